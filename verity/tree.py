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


class HashTree:
    """The tree over `leaves`, whose level 0 is hashed as it grows: at the end it is only written.

    Leaf digests go in here, not into `leaves`; what is there already counts. Memory: the digests of
    level 0, 1/128 of the leaves with 4096-byte hash blocks. Errors are those of `leaves`.
    """

    def __init__(self, leaves: LeafStore, params: Params) -> None:
        self._leaves, self._params = leaves, params
        self._level_1 = bytearray()  # the digests of the full hash blocks of level 0
        self._partial = bytearray()  # the digests behind those
        for piece in leaves.chunks(_CHUNK_BLOCKS * params.hash_block_bytes):
            self._hash(piece)

    def append(self, digests: bytes) -> None:
        self._leaves.append(digests)
        self._hash(digests)

    def _hash(self, digests: bytes) -> None:
        size = self._params.hash_block_bytes
        self._partial += digests
        full = len(self._partial) - len(self._partial) % size
        if full:
            with memoryview(self._partial) as view:
                self._level_1 += block_digests(view[:full], size, self._params.salt)
            del self._partial[:full]

    def replace(self, index: int, digests: bytes) -> None:
        """Put other digests from `index` on, all of which are there already."""
        self._leaves.replace(index, digests)
        size = self._params.hash_block_bytes
        start, end = index * DIGEST_BYTES, index * DIGEST_BYTES + len(digests)
        full = len(self._level_1) // DIGEST_BYTES * size
        if end > full:
            behind = digests[max(0, full - start) :]
            at = max(0, start - full)
            self._partial[at : at + len(behind)] = behind
        if start < min(end, full):
            first, last = start // size, -(-min(end, full) // size)
            again = block_digests(self._leaves.read(first * size, last * size), size, self._params.salt)
            self._level_1[first * DIGEST_BYTES : last * DIGEST_BYTES] = again

    def write(self, write: Callable[[Buffer], object]) -> bytes:
        """Write the tree in file order; the raw root hash. Raises VerityError without leaves."""
        size = self._params.hash_block_bytes
        if not Geometry(len(self._leaves), self._params).levels:
            return bytes(self._partial)
        digests = bytes(self._level_1)
        if self._partial:
            digests += block_digests(_padded(bytes(self._partial), size), size, self._params.salt)
        upper: list[bytes] = []
        while len(digests) > DIGEST_BYTES:
            upper.append(_padded(digests, size))
            digests = block_digests(upper[-1], size, self._params.salt)
        for level in reversed(upper):
            write(level)
        for piece in self._leaves.chunks(_CHUNK_BLOCKS * size):
            write(_padded(piece, size))
        return digests


def write_tree(leaves: LeafStore, params: Params, write: Callable[[Buffer], object]) -> bytes:
    """Write the tree over `leaves` as they are now; the raw root hash. Raises VerityError without leaves."""
    return HashTree(leaves, params).write(write)


def _padded(digests: bytes, size: int) -> bytes:
    """Digests have no gaps (32 is a power of two); the last hash block is filled with zeros."""
    return digests + bytes(-len(digests) % size)
