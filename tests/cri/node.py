# SPDX-License-Identifier: Apache-2.0
"""A containerd whose CRI plugin is on, with our daemon behind it, as the kubelet would find them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from snapshotter import metastore
from snapshotter.api.proto import snapshots_pb2, types_pb2
from snapshotter.metastore import Kind
from tests.cri.client import Cri, connect
from tests.harness import (
    EAGER_COLLECTION,
    SNAPSHOTTER,
    Containerd,
    Daemon,
    Release,
    host_state,
    releases,
    remove_container_state,
    wait_for,
)

CNI_PROGRAMS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins
NAMESPACE = "k8s.io"  # CRI's own, always
HANDLER = "tardev"
# Where the tests run there may be neither AppArmor nor CAP_SYS_RESOURCE, without which a sandbox's -998 is refused.
_UNPRIVILEGED = "disable_apparmor = true\nrestrict_oom_score_adj = true\n"
BRIDGE = f"tardev{os.getpid()}"


def releases_by_version() -> dict[tuple[int, int], Release]:
    """Each version once, in order."""
    return dict(sorted(((release.version, release) for release in releases().values()), key=lambda pair: pair[0]))


@dataclass(frozen=True)
class Settings:
    """What an operator may choose. The defaults are containerd's, but for the snapshotter."""

    sandbox_image: str
    snapshotter: str = SNAPSHOTTER
    """For all pods; those of the runtime class `tardev` have ours in any case (1.7 and later)."""
    snapshot_annotations: bool = False
    """disable_snapshot_annotations = false"""
    local_pull: bool = False
    """use_local_image_pull = true (2.1 and later)"""
    remote_annotations: bool = False
    """The export enable_remote_snapshot_annotations = "true" (2.1 and later)."""
    unpack_for: tuple[str, ...] = (SNAPSHOTTER, "overlayfs")
    """Snapshotters with an unpack_config (2.0 and later)."""
    daemon: str = ""
    """More of our daemon's configuration."""


@dataclass
class CriContainerd(Containerd):
    settings: Settings = field(kw_only=True)
    daemon_root: Path = field(kw_only=True)

    @property
    def image_directory(self) -> Path:
        """What CRI tells the kubelet to watch: 1.6 does not read the plugin's exports."""
        if self.release.version >= (1, 7):
            return self.daemon_root
        return self.root / f"io.containerd.snapshotter.v1.{SNAPSHOTTER}"

    def _configuration(self) -> str:
        version = self.release.version
        chosen = self.settings
        text = (
            f"version = {3 if version >= (2, 0) else 2}\nroot = '{self.root}'\nstate = '{self.state}'\n"
            "disabled_plugins = ['io.containerd.internal.v1.opt', 'io.containerd.nri.v1.nri',"
            " 'io.containerd.snapshotter.v1.btrfs']\n"
            f"[grpc]\naddress = '{self.address}'\n[ttrpc]\naddress = '{self.address}.ttrpc'\n"
            "[debug]\nlevel = 'debug'\n"
            f"[proxy_plugins.{SNAPSHOTTER}]\ntype = 'snapshot'\naddress = '{self.daemon_address}'\n"
            f"{EAGER_COLLECTION}"
        )
        if version >= (1, 7):
            text += f"[proxy_plugins.{SNAPSHOTTER}.exports]\nroot = '{self.daemon_root}'\n"
            if chosen.remote_annotations:
                text += "enable_remote_snapshot_annotations = 'true'\n"
            text += (
                f"[proxy_plugins.tardev-diff]\ntype = 'diff'\naddress = '{self.daemon_address}'\n"
                "[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['tardev-diff', 'walking']\n"
            )
        if version >= (2, 0):
            for snapshotter in chosen.unpack_for:
                differ = "tardev-diff" if snapshotter == SNAPSHOTTER else "walking"
                text += (
                    "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux/amd64'\n"
                    f"snapshotter = '{snapshotter}'\ndiffer = '{differ}'\n"
                )
        return text + (self._modern() if version >= (2, 0) else self._older())

    def _cni(self) -> str:
        conf = self.directory / "cni"
        conf.mkdir(exist_ok=True)
        programs = f"bin_dirs = ['{CNI_PROGRAMS}']" if self.release.version >= (2, 1) else f"bin_dir = '{CNI_PROGRAMS}'"
        return f"{programs}\nconf_dir = '{conf}'\n"

    def _older(self) -> str:
        """1.6 and 1.7."""
        chosen = self.settings
        cri = "plugins.'io.containerd.grpc.v1.cri'"
        runc = "runtime_type = 'io.containerd.runc.v2'\n"
        text = (
            f"[{cri}]\nsandbox_image = '{chosen.sandbox_image}'\nstats_collect_period = 1\n"
            f"{_UNPRIVILEGED}stream_server_address = '127.0.0.1'\nstream_server_port = '0'\n"
            f"[{cri}.cni]\n{self._cni()}"
            f"[{cri}.containerd]\nsnapshotter = '{chosen.snapshotter}'\n"
            f"disable_snapshot_annotations = {json.dumps(not chosen.snapshot_annotations)}\n"
            f"[{cri}.containerd.runtimes.runc]\n{runc}"
        )
        if self.release.version >= (1, 7):
            text += f"[{cri}.containerd.runtimes.{HANDLER}]\n{runc}snapshotter = '{SNAPSHOTTER}'\n"
        return text

    def _modern(self) -> str:
        """2.0 and later."""
        chosen = self.settings
        images, runtime = "plugins.'io.containerd.cri.v1.images'", "plugins.'io.containerd.cri.v1.runtime'"
        return (
            f"[{images}]\nsnapshotter = '{chosen.snapshotter}'\nstats_collect_period = 1\n"
            f"disable_snapshot_annotations = {json.dumps(not chosen.snapshot_annotations)}\n"
            f"use_local_image_pull = {json.dumps(chosen.local_pull)}\n"
            f"[{images}.pinned_images]\nsandbox = '{chosen.sandbox_image}'\n"
            f"[{images}.runtime_platforms.{HANDLER}]\nplatform = 'linux/amd64'\nsnapshotter = '{SNAPSHOTTER}'\n"
            f"[{runtime}]\n{_UNPRIVILEGED}[{runtime}.cni]\n{self._cni()}"
            f"[{runtime}.containerd.runtimes.{HANDLER}]\n"
            f"runtime_type = 'io.containerd.runc.v2'\nsnapshotter = '{SNAPSHOTTER}'\n"
            "[plugins.'io.containerd.grpc.v1.cri']\nstream_server_address = '127.0.0.1'\nstream_server_port = '0'\n"
        )

    def write_network(self) -> None:
        """A bridge of its own, without a gateway: nothing of the machine's network changes but for it."""
        ranges = [[{"subnet": "198.51.100.0/24"}]]  # for documentation: routed nowhere
        ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(self.directory / "addresses")}
        plugin = {"type": "bridge", "bridge": BRIDGE, "ipam": ipam}
        network = {"cniVersion": "0.4.0", "name": "tests", "plugins": [plugin]}
        (self.directory / "cni" / "10-tests.conflist").write_text(json.dumps(network))


