# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from snapshotter.cli import uvm


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_directory_goes_at_the_end_and_those_of_the_dead_at_the_start(temporary: Path) -> None:
    abandoned = temporary / "tardev-uvm-dead"
    (abandoned / "below").mkdir(parents=True)
    others = temporary / "other-dead"
    others.mkdir()
    with uvm.working_directory() as first, uvm.working_directory() as second:
        assert first != second
        assert sorted(temporary.iterdir()) == sorted([others, first, second])
        (first / "file").write_text("x")
    assert list(temporary.iterdir()) == [others]


def test_one_that_is_held_stays(temporary: Path) -> None:
    held = temporary / "tardev-uvm-held"
    held.mkdir()
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with uvm.working_directory():
            assert held.exists()
    finally:
        os.close(fd)


def test_a_link_of_that_name_is_not_followed(temporary: Path) -> None:
    target = temporary / "precious"
    target.mkdir()
    (temporary / "tardev-uvm-link").symlink_to(target)
    with uvm.working_directory():
        assert target.exists()


def test_an_error_leaves_no_directory(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), uvm.working_directory():
        raise ZeroDivisionError
    assert list(temporary.iterdir()) == []
