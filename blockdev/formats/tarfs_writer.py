# SPDX-License-Identifier: Apache-2.0
"""Members → tarfs tree → index, bit for bit as Microsoft's tools make it, their faults included.

docs/formats.md, "The format `tarfs`". Where the result would come out wrong in a guest it is counted
in `warnings`; where those tools hang or fail, the layer is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import tarfs
from blockdev.formats.entry import FORMAT_MASK
from blockdev.formats.layer_file import ReadAt, align
from blockdev.formats.limits import Limits
from blockdev.formats.tarfs_tar import Dialect, TarfsMember, TarfsScanner
from verity.buffers import Buffer

_HARDLINK, _GLOBAL = 0x31, 0x67
_TYPES: Final = {
    0x30: S_IFREG,
    0x00: S_IFREG,
    0x32: S_IFLNK,
    0x33: S_IFCHR,
    0x34: S_IFBLK,
    0x35: S_IFDIR,
    0x36: S_IFIFO,
}
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_DOTS: Final = frozenset((b"", b".", b".."))  # what `.wh.`, `.wh..` and `.wh...` come down to
_TIME_MASK: Final = (1 << tarfs.TIME_BITS) - 1
_EMIT_BYTES: Final = 256 << 10
# About what a node, a name and a text take in memory beside their bytes, on CPython for 64 bits.
_NODE_COST_BYTES: Final = 420
_CANDIDATES_MAX: Final = 1 << 20

# Warnings that mean: the container would see other files than the image has, or than containerd's own unpacking of
# it shows. docs/formats.md has what each of them does in a guest.
FAULTS: Final = frozenset(
    (
        "bad_root", "changed_links", "cut_device_numbers", "cut_link_texts", "dropped_names", "dropped_xattrs",
        "hidden_members", "ignored_link_headers", "impossible_names", "lost_marks", "lost_mode_bits",
        "misread_headers", "phantom_directories", "shadow_superblocks", "shifted_names", "skipped_members",
        "sparse_members", "unreachable_names", "wrong_link_texts", "wrong_owners", "wrong_times",
    )
)  # fmt: skip


class _Node:
    """`mode`: type and permissions, 0 for a phantom, which was only ever named as somebody's parent.
    `children` is None as long as there are none: most nodes are files."""

    __slots__ = ("children", "flags", "gid", "linked", "mode", "mtime", "number", "offset", "size", "text", "uid")

    def __init__(self) -> None:
        self.mode = self.flags = self.uid = self.gid = self.mtime = self.size = self.offset = self.number = 0
        self.linked = False  # has been given another name
        self.children: dict[bytes, _Node] | None = None
        self.text: bytes | None = None  # of a symlink that does not have it in its header

    @property
    def whiteout(self) -> bool:
        return self.mode & FORMAT_MASK == S_IFCHR and not self.offset


class _Tree:
    """What the members leave behind, in their order."""

    def __init__(self, dialect: Dialect, limits: Limits) -> None:
        self._dialect, self._limits = dialect, limits
        self.root = _Node()
        self.root.mode = S_IFDIR | 0o555
        self.texts: list[bytes] = []  # of special symlinks, whatever becomes of these
        self.warnings = dict.fromkeys(sorted(FAULTS), 0)
        self.hardlinks = False
        self._memory = 0
        # Members mostly come directory by directory. Good until a name of the tree leads elsewhere.
        self._last_parent: tuple[bytes, _Node] | None = None

    def _charge(self, size_bytes: int) -> None:
        self._memory += size_bytes
        if self._memory > self._limits.metadata_bytes:
            raise LimitExceeded(f"names and attributes exceed {self._limits.metadata_bytes} bytes")

    def _child(self, parent: _Node, name: bytes) -> _Node:
        if parent.children is None:
            parent.children = {}
        child = parent.children.get(name)
        if child is None:
            child = parent.children[name] = _Node()
            self._charge(len(name) + _NODE_COST_BYTES)
        return child

    def _walk(self, parts: list[bytes]) -> _Node:
        node = self.root
        for part in parts:
            node = self._child(node, part)
        return node

    def _parent(self, path: bytes) -> tuple[_Node | None, bytes] | None:
        """The node above the last component, and that component; no node for the root. None: leads above it."""
        above, _, last = path.rstrip(b"/").rpartition(b"/")
        if last in (b"", b".", b".."):
            parts = _clean(path)
            if not parts:
                return None if parts is None else (None, b"")
            last = parts.pop()
            return self._walk(parts), last
        if self._last_parent is not None and self._last_parent[0] == above:
            return self._last_parent[1], last
        parts = _clean(above)
        if parts is None:
            return None
        parent = self._walk(parts)
        self._last_parent = above, parent
        return parent, last

    def add(self, member: TarfsMember) -> None:
        if not self._apply(member) and member.type != _GLOBAL:  # which is nothing for containerd either
            self.warnings["skipped_members"] += 1

    def _apply(self, member: TarfsMember) -> bool:
        """False for a member that is skipped."""
        if member.mode is None:
            return False
        if member.type == _HARDLINK:
            return self._hardlink(member, member.mode)
        file_type = _TYPES.get(member.type)
        if file_type is None:
            return False
        size = offset = 0
        text = None
        if file_type == S_IFREG:
            size, offset = member.size_bytes, member.data_offset_bytes
        elif file_type == S_IFLNK:
            if member.link is None:
                return False
            size = len(member.link)
            if member.link_offset_bytes is not None:
                offset = member.link_offset_bytes
            elif not self._dialect.special_links:
                return False
            else:
                text = member.link
                self._charge(size + _NODE_COST_BYTES)
                self.texts.append(text)
        elif file_type in (S_IFCHR, S_IFBLK):
            if member.device is None:
                return False
            major, minor = member.device
            offset = major << 32 | minor

        place = self._parent(member.name)
        if place is None:
            return False
        parent, name = place
        if parent is None:
            node = self.root
        elif name.startswith(_WHITEOUT):
            self._mark(parent, name, member)
            return True
        else:
            node = self._child(parent, name)
        if node.mode or node.children or node.flags:
            self._overwrite(node, file_type)
        node.mode = file_type | member.mode & tarfs.PERMISSIONS
        node.flags, node.uid, node.gid, node.mtime = 0, member.uid, member.gid, member.mtime & _TIME_MASK
        node.size, node.offset, node.text = size, offset, text
        self._judge(member, member.mode, file_type, on_root=parent is None)
        return True

    def _overwrite(self, node: _Node, file_type: int) -> None:
        """In place, so under each of its names, and with all that it holds."""
        warnings = self.warnings
        directory = file_type == S_IFDIR
        if node.children:
            if directory or node.mode & FORMAT_MASK not in (S_IFDIR, 0):
                warnings["dropped_names"] += len(node.children)
            # else whatever replaces a directory takes its place with all below it: that is what everybody does
            self._drop_children(node)
        if directory and (node.flags or node.whiteout):
            warnings["lost_marks"] += 1
        if node.linked:
            warnings["changed_links"] += 1

    def _mark(self, parent: _Node, name: bytes, member: TarfsMember) -> None:
        if member.faults and "misread_headers" in member.faults:
            self.warnings["misread_headers"] += 1
        if name == _OPAQUE:
            parent.flags |= tarfs.FLAG_OPAQUE
            return
        node = self._child(parent, name[len(_WHITEOUT) :])
        if node.mode and not node.whiteout:
            # A mark speaks of lower layers; here this layer's own file goes.
            self.warnings["dropped_names"] += 1
        if node.linked:
            self.warnings["changed_links"] += 1
        if node.children:
            self.warnings["dropped_names"] += len(node.children)
            self._drop_children(node)
        node.mode = S_IFCHR | node.mode & tarfs.PERMISSIONS
        node.size = node.offset = 0
        node.text = None

    def _drop_children(self, node: _Node) -> None:
        node.children = None
        self._last_parent = None

    def _judge(self, member: TarfsMember, mode: int, file_type: int, *, on_root: bool) -> None:
        """What of this member the file system has no place for, or the scanner found read wrongly."""
        warnings, faults = self.warnings, member.faults
        if on_root:
            # Attributes of a layer's root show nowhere: an overlay has those of its upper directory.
            if faults and "misread_headers" in faults:
                warnings["misread_headers"] += 1
            return
        if faults:
            for fault, times in faults.items():
                warnings[fault] += times
        if mode & 0o7000 and file_type != S_IFLNK:
            warnings["lost_mode_bits"] += 1
        if member.mtime > _TIME_MASK:
            warnings["wrong_times"] += 1
        if file_type == S_IFLNK:
            if member.link and len(member.link) > tarfs.LINK_TEXT_BYTES_MAX:
                warnings["cut_link_texts"] += 1
        elif member.device is not None:
            major, minor = member.device
            if major >= tarfs.MAJORS or minor >= tarfs.MINORS:
                warnings["cut_device_numbers"] += 1

    def _hardlink(self, member: TarfsMember, mode: int) -> bool:
        target_parts = _clean(member.link or b"")
        if target_parts is None:
            return False
        target = self._walk(target_parts)
        if target.mode & FORMAT_MASK != S_IFREG:
            return False
        place = self._parent(member.name)
        if place is None:
            return False
        parent, name = place
        self.hardlinks = target.linked = True
        self._judge_link(member, mode, target, name)
        self._last_parent = None
        if parent is None:
            self.root = target
            return True
        if parent.children is None:
            parent.children = {}
        if name not in parent.children:
            self._charge(len(name) + _NODE_COST_BYTES)
        parent.children[name] = target
        return True

    def _judge_link(self, member: TarfsMember, mode: int, target: _Node, name: bytes) -> None:
        faults = member.faults or {}
        for fault in ("misread_headers", "dropped_xattrs"):
            self.warnings[fault] += faults.get(fault, 0)
        if name.startswith(_WHITEOUT):
            self.warnings["lost_marks"] += 1  # a file of this name, where everybody else sees a mark
        header = S_IFREG | mode & tarfs.PERMISSIONS, member.uid, member.gid, member.mtime & _TIME_MASK
        if header != (target.mode, target.uid, target.gid, target.mtime):
            self.warnings["ignored_link_headers"] += 1

    def refuse_cycles(self) -> None:
        """A link below its own target makes one; Microsoft's tools then run for ever. Raises FormatError."""
        if not self.hardlinks:
            return
        done: set[int] = set()
        path: set[int] = {id(self.root)}
        stack: list[tuple[_Node, Iterator[_Node]]] = [(self.root, iter((self.root.children or {}).values()))]
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
        """By name; what the container would miss is in FAULTS."""
        return {**self._tree.warnings, "nonzero_padding": self._scanner.dirty_padding}

    def write(self, write: Callable[[bytes], object], tar_size_bytes: int) -> int:
        """The index, up to a multiple of 4096. The number of inodes."""
        self._scanner.close()
        self._tree.refuse_cycles()
        layout = _Layout(self._tree, self._limits, tar_size_bytes)
        layout.judge(self._tree.warnings)
        self._tree.warnings["hidden_members"] = int(self._scanner.hidden_members)

        out = bytearray()
        position = tar_size_bytes

        def flush() -> None:
            nonlocal position
            self._watch.feed(out)
            write(bytes(out))
            position += len(out)
            out.clear()

        for piece in layout.pieces():
            out += piece
            if len(out) > _EMIT_BYTES:
                flush()
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
        for node in visits:  # grows while it is walked: that is the breadth-first queue
            if not node.number:
                self.inodes.append(node)
                node.number = len(self.inodes)
                if node.children is not None:
                    node.children = dict(sorted(node.children.items()))
            if node.children is not None:
                visits += node.children.values()
                if len(visits) > 2 * limits.entries:
                    raise LimitExceeded(f"more than {2 * limits.entries} names, hardlinks to directories included")
        # Each visit, not each directory: one that is reached under two names is written twice.
        self._tables = [(node, node.children or {}) for node in visits if node.mode & FORMAT_MASK == S_IFDIR]
        position = start + tarfs.INODE.size * len(self.inodes)
        name_bytes = 0
        for node, children in self._tables:
            # Of a directory that is visited twice the last copy counts.
            node.offset, node.size = position, tarfs.DIRENT.size * len(children)
            position += node.size
            name_bytes += sum(map(len, children))
            if name_bytes > limits.metadata_bytes:
                raise LimitExceeded(f"names exceed {limits.metadata_bytes} bytes, hardlinks to directories included")
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

    def pieces(self) -> Iterator[bytes]:
        """The inode table, the directories' entries, the texts, the names."""
        pack_inode, pack_entry = tarfs.INODE.pack, tarfs.DIRENT.pack
        for node in self.inodes:
            mtime = node.mtime
            yield pack_inode(
                node.mode, node.flags, mtime >> 32, node.uid, node.gid, mtime & 0xFFFFFFFF, node.size, node.offset
            )
        # The texts that lost their symlinks are in the string area too, but are not counted here.
        position = self.strings_at + self._handed_out
        for _, children in self._tables:
            for name, node in children.items():
                size = len(name)
                yield pack_entry(node.number, position, size, node.mode >> 12)
                position += size
        yield from self._tree.texts
        for _, children in self._tables:
            yield b"".join(children)

    def judge(self, warnings: dict[str, int]) -> None:
        for node in self.inodes:
            if not node.mode:
                warnings["phantom_directories"] += 1
            names = node.children
            if names is None:
                continue
            if node.mode & FORMAT_MASK != S_IFDIR:
                warnings["unreachable_names"] += len(names)
            elif max(map(len, names)) > tarfs.NAME_BYTES_MAX or b"\0" in b"".join(names) or not _DOTS.isdisjoint(names):
                warnings["impossible_names"] += sum(map(_impossible, names))
        if self._tree.root.mode & FORMAT_MASK != S_IFDIR:
            warnings["bad_root"] = 1
        if self._handed_out != self._texts_bytes:
            warnings["shifted_names"] = sum(len(children) for _, children in self._tables)
        texts = b"".join(self._tree.texts)
        at = 0
        for node in self._surviving:
            if texts[at : at + node.size] != node.text:
                warnings["wrong_link_texts"] += 1
            at += node.size


