# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: a journey on a disk whose writes are logged, with a mark for all that was acknowledged.

    python -m tests.powercut.journey JOURNEY DISK LOG

Journeys: `direct`, our daemon alone, called as containerd would; `tardev-host` and `overlayfs`, containerd imports,
removes and imports again with that snapshotter. Marks: `committed/NAME` behind the reply; `removing`, before the first
call that takes them away; `imported`, when ctr has said so.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from snapshotter.api.proto import diff_pb2, snapshots_pb2, snapshots_pb2_grpc, types_pb2
from tests.crash.journeys import OCI, chains_of, digest_of, image_tars
from tests.harness import SNAPSHOTTER, Containerd, Daemon, releases, run

IMAGE = "localhost/tardev-test/layers:latest"
ARCHIVE = Path("images/layers.tar")
DATA = Path("/data")
_NAME = "logged"


def mark(text: str) -> None:
    run("dmsetup", "message", _NAME, "0", "mark", text)


@contextlib.contextmanager
def logged(disk: str, log: str) -> Iterator[None]:
    sectors = int(Path(f"/sys/class/block/{Path(disk).name}/size").read_text())
    run("dmsetup", "create", "--noudevsync", _NAME, "--table", f"0 {sectors} log-writes {disk} {log}")
    DATA.mkdir()
    # Without udev there is no link in /dev/mapper.
    (named,) = (path for path in Path("/sys/class/block").glob("dm-*/dm/name") if path.read_text().strip() == _NAME)
    run("mount", Path("/dev") / named.parts[-3], DATA)
    yield
    run("umount", DATA)
    run("dmsetup", "remove", "--noudevsync", _NAME)


def servers(directory: Path) -> tuple[Daemon, Containerd]:
    """What they must not lose is on the logged disk, all else is not."""
    for name in ("daemon", "containerd"):
        (directory / name).mkdir(parents=True)
        (DATA / name).mkdir()
        (directory / name / "root").symlink_to(DATA / name)
    containerd_root = directory / "containerd" / "root"
    cache = '[cache]\nmax_size = "0"\n'  # what is removed goes, and is built again
    daemon = Daemon(
        directory / "daemon", containerd_root, cache, containerd_socket=str(directory / "containerd/c.sock")
    )
    return daemon, Containerd(releases()["later"], directory / "containerd", daemon.address)


def direct(daemon: Daemon) -> None:
    """Four small layers, one with a parents layer; removed, and built anew while the old ones are collected."""
    tars = image_tars("power")
    store = DATA / "containerd/io.containerd.content.v1.content/blobs/sha256"
    store.mkdir(parents=True)
    blobs = [gzip.compress(tar, mtime=0) for tar in tars]
    for blob in blobs:
        (store / digest_of(blob).removeprefix("sha256:")).write_bytes(blob)
    os.sync()
    daemon.start()
    with daemon.client() as client:
        for number in range(2):
            parent = ""
            names = []
            for chain_id, blob in zip(chains_of(tars), blobs, strict=True):
                key = f"default/{number}/extract-{number}-x {chain_id}"
                mounts = client.snapshots.Prepare(
                    snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=parent)
                ).mounts
                descriptor = types_pb2.Descriptor(digest=digest_of(blob), size=len(blob), media_type=f"{OCI}+gzip")
                client.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts))
                parent = f"default/{number}/{chain_id}"
                client.snapshots.Commit(
                    snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=parent, key=key)
                )
                mark(f"committed/{chain_id}")
                names.append(parent)
            if number == 0:
                mark("removing")
                for name in reversed(names):
                    client.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=name))
                client.snapshots.Cleanup(snapshots_pb2.CleanupRequest(snapshotter=SNAPSHOTTER))
    daemon.stop()


def committed(containerd: Containerd, snapshotter: str) -> set[str]:
    """As containerd says, to its own clients."""
    with grpc.insecure_channel(f"unix:{containerd.address}") as channel:
        replies = snapshots_pb2_grpc.SnapshotsStub(channel).List(
            snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter),
            metadata=(("containerd-namespace", "default"),),
        )
        return {info.name for reply in replies for info in reply.info if info.kind == snapshots_pb2.COMMITTED}


@contextlib.contextmanager
def marked(look: Callable[[], set[str]]) -> Iterator[None]:
    """Each snapshot that is seen committed gets its mark, within moments; and one that is seen no more, too."""
    done = threading.Event()

    def watch() -> None:
        seen: set[str] = set()
        while not done.wait(0.02):
            now = look()
            for name in sorted(now - seen):
                mark(f"committed/{name}")
            for name in sorted(seen - now):
                mark(f"gone/{name}")
            seen = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def through_containerd(daemon: Daemon, containerd: Containerd, snapshotter: str) -> None:
    daemon.start()
    containerd.start()
    for number in range(2):
        with marked(lambda: committed(containerd, snapshotter)):
            containerd.retry("images", "import", "--snapshotter", snapshotter, ARCHIVE)
        for name in sorted(committed(containerd, snapshotter)):
            mark(f"committed/{name}")
        mark("imported")
        if number == 0:
            mark("removing")
            containerd.ctr("images", "rm", "--sync", IMAGE)
    containerd.stop()
    daemon.stop()


def main() -> None:
    journey, disk, log = sys.argv[1:]
    with logged(disk, log):
        daemon, containerd = servers(Path("/tmp/node"))
        try:
            if journey == "direct":
                direct(daemon)
            else:
                through_containerd(daemon, containerd, journey)
        finally:
            containerd.clean_up()
            daemon.clean_up()


if __name__ == "__main__":
    main()
