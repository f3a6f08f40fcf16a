# SPDX-License-Identifier: Apache-2.0
"""One name of a layer, as every index reader gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

FORMAT_MASK: Final = 0o170000  # the bits of st_mode that say the file's type (man 7 inode: S_IFMT)


@dataclass(frozen=True, slots=True)
class Entry:
    """`path`: without a slash in front, the root's is b"". `mode` is a whole st_mode.

    `inode`: equal for the names of one file. `data_offset_bytes`: of a regular file's data in the layer file; all of
    it but the last `tail_bytes`, which are at `tail_offset_bytes`.
    """

    path: bytes
    inode: int
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime: tuple[int, int]  # seconds, nanoseconds
    nlink: int
    rdev: tuple[int, int]
    link: bytes
    data_offset_bytes: int
    xattrs: dict[bytes, bytes]
    tail_offset_bytes: int = 0
    tail_bytes: int = 0

    def extents(self) -> Iterator[tuple[int, int]]:
        """Of a regular file's data: (offset in the layer file, size), in order, none of them empty."""
        blocks = self.size_bytes - self.tail_bytes
        if blocks:
            yield self.data_offset_bytes, blocks
        if self.tail_bytes:
            yield self.tail_offset_bytes, self.tail_bytes