def _impossible(name: bytes) -> bool:
    """No program can ask for it."""
    return len(name) > tarfs.NAME_BYTES_MAX or name in _DOTS or b"\0" in name


class _SuperblockWatch:
    """Looks for blocks that would serve as superblock if the device were cut behind them.

    The kernel module takes the device's last block for the superblock, without a magic, and a root
    hash does not bind the length of the device.
    """

    def __init__(self, read_back: ReadAt | None) -> None:
        self._read_back = read_back
        self._offset = 0
        self._carry = b""  # the start of a record that the pieces cut in two
        # Inode table, inodes and end of the device, one after the other: an array, for there may be many.
        self._candidates = array("Q")
        self._more = 0  # candidates beyond those

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
        if not inodes or table + inodes * tarfs.INODE.size > end:
            return
        if len(self._candidates) < 3 * _CANDIDATES_MAX:
            self._candidates.extend((table, inodes, end))
        else:
            self._more += 1

    def found(self, size_bytes: int) -> int:
        """How many would be mounted with a root that can be listed, where `read_back` can tell. Each beyond
        _CANDIDATES_MAX is taken for one."""
        values = iter(self._candidates)
        return self._more + sum(
            end <= size_bytes and self._has_root(table, inodes, end)
            for table, inodes, end in zip(values, values, values, strict=True)
        )

    def _has_root(self, table: int, inodes: int, end: int) -> bool:
        """A directory that is empty, or whose first entry names an inode. Ordinary data often looks like a
        superblock, and now and then like an inode of a directory, too."""
        if self._read_back is None:
            return True
        mode, *_, size, offset = tarfs.INODE.unpack(self._read_back(table, tarfs.INODE.size))
        if mode & FORMAT_MASK != S_IFDIR or mode & ~(FORMAT_MASK | tarfs.PERMISSIONS):
            return False
        if not size:
            return True
        if size % tarfs.DIRENT.size or offset + size > end:
            return False
        number, name_at, name_bytes, _ = tarfs.DIRENT.unpack(self._read_back(offset, tarfs.DIRENT.size))
        return bool(1 <= number <= inodes and 1 <= name_bytes <= tarfs.NAME_BYTES_MAX and name_at + name_bytes <= end)
