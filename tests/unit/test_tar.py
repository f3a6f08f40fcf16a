# SPDX-License-Identifier: Apache-2.0
"""The rules of the tar stream, one by one: headers, extended headers, values. Names are the file tree's matter."""

from __future__ import annotations

import tarfile
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, LimitExceeded, UnsupportedError
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType, TarScanner, _pax_time, parse_pax
from tests.golden import make_tars
from tests.golden.make_tars import EOA, GNU, T0, USTAR, V7

MIB = 1 << 20
ZERO = bytes(512)
LAST_SECOND = 9223372036


def header(name: bytes = b"f", typ: bytes = b"0", size: int = 0, **fields: Any) -> bytes:
    return bytes(make_tars.hdr(name, typ, size, **fields))


def file(name: bytes = b"f", data: bytes = b"", **fields: Any) -> bytes:
    return header(name, b"0", len(data), **fields) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[bytes, bytes], typ: bytes = b"x") -> bytes:
    return bytes(make_tars.PX(*records, typ=typ))


def raw_pax(body: bytes, typ: bytes = b"x") -> bytes:
    return header(b"PaxHeaders/x", typ, len(body)) + padded(body)


def long_name(text: bytes, typ: bytes = b"L") -> bytes:
    return bytes(make_tars.LL(text, typ))


def base256(value: int, width: int) -> bytes:
    return bytes(make_tars.b256(value, width))


def with_checksum(record: bytes, checksum: bytes) -> bytes:
    return record[:148] + checksum + record[156:]


def checksummed(record: bytes) -> bytes:
    return with_checksum(record, b"%06o\0 " % (sum(record[:148]) + sum(record[156:]) + 8 * 0x20))


def scanned(tar: bytes, *pieces: int, limits: Limits | None = None) -> tuple[list[Member], TarScanner]:
    """`pieces`: where the stream is cut."""
    found: list[Member] = []
    scanner = TarScanner(found.append, limits or Limits())
    for start, end in zip((0, *pieces), (*pieces, len(tar)), strict=True):
        scanner.feed(tar[start:end])
    scanner.close()
    return found, scanner


def members(tar: bytes) -> list[Member]:
    return scanned(tar)[0]


def only(tar: bytes) -> Member:
    (member,) = members(tar)
    return member


def refused(
    tar: bytes, *words: str, error: type[BlockdevError] = FormatError, limits: Limits | None = None
) -> BlockdevError:
    with pytest.raises(BlockdevError) as caught:
        scanned(tar, limits=limits)
    assert type(caught.value) is error, caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


# --- headers


def test_a_ustar_prefix_goes_in_front_of_the_name() -> None:
    assert only(file(b"name", prefix=b"a/b")).name == b"a/b/name"
    assert only(file(b"name", prefix=b"p" * 155)).name == b"p" * 155 + b"/name"
    assert only(file(b"name", prefix=b"p\0rest")).name == b"p/name"
    assert only(file(b"n" * 100, prefix=b"")).name == b"n" * 100


def test_any_version_behind_the_ustar_magic_is_ustar() -> None:
    assert only(file(b"name", prefix=b"p", magic=(b"ustar\0", b"\0\0"))).name == b"p/name"


def test_a_star_prefix_ends_after_131_bytes() -> None:
    member = only(checksummed(header(b"name", prefix=b"p" * 131 + b"0" * 24)[:508] + b"tar\0"))
    assert member.name == b"p" * 131 + b"/name"


@pytest.mark.parametrize("magic", [GNU, V7, (b"ustar ", b"00"), (b"USTAR\0", b"00"), (b"ustar\x01", b"00")])
def test_only_ustar_has_a_prefix(magic: tuple[bytes, bytes]) -> None:
    # In a GNU header these bytes are a time.
    assert only(file(b"name", prefix=b"00000001234", magic=magic)).name == b"name"


@pytest.mark.parametrize("at", [476, 488])
def test_the_times_of_a_star_header_must_be_numbers(at: int) -> None:
    record = header(b"name")[:508] + b"tar\0"
    refused(checksummed(record[:at] + b"garbage".ljust(12, b"\0") + record[at + 12 :]), "atime or ctime")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (b"usr/share/doc", b"usr/share/doc/name"),  # as Go before 1.8 wrote it
        (b"00000001234\0zz", b"00000001234/name"),  # the change time is none
        (b"00000001234\0" + b"00000001234\0" + b"rest", b"name"),
        (b"\0" * 12 + b"zz", b"name"),
        (b"usr/\xff", b"name"),
    ],
)
def test_a_gnu_header_has_a_prefix_where_its_times_are_none(field: bytes, name: bytes) -> None:
    assert only(file(b"name", prefix=field, magic=GNU)).name == name


def test_a_star_trailer_without_the_ustar_magic_means_nothing() -> None:
    record = checksummed(header(b"name", prefix=b"p" * 155, magic=V7)[:508] + b"tar\0")
    assert only(record).name == b"name"


@pytest.mark.parametrize("magic", [USTAR, GNU])
def test_device_numbers_of_ustar_and_gnu(magic: tuple[bytes, bytes]) -> None:
    member = only(header(b"d", b"3", magic=magic, dev=(8, 300)))
    assert (member.type, member.major, member.minor) == (MemberType.CHAR, 8, 300)


