# SPDX-License-Identifier: Apache-2.0
"""The journeys of the design, driven by gRPC as containerd does: each can be cut at any moment and begun again.

A `Stage` keeps what its calls were answered: that is what may never be lost. What a call has made without being heard
is containerd's garbage, which its metadata layer collects: it removes each snapshot of ours that it does not know.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc

from policy.chain import ChainID, layer_name
from snapshotter import metastore
from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from snapshotter.idmap import GID_LABEL, UID_LABEL
from tests.golden.make_tars import EOA, PX, D, F
from tests.harness import SNAPSHOTTER, Client, Daemon, wait_for

OCI: Final = "application/vnd.oci.image.layer.v1.tar"
REF: Final = "containerd.io/snapshot.ref"
Code = grpc.StatusCode
_QUIET_SECONDS: Final = 0.15


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def image_tars(salt: str) -> list[bytes]:
    """Four layers: the second adds to a directory of the first without an entry for it, so the chain from there on
    needs a parents layer; the third is gzip's; the last spans many blocks."""
    mark = salt.encode()
    low = PX((b"SCHILY.xattr.user.low", mark)) + D(b"a/", mode=0o2750, uid=7, gid=8) + D(b"plain/") + F(b"a/x", mark)
    return [
        low + EOA,
        F(b"a/y", mark) + EOA,
        F(b"plain/y", mark) + EOA,
        F(b"large", hashlib.shake_128(mark).digest(200_000)) + EOA,
    ]


