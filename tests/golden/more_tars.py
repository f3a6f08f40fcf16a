# SPDX-License-Identifier: Apache-2.0
"""More deterministic test layers: one case for each rule that none of make_tars.py, which is frozen, holds.

A refusal needs a layer of its own, or the next fault would hide that this one is no longer seen. The
bytes of what is in here are frozen as well, once a vector in tar-index-more.json names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from tests.golden.make_tars import EOA, GNU, LL, PX, USTAR, V7, D, F, H, S, b256, hdr, pad, prng

CASES: Final[dict[str, Callable[[], bytes]]] = {}
MEBIBYTE: Final = 1 << 20


def case(make: Callable[[], bytes]) -> Callable[[], bytes]:
    CASES[make.__name__.replace("_", "-")] = make
    return make


def one(name: str, tar: bytes) -> None:
    """A case that is a single line."""
    assert name not in CASES, name
    CASES[name] = lambda: tar + EOA


def raw_pax(body: bytes, typ: bytes = b"x") -> bytes:
    return bytes(hdr(b"PaxHeaders/x", typ, len(body)) + pad(body))


def sealed(record: bytes, checksum: bytes | None = None) -> bytes:
    blank = record[:148] + b" " * 8 + record[156:512]
    return blank[:148] + (checksum or b"%06o\0 " % sum(blank)) + blank[156:]


def xattr(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return b"SCHILY.xattr." + name, value


# ---------------------------------------------------------------- map, index


@case
def mt_root_moves() -> bytes:
    """The root's dirents do not fit behind its inode in the first block: nid 16."""
    return bytes(b"".join(F(b"r%d" % n + b"n" * 78) for n in range(4)) + EOA)


@case
def mt_index_of_whole_blocks() -> bytes:
    """The metadata area is a multiple of 4096: nothing is between it and the tree."""
    return bytes(b"".join(F(b"%02d" % n) for n in range(47)) + EOA)


@case
def mt_inlined_to_the_last_byte() -> bytes:
    """Directories of 448 and 449 bytes of dirents, and the same with an xattr in front of them."""
    out = b""
    for name, lengths in ((b"a", (72, 72, 72, 72, 73)), (b"b", (72, 72, 72, 72, 74))):
        out += D(name) + b"".join(F(name + b"/" + b"%d" % n + b"x" * (size - 1)) for n, size in enumerate(lengths))
    # The body has 12 + 4 + 1 + 3 = 20 bytes.
    for name, lengths in ((b"c", (68, 68, 68, 68, 69)), (b"d", (68, 68, 68, 68, 70))):
        out += PX(xattr(b"user.a", b"123")) + D(name)
        out += b"".join(F(name + b"/" + b"%d" % n + b"x" * (size - 1)) for n, size in enumerate(lengths))
    for size in (428, 429, 448, 449):
        records = [(b"linkpath", b"t" * size)] + ([xattr(b"security.a", b"")] if size < 440 else [])
        out += PX(*records) + S(b"s%d" % size, b"x")
    return bytes(out + EOA)


@case
def mt_records_up_to_a_block() -> bytes:
    """Records that end where a block ends stay where they are."""
    return bytes(b"".join(PX((b"linkpath", b"%02d" % n + b"t" * 190)) + S(b"s%02d" % n, b"x") for n in range(9)) + EOA)


@case
def mt_block_data_in_order() -> bytes:
    """Several inodes with block data: links and directories, in the canonical order, not the tar's."""
    out = b""
    for name in (b"z", b"m", b"a"):
        out += PX((b"linkpath", name * 700)) + S(name, b"x") + D(b"d" + name)
        out += b"".join(F(b"d" + name + b"/" + b"%03d" % n) for n in range(60))
    return bytes(out + EOA)


@case
def mt_dirent_block_filled_whole() -> bytes:
    """12 bytes and the name, five times and the two dots: 512. One more goes into the next block."""
    names = [b"%d" % n + b"x" * size for n, size in enumerate((84, 84, 84, 84, 84, 20))]
    return bytes(D(b"d") + b"".join(F(b"d/" + name) for name in names) + EOA)


