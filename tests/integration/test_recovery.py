# SPDX-License-Identifier: Apache-2.0
"""What is left, odd or damaged on disk, and a daemon that starts and serves all the same."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from snapshotter import metastore
from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.harness import SNAPSHOTTER, Client, Daemon, ProcessFailed, run, wait_for
from tests.should_fail.test_bad_layers import GZIP, OCI, apply, prepare, put, refused

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]


def committed(daemon: Daemon, client: Client) -> str:
    """The name of a snapshot with one layer."""
    key, mounts = prepare(client)
    diff_id = apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts)
    name = f"default/900/{diff_id}"
    client.snapshots.Commit(
        snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=name, key=key), timeout=30
    )
    return name


def container(client: Client, key: str, parent: str) -> list[object]:
    request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=parent)
    return list(client.snapshots.Prepare(request, timeout=30).mounts)


def remove(client: Client, key: str) -> None:
    client.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=key), timeout=30)


def deepen(directory: Path, depth: int) -> None:
    """Past Python's recursion and the kernel's longest path."""
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def directories(daemon: Daemon) -> list[Path]:
    return list((daemon.root / "snapshots").iterdir())


def test_no_container_makes_a_directory_that_cannot_be_removed(daemon: Daemon) -> None:
    with daemon.client() as client:
        parent = committed(daemon, client)
        wait_for("the committed one's directory goes", lambda: not directories(daemon))
        container(client, "default/1/deep", parent)
        deepen(directories(daemon)[0] / "fs", 1500)
        remove(client, "default/1/deep")
        wait_for("its directory is gone", lambda: not directories(daemon))
    # The same, met at a start.
    (daemon.root / "snapshots" / "999" / "fs").mkdir(parents=True)
    deepen(daemon.root / "snapshots" / "999" / "fs", 1500)
    daemon.stop()
    daemon.restart()
    assert not directories(daemon)
    wait_for("the trash is empty", lambda: not list((daemon.root / "trash").iterdir()))


def test_what_cannot_be_removed_does_not_keep_it_from_starting(daemon: Daemon) -> None:
    daemon.stop()
    stuck = daemon.root / "snapshots" / "999" / "fs" / "file"
    stuck.parent.mkdir(parents=True)
    stuck.write_bytes(b"x")
    run("chattr", "+i", stuck)
    (daemon.root / "staging" / "odd").mkdir()
    (daemon.root / "layers" / "stray").write_bytes(b"x")
    (daemon.root / "layers" / "tar-index" / "directory").mkdir()
    trash = daemon.root / "trash"
    try:
        daemon.restart()
        assert not daemon.staged()
        wait_for("only one thing is left", lambda: len(list(trash.iterdir())) == 1)
    finally:
        run("chattr", "-i", *([stuck] if stuck.exists() else trash.rglob("file")))
    daemon.stop()
    daemon.restart()
    assert not directories(daemon)
    wait_for("the trash is empty", lambda: not list(trash.iterdir()))


def test_a_key_of_no_namespace_does_not_keep_it_from_starting(daemon: Daemon) -> None:
    with daemon.client() as client:
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=SNAPSHOTTER, key="odd\nüname/1/extract-1-x sha256:" + "0" * 64
        )
        client.snapshots.Prepare(request, timeout=30, metadata=(("containerd-namespace", "default"),))
    daemon.stop()
    daemon.restart()
    assert len(daemon.tardevctl("snapshots")) == 1


def test_a_broken_layer_file_is_not_handed_to_the_kernel_and_built_again(daemon: Daemon) -> None:
    with daemon.client() as client:
        parent = committed(daemon, client)
        (file,) = daemon.layer_files()
        good = file.read_bytes()
        file.unlink()
        file.write_bytes(good[:-4096] + bytes(4096))
        [blob] = (daemon.directory.parent / "containerd").rglob("blobs/sha256/*")
        blob.unlink()
        error = refused(lambda: container(client, "default/1/c", parent))
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert "sha256:" + file.name in error.details()
        assert not daemon.mounts()
        # Nothing stays of the refused one, and another Apply mends the layer for all who refer to it.
        _, mounts = prepare(client, "sha256:" + "1" * 64)
        apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts)
        assert file.read_bytes() == good
        container(client, "default/1/c", parent)
        assert len(daemon.mounts()) == 1


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Daemon]:
    """Its root is reached through a symlink, as where /var/lib/containerd lies on another disk."""
    (tmp_path / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "daemon").symlink_to(tmp_path / "disk")
    server = Daemon(tmp_path / "daemon", tmp_path / "containerd")
    server.start()
    yield server
    server.clean_up()


def test_a_root_behind_a_symlink_leaks_no_mounts(linked: Daemon, tmp_path: Path) -> None:
    def mounts() -> int:
        text = Path("/proc/self/mountinfo").read_text()
        return sum(f" {tmp_path}/disk/root/m/" in line for line in text.splitlines())

    with linked.client() as client:
        parent = committed(linked, client)
        for number in range(3):
            container(client, f"default/1/c{number}", parent)
        assert mounts() == 1
        linked.stop()
        linked.restart()
    with linked.client() as client:
        assert mounts() == 1
        for number in range(3):
            remove(client, f"default/1/c{number}")
        wait_for("the mount is released", lambda: mounts() == 0)


def test_a_directory_of_somebody_else_is_not_taken_for_a_root(daemon: Daemon) -> None:
    daemon.stop()
    precious = daemon.root / "snapshots" / "17" / "fs" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"x")
    for path in daemon.root.glob("metadata.db*"):
        path.unlink()
    with pytest.raises(ProcessFailed, match=r"holds layers and snapshots but no metadata\.db"):
        daemon.restart()
    assert precious.exists()


def test_a_prepare_whose_caller_has_gone_leaves_nothing(daemon: Daemon) -> None:
    """Its transaction waits, here for another's lock, and comes through after the caller's deadline."""
    with daemon.client() as client, contextlib.closing(sqlite3.connect(daemon.root / "metadata.db")) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key="default/1/gone")
        with pytest.raises(grpc.RpcError) as caught:
            client.snapshots.Prepare(request, timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        other.execute("ROLLBACK")
        wait_for("it has been undone", lambda: not daemon.metric("tardev_rpc_left"))
        assert not daemon.snapshots()
        wait_for("its directory is gone", lambda: not directories(daemon))
        assert container(client, "default/1/gone", "")


@pytest.mark.skipif(os.path.exists("/dev/mapper/control"), reason="this kernel has device-mapper")
def test_without_device_mapper_layers_are_not_served_unverified(daemon: Daemon) -> None:
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + '\n[host]\nverity = "require"\n')
    with pytest.raises(ProcessFailed, match=r"host\.verity = .*require.*no dm-verity"):
        daemon.restart()


@contextlib.contextmanager
def held(database: Path) -> Iterator[sqlite3.Connection]:
    """No other connection reads or writes it."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        yield holder


