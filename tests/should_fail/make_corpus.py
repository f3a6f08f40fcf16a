# SPDX-License-Identifier: Apache-2.0
"""Hostile layers, one file each, with what must come of them beside it.

usage: python -m tests.should_fail.make_corpus   -> writes corpus/ and neutralised/ next to this file

`corpus/NAME.json` names the error and words of its message, `neutralised/NAME.json` what is left of a
layer that is taken, without what it tried. Compressed streams are written by hand here, but for those
that must compress well: other versions of the libraries may write these differently, and `same` says
whether two of them hold the same bytes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from zstandard import ZstdCompressor, ZstdDecompressor

from tests.golden.make_tars import EOA, GNU, LL, PX, V7, D, F, H, S, b256, hdr, octal, pad, prng

HERE: Final = Path(__file__).parent
OCI: Final = "application/vnd.oci.image.layer.v1.tar"
MIB: Final = 1 << 20
_SUFFIXES: Final = {"": ".tar", "+gzip": ".tar.gz", "+zstd": ".tar.zst"}


@dataclass
class Case:
    """`packed`: the library that compressed it, if one did. Expected: all that goes into the JSON file."""

    blob: bytes
    expected: dict[str, Any]
    packed: str = ""
    extension: str = field(default=".tar")


BAD: Final[dict[str, Case]] = {}
NEUTRALISED: Final[dict[str, Case]] = {}


def bad(
    name: str,
    blob: bytes,
    error: str,
    message: str,
    suffix: str = "",
    *,
    media_type: str = "",
    packed: str = "",
    **limits: int,
) -> None:
    expected: dict[str, Any] = {"media_type": media_type or OCI + suffix, "error": error, "message": message}
    if limits:
        expected["limits"] = limits
    assert name not in BAD, name
    BAD[name] = Case(blob, expected, packed, _SUFFIXES[suffix])


def packed(name: str, tar: bytes, error: str, message: str, suffix: str = "+zstd", **limits: int) -> None:
    """The same for a tar that is large on its own."""
    blob = gzip.compress(tar, 9, mtime=0) if suffix == "+gzip" else ZstdCompressor(level=19).compress(tar)
    bad(name, blob, error, message, suffix, media_type=OCI + suffix, packed=suffix[1:], **limits)


def neutralised(name: str, tar: bytes, *, zstd: bool = False, **expected: Any) -> None:
    """Expected: `warnings`, `entries` (inodes), `xattrs` by path (values in hexadecimal), `absent` paths."""
    suffix = "+zstd" if zstd else ""
    blob = ZstdCompressor(level=19).compress(tar) if zstd else tar
    NEUTRALISED[name] = Case(blob, {"media_type": OCI + suffix, **expected}, suffix[1:], _SUFFIXES[suffix])


# --- parts of tars


def checksummed(record: bytes, text: bytes | None = None) -> bytes:
    """With the right checksum, or with `text` in its place."""
    blank = record[:148] + b" " * 8 + record[156:512]
    return blank[:148] + (text or b"%06o\0 " % sum(blank)) + blank[156:] + record[512:]


def raw_pax(body: bytes, typ: bytes = b"x") -> bytes:
    return bytes(hdr(b"PaxHeaders/x", typ, len(body)) + pad(body))


def pax_file(*records: tuple[bytes, bytes], name: bytes = b"f") -> bytes:
    return bytes(PX(*records) + F(name, b"data") + EOA)


def with_field(**raw: bytes) -> bytes:
    """A good member and one with a raw field."""
    return bytes(F(b"good", b"1") + hdr(b"hostile", b"0", raw=raw) + EOA)


# --- compressed streams by hand


def gz(
    data: bytes,
    *,
    head: bytes = b"\x1f\x8b\x08\0\0\0\0\0\0\xff",
    crc: int | None = None,
    size: int | None = None,
    deflate: bytes | None = None,
) -> bytes:
    """One member of stored blocks."""
    body = b""
    for at in range(0, len(data) or 1, 0xFFFF):
        piece = data[at : at + 0xFFFF]
        length = len(piece).to_bytes(2, "little")
        body += bytes([at + 0xFFFF >= len(data)]) + length + bytes(255 - byte for byte in length) + piece
    crc = zlib.crc32(data) if crc is None else crc
    size = len(data) if size is None else size
    return head + (body if deflate is None else deflate) + crc.to_bytes(4, "little") + size.to_bytes(4, "little")


def frame(*blocks: bytes, head: bytes = b"\x00\x58") -> bytes:
    """A zstd frame; `head`: descriptor and what belongs to it, by default a window of 2 MiB and nothing else."""
    return b"\x28\xb5\x2f\xfd" + head + b"".join(blocks)


def block(content: bytes, *, last: bool = True, kind: int = 0, size: int | None = None) -> bytes:
    """Raw by default; 1: one byte repeated, 3: reserved."""
    size = len(content) if size is None else size
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + content


def zeros(count: int) -> bytes:
    """A frame of that many times 128 KiB, four bytes for each."""
    return frame(*(block(b"\0", kind=1, size=128 << 10, last=n + 1 == count) for n in range(count)))


SMALL: Final = bytes(F(b"file", b"content") + EOA)
ZSTD: Final = frame(block(SMALL))

# ================================================================ names

FORMAT: Final = "FormatError"
LIMIT: Final = "LimitExceeded"
UNSUPPORTED: Final = "UnsupportedError"
STREAM: Final = "CompressionError"

bad("dot-dot-name", F(b"a/../../etc/passwd", b"x") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-first", F(b"../escape", b"x") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-last", F(b"a/..", b"x") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-alone", D(b"..") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-absolute", F(b"/../etc/passwd", b"x") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-pax-path", PX((b"path", b"x/../../y")) + F(b"harmless", b"x") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-gnu-name", LL(b"x/../../y") + F(b"harmless", b"x", magic=GNU) + EOA, FORMAT, "'..' in a path")
bad("dot-dot-prefix", F(b"passwd", b"x", prefix=b"../../etc") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-split-by-prefix", F(b"./x", b"x", prefix=b"a/..") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-hardlink-target", F(b"f", b"x") + H(b"l", b"../../etc/shadow") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-hardlink-target-inside", D(b"d") + F(b"f", b"x") + H(b"l", b"d/../f") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-hardlink-pax-linkpath", F(b"f") + PX((b"linkpath", b"../f")) + H(b"l", b"f") + EOA, FORMAT, "'..' in a pa")
bad("dot-dot-hardlink-gnu-link", F(b"f") + LL(b"../f", b"K") + H(b"l", b"f", magic=GNU) + EOA, FORMAT, "'..' in a path")
bad("dot-dot-whiteout", F(b"../.wh.etc") + EOA, FORMAT, "'..' in a path")
bad("dot-dot-through-a-symlink", S(b"up", b"..") + F(b"up/../x", b"x") + EOA, FORMAT, "'..' in a path")
bad("component-of-256", PX((b"path", b"n" * 256)) + F(b"n") + EOA, FORMAT, "name component of 256 bytes")
bad("component-of-256-in-a-parent", PX((b"path", b"n" * 256 + b"/x")) + F(b"n") + EOA, FORMAT, "component of 256 bytes")
bad("component-of-256-in-a-target", F(b"f") + PX((b"linkpath", b"n" * 256)) + H(b"l", b"f") + EOA, FORMAT, "of 256 byt")
bad(
    "component-of-256-in-a-followed-symlink",
    PX((b"linkpath", b"n" * 256)) + S(b"l", b"x") + F(b"l/f") + EOA,
    FORMAT,
    "name component of 256 bytes",
)
bad("component-of-256-gnu", LL(b"n" * 256) + F(b"n", magic=GNU) + EOA, FORMAT, "name component of 256 bytes")
bad("whiteout-of-256", PX((b"path", b".wh." + b"n" * 256)) + F(b"n") + EOA, FORMAT, "name component of 260 bytes")
packed("path-over-the-limit", PX((b"path", b"a/" * 32768 + b"x")) + F(b"n") + EOA, LIMIT, "path of 65537 bytes")
bad("path-over-a-lower-limit", F(b"a/b/c/d/e") + EOA, LIMIT, "path of 9 bytes, over the limit of 8", path_bytes=8)
packed("path-of-40000-levels", PX((b"path", b"d/" * 40000)) + D(b"n") + EOA, LIMIT, "path of 80000 bytes")
packed("name-of-a-mebibyte", LL(b"n" * (MIB - 1)) + F(b"n", magic=GNU) + EOA, LIMIT, "path of 1048575 bytes")
for _key in (b"path", b"linkpath", b"uname", b"gname"):
    bad(f"nul-in-pax-{_key.decode()}", pax_file((_key, b"etc/passwd\0.txt")), FORMAT, "malformed pax record")
bad("nul-in-pax-key", pax_file((b"SCHILY.xattr.user.a\0b", b"v")), FORMAT, "malformed pax record")

# ================================================================ symlinks and parents

bad("symlink-to-itself-as-parent", S(b"l", b"l") + F(b"l/x", b"x") + EOA, FORMAT, "too many symlinks in the path")
bad("symlink-loop-of-two", S(b"a", b"b") + S(b"b", b"a") + F(b"a/x") + EOA, FORMAT, "too many symlinks in the path")
bad(
    "symlink-loop-absolute", D(b"d") + S(b"d/l", b"/d/../d/l/x") + F(b"d/l/x") + EOA, FORMAT, "too many symlinks in the"
)
bad(
    "symlink-loop-through-a-directory",
    D(b"d") + S(b"d/a", b"../d/a/b") + D(b"d/a/c") + EOA,
    FORMAT,
    "too many symlinks",
)
packed(
    "symlink-chain-of-300",
    b"".join(S(b"%03d" % n, b"%03d" % (n + 1)) for n in range(300)) + F(b"000/x") + EOA,
    FORMAT,
    "too many symlinks in the path",
    "+gzip",
)
packed(
    "symlink-chain-of-256",
    b"".join(S(b"%03d" % n, b"%03d" % (n + 1)) for n in range(256)) + F(b"000/x") + EOA,
    FORMAT,
    "too many symlinks in the path",
    "+gzip",
)
packed(
    "symlink-doubling",
    b"".join(S(b"l%02d" % n, b"l%02d/../l%02d" % (n - 1, n - 1)) for n in range(1, 30))
    + S(b"l00", b".")
    + F(b"l29/x")
    + EOA,
    FORMAT,
    "too many symlinks in the path",
    "+gzip",
)
packed(
    "symlink-components-bomb",
    b"".join(PX((b"linkpath", b"./" * 2040 + b"%03d" % (n + 1))) + S(b"%03d" % n, b"x") for n in range(250))
    + b"".join(F(b"%03d/x" % n) for n in range(5))
    + EOA,
    LIMIT,
    "too many symlinks in the paths of parents",
)
bad("symlink-loop-in-a-target", S(b"a", b"b") + S(b"b", b"a") + H(b"l", b"a/x") + EOA, FORMAT, "too many symlinks")
bad("symlink-without-text", S(b"l", b"") + EOA, FORMAT, "symlink text of 0 bytes")
bad("symlink-text-nul-first", S(b"l", b"\0target") + EOA, FORMAT, "symlink text of 0 bytes")
bad("symlink-text-of-4096", PX((b"linkpath", b"t" * 4096)) + S(b"l", b"x") + EOA, FORMAT, "symlink text of 4096 bytes")
bad("symlink-text-of-4096-gnu", LL(b"t" * 4096, b"K") + S(b"l", b"x", magic=GNU) + EOA, FORMAT, "symlink text of 4096")
packed("symlink-text-of-a-mebibyte", LL(b"t" * (MIB - 1), b"K") + S(b"l", b"x", magic=GNU) + EOA, FORMAT, "of 1048575")
for _name, _parent in (
    ("file", F(b"p", b"x")),
    ("char", hdr(b"p", b"3", dev=(1, 3))),
    ("block", hdr(b"p", b"4", dev=(7, 0))),
    ("fifo", hdr(b"p", b"6")),
    ("hardlink", F(b"f", b"x") + H(b"p", b"f")),
    ("symlink-to-file", F(b"f") + S(b"p", b"f")),
    ("symlink-to-device", hdr(b"d", b"3", dev=(1, 3)) + S(b"p", b"/d")),
    ("symlink-below-a-file", F(b"f") + S(b"p", b"f/x")),
    ("directory-turned-file", D(b"p") + F(b"p/x", b"1") + F(b"p", b"2")),
    ("directory-turned-device", D(b"p") + F(b"p/x", b"1") + hdr(b"p", b"3")),
    ("directory-turned-hardlink", F(b"f") + D(b"p") + F(b"p/x", b"1") + H(b"p", b"f")),
):
    bad(f"parent-is-a-{_name}", _parent + F(b"p/child", b"x") + EOA, FORMAT, "parent is not a directory")
bad("parent-of-a-whiteout-is-a-file", F(b"p") + F(b"p/.wh.x") + EOA, FORMAT, "parent is not a directory")
bad("parent-of-an-opaque-mark-is-a-file", F(b"p") + F(b"p/.wh..wh..opq") + EOA, FORMAT, "parent is not a directory")
bad("parent-of-a-target-is-a-file", F(b"p") + H(b"l", b"p/x") + EOA, FORMAT, "parent is not a directory")

# ================================================================ hardlinks

_NOT_EARLIER: Final = "hardlink target not earlier in this layer"
bad("hardlink-to-itself", H(b"a", b"a") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-itself-over-a-file", F(b"a", b"x") + H(b"a", b"a") + EOA, FORMAT, _NOT_EARLIER)
bad(
    "hardlink-to-itself-by-a-symlinked-parent",
    D(b"d") + F(b"d/f") + S(b"e", b"d") + H(b"d/f", b"e/f") + EOA,
    FORMAT,
    _NOT_EARLIER,
)
bad("hardlink-to-a-later-name", H(b"a", b"b") + F(b"b", b"x") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-a-missing-name", F(b"f") + H(b"a", b"no/such") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-nothing", F(b"f") + H(b"a", b"") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-the-root", F(b"f") + H(b"a", b"/") + EOA, FORMAT, "hardlink to a directory")
bad("hardlink-cycle", H(b"a", b"b") + H(b"b", b"a") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-cycle-of-three", H(b"a", b"b") + H(b"b", b"c") + H(b"c", b"a") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-what-it-replaces", D(b"d") + F(b"d/x", b"1") + H(b"d", b"d/x") + EOA, FORMAT, _NOT_EARLIER)
bad(
    "hardlink-to-what-was-replaced",
    D(b"d") + F(b"d/x", b"1") + F(b"d") + D(b"d") + H(b"l", b"d/x") + EOA,
    FORMAT,
    _NOT_EARLIER,
)
bad("hardlink-to-a-whiteout", F(b".wh.gone") + H(b"l", b"gone") + EOA, FORMAT, _NOT_EARLIER)
bad("hardlink-to-a-directory", D(b"d") + H(b"l", b"d") + EOA, FORMAT, "hardlink to a directory")
bad("hardlink-to-a-made-directory", F(b"d/f") + H(b"l", b"d") + EOA, FORMAT, "hardlink to a directory")
bad("hardlink-to-its-own-parent", H(b"d/l", b"d") + EOA, FORMAT, "hardlink to a directory")
bad("hardlink-below-its-own-target", F(b"f", b"x") + H(b"f/l", b"f") + EOA, FORMAT, "parent is not a directory")
bad("hardlink-with-data", F(b"a") + hdr(b"l", b"1", 512, link=b"a") + prng(512) + EOA, FORMAT, "checksum")

# ================================================================ sizes

for _name, _value in (
    ("2-to-63", 1 << 63),
    ("2-to-64-minus-1", (1 << 64) - 1),
    ("2-to-80", 1 << 80),
    ("minus-2-to-63-minus-1", -(1 << 63) - 1),
):
    bad(f"size-{_name}", with_field(size=b256(_value, 12)), FORMAT, "size is no number of 64 bits")
bad("size-2-to-63-minus-1", with_field(size=b256((1 << 63) - 1, 12)), LIMIT, "is over the layer limit")
bad("size-over-the-layer-limit", with_field(size=octal((1 << 36) - 1, 13)[:12]), LIMIT, "is over the layer limit")
bad("size-minus-1", with_field(size=b256(-1, 12)), FORMAT, "negative size")
bad("size-minus-512", with_field(size=b256(-512, 12)), FORMAT, "negative size")
bad("size-minus-2-to-63", with_field(size=b256(-(1 << 63), 12)), FORMAT, "negative size")
bad("pax-size-minus-1", pax_file((b"size", b"-1")), FORMAT, "negative size")
bad("pax-size-2-to-63", pax_file((b"size", b"%d" % (1 << 63))), FORMAT, "pax size does not fit 64 bits")
bad("pax-size-2-to-64", pax_file((b"size", b"%d" % (1 << 64))), FORMAT, "pax size does not fit 64 bits")
bad("pax-size-of-9000-digits", pax_file((b"size", b"9" * 9000)), FORMAT, "pax size does not fit 64 bits")
bad("pax-size-2-to-63-minus-1", pax_file((b"size", b"%d" % ((1 << 63) - 1))), LIMIT, "is over the layer limit")
for _name, _text in (
    ("words", b"many"),
    ("hex", b"0x10"),
    ("blank", b" 4"),
    ("point", b"4.0"),
    ("underscore", b"1_0"),
    ("sign-alone", b"-"),
    ("arabic-digit", "\u0664".encode()),
    ("nul", b"4\0"),
):
    bad(f"pax-size-{_name}", pax_file((b"size", _text)), FORMAT, "pax size is no decimal number")
bad("pax-size-beyond-the-stream", pax_file((b"size", b"100000")), FORMAT, "ends inside a member's data")
bad("pax-size-swallows-the-next-header", PX((b"size", b"5")) + F(b"a", b"") + F(b"b", b"xx") + EOA, FORMAT, "checksum")
bad("extended-header-of-minus-1", hdr(b"x", b"x", raw={"size": b256(-1, 12)}) + EOA, FORMAT, "negative size")
bad("extended-header-of-2-to-63", hdr(b"x", b"x", raw={"size": b256(1 << 63, 12)}) + EOA, FORMAT, "size is no number")
bad("extended-header-of-8-gib", hdr(b"x", b"x", raw={"size": b"7" * 11 + b"\0"}) + EOA, LIMIT, "header of 8589934591 b")
bad("nul-directory-with-data", hdr(b"d/", b"\0", 512) + bytes(512) + EOA, FORMAT, "directory of type NUL with data")
bad("tar-over-a-lower-limit", F(b"f", prng(2000)) + EOA, LIMIT, "limit of 2048 bytes", tar_bytes=2048)

# ================================================================ cut short

_WHOLE: Final = bytes(F(b"a", b"1") + PX((b"path", b"long/name")) + LL(b"longer/name") + F(b"b", prng(1500)) + EOA)
for _name, _at, _words in (
    ("in-the-first-header", 100, "ends inside a header"),
    ("in-data", 2 * 512 + 5 * 512 + 100, "inside a member's data"),
    ("one-byte-into-a-header", 1025, "ends inside a header"),
    ("one-byte-before-a-header-ends", 1535, "inside a header"),
    ("behind-a-pax-header", 1536, "ends inside an extended header"),
    ("in-a-pax-body", 1540, "inside an extended header"),
    ("in-a-gnu-header", 2100, "ends inside a header"),
    ("behind-a-gnu-header", 2560, "inside an extended header"),
    ("in-a-gnu-body", 2565, "ends inside an extended header"),
    ("behind-a-header", 3584, "inside a member's data"),
    ("one-byte-before-data-ends", 3584 + 1499, "inside a member's data"),
):
    bad(f"cut-{_name}", _WHOLE[:_at], FORMAT, _words)
bad("cut-in-a-zero-block", F(b"a", b"1") + bytes(300), FORMAT, "ends inside a header")
bad("cut-in-the-second-zero-block", F(b"a", b"1") + bytes(700), FORMAT, "ends inside a header")
bad("one-zero-block-then-a-header", F(b"a") + bytes(512) + F(b"b") + EOA, FORMAT, "bytes after a single zero block")
bad("one-zero-block-then-junk", F(b"a") + bytes(512) + prng(512), FORMAT, "bytes after a single zero block")
bad("one-zero-block-then-part-of-a-header", F(b"a") + bytes(512) + b"x", FORMAT, "ends inside a header")
bad("zero-block-behind-a-pax-header", PX((b"path", b"p")) + bytes(512) + F(b"b") + EOA, FORMAT, "a single zero block")

# ================================================================ numbers

for _name, _raw, _words in (
    ("uid-2-to-32", {"uid": b256(1 << 32, 8)}, "id out of range"),
    ("uid-2-to-32-minus-1", {"uid": b256((1 << 32) - 1, 8)}, "id out of range"),
    ("uid-minus-1", {"uid": b256(-1, 8)}, "id out of range"),
    ("gid-2-to-40", {"gid": b256(1 << 40, 8)}, "id out of range"),
    ("gid-minus-2", {"gid": b256(-2, 8)}, "id out of range"),
    ("mtime-2-to-63", {"mtime": b256(1 << 63, 12)}, "mtime is no number"),
):
    bad(_name, with_field(**_raw), FORMAT, _words)
for _key in (b"uid", b"gid"):
    for _text in (b"4294967295", b"4294967296", b"-1", b"9223372036854775807"):
        bad(f"pax-{_key.decode()}-{_text.decode()}", pax_file((_key, _text)), FORMAT, "id out of range")
    bad(f"pax-{_key.decode()}-garbage", pax_file((_key, b"root")), FORMAT, "is no decimal number")
bad("uid-out-of-range-of-the-root", hdr(b"./", b"5", raw={"uid": b256(1 << 32, 8)}) + EOA, FORMAT, "id out of range")
bad("uid-out-of-range-of-a-whiteout", hdr(b".wh.a", b"0", raw={"uid": b256(1 << 32, 8)}) + EOA, FORMAT, "id out of")
for _name, _text in (
    ("garbage", b"yesterday"),
    ("no-digits", b".5"),
    ("two-points", b"1.2.3"),
    ("exponent", b"1e9"),
    ("letters-behind", b"1.5s"),
):
    bad(f"pax-mtime-{_name}", pax_file((b"mtime", _text)), FORMAT, "pax mtime is no time")
bad("pax-mtime-of-9000-digits", pax_file((b"mtime", b"9" * 9000)), FORMAT, "pax mtime does not fit 64 bits")
for _name, _major, _minor in (("major-4096", 4096, 0), ("minor-2-to-20", 0, 1 << 20), ("major-2-to-20", 1 << 20, 1)):
    bad(f"device-{_name}", hdr(b"d", b"3", dev=(_major, _minor)) + EOA, FORMAT, "device number out of range")
bad("device-major-minus-1", hdr(b"d", b"4", raw={"dmaj": b256(-1, 8)}) + EOA, FORMAT, "device number out of range")
bad("device-minor-2-to-40", hdr(b"d", b"4", magic=GNU, raw={"dmin": b256(1 << 40, 8)}) + EOA, FORMAT, "out of range")
for _field, _label, _width in (
    ("mode", "mode", 8),
    ("uid", "uid", 8),
    ("gid", "gid", 8),
    ("size", "size", 12),
    ("mtime", "mtime", 12),
    ("dmaj", "devmajor", 8),
    ("dmin", "devminor", 8),
):
    bad(f"garbage-in-{_label}", with_field(**{_field: b"12x4567\0zzzz"[:_width]}), FORMAT, f"{_label} is no number")
    bad(f"minus-in-{_label}", with_field(**{_field: b"-000001".ljust(_width, b"\0")}), FORMAT, f"{_label} is no number")
bad("checksum-of-zeros", checksummed(F(b"f", b"x"), bytes(8)) + EOA, FORMAT, "bad header checksum")
bad("checksum-of-blanks", checksummed(F(b"f", b"x"), b" " * 8) + EOA, FORMAT, "bad header checksum")
bad("checksum-garbage", checksummed(F(b"f", b"x"), b"chksum!\0") + EOA, FORMAT, "checksum is no octal number")
bad("checksum-decimal", checksummed(F(b"f", b"x"), b"009999\0 ") + EOA, FORMAT, "checksum is no octal number")
bad("checksum-negative", checksummed(F(b"f", b"x"), b256(-1, 8)) + EOA, FORMAT, "checksum is no octal number")
bad(
    "checksum-one-off",
    checksummed(F(b"f"), b"%06o\0 " % (sum(hdr(b"f")[:148] + hdr(b"f")[156:]) + 257)) + EOA,
    FORMAT,
    "bad header checksum",
)
bad("random-bytes", prng(4096), FORMAT, "checksum")
bad("text-file", b"#!/bin/sh\nexec /bin/true\n" * 40, FORMAT, "checksum")

# ================================================================ extended headers

for _name, _body, _words in (
    ("length-too-short", b"11 path=abcde\n", "wrong length"),
    ("length-too-long", b"99 path=abc\n", "wrong length"),
    ("length-zero", b"0 path=abc\n", "wrong length"),
    ("length-four", b"4 a\n", "wrong length"),
    ("length-huge", b"9" * 30 + b" path=abc\n", "does not fit"),
    ("length-2-to-63", b"9223372036854775807 a=b\n", "wrong l"),
    ("length-negative", b"-12 path=abc\n", "without a length"),
    ("length-plus", b"+12 path=abc\n", "wrong length"),
    ("length-two-plus", b"++12 path=ab\n", "without a length"),
    ("length-hex", b"0xc path=abc\n", "without a length"),
    ("length-missing", b" path=abc\n", "without a length"),
    ("no-blank", b"12path=abc\n", "without a length"),
    ("no-equals", b"11 pathabc\n", "malformed pax record"),
    ("no-newline", b"11 path=abc", "wrong length"),
    ("no-key", b"8 =value\n", "wrong length"),
    ("empty-key", b"9 =value\n", "malformed pax record"),
    ("blank-behind-the-end", b"5 a=\n ", "without a length"),
    ("nuls-behind", b"6 a=b\n" + bytes(6), "without a length"),
    ("length-inside-the-key", b"00005 path=abc\n", "wrong"),
    ("newlines", b"\n\n\n", "without a length"),
    ("binary", prng(100), "pax record"),
):
    bad(f"pax-{_name}", raw_pax(_body) + F(b"f", b"x") + EOA, FORMAT, _words)
bad("pax-global-malformed", raw_pax(b"99 path=abc\n", b"g") + F(b"f") + EOA, FORMAT, "wrong length")
bad("pax-malformed-behind-which-nothing-comes", F(b"f") + raw_pax(b"99 path=abc\n"), FORMAT, "wrong length")
for _typ in (b"x", b"g", b"L", b"K"):
    packed(
        f"extended-header-{_typ.decode()}-over-a-mebibyte",
        hdr(b"e", _typ, MIB + 1) + pad(b"a" * (MIB + 1)) + F(b"f") + EOA,
        LIMIT,
        "extended header of 1048577 bytes",
        "+gzip",
    )
_RECORD: Final = b"SCHILY.xattr.user.a=" + b"v" * 1000
packed(
    "pax-bomb-of-32-mebibytes",
    raw_pax(b"%d %s\n" % (len(_RECORD) + 6, _RECORD) * (32 * MIB // 1026)) + F(b"f") + EOA,
    LIMIT,
    "extended header of",
)
for _name, _records in (
    ("0.0", ((b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"4"))),
    ("0.1", ((b"GNU.sparse.map", b"0,4"), (b"GNU.sparse.size", b"4"))),
    ("1.0", ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"4"))),
    ("unknown", ((b"GNU.sparse.nonsense", b""),)),
):
    bad(f"pax-sparse-{_name}", pax_file(*_records), UNSUPPORTED, "pax sparse member")
bad("gnu-sparse", hdr(b"s", b"S", 512, magic=GNU) + prng(512) + EOA, UNSUPPORTED, "GNU sparse member")
for _typ in (b"7", b"8", b"9", b"A", b"D", b"M", b"N", b"V", b"X", b"Z", b" ", b"\x01", b"\xff"):
    bad(f"type-{_typ.hex()}", hdr(b"odd", _typ) + EOA, UNSUPPORTED, "member b'odd'")
bad("type-of-the-root", hdr(b"./", b"V") + EOA, UNSUPPORTED, "member b'./'")
bad("type-of-a-whiteout", hdr(b".wh.x", b"7") + EOA, UNSUPPORTED, "member b'.wh.x'")

# ================================================================ whiteouts

for _name, _text in (("empty", b".wh."), ("dot", b".wh.."), ("dot-dot", b".wh...")):
    bad(f"whiteout-of-{_name}", F(b"d/" + _text) + EOA, FORMAT, "whiteout of no name")
bad("whiteout-directory-of-no-name", D(b".wh./") + EOA, FORMAT, "whiteout of no name")

# ================================================================ too much of something

packed(
    "entries-200000",
    hdr(b"f", b"0") * 200_000 + EOA,
    LIMIT,
    "more than 100000 entries",
    entries=100_000,
    expansion_ratio=100_000,
)
packed("entries-without-effect", hdr(b"./", b"5") * 2000 + EOA, LIMIT, "more than 1000 entries", entries=1000)
packed(
    "directories-without-entries",
    b"".join(F(b"%d/%d/%d/f" % (n, n, n)) for n in range(400)) + EOA,
    LIMIT,
    "more than 1000 directories without entries",
    entries=1000,
)
packed(
    "directories-through-symlinks",
    b"".join(PX((b"linkpath", b"d/" * 2000 + b"%02d" % (n + 1))) + S(b"%02d" % n, b"x") for n in range(99))
    + F(b"00/x")
    + EOA,
    LIMIT,
    "directories without entries",
    entries=1000,
)
packed(
    "metadata-of-many-names",
    b"".join(F(b"%07d" % n) for n in range(10_000)) + EOA,
    LIMIT,
    "names and attributes exceed 1000000 bytes",
    metadata_bytes=1_000_000,
)
packed(
    "metadata-of-one-xattr",
    b"".join(PX((b"SCHILY.xattr.user.a", b"v" * 60000)) + F(b"f") for _ in range(40)) + EOA,
    LIMIT,
    "names and attributes exceed 2000000 bytes",
    metadata_bytes=2_000_000,
)
packed(
    "xattr-value-of-65536",
    PX((b"SCHILY.xattr.user.a", b"v" * 65536)) + F(b"f") + EOA,
    FORMAT,
    "of 65536 bytes",
    "+gzip",
)
packed("xattr-value-of-a-mebibyte", PX((b"SCHILY.xattr.user.a", b"v" * (MIB - 40))) + F(b"f") + EOA, FORMAT, "xattr")
packed(
    "xattr-body-over-the-limit",
    PX(*((b"SCHILY.xattr.user.%d" % n, b"v" * 60000) for n in range(5))) + F(b"f") + EOA,
    LIMIT,
    "xattrs of one file exceed 262148 bytes",
    "+gzip",
)
packed(
    "xattr-body-of-many-names",
    PX(*((b"SCHILY.xattr.user.%06d" % n, b"v") for n in range(25000))) + F(b"f") + EOA,
    LIMIT,
    "xattrs of one file exceed 262148 bytes",
)
packed(
    "xattr-body-joined",
    D(b"d") + b"".join(PX((b"SCHILY.xattr.user.%d" % n, b"v" * 60000)) + D(b"d") for n in range(5)) + EOA,
    LIMIT,
    "xattrs of one file exceed 262148 bytes",
)
packed(
    "xattr-body-joined-by-hardlinks",
    F(b"f") + b"".join(PX((b"SCHILY.xattr.user.%d" % n, b"v" * 60000)) + H(b"l%d" % n, b"f") for n in range(5)) + EOA,
    LIMIT,
    "xattrs of one file exceed 262148",
)
bad("xattr-name-empty", pax_file((b"SCHILY.xattr.", b"v")), FORMAT, "xattr name of 0 bytes")
bad("xattr-name-without-a-rest", pax_file((b"SCHILY.xattr.security.", b"v")), FORMAT, "xattr name of 9 bytes")
bad("checksum-in-base-256", checksummed(F(b"f", b"x"), b256(3000, 8)) + EOA, FORMAT, "checksum is no octal number")
bad("xattr-name-of-256", pax_file((b"SCHILY.xattr.user." + b"n" * 251, b"v")), FORMAT, "xattr name of 256 bytes")
bad(
    "xattr-body-over-a-lower-limit",
    pax_file((b"SCHILY.xattr.user.a", b"v" * 100)),
    LIMIT,
    "exceed 64 bytes",
    xattr_bytes=64,
)

# ================================================================ expansion

packed(
    "gzip-bomb",
    bytes(4 * MIB),
    LIMIT,
    "expands more than 100 times",
    "+gzip",
    expansion_ratio=100,
    expansion_floor_bytes=MIB,
)
bad(
    "gzip-bomb-of-members",
    gzip.compress(bytes(256 << 10), 9, mtime=0) * 16,
    LIMIT,
    "expands more than 100 times",
    "+gzip",
    packed="gzip",
    expansion_ratio=100,
    expansion_floor_bytes=MIB,
)
packed("gzip-bomb-over-the-tar-limit", bytes(4 * MIB), LIMIT, "over the limit of 1048576 bytes", "+gzip", tar_bytes=MIB)
bad("zstd-bomb", zeros(600), LIMIT, "expands more than 1100 times", "+zstd")
bad("zstd-bomb-of-frames", zeros(2) * 300, LIMIT, "expands more than 1100 times", "+zstd")
bad(
    "zstd-bomb-in-a-file",
    frame(block(hdr(b"f", b"0", (1 << 33) - 1), last=False)) + zeros(600)[6:],
    LIMIT,
    "expands more",
    "+zstd",
)
bad(
    "zstd-bomb-behind-skippable-frames",
    b"\x50\x2a\x4d\x18\x10\0\0\0" + bytes(16) + zeros(600),
    LIMIT,
    "expands more",
    "+zstd",
)
bad("zstd-bomb-over-the-tar-limit", zeros(64), LIMIT, "over the limit of 1048576 bytes", "+zstd", tar_bytes=MIB)
bad(
    "zstd-window-of-256-mebibytes", frame(block(SMALL), head=b"\x00\x90"), LIMIT, "window over 134217728 bytes", "+zstd"
)
bad("zstd-window-of-3-tebibytes", frame(block(SMALL), head=b"\x00\xff"), LIMIT, "window over 134217728 bytes", "+zstd")
bad(
    "zstd-content-size-of-2-to-60",
    frame(block(SMALL), head=b"\xe0" + (1 << 60).to_bytes(8, "little")),
    LIMIT,
    "window over 134217728 bytes",
    "+zstd",
)
bad(
    "zstd-content-size-of-2-to-64-minus-1",
    frame(block(SMALL), head=b"\xe0" + b"\xff" * 8),
    LIMIT,
    "window over 134217728 bytes",
    "+zstd",
)

# ================================================================ gzip streams

for _name, _at, _words in (
    ("in-the-magic", 1, "truncated"),
    ("in-the-header", 7, "truncated"),
    ("behind-the-header", 10, "truncated"),
    ("in-a-block-header", 13, "truncated"),
    ("in-a-block", 200, "truncated"),
    ("in-the-crc", -6, "truncated"),
    ("before-the-crc", -8, "truncated"),
    ("in-the-size", -2, "truncated"),
):
    bad(f"gzip-cut-{_name}", gz(SMALL)[:_at], STREAM, _words, "+gzip")
bad("gzip-empty", b"", STREAM, "empty where a gzip stream was promised", "+gzip")
bad("gzip-of-zeros", bytes(512), STREAM, "no zero padding", "+gzip")
bad("gzip-wrong-crc", gz(SMALL, crc=zlib.crc32(SMALL) ^ 1), STREAM, "gzip stream is corrupt", "+gzip")
bad("gzip-wrong-size", gz(SMALL, size=len(SMALL) + 1), STREAM, "gzip stream is corrupt", "+gzip")
bad("gzip-reserved-block", gz(SMALL, deflate=b"\x07" + bytes(20)), STREAM, "gzip stream is corrupt", "+gzip")
bad("gzip-wrong-stored-length", gz(SMALL, deflate=b"\x01\x04\0\0\0abcd"), STREAM, "gzip stream is corrupt", "+gzip")
bad("gzip-distance-too-far", gz(b"", deflate=b"\x03\x02" + bytes(8)), STREAM, "corrupt", "+gzip")
_HEAD: Final = b"\x1f\x8b\x08\x02\0\0\0\0\0\xff"
bad(
    "gzip-wrong-header-crc",
    gz(SMALL, head=_HEAD + (zlib.crc32(_HEAD) & 0xFFFF ^ 1).to_bytes(2, "little")),
    STREAM,
    "header has a wrong checksum",
    "+gzip",
)
bad("gzip-method-7", gz(SMALL, head=b"\x1f\x8b\x07\0\0\0\0\0\0\xff"), STREAM, "compression method 7", "+gzip")
bad("gzip-cut-in-the-extra-field", b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x10\0abc", STREAM, "truncated", "+gzip")
bad("gzip-cut-in-the-name", b"\x1f\x8b\x08\x08\0\0\0\0\0\xffname", STREAM, "truncated", "+gzip")
bad("gzip-cut-in-the-comment", b"\x1f\x8b\x08\x10\0\0\0\0\0\xffcomment", STREAM, "truncated", "+gzip")
bad("gzip-junk-behind", gz(SMALL) + b"junk", STREAM, "after the last gzip member", "+gzip")
bad("gzip-one-byte-behind", gz(SMALL) + b"\x1f", STREAM, "after the last gzip member", "+gzip")
bad("gzip-zeros-then-junk", gz(SMALL) + bytes(512) + b"junk", STREAM, "after the last gzip member", "+gzip")
bad("gzip-zeros-then-a-member", gz(SMALL) + bytes(8) + gz(SMALL), STREAM, "after the last gzip member", "+gzip")
bad("gzip-second-member-cut", gz(SMALL[:512]) + gz(SMALL[512:])[:-3], STREAM, "truncated", "+gzip")
bad("gzip-second-member-corrupt", gz(SMALL[:512]) + gz(SMALL[512:], crc=0), STREAM, "corrupt", "+gzip")

# ================================================================ zstd streams

_SUMMED: Final = frame(block(SMALL), head=b"\x04\x58") + b"\x01\x02\x03\x04"
for _name, _stream in (
    ("in-the-magic", ZSTD[:3]),
    ("in-the-frame-header", ZSTD[:5]),
    ("behind-the-frame-header", ZSTD[:6]),
    ("in-a-block-header", ZSTD[:8]),
    ("in-a-block", ZSTD[:300]),
    ("one-byte-before-its-end", ZSTD[:-1]),
    ("before-the-checksum", _SUMMED[:-4]),
    ("in-the-checksum", _SUMMED[:-2]),
    ("before-the-last-block", frame(block(SMALL, last=False))),
    ("in-a-skippable-header", ZSTD + b"\x50\x2a\x4d\x18\x04\0"),
    ("in-a-skippable-frame", ZSTD + b"\x50\x2a\x4d\x18\xff\xff\xff\xffabc"),
    ("in-the-second-frame", ZSTD + ZSTD[:9]),
):
    bad(f"zstd-cut-{_name}", _stream, STREAM, "zstd stream is truncated", "+zstd")
bad("zstd-empty", b"", STREAM, "empty where a zstd stream was promised", "+zstd")
bad("zstd-wrong-checksum", _SUMMED, STREAM, "zstd stream is corrupt", "+zstd")
bad("zstd-junk-behind", ZSTD + b"junk", STREAM, "that are no frame", "+zstd")
bad("zstd-junk-between", ZSTD + b"\0\0\0\0" + ZSTD, STREAM, "that are no frame", "+zstd")
bad("zstd-zeros-behind", ZSTD + bytes(512), STREAM, "that are no frame", "+zstd")
bad("zstd-old-magic", b"\x27\xb5\x2f\xfd" + ZSTD[4:], STREAM, "that are no frame", "+zstd")
bad("zstd-dictionary", frame(block(SMALL), head=b"\x03\x58\x78\x56\x34\x12"), STREAM, "zstd stream is corrupt", "+zstd")
bad("zstd-reserved-block", frame(block(SMALL, kind=3)), STREAM, "zstd stream is corrupt", "+zstd")
bad("zstd-reserved-bit", frame(block(SMALL), head=b"\x08\x58"), STREAM, "zstd stream is corrupt", "+zstd")
bad("zstd-block-over-128-kibibytes", frame(block(b"\0", kind=1, size=(128 << 10) + 1)), STREAM, "corrupt", "+zstd")
bad("zstd-compressed-block-of-junk", frame(block(prng(200), kind=2)), STREAM, "zstd stream is corrupt", "+zstd")
bad("zstd-content-size-too-small", frame(block(SMALL), head=b"\x20\x10"), STREAM, "zstd stream is corrupt", "+zstd")
bad(
    "zstd-content-size-too-large",
    frame(block(SMALL), head=b"\x60" + (60000).to_bytes(2, "little")),
    STREAM,
    "corrupt",
    "+zstd",
)

# ================================================================ one for the other

bad("gzip-as-tar", gz(SMALL), FORMAT, "checksum")
bad("zstd-as-tar", ZSTD, FORMAT, "checksum")
bad("tar-as-gzip", SMALL, STREAM, "gzip", "+gzip")
bad("tar-as-zstd", SMALL, STREAM, "that are no frame", "+zstd")
bad("gzip-as-zstd", gz(SMALL), STREAM, "that are no frame", "+zstd")
bad("zstd-as-gzip", ZSTD, STREAM, "gzip", "+gzip")
bad("gzip-in-gzip", gz(gz(SMALL)), FORMAT, "checksum", "+gzip")
bad("elf-as-tar", b"\x7fELF\x02\x01\x01" + bytes(600), FORMAT, "checksum")
for _name, _type in (
    ("encrypted", OCI + "+gzip+encrypted"),
    ("encrypted-plain", OCI + "+encrypted"),
    ("brotli", OCI + "+br"),
    ("xz", OCI + "+xz"),
    ("upper-case", OCI.upper()),
    ("none", ""),
    ("config", "application/vnd.oci.image.config.v1+json"),
    ("helm", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"),
    ("wasm", "application/vnd.wasm.content.layer.v1+wasm"),
    ("squashfs", "application/vnd.sylabs.sif.layer.v1.squashfs"),
    ("blank-behind", OCI + " "),
    ("with-parameters", OCI + "+gzip; charset=utf-8"),
    ("foreign-encrypted", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip+encrypted"),
    ("control-characters", OCI + "\n\x1b[2J"),
    ("long", "application/" + "x" * 5000),
):
    bad(f"media-type-{_name}", SMALL, UNSUPPORTED, "is no tar layer, plain, gzip or zstd", media_type=_type or "-")
BAD["media-type-none"].expected["media_type"] = ""

# ================================================================ taken, without what they tried

_X: Final = b"SCHILY.xattr."
_OVERLAY: Final = tuple(
    (_X + b"trusted.overlay." + name, value)
    for name, value in (
        (b"opaque", b"y"),
        (b"redirect", b"/etc"),
        (b"metacopy", b""),
        (b"origin", b"x"),
        (b"impure", b"y"),
    )
)
neutralised("overlay-opaque", PX(_OVERLAY[0]) + D(b"d") + EOA, warnings={"dropped_xattrs": 1}, xattrs={"d": {}})
neutralised("overlay-redirect", PX(_OVERLAY[1]) + D(b"d") + EOA, warnings={"dropped_xattrs": 1}, xattrs={"d": {}})
neutralised("overlay-metacopy", PX(_OVERLAY[2]) + F(b"f", b"x") + EOA, warnings={"dropped_xattrs": 1}, xattrs={"f": {}})
neutralised(
    "overlay-all-on-a-file",
    PX(*_OVERLAY, (_X + b"user.kept", b"1")) + F(b"f") + EOA,
    warnings={"dropped_xattrs": 5},
    xattrs={"f": {"user.kept": "31"}},
)
neutralised(
    "overlay-by-a-hardlink",
    F(b"f") + PX(*_OVERLAY) + H(b"l", b"f") + EOA,
    warnings={"dropped_xattrs": 5},
    xattrs={"f": {}, "l": {}},
)
neutralised(
    "overlay-by-a-later-directory",
    D(b"d") + PX(*_OVERLAY) + D(b"d") + EOA,
    warnings={"dropped_xattrs": 5},
    xattrs={"d": {}},
)
neutralised(
    "overlay-on-an-opaque-directory",
    PX((_X + b"trusted.overlay.opaque", b"x")) + D(b"d") + F(b"d/.wh..wh..opq") + EOA,
    warnings={"dropped_xattrs": 1},
    xattrs={"d": {"trusted.overlay.opaque": "79"}},
    absent=["d/.wh..wh..opq"],
)
neutralised("overlay-on-the-root", PX(*_OVERLAY) + D(b"./") + EOA, xattrs={"": {}}, entries=1)
neutralised("overlay-on-a-whiteout", PX(*_OVERLAY) + F(b".wh.w") + EOA, xattrs={"w": {}}, absent=[".wh.w"])
neutralised(
    "trusted-of-any-name",
    PX((_X + b"trusted.x", b"1"), (_X + b"trusted.", b"1")) + F(b"f") + EOA,
    warnings={"dropped_xattrs": 2},
    xattrs={"f": {}},
)
neutralised(
    "xattrs-of-no-name-index",
    PX(
        *(
            (_X + name, b"1")
            for name in (
                b"system.x",
                b"btrfs.x",
                b"x",
                b"os2.x",
                b"User.x",
                b"system.posix_acl_accessx",
            )
        )
    )
    + F(b"f")
    + EOA,
    warnings={"dropped_xattrs": 6},
    xattrs={"f": {}},
)
neutralised(
    "user-xattrs-of-others",
    PX((_X + b"user.a", b"1")) + S(b"s", b"t") + PX((_X + b"user.a", b"1")) + hdr(b"d", b"3", dev=(1, 3)) + EOA,
    warnings={"dropped_xattrs": 2},
    xattrs={"s": {}, "d": {}},
)
neutralised(
    "global-header-with-names",
    PX((b"path", b"../../x"), (b"uid", b"99999999999"), (b"linkpath", b".."), _OVERLAY[0], typ=b"g")
    + F(b"f", b"x")
    + EOA,
    xattrs={"f": {}},
    entries=2,
)
neutralised(
    "members-of-the-root",
    F(b"/", b"data") + S(b"./", b"/etc") + hdr(b".", b"3", dev=(1, 3)) + H(b"/", b"x") + EOA,
    entries=1,
)
neutralised(
    "absolute-names",
    F(b"//etc//passwd", b"x") + H(b"/l", b"/etc/passwd") + EOA,
    entries=3,
    warnings={"invented_directories": 1},
    xattrs={"etc/passwd": {}, "l": {}},
)
neutralised(
    "symlink-out-of-the-root-as-parent",
    S(b"out", b"/../../../etc") + F(b"out/passwd", b"x") + EOA,
    entries=4,
    warnings={"invented_directories": 1},
    xattrs={"etc/passwd": {}},
)
neutralised("hardlink-round", F(b"a", b"x") + H(b"b", b"a") + H(b"a", b"b") + EOA, entries=2, xattrs={"a": {}, "b": {}})
neutralised("members-behind-the-end", F(b"a") + EOA + F(b"hidden") + EOA, entries=2, absent=["hidden"])
neutralised(
    "padding-of-secrets",
    hdr(b"f", b"0", 3) + b"abc" + b"secret".ljust(509, b"\1") + EOA,
    warnings={"nonzero_padding": 1},
    entries=2,
)
neutralised(
    "levels-30000",
    PX((b"path", b"d/" * 30000)) + D(b"n") + EOA,
    zstd=True,
    entries=30001,
    warnings={"invented_directories": 29999},
)
neutralised(
    "symlink-chain-of-255",
    b"".join(S(b"%03d" % n, b"%03d" % (n + 1)) for n in range(255)) + D(b"255") + F(b"000/x") + EOA,
    zstd=True,
    entries=258,
    xattrs={"255/x": {}},
)
neutralised(
    "v7-device-garbage", hdr(b"d", b"3", magic=V7, raw={"dmaj": b"garbage!", "dmin": b"garbage!"}) + EOA, entries=2
)


def text(case: Case) -> str:
    return json.dumps(case.expected, indent=1, sort_keys=True) + "\n"


def same(committed: bytes, case: Case) -> bool:
    """Whether the file holds what the generator means, if perhaps compressed by another version of a library."""
    if committed == case.blob:
        return True
    if case.packed == "gzip":
        return gzip.decompress(committed) == gzip.decompress(case.blob)
    if case.packed == "zstd":
        return ZstdDecompressor().decompress(committed) == ZstdDecompressor().decompress(case.blob)
    return False


def directories() -> dict[Path, dict[str, Case]]:
    return {HERE / "corpus": BAD, HERE / "neutralised": NEUTRALISED}


def main() -> None:
    for directory, cases in directories().items():
        directory.mkdir(exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        for name, case in cases.items():
            (directory / f"{name}{case.extension}").write_bytes(case.blob)
            (directory / f"{name}.json").write_text(text(case))


if __name__ == "__main__":
    main()
