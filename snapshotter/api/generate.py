# SPDX-License-Identifier: Apache-2.0
"""Write the Python code of the .proto files beside them: `./dev generate`."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Final

_PROTO: Final = Path(__file__).parent / "proto"


def generate(out: Path) -> None:
    """Into `out`, as the tree snapshotter/api/proto. Raises RuntimeError."""
    from grpc_tools import protoc  # a development dependency

    root = _PROTO.parent.parent.parent
    sources = [str(path.relative_to(root)) for path in sorted(_PROTO.glob("*.proto"))]
    builtin = str(files("grpc_tools") / "_proto")
    where = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", f"-I{root}", f"-I{builtin}", *where, *sources]):
        raise RuntimeError("protoc failed")
    for path in (out / "snapshotter/api/proto").glob("*_grpc.py"):
        # Files of messages only get an empty one.
        if "class " not in path.read_text():
            path.unlink()


if __name__ == "__main__":
    generate(_PROTO.parent.parent.parent)
    sys.stdout.write(f"written below {_PROTO}\n")