@pytest.mark.parametrize("magic", [V7, (b"ustar ", b"00")])
def test_v7_has_no_device_numbers_and_does_not_read_the_fields(magic: tuple[bytes, bytes]) -> None:
    member = only(header(b"d", b"4", magic=magic, raw={"dmaj": b"garbage!", "dmin": b"garbage!"}))
    assert (member.type, member.major, member.minor) == (MemberType.BLOCK, 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"00000644", 0o644),
        (b"   644 \0", 0o644),
        (b"\0\0 644\0\0", 0o644),
        (b"644\0 \0  ", 0o644),
        (b"644\0junk", 0o644),
        (b"0\0\0\0\0\0\0\0", 0),
        (b"\0" * 8, 0),
        (b" " * 8, 0),
        (b" \0 \0 \0 \0", 0),
        (b"77777777", 0o77777777),
        (b"\x80" + bytes(7), 0),
        (b"\x80\0\0\0\xff\xff\xff\xfe", 0xFFFFFFFE),
    ],
)
def test_numbers_are_octal_or_base_256(field: bytes, value: int) -> None:
    assert only(file(raw={"uid": field})).uid == value


@pytest.mark.parametrize(
    "field",
    [b"9999999\0", b"64 4\0\0\0\0", b"-000001\0", b"+000001\0", b"0x1\0\0\0\0\0", b"0o1\0\0\0\0\0", b"6_4\0\0\0\0\0",
     b"6.4\0\0\0\0\0", b"644\n\0\0\0\0", b"\t644\0\0\0\0", b"x\0 644\0\0"],
)  # fmt: skip
def test_what_is_no_number_is_refused(field: bytes) -> None:
    refused(file(b"first") + file(b"second", raw={"uid": field}), "byte 512", "second", "uid is no number")


@pytest.mark.parametrize(
    ("raw", "what"),
    [("mode", "mode"), ("uid", "uid"), ("gid", "gid"), ("size", "size"), ("mtime", "mtime"), ("dmaj", "devmajor"),
     ("dmin", "devminor")],
)  # fmt: skip
@pytest.mark.parametrize("typ", [b"0", b"5", b"x", b"L"])
def test_every_field_that_is_no_number_is_named(typ: bytes, raw: str, what: str) -> None:
    width = 12 if raw in ("size", "mtime") else 8
    refused(file(b"a") + header(b"named", typ, raw={raw: b"8".ljust(width, b"\0")}), "byte 512", "named", what)


def test_a_checksum_that_is_no_number_is_refused() -> None:
    refused(with_checksum(header(b"named"), b"zzzzzz\0 "), "byte 0", "named", "checksum is no octal number")


@pytest.mark.parametrize("value", [0, 1, T0, LAST_SECOND])
def test_base_256_in_twelve_bytes(value: int) -> None:
    assert only(file(raw={"mtime": base256(value, 12)})).mtime == (value, 0)


def test_base_256_holds_64_bits_and_no_more() -> None:
    for value in (2**63 - 1, -(2**63)):
        assert only(file(raw={"mtime": base256(value, 12)})).mtime == (0, 0)  # a number, though no time
    for value in (2**63, -(2**63) - 1, 2**94 - 1, -(2**94)):
        refused(file(b"named", raw={"mtime": base256(value, 12)}), "named", "mtime is no number of 64 bits")


@pytest.mark.parametrize("value", [-1, -2, -256, -(2**32), -(2**61), -(2**62)])
def test_bit_6_is_the_sign_of_base_256(value: int) -> None:
    refused(file(raw={"uid": base256(value, 8)}), f"uid {value},")


def test_a_negative_mode_keeps_its_low_bits() -> None:
    assert only(file(raw={"mode": base256(-1, 8)})).mode == 0o7777


@pytest.mark.parametrize("form", [b"%06o\0 ", b"%07o\0", b"%08o", b" %05o \0", b"%05o\0\0\0", b"\0 %05o\0"])
def test_the_checksum_may_be_written_in_many_ways(form: bytes) -> None:
    record = header(b"f")
    stored = form % (sum(record[:148]) + sum(record[156:]) + 8 * 0x20)
    assert only(with_checksum(record, stored)).name == b"f"


def test_a_checksum_in_base_256_is_refused() -> None:
    record = header(b"f")
    total = sum(record[:148]) + sum(record[156:]) + 8 * 0x20
    refused(with_checksum(record, base256(total, 8)), "checksum is no octal number")


def test_the_checksum_counts_unsigned_or_signed_bytes() -> None:
    record = header(b"\xff\x80 name")
    assert only(record).name == b"\xff\x80 name"
    signed = sum(byte - 256 * (byte > 127) for byte in record[:148] + record[156:]) + 8 * 0x20
    assert only(with_checksum(record, b"%06o\0 " % signed)).name == b"\xff\x80 name"
    for wrong in (signed + 1, signed + 256, signed - 256):
        refused(with_checksum(record, b"%06o\0 " % wrong), "byte 0", "name", "bad header checksum")


def test_every_flipped_byte_of_a_header_breaks_the_checksum() -> None:
    record = header(b"name", uid=5)
    for at in (*range(148), *range(156, 512)):
        damaged = bytearray(record)
        damaged[at] ^= 0x01
        refused(file(b"first") + bytes(damaged), "byte 512", "bad header checksum")


