# SPDX-License-Identifier: Apache-2.0
"""Reading in the background: at a rate, past the page cache, until it is stopped."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from snapshotter.direct import opened_direct
from snapshotter.pace import Pace, Stopped
from snapshotter.reserve import Reserve


def test_a_rate_is_kept() -> None:
    pace, started = Pace(1_000_000), time.monotonic()
    for _ in range(4):
        pace(100_000)
    assert time.monotonic() - started >= 0.25  # the first one waits for nothing


def test_without_a_rate_nothing_waits() -> None:
    pace, started = Pace(0), time.monotonic()
    for _ in range(1000):
        pace(1 << 30)
    assert time.monotonic() - started < 10


def test_who_waits_is_stopped() -> None:
    pace = Pace(1)
    pace(1000)
    threading.Timer(0.05, pace.stop).start()
    with pytest.raises(Stopped):
        pace(1)
    with pytest.raises(Stopped):
        Pace.__call__(pace, 1)


def test_any_range_of_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    data = os.urandom((2 << 20) + 777)
    (tmp_path / "file").write_bytes(data)
    chance = random.Random(1)
    with opened_direct(tmp_path / "file") as read:
        assert read(0, len(data) + 5000) == data
        assert read(len(data), 1) == read(len(data) + 5000, 1) == b""
        for _ in range(200):
            offset = chance.randrange(len(data))
            size = chance.choice([1, 512, 4096, 70_000, 3 << 20])
            assert read(offset, size) == data[offset : offset + size]


def test_a_reserve_is_there_until_it_is_given_up(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", 1 << 20)
    assert not reserve.give_up()
    assert reserve.keep()
    assert reserve.keep()
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 1 << 20
    assert reserve.give_up()
    assert not (tmp_path / "reserve").exists()


def test_a_reserve_that_does_not_fit_takes_nothing(tmp_path: Path) -> None:
    assert not Reserve(tmp_path / "reserve", 1 << 60).keep()
    assert not (tmp_path / "reserve").exists()
