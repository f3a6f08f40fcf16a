# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import threading
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verity import hasher, verify
from verity.errors import VerificationFailed, VerityError
from verity.hasher import LeafHasher, LeafStore, StreamHash, block_digests, leaf_digests
from verity.params import BLOCK_BYTES, Params
from verity.tree import Geometry, HashTree, write_tree

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
    with pytest.raises(ValueError):
        hasher._leafhash.Stream("abacus")
    stream = hasher._leafhash.Stream("portable-c")
    stream.update(b"before")
    for rest in ((bytes(511), 512, b""), (bytes(512), 512, bytes(64)), (bytes(8192), 8192, b""), (bytes(512), 0, b"")):
        with pytest.raises(ValueError):
            stream.update_with_leaves(b"refused", *rest)
    with pytest.raises(TypeError):
        stream.update("text")  # type: ignore[arg-type]
    assert stream.digest() == hashlib.sha256(b"before").digest()


@given(
    lengths=st.lists(st.one_of(st.integers(0, 200), st.integers(0, 40_000)), max_size=6),
    blocks=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    block_bytes=sizes,
    salt=st.one_of(st.just(bytes(32)), st.binary(max_size=70)),
)
def test_a_stream_and_leaves_in_one_are_the_two_apart(
    lengths: list[int], blocks: list[int], block_bytes: int, salt: bytes
) -> None:
    """Also where the leaves are none of the stream's bytes, fewer, or more than pass beside it."""
    for implementation in IMPLEMENTATIONS:
        stream, expected = StreamHash(implementation), hashlib.sha256()
        for number, length in enumerate(lengths):
            data = hashlib.shake_128(b"%d" % number).digest(length)
            leaves = hashlib.shake_128(b"leaves %d" % number).digest(blocks[number] * block_bytes)
            before = stream.copy()
            digests = stream.update_with_leaves(data, leaves, block_bytes, salt)
            assert digests == block_digests(leaves, block_bytes, salt, "hashlib")
            assert before.digest() == expected.digest()
            expected.update(data)
            before.update(data)
            assert before.digest() == stream.digest() == expected.digest()
            assert stream.hexdigest() == expected.hexdigest()
        with pytest.raises(VerityError):
            stream.update_with_leaves(b"refused", bytes(block_bytes + 1), block_bytes, salt)
        assert stream.digest() == expected.digest()


