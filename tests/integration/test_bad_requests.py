# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody should make, and callers that go away in the middle: the exact code, and nothing changed."""

from __future__ import annotations

import functools
import gzip
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from snapshotter.metastore import Kind, read
from tests.harness import SNAPSHOTTER, Daemon, wait_for
from tests.integration.test_parallel_unpack import big_tar, put, put_image
from tests.integration.test_snapshots_api import PLAIN, REF, Api, Code, chain_of, digest_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]


@dataclass(frozen=True)
class World:
    """Everything that a call could change."""

    snapshots: tuple[bytes, ...]
    directories: frozenset[str]
    mounts: tuple[str, ...]
    layer_files: tuple[str, ...]
    staged: int


def world(api: Api) -> World:
    infos = [info for message in api.messages() for info in message.info]
    return World(
        tuple(info.SerializeToString(deterministic=True) for info in infos),
        frozenset(api.directories()),
        tuple(sorted(api.daemon.mounts())),
        tuple(path.name for path in api.daemon.layer_files()),
        len(api.daemon.staged()),
    )


@dataclass
class Populated:
    """One snapshot of each kind."""

    api: Api
    below: str
    top: str
    active: str
    container: str
    view: str
    look: str
    applied: str
    empty: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One daemon for all tests here: none may leave anything."""
    directory = tmp_path_factory.mktemp("requests")
    (directory / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    daemon = Daemon(directory / "daemon", directory / "containerd")
    daemon.start()
    with daemon.client() as client:
        yield Api(daemon, client)
    daemon.clean_up()


@pytest.fixture
def populated(shared: Api) -> Iterator[Populated]:
    api = shared
    below = api.layer("a", labels={REF: chain_of(["a"])})
    top = api.layer("a", "b", parent=below)
    made = Populated(
        api, below, top, api.key("active"), api.key("container"), api.key("view"), api.key("look"),
        api.unpacked("a", "b", "c", parent=top), api.key(f"extract-1-x {chain_of(['never', 'fetched'])}"),
    )  # fmt: skip
    (mount,) = api.prepare(made.active)
    (Path(mount.source) / "file").write_text("x")
    api.prepare(made.container, top)
    api.view(made.view)
    api.view(made.look, top)
    api.prepare(made.empty, below)
    wait_for("the committed ones' directories go", lambda: len(api.directories()) == 5)
    yield made
    for name in reversed(api.list()):
        api.remove(name)
    wait_for("nothing is left", lambda: is_consistent(api) and not api.directories())


def test_wrong_kinds_unknown_and_existing_keys(populated: Populated) -> None:
    api, it = populated.api, populated
    uncommitted = (it.active, it.container, it.view, it.look, it.applied, it.empty)
    everything = (it.below, it.top, *uncommitted)
    before = world(api)
    for key in everything:
        for call in (api.prepare, api.view):
            assert key in refused(Code.ALREADY_EXISTS, call, key)
            assert key in refused(Code.ALREADY_EXISTS, call, key, it.top)
        assert key in refused(Code.ALREADY_EXISTS, api.commit, key, it.applied)
        assert key in refused(Code.ALREADY_EXISTS, api.commit, key, "absent")
    for parent in uncommitted:
        for call in (api.prepare, api.view):
            assert parent in refused(Code.INVALID_ARGUMENT, call, "default/9/new", parent)
    for absent in ("absent", "", "default/1/", f"{it.active} ", it.active[:-1], it.active.upper()):
        if absent:
            for call in (api.prepare, api.view):
                refused(Code.NOT_FOUND, call, "default/9/new", absent)
        for ask in (api.mounts, api.stat, api.usage, api.remove):
            refused(Code.NOT_FOUND, ask, absent)
        refused(Code.NOT_FOUND, api.commit, "default/9/new", absent)
        for paths in ((), ("labels",), ("labels.a",), ("parent",)):
            refused(Code.NOT_FOUND, api.update, absent, {"a": "b"}, *paths)
    for committed in (it.below, it.top):
        assert committed in refused(Code.FAILED_PRECONDITION, api.mounts, committed)
        assert committed in refused(Code.FAILED_PRECONDITION, api.remove, committed)
    for wrong in (it.below, it.top, it.view, it.look):
        assert wrong in refused(Code.FAILED_PRECONDITION, api.commit, "default/9/new", wrong)
    refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain_of(['never', 'fetched'])}", it.empty)
    refused(Code.FAILED_PRECONDITION, api.commit, "default/9/named as I like", it.empty)
    refused(Code.INVALID_ARGUMENT, api.commit, "", it.applied)
    for parent in (it.below, "default/9/absent"):
        refused(Code.INVALID_ARGUMENT, api.commit, "default/9/new", it.applied, parent=parent)
    for call in (api.prepare, api.view):
        refused(Code.INVALID_ARGUMENT, call, "")
    assert world(api) == before


BAD_FILTERS = ("kind=active", "labels.", "name~=(", 'name=="open', "\n", "x\0", "ü==1", "==", "a,,b")
BAD_PATHS = ("parent", "name", "kind", "created_at", "updated_at", "Labels", "label", "labelsx", "labels/a", "", "*")


def test_bad_filters_and_masks(populated: Populated) -> None:
    api = populated.api
    before = world(api)
    for bad in (
        "kind=active",
        "labels.",
        "name~=(",
        'name=="open',
        "\n",
        "x\0",
        "ü==1",
        "==",
        "a,,b",
        "name==" + "x" * 70_000,
    ):
        refused(Code.INVALID_ARGUMENT, api.list, bad)
        refused(Code.INVALID_ARGUMENT, api.list, "kind==active", bad)
    for path in (
        "parent",
        "name",
        "kind",
        "created_at",
        "updated_at",
        "Labels",
        "label",
        "labelsx",
        "labels/a",
        "",
        "*",
    ):
        for key in (populated.top, populated.active, populated.view):
            for paths in ((path,), ("labels.a", path), (path, "labels")):
                refused(Code.INVALID_ARGUMENT, api.update, key, {"a": "2"}, *paths)
    assert world(api) == before


def test_foreign_and_empty_mounts(populated: Populated) -> None:
    api, it = populated.api, populated
    root = api.daemon.root / "snapshots"
    (ours,) = api.mounts(it.active)
    (overlay,) = api.mounts(it.container)
    (extraction,) = api.mounts(it.applied)
    good = tar_of("d")
    put(api, good)
    Mount = types_pb2.Mount
    foreign: list[list[types_pb2.Mount]] = [
        [],
        [Mount()],
        [Mount(type="bind")],
        [Mount(type="bind", source="/etc")],
        [Mount(type="bind", source=f"{root}/../snapshots/x/fs")],
        [Mount(type="bind", source=f"{root}/1")],
        [Mount(type="bind", source=f"{root}/1/fs/below")],
        [Mount(type="bind", source=f"{root}/{'9' * 40}/fs")],
        [Mount(type="bind", source=f"{root}/\u0663/fs")],
        [Mount(type="overlay", source="overlay", options=["lowerdir=/a:/b"])],
        [Mount(type="erofs", source=ours.source)],
        [extraction, extraction],
        # Holds changes: what is in it would be lost.
        [ours],
    ]
    before = world(api)
    for mounts in foreign:
        refused(Code.UNIMPLEMENTED, api.apply, good, mounts)
    # Ours, but nobody's any more; or nobody's yet.
    refused(Code.NOT_FOUND, api.apply, good, [Mount(type="bind", source=f"{root}/99999/fs")])
    # Another layer is there already.
    assert it.applied in refused(Code.FAILED_PRECONDITION, api.apply, good, [extraction])
    assert overlay.type == "overlay"
    after = world(api)
    # A layer of its own it is by now, which nothing refers to.
    assert set(after.layer_files) - set(before.layer_files) <= {digest_of(good).removeprefix("sha256:")}
    assert after == World(after.snapshots, before.directories, before.mounts, after.layer_files, 0)
    assert after.snapshots == before.snapshots
    refused(Code.UNIMPLEMENTED, api.diff.Diff, diff_pb2.DiffRequest(), timeout=30)


def test_labels_cannot_make_anything_what_it_is_not(populated: Populated) -> None:
    """Annotations of a pod and of a layer's descriptor become labels: anybody writes them."""
    api, it = populated.api, populated
    forged = {
        REF: chain_of(["a"]),
        "containerd.io/snapshot/cri.layer-digest": digest_of(tar_of("a")),
        "containerd.io/snapshot/cri.image-layers": digest_of(tar_of("a")),
        "containerd.io/snapshot/diff-id": digest_of(tar_of("z")),
        "containerd.io/snapshot/parent-chain-id": chain_of(["z"]),
        "containerd.io/snapshot/max-size": "-1",
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/overlaybd.blob-digest": "x",
    }
    plain = api.prepare(api.key("0123456789abcdef"), it.top)
    dressed = api.prepare(api.key("fedcba9876543210"), it.top, forged)
    assert [mount.type for mount in plain] == [mount.type for mount in dressed] == ["overlay"]
    alone = api.prepare(api.key("sandbox"), labels=forged)
    assert "noexec" not in alone[0].options
    # An extraction's labels say nothing of its layer either.
    key = api.key(f"extract-1-x {chain_of(['a', 'b', 'd'])}")
    mounts = api.prepare(key, it.top, forged)
    assert api.apply(tar_of("d"), mounts) == digest_of(tar_of("d"))
    refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain_of(['a'])}", key, forged)
    name = api.key(chain_of(["a", "b", "d"]))
    api.commit(name, key, forged)
    assert dict(api.stat(name).labels) == forged
    assert api.mounts(it.container) == api.mounts(it.container)