@case
def mt_dots_in_order() -> bytes:
    return bytes(b"".join(F(b"d/" + name) for name in (b"!", b"-", b"+x", b".a", b"...", b"/x", b"0", b"~")) + EOA)


@case
def mt_device_numbers() -> bytes:
    numbers = [(0, 127), (0, 128), (8, 255), (8, 256), (255, 4095), (4095, 1048575), (256, 65536)]
    return bytes(b"".join(hdr(b"d%d" % n, b"34"[n % 2 : n % 2 + 1], dev=dev) for n, dev in enumerate(numbers)) + EOA)


@case
def mt_xattr_names() -> bytes:
    """ACLs have an index each; names with nothing behind their prefix have none."""
    acl = acl_of((1, 7), (2, 5), (4, 5), (16, 5), (32, 5))
    names = (
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"trusted.",
        b"system.x",
        b"system.posix_acl_access.x",
        b"user.a.b",
        b"user",
    )
    return bytes(PX(*(xattr(name, acl) for name in names)) + D(b"d") + EOA)


for _number, _nameless in enumerate((b"", b"user.", b"security.")):
    one(f"mt-xattr-without-a-name-{_number}", PX(xattr(_nameless, b"1")) + F(b"f"))


def acl_of(*entries: tuple[int, int]) -> bytes:
    """(tag, permissions); the id is 0 for a named user, else none."""
    ids = (b"\0" * 4 if tag == 2 else b"\xff" * 4 for tag, _ in entries)
    body = (bytes((tag, 0, allowed, 0)) + name for (tag, allowed), name in zip(entries, ids, strict=True))
    return b"\2\0\0\0" + b"".join(body)


@case
def mt_acls_that_say_nothing() -> bytes:
    """Dropped, but for the last: a default one of three entries, which the mode does not say."""
    access, default = b"system.posix_acl_access", b"system.posix_acl_default"
    minimal = acl_of((1, 7), (4, 5), (32, 0))
    tar = b""
    for number, value in enumerate((b"", b"\2\0\0\0", b"\1" + minimal[1:])):
        tar += PX(xattr(access, value), xattr(default, value)) + D(b"d%d" % number)
    return bytes(tar + PX(xattr(access, minimal), xattr(default, minimal)) + D(b"d3") + EOA)


@case
def mt_xattr_limits() -> bytes:
    """A name of 255 bytes with its prefix, a value of 65535; no limit for what is dropped."""
    dropped = xattr(b"trusted." + b"n" * 300, b"v")
    return bytes(PX(xattr(b"user." + b"n" * 250, b"v"), xattr(b"user.v", b"v" * 65535), dropped) + F(b"f") + EOA)


one("mt-xattr-name-of-256", PX(xattr(b"user." + b"n" * 251, b"v")) + F(b"f"))


@case
def mt_xattr_body_limit() -> bytes:
    """262148 bytes."""
    sizes = (65535, 65535, 65535, 65511)
    return bytes(PX(*(xattr(b"user.%d" % n, b"v" * size) for n, size in enumerate(sizes))) + D(b"d") + EOA)


one("mt-xattr-name-too-long", PX(xattr(b"user." + b"n" * 256, b"v")) + F(b"f"))
one("mt-xattr-value-too-long", PX(xattr(b"user.a", b"v" * 65536)) + F(b"f"))
one(
    "mt-xattr-body-too-long",
    PX(*(xattr(b"user.%d" % n, b"v" * size) for n, size in enumerate((65535, 65535, 65535, 65512)))) + F(b"f"),
)
one("mt-xattr-body-with-opaque-too-long", CASES["mt-xattr-body-limit"]()[:-1024] + F(b"d/.wh..wh..opq"))


@case
def mt_three_levels() -> bytes:
    """Over 16384 data blocks: a hash tree of three levels."""
    return bytes(F(b"f", hashlib.shake_128(b"three levels").digest(9 * MEBIBYTE + 5)) + EOA)


# ---------------------------------------------------------------- headers


