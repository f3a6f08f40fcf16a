# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md, "The format `tar-index-parents`", once more: every layer over the whole tree, no thought of speed.

Written from the document; it shares no code with blockdev.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.property import reference
from tests.property.reference import Node, little


@dataclass(frozen=True)
class Attributes:
    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]

    def without_time(self) -> Attributes:
        return replace(self, mtime=(0, 0))


def attributes(node: Node) -> Attributes:
    xattrs = {name: value for name, value in node.xattrs.items() if not name.startswith(b"trusted.")}
    return Attributes(node.mode, node.uid, node.gid, node.mtime, tuple(sorted(xattrs.items())))


@dataclass(frozen=True)
class Directory:
    """As it is, and as the topmost layer that has it says."""

    true: Attributes
    raw: Attributes

    @property
    def differs(self) -> bool:
        return self.true.without_time() != self.raw.without_time()


# By path; the root's is empty. What an overlay of the layers shows: directories alone.
View = dict[tuple[bytes, ...], Directory]


def names_of(layer: Node) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    """Parents before what is in them."""
    todo: list[tuple[tuple[bytes, ...], Node]] = [((), layer)]
    while todo:
        path, node = todo.pop()
        yield path, node
        todo += [((*path, name), child) for name, child in node.children.items()]


def above(view: View, layer: Node) -> View:
    """The view with one more layer on top."""
    hidden = {path for path, node in names_of(layer) if path and (node.kind != "directory" or node.opaque)}
    gone = {path for path, node in names_of(layer) if node.kind != "directory"}
    result = {
        path: directory
        for path, directory in view.items()
        if path not in gone and not any(path[:length] in hidden for length in range(len(path)))
    }
    copied: dict[tuple[bytes, ...], Attributes] = {}
    for path, node in names_of(layer):
        if node.kind != "directory":
            continue
        raw = true = attributes(node)
        below = result[path].true if path in result else None
        if node.made and below is not None:
            copied[path] = below
            if node.entry:
                true = replace(raw, xattrs=tuple(sorted({**dict(below.xattrs), **dict(raw.xattrs)}.items())))
            else:
                true = replace(below, mtime=raw.mtime)
        elif node.made and not node.entry and node.in_made:
            parent = copied.get(path[:-1])
            if parent is not None and parent.mode & 0o2000:
                true = replace(raw, gid=parent.gid)
        result[path] = Directory(true, raw)
    return result


def view_of(tars: Sequence[bytes]) -> View:
    """Of a chain, its first layer first. Raises reference.Refused."""
    view: View = {}
    for tar in tars:
        view = above(view, reference.read_tar(tar))
    return view


def table(tars: Sequence[bytes]) -> bytes:
    """The canonical table; empty where the chain needs no parents layer."""
    view = view_of(tars)
    carried = {path[:length] for path in view if view[path].differs for length in range(len(path) + 1)}
    records = b""
    for path in sorted(carried):
        directory = view[path]
        true = directory.true
        name = path[-1] if path else b""
        body = reference.xattr_body(dict(true.xattrs))
        records += (
            little(len(path), 4) + little(16 if directory.differs else 0, 2) + little(true.mode, 2)
            + little(true.uid, 4) + little(true.gid, 4) + little(true.mtime[0], 8, signed=True)
            + little(true.mtime[1], 4) + little(len(name), 2) + bytes(2) + little(len(body), 4) + name + body
        )  # fmt: skip
    return b"PARENTS\0" + little(1, 4) + little(len(carried), 4) + records if carried else b""


def layer_file(tars: Sequence[bytes], of: str = "tar-index") -> reference.Layer | None:
    """The parents layer of a chain of layers in the format `of`; None where it needs none."""
    packed = table(tars)
    if not packed:
        return None
    view = view_of(tars)
    root = Node("directory")
    at: dict[tuple[bytes, ...], Node] = {(): root}
    carried = {path[:length] for path in view if view[path].differs for length in range(len(path) + 1)}
    for path in sorted(carried):
        true = view[path].true
        node = at.setdefault(path, Node("directory"))
        node.mode, node.uid, node.gid, node.mtime = true.mode, true.uid, true.gid, true.mtime
        node.xattrs = dict(true.xattrs)
        if path:
            at[path[:-1]].children[path[-1]] = node
    magic, block = {"tar-index": (b"TARPARNT", 512), "erofs-4k": (b"EROFS4KP", 4096)}[of]
    return reference.laid_out(packed, root, magic, b"%s-parents" % of.encode(), block)


def identity(tars: Sequence[bytes]) -> str:
    return hashlib.sha256(table(tars)).hexdigest()
