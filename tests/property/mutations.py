# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs from a source of randomness: tars, compressed streams, layer files.

Everything is drawn from a `random.Random`, so that Hypothesis, which shrinks, and the fuzzer, which is
fast, share it. Checksums and lengths are put right after a mutation, mostly: what is wrong only in them
is refused before anything else of it is looked at.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from zstandard import ZstdCompressor

from blockdev.formats import erofs
from tests.golden.make_tars import EOA, GNU, LL, PX, USTAR, V7, b256, hdr, pad

Records = list[tuple[bytes, bytes]]

# The sound ones of each come first, see `mostly`.
NAMES: Final = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"a/b",
    b"a/b/c",
    b"b/a",
    b"d/a",
    b"d/b/",
    b"a/",
    b"./a",
    b"/a//b",
    b".wh.a",
    b"d/.wh.a",
    b".wh..wh..opq",
    b"d/.wh..wh..opq",
    b"./",
    b"n" * 100,
    b"\xff\xfe",
    b"!x",
    b"a\nb",
    b"...",
    b".",
    b"",
    b"/",
    b"..",
    b"a/..",
    b"../a",
    b"a/../b",
    b"a/.",
    b"a/b/.",
    b"a/.wh.b",
    b"./.wh.d/",
    b".wh.",
    b"a/.wh..",
    b".wh...",
    b"a/b/.wh..wh..opq",
    b".wh..wh.plnk",
    b".wh.a/b",
    b".wh..wh..opq/x",
    b"n" * 255,
    b"n" * 256,
    b".wh." + b"n" * 255,
    b".wh." + b"n" * 255 + b"/.",
    b"d/" + b"n" * 255,
    b"d/" * 40 + b"x",
    b"a\0b",
    b"A/" * 3,
]
TARGETS: Final = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"a/b",
    b"b/a",
    b"/a",
    b"/d/b",
    b"d/a",
    b"..",
    b"../a",
    b"../../d",
    b".",
    b"/",
    b"d/../a",
    b"x/y",
    b"missing/../a",
    b"a/",
    b"./b",
    b"t" * 440,
    b"t" * 448,
    b"t" * 449,
    b"t" * 512,
    b"t" * 4095,
    b"",
    b"t" * 4096,
    b"n" * 256,
    b"/../a/./b",
    b"a/b/c",
    b"\0a",
    b"d//a",
]
KEYS: Final = [
    b"path",
    b"linkpath",
    b"uid",
    b"gid",
    b"mtime",
    b"mtime",
    b"atime",
    b"comment",
    b"LIBARCHIVE.xattr.user.a",
    b"SCHILY.xattr.user.a",
    b"SCHILY.xattr.user.b",
    b"SCHILY.xattr.user.",
    b"SCHILY.xattr.security.capability",
    b"SCHILY.xattr.security.x",
    b"SCHILY.xattr.trusted.overlay.opaque",
    b"SCHILY.xattr.system.posix_acl_access",
    b"SCHILY.xattr.system.posix_acl_default",
    b"SCHILY.xattr.system.x",
    b"SCHILY.xattr.user." + b"n" * 255,
    b"size",
    b"uname",
    b"hdrcharset",
    b"GNU.sparse.map",
    b"SCHILY.xattr.",
    b"SCHILY.xattr.user." + b"n" * 256,
    b"SCHILY.xattr",
]
NUMBERS: Final = [
    b"0",
    b"1",
    b"3",
    b"512",
    b"513",
    b"+5",
    b"007",
    b"4294967294",
    b"-0",
    b"0" * 30 + b"7",
    b"",
    b"1700000000",
    b"-1",
    b"4294967295",
    b"4294967296",
    b"1.5",
    b"-1.5",
    b"1.",
    b".5",
    b"9223372036.854775807",
    b"9223372036.854775808",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775808",
    b"1700000000.1234567899",
    b" 1",
    b"1 ",
    b"0x1",
    b"1e3",
    b"9" * 40,
    b"-0.5",
    b"1.5x",
    b"--1",
    b"1.-5",
    b"1_0",
]
TIMES: Final = [
    b"0",
    b"1",
    b"1.5",
    b"-1.5",
    b"1.",
    b"9223372036.854775807",
    b"9223372036.854775808",
    b"1700000000.1234567899",
    b"-0.5",
    b"-1",
    b"+7.25",
    b"007.5",
    b"",
]
TYPES: Final = [
    *[b"0"] * 7,
    *[b"5"] * 5,
    *[b"1"] * 4,
    *[b"2"] * 5,
    b"\0",
    b"\0",
    b"3",
    b"4",
    b"6",
    b"7",
    b"S",
    b"V",
    b"Z",
]
FIELDS: Final = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "major": (329, 8),
    "minor": (337, 8),
    "prefix": (345, 155),
    "tail": (500, 12),
}
MAGICS: Final = [b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\0\0\0", b"ustar 00", b"USTAR\x0000", b"ustar\x00  "]


def chance(rng: Random, one_in: int) -> bool:
    return rng.randrange(one_in) == 0


def mostly(rng: Random, pool: list[bytes], sound: int) -> bytes:
    """Mostly one of the first `sound`, which nothing is wrong with: a tar of many members is to be taken sometimes."""
    return rng.choice(pool[:sound] if rng.randrange(12) else pool)


def a_name(rng: Random) -> bytes:
    return mostly(rng, NAMES, 22)


def a_target(rng: Random) -> bytes:
    return mostly(rng, TARGETS, 24)


def a_key(rng: Random) -> bytes:
    return mostly(rng, KEYS, 19)


def a_type(rng: Random) -> bytes:
    return mostly(rng, TYPES, 26)


def raw_number(rng: Random, width: int) -> bytes:
    value = rng.choice(
        [
            0,
            1,
            2,
            0o644,
            0o4755,
            255,
            256,
            4095,
            4096,
            2**20 - 1,
            2**20,
            2**32 - 2,
            2**32 - 1,
            2**32,
            -1,
            -2,
            -(2**63),
            2**63 - 1,
            2**63,
            512,
            1000,
        ]
    )
    form = rng.randrange(8)
    if form < 3:
        return (b"%0*o\0" % (width - 1, abs(value)))[-width:].rjust(width, b"0")
    if form < 6:
        field: bytes = b256(value, width)
        return field
    return rng.choice(
        [
            b"",
            b" " * width,
            b"7" * width,
            b" 644 ",
            b"\0\x00 644\0",
            b"644\0zz",
            b"9",
            b"-1",
            b"0x1",
            b"6 4",
            b"644\n",
            b"\x80",
            b"\xff" * width,
            b"\xc0",
            b"\xbf" + b"\xff" * (width - 1),
            b"\t7",
        ]
    )[:width].ljust(width, rng.choice([b"\0", b" "]))


def value_for(rng: Random, key: bytes) -> bytes:
    if key == b"path":
        return a_name(rng)
    if key == b"linkpath":
        return a_target(rng)
    if key == b"mtime" and not chance(rng, 8):
        return rng.choice(TIMES)
    if key in (b"size", b"uid", b"gid", b"mtime"):
        return mostly(rng, NUMBERS, 12)
    if key == b"SCHILY.xattr.user.b" and chance(rng, 30):
        return b"v" * rng.choice([65535, 65536, 65532])
    return rng.choice([b"", b"1", b"two\nlines", b"=" * 30, bytes(20), b"v" * 380, b"v" * 390, b"v" * 900, b"a\0b"])


def records(rng: Random) -> Records:
    return [(key, value_for(rng, key)) for key in (a_key(rng) for _ in range(rng.randrange(1, 5)))]


def member(rng: Random) -> bytes:
    """One, with the extended headers in front of it."""
    out = b""
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        kind = rng.randrange(6)
        if kind < 4:
            out += PX(*records(rng), typ=b"g" if chance(rng, 8) else b"x")
        elif kind == 4:
            out += LL(a_name(rng))
        else:
            out += LL(a_target(rng), b"K")
    typ = a_type(rng)
    data = b"" if typ not in b"0\0" else rng.choice([b"", b"", b"1", b"data", b"x" * 511, b"y" * 512, b"z" * 1300])
    raw: dict[str, bytes] = {}
    if chance(rng, 16):
        field, width = rng.choice(
            [("mode", 8), ("uid", 8), ("gid", 8), ("mtime", 12), ("dmaj", 8), ("dmin", 8), ("size", 12)]
        )
        raw[field] = raw_number(rng, width)
    arguments: dict[str, Any] = {
        "magic": rng.choice([USTAR, USTAR, USTAR, GNU, V7]),
        "mode": rng.choice([0o644, 0o755, 0o7777, 0, 0o100600]),
        "uid": rng.choice([0, 1, 1000]),
        "gid": rng.choice([0, 7]),
        "mtime": rng.choice([0, 1, 1700000000, 8**11 - 1]),
        "dev": (4096, 0) if chance(rng, 20) else rng.choice([(0, 0), (1, 3), (4095, 2**20 - 1), (8, 256)]),
        "raw": raw,
        "prefix": b"" if not chance(rng, 10) else rng.choice([b"a", b"d", b"..", b"p/q", b"P" * 155]),
        "link": a_target(rng)[:100],
    }
    size = len(data)
    if typ not in (b"0", b"\0") and chance(rng, 10):
        size = 512
    body = pad(data) if not chance(rng, 12) else data + b"\x01" * (-len(data) % 512)
    header: bytes = hdr(a_name(rng)[:100], typ, size, **arguments)
    return out + header + body


def tar(rng: Random) -> bytes:
    out = b"".join(member(rng) for _ in range(rng.randrange(1, 8)))
    return out + rng.choice([EOA, EOA, EOA, b"", bytes(512), bytes(512) + b"x", bytes(300), EOA + b"junk" * 50])


# --- mutations of tars


@dataclass
class Segment:
    """A header and what follows it, padding included; or bytes that are no header."""

    header: bytearray
    body: bytes


def octal_size(header: bytes | bytearray) -> int:
    match = re.match(rb"[ \0]*([0-7]*)", header[124:136])
    return int(match[1] or b"0", 8) if match else 0


def segments(data: bytes) -> list[Segment]:
    found, at = [], 0
    while at + 512 <= len(data):
        header = bytearray(data[at : at + 512])
        size = octal_size(header) if header[156] in b"0\0xgLK" and any(header) else 0
        end = min(len(data), at + 512 + size + -size % 512)
        found.append(Segment(header, data[at + 512 : end]))
        at = end
    if at < len(data):
        found.append(Segment(bytearray(), data[at:]))
    return found


def seal(header: bytearray) -> None:
    if len(header) == 512 and any(header):
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)