def chains_of(tars: Sequence[bytes]) -> list[str]:
    chains: list[str] = []
    for tar in tars:
        diff_id = digest_of(tar)
        chains.append(digest_of(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return chains


@dataclass
class Control:
    """Of a daemon's trace points: what it passed, and where it dies (snapshotter.trace)."""

    directory: Path

    def arm(self, point: str = "", number: int = 1) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "passed").write_text("")
        (self.directory / "kill").write_text(f"{point}:{number}" if point else "")

    def passed(self) -> list[str]:
        return (self.directory / "passed").read_text().splitlines()

    def when_quiet(self) -> Counter[str]:
        """Once nothing has been passed for a moment: what goes on behind the replies has ended."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < _QUIET_SECONDS:
            if len(self.passed()) != last:
                last, since = len(self.passed()), time.monotonic()
            time.sleep(0.02)
        return Counter(self.passed())

    @property
    def env(self) -> dict[str, str]:
        return {"TARDEV_TRACE_CONTROL": str(self.directory)}


@dataclass
class Stage:
    """A daemon with its trace points under control, what it has acknowledged, and an image of one run."""

    daemon: Daemon
    control: Control
    env: Mapping[str, str] = field(default_factory=dict)
    client: Client | None = None
    committed: dict[str, str] = field(default_factory=dict)  # chain ID → name that was acknowledged
    active: dict[str, str] = field(default_factory=dict)  # what for → key
    removed: set[str] = field(default_factory=set)
    becoming: dict[str, str] = field(default_factory=dict)  # key → the name that it is, or is not yet, committed as
    tars: list[bytes] = field(default_factory=list)
    salt: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def blobs(self) -> Path:
        return self.daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs/sha256"

    def start(self, **env: str) -> None:
        """Or again, whatever became of the one before. Raises ProcessFailed where it dies meanwhile."""
        self._open.close()
        self.daemon.stop()
        self.daemon.restart({**self.control.env, **self.env, **env})
        self.client = self._open.enter_context(self.daemon.client())

    def close(self) -> None:
        self._open.close()
        self.daemon.clean_up()

    def new_image(self, salt: str) -> None:
        self.salt, self.tars = salt, image_tars(salt)
        self.committed, self.active, self.removed, self.becoming = {}, {}, set(), {}

    def new_key(self, text: str) -> str:
        return f"default/{next(self._numbers)}/{text}"

    @property
    def stub(self) -> Client:
        assert self.client is not None
        return self.client

    # Calls, as containerd makes them

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] = {}) -> list[types_pb2.Mount]:
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=parent, labels=labels)
        return list(self.stub.snapshots.Prepare(request, timeout=60).mounts)

    def put(self, blob: bytes) -> types_pb2.Descriptor:
        digest = digest_of(blob)
        # As containerd does: a blob is there or it is not.
        part = self.blobs.with_name("part")
        part.write_bytes(blob)
        part.rename(self.blobs / digest.removeprefix("sha256:"))
        return types_pb2.Descriptor(digest=digest, size=len(blob))

    def blob(self, number: int) -> tuple[bytes, str]:
        tar = self.tars[number]
        return (gzip.compress(tar, mtime=0), f"{OCI}+gzip") if number == 2 else (tar, OCI)

    def commit(self, name: str, key: str) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=name, key=key)
        try:
            self.stub.snapshots.Commit(request, timeout=60)
        except grpc.RpcError as error:
            if error.code() is not Code.ALREADY_EXISTS:
                raise

    def remove(self, key: str) -> None:
        """As containerd's collector: what is gone is gone."""
        try:
            self.stub.snapshots.Remove(
                snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=key), timeout=60
            )
        except grpc.RpcError as error:
            if error.code() is not Code.NOT_FOUND:
                raise

    def cleanup(self) -> None:
        self.stub.snapshots.Cleanup(snapshots_pb2.CleanupRequest(snapshotter=SNAPSHOTTER), timeout=60)

    def names(self) -> dict[str, str]:
        """Of all snapshots, each with its parent's."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=SNAPSHOTTER)
        return {info.name: info.parent for part in self.stub.snapshots.List(request, timeout=60) for info in part.info}

    # Steps

    def pull(self, *, apply: bool = True) -> str:
        """The layers that are not there yet; the name of the topmost. A layer's name is acknowledged by its Commit."""
        parent = ""
        for number, chain in enumerate(chains_of(self.tars)):
            if chain not in self.committed:
                key = self.new_key(f"extract-{number}-x {chain}")
                mounts = self.prepare(key, parent)
                if apply:
                    blob, media_type = self.blob(number)
                    descriptor = self.put(blob)
                    descriptor.media_type = media_type
                    request = diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts)
                    reply = self.stub.diff.Apply(request, timeout=60)
                    assert reply.applied.digest == digest_of(self.tars[number])
                # containerd keeps the name of a commit that was not heard, and asks for it again by that name.
                name = f"default/{number + 900}/{self.salt}/{chain}"
                self.commit(name, key)
                self.committed[chain] = name
            parent = self.committed[chain]
        return parent

    def put_image(self) -> None:
        """All that containerd has of it before it unpacks."""
        layers = []
        for number in range(len(self.tars)):
            blob, media_type = self.blob(number)
            descriptor = self.put(blob)
            layers.append({"mediaType": media_type, "digest": descriptor.digest, "size": descriptor.size})
        rootfs = {"type": "layers", "diff_ids": [digest_of(tar) for tar in self.tars]}
        config = self.put(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())
        named = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.digest, "size": config.size}
        self.put(
            json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": named,
                    "layers": layers,
                }
            ).encode()
        )

    def skip(self) -> str:
        """A pull into another namespace, of layers that are all stored: every Prepare says so, and has recorded it."""
        parent = ""
        for number, chain in enumerate(chains_of(self.tars)):
            labels = {REF: chain}
            if chain not in self.committed:
                try:
                    self.prepare(f"other/{next(self._numbers)}/extract-{number}-x {chain}", parent, labels)
                except grpc.RpcError as error:
                    if error.code() is not Code.ALREADY_EXISTS:
                        raise
                else:
                    raise AssertionError(f"nothing is stored for {chain}")
                request = snapshots_pb2.ListSnapshotsRequest(snapshotter=SNAPSHOTTER)
                self.committed[chain] = next(
                    info.name
                    for part in self.stub.snapshots.List(request, timeout=60)
                    for info in part.info
                    if info.name.startswith("other/") and info.parent == parent and info.labels.get(REF) == chain
                )
            parent = self.committed[chain]
        return parent

    def start_container(self, labels: Mapping[str, str] = {}) -> None:
        """containerd's retry has a number of its own."""
        if "container" not in self.active:
            key = self.new_key("container")
            self.prepare(key, self.top, labels)
            self.active["container"] = key
        request = snapshots_pb2.MountsRequest(snapshotter=SNAPSHOTTER, key=self.active["container"])
        assert self.stub.snapshots.Mounts(request, timeout=60).mounts

    @property
    def top(self) -> str:
        return self.committed[chains_of(self.tars)[-1]]

    def directory(self, key: str) -> Path:
        (found,) = [each for each in self.daemon.snapshots() if each.name == key]
        return self.daemon.root / "snapshots" / str(found.id) / "fs"

    def write_changes(self) -> None:
        """As a container would, into its upper directory."""
        top = self.directory(self.active["container"])
        (top / "below/it").mkdir(parents=True)
        for name in ("one", "below/two", "below/it/three"):
            (top / name).write_text(f"{self.salt} {name}")

    def commit_changes(self) -> None:
        if "changes" not in self.committed:
            key, name = self.active["container"], f"default/999/{self.salt} changes"
            self.becoming[key] = name
            self.commit(name, key)
            self.committed["changes"] = name
            self.active.pop("container")

    def stop_container(self) -> None:
        key = self.active.get("container")
        if key:
            self.removed.add(key)
            self.active.pop("container")
        for key in sorted(self.removed):
            self.remove(key)

    def remove_image(self) -> None:
        for chain in reversed(chains_of(self.tars)):
            if chain in self.committed:
                self.removed.add(self.committed.pop(chain))
        # Children first, as the collector does.
        parents = self.names()
        for name in sorted(self.removed & parents.keys(), key=lambda name: _depth(parents, name), reverse=True):
            self.remove(name)
        self.cleanup()

    def collect(self) -> None:
        """Remove what was never acknowledged, children first."""
        parents = self.names()
        known = {*self.committed.values(), *self.active.values(), *self.becoming.values()}
        for name in sorted(parents.keys() - known, key=lambda name: _depth(parents, name), reverse=True):
            self.remove(name)

    def lost(self) -> list[str]:
        """Of what was acknowledged."""
        there = self.names()
        acknowledged = {*self.committed.values(), *self.active.values()}
        return sorted(name for name in acknowledged if name not in there and self.becoming.get(name) not in there)

    def clear(self) -> None:
        """Nothing of the run stays but layers in the cache."""
        self.committed, self.active, self.removed, self.becoming = {}, {}, set(), {}
        self.collect()


