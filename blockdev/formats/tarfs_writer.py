# SPDX-License-Identifier: Apache-2.0
"""Members → tarfs tree → index, bit for bit as Microsoft's tools make it, their faults included.

docs/formats.md, "The format `tarfs`". Where the result would come out wrong in a guest it is counted
in `warnings`; where those tools hang or fail, the layer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import tarfs
from blockdev.formats.layer_file import ReadAt, align
from blockdev.formats.limits import Limits
from blockdev.formats.tarfs_tar import Dialect, TarfsMember, TarfsScanner
from verity.buffers import Buffer

_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000
_S_IFLNK: Final = 0o120000
_S_IFDIR: Final = 0o040000
_S_IFCHR: Final = 0o020000
_S_IFBLK: Final = 0o060000
_S_IFIFO: Final = 0o010000
_REGULAR: Final = b"0\0"
_HARDLINK, _SYMLINK, _DIRECTORY = 0x31, 0x32, 0x35
_TYPES: Final = {
    0x30: _S_IFREG,
    0x00: _S_IFREG,
    0x32: _S_IFLNK,
    0x33: _S_IFCHR,
    0x34: _S_IFBLK,
    0x35: _S_IFDIR,
    0x36: _S_IFIFO,
}
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_TIME_MASK: Final = (1 << tarfs.TIME_BITS) - 1
_EMIT_BYTES: Final = 256 << 10
# About what a node, a name and a text take in memory beside their bytes, on CPython for 64 bits.
_NODE_COST_BYTES: Final = 420
_CANDIDATES_MAX: Final = 100_000

# Warnings that mean: the container would see other files than the image has. The others are for the curious.
FAULTS: Final = frozenset(
    (
        "cut_device_numbers", "cut_link_texts", "cut_times", "dropped_names", "dropped_xattrs", "link_as_root",
        "long_names", "lost_mode_bits", "phantom_directories", "shadow_superblocks", "shifted_names", "skipped_members",
        "unreachable_names", "wrong_link_texts",
    )
)  # fmt: skip


class _Node:
    """`mode`: type and permissions, 0 for a phantom, which was only ever named as somebody's parent."""

    __slots__ = ("children", "flags", "gid", "mode", "mtime", "number", "offset", "size", "text", "uid")

    def __init__(self) -> None:
        self.mode = self.flags = self.uid = self.gid = self.mtime = self.size = self.offset = 0
        self.children: dict[bytes, _Node] = {}
        self.text: bytes | None = None  # of a symlink that does not have it in its header
        self.number = 0