@case
def mt_magics() -> bytes:
    """Any version of ustar has a prefix; GNU and v7 have none, whatever is in its place."""
    return bytes(
        F(b"name", prefix=b"p" * 155)
        + F(b"a", prefix=b"v", magic=(b"ustar\0", b"\0\0"))
        + F(b"gnu", prefix=b"0000000123", magic=GNU)
        + F(b"v7", prefix=b"p", magic=V7)
        + F(b"blank", prefix=b"p", magic=(b"ustar ", b"00"))
        + F(b"upper", prefix=b"p", magic=(b"USTAR\0", b"00"))
        + hdr(b"v7dev", b"3", magic=V7, raw={"dmaj": b"garbage!", "dmin": b"garbage!"})
        + hdr(b"gnudev", b"3", magic=GNU, dev=(1, 3))
        + hdr(b"ustardev", b"4", magic=USTAR, dev=(7, 1))
        + EOA
    )


@case
def mt_numbers() -> bytes:
    return bytes(
        F(b"nul-inside", raw={"mode": b"644\0zzzz"})
        + F(b"blanks", raw={"mode": b"\0 755 \0 ", "uid": b" \0 12\0\0\0"})
        + F(b"long-octal", raw={"uid": b"00000012", "gid": b"77777777"})
        + F(b"mode", mode=0o17644)
        + F(b"mode-base256", raw={"mode": b256(-1, 8)})
        + F(b"ids", raw={"uid": b256(2**32 - 2, 8), "gid": b256(2**32 - 2, 8)})
        + F(b"time", raw={"mtime": b256(2**63 - 1, 12)})
        + F(b"name\0hidden", b"1")
        + EOA
    )


one(
    "mt-checksum-base256",
    sealed(F(b"checksum"), b256(sum(hdr(b"checksum")[:148] + hdr(b"checksum")[156:]) + 256, 8)),
)


for _field, _width in (("mode", 8), ("uid", 8), ("gid", 8), ("size", 12), ("mtime", 12), ("dmaj", 8), ("dmin", 8)):
    one(f"mt-{_field}-no-number", F(b"f", raw={_field: b"12x".ljust(_width, b"\0")}))
one("mt-number-with-a-sign", F(b"f", raw={"mode": b"-000644\0"}))
one("mt-number-of-9", F(b"f", raw={"mode": b"0000649\0"}))
one("mt-base256-over-64-bits", F(b"f", raw={"mtime": b256(1 << 64, 12)}))
one("mt-base256-under-64-bits", F(b"f", raw={"mtime": b256(-(1 << 63) - 1, 12)}))
one("mt-checksum-no-number", sealed(F(b"f"), b"zzzzzz\0 "))
one("mt-uid-too-large", F(b"f", raw={"uid": b256(2**32 - 1, 8)}))
one("mt-gid-too-large", F(b"f", raw={"gid": b256(2**32 - 1, 8)}))
one("mt-gid-negative", F(b"f", raw={"gid": b256(-1, 8)}))
one("mt-uid-too-large-of-the-root", D(b"./", raw={"uid": b256(2**32 - 1, 8)}))
one("mt-uid-too-large-of-a-whiteout", F(b".wh.x", raw={"uid": b256(2**32 - 1, 8)}))
one("mt-size-negative", F(b"f", raw={"size": b256(-1, 12)}))
one("mt-pax-size-does-not-heal", PX((b"size", b"3")) + hdr(b"f", b"0", raw={"size": b256(-1, 12)}) + pad(b"abc"))
one("mt-pax-size-negative", PX((b"size", b"-1")) + F(b"f"))
one("mt-nul-directory-with-data", hdr(b"d/", b"\0", 512, mode=0o755) + F(b"inside", b"x")[:512])
for _typ in b"78SVDMNXZ":
    one(f"mt-type-{chr(_typ)}", hdr(b"f", bytes([_typ])))
