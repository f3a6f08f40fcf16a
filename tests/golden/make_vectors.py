# SPDX-License-Identifier: Apache-2.0
"""Vectors of tar-index-more.json, by the model that was written from the document; the engine has no part in it.

usage: python -m tests.golden.make_vectors   -> adds those that are missing; what is there is never changed
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from tests.golden import make_tars, more_tars
from tests.property import reference

HERE: Final = Path(__file__).parent
MORE: Final = HERE / "tar-index-more.json"
ABOUT: Final = (
    "tar-index v1 layer files, like tar-index.json, for the cases that it does not have; tars come from make_tars.py "
    "and more_tars.py; written by tests/property/reference.py; test_kernel_view.py holds them against the kernel, "
    '"fsck.erofs" and "veritysetup"; "refused" gives the reason in the words of the model'
)


def known(path: Path) -> dict[str, dict[str, Any]]:
    vectors = json.loads(path.read_text())["vectors"] if path.exists() else []
    return {vector["name"]: vector for vector in vectors}


def vector_of(name: str, tar: bytes) -> dict[str, Any]:
    vector: dict[str, Any] = {"name": name, "tar_sha256": hashlib.sha256(tar).hexdigest(), "tar_size": len(tar)}
    try:
        layer = reference.layer_file(tar)
    except reference.Refused as refused:
        return {**vector, "refused": str(refused)}
    return {
        **vector,
        "data_size": layer.data_size,
        "inodes": layer.inodes,
        "root_hash": layer.root_hash.hex(),
        "file_sha256": hashlib.sha256(layer.file).hexdigest(),
        "file_size": len(layer.file),
    }


def main() -> None:
    first, more = known(HERE / "tar-index.json"), known(MORE)
    for name, make in (make_tars.CASES | more_tars.CASES).items():
        if name not in first and name not in more:
            more[name] = vector_of(name, bytes(make()))
    MORE.write_text(json.dumps({"about": ABOUT, "vectors": list(more.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
