# SPDX-License-Identifier: Apache-2.0
"""The file tree of one layer: what its members, in their order, leave behind. Metadata only.

The rules are containerd's unpacker's onto an overlay upper directory; docs/formats.md ("Reading the
tar stream") lists them with the exceptions. A layer cannot see the layers below it, so a whiteout
stays a mark and a directory without an entry of its own is made and remembered as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType

NAME_BYTES_MAX: Final = 255
LINK_TEXT_BYTES_MAX: Final = 4095
MAJORS: Final = 1 << 12
MINORS: Final = 1 << 20
_HOPS_MAX: Final = 255  # symlinks followed for one path; the kernel stops at 40, Go's unpacker at 255
_WHITEOUT: Final = b".wh."
_WHITEOUT_META: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"
_DOT: Final = ord(".")
_NAMELESS: Final = (b"", b"user.", b"security.")
_CAPABILITY: Final = b"security.capability"
# About what each takes in memory beside its text, on CPython for 64 bits.
_INODE_COST_BYTES: Final = 320
_DIRECTORY_COST_BYTES: Final = 560
_XATTR_COST_BYTES: Final = 220
# Components of link texts that parents may be followed through: texts of 4 KiB, 255 in a row, for
# each of many members would keep a processor busy for hours.
_FOLLOWED_AT_ONCE: Final = 1 << 20
_FOLLOWED_PER_MEMBER: Final = 64

_SETGID: Final = 0o2000

_FORMAT_BITS: Final = {
    MemberType.FILE: S_IFREG,
    MemberType.SYMLINK: S_IFLNK,
    MemberType.CHAR: S_IFCHR,
    MemberType.BLOCK: S_IFBLK,
    MemberType.FIFO: S_IFIFO,
}


class Inode:
    """A non-directory. `mode` is a whole st_mode; `size_bytes` and `tar_offset_bytes` are for files."""

    __slots__ = ("gid", "link", "mode", "mtime", "nlink", "number", "rdev", "size_bytes", "tar_offset_bytes", "uid",
                 "xattr_bytes", "xattrs")  # fmt: skip

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime: tuple[int, int] = (0, 0)) -> None:
        self.mode, self.uid, self.gid, self.mtime = mode, uid, gid, mtime
        self.size_bytes = self.tar_offset_bytes = 0
        self.rdev = (0, 0)
        self.link = b""
        self.xattrs: dict[bytes, bytes] | None = None
        self.xattr_bytes = 0  # what they come to in the index, without its header
        self.nlink = 0
        self.number = -1  # place in the canonical order, once it has one


class Directory(Inode):
    """`explicit`: has an entry of its own; `whiteouts`: names of lower layers that are gone.

    `path_bytes`: how long its path is, with a slash at the end; symlinks can make it longer than any member's name.
    `made`: it was made for want of an entry, which may have come since; `in_made`: then in one without an entry, too.
    `holder` and `name`: where it stands, once the tree is finished; the root has none.
    """

    __slots__ = ("children", "explicit", "holder", "in_made", "made", "name", "opaque", "path_bytes", "whiteouts")

    holder: Directory
    name: bytes

    def __init__(self, path_bytes: int) -> None:
        super().__init__(S_IFDIR | 0o755)
        self.path_bytes = path_bytes
        self.children: dict[bytes, Inode] = {}
        self.explicit = self.made = self.in_made = False
        self.opaque = False
        self.whiteouts: set[bytes] | None = None


class FileTree:
    """Apply members with `add`, then `finish`. Raises FormatError and LimitExceeded."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.root = Directory(0)
        self._metadata_bytes = 0
        self._followed_left = _FOLLOWED_AT_ONCE
        # Archives list a directory's members together: the last parent is usually the next one too.
        self._last_parent: tuple[bytes, Directory] | None = None
        # Names and times of directories with entries: the times are set at the end, by name.
        self._directory_times: list[tuple[bytes, tuple[int, int]]] = []
        self._names_moved = False  # a directory or symlink was replaced: a name may lead elsewhere at the end
        self.dropped_xattrs = 0
        self.invented_directories = 0
        self.made: list[Directory] = []  # what is left of these at the end

    def add(self, member: Member) -> None:
        self._followed_left += _FOLLOWED_PER_MEMBER
        self._charge(len(member.name) + len(member.link) + _INODE_COST_BYTES)
        try:
            self._add(member)
        except FormatError as error:
            raise FormatError(f"member {member.name[:200]!r}: {error}") from None

    def _charge(self, size_bytes: int) -> None:
        self._metadata_bytes += size_bytes
        if self._metadata_bytes > self._limits.metadata_bytes:
            raise LimitExceeded(f"names and attributes exceed {self._limits.metadata_bytes} bytes")

    def _add(self, member: Member) -> None:
        parent_path, _, base = member.name.rstrip(b"/").rpartition(b"/")
        odd = not base or base[0] == _DOT
        if odd and base in (b"", b".", b".."):
            # Rare: let the general rule find the last real component.
            parts = self._split(member.name, last_may_be_mark=True)
            if not parts:
                return
            base = parts.pop()
            parent_path = b"/".join(parts)
        whiteout = odd and base.startswith(_WHITEOUT)
        if len(base) > NAME_BYTES_MAX + (len(_WHITEOUT) if whiteout else 0):
            raise FormatError(f"name component of {len(base)} bytes")
        last = self._last_parent
        if last is not None and last[0] == parent_path:
            parent = last[1]
        else:
            parent = self._directory(self._split(parent_path))
            self._last_parent = (parent_path, parent)

        if whiteout:
            self._whiteout(parent, base)
        elif member.type is MemberType.DIRECTORY:
            self._add_directory(parent, base, member)
        elif member.type is MemberType.HARDLINK:
            self._add_hardlink(parent, base, member)
        else:
            node = self._inode(member)
            if base in parent.children:
                self._replace(parent, base, node)
            else:
                parent.children[base] = node

    @staticmethod
    def _split(path: bytes, *, last_may_be_mark: bool = False) -> list[bytes]:
        parts = [part for part in path.split(b"/") if part and part != b"."]
        for part in parts[:-1] if last_may_be_mark else parts:  # the last one's length is looked at with its mark
            if len(part) > NAME_BYTES_MAX:
                raise FormatError(f"name component of {len(part)} bytes")
        if b".." in parts:
            raise FormatError("'..' in a path")
        return parts

    def _directory(self, parts: list[bytes]) -> Directory:
        found = self._walk(parts, make=True)
        assert isinstance(found, Directory)
        return found

    def _find(self, path: bytes) -> Inode | None:
        """What is at a path, the last symlink followed, too."""
        try:
            return self._walk(self._split(path), make=False, any_type=True)
        except FormatError:
            return None

    def _walk(self, parts: list[bytes], *, make: bool, any_type: bool = False) -> Inode | None:
        """The directory at `parts`, symlinks followed inside the layer's root."""
        stack = [self.root]
        todo = parts[::-1]
        hops = 0
        while todo:
            name = todo.pop()
            if not name or name == b".":
                continue
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            child = stack[-1].children.get(name)
            if child is None:
                if not make:
                    return None
                if len(name) > NAME_BYTES_MAX:
                    raise FormatError(f"name component of {len(name)} bytes")
                self.invented_directories += 1
                if self.invented_directories > self._limits.entries:
                    raise LimitExceeded(f"more than {self._limits.entries} directories without entries")
                self._charge(len(name) + _DIRECTORY_COST_BYTES)
                child = self._new_directory(stack[-1], name)
                child.made, child.in_made = True, stack[-1].made and not stack[-1].explicit
                if stack[-1].mode & _SETGID:
                    child.gid = stack[-1].gid
                stack[-1].children[name] = child
            if isinstance(child, Directory):
                stack.append(child)
            elif child.link:
                hops += 1
                if hops > _HOPS_MAX:
                    raise FormatError("too many symlinks in the path of a parent")
                if child.link.startswith(b"/"):
                    del stack[1:]
                parts = child.link.split(b"/")[::-1]
                self._followed_left -= len(parts)
                if self._followed_left < 0:
                    raise LimitExceeded("too many symlinks in the paths of parents")
                todo += parts
            elif any_type and not todo:
                return child
            else:
                raise FormatError(f"parent is not a directory: {name!r}")
        return stack[-1]

    def _new_directory(self, parent: Directory, name: bytes) -> Directory:
        path_bytes = parent.path_bytes + len(name) + 1
        if path_bytes > self._limits.path_bytes:
            raise LimitExceeded(f"path of {path_bytes} bytes, over the limit of {self._limits.path_bytes}")
        return Directory(path_bytes)

    def _whiteout(self, parent: Directory, base: bytes) -> None:
        if base == _OPAQUE:
            parent.opaque = True
        elif not base.startswith(_WHITEOUT_META):
            name = base[len(_WHITEOUT) :]
            if name in (b"", b".", b".."):
                raise FormatError(f"whiteout of no name: {base!r}")
            if parent.whiteouts is None:
                parent.whiteouts = set()
            parent.whiteouts.add(name)

    def _add_directory(self, parent: Directory, base: bytes, member: Member) -> None:
        node = parent.children.get(base)
        if not isinstance(node, Directory):
            node = self._new_directory(parent, base)
            self._charge(_DIRECTORY_COST_BYTES - _INODE_COST_BYTES)
            self._replace(parent, base, node)
        node.mode = S_IFDIR | member.mode
        node.uid, node.gid, node.mtime = member.uid, member.gid, member.mtime
        node.explicit = True
        self._directory_times.append((member.name, member.mtime))
        self._join_xattrs(node, member.xattrs)

    def _add_hardlink(self, parent: Directory, base: bytes, member: Member) -> None:
        if base in parent.children:
            self._replace(parent, base, None)
        parts = self._split(member.link)
        target: Inode | None = None
        if member.link.endswith((b"/", b"/.")):
            target = self._find(member.link)
        elif parts:
            holder = self._walk(parts[:-1], make=False)
            target = holder.children.get(parts[-1]) if isinstance(holder, Directory) else None
        if target is None:
            raise FormatError(f"hardlink target not earlier in this layer: {member.link[:200]!r}")
        if isinstance(target, Directory):
            raise FormatError(f"hardlink to a directory: {member.link[:200]!r}")
        parent.children[base] = target
        target.uid, target.gid, target.mtime = member.uid, member.gid, member.mtime
        if not target.link:
            target.mode = (target.mode & 0o170000) | member.mode
        if target.xattrs:
            self._set_xattr(target, _CAPABILITY, None)
        self._join_xattrs(target, member.xattrs)

    def _inode(self, member: Member) -> Inode:
        node = Inode(_FORMAT_BITS[member.type] | member.mode, member.uid, member.gid, member.mtime)
        if member.type is MemberType.FILE:
            node.size_bytes, node.tar_offset_bytes = member.size_bytes, member.data_offset_bytes
        elif member.type is MemberType.SYMLINK:
            if not 1 <= len(member.link) <= LINK_TEXT_BYTES_MAX:
                raise FormatError(f"symlink text of {len(member.link)} bytes")
            node.link = member.link
            node.mode = S_IFLNK | 0o777
        elif member.type is not MemberType.FIFO:
            if not 0 <= member.major < MAJORS or not 0 <= member.minor < MINORS:
                raise FormatError(f"device number out of range: {member.major}:{member.minor}")
            node.rdev = (member.major, member.minor)
        if member.xattrs:
            self._join_xattrs(node, member.xattrs)
        return node

    def _replace(self, parent: Directory, base: bytes, node: Inode | None) -> None:
        old = parent.children.get(base)
        if isinstance(old, Directory) or (old is not None and old.link):
            self._last_parent = None  # it may have led through what goes now
            self._names_moved = True
        if node is None:
            del parent.children[base]
        else:
            parent.children[base] = node

    def _join_xattrs(self, node: Inode, xattrs: dict[bytes, bytes]) -> None:
        for name, value in xattrs.items():
            if name in _NAMELESS or (len(name) > NAME_BYTES_MAX and not name.startswith(b"trusted.")):
                raise FormatError(f"xattr name of {len(name)} bytes: {name[:80]!r}")
            if not _representable(name, node.mode) or _says_nothing(name, value):
                self.dropped_xattrs += 1
                continue
            self._set_xattr(node, name, value)
            self._charge(len(name) + len(value) + _XATTR_COST_BYTES)
        # Of all of them, joined: one may make room for another.
        if node.xattrs and erofs.XATTR_HEADER_BYTES + node.xattr_bytes > self._limits.xattr_bytes:
            raise LimitExceeded(f"xattrs of one file exceed {self._limits.xattr_bytes} bytes")

    def _set_xattr(self, node: Inode, name: bytes, value: bytes | None) -> None:
        """None takes it away."""
        split = erofs.split_xattr_name(name)
        assert split is not None  # else it is not representable
        rest = split[1]
        if node.xattrs is None:
            node.xattrs = {}
        old = node.xattrs.pop(name, None)
        if old is not None:
            node.xattr_bytes -= erofs.xattr_entry_bytes(rest, old)
        if value is None:
            return
        if len(value) > erofs.XATTR_VALUE_BYTES_MAX:
            raise FormatError(f"xattr {name[:80]!r} of {len(value)} bytes is over the format's limit")
        node.xattrs[name] = value
        node.xattr_bytes += erofs.xattr_entry_bytes(rest, value)

    def finish(self) -> list[Inode]:
        """Turn marks into nodes and number the inodes: the canonical order, breadth first by name.

        Each inode stands at its first name; nlink is set. Call once.
        """
        self._last_parent = None
        if self._names_moved:
            for path, mtime in self._directory_times:
                found = self._find(path)
                if found is None:
                    raise FormatError(f"directory {path[:200]!r} is gone when its time is set")
                if found is not self.root:
                    found.mtime = mtime
        self.root.number = 0
        order: list[Inode] = [self.root]
        for node in order:  # grows while it is walked: that is the breadth-first queue
            if not isinstance(node, Directory):
                continue
            for name in node.whiteouts or ():
                existing = node.children.get(name)
                if existing is None:
                    node.children[name] = Inode(S_IFCHR)
                elif isinstance(existing, Directory):
                    existing.opaque = True
            if node.opaque:
                node.xattrs = {**(node.xattrs or {}), b"trusted.overlay.opaque": b"y"}
            node.nlink = 2
            for child_name, child in sorted_children(node):
                if isinstance(child, Directory):
                    node.nlink += 1
                    child.holder, child.name = node, child_name
                    if child.made:
                        self.made.append(child)
                else:
                    child.nlink += 1
                if child.number < 0:
                    child.number = len(order)
                    order.append(child)
        return order


