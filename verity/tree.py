# SPDX-License-Identifier: Apache-2.0
"""The dm-verity hash tree: its shape, and writing it (Linux: drivers/md/dm-verity-target.c).

Level 0 hashes the data blocks, each next level the hash blocks of the one before, until one block is
left; the root hash is that block's digest. A single data block has no tree: its digest is the root.
On disk the top level comes first, level 0 last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from verity.buffers import Buffer
from verity.errors import VerityError
from verity.hasher import LeafStore, block_digests
from verity.params import DIGEST_BYTES, Params

_CHUNK_BLOCKS: Final = 256


@dataclass(frozen=True, slots=True)
class Geometry:
    """`levels`: (byte offset from the start of the tree, hash blocks), top level first.

    Raises VerityError without data blocks.
    """

    data_blocks: int
    params: Params
    levels: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.data_blocks < 1:
            raise VerityError("a tree needs at least one data block")
        counts = []
        blocks = self.data_blocks
        while blocks > 1:
            blocks = -(-blocks // self.params.digests_per_block)
            counts.append(blocks)
        levels, offset = [], 0
        for count in reversed(counts):
            levels.append((offset, count))
            offset += count * self.params.hash_block_bytes
        object.__setattr__(self, "levels", tuple(levels))

    @property
    def tree_size_bytes(self) -> int:
        return sum(count for _, count in self.levels) * self.params.hash_block_bytes

    @property
    def data_size_bytes(self) -> int:
        return self.data_blocks * self.params.data_block_bytes


def write_tree(leaves: LeafStore, params: Params, write: Callable[[Buffer], object]) -> bytes:
    """Write the tree over `leaves` through `write` in file order; the raw root hash.

    Memory: all levels but the last, 1/128 of the leaves with 4096-byte hash blocks.
    """
    geometry = Geometry(len(leaves), params)
    size = params.hash_block_bytes
    chunk = _CHUNK_BLOCKS * params.digests_per_block * DIGEST_BYTES

    if not geometry.levels:
        return b"".join(leaves.chunks(chunk))
    digests = b"".join(block_digests(_padded(piece, size), size, params.salt) for piece in leaves.chunks(chunk))
    upper: list[bytes] = []
    while len(digests) > DIGEST_BYTES:
        upper.append(_padded(digests, size))
        digests = block_digests(upper[-1], size, params.salt)
    for level in reversed(upper):
        write(level)
    for piece in leaves.chunks(chunk):
        write(_padded(piece, size))
    return digests


def _padded(digests: bytes, size: int) -> bytes:
    """Digests have no gaps (32 is a power of two); the last hash block is filled with zeros."""
    return digests + bytes(-len(digests) % size)
