# SPDX-License-Identifier: Apache-2.0
"""The format `tarfs` rule by rule: what is read how, what is refused, what is counted, and that all is bounded."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, LimitExceeded
from blockdev.formats import tarfs
from blockdev.formats.entry import Entry
from blockdev.formats.layer_file import FORMATS
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.formats.limits import Limits
from blockdev.formats.tarfs_reader import Reader
from blockdev.formats.tarfs_tar import Dialect, TarfsMember, TarfsScanner
from blockdev.formats.tarfs_writer import FAULTS, TarfsWriter
from tests.golden import make_tars
from tests.golden.make_tars import EOA, GNU, LL, PX, T0, USTAR, V7, D, F, H, S, b256, hdr, octal, pad
from verity.hasher import LeafStore

OPAQUE = {b"trusted.overlay.opaque": b"y"}


def build(
    *pieces: bytes, name: str = "tarfs", strict: bool = False, limits: Limits | None = None
) -> tuple[BuiltLayer, bytes]:
    out, leaves = bytearray(), LeafStore()
    try:
        writer = LayerWriter(
            FORMATS[name], write=out.extend, write_head=lambda _: None, leaves=leaves, limits=limits or Limits(),
            read_back=lambda offset, size: bytes(out[offset : offset + size]), strict=strict,
        )  # fmt: skip
        for piece in pieces:
            writer.feed(piece)
        built = writer.finish(hashlib.sha256(b"".join(pieces)).digest())
    finally:
        leaves.close()
    return built, bytes(out)


def warnings(*members: bytes, name: str = "tarfs") -> dict[str, int]:
    return build(b"".join(members) + EOA, name=name)[0].warnings


def reader(file: bytes, size: int) -> Reader:
    return Reader(lambda offset, length: file[offset : min(size, offset + length)], size)


def shown(*members: bytes, name: str = "tarfs") -> dict[bytes, Entry]:
    built, file = build(b"".join(members) + EOA, name=name)
    return {entry.path: entry for entry in reader(file, built.data_size_bytes).walk()}


def scanned(tar: bytes, dialect: Dialect = Dialect.SNAPSHOTTER) -> list[TarfsMember]:
    found: list[TarfsMember] = []
    scanner = TarfsScanner(found.append, Limits(), dialect)
    scanner.feed(tar)
    scanner.close()
    return found


def sparse(blocks: Iterable[bytes], size: int, real_size: bytes, *more: bytes, **fields: Any) -> bytes:
    """Header and extensions of an old GNU sparse member, without its data."""
    body = bytes(41) + b"".join(blocks).ljust(96, b"\0") + (b"\1" if more else b"\0") + real_size + bytes(17)
    header = hdr(b"s", b"S", size, raw={"prefix": body[:155], "tail": body[155:]}, **{"magic": GNU, **fields})
    return bytes(header) + b"".join(more)


def hole(offset: int, length: int) -> bytes:
    return bytes(octal(offset, 12) + octal(length, 12))


# --- headers


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (F(b"a")[:-1] + b"\1", "tar header at byte 0 .b'a'.: bad header checksum"),
        (F(b"a", raw={"size": b"9".ljust(12, b"\0")}), "size is no number"),
        (F(b"a", raw={"size": bytes(12)}), "size is no number"),
        (F(b"a")[:511], "tar ends inside a header, at byte 511"),
        (hdr(b"a", b"0", 600) + bytes(599), "tar ends inside a member's data, at byte 1111"),
        (hdr(b"a", b"0", 600) + bytes(1023), "tar ends inside the padding of a member, at byte 1535"),
        (LL(b"n")[:513], "tar ends inside an extended header"),
        (LL(b"n") + LL(b"m") + F(b"a") + EOA, "two extended headers of type 'L' for one member"),
        (LL(b"n", b"K") + LL(b"m", b"K") + F(b"a") + EOA, "two extended headers of type 'K' for one member"),
        (PX((b"a", b"b")) * 2 + F(b"a") + EOA, "two extended headers of type 'x' for one member"),
        (PX((b"a", b"b")) + EOA, "tar ends with an extended header that no member follows"),
        (PX((b"a", b"b")), "tar ends with an extended header that no member follows"),
        (LL(b"n") + EOA, "tar ends with an extended header that no member follows"),
        (sparse([hole(0, 0)], 0, octal(0, 12), magic=USTAR), "sparse member without a GNU header"),
        (sparse([], 0, b"x" * 12), "sparse member without a real size"),
        (sparse([hole(0, 512)[:12] + b"x" * 12], 512, octal(512, 12)), "sparse map with a field that is no number"),
        (sparse([hole(512, 512), hole(0, 512)], 1024, octal(1024, 12)), "sparse map that contradicts itself"),
        (sparse([hole(0, 100), hole(200, 512)], 612, octal(712, 12)), "sparse map that contradicts itself"),
        (sparse([hole(0, 1024)], 512, octal(1024, 12)), "sparse map that contradicts itself"),
        (sparse([hole(0, 512)], 1024, octal(512, 12)), "sparse map that contradicts the member's sizes"),
        (sparse([hole(0, 512)], 512, octal(600, 12)), "sparse map that contradicts the member's sizes"),
        (sparse([hole(0, 512)], 512, octal(512, 12), bytes(504) + b"\1" + bytes(7)), "tar ends inside a sparse map"),
    ],
)  # fmt: skip
def test_what_the_peer_fails_on_is_refused(tar: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        build(tar)


def test_an_old_sparse_member_is_skipped_with_its_extensions() -> None:
    extension = hole(4096, 512) + bytes(480) + bytes(8)
    member = sparse([hole(0, 512)] * 1, 1024, octal(4608, 12), extension) + bytes(1024)
    found = shown(member, F(b"after", b"a"))
    assert sorted(found) == [b"", b"after"]
    assert warnings(member, F(b"after", b"a")) == {"skipped_members": 1}


def test_one_zero_block_ends_the_tar_and_what_is_behind_it_is_missed() -> None:
    for tail in (b"", bytes(512), bytes(100), b"x" * 511, bytes(512) + F(b"b")):
        assert build(F(b"a") + bytes(512) + tail)[0].warnings == {}
    hidden = F(b"a") + bytes(512) + F(b"b") + EOA
    assert build(hidden)[0].warnings == {"hidden_members": 1}
    assert [member.name for member in scanned(hidden)] == [b"a"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"644\0", 0o644), (b" 644 \0\0\0", 0o644), (b"+644\0", 0o644), (b"\xc2\xa07\xe3\x80\x80", 7),
        (b"\0007", None), (b"", None),
        (b"-7", None), (b"8", None), (b"\x1c7", None), (b"7 7", None), (b"+", None), (b"\xff7", None), (b"\x85", None),
        (b"77777777", 0o77777777),
    ],
)  # fmt: skip
def test_octal_fields(field: bytes, value: int | None) -> None:
    (member,) = scanned(F(b"a", raw={"mode": field.ljust(8, b"\0"), "uid": field.ljust(8, b"\0")}))
    # The first byte of an id with bit 7 set makes it base-256 instead; of a mode it is no number at all.
    assert member.mode == value
    if not field[:1] > b"\x7f":
        assert member.uid == (value or 0)


def test_base_256_fields() -> None:
    raw = {"uid": b256(3_000_000_000, 8), "gid": b256(-2, 8), "mtime": b256(-5, 12)}
    (member,) = scanned(F(b"a", raw=raw))
    assert (member.uid, member.gid, member.mtime) == (3_000_000_000, 0xFFFFFFFE, 2**64 - 5)
    assert scanned(hdr(b"a", b"0", raw={"size": b256(5, 12)}) + pad(b"12345"))[0].size_bytes == 5
    assert scanned(F(b"a", raw={"mode": b256(0o644, 8)}))[0].mode is None
    assert scanned(hdr(b"c", b"3", raw={"dmaj": b256(1, 8)}))[0].device is None


@pytest.mark.parametrize(
    ("magic", "name", "device"),
    [(USTAR, b"p/n", (1, 3)), (GNU, b"n", (1, 3)), (V7, b"n", None), ((b"ustar\0", b" 0"), b"n", None)],
)
def test_what_a_magic_gives(magic: tuple[bytes, bytes], name: bytes, device: tuple[int, int] | None) -> None:
    raw = {"dmaj": octal(1, 8), "dmin": octal(3, 8)}
    (member,) = scanned(hdr(b"n", b"3", magic=magic, prefix=b"p", raw=raw))
    assert (member.name, member.device) == (name, device)


def test_long_names_and_links() -> None:
    assert scanned(LL(b"a\0b") + F(b"n", magic=GNU))[0].name == b"a\0b"
    assert scanned(hdr(b"L", b"L", 0) + F(b"n"))[0].name == b""
    assert scanned(PX((b"path", b"x")) + LL(b"l") + F(b"n"))[0].name == b"l"
    assert scanned(LL(b"l", b"K") + PX((b"linkpath", b"x")) + S(b"n", b"h"))[0].link == b"l"
    # Without a magic they are members like others.
    assert [member.type for member in scanned(hdr(b"L", b"L", 2, magic=V7) + pad(b"l\0") + F(b"n"))] == [0x4C, 0x30]


def test_a_pax_size_counts_where_the_header_has_none() -> None:
    assert scanned(PX((b"size", b"5")) + hdr(b"a", b"0", 0) + pad(b"12345"))[0].size_bytes == 5
    assert scanned(PX((b"size", b"5")) + F(b"a", b"123"))[0].size_bytes == 3


@pytest.mark.parametrize(
    ("records", "name", "size"),
    [
        ([(b"path", b"one"), (b"path", b"two"), (b"size", b"3")], b"one", 3),
        ([(b"comment", b"a\nb"), (b"path", b"seen"), (b"size", b"3")], b"seen", 0),
        ([(b"size", b"3"), (b"comment", b"a\nb"), (b"path", b"seen")], b"seen", 3),
        ([(b"comment", b"a\n\nb"), (b"path", b"hidden"), (b"size", b"3")], b"h", 0),
        ([(b"size", b"+3")], b"h", 3),
        ([(b"size", b"-3")], b"h", 0),
        ([(b"size", b"3"), (b"size", b"4")], b"h", 3),
        ([(b"size", b"x"), (b"size", b"3")], b"h", 0),
        ([(b"size", b"0" * 5000 + b"3")], b"h", 3),
        ([(b"size", b"18446744073709551616")], b"h", 0),
    ],
)
def test_pax_records(records: list[tuple[bytes, bytes]], name: bytes, size: int) -> None:
    (member,) = scanned(PX(*records) + hdr(b"h", b"0", 0) + (pad(b"123") if size else b""))
    assert (member.name, member.size_bytes) == (name, size)


def test_pax_ids_count_in_genpolicy_only() -> None:
    tar = PX((b"uid", b"4294967301"), (b"gid", b"7")) + F(b"a", uid=1, gid=2)
    assert [(m.uid, m.gid) for m in scanned(tar)] == [(1, 2)]
    for dialect in (Dialect.GENPOLICY, Dialect.GENPOLICY_UPSTREAM):
        assert [(m.uid, m.gid) for m in scanned(tar, dialect)] == [(5, 7)]


def test_a_global_header_takes_what_was_pending_and_is_nothing() -> None:
    members = scanned(PX((b"path", b"lost")) + PX((b"path", b"g"), typ=b"g") + F(b"a"))
    assert [member.name for member in members] == [b"lost", b"a"]
    assert warnings(PX((b"comment", b"c"), typ=b"g"), F(b"a")) == {}


# --- the tree


def test_the_root_has_defaults_and_takes_an_entry() -> None:
    assert (shown()[b""].mode, shown()[b""].mtime) == (0o40555, (0, 0))
    assert shown(D(b"./", mode=0o751, uid=3))[b""].uid == 3


def test_missing_parents_hide_what_is_below_them() -> None:
    members = F(b"opt/app/x", b"1"), F(b"y")
    assert sorted(shown(*members)) == [b"", b"y"]
    assert warnings(*members) == {"phantom_directories": 2, "unreachable_names": 2}


def test_a_second_entry_of_a_directory_loses_what_is_in_it() -> None:
    assert sorted(shown(D(b"d"), F(b"d/a"), D(b"d"), F(b"d/b"))) == [b"", b"d", b"d/b"]
    assert warnings(D(b"d"), F(b"d/a"), F(b"d/c"), D(b"d")) == {"dropped_names": 2}
    assert warnings(F(b"a"), D(b"./")) == {"dropped_names": 1}


def test_a_repeated_directory_without_children_is_no_fault() -> None:
    assert warnings(D(b"./"), D(b"./"), D(b"d"), D(b"d"), D(b"d/e"), D(b"d/e/"), F(b"d/e/f")) == {}


def test_what_replaces_a_directory_takes_its_place_with_all_below_it() -> None:
    assert warnings(D(b"d"), F(b"d/a"), S(b"d", b"x")) == {}
    assert warnings(D(b"d"), F(b"d/a"), F(b"f"), H(b"d", b"f")) == {}
    assert sorted(shown(D(b"d"), F(b"d/a"), F(b"d"))) == [b"", b"d"]


def test_a_parent_replaced_on_the_way_is_left() -> None:
    """Members of one directory after the other: the place of the last one is remembered."""
    found = shown(
        D(b"d"), D(b"d/e"), F(b"d/e/a"), D(b"d"), F(b"d/e/b"), D(b"x"), F(b"x/1"), F(b"f"), H(b"x", b"f"), F(b"x/2")
    )
    assert sorted(found) == [b"", b"d", b"f", b"x"]
    found = shown(D(b"d"), D(b"d/e"), F(b"d/e/a"), F(b".wh.d"), F(b"d/e/b"))
    assert sorted(found) == [b"", b"d"]


def test_opaque_marks() -> None:
    assert shown(D(b"d"), F(b"d/.wh..wh..opq"))[b"d"].xattrs == OPAQUE
    assert shown(F(b"d/.wh..wh..opq"), D(b"d"))[b"d"].xattrs == {}
    assert warnings(F(b"d/.wh..wh..opq"), D(b"d")) == {"lost_marks": 1}
    assert warnings(D(b"d"), F(b"d/.wh..wh..opq"), F(b"d")) == {}
    assert shown(D(b"d"), S(b"d/.wh..wh..opq", b"x"))[b"d"].xattrs == OPAQUE
    assert warnings(F(b".wh..wh..opq"), D(b"./")) == {"lost_marks": 1}


def test_whiteouts() -> None:
    found = shown(F(b".wh.a", mode=0o755, uid=5), D(b".wh.b"))
    assert {(e.mode, e.uid, e.rdev) for path, e in found.items() if path} == {(0o20000, 0, (0, 0))}
    assert shown(F(b"a", mode=0o640, uid=5), F(b".wh.a"))[b"a"].mode == 0o20640
    assert warnings(F(b"a"), F(b".wh.a")) == {"dropped_names": 1}
    assert warnings(D(b"a"), F(b"a/b"), F(b".wh.a")) == {"dropped_names": 2}
    assert warnings(F(b".wh.a"), F(b".wh.a")) == {}
    assert warnings(F(b".wh.a"), F(b"a")) == {}
    assert warnings(F(b".wh.a"), D(b"a")) == {"lost_marks": 1}
    assert warnings(F(b"a"), H(b".wh.b", b"a")) == {"lost_marks": 1}


def test_names_that_nobody_can_ask_for() -> None:
    for name in (b".wh.", b".wh..", b".wh..."):
        assert warnings(F(name)) == {"impossible_names": 1}
        assert sorted(shown(F(name), F(b"a"))) == [b"", b"a"]
    assert warnings(PX((b"path", b"n" * 256)) + F(b"n")) == {"impossible_names": 1}
    assert warnings(PX((b"path", b"n" * 255)) + F(b"n")) == {}
    assert warnings(LL(b"a\0b") + F(b"n"))["impossible_names"] == 1


def test_hardlinks_are_one_inode() -> None:
    found = shown(D(b"d"), F(b"d/a", b"1", mode=0o600), H(b"b", b"./d/a", mode=0o600), H(b"c", b"b", mode=0o600))
    assert len({found[name].inode for name in (b"d/a", b"b", b"c")}) == 1
    assert warnings(F(b"a", mode=0o600), H(b"b", b"a", mode=0o600)) == {}
    assert warnings(F(b"a", mode=0o600), H(b"b", b"a", mode=0o644)) == {"ignored_link_headers": 1}
    assert warnings(F(b"a", uid=1), H(b"b", b"a", uid=2)) == {"ignored_link_headers": 1}


def test_a_change_of_one_name_changes_all() -> None:
    found = shown(F(b"a", b"old"), H(b"b", b"a"), F(b"a", b"newer"), F(b"c", b"c"), H(b"d", b"c"), F(b".wh.c"))
    assert found[b"a"].size_bytes == found[b"b"].size_bytes == 5
    assert found[b"d"].mode == 0o20644
    assert warnings(F(b"a"), H(b"b", b"a"), F(b"a")) == {"changed_links": 1}
    assert warnings(F(b"a"), H(b"b", b"a"), F(b".wh.a")) == {"changed_links": 1, "dropped_names": 1}


@pytest.mark.parametrize("target", [b"missing", b"s", b"d", b"..", b"later"])
def test_hardlinks_to_what_is_no_file_are_skipped(target: bytes) -> None:
    assert warnings(S(b"s", b"x"), D(b"d"), H(b"l", target), F(b"later"))["skipped_members"] == 1


def test_a_hardlink_to_nothing_leaves_a_phantom() -> None:
    built, file = build(H(b"l", b"a/b") + EOA)
    assert (built.entries, len(list(reader(file, built.data_size_bytes).walk()))) == (3, 1)
    assert built.warnings == {"phantom_directories": 2, "skipped_members": 1, "unreachable_names": 1}


def test_a_directory_with_two_names_is_written_twice() -> None:
    built, file = build(F(b"a") + H(b"b", b"a") + D(b"a") + F(b"b/x") + EOA)
    assert built.warnings == {"changed_links": 1}
    with pytest.raises(FormatError, match="directory 2 has two names"):
        list(reader(file, built.data_size_bytes).walk())


@pytest.mark.parametrize("member", [F(b"./"), S(b"/", b"x"), F(b"f") + H(b"f/..", b"f")])
def test_a_root_that_is_no_directory(member: bytes) -> None:
    built, file = build(member + EOA)
    assert built.warnings["bad_root"] == 1
    with pytest.raises(FormatError, match="the root is no directory"):
        list(reader(file, built.data_size_bytes).walk())


def test_special_links() -> None:
    special = PX((b"linkpath", b"t" * 120)) + S(b"a", b"t" * 100)
    assert shown(special)[b"a"].link == b"t" * 120
    assert warnings(special) == {}
    assert b"a" not in shown(special, name="tarfs-genpolicy-upstream")
    assert warnings(special, name="tarfs-genpolicy-upstream") == {"skipped_members": 1}
    assert warnings(special, F(b"a"), F(b"b")) == {"shifted_names": 2}
    second = PX((b"linkpath", b"u" * 130)) + S(b"0", b"u" * 100)
    assert warnings(special, second) == {"wrong_link_texts": 2}


def test_what_has_no_place_in_the_file_system_is_counted() -> None:
    assert warnings(F(b"a", mode=0o4755), D(b"b", mode=0o1777), S(b"l", b"x", mode=0o7777)) == {"lost_mode_bits": 2}
    assert warnings(PX((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.b", b"\n\n")) + F(b"a")) == {
        "dropped_xattrs": 2
    }
    assert warnings(PX((b"SCHILY.xattr.trusted.a", b"1"), (b"LIBARCHIVE.xattr.user.a", b"1")) + F(b"a")) == {}
    assert warnings(hdr(b"c", b"3", dev=(4096, 0)), hdr(b"d", b"4", dev=(0, 1 << 20))) == {"cut_device_numbers": 2}
    assert warnings(PX((b"linkpath", b"t" * 4096)) + S(b"a", b"t")) == {"cut_link_texts": 1}
    assert warnings(PX((b"linkpath", b"t" * 4095)) + S(b"a", b"t")) == {}


def test_times() -> None:
    assert shown(F(b"a", raw={"mtime": b256(2**36 - 1, 12)}))[b"a"].mtime == (2**36 - 1, 0)
    assert warnings(F(b"a", raw={"mtime": b256(2**36, 12)})) == {"wrong_times": 1}
    for fraction in (b"%d.25" % T0, b"%d.75" % (T0 - 1), b"%d" % T0):  # tools round, or cut
        assert warnings(PX((b"mtime", fraction)) + F(b"a")) == {}
    assert warnings(PX((b"mtime", b"%d" % (T0 + 1))) + F(b"a")) == {"wrong_times": 1}
    assert warnings(PX((b"mtime", b"-1.5")) + F(b"a", mtime=0)) == {"wrong_times": 1}


def test_owners() -> None:
    assert warnings(PX((b"uid", b"3000000")) + F(b"a")) == {"wrong_owners": 1}
    assert warnings(PX((b"uid", b"3000000")) + F(b"a"), name="tarfs-genpolicy") == {}
    assert warnings(PX((b"uid", b"7")) + F(b"a", uid=7)) == {}
    assert warnings(F(b"a", raw={"uid": bytes(8), "gid": b" " * 8})) == {}
    assert warnings(F(b"a", raw={"uid": b"9".ljust(8, b"\0")})) == {"wrong_owners": 1}
    assert warnings(F(b"a", raw={"gid": b256(2**33, 8)})) == {"wrong_owners": 1}


@pytest.mark.parametrize(
    "member",
    [
        PX((b"path", b"a"), (b"path", b"b")) + F(b"n"),
        PX((b"path", b"a\nb")) + F(b"n"),
        PX((b"comment", b"a\n\nb"), (b"path", b"b")) + F(b"n"),
        PX((b"size", b"7")) + F(b"n", b"123"),
        PX((b"comment", b"c")).replace(b"13 comment", b"14 comment") + F(b"n"),
        hdr(b"n/", b"\0"),
        D(b"n") + hdr(b"n/o", b"5", 512) + bytes(512),
        F(b"n", magic=(b"ustar\0", b" 0"), prefix=b"p"),
    ],
)
def test_headers_that_others_read_otherwise(member: bytes) -> None:
    assert warnings(member) == {"misread_headers": 1}


def test_an_empty_path_is_the_root() -> None:
    assert warnings(PX((b"path", b"")) + F(b"n")) == {"bad_root": 1, "misread_headers": 1}
    assert warnings(PX((b"path", b"")) + D(b"n")) == {"misread_headers": 1}


def test_a_sparse_member_by_pax_shows_its_map() -> None:
    assert warnings(PX((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + F(b"a", b"0\n")) == {
        "sparse_members": 1
    }


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_an_ordinary_layer_has_no_faults(form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name in ("./", "./", "./etc/", "./etc/ssl/", "./usr/", "./usr/bin/"):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, T0
            tar.addfile(member)
        for name in (
            "./etc/a",
            "./etc/ssl/" + "c" * 120 if form != tarfile.USTAR_FORMAT else "./etc/ssl/c",
            "./usr/bin/x",
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = 700, 0o755, 1000
            member.mtime = T0 + 0.75 if form == tarfile.PAX_FORMAT else T0
            tar.addfile(member, io.BytesIO(bytes(700)))
            member.type, member.linkname, member.name, member.size = tarfile.LNKTYPE, name, name + "-link", 0
            tar.addfile(member)
            member.type, member.name = tarfile.SYMTYPE, name + "-symlink"
            tar.addfile(member)
        for name in ("./etc/.wh.gone", "./etc/ssl/.wh..wh..opq"):
            tar.addfile(tarfile.TarInfo(name))
    built, _ = build(out.getvalue(), strict=True)
    assert built.warnings == {}


def test_every_warning_but_dirty_padding_is_a_fault_and_strict_refuses() -> None:
    writer = TarfsWriter(Dialect.SNAPSHOTTER, Limits(), None)
    assert set(writer.warnings()) == FAULTS | {"nonzero_padding"}
    dirty = hdr(b"a", b"0", 1) + b"1" * 512 + EOA
    assert build(dirty, strict=True)[0].warnings == {"nonzero_padding": 1}
    with pytest.raises(
        FormatError, match="would come out wrong from format tarfs: phantom_directories 1, unreachable_names 1"
    ):
        build(F(b"a/b") + EOA, strict=True)


def test_the_specification_has_every_fault() -> None:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    section = text.split("### tarfs: what comes out wrong")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == sorted(FAULTS)


# --- a superblock where the device could be cut


def with_shadow(root: bytes, entry: bytes = bytes(32), inodes: int = 1) -> bytes:
    """A file whose second block ends in a superblock; its inode table is in the file."""
    data = bytearray(8192)
    data[0:64] = root + entry
    struct.pack_into("<QQ", data, 8192 - 512 - 512, 512, inodes)  # at byte 3584 of the tar's second block
    return bytes(F(b"f", bytes(data)) + EOA)


def inode(mode: int, size: int = 0, offset: int = 0) -> bytes:
    return tarfs.INODE.pack(mode, 0, 0, 0, 0, 0, size, offset)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096, 7684, 1 << 20])
def test_a_shadow_superblock_is_seen_however_the_tar_is_cut(piece_bytes: int) -> None:
    tar = with_shadow(inode(0o40755))
    pieces = [tar[at : at + piece_bytes] for at in range(0, len(tar), piece_bytes)]
    assert build(*pieces)[0].warnings == {"shadow_superblocks": 1}


@pytest.mark.parametrize(
    ("tar", "seen"),
    [
        (with_shadow(inode(0o40755)), True),
        (with_shadow(inode(0o40755, 32, 544), tarfs.DIRENT.pack(1, 0, 5, 4)), True),
        (with_shadow(inode(0o40755, 32, 544), tarfs.DIRENT.pack(2, 0, 5, 4)), False),
        (with_shadow(inode(0o40755, 32, 544), tarfs.DIRENT.pack(1, 0, 0, 4)), False),
        (with_shadow(inode(0o40755, 31, 544)), False),
        (with_shadow(inode(0o40755, 32, 8192)), False),
        (with_shadow(inode(0o100755)), False),
        (with_shadow(inode(0o41755)), False),
        (with_shadow(inode(0o40755), inodes=1000), False),
        (with_shadow(inode(0o40755), inodes=0), False),
    ],
)
def test_what_counts_as_a_shadow_superblock(tar: bytes, seen: bool) -> None:
    assert build(tar)[0].warnings == ({"shadow_superblocks": 1} if seen else {})


def test_without_a_way_to_read_back_a_superblock_counts_unseen() -> None:
    writer = TarfsWriter(Dialect.SNAPSHOTTER, Limits(), None)
    tar = with_shadow(inode(0o100755))
    writer.feed(tar)
    writer.write(lambda data: None, len(tar))
    assert writer.warnings()["shadow_superblocks"] == 1


# --- hostile layers


def test_a_hardlink_below_its_own_target_is_refused() -> None:
    with pytest.raises(FormatError, match="a hardlink below its own target"):
        build(F(b"a") + H(b"a/b", b"a") + EOA)
    with pytest.raises(FormatError, match="a hardlink below its own target"):
        build(F(b"a") + F(b"a/b") + H(b"a/b/c/d", b"a") + EOA)
    # One that is gone by the end is none, nor is a second name beside the first.
    assert build(F(b"a") + H(b"a/b", b"a") + D(b"a") + EOA)[0].entries == 2
    assert build(F(b"a") + F(b"a/b") + H(b"c", b"a") + H(b"a/d", b"a/b") + EOA)[0].entries == 3


def doubling(levels: int) -> bytes:
    """Each level holds the next one under two names."""
    out, here = b"", b""
    for _ in range(levels):
        out += F(here + b"x") + H(here + b"y", here + b"x") + D(here + b"x")
        here += b"x/"
    return out + EOA


def test_hardlinked_directories_that_double_are_refused() -> None:
    assert build(doubling(10))[0].entries == 11
    with pytest.raises(LimitExceeded, match="more than 20000 names, hardlinks to directories included"):
        build(doubling(14), limits=Limits(entries=10_000))
    with pytest.raises(LimitExceeded, match="more than 20000 names"):
        build(doubling(40), limits=Limits(entries=10_000))


def test_names_that_hardlinked_directories_multiply_are_bounded() -> None:
    links = b"".join(H(b"l%03d" % number, b"d") for number in range(100))
    tar = F(b"d") + links + D(b"d") + PX((b"path", b"d/" + b"n" * 20_000)) + F(b"n") + EOA
    with pytest.raises(LimitExceeded, match="names exceed 1000000 bytes, hardlinks to directories included"):
        build(tar, limits=Limits(metadata_bytes=1_000_000))


def test_a_directory_under_many_names_counts_its_children_once() -> None:
    """Warnings go by inodes, not by visits."""
    links = b"".join(H(b"l%04d" % number, b"d") for number in range(500))
    odd = b"".join(PX((b"path", b"d/%d" % n + b"n" * 255)) + F(b"n") for n in range(3))
    assert warnings(F(b"d"), links, D(b"d"), odd) == {"changed_links": 1, "impossible_names": 3}


@pytest.mark.parametrize(
    ("tar", "limits", "message"),
    [
        (F(b"a") * 3 + EOA, {"entries": 2}, "more than 2 entries"),
        (hdr(b"a", b"0", raw={"size": b256(2**62, 12)}), {}, "member of 4611686018427387904 bytes is over the layer"),
        (PX((b"size", b"%d" % (2**64 - 1))) + F(b"a"), {}, "over the layer limit"),
        (hdr(b"L", b"L", 2 << 20), {}, "extended header of 2097152 bytes, over the limit of 1048576"),
        (LL(b"n" * 70_000) + F(b"a") + EOA, {}, "path of 70000 bytes, over the limit of 65536"),
        (F(b"abc") + EOA, {"path_bytes": 2}, "path of 3 bytes, over the limit of 2"),
        (LL(b"a/" * 3000) + F(b"a") + EOA, {"metadata_bytes": 1_000_000}, "names and attributes exceed 1000000 bytes"),
        (LL(b"b/" * 300_000, b"K") + H(b"h", b"") + EOA, {"metadata_bytes": 100_000_000}, "names and attributes"),
        (LL(b"t" * 900_000, b"K") + S(b"l", b"") + EOA, {"metadata_bytes": 500_000}, "names and attributes exceed"),
    ],
)  # fmt: skip
def test_limits(tar: bytes, limits: dict[str, int], message: str) -> None:
    with pytest.raises(LimitExceeded, match=message):
        build(tar, limits=Limits(**limits))


def test_paths_of_many_components_are_no_trouble() -> None:
    """Neither for the recursion that frees them, nor in time where the parent is the one before."""
    deep = b"d/" * 32_000
    tar = b"".join(LL(deep + b"%d" % number) + F(b"n") for number in range(50)) + EOA
    built, file = build(tar)
    assert built.entries == 32_051
    assert built.warnings == {"phantom_directories": 32_000, "unreachable_names": 32_049}
    assert len(list(reader(file, built.data_size_bytes).walk())) == 1


def test_pax_bodies_of_empty_or_broken_lines_are_no_trouble() -> None:
    for body in (b"\n" * (1 << 20), b"x\n" * (1 << 19), b"9" * (1 << 20), b" " * (1 << 20), b"1 =\n" * (1 << 18)):
        assert build(hdr(b"x", b"x", len(body)) + body + F(b"a") + EOA)[0].entries == 2


# --- the reader


def tampered(change: Callable[[bytearray, int], None], *members: bytes) -> Reader:
    """`change` gets the data area and where the inode table is."""
    built, file = build(b"".join(members) + EOA)
    data = bytearray(file[: built.data_size_bytes])
    change(data, int.from_bytes(data[-512:-504], "little"))
    return reader(bytes(data), len(data))


def put(offset: int, layout: str, *values: int) -> Callable[[bytearray, int], None]:
    """`offset`: from the inode table, or from the end where it is negative."""

    def change(data: bytearray, table: int) -> None:
        struct.pack_into("<" + layout, data, len(data) + offset if offset < 0 else table + offset, *values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(-512, "Q", 1 << 40), "no tarfs superblock"),
        (put(-504, "Q", 0), "no tarfs superblock"),
        (put(-504, "Q", 1 << 60), "no tarfs superblock"),
        (put(-4096, "B", 1), "no tarfs superblock"),
        (put(0, "H", 0o100755), "the root is no directory"),
        (put(16, "Q", 33), "directory of 33 bytes"),
        (put(16, "Q", 1 << 40), "directory of 1099511627776 bytes"),
        (put(24, "Q", 1 << 63), "index points at bytes"),
        (put(96, "Q", 9), "index names inode 9 of 3"),
        (put(96, "Q", 0), "index names inode 0 of 3"),
        (put(96 + 8, "Q", 1 << 63), "index points at bytes"),
        (put(96 + 16, "Q", 1 << 62), "more names than the data area has room for"),
        (put(96 + 32 + 8, "QQ", 0, 1), "directory entry with the name b'a'"),
        (put(96, "Q", 1), "directory 1 has two names"),
        (put(32 + 16, "Q", 1 << 40), "data of b'a' lies outside the data area"),
        (put(64 + 16, "Q", 4096), "symlink b'b' of 4096 bytes"),
    ],
)
def test_an_index_that_points_anywhere_is_refused(change: Callable[[bytearray, int], None], message: str) -> None:
    with pytest.raises(BlockdevError, match=message):
        list(tampered(change, F(b"a", b"1"), S(b"b", b"a")).walk())


def test_what_the_module_does_not_show_is_not_shown() -> None:
    for mode in (0o644, 0o104644, 0o130644, 0):
        assert [e.path for e in tampered(put(32, "H", mode), F(b"a", b"1"), S(b"b", b"a")).walk()] == [b"", b"b"]


def test_names_of_the_same_bytes_again_and_again_are_bounded() -> None:
    """Entries may share the bytes of their names, which would make a small file a large tree."""
    entries = 3000

    def change(data: bytearray, table: int) -> None:
        at = table + 2 * 32
        for number in range(entries):
            struct.pack_into("<QQQ", data, at + 32 * number, 2, number, 10_000)
        struct.pack_into("<QQ", data, table + 16, 32 * entries, at)

    data = make_tars.prng(9000).replace(b"/", b"0")
    with pytest.raises(LimitExceeded, match="more names than the data area has room for"):
        list(tampered(change, F(b"a", data), *(F(b"f%05d" % number) for number in range(entries))).walk())
