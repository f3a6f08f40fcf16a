# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: verified layers of containers that start at once, and of a daemon that dies while it mounts them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from tests.harness import SNAPSHOTTER, ProcessFailed, host_state, run, wait_for
from tests.nodes.node import Node, a_node

REQUIRE = '[host]\nverity = "require"\n'
LAYERS = "localhost/tardev-test/layers:latest"
POINTS = ("activation.made:3", "activation.mounted:3")


def devices() -> list[str]:
    """Names of all dm devices, as dmsetup says."""
    return sorted(line.split()[0] for line in run("dmsetup", "ls").splitlines() if line.startswith("tardev-"))


def loops() -> list[str]:
    return [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]


def start(node: Node, name: str) -> None:
    node.containerd.retry("run", "-d", "--snapshotter", SNAPSHOTTER, LAYERS, name, "/bin/sleep", "1000")


def delete(node: Node, *names: str) -> None:
    for name in names:
        node.containerd.retry("tasks", "delete", "--force", name)
        node.containerd.retry("containers", "delete", name)


def at_once(node: Node) -> int:
    """Two containers of one chain share its devices, and neither is late or wrong for the other; how many."""
    threads = [threading.Thread(target=start, args=(node, name)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [path for path in loops() if str(node.daemon.root) in path]
    assert len(files) == len(set(files)) == len(devices()), (files, devices())
    for name in ("left", "right"):
        assert node.containerd.says("tasks", "exec", "--exec-id", os.urandom(4).hex(), name, "/bin/echo", "here")
    delete(node, "left")
    shared = devices()
    assert shared
    delete(node, "right")
    wait_for("the devices go with the containers", lambda: not devices() and not loops())
    return len(shared)


def killed_while_it_mounts(node: Node, point: str) -> None:
    node.daemon.stop()
    node.daemon.restart({"TARDEV_TRACE_KILL": point})
    node.containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    failure(lambda: node.containerd.ctr("run", "--rm", "--snapshotter", SNAPSHOTTER, LAYERS, "killed", "/bin/true"))
    node.daemon.await_kill()
    node.daemon.restart()
    # containerd looks for what it does not know of after a removal, not before.
    node.containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "other")
    node.containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "rm", "other")
    node.containerd.collect_until("nothing of it is left", lambda: not devices() and not loops())


def failure(call: Callable[[], object]) -> str:
    """What it says of its failure."""
    try:
        said = call()
    except ProcessFailed as error:
        return str(error)
    raise AssertionError(f"it went through: {said!r}")


def main() -> None:
    before = host_state()
    with a_node(Path("/tmp/node"), REQUIRE) as node:
        node.containerd.import_image(Path("images/layers.tar"))
        shared = at_once(node)
        for point in POINTS:
            killed_while_it_mounts(node, point)
    assert host_state() == before
    print(json.dumps({"shared": shared, "killed": len(POINTS), "devices": devices(), "loops": loops()}))


if __name__ == "__main__":
    main()