def test_the_data_of_files_is_stepped_over() -> None:
    tar = file(b"a", b"x" * 700) + header(b"b", b"\0", 512) + b"y" * 512 + file(b"c", b"z")
    found = members(tar)
    assert [(m.name, m.type, m.size_bytes, m.data_offset_bytes) for m in found] == [
        (b"a", MemberType.FILE, 700, 512),
        (b"b", MemberType.FILE, 512, 512 + 1024 + 512),
        (b"c", MemberType.FILE, 1, 512 + 1024 + 512 + 512 + 512),
    ]
    assert [tar[m.data_offset_bytes :][: m.size_bytes] for m in found] == [b"x" * 700, b"y" * 512, b"z"]


def test_data_may_look_like_headers_and_zero_blocks() -> None:
    assert [m.name for m in members(file(b"a", file(b"inner") + EOA) + file(b"b"))] == [b"a", b"b"]


@pytest.mark.parametrize("typ", [b"1", b"2", b"3", b"4", b"5", b"6"])
@pytest.mark.parametrize("size", [1, 512, 600, 8**11 - 1])
def test_types_1_to_6_have_no_data_whatever_the_size_says(typ: bytes, size: int) -> None:
    first, second = members(header(b"a", typ, size, link=b"t") + file(b"b"))
    assert (first.size_bytes, second.name) == (0, b"b")


@pytest.mark.parametrize("typ", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_types_1_to_6_have_no_data_when_the_size_is_negative_either(typ: bytes) -> None:
    first, second = members(header(b"a", typ, link=b"t", raw={"size": base256(-1, 12)}) + file(b"b"))
    assert (first.size_bytes, second.name) == (0, b"b")


def test_an_old_directory_has_no_data() -> None:
    """Go's reader would take it for the next header, and see files that nobody else sees."""
    refused(header(b"old/", b"\0", 3) + padded(b"abc") + file(b"b"), "old/", "type NUL with data")


@pytest.mark.parametrize("typ", [b"0", b"\0", b"x", b"g", b"L", b"K"])
def test_a_negative_size_is_refused(typ: bytes) -> None:
    refused(file(b"a") + header(b"named", typ, raw={"size": base256(-1, 12)}), "byte 512", "named", "negative size")


def test_a_negative_size_from_a_pax_header_is_refused() -> None:
    refused(pax((b"size", b"-1")) + header(b"named"), "byte 1024", "named", "negative size")


def test_a_good_pax_size_does_not_heal_a_negative_one_in_the_header() -> None:
    negative = {"size": base256(-1, 12)}
    refused(pax((b"size", b"5")) + header(b"f", raw=negative) + padded(b"12345"), "negative size")
    assert only(pax((b"size", b"5")) + header(b"d", b"5", raw=negative)).size_bytes == 0


@pytest.mark.parametrize(
    ("typ", "expected"),
    [
        (b"0", MemberType.FILE),
        (b"\0", MemberType.FILE),
        (b"1", MemberType.HARDLINK),
        (b"2", MemberType.SYMLINK),
        (b"3", MemberType.CHAR),
        (b"4", MemberType.BLOCK),
        (b"5", MemberType.DIRECTORY),
        (b"6", MemberType.FIFO),
    ],
)
@pytest.mark.parametrize("magic", [USTAR, GNU, V7])
def test_types(typ: bytes, expected: MemberType, magic: tuple[bytes, bytes]) -> None:
    assert only(header(b"a", typ, link=b"t", magic=magic)).type is expected


def test_every_other_type_is_refused_by_name_and_offset() -> None:
    for value in range(256):
        typ = bytes([value])
        if typ not in b"0123456\0xgLK":
            refused(file(b"a") + header(b"named", typ), "byte 512", "named", error=UnsupportedError)


def test_gnu_sparse_files_and_contiguous_ones_are_refused() -> None:
    refused(header(b"named", b"S", 512, magic=GNU) + bytes(512), "GNU sparse", "named", error=UnsupportedError)
    refused(header(b"named", b"7"), "b'7'", "named", error=UnsupportedError)


def test_the_refusal_of_a_type_names_the_final_name() -> None:
    refused(long_name(b"long") + header(b"short", b"V"), "b'long'", "byte 1024", error=UnsupportedError)


def test_type_0_with_a_trailing_slash_is_a_file() -> None:
    member = only(file(b"a/", b"data"))
    assert (member.type, member.name, member.size_bytes) == (MemberType.FILE, b"a/", 4)


@pytest.mark.parametrize("before", [b"", long_name(b"final/"), pax((b"path", b"final/"))])
def test_type_nul_is_a_directory_when_the_final_name_ends_in_a_slash(before: bytes) -> None:
    assert only(before + header(b"a" if before else b"a/", b"\0")).type is MemberType.DIRECTORY


@pytest.mark.parametrize("before", [long_name(b"final"), pax((b"path", b"final"))])
def test_type_nul_is_a_file_when_the_slash_is_not_in_the_final_name(before: bytes) -> None:
    assert only(before + header(b"a/", b"\0")).type is MemberType.FILE


@pytest.mark.parametrize(
    "tail",
    [b"", ZERO, EOA, EOA + ZERO * 18, EOA + b"junk", EOA + b"j" * 512, EOA + file(b"hidden"), EOA + ZERO + b"x"],
    ids=["clean", "one", "two", "twenty", "odd junk", "a block of junk", "a member", "three and junk"],
)
def test_a_tar_may_end_so(tail: bytes) -> None:
    assert [m.name for m in members(file(b"a", b"1") + tail)] == [b"a"]
    assert members(tail) == []


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (ZERO + file(b"b"), ("single zero block", "byte 1536")),
        (ZERO + b"j" * 512, ("single zero block", "byte 1536")),
        (ZERO + b"\0" * 511 + b"\x01", ("single zero block", "byte 1536")),
        (ZERO + b"\0", ("inside a header", "byte 1537")),
        (ZERO + bytes(511), ("inside a header", "byte 2047")),
        (b"\0", ("inside a header", "byte 1025")),
        (b"b", ("inside a header", "byte 1025")),
        (file(b"b")[:511], ("inside a header", "byte 1535")),
        (b"j" * 512, ("tar header", "byte 1024")),
    ],
)
def test_a_tar_must_not_end_so(tail: bytes, words: tuple[str, ...]) -> None:
    refused(file(b"a", b"1") + tail, *words)


