# SPDX-License-Identifier: Apache-2.0
"""Write the Python code of .proto files beside them: `./dev generate`."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]
_PROTO: Final = Path(__file__).parent / "proto"


def generate(out: Path, directory: Path = _PROTO) -> None:
    """The code of a directory of this checkout, into the same directory below `out`. Raises RuntimeError."""
    from grpc_tools import protoc  # a development dependency

    sources = [str(path.relative_to(_ROOT)) for path in sorted(directory.glob("*.proto"))]
    builtin = str(files("grpc_tools") / "_proto")
    where = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", f"-I{_ROOT}", f"-I{builtin}", *where, *sources]):
        raise RuntimeError("protoc failed")
    for path in (out / directory.relative_to(_ROOT)).glob("*_grpc.py"):
        # Files of messages only get an empty one.
        if "class " not in path.read_text():
            path.unlink()


if __name__ == "__main__":
    for given in map(Path.absolute, map(Path, sys.argv[1:] or [_PROTO])):
        generate(_ROOT, given)
        sys.stdout.write(f"written below {given}\n")
