# SPDX-License-Identifier: Apache-2.0
"""The directories that a chain of layers shows with wrong attributes, and the right ones.

A layer may add to a directory without an entry for it. Its own index then has made attributes, which in an overlay
hide those of the layers below. containerd's unpacker copies them up from there; the parents layer, on top of all, has
them instead. docs/formats.md, "The format `tar-index-parents`", has the rules.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from stat import S_IFDIR
from typing import Final, Protocol

from blockdev.errors import LimitExceeded
from blockdev.formats import directory_table, erofs
from blockdev.formats.directory_table import Attributes, Record
from blockdev.formats.entry import FORMAT_MASK
from blockdev.formats.erofs_reader import Inode, Reader
from blockdev.formats.file_tree import Directory

# Of one chain: what is carried is held in memory, and every layer above carries it again.
DIRECTORIES_MAX: Final = 100_000
TABLE_BYTES_MAX: Final = 32 << 20
_SETGID: Final = 0o2000
_OPAQUE_XATTR: Final = b"trusted.overlay.opaque"


@dataclass(slots=True)
class Carried:
    """A directory of the parents layer, never changed once it is part of a table.

    `differs`: from what the layers show without it; the others are on the way to one that does.
    """

    attributes: Attributes
    differs: bool = False
    children: dict[bytes, Carried] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One component of a path on the way of a walk; two of the same name are different steps."""

    name: bytes


class What(enum.Enum):
    DIRECTORY = enum.auto()
    ABSENT = enum.auto()
    OTHER = enum.auto()  # at the path, or where it would need a directory


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer has at a path. `below_opaque`: in a directory that hides what layers below have in it."""

    what: What
    below_opaque: bool
    opaque: bool = False
    inode: Inode | None = None


_ABSENT: Final = {hidden: Seen(What.ABSENT, hidden) for hidden in (False, True)}
_OTHER: Final = {hidden: Seen(What.OTHER, hidden) for hidden in (False, True)}


class Cursor:
    """Looks up paths in one layer's index. Questions whose paths begin with the same steps share the way.

    The index may be any bytes: raises FormatError and LimitExceeded, and what its reader raises.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # As far as the layer has the way; what ends it is its last.
        self._way: list[tuple[Step | None, Seen]] = [(None, self._seen(reader.root(), below_opaque=False))]

    def look(self, path: Sequence[Step]) -> Seen:
        way = self._way
        while len(way) > 1 and (len(way) - 1 > len(path) or way[-1][0] is not path[len(way) - 2]):
            way.pop()
        while len(way) <= len(path):
            last = way[-1][1]
            if last.what is not What.DIRECTORY:
                return last
            assert last.inode is not None
            step = path[len(way) - 1]
            # Of the roots an overlay looks at no mark: all are merged.
            hidden = last.below_opaque or (last.opaque and len(way) > 1)
            way.append((step, self._seen(self._reader.child(last.inode, step.name), below_opaque=hidden)))
        return way[-1][1]

    def _seen(self, inode: Inode | None, *, below_opaque: bool) -> Seen:
        if inode is None:
            return _ABSENT[below_opaque]
        if inode.mode & FORMAT_MASK != S_IFDIR:
            return _OTHER[below_opaque]
        return Seen(What.DIRECTORY, below_opaque, _OPAQUE_XATTR in self._reader.xattrs(inode), inode)

    def attributes(self, seen: Seen) -> Attributes:
        """Of a directory."""
        inode = seen.inode
        assert inode is not None
        xattrs = {key: value for key, value in self._reader.xattrs(inode).items() if not key.startswith(b"trusted.")}
        return Attributes(inode.mode & 0o7777, inode.uid, inode.gid, inode.mtime, xattrs)


@dataclass(slots=True)
class _Frame:
    """A directory of the new layer that the walk is in."""

    out: Carried
    name: bytes
    below: dict[bytes, Carried]  # what the chain below carries in it, as far as it can still be seen
    bare: bool  # no layer below shows it
    copied: Attributes | None  # what it was made with, where it was made: those of the layers below