def change_field(rng: Random, segment: Segment) -> None:
    field = rng.choice(list(FIELDS))
    at, width = FIELDS[field]
    if field == "type":
        value = rng.choice([*TYPES, b"x", b"g", b"L", b"K"])
    elif field == "magic":
        value = rng.choice(MAGICS)
    elif field == "name":
        value = a_name(rng)
    elif field == "link":
        value = a_target(rng)
    elif field == "prefix":
        value = rng.choice([b"", b"a", b"..", b"d/a", b"p" * 131 + b"0" * 24, b"p" * 155])
    elif field == "tail":
        value = rng.choice([bytes(8) + b"tar\0", bytes(12), b"\xff" * 12])
    else:
        value = raw_number(rng, width)
    segment.header[at : at + width] = value[:width].ljust(width, b"\0")


def change_pax(rng: Random, segment: Segment) -> None:
    """Records changed, their lengths put right, mostly; and that of the header."""
    size = octal_size(segment.header)
    body = segment.body[:size]
    found: list[bytes] = []
    while body:
        match = re.match(rb"([0-9]{1,7}) ", body)
        length = int(match[1]) if match else 0
        if not match or length <= len(match[0]):
            break
        found.append(body[len(match[0]) : length - 1])
        body = body[length:]
    action = rng.randrange(6)
    at = rng.randrange(len(found)) if found else 0
    if action == 0 or not found:
        key = a_key(rng)
        found.insert(at, key + b"=" + value_for(rng, key))
    elif action == 1:
        found.append(found[at])
    elif action == 2:
        del found[at]
    elif action == 3:
        key = found[at].partition(b"=")[0]
        found[at] = key + b"=" + value_for(rng, key)
    elif action == 4:
        found[at] = flip(rng, found[at])
    else:
        found[at] = rng.choice([b"noequals", b"=v", b"a\0b=c", b"path=a\0b", b"uname=\0", b"", b"x="])
    out = b""
    for content in found:
        length = len(content) + 3
        while len(b"%d" % length) + len(content) + 2 != length:
            length = len(b"%d" % length) + len(content) + 2
        wrong = 0 if not chance(rng, 15) else rng.choice([-1, 1, 10])
        form = b"%d" if not chance(rng, 30) else rng.choice([b"+%d", b"-%d", b"0x%x", b" %d"])
        out += form % (length + wrong) + b" " + content + b"\n"
    if chance(rng, 30):
        out = out[:-1]
    segment.body = pad(out)
    segment.header[124:136] = b"%011o\0" % len(out)


