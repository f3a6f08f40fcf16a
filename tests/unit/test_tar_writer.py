# SPDX-License-Identifier: Apache-2.0
"""What is written is what our scanner, and others', read back."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import pytest

from blockdev.errors import LimitExceeded, UnsupportedError
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType, TarScanner
from blockdev.formats.tar_writer import END, member_header, padding

PLAIN = Member(MemberType.FILE, b"a", b"", 0o644, 0, 0, (0, 0), 0, 0, 0, 0, {})
DATA_OFFSET = 512


def written(member: Member) -> bytes:
    return member_header(member, Limits())


def scanned(tar: bytes) -> list[Member]:
    found: list[Member] = []
    scanner = TarScanner(found.append, Limits())
    scanner.feed(tar)
    scanner.close()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"type": MemberType.DIRECTORY, "name": b"a/", "mode": 0o7777},
        {"type": MemberType.SYMLINK, "link": b"l" * 100},
        {"type": MemberType.SYMLINK, "link": b"l" * 4095},
        {"type": MemberType.HARDLINK, "link": b"\xff" * 101},
        {"type": MemberType.CHAR, "major": 4095, "minor": 1048575},
        {"type": MemberType.BLOCK, "major": 8, "minor": 1},
        {"type": MemberType.FIFO},
        {"name": b"n" * 100},
        {"name": b"n" * 101},
        {"name": b"\xff\n=" * 50},
        {"name": "ü".encode() * 60},
        {"uid": 8**7 - 1, "gid": 8**7},
        {"uid": 2**32 - 2, "gid": 2**32 - 2},
        {"mtime": (8**11 - 1, 0)},
        {"mtime": (8**11, 0)},
        {"mtime": (1, 5)},
        {"mtime": (1_700_000_000, 123_456_780)},
        {"mtime": (9223372036, 854775807)},
        {"xattrs": {b"user.empty": b"", b"security.capability": b"\0\n=\xff", b"user.\xff": b"x" * 70000}},
    ],
)
def test_a_member_is_read_back_as_it_was_written(changes: dict[str, object]) -> None:
    member = replace(PLAIN, **changes)  # type: ignore[arg-type]
    header = written(member)
    [found] = scanned(header + END)
    assert found == replace(member, data_offset_bytes=len(header))


def test_a_size_of_any_digits_is_read_back() -> None:
    for size in (8**11 - 1, 8**11):
        found: list[Member] = []
        TarScanner(found.append, Limits()).feed(written(replace(PLAIN, size_bytes=size)))
        assert found[0].size_bytes == size


def test_times_before_1970_are_said_as_they_are() -> None:
    for mtime, text in (((-1, 0), b"=-1\n"), ((-2, 500_000_000), b"=-1.5\n"), ((-1, 1), b"=-0.999999999\n")):
        assert b" mtime" + text in written(replace(PLAIN, mtime=mtime))


def test_what_needs_no_extended_header_has_none() -> None:
    assert len(written(PLAIN)) == DATA_OFFSET


def test_the_order_of_attributes_does_not_matter() -> None:
    one, other = {b"user.a": b"1", b"user.b": b"2"}, {b"user.b": b"2", b"user.a": b"1"}
    assert written(replace(PLAIN, xattrs=one)) == written(replace(PLAIN, xattrs=other))


def test_padding_fills_records() -> None:
    assert [len(padding(size)) for size in (0, 1, 511, 512, 513)] == [0, 511, 1, 0, 511]


def test_python_reads_it_too() -> None:
    member = replace(
        PLAIN, name=b"d/" + b"n" * 200, size_bytes=3, uid=3_000_000, mtime=(1, 250_000_000), xattrs={b"user.a": b"b"}
    )
    with tarfile.open(fileobj=io.BytesIO(written(member) + b"abc" + padding(3) + END)) as tar:
        [info] = tar.getmembers()
        file = tar.extractfile(info)
        assert file is not None
        assert file.read() == b"abc"
    assert (info.name, info.uid, info.mtime) == ("d/" + "n" * 200, 3_000_000, 1.25)
    assert info.pax_headers["SCHILY.xattr.user.a"] == "b"


@pytest.mark.parametrize("name", [b"", b"user.a=b", b"user.\0"])
def test_an_attribute_that_a_reader_would_take_for_another_is_refused(name: bytes) -> None:
    with pytest.raises(UnsupportedError, match="no tar can hold"):
        written(replace(PLAIN, xattrs={name: b"x"}))


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="NUL"):
        written(replace(PLAIN, name=b"a\0b"))


def test_an_extended_header_that_no_reader_would_take_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="over the limit"):
        member_header(replace(PLAIN, xattrs={b"user.a": b"x" * 2000}), Limits(extended_header_bytes=2000))