one("mt-type-of-the-root", hdr(b"./", b"Z"))
one("mt-type-of-a-whiteout", hdr(b".wh.f", b"Z"))
one("mt-major-too-large", hdr(b"d", b"3", dev=(4096, 0)))
one("mt-minor-too-large", hdr(b"d", b"4", dev=(0, 1 << 20)))
one("mt-major-negative", hdr(b"d", b"3", raw={"dmaj": b256(-1, 8)}))
one("mt-minor-negative", hdr(b"d", b"3", raw={"dmin": b256(-1, 8)}))
one("mt-whiteout-with-a-device-number-too-large", hdr(b".wh.d", b"3", dev=(4096, 0)))
CASES["mt-part-of-a-header"] = lambda: F(b"a") + F(b"b")[:511]
CASES["mt-part-of-a-zero-block"] = lambda: F(b"a") + bytes(511)
CASES["mt-header-behind-two-zero-blocks"] = lambda: F(b"a") + EOA + F(b"b")[:300]
CASES["mt-cut-in-an-extended-header"] = lambda: F(b"a") + PX((b"path", b"b"))[: 512 + 5]
CASES["mt-cut-behind-an-extended-header"] = lambda: F(b"a") + PX((b"path", b"b"))[:512]
CASES["mt-end-in-the-padding-of-an-extended-header"] = lambda: F(b"a") + PX((b"path", b"b"))[: 512 + 9]

# ---------------------------------------------------------------- extended headers


@case
def mt_long_names() -> bytes:
    """Up to the first NUL; empty ones have no effect; before pax, in either order; for one member; dropped by a g."""
    return bytes(
        LL(b"name\0hidden")
        + F(b"x1", magic=GNU)
        + LL(b"target\0hidden", b"K")
        + S(b"s1", b"x")
        + LL(b"")
        + F(b"x2")
        + LL(b"", b"K")
        + S(b"s2", b"t2")
        + LL(b"t3", b"K")
        + PX((b"linkpath", b"pax"))
        + S(b"s3", b"x")
        + PX((b"linkpath", b"pax"))
        + LL(b"t4", b"K")
        + S(b"s4", b"x")
        + LL(b"lost")
        + PX((b"comment", b"c"), typ=b"g")
        + F(b"x5")
        + LL(b"lost", b"K")
        + PX((b"comment", b"c"), typ=b"g")
        + S(b"s5", b"t5")
        + LL(b"once")
        + F(b"x6")
        + F(b"x7")
        + LL(b"tonce", b"K")
        + S(b"s6", b"x")
        + S(b"s7", b"t7")
        + EOA
    )


@case
def mt_pax_values() -> bytes:
    return bytes(
        PX((b"uid", b"+5"), (b"gid", b"0007"))
        + F(b"signs", uid=1, gid=2)
        + PX((b"uid", b"4294967294"))
        + F(b"uid")
        + PX((b"gid", b"4294967294"))
        + F(b"gid")
        + PX((b"uid", b""), (b"size", b""), (b"linkpath", b""))
        + F(b"empty", b"1", uid=3)
        + PX((b"mtime", b"1.5"))
        + F(b"half")
        + PX((b"mtime", b"+7.25"))
        + F(b"plus")
        + PX((b"mtime", b"1.0000000019"))
        + F(b"nine")
        + PX((b"mtime", b"9223372036854775807"))
        + F(b"far")
        + PX((b"mtime", b"-0.5"))
        + F(b"below")
        + PX((b"comment", b"a\0b"), (b"hdrcharset", b"BINARY"), (b"atime", b"1.5"), (b"ctime", b"-3"))
        + F(b"ignored")
        + raw_pax(b"5 a=\n0013 path=ze\n")
        + F(b"x8")
        + raw_pax(b"")
        + F(b"no-records")
        + PX((b"path", b"a=b"))
        + F(b"x9")
        + PX((b"uname", b"u"), (b"gname", b"g"))
        + F(b"names")
        + EOA
    )


@case
def mt_extended_of_a_mebibyte() -> bytes:
    record = b"%d comment=" % MEBIBYTE
    return bytes(raw_pax(record + b"c" * (MEBIBYTE - len(record) - 1) + b"\n") + F(b"f") + EOA)


for _typ in b"xgLK":
    _record = b"%d comment=" % (MEBIBYTE + 1)
    one(
        f"mt-extended-{chr(_typ)}-over-a-mebibyte",
        raw_pax(_record + b"c" * (MEBIBYTE - len(_record)) + b"\n", bytes([_typ])) + F(b"f"),
    )