def test_what_is_not_ours_is_answered_before_the_metadata_can_be_read(daemon: Daemon) -> None:
    with daemon.client() as client:
        parent = committed(daemon, client)
    daemon.stop()
    elsewhere = [types_pb2.Mount(type="bind", source="/var/lib/elsewhere/snapshots/1/fs", options=["rw"])]
    foreign = diff_pb2.ApplyRequest(diff=types_pb2.Descriptor(media_type=f"{OCI}+gzip"), mounts=elsewhere)
    wanted = snapshots_pb2.StatSnapshotRequest(snapshotter=SNAPSHOTTER, key=parent)
    with daemon.client() as client:
        with held(daemon.root / metastore.FILE_NAME):
            daemon.launch()
            with pytest.raises(grpc.RpcError) as caught:
                client.diff.Apply(foreign, timeout=20, wait_for_ready=True)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.RpcError) as caught:
                client.snapshots.Stat(wanted, timeout=0.5)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
                assert status == health_pb2.HealthCheckResponse.NOT_SERVING
            waiting = client.snapshots.Stat.future(wanted, timeout=30)
        assert waiting.result().info.name == parent


def test_who_waits_for_a_start_that_fails_is_told_why(daemon: Daemon) -> None:
    daemon.stop()
    wanted = snapshots_pb2.StatSnapshotRequest(snapshotter=SNAPSHOTTER, key="k")
    with daemon.client() as client:
        with held(daemon.root / metastore.FILE_NAME) as holder:
            daemon.launch()
            wait_for("the socket", daemon.address.exists)
            waiting = client.snapshots.Stat.future(wanted, timeout=30, wait_for_ready=True)
            with pytest.raises(grpc.RpcError):
                client.snapshots.Stat(wanted, timeout=2, wait_for_ready=True)
            holder.execute("PRAGMA user_version = 99")
            holder.execute("COMMIT")
        with pytest.raises(grpc.RpcError) as caught:
            waiting.result()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "schema version 99" in str(caught.value.details())
    assert daemon.process is not None
    assert daemon.process.wait(30) == 2
    assert not daemon.address.exists()