class _Tree:
    """What the members leave behind, in their order."""

    def __init__(self, dialect: Dialect, limits: Limits) -> None:
        self._dialect, self._limits = dialect, limits
        self.root = _Node()
        self.root.mode = _S_IFDIR | 0o555
        self.texts: list[bytes] = []  # of special symlinks, whatever becomes of these
        self.warnings = dict.fromkeys(sorted(FAULTS), 0)
        self.hardlinks = False
        self._memory = 0

    def _charge(self, size_bytes: int) -> None:
        self._memory += size_bytes
        if self._memory > self._limits.metadata_bytes:
            raise LimitExceeded(f"names and attributes exceed {self._limits.metadata_bytes} bytes")

    def _walk(self, parts: list[bytes]) -> _Node:
        node = self.root
        for part in parts:
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node()
                self._charge(len(part) + _NODE_COST_BYTES)
            node = child
        return node

    def add(self, member: TarfsMember) -> None:
        if not self._apply(member):
            self.warnings["skipped_members"] += 1

    def _apply(self, member: TarfsMember) -> bool:
        """False for a member that is skipped."""
        if member.mode is None:
            return False
        if member.type == _HARDLINK:
            return self._hardlink(member)
        if member.type not in _TYPES:
            return False
        node = _Node()
        node.mode = _TYPES[member.type] | member.mode & tarfs.PERMISSIONS
        node.uid, node.gid, node.mtime = member.uid, member.gid, member.mtime & _TIME_MASK
        if node.mode & _S_IFMT in (_S_IFCHR, _S_IFBLK):
            if member.device is None:
                return False
            major, minor = member.device
            node.offset = major << 32 | minor
        elif member.type == _SYMLINK:
            if member.link is None:
                return False
            node.size = len(member.link)
            if member.link_offset_bytes is not None:
                node.offset = member.link_offset_bytes
            elif not self._dialect.special_links:
                return False
            else:
                node.text = member.link
                self._charge(len(member.link) + _NODE_COST_BYTES)
                self.texts.append(member.link)
        elif member.type in _REGULAR:
            node.size, node.offset = member.size_bytes, member.data_offset_bytes
        return self._place(node, member)

    def _place(self, node: _Node, member: TarfsMember) -> bool:
        parts = _clean(member.name)
        if parts is None:
            return False
        if parts and parts[-1] == _OPAQUE:
            self._walk(parts[:-1]).flags |= tarfs.FLAG_OPAQUE
            return True
        if parts and parts[-1].startswith(_WHITEOUT):
            parts[-1] = parts[-1][len(_WHITEOUT) :]
            old = self._walk(parts)
            if old.mode:
                self.warnings["dropped_names"] += 1  # a whiteout speaks of lower layers; here this layer's file goes
            old.mode = _S_IFCHR | old.mode & tarfs.PERMISSIONS
            old.size = old.offset = 0
            old.text = None
            self._drop_children(old)
            return True
        old = self._walk(parts)
        self._drop_children(old)
        if old.flags:
            self.warnings["dropped_names"] += 1  # the opaque mark is lost
        old.mode, old.flags, old.uid, old.gid, old.mtime = node.mode, 0, node.uid, node.gid, node.mtime
        old.size, old.offset, old.text = node.size, node.offset, node.text
        self._judge(member, parts)
        return True

    def _judge(self, member: TarfsMember, parts: list[bytes]) -> None:
        """What of this member the file system has no place for."""
        warnings = self.warnings
        assert member.mode is not None
        if member.mode & 0o7000:
            warnings["lost_mode_bits"] += 1
        if member.xattrs:
            warnings["dropped_xattrs"] += member.xattrs
        if member.mtime > _TIME_MASK:
            warnings["cut_times"] += 1
        if member.device is not None and member.type in b"34":
            major, minor = member.device
            if major >= tarfs.MAJORS or minor >= tarfs.MINORS:
                warnings["cut_device_numbers"] += 1
        if member.type == _SYMLINK and member.link is not None and len(member.link) > tarfs.LINK_TEXT_BYTES_MAX:
            warnings["cut_link_texts"] += 1
        if parts and len(parts[-1]) > tarfs.NAME_BYTES_MAX:
            warnings["long_names"] += 1

    def _drop_children(self, node: _Node) -> None:
        if node.children:
            self.warnings["dropped_names"] += len(node.children)
            node.children = {}

    def _hardlink(self, member: TarfsMember) -> bool:
        target_parts = _clean(member.link or b"")
        if target_parts is None:
            return False
        target = self._walk(target_parts)
        if target.mode & _S_IFMT != _S_IFREG:
            return False
        parts = _clean(member.name)
        if parts is None:
            return False
        self.hardlinks = True
        if not parts:
            self.root = target
            self.warnings["link_as_root"] += 1
            return True
        children = self._walk(parts[:-1]).children
        if parts[-1] not in children:
            self._charge(len(parts[-1]) + _NODE_COST_BYTES)
        children[parts[-1]] = target
        return True

    def refuse_cycles(self) -> None:
        """A link below its own target makes one; Microsoft's tools then run for ever. Raises FormatError."""
        if not self.hardlinks:
            return
        done: set[int] = set()
        path: set[int] = {id(self.root)}
        stack: list[tuple[_Node, Iterator[_Node]]] = [(self.root, iter(self.root.children.values()))]
        while stack:
            node, children = stack[-1]
            child = next(children, None)
            if child is None:
                stack.pop()
                path.discard(id(node))
                done.add(id(node))
            elif id(child) in path:
                raise FormatError("a hardlink below its own target")
            elif id(child) not in done and child.children:
                path.add(id(child))
                stack.append((child, iter(child.children.values())))


