# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verity import hasher
from verity.errors import VerityError
from verity.hasher import LeafStore, block_digests
from verity.params import BLOCK_BYTES, Params
from verity.tree import Geometry, write_tree

IMPLEMENTATIONS = [*(hasher._leafhash.IMPLEMENTATIONS if hasher._leafhash else ()), "hashlib"]
sizes = st.sampled_from(BLOCK_BYTES)


@given(block_bytes=sizes, blocks=st.integers(0, 9), salt=st.binary(max_size=256), seed=st.binary(min_size=1))
def test_implementations_agree(block_bytes: int, blocks: int, salt: bytes, seed: bytes) -> None:
    data = hashlib.shake_128(seed).digest(block_bytes * blocks)
    plain = b"".join(
        hashlib.sha256(salt + data[i : i + block_bytes]).digest() for i in range(0, len(data), block_bytes)
    )
    for implementation in IMPLEMENTATIONS:
        assert block_digests(data, block_bytes, salt, implementation) == plain


@pytest.mark.skipif(hasher._leafhash is None, reason="the C extension is not built")
def test_the_extension_refuses_what_it_cannot_do() -> None:
    assert hasher._leafhash is not None
    for arguments in ((bytes(512), 100, b"", "portable-c"), (bytes(512), 512, bytes(64), "portable-c"),
                      (bytes(511), 512, b"", "portable-c"), (bytes(512), 512, b"", "abacus"),
                      (bytes(512), 0, b"", "portable-c"), (bytes(512), -512, b"", "portable-c")):  # fmt: skip
        with pytest.raises(ValueError):
            hasher._leafhash.digests(*arguments)
    with pytest.raises(VerityError):
        block_digests(bytes(511), 512, b"")


@given(
    data=st.data(),
    pieces=st.lists(st.integers(0, 40), max_size=12),
    threshold=st.sampled_from([1, 64, 100, 1 << 20]),
    chunk=st.integers(1, 50),
)
def test_a_spooled_store_is_a_list(data: st.DataObject, pieces: list[int], threshold: int, chunk: int) -> None:
    store, expected = LeafStore(threshold_bytes=threshold), b""
    try:
        for number, count in enumerate(pieces):
            piece = hashlib.shake_128(b"%d" % number).digest(32 * count)
            store.append(piece)
            expected += piece
        if expected:
            index = data.draw(st.integers(0, len(expected) // 32 - 1))
            count = data.draw(st.integers(1, min(9, len(expected) // 32 - index)))
            store.replace(index, b"r" * 32 * count)
            expected = expected[: 32 * index] + b"r" * 32 * count + expected[32 * (index + count) :]
        with pytest.raises(VerityError):
            store.replace(len(store), bytes(32))
        assert len(store) == len(expected) // 32
        assert b"".join(store.chunks(chunk)) == expected
    finally:
        store.close()


def naive_tree(digests: bytes, params: Params) -> tuple[bytes, bytes]:
    tree = b""
    while len(digests) > 32:
        level = digests + bytes(-len(digests) % params.hash_block_bytes)
        tree = level + tree
        size = params.hash_block_bytes
        digests = b"".join(
            hashlib.sha256(params.salt + level[i : i + size]).digest() for i in range(0, len(level), size)
        )
    return tree, digests


@given(blocks=st.integers(1, 700), hash_block=sizes, threshold=st.sampled_from([64, 1 << 20]))
def test_the_tree_is_the_definition(blocks: int, hash_block: int, threshold: int) -> None:
    params = Params(512, hash_block)
    digests = hashlib.shake_128(b"%d" % blocks).digest(32 * blocks)
    store, out = LeafStore(threshold_bytes=threshold), io.BytesIO()
    try:
        store.append(digests)
        root = write_tree(store, params, out.write)
    finally:
        store.close()
    assert (out.getvalue(), root) == naive_tree(digests, params)
    assert len(out.getvalue()) == Geometry(blocks, params).tree_size_bytes
