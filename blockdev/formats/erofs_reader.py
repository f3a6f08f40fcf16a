# SPDX-License-Identifier: Apache-2.0
"""Read the index of a layer file again. Every offset and count in it is taken for hostile.

Understands what our writer writes, nothing more: extended inodes, plain and inline data, inline xattrs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFLNK, S_IFREG
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.entry import FORMAT_MASK, Entry
from blockdev.formats.layer_file import ReadAt

_DIRECTORY_BYTES_MAX: Final = 1 << 30
_PATH_BYTES_MAX: Final = 1 << 20
# Bodies worth keeping, in case that the file has more names; how much of them; and how often all of the data area
# may be read for such bodies, which in a forged index can overlap.
_XATTRS_CACHED_BYTES_MIN: Final = 1 << 10
_XATTRS_CACHED_BYTES_MAX: Final = 64 << 20
_XATTRS_READ_TIMES_MAX: Final = 16
# Blocks of directories that names were looked up in, each of some dozens of names.
_BLOCKS_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class Inode:
    """As it is stored; what it points at is not looked at yet."""

    mode: int
    layout: int
    size_bytes: int
    address: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    nlink: int
    xattr_bytes: int
    end_offset: int  # of record and xattrs: where inlined data starts


class Reader:
    """Over the data area of a layer file. Raises FormatError or LimitExceeded, here and in `walk`.

    `verified`: by `read_at`, for looking up some paths; the superblock's checksum says nothing more then, and no xattrs
    are kept for further names of a file.
    """

    def __init__(self, read_at: ReadAt, data_size_bytes: int, *, verified: bool = False) -> None:
        self._read_at, self._size, self._keeps_xattrs = read_at, data_size_bytes, not verified
        self._xattrs_kept: OrderedDict[int, tuple[int, dict[bytes, bytes]]] = OrderedDict()  # by the place of their end
        self._xattr_bytes_kept = self._xattr_bytes_read = 0
        self._names_kept: dict[tuple[int, int, int, int], dict[bytes, int]] = {}
        self.superblock = erofs.Superblock.unpack(
            self._read(erofs.SUPERBLOCK_OFFSET_BYTES, erofs.Superblock.LAYOUT.size)
        )
        if not 9 <= self.superblock.block_bits <= 12:
            raise FormatError(f"EROFS blocks of 2^{self.superblock.block_bits} bytes")
        self.block_bytes = 1 << self.superblock.block_bits
        if self.superblock.blocks * self.block_bytes > data_size_bytes:
            raise FormatError("EROFS claims more blocks than the data area has")
        if verified:
            return
        covered = bytearray(self._read(erofs.SUPERBLOCK_OFFSET_BYTES, erofs.checksummed_bytes(self.block_bytes)))
        covered[4:8] = bytes(4)
        if erofs.crc32c(covered) != self.superblock.checksum:
            raise FormatError("EROFS superblock has a wrong checksum")

    def walk(self) -> Iterator[Entry]:
        """Every name, the root's b"" first, parents before children, names of a directory in their order."""
        # Length of the directory's path, name, nid. The path itself would be held for each name that waits; parents
        # come first, so that it is always the beginning of the path before.
        todo = [(0, b"", self.superblock.root_nid)]
        path = b""
        directories: set[int] = set()
        names = 0
        while todo:
            parent_bytes, name, nid = todo.pop()
            path = path[:parent_bytes] + b"/" + name if parent_bytes else name
            if len(path) > _PATH_BYTES_MAX:
                raise LimitExceeded(f"path of {len(path)} bytes")
            inode = self._inode(nid)
            if not path and inode.mode & FORMAT_MASK != S_IFDIR:
                raise FormatError("the root is no directory")
            yield self._entry(path, nid, inode)
            if inode.mode & FORMAT_MASK == S_IFDIR:
                if nid in directories:
                    raise FormatError(f"directory {nid} has two names")
                directories.add(nid)
                children = list(self._children(inode))
                names += len(children)
                # A name costs 13 bytes of metadata at the least.
                if names * erofs.DIRENT.size > self._size:
                    raise LimitExceeded("more names than the data area has room for")
                todo += [(len(path), child_name, child) for child_name, child in reversed(children)]

    def root(self) -> Inode:
        return self._inode(self.superblock.root_nid)

    def child(self, directory: Inode, name: bytes) -> Inode | None:
        """By binary search, as the kernel does: of a large directory a few blocks are read."""
        if not directory.size_bytes:
            return None
        low, high = 0, -(-directory.size_bytes // self.block_bytes) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if next(iter(self._block_names(directory, middle))) <= name:
                low = middle
            else:
                high = middle - 1
        nid = self._block_names(directory, low).get(name)
        return self._inode(nid) if nid is not None else None

    def _block_names(self, directory: Inode, number: int) -> dict[bytes, int]:
        """Of one block of a directory, in its order: nids by name."""
        key = directory.end_offset, directory.address, directory.size_bytes, number
        found = self._names_kept.get(key)
        if found is None:
            if len(self._names_kept) >= _BLOCKS_KEPT:
                self._names_kept.clear()
            found = self._names_kept[key] = dict(self._dirents(self._directory_block(directory, number)))
        return found

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        return self._xattrs(inode)

    def _directory_block(self, inode: Inode, number: int) -> bytes:
        size = min(self.block_bytes, inode.size_bytes - number * self.block_bytes)
        last = (number + 1) * self.block_bytes >= inode.size_bytes
        if last and inode.layout == erofs.LAYOUT_INLINE:
            return self._read(inode.end_offset, size)
        return self._read((inode.address + number) * self.block_bytes, size)

    @staticmethod
    def _dirents(block: bytes) -> list[tuple[bytes, int]]:
        """(name, nid) of every entry."""
        if len(block) < erofs.DIRENT.size:
            raise FormatError("directory block without entries")
        first = erofs.DIRENT.unpack_from(block)[1]
        if first % erofs.DIRENT.size or not erofs.DIRENT.size <= first <= len(block):
            raise FormatError("directory block in disorder")
        records = list(erofs.DIRENT.iter_unpack(block[:first]))
        ends = [record[1] for record in records[1:]] + [len(block)]
        found = []
        for (nid, begin, _), end in zip(records, ends, strict=True):
            if not first <= begin < end <= len(block):
                raise FormatError("directory entry in disorder")
            found.append((block[begin:end].rstrip(b"\0"), nid))
        return found

    def _read(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self._size:
            raise FormatError(f"index points at bytes {offset} to {offset + size} of {self._size}")
        data = self._read_at(offset, size)
        if len(data) != size:
            raise FormatError(f"layer file ends at byte {offset + len(data)}")
        return data

    def _inode(self, nid: int) -> Inode:
        offset = self.superblock.meta_block * self.block_bytes + nid * erofs.NID_UNIT_BYTES
        fields = erofs.INODE.unpack(self._read(offset, erofs.INODE_BYTES))
        kind, xattr_count, mode, size, address, _, uid, gid, seconds, nanoseconds, nlink = fields
        layout = kind >> 1
        if not kind & 1 or layout not in (erofs.LAYOUT_PLAIN, erofs.LAYOUT_INLINE):
            raise FormatError(f"inode {nid} has format {kind:#x}, which is not ours")
        if mode & FORMAT_MASK not in erofs.FILE_TYPES:
            raise FormatError(f"inode {nid} has mode {mode:#o}")
        if nanoseconds >= 1_000_000_000:
            raise FormatError(f"inode {nid} has {nanoseconds} nanoseconds in a second")
        xattr_bytes = erofs.XATTR_HEADER_BYTES + 4 * (xattr_count - 1) if xattr_count else 0
        end = offset + erofs.INODE_BYTES + xattr_bytes
        return Inode(mode, layout, size, address, uid, gid, (seconds, nanoseconds), nlink, xattr_bytes, end)

    def _entry(self, path: bytes, nid: int, inode: Inode) -> Entry:
        kind = inode.mode & FORMAT_MASK
        rdev, link, offset, tail = (0, 0), b"", 0, 0
        if kind in (S_IFCHR, S_IFBLK):
            number = inode.address
            rdev = (number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)
        elif kind == S_IFLNK:
            if inode.size_bytes > 4095:
                raise FormatError(f"symlink {path!r} of {inode.size_bytes} bytes")
            link = self._content(inode)
        elif kind == S_IFREG and inode.size_bytes:
            tail = self._tail_bytes(inode)
            if inode.size_bytes > tail:
                offset = inode.address * self.block_bytes
            if offset + inode.size_bytes - tail > self._size or (tail and inode.end_offset + tail > self._size):
                raise FormatError(f"data of {path!r} lies outside the data area")
        return Entry(
            path, nid, inode.mode, inode.uid, inode.gid, inode.size_bytes, inode.mtime, inode.nlink, rdev, link, offset,
            self._xattrs(inode), inode.end_offset if tail else 0, tail,
        )  # fmt: skip

    def _tail_bytes(self, inode: Inode) -> int:
        """How much of the end is inlined."""
        if inode.layout == erofs.LAYOUT_PLAIN or not inode.size_bytes:
            return 0
        tail = inode.size_bytes % self.block_bytes or self.block_bytes
        if inode.end_offset // self.block_bytes != (inode.end_offset + tail - 1) // self.block_bytes:
            raise FormatError("inlined data crosses a block")
        return tail

    def _content(self, inode: Inode) -> bytes:
        """Of a directory or symlink."""
        start = inode.address * self.block_bytes
        tail = self._tail_bytes(inode)
        full = inode.size_bytes - tail
        if not tail:
            return self._read(start, full)
        return (self._read(start, full) if full else b"") + self._read(inode.end_offset, tail)

    def _children(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        if inode.size_bytes > _DIRECTORY_BYTES_MAX:
            raise LimitExceeded(f"directory of {inode.size_bytes} bytes")
        content = self._content(inode)
        last = b""
        for start in range(0, len(content), self.block_bytes):
            block = content[start : start + self.block_bytes]
            for name, nid in self._dirents(block):
                if not name or len(name) > 255 or b"/" in name or b"\0" in name or name <= last:
                    raise FormatError(f"directory entry with the name {name[:80]!r}")
                last = name
                if name not in (b".", b".."):
                    yield name, nid

    def _xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        if not inode.xattr_bytes:
            return {}
        kept = self._xattrs_kept.get(inode.end_offset)
        if kept is not None and kept[0] == inode.xattr_bytes:
            self._xattrs_kept.move_to_end(inode.end_offset)
            return kept[1]
        self._xattr_bytes_read += inode.xattr_bytes
        if self._xattr_bytes_read > _XATTRS_READ_TIMES_MAX * self._size + erofs.XATTR_BODY_BYTES_MAX:
            raise LimitExceeded("more xattrs than the data area has room for")
        area = self._read(inode.end_offset - inode.xattr_bytes, inode.xattr_bytes)
        found = erofs.parse_xattr_body(area)
        if kept is None and self._keeps_xattrs and inode.xattr_bytes >= _XATTRS_CACHED_BYTES_MIN:
            self._xattrs_kept[inode.end_offset] = inode.xattr_bytes, found
            self._xattr_bytes_kept += inode.xattr_bytes
            while self._xattr_bytes_kept > _XATTRS_CACHED_BYTES_MAX:
                _, (size, _) = self._xattrs_kept.popitem(last=False)
                self._xattr_bytes_kept -= size
        return found
