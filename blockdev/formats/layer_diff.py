# SPDX-License-Identifier: Apache-2.0
"""Two layers compared by what a container would see, name by name, whatever their formats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from stat import S_IFDIR, S_IFREG

from blockdev.errors import FormatError
from blockdev.formats.entry import FORMAT_MASK, Entry
from blockdev.formats.layer_file import LayerFile, ReadAt
from blockdev.formats.layer_reader import index_reader, pieces

Value = int | bytes | tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Difference:
    """`change`: "added", "removed" or "changed", seen from the first layer to the second.

    `attributes`: of a changed name those that differ, (before, after). Bytes are names, values of
    xattrs ("xattr NAME") and sha256 digests ("content"); None stands for an xattr that is not there.
    """

    path: bytes
    change: str
    attributes: dict[str, tuple[Value, Value]] = field(default_factory=dict)


class _Side:
    """One layer's names, in the order that both have."""

    def __init__(self, layer: LayerFile, read_at: ReadAt) -> None:
        self._read_at = read_at
        # In tarfs nothing says which inodes have several names.
        self._every_inode = layer.format.file_system == "tar"
        self._walk = index_reader(layer, read_at).walk()
        self._first_names: dict[int, bytes] = {}
        self._digests: dict[int, bytes] = {}
        self._last = b""
        self.entry: Entry | None = None
        self.key = b""

    def step(self) -> None:
        self.entry = next(self._walk, None)
        if self.entry is not None:
            # Parents first and names in byte order: that is the byte order of paths whose slashes sort before all else.
            self.key = self.entry.path.replace(b"/", b"\0")
            if self._last and self.key <= self._last:
                raise FormatError(f"the name {self.entry.path[:200]!r} is out of order")
            self._last = self.key

    def _shared(self, entry: Entry) -> bool:
        return entry.nlink > 1 or self._every_inode

    def first_name(self, entry: Entry) -> bytes:
        """Of the names of its inode."""
        return self._first_names.setdefault(entry.inode, entry.path) if self._shared(entry) else entry.path

    def digest(self, entry: Entry) -> bytes:
        if entry.inode in self._digests:
            return self._digests[entry.inode]
        sha256 = hashlib.sha256()
        for offset, size in entry.extents():
            for piece in pieces(self._read_at, offset, size):
                sha256.update(piece)
        if self._shared(entry):
            self._digests[entry.inode] = sha256.digest()
        return sha256.digest()


def differences(before: tuple[LayerFile, ReadAt], after: tuple[LayerFile, ReadAt]) -> Iterator[Difference]:
    """In the order of the names. Contents are compared by sha256 where the sizes are equal.

    Raises FormatError, LimitExceeded.
    """
    left, right = _Side(*before), _Side(*after)
    left.step()
    right.step()
    while left.entry is not None or right.entry is not None:
        old, new = left.entry, right.entry
        if new is None or (old is not None and left.key < right.key):
            assert old is not None
            left.first_name(old)
            yield Difference(old.path, "removed")
            left.step()
        elif old is None or right.key < left.key:
            right.first_name(new)
            yield Difference(new.path, "added")
            right.step()
        else:
            found = _attributes(left, old, right, new)
            if found:
                yield Difference(old.path, "changed", found)
            left.step()
            right.step()


def _attributes(left: _Side, old: Entry, right: _Side, new: Entry) -> dict[str, tuple[Value, Value]]:
    kinds = old.mode & FORMAT_MASK, new.mode & FORMAT_MASK
    pairs: dict[str, tuple[Value, Value]] = {
        "mode": (old.mode, new.mode),
        "uid": (old.uid, new.uid),
        "gid": (old.gid, new.gid),
        "mtime": (old.mtime, new.mtime),
        "rdev": (old.rdev, new.rdev),
        "link": (old.link, new.link),
        "same file as": (left.first_name(old), right.first_name(new)),
    }
    if S_IFDIR not in kinds:  # those of a directory follow from what is in it
        pairs["nlink"] = old.nlink, new.nlink
    for name in sorted({*old.xattrs, *new.xattrs}):
        shown = name.decode("utf-8", "backslashreplace")
        pairs[f"xattr {shown}"] = old.xattrs.get(name), new.xattrs.get(name)
    if kinds == (S_IFREG, S_IFREG):
        pairs["size"] = old.size_bytes, new.size_bytes
        if old.size_bytes == new.size_bytes:
            pairs["content"] = left.digest(old), right.digest(new)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
