# SPDX-License-Identifier: Apache-2.0
"""Several VMs at once from the layers of one image: what they take of the host's memory and disk.

A real containerd pulls the image through a daemon with the contract `kata-tardev`; each VM gets the files that its
container's own mounts name, reads all of them through dm-verity, and stays until all have done so.
"""

from __future__ import annotations

import asyncio
import os
import re
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import layers, page_cache
from bench.through_containerd import servers
from blockdev.formats.layer_file import FORMATS
from snapshotter.api.proto import snapshots_pb2
from snapshotter.contracts import Mount
from tests.harness import SNAPSHOTTER, Client, Daemon, oci_archive, sha256_of
from tests.kata_peer import OPTION, shim_layers
from uvm.frames import Kind
from uvm.image import Image
from uvm.policy import Policy, PolicyLayer, Process
from uvm.runner import QEMU, Disk, Result, run_policy

MEMORY_MIB: Final = 192
_FORMAT: Final = "tar-index"
_CONFIG: Final = f'[snapshotters.{SNAPSHOTTER}]\ncontract = "kata-tardev"\nformat = "{_FORMAT}"\n'
_REFERENCE: Final = "localhost/bench:latest"
_READ: Final = "cat /data/* | wc -c; exec sleep 86400"
_TIMEOUT_SECONDS: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes on the host while `machines` VMs have all read all layers.

    `memory`: the sum of the QEMU processes' proportional set sizes; `of_guests`: the part that is no file's.
    `cached`: of the layer files in the page cache; `read`: from the disk by all QEMUs; `written`: to it by them.
    `data_root`: what the daemon's directory has more than before there was a container.
    """

    machines: int
    seconds: float
    memory: int
    of_guests: int
    cached: int
    read: int
    written: int
    data_root: int


def image_tars(directory: Path, count: int, size_bytes: int) -> list[Path]:
    """A layer with a shell, and some with one file of noise each; bottom first."""

    def shell(tar: tarfile.TarFile) -> None:
        layers.add(tar, "bin", "")
        layers.add(tar, "bin/busybox", "/bin/busybox")
        for name in ("sh", "cat", "wc", "sleep"):
            layers.link(tar, f"bin/{name}", "busybox")

    def data(number: int) -> layers.Writer:
        def write(tar: tarfile.TarFile) -> None:
            layers.add(tar, "data", "")
            layers.noise(tar, f"data/{number}", size_bytes)

        return write

    return [
        layers.one_tar(directory, "shell", shell),
        *(layers.one_tar(directory, f"data-{size_bytes}-{number}", data(number)) for number in range(count)),
    ]


def disk_bytes(directory: Path) -> int:
    """Of all files, each once whatever its names."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in (".", *names):
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(parent, name))
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def machines() -> list[int]:
    """The QEMUs that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{pid}/exe").readlink().name == QEMU:
                    found.append(int(pid))
    return found


def _number(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(path).read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@dataclass(frozen=True, slots=True)
class Node:
    """An image, unpacked."""

    daemon: Daemon
    top: str  # the name of its snapshot
    data_bytes: int  # of the files in /data

    def layers_of(self, client: Client, key: str) -> list[tuple[PolicyLayer, Path]]:
        """Of a new container: what its mounts name, topmost first."""
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=self.top)
        answer = client.snapshots.Prepare(request, timeout=60).mounts
        rows = {row["root_hash"]: row for row in self.daemon.tardevctl("layers")}
        found = []
        for number, mount in enumerate(
            shim_layers([Mount(each.type, each.source, tuple(each.options)) for each in answer], "base64")
        ):
            (root_hash,) = [option.partition("=")[2] for option in mount.options if f"{OPTION}root-hash=" in option]
            layer = PolicyLayer(
                f"layer-{number}", _FORMAT, bytes.fromhex(root_hash), rows[root_hash]["data_size_bytes"],
                FORMATS[_FORMAT].params,
            )  # fmt: skip
            found.append((layer, Path(mount.source)))
        return found


def measure(
    image: Image, directory: Path, tars: Sequence[Path], counts: Sequence[int]
) -> tuple[list[int], list[Shared]]:
    """The sizes of the layer files in bytes, and what was found for each number of VMs."""
    archive = directory / "image.tar"
    oci_archive(archive, _REFERENCE, tars, layers.MEDIA_TYPES["plain"], [f"sha256:{sha256_of(tar)}" for tar in tars])
    with servers(directory, _CONFIG) as (containerd, daemon), daemon.client() as client:
        containerd.import_image(archive)
        archive.unlink()
        rows = [row for row in daemon.tardevctl("snapshots") if row["kind"] == "committed"]
        (top,) = {row["name"] for row in rows} - {row["parent"] for row in rows}
        data_bytes = 0
        for tar in tars:
            with tarfile.open(tar) as members:
                data_bytes += sum(each.size for each in members if each.isreg() and each.name.startswith("data/"))
        node = Node(daemon, top, data_bytes)
        files = [path for _, path in node.layers_of(client, "default/900/first")]
        _remove(client, "default/900/first")
        return [path.stat().st_size for path in files], [_together(image, node, client, count) for count in counts]


def _remove(client: Client, key: str) -> None:
    client.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=key), timeout=60)


def _together(image: Image, node: Node, client: Client, count: int) -> Shared:
    os.sync()
    before = disk_bytes(node.daemon.root)
    keys = [f"default/901/{count}-{number}" for number in range(count)]
    containers = [node.layers_of(client, key) for key in keys]
    files = [path for _, path in containers[0]]
    for other in containers:
        for path, (_, its) in zip(files, other, strict=True):
            if not os.path.samefile(path, its):  # the same file, not only an equal one
                raise RuntimeError("two containers of an image have different layer files")
    page_cache.drop(files)
    started = time.monotonic()

    def look() -> Shared:
        seconds, pids = time.monotonic() - started, machines()
        if len(pids) != count:
            raise RuntimeError(f"{len(pids)} QEMUs run, not {count}")
        return Shared(
            machines=count,
            seconds=seconds,
            memory=sum(_number(f"/proc/{pid}/smaps_rollup", "Pss") for pid in pids) * 1024,
            of_guests=sum(_number(f"/proc/{pid}/smaps_rollup", "Pss_Anon") for pid in pids) * 1024,
            cached=sum(map(page_cache.cached_bytes, files)),
            read=sum(_number(f"/proc/{pid}/io", "read_bytes") for pid in pids),
            written=sum(_number(f"/proc/{pid}/io", "write_bytes") for pid in pids),
            data_root=disk_bytes(node.daemon.root) - before,
        )

    try:
        return asyncio.run(_all_at_once(image, containers, node.data_bytes, look))
    finally:
        for key in keys:
            _remove(client, key)


async def _all_at_once(
    image: Image,
    containers: Sequence[Sequence[tuple[PolicyLayer, Path]]],
    data_bytes: int,
    look: Callable[[], Shared],
) -> Shared:
    """`look` when all have read all, and none has ended."""
    heard = [asyncio.get_running_loop().create_future() for _ in containers]
    runs = [
        asyncio.create_task(_run(image, container, said)) for container, said in zip(containers, heard, strict=True)
    ]
    try:
        for task, said in zip(runs, heard, strict=True):
            await asyncio.wait([task, said], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                raise RuntimeError(f"a VM ended: {task.result()}")
            if said.result() != b"%d\n" % data_bytes:
                raise RuntimeError(f"a VM says {said.result()!r} and not that it has read {data_bytes} bytes")
        return look()
    finally:
        for task in runs:
            task.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def _run(image: Image, container: Sequence[tuple[PolicyLayer, Path]], said: asyncio.Future[bytes]) -> Result:
    text = bytearray()

    def heard(kind: Kind, payload: bytes) -> None:
        text.extend(payload)
        if text.endswith(b"\n") and not said.done():
            said.set_result(bytes(text))

    process = Process(["/bin/sh", "-c", _READ], ["PATH=/bin"])
    policy = Policy([layer for layer, _ in container], process).text()
    disks = [Disk(layer.name, path) for layer, path in container]
    return await run_policy(image, policy, disks, memory_mib=MEMORY_MIB, timeout_s=_TIMEOUT_SECONDS, on_output=heard)
