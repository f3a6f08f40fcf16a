# SPDX-License-Identifier: Apache-2.0
"""What the kernel would check, block by block, and beyond it: every block, padding included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from verity.errors import VerificationFailed
from verity.hasher import block_digests
from verity.params import DIGEST_BYTES
from verity.tree import Geometry

ReadAt = Callable[[int, int], bytes]  # (offset, size) in bytes → at most size bytes
_CHUNK_BYTES: Final = 1 << 20


def verify_all(read_at: ReadAt, geometry: Geometry, root_hash: bytes) -> None:
    """Check the whole tree, top down, then all data. The tree starts right after the data.

    Raises VerificationFailed naming the first bad block: the top of the tree first, data last.
    """
    params = geometry.params
    tree = geometry.data_size_bytes
    expected = root_hash
    for depth, (offset, blocks) in enumerate(geometry.levels):
        name = f"hash block of level {len(geometry.levels) - 1 - depth}"
        below = geometry.levels[depth + 1][1] if depth + 1 < len(geometry.levels) else geometry.data_blocks
        content = bytearray()
        for start in range(0, blocks * params.hash_block_bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, blocks * params.hash_block_bytes - start)
            piece = _exactly(read_at, tree + offset + start, size)
            first = start // params.hash_block_bytes
            _compare(piece, params.hash_block_bytes, params.salt, expected, name, first=first)
            content += piece
        if any(content[below * DIGEST_BYTES :]):
            raise VerificationFailed(f"{name}: bytes behind its {below} digests are not zero")
        expected = bytes(content[: below * DIGEST_BYTES])
    for start in range(0, geometry.data_size_bytes, _CHUNK_BYTES):
        piece = _exactly(read_at, start, min(_CHUNK_BYTES, geometry.data_size_bytes - start))
        first = start // params.data_block_bytes
        _compare(piece, params.data_block_bytes, params.salt, expected, "data block", first=first)


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
        _compare(piece, params.hash_block_bytes, params.salt, expected, f"hash block of level {above}", named=block)
        expected = piece[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES]
    data = _exactly(read_at, index * params.data_block_bytes, params.data_block_bytes)
    _compare(data, params.data_block_bytes, params.salt, expected, "data block", named=index)
    return data


def _exactly(read_at: ReadAt, offset: int, size: int) -> bytes:
    data = read_at(offset, size)
    if len(data) != size:
        raise VerificationFailed(f"file ends at byte {offset + len(data)}, before the {offset + size} of its geometry")
    return data


def _compare(
    data: bytes, block_bytes: int, salt: bytes, expected: bytes, what: str, *, first: int = 0, named: int | None = None
) -> None:
    """`expected` holds digests of a level, those of `data` from `first` on; `named` is the block's own number."""
    digests = block_digests(data, block_bytes, salt)
    wanted = expected[first * DIGEST_BYTES : first * DIGEST_BYTES + len(digests)]
    if digests == wanted:
        return
    for number in range(len(digests) // DIGEST_BYTES):
        part = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
        if digests[part] != wanted[part]:
            block = first + number if named is None else named
            raise VerificationFailed(f"{what} {block} does not have the digest that the tree names")