class _Merge:
    def __init__(self, own: Cursor, lowers: Iterable[Cursor]) -> None:
        self._own = own
        self._lowers = iter(lowers)
        self._opened: list[Cursor] = []
        self._path: list[Step] = []
        self._held = self._held_bytes = 0  # directories, and their names and xattrs

    def _hold(self, name: bytes, attributes: Attributes, sign: int = 1) -> None:
        """Before a hostile chain fills the memory. Raises LimitExceeded."""
        self._held += sign
        self._held_bytes += sign * _size(name, attributes)
        _check(self._held, self._held_bytes)

    def run(self, below: Carried | None, made: Iterable[Record]) -> Carried | None:
        frames: list[_Frame] = []
        root: Carried | None = None
        for record in made:
            while len(frames) > record.depth:
                self._close(frames)
            if frames:
                self._enter(frames, record)
            else:
                root = Carried(record.attributes)
                carried = dict(below.children) if below is not None else {}
                frames.append(_Frame(root, b"", carried, bare=False, copied=None))
        if root is None and below is not None:
            root = Carried(below.attributes)
            frames.append(_Frame(root, b"", dict(below.children), bare=False, copied=None))
        while frames:
            self._close(frames)
        return root if root is not None and root.children else None

    def _enter(self, frames: list[_Frame], record: Record) -> None:
        above, own = frames[-1], record.attributes
        self._path.append(Step(record.name))
        carried = above.below.pop(record.name, None)
        base: Attributes | None = None
        bare = above.bare
        if carried is not None:
            base = carried.attributes
        elif record.flags & directory_table.MADE and not bare:
            base = self._below()
            bare = base is None
        true = own
        if record.flags & directory_table.MADE:
            if record.flags & directory_table.ENTRY:
                if base is not None:
                    true = replace(own, xattrs={**base.xattrs, **own.xattrs})
            elif base is not None:
                true = replace(base, mtime=own.mtime)
            elif record.flags & directory_table.IN_MADE and above.copied and above.copied.mode & _SETGID:
                true = replace(own, gid=above.copied.gid)
        self._hold(record.name, true)
        opaque = bool(record.flags & directory_table.OPAQUE)
        frames.append(
            _Frame(
                Carried(true, true.shown() != own.shown()),
                record.name,
                dict(carried.children) if carried is not None and not opaque else {},
                bare or opaque,
                base,
            )
        )

    def _close(self, frames: list[_Frame]) -> None:
        frame = frames.pop()
        self._follow(frame.out, frame.below)
        if frames:
            self._path.pop()
            if frame.out.differs or frame.out.children:
                frames[-1].out.children[frame.name] = frame.out
            else:
                self._hold(frame.name, frame.out.attributes, -1)

    def _follow(self, into: Carried, carried: dict[bytes, Carried]) -> None:
        """Directories that the chain below carries, and that the new layer has an entry for, or not at all."""
        work = [(into, iter(carried.items()))]
        while work:
            out, rest = work[-1]
            for name, node in rest:
                self._path.append(Step(name))
                seen = self._own.look(self._path)
                if seen.what is What.DIRECTORY and node.children and not seen.opaque:
                    attributes = self._own.attributes(seen)
                    self._hold(name, attributes)
                    work.append((Carried(attributes), iter(node.children.items())))
                    break
                if seen.what is What.ABSENT:
                    out.children[name] = node
                self._path.pop()
            else:
                work.pop()
                if work:
                    name = self._path.pop().name
                    if out.children:
                        work[-1][0].children[name] = out

    def _below(self) -> Attributes | None:
        """Of the directory at the path of the walk in the topmost layer below that shows it."""
        for cursor in self._lower_cursors():
            seen = cursor.look(self._path)
            if seen.what is What.DIRECTORY:
                return cursor.attributes(seen)
            if seen.what is What.OTHER or seen.below_opaque:
                return None
        return None

    def _lower_cursors(self) -> Iterator[Cursor]:
        yield from self._opened
        for cursor in self._lowers:
            self._opened.append(cursor)
            yield cursor


