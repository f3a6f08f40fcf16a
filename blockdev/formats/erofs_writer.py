# SPDX-License-Identifier: Apache-2.0
"""File tree → EROFS metadata area: inodes breadth first, then the blocks that are not inlined.

docs/formats.md, "Metadata area". One pass places everything, a second one emits it in file order, so
that memory grows with the number of inodes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from stat import S_IFBLK, S_IFCHR, S_IFLNK, S_IFREG
from typing import Final, Protocol

from blockdev.errors import FormatError
from blockdev.formats import erofs
from blockdev.formats.file_tree import Directory, Inode

_RESERVED_BYTES: Final = 64  # keeps the root off nid 0, which shows as inode number 0
_EMIT_BYTES: Final = 256 << 10


class Contents(Protocol):
    """Where the data of files is. `tail_bytes` of it, less than a block, go behind the inode, in one block."""

    def tail_bytes(self, node: Inode) -> int: ...

    def take(self, node: Inode, tail_offset_bytes: int) -> tuple[int, bytes]:
        """Of a file with data, once: the first block of what is not in the tail, and the tail.

        `tail_offset_bytes`: where that is written, in the file system.
        """


class ContentsInTar:
    """In one piece each, in a tar that begins at an offset of the file system, which `emit` must know."""

    def __init__(self, offset_bytes: int, block_bytes: int) -> None:
        self.offset_bytes, self._block = offset_bytes, block_bytes

    def tail_bytes(self, node: Inode) -> int:
        return 0

    def take(self, node: Inode, tail_offset_bytes: int) -> tuple[int, bytes]:
        return (self.offset_bytes + node.tar_offset_bytes) // self._block, b""


@dataclass(frozen=True, slots=True)
class MetadataArea:
    root_nid: int
    inodes: int
    size_bytes: int  # a multiple of the block size


class MetadataWriter:
    """`layout` once, then `emit` once. `order` is FileTree.finish()'s."""

    def __init__(self, order: Sequence[Inode], block_bytes: int, contents: Contents) -> None:
        self._order, self._contents = order, contents
        self._block = block_bytes
        self._positions: list[int] = []  # byte offset of each inode record, by number
        self._blocks_at: list[tuple[int, int]] = []  # (inode number, byte offset of its block data)
        self._parents: dict[int, int] = {0: 0}  # directory number → its parent's
        self._xattrs: dict[int, bytes] = {}
        self._area: MetadataArea | None = None

    def layout(self) -> MetadataArea:
        block = self._block
        position = _RESERVED_BYTES
        outside: list[tuple[int, int]] = []
        for number, node in enumerate(self._order):
            body = erofs.xattr_body(node.xattrs)
            if body:
                self._xattrs[number] = body
            if len(body) > erofs.XATTR_BODY_BYTES_MAX:
                raise FormatError(f"xattrs of one inode exceed {erofs.XATTR_BODY_BYTES_MAX} bytes")
            base = erofs.INODE_BYTES + len(body)
            tail = 0
            position += -position % erofs.INODE_BYTES
            if isinstance(node, Directory):
                for child in node.children.values():
                    if isinstance(child, Directory):
                        self._parents[child.number] = number
                full, used = self._directory_shape(node)
                node.size_bytes = full * block + used
                if base + used <= block:
                    tail = used
                else:
                    full += 1
                if full:
                    outside.append((number, full))
            elif node.link:
                node.size_bytes = len(node.link)
                if len(node.link) < block and base + len(node.link) <= block:
                    tail = len(node.link)
                else:
                    outside.append((number, -(-len(node.link) // block)))
            elif node.size_bytes:
                tail = self._contents.tail_bytes(node)
            if tail and base + tail <= block:
                if position // block != (position + base + tail - 1) // block:
                    position += -position % block
            elif tail and (position + base) // block != (position + base + tail - 1) // block:
                # Only of a file: its xattrs may cross a block, its tail may not.
                behind = position + base
                position += -behind % block
                position += -position % erofs.INODE_BYTES
            self._positions.append(position)
            position += base + tail
        position += -position % block
        for number, blocks in outside:
            self._blocks_at.append((number, position))
            position += blocks * block
        self._area = MetadataArea(self._positions[0] // erofs.NID_UNIT_BYTES, len(self._order), position)
        return self._area

    def emit(self, write: Callable[[bytes], object], area_offset_bytes: int) -> None:
        """Write the area; `area_offset_bytes` is its place in the file system."""
        assert self._area is not None
        out = bytearray(_RESERVED_BYTES)
        written = 0
        block, contents = self._block, self._contents
        placed = dict(self._blocks_at)

        def flush() -> None:
            nonlocal written
            if len(out) >= _EMIT_BYTES:
                write(bytes(out))
                written += len(out)
                out.clear()

        pack = erofs.INODE.pack
        for number, node in enumerate(self._order):
            position = self._positions[number]
            if gap := position - written - len(out):
                out += bytes(gap)
            body = self._xattrs.get(number, b"")
            tail = b""
            format_type = node.mode & 0o170000
            layout = erofs.LAYOUT_PLAIN
            address = 0
            if number in placed:
                address = (area_offset_bytes + placed[number]) // block
            if isinstance(node, Directory):
                used = node.size_bytes % block or block
                if erofs.INODE_BYTES + len(body) + used <= block:
                    layout = erofs.LAYOUT_INLINE
                    for tail in self._directory_blocks(node):  # noqa: B007 - the last one is wanted
                        pass
            elif format_type == S_IFREG:
                if node.size_bytes:
                    behind = area_offset_bytes + position + erofs.INODE_BYTES + len(body)
                    address, tail = contents.take(node, behind)
                    if tail:
                        layout = erofs.LAYOUT_INLINE
            elif format_type == S_IFLNK:
                if number not in placed:
                    layout, tail = erofs.LAYOUT_INLINE, node.link
            elif format_type in (S_IFCHR, S_IFBLK):
                address = erofs.encode_device(*node.rdev)
            out += pack(
                1 | layout << 1,
                (len(body) - erofs.XATTR_HEADER_BYTES) // 4 + 1 if body else 0,
                node.mode,
                node.size_bytes,
                address,
                number + 1,
                node.uid,
                node.gid,
                node.mtime[0],
                node.mtime[1],
                node.nlink,
            )
            out += body
            out += tail
            if len(out) >= _EMIT_BYTES:
                flush()
        for number, position in self._blocks_at:
            out += bytes(position - written - len(out))
            node = self._order[number]
            if isinstance(node, Directory):
                used = node.size_bytes % block or block
                inlined = erofs.INODE_BYTES + len(self._xattrs.get(number, b"")) + used <= block
                blocks = -(-node.size_bytes // block) - inlined
                for index, dirents in enumerate(self._directory_blocks(node)):
                    if index < blocks:
                        out += dirents
                        out += bytes(-len(dirents) % block)
                        flush()
            else:
                out += node.link
                out += bytes(-len(node.link) % block)
            flush()
        out += bytes(self._area.size_bytes - written - len(out))
        write(bytes(out))

    def _names(self, node: Directory) -> list[bytes]:
        return sorted([b".", b"..", *node.children])

    def _directory_shape(self, node: Directory) -> tuple[int, int]:
        """(blocks before the last one, bytes used in the last one)."""
        block, full, used = self._block, 0, 0
        for name in self._names(node):
            need = erofs.DIRENT.size + len(name)
            if used + need > block:
                full, used = full + 1, 0
            used += need
        return full, used

    def _directory_blocks(self, node: Directory) -> Iterator[bytes]:
        """Dirent blocks, each without the zero fill at its end."""
        names: list[bytes] = []
        used = 0
        for name in self._names(node):
            need = erofs.DIRENT.size + len(name)
            if used + need > self._block:
                yield self._dirents(node, names)
                names, used = [], 0
            names.append(name)
            used += need
        yield self._dirents(node, names)

    def _dirents(self, node: Directory, names: list[bytes]) -> bytes:
        out = bytearray()
        pack, unit, positions, children = erofs.DIRENT.pack, erofs.NID_UNIT_BYTES, self._positions, node.children
        offset = erofs.DIRENT.size * len(names)
        for name in names:
            child = children.get(name)
            if child is not None:
                number, mode = child.number, child.mode
            else:  # "." or ".."
                number, mode = node.number if name == b"." else self._parents[node.number], node.mode
            out += pack(positions[number] // unit, offset, erofs.FILE_TYPES[mode & 0o170000])
            offset += len(name)
        return bytes(out) + b"".join(names)