for _name, _body in (
    ("length-with-a-plus", b"+13 path=abc\n"),
    ("length-past-the-end", b"99 path=abc\n"),
    ("length-too-short", b"11 path=abc\n"),
    ("no-length", b" path=abc\n"),
    ("no-blank", b"12path=abc\n"),
    ("no-newline", b"12 path=abcd"),
    ("empty-key", b"9 =value\n"),
    ("no-equals", b"11 keyonly\n"),
    ("nul-in-key", b"8 a\0b=c\n"),
    ("nul-in-path", b"12 path=a\0b\n"),
    ("nul-in-linkpath", b"16 linkpath=a\0b\n"),
    ("nul-in-uname", b"13 uname=a\0b\n"),
    ("nul-in-gname", b"13 gname=a\0b\n"),
    ("zeros-behind", b"5 a=\n" + bytes(5)),
    ("uid-no-number", b"10 uid=1x\n"),
    ("uid-blank", b"9 uid= 1\n"),
    ("gid-no-number", b"10 gid=1.\n"),
    ("size-no-number", b"10 size=x\n"),
    ("mtime-no-time", b"14 mtime=1.5s\n"),
    ("mtime-without-seconds", b"12 mtime=.5\n"),
    ("mtime-over-64-bits", b"29 mtime=9223372036854775808\n"),
    ("mtime-of-30-digits", b"40 mtime=" + b"9" * 30 + b"\n"),
    ("uid-over-64-bits", b"35 uid=" + b"1" * 27 + b"\n"),
    ("sparse-map", b"22 GNU.sparse.map=0,1\n"),
    ("sparse-size", b"21 GNU.sparse.size=1\n"),
    ("sparse-unknown", b"16 GNU.sparse.=\n"),
):
    one(f"mt-pax-{_name}", raw_pax(_body) + F(b"f"))
one("mt-pax-length-not-of-the-record", raw_pax(b"10 path=ab\n7 b=cd\n") + F(b"f"))
one("mt-pax-global-malformed", raw_pax(b"99 path=abc\n", b"g") + F(b"f"))
one("mt-pax-global-sparse", PX((b"GNU.sparse.major", b"1"), typ=b"g") + F(b"f"))
one("mt-pax-without-a-member-malformed", F(b"f") + raw_pax(b"99 path=abc\n"))

# ---------------------------------------------------------------- names, entries, whiteouts


@case
def mt_name_limits() -> bytes:
    return bytes(
        PX((b"path", b"n" * 255 + b"/" + b"m" * 255))
        + F(b"x")
        + PX((b"path", b".wh." + b"w" * 255))
        + F(b"x")
        + PX((b"linkpath", b"t" * 4095))
        + S(b"long", b"x")
        + S(b"short", b"t")
        + EOA
    )


one("mt-component-too-long", PX((b"path", b"n" * 256)) + F(b"x"))
one("mt-component-of-a-parent-too-long", PX((b"path", b"n" * 256 + b"/x")) + F(b"x"))
one("mt-whiteout-of-a-name-too-long", PX((b"path", b".wh." + b"n" * 256)) + F(b"x"))
one("mt-mark-counts-in-a-parent", PX((b"path", b".wh." + b"n" * 255 + b"/x")) + F(b"x"))
one("mt-component-of-a-followed-link-too-long", PX((b"linkpath", b"n" * 256)) + S(b"l", b"x") + F(b"l/f"))
one("mt-symlink-too-long", PX((b"linkpath", b"t" * 4096)) + S(b"l", b"x"))
one("mt-symlink-empty", S(b"l", b""))
one("mt-dot-dot-in-a-name", F(b"a/../b"))
one("mt-dot-dot-last", F(b"a/.."))
one("mt-dot-dot-in-a-target", F(b"f") + D(b"d") + H(b"l", b"d/../f"))


def chain(count: int) -> bytes:
    links = b"".join(S(b"%03d" % n, b"%03d" % (n + 1)) for n in range(count))
    return bytes(links + D(b"%03d" % count) + F(b"000/x") + EOA)


CASES["mt-255-symlinks"] = lambda: chain(255)
CASES["mt-256-symlinks"] = lambda: chain(256)


