# SPDX-License-Identifier: Apache-2.0
"""The daemon is killed under a real containerd, whose retry then succeeds. At every step of every journey, without a
containerd: tests/crash.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.crash import oracle
from tests.harness import ProcessFailed, check_tree, host_state, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import promised, reference

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

BUILD = ["prepare.created", "build.staged", "build.built", "publish.staged", "publish.synced", "publish.renamed",
         "publish.in_transaction", "build.published", "build.recorded"]  # fmt: skip
COMMIT = ["commit.checked", "commit.committed"]
PARENTS = ["publish.table_renamed", "made.published"]
APPLY = ["apply.built", "apply.recorded"]  # not with 1.6, which has no differ
# On both sides of what a start has to tell apart: a file without a row, a snapshot. 1.6 enters the same steps by
# another way, and builds in Commit too.
EVERY_RUN: dict[str, set[str]] = {"system": set(), "later": {"publish.renamed", "commit.committed"}}


# runc keeps the state of all containerds of a machine in one place.
RUNNING = f"running-{os.getpid()}"


def start_container(node: Node, images: Path) -> None:
    node.containerd.import_image(images / "hello.tar")
    node.containerd.ctr("run", "-d", "--snapshotter", "tardev-host", reference("hello"), RUNNING, "/bin/sleep", "1000")


def assert_it_runs(node: Node) -> None:
    """Programs that were not loaded yet still start: their bytes come through the layer's mount."""
    assert RUNNING in node.containerd.retry("tasks", "list").split()
    out = node.containerd.says("tasks", "exec", "--exec-id", os.urandom(4).hex(), RUNNING, "/bin/cat", "/etc/hello")
    assert out.strip() == "hello from a tar layer"


def kill_during(node: Node, point: str, *arguments: str | Path) -> None:
    """Run ctr with a daemon that dies at the point, and start the daemon again."""
    daemon = node.daemon
    daemon.stop()
    daemon.restart({"TARDEV_TRACE_KILL": point})
    node.containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
    with pytest.raises(ProcessFailed):
        node.containerd.ctr(*arguments)
    daemon.await_kill()
    daemon.restart()
    # What was left is gone at once; a build that an unpacker may still wait for begins again.
    assert_in_order(node)


def assert_in_order(node: Node) -> None:
    assert oracle.broken(node.daemon) == []
    assert oracle.leftovers(node.daemon) == []


@pytest.mark.parametrize(
    ("node", "point"),
    [
        pytest.param(label, point, marks=() if point in EVERY_RUN[label] else pytest.mark.soak)
        for label, points in {"system": BUILD + COMMIT, "later": BUILD + APPLY + COMMIT + PARENTS}.items()
        for point in points
    ],
    indirect=["node"],
)
def test_killed_in_a_pull(node: Node, images: Path, tmp_path: Path, point: str) -> None:
    start_container(node, images)
    arguments = ("images", "import", "--snapshotter", "tardev-host", images / "layers.tar")
    # the fourth layer's turn: some are there, some are not; the last one alone has a table and needs a parents layer
    kill_during(node, point if point in PARENTS else f"{point}:3", *arguments)
    assert_it_runs(node)
    node.containerd.retry(*arguments)
    with node.containerd.rootfs(promised(images, "layers")["chain_ids"][-1], tmp_path / "m") as rootfs:
        assert check_tree(images / "layers.json", rootfs) == ""
    assert_it_runs(node)
    assert_in_order(node)
    assert len(node.daemon.layer_files()) == 8 + 1  # and the parents layer


@pytest.mark.parametrize("point", ["remove.begun", "remove.removed"])
def test_killed_in_a_remove(node: Node, images: Path, point: str) -> None:
    start_container(node, images)
    containerd, daemon = node.containerd, node.daemon
    containerd.ctr(
        "snapshots", "--snapshotter", "tardev-host", "prepare", "other", promised(images, "hello")["chain_ids"][0]
    )
    before = len(daemon.snapshots())
    daemon.stop()
    daemon.restart({"TARDEV_TRACE_KILL": point})
    containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
    # containerd removes it from its own records and leaves ours to its garbage collector
    containerd.ctr("snapshots", "--snapshotter", "tardev-host", "rm", "other")
    daemon.await_kill()
    daemon.restart()
    assert_it_runs(node)

    def removed() -> bool:
        # containerd collects a snapshotter's garbage after a removal from it, and does not come back by itself
        key = os.urandom(4).hex()
        containerd.retry("snapshots", "--snapshotter", "tardev-host", "prepare", key)
        containerd.retry("snapshots", "--snapshotter", "tardev-host", "rm", key)
        time.sleep(0.5)
        return len(daemon.snapshots()) == before - 1

    wait_for("the snapshot is gone", removed)
    rows = {str(row["name"]) for row in daemon.tardevctl("snapshots")}
    assert not any(name.endswith("/other") for name in rows)
    wait_for("only the container's directory stays", lambda: len(list((daemon.root / "snapshots").iterdir())) == 1)
    assert_it_runs(node)
    assert_in_order(node)


@pytest.mark.soak
@pytest.mark.parametrize("point", ["ingest.written", "ingest.committed"])
def test_killed_in_a_diff(later_node: Node, images: Path, point: str) -> None:
    """What a container wrote, as a blob of containerd's: it is there once, and the retry has it."""
    containerd = later_node.containerd
    start_container(later_node, images)
    (directory,) = (later_node.daemon.root / "snapshots").iterdir()
    (directory / "fs/etc").mkdir()
    (directory / "fs/etc/written").write_text("by a container")
    arguments = ("snapshots", "--snapshotter", "tardev-host", "diff", "--keep", RUNNING)
    before = set(containerd.ctr("content", "list", "-q").split())
    kill_during(later_node, point, *arguments)
    assert_it_runs(later_node)
    containerd.retry(*arguments)
    assert len(set(containerd.ctr("content", "list", "-q").split()) - before) == 1
    assert_it_runs(later_node)
    assert_in_order(later_node)


def test_a_running_container_outlives_a_killed_daemon(node: Node, images: Path) -> None:
    start_container(node, images)
    node.daemon.kill()
    assert_it_runs(node)
    node.daemon.restart()
    assert len(node.daemon.mounts()) == 1
    assert_it_runs(node)
    # its back-off over, or its garbage collector would fail once and not come back
    node.containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
    node.containerd.retry("tasks", "kill", "-s", "SIGKILL", RUNNING)
    wait_for("the task ends", lambda: "RUNNING" not in node.containerd.ctr("tasks", "list"))
    node.containerd.ctr("tasks", "delete", RUNNING)
    node.containerd.ctr("containers", "delete", RUNNING)
    node.containerd.collect_until("its mount is released", lambda: not node.daemon.mounts())


def test_workers_die_with_the_daemon(later_node: Node, images: Path, tmp_path: Path) -> None:
    before = host_state()
    later_node.daemon.stop()
    later_node.daemon.restart({"TARDEV_TRACE_PAUSE": f"build.staged={tmp_path / 'go'}"})
    process = subprocess.Popen(
        [str(later_node.containerd.release.ctr), "--address", str(later_node.containerd.address), "images", "import",
         "--snapshotter", "tardev-host", str(images / "hello.tar")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for("a build is staged", lambda: later_node.daemon.staged())
    later_node.daemon.kill()
    assert process.wait(60) != 0
    later_node.daemon.restart()
    wait_for("staging is empty", lambda: not later_node.daemon.staged())
    assert not [what for what in host_state() - before if "blockdev.workers" in what]
