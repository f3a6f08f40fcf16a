# SPDX-License-Identifier: Apache-2.0
"""Layer files that go bad: found at the next start, by the next container, by fsck and by the scrub; made again from
their blob, and where there is none, the error says what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from blockdev.formats.layer_file import HEAD_BYTES
from snapshotter.metastore import Layer, LayerState
from tests.conftest import in_every_run
from tests.harness import BIN, SNAPSHOTTER, Client, Containerd, Daemon, Registry, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import HELLO
from tests.integration.test_recovery import committed, container, remove
from tests.should_fail.test_bad_layers import TAR, refused

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]


def flip(at: Callable[[Layer], int]) -> Callable[[Path, Layer], None]:
    def act(path: Path, layer: Layer) -> None:
        with path.open("r+b") as file:
            offset = at(layer)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    return act


def zero(path: Path, size_bytes: int) -> None:
    path.write_bytes(bytes(size_bytes))


DAMAGES: dict[str, Callable[[Path, Layer], None]] = {
    "truncate": lambda path, layer: os.truncate(path, layer.file_size_bytes - 4096),
    "data": flip(lambda layer: HEAD_BYTES + 1000),
    "index": flip(lambda layer: layer.data_size_bytes - 300),
    "tree": flip(lambda layer: layer.data_size_bytes + layer.tree_size_bytes - 700),
    "trailer": flip(lambda layer: layer.file_size_bytes - 500),
    "delete": lambda path, layer: path.unlink(),
    "zero": lambda path, layer: zero(path, layer.file_size_bytes),
}


@dataclass
class Stored:
    daemon: Daemon
    client: Client
    name: str  # of the committed snapshot
    path: Path
    good: bytes

    @property
    def layer(self) -> Layer:
        [layer] = self.daemon.layers()
        return layer

    def damage(self, kind: str, *, unseen: bool = False) -> None:
        """`unseen`: as a disk does it, and no program that writes to the file."""
        before = self.path.stat()
        DAMAGES[kind](self.path, self.layer)
        if unseen and self.path.exists():
            os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def lose_blob(self) -> None:
        for blob in (self.daemon.directory.parent / "containerd").rglob("blobs/sha256/*"):
            blob.unlink()

    def assert_repaired(self) -> None:
        assert self.path.read_bytes() == self.good
        assert self.layer.state is LayerState.READY
        assert fsck(self.daemon) == (0, [])


@pytest.fixture
def stored(daemon: Daemon) -> Stored:
    with daemon.client() as client:
        name = committed(daemon, client)
    [path] = daemon.layer_files()
    with daemon.client() as client:
        return Stored(daemon, client, name, path, path.read_bytes())


def fsck(daemon: Daemon, *arguments: str, command: str = "fsck") -> tuple[int, list[dict[str, str]]]:
    """Exit status and findings."""
    done = subprocess.run(
        [BIN / "tardevctl", command, *arguments, "--json", "--config", daemon.config],
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def at_boot(stored: Stored, kind: str) -> None:
    stored.daemon.stop()
    stored.damage(kind)
    stored.daemon.restart()
    aside = stored.daemon.root / "quarantine"
    assert (list(aside.iterdir()) if aside.exists() else []) == (
        [] if kind == "delete" else [aside / f"tar-index-{stored.path.name}"]
    )
    wait_for("it is repaired", lambda: stored.layer.state is LayerState.READY)


def at_prepare(stored: Stored, kind: str) -> None:
    stored.damage(kind)
    with stored.daemon.client() as client:
        container(client, "default/1/c", stored.name)
        remove(client, "default/1/c")


def by_fsck(stored: Stored, kind: str) -> None:
    stored.damage(kind, unseen=True)
    status, [found] = fsck(stored.daemon)
    assert status == 1
    assert stored.layer.diff_id in found["what"]
    assert found["outcome"] == "found"
    assert stored.layer.state is LayerState.READY  # it has only looked
    status, [found] = fsck(stored.daemon, "--repair")
    assert (status, found["outcome"]) == (0, "repaired")


def by_fsck_without_a_daemon(stored: Stored, kind: str) -> None:
    stored.daemon.stop()
    by_fsck(stored, kind)
    stored.daemon.restart()


def by_scrub(stored: Stored, kind: str) -> None:
    stored.damage(kind, unseen=True)
    status, [found] = fsck(stored.daemon, command="scrub")
    assert (status, found["outcome"]) == (0, "repaired")


WAYS = {way.__name__: way for way in (at_boot, at_prepare, by_fsck, by_fsck_without_a_daemon, by_scrub)}
CASES = [(way, kind) for way in WAYS for kind in DAMAGES]
EVERY_RUN = {("at_boot", "data"), ("at_prepare", "delete"), ("by_fsck", "index"), ("by_scrub", "tree")}


@pytest.mark.parametrize("case", in_every_run(CASES, EVERY_RUN.__contains__), ids="-".join)
def test_found_and_repaired_from_the_blob(stored: Stored, case: tuple[str, str]) -> None:
    way, kind = case
    WAYS[way](stored, kind)
    stored.assert_repaired()
    with stored.daemon.client() as client:
        container(client, "default/1/again", stored.name)


@pytest.mark.parametrize("kind", in_every_run(list(DAMAGES), "data".__eq__))
def test_without_a_blob_nobody_is_given_the_layer(stored: Stored, kind: str) -> None:
    stored.lose_blob()
    stored.damage(kind)
    with stored.daemon.client() as client:
        for _ in range(2):
            error = refused(lambda: container(client, "default/1/c", stored.name))
            assert error.code() is grpc.StatusCode.DATA_LOSS
            assert stored.layer.diff_id in error.details()
            assert "its blob is not in containerd's content store" in error.details()
            assert "tardevctl fsck --repair" in error.details()
    assert not stored.daemon.mounts()
    status, findings = fsck(stored.daemon, "--repair")
    assert status == 1
    assert [found["outcome"] for found in findings if stored.layer.diff_id in found["what"]] == ["not repaired"]
    stored.daemon.stop()
    stored.daemon.restart()
    assert stored.layer.state is LayerState.BROKEN
    with stored.daemon.client() as client:
        assert refused(lambda: container(client, "default/1/c", stored.name)).code() is grpc.StatusCode.DATA_LOSS


def test_what_is_mounted_is_the_new_file_for_who_comes_from_now_on(stored: Stored) -> None:
    with stored.daemon.client() as client:
        container(client, "default/1/old", stored.name)
        [point] = stored.daemon.mounts()
        kept = os.open(Path(point, "b"), os.O_RDONLY)
        stored.damage("data")
        container(client, "default/1/new", stored.name)
        assert stored.daemon.mounts() == [point, point]  # on top of the other one
        assert TAR.find(Path(point, "a").read_bytes()) == 512
        # Who has the old one open keeps it.
        assert os.pread(kept, 1 << 20, 0) == Path(point, "b").read_bytes()
        os.close(kept)
        for key in ("old", "new"):
            remove(client, f"default/1/{key}")
    wait_for("both are unmounted", lambda: not stored.daemon.mounts())
    stored.assert_repaired()


def test_what_is_left_over_is_found_and_removed_beside_the_daemon(stored: Stored) -> None:
    root = stored.daemon.root
    strays = [root / "staging" / "stray", root / "layers" / "tar-index" / ("0" * 64), root / "snapshots" / "999"]
    for stray in strays[:2]:
        stray.write_bytes(b"x")
    strays[2].mkdir()
    status, findings = fsck(stored.daemon)
    assert (status, len(findings)) == (1, 3)
    assert all(stray.exists() for stray in strays)
    status, findings = fsck(stored.daemon, "--repair")
    assert (status, {found["outcome"] for found in findings}) == (0, {"repaired"})
    assert not any(stray.exists() for stray in strays)
    wait_for("the trash is empty", lambda: not list((root / "trash").iterdir()))
    stored.assert_repaired()


def test_the_daemon_scrubs_by_itself(stored: Stored) -> None:
    daemon = stored.daemon
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + "\n[scrub]\ninterval = 1\n")
    daemon.restart()
    stored.damage("tree", unseen=True)
    wait_for("it is repaired", lambda: daemon.metric("tardev_layers_repaired_total") == 1)
    stored.assert_repaired()


@pytest.mark.containerd
@pytest.mark.slow
def test_the_error_has_the_command_that_helps(later_node: Node, registry: Registry, images: Path) -> None:
    containerd, daemon = later_node.containerd, later_node.daemon
    reference = registry.push(images / "layers.tar", "layers:damaged")
    containerd.pull(reference)
    top = next(layer for layer in daemon.layers() if layer.shared_by and layer.tar_size_bytes > 10_000)
    path = daemon.root / "layers" / "tar-index" / top.diff_id.removeprefix("sha256:")
    good = path.read_bytes()
    DAMAGES["data"](path, top)
    for digest in containerd.ctr("content", "list", "-q").split():
        # The config and manifests stay: containerd needs them, too.
        if (containerd.root / "io.containerd.content.v1.content/blobs/sha256" / digest[7:]).stat().st_size > 5000:
            containerd.ctr("content", "rm", digest)
    said = fails(containerd, reference)
    assert top.diff_id in said
    found = re.search(r"run: (ctr -n default content fetch \S+) && (tardevctl fsck --repair)", said)
    assert found, said
    assert reference in found[1]
    containerd.ctr(*shlex.split(found[1])[3:5], "--plain-http", *shlex.split(found[1])[5:])
    status, findings = fsck(daemon, "--repair")
    assert (status, [each["outcome"] for each in findings]) == (0, ["repaired"])
    assert path.read_bytes() == good
    assert containerd.cat(reference, "again", "/etc/hello").strip() == HELLO["layers"]


def fails(containerd: Containerd, reference: str) -> str:
    done = subprocess.run(
        [containerd.release.ctr, "--address", containerd.address, "run", "--rm", "--snapshotter", SNAPSHOTTER,
         reference, "damaged", "/bin/true"],
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode
    return done.stderr.decode()