@case
def mt_symlinks_on_the_way() -> bytes:
    """Absolute from below, up, above the root, through another link, the rest of the name behind; missing parts."""
    return bytes(
        D(b"d")
        + D(b"e")
        + S(b"d/abs", b"/e")
        + F(b"d/abs/1")
        + S(b"d/up", b"../e")
        + F(b"d/up/2")
        + S(b"d/above", b"../../../e")
        + F(b"d/above/3")
        + S(b"d/two", b"up/./")
        + F(b"d/two/sub/4")
        + S(b"m", b"made/../e")
        + F(b"m/5")
        + S(b"d/self", b".")
        + F(b"d/self/self/6")
        + S(b"l", b"d/self/new")
        + D(b"l/7")
        + S(b"seven", b"e/sub")
        + F(b"seven/.wh.x")
        + F(b"e/file")
        + H(b"d/h", b"d/two/file")
        + H(b"d/up/h2", b"/d/h")
        + EOA
    )


one("mt-parent-is-a-file", F(b"f") + F(b"f/x"))
one("mt-parent-is-a-link-to-a-file", F(b"f") + S(b"l", b"f") + F(b"l/x"))
one("mt-parent-is-a-device", hdr(b"c", b"3", dev=(1, 3)) + F(b"c/x"))
one("mt-hardlink-makes-nothing-for-its-target", F(b"f") + S(b"s", b"gone/..") + H(b"l", b"s/f"))
one("mt-hardlink-to-a-directory", D(b"d") + H(b"l", b"d"))
one("mt-hardlink-to-nothing", F(b"f") + H(b"l", b"g"))
one("mt-hardlink-to-itself", F(b"f") + H(b"f", b"f"))
one("mt-hardlink-to-the-root", F(b"f") + H(b"l", b"/"))
one("mt-hardlink-of-the-root", F(b"f") + H(b"./", b"nothing"))
one("mt-hardlink-to-a-whiteout", F(b".wh.w") + H(b"l", b"w"))


@case
def mt_hardlinks() -> bytes:
    """Parents are made before the target is looked up; links of links, symlinks and devices; links that are marks."""
    return bytes(
        F(b"f", b"1", mode=0o600)
        + H(b"new/l", b"f")
        + S(b"s", b"f", mode=0o600)
        + hdr(b"hs", b"1", link=b"s", mode=0o640, uid=4)
        + hdr(b"c", b"3", dev=(1, 3), mode=0o600)
        + hdr(b"hc", b"1", link=b"c", mode=0o666)
        + F(b"of")
        + H(b"new", b"of")
        + PX(xattr(b"user.a", b"1"))
        + F(b"xa")
        + PX(xattr(b"user.b", b"2"), xattr(b"user.a", b"3"))
        + H(b"xb", b"xa")
        + PX(xattr(b"user.a", b"1"))
        + H(b"hs2", b"hs")
        + H(b".wh.mark", b"nothing")
        + D(b"dir")
        + F(b"dir/x")
        + H(b"dir", b"f")
        + EOA
    )


@case
def mt_entries() -> bytes:
    """Every kind over every kind; what is below goes; directories over made ones; the mode of a symlink."""
    kinds = (
        lambda n: F(n, b"f"),
        lambda n: D(n),
        lambda n: S(n, b"t", mode=0o600),
        lambda n: hdr(n, b"3", dev=(1, 1)),
        lambda n: hdr(n, b"6"),
    )
    out = b""
    for first, make in enumerate(kinds):
        for second, then in enumerate(kinds):
            out += make(b"n%d%d" % (first, second)) + then(b"n%d%d" % (first, second))
    out += F(b"t")  # what the symlinks lead to, or the time of the directories that they replace had no place
    out += F(b"made/x") + D(b"made", mode=0o700, uid=1) + PX(xattr(b"user.a", b"1")) + D(b"made", mode=0o711)
    return bytes(
        out
        + D(b"gone")
        + F(b"gone/x")
        + F(b"gone/.wh.y")
        + F(b"gone/.wh..wh..opq")
        + S(b"gone", b"t")
        + D(b"gone")
        + EOA
    )


one("mt-whiteout-of-255-and-a-dot", PX((b"path", b".wh." + b"n" * 255 + b"/.")) + F(b"x"))

