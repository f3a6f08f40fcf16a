# SPDX-License-Identifier: Apache-2.0
"""The same layer unpacked by a real containerd: into its own overlayfs snapshotter, and through us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.layers import MEDIA_TYPES
from bench.measure import Figures, Watch
from tests.harness import SNAPSHOTTER, Containerd, Daemon, oci_archive, releases


@contextmanager
def servers(directory: Path, extra: str = "") -> Iterator[tuple[Containerd, Daemon]]:
    """A containerd and a daemon that it unpacks through; `extra`: more of the daemon's configuration."""
    root = directory / "containerd"
    daemon = Daemon(directory / "daemon", root / "root", extra, containerd_socket=str(root / "c.sock"))
    containerd = Containerd(releases()["later"], root, daemon.address)
    daemon.start()
    try:
        containerd.start()
        yield containerd, daemon
    finally:
        containerd.clean_up()
        daemon.clean_up()


def unpack(blob: Path, kind: str, diff_id: str, directory: Path) -> dict[str, Figures]:
    """By snapshotter; in both cases the blob is in the content store already."""
    image = directory / "image.tar"
    manifest = oci_archive(image, "localhost/bench:latest", [blob], MEDIA_TYPES[kind], [diff_id])
    found = {}
    with servers(directory) as (containerd, daemon):
        assert containerd.process is not None
        assert daemon.process is not None
        containerd.ctr("images", "import", "--no-unpack", image)
        image.unlink()
        os.sync()
        for snapshotter, pids in (
            ("overlayfs", (containerd.process.pid,)),
            (SNAPSHOTTER, (containerd.process.pid, daemon.process.pid)),
        ):
            with Watch(*pids) as watch:
                containerd.ctr("snapshots", "unpack", "--snapshotter", snapshotter, manifest)
            assert watch.figures is not None
            found[snapshotter] = watch.figures
            os.sync()
    return found
