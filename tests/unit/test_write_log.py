# SPDX-License-Identifier: Apache-2.0
"""A log of dm-log-writes (Linux: Documentation/admin-guide/device-mapper/log-writes.rst), and its points."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.powercut.cuts import acknowledged
from tests.powercut.write_log import DISCARD, FLUSH, FUA, MARK, Disk, Point, read_log, some_of

SECTOR = 512


def entry(sector: int, data: bytes, flags: int = 0) -> bytes:
    head = struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, 0)
    return head.ljust(SECTOR, b"\0") + data


def mark(text: bytes) -> bytes:
    return (struct.pack("<QQQQ", 0, 0, MARK, len(text)) + text).ljust(SECTOR, b"\0")


def log_of(directory: Path, *entries: bytes) -> Path:
    path = directory / "log"
    head = struct.pack("<QQQI", 0x6A736677736872, 1, len(entries), SECTOR).ljust(SECTOR, b"\0")
    path.write_bytes(head + b"".join(entries))
    return path


def block(letter: str) -> bytes:
    return letter.encode() * SECTOR


def test_each_point_has_what_was_written_and_marked_before_it(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        entry(0, block("a")),
        entry(1, block("b"), FUA),
        mark(b"committed/x"),
        entry(0, block("c")),
        entry(2, block("d")),
        # A discard names sectors, and has no data in the log.
        struct.pack("<QQQQ", 1, 1, DISCARD, 0).ljust(SECTOR, b"\0"),
        entry(0, b"", FLUSH),
        entry(3, block("e")),
    )
    image = tmp_path / "image"
    image.write_bytes(block("-") * 4)
    disk = Disk(log, image)
    found = []
    for point, waiting in disk.points():
        found.append((point, image.read_bytes()[::SECTOR], [each.offset // SECTOR for each in waiting]))
    disk.close()
    assert found == [
        (Point(0, (), ("committed/x",)), b"----", [0, 1]),
        (Point(1, ("committed/x",)), b"ab--", [0, 2, 1, 0]),
    ]
    # After the last barrier: what was in front of it, and nothing of what came later.
    assert image.read_bytes()[::SECTOR] == b"cbd-"


def test_what_had_to_be_through_is_in_every_choice(tmp_path: Path) -> None:
    writes = [entry(number, block("x")) for number in range(40)]
    log = log_of(tmp_path, *writes, entry(99, block("y"), FUA))
    entries = read_log(log)
    chosen = [some_of(entries, seed) for seed in range(20)]
    assert all(each[-1].offset == 99 * SECTOR for each in chosen)
    assert all(0 < len(each) < 41 for each in chosen)
    assert len({tuple(one.offset for one in each) for each in chosen}) == 20
    assert some_of(entries, 7) == some_of(entries, 7)


def test_a_removal_that_began_takes_the_promise_back() -> None:
    marks = ("committed/sha256:a", "committed/sha256:b", "imported", "removing", "committed/sha256:a")
    assert acknowledged(Point(0, marks[:3])) == {"sha256:a", "sha256:b"}
    assert acknowledged(Point(0, marks[:4])) == set()
    assert acknowledged(Point(0, marks)) == {"sha256:a"}


def test_what_containerd_is_seen_to_have_collected_was_being_collected_before() -> None:
    marks = ("committed/a", "committed/b", "gone/a", "committed/a")
    assert acknowledged(Point(0, marks[:2], marks[2:])) == {"b"}
    assert acknowledged(Point(0, marks[:3], marks[3:])) == {"b"}
    assert acknowledged(Point(0, marks)) == {"a", "b"}


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no log"):
        read_log(tmp_path / "log")
