# SPDX-License-Identifier: Apache-2.0
"""What is put into the trash is out of its place at once, and gone some time later."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from snapshotter.trash import Trash
from tests.harness import wait_for


@asynccontextmanager
async def emptied(trash: Trash) -> AsyncIterator[Trash]:
    trash.prepare()
    task = asyncio.create_task(trash.empty_as_it_comes())
    try:
        yield trash
    finally:
        task.cancel()
        trash.close()


async def until(check: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_for, "the trash is emptied", check)


async def test_files_and_directories_leave_their_place_at_once_and_go(tmp_path: Path) -> None:
    trash = Trash(tmp_path)
    trash.prepare()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "directory" / "below").mkdir(parents=True)
    (tmp_path / "directory" / "below" / "file").write_bytes(b"x")
    assert trash.put(tmp_path / "file")
    assert trash.put(tmp_path / "directory")
    assert not trash.put(tmp_path / "file")
    assert os.listdir(tmp_path) == ["trash"]
    assert len(trash.names()) == 2
    # What lies there since before a start goes, and what comes while it is emptied.
    async with emptied(trash):
        await until(lambda: not trash.names())
        (tmp_path / "file").write_bytes(b"x")
        await asyncio.to_thread(trash.put, tmp_path / "file")
        await until(lambda: not trash.names())


async def test_files_go_no_quicker_than_the_rate_unless_room_is_needed(tmp_path: Path) -> None:
    async def seconds(*, hurry: bool) -> float:
        trash = Trash(tmp_path, bytes_per_second=1 << 20, in_a_hurry=lambda: hurry)
        trash.prepare()
        for number in range(3):
            (tmp_path / str(number)).write_bytes(os.urandom(256 << 10))
            trash.put(tmp_path / str(number))
        started = time.monotonic()
        async with emptied(trash):
            await until(lambda: not trash.names())
        return time.monotonic() - started

    assert await seconds(hurry=False) >= 0.4  # two pauses of a quarter of a second, and a bit less by the clock's grain
    assert await seconds(hurry=True) < await seconds(hurry=False)


async def test_what_cannot_be_removed_stays_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trash = Trash(tmp_path)
    trash.prepare()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
        trash.put(tmp_path / name)
    stuck = sorted(trash.names())[0]
    unlink = os.unlink

    def refuse(path: str | Path, **named: int) -> None:
        if Path(path).name == stuck:
            raise OSError(errno.EPERM, "not permitted")
        unlink(path, **named)

    monkeypatch.setattr(os, "unlink", refuse)
    async with emptied(trash):
        await until(lambda: trash.names() == {stuck})
        (tmp_path / "c").write_bytes(b"x")
        await asyncio.to_thread(trash.put, tmp_path / "c")
        await until(lambda: trash.names() == {stuck})
    monkeypatch.undo()
    async with emptied(Trash(tmp_path)):
        await until(lambda: not trash.names())


def test_on_a_full_disk_it_goes_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trash = Trash(tmp_path)
    trash.prepare()
    (tmp_path / "file").write_bytes(b"x")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "rename", full)
    assert trash.put(tmp_path / "file")
    assert os.listdir(tmp_path) == ["trash"]
    assert not trash.names()


async def test_what_failed_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"listdir": 1, "rmdir": 1}

    def failing(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            if failures[name]:
                failures[name] -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, call)

    async with emptied(Trash(tmp_path)) as trash:
        await asyncio.sleep(0.05)
        for name in failures:
            failing(name)
        (tmp_path / "directory").mkdir()
        await asyncio.to_thread(trash.put, tmp_path / "directory")
        await until(lambda: not failures["listdir"])
        trash.again()
        await until(lambda: not failures["rmdir"])
        await asyncio.sleep(0.05)
        trash.again()
        await until(lambda: not trash.names())
