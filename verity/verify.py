# SPDX-License-Identifier: Apache-2.0
"""What the kernel would check, block by block, and beyond it: every block, padding included."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from verity.buffers import ReadAt
from verity.errors import VerificationFailed
from verity.hasher import block_digests
from verity.params import DIGEST_BYTES, Params
from verity.tree import Geometry

Progress = Callable[[int, int], object]  # (bytes checked, bytes in all)
# Data under one piece of level 0.
_PIECE_BYTES: Final = 1 << 20
# Beside the piece that each thread has, so that none waits for the oldest one to be looked at.
_PIECES_AHEAD: Final = 2
_BLOCKS_KEPT: Final = 2048


@dataclass(frozen=True, slots=True)
class _Area:
    """Equal blocks in the file: the data, or one level of the tree. `level` counts from the data; None: the data."""

    start_bytes: int
    block_bytes: int
    blocks: int
    level: int | None

    @property
    def name(self) -> str:
        return "data block" if self.level is None else f"hash block of level {self.level}"

    def offset_bytes(self, block: int) -> int:
        return self.start_bytes + block * self.block_bytes

    def failed(self, message: str, block: int) -> VerificationFailed:
        kind: Literal["data", "hash"] = "data" if self.level is None else "hash"
        return VerificationFailed(
            message, kind=kind, level=self.level, block=block, offset_bytes=self.offset_bytes(block)
        )


def _areas(geometry: Geometry) -> Iterator[_Area]:
    """In the order of the chain of digests: top level first, the data last."""
    params = geometry.params
    for depth, (offset, blocks) in enumerate(geometry.levels):
        level = len(geometry.levels) - 1 - depth
        yield _Area(geometry.data_size_bytes + offset, params.hash_block_bytes, blocks, level)
    yield _Area(0, params.data_block_bytes, geometry.data_blocks, None)


def verify_all(
    read_at: ReadAt,
    geometry: Geometry,
    root_hash: bytes,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Check the whole tree, top down, and all data. The tree starts right after the data.

    Raises VerificationFailed naming the first bad block: upper levels first, then each piece of level 0
    (what stands above 1 MiB of data) before the data below it. An error of `read_at` is raised at its
    place in the same order. `progress` is called by this thread. `threads`: by default one for each
    processor that this process may use; all of them call `read_at`. Memory: the upper levels, 1/128 of
    level 0 with 4096-byte hash blocks, and for each thread a few pieces.
    """
    *upper, data = _areas(geometry)
    total = geometry.data_size_bytes + geometry.tree_size_bytes
    done = 0

    def checked(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress(done, total)

    expected = root_hash
    for area, below in pairwise(upper):
        digests = bytearray()
        for first in range(0, area.blocks, _PIECE_BYTES // area.block_bytes):
            count = min(_PIECE_BYTES // area.block_bytes, area.blocks - first)
            above = expected[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
            digests += _digests(read_at, area, first, count, above, below.blocks, geometry.params)
            checked(count * area.block_bytes)
        expected = bytes(digests)
    if not upper:
        _blocks(read_at, data, 0, 1, expected, geometry.params.salt)
        checked(data.block_bytes)
        return
    leaves = upper[-1]
    per_block = geometry.params.digests_per_block
    piece = max(1, _PIECE_BYTES // (per_block * data.block_bytes))

    def check(first: int) -> int:
        """A piece of level 0 from its block `first` on and the data below it; how many bytes that was."""
        count = min(piece, leaves.blocks - first)
        above = expected[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
        digests = _digests(read_at, leaves, first, count, above, data.blocks, geometry.params)
        below = len(digests) // DIGEST_BYTES
        _blocks(read_at, data, first * per_block, below, digests, geometry.params.salt)
        return count * leaves.block_bytes + below * data.block_bytes

    pieces = range(0, leaves.blocks, piece)
    for size in _in_order(check, pieces, min(threads or len(os.sched_getaffinity(0)), len(pieces))):
        checked(size)


def _in_order(check: Callable[[int], int], pieces: range, threads: int) -> Iterator[int]:
    """What `check` says of each piece, in order: so the first error is that of the first piece that has one."""
    if threads == 1:
        yield from (check(piece) for piece in pieces)
        return
    waiting: deque[Future[int]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for piece in pieces:
                if len(waiting) == threads + _PIECES_AHEAD:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(check, piece))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_verified(read_at: ReadAt, geometry: Geometry, root_hash: bytes, index: int) -> bytes:
    """One data block, with the path of hash blocks above it, checked from the root as the kernel does.

    Raises VerificationFailed; IndexError for a block that the geometry does not have.
    """
    if not 0 <= index < geometry.data_blocks:
        raise IndexError(f"no data block {index}: there are {geometry.data_blocks}")
    params = geometry.params
    *upper, data = _areas(geometry)
    expected = root_hash
    for above, area in zip(range(len(upper) - 1, -1, -1), upper, strict=True):
        block, slot = divmod(index // params.digests_per_block**above, params.digests_per_block)
        piece = _blocks(read_at, area, block, 1, expected, params.salt)
        expected = piece[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES]
    return _blocks(read_at, data, index, 1, expected, params.salt)


class VerifiedReader:
    """Data of a file read through its hash tree, for who reads here and there. Blocks that were checked are kept, up
    to a few MiB of them; `read_at` is asked for whole blocks."""

    def __init__(self, read_at: ReadAt, geometry: Geometry, root_hash: bytes) -> None:
        self._read_at, self._geometry, self._root_hash = read_at, geometry, root_hash
        self._areas = list(_areas(geometry))  # top level first, the data last
        self._kept: dict[tuple[int, int], bytes] = {}

    def __call__(self, offset: int, size: int) -> bytes:
        """Less at the end of the data. Raises VerificationFailed."""
        block_bytes = self._geometry.params.data_block_bytes
        end = min(offset + size, self._geometry.data_size_bytes)
        if end <= offset:
            return b""
        first, depth = offset // block_bytes, len(self._areas) - 1
        blocks = [self._block(depth, block) for block in range(first, -(-end // block_bytes))]
        return b"".join(blocks)[offset - first * block_bytes : end - first * block_bytes]

    def _block(self, depth: int, block: int) -> bytes:
        kept = self._kept.get((depth, block))
        if kept is not None:
            return kept
        params, expected = self._geometry.params, self._root_hash
        if depth:
            above, slot = divmod(block, params.digests_per_block)
            digests = self._block(depth - 1, above)
            expected = digests[slot * DIGEST_BYTES : (slot + 1) * DIGEST_BYTES]
        found = _blocks(self._read_at, self._areas[depth], block, 1, expected, params.salt)
        if len(self._kept) >= _BLOCKS_KEPT:
            self._kept.clear()
        self._kept[depth, block] = found
        return found


def _digests(
    read_at: ReadAt, area: _Area, first: int, count: int, expected: bytes, below: int, params: Params
) -> bytes:
    """The digests in some hash blocks, checked as `_blocks` does; `below`: how many the whole area holds."""
    blocks = _blocks(read_at, area, first, count, expected, params.salt)
    used = (below - first * params.digests_per_block) * DIGEST_BYTES
    if any(blocks[used:]):
        raise area.failed(f"{area.name}: bytes behind its {below} digests are not zero", first + count - 1)
    return blocks[:used]


def _blocks(read_at: ReadAt, area: _Area, first: int, count: int, expected: bytes, salt: bytes) -> bytes:
    """`count` blocks from `first` on, which have the digests `expected`. Raises VerificationFailed."""
    offset, size = area.offset_bytes(first), count * area.block_bytes
    data = read_at(offset, size)
    if len(data) != size:
        end = offset + len(data)
        message = f"file ends at byte {end}, before the {offset + size} of its geometry"
        raise VerificationFailed(message, kind="end", level=None, block=None, offset_bytes=end)
    digests = block_digests(data, area.block_bytes, salt)
    if digests != expected:
        for at in range(count):
            part = slice(at * DIGEST_BYTES, (at + 1) * DIGEST_BYTES)
            if digests[part] != expected[part]:
                block = first + at
                raise area.failed(f"{area.name} {block} does not have the digest that the tree names", block)
    return data