def _depth(parents: Mapping[str, str], name: str) -> int:
    depth = 0
    while name := parents.get(name, ""):
        depth += 1
    return depth


@dataclass(frozen=True)
class Journey:
    """`set_up` comes first, unharmed; `act` may be cut anywhere and called again, until it ends; then `check`.

    `fresh`: the daemon starts anew between them, for layers that it has handed out lately are not swept. `boot`: the
    set-up leaves it stopped, and to act is to start it. `damages`: the set-up spoils a layer's file.
    """

    name: str
    act: Callable[[Stage], object]
    set_up: Callable[[Stage], object] = lambda stage: None
    check: Callable[[Stage], object] = lambda stage: None
    config: str = ""
    fresh: bool = False
    boot: bool = False
    damages: bool = False

    @property
    def mends(self) -> bool:
        """A start puts a bad file aside, for somebody to look at, and makes the layer again behind its answers."""
        return self.boot or self.damages


def named(contract: str, layer_format: str, more: str = "") -> str:
    return f'[snapshotters.{SNAPSHOTTER}]\ncontract = "{contract}"\nformat = "{layer_format}"\n{more}'


def _pulled(stage: Stage) -> None:
    stage.pull()


def _runs(stage: Stage) -> None:
    """A container of the image can be had, and goes again."""
    stage.pull()
    stage.start_container()
    stage.stop_container()


def _container(stage: Stage) -> None:
    stage.pull()
    stage.start_container()


def _changed(stage: Stage) -> None:
    _container(stage)
    stage.write_changes()


def _changed_in_a_user_namespace(stage: Stage) -> None:
    stage.pull()
    stage.start_container(_MAPPED)
    stage.write_changes()


def _committed(stage: Stage) -> None:
    assert stage.committed["changes"] in stage.names()


def _gone(stage: Stage) -> None:
    assert not stage.removed & stage.names().keys()


def _all_gone(stage: Stage) -> None:
    _gone(stage)
    digests = {digest_of(tar) for tar in stage.tars}
    assert not [layer for layer in stage.daemon.layers() if layer.diff_id in digests]


def _damage(stage: Stage) -> None:
    """A layer that is linked gets a bad file: the next Apply of it makes another, and all links go there."""
    stage.pull()
    path = stage.daemon.root / "layers/tarfs" / digest_of(stage.tars[0]).removeprefix("sha256:")
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[:-1])