KEYS = {
    "spaces": "default/1/ a  b ",
    "slashes": "default/1//a///b/",
    "colons": "default/1/a:b:c::",
    "like an extraction": "default/1/extract-1-x no chain",
    "like a path": "/var/lib/x/../y",
    "4 KiB": "default/1/" + "k" * 4096,
    "4 KiB without a namespace": "k" * 4096,
    "4 KiB of blanks": " " * 4096,
    "4 KiB of slashes": "/" * 4096,
    "4 KiB of colons, extracted": "default/1/extract-" + ":" * 4096 + " sha256:" + "0" * 64,
}


@pytest.mark.parametrize("name", KEYS)
def test_odd_keys_go_through_everything_without_a_namespace(populated: Populated, name: str) -> None:
    """containerd 1.6 sends none; and what a key begins with need not be one."""
    api, key = populated.api, KEYS[name]
    before = world(api)
    mounts = api.prepare(key, populated.top)
    assert api.mounts(key) == mounts
    assert api.stat(key).parent == populated.top
    assert api.usage(key)[1] >= 1
    assert api.list(f'name=="{key}"') == [key]
    assert dict(api.update(key, {"a": "b"}, "labels.a").labels) == {"a": "b"}
    for call in (api.prepare, api.view):
        refused(Code.ALREADY_EXISTS, call, key)
        refused(Code.INVALID_ARGUMENT, call, "default/9/new", key)
    assert api.apply(tar_of("c"), mounts) == digest_of(tar_of("c"))
    refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain_of(['c'])}", key)
    api.commit(f"{key}, committed", key)
    assert api.stat(f"{key}, committed").parent == populated.top
    api.remove(f"{key}, committed")
    wait_for("all is as before", lambda: world(api) == before)