def test_zero_blocks_behind_an_extended_header_end_the_archive_too() -> None:
    assert members(pax((b"path", b"p")) + EOA + b"junk") == []
    refused(pax((b"path", b"p")) + ZERO + file(b"a"), "single zero block")


def test_a_stream_cut_anywhere_is_refused_except_at_its_ends() -> None:
    tar = file(b"a", b"x" * 700) + EOA
    for end in range(len(tar) + 1):
        # Data to its last byte, with or without its padding; then one zero block, or two.
        if end == 0 or 512 + 700 <= end <= 1536 or end in (2048, 2560):
            assert len(members(tar[:end])) == (end > 0)
        else:
            refused(tar[:end], "inside a member's data" if 512 <= end < 1212 else "inside a header", f"byte {end}")


def test_an_extended_header_cut_short_is_refused_and_one_without_padding_is_not() -> None:
    tar = pax((b"path", b"x" * 200))
    body = 512 + 200 + len(b"210 path=\n")
    for end in (1, 511, 512, 513, body - 1):
        refused(tar[:end], "inside", f"byte {end}")
    for end in (body, body + 1, 1023, 1024):
        assert members(tar[:end]) == []


def test_dirty_padding_is_counted_once_a_member() -> None:
    def dirty(data: bytes, *dirt: int) -> bytes:
        block = bytearray(padded(data))
        for at in dirt:
            block[at] = 1
        return header(b"f", b"0", len(data)) + bytes(block)

    assert scanned(dirty(b"12345", 5))[1].dirty_padding == 1
    assert scanned(dirty(b"12345", 511))[1].dirty_padding == 1
    assert scanned(dirty(b"12345", 5, 6, 300, 511))[1].dirty_padding == 1
    assert scanned(dirty(b"x" * 513, 513))[1].dirty_padding == 1
    assert scanned(dirty(b"12345"))[1].dirty_padding == 0
    assert scanned(dirty(b"x" * 512))[1].dirty_padding == 0
    assert scanned(dirty(b"1", 9) + dirty(b"2") + dirty(b"3", 9) + EOA + b"junk")[1].dirty_padding == 2


@pytest.mark.parametrize("cut", [512, 515, 516, 517, 518, 600, 1022, 1023, 1024, 1025])
def test_dirty_padding_is_found_wherever_the_stream_is_cut(cut: int) -> None:
    tar = header(b"f", b"0", 5) + b"12345" + bytes(200) + b"\x01" + bytes(305) + b"\x01" + file(b"g")
    assert scanned(tar, cut)[1].dirty_padding == 1
    assert scanned(tar, *range(513, len(tar)))[1].dirty_padding == 1


def test_dirty_padding_that_is_cut_short_counts() -> None:
    assert scanned(header(b"f", b"0", 5) + b"12345\0\0\x01")[1].dirty_padding == 1


def test_the_padding_of_extended_headers_does_not_count() -> None:
    """Nobody sees it through the mapping of a file."""
    record = b"13 path=name\n"
    extended = header(b"x", b"x", len(record)) + record.ljust(512, b"j") + file(b"f", b"1")
    assert scanned(extended)[1].dirty_padding == 0
    assert scanned(header(b"f", b"0", 1) + b"1".ljust(512, b"j") + extended)[1].dirty_padding == 1


# --- extended headers


def exactly(kind: bytes, size: int) -> bytes:
    if kind in b"LK":
        body = b"text".ljust(size, b"\0")
    else:
        head = b"%d comment=" % size
        body = head + b"c" * (size - len(head) - 1) + b"\n"
    return header(b"extended", kind, size) + padded(body)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_an_extended_header_may_have_a_mebibyte(kind: bytes) -> None:
    member = only(exactly(kind, MIB) + header(b"f", b"2", link=b"t"))
    assert member.name == (b"text" if kind == b"L" else b"f")
    assert member.link == (b"text" if kind == b"K" else b"t")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_an_extended_header_over_a_mebibyte_is_refused_at_its_header(kind: bytes) -> None:
    tar = file(b"a") + exactly(kind, MIB + 1)[:512]
    refused(tar, "extended header of 1048577 bytes", error=LimitExceeded)
    small = Limits(extended_header_bytes=100)
    refused(exactly(kind, 101), "over the limit of 100", error=LimitExceeded, limits=small)
    assert scanned(exactly(kind, 100), limits=small)[0] == []


