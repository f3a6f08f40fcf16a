# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.conftest import in_every_run
from tests.harness import Containerd, Daemon, Registry, Release, host_state, releases, wait_for

MakeContainerd: TypeAlias = Callable[[Release, Path, Path], Containerd]  # its directory, our daemon's address


@dataclass
class Node:
    """A containerd and our daemon, each with its own directories."""

    daemon: Daemon
    containerd: Containerd

    def clean_up(self) -> None:
        self.containerd.clean_up()
        self.daemon.clean_up()


def make_node(directory: Path, label: str, extra: str = "", make: MakeContainerd = Containerd) -> Node:
    """`label` as in harness.releases(); `extra` goes to the end of our daemon's configuration."""
    release = releases()[label]
    if label == "later":
        assert release.version >= (2, 1)
    sys.stdout.write(f"containerd {'.'.join(map(str, release.version))} ({label})\n")
    root = directory / "containerd"
    daemon = Daemon(directory / "daemon", root / "root", extra, containerd_socket=str(root / "c.sock"))
    node = Node(daemon, make(release, root, daemon.address))
    daemon.start()
    node.containerd.start()
    return node


@contextmanager
def a_node(directory: Path, label: str, extra: str = "", make: MakeContainerd = Containerd) -> Iterator[Node]:
    """The test fails if the machine is not as it was when the node has gone."""
    before = host_state()
    made = make_node(directory, label, extra, make)
    try:
        yield made
    finally:
        made.clean_up()
    try:
        wait_for("nothing is left behind", lambda: not host_state() - before)
    except TimeoutError:
        raise AssertionError(f"left behind: {sorted(host_state() - before)}") from None


@pytest.fixture(params=in_every_run(["system", "later"], lambda label: label == "later"))
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    """For a test of its own, on a later containerd and, in ./dev soak, on Debian's own."""
    with a_node(tmp_path, request.param) as made:
        yield made


@pytest.fixture
def later_node(tmp_path: Path) -> Iterator[Node]:
    with a_node(tmp_path, "later") as made:
        yield made


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    server = Registry(tmp_path_factory.mktemp("registry"))
    server.start()
    yield server
    server.stop()
