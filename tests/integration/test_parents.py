# SPDX-License-Identifier: Apache-2.0
"""Parents layers on a real daemon: on top of the mounts, shared, collected, and made again when they are lost."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev.formats.layer_file import of_chain
from snapshotter import metastore
from snapshotter.api.proto import snapshots_pb2, types_pb2
from snapshotter.metastore import Layer, LayerState
from tests.golden.make_tars import EOA, PX, D, F
from tests.harness import SNAPSHOTTER, Client, Daemon, wait_for
from tests.integration.test_recovery import container, remove
from tests.integration.test_snapshots_api import digest_of
from tests.property import parents_model
from tests.should_fail.test_bad_layers import OCI, apply, prepare, put, refused

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]

LOW = PX((b"SCHILY.xattr.user.low", b"1")) + D(b"a/", mode=0o2750, uid=7, gid=8) + D(b"plain/") + F(b"a/x") + EOA
ADDS = F(b"a/y") + EOA
PLAIN = F(b"plain/y") + EOA
COVERS = D(b"a/", mode=0o700) + EOA


def chain_id(tars: Sequence[bytes]) -> str:
    found = ""
    for tar in tars:
        found = digest_of(f"{found} {digest_of(tar)}".encode()) if found else digest_of(tar)
    return found


def commit(client: Client, name: str, key: str, parent: str = "") -> None:
    request = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=name, key=key, parent=parent)
    client.snapshots.Commit(request, timeout=30)


def image(daemon: Daemon, client: Client, *tars: bytes, number: int = 1) -> str:
    """The name of the last snapshot of the chain. What is there already is taken."""
    there, name = {snapshot.name for snapshot in metastore.read(database(daemon))[0]}, ""
    for length in range(1, len(tars) + 1):
        parent, name = name, f"default/{number}/{chain_id(tars[:length])}"
        if name not in there:
            key, mounts = prepare(client, chain_id(tars[:length]), parent)
            apply(client, put(daemon, tars[length - 1]), OCI, mounts)
            commit(client, name, key)
    return name


def database(daemon: Daemon) -> Path:
    return daemon.root / metastore.FILE_NAME


def of_chains(daemon: Daemon) -> list[Layer]:
    return [layer for layer in metastore.read(database(daemon))[1] if of_chain(layer.format)]


def parents_of(daemon: Daemon, name: str) -> str:
    snapshots, layers = metastore.read(database(daemon))
    by_id = {layer.id: layer.diff_id for layer in layers}
    (found,) = [snapshot.parents_layer_id for snapshot in snapshots if snapshot.name == name]
    return by_id[found] if found is not None else ""


@contextmanager
def mounted(answer: list[Any], target: Path) -> Iterator[Path]:
    (mount,) = answer
    assert isinstance(mount, types_pb2.Mount)
    target.mkdir(exist_ok=True)
    options = ",".join(mount.options)
    subprocess.run(["mount", "-t", mount.type, mount.source, "-o", options, target], check=True, timeout=60)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True, timeout=60)


def check_attributes(directory: Path) -> None:
    status = (directory / "a").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o2750, 7, 8)
    assert os.getxattr(directory / "a", "user.low") == b"1"
    assert sorted(os.listdir(directory / "a")) == ["x", "y"]


@pytest.mark.parametrize("layer_format", ["tar-index", "erofs-4k"])
def test_a_container_sees_the_lower_layers_attributes(daemon: Daemon, layer_format: str, tmp_path: Path) -> None:
    with daemon.client() as client:
        name = image(daemon, client, LOW, ADDS)
        (layer,) = of_chains(daemon)
        assert parents_of(daemon, name) == layer.diff_id
        assert layer.shared_by == 1
        assert [row["diff_id"] for row in daemon.tardevctl("layers") if of_chain(row["format"])] == [layer.diff_id]
        assert [row["parents_layer"] for row in daemon.tardevctl("snapshots")] == ["", layer.diff_id]
        expected = parents_model.layer_file([LOW, ADDS], layer_format)
        assert expected is not None
        assert (daemon.root / f"layers/{layer_format}-parents" / expected.diff_id.hex()).read_bytes() == expected.file
        with mounted(container(client, "default/1/c", name), tmp_path / "m") as directory:
            check_attributes(directory)
            (directory / "a/z").write_text("a container may write there")
        assert len(daemon.mounts()) == 3
        remove(client, "default/1/c")
        wait_for("every mount is released", lambda: not daemon.mounts())


def test_chains_that_need_none_have_none(daemon: Daemon) -> None:
    with daemon.client() as client:
        image(daemon, client, LOW, PLAIN)
        name = image(daemon, client, LOW, COVERS)
        assert not of_chains(daemon)
        assert parents_of(daemon, name) == ""


def test_every_layer_of_a_chain_has_its_own(daemon: Daemon) -> None:
    with daemon.client() as client:
        first, second = image(daemon, client, LOW, ADDS), image(daemon, client, LOW, ADDS, PLAIN)
        third = image(daemon, client, LOW, ADDS, PLAIN, COVERS)
        assert parents_of(daemon, first) == parents_of(daemon, second) != ""
        assert parents_of(daemon, third) == ""
        assert [layer.shared_by for layer in of_chains(daemon)] == [2]


def test_a_parent_that_only_commit_brings(daemon: Daemon) -> None:
    """As in a parallel unpack, where Apply knows of none."""
    with daemon.client() as client:
        low = image(daemon, client, LOW)
        name = f"default/1/{chain_id([LOW, ADDS])}"
        key, mounts = prepare(client, chain_id([LOW, ADDS]))
        apply(client, put(daemon, ADDS), OCI, mounts)
        commit(client, name, key, low)
        assert parents_of(daemon, name) == of_chains(daemon)[0].diff_id


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[Daemon]:
    """Keeps nothing that is not in use."""
    (tmp_path / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    server = Daemon(tmp_path / "daemon", tmp_path / "containerd", '[cache]\nmax_size = "0"\n')
    server.start()
    yield server
    server.clean_up()


def test_it_goes_with_the_last_chain_that_needs_it(cold: Daemon) -> None:
    def sweep() -> None:
        # What was handed out lately is spared: a new daemon has handed out nothing.
        cold.stop()
        cold.restart()
        with cold.client() as client:
            client.snapshots.Cleanup(snapshots_pb2.CleanupRequest(snapshotter=SNAPSHOTTER), timeout=30)

    with cold.client() as client:
        name = image(cold, client, LOW, ADDS)
        other = image(cold, client, LOW, ADDS, number=2)
        container(client, "default/1/c", other)
    assert len(cold.mounts()) == 3
    sweep()
    assert len(of_chains(cold)) == 1
    with cold.client() as client:
        remove(client, name)
        sweep()
    assert len(of_chains(cold)) == 1
    assert len(cold.mounts()) == 3
    with cold.client() as client:
        remove(client, "default/1/c")
        remove(client, other)
    sweep()
    assert not of_chains(cold)
    assert not list((cold.root / "layers/tar-index-parents").iterdir())
    assert not list((cold.root / "tables").rglob("*/*"))
    assert not cold.mounts()


def lost(daemon: Daemon) -> Path:
    (layer,) = of_chains(daemon)
    return daemon.root / "layers/tar-index-parents" / layer.diff_id.removeprefix("sha256:")


def spoil(path: Path) -> None:
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[:-4096] + bytes(4096))


@pytest.mark.parametrize("how", [Path.unlink, spoil], ids=["missing", "spoilt"])
def test_a_lost_one_is_made_again_when_a_container_starts(daemon: Daemon, tmp_path: Path, how: Any) -> None:
    with daemon.client() as client:
        name = image(daemon, client, LOW, ADDS)
        good = lost(daemon).read_bytes()
        how(lost(daemon))
        with mounted(container(client, "default/1/c", name), tmp_path / "m") as directory:
            check_attributes(directory)
        assert lost(daemon).read_bytes() == good
        assert of_chains(daemon)[0].state is LayerState.READY


@pytest.mark.parametrize("how", [Path.unlink, spoil], ids=["missing", "spoilt"])
def test_a_lost_one_is_made_again_when_the_daemon_starts(daemon: Daemon, how: Any) -> None:
    with daemon.client() as client:
        image(daemon, client, LOW, ADDS)
    good = lost(daemon).read_bytes()
    daemon.stop()
    how(lost(daemon))
    daemon.restart()
    wait_for("it is READY", lambda: of_chains(daemon)[0].state is LayerState.READY)
    assert lost(daemon).read_bytes() == good


def test_a_lost_one_is_made_again_when_a_layer_comes_on_top(daemon: Daemon) -> None:
    """Content that does not verify is no worse than none: what comes of it would be wrong for good."""
    with daemon.client() as client:
        below = image(daemon, client, LOW, ADDS)
        identity = parents_of(daemon, below)
        path = lost(daemon)
        good = bytearray(path.read_bytes())
        good[4096 + 16 + 8] ^= 1  # in the table; head and trailer are as they were
        path.unlink()
        path.write_bytes(good)
        assert parents_of(daemon, image(daemon, client, LOW, ADDS, PLAIN)) == identity
        assert digest_of(path.read_bytes()[4096 : 4096 + of_chains(daemon)[0].tar_size_bytes]) == identity


def test_a_lower_layer_that_does_not_verify_is_repaired_or_said_to_be_broken(daemon: Daemon) -> None:
    with daemon.client() as client:
        image(daemon, client, LOW)
        path = daemon.root / "layers/tar-index" / digest_of(LOW).removeprefix("sha256:")
        bad = bytearray(path.read_bytes())
        at = bad.index((0o042750).to_bytes(2, "little"), 4096)  # the mode of `a`
        bad[at] ^= 1
        before = path.stat()
        path.unlink()
        path.write_bytes(bad)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk does it
        good = next((daemon.directory.parent / "containerd").rglob(f"blobs/sha256/{digest_of(LOW)[7:]}"))
        os.rename(good, aside := daemon.directory / "aside")
        error = refused(lambda: image(daemon, client, LOW, ADDS))
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert digest_of(LOW) in error.details()
        os.rename(aside, good)
        image(daemon, client, LOW, ADDS)
        assert path.read_bytes() != bytes(bad)


@pytest.mark.parametrize("how", ["missing", "spoilt"])
def test_a_bad_table_is_made_again_from_the_layers_blob(daemon: Daemon, how: str) -> None:
    with daemon.client() as client:
        image(daemon, client, LOW)
        key, mounts = prepare(client, chain_id([ADDS]))
        apply(client, put(daemon, ADDS), OCI, mounts)  # of no parent: nothing has looked at the table yet
        remove(client, key)
        (table,) = (daemon.root / "tables/tar-index").iterdir()
        good = table.read_bytes()
        table.unlink()
        if how == "spoilt":
            table.write_bytes(good[:-1])
        image(daemon, client, LOW, ADDS)
        assert table.read_bytes() == good
        assert len(of_chains(daemon)) == 1


def test_what_a_crash_left_of_a_table_goes(daemon: Daemon) -> None:
    with daemon.client() as client:
        image(daemon, client, LOW, ADDS)
    daemon.stop()
    left = daemon.root / "tables/tar-index" / ("0" * 64)
    left.write_bytes(b"x")
    daemon.restart()
    assert [path.name for path in left.parent.iterdir()] == [digest_of(ADDS).removeprefix("sha256:")]
