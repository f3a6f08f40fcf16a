# SPDX-License-Identifier: Apache-2.0
"""`kata-overlay` by mount.fuse3, as containerd starts it where it looks into an image on the host."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.api.proto import types_pb2
from snapshotter.contracts.kata_tardev import MAX_LAYERS
from tests.differential.trees import walk
from tests.harness import BIN, SNAPSHOTTER, ProcessFailed, host_state, oci_archive, run, wait_for
from tests.integration.conftest import a_node
from tests.integration.test_host_runs import PLAIN, Entry, base, directory, tar
from tests.integration.test_kata import HOST, Kata, chain, kata, named
from tests.integration.test_snapshots_api import chain_of, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts mount.fuse3, which starts kata-overlay, has both in its PATH."""
    assert shutil.which("mount.fuse3"), "./dev setup installs fuse3"
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")


def as_containerd_does(mounts: Sequence[types_pb2.Mount], target: Path, *more: str) -> None:
    (mount,) = mounts
    name, _, kind = mount.type.partition(".")
    options = [word for option in (*mount.options, *more) for word in ("-o", option)]
    run(f"mount.{name}", mount.source, target, *options, "-t", kind)


def held(directory: Path) -> set[str]:
    """Mounts and loop devices of a test; an index that is made on the way has no path."""
    return {what for what in host_state() if str(directory) in what or "memfd:index" in what}


@contextmanager
def seen(mounts: Sequence[types_pb2.Mount], target: Path, *more: str) -> Iterator[Path]:
    target.mkdir()
    as_containerd_does(mounts, target, *more)
    try:
        yield target
    finally:
        run("umount", target)
        target.rmdir()


@pytest.mark.parametrize("layer_format", ["tarfs", "tar-index"])
@pytest.mark.parametrize("encoding", ["base64", "plain"])
def test_it_shows_what_a_container_of_the_host_would_see(tmp_path: Path, layer_format: str, encoding: str) -> None:
    with kata(tmp_path, named(layer_format, encoding=encoding) + HOST) as node:
        layers = ("a", "b", "c")
        mounts = node.api.view(node.api.key("view"), chain(node.api, *layers))
        names = unpacked_for("runc", node, layers)
        before = held(tmp_path)
        with seen(mounts, tmp_path / "kata") as target:
            tree = walk(target)
            assert (target / "b").read_text() == "b"
            with pytest.raises(OSError, match="Read-only"):
                (target / "new").touch()
        wait_for("nothing of it stays", lambda: held(tmp_path) == before)
        expected = node.api.view("default/80/expected", names, snapshotter="runc")
        (overlay,) = expected
        target = tmp_path / "host"
        target.mkdir()
        run("mount", "-t", "overlay", "overlay", target, "-o", ",".join(overlay.options))
        try:
            assert {name: (node.mode, node.content) for name, node in walk(target).items()} == {
                name: (node.mode, node.content) for name, node in tree.items()
            }
        finally:
            run("umount", target)


def unpacked_for(snapshotter: str, node: Kata, layers: Sequence[str]) -> str:
    parent = ""
    for number in range(1, len(layers) + 1):
        key = node.api.key(f"extract-1-x {chain_of(layers[:number])}")
        node.api.apply(tar_of(layers[number - 1]), node.api.prepare(key, parent, snapshotter=snapshotter))
        parent = node.api.key(chain_of(layers[:number]))
        node.api.commit(parent, key, snapshotter=snapshotter)
    return parent


@pytest.mark.parametrize("count", [1, MAX_LAYERS])
def test_one_layer_and_as_many_as_there_may_be(tmp_path: Path, count: int) -> None:
    with kata(tmp_path, named()) as node:
        mounts = node.api.view(node.api.key("view"), chain(node.api, *["a"] * count))
        before = held(tmp_path)
        # What containerd adds to look in without writing, and where SELinux is on.
        with seen(mounts, tmp_path / "m", "ro", 'context="system_u:object_r:x:s0:c1,c2"') as target:
            assert (target / "a").read_text() == "a"
        wait_for("nothing of it stays", lambda: held(tmp_path) == before)


def test_what_cannot_be_mounted_leaves_nothing(tmp_path: Path) -> None:
    with kata(tmp_path, named("tar-index")) as node:
        mounts = node.api.view(node.api.key("view"), chain(node.api, "a", "b"))
        target = tmp_path / "m"
        target.mkdir()
        before = held(tmp_path)
        good = node.link("a").read_bytes()
        node.link("a").unlink()
        for spoilt in (None, b"", good[:-1], good[:-4096] + bytes(4096), bytes(4096) + good[4096:]):
            if spoilt is not None:
                node.link("a").write_bytes(spoilt)
            with pytest.raises(ProcessFailed, match="kata-overlay"):
                as_containerd_does(mounts, target)
            wait_for("nothing of it stays", lambda: held(tmp_path) == before)
        with pytest.raises(ProcessFailed):
            run(BIN / "kata-overlay", "/", target, "-o", "rw")
        assert held(tmp_path) == before


def entries() -> list[Entry]:
    passwd = Entry("etc/passwd", data=b"root:x:0:0::/:/bin/sh\ntester:x:1234:1235::/:/bin/sh\n")
    group = Entry("etc/group", data=b"root:x:0:\ntester:x:1235:\n")
    mount_points = [directory(name) for name in ("etc", "proc", "sys", "dev", "run")]
    return [*base(), *mount_points, passwd, group]


@pytest.mark.containerd
@pytest.mark.slow
@pytest.mark.parametrize("layer_format", ["tarfs", "tar-index"])
@pytest.mark.parametrize("label", ["1.6", "later"])
def test_containerd_finds_the_user_of_an_image(tmp_path: Path, label: str, layer_format: str) -> None:
    """And runc runs it, from a file system that it cannot write to: the same helper mounts its root."""
    layers = [tar(*entries()), tar(Entry("etc/hello", data=b"hello"))]
    archive, reference = tmp_path / "image.tar", "localhost/named:1"
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    oci_archive(archive, reference, layers, PLAIN, diff_ids, {"User": "tester"})
    with a_node(tmp_path, label, named(layer_format)) as node:
        node.containerd.import_image(archive)
        out = node.containerd.says(
            "run", "--rm", "--read-only", "--snapshotter", SNAPSHOTTER, reference, "named", "/bin/busybox", "id", "-u"
        )
        assert out.strip() == "1234"


def test_killed_at_any_moment_it_leaves_nothing(tmp_path: Path) -> None:
    """Its mounts are in a namespace of its own until the last step, so whoever kills it has nothing to clean up."""
    with kata(tmp_path, named("tarfs")) as node:
        (mount,) = node.api.prepare(node.api.key("pod"), chain(node.api, *"abcdefghij"))
        target = tmp_path / "target"
        target.mkdir()
        options = [word for option in mount.options for word in ("-o", option)]
        before, ended = held(tmp_path), []
        for number in range(30):
            process = subprocess.Popen([BIN / "kata-overlay", mount.source, target, *options])
            time.sleep(number * 0.015)
            process.kill()
            ended.append(process.wait())
            if os.path.ismount(target):  # it was through before the signal
                run("umount", target)
            assert held(tmp_path) == before
            assert list(target.iterdir()) == []
        assert -signal.SIGKILL in ended
