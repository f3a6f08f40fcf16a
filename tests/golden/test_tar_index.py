# SPDX-License-Identifier: Apache-2.0
"""Frozen layer files of the tar-index format: a change here means that signed policies refuse the layer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import BlockdevError
from blockdev.formats.layer_writer import BuiltLayer
from tests.chains import make
from tests.golden import make_tars, more_tars

HERE = Path(__file__).parent
FIRST: list[dict[str, Any]] = json.loads((HERE / "tar-index.json").read_text())["vectors"]
MORE: list[dict[str, Any]] = json.loads((HERE / "tar-index-more.json").read_text())["vectors"]
VECTORS = FIRST + MORE
CASES = make_tars.CASES | more_tars.CASES


def tar_of(name: str) -> bytes:
    return bytes(CASES[name]())


def test_every_case_has_one_vector() -> None:
    """Or a refusal; and no vector is without a case."""
    assert sorted(vector["name"] for vector in VECTORS) == sorted(CASES)
    assert len(CASES) == len(make_tars.CASES) + len(more_tars.CASES)
    keys = {"data_size", "inodes", "root_hash", "file_sha256", "file_size"}
    assert all("refused" in vector or keys <= vector.keys() for vector in VECTORS)


def build(tar: bytes, piece_bytes: int = 1 << 20) -> tuple[BuiltLayer, bytes]:
    made = make(tar, piece_bytes=piece_bytes)
    return made.built, made.file


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_vector(vector: dict[str, Any]) -> None:
    tar = tar_of(vector["name"])
    assert hashlib.sha256(tar).hexdigest() == vector["tar_sha256"], "the generator changed"
    if "refused" in vector:
        with pytest.raises(BlockdevError):
            build(tar)
        return
    built, file = build(tar)
    assert built.entries == vector["inodes"]
    assert built.data_size_bytes == vector["data_size"]
    assert built.root_hash.hex() == vector["root_hash"]
    assert len(file) == built.file_size_bytes == vector["file_size"]
    assert hashlib.sha256(file).hexdigest() == vector["file_sha256"]


@pytest.mark.parametrize("piece_bytes", [1, 511, 513, 4096])
@pytest.mark.parametrize("name", ["ti-names", "xattrs", "pax-long", "sizes", "unpadded-last", "hardlinks"])
def test_the_size_of_reads_does_not_matter(name: str, piece_bytes: int) -> None:
    tar = make_tars.CASES[name]()
    assert build(tar, piece_bytes) == build(tar)