def _mend(stage: Stage) -> None:
    """Another pull of the same layer, in another namespace."""
    key = stage.new_key(f"extract-0-x {chains_of(stage.tars)[0]}")
    mounts = stage.prepare(key)
    descriptor = stage.put(stage.tars[0])
    descriptor.media_type = OCI
    stage.stub.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60)
    stage.remove(key)


def _download_skipped(stage: Stage) -> None:
    stage.put_image()
    stage.pull()
    first = dict(stage.committed)
    stage.committed = {}
    stage.active = {f"first {chain}": name for chain, name in first.items()}


def _recompressed(stage: Stage) -> None:
    """The same tar in another compression: its file is there, what was staged goes."""
    blob = gzip.compress(stage.tars[3], 1, mtime=0)
    chain = digest_of(stage.tars[3])
    if chain not in stage.committed:
        key = stage.new_key(f"extract-0-x {chain}")
        mounts = stage.prepare(key)
        descriptor = stage.put(blob)
        descriptor.media_type = f"{OCI}+gzip"
        stage.stub.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60)
        name = f"default/950/{stage.salt}/{chain}"
        stage.commit(name, key)
        stage.committed[chain] = name


def _refused(stage: Stage) -> None:
    """The chain has more layers than the name allows: nothing stays of the container."""
    try:
        stage.prepare(stage.new_key("refused"), stage.top)
    except grpc.RpcError as error:
        if error.code() is not Code.FAILED_PRECONDITION:
            raise
    else:
        raise AssertionError("it was not refused")


def _stopped(stage: Stage) -> None:
    """All containers, and with the daemon down."""
    stage.daemon.stop()


def _left_by_others(stage: Stage) -> None:
    """What a start finds, without what it must not lose: files, directories and mounts of nobody, a container whose
    directory is not whole, a layer in the cache that is damaged, a parents layer that is lost."""
    stage.pull()
    stage.start_container()
    stray = digest_of(b"stray").removeprefix("sha256:")
    extra = F(b"extra", stage.salt.encode()) + EOA
    key = stage.new_key(f"extract-9-x {digest_of(extra)}")
    mounts = stage.prepare(key)
    descriptor = stage.put(extra)
    descriptor.media_type = OCI
    stage.stub.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60)
    gone = stage.new_key("gone")
    name = stage.committed[chains_of(stage.tars)[0]]
    stage.remove(key)
    stage.prepare(gone, name)
    stage.control.when_quiet()
    _stopped(stage)
    root = stage.daemon.root
    (root / "staging/tmpfile").write_bytes(b"x")
    (root / "staging/directory/below").mkdir(parents=True)
    for top in ("layers", "tables"):
        (root / top / "tar-index" / stray).write_bytes(b"x")
    (root / f"layers/tar-index/{stray}.dmverity").write_bytes(b"x")
    (root / "snapshots/999999/fs/below").mkdir(parents=True)
    (root / "snapshots/999999/fs/file").write_bytes(b"x")
    path = root / "layers/tar-index" / digest_of(extra).removeprefix("sha256:")
    path.write_bytes(path.read_bytes()[:-1])
    snapshots, layers = metastore.read(root / metastore.FILE_NAME)
    (of_chain,) = {each.parents_layer_id for each in snapshots if each.name == stage.top}
    (lost,) = [layer.diff_id.removeprefix("sha256:") for layer in layers if layer.id == of_chain]
    (root / "layers/tar-index-parents" / lost).unlink()
    ids = {snapshot.name: snapshot.id for snapshot in stage.daemon.snapshots()}
    (root / "snapshots" / str(ids[stage.active["container"]]) / "work").rmdir()
    with contextlib.closing(sqlite3.connect(root / metastore.FILE_NAME, isolation_level=None)) as database:
        database.execute("DELETE FROM snapshots WHERE name = ?", (gone,))


def _links_left(stage: Stage) -> None:
    """Links of nobody, lost ones, and one to another file."""
    stage.pull()
    stage.control.when_quiet()
    _stopped(stage)
    directory = stage.daemon.root / "layers"
    names = [layer_name(ChainID(chain)) for chain in chains_of(stage.tars)]
    (directory / names[0]).unlink()
    (directory / names[1]).unlink()
    (directory / names[1]).write_bytes(b"x")
    (directory / f".{names[2]}").write_bytes(b"x")
    (directory / ("0" * 64)).write_bytes(b"x")