# Callers that go away


@functools.cache
def big_blob() -> bytes:
    return gzip.compress(big_tar(24), 1)


def uploaded(api: Api) -> types_pb2.Descriptor:
    data = big_blob()
    put(api, data)
    return types_pb2.Descriptor(media_type=f"{PLAIN}+gzip", digest=digest_of(data), size=len(data))


def futures(it: Populated) -> dict[str, Callable[[], Any]]:
    """A call of each kind that would succeed."""
    api, stub = it.api, it.api.stub
    named: dict[str, Any] = {"snapshotter": SNAPSHOTTER}
    (extraction,) = api.mounts(it.empty)
    return {
        "Prepare": lambda: stub.Prepare.future(
            snapshots_pb2.PrepareSnapshotRequest(**named, key="client/8/new", parent=it.top)
        ),
        "Prepare, to be unpacked": lambda: stub.Prepare.future(
            snapshots_pb2.PrepareSnapshotRequest(
                **named, key=f"client/8/extract-1-x {chain_of(['a', 'z'])}", parent=it.below
            )
        ),
        "View": lambda: stub.View.future(snapshots_pb2.ViewSnapshotRequest(**named, key="client/8/new", parent=it.top)),
        "Mounts": lambda: stub.Mounts.future(snapshots_pb2.MountsRequest(**named, key=it.container)),
        "Commit": lambda: stub.Commit.future(
            snapshots_pb2.CommitSnapshotRequest(**named, name=f"client/8/{chain_of(['a', 'b', 'c'])}", key=it.applied)
        ),
        "Remove": lambda: stub.Remove.future(snapshots_pb2.RemoveSnapshotRequest(**named, key=it.container)),
        "Stat": lambda: stub.Stat.future(snapshots_pb2.StatSnapshotRequest(**named, key=it.container)),
        "Update": lambda: stub.Update.future(
            snapshots_pb2.UpdateSnapshotRequest(
                **named, info=snapshots_pb2.Info(name=it.active, labels={"new": "label"})
            )
        ),
        "List": lambda: stub.List(snapshots_pb2.ListSnapshotsRequest(**named)),
        "Usage": lambda: stub.Usage.future(snapshots_pb2.UsageRequest(**named, key=it.container)),
        "Cleanup": lambda: stub.Cleanup.future(snapshots_pb2.CleanupRequest(**named)),
        "Apply": lambda: api.diff.Apply.future(diff_pb2.ApplyRequest(diff=uploaded(api), mounts=[extraction])),
        "Diff": lambda: api.diff.Diff.future(diff_pb2.DiffRequest(left=[extraction], right=[extraction])),
    }