@dataclass(frozen=True)
class Stored:
    """A snapshot as our daemon has it; `diff_id` of its own layer, "" without."""

    name: str
    parent: str
    labels: dict[str, str]
    diff_id: str


@dataclass
class CriNode:
    daemon: Daemon
    containerd: CriContainerd
    cri: Cri
    cgroup_parent: str

    def snapshots(self, kind: Kind) -> list[Stored]:
        """Parents first. From the database: `tardevctl snapshots` says the same, and takes its time to start."""
        found, layers = metastore.read(self.daemon.root / metastore.FILE_NAME)
        diff_ids = {layer.id: layer.diff_id for layer in layers}
        return [
            Stored(row.name, row.parent, row.labels, diff_ids[row.layer_id] if row.layer_id else "")
            for row in found
            if row.kind is kind
        ]

    def container_snapshot(self, container: str) -> Stored:
        """Of a container or a sandbox: its key ends with the ID."""
        (found,) = (row for row in self.snapshots(Kind.ACTIVE) if row.name.endswith(f"/{container}"))
        return found

    def mounts(self, container: str) -> list[types_pb2.Mount]:
        """What the daemon answers to Mounts for a container or a sandbox."""
        request = snapshots_pb2.MountsRequest(snapshotter=SNAPSHOTTER, key=self.container_snapshot(container).name)
        with self.daemon.client() as client:
            return list(client.snapshots.Mounts(request, timeout=30).mounts)

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return self.cri.ready()
            return False

        self.containerd.wait_until("CRI is ready", ready)

    def clean_up(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for pod in self.cri.pods():
                self.cri.remove_pod(pod)
        self.containerd.clean_up()
        self.daemon.clean_up()
        remove_container_state(NAMESPACE)
        # runc makes the parent and leaves it: one in each hierarchy of version 1, one in version 2.
        for pattern in (f"*/{self.cgroup_parent}", self.cgroup_parent):
            for directory in Path("/sys/fs/cgroup").glob(pattern.replace("//", "/").lstrip("/")):
                with contextlib.suppress(OSError):
                    directory.rmdir()


@contextlib.contextmanager
def cri_node(directory: Path, release: Release, settings: Settings) -> Iterator[CriNode]:
    """Both servers. What is left behind at the end is an AssertionError."""
    before = host_state()
    root = directory / "containerd"
    daemon = Daemon(
        directory / "daemon", root / "root", settings.daemon, containerd_socket=str(root / "c.sock")
    )  # fmt: skip
    daemon.start()
    containerd = CriContainerd(
        release, root, daemon.address, NAMESPACE, settings=settings, daemon_root=daemon.root
    )  # fmt: skip
    cgroup_parent = f"/tardev-tests-{os.getpid()}"
    try:
        containerd.start()
        with connect(containerd.address, cgroup_parent) as cri:
            node = CriNode(daemon, containerd, cri, cgroup_parent)
            try:
                node.wait_until_ready()
                yield node
            finally:
                node.clean_up()
    finally:
        containerd.stop(signal.SIGKILL)
        daemon.clean_up()
    try:
        wait_for("nothing is left behind", lambda: not host_state() - before)
    except TimeoutError:
        raise AssertionError(f"left behind: {sorted(host_state() - before)}") from None
