# SPDX-License-Identifier: Apache-2.0
"""Vectors of tar-index-more.json and erofs-4k.json, by the model of the document; the engine has no part in it.

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
EROFS_4K: Final = HERE / "erofs-4k.json"
ABOUT: Final = (
    "tar-index v1 layer files, like tar-index.json, for the cases that it does not have; tars come from make_tars.py "
    "and more_tars.py; written by tests/property/reference.py; test_kernel_view.py holds them against the kernel, "
    '"fsck.erofs" and "veritysetup"; "refused" gives the reason in the words of the model'
)
ABOUT_4K: Final = (
    "erofs-4k v1 layer files of the same tars as those of tar-index.json and tar-index-more.json; written by "
    'tests/property/reference.py; test_kernel_view.py holds them against the kernel, "fsck.erofs" and "veritysetup"'
)


def known(path: Path) -> dict[str, dict[str, Any]]:
    vectors = json.loads(path.read_text())["vectors"] if path.exists() else []
    return {vector["name"]: vector for vector in vectors}


def vector_of(name: str, tar: bytes, layer_format: str) -> dict[str, Any]:
    vector: dict[str, Any] = {"name": name, "tar_sha256": hashlib.sha256(tar).hexdigest(), "tar_size": len(tar)}
    try:
        layer = reference.layer_file(tar, layer_format)
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
    first, more, in_4k = known(HERE / "tar-index.json"), known(MORE), known(EROFS_4K)
    for name, make in (make_tars.CASES | more_tars.CASES).items():
        if name not in first and name not in more:
            more[name] = vector_of(name, bytes(make()), "tar-index")
        if name not in in_4k:
            in_4k[name] = vector_of(name, bytes(make()), "erofs-4k")
    for path, about, vectors in ((MORE, ABOUT, more), (EROFS_4K, ABOUT_4K, in_4k)):
        path.write_text(json.dumps({"about": about, "vectors": list(vectors.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
