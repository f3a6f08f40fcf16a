# SPDX-License-Identifier: Apache-2.0
"""Layers that are prepared side by side without a parent and get it with their Commit (containerd 2.2: core/unpack,
capability "rebase"), with Apply and, where only the snapshot plugin is configured, without."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import signal
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from snapshotter.api.proto import snapshots_pb2, types_pb2
from tests.harness import SNAPSHOTTER, Daemon, run, wait_for
from tests.integration.test_snapshots_api import PLAIN, REF, Api, Code, chain_of, digest_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Api]:
    with daemon.client() as client:
        yield Api(daemon, client)


def content_of(api: Api) -> Path:
    return api.daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs/sha256"


def put(api: Api, data: bytes) -> str:
    """As containerd does: what is in the directory is complete."""
    path = content_of(api) / hashlib.sha256(data).hexdigest()
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.rename(path)
    return digest_of(data)


def put_image(api: Api, diff_ids: Sequence[str], blobs: Sequence[bytes], *, layers: bool = True) -> None:
    """Manifest and config, in the order in which they are fetched, and the layers."""
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}).encode()
    descriptors = [{"mediaType": PLAIN, "digest": digest_of(blob), "size": len(blob)} for blob in blobs]
    manifest = {"config": {"digest": digest_of(config), "size": len(config)}, "layers": descriptors}
    put(api, json.dumps(manifest).encode())
    put(api, config)
    for blob in blobs if layers else ():
        put(api, blob)


class Unpacker:
    """What containerd's does from 2.2 on, request by request."""

    def __init__(self, api: Api, names: Sequence[str] = NAMES, namespace: str = "default") -> None:
        self.api, self.names, self.namespace = api, names, namespace
        self.chains = [chain_of(names[: count + 1]) for count in range(len(names))]
        self._numbers = itertools.count(1 + random.randrange(1 << 40))
        self.keys: list[str] = []

    def _key(self, text: str) -> str:
        return f"{self.namespace}/{next(self._numbers)}/{text}"

    def labels(self, number: int) -> dict[str, str]:
        """The second and third from 2.3 on."""
        labels = {REF: self.chains[number], "containerd.io/snapshot/diff-id": digest_of(tar_of(self.names[number]))}
        if number:
            labels["containerd.io/snapshot/parent-chain-id"] = self.chains[number - 1]
        return labels

    def prepare(self) -> None:
        self.keys = [self._key(f"extract-{number}-Ab_- {chain}") for number, chain in enumerate(self.chains)]
        for number, key in enumerate(self.keys):
            self.mounts(number, self.api.prepare(key, labels=self.labels(number)))

    def mounts(self, number: int, mounts: list[types_pb2.Mount]) -> None:
        pass

    def commit(self) -> list[str]:
        """In order, each on the one before."""
        names: list[str] = []
        for number, (key, chain) in enumerate(zip(self.keys, self.chains, strict=True)):
            names.append(self._key(chain))
            self.api.commit(names[-1], key, self.labels(number), parent=names[-2] if number else "")
        return names


class Applying(Unpacker):
    """With the diff plugin: each layer is applied as soon as it is there, whatever the others do."""

    def __init__(self, api: Api, names: Sequence[str] = NAMES, namespace: str = "default") -> None:
        super().__init__(api, names, namespace)
        self._threads = ThreadPoolExecutor(3)
        self._applied: list[Future[str]] = []

    def mounts(self, number: int, mounts: list[types_pb2.Mount]) -> None:
        self._applied.append(self._threads.submit(self.api.apply, tar_of(self.names[number]), mounts))

    def commit(self) -> list[str]:
        self._threads.shutdown()
        diff_ids = [applied.result() for applied in self._applied]
        assert diff_ids == [digest_of(tar_of(name)) for name in self.names]
        return super().commit()


