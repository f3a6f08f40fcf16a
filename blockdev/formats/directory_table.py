# SPDX-License-Identifier: Apache-2.0
"""Tables of directories: those that a layer made for want of an entry, and those that a parents layer carries.

docs/formats.md, "The format `tar-index-parents`", has the bytes of both. Whatever is read here is taken for hostile.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from blockdev.errors import FormatError
from blockdev.formats import erofs
from blockdev.formats.file_tree import NAME_BYTES_MAX, Directory
from blockdev.formats.layer_file import ReadAt

MADE: Final = 0x1  # for want of an entry
ENTRY: Final = 0x2  # has an entry; with MADE: it came later
IN_MADE: Final = 0x4  # made in a directory that had no entry at that time and was made itself
OPAQUE: Final = 0x8
DIFFERS: Final = 0x10  # from what the layers show without it
_LAYER_FLAGS: Final = MADE | ENTRY | IN_MADE | OPAQUE

LAYER_MAGIC: Final = b"MADEDIRS"
PARENTS_MAGIC: Final = b"PARENTS\0"
_HEAD: Final = struct.Struct("<8sII")  # magic, version, records
# depth, flags, mode, uid, gid, seconds, nanoseconds, length of the name, of the xattr body
_RECORD: Final = struct.Struct("<IHHIIqIHxxI")
_DIGEST_BYTES: Final = 32
_PIECE_BYTES: Final = 256 << 10
assert _RECORD.size == 36


@dataclass(frozen=True, slots=True)
class Attributes:
    """Of a directory. `mode`: the lower 12 bits. `xattrs`: without those of `trusted.`"""

    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    xattrs: dict[bytes, bytes]

    def shown(self) -> tuple[int, int, int, dict[bytes, bytes]]:
        """All but the time: a directory without an entry has none that any tar would tell."""
        return self.mode, self.uid, self.gid, self.xattrs


@dataclass(frozen=True, slots=True)
class Record:
    """One directory, behind the one that holds it and in front of those that it holds. The root has depth 0."""

    depth: int
    flags: int
    name: bytes
    attributes: Attributes

    def pack(self) -> bytes:
        attributes, body = self.attributes, erofs.xattr_body(self.attributes.xattrs)
        return (
            _RECORD.pack(
                self.depth, self.flags, attributes.mode, attributes.uid, attributes.gid, *attributes.mtime,
                len(self.name), len(body),
            )
            + self.name
            + body
        )  # fmt: skip


def layer_table(root: Directory, made: Iterable[Directory], diff_id: bytes) -> Iterator[bytes]:
    """Of a finished file tree, in pieces: the directories `made`, and all above them."""
    held: dict[Directory, list[Directory]] = {root: []}
    for node in made:
        while node not in held:
            held[node] = []
            node = node.holder
    for node in held:
        if node is not root:
            held[node.holder].append(node)
    digest = hashlib.sha256()
    out = bytearray(_HEAD.pack(LAYER_MAGIC, 1, len(held)) + diff_id)
    todo = [(0, root)]
    while todo:
        depth, node = todo.pop()
        out += Record(depth, _flags(node), node.name if depth else b"", attributes_of(node)).pack()
        todo += [(depth + 1, child) for child in sorted(held[node], key=_name, reverse=True)]
        if len(out) >= _PIECE_BYTES:
            digest.update(out)
            yield bytes(out)
            out.clear()
    digest.update(out)
    yield bytes(out) + digest.digest()


def _name(node: Directory) -> bytes:
    return node.name


def _flags(node: Directory) -> int:
    return MADE * node.made | ENTRY * node.explicit | IN_MADE * node.in_made | OPAQUE * node.opaque


def attributes_of(node: Directory) -> Attributes:
    xattrs = {name: value for name, value in (node.xattrs or {}).items() if not name.startswith(b"trusted.")}
    return Attributes(node.mode & 0o7777, node.uid, node.gid, node.mtime, xattrs)


class _Source:
    """Bytes of a table, front to back."""

    def __init__(self, read_at: ReadAt, size_bytes: int) -> None:
        self._read_at, self._left = read_at, size_bytes
        self._offset = 0
        self._piece = memoryview(b"")
        self.digest = hashlib.sha256()

    def take(self, size: int) -> bytes:
        """Raises FormatError at the end."""
        if size > len(self._piece):
            if size > len(self._piece) + self._left:
                raise FormatError("directory table ends within a record")
            wanted = min(max(_PIECE_BYTES, size), self._left)
            piece = self._read_at(self._offset, wanted)
            if len(piece) != wanted:
                raise FormatError("directory table is cut short")
            self._piece = memoryview(bytes(self._piece) + piece)
            self._offset += wanted
            self._left -= wanted
        data = bytes(self._piece[:size])
        self._piece = self._piece[size:]
        self.digest.update(data)
        return data

    def end(self) -> None:
        if self._left or self._piece:
            raise FormatError("directory table goes on behind its end")


def read_layer_table(read_at: ReadAt, size_bytes: int, diff_id: bytes) -> Iterator[Record]:
    """What `layer_table` wrote for the layer. Raises FormatError, for a wrong checksum at the end only."""
    source = _Source(read_at, size_bytes)
    records = _head(source, LAYER_MAGIC)
    if source.take(_DIGEST_BYTES) != diff_id:
        raise FormatError("directory table is another layer's")
    yield from _records(source, records, _LAYER_FLAGS)
    expected = source.digest.digest()
    if source.take(_DIGEST_BYTES) != expected:
        raise FormatError("directory table has a wrong checksum")
    source.end()


def parents_table(records: Iterable[Record]) -> bytes:
    """The canonical table of a parents layer. Its sha256 is the identity of the layer."""
    packed = [record.pack() for record in records]
    return _HEAD.pack(PARENTS_MAGIC, 1, len(packed)) + b"".join(packed)


def read_parents_table(read_at: ReadAt, size_bytes: int) -> Iterator[Record]:
    """Raises FormatError for what `parents_table` would not have written."""
    source = _Source(read_at, size_bytes)
    last: Record | None = None
    for record in _records(source, _head(source, PARENTS_MAGIC), DIFFERS):
        if last is not None and record.depth <= last.depth and not last.flags & DIFFERS:
            raise FormatError("directory table holds what it need not hold")
        last = record
        yield record
    if last is None or not last.flags & DIFFERS:
        raise FormatError("directory table holds what it need not hold")
    source.end()


def _head(source: _Source, magic: bytes) -> int:
    found, version, records = _HEAD.unpack(source.take(_HEAD.size))
    if (found, version) != (magic, 1):
        raise FormatError("no directory table of version 1")
    return int(records)


def _records(source: _Source, count: int, flags_known: int) -> Iterator[Record]:
    names: list[bytes] = []  # of the last record at each depth, up to that of the last one
    for number in range(count):  # every one takes bytes of the table, whatever the count says
        depth, flags, mode, uid, gid, seconds, nanoseconds, name_bytes, body_bytes = _RECORD.unpack(
            source.take(_RECORD.size)
        )
        name = source.take(name_bytes)
        if depth > len(names) or (depth == 0) != (number == 0):
            raise FormatError("directory table in disorder")
        if depth and not (0 < len(name) <= NAME_BYTES_MAX and name not in (b".", b"..")):
            raise FormatError(f"directory table has a name of {len(name)} bytes")
        if (not depth and name) or b"/" in name or b"\0" in name:
            raise FormatError(f"directory table has the name {name[:80]!r}")
        if depth < len(names) and name <= names[depth]:
            raise FormatError("directory table in disorder")
        del names[depth:]
        names.append(name)
        if flags & ~flags_known or mode & ~0o7777 or nanoseconds >= 1_000_000_000:
            raise FormatError("directory table has a record with unknown bits")
        if body_bytes > erofs.XATTR_BODY_BYTES_MAX:
            raise FormatError("directory table has xattrs over their limit")
        body = source.take(body_bytes)
        xattrs = erofs.parse_xattr_body(body)
        if erofs.xattr_body(xattrs) != body or any(name.startswith(b"trusted.") for name in xattrs):
            raise FormatError("directory table has xattrs in disorder")
        yield Record(depth, flags, name, Attributes(mode, uid, gid, (seconds, nanoseconds), xattrs))
