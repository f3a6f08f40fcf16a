# SPDX-License-Identifier: Apache-2.0
"""What the directories of active snapshots hold: bytes and inodes, by walks behind the answers.

CRI asks for every active snapshot each 10 s, one after the other (`stats_collect_period`), so no answer
waits for a walk of a big directory. An answer is

* the result of a walk that ends with its first slice, which that of most directories does; else
* the result of the last walk that ended; else, while the first one is under way,
* what that one has counted so far: a bound from below.

One thread walks, a slice of time for each directory in turn, the youngest walks first: a small
directory waits for one slice of a big one, never for all of it. Between slices of walks that take
several it rests, and the result of such a one holds for some times the time that it took. So however many
containers write however many files, walks take a bounded part of one processor.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import stat
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from snapshotter.metastore import SnapshotID

_MOMENT_SECONDS: Final = 0.1
_SLICE_SECONDS: Final = 0.02
_REST_SECONDS: Final = 0.06
_HOLDS_TIMES: Final = 10
_BLOCK_BYTES: Final = 512  # of st_blocks (man 3 stat)


@dataclass(frozen=True, slots=True)
class Use:
    """Of storage: bytes and inodes."""

    size_bytes: int
    inodes: int


class Walk:
    """Of one directory, in slices. Symlinks are counted, not followed; a directory whose path is too long for the
    kernel is left out, and so is what another has taken away meanwhile."""

    def __init__(self, top: Path) -> None:
        self._size_bytes = self._inodes = 0
        # What has several names counts once: of n names that are met, each gives an n-th. So no inode is remembered.
        self._shared: dict[int, list[int]] = {}
        self._entries = self._below(str(top))

    def step(self, seconds: float) -> bool:
        """Whether that was the end of it."""
        until = time.monotonic() + seconds
        return all(time.monotonic() <= until for _ in self._entries)

    def close(self) -> None:
        self._entries.close()

    def _below(self, top: str) -> Generator[None, None, None]:
        with suppress(OSError):
            self._size_bytes, self._inodes = os.lstat(top).st_blocks * _BLOCK_BYTES, 1
        todo = [top]
        while todo:
            with suppress(OSError), os.scandir(todo.pop()) as entries:
                for entry in entries:
                    with suppress(OSError):
                        if self._count(entry):
                            todo.append(entry.path)
                    yield

    def _count(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a directory."""
        status = entry.stat(follow_symlinks=False)
        size_bytes = status.st_blocks * _BLOCK_BYTES
        directory = stat.S_ISDIR(status.st_mode)
        if status.st_nlink > 1 and not directory:
            shared = self._shared.setdefault(status.st_nlink, [0, 0])
            shared[0] += size_bytes
            shared[1] += 1
        else:
            self._size_bytes += size_bytes
            self._inodes += 1
        return directory

    def so_far(self) -> Use:
        shared = list(self._shared.items())
        return Use(
            self._size_bytes + sum(size_bytes // names for names, (size_bytes, _) in shared),
            self._inodes + sum(-(-count // names) for names, (_, count) in shared),
        )


@dataclass(slots=True)
class _Known:
    walk: Walk | None = None  # the one under way
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # its first slice is over
    result: Use | None = None
    seconds: float = 0.0  # that the walk under way has taken
    holds_until: float = 0.0


class Usage:
    """`directory`: of a snapshot's id."""

    def __init__(self, directory: Callable[[SnapshotID], Path]) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._known: dict[SnapshotID, _Known] = {}
        self._queue: list[tuple[float, int, SnapshotID, _Known]] = []  # by the time taken, then by age
        self._numbers = itertools.count()
        self._came = asyncio.Event()
        self._walker: asyncio.Task[None] | None = None

    async def of(self, snapshot_id: SnapshotID) -> Use:
        known = self._known.setdefault(snapshot_id, _Known())
        if known.walk is None and time.monotonic() >= known.holds_until:
            known.walk, known.seconds = Walk(self._directory(snapshot_id)), 0.0
            known.begun.clear()
            self._push(snapshot_id, known)
        if known.walk is not None and not known.seconds:
            with suppress(TimeoutError):
                await asyncio.wait_for(known.begun.wait(), _MOMENT_SECONDS)
        if known.result is not None:
            return known.result
        return known.walk.so_far() if known.walk is not None else Use(0, 0)

    def forget(self, snapshot_id: SnapshotID) -> None:
        """It is no longer active."""
        self._known.pop(snapshot_id, None)

    async def close(self) -> None:
        if self._walker is not None:
            self._walker.cancel()
            await asyncio.wait([self._walker])
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _push(self, snapshot_id: SnapshotID, known: _Known) -> None:
        heapq.heappush(self._queue, (known.seconds, next(self._numbers), snapshot_id, known))
        self._came.set()
        if self._walker is None or self._walker.done():
            self._walker = asyncio.create_task(self._walk())

    async def _walk(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            self._came.clear()
            _, _, snapshot_id, known = heapq.heappop(self._queue)
            walk = known.walk
            if walk is None:
                continue
            if self._known.get(snapshot_id) is not known:
                walk.close()
                continue
            started, first = time.monotonic(), not known.seconds
            over = await loop.run_in_executor(self._thread, walk.step, _SLICE_SECONDS)
            known.seconds += time.monotonic() - started
            if over:
                known.result, known.walk = walk.so_far(), None
                known.holds_until = 0.0 if first else time.monotonic() + _HOLDS_TIMES * known.seconds
                if not known.result.inodes:  # it went before it was walked
                    self._known.pop(snapshot_id, None)
            else:
                heapq.heappush(self._queue, (known.seconds, next(self._numbers), snapshot_id, known))
            known.begun.set()
            if self._queue and self._queue[0][0] > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._came.wait(), _REST_SECONDS)