def canonical_order(root: Directory) -> list[Inode]:
    """Of a tree of directories alone: numbers and link counts are set."""
    root.number = 0
    order: list[Inode] = [root]
    for node in order:
        assert isinstance(node, Directory)
        node.nlink = 2 + len(node.children)
        for _, child in sorted_children(node):
            child.number = len(order)
            order.append(child)
    return order


def sorted_children(node: Directory) -> Iterator[tuple[bytes, Inode]]:
    """Children in bytewise name order."""
    children = node.children
    for name in sorted(children):
        yield name, children[name]


def _says_nothing(name: bytes, value: bytes) -> bool:
    """An ACL that the kernel takes and does not keep: without entries, of a version it does not know, or the mode's."""
    if not name.startswith(b"system.posix_acl_"):
        return False
    if len(value) <= 4 or value[:4] != b"\2\0\0\0":
        return True
    tags = [int.from_bytes(value[at : at + 2], "little") for at in range(4, len(value), 8)]
    return name.endswith(b"access") and tags == [1, 4, 32] and len(value) == 28


def _representable(name: bytes, mode: int) -> bool:
    """Whether EROFS has a name index for the attribute and the kernel would show it on such a file."""
    if name.startswith(b"trusted."):
        return False  # overlay's own are the index writer's to set, never a layer's
    if name.startswith(b"user.") and mode & 0o170000 not in (S_IFREG, S_IFDIR):
        return False
    return erofs.split_xattr_name(name) is not None