@pytest.mark.parametrize(
    ("tar", "limits"),
    [
        (header(b"named", b"x", MIB + 1), Limits()),
        (header(b"named") + ZERO, Limits(entries=1)),
        (header(b"named"), Limits(path_bytes=4)),
        (header(b"named", b"0", 5), Limits(tar_bytes=1028)),
    ],
    ids=["extended header", "entries", "path", "tar"],
)
def test_a_limit_names_the_member_and_its_offset(tar: bytes, limits: Limits) -> None:
    refused(file(b"a") + tar, "named", "byte 512", error=LimitExceeded, limits=limits)


def test_long_names_and_links_end_at_the_first_nul() -> None:
    tar = header(b"l", b"L", 10, magic=GNU) + padded(b"long\0rest\0")
    tar += header(b"k", b"K", 4, magic=GNU) + padded(b"link")
    member = only(tar + header(b"short", b"2", link=b"t"))
    assert (member.name, member.link) == (b"long", b"link")


@pytest.mark.parametrize("magic", [USTAR, GNU, V7])
def test_long_names_do_not_ask_for_a_magic(magic: tuple[bytes, bytes]) -> None:
    assert only(header(b"l", b"L", 4, magic=magic) + padded(b"long") + file(b"short")).name == b"long"


@pytest.mark.parametrize("empty", [b"", b"\0", b"\0rest"])
def test_an_empty_long_name_leaves_the_headers_own(empty: bytes) -> None:
    for kind in (b"L", b"K"):
        member = only(header(b"e", kind, len(empty)) + padded(empty) + header(b"f", b"2", link=b"t"))
        assert (member.name, member.link) == (b"f", b"t")


def test_extended_headers_apply_to_one_member_only() -> None:
    tar = long_name(b"long") + long_name(b"link", b"K") + pax((b"uid", b"7"), (b"SCHILY.xattr.user.a", b"1"))
    first, second = members(tar + header(b"a", b"2", link=b"t") + header(b"b", b"2", link=b"u"))
    assert (first.name, first.link, first.uid, first.xattrs) == (b"long", b"link", 7, {b"user.a": b"1"})
    assert (second.name, second.link, second.uid, second.xattrs) == (b"b", b"u", 0, {})


@pytest.mark.parametrize(
    ("body", "records"),
    [
        (b"", {}),
        (b"5 a=\n", {b"a": b""}),
        (b"6 a=b\n", {b"a": b"b"}),
        (b"06 a=\n", {b"a": b""}),
        (b"8 a=b=c\n", {b"a": b"b=c"}),
        (b"7 a=\n\n\n", {b"a": b"\n\n"}),
        (b"8 a=\0\0\0\n", {b"a": b"\0\0\0"}),
        (b"7 a b=\n", {b"a b": b""}),
        (b"6 a=1\n6 b=2\n", {b"a": b"1", b"b": b"2"}),
        (b"6 a=1\n6 a=2\n", {b"a": b"2"}),
        (b"6 a=1\n5 a=\n", {b"a": b""}),
        (b"19 SCHILY.xattr.=\0\n", {b"SCHILY.xattr.": b"\0"}),
        (b"10 path=/\n", {b"path": b"/"}),
    ],
)
def test_pax_records(body: bytes, records: dict[bytes, bytes]) -> None:
    assert parse_pax(body) == records


BAD_RECORDS = [
    b"\n",
    b" ",
    b"6",
    b"6 ",
    b" 6 a=b\n",
    b"a=b\n",
    b"x a=b\n",
    b"-6 a=b\n",
    b"+6 a=b\n",
    b"0x6 a=b\n",
    b"6.0 a=b\n",
    b"0 a=b\n",
    b"1 a=b\n",
    b"2 a=b\n",
    b"4 a=b\n",
    b"4 =\n",
    b"5 a=b\n",
    b"7 a=b\n",
    b"6 a=b ",
    b"6 a=bc\n",
    b"7 a=b\n\0",
    b"6 a=b\n\0",
    b"6 a=b\n\n",
    b"6 abc\n",
    b"99 a=b\n",
    b"18446744073709551622 a=b\n",
    b"9" * 5000 + b" a=b\n",
    b"7 a\0=b\n",
    b"11 path=a\0\n",
    b"15 linkpath=\0a\n",
    b"10 uname=\0\n",
    b"10 gname=\0\n",
    b"\0" * 20,
    "٦ a=b\n".encode(),
]


@pytest.mark.parametrize("body", BAD_RECORDS)
@pytest.mark.parametrize("typ", [b"x", b"g"])
def test_a_malformed_pax_record_is_refused(body: bytes, typ: bytes) -> None:
    with pytest.raises(FormatError, match="pax record"):
        parse_pax(body)
    with pytest.raises(FormatError, match="pax record"):
        parse_pax(b"9 k=good\n" + body)
    refused(raw_pax(body, typ) + file(b"a"), "pax record")


def test_the_refusal_of_a_pax_record_names_its_offset() -> None:
    refused(file(b"a") + raw_pax(b"x a=b\n") + file(b"b"), "pax record", "byte 512")


def test_the_last_of_a_repeated_key_wins() -> None:
    assert only(pax((b"path", b"one"), (b"uid", b"1"), (b"path", b"two")) + file(b"f")).name == b"two"
    # An empty one does, too: it leaves the header's field.
    assert only(pax((b"path", b"one"), (b"path", b"")) + file(b"f")).name == b"f"


