# SPDX-License-Identifier: Apache-2.0
"""Layers in which an unpacker can go wrong, one or few a tar. What each must come to says test_unpacker.py."""

from __future__ import annotations

import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable
from typing import Final

from tests.golden.make_tars import EOA, GNU, LL, PX, T0, V7, D, F, H, S, b256, hdr, octal, pad

SHAPES: Final[dict[str, bytes]] = {}


def shape(make: Callable[[], bytes]) -> Callable[[], bytes]:
    SHAPES[make.__name__.replace("_", "-")] = make()
    return make


def shapes(make: Callable[[], dict[str, bytes]]) -> Callable[[], dict[str, bytes]]:
    for name, tar in make().items():
        SHAPES[f"{make.__name__.replace('_', '-')}-{name}"] = tar
    return make


def patched(header: bytes, at: int, value: bytes) -> bytes:
    """A header with other bytes at a place, and the checksum of them."""
    out = bytearray(header)
    out[at : at + len(value)] = value
    out[148:156] = b" " * 8
    out[148:156] = b"%06o\0 " % sum(out[:512])
    return bytes(out)


def X(name: bytes, value: bytes) -> bytes:
    """An xattr for the next member."""
    return PX((b"SCHILY.xattr." + name, value))


def capability(version: int = 2, root: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack("<I4I", version << 24 | flags, 1 << 10, 0, 0, 0) + root


def acl(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    """Of (tag, permissions, id): user 1 and 2, group 4 and 8, mask 16, other 32; an odd one has an id."""
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NO_ID: Final = 0xFFFFFFFF
# For mode 0640: its three classes, a user of its own, and the mask that stands for the group then.
GOOD_ACL: Final = acl((1, 6, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 4, NO_ID), (32, 0, NO_ID))
MINIMAL_ACL: Final = acl((1, 6, NO_ID), (4, 4, NO_ID), (32, 0, NO_ID))
ACL: Final = b"system.posix_acl_access"
DEFAULT_ACL: Final = b"system.posix_acl_default"
CAPABILITY: Final = b"security.capability"


# --- forms of headers


@shape
def v7_every_type() -> bytes:
    return (
        D(b"d", magic=V7)
        + F(b"d/f", b"1", magic=V7)
        + H(b"h", b"d/f", magic=V7)
        + S(b"s", b"d/f", magic=V7)
        + hdr(b"c", b"3", magic=V7, dev=(1, 3))
        + hdr(b"b", b"4", magic=V7)
        + hdr(b"p", b"6", magic=V7)
        + patched(hdr(b"noprefix", magic=V7), 345, b"ignored")
        + patched(hdr(b"x", b"3", magic=V7), 329, b"junk!!!!")
        + hdr(b"slash/", b"\0", magic=V7, mode=0o700)
        + EOA
    )


@shape
def ustar_versions() -> bytes:
    return (
        F(b"blank", b"1", magic=(b"ustar\0", b"  "))
        + F(b"none", b"2", magic=(b"ustar\0", b"\0\0"))
        + F(b"name", b"3", prefix=b"pre/fix")
        + F(b"n" * 100, b"4", prefix=b"p" * 155)
        + F(b"/abs", b"5", prefix=b"/rooted/")
        + F(b"half", b"6", magic=(b"ustar ", b"00"))
        + EOA
    )


def star(header: bytes, atime: bytes = octal(T0, 12), ctime: bytes = octal(T0, 12)) -> bytes:
    return patched(patched(patched(header, 476, atime), 488, ctime), 508, b"tar\0")


@shape
def star_headers() -> bytes:
    return (
        star(hdr(b"name", prefix=b"p" * 131))
        + star(hdr(b"plain"))
        + star(hdr(b"d/", b"5", mode=0o755))
        + star(hdr(b"old", prefix=b"d"), b"\0" * 12, b" " * 12)
        + EOA
    )


@shape
def gnu_headers() -> bytes:
    times = octal(T0 + 9, 12) + octal(T0 + 8, 12)
    return (
        hdr(b"times", magic=GNU, prefix=times)
        + hdr(b"binary", magic=GNU, prefix=b256(T0, 12) + b256(-1, 12))
        + LL(b"long/" * 60 + b"f")
        + F(b"short", b"1", magic=GNU)
        + LL(b"t" * 300, b"K")
        + S(b"s", b"x", magic=GNU)
        + LL(b"long/" * 60 + b"f", b"K")
        + H(b"h", b"x", magic=GNU)
        + LL(b"")
        + F(b"empty-long", b"2", magic=GNU)
        + LL(b"")
        + LL(b"", b"K")
        + S(b"s2", b"kept", magic=GNU)
        + LL(b"one")
        + LL(b"two")
        + F(b"three", magic=GNU)
        + LL(b"cut\0here")
        + F(b"four", magic=GNU)
        + LL(b"dir/")
        + hdr(b"x", b"\0", magic=GNU, mode=0o711)
        + LL(b"ustar-too")
        + F(b"five")
        + LL(b"v7-too")
        + F(b"six", magic=V7)
        + EOA
    )


@shape
def gnu_base_256() -> bytes:
    return (
        hdr(b"id", magic=GNU, raw={"uid": b256(3000000000, 8), "gid": b256(70000, 8), "mode": b256(0o4711, 8)})
        + hdr(b"size", magic=GNU, raw={"size": b256(700, 12)})
        + pad(b"s" * 700)
        + hdr(b"time", magic=GNU, raw={"mtime": b256(T0 * 5, 12)})
        + hdr(b"past", raw={"mtime": b256(-1, 12)})
        + hdr(b"device", b"3", magic=GNU, raw={"dmaj": b256(4095, 8), "dmin": b256(1048575, 8)})
        + EOA
    )


@shapes
def number() -> dict[str, bytes]:
    fields = {
        "blanks": b"   755 \0",
        "nuls": b"\0\0755\0\0\0",
        "cut": b"7\x005\x005\x00\x00\x00",
        "full": b"00000755",
        "nine": b"0000759\0",
        "minus": b"-000755\0",
        "plus": b"+000755\0",
        "hex": b"0x1ff\0\0\0",
        "tab": b"\t755\0\0\0\0",
        "inner-blank": b"07 55\0\0\0",
        "b256-wide": b"\x80\xff\xff\xff\xff\xff\xff\xff",
        "b256-zero": b"\x80" + bytes(7),
        "b256-minus-one": b"\xff" * 8,
        "high-bit": b"\xc0" + bytes(7),
    }
    fields = {name: field.ljust(8, b"\0") for name, field in fields.items()}
    found = {f"mode-{name}": hdr(b"f", raw={"mode": field}) + EOA for name, field in fields.items()}
    for name, field in fields.items():
        found[f"uid-{name}"] = hdr(b"f", raw={"uid": field}) + EOA
        found[f"v7-device-{name}"] = hdr(b"c", b"3", magic=V7, raw={"dmaj": field}) + EOA
    for name, mtime in {
        "12-digits": b"777777777777",
        "bad": b"1700000000x\0",
        "b256-96-bit": b"\x80\1" + bytes(10),
        "b256-64-bit": b"\x80\0\0\0\x7f" + b"\xff" * 7,
        "b256-sign": b"\xff\xff\xff\xff\x80" + bytes(7),
        "b256-max": b"\x80\0\0\0" + struct.pack(">q", 9223372036),
        "b256-over": b"\x80\0\0\0" + struct.pack(">q", 9223372037),
    }.items():
        found[f"mtime-{name}"] = hdr(b"f", raw={"mtime": mtime}) + EOA
    for name, size in {
        "octal-big": b"77777777777\0",
        "b256-negative": b256(-1, 12),
        "b256-big": b256(1 << 62, 12),
    }.items():
        found[f"size-{name}"] = hdr(b"f", raw={"size": size}) + EOA
        found[f"size-of-directory-{name}"] = hdr(b"d", b"5", mode=0o755, raw={"size": size}) + EOA
    return found


@shapes
def typeflag() -> dict[str, bytes]:
    found = {}
    for flag in b"0123456789ABDEIMNSVXxgLK\0\x01Zaz ~":
        kind = bytes((flag,))
        name = f"{flag:02x}"
        found[name] = F(b"t", b"1") + hdr(b"m", kind, link=b"t", mode=0o755) + F(b"z", b"2") + EOA
        found[f"{name}-slash"] = F(b"t", b"1") + hdr(b"m/", kind, link=b"t", mode=0o755) + F(b"z", b"2") + EOA
        found[f"{name}-data"] = F(b"t", b"1") + hdr(b"m", kind, 3, link=b"t") + pad(b"abc") + F(b"z", b"2") + EOA
    return found


@shapes
def checksum() -> dict[str, bytes]:
    good = F(b"f\xff\xfe", b"1")
    signed = sum(byte - 256 if byte > 127 else byte for byte in good[:148] + b" " * 8 + good[156:512])
    fields = {
        "signed": b"%06o\0 " % signed,
        "wide": b"%07o\0" % int(good[148:154], 8),
        "blank": b" " * 8,
        "nul": bytes(8),
        "off-by-one": b"%06o\0 " % (int(good[148:154], 8) + 1),
        "junk": b"zzzzzz\0 ",
        "padded": b" " + good[148:155],
    }
    return {name: good[:148] + field + good[156:] + EOA for name, field in fields.items()}


# --- pax


@shape
def pax_every_key() -> bytes:
    return (
        PX(
            (b"path", b"dir/renamed"),
            (b"uid", b"4294967294"),
            (b"gid", b"+7"),
            (b"mtime", b"1700000000.25"),
            (b"atime", b"1800000000"),
            (b"ctime", b"-1"),
            (b"uname", b"root"),
            (b"gname", b""),
            (b"comment", b"c\0d"),
            (b"hdrcharset", b"BINARY"),
            (b"charset", b"ISO-IR 8859 1 1998"),
            (b"SCHILY.fflags", b"nodump"),
            (b"SCHILY.dev", b"1"),
            (b"VENDOR.key", b"=\n=\n"),
            (b"RHT.security.selinux", b"x"),
            (b"realtime.any", b"1"),
            (b"LIBARCHIVE.creationtime", b"1"),
            (b"SCHILY.xattr.user.k", b"a=b\nc\0d"),
        )
        + hdr(b"x")
        + PX((b"linkpath", b"dir/renamed"))
        + H(b"h", b"nothing")
        + PX((b"linkpath", b"../x/" * 40))
        + S(b"s", b"y")
        + PX((b"size", b"600"))
        + hdr(b"sized")
        + pad(b"z" * 600)
        + PX((b"size", b"00000600"))
        + hdr(b"sized0")
        + pad(b"z" * 600)
        + PX((b"path", b""), (b"size", b""), (b"uid", b""), (b"mtime", b""))
        + F(b"kept", b"1")
        + EOA
    )


@shapes
def pax_time() -> dict[str, bytes]:
    times = (
        b"0",
        b"-0",
        b"+5",
        b"1.",
        b".5",
        b"-.5",
        b"1.5",
        b"-1.5",
        b"-0.5",
        b"+0.5",
        b"1.1234567891",
        b"1.000000000000001",
        b"9223372036.854775807",
        b"9223372036.854775808",
        b"9223372037",
        b"9223372036854775807",
        b"9223372036854775808",
        b"-9223372036854775808",
        b"1e9",
        b"1.5x",
        b"1.-5",
        b"1.+5",
        b"1,5",
        b" 1",
        b"1 ",
        b"0x10",
        b"1_000",
        b"--1",
        b"1.5.5",
        b"00000000000000000000000000001",
        b"2147483648.999999999",
        b"0.000000001",
        b"0.0000000009",
        b"-",
        b"+",
        b".",
    )
    return {
        f"{at:02}": PX((b"mtime", time)) + F(b"f", b"1") + PX((b"mtime", time)) + D(b"d") + EOA
        for at, time in enumerate(times)
    }


@shapes
def pax_number() -> dict[str, bytes]:
    values = {
        "plus": b"+5",
        "zeros": b"0005",
        "minus-zero": b"-0",
        "minus": b"-1",
        "max": b"4294967294",
        "blank": b" 5",
        "trailing": b"5 ",
        "hex": b"0x5",
        "underscore": b"1_0",
        "long": b"1" * 20,
        "word": b"root",
        "point": b"5.0",
    }
    return {
        f"{key}-{name}": PX((key.encode(), value)) + F(b"f", b"") + EOA
        for key in ("uid", "size")
        for name, value in values.items()
    }


def pax_raw(body: bytes, kind: bytes = b"x") -> bytes:
    return hdr(b"PaxHeaders/x", kind, len(body)) + pad(body)


@shapes
def pax_record() -> dict[str, bytes]:
    bodies = {
        "empty": b"",
        "short": b"4 =\n",
        "no-key": b"5 =a\n",
        "five": b"5 a=\n",
        "no-equals": b"6 abc\n",
        "zero": b"0 a=b\n",
        "leading-zero": b"06 a=b\n\n"[:7],
        "zeros": b"007 a=b"[:6] + b"\n",
        "too-long": b"60 a=b\n",
        "too-short": b"5 a=b\n",
        "no-blank": b"6a=b\n",
        "two-blanks": b"7  a=b\n",
        "tab": b"6\ta=b\n",
        "minus": b"-6 a=b\n",
        "nul-end": b"6 a=b\n\0\0\0",
        "nul-key": b"8 a\0a=b\n",
        "nul-path": b"12 path=a\0b\n",
        "nul-link": b"16 linkpath=a\0b\n",
        "nul-uname": b"13 uname=a\0b\n",
        "nul-other": b"12 othe=a\0b\n",
        "equals": b"13 path=a=b=\n",
        "cr": b"12 path=abc\r"[:11] + b"\n",
        "junk-end": b"6 a=b\nx",
        "hex": b"0xb path=ab\n",
        "newline-path": b"12 path=a\nb\n",
        "huge": b"99999999999999999999 a=b\n",
    }
    found = {name: pax_raw(body) + F(b"f", b"1") + EOA for name, body in bodies.items()}
    found |= {f"global-{name}": pax_raw(body, b"g") + F(b"f", b"1") + EOA for name, body in bodies.items()}
    return found


@shape
def pax_global() -> bytes:
    return (
        PX((b"path", b"all"), (b"mtime", b"1"), (b"SCHILY.xattr.user.g", b"1"), typ=b"g")
        + F(b"a", b"1")
        + PX((b"uid", b"5"))
        + F(b"b", b"2")
        + PX((b"comment", b"c"), typ=b"g")
        + D(b"d")
        + PX((b"path", b"lost"))
        + PX((b"size", b"5"), typ=b"g")
        + F(b"c", b"3")
        + LL(b"lost-too")
        + PX((b"a", b"b"), typ=b"g")
        + F(b"e")
        + EOA
    )


@shape
def pax_over_the_limit() -> bytes:
    return PX((b"comment", b"c" * (1 << 20))) + F(b"f", b"1") + EOA


@shape
def pax_at_the_limit() -> bytes:
    return PX((b"comment", b"c" * ((1 << 20) - 17))) + F(b"f", b"1") + EOA


@shape
def gnu_long_over_the_limit() -> bytes:
    return LL(b"n" * (1 << 20)) + F(b"f", b"1", magic=GNU) + EOA


@shape
def extended_headers_in_any_order() -> bytes:
    out = b""
    for at, order in enumerate(itertools.permutations((b"x", b"L", b"K"))):
        name = b"%d" % at
        parts = {
            b"x": PX((b"path", b"pax" + name), (b"linkpath", b"paxlink" + name), (b"mtime", b"5.5")),
            b"L": LL(b"gnu" + name),
            b"K": LL(b"gnulink" + name, b"K"),
        }
        out += b"".join(parts[key] for key in order) + S(b"header" + name, b"headerlink")
        out += parts[b"x"] + parts[order[0]] + parts[b"x"] + S(b"again" + name, b"x")
    return out + EOA


# --- names


@shape
def names_with_dots_and_slashes() -> bytes:
    return (
        D(b".")
        + D(b"./")
        + D(b"/")
        + D(b"//")
        + hdr(b"", b"0", 3)
        + pad(b"abc")
        + D(b"./d/")
        + F(b"./d//./f", b"1")
        + F(b"/d/abs", b"2")
        + F(b"///d/abs3", b"3")
        + D(b"d/e///")
        + F(b"d/e/./g/.", b"4")
        + F(b"d/...", b"5")
        + S(b"d/sym/", b"x/")
        + F(b"/../"[:1] + b"top", b"6")
        + D(b"./././deep/./er/.")
        + EOA
    )


@shape
def missing_parents_of_every_type() -> bytes:
    return (
        F(b"t", b"1")
        + F(b"a/b/f", b"1")
        + D(b"c/d/e")
        + S(b"g/s", b"x")
        + H(b"h/i/l", b"t")
        + hdr(b"j/c", b"3", dev=(1, 3))
        + hdr(b"k/p", b"6")
        + F(b"l/.wh.w")
        + F(b"m/n/.wh..wh..opq")
        + D(b"a", mode=0o700, uid=5)
        + EOA
    )


@shape
def names_of_any_bytes() -> bytes:
    # All bytes that a name may hold, in names of one to three.
    plain = [bytes((byte,)) for byte in range(1, 256) if byte not in b"/."]
    return (
        b"".join(F(b"b/" + name, name) for name in plain)
        + b"".join(F(b"c/" + name * 2 + b"x", name) for name in plain[::7])
        + S(b"\xff\xfe", b"\xc3\x28")
        + H(b"\xe2\x82", b"b/\xff")
        + PX((b"path", b"\xf0\x28\x8c\x28"))
        + F(b"x")
        + EOA
    )


@shape
def names_of_255_bytes() -> bytes:
    long = b"n" * 255
    return (
        PX((b"path", long))
        + F(b"x", b"1")
        + LL(b"d" * 255 + b"/" + b"e" * 255)
        + F(b"x", b"2", magic=GNU)
        + PX((b"path", b"\xff" * 255 + b"/"))
        + hdr(b"x", b"5", mode=0o755)
        + PX((b"path", b".wh." + b"w" * 251))
        + F(b"x")
        + PX((b"path", b"o/.wh." + b"w" * 255))
        + F(b"x")
        + PX((b"linkpath", long))
        + H(b"h", b"x")
        + EOA
    )


@shapes
def too_long() -> dict[str, bytes]:
    return {
        "name": PX((b"path", b"n" * 256)) + F(b"x") + EOA,
        "parent": PX((b"path", b"n" * 256 + b"/f")) + F(b"x") + EOA,
        "whiteout": PX((b"path", b".wh." + b"n" * 256)) + F(b"x") + EOA,
        "opaque-parent": PX((b"path", b"n" * 256 + b"/.wh..wh..opq")) + F(b"x") + EOA,
        "hardlink-target": F(b"f") + PX((b"linkpath", b"n" * 256)) + H(b"h", b"x") + EOA,
        "symlink-target": PX((b"linkpath", b"t" * 4096)) + S(b"s", b"x") + EOA,
        "name-of-global": PX((b"a", b"b"), typ=b"g") + PX((b"path", b"n" * 256)) + D(b"x") + EOA,
        "through-symlink": PX((b"linkpath", b"n" * 256)) + S(b"s", b"x") + F(b"s/f") + EOA,
        "path": PX((b"path", b"/".join([b"p" * 250] * 20))) + F(b"x", b"1") + EOA,
    }


@shape
def symlink_targets_of_any_length() -> bytes:
    lengths = (1, 59, 60, 61, 255, 256, 1023, 1024, 4094, 4095)  # ext4 keeps up to 59 bytes in the inode
    return (
        b"".join(PX((b"linkpath", b"t" * n)) + S(b"s%d" % n, b"x") for n in lengths) + S(b"dots", b"../..//./x/") + EOA
    )


@shape
def symlink_without_a_target() -> bytes:
    return S(b"s", b"") + EOA


# --- ends


@shapes
def end() -> dict[str, bytes]:
    one = F(b"a", b"1") + F(b"b", b"2" * 600)
    zero = bytes(512)
    return {
        "none": one,
        "one-block": one + zero,
        "two-blocks": one + zero * 2,
        "many": one + zero * 20,
        "junk": one + zero * 2 + b"junk" * 99,
        "second-archive": one + zero * 2 + F(b"c", b"3") + zero * 2,
        "one-then-header": one + zero + F(b"c", b"3"),
        "one-then-half": one + zero + bytes(100),
        "one-then-junk": one + zero + b"j" * 512,
        "half-header": one + F(b"c")[:300],
        "half-zeros": one + bytes(300),
        "in-data": one[:-700],
        "in-padding": one[:-300],
        "after-data": one[: 512 * 3 + 600],
        "empty": b"",
        "only-zeros": zero * 2,
        "one-zero": zero,
        "junk-only": b"junk",
        "junk-block": b"junk" * 128,
        "after-header-with-data": hdr(b"a", size=5),
        "dangling-x": one + PX((b"path", b"x")),
        "dangling-x-end": one + PX((b"path", b"x")) + EOA,
        "dangling-g": one + PX((b"path", b"x"), typ=b"g"),
        "dangling-L": one + LL(b"x"),
        "dangling-K": one + LL(b"x", b"K") + EOA,
        "in-x": one + PX((b"path", b"x" * 700))[:-400],
        "x-without-padding": one + PX((b"path", b"x" * 10))[:-490],
        "x-then-one-zero": one + PX((b"path", b"x")) + zero,
        "x-then-half": one + PX((b"path", b"x")) + F(b"c")[:100],
    }


# --- entries over entries

KINDS: Final = {
    "file": lambda name: F(name, b"content of " + name, mode=0o640, uid=1, gid=2, mtime=T0 + 1),
    "directory": lambda name: D(name, mode=0o2750, uid=3, gid=4, mtime=T0 + 2),
    "full-directory": lambda name: (
        D(name, mode=0o700, uid=3, mtime=T0 + 2) + F(name + b"/child", b"1") + D(name + b"/sub")
    ),
    "made-directory": lambda name: F(name + b"/made-child", b"1"),
    "symlink": lambda name: S(name, b"target", uid=5, gid=6, mtime=T0 + 3),
    "symlink-to-directory": lambda name: S(name, b"dir", uid=5, gid=6, mtime=T0 + 3),
    "hardlink": lambda name: H(name, b"target", mode=0o4755, uid=7, gid=8, mtime=T0 + 4),
    "char": lambda name: hdr(name, b"3", dev=(1, 3), mode=0o666, uid=9, mtime=T0 + 5),
    "block": lambda name: hdr(name, b"4", dev=(7, 300), mode=0o660, gid=10, mtime=T0 + 6),
    "fifo": lambda name: hdr(name, b"6", mode=0o600, mtime=T0 + 7),
    "opaque": lambda name: F(name + b"/.wh..wh..opq"),
}


@shapes
def over() -> dict[str, bytes]:
    found = {}
    base = F(b"target", b"shared") + D(b"dir", mtime=T0 + 2) + F(b"dir/in", b"1")
    for (first, make_first), (second, make_second) in itertools.product(KINDS.items(), KINDS.items()):
        found[f"{first}-by-{second}"] = base + make_first(b"n") + make_second(b"n") + EOA
        found[f"{first}-by-{second}-below"] = (
            base + D(b"p") + make_first(b"p/n") + make_second(b"./p/n/") + F(b"p/z") + EOA
        )
    return found


@shape
def directory_over_directory_joins_xattrs() -> bytes:
    return (
        PX((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.b", b"1"))
        + D(b"d", mode=0o700)
        + F(b"d/f")
        + PX((b"SCHILY.xattr.user.b", b"2"))
        + D(b"./d/", mode=0o1777, uid=9, mtime=T0 + 1)
        + F(b"e/f")
        + X(b"user.c", b"3")
        + D(b"e", mode=0o711)
        + X(CAPABILITY, capability())
        + D(b"g")
        + D(b"g", uid=1)
        + EOA
    )


@shape
def hardlinks_with_their_own_header() -> bytes:
    return (
        PX((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.security.capability", capability()))
        + F(b"f", b"1", mode=0o755)
        + H(b"l1", b"f", mode=0o4711, uid=5, gid=6, mtime=T0 + 9)
        + X(b"user.b", b"2")
        + H(b"l2", b"l1", mtime=T0 + 10)
        + X(CAPABILITY, capability(2, flags=0))
        + H(b"l3", b"/f", mode=0)
        + PX((b"mtime", b"1.5"))
        + H(b"d/l4", b"./l3")
        + S(b"s", b"f", uid=1)
        + H(b"s2", b"s", mode=0o600, uid=2, mtime=T0 + 11)
        + X(b"user.x", b"dropped")
        + H(b"s3", b"s2")
        + hdr(b"p", b"6")
        + H(b"p2", b"p", mode=0o644, uid=3)
        + hdr(b"c", b"3", dev=(5, 1))
        + H(b"c2", b"c", mode=0o620, gid=5)
        + X(CAPABILITY, capability())
        + hdr(b"q", b"6")
        + H(b"q2", b"q")
        + EOA
    )


@shape
def hardlinks_through_symlinks() -> bytes:
    return (
        D(b"usr")
        + D(b"usr/lib")
        + S(b"lib", b"usr/lib")
        + F(b"usr/lib/a", b"1")
        + H(b"lib/b", b"lib/a")
        + H(b"c", b"/lib/b")
        + S(b"usr/up", b"../lib")
        + H(b"usr/up/d", b"usr/up/b")
        + S(b"out", b"../../../usr")
        + H(b"out/e", b"out/lib/a")
        + EOA
    )


@shapes
def hardlink() -> dict[str, bytes]:
    f = F(b"f", b"1") + D(b"d") + F(b"d/g", b"2") + S(b"s", b"f") + S(b"ds", b"d")
    return {
        "before-its-target": H(b"h", b"f") + f + EOA,
        "to-nothing": f + H(b"h", b"none") + EOA,
        "to-a-directory": f + H(b"h", b"d") + EOA,
        "to-itself": f + H(b"f", b"f") + EOA,
        "to-itself-below": f + H(b"d", b"d/g") + EOA,
        "to-empty": f + H(b"h", b"") + EOA,
        "to-root": f + H(b"h", b"/") + EOA,
        "to-dot": f + H(b"h", b".") + EOA,
        "below-a-file": f + H(b"h", b"f/x") + EOA,
        "in-a-file": f + H(b"f/h", b"d/g") + EOA,
        "to-a-symlink": f + H(b"h", b"s", uid=4) + EOA,
        "over-a-directory": f + H(b"d", b"f") + EOA,
        "over-its-twin": f + H(b"h", b"f") + H(b"h", b"f", mode=0o600) + EOA,
        "swapped": f + H(b"h", b"f") + H(b"f", b"h") + EOA,
        "to-a-replaced": f + F(b"f", b"new") + H(b"h", b"f") + EOA,
        "lives-on": f + H(b"h", b"f") + F(b"f", b"new") + H(b"i", b"h") + EOA,
        "with-data": f + hdr(b"h", b"1", 5, link=b"f") + pad(b"12345") + EOA,
        "to-a-file-with-slash": f + H(b"h", b"f/") + EOA,
        "to-a-file-with-dot": f + H(b"h", b"f/.") + EOA,
        "through-a-symlink-with-slash": f + H(b"h", b"s/") + EOA,
        "through-a-symlink-with-dot": f + H(b"h", b"s/.") + EOA,
        "to-a-directory-with-slash": f + H(b"h", b"d/") + EOA,
        "to-a-made-directory": F(b"a/b") + H(b"h", b"a") + EOA,
        "chain": f + b"".join(H(b"h%d" % i, b"h%d" % (i - 1) if i else b"f", mtime=T0 + i) for i in range(9)) + EOA,
        "to-a-whiteout": f + F(b".wh.w") + H(b"h", b"w") + EOA,
        "to-a-whiteout-mark": f + F(b".wh.w") + H(b"h", b".wh.w") + EOA,
        "makes-parents": f + H(b"x/y/h", b"f") + EOA,
        "to-a-missing-parent": f + H(b"h", b"x/y") + EOA,
        "named-as-a-mark": f + H(b".wh.h", b"f") + EOA,
        "to-a-loop": f + S(b"l", b"l") + H(b"h", b"l/x") + EOA,
        "to-a-loop-itself": f + S(b"l", b"l") + H(b"h", b"l") + EOA,
    }


# --- parents that are symlinks


def hops(count: int) -> bytes:
    return (
        b"".join(S(b"l%d" % n, b"l%d" % (n + 1)) for n in range(count - 1))
        + S(b"l%d" % (count - 1), b"r")
        + D(b"r")
        + F(b"l0/x")
        + EOA
    )


@shapes
def through() -> dict[str, bytes]:
    real = D(b"real") + D(b"real/in") + F(b"real/f", b"1")
    return {
        "relative": real + S(b"l", b"real") + F(b"l/x", b"2") + D(b"l/in", mode=0o700) + EOA,
        "absolute": real + S(b"l", b"/real/in") + F(b"l/x", b"2") + F(b"l/y/z", b"3") + EOA,
        "chain": real
        + b"".join(S(b"l%d" % n, b"l%d" % (n + 1)) for n in range(20))
        + S(b"l20", b"real")
        + F(b"l0/x", b"2")
        + EOA,
        "above-the-root": real + S(b"l", b"../../../real") + F(b"l/x", b"2") + EOA,
        "to-the-root": real + S(b"l", b"/") + F(b"l/x", b"2") + D(b"l/real", mode=0o711) + EOA,
        "to-dot": real + S(b"real/l", b".") + F(b"real/l/l/x", b"2") + EOA,
        "to-dot-dot": real + S(b"real/in/l", b"..") + F(b"real/in/l/x", b"2") + EOA,
        "to-nothing": S(b"l", b"not/there") + F(b"l/x", b"2") + EOA,
        "to-nothing-absolute": S(b"l", b"/not/there/") + D(b"l/x") + EOA,
        "to-a-file": real + S(b"l", b"real/f") + F(b"l/x", b"2") + EOA,
        "loop": S(b"a", b"b") + S(b"b", b"a") + F(b"a/x") + EOA,
        "itself": S(b"a", b"a") + F(b"a/x") + EOA,
        "below-itself": S(b"a", b"a/b") + F(b"a/x") + EOA,
        "middle": real + D(b"p") + S(b"p/l", b"../real") + F(b"p/l/in/x", b"2") + EOA,
        "dir-over-symlink": real + S(b"l", b"real") + D(b"l") + F(b"l/x", b"2") + EOA,
        "symlink-with-slash": real + S(b"l/", b"real/") + D(b"l/") + EOA,
        "replaced-target": S(b"l", b"t") + F(b"l/x") + F(b"t", b"1") + EOA,
        "replaced-symlink": real + S(b"l", b"real") + F(b"l/x", b"1") + S(b"l", b"real/in") + F(b"l/x", b"2") + EOA,
        "whiteout": real + S(b"l", b"real") + F(b"l/.wh.gone") + F(b"l/.wh..wh..opq") + EOA,
        "opaque-twice": real + S(b"l", b"real") + F(b"l/.wh..wh..opq") + F(b"real/.wh..wh..opq") + EOA,
        "dots-in-target": real + S(b"l", b"./real/./in/../../real//in") + F(b"l/x", b"2") + EOA,
        "missing-dot-dot": D(b"real") + S(b"l", b"missing/../real") + F(b"l/x", b"2") + EOA,
        "symlink-dot-dot": D(b"u")
        + D(b"u/v")
        + D(b"u/x")
        + S(b"a", b"u/v")
        + S(b"l", b"a/../x")
        + F(b"l/f", b"1")
        + EOA,
        "two-symlinks-dot-dot": D(b"u")
        + D(b"u/v")
        + D(b"u/x")
        + S(b"s", b"u/v")
        + S(b"a", b"s")
        + S(b"l", b"a/../x")
        + F(b"l/f", b"1")
        + EOA,
        "file-dot-dot": real + S(b"l", b"real/f/../in") + F(b"l/x", b"2") + EOA,
        "hops-100": hops(100),
        "hops-254": hops(254),
        "hops-255": hops(255),
        "hops-256": hops(256),
        "hops-twice": S(b"a", b"r")
        + D(b"r")
        + S(b"r/b", b"../a")
        + F(b"/".join([b"a", *[b"b"] * 60, b"x"]), b"1")
        + EOA,
    }


@shapes
def file_as_parent() -> dict[str, bytes]:
    return {kind: F(b"target") + make(b"n") + F(b"n/x", b"1") + EOA for kind, make in KINDS.items()} | {
        f"{kind}-of-directory": F(b"target") + make(b"n") + D(b"n/x/y") + EOA for kind, make in KINDS.items()
    }


# --- a directory that was, when its time is set at the end


@shapes
def late_time() -> dict[str, bytes]:
    old = D(b"d", mtime=T0 + 1)
    return {
        "of-a-file": old + F(b"d", b"1", mtime=T0 + 2) + EOA,
        "of-a-fifo": old + hdr(b"d", b"6", mtime=T0 + 2) + EOA,
        "of-a-symlink-to-a-file": F(b"f", mtime=T0 + 3) + old + S(b"d", b"f", mtime=T0 + 2) + EOA,
        "of-a-symlink-to-a-directory": old + D(b"e", mtime=T0 + 3) + S(b"d", b"e") + EOA,
        "of-a-symlink-to-nothing": old + S(b"d", b"none") + EOA,
        "of-a-symlink-loop": old + S(b"d", b"d") + EOA,
        "of-a-hardlink": F(b"f", mtime=T0 + 3) + old + H(b"d", b"f", mtime=T0 + 2) + EOA,
        "below-a-file": D(b"p") + D(b"p/d") + F(b"p") + EOA,
        "below-a-new-directory": D(b"p") + D(b"p/d") + F(b"p") + D(b"p") + EOA,
        "of-a-made-directory": old + F(b"d") + F(b"e/x") + S(b"d", b"e") + EOA,
        "in-turn": D(b"d", mtime=T0 + 1) + D(b"e", mtime=T0 + 2) + D(b"d", mtime=T0 + 3) + S(b"f", b"d") + EOA,
        "through-a-symlink": D(b"r")
        + S(b"l", b"r")
        + D(b"l/d", mtime=T0 + 1)
        + S(b"l", b"q")
        + D(b"q")
        + D(b"q/d", mtime=T0 + 2)
        + EOA,
        "same": old + F(b"d", b"1", mtime=T0 + 1) + EOA,
    }


# --- whiteouts and opaque marks


@shapes
def whiteout() -> dict[str, bytes]:
    w, opq = F(b"d/.wh.n"), F(b"d/.wh..wh..opq")
    found = {
        "alone": w + EOA,
        "of-every-type": b"".join(hdr(b".wh.%c" % kind, b"%c" % kind, link=b"x") for kind in b"0123456") + EOA,
        "with-data": F(b".wh.n", b"skipped" * 99) + F(b"z") + EOA,
        "at-the-root": F(b".wh.n") + F(b".wh..wh..opq") + EOA,
        "owner-and-time": F(b".wh.n", uid=5, gid=6, mode=0o777) + EOA,
        "with-xattrs": X(b"user.a", b"1") + F(b".wh.n") + EOA,
        "opaque-with-xattrs": D(b"d") + X(b"user.a", b"1") + opq + EOA,
        "opaque-then-directory": opq + D(b"d", mode=0o700) + F(b"d/f") + EOA,
        "directory-then-opaque": D(b"d", mode=0o700) + F(b"d/f") + opq + D(b"d", mode=0o711) + EOA,
        "opaque-twice": opq + opq + EOA,
        "opaque-directory-member": hdr(b"d/.wh..wh..opq", b"5") + EOA,
        "opaque-below": hdr(b"d/.wh..wh..opq/x", b"0") + EOA,
        "then-opaque": w + opq + EOA,
        "opaque-then": opq + w + EOA,
        "goes-with-its-directory": D(b"d") + w + opq + F(b"d") + D(b"d") + F(b"d/y") + EOA,
        "in-a-replaced-directory": F(b"d/x") + opq + w + S(b"d", b"e") + EOA,
        "of-nothing": F(b".wh.") + EOA,
        "of-dot": F(b".wh..") + EOA,
        "of-dot-dot": F(b".wh...") + EOA,
        "of-dots": F(b".wh.....") + EOA,
        "of-a-mark": F(b".wh..wh.x") + EOA,
        "meta": F(b"a/.wh..wh.plnk") + D(b".wh..wh.aufs") + EOA,
        "meta-alone": F(b".wh..wh.") + EOA,
        "meta-twice": F(b".wh..wh.x") + F(b".wh..wh.x") + EOA,
        "as-a-parent": F(b".wh.d/f", b"1") + D(b"e/.wh.x/y") + EOA,
        "mark-then-parent": F(b".wh.d") + F(b".wh.d/f") + EOA,
        "upper-case": F(b".WH.x") + F(b"a.wh.x") + EOA,
        "like-a-mark": F(b".wh", b"1") + F(b".whx", b"2") + F(b"wh.x", b"3") + EOA,
        "twice": w + w + EOA,
        "twice-as-paths": w + F(b"./d//.wh.n") + EOA,
        "with-slash": F(b".wh.n/") + D(b".wh.m/") + EOA,
        "under-an-opaque-name": D(b".wh..opq") + EOA,
        "twice-with-name-between": F(b".wh.n") + F(b"n") + F(b".wh.n") + EOA,
        "then-parent-of-a-mark": F(b".wh.n") + F(b"n/.wh.x") + EOA,
        "then-opaque-of-its-name": F(b".wh.n") + F(b"n/.wh..wh..opq") + EOA,
        "below-a-file": F(b"f") + F(b"f/.wh.x") + EOA,
        "opaque-of-a-file": F(b"f") + F(b"f/.wh..wh..opq") + EOA,
        "opaque-of-a-symlink": D(b"r") + S(b"s", b"r") + F(b"s/.wh..wh..opq") + EOA,
        "gone-then-again": F(b".wh.n") + D(b"n") + F(b"n") + F(b"m") + EOA,
    }
    for kind, make in KINDS.items():
        found[f"then-{kind}"] = F(b"target") + F(b".wh.n") + make(b"n") + EOA
        found[f"after-{kind}"] = F(b"target") + make(b"n") + F(b".wh.n") + EOA
        found[f"opaque-then-{kind}"] = F(b"target") + D(b"d") + opq + make(b"d/n") + EOA
        found[f"{kind}-then-opaque"] = F(b"target") + D(b"d") + make(b"d/n") + opq + EOA
    return found


# --- modes, owners, devices


@shape
def modes_of_every_type() -> bytes:
    modes = (0, 0o1, 0o644, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777, 0o100644, 0o040755, 0o777777)
    makers = {
        b"f": lambda name, mode: F(name, b"1", mode=mode, uid=1000, gid=1001),
        b"d": lambda name, mode: D(name, mode=mode, uid=1000, gid=1001),
        b"p": lambda name, mode: hdr(name, b"6", mode=mode, uid=1),
        b"c": lambda name, mode: hdr(name, b"3", mode=mode, dev=(1, 3), uid=1),
        b"s": lambda name, mode: S(name, b"x", mode=mode, uid=1, gid=2),
    }
    return b"".join(make(b"%s%o" % (kind, mode), mode) for kind, make in makers.items() for mode in modes) + EOA


@shape
def children_of_a_setgid_directory() -> bytes:
    return (
        D(b"d", mode=0o2775, gid=50)
        + F(b"d/f", gid=1)
        + D(b"d/e", mode=0o755)
        + hdr(b"d/p", b"6")
        + S(b"d/s", b"x")
        + EOA
    )


@shape
def made_directory_below_a_setgid_one() -> bytes:
    return D(b"d", mode=0o2775, gid=50) + F(b"d/made/f") + EOA


@shape
def device_numbers() -> bytes:
    numbers = ((0, 0), (1, 3), (0, 255), (0, 256), (255, 0), (256, 65536), (4095, 1048575), (511, 300))
    return b"".join(hdr(b"%c%d-%d" % (kind, *dev), b"%c" % kind, dev=dev) for kind in b"346" for dev in numbers) + EOA


@shape
def device_like_a_whiteout() -> bytes:
    return (
        D(b"d") + hdr(b"d/w", b"3", mode=0, mtime=0) + hdr(b"d/v", b"3", mode=0o600) + hdr(b"d/b", b"4", mode=0) + EOA
    )


# --- xattrs


@shape
def xattrs_of_every_type() -> bytes:
    records = [
        (b"SCHILY.xattr." + key, value)
        for key, value in (
            (b"user.a", b"1"),
            (b"user.empty", b""),
            (b"user." + b"n" * 250, b"long"),
            (b"user.v", b"\0\xff" * 300),
            (b"user.a=b"[:6], b"="),
            (b"security.x", b"s"),
            (b"trusted.x", b"t"),
            (b"trusted.overlay.opaque", b"y"),
            (b"trusted.overlay.redirect", b"/"),
            (b"system.x", b"n"),
            (b"nonsense", b"n"),
            (b"nonsense.x", b"n"),
            (b"USER.x", b"n"),
            (b"user", b"n"),
            (b"os2.x", b"n"),
            (CAPABILITY, capability()),
        )
    ]
    return (
        PX(*records)
        + F(b"f", b"1")
        + PX(*records)
        + D(b"d")
        + PX(*records)
        + S(b"s", b"f")
        + PX(*records)
        + hdr(b"p", b"6")
        + PX(*records)
        + hdr(b"c", b"3", dev=(1, 3))
        + PX(*records)
        + H(b"h", b"f")
        + PX(*records)
        + F(b"o/.wh..wh..opq")
        + EOA
    )


@shapes
def xattr_name() -> dict[str, bytes]:
    names = (
        b"",
        b"user.",
        b"security.",
        b"trusted.",
        b"system.",
        b".",
        b"user",
        b"user.a\xff",
        b"user." + b"n" * 251,
        b"x" * 300,
        b"security." + b"n" * 247,
        b"trusted." + b"n" * 300,
    )
    return {f"{at:02}": X(name, b"v") + F(b"f") + X(name, b"v") + D(b"d") + EOA for at, name in enumerate(names)}


@shapes
def file_capability() -> dict[str, bytes]:
    values = {
        "v1": struct.pack("<3I", 0x01000001, 1, 0),
        "v2": capability(),
        "v2-short": capability()[:-1],
        "v2-long": capability() + b"\0",
        "v3": capability(3, struct.pack("<I", 1000)),
        "v3-short": capability(3),
        "v3-root-0": capability(3, bytes(4)),
        "v3-root-none": capability(3, b"\xff" * 4),
        "v4": capability(4, bytes(4)),
        "empty": b"",
        "junk": b"junk",
        "flags": capability(flags=0xFFFFFF),
    }
    return (
        {name: X(CAPABILITY, value) + F(b"f", mode=0o755, uid=3) + EOA for name, value in values.items()}
        | {
            f"{name}-of-directory": X(CAPABILITY, value) + D(b"d") + EOA
            for name, value in values.items()
            if name in ("v2", "junk")
        }
        | {"v2-of-symlink": X(CAPABILITY, capability()) + S(b"s", b"f") + EOA}
    )


@shapes
def posix_acl() -> dict[str, bytes]:
    u, g, m, o = (1, 6, NO_ID), (4, 4, NO_ID), (16, 4, NO_ID), (32, 0, NO_ID)
    values = {
        "good": GOOD_ACL,
        "minimal": MINIMAL_ACL,
        "empty": b"",
        "no-entries": acl(),
        "version": acl(u, g, o, version=1),
        "cut": GOOD_ACL[:-1],
        "no-other": acl(u, g),
        "no-user": acl(g, o),
        "twice": acl(u, u, g, o),
        "no-mask": acl(u, (2, 4, 5), g, o),
        "order": acl(o, g, u),
        "users-out-of-order": acl(u, (2, 4, 9), (2, 4, 5), g, m, o),
        "same-user-twice": acl(u, (2, 4, 5), (2, 6, 5), g, m, o),
        "bad-tag": acl(u, g, (64, 0, 0), o),
        "bad-permissions": acl((1, 8, NO_ID), g, o),
        "no-id": acl(u, (2, 4, NO_ID), g, m, o),
        "mask-only": acl(u, g, m, o),
        "junk": b"junkjunk",
        "ids-not-blank": acl((1, 6, 0), (2, 4, 1000), (4, 4, 0), (16, 4, 0), (32, 0, 0)),
    }
    found = {f"access-{name}": X(ACL, value) + F(b"f", mode=0o640) + EOA for name, value in values.items()}
    found |= {f"default-{name}": X(DEFAULT_ACL, value) + D(b"d", mode=0o750) + EOA for name, value in values.items()}
    return found | {
        "of-directory": X(ACL, acl((1, 7, NO_ID), (2, 5, 1000), (4, 5, NO_ID), (16, 5, NO_ID), (32, 0, NO_ID)))
        + D(b"d", mode=0o750)
        + EOA,
        "contradicts-mode": X(ACL, GOOD_ACL) + F(b"f", mode=0o777) + EOA,
        "minimal-contradicts-mode": X(ACL, MINIMAL_ACL) + F(b"f", mode=0o777) + EOA,
        "of-symlink": X(ACL, GOOD_ACL) + S(b"s", b"f") + EOA,
        "default-of-file": X(DEFAULT_ACL, GOOD_ACL) + F(b"f") + EOA,
        "default-of-symlink": X(DEFAULT_ACL, GOOD_ACL) + S(b"s", b"f") + EOA,
        "of-fifo": X(ACL, GOOD_ACL) + hdr(b"p", b"6", mode=0o640) + EOA,
        "of-device": X(ACL, GOOD_ACL) + hdr(b"c", b"3", mode=0o640, dev=(1, 3)) + EOA,
        "default-inherited": X(DEFAULT_ACL, GOOD_ACL) + D(b"d", mode=0o750) + F(b"d/f", mode=0o644) + EOA,
        "default-then-below": X(DEFAULT_ACL, GOOD_ACL) + D(b"d", mode=0o750) + D(b"d/e", mode=0o755) + EOA,
        "default-with-setgid": X(DEFAULT_ACL, GOOD_ACL) + D(b"d", mode=0o2750) + EOA,
        "of-hardlink": F(b"f", mode=0o640) + X(ACL, GOOD_ACL) + H(b"h", b"f", mode=0o640) + EOA,
        "and-chmod-by-hardlink": X(ACL, GOOD_ACL) + F(b"f", mode=0o640) + H(b"h", b"f", mode=0o777) + EOA,
        "and-second-directory": X(ACL, GOOD_ACL) + D(b"d", mode=0o640) + D(b"d", mode=0o777) + EOA,
    }


# --- layers of other makers


@shape
def estargz() -> bytes:
    """As the uncompressed side of one: landmarks in front, the table of contents as the last member."""
    toc = {
        "version": 1,
        "entries": [{"name": "usr/", "type": "dir", "mode": 493}, {"name": "usr/f", "type": "reg", "size": 3}],
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("usr/", b""),
            ("usr/f", b"abc"),
            (".prefetch.landmark", b"\x0f"),
            (".no.prefetch.landmark", b"\x0f"),
            ("stargz.index.json", json.dumps(toc).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), T0
            if name.endswith("/"):
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@shape
def zstd_chunked() -> bytes:
    """Its table of contents lies outside of the tar; inside there are pax times and xattrs as tar-split keeps them."""
    return (
        PX((b"mtime", b"1700000000.123456789"), (b"atime", b"1700000001.5"), (b"ctime", b"1700000002.5"))
        + D(b"usr/")
        + PX((b"mtime", b"1700000000.123456789"), (b"SCHILY.xattr.security.capability", capability()))
        + F(b"usr/ping", b"p" * 5000, mode=0o755)
        + H(b"usr/ping4", b"usr/ping", mode=0o755)
        + F(b"usr/empty")
        + EOA
    )


@shape
def docker_layer() -> bytes:
    """As a builder writes one over another layer: made whole directories, marks first or last, owners by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (
            ("etc/", b"5"),
            ("etc/.wh.old", b"0"),
            ("etc/passwd", b"0"),
            ("var/", b"5"),
            ("var/cache/", b"5"),
            ("var/cache/.wh..wh..opq", b"0"),
            ("var/cache/new", b"0"),
            ("bin", b"2"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.mtime, member.uname, member.gname = kind, T0, "root", "root"
            member.mode = 0o755 if kind == b"5" else 0o644
            member.linkname = "usr/bin" if kind == b"2" else ""
            tar.addfile(member)
    return out.getvalue()


# --- the exceptions of docs/formats.md, each at its narrowest


@shapes
def e() -> dict[str, bytes]:
    bad_time = b"notanumber!\0"
    upper = F(b"up", b"1")
    return {
        "01-gnu-prefix": hdr(b"name", magic=GNU, prefix=b"pre/fix") + EOA,
        "01-gnu-prefix-not-ascii": hdr(b"name", magic=GNU, prefix=b"pr\xff") + EOA,
        "02-star-atime": star(hdr(b"name", prefix=b"p"), bad_time) + EOA,
        "02-star-ctime": star(hdr(b"name"), ctime=bad_time) + EOA,
        "03-checksum": (lambda h: h[:148] + b256(int(h[148:154], 8), 8) + h[156:])(F(b"f", b"1")[:512])
        + pad(b"1")
        + EOA,
        "04-negative-size": PX((b"size", b"3")) + hdr(b"f", raw={"size": b256(-5, 12)}) + pad(b"abc") + EOA,
        "05-directory-with-data": hdr(b"d/", b"\0", 512, mode=0o755) + F(b"hidden") + EOA,
        "06-unsupported-root": upper + hdr(b"./", b"7") + EOA,
        "06-unsupported-whiteout": upper + hdr(b".wh.w", b"Z") + EOA,
        "06-unsupported-opaque": upper + hdr(b"d/.wh..wh..opq", b"7") + EOA,
        "07-plus": pax_raw(b"+7 a=b\n") + F(b"f") + EOA,
        "08-atime": PX((b"atime", b"never")) + F(b"f") + EOA,
        "08-ctime": PX((b"ctime", b"1.5x")) + F(b"f") + EOA,
        "09-sparse-unknown": PX((b"GNU.sparse.unknown", b"1")) + F(b"f") + EOA,
        "09-sparse-0": PX(
            (b"GNU.sparse.major", b"0"),
            (b"GNU.sparse.minor", b"1"),
            (b"GNU.sparse.numblocks", b"1"),
            (b"GNU.sparse.map", b"2,3"),
            (b"GNU.sparse.size", b"9"),
            (b"GNU.sparse.name", b"g"),
        )
        + hdr(b"f", size=3)
        + pad(b"abc")
        + EOA,
        "09-sparse-without-effect": PX((b"GNU.sparse.size", b"9")) + PX((b"comment", b"c")) + F(b"f") + EOA,
        "09-sparse-dangling": F(b"f") + PX((b"GNU.sparse.size", b"9")) + EOA,
        "10-global-makes-parents": patched(PX((b"a", b"b"), typ=b"g"), 0, b"made/name\0\0\0\0") + F(b"f") + EOA,
        "10-global-removes": F(b"n") + patched(PX((b"a", b"b"), typ=b"g"), 0, b"n\0" + bytes(20)) + EOA,
        "10-global-whiteout": patched(PX((b"a", b"b"), typ=b"g"), 0, b".wh.w\0" + bytes(20)) + EOA,
        "11-uid": PX((b"uid", b"4294967301")) + F(b"f") + EOA,
        "11-gid-minus-two": hdr(b"f", raw={"gid": b256(-2, 8)}) + EOA,
        "11-uid-minus-one": PX((b"uid", b"4294967295")) + F(b"f") + EOA,
        "12-major": hdr(b"c", b"3", dev=(4096 + 5, 1)) + EOA,
        "12-minor": hdr(b"c", b"4", dev=(5, (1 << 20) + 1)) + EOA,
        "13-no-name": X(b"", b"v") + F(b"f") + EOA,
        "13-user": X(b"user.", b"v") + F(b"f") + EOA,
        "13-security": X(b"security.", b"v") + F(b"f") + EOA,
        "14-capability": X(CAPABILITY, b"junk") + F(b"f") + EOA,
        "14-acl": X(ACL, GOOD_ACL[:-1]) + F(b"f") + EOA,
        "14-acl-of-symlink": X(ACL, GOOD_ACL) + S(b"s", b"f") + EOA,
        "14-acl-and-mode": X(ACL, GOOD_ACL) + F(b"f", mode=0o777) + EOA,
        "14-default-acl-of-file": X(DEFAULT_ACL, GOOD_ACL) + F(b"f") + EOA,
        "15-name": D(b"a") + F(b"a/../b") + EOA,
        "15-above": F(b"../b") + EOA,
        "15-link": F(b"f") + H(b"h", b"a/../f") + EOA,
        "16-missing": D(b"real") + S(b"l", b"missing/../real") + F(b"l/x", b"2") + EOA,
        "17-made": F(b"made/deep/f", b"1") + EOA,
        "18-whiteout": F(b".wh.w", uid=5, gid=6) + EOA,
        "19-meta": F(b"d/.wh..wh.plnk") + EOA,
        "20-file": F(b"n") + F(b".wh.n") + EOA,
        "20-made": F(b"n/x") + F(b".wh.n") + EOA,
        "21-directory": F(b".wh.n") + D(b"n") + EOA,
        "22-twice": F(b".wh.n") + F(b".wh.n") + EOA,
    }
