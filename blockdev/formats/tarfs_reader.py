# SPDX-License-Identifier: Apache-2.0
"""Read a tarfs index as the kernel module does, with every offset and count in it taken for hostile.

What the module would not show is not shown: names whose inode has no type, and what lies below them. Nor are
names that no program can ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from stat import S_IFDIR, S_IFLNK, S_IFREG
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import tarfs
from blockdev.formats.entry import FORMAT_MASK, Entry
from blockdev.formats.layer_file import ReadAt

_DEVICES: Final = (0o020000, 0o060000)
_KNOWN: Final = frozenset((S_IFDIR, S_IFLNK, S_IFREG, *_DEVICES, 0o010000, 0o140000))
_DIRECTORY_BYTES_MAX: Final = 1 << 28
_PATH_BYTES_MAX: Final = 1 << 20  # also of a name
_NAMES_BYTES_MAX: Final = 1 << 30  # of all entries with their names
_PATHS_BYTES_MAX: Final = 1 << 34  # of all paths, which long directories make much more than all names


class Reader:
    """Over the data area of a layer file. Raises FormatError or LimitExceeded, here and in `walk`."""

    def __init__(self, read_at: ReadAt, data_size_bytes: int) -> None:
        self._read_at, self._size = read_at, data_size_bytes
        last = self._read(data_size_bytes - tarfs.BLOCK_BYTES, tarfs.BLOCK_BYTES)
        self.superblock = tarfs.Superblock.unpack(last, data_size_bytes)
        self._name_bytes = 0  # that the walk has come by
        self.hidden_names = 0  # that the walk came by: there, but not for the kernel

    def walk(self) -> Iterator[Entry]:
        """As IndexReader.walk. A directory with two names, which a tarfs layer can have, is refused."""
        todo = [(b"", b"", 1)]
        directories: set[int] = set()
        path_bytes = 0
        self._name_bytes = 0
        while todo:
            parent, name, number = todo.pop()
            path_bytes += len(parent) + len(name)
            if len(parent) + len(name) > _PATH_BYTES_MAX or path_bytes > _PATHS_BYTES_MAX:
                raise LimitExceeded(f"path of {len(parent) + len(name)} bytes, {path_bytes} in all")
            path = parent + b"/" + name if parent else name
            entry = self._entry(path, number)
            if entry is None:
                self.hidden_names += 1
                continue
            yield entry
            if entry.mode & FORMAT_MASK != S_IFDIR:
                if not path:
                    raise FormatError("the root is no directory")
                continue
            if number in directories:
                raise FormatError(f"directory {number} has two names")
            directories.add(number)
            todo += [(path, child, inode) for child, inode in reversed(self._children(number, entry))]

    def _read(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self._size:
            raise FormatError(f"index points at bytes {offset} to {offset + size} of {self._size}")
        data = self._read_at(offset, size)
        if len(data) != size:
            raise FormatError(f"layer file ends at byte {offset + len(data)}")
        return data

    def _inode(self, number: int) -> tuple[int, int, int, int, int, int, int, int]:
        if not 1 <= number <= self.superblock.inodes:
            raise FormatError(f"index names inode {number} of {self.superblock.inodes}")
        at = self.superblock.inode_table_bytes + (number - 1) * tarfs.INODE.size
        fields: tuple[int, int, int, int, int, int, int, int] = tarfs.INODE.unpack(self._read(at, tarfs.INODE.size))
        return fields

    def _entry(self, path: bytes, number: int) -> Entry | None:
        mode, flags, time_high, uid, gid, time_low, size, offset = self._inode(number)
        kind = mode & FORMAT_MASK
        if kind not in _KNOWN or mode & ~(FORMAT_MASK | tarfs.PERMISSIONS):
            return None
        rdev, link, data_offset = (0, 0), b"", 0
        if kind in _DEVICES:
            rdev = (offset >> 32, offset & (tarfs.MINORS - 1))
        elif kind == S_IFLNK:
            if size > tarfs.LINK_TEXT_BYTES_MAX:
                raise FormatError(f"symlink {path[:200]!r} of {size} bytes")
            link = self._read(offset, size)
        elif kind == S_IFREG and size:
            if offset + size > self._size:
                raise FormatError(f"data of {path[:200]!r} lies outside the data area")
            data_offset = offset
        xattrs = {b"trusted.overlay.opaque": b"y"} if kind == S_IFDIR and flags & tarfs.FLAG_OPAQUE else {}
        mtime = (time_low | (time_high & 0xF) << 32, 0)
        return Entry(path, number, mode, uid, gid, size, mtime, 1, rdev, link, data_offset, xattrs)

    def _children(self, number: int, directory: Entry) -> list[tuple[bytes, int]]:
        if directory.size_bytes > _DIRECTORY_BYTES_MAX or directory.size_bytes % tarfs.DIRENT.size:
            raise FormatError(f"directory of {directory.size_bytes} bytes")
        table = self._read(self._inode(number)[7], directory.size_bytes)
        found, seen = [], set[bytes]()
        for inode, at, length, _ in tarfs.DIRENT.iter_unpack(table):
            self._name_bytes += tarfs.DIRENT.size + length
            if self._name_bytes > min(self._size, _NAMES_BYTES_MAX):
                raise LimitExceeded("more names than the data area has room for")
            if length > _PATH_BYTES_MAX:
                raise LimitExceeded(f"name of {length} bytes")
            name = self._read(at, length)
            if b"/" in name or name in seen:
                raise FormatError(f"directory entry with the name {name[:80]!r}")
            seen.add(name)
            if name not in (b"", b".", b"..") and b"\0" not in name:
                found.append((name, inode))
        return found