def merged(below: Carried | None, made: Iterable[Record], own: Cursor, lowers: Iterable[Cursor]) -> Carried | None:
    """The root of what the parents layer of a chain carries; None where the chain needs none.

    `below`: the same of the chain without its topmost layer. Of that layer, `made` is its table of made directories
    (empty without any) and `own` its index; `lowers` are the layers below it, topmost first, opened as they are
    needed. Time: in the size of `made` and `below`, and for a directory of `made` that `below` lacks the layers down
    to the first that shows it. Raises FormatError and LimitExceeded, and what the readers raise.
    """
    return _Merge(own, lowers).run(below, made)


class ChainLayer(Protocol):
    """A layer as its parents layer needs it. `has_table`: it made directories; `made`: that table; `cursor`: into its
    index, good for one merge."""

    @property
    def has_table(self) -> bool: ...
    def made(self) -> Iterable[Record]: ...
    def cursor(self) -> Cursor: ...


def carried_by(layers: Sequence[ChainLayer]) -> Carried | None:
    """By the parents layer of a whole chain, the first layer first; None where it needs none. Raises as `merged`."""
    carried: Carried | None = None
    for number, layer in enumerate(layers):
        if carried is not None or (number and layer.has_table):
            lowers = (each.cursor() for each in reversed(layers[:number]))
            carried = merged(carried, layer.made(), layer.cursor(), lowers)
    return carried


def pack(root: Carried) -> bytes:
    """The canonical table. Raises LimitExceeded."""
    return directory_table.parents_table(_records(root))


def _records(root: Carried) -> Iterator[Record]:
    todo = [(0, b"", root)]
    count = size_bytes = 0
    while todo:
        depth, name, node = todo.pop()
        record = Record(depth, directory_table.DIFFERS * node.differs, name, node.attributes)
        count += 1
        size_bytes += _size(name, node.attributes)
        _check(count, size_bytes)
        if len(erofs.xattr_body(node.attributes.xattrs)) > erofs.XATTR_BODY_BYTES_MAX:
            raise LimitExceeded(f"xattrs of one directory exceed {erofs.XATTR_BODY_BYTES_MAX} bytes")
        yield record
        todo += [(depth + 1, child, node.children[child]) for child in sorted(node.children, reverse=True)]


def _size(name: bytes, attributes: Attributes) -> int:
    return len(name) + sum(len(key) + len(value) for key, value in attributes.xattrs.items())


def _check(count: int, size_bytes: int) -> None:
    if count > DIRECTORIES_MAX or size_bytes > TABLE_BYTES_MAX:
        raise LimitExceeded(
            "the layers of this image add to too many directories without an entry for them: a parents layer has"
            f" at most {DIRECTORIES_MAX}, and {TABLE_BYTES_MAX} bytes of names and attributes"
        )


def unpack(records: Iterable[Record]) -> Carried:
    """Of `directory_table.read_parents_table`; what that raises."""
    line: list[Carried] = []
    for record in records:
        node = Carried(record.attributes, bool(record.flags & directory_table.DIFFERS))
        del line[record.depth :]
        if line:
            line[-1].children[record.name] = node
        line.append(node)
    return line[0]


def directories(records: Iterable[Record]) -> Directory:
    """The tree that the index of a parents layer shows."""
    line: list[Directory] = []
    for record in records:
        attributes = record.attributes
        node = Directory(0)
        node.mode = S_IFDIR | attributes.mode
        node.uid, node.gid, node.mtime = attributes.uid, attributes.gid, attributes.mtime
        node.xattrs = attributes.xattrs or None
        del line[record.depth :]
        if line:
            line[-1].children[record.name] = node
        line.append(node)
    return line[0]