def flip(rng: Random, data: bytes) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out))
        out[at] = rng.choice([out[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255, 0x2F, 0x2E])
    return bytes(out)


def mutate_tar(rng: Random, base: bytes, other: bytes) -> bytes:
    parts = segments(base)
    for _ in range(rng.randrange(1, 5)):
        if not parts:
            parts = segments(tar(rng))
        at = rng.randrange(len(parts))
        headers = [part for part in parts if len(part.header) == 512 and any(part.header)]
        extended = [part for part in headers if part.header[156] in b"xg"]
        action = rng.randrange(14)
        if action <= 3 and headers:
            change_field(rng, rng.choice(headers))
        elif action <= 5 and extended:
            change_pax(rng, rng.choice(extended))
        elif action == 6:
            del parts[at]
        elif action == 7:
            copy = parts[at]
            parts.insert(rng.randrange(len(parts) + 1), Segment(bytearray(copy.header), copy.body))
        elif action == 8:
            more = segments(other)
            if more:
                first = rng.randrange(len(more))
                parts[at:at] = more[first : first + rng.randrange(1, 4)]
        elif action == 9:
            parts[at:at] = segments(member(rng))
        elif action == 10:
            to = rng.randrange(len(parts))
            parts[at], parts[to] = parts[to], parts[at]
        elif action == 11:
            parts[at].body = flip(rng, parts[at].body)
        elif action == 12 and headers:
            chosen = rng.choice(headers)
            chosen.header[:] = flip(rng, bytes(chosen.header))
        elif action == 13:
            parts.insert(at, Segment(bytearray(rng.choice([512, 1024])), b""))
    for part in parts:
        if not chance(rng, 60):
            seal(part.header)
    out = b"".join(bytes(part.header) + part.body for part in parts)
    return cut(rng, out) if chance(rng, 12) else out


def cut(rng: Random, data: bytes) -> bytes:
    """At the edges of blocks more often than elsewhere."""
    at = rng.randrange(len(data) + 1)
    return data[: at // 512 * 512 + rng.choice([-1, 0, 0, 1])] if chance(rng, 2) and at > 512 else data[:at]


# --- any bytes, compressed streams


def mutate_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(8)
        if action <= 2:
            out = bytearray(flip(rng, bytes(out)))
        elif action == 3:
            del out[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif action == 4:
            out[at:at] = rng.choice(
                [b"\0", b"\xff", bytes(8), b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\4\0\0\0abcd"]
            )
        elif action == 5:
            first = rng.randrange(len(other) + 1)
            out[at:at] = other[first : first + rng.choice([1, 4, 16, 100, 1000])]
        elif action == 6:
            out = out[:at]
        else:
            # The first bytes hold flags, methods, window and content sizes.
            out[: min(at, 16)] = flip(rng, bytes(out[: min(at, 16)])) if at else b""
    return bytes(out)


def gzip_stream(rng: Random, data: bytes) -> bytes:
    out = b""
    for piece in pieces(rng, data):
        member = gzip.compress(piece, rng.choice([0, 1, 9]), mtime=0)
        flags, extra = rng.choice(
            [(0, b"")] * 4 + [(8, b"name\0"), (4, b"\4\0abcd"), (16, b"comment\0"), (0xE0, b""), (2, b"\0\0")]
        )
        out += member[:3] + bytes([flags]) + member[4:10] + extra + member[10:]
    return out + bytes(rng.choice([0, 0, 0, 1, 512]))


def sealed_gzip(stream: bytes) -> bytes:
    """With the checksum and the size of what its first member really holds, where that can be told."""
    if len(stream) < 18 or stream[3]:
        return stream
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(stream[10:], 1 << 22)
    except zlib.error:
        return stream
    if not inflater.eof or len(inflater.unused_data) < 8:
        return stream
    end = len(stream) - len(inflater.unused_data)
    return stream[:end] + struct.pack("<II", zlib.crc32(data), len(data)) + stream[end + 8 :]


def zstd_stream(rng: Random, data: bytes) -> bytes:
    out = b""
    for piece in pieces(rng, data):
        compressor = ZstdCompressor(
            level=rng.choice([1, 3, 19]), write_checksum=chance(rng, 2), write_content_size=chance(rng, 2)
        )
        out += compressor.compress(piece)
        if chance(rng, 4):
            out += bytes([0x50 + rng.randrange(16)]) + b"\x2a\x4d\x18\4\0\0\0note"
    return out


def pieces(rng: Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# --- layer files


def mutate_layer(rng: Random, file: bytes, data_size: int) -> bytes:
    """The data area, changed where the reader looks; its superblock's checksum put right, mostly."""
    block = 1 << file[1024 + 12]
    start = struct.unpack_from("<I", file, 1024 + 40)[0] * block
    out = bytearray(file[:data_size])
    for _ in range(rng.randrange(1, 6)):
        action = rng.randrange(4)
        width = rng.choice([1, 2, 4, 8])
        inside = rng.randrange(start, data_size - width) if not chance(rng, 6) else rng.randrange(1024, 1152 - width)
        if action == 0:
            at = inside // width * width
            value = rng.choice([rng.randrange(700), rng.randrange(1 << 8 * width), (1 << 8 * width) - 1, 0])
            out[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif action == 1:
            out[inside] ^= 1 << rng.randrange(8)
        elif action == 2:
            # Records in places of others, all sound in themselves: so that loops and double names come up.
            source, target = (start + 32 * rng.randrange((data_size - start) // 32 - 4) for _ in range(2))
            piece = file[source : source + 32 * rng.randrange(1, 5)]
            out[target : target + len(piece)] = piece
            del out[data_size:]
        else:
            # A field of an inode that is one.
            inode = start + 64 * rng.randrange(1, max(2, (data_size - start) // 64))
            offset, size = rng.choice([(0, 2), (2, 2), (4, 2), (8, 8), (16, 4), (32, 8), (40, 4), (44, 4)])
            value = rng.choice([0, 1, 5, 0x41ED, 0xA1FF, 0x81A4, 511, 512, 513, 4095, 4096, 1 << 30, (1 << 64) - 1])
            out[inode + offset : inode + offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            del out[data_size:]
    out = out.ljust(data_size, b"\0")
    if not chance(rng, 20):
        out[1028:1032] = bytes(4)
        struct.pack_into("<I", out, 1028, erofs.crc32c(out[1024:][: erofs.checksummed_bytes(block)]))
    return bytes(out)
