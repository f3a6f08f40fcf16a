# SPDX-License-Identifier: Apache-2.0
"""tarfs layer files as Microsoft's tools make them: a change here means that their policies refuse the layer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import BlockdevError
from blockdev.formats.layer_file import FORMATS, open_layer_file
from blockdev.formats.layer_reader import index_reader
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.formats.limits import Limits
from tests.golden import make_tars
from verity import veritysetup
from verity.hasher import LeafStore
from verity.verify import verify_all

# Microsoft's tools made the first; for the second two implementations here had to agree, which share no code.
FILES = ("tarfs.json", "tarfs-more.json")
VECTORS: list[dict[str, Any]] = [
    vector for file in FILES for vector in json.loads((Path(__file__).parent / file).read_text())["vectors"]
]
SOUND = [vector for vector in VECTORS if "refused" not in vector]
VARIANTS = {
    "tarfs": "root_hash",
    "tarfs-genpolicy": "root_hash_genpolicy",
    "tarfs-genpolicy-upstream": "root_hash_genpolicy_upstream",
}


def build(tar: bytes, layer_format: str = "tarfs", piece_bytes: int = 1 << 20) -> tuple[BuiltLayer, bytes]:
    out = bytearray()
    leaves = LeafStore()
    writer = LayerWriter(
        FORMATS[layer_format],
        write=out.extend,
        write_head=lambda head: pytest.fail("tarfs has no head"),
        leaves=leaves,
        limits=Limits(),
        read_back=lambda offset, size: bytes(out[offset : offset + size]),
    )
    for at in range(0, len(tar), piece_bytes):
        writer.feed(tar[at : at + piece_bytes])
    built = writer.finish(hashlib.sha256(tar).digest())
    leaves.close()
    return built, bytes(out)


@pytest.mark.parametrize("layer_format", VARIANTS)
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_vector(vector: dict[str, Any], layer_format: str) -> None:
    tar = make_tars.CASES[vector["name"]]()
    assert hashlib.sha256(tar).hexdigest() == vector["tar_sha256"], "the generator changed"
    if "refused" in vector:
        with pytest.raises(BlockdevError):
            build(tar, layer_format)
        return
    built, file = build(tar, layer_format)
    assert built.root_hash.hex() == vector[VARIANTS[layer_format]]
    if layer_format == "tarfs":
        assert built.data_size_bytes == vector["data_size"]
        assert len(file) == built.file_size_bytes == vector["file_size"]
        assert hashlib.sha256(file).hexdigest() == vector["file_sha256"]


def test_each_tar_has_a_vector() -> None:
    names = [vector["name"] for vector in VECTORS]
    assert sorted(names) == sorted(make_tars.CASES)


@pytest.mark.parametrize("vector", SOUND, ids=lambda vector: str(vector["name"]))
def test_a_vectors_file_opens_verifies_and_gives_its_tar_back(vector: dict[str, Any]) -> None:
    tar = make_tars.CASES[vector["name"]]()
    built, file = build(tar)

    def read_at(offset: int, size: int) -> bytes:
        return file[offset : offset + size]

    layer = open_layer_file(read_at, len(file))
    assert (layer.format.name, layer.entries, layer.file_size_bytes) == ("tarfs", built.entries, len(file))
    assert file[: layer.tar_size_bytes] == tar
    assert sum(region.size_bytes for region in layer.regions()) == len(file)
    verify_all(read_at, layer.geometry, built.root_hash)
    assert next(iter(index_reader(layer, read_at).walk())).path == b""


@pytest.mark.tool
@pytest.mark.parametrize("vector", SOUND, ids=lambda vector: str(vector["name"]))
def test_veritysetup_accepts_a_vectors_file(vector: dict[str, Any], tmp_path: Path) -> None:
    built, file = build(make_tars.CASES[vector["name"]]())
    path = tmp_path / "layer.img"
    path.write_bytes(file)
    layer = open_layer_file(lambda offset, size: file[offset : offset + size], len(file))
    veritysetup.verify(str(path), layer.geometry, built.root_hash)


@pytest.mark.parametrize("piece_bytes", [1, 13, 511, 4097])
@pytest.mark.parametrize("name", ["plain", "special-link-overwritten", "pax-sparse-1-0", "gnu-sparse", "pax-odd"])
def test_the_size_of_reads_does_not_matter(name: str, piece_bytes: int) -> None:
    tar = make_tars.CASES[name]()
    assert build(tar, "tarfs", piece_bytes) == build(tar)
