# SPDX-License-Identifier: Apache-2.0
"""The format `tarfs` a second time, slowly and with the whole tar in memory: written from its specification alone.

Nothing here is shared with the engine, so that a mistake would have to be made twice.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Final

BLOCK: Final = 4096
VARIANTS: Final = ("tarfs", "tarfs-genpolicy", "tarfs-genpolicy-upstream")
_WHITE: Final = "".join(
    map(chr, [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000])
)
_KINDS: Final = {b"\0": 8, b"0": 8, b"2": 10, b"3": 2, b"4": 6, b"5": 4, b"6": 1}  # to the upper four bits of a mode
_VISITS_MAX: Final = 100_000


class Refused(Exception):
    pass


@dataclass
class Node:
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    offset: int = 0
    opaque: bool = False
    text: bytes | None = None
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def kind(self) -> int:
        return self.mode >> 12


@dataclass
class Member:
    at: int
    header: bytes
    known: bool
    size: int
    name: bytes
    link: bytes | None
    uid: int
    gid: int


@dataclass
class Shown:
    """What the kernel module shows under one name."""

    path: bytes
    inode: int
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    device: tuple[int, int]
    link: bytes
    data_offset: int
    opaque: bool


@dataclass
class Layer:
    file: bytes
    data_size: int
    inodes: int
    root_hash: bytes
    shown: list[Shown] | None  # None: not to be read as a tree of names


def cut(text: bytes) -> bytes:
    return text[: text.index(0)] if 0 in text else text


def octal(text: bytes) -> int | None:
    try:
        words = cut(text).decode("utf-8").strip(_WHITE)
    except UnicodeDecodeError:
        return None
    if not re.fullmatch("[+]?[0-7]+", words):
        return None
    number = int(words, 8)
    return number if number < 2**64 else None


def number(text: bytes) -> int | None:
    if text[0] < 128:
        return octal(text)
    return int.from_bytes(text[-8:], "big") % (2**63 if len(text) == 8 else 2**64)


def decimal(text: bytes) -> int | None:
    if not re.fullmatch(rb"[+]?[0-9]+", text):
        return None
    digits = text.lstrip(b"+").lstrip(b"0") or b"0"
    return int(digits) if len(digits) < 21 and int(digits) < 2**64 else None


def pax_lines(body: bytes) -> list[tuple[bytes, bytes] | None]:
    """Key and value of each line up to the first empty one; None for a line that is no record."""
    found: list[tuple[bytes, bytes] | None] = []
    for line in body.split(b"\n"):
        if line == b"":
            break
        match = re.fullmatch(rb"([^ ]*) ([^=]*)=(.*)", line, re.DOTALL)
        good = match is not None and decimal(match[1]) == len(line) + 1
        found.append((match[2], match[3]) if match is not None and good else None)
    return found


def pax_text(body: bytes | None, key: bytes) -> bytes | None:
    for record in pax_lines(body or b""):
        if record is not None and record[0] == key:
            return record[1]
    return None


def pax_number(body: bytes | None, key: bytes) -> int | None:
    for record in pax_lines(body or b""):
        if record is None:
            return None
        if record[0] == key:
            return decimal(record[1])
    return None


def check_sparse(tar: bytes, at: int, size: int) -> int:
    """Where the data begins."""
    header = tar[at : at + 512]
    if header[257:265] != b"ustar  \0":
        raise Refused("sparse without GNU magic")
    slots = [header[386 + 24 * n :][:24] for n in range(4)]
    more, at = header[482] == 1, at + 512
    while more:
        extension = tar[at : at + 512]
        if len(extension) < 512:
            raise Refused("sparse map cut short")
        slots += [extension[24 * n :][:24] for n in range(21)]
        more, at = extension[504] == 1, at + 512
    end = used = 0
    for slot in slots:
        if slot[0] == 0 or slot[12] == 0:
            continue
        offset, length = octal(slot[:12]), octal(slot[12:])
        if offset is None or length is None or offset < end or used + length > size or (length and used % 512):
            raise Refused("sparse map")
        end, used = offset + length, used + length
    if used != size or end != octal(header[483:495]):
        raise Refused("sparse map and sizes")
    return at


def read(tar: bytes, variant: str) -> list[Member]:
    found: list[Member] = []
    at = 0
    pending: dict[bytes, bytes] = {}  # by type
    while True:
        header = tar[at : at + 512]
        if at > len(tar) or 0 < len(header) < 512:
            raise Refused("cut short")
        if not any(header):  # also at the end of the tar
            if pending:
                raise Refused("extended header without a member")
            return found
        if octal(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise Refused("checksum")
        size = number(header[124:136])
        if size is None:
            raise Refused("size")
        pax = pending.get(b"x")
        if size == 0:
            size = pax_number(pax, b"size") or 0
        ustar, gnu = header[257:265] == b"ustar\00000", header[257:265] == b"ustar  \0"
        typeflag = header[156:157]
        data = at + 512
        if (ustar or gnu) and typeflag in (b"L", b"K", b"x"):
            if typeflag in pending:
                raise Refused("two of one type")
            pending[typeflag] = tar[data : data + size]
            at = data + (size + 511) // 512 * 512
            continue
        if typeflag == b"S":
            data = check_sparse(tar, at, size)
        name = cut(header[:100])
        if ustar and header[345]:
            name = cut(header[345:500]) + b"/" + name
        link = cut(header[157:257]) if header[157] else None
        by_pax = pax_text(pax, b"path"), pax_text(pax, b"linkpath")
        name, link = by_pax[0] if by_pax[0] is not None else name, by_pax[1] if by_pax[1] is not None else link
        if b"L" in pending:
            name = pending[b"L"][:-1] if pending[b"L"].endswith(b"\0") else pending[b"L"]
        if b"K" in pending:
            link = pending[b"K"][:-1] if pending[b"K"].endswith(b"\0") else pending[b"K"]
        uid, gid = number(header[108:116]) or 0, number(header[116:124]) or 0
        if variant != "tarfs":
            ids = pax_number(pax, b"uid"), pax_number(pax, b"gid")
            uid, gid = ids[0] if ids[0] is not None else uid, ids[1] if ids[1] is not None else gid
        found.append(Member(at, header, ustar or gnu, size, name, link, uid % 2**32, gid % 2**32))
        pending = {}
        at = data + (size + 511) // 512 * 512


def clean(path: bytes | None) -> list[bytes] | None:
    parts: list[bytes] = []
    for part in (path or b"").split(b"/"):
        if part == b"..":
            if not parts:
                return None
            del parts[-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts


class Tree:
    def __init__(self, tar: bytes, variant: str) -> None:
        self.root = Node(mode=0o40555)
        self.texts: list[bytes] = []
        for member in read(tar, variant):
            self.add(member, variant)

    def walk(self, parts: list[bytes]) -> Node:
        node = self.root
        for part in parts:
            node = node.children.setdefault(part, Node())
        return node

    def add(self, member: Member, variant: str) -> None:
        header = member.header
        typeflag, mode = header[156:157], octal(header[100:108])
        if mode is None:
            return
        if typeflag == b"1":
            self.link(member)
            return
        if typeflag not in _KINDS:
            return
        new = Node(_KINDS[typeflag] << 12 | mode & 0o777, member.uid, member.gid)
        new.mtime = (number(header[136:148]) or 0) % 2**36
        if typeflag in (b"0", b"\0"):
            new.size, new.offset = member.size, member.at + 512
        if typeflag in (b"3", b"4"):
            major, minor = octal(header[329:337]), octal(header[337:345])
            if not member.known or major is None or minor is None:
                return
            new.offset = major % 2**32 * 2**32 + minor % 2**32
        if typeflag == b"2":
            if member.link is None:
                return
            new.size = len(member.link)
            if member.link == (cut(header[157:257]) if header[157] else None):
                new.offset = member.at + 157
            elif variant == "tarfs-genpolicy-upstream":
                return
            else:
                new.text = member.link
                self.texts.append(member.link)
        parts = clean(member.name)
        if parts is None:
            return
        if parts[-1:] == [b".wh..wh..opq"]:
            self.walk(parts[:-1]).opaque = True
        elif parts and parts[-1][:4] == b".wh.":
            old = self.walk([*parts[:-1], parts[-1][4:]])
            old.mode, old.size, old.offset = 2 << 12 | old.mode & 0o777, 0, 0
            old.text, old.children = None, {}
        else:
            vars(self.walk(parts)).update(vars(new))

    def link(self, member: Member) -> None:
        target_parts = clean(member.link)
        if target_parts is None:
            return
        target = self.walk(target_parts)
        parts = clean(member.name)
        if target.kind != 8 or parts is None:
            return
        if parts:
            self.walk(parts[:-1]).children[parts[-1]] = target
        else:
            self.root = target

    def check(self) -> None:
        """Where the tools of others run for ever."""
        above: list[int] = []
        done: set[int] = set()

        def look(node: Node) -> None:
            if id(node) in above:
                raise Refused("cycle")
            if id(node) not in done:
                above.append(id(node))
                for child in node.children.values():
                    look(child)
                above.pop()
                done.add(id(node))

        look(self.root)

    def visits(self) -> list[Node]:
        queue = [self.root]
        for node in queue:
            queue += [node.children[name] for name in sorted(node.children)]
            if len(queue) > _VISITS_MAX:
                raise Refused("too many names")
        return queue


def little(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def up(value: int) -> int:
    return (value + BLOCK - 1) // BLOCK * BLOCK


def build(tar: bytes, variant: str) -> Layer:
    tree = Tree(tar, variant)
    tree.check()
    visits = tree.visits()
    numbers: dict[int, int] = {}
    order: list[Node] = []
    for node in visits:
        if id(node) not in numbers:
            order.append(node)
            numbers[id(node)] = len(order)
    directories = [node for node in visits if node.kind == 4]
    entries_at = len(tar) + 32 * len(order)
    strings_at = entries_at
    for node in directories:
        node.offset, node.size = strings_at, 32 * len(node.children)
        strings_at += node.size
    surviving = 0
    table = b""
    for node in order:
        if node.text is not None:
            node.offset = strings_at + surviving
            surviving += len(node.text)
        table += little(node.mode, 2) + little(node.opaque, 1) + little(node.mtime >> 32, 1) + little(node.uid, 4)
        table += little(node.gid, 4) + little(node.mtime % 2**32, 4) + little(node.size, 8) + little(node.offset, 8)
    entries, names = b"", b""
    for node in directories:
        for name in sorted(node.children):
            child = node.children[name]
            entries += little(numbers[id(child)], 8) + little(strings_at + surviving + len(names), 8)
            entries += little(len(name), 8) + little(child.kind, 1) + bytes(7)
            names += name
    texts = b"".join(tree.texts)
    end = up(strings_at + surviving + len(texts) + 2 * len(names))
    data = (tar + table + entries + texts + names).ljust(end + 3584, b"\0")
    data = (data + little(len(tar), 8) + little(len(order), 8)).ljust(end + BLOCK, b"\0")
    hashes, root_hash = verity(data)
    trailer = (bytes(3584) + little(BLOCK, 4) * 2 + little(len(data) // BLOCK, 8)).ljust(BLOCK, b"\0")
    return Layer(data + hashes + trailer, len(data), len(order), root_hash, show(data, tree.root, numbers))


def verity(data: bytes) -> tuple[bytes, bytes]:
    levels: list[bytes] = []
    below = data
    while len(below) > BLOCK:
        digests = b"".join(
            hashlib.sha256(bytes(32) + below[at : at + BLOCK]).digest() for at in range(0, len(below), BLOCK)
        )
        below = digests.ljust(up(len(digests)), b"\0")
        levels.insert(0, below)
    return b"".join(levels), hashlib.sha256(bytes(32) + below).digest()


def show(data: bytes, root: Node, numbers: dict[int, int]) -> list[Shown] | None:
    """In the order of a walk. Names and texts are what the bytes say, which is not always what was meant."""
    found: list[Shown] = []
    expanded: set[int] = set()

    def look(path: bytes, node: Node) -> bool:
        kind = node.kind
        if kind == 0:
            return True
        device = (node.offset >> 32, node.offset % 2**20) if kind in (2, 6) else (0, 0)
        link = data[node.offset : node.offset + node.size] if kind == 10 else b""
        found.append(
            Shown(
                path, numbers[id(node)], node.mode, node.uid, node.gid, node.mtime, node.size, device, link,
                node.offset if kind == 8 and node.size else 0, kind == 4 and node.opaque,
            )
        )  # fmt: skip
        if kind != 4:
            return bool(path) and not (kind == 10 and node.size > 4095)
        if id(node) in expanded:
            return False
        expanded.add(id(node))
        names: set[bytes] = set()
        below: list[tuple[bytes, Node]] = []
        for place, expected in enumerate(sorted(node.children)):
            record = data[node.offset + 32 * place :][:32]
            at, size = int.from_bytes(record[8:16], "little"), int.from_bytes(record[16:24], "little")
            name = data[at : at + size]
            if b"/" in name or name in names:
                return False
            names.add(name)
            if name not in (b"", b".", b"..") and b"\0" not in name:
                below.append((name, node.children[expected]))
        return all(look(path + b"/" + name if path else name, child) for name, child in below)

    return found if look(b"", root) else None