def seen(api: Api, parent: str, target: Path) -> set[str]:
    """What a container on it sees."""
    key = api.key(f"pod {random.randrange(1 << 40)}")
    (mount,) = api.prepare(key, parent)
    target.mkdir(exist_ok=True)
    run("mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, target)
    try:
        return {path.name for path in target.iterdir()}
    finally:
        run("umount", target)
        api.remove(key)


@pytest.mark.parametrize("kind", [Applying, Unpacker])
def test_layers_get_their_parents_at_commit(api: Api, tmp_path: Path, kind: type[Unpacker]) -> None:
    if kind is Unpacker:
        put_image(api, [digest_of(tar_of(name)) for name in NAMES], [tar_of(name) for name in NAMES])
    unpacker = kind(api)
    unpacker.prepare()
    assert {api.stat(key).parent for key in unpacker.keys} == {""}
    names = unpacker.commit()
    assert [api.stat(name).parent for name in names] == ["", *names[:-1]]
    assert [dict(api.stat(name).labels) for name in names] == [unpacker.labels(number) for number in range(len(NAMES))]
    assert seen(api, names[-1], tmp_path / "m") == set(NAMES)
    assert seen(api, names[1], tmp_path / "m") == set(NAMES[:2])
    assert api.daemon.metric("tardev_builds_total") == len(NAMES)
    # A second one at the same time has what it needs, but not the names.
    again = kind(api, namespace="other")
    again.prepare()
    assert seen(api, again.commit()[-1], tmp_path / "m") == set(NAMES)
    assert api.daemon.metric("tardev_builds_total") == len(NAMES)
    for name in reversed(names):
        api.remove(name)


@pytest.mark.parametrize("kind", [Applying, Unpacker])
def test_many_unpackers_of_one_image_at_once(api: Api, kind: type[Unpacker]) -> None:
    if kind is Unpacker:
        put_image(api, [digest_of(tar_of(name)) for name in NAMES], [tar_of(name) for name in NAMES])

    def unpack(number: int) -> str:
        unpacker = kind(api, namespace=f"n{number}")
        unpacker.prepare()
        return unpacker.commit()[-1]

    with ThreadPoolExecutor(8) as threads:
        tops = list(threads.map(unpack, range(8)))
    assert len(set(tops)) == 8
    assert api.daemon.metric("tardev_builds_total") == len(NAMES)
    assert api.daemon.metric("tardev_builds_total", result="ok") == len(NAMES)


def test_a_layer_needs_no_parent_to_be_built_early(api: Api) -> None:
    """Commit is called within containerd's write transaction: nothing is left to build there."""
    unpacker = Unpacker(api)
    put_image(api, [digest_of(tar_of(name)) for name in NAMES], [tar_of(name) for name in NAMES], layers=False)
    unpacker.prepare()
    for name in reversed(NAMES):
        put(api, tar_of(name))
    wait_for("all are built", lambda: len(api.daemon.layer_files()) == len(NAMES))
    unpacker.commit()
    assert api.daemon.metric("tardev_builds_total") == len(NAMES)


def test_blobs_that_another_image_lists_beside_the_diff_ids_are_passed_over(api: Api, tmp_path: Path) -> None:
    """It is there first; and what its blobs are is found out before any parent is known."""
    diff_ids = [digest_of(tar_of(name)) for name in NAMES]
    put_image(api, diff_ids, [tar_of(f"evil {name}") for name in NAMES])
    unpacker = Unpacker(api)
    unpacker.prepare()
    wait_for("its blobs are built", lambda: len(api.daemon.layer_files()) == len(NAMES))
    put_image(api, diff_ids, [tar_of(name) for name in NAMES])
    assert seen(api, unpacker.commit()[-1], tmp_path / "m") == set(NAMES)


def test_a_wrong_parent_is_refused_and_the_right_one_then_taken(api: Api) -> None:
    put_image(api, [digest_of(tar_of(name)) for name in NAMES], [tar_of(name) for name in NAMES])
    other = api.layer("other")
    unpacker = Unpacker(api)
    unpacker.prepare()
    chain, key = unpacker.chains[1], unpacker.keys[1]
    for parent in ("", other):
        text = refused(Code.FAILED_PRECONDITION, api.commit, f"default/1/{chain}", key, parent=parent)
        assert chain in text
    refused(Code.NOT_FOUND, api.commit, f"default/1/{chain}", key, parent="default/9/gone")
    unpacker.commit()


def test_an_image_list_that_lies_about_the_chain_is_refused(api: Api) -> None:
    """A diff ID that the chain ID is not made of."""
    put_image(api, [digest_of(tar_of("a")), digest_of(tar_of("x"))], [tar_of("a"), tar_of("b")])
    unpacker = Unpacker(api, ("a", "b"))
    unpacker.prepare()
    text = refused(Code.FAILED_PRECONDITION, unpacker.commit)
    assert unpacker.chains[1] in text


# What kept a candidate from being built and passes.


def big_tar(mebibytes: int) -> bytes:
    out = io.BytesIO()
    piece = random.Random(1).randbytes(1 << 20)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(mebibytes):
            member = tarfile.TarInfo(f"f{number}")
            member.size = len(piece)
            tar.addfile(member, io.BytesIO(piece))
    return out.getvalue()


def workers(daemon: Daemon) -> list[int]:
    assert daemon.process is not None
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == daemon.process.pid:
                found.append(int(process.name))
        except OSError:
            pass
    return found


def test_a_killed_worker_costs_a_build_and_no_candidate(api: Api) -> None:
    data = big_tar(200)  # long enough to be met
    put_image(api, [digest_of(data)], [data])
    key = api.key(f"extract-1-x {digest_of(data)}")
    api.prepare(key)
    wait_for("a build runs", lambda: workers(api.daemon))
    for pid in workers(api.daemon):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    wait_for("it has failed", lambda: api.daemon.metric("tardev_builds_total", result="failed") == 1)
    api.commit(api.key(digest_of(data)), key)
    assert api.daemon.metric("tardev_builds_total", result="ok") == 1


def test_a_full_disk_costs_a_build_and_no_candidate(tmp_path: Path) -> None:
    blobs = tmp_path / "containerd/io.containerd.content.v1.content/blobs/sha256"
    blobs.mkdir(parents=True)
    daemon = Daemon(tmp_path / "daemon", tmp_path / "containerd")
    daemon.root.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", daemon.root)
    try:
        daemon.start()
        with daemon.client() as client:
            api = Api(daemon, client)
            data = big_tar(60)
            put_image(api, [digest_of(data)], [data])
            key, name = api.key(f"extract-1-x {digest_of(data)}"), api.key(digest_of(data))
            api.prepare(key)
            text = refused(Code.RESOURCE_EXHAUSTED, api.commit, name, key)
            assert digest_of(data) in text
            assert not daemon.staged()
            run("mount", "-o", "remount,size=200m", daemon.root)
            api.commit(name, key)
            assert api.list() == [name]
    finally:
        daemon.stop()
        run("umount", daemon.root)


def test_bad_bytes_are_built_once_for_a_snapshot_and_said_again(api: Api) -> None:
    data = b"no tar " * 1000
    put_image(api, [digest_of(data)], [data])
    key = api.key(f"extract-1-x {digest_of(data)}")
    api.prepare(key)
    for _ in range(3):
        text = refused(Code.INVALID_ARGUMENT, api.commit, f"default/9/{digest_of(data)}", key)
        assert digest_of(data) in text
    time.sleep(0.5)
    assert api.daemon.metric("tardev_builds_total") == 1


def test_a_parent_that_goes_while_a_commit_waits_for_it_is_not_found(api: Api) -> None:
    """Between the look at it and the transaction that names it."""
    below = api.layer("a")
    key = api.unpacked("a", "b")
    request = snapshots_pb2.CommitSnapshotRequest(
        snapshotter=SNAPSHOTTER, name=f"default/9/{chain_of(['a', 'b'])}", key=key, parent=below
    )
    for _ in range(20):
        commit = api.stub.Commit.future(request, timeout=30)
        remove = api.stub.Remove.future(
            snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=below), timeout=30
        )
        if commit.code() is Code.OK:
            assert remove.code() is grpc.StatusCode.FAILED_PRECONDITION
            break
        assert (commit.code(), remove.code()) == (Code.NOT_FOUND, Code.OK)
        assert api.stat(key).kind == snapshots_pb2.ACTIVE
        below = api.layer("a")
        request.parent = below
