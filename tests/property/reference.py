# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md once more: the whole tar in memory, one rule after the other, no thought of speed.

`read_tar` gives the tree of "Reading the tar stream" or refuses; `layer_file` gives the bytes of "File
map" to "Trailer" for it, or those of "The format `erofs-4k`". Written from the document, and it shares no
code with blockdev and verity: what both agree on is what the document says, or an error that was made twice.
Bounds that are the program's own are not in here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

MEBIBYTE: Final = 1 << 20
ZERO_BLOCK: Final = bytes(512)


class Refused(Exception):
    """`at`: offset of the header that is refused; None where the end of the stream is what is wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.at: int | None = None


@dataclass(eq=False)
class Node:
    """An inode. `kind` is one of file, directory, symlink, char, block, fifo."""

    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: tuple[int, int] = (0, 0)
    rdev: tuple[int, int] = (0, 0)
    target: bytes = b""
    data: bytes = b""
    data_offset: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    opaque: bool = False
    whiteouts: set[bytes] = field(default_factory=set)
    # Of a directory: made as a parent; in one that was made and had no entry then; has an entry.
    made: bool = False
    in_made: bool = False
    entry: bool = False


# ---------------------------------------------------------------- Headers


def text(raw: bytes) -> bytes:
    return raw[: raw.index(0)] if 0 in raw else raw


def number(raw: bytes) -> int:
    if raw[0] & 0x80:
        width = 8 * len(raw) - 1  # without the marker bit
        value = int.from_bytes(raw, "big") % (1 << width)
        if value >> (width - 1):
            value -= 1 << width
        if not -(1 << 63) <= value < 1 << 63:
            raise Refused("a number over 64 bits")
        return value
    digits = text(raw.strip(b" \0"))
    if digits == b"":
        return 0
    if any(digit not in b"01234567" for digit in digits):
        raise Refused("no octal number")
    return int(digits, 8)  # twelve digits at the most: 36 bits


def is_number(raw: bytes) -> bool:
    try:
        number(raw)
    except Refused:
        return False
    return True


def checksum_fits(header: bytes) -> bool:
    if header[148] & 0x80:
        raise Refused("a checksum in base-256")
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    signed = sum(byte - 256 if byte > 127 else byte for byte in blanked)
    return number(header[148:156]) in (unsigned, signed)


KINDS: Final = {
    b"0": "file", b"\0": "file", b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "directory",
    b"6": "fifo",
}  # fmt: skip


@dataclass
class Member:
    kind: str
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    rdev: tuple[int, int]
    size: int
    data_offset: int
    xattrs: dict[bytes, bytes]


# ---------------------------------------------------------------- Extended headers


def pax_records(body: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while body:
        length, blank, _ = body.partition(b" ")
        if not blank or not re.fullmatch(rb"[+]?[0-9]+", length):
            raise Refused("a pax record without a length")
        if len(length.lstrip(b"+").lstrip(b"0")) > 9 or not 5 <= int(length) <= len(body):
            raise Refused("a pax record of a wrong length")
        record, body = body[: int(length)], body[int(length) :]
        if not record.endswith(b"\n") or len(record) <= len(length):
            raise Refused("a pax record of a wrong length")
        content = record[len(length) + 1 : -1]
        key, equals, value = content.partition(b"=")
        if not equals or key == b"" or 0 in key:
            raise Refused("a pax record without a key")
        if key in (b"path", b"linkpath", b"uname", b"gname") and 0 in value:
            raise Refused("a NUL in a name")
        found[key] = value
    return found


def decimal(value: bytes) -> int:
    if not re.fullmatch(rb"[+-]?[0-9]+", value):
        raise Refused("no decimal number")
    sign, digits = value[:1] == b"-", value.lstrip(b"+-").lstrip(b"0")
    if len(digits) > 19:
        raise Refused("a number over 64 bits")
    found = -int(digits or b"0") if sign else int(digits or b"0")
    if not -(1 << 63) <= found < 1 << 63:
        raise Refused("a number over 64 bits")
    return found


def time(value: bytes) -> tuple[int, int]:
    whole, point, fraction = value.partition(b".")
    seconds = decimal(whole)
    if point and not re.fullmatch(rb"[0-9]*", fraction):
        raise Refused("no time")
    nanoseconds = int((fraction + b"0" * 9)[:9])
    if whole.startswith(b"-") and nanoseconds:
        return seconds - 1, 1_000_000_000 - nanoseconds
    return seconds, nanoseconds


# ---------------------------------------------------------------- The stream


def read_tar(tar: bytes, data_at: list[tuple[int, int]] | None = None) -> Node:
    """The root of the tree, marks evaluated. Raises Refused. Into `data_at`: offset and size of all file data."""
    tree = Tree()
    at = 0
    pax: dict[bytes, bytes] = {}
    long_name = long_link = b""
    while True:
        header = tar[at : at + 512]
        if header == b"":
            return tree.finished()
        if len(header) < 512:
            raise Refused("a part of a header")
        if header == ZERO_BLOCK:
            following = tar[at + 512 : at + 1024]
            if following in (b"", ZERO_BLOCK):
                return tree.finished()
            raise Refused("something behind one zero block")
        try:
            if not checksum_fits(header):
                raise Refused("a wrong checksum")
            if header[257:263] == b"ustar\0":
                style = "ustar"
            elif header[257:265] == b"ustar  \0":
                style = "gnu"
            else:
                style = "v7"
            mode, uid, gid = number(header[100:108]), number(header[108:116]), number(header[116:124])
            size, seconds = number(header[124:136]), number(header[136:148])
            rdev = (0, 0) if style == "v7" else (number(header[329:337]), number(header[337:345]))
            kind = header[156:157]

            if kind in (b"x", b"g", b"L", b"K"):
                if not 0 <= size <= MEBIBYTE:
                    raise Refused("an extended header over its limit")
                body = tar[at + 512 : at + 512 + size]
                if len(body) < size:
                    raise Cut
                if kind == b"x":
                    pax = pax_records(body)
                    if any(key.startswith(b"GNU.sparse.") for key in pax):
                        raise Refused("a sparse file")
                elif kind == b"g":
                    pax_records(body)
                    pax, long_name, long_link = {}, b"", b""
                elif kind == b"L":
                    long_name = text(body)
                else:
                    long_link = text(body)
                at += 512 + size + -size % 512
                continue

            name, link = text(header[:100]), text(header[157:257])
            if size < 0 and kind in (b"0", b"\0"):
                raise Refused("a negative size")
            prefix = b""
            if style == "ustar" and header[508:512] == b"tar\0":
                prefix = text(header[345:476])
                if not is_number(header[476:488]) or not is_number(header[488:500]):
                    raise Refused("a time of star that is no number")
            elif style == "ustar":
                prefix = text(header[345:500])
            elif style == "gnu":
                times = header[345:357], header[357:369]
                if any(raw[0] != 0 and not is_number(raw) for raw in times) and text(header[345:500]).isascii():
                    prefix = text(header[345:500])
            if prefix:
                name = prefix + b"/" + name
            mtime = (seconds, 0)
            name, link = pax.get(b"path") or name, pax.get(b"linkpath") or link
            size = decimal(pax[b"size"]) if pax.get(b"size") else size
            uid = decimal(pax[b"uid"]) if pax.get(b"uid") else uid
            gid = decimal(pax[b"gid"]) if pax.get(b"gid") else gid
            mtime = time(pax[b"mtime"]) if pax.get(b"mtime") else mtime
            for unused in (b"atime", b"ctime"):
                if pax.get(unused):
                    time(pax[unused])
            name, link = long_name or name, long_link or link
            prefix_of = b"SCHILY.xattr."
            xattrs = {key[len(prefix_of) :]: value for key, value in pax.items() if key.startswith(prefix_of)}
            pax, long_name, long_link = {}, b"", b""

            if kind not in KINDS:
                raise Refused("an unsupported type")
            what = KINDS[kind]
            if what == "file":
                if size < 0:
                    raise Refused("a negative size")
                if kind == b"\0" and name.endswith(b"/"):
                    if size:
                        raise Refused("a directory with data")
                    what = "directory"
            else:
                size = 0
            if not (0 <= uid <= 2**32 - 2 and 0 <= gid <= 2**32 - 2):
                raise Refused("an owner out of range")
            if not (0, 0) <= mtime <= (9223372036, 854775807):
                mtime = (0, 0)
            data = tar[at + 512 : at + 512 + size]
            tree.add(Member(what, name, link, mode & 0o7777, uid, gid, mtime, rdev, size, at + 512, xattrs), data)
            if len(data) < size:
                raise Cut
            if size and data_at is not None:
                data_at.append((at + 512, size))
        except Cut:
            raise Refused("cut short") from None
        except Refused as refused:
            refused.at = at
            raise
        at += 512 + size + -size % 512
        if at > len(tar):
            return tree.finished()  # the stream may end in the padding


class Cut(Exception):
    pass


# ---------------------------------------------------------------- Names, entries, whiteouts


class Tree:
    def __init__(self) -> None:
        self.root = Node("directory")
        self.directory_times: list[tuple[bytes, tuple[int, int]]] = []

    def parts(self, name: bytes, *, member: bool) -> list[bytes]:
        found = [part for part in name.split(b"/") if part not in (b"", b".")]
        for index, part in enumerate(found):
            if part == b"..":
                raise Refused("'..' in a name")
            mark = member and index == len(found) - 1 and part.startswith(b".wh.")
            if len(part) - (4 if mark else 0) > 255:
                raise Refused("a component over 255 bytes")
        return found

    def parent(self, parts: list[bytes], *, make: bool) -> Node | None:
        """The directory that the components lead to; None where one is missing and none is to be made."""
        way = [self.root]
        todo = list(parts)
        followed = 0
        while todo:
            part = todo.pop(0)
            if part in (b"", b"."):
                continue
            if part == b"..":
                way = way[:-1] or way
                continue
            if part not in way[-1].children:
                if not make:
                    return None
                if len(part) > 255:
                    raise Refused("a component over 255 bytes")
                made = way[-1].children[part] = Node("directory", made=True)
                made.in_made = way[-1].made and not way[-1].entry
                if way[-1].mode & 0o2000:
                    made.gid = way[-1].gid
            node = way[-1].children[part]
            if node.kind == "directory":
                way.append(node)
            elif node.kind == "symlink":
                followed += 1
                if followed > 255:
                    raise Refused("over 255 symlinks")
                if node.target.startswith(b"/"):
                    way = [self.root]
                todo = node.target.split(b"/") + todo
            else:
                raise Refused("a parent that is no directory")
        return way[-1]

    def followed(self, name: bytes) -> Node | None:
        """What is at a name, the last symlink followed too; None where nothing is."""
        node = self.root
        way = [self.root]
        todo = self.parts(name, member=False)
        hops = 0
        while todo:
            part = todo.pop(0)
            if node.kind != "directory":
                return None
            if part in (b"", b"."):
                continue
            if part == b"..":
                way = way[:-1] or way
                node = way[-1]
                continue
            if part not in way[-1].children:
                return None
            found = way[-1].children[part]
            if found.kind == "symlink":
                hops += 1
                if hops > 255:
                    return None
                if found.target.startswith(b"/"):
                    way = [self.root]
                node = way[-1]
                todo = found.target.split(b"/") + todo
            else:
                node = found
                if found.kind == "directory":
                    way.append(found)
        return node

    def add(self, member: Member, data: bytes) -> None:
        parts = self.parts(member.name, member=True)
        if not parts:
            return
        *above, base = parts
        parent = self.parent(above, make=True)
        assert parent is not None

        if base.startswith(b".wh."):
            if base == b".wh..wh..opq":
                parent.opaque = True
            elif base.startswith(b".wh..wh."):
                pass
            elif base in (b".wh.", b".wh..", b".wh..."):
                raise Refused("a whiteout of no name")
            else:
                parent.whiteouts.add(base[4:])
            return

        old = parent.children.get(base)
        if member.kind == "hardlink":
            parent.children.pop(base, None)
            target = self.parts(member.link, member=False)
            if member.link.endswith((b"/", b"/.")):
                node = self.followed(member.link)
            else:
                holder = self.parent(target[:-1], make=False) if target else None
                node = holder.children.get(target[-1]) if holder is not None else None
            if node is None:
                raise Refused("a hardlink to nothing")
            if node.kind == "directory":
                raise Refused("a hardlink to a directory")
            parent.children[base] = node
            node.xattrs.pop(b"security.capability", None)
        elif member.kind == "directory" and old is not None and old.kind == "directory":
            node = old
        else:
            node = Node(member.kind)
            if member.kind == "file":
                node.data, node.data_offset = data, member.data_offset
            elif member.kind == "symlink":
                if not 1 <= len(member.link) <= 4095:
                    raise Refused("a symlink's target out of range")
                node.target = member.link
            elif member.kind in ("char", "block"):
                if not (0 <= member.rdev[0] < 1 << 12 and 0 <= member.rdev[1] < 1 << 20):
                    raise Refused("a device number out of range")
                node.rdev = member.rdev
            parent.children[base] = node
        node.mode = 0o777 if node.kind == "symlink" else member.mode
        node.uid, node.gid, node.mtime = member.uid, member.gid, member.mtime
        if member.kind == "directory":
            self.directory_times.append((member.name, member.mtime))
            node.entry = True
        for name, value in member.xattrs.items():
            if name in (b"", b"user.", b"security.") or (len(name) > 255 and not name.startswith(b"trusted.")):
                raise Refused("an xattr's name out of range")
            if says_nothing(name, value):
                continue
            if name_index(name) is None or name.startswith(b"trusted."):
                continue
            if name.startswith(b"user.") and node.kind not in ("file", "directory"):
                continue
            node.xattrs[name] = value
        check_xattrs(node.xattrs)

    def finished(self) -> Node:
        """Times of directories and marks are evaluated at the end of the tar."""
        for name, mtime in self.directory_times:
            node = self.followed(name)
            if node is None:
                raise Refused("a directory that is gone at the end")
            if node is not self.root:
                node.mtime = mtime

        def evaluate(directory: Node) -> None:
            for name in directory.whiteouts:
                node = directory.children.get(name)
                if node is None:
                    directory.children[name] = Node("char", mode=0)
                elif node.kind == "directory":
                    node.opaque = True
            if directory.opaque:
                directory.xattrs[b"trusted.overlay.opaque"] = b"y"
                check_xattrs(directory.xattrs)

        todo = [self.root]
        while todo:
            directory = todo.pop()
            evaluate(directory)
            todo += [child for child in directory.children.values() if child.kind == "directory"]
        return self.root


def says_nothing(name: bytes, value: bytes) -> bool:
    """An ACL that is dropped."""
    if name not in (b"system.posix_acl_access", b"system.posix_acl_default"):
        return False
    if len(value) <= 4 or value[:4] != little(2, 4):
        return True
    tags = [value[at : at + 2] for at in (4, 12, 20)]
    return name.endswith(b"_access") and len(value) == 28 and tags == [little(tag, 2) for tag in (1, 4, 32)]


def name_index(name: bytes) -> tuple[int, bytes] | None:
    if name == b"system.posix_acl_access":
        return 2, b""
    if name == b"system.posix_acl_default":
        return 3, b""
    for index, prefix in ((1, b"user."), (4, b"trusted."), (6, b"security.")):
        if name.startswith(prefix) and name != prefix:
            return index, name[len(prefix) :]
    return None


def check_xattrs(xattrs: dict[bytes, bytes]) -> None:
    for name, value in xattrs.items():
        found = name_index(name)
        assert found is not None
        if len(found[1]) > 255 or len(value) > 65535:
            raise Refused("an xattr over its limit")
    if len(xattr_body(xattrs)) > 262148:
        raise Refused("an xattr body over its limit")


def flat(root: Node) -> dict[bytes, Node]:
    """All names; hardlinks share their node."""
    found = {b"": root}
    todo = [(b"", root)]
    while todo:
        path, directory = todo.pop()
        for name, child in directory.children.items():
            below = path + b"/" + name if path else name
            found[below] = child
            if child.kind == "directory":
                todo.append((below, child))
    return found


def link_counts(root: Node) -> dict[int, int]:
    """By the identity of the node."""
    counts: dict[int, int] = {}
    for node in flat(root).values():
        if node.kind == "directory":
            counts[id(node)] = 2 + sum(child.kind == "directory" for child in node.children.values())
        else:
            counts[id(node)] = counts.get(id(node), 0) + 1
    return counts


# ---------------------------------------------------------------- Metadata area

FORMAT_BITS: Final = {
    "file": 0o100000, "directory": 0o040000, "symlink": 0o120000, "char": 0o020000, "block": 0o060000, "fifo": 0o010000,
}  # fmt: skip
FILE_TYPES: Final = {"file": 1, "directory": 2, "char": 3, "block": 4, "fifo": 5, "symlink": 7}


def align(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit


def little(value: int, size: int, *, signed: bool = False) -> bytes:
    return value.to_bytes(size, "little", signed=signed)


def xattr_body(xattrs: dict[bytes, bytes]) -> bytes:
    if not xattrs:
        return b""
    entries = []
    for name, value in xattrs.items():
        found = name_index(name)
        assert found is not None
        entries.append((found[0], found[1], value))
    body = bytes(12)
    for index, rest, value in sorted(entries):
        body += bytes([len(rest), index]) + little(len(value), 2) + rest + value
        body += bytes(align(len(body), 4) - len(body))
    return body


def canonical_order(root: Node) -> list[Node]:
    order, seen = [root], {id(root)}
    for node in order:
        for name in sorted(node.children):
            child = node.children[name]
            if id(child) not in seen:
                seen.add(id(child))
                order.append(child)
    return order


def dirent_blocks(directory: Node, parent: Node, nids: dict[int, int], block: int) -> list[bytes]:
    """Each without the zeros at its end. Names and sizes do not depend on the nids."""
    entries = {b".": directory, b"..": parent, **directory.children}
    groups: list[list[bytes]] = [[]]
    for name in sorted(entries):
        if sum(12 + len(other) for other in [*groups[-1], name]) > block:
            groups.append([])
        groups[-1].append(name)
    blocks = []
    for group in groups:
        records, names = b"", b""
        for name in group:
            node = entries[name]
            offset = 12 * len(group) + len(names)
            records += little(nids.get(id(node), 0), 8) + little(offset, 2) + bytes([FILE_TYPES[node.kind], 0])
            names += name
        blocks.append(records + names)
    return blocks


def tail_of(data: bytes) -> bytes:
    """Of `erofs-4k`: the end of a file that is not in its body."""
    size = len(data) % 4096
    return data[len(data) - size :] if 1 <= size <= 4032 else b""


def metadata(
    root: Node, meta_off: int, block: int, first_block: Callable[[Node], int], *, tails: bool
) -> tuple[bytes, int, int, dict[int, int]]:
    """(the area, nid of the root, number of inodes, places of tails in the area by the identity of the node).

    `first_block`: of a file's data; `tails`: their ends are inlined.
    """
    order = canonical_order(root)
    parents = {id(root): root}
    for node in order:
        for child in node.children.values():
            if child.kind == "directory":
                parents[id(child)] = node
    counts = link_counts(root)

    def contents(node: Node, nids: dict[int, int]) -> tuple[bytes, bytes, int]:
        """(block data, inlined tail, i_size)."""
        base = 64 + len(xattr_body(node.xattrs))
        if node.kind == "directory":
            blocks = dirent_blocks(node, parents[id(node)], nids, block)
            size = (len(blocks) - 1) * block + len(blocks[-1])
            tail = blocks.pop() if base + len(blocks[-1]) <= block else b""
            return b"".join(each.ljust(block, b"\0") for each in blocks), tail, size
        if node.kind == "symlink":
            if base + len(node.target) <= block:
                return b"", node.target, len(node.target)
            return node.target.ljust(align(len(node.target), block), b"\0"), b"", len(node.target)
        return b"", tail_of(node.data) if tails else b"", len(node.data)

    # Places first: they need only the sizes.
    position, places = 64, []
    for node in order:
        _, tail, _ = contents(node, {})
        base = 64 + len(xattr_body(node.xattrs))
        length = base + len(tail)
        position = align(position, 64)
        if tail and length <= block and position // block != (position + length - 1) // block:
            position = align(position, block)
        while length > block and tail and (position + base) // block != (position + length - 1) // block:
            position += 64
        places.append(position)
        position += length
    nids = {id(node): place // 32 for node, place in zip(order, places, strict=True)}

    area, tail_places = bytearray(align(position, block)), dict[int, int]()
    for number_, (node, place) in enumerate(zip(order, places, strict=True), 1):
        outside, tail, size = contents(node, nids)
        body = xattr_body(node.xattrs)
        if node.kind == "file":
            i_u = first_block(node) if len(node.data) > len(tail) else 0
            tail_places[id(node)] = place + 64 + len(body)
        elif node.kind in ("char", "block"):
            major, minor = node.rdev
            i_u = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
        elif outside:
            i_u = (meta_off + len(area)) // block
        else:
            i_u = 0
        record = (
            little(5 if tail else 1, 2) + little((len(body) - 12) // 4 + 1 if body else 0, 2)
            + little(FORMAT_BITS[node.kind] | node.mode, 2) + bytes(2) + little(size, 8) + little(i_u, 4)
            + little(number_, 4) + little(node.uid, 4) + little(node.gid, 4) + little(node.mtime[0], 8, signed=True)
            + little(node.mtime[1], 4) + little(counts[id(node)], 4) + bytes(16)
        )  # fmt: skip
        assert len(record) == 64
        whole = record + body + tail
        area[place : place + len(whole)] = whole
        area += outside
    return bytes(area), nids[id(root)], len(order), tail_places


# ---------------------------------------------------------------- Head, verity, trailer


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def uuid(diff_id: bytes, name: bytes) -> bytes:
    found = bytearray(hashlib.sha256(b"tar-index:v1:" + name + b":" + diff_id).digest()[:16])
    found[6] = 0x80 | found[6] & 0x0F
    found[8] = 0x80 | found[8] & 0x3F
    return bytes(found)


def verity_tree(data: bytes, data_block: int) -> tuple[bytes, bytes, int]:
    """(tree, root hash, levels)."""

    def digests(blocks: bytes, size: int) -> bytes:
        return b"".join(
            hashlib.sha256(bytes(32) + blocks[at : at + size]).digest() for at in range(0, len(blocks), size)
        )

    level = digests(data, data_block)
    levels = []
    while True:
        levels.append(level.ljust(align(len(level), 4096), b"\0"))
        level = digests(levels[-1], 4096)
        if len(level) == 32:
            return b"".join(reversed(levels)), level, len(levels)


@dataclass
class Layer:
    file: bytes
    root: Node
    diff_id: bytes
    root_hash: bytes
    data_size: int
    inodes: int


def layer_file(tar: bytes, name: str = "tar-index") -> Layer:
    """Raises Refused."""
    return laid_out(tar, read_tar(tar), b"TARINDEX", b"tar-index", 512) if name == "tar-index" else split_up(tar)


def laid_out(content: bytes, root: Node, magic: bytes, name: bytes, block: int) -> Layer:
    """From "File map" on; `content`: what the head is followed by, a tar or the table of a parents layer."""
    diff_id = hashlib.sha256(content).digest()
    meta_off = align(4096 + len(content), 4096)
    area, root_nid, inodes, _ = metadata(
        root, meta_off, block, lambda node: (4096 + node.data_offset) // block, tails=False
    )
    identity = magic + little(1, 4) + little(0, 4) + little(4096, 8) + little(len(content), 8) + little(meta_off, 8)
    body = content.ljust(meta_off - 4096, b"\0") + area
    return finished(identity + diff_id, body, root, name, block, meta_off, (root_nid, inodes))


def split_up(tar: bytes) -> Layer:
    """As "The format `erofs-4k`" has it. Raises Refused."""
    data_at: list[tuple[int, int]] = []
    root = read_tar(tar, data_at)
    diff_id = hashlib.sha256(tar).digest()
    bodies, blocks = b"", dict[int, int]()
    for at, size in data_at:
        data = tar[at : at + size]
        blocks[at] = 1 + len(bodies) // 4096
        bodies += data[: size - len(tail_of(data))]
        bodies = bodies.ljust(align(len(bodies), 4096), b"\0")
    meta_off = 4096 + len(bodies)
    area, root_nid, inodes, tail_places = metadata(
        root, meta_off, 4096, lambda node: blocks[node.data_offset], tails=True
    )
    keep_off = meta_off + len(area)
    files = {node.data_offset: node for node in flat(root).values() if node.kind == "file" and node.data}

    lost = places = instructions = b""
    rest_from = 0
    for at, size in [*data_at, (len(tar), 0)]:
        while rest_from < at:
            stop = min(at, align(rest_from + 1, 512))
            instructions += rest(tar[rest_from:stop])
            rest_from = stop
        rest_from = at + size
        tail = tail_of(tar[at : at + size])
        if size > len(tail):
            instructions += leb128((size - len(tail)) * 4 + 2)
        if tail:
            instructions += leb128(len(tail) * 4 + 3)
            if at in files:
                places += little(meta_off + tail_places[id(files[at])], 8)
            else:
                places += little(keep_off + len(lost), 8)
                lost += tail

    identity = b"EROFS-4K" + little(1, 4) + little(0, 4) + little(4096, 8) + little(len(tar), 8) + little(meta_off, 8)
    identity += diff_id + little(keep_off, 8) + little(len(lost), 8) + little(len(places) // 8, 8)
    identity += little(len(instructions), 8)
    body = bodies + area + lost + places + instructions
    return finished(identity, body, root, b"erofs-4k", 4096, meta_off, (root_nid, inodes))


def rest(piece: bytes) -> bytes:
    """Instructions for bytes that are no file data."""
    made = b""
    while piece:
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros >= 8:
            made += leb128(zeros * 4 + 1)
            piece = piece[zeros:]
        else:
            following = piece.find(bytes(8))
            literal = piece if following < 0 else piece[:following]
            made += leb128(len(literal) * 4) + literal
            piece = piece[len(literal) :]
    return made


def leb128(value: int) -> bytes:
    made = [value & 0x7F]
    while value := value >> 7:
        made[-1] |= 0x80
        made.append(value & 0x7F)
    return bytes(made)


def finished(
    identity: bytes, body: bytes, root: Node, name: bytes, block: int, meta_off: int, counted: tuple[int, int]
) -> Layer:
    """`body`: what stands behind the head; `counted`: nid of the root, number of inodes."""
    diff_id = identity[40:72]
    root_nid, inodes = counted
    data_size = align(4096 + len(body), 4096)
    blocks = data_size // block
    superblock = (
        little(0xE0F5E1E2, 4) + bytes(4) + little(3, 4) + bytes([{512: 9, 4096: 12}[block], 0]) + little(root_nid, 2)
        + little(inodes, 8) + bytes(12) + little(blocks, 4) + little(meta_off // block, 4) + bytes(4)
        + uuid(diff_id, name)
    ).ljust({512: 512, 4096: 3072}[block], b"\0")  # fmt: skip
    superblock = superblock[:4] + little(crc32c(superblock), 4) + superblock[8:]
    head = (identity.ljust(1024, b"\0") + superblock).ljust(4096, b"\0")
    data = (head + body).ljust(data_size, b"\0")

    tree, root_hash, levels = verity_tree(data, block)
    trailer = (
        b"TARIDXTR" + little(1, 4) + little(1, 4) + little(block, 4) + little(4096, 4) + little(blocks, 8)
        + little(data_size, 8) + little(len(tree), 8) + little(levels, 8) + root_hash + diff_id
    )  # fmt: skip
    assert len(trailer) == 120
    trailer = (trailer + hashlib.sha256(trailer).digest()).ljust(3584, b"\0")
    trailer = (trailer + little(block, 4) + little(4096, 4) + little(blocks, 8)).ljust(4096, b"\0")
    return Layer(data + tree + trailer, root, diff_id, root_hash, data_size, inodes)
