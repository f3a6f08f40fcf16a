# SPDX-License-Identifier: Apache-2.0
"""Every golden layer file gives back its tar bit for bit, and says so by the diff ID."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.formats.layer_writer import BuiltLayer
from snapshotter.cli import layer as cli_layer
from tests.chains import make
from tests.golden import make_tars, more_tars, test_erofs_4k, test_tar_index, test_tarfs


def build_4k(tar: bytes) -> tuple[BuiltLayer, bytes]:
    made = make(tar, "erofs-4k")
    return made.built, made.file


BUILDS: dict[str, Callable[[bytes], tuple[BuiltLayer, bytes]]] = {
    "tar-index": test_tar_index.build,
    "erofs-4k": build_4k,
    "tarfs": test_tarfs.build,
}
CASES = [
    pytest.param(layer_format, vector["name"], id=f"{layer_format}-{vector['name']}")
    for layer_format, vectors in (
        ("tar-index", test_tar_index.VECTORS),
        ("erofs-4k", test_erofs_4k.VECTORS),
        ("tarfs", test_tarfs.VECTORS),
    )
    for vector in vectors
    if "refused" not in vector
]


@pytest.mark.parametrize(("layer_format", "name"), CASES)
def test_a_golden_layer_file_gives_its_tar_back(tmp_path: Path, layer_format: str, name: str) -> None:
    tar = bytes((make_tars.CASES | more_tars.CASES)[name]())
    built, data = BUILDS[layer_format](tar)
    (tmp_path / "layer").write_bytes(data)
    diff_id = "sha256:" + hashlib.sha256(tar).hexdigest()
    record = cli_layer.tar(tmp_path / "layer", tmp_path / "tar", diff_id=diff_id)
    assert (tmp_path / "tar").read_bytes() == tar
    assert record == {"diff_id": diff_id, "tar_size_bytes": len(tar), "checked": True}
    checked = cli_layer.verify(
        tmp_path / "layer", built.root_hash.hex(), format=layer_format, diff_id=diff_id
    )  # fmt: skip
    assert checked["verified"] is True