def test_a_second_extended_header_replaces_the_first() -> None:
    member = only(pax((b"path", b"one"), (b"uid", b"1")) + pax((b"gid", b"2")) + file(b"f", uid=8, gid=9))
    assert (member.name, member.uid, member.gid) == (b"f", 8, 2)
    assert only(long_name(b"one") + long_name(b"two") + file(b"f")).name == b"two"


def test_a_global_header_has_no_effect_and_drops_what_is_pending() -> None:
    everything = (
        (b"path", b"g"), (b"linkpath", b"g"), (b"uid", b"1"), (b"gid", b"1"), (b"mtime", b"1"), (b"size", b"9"),
        (b"SCHILY.xattr.user.a", b"1"), (b"GNU.sparse.major", b"1"),
    )  # fmt: skip
    plain = header(b"f", b"2", link=b"t") + file(b"z")
    shift = len(pax(*everything, typ=b"g"))
    expected = members(plain)
    for number, before in enumerate((b"", pax((b"path", b"lost")), long_name(b"lost"), long_name(b"lost", b"K"))):
        found = members(before + pax(*everything, typ=b"g") + plain)
        for member in found:
            member.data_offset_bytes -= shift + len(before)
        assert found == expected, number


@pytest.mark.parametrize("dangling", [pax((b"path", b"p")), pax((b"path", b"p"), typ=b"g"), long_name(b"n"),
                                      long_name(b"n", b"K"), long_name(b"n") + pax((b"path", b"p"))])  # fmt: skip
def test_an_extended_header_that_no_member_follows_is_nothing(dangling: bytes) -> None:
    assert [m.name for m in members(file(b"a") + dangling)] == [b"a"]
    assert [m.name for m in members(file(b"a") + dangling + EOA)] == [b"a"]


def test_an_empty_value_leaves_the_headers_field() -> None:
    keys = (b"path", b"linkpath", b"uid", b"gid", b"mtime", b"size")
    tar = pax(*((key, b"") for key in keys)) + header(b"f", b"0", 3, link=b"t", uid=1, gid=2, mtime=3) + padded(b"abc")
    member = only(tar)
    assert (member.name, member.link, member.uid, member.gid, member.mtime, member.size_bytes) == (
        b"f", b"t", 1, 2, (3, 0), 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"0", 0), (b"5", 5), (b"+5", 5), (b"-0", 0), (b"007", 7), (b"4294967294", 4294967294), (b"0" * 19 + b"5", 5)],
)
def test_pax_numbers(text: bytes, value: int) -> None:
    assert only(pax((b"uid", text)) + file(b"f", uid=9)).uid == value
    assert only(pax((b"gid", text)) + file(b"f", gid=9)).gid == value


@pytest.mark.parametrize("key", ["uid", "gid", "size"])
@pytest.mark.parametrize(
    "text",
    [b" 5", b"5 ", b"5\n", b"5\0", b"0x5", b"5.0", b"1e3", b"1_0", b"+", b"-", b"+-5", b"x", "٣".encode(), b"9" * 5000,
     b"9223372036854775808", b"-9223372036854775809"],
)  # fmt: skip
def test_what_is_no_pax_number_is_refused(key: str, text: bytes) -> None:
    refused(file(b"a") + pax((key.encode(), text)) + file(b"named"), f"pax {key}", "named")


def test_leading_zeros_of_a_pax_number_do_not_count() -> None:
    assert only(pax((b"uid", b"0" * 60 + b"5")) + file(b"f")).uid == 5
    assert only(pax((b"mtime", b"0" * 60 + b"5.5")) + file(b"f")).mtime == (5, 500_000_000)


def test_pax_numbers_have_64_bits() -> None:
    for text in (b"9223372036854775807", b"-9223372036854775808"):
        refused(pax((b"uid", text)) + file(b"f"), "id out of range")


def test_a_pax_size_replaces_the_headers() -> None:
    for headers_size in (0, 3, 600):
        first, second = members(pax((b"size", b"5")) + header(b"f", b"0", headers_size) + padded(b"12345") + file(b"g"))
        assert (first.size_bytes, second.name) == (5, b"g")
    assert members(pax((b"size", b"5")) + header(b"d", b"5") + file(b"g"))[1].name == b"g"


@pytest.mark.parametrize(
    ("text", "mtime"),
    [
        (b"1700000000", (1700000000, 0)),
        (b"+1700000000", (1700000000, 0)),
        (b"1700000000.", (1700000000, 0)),
        (b"1700000000.5", (1700000000, 500_000_000)),
        (b"1700000000.000000001", (1700000000, 1)),
        (b"1700000000.123456789", (1700000000, 123_456_789)),
        (b"1700000000.1234567899", (1700000000, 123_456_789)),
        (b"1700000000.0000000009", (1700000000, 0)),
        (b"1700000000." + b"9" * 3000, (1700000000, 999_999_999)),
        (b"0", (0, 0)),
        (b"0.000000001", (0, 1)),
        (b"-0", (0, 0)),
        (b"-0.0", (0, 0)),
        (b"9223372036.854775807", (LAST_SECOND, 854_775_807)),
        (b"9223372036.8547758079", (LAST_SECOND, 854_775_807)),
        # out of range: 0, whatever the fraction
        (b"9223372036.854775808", (0, 0)),
        (b"9223372037", (0, 0)),
        (b"9223372036854775807.5", (0, 0)),
        (b"-1", (0, 0)),
        (b"-1.5", (0, 0)),
        (b"-0.5", (0, 0)),
        (b"-9223372036854775808.5", (0, 0)),
    ],
)
def test_pax_times(text: bytes, mtime: tuple[int, int]) -> None:
    assert only(pax((b"mtime", text)) + file(b"f", mtime=5)).mtime == mtime


