# SPDX-License-Identifier: Apache-2.0
"""Frozen layer files of the erofs-4k format, and what a reader that knows nothing but the document finds in them."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import pytest

from blockdev.errors import BlockdevError
from tests.chains import make
from tests.golden import test_tar_index
from tests.golden.make_vectors import EROFS_4K, known
from tests.golden.test_tar_index import tar_of
from tests.property import reference
from tests.property.second_reader import LayerFile

VECTORS: Final = list(known(EROFS_4K).values())
TAKEN: Final = [vector for vector in VECTORS if "refused" not in vector]
PIECES: Final = ["sizes", "unpadded-last", "pax-long", "ek-the-rest", "ek-ends-with-data", "ek-tails-that-no-file-has"]


def parametrized(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=lambda vector: str(vector["name"]))


def test_the_same_tars_are_refused_as_in_tar_index() -> None:
    """And every case has one vector."""
    assert {vector["name"]: "refused" in vector for vector in VECTORS} == {
        vector["name"]: "refused" in vector for vector in test_tar_index.VECTORS
    }


@parametrized(VECTORS)
def test_vector(vector: dict[str, Any]) -> None:
    tar = tar_of(vector["name"])
    assert hashlib.sha256(tar).hexdigest() == vector["tar_sha256"], "the generator changed"
    if "refused" in vector:
        with pytest.raises(BlockdevError):
            make(tar, "erofs-4k")
        return
    made = make(tar, "erofs-4k")
    assert made.built.entries == vector["inodes"]
    assert made.built.data_size_bytes == vector["data_size"]
    assert made.built.root_hash.hex() == vector["root_hash"]
    assert len(made.file) == made.built.file_size_bytes == vector["file_size"]
    assert hashlib.sha256(made.file).hexdigest() == vector["file_sha256"]


@parametrized(TAKEN)
def test_another_reader_finds_tree_and_tar(vector: dict[str, Any]) -> None:
    tar = tar_of(vector["name"])
    root = reference.read_tar(tar)
    counts, inodes = reference.link_counts(root), dict[int, reference.Node]()
    layer = LayerFile(make(tar, "erofs-4k").file)
    assert layer.diff_id == hashlib.sha256(layer.tar()).digest() == hashlib.sha256(tar).digest()
    found, nodes = layer.tree(), reference.flat(root)
    assert found.keys() == nodes.keys()
    for path, node in nodes.items():
        seen = found[path]
        assert inodes.setdefault(seen.nid, node) is node
        assert (seen.mode, seen.owner, seen.mtime) == (
            reference.FORMAT_BITS[node.kind] | node.mode, (node.uid, node.gid), node.mtime,
        ), path  # fmt: skip
        assert (seen.links, seen.device, seen.xattrs) == (
            counts[id(node)],
            node.rdev,
            tuple(sorted(node.xattrs.items())),
        )
        assert node.kind == "directory" or seen.content == (node.target or node.data), path


@pytest.mark.parametrize("piece_bytes", [1, 511, 513, 4096])
@pytest.mark.parametrize("name", PIECES)
def test_the_size_of_reads_does_not_matter(name: str, piece_bytes: int) -> None:
    assert make(tar_of(name), "erofs-4k", piece_bytes).file == make(tar_of(name), "erofs-4k").file
