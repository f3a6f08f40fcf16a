# SPDX-License-Identifier: Apache-2.0
"""Bytes that wait for the end of a pass: a few in memory, the rest in one file, of however many kinds they are."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator

from verity.buffers import Buffer
from verity.errors import VerityError


class Spool:
    """A file that only grows: `fd` (the caller's, empty, writable), or an unnamed temporary one once it is needed.

    Threads may share it. Raises OSError when it cannot be written or read.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd, self._own = fd, False
        self._lock = threading.Lock()
        self.size_bytes = 0

    def append(self, data: Buffer) -> int:
        """The offset at which it is."""
        with self._lock:
            offset = self.size_bytes
            self.size_bytes += memoryview(data).nbytes
        self.write(data, offset)
        return offset

    def write(self, data: Buffer, offset: int) -> None:
        """Over what is there."""
        fd, view = self._file(), memoryview(data)
        try:
            while view:
                written = os.pwrite(fd, view, offset)
                offset += written
                view = view[written:]
        finally:
            view.release()

    def read(self, offset: int, size: int) -> bytes:
        out = b""
        while len(out) < size:
            piece = os.pread(self._file(), size - len(out), offset + len(out))
            if not piece:
                raise VerityError("what was spooled is cut short")
            out += piece
        return out

    def close(self) -> None:
        if self._own and self._fd is not None:
            os.close(self._fd)
            self._fd, self._own = None, False

    def _file(self) -> int:
        with self._lock:
            if self._fd is None:
                # Unlinked at once, so that nothing is left behind whatever becomes of the process.
                import tempfile  # costs a worker, which brings its own, a tenth of its start

                self._fd, path = tempfile.mkstemp(prefix="spool-")
                self._own = True
                os.unlink(path)
            return self._fd


class SpooledBytes:
    """Appended and read again; beyond `threshold_bytes` they go to the spool, which may have others, too."""

    def __init__(self, spool: Spool, *, threshold_bytes: int) -> None:
        self.spool, self._threshold = spool, threshold_bytes
        self._memory = bytearray()
        # What was spooled, in pieces: where each begins among these bytes, and in the file.
        self._starts: list[int] = []
        self._offsets: list[int] = []
        self.bytes_spooled = 0

    def __len__(self) -> int:
        return self.bytes_spooled + len(self._memory)

    def append(self, data: Buffer) -> None:
        self._memory += data
        if len(self._memory) >= self._threshold:
            self._starts.append(self.bytes_spooled)
            self._offsets.append(self.spool.append(self._memory))
            self.bytes_spooled += len(self._memory)
            self._memory.clear()

    def replace(self, start: int, data: bytes) -> None:
        """Put other bytes from `start` on, all of which are there already."""
        if start + len(data) > len(self):
            raise VerityError(f"no bytes to replace at {start}")
        spooled = data[: max(0, self.bytes_spooled - start)]
        done = 0
        for offset, size in self._places(start, start + len(spooled)):
            self.spool.write(spooled[done : done + size], offset)
            done += size
        rest = data[len(spooled) :]
        if rest:
            at = start + len(spooled) - self.bytes_spooled
            self._memory[at : at + len(rest)] = rest

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, which must be there."""
        piece = b""
        if start < self.bytes_spooled:
            parts = [self.spool.read(*place) for place in self._places(start, min(end, self.bytes_spooled))]
            piece = parts[0] if len(parts) == 1 else b"".join(parts)
        if end > self.bytes_spooled:
            first = max(0, start - self.bytes_spooled)
            piece += bytes(self._memory[first : end - self.bytes_spooled])
        return piece

    def chunks(self, size_bytes: int) -> Iterator[bytes]:
        """All of them, in pieces of `size_bytes`, the last one shorter."""
        total = len(self)
        for start in range(0, total, size_bytes):
            yield self.read(start, min(start + size_bytes, total))

    def beside(self) -> SpooledBytes:
        """Others, in the same spool."""
        return SpooledBytes(self.spool, threshold_bytes=self._threshold)

    def _places(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset in the file, size) of spooled bytes."""
        while start < end:
            piece = bisect_right(self._starts, start) - 1
            stop = self._starts[piece + 1] if piece + 1 < len(self._starts) else self.bytes_spooled
            size = min(end, stop) - start
            yield self._offsets[piece] + start - self._starts[piece], size
            start += size