METHODS = (
    "Prepare", "Prepare, to be unpacked", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage",
    "Cleanup", "Apply", "Diff",
)  # fmt: skip
CHANGING = {"Commit", "Remove", "Update"}  # happen or do not; the others leave no trace


@contextmanager
def nobody_writes(api: Api) -> Iterator[None]:
    """Whoever wants to, waits."""
    with closing(sqlite3.connect(api.daemon.root / "metadata.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def is_consistent(api: Api) -> bool:
    """Directories are those of the snapshots that have some, mounts those of layers below containers."""
    rows, _ = read(api.daemon.root / "metadata.db")
    containers = [row for row in rows if row.kind in (Kind.ACTIVE, Kind.VIEW) and not row.extraction and row.parent]
    return (
        api.directories() == {str(row.id) for row in rows if row.has_directory}
        and bool(api.daemon.mounts()) == bool(containers)
        and not api.daemon.staged()
        and api.daemon.metric("tardev_rpc_running") == api.daemon.metric("tardev_rpc_left") == 0
    )


def code_of(call: Any) -> grpc.StatusCode:
    """Of one that was cancelled; OK where the answer came first."""
    if call.cancelled():
        return Code.CANCELLED
    found: grpc.StatusCode = call.code()
    return found


def under_way(api: Api, ended: float) -> bool:
    """A call, or over since: `ended` is how many were before it."""
    metric = api.daemon.metric
    return metric("tardev_rpc_running") > 0 or metric("tardev_rpc_seconds_count") > ended


@pytest.mark.parametrize("method", METHODS)
def test_a_caller_that_goes_away(populated: Populated, method: str) -> None:
    """At several moments, and once for certain in the middle: while the transaction waits for another's."""
    api = populated.api
    begin = futures(populated)[method]
    before, builds = world(api), api.daemon.metric("tardev_builds_total", result="ok")

    def settled() -> World:
        wait_for("all is consistent", lambda: is_consistent(api))
        return world(api)

    for delay in ("lock", 0.0, 0.001, 0.003, 0.01):
        if delay == "lock":
            with nobody_writes(api):
                ended = api.daemon.metric("tardev_rpc_seconds_count")
                call = begin()
                wait_for("it is under way", lambda: under_way(api, ended))  # noqa: B023
                call.cancel()
                wait_for("it has ended", lambda: not api.daemon.metric("tardev_rpc_running"))
        else:
            call = begin()
            time.sleep(float(delay))
            call.cancel()
        if method == "List":
            assert world(api) == before
            continue
        code = code_of(call)
        assert code in (Code.CANCELLED, Code.OK) or (method == "Diff" and code is Code.UNIMPLEMENTED)
        now = settled()
        if delay != "lock" and method not in CHANGING:
            # The answer was under way already: the snapshot is whole, and containerd's garbage collection takes it.
            for new in [name for name in api.list() if name.startswith("client/8/")]:
                assert api.mounts(new)
                api.remove(new)
                now = settled()
        if method == "Apply":
            # The build of one that has gone goes on for a while; what it makes is a layer that nothing refers to.
            assert now.snapshots == before.snapshots
            continue
        if method in CHANGING and now.snapshots != before.snapshots:
            break
        assert now == before
    # Whatever came of it, the same call does its work now, or says that it is done.
    call = begin()
    if method == "List":
        assert list(call)
        return
    code = call.code()
    done = {"Commit": Code.ALREADY_EXISTS, "Remove": Code.NOT_FOUND, "Diff": Code.UNIMPLEMENTED}
    assert code is Code.OK or code is done.get(method)
    settled()
    if method == "Apply":
        assert api.daemon.metric("tardev_builds_total", result="ok") == builds + 1


def test_a_caller_that_goes_away_while_its_commit_waits_for_a_build(populated: Populated) -> None:
    api, data = populated.api, big_tar(100)
    before = api.daemon.metric("tardev_builds_total")
    key, name = api.key(f"extract-1-x {digest_of(data)}"), api.key(digest_of(data))
    api.prepare(key)
    put_image(api, [digest_of(data)], [data])
    request = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=name, key=key)
    for _ in range(3):
        call = api.stub.Commit.future(request)
        time.sleep(0.05)
        call.cancel()
        assert code_of(call) is Code.CANCELLED
    assert api.stat(key).kind == snapshots_pb2.ACTIVE
    # The build did not go with them, and is not begun again.
    api.commit(name, key)
    assert api.daemon.metric("tardev_builds_total") == before + 1
