# SPDX-License-Identifier: Apache-2.0
"""Our daemon and a containerd, started inside a guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.harness import Containerd, Daemon, host_state, releases, wait_for


@dataclass
class Node:
    daemon: Daemon
    containerd: Containerd


@contextlib.contextmanager
def a_node(directory: Path, extra: str = "") -> Iterator[Node]:
    """With the later containerd; `extra` goes to the end of our daemon's configuration. AssertionError where mounts,
    devices or processes are left behind."""
    before = host_state()
    root = directory / "containerd"
    daemon = Daemon(directory / "daemon", root / "root", extra, containerd_socket=str(root / "c.sock"))
    node = Node(daemon, Containerd(releases()["later"], root, daemon.address))
    daemon.start()
    try:
        node.containerd.start()
        yield node
    finally:
        node.containerd.clean_up()
        daemon.clean_up()
    try:
        wait_for("nothing is left behind", lambda: not host_state() - before)
    except TimeoutError:
        raise AssertionError(f"left behind: {sorted(host_state() - before)}") from None