def test_a_stream_of_any_length_is_sha256() -> None:
    data = hashlib.shake_128(b"stream").digest(260)
    for implementation in IMPLEMENTATIONS:
        for length in range(len(data)):
            stream = StreamHash(implementation)
            stream.update(data[: length // 3])
            stream.update(memoryview(data)[length // 3 : length])
            assert stream.digest() == hashlib.sha256(data[:length]).digest()
    with pytest.raises(ValueError):
        StreamHash("abacus")


@given(
    cuts=st.lists(st.integers(0, 20_000), max_size=10),
    block_bytes=sizes,
    beside=st.lists(st.booleans(), min_size=11, max_size=11),
)
def test_blocks_are_hashed_wherever_pieces_end(cuts: list[int], block_bytes: int, beside: list[bool]) -> None:
    """Some pieces go into the stream, too, some (padding, metadata) are leaves alone."""
    data = hashlib.shake_128(b"pieces").digest(20_000)
    params = Params(block_bytes, 4096)
    for implementation in IMPLEMENTATIONS:
        stream, expected = StreamHash(implementation), hashlib.sha256()
        leaves, digests, start = LeafHasher(params), b"", 0
        for end, with_stream in zip([*sorted(cuts), len(data)], beside, strict=False):
            piece = bytearray(data[start:end])
            digests += leaves.update(piece, stream if with_stream else None)
            if with_stream:
                expected.update(piece)
            piece[:] = bytes(len(piece))  # pieces are not kept
            start = end
        assert digests == leaf_digests(data[: len(data) - len(data) % block_bytes], params)
        assert stream.digest() == expected.digest()


@pytest.mark.skipif(not hasher.ONE_PASS, reason="hashlib locks on its own")
def test_a_stream_under_an_update_refuses_a_second() -> None:
    """What two threads do at once has no order; no digest comes of it."""
    data = bytes(16 << 20)
    stream, expected, refused = StreamHash(), hashlib.sha256(), False
    while not refused:  # until this thread is quick enough to find the other at work
        thread = threading.Thread(target=stream.update, args=(data,))
        thread.start()
        try:
            while thread.is_alive():
                stream.digest()
        except RuntimeError as error:
            refused = "another thread" in str(error)
        thread.join()
        expected.update(data)
    assert stream.digest() == expected.digest()


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


@given(
    data=st.data(),
    there=st.integers(0, 300),
    pieces=st.lists(st.integers(0, 300), max_size=6),
    hash_block=sizes,
    threshold=st.sampled_from([64, 5000, 1 << 20]),
)
def test_a_tree_that_grows_is_the_tree_of_the_whole(
    data: st.DataObject, there: int, pieces: list[int], hash_block: int, threshold: int
) -> None:
    """Whatever was replaced between: in full hash blocks, in the one that is filled, across both."""
    params = Params(512, hash_block)
    expected = bytearray(hashlib.shake_128(b"there").digest(32 * there))
    store, out = LeafStore(threshold_bytes=threshold), io.BytesIO()
    try:
        store.append(bytes(expected))
        tree = HashTree(store, params)
        for number, count in enumerate(pieces):
            piece = hashlib.shake_128(b"%d" % number).digest(32 * count)
            tree.append(piece)
            expected += piece
            if expected:
                index = data.draw(st.integers(0, len(expected) // 32 - 1))
                count = data.draw(st.integers(0, len(expected) // 32 - index))
                tree.replace(index, bytes([number]) * 32 * count)
                expected[32 * index : 32 * (index + count)] = bytes([number]) * 32 * count
        with pytest.raises(VerityError):
            tree.replace(len(store), bytes(32))
        if not expected:
            with pytest.raises(VerityError):
                tree.write(out.write)
            return
        for _ in range(2):  # writing takes nothing away
            out.seek(0)
            assert (tree.write(out.write), out.getvalue()) == naive_tree(bytes(expected), params)[::-1]
    finally:
        store.close()


def first_bad(file: bytes, geometry: Geometry, root: bytes, piece: int) -> tuple[str, int | None, int, int] | None:
    """The documented order, block by block: upper levels, then `piece` blocks of level 0 and the data below them."""
    params = geometry.params
    areas = [
        ("hash", len(geometry.levels) - 1 - depth, geometry.data_size_bytes + start, params.hash_block_bytes, count)
        for depth, (start, count) in enumerate(geometry.levels)
    ]
    areas.append(("data", None, 0, params.data_block_bytes, geometry.data_blocks))  # type: ignore[arg-type]

    def bad(depth: int, first: int, last: int) -> tuple[str, int | None, int, int] | None:
        kind, level, start, size, count = areas[depth]
        for block in range(first, min(last, count)):
            at = start + block * size
            if depth:
                above = areas[depth - 1][2] + 32 * block
                expected = file[above : above + 32]
            else:
                expected = root
            if hashlib.sha256(params.salt + file[at : at + size]).digest() != expected:
                return kind, level, block, at
        return None

    for depth in range(len(areas) - 2):
        if found := bad(depth, 0, areas[depth][4]):
            return found
    if len(areas) == 1:
        return bad(0, 0, 1)
    per_block, leaves = params.digests_per_block, len(areas) - 2
    for first in range(0, areas[leaves][4], piece):
        found = bad(leaves, first, first + piece) or bad(leaves + 1, first * per_block, (first + piece) * per_block)
        if found:
            return found
    return None


@given(
    data=st.data(),
    blocks=st.integers(1, 400),
    params=st.sampled_from([Params(512, 512), Params(512, 4096, b"salt"), Params(4096, 512), Params(1024, 2048, b"")]),
    piece=st.integers(1, 5),
    threads=st.integers(1, 4),
)
def test_verification_names_what_the_definition_names(
    data: st.DataObject, blocks: int, params: Params, piece: int, threads: int
) -> None:
    content = hashlib.shake_128(b"content").digest(blocks * params.data_block_bytes)
    tree, root = naive_tree(leaf_digests(content, params), params)
    geometry, file = Geometry(blocks, params), bytearray(content + tree)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.one_of(st.integers(0, len(file) - 1), st.integers(max(0, len(file) - 9000), len(file) - 1)))
        file[at] ^= data.draw(st.integers(1, 255))
    expected = first_bad(bytes(file), geometry, root, piece)
    size = piece * params.digests_per_block * params.data_block_bytes
    failure: VerificationFailed | None = None
    with mock.patch.object(verify, "_PIECE_BYTES", size):
        try:
            verify.verify_all(lambda at, count: bytes(file[at : at + count]), geometry, root, threads=threads)
        except VerificationFailed as error:
            failure = error
    if failure is None:
        assert expected is None
    else:
        assert (failure.kind, failure.level, failure.block, failure.offset_bytes) == expected
        assert f" {failure.block} does not have the digest" in str(failure)