for _key in (b"atime", b"ctime"):
    one(f"mt-pax-{_key.decode()}-is-no-time", PX((_key, b"never")) + F(b"f"))


@case
def mt_late_times() -> bytes:
    """The time of a directory's entry is set at the end, by name, wherever that leads then."""
    return bytes(
        D(b"file", mtime=5)
        + F(b"file", b"1", mtime=6)
        + D(b"link", mtime=7)
        + S(b"link", b"target", mtime=8)
        + F(b"target", mtime=9)
        + D(b"twice", mtime=10)
        + F(b"twice", mtime=11)
        + D(b"twice", mtime=12)
        + EOA
    )


one("mt-late-time-of-what-is-gone", D(b"a/b") + F(b"a"))
one("mt-late-time-below-a-dangling-link", D(b"a") + S(b"a", b"b"))


@case
def mt_link_with_a_slash() -> bytes:
    tar = F(b"f", b"1") + S(b"s", b"f") + S(b"s2", b"s") + H(b"plain", b"s")
    return bytes(tar + H(b"slash", b"s2/") + H(b"dot", b"s2/.") + EOA)


@case
def mt_set_group_id() -> bytes:
    tar = D(b"d", mode=0o2755, gid=7) + F(b"d/made/deep/f") + D(b"e", gid=8) + F(b"e/made/f")
    return bytes(tar + D(b"d/entry", gid=9) + EOA)


@case
def mt_prefixes() -> bytes:
    """star's of 131 bytes; GNU's where Go before 1.8 put one, and where there are times."""
    long = b"p" * 131 + b"/"
    times = b"00000001234\0"
    star = hdr(b"star", prefix=long[:131] + times + times)
    return bytes(
        sealed(star[:508] + b"tar\0")
        + hdr(b"old-go", prefix=b"usr/share", magic=GNU)
        + hdr(b"change-time", prefix=times + b"x" * 12, magic=GNU)
        + hdr(b"times", prefix=times * 2 + b"more", magic=GNU)
        + hdr(b"no-access-time", prefix=bytes(12) + times + b"more", magic=GNU)
        + hdr(b"not-ascii", prefix=b"usr/\xff", magic=GNU)
        + EOA
    )


for _at in (476, 488):
    _star = hdr(b"star")[:508] + b"tar\0"
    one(f"mt-star-time-at-{_at}", sealed(_star[:_at] + b"garbage".ljust(12, b"\0") + _star[_at + 12 :]))


for _name, _text in (("nothing", b".wh."), ("dot", b".wh.."), ("dot-dot", b".wh...")):
    one(f"mt-whiteout-of-{_name}", F(b"d/" + _text))


@case
def mt_marks() -> bytes:
    """Twice; of directories, made and not, before and after; of links; below marks; through links; names like marks."""
    return bytes(
        F(b".wh.a")
        + F(b".wh.a", uid=5)
        + F(b".wh.d")
        + D(b"d")
        + D(b"e")
        + F(b".wh.e/")
        + F(b"m/x")
        + F(b".wh.m")
        + S(b"s", b"e")
        + F(b".wh.s")
        + F(b"s/.wh.x")
        + F(b"made/.wh..wh.foo")
        + F(b"made2/.wh..wh..opq")
        + F(b"d/.wh..wh..opq")
        + F(b"d/.wh..wh..opq")
        + F(b"q/.wh.x/y")
        + D(b".wh..whx")
        + F(b".whx")
        + F(b"....")
        + F(b".wh.....")
        + hdr(b"r/.wh.c", b"3", dev=(1, 3), mode=0o666)
        + PX(xattr(b"user.a", b"1"))
        + F(b".wh.attr", b"data", mode=0o777, uid=1)
        + F(b"w/.wh.g")
        + F(b"w/g")
        + F(b"w/.wh.g")
        + EOA
    )