@pytest.mark.parametrize("text", [b".", b".5", b"-.5", b"-", b"1.x", b"1.-5", b"1.5.5", b"1,5", b"1e9", b" 1", b"1 ",
                                  b"1\n", b"0x1", b"1_0", b"nan", b"9223372036854775808",
                                  b"-9223372036854775809.5", b"9" * 5000])  # fmt: skip
def test_what_is_no_pax_time_is_refused(text: bytes) -> None:
    refused(file(b"a") + pax((b"mtime", text)) + file(b"named"), "pax mtime", "named")


def test_a_negative_time_with_a_fraction_goes_down() -> None:
    # Not to be seen in a member: every negative time becomes 0 there.
    assert _pax_time(b"-1.5") == (-2, 500_000_000)
    assert _pax_time(b"-0.25") == (-1, 750_000_000)
    assert _pax_time(b"-1.000000001") == (-2, 999_999_999)
    assert _pax_time(b"-1.0000000009") == (-1, 0)
    assert _pax_time(b"-3.") == (-3, 0)


def test_gnu_long_names_win_over_pax_and_pax_over_the_header() -> None:
    records = pax((b"path", b"pax"), (b"linkpath", b"paxlink"))
    gnu = long_name(b"gnu") + long_name(b"gnulink", b"K")
    plain = header(b"hdr", b"2", link=b"hdrlink", prefix=b"prefix")
    assert (only(plain).name, only(plain).link) == (b"prefix/hdr", b"hdrlink")
    assert (only(records + plain).name, only(records + plain).link) == (b"pax", b"paxlink")
    for both in (records + gnu + plain, gnu + records + plain):
        assert (only(both).name, only(both).link) == (b"gnu", b"gnulink")


