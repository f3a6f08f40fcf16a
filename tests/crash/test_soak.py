# SPDX-License-Identifier: Apache-2.0
"""Many containers come and go by a real containerd and runc, while the daemon is killed now and then; and imports that
are killed at random moments, ours beside containerd's own overlayfs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockdev.kernel.mounts import mounted_below
from tests.crash import oracle
from tests.crash.journeys import allocated_bytes
from tests.crash.report import say
from tests.harness import SNAPSHOTTER, Containerd, Daemon, ProcessFailed, host_state, releases, wait_for
from tests.integration.conftest import Node, a_node
from tests.integration.test_host_runs import Entry, base, directory, import_image, tar

pytestmark = [
    pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow, pytest.mark.soak,
]  # fmt: skip

CYCLES = int(os.environ.get("TARDEV_SOAK_CYCLES", "1000"))
AT_ONCE = 20
KILLS_OF_IMPORTS = int(os.environ.get("TARDEV_SOAK_KILLS", "30"))
_BETWEEN_KILLS_SECONDS = (2.0, 8.0)
_RSS_GROWTH_BYTES = 16 << 20
# All that it reads, and what came of it, one line for each time.
_HASHES = (
    "while :; do busybox find bin data -type f -exec busybox sha256sum {} + 2>&1 |"
    " busybox sort | busybox sha256sum; done"
)


def rss_bytes(daemon: Daemon) -> int:
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def data(number: int) -> bytes:
    """A layer of some megabytes, in files of odd sizes."""
    seed = random.Random(number)
    files = [Entry(f"data/{number}-{each}", data=seed.randbytes(seed.randrange(1, 400_000))) for each in range(12)]
    return tar(directory("data"), *files)


@dataclass
class Counts:
    cycles: int = 0
    retries: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class State:
    mounts: int
    loop_devices: int
    open_files: int
    rss_bytes: int
    disk_bytes: int
    database_bytes: int
    snapshots: int
    layers: int

    @classmethod
    def of(cls, daemon: Daemon) -> State:
        return cls(
            len(daemon.mounts()),
            # Of ours alone: this number is the whole machine's.
            len([what for what in host_state() if what.startswith(f"loop device over {daemon.directory}")]),
            oracle.open_files(daemon),
            rss_bytes(daemon),
            allocated_bytes(daemon.root),
            sum(path.stat().st_size for path in daemon.root.glob("metadata.db*")),
            len(daemon.snapshots()),
            len(daemon.layers()),
        )


@contextlib.contextmanager
def killed_now_and_then(daemon: Daemon, counts: Counts) -> Iterator[None]:
    stop, chance = threading.Event(), random.Random(8)

    def run() -> None:
        while not stop.wait(chance.uniform(*_BETWEEN_KILLS_SECONDS)):
            daemon.kill()
            daemon.restart()
            counts.kills += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def cycle(containerd: Containerd, reference: str, number: int, counts: Counts) -> None:
    """Create, run, remove; begun again, as an orchestrator would, where the daemon was away."""
    deadline = time.monotonic() + 300
    tries = 0
    while True:
        tries += 1
        name = f"cycle-{number}-{tries}"
        try:
            out = containerd.run_container(reference, name, "/bin/busybox", "head", "-c", "7", "data/1-1")
            with counts.lock:
                counts.cycles += 1
                counts.retries += tries - 1
            del out  # `ctr` may end before it has read all of it
            return
        except ProcessFailed as error:
            if time.monotonic() > deadline:
                with counts.lock:
                    counts.failed.append(f"{number}: {error}")
                return
        for command in (("tasks", "delete", "--force", name), ("containers", "delete", name)):
            with contextlib.suppress(ProcessFailed):
                containerd.ctr(*command)
        with contextlib.suppress(ProcessFailed):
            containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "rm", name)
        time.sleep(0.5)


def run_cycles(containerd: Containerd, reference: str, numbers: range, counts: Counts) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda number: cycle(containerd, reference, number, counts), numbers))


def settled(node: Node, mounts: int, snapshots: int) -> None:
    node.containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    node.containerd.collect_until(
        "what the cycles have left is collected",
        lambda: len(node.daemon.mounts()) == mounts and len(node.daemon.snapshots()) == snapshots,
    )


@pytest.mark.timeout(7200)
def test_a_thousand_containers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    counts = Counts()
    with a_node(tmp_path, "later") as node:
        containerd, daemon = node.containerd, node.daemon
        layers = [tar(*base()), *(data(number) for number in range(4))]
        reference = import_image(containerd, "soak", layers, tmp_path, SNAPSHOTTER)
        log = tmp_path / "hashes"
        containerd.ctr(
            "run", "-d", "--log-uri", f"file://{log}", "--snapshotter", SNAPSHOTTER, reference, "hashing",
            "/bin/sh", "-c", f"PATH=/bin; {_HASHES}",
        )  # fmt: skip
        # Warm: what a first container brings into memory stays.
        run_cycles(containerd, reference, range(AT_ONCE), Counts())
        mounts, snapshots = len(layers), len(layers) + 1
        settled(node, mounts, snapshots)
        first = State.of(daemon)
        started = time.monotonic()
        with killed_now_and_then(daemon, counts):
            run_cycles(containerd, reference, range(CYCLES), counts)
        settled(node, mounts, snapshots)
        # Of one process: no kill in between gives anything back.
        run_cycles(containerd, reference, range(CYCLES, CYCLES + AT_ONCE), Counts())
        settled(node, mounts, snapshots)
        left = oracle.leftovers(daemon)
        second = State.of(daemon)
        rest = Counts()
        run_cycles(containerd, reference, range(CYCLES + AT_ONCE, CYCLES + AT_ONCE + CYCLES // 5), rest)
        settled(node, mounts, snapshots)
        last = State.of(daemon)
        seconds = time.monotonic() - started
        hashes = log.read_text().splitlines()
        broken = oracle.broken(daemon)
        containerd.retry("tasks", "kill", "-s", "SIGKILL", "hashing")
        wait_for("it has ended", lambda: "RUNNING" not in containerd.ctr("tasks", "list"))
        containerd.ctr("tasks", "delete", "hashing")
        containerd.ctr("containers", "delete", "hashing")
        containerd.collect_until("nothing is mounted", lambda: not daemon.mounts())
    say(
        request,
        f"{counts.cycles} of {CYCLES} cycles, {AT_ONCE} at a time, {counts.kills} kills, {counts.retries} begun again;"
        f" then {rest.cycles} without a kill; {seconds:.0f} s",
        f"hashed {len(hashes)} times, {len(set(hashes))} result",
        f"before: {first}",
        f"after the kills: {second}",
        f"at the end: {last}",
    )
    assert counts.failed == rest.failed == []
    assert counts.kills
    assert left == broken == []
    assert len(hashes) > 1
    assert len(set(hashes)) == 1
    for state in (second, last):
        assert (state.mounts, state.loop_devices) == (first.mounts, first.loop_devices)
        assert (state.snapshots, state.layers) == (first.snapshots, first.layers)
        assert state.disk_bytes <= first.disk_bytes + (1 << 20)  # what the hashing container may have written
    assert abs(last.open_files - second.open_files) <= 2
    assert last.rss_bytes - second.rss_bytes < _RSS_GROWTH_BYTES


@dataclass
class Left:
    """Of one snapshotter, after all kills and retries; and when its image is gone."""

    kills: int = 0
    broken: int = 0
    staged: int = 0
    directories: int = 0
    mounts: int = 0


def kill_an_import(node: Containerd, archive: Path, snapshotter: str, victim: Callable[[], None], after: float) -> None:
    process = subprocess.Popen(
        [str(node.release.ctr), "--address", str(node.address), "images", "import", "--snapshotter", snapshotter,
         str(archive)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(after)
    victim()
    process.send_signal(signal.SIGKILL)
    process.wait()


def remove_image(containerd: Containerd, reference: str) -> None:
    with contextlib.suppress(ProcessFailed):
        containerd.retry("images", "delete", "--sync", reference)
    # An import that was cut holds what it had until its lease ends, a day later.
    for lease in containerd.retry("leases", "list", "-q").split():
        containerd.retry("leases", "delete", "--sync", lease)


@pytest.mark.timeout(3600)
def test_imports_killed_at_random(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """containerd with its overlayfs is killed as a whole, for the snapshotter is a part of it; of ours, the daemon."""
    chance = random.Random(9)
    layers = [tar(*base()), *(data(number) for number in range(6))]
    ours, theirs = Left(), Left()
    with a_node(tmp_path / "ours", "later") as node:
        reference = import_image(node.containerd, "kills", layers, tmp_path, SNAPSHOTTER)
        archive = tmp_path / "kills.tar"
        for _ in range(KILLS_OF_IMPORTS):
            remove_image(node.containerd, reference)
            kill_an_import(node.containerd, archive, SNAPSHOTTER, node.daemon.kill, chance.uniform(0, 1.5))
            node.daemon.restart()
            ours.kills += 1
            ours.broken += len(oracle.broken(node.daemon))
            left = oracle.leftovers(node.daemon)
            ours.staged += len([what for what in left if what.startswith("staged")])
            ours.directories += len([what for what in left if "directory" in what])
            ours.mounts += len([what for what in left if "mount" in what])
            node.containerd.retry("images", "import", "--snapshotter", SNAPSHOTTER, archive)
        remove_image(node.containerd, reference)
        node.containerd.collect_until("all snapshots are gone", lambda: not node.daemon.snapshots())
        assert oracle.leftovers(node.daemon) == []
    containerd = Containerd(releases()["later"], tmp_path / "theirs", tmp_path / "nobody.sock", snapshotters=())
    containerd.start()
    try:
        place = containerd.root / "io.containerd.snapshotter.v1.overlayfs/snapshots"
        for _ in range(KILLS_OF_IMPORTS):
            remove_image(containerd, reference)
            kill_an_import(containerd, archive, "overlayfs", containerd.kill, chance.uniform(0, 1.5))
            containerd.start()
            theirs.kills += 1
            containerd.retry("images", "import", "--snapshotter", "overlayfs", archive)
            # Directories that its own metadata does not know: of the image there is one for each layer.
            names = [path.name for path in place.iterdir()]
            theirs.staged += len([name for name in names if name.startswith("new-")])
        remove_image(containerd, reference)
        with contextlib.suppress(TimeoutError):
            wait_for("its snapshots are gone", lambda: not list(place.iterdir()), 20)
        theirs.directories = len(list(place.iterdir()))
        theirs.mounts = len(mounted_below(containerd.directory))
        rows = containerd.ctr("snapshots", "--snapshotter", "overlayfs", "list").splitlines()[1:]
    finally:
        containerd.clean_up()
    say(request, f"ours: {ours}", f"overlayfs: {theirs}, snapshots in its metadata: {len(rows)}")
    assert ours == Left(kills=KILLS_OF_IMPORTS)