@case
def mt_values() -> bytes:
    """xattrs of what may not have them; padding that is not zero; data at its place behind extended headers."""
    some = [
        xattr(b"user.a", b"1"),
        xattr(b"security.a", b"2"),
        xattr(b"trusted.a", b"3"),
        xattr(b"trusted.overlay.redirect", b"/"),
    ]
    return bytes(
        PX(*some)
        + F(b"f", b"x")
        + PX(*some)
        + D(b"d")
        + PX(*some)
        + S(b"s", b"t")
        + PX(*some)
        + hdr(b"c", b"3", dev=(1, 3))
        + PX(*some)
        + hdr(b"b", b"4", dev=(1, 3))
        + PX(*some)
        + hdr(b"p", b"6")
        + hdr(b"dirty", b"0", 3)
        + b"abc"
        + b"\1" * 509
        + F(b"big", prng(5000))
        + F(b"empty")
        + EOA
    )


@case
def mt_made_root() -> bytes:
    """Members of the root change nothing: its mode, owner, time and xattrs are not theirs."""
    return bytes(
        PX(xattr(b"user.a", b"1"), (b"mtime", b"5"))
        + D(b"./", mode=0o700, uid=3, gid=4)
        + F(b"a")
        + hdr(b"/", b"2", link=b"a")
        + H(b".", b"a")
        + hdr(b"./.", b"3", dev=(5000, 0))
        + EOA
    )


# ---------------------------------------------------------------- erofs-4k: bodies, tails, the rest


@case
def ek_sizes_around_a_block() -> bytes:
    """The longest tail that is inlined, and the shortest that is not; bodies with and without zeros behind them."""
    sizes = (1, 4031, 4032, 4033, 4095, 4096, 4097, 8127, 8128, 8129, 8191, 8192, 12289)
    return bytes(b"".join(F(b"s%05d" % size, prng(size, b"%d" % size)) for size in sizes) + EOA)


@case
def ek_tails_behind_xattrs() -> bytes:
    """Xattrs that leave no room in the block of the inode, or just so; others come with a hardlink, after the data."""
    members = b""
    for value in (1, 2000, 3940, 3941, 3942, 4000, 4093, 8000, 60000):
        for size in (1, 60, 3000, 4032):
            members += PX(xattr(b"user.a", b"v" * value)) + F(b"v%05d-%d" % (value, size), prng(size, b"%d" % value))
    members += F(b"later", prng(5000)) + PX(xattr(b"user.b", b"w" * 5000)) + H(b"link", b"later")
    return bytes(members + EOA)


@case
def ek_tails_that_no_file_has() -> bytes:
    """Data of members that are replaced, marks, or the root; and of what is below a directory that goes."""
    return bytes(
        F(b"twice", prng(4100, b"1")) + F(b"twice", prng(50, b"2")) + F(b".wh.gone", prng(4099, b"3"))
        + F(b"d/.wh..wh..opq", prng(9, b"4")) + F(b"./", prng(8200, b"5")) + F(b"sub/a", prng(10, b"6"))
        + F(b"sub/b", prng(4096)) + F(b"sub", b"now a file") + F(b"twice/", prng(7, b"7"))
        + F(b"kept", prng(6000, b"8")) + EOA
    )  # fmt: skip


@case
def ek_the_rest() -> bytes:
    """Runs of seven and of eight zeros, over the multiples of 512; padding that is not zero; all behind the end."""
    members = hdr(b"dirty", b"0", 3) + b"abc" + b"\1" + bytes(7) + b"\2" + bytes(8) + b"\3" + bytes(491)
    end = bytes(7) + b"\4" + bytes(8) + b"\5" + prng(40) + bytes(500) + b"\6" + bytes(1030) + b"\7" + bytes(3)
    return bytes(members + F(b"f", prng(600)) + EOA + end)


@case
def ek_ends_with_data() -> bytes:
    """No padding and no end mark: the last byte of the tar is one of a tail."""
    return bytes(F(b"a", prng(5000)) + hdr(b"b", b"0", 4100) + prng(4100))


@case
def ek_ends_with_a_body() -> bytes:
    return bytes(hdr(b"b", b"0", 4096) + prng(4096))


@case
def ek_nothing_but_rest() -> bytes:
    return bytes(D(b"d/") + S(b"s", b"d") + F(b"empty") + EOA)


@case
def ek_tail_to_the_end_of_a_block() -> bytes:
    """Behind xattrs that leave no room in the block of the inode."""
    return bytes(PX(xattr(b"user.a", b"v" * 3887)) + F(b"f", prng(4032)) + EOA)
