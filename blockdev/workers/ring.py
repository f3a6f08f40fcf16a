# SPDX-License-Identifier: Apache-2.0
"""A stream from one process to another through shared memory; a pipe would copy every byte through the kernel twice.

    writer ── memory: slots of PIECE bytes, filled in turn ──► reader
           ── full: a pipe, the size of each filled slot, u32 ──►
           ◄── free: a pipe, one byte for each slot given back ──

Neither end trusts the other: the reader copies a piece out before it looks at it, since the writer
could change it at any time, and takes no size that a slot has not. The memory cannot shrink (sealed),
so reading it cannot fail. A size of 0 is the end of the stream: a writer that dies has not come to it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, NamedTuple, Self

from blockdev.errors import BuildFailed, CutShort
from verity.buffers import Buffer

_SIZE: Final = struct.Struct("<I")
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingEnd(NamedTuple):
    """What one process is given: descriptor numbers, and the ring's shape."""

    memory_fd: int
    full_fd: int
    free_fd: int
    slots: int
    slot_bytes: int

    def descriptors(self) -> tuple[int, int, int]:
        return self.memory_fd, self.full_fd, self.free_fd

    def encode(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def decode(cls, text: str) -> Self:
        return cls(*map(int, text.split(",")))

    def map(self) -> memoryview:
        size = self.slots * self.slot_bytes
        return memoryview(mmap.mmap(self.memory_fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


def make_ring(ends: ExitStack, *, slots: int, slot_bytes: int) -> tuple[RingEnd, RingEnd]:
    """(the writer's end, the reader's end); `ends` closes this process's descriptors. Raises OSError."""
    memory = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    ends.callback(os.close, memory)
    os.truncate(memory, slots * slot_bytes)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    full_read, full_write = _pipe(ends)
    free_read, free_write = _pipe(ends)
    return (
        RingEnd(memory, full_write, free_read, slots, slot_bytes),
        RingEnd(memory, full_read, free_write, slots, slot_bytes),
    )


def _pipe(ends: ExitStack) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    ends.callback(os.close, read)
    ends.callback(os.close, write)
    return read, write


class RingWriter:
    """Raises BrokenPipeError once the reader has gone."""

    def __init__(self, end: RingEnd) -> None:
        self._end, self._memory = end, end.map()
        self._free = end.slots
        self._slot = self._used = 0

    def write(self, data: Buffer) -> None:
        """All of it; slots are handed over when they are full."""
        view = memoryview(data)
        while view:
            if not self._used and not self._free:
                given_back = os.read(self._end.free_fd, self._end.slots)
                if not given_back:
                    raise BrokenPipeError("the reader of the ring has gone")
                self._free += len(given_back)
            start = self._slot * self._end.slot_bytes + self._used
            take = min(len(view), self._end.slot_bytes - self._used)
            self._memory[start : start + take] = view[:take]
            self._used += take
            view = view[take:]
            if self._used == self._end.slot_bytes:
                self._hand_over()

    def _hand_over(self) -> None:
        os.write(self._end.full_fd, _SIZE.pack(self._used))
        self._free -= 1
        self._used = 0
        self._slot = (self._slot + 1) % self._end.slots

    def close(self) -> None:
        """Hand over what is left, and end the stream. Raises nothing where the reader has gone."""
        try:
            if self._used:
                self._hand_over()
            os.write(self._end.full_fd, _SIZE.pack(0))
        except BrokenPipeError:
            pass
        finally:
            self.abandon()

    def abandon(self) -> None:
        """The stream stays without its end."""
        os.close(self._end.full_fd)
        os.close(self._end.free_fd)


class RingReader:
    """Raises CutShort where the writer ends before its stream does, BuildFailed where it breaks the protocol."""

    def __init__(self, end: RingEnd) -> None:
        self._end, self._memory = end, end.map()
        self._slot = -1
        self._at = self._left = 0  # in the memory, of the slot that is being read
        self._ended = False

    def read_into(self, view: memoryview) -> int:
        """Fill the view; fewer bytes only at the end of the stream."""
        filled = 0
        while filled < len(view) and (self._left or self._next()):
            take = min(len(view) - filled, self._left)
            view[filled : filled + take] = self._memory[self._at : self._at + take]
            filled += take
            self._took(take)
        return filled

    def read(self, size: int) -> bytes:
        """1 to `size` bytes; b"" at the end of the stream."""
        if not self._left and not self._next():
            return b""
        data = bytes(self._memory[self._at : self._at + min(size, self._left)])
        self._took(len(data))
        return data

    def _took(self, size: int) -> None:
        self._at += size
        self._left -= size
        if not self._left:
            try:
                os.write(self._end.free_fd, b"\0")
            except BrokenPipeError:
                pass  # it has handed over all it had, and ended

    def _next(self) -> bool:
        if self._ended:
            return False
        header = _exactly(lambda size: os.read(self._end.full_fd, size), _SIZE.size)
        if len(header) < _SIZE.size:
            raise CutShort("the other process of the build has ended before its stream")
        size = _SIZE.unpack(header)[0]
        if not size:
            self._ended = True
            return False
        if size > self._end.slot_bytes:
            raise BuildFailed("the other process of the build does not keep to the protocol")
        self._slot = (self._slot + 1) % self._end.slots
        self._at, self._left = self._slot * self._end.slot_bytes, size
        return True

    def close(self) -> None:
        """The writer gets to know it with its next slot."""
        os.close(self._end.full_fd)
        os.close(self._end.free_fd)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = read(size - len(data))
        if not piece:
            break
        data += piece
    return data
