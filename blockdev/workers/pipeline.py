# SPDX-License-Identifier: Apache-2.0
"""Several sinks over one stream, each on its own thread, over a small pool of shared buffers.

Hashing, writing and reading release the interpreter's lock for large buffers, so the sinks really
overlap; the pool bounds what is in memory.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final

from verity.buffers import Buffer

_STOP: Final = None


def page_aligned(size_bytes: int) -> memoryview:
    """A buffer that the kernel copies from and to at full speed: a bytearray begins 16 bytes into a page, which
    costs some processors three quarters of it."""
    return memoryview(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class _Piece:
    __slots__ = ("pending", "view")

    def __init__(self, size_bytes: int) -> None:
        self.view = page_aligned(size_bytes)
        self.pending = 0


class Pipeline:
    """`run` reads until `fill` returns 0. The first error of a sink ends it and is raised;
    the other sinks have then seen everything that was read, so that a digest stays whole.

    """

    def __init__(self, sinks: Sequence[Callable[[Buffer], object]], *, pieces: int, piece_bytes: int) -> None:
        self._sinks = sinks
        self._free: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        for _ in range(pieces):
            self._free.put(_Piece(piece_bytes))
        self._lanes: list[queue.SimpleQueue[tuple[_Piece, int] | None]] = [queue.SimpleQueue() for _ in sinks]
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self, fill: Callable[[memoryview], int]) -> None:
        """`fill` puts bytes into the view it is given and returns how many; it fills it unless the stream ends."""
        threads = [
            threading.Thread(target=self._lane, args=(sink, lane), daemon=True)
            for sink, lane in zip(self._sinks, self._lanes, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            while self._error is None:
                piece = self._free.get()
                size = fill(piece.view)
                if not size:
                    break
                piece.pending = len(self._lanes)
                for lane in self._lanes:
                    lane.put((piece, size))
        finally:
            for lane in self._lanes:
                lane.put(_STOP)
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _lane(self, sink: Callable[[Buffer], object], lane: queue.SimpleQueue[tuple[_Piece, int] | None]) -> None:
        failed = False
        while (item := lane.get()) is not _STOP:
            piece, size = item
            if not failed:
                try:
                    sink(piece.view[:size])
                except BaseException as error:
                    failed = True
                    with self._lock:
                        self._error = self._error or error
            with self._lock:
                piece.pending -= 1
                done = not piece.pending
            if done:
                self._free.put(piece)
