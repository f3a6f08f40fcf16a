# SPDX-License-Identifier: Apache-2.0
"""What the kernel would check, block by block, and beyond it: every block, padding included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from verity.errors import VerificationFailed
from verity.hasher import block_digests
from verity.params import DIGEST_BYTES
from verity.tree import Geometry

ReadAt = Callable[[int, int], bytes]  # (offset, size) in bytes → at most size bytes
_CHUNK_BYTES: Final = 1 << 20


def verify_all(read_at: ReadAt, geometry: Geometry, root_hash: bytes) -> None:
    """Check the whole tree, top down, and all data. The tree starts right after the data.

    Raises VerificationFailed naming the first bad block: upper levels first, then each piece of
    level 0 before the data below it. Memory: the upper levels, 1/128 of level 0.
    """
    expected = root_hash
    for depth in range(len(geometry.levels) - 1):
        pieces = [piece for _, piece in _hash_blocks(read_at, geometry, depth, expected)]
        expected = b"".join(pieces)
    if not geometry.levels:
        _verify_data(read_at, geometry, expected, 0)
        return
    for first, digests in _hash_blocks(read_at, geometry, len(geometry.levels) - 1, expected):
        _verify_data(read_at, geometry, digests, first * geometry.params.digests_per_block)


def _hash_blocks(read_at: ReadAt, geometry: Geometry, depth: int, expected: bytes) -> Iterator[tuple[int, bytes]]:
    """(number of the first block, digests of the level below) piece by piece; `expected`: the digests of this level."""
    params = geometry.params
    offset, blocks = geometry.levels[depth]
    last = depth + 1 == len(geometry.levels)
    below = geometry.data_blocks if last else geometry.levels[depth + 1][1]
    name = f"hash block of level {len(geometry.levels) - 1 - depth}"
    chunk = _CHUNK_BYTES // params.hash_block_bytes
    for first in range(0, blocks, chunk):
        count = min(chunk, blocks - first)
        start = geometry.data_size_bytes + offset + first * params.hash_block_bytes
        piece = _exactly(read_at, start, count * params.hash_block_bytes)
        above = expected[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
        _compare(piece, params.hash_block_bytes, params.salt, above, name, first)
        used = (below - first * params.digests_per_block) * DIGEST_BYTES
        if any(piece[used:]):
            raise VerificationFailed(f"{name}: bytes behind its {below} digests are not zero")
        yield first, piece[:used]


def _verify_data(read_at: ReadAt, geometry: Geometry, digests: bytes, first: int) -> None:
    """The data blocks from `first` on that have these digests."""
    params = geometry.params
    chunk = _CHUNK_BYTES // params.data_block_bytes
    for at in range(0, len(digests) // DIGEST_BYTES, chunk):
        expected = digests[at * DIGEST_BYTES : (at + chunk) * DIGEST_BYTES]
        size = len(expected) // DIGEST_BYTES * params.data_block_bytes
        piece = _exactly(read_at, (first + at) * params.data_block_bytes, size)
        _compare(piece, params.data_block_bytes, params.salt, expected, "data block", first + at)


def read_verified(read_at: ReadAt, geometry: Geometry, root_hash: bytes, index: int) -> bytes:
    """One data block, with the path of hash blocks above it, checked from the root as the kernel does.

    Raises VerificationFailed; IndexError for a block that the geometry does not have.
    """
    if not 0 <= index < geometry.data_blocks:
        raise IndexError(f"no data block {index}: there are {geometry.data_blocks}")
    params = geometry.params
    expected = root_hash
    for depth, (offset, _) in enumerate(geometry.levels):
        above = len(geometry.levels) - 1 - depth
        position = index // params.digests_per_block**above
        block, slot = divmod(position, params.digests_per_block)
        start = geometry.data_size_bytes + offset + block * params.hash_block_bytes
        piece = _exactly(read_at, start, params.hash_block_bytes)
        _compare(piece, params.hash_block_bytes, params.salt, expected, f"hash block of level {above}", block)
        expected = piece[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES]
    data = _exactly(read_at, index * params.data_block_bytes, params.data_block_bytes)
    _compare(data, params.data_block_bytes, params.salt, expected, "data block", index)
    return data


def _exactly(read_at: ReadAt, offset: int, size: int) -> bytes:
    data = read_at(offset, size)
    if len(data) != size:
        raise VerificationFailed(f"file ends at byte {offset + len(data)}, before the {offset + size} of its geometry")
    return data


def _compare(data: bytes, block_bytes: int, salt: bytes, expected: bytes, what: str, first: int) -> None:
    """`expected`: the digests of the blocks of `data`; `first`: the number of the first of them."""
    digests = block_digests(data, block_bytes, salt)
    if digests == expected:
        return
    for number in range(len(digests) // DIGEST_BYTES):
        part = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
        if digests[part] != expected[part]:
            raise VerificationFailed(f"{what} {first + number} does not have the digest that the tree names")