def _sidecars_left(stage: Stage) -> None:
    """One that says something else."""
    _runs(stage)
    stage.control.when_quiet()
    _stopped(stage)
    path = next((stage.daemon.root / "layers/erofs-4k").glob("*.dmverity"))
    path.chmod(0o600)
    path.write_text("{}")


def _begun(stage: Stage) -> None:
    stage.start()


_SWEPT: Final = '[cache]\nmax_size = "0"\n'
_TARDEV: Final = named("kata-tardev", "tarfs") + _SWEPT
_EROFS: Final = named("kata-erofs", "erofs-4k") + _SWEPT
_MAPPED: Final = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}

JOURNEYS: Final = [
    Journey("pull", _pulled, check=_runs, config=_SWEPT),
    Journey("pull without Apply", lambda stage: stage.pull(apply=False), Stage.put_image, _runs, _SWEPT),
    Journey(
        "pull without download",
        Stage.skip,
        _download_skipped,
        config=named("host", "tar-index", "skip_download = true\n") + _SWEPT,
    ),
    Journey("start", Stage.start_container, _pulled, config=_SWEPT),
    Journey(
        "start in a user namespace",
        lambda stage: stage.start_container(_MAPPED),
        _pulled,
        config=named("host", "tar-index", "remap_ids = true\n") + _SWEPT,
    ),
    Journey("commit of changes", Stage.commit_changes, _changed, _committed, _SWEPT),
    Journey("stop", Stage.stop_container, _changed, _gone, _SWEPT),
    Journey(
        "stop in a user namespace",
        Stage.stop_container,
        _changed_in_a_user_namespace,
        _gone,
        named("host", "tar-index", "remap_ids = true\n") + _SWEPT,
    ),
    Journey("removal", Stage.remove_image, _pulled, _all_gone, _SWEPT, fresh=True),
    Journey("pull of another compression", _recompressed, _pulled, config=_SWEPT),
    Journey("refused start", _refused, _pulled, config=named("host", "tar-index", "max_layers = 3\n") + _SWEPT),
    Journey("boot", _begun, _left_by_others, _runs, _SWEPT, boot=True),
    Journey("kata-tardev: boot", _begun, _links_left, _runs, _TARDEV, boot=True),
    Journey("kata-erofs: boot", _begun, _sidecars_left, _runs, _EROFS, boot=True),
    Journey("kata-tardev: pull", _pulled, check=_runs, config=_TARDEV),
    Journey("kata-tardev: start", Stage.start_container, _pulled, config=_TARDEV),
    Journey("kata-tardev: mending", _mend, _damage, _runs, _TARDEV, damages=True),
    Journey("kata-tardev: removal", Stage.remove_image, _pulled, _all_gone, _TARDEV, fresh=True),
    Journey("kata-erofs: start", Stage.start_container, _pulled, config=_EROFS),
    Journey("kata-erofs: removal", Stage.remove_image, _runs, _all_gone, _EROFS, fresh=True),
]


def make_stage(directory: Path, journey: Journey, env: Mapping[str, str] = {}) -> Stage:
    """Not started yet."""
    (directory / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    daemon = Daemon(directory / "daemon", directory / "containerd", journey.config)
    control = Control(directory / "control")
    control.arm()
    return Stage(daemon, control, env)


def until_dead(stage: Stage) -> bool:
    """Whether the daemon has killed itself, perhaps behind its reply."""
    process = stage.daemon.process
    assert process is not None
    with contextlib.suppress(TimeoutError):
        wait_for("it is dead", lambda: process.poll() is not None, 3)
    return process.poll() is not None


def layers_of(daemon: Daemon) -> list[metastore.Layer]:
    return metastore.read(daemon.root / metastore.FILE_NAME)[1]


def allocated_bytes(root: Path) -> int:
    """Of all files below it, but for the database, which keeps what it has once had, and its reserve."""
    found: dict[int, int] = {}
    for directory, _, names in os.walk(root):
        for name in names:
            if not name.startswith(("metadata.db", "reserve")):
                status = os.lstat(os.path.join(directory, name))
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())
