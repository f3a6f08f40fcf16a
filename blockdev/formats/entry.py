# SPDX-License-Identifier: Apache-2.0
"""One name of a layer, as every index reader gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FORMAT_MASK: Final = 0o170000  # the bits of st_mode that say the file's type (man 7 inode: S_IFMT)


@dataclass(frozen=True, slots=True)
class Entry:
    """`path`: without a slash in front, the root's is b"". `mode` is a whole st_mode.

    `inode`: equal for the names of one file. `data_offset_bytes`: of a regular file's data in the layer file.
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
