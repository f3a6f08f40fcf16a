# SPDX-License-Identifier: Apache-2.0
"""No answer waits for a walk, and walks wait for each other in slices."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from snapshotter import usage as module
from snapshotter.metastore import SnapshotID
from snapshotter.trash import remove_tree
from snapshotter.usage import Usage, Use, Walk
from tests.harness import run


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    remove_tree(tmp_path)  # some of it is too deep for others
    tmp_path.mkdir()


@pytest_asyncio.fixture
async def usage(place: Path) -> AsyncIterator[Usage]:
    made = Usage(lambda snapshot_id: place / str(snapshot_id))
    yield made
    await made.close()


ONE, TWO = SnapshotID(1), SnapshotID(2)


def disk_usage(path: Path) -> Use:
    """du's."""
    size = run("du", "-s", "--block-size=1", path).split()[0]
    inodes = run("du", "-s", "--inodes", path).split()[0]
    return Use(int(size), int(inodes))


def fill(directory: Path, count: int) -> None:
    for number in range(count):
        if number % 100 == 0:
            below = directory / f"d{number}"
            below.mkdir(parents=True)
        (below / f"f{number}").touch()


async def test_a_walk_counts_as_du_does(place: Path) -> None:
    top = place / "1"
    top.mkdir()
    (top / "big").write_bytes(os.urandom(100_000))
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    for name in "abc":
        os.link(top / "big", top / f"same {name}")
    os.link(top / "sparse", top / "hole")
    (top / "link").symlink_to("/usr")
    os.mkfifo(top / "fifo")
    fill(top / "many", 200)
    os.link(top / "many" / "d0" / "f0", top / "again")
    walk = Walk(top)
    while not walk.step(0.0):
        pass
    assert walk.so_far() == disk_usage(top)


async def test_a_small_directory_is_told_as_it_is(usage: Usage, place: Path) -> None:
    (place / "1").mkdir()
    assert await usage.of(ONE) == disk_usage(place / "1")
    (place / "1" / "file").write_bytes(b"x" * 100_000)
    assert await usage.of(ONE) == disk_usage(place / "1")
    assert await usage.of(TWO) == Use(0, 0)
    assert TWO not in usage._known


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds 200 files is big."""
    monkeypatch.setattr(module, "_SLICE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_REST_SECONDS", 0.003)


@pytest.mark.usefixtures("slowly")
async def test_a_big_directory_is_told_as_far_as_it_is_known(
    usage: Usage, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer is a bound from below; a later one stays until the next walk is over."""
    fill(place / "1", 200)
    truth = disk_usage(place / "1")
    seen: list[Use] = []
    while not seen or seen[-1] != truth:
        started = time.monotonic()
        seen.append(await usage.of(ONE))
        assert time.monotonic() - started < module._MOMENT_SECONDS + 30
        await asyncio.sleep(0.01)
    assert all(0 < use.inodes <= truth.inodes for use in seen)
    assert [use.inodes for use in seen] == sorted(use.inodes for use in seen)
    assert len(seen) > 2
    usage._known[ONE].holds_until = 0
    (place / "1" / "new").touch()
    assert await usage.of(ONE) == truth
    monkeypatch.setattr(module, "_SLICE_SECONDS", 1.0)
    while await usage.of(ONE) == truth:
        usage._known[ONE].holds_until = 0
        await asyncio.sleep(0.01)
    assert await usage.of(ONE) == disk_usage(place / "1")


@pytest.mark.usefixtures("slowly")
async def test_a_small_directory_does_not_wait_for_a_big_one(usage: Usage, place: Path) -> None:
    fill(place / "1", 200)
    (place / "2").mkdir()
    await usage.of(ONE)
    assert usage._known[ONE].walk is not None
    assert await usage.of(TWO) == disk_usage(place / "2")
    assert usage._known[ONE].walk is not None


async def test_walks_take_a_part_of_a_processor(usage: Usage, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices: list[float] = []
    step = Walk.step

    def timed(walk: Walk, seconds: float) -> bool:
        slices.append(time.monotonic())
        return step(walk, seconds)

    monkeypatch.setattr(Walk, "step", timed)
    monkeypatch.setattr(module, "_SLICE_SECONDS", 0.0)
    (place / "1").mkdir()
    for number in range(9):
        (place / "1" / str(number)).touch()
    await usage.of(ONE)
    while usage._known[ONE].walk is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    gaps = [after - before for before, after in itertools.pairwise(slices)]
    assert len(gaps) >= 8
    assert min(gaps[1:]) >= module._REST_SECONDS * 0.9
    # And its result holds for as long again, several times.
    assert usage._known[ONE].holds_until > time.monotonic()


@pytest.mark.usefixtures("slowly")
async def test_what_is_forgotten_is_not_walked_on(usage: Usage, place: Path) -> None:
    fill(place / "1", 200)
    await usage.of(ONE)
    usage.forget(ONE)
    await asyncio.sleep(0.2)
    assert not usage._queue
    assert not usage._known


async def test_a_deep_tree_is_walked_without_a_crash(usage: Usage, place: Path) -> None:
    path = place / "1"
    path.mkdir()
    (path / "file").write_bytes(b"x" * 10_000)
    os.link(path / "file", path / "again")
    (path / "link").symlink_to("/")
    for _ in range(1200):
        path = path / "d"
        path.mkdir()
    while (use := await usage.of(ONE)).inodes != 1 + 1 + 1 + 1200:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert use.size_bytes >= 10_000