def test_xattrs_come_from_schily_keys_alone() -> None:
    records = (
        (b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.empty", b""), (b"SCHILY.xattr.security.x", b"\0\n=\xff"),
        (b"SCHILY.acl.access", b"u::rw-"), (b"LIBARCHIVE.xattr.user.b", b"QQ"), (b"schily.xattr.user.c", b"1"),
        (b"SCHILY.xattrs.user.d", b"1"), (b"RHT.security.selinux", b"1"),
    )  # fmt: skip
    assert only(pax(*records) + file(b"f")).xattrs == {b"user.a": b"1", b"user.empty": b"", b"security.x": b"\0\n=\xff"}


@pytest.mark.parametrize("value", [b"1", b"no time", b"\0"])
def test_other_keys_are_ignored(value: bytes) -> None:
    keys = (b"hdrcharset", b"comment", b"devmajor", b"mode", b"PATH", b"GNU.x", b"GNU.sparse")
    assert only(pax(*((key, value) for key in keys)) + file(b"f")) == only(pax((b"comment", b"c")) + file(b"f"))
    assert only(pax((b"uname", b"u"), (b"gname", b"g")) + file(b"f")) == only(pax((b"comment", b"c")) + file(b"f"))


@pytest.mark.parametrize("key", [b"atime", b"ctime"])
def test_pax_times_that_are_not_used_must_be_times_all_the_same(key: bytes) -> None:
    assert only(pax((key, b"-1.5")) + file(b"f")).mtime == only(file(b"f")).mtime
    assert only(pax((key, b"")) + file(b"f")).name == b"f"
    refused(pax((key, b"no time")) + file(b"f"), "is no time")


def test_the_length_of_a_pax_record_may_have_a_plus() -> None:
    assert parse_pax(b"+11 path=a\n") == {b"path": b"a"}


@pytest.mark.parametrize("key", [b"major", b"minor", b"map", b"size", b"realsize", b"name", b"numblocks", b"offset",
                                 b"numbytes", b"new"])  # fmt: skip
def test_pax_sparse_members_are_refused(key: bytes) -> None:
    refused(pax((b"GNU.sparse." + key, b"1")) + file(b"f"), "sparse", error=UnsupportedError)


def test_the_refusal_of_a_sparse_member_names_its_offset_however_the_stream_is_cut() -> None:
    tar = file(b"a") + pax((b"GNU.sparse.major", b"1")) + file(b"named")
    for pieces in ((), (600,), (512, 1024, 1536), tuple(range(1, len(tar)))):
        with pytest.raises(UnsupportedError, match=r"byte (512|1536)\b"):
            scanned(tar, *pieces)


# --- values


def test_only_the_low_twelve_bits_of_the_mode_count() -> None:
    assert only(file(mode=0o100644)).mode == 0o644
    assert only(file(mode=0o7777)).mode == 0o7777
    assert only(file(mode=0)).mode == 0


def test_ids_end_before_the_one_that_means_nobody() -> None:
    last = 2**32 - 2
    member = only(file(raw={"uid": base256(last, 8), "gid": base256(last, 8)}))
    assert (member.uid, member.gid) == (last, last)
    for bad in (-1, -2, last + 1, last + 2, 2**40):
        refused(file(b"named", raw={"uid": base256(bad, 8)}), "named", "byte 0", f"uid {bad}")
        refused(file(b"named", raw={"gid": base256(bad, 8)}), "named", "byte 0", f"gid {bad}")
        refused(pax((b"uid", b"%d" % bad)) + file(b"named"), "named", "byte 1024", f"uid {bad}")
        refused(pax((b"gid", b"%d" % bad)) + file(b"named"), "named", "byte 1024", f"gid {bad}")


@pytest.mark.parametrize("name", [b"./", b".wh.gone", b".wh..wh..opq"])
def test_members_without_effect_are_held_to_the_same_rules(name: bytes) -> None:
    refused(file(name, raw={"uid": base256(-1, 8)}), "id out of range")
    refused(header(name, b"7"), "b'7'", error=UnsupportedError)


def test_a_good_pax_id_heals_a_bad_one_in_the_header() -> None:
    assert only(pax((b"uid", b"5")) + file(raw={"uid": base256(-1, 8)})).uid == 5


@pytest.mark.parametrize("mtime", [-1, -(2**63), LAST_SECOND + 1, 2**63 - 1])
def test_a_header_time_out_of_range_becomes_0(mtime: int) -> None:
    assert only(file(raw={"mtime": base256(mtime, 12)})).mtime == (0, 0)


def test_limits_are_exact() -> None:
    tar = file(b"a", b"x" * 512) + file(b"b")
    assert len(scanned(tar, limits=Limits(tar_bytes=len(tar), entries=2, path_bytes=1))[0]) == 2
    refused(tar, "limit of 1535 bytes", error=LimitExceeded, limits=Limits(tar_bytes=len(tar) - 1))
    refused(tar, "more than 1 entries", error=LimitExceeded, limits=Limits(entries=1))
    refused(file(b"ab"), "path of 2 bytes", error=LimitExceeded, limits=Limits(path_bytes=1))


def test_a_size_over_the_limit_is_refused_at_the_header() -> None:
    refused(header(b"huge", b"0", raw={"size": base256(2**63 - 1, 12)}), "huge", error=LimitExceeded)
    refused(pax((b"size", b"9223372036854775807")) + file(b"huge"), "huge", error=LimitExceeded)


def test_an_error_of_the_receiver_gets_the_offset() -> None:
    def receiver(member: Member) -> None:
        raise FormatError(f"no {member.name!r} here")

    with pytest.raises(FormatError, match=r"tar header at byte 0 .*no b'f' here"):
        TarScanner(receiver, Limits()).feed(file(b"f"))


# --- the stream as a whole


def everything() -> bytes:
    """A little of each."""
    dirty = header(b"dirty", b"0", 5) + b"12345".ljust(512, b"j")
    return b"".join(
        (
            file(b"a", b"x" * 700, prefix=b"p"), dirty, long_name(b"n" * 300), header(b"l", b"2", link=b"t"),
            pax((b"path", b"pax"), (b"size", b"3"), (b"SCHILY.xattr.user.a", b"\n")), header(b"f"), padded(b"abc"),
            header(b"d", b"5"), pax((b"comment", b"g" * 600), typ=b"g"), file(b"end"), EOA, b"opaque",
        )
    )  # fmt: skip


def test_the_size_of_the_pieces_does_not_matter() -> None:
    tar = everything()
    expected, scanner = scanned(tar)
    assert (len(expected), scanner.members, scanner.dirty_padding) == (6, 6, 1)
    for cut in range(1, len(tar)):
        found, other = scanned(tar, cut)
        assert (found, other.dirty_padding) == (expected, 1)
    for size in (1, 3, 511, 513):
        assert scanned(tar, *range(size, len(tar), size))[0] == expected


def test_the_buffer_of_a_piece_may_be_used_again() -> None:
    found: list[Member] = []
    scanner = TarScanner(found.append, Limits())
    tar, buffer = everything(), bytearray(300)
    for at in range(0, len(tar), 300):
        piece = tar[at : at + 300]
        buffer[: len(piece)] = piece
        scanner.feed(memoryview(buffer)[: len(piece)])
        buffer[:] = b"\xff" * 300
    scanner.close()
    assert found == members(tar)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_usual_writer_is_understood(form: int) -> None:
    tar = make_tars.T(form)
    tar.d("dir", uid=5, mode=0o700)
    tar.f("dir/" + "f" * 90, b"data", mtime=77)
    tar.s("link", "target")
    tar.h("hard", "link")
    tar.add("dev", tarfile.BLKTYPE, dev=(7, 9))
    directory, data, link, hard, device = members(tar.done())
    assert (directory.name, directory.type, directory.uid, directory.mode) == (
        b"dir/", MemberType.DIRECTORY, 5, 0o700,
    )  # fmt: skip
    assert (data.name, data.size_bytes, data.mtime) == (b"dir/" + b"f" * 90, 4, (77, 0))
    assert (link.type, link.link, hard.type, hard.link) == (
        MemberType.SYMLINK, b"target", MemberType.HARDLINK, b"link",
    )  # fmt: skip
    assert (device.type, device.major, device.minor) == (MemberType.BLOCK, 7, 9)
