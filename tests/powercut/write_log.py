# SPDX-License-Identifier: Apache-2.0
"""What dm-log-writes recorded, and the disk as a power cut may have left it.

Linux: Documentation/admin-guide/device-mapper/log-writes.rst. The target logs a write when it has completed and the
next flush begins, a FUA write when it has completed: what is in front of an entry was on the disk when that one came.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FLUSH, FUA, DISCARD, MARK, METADATA = (1 << bit for bit in range(5))
_MAGIC: Final = 0x6A736677736872
_SUPER: Final = struct.Struct("<QQQI")  # magic, version, number of entries, bytes of a sector
_ENTRY: Final = struct.Struct("<QQQQ")  # sector, number of sectors, flags, bytes of a mark


@dataclass(frozen=True, slots=True)
class Entry:
    """Offsets and sizes in bytes."""

    offset: int
    size: int
    flags: int
    data_at: int  # in the log
    mark: str = ""

    @property
    def is_barrier(self) -> bool:
        return bool(self.flags & (FLUSH | FUA))


def read_log(log: Path) -> list[Entry]:
    """Raises ValueError for what is no log."""
    entries = []
    with log.open("rb") as file:
        magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        if (magic, version) != (_MAGIC, 1):
            raise ValueError(f"{log} is no log of dm-log-writes, version 1")
        at = sector
        for _ in range(count):
            file.seek(at)
            start, sectors, flags, mark_bytes = _ENTRY.unpack(file.read(_ENTRY.size))
            mark = file.read(mark_bytes).rstrip(b"\0").decode() if flags & MARK else ""
            at += sector
            entries.append(Entry(start * sector, sectors * sector, flags, at, mark))
            if not flags & (DISCARD | MARK):
                at += sectors * sector
    return entries


def log_size(log: Path) -> int:
    """Bytes of the log that are in use."""
    last = read_log(log)[-1]
    return last.data_at + (0 if last.flags & (DISCARD | MARK) else last.size)


@dataclass(frozen=True, slots=True)
class Point:
    """The power goes just when this entry, the last of `entries`, is on the disk."""

    number: int
    marks: tuple[str, ...]  # before it
    later: tuple[str, ...] = ()  # behind it, in the journey that was not cut


class Disk:
    """The recorded disk in a file, brought forward from barrier to barrier."""

    def __init__(self, log: Path, image: Path, drops: Callable[[Entry], bool] = lambda entry: False) -> None:
        """`image`: what the disk held before the first entry; it is changed. `drops`: of a disk that says of some
        writes that it has done them, and has not."""
        self._drops = drops
        self.entries = read_log(log)
        self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self._image = os.open(image, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._log)
        os.close(self._image)

    def points(self) -> Iterator[tuple[Point, Sequence[Entry]]]:
        """At each barrier; and the writes since the one before it, of which any may be missing at a power cut. They are
        applied when the next point is asked for."""
        every = tuple(entry.mark for entry in self.entries if entry.mark)
        marks: list[str] = []
        waiting: list[Entry] = []
        number = 0
        for entry in self.entries:
            if entry.mark:
                marks.append(entry.mark)
            elif not entry.flags & MARK:
                waiting.append(entry)
            if entry.is_barrier:
                yield Point(number, tuple(marks), every[len(marks) :]), tuple(waiting)
                number += 1
                for each in waiting:
                    self.apply(each)
                waiting = []

    def apply(self, entry: Entry, image_fd: int | None = None) -> None:
        """To the disk, or to a copy of it."""
        fd = self._image if image_fd is None else image_fd
        if entry.flags & DISCARD or self._drops(entry):
            return  # what is discarded may stay as it was
        if entry.size:
            data = os.pread(self._log, entry.size, entry.data_at)
            if len(data) != entry.size:
                raise ValueError("the log ends in an entry's data")
            os.pwrite(fd, data, entry.offset)


def some_of(entries: Sequence[Entry], seed: int) -> list[Entry]:
    """A random half of the writes that no barrier has covered yet, in their order; none that had to be through (FUA) is
    missing."""
    chance = random.Random(seed)
    return [entry for entry in entries if entry.flags & FUA or chance.random() < 0.5]
