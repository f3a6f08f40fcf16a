# SPDX-License-Identifier: Apache-2.0
"""Which layers go when no snapshot refers to them, which never go, and what is said of the room they take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.metastore import Kind
from tests.harness import Daemon, wait_for
from tests.integration.test_snapshots_api import Api, digest_of, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]


@contextmanager
def restarted(daemon: Daemon, extra: str) -> Iterator[Api]:
    """It knows of no layer that it has just handed out."""
    daemon.stop()
    text = daemon.config.read_text().partition("\n[cache]")[0]
    daemon.config.write_text(f"{text}\n[cache]\n{extra}\n")
    daemon.restart()
    with daemon.client() as client:
        yield Api(daemon, client)


def stored(daemon: Daemon) -> set[str]:
    return {layer.diff_id for layer in daemon.layers()}


def test_the_longest_unused_go_first(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        names = {text: api.layer(text) for text in ("a", "b", "c")}
    size_bytes = daemon.layers()[0].file_size_bytes
    with restarted(daemon, f'max_size = "{2 * size_bytes}"') as api:
        for text in ("b", "c", "a"):
            api.remove(names[text])
        api.cleanup()
        assert stored(daemon) == {digest_of(tar_of("c")), digest_of(tar_of("a"))}
        wait_for("its file is gone", lambda: len(daemon.layer_files()) == 2)


def test_what_nobody_has_used_for_long_goes_though_there_is_room(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        names = {text: api.layer(text) for text in ("a", "b", "c")}
    with restarted(daemon, "max_age = 1.0") as api:
        api.remove(names["a"])
        time.sleep(1.1)
        api.remove(names["b"])
        api.cleanup()
        assert stored(daemon) == {digest_of(tar_of("b")), digest_of(tar_of("c"))}


@pytest.mark.parametrize("serving", [True, False])
def test_all_can_be_collected_by_hand(daemon: Daemon, serving: bool) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        api.layer("a")
        api.remove(api.layer("b"))
    daemon.stop()
    if serving:
        daemon.restart()
    assert daemon.tardevctl("gc") == {"layers": 0, "size_bytes": 0}
    size_bytes = next(layer.file_size_bytes for layer in daemon.layers() if not layer.shared_by)
    assert daemon.tardevctl("gc", "--all") == {"layers": 1, "size_bytes": size_bytes}
    assert stored(daemon) == {digest_of(tar_of("a"))}


def test_what_somebody_has_open_stays_his(daemon: Daemon) -> None:
    """As a VM has it: the layer goes, its bytes stay until that ends."""
    with daemon.client() as client:
        api = Api(daemon, client)
        name = api.layer("a")
    [path] = daemon.layer_files()
    good = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    try:
        with restarted(daemon, 'max_size = "0"') as api:
            api.remove(name)
            api.cleanup()
            assert not daemon.layer_files()
            wait_for("the trash is empty", lambda: not list((daemon.root / "trash").iterdir()))
            assert os.pread(fd, len(good) + 1, 0) == good
    finally:
        os.close(fd)


def test_usage_is_what_the_disk_says(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        for text in ("a", "b"):
            api.layer(text)
        container = api.key("c")
        api.prepare(container)
        [directory] = (daemon.root / "snapshots").iterdir()
        (directory / "fs" / "file").write_bytes(bytes(100_000))
        os.sync()
        names = [snapshot.name for snapshot in daemon.snapshots() if snapshot.kind is Kind.COMMITTED]
        said = sum(api.usage(name)[0] for name in names) + api.usage(container)[0]
    found = sum(path.stat().st_blocks * 512 for path in daemon.layer_files()) + allocated(directory / "fs")
    block_bytes = os.statvfs(daemon.root).f_frsize
    assert abs(said - found) <= block_bytes * (len(names) + 1)


def allocated(directory: Path) -> int:
    paths = [directory, *directory.rglob("*")]
    return sum(path.lstat().st_blocks * 512 for path in paths)
