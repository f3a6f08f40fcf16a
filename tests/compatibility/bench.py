# SPDX-License-Identifier: Apache-2.0
"""What the rows of the table are checked on: one containerd, our daemon with two names, a registry."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from tests.golden.make_tars import T
from tests.harness import SNAPSHOTTER, Containerd, Registry, Release, oci_archive, remove_container_state
from tests.images import mkimage
from tests.integration.conftest import Node, a_node

# Of docs/compatibility.md, as harness.releases() names them.
COLUMNS: Final = ("1.6", "1.7", "later")
OTHER: Final = "tardev-other"  # a second name for the same contract
GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
# Layers that nothing refers to go at once, so that containerd's garbage collection shows down to the files.
_DAEMON: Final = '[cache]\nmax_size = "0"\n' + "".join(
    f'[snapshotters.{name}]\ncontract = "host"\nformat = "tar-index"\n' for name in (SNAPSHOTTER, OTHER)
)


@dataclass(frozen=True)
class Image:
    """Two layers: a base that all have, and one of its own in which /etc/which is the image's name."""

    name: str
    reference: str
    archive: Path
    diff_ids: tuple[str, str]
    chain_ids: tuple[str, str]


def sees(content: str) -> tuple[str, ...]:
    """A command that fails unless /etc/which has that content. ctr may lose output when the machine is busy."""
    return ("/bin/sh", "-c", f'[ "$(cat /etc/which)" = "{content}" ]')


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class _TwoNames(Containerd):
    def _configuration(self) -> str:
        text = super()._configuration()
        if self.has_differ:
            text += (
                "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux/amd64'\n"
                f"snapshotter = '{OTHER}'\ndiffer = 'tardev-diff'\n"
            )
        return text + f"[proxy_plugins.{OTHER}]\ntype = 'snapshot'\naddress = '{self.daemon_address}'\n"


@dataclass
class Bench:
    node: Node
    registry: Registry
    directory: Path

    @cached_property
    def _base(self) -> bytes:
        return bytes(mkimage.layer_tar(mkimage.base_layer(mkimage.static_busybox())))

    def image(self, name: str) -> Image:
        """Its second layer is nowhere yet."""
        tar = T()
        tar.d("etc/")
        tar.f("etc/which", name.encode())
        tars = self._base, bytes(tar.done())
        base, own = map(_digest, tars)
        archive, reference = self.directory / f"{name}.tar", f"localhost/compatibility/{name}:1"
        oci_archive(archive, reference, [gzip.compress(tar, 1, mtime=0) for tar in tars], GZIP, (base, own))
        return Image(name, reference, archive, (base, own), (base, _digest(f"{base} {own}".encode())))

    def pushed(self, image: Image) -> Image:
        """The same with the reference by which it can be pulled."""
        return replace(image, reference=self.registry.push(image.archive, f"{image.name}:1"))

    def run(self, image: Image, name: str, *, snapshotter: str = SNAPSHOTTER, namespace: str = "") -> None:
        """A container of that name that sees its image, and is gone afterwards."""
        self.node.containerd.retry(
            "run", "--rm", "--snapshotter", snapshotter, image.reference, name, *sees(image.name), namespace=namespace
        )

    def diff_ids(self) -> set[str]:
        """Of the layers that are stored; each has its file."""
        layers = self.node.daemon.tardevctl("layers")
        assert len(layers) == len(self.node.daemon.layer_files())
        return {layer["diff_id"] for layer in layers}

    def committed(self, snapshotter: str = SNAPSHOTTER, namespace: str = "") -> set[str]:
        """Names of committed snapshots as containerd has them, most of them chain IDs."""
        lines = self.node.containerd.ctr("snapshots", "--snapshotter", snapshotter, "list", namespace=namespace)
        return {line.split()[0] for line in lines.splitlines()[1:] if line.split()[-1] == "Committed"}

    def builds(self) -> int:
        return int(self.node.daemon.metric("tardev_builds_total", result="ok"))

    def applies(self) -> int:
        """Layers that containerd has handed to our differ."""
        return int(self.node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK"))


@contextlib.contextmanager
def bench(directory: Path, column: str) -> Iterator[Bench]:
    # runc keeps the state of all containerds of a machine in one place.
    namespace = f"compatibility-{os.getpid()}"

    def make(release: Release, directory: Path, address: Path) -> Containerd:
        return _TwoNames(release, directory, address, namespace)

    registry = Registry(directory / "registry")
    registry.start()
    try:
        with a_node(directory, column, _DAEMON, make) as node:
            yield Bench(node, registry, directory)
    finally:
        registry.stop()
        remove_container_state(namespace)
        remove_container_state(f"{namespace}-b")