def _clean(path: bytes) -> list[bytes] | None:
    """Components; None where `..` leads above the root."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part and part != b".":
            parts.append(part)
    return parts


class TarfsWriter:
    """`feed` it the tar, then `write` the index. `read_back`: of the tar's bytes, once `feed` has seen all of them.

    Raises FormatError and LimitExceeded.
    """

    def __init__(self, dialect: Dialect, limits: Limits, read_back: ReadAt | None) -> None:
        self._tree = _Tree(dialect, limits)
        self._scanner = TarfsScanner(self._tree.add, limits, dialect)
        self._limits = limits
        self._watch = _SuperblockWatch(read_back)

    def feed(self, data: Buffer) -> None:
        self._watch.feed(data)
        self._scanner.feed(data)

    def warnings(self) -> dict[str, int]:
        """By name, in the order of names; what the container would miss is in FAULTS."""
        return {**self._tree.warnings, "nonzero_padding": self._scanner.dirty_padding}

    def write(self, write: Callable[[bytes], object], tar_size_bytes: int) -> int:
        """The index, up to a multiple of 4096. The number of inodes."""
        self._scanner.close()
        self._tree.refuse_cycles()
        layout = _Layout(self._tree, self._limits, tar_size_bytes)
        layout.judge(self._tree.warnings)

        out = bytearray()
        position = tar_size_bytes

        def flush(least: int = 0) -> None:
            nonlocal position
            if len(out) > least:
                self._watch.feed(out)
                write(bytes(out))
                position += len(out)
                out.clear()

        for record in layout.records():
            out += record
            flush(_EMIT_BYTES)
        for text in self._tree.texts:
            out += text
            flush(_EMIT_BYTES)
        for name, _ in layout.names():
            out += name
            flush(_EMIT_BYTES)
        flush()
        while position < layout.end:
            out += bytes(min(layout.end - position, _EMIT_BYTES))
            flush()
        self._tree.warnings["shadow_superblocks"] = self._watch.found(layout.end)
        write(tarfs.Superblock(tar_size_bytes, len(layout.inodes)).pack())
        return len(layout.inodes)


class _Layout:
    """Where everything goes. Offsets from the start of the file."""

    def __init__(self, tree: _Tree, limits: Limits, start: int) -> None:
        self._tree = tree
        self.inodes: list[_Node] = []  # by number, which is from 1
        visits = [tree.root]
        self._visits = visits
        for node in visits:  # grows while it is walked: that is the breadth-first queue
            if not node.number:
                self.inodes.append(node)
                node.number = len(self.inodes)
                node.children = dict(sorted(node.children.items()))
            visits += node.children.values()
            if len(visits) > 2 * limits.entries:
                raise LimitExceeded(f"more than {2 * limits.entries} names, hardlinks to directories included")
        self._directories_at = start + tarfs.INODE.size * len(self.inodes)
        position = self._directories_at
        name_bytes = 0
        for node in visits:
            if node.mode & _S_IFMT == _S_IFDIR:
                # Of a directory that is visited twice the last copy counts.
                node.offset, node.size = position, tarfs.DIRENT.size * len(node.children)
                position += node.size
                name_bytes += sum(map(len, node.children))
        self.strings_at = position
        self._texts_bytes = sum(map(len, tree.texts))
        self._surviving: list[_Node] = []  # special symlinks, in the order in which their texts are handed out
        handed_out = 0
        for node in self.inodes:
            if node.text is not None:
                node.offset = self.strings_at + handed_out
                handed_out += node.size
                self._surviving.append(node)
        self._handed_out = handed_out
        # Everything in the string area is counted twice.
        self.end = align(self.strings_at + handed_out + self._texts_bytes + 2 * name_bytes, tarfs.BLOCK_BYTES)

    def names(self) -> Iterator[tuple[bytes, _Node]]:
        for node in self._visits:
            if node.mode & _S_IFMT == _S_IFDIR:
                yield from node.children.items()

    def records(self) -> Iterator[bytes]:
        """The inode table, then the directories' entries."""
        for node in self.inodes:
            yield tarfs.INODE.pack(
                node.mode, node.flags, node.mtime >> 32 & 0xF, node.uid, node.gid, node.mtime & 0xFFFFFFFF, node.size,
                node.offset,
            )  # fmt: skip
        # The texts that lost their symlinks are in the string area too, but are not counted here.
        position = self.strings_at + self._handed_out
        for name, node in self.names():
            yield tarfs.DIRENT.pack(node.number, position, len(name), node.mode >> 12)
            position += len(name)

    def judge(self, warnings: dict[str, int]) -> None:
        for node in self.inodes:
            if not node.mode:
                warnings["phantom_directories"] += 1
            if node.mode & _S_IFMT != _S_IFDIR:
                warnings["unreachable_names"] += len(node.children)
        if self._handed_out != self._texts_bytes:
            warnings["shifted_names"] = sum(1 for _ in self.names())
        texts = b"".join(self._tree.texts)
        at = 0
        for node in self._surviving:
            if texts[at : at + node.size] != node.text:
                warnings["wrong_link_texts"] += 1
            at += node.size


class _SuperblockWatch:
    """Looks for blocks that would serve as superblock if the device were cut behind them.

    The kernel module takes the device's last block for the superblock, without a magic, and a root
    hash does not bind the length of the device.
    """

    def __init__(self, read_back: ReadAt | None) -> None:
        self._read_back = read_back
        self._offset = 0
        self._carry = b""  # the start of a record that the pieces cut in two
        self._candidates: list[tuple[int, int]] = []  # (inode table, end of the device)

    def feed(self, data: Buffer) -> None:
        view = memoryview(data)
        block, size = tarfs.BLOCK_BYTES, tarfs.Superblock.LAYOUT.size
        if self._carry:
            missing = size - len(self._carry)
            self._carry += view[:missing]
            if len(self._carry) == size:
                self._look(self._carry, 0, self._offset - (size - missing))
                self._carry = b""
        at = (tarfs.SUPERBLOCK_OFFSET_BYTES - self._offset) % block
        while at + size <= len(view):
            self._look(view, at, self._offset + at)
            at += block
        if at < len(view):
            self._carry = bytes(view[at:])
        self._offset += len(view)

    def _look(self, data: Buffer, at: int, offset: int) -> None:
        table, inodes = tarfs.Superblock.LAYOUT.unpack_from(data, at)
        end = offset - tarfs.SUPERBLOCK_OFFSET_BYTES + tarfs.BLOCK_BYTES
        if inodes and table + inodes * tarfs.INODE.size <= end and len(self._candidates) < _CANDIDATES_MAX:
            self._candidates.append((table, end))

    def found(self, size_bytes: int) -> int:
        """How many would be mounted: those whose root is a directory, where `read_back` can tell."""
        return sum(end <= size_bytes and self._has_root(table) for table, end in self._candidates)

    def _has_root(self, table: int) -> bool:
        if self._read_back is None:
            return True
        mode = int.from_bytes(self._read_back(table, 2), "little")
        return mode & _S_IFMT == _S_IFDIR and not mode & ~(_S_IFMT | tarfs.PERMISSIONS)
