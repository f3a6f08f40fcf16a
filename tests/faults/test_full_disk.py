# SPDX-License-Identifier: Apache-2.0
"""A root on a small file system of its own that is full to the last byte, at different moments; and few descriptors.

Quotas: this is what EDQUOT of the fault matrix is for, where the kernel has none (CONFIG_QFMT_V2).
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from snapshotter.api.proto import diff_pb2
from tests.conftest import in_every_run
from tests.crash import oracle
from tests.crash.journeys import JOURNEYS, OCI, Stage, allocated_bytes, chains_of, digest_of, make_stage
from tests.golden.make_tars import EOA, F
from tests.harness import ProcessFailed, host_state, run, wait_for

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]

Code = grpc.StatusCode
_BYTES = 32 << 20


@contextlib.contextmanager
def small(directory: Path) -> Iterator[None]:
    """An ext4 of 32 MiB is mounted there, without a file in it."""
    image = directory.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(_BYTES)
    # Blocks of 1 KiB and nothing kept for root: full is full.
    run("mkfs.ext4", "-q", "-b", "1024", "-m", "0", "-O", "^has_journal", image)
    directory.mkdir(parents=True)
    run("mount", "-o", "loop", image, directory)
    try:
        (directory / "lost+found").rmdir()
        yield
    finally:
        run("umount", directory, check=False)  # the daemon's own cleaning up unmounts all that is below its directory


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    before = host_state()
    made = make_stage(tmp_path, JOURNEYS[0])
    with small(made.daemon.root):
        try:
            made.start()
            made.new_image("full")
            yield made
        finally:
            made.close()
    wait_for("nothing is left behind", lambda: not host_state() - before)


class Filler:
    def __init__(self, root: Path) -> None:
        self.path = root / "staging" / ".filler"  # which nobody looks into while the daemon runs

    def fill(self, leave_bytes: int = 0) -> None:
        with self.path.open("ab", buffering=0) as file:
            for size in (1 << 20, 1024, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
            if leave_bytes:
                file.truncate(file.tell() - leave_bytes)

    def free(self) -> None:
        self.path.unlink(missing_ok=True)


def exhausted(call: Callable[[], object]) -> str:
    """Its text. The call is refused for want of space."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED, caught.value.details()
    return str(caught.value.details())


def maybe_exhausted(call: Callable[[], object]) -> bool:
    """Whether it was refused, for want of space: small writes may find room in what the database has already."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is not Code.RESOURCE_EXHAUSTED:
            raise
        return True
    return False


def assert_in_order(stage: Stage) -> None:
    assert stage.daemon.alive()
    assert stage.lost() == []
    assert oracle.broken(stage.daemon) == []
    assert oracle.leftovers(stage.daemon) == []


def assert_space_comes_back(stage: Stage) -> None:
    stage.start()
    stage.clear()
    stage.cleanup()
    assert oracle.leftovers(stage.daemon) == []
    assert stage.daemon.layers() == []
    assert allocated_bytes(stage.daemon.root) <= 4096


def apply(stage: Stage, tar: bytes) -> None:
    key = stage.new_key(f"extract-0-x {digest_of(tar)}")
    mounts = stage.prepare(key)
    descriptor = stage.put(tar)
    descriptor.media_type = OCI
    try:
        stage.stub.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60)
    finally:
        stage.remove(key)


def larger_than_the_disk() -> bytes:
    return bytes(F(b"large", bytes(_BYTES)) + EOA)


@pytest.mark.soak
def test_a_layer_that_does_not_fit(stage: Stage) -> None:
    """Met in the middle of the worker's writing."""
    text = exhausted(lambda: apply(stage, larger_than_the_disk()))
    assert "No space left" in text
    assert digest_of(larger_than_the_disk()) in text
    assert_in_order(stage)
    stage.pull()
    stage.start_container()
    assert_in_order(stage)
    stage.stop_container()
    assert_space_comes_back(stage)


@pytest.mark.parametrize(
    "moment",
    in_every_run(
        ["at the beginning", "half way", "before the start", "before the commit of changes"], "half way".__eq__
    ),
)
def test_full(stage: Stage, moment: str) -> None:
    filler = Filler(stage.daemon.root)
    calls: list[Callable[[], object]] = [stage.pull]
    if moment == "half way":
        tars = stage.tars
        stage.tars = tars[:2]
        stage.pull()
        stage.tars = tars
    elif moment != "at the beginning":
        stage.pull()
        calls = [stage.start_container]
    if moment == "before the commit of changes":
        stage.start_container()
        stage.write_changes()
        calls = [stage.commit_changes]
    stage.control.when_quiet()
    filler.fill()
    for call in calls:
        refused = exhausted(call)
        assert "space" in refused or "full" in refused, refused
    assert stage.daemon.alive()
    # What reads goes on: lists, and the mounts of those that are there.
    assert stage.lost() == []
    assert oracle.broken(stage.daemon) == []
    filler.free()
    assert_in_order(stage)
    for call in calls:
        call()
    stage.collect()
    assert_in_order(stage)
    stage.stop_container()
    assert_space_comes_back(stage)


def test_removals_make_room_on_a_full_disk(stage: Stage) -> None:
    stage.pull()
    stage.start_container()
    stage.start()
    Filler(stage.daemon.root).fill()
    stage.stop_container()
    stage.remove_image()
    Filler(stage.daemon.root).free()
    assert_in_order(stage)
    assert stage.daemon.layers() == []


@pytest.mark.soak
def test_starts_on_a_full_disk_and_serves_what_is_there(stage: Stage) -> None:
    stage.pull()
    stage.start_container()
    filler = Filler(stage.daemon.root)
    filler.path = stage.daemon.root / "snapshots" / next(iter(os.listdir(stage.daemon.root / "snapshots"))) / "fs/x"
    filler.fill()
    stage.daemon.kill()
    try:
        stage.start()
    except ProcessFailed:
        assert "No space left" in stage.daemon.log.read_text() or "full" in stage.daemon.log.read_text()
        raise
    assert stage.lost() == []
    stage.start_container()
    filler.free()
    assert_in_order(stage)
    stage.stop_container()
    assert_space_comes_back(stage)


@pytest.mark.soak
def test_few_descriptors(stage: Stage) -> None:
    """The limit is lowered while it runs, to what it has and a few more: calls that find none are refused in words."""
    process = stage.daemon.process
    assert process is not None
    stage.names()  # it is connected
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    has = max(int(name) for name in os.listdir(f"/proc/{process.pid}/fd")) + 1
    refused = 0
    for more in (0, 1, 2, 3, 4, 6, 8, 12, 16):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (has + more, hard))
        refused += maybe_exhausted(stage.pull)
        assert stage.daemon.alive()
        assert len(stage.committed) == 0 or stage.lost() == []
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert refused
    stage.pull()
    stage.collect()
    assert_in_order(stage)
    assert set(stage.committed) == set(chains_of(stage.tars))
    assert_space_comes_back(stage)
