# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: containers whose layers the host's dm-verity holds against their root hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from blockdev.errors import KernelError
from blockdev.formats.layer_file import format_named
from blockdev.kernel import devmapper, loop, mounts
from snapshotter import metastore
from snapshotter.activation import Activation
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import Layer
from tests.harness import Containerd, ProcessFailed, run, wait_for
from tests.nodes.node import a_node

IMAGE = "localhost/tardev-test/hello:latest"
TEXT = b"hello from a tar layer"
REQUIRE = '[host]\nverity = "require"\n'


def devices() -> dict[str, str]:
    """Of dm-verity: name, and "V" or "C"."""
    lines = run("dmsetup", "status", "--target", "verity", check=False).splitlines()
    return {line.split(":")[0]: line.split()[-1] for line in lines if " verity " in line}


def start(containerd: Containerd, name: str) -> None:
    containerd.ctr("run", "-d", "--snapshotter", "tardev-host", IMAGE, name, "/bin/busybox", "sleep", "10000")


def reads(containerd: Containerd, name: str) -> str:
    """What a container finds in the file; the error where it cannot read it."""
    identity = os.urandom(4).hex()
    try:
        said = containerd.says("tasks", "exec", "--exec-id", identity, name, "/bin/busybox", "cat", "/etc/hello")
    except ProcessFailed as error:
        said = str(error)
    return said.strip()


def end(containerd: Containerd, name: str) -> None:
    containerd.ctr("tasks", "delete", "--force", name)
    containerd.ctr("containers", "delete", name)


def refused(path: Path, layer: Layer, directory: Path) -> str:
    """Why the layer is not mounted under another root hash."""
    wrong = bytes.fromhex(layer.root_hash)[:-1] + b"\0"
    directory.mkdir(exist_ok=True)
    try:
        mounts.mount_verified(
            path, directory, 512, format_named(layer.format).geometry(layer.data_size_bytes), wrong, "tardev-wrong"
        )
    except KernelError as error:
        return str(error)
    return ""


def die_between_device_and_mount(path: str, diff_id: str, root: str) -> None:
    """In a process of its own."""
    [layer] = [each for each in metastore.read(Path(root) / metastore.FILE_NAME)[1] if each.diff_id == diff_id]
    name = f"{Activation(Path(root), LayerStore(Path(root)))._prefix}dead"
    fd = os.open(path, os.O_RDONLY)
    device = loop.attach_read_only(fd, 512)
    with devmapper.verity_device(
        name,
        os.readlink(f"/proc/self/fd/{device}"),
        format_named(layer.format).geometry(layer.data_size_bytes),
        bytes.fromhex(layer.root_hash),
    ):
        os._exit(0)


def main() -> None:
    if sys.argv[1:]:
        die_between_device_and_mount(*sys.argv[1:])
    said: dict[str, object] = {}
    assert devices() == {}
    with a_node(Path("/tmp/node")) as node:
        daemon, containerd = node.daemon, node.containerd
        containerd.import_image(Path("images/hello.tar"))
        # One from before the option, whose layer is mounted as it is.
        start(containerd, "before")
        assert devices() == {}
        daemon.stop()
        daemon.config.write_text(daemon.config.read_text() + REQUIRE)
        daemon.restart()
        containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
        start(containerd, "one")
        start(containerd, "two")
        for name in ("before", "one", "two"):
            found = reads(containerd, name)
            assert found == TEXT.decode(), f"{name}: {found}"
        [layer] = daemon.layers()
        path = LayerStore(daemon.root).path(layer.diff_id, layer.format)
        said["shared"] = list(devices().values())
        said["mounts"] = len(daemon.mounts())
        end(containerd, "before")
        end(containerd, "two")
        daemon.kill()
        assert reads(containerd, "one") == TEXT.decode()
        daemon.restart()
        containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
        start(containerd, "two")
        said["after_a_kill"] = list(devices().values())
        said["wrong_root_hash"] = refused(path, layer, Path("/tmp/wrong"))
        assert "tardev-wrong" not in devices()

        # Tampering: nobody is given what was changed, and who comes then gets the layer built again.
        at = path.read_bytes().index(TEXT)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(TEXT.upper())
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        said["tampered"] = reads(containerd, "one")
        said["noticed"] = sorted(devices().values())
        start(containerd, "three")
        said["repaired"] = reads(containerd, "three")
        said["still_refused"] = reads(containerd, "two")

        # A kill between the making of a device and its mount.
        subprocess.run([sys.executable, "-m", __spec__.name, str(path), layer.diff_id, str(daemon.root)], check=True)
        assert any(name.endswith("dead") for name in devices())
        daemon.kill()
        daemon.restart()
        containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
        assert not any(name.endswith("dead") for name in devices())
        for name in ("one", "two", "three"):
            end(containerd, name)
        containerd.ctr("images", "rm", "--sync", IMAGE)
        containerd.collect_until("mounts go", lambda: not daemon.mounts())
        wait_for("devices go", lambda: not devices())

        # Made and let go, one after the other.
        started = time.monotonic()
        point = Path("/tmp/point")
        point.mkdir()
        for number in range(5):
            mounts.mount_verified(
                path,
                point,
                512,
                format_named(layer.format).geometry(layer.data_size_bytes),
                bytes.fromhex(layer.root_hash),
                f"tardev-n{number}",
            )
            mounts.unmount(point)
        said["milliseconds_each"] = round(200 * (time.monotonic() - started), 1)
        wait_for("devices go", lambda: not devices())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
