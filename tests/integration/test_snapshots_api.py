# SPDX-License-Identifier: Apache-2.0
"""Every call of Snapshots v1 on the real daemon's socket, as containerd would make it and as it would not."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc

from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.harness import BIN, SNAPSHOTTER, Client, Daemon, run, wait_for

pytestmark = pytest.mark.root

Code = grpc.StatusCode
PLAIN = "application/vnd.oci.image.layer.v1.tar"
REF = "containerd.io/snapshot.ref"
SERVICE = "containerd.services.snapshots.v1.Snapshots"
NOBODY = 65534


def tar_of(name: str) -> bytes:
    """One layer: a file of that name and content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(name)
        tar.addfile(member, io.BytesIO(name.encode()))
    return out.getvalue()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_of(names: Sequence[str]) -> str:
    chain = ""
    for name in names:
        diff_id = digest_of(tar_of(name))
        chain = digest_of(f"{chain} {diff_id}".encode()) if chain else diff_id
    return chain


class Api:
    """The stubs' calls, with their requests spelled out."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.daemon, self.stub, self.diff = daemon, client.snapshots, client.diff
        self._numbers = itertools.count(1)

    def key(self, text: str) -> str:
        """As containerd's metadata layer hands it on."""
        return f"default/{next(self._numbers)}/{text}"

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None, snapshotter: str = SNAPSHOTTER
    ) -> list[types_pb2.Mount]:
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=labels or {}
        )
        return list(self.stub.Prepare(request, timeout=30).mounts)

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None, snapshotter: str = SNAPSHOTTER
    ) -> list[types_pb2.Mount]:
        request = snapshots_pb2.ViewSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=labels or {}
        )
        return list(self.stub.View(request, timeout=30).mounts)

    def mounts(self, key: str, snapshotter: str = SNAPSHOTTER) -> list[types_pb2.Mount]:
        return list(self.stub.Mounts(snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key), timeout=30).mounts)

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        parent: str = "",
        snapshotter: str = SNAPSHOTTER,
    ) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(
            snapshotter=snapshotter, name=name, key=key, labels=labels or {}, parent=parent
        )
        self.stub.Commit(request, timeout=30)

    def remove(self, key: str, snapshotter: str = SNAPSHOTTER) -> None:
        self.stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key), timeout=30)

    def stat(self, key: str, snapshotter: str = SNAPSHOTTER) -> snapshots_pb2.Info:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key)
        info: snapshots_pb2.Info = self.stub.Stat(request, timeout=30).info
        return info

    def update(
        self, name: str, labels: Mapping[str, str], *paths: str, snapshotter: str = SNAPSHOTTER, **fields: Any
    ) -> snapshots_pb2.Info:
        request = snapshots_pb2.UpdateSnapshotRequest(
            snapshotter=snapshotter,
            info=snapshots_pb2.Info(name=name, labels=labels, **fields),
            update_mask=FieldMask(paths=paths) if paths else None,
        )
        info: snapshots_pb2.Info = self.stub.Update(request, timeout=30).info
        return info

    def messages(self, *filters: str, snapshotter: str = SNAPSHOTTER) -> list[snapshots_pb2.ListSnapshotsResponse]:
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter, filters=filters)
        return list(self.stub.List(request, timeout=30))

    def list(self, *filters: str, snapshotter: str = SNAPSHOTTER) -> list[str]:
        return [info.name for message in self.messages(*filters, snapshotter=snapshotter) for info in message.info]

    def usage(self, key: str, snapshotter: str = SNAPSHOTTER) -> tuple[int, int]:
        reply = self.stub.Usage(snapshots_pb2.UsageRequest(snapshotter=snapshotter, key=key), timeout=30)
        return reply.size, reply.inodes

    def cleanup(self, snapshotter: str = SNAPSHOTTER) -> None:
        self.stub.Cleanup(snapshots_pb2.CleanupRequest(snapshotter=snapshotter), timeout=30)

    def apply(self, data: bytes, mounts: Sequence[types_pb2.Mount]) -> str:
        digest = digest_of(data)
        blobs = self.daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs/sha256"
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        descriptor = types_pb2.Descriptor(media_type=PLAIN, digest=digest, size=len(data))
        return str(self.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60).applied.digest)

    def unpacked(self, *names: str, parent: str = "", labels: Mapping[str, str] | None = None) -> str:
        """The key of an extraction to which the last layer was applied."""
        key = self.key(f"extract-1-x {chain_of(names)}")
        self.apply(tar_of(names[-1]), self.prepare(key, parent, labels))
        return key

    def layer(self, *names: str, parent: str = "", labels: Mapping[str, str] | None = None) -> str:
        """The name of a committed layer, the last of the chain."""
        key = self.unpacked(*names, parent=parent, labels=labels)
        name = self.key(chain_of(names))
        self.commit(name, key, labels)
        return name

    def directories(self) -> set[str]:
        return {path.name for path in (self.daemon.root / "snapshots").iterdir()}


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Api]:
    with daemon.client() as client:
        yield Api(daemon, client)


def refused(code: grpc.StatusCode, call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The text of the status."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    text = str(caught.value.details())
    assert caught.value.code() is code, text
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 4096
    # containerd's client takes such an end for another kind of error.
    assert not text.endswith((": conflict", ": not modified"))
    return text


def at(info: snapshots_pb2.Info) -> tuple[int, int]:
    return info.created_at.ToNanoseconds(), info.updated_at.ToNanoseconds()


# Prepare and View


def test_prepare_answers_a_writable_empty_directory_and_remembers_what_was_asked(api: Api) -> None:
    before = time.time_ns()
    labels = {REF: "x", "containerd.io/snapshot/a.b/c": "ü"}
    key = api.key("0123456789abcdef")
    (mount,) = api.prepare(key, labels={**labels, "an empty one is none": ""})
    assert (mount.type, mount.target) == ("bind", "")
    assert {"rbind", "rw"} <= set(mount.options)
    directory = Path(mount.source)
    assert directory.is_relative_to(api.daemon.root)
    assert not list(directory.iterdir())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    info = api.stat(key)
    assert (info.name, info.parent, info.kind) == (key, "", snapshots_pb2.ACTIVE)
    assert dict(info.labels) == labels
    created, updated = at(info)
    assert before <= created == updated <= time.time_ns()


def test_a_view_of_nothing_is_read_only(api: Api) -> None:
    key = api.key("look")
    (mount,) = api.view(key, labels={"a": "b"})
    assert mount.type == "bind"
    assert "ro" in mount.options
    assert "rw" not in mount.options
    info = api.stat(key)
    assert (info.kind, dict(info.labels)) == (snapshots_pb2.VIEW, {"a": "b"})


def test_an_extraction_gets_a_directory_in_which_nothing_can_run(api: Api) -> None:
    (mount,) = api.prepare(api.key(f"extract-1-x {chain_of(['a'])}"))
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(mount.options)
    # As "staged already" containerd 2.4 would skip the download.
    assert "ro" not in mount.options
    assert stat.S_IMODE(Path(mount.source).parent.stat().st_mode) == 0o700


def test_one_key_is_one_snapshot_whatever_its_kind(api: Api) -> None:
    active, view, committed = api.key("active"), api.key("view"), api.layer("a")
    api.prepare(active, labels={"first": "1"})
    api.view(view)
    before = {key: api.stat(key) for key in (active, view, committed)}
    directories = api.directories()
    for key in before:
        for call in (api.prepare, api.view):
            assert key in refused(Code.ALREADY_EXISTS, call, key)
            assert key in refused(Code.ALREADY_EXISTS, call, key, committed)
        assert api.stat(key) == before[key]
    assert api.directories() <= directories


def test_a_parent_must_exist_and_be_committed(api: Api) -> None:
    active, view = api.key("active"), api.key("view")
    api.prepare(active)
    api.view(view)
    for call in (api.prepare, api.view):
        assert "default/9/nobody" in refused(Code.NOT_FOUND, call, api.key("child"), "default/9/nobody")
        for parent in (active, view):
            assert parent in refused(Code.INVALID_ARGUMENT, call, api.key("child"), parent)
    assert api.list() == [active, view]
    assert len(api.directories()) == 2


def test_an_empty_key_is_refused(api: Api) -> None:
    for call in (api.prepare, api.view):
        refused(Code.INVALID_ARGUMENT, call, "")
    assert api.list() == []


def test_labels_alone_make_no_unpacking(api: Api) -> None:
    """Annotations of a pod reach its sandbox's Prepare as labels, and anybody writes those."""
    name = api.layer("a", labels={REF: chain_of(["a"])})
    key = api.key("0123456789abcdef")
    forged = {REF: chain_of(["a"]), "containerd.io/snapshot/cri.layer-digest": digest_of(tar_of("a"))}
    (mount,) = api.prepare(key, labels=forged)
    assert "noexec" not in mount.options
    assert api.list() == [name, key]


@pytest.mark.parametrize("kind", ["prepare", "view"])
def test_of_many_calls_for_one_key_exactly_one_wins(api: Api, kind: str) -> None:
    key = api.key("wanted by all")
    if kind == "prepare":
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key)
        calls = [api.stub.Prepare.future(request, timeout=30) for _ in range(30)]
    else:
        request = snapshots_pb2.ViewSnapshotRequest(snapshotter=SNAPSHOTTER, key=key)
        calls = [api.stub.View.future(request, timeout=30) for _ in range(30)]
    codes = [call.code() for call in calls]
    assert sorted(code.name for code in codes) == ["ALREADY_EXISTS"] * 29 + ["OK"]
    (winner,) = [call.result() for call in calls if call.code() is Code.OK]
    assert api.mounts(key) == list(winner.mounts)
    assert Path(winner.mounts[0].source).is_dir()
    assert len(api.directories()) == 1


# Mounts


def test_mounts_are_those_of_prepare_and_of_a_daemon_before(api: Api) -> None:
    keys = {
        api.key("active"): api.prepare,
        api.key(f"extract-1-x {chain_of(['a'])}"): api.prepare,
        api.key("v"): api.view,
    }
    answers = {key: call(key) for key, call in keys.items()}
    assert {key: api.mounts(key) for key in keys} == answers
    api.daemon.stop()
    api.daemon.restart()
    with api.daemon.client() as client:
        assert {key: Api(api.daemon, client).mounts(key) for key in keys} == answers


def test_what_is_committed_has_no_mounts(api: Api) -> None:
    name = api.layer("a")
    assert name in refused(Code.FAILED_PRECONDITION, api.mounts, name)
    assert "'absent'" in refused(Code.NOT_FOUND, api.mounts, "absent")


@pytest.mark.erofs
def test_a_container_sees_its_layers_and_its_mounts_outlive_the_daemon(api: Api, tmp_path: Path) -> None:
    below = api.layer("a")
    top = api.layer("a", "b", parent=below)
    pod, look, one = api.key("pod"), api.key("look"), api.key("one")
    answers = {pod: api.prepare(pod, top), look: api.view(look, top), one: api.view(one, below)}
    assert {key: api.mounts(key) for key in answers} == answers
    assert len(api.daemon.mounts()) == 2
    target = tmp_path / "rootfs"
    target.mkdir()
    for key, expected in ((pod, {"a", "b"}), (look, {"a", "b"}), (one, {"a"})):
        (mount,) = answers[key]
        kind = [] if mount.type == "bind" else ["-t", mount.type]
        run("mount", *kind, "-o", ",".join(mount.options), mount.source, target)
        try:
            assert {path.name for path in target.iterdir()} == expected
            assert all((target / name).read_text() == name for name in expected)
            if key == pod:
                (target / "new").write_text("new")
            else:
                with pytest.raises(OSError, match="Read-only"):
                    (target / "new").write_text("new")
        finally:
            run("umount", target)
    api.daemon.kill()
    api.daemon.restart()
    assert len(api.daemon.mounts()) == 2
    with api.daemon.client() as client:
        after = Api(api.daemon, client)
        assert {key: after.mounts(key) for key in answers} == answers
        after.remove(pod)
        after.remove(look)
        wait_for("the upper layer is released", lambda: len(api.daemon.mounts()) == 1)
        after.remove(one)
        wait_for("nothing is mounted", lambda: not api.daemon.mounts())
        assert after.list() == [below, top]
        wait_for("their directories go", lambda: not after.directories())


# Commit


def test_a_commit_takes_the_name_the_labels_and_the_time(api: Api) -> None:
    labels = {REF: chain_of(["a"]), "only": "prepare"}
    key = api.unpacked("a", labels=labels)
    name = api.key(chain_of(["a"]))
    moment = time.time_ns()
    api.commit(name, key, {REF: chain_of(["a"]), "more": "commit"})
    info = api.stat(name)
    assert (info.name, info.parent, info.kind) == (name, "", snapshots_pb2.COMMITTED)
    assert dict(info.labels) == {REF: chain_of(["a"]), "more": "commit"}
    assert api.list() == [name]
    for call in (api.stat, api.mounts, api.usage, api.remove):
        assert key in refused(Code.NOT_FOUND, call, key)
    wait_for("its directory goes", lambda: not api.directories())
    created, updated = at(info)
    assert moment <= created == updated


def test_a_layer_above_keeps_its_parent(api: Api) -> None:
    below = api.layer("a")
    top = api.layer("a", "b", parent=below)
    assert api.stat(top).parent == below
    # Parents first: containerd's garbage collector builds its tree from this.
    assert api.list() == [below, top]


def test_what_cannot_be_committed(api: Api) -> None:
    name, key = api.layer("a"), api.unpacked("b")
    view = api.key("look")
    api.view(view)
    assert "absent" in refused(Code.NOT_FOUND, api.commit, "default/9/x", "absent")
    assert view in refused(Code.FAILED_PRECONDITION, api.commit, "default/9/x", view)
    assert name in refused(Code.FAILED_PRECONDITION, api.commit, "default/9/x", name)
    for taken in (name, view, key):
        assert taken in refused(Code.ALREADY_EXISTS, api.commit, taken, key)
    refused(Code.INVALID_ARGUMENT, api.commit, "", key)
    empty = api.key(f"extract-1-x {chain_of(['never fetched'])}")
    api.prepare(empty)
    refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain_of(['never fetched'])}", empty)
    assert api.list() == [name, key, view, empty]
    api.commit(api.key(chain_of(["b"])), key)


def test_a_chain_id_that_is_not_of_these_layers(api: Api) -> None:
    below = api.layer("a")
    key = api.unpacked("a", "b", parent=below)
    for wrong in (chain_of(["b"]), chain_of(["a"]), chain_of(["b", "a"]), chain_of(["a", "b", "b"])):
        text = refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{wrong}", key)
        assert wrong in text
        assert digest_of(tar_of("b")) in text
    assert api.stat(key).kind == snapshots_pb2.ACTIVE
    api.commit(api.key(chain_of(["a", "b"])), key)


def test_a_commit_cannot_change_the_parent(api: Api) -> None:
    below, other = api.layer("a"), api.layer("b")
    key = api.unpacked("a", "c", parent=below)
    name = api.key(chain_of(["a", "c"]))
    refused(Code.INVALID_ARGUMENT, api.commit, name, key, parent=other)
    refused(Code.INVALID_ARGUMENT, api.commit, name, key, parent="default/9/nobody")
    assert api.stat(key).parent == below
    api.commit(name, key, parent=below)
    assert api.stat(name).parent == below


def test_a_snapshot_without_parent_may_get_one_at_commit(api: Api) -> None:
    """What the capability "rebase" of containerd 2.2 means: layers are unpacked side by side."""
    below = api.layer("a")
    key = api.unpacked("a", "b")
    name = api.key(chain_of(["a", "b"]))
    uncommitted = api.key("active")
    api.prepare(uncommitted)
    refused(Code.NOT_FOUND, api.commit, name, key, parent="default/9/nobody")
    refused(Code.FAILED_PRECONDITION, api.commit, name, key, parent=uncommitted)
    api.commit(name, key, parent=below)
    assert api.stat(name).parent == below
    assert below in refused(Code.FAILED_PRECONDITION, api.remove, below)


def test_of_many_commits_of_one_key_exactly_one_wins(api: Api) -> None:
    key = api.unpacked("a")
    names = [api.key(chain_of(["a"])) for _ in range(10)]
    calls = [
        api.stub.Commit.future(
            snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=name, key=key), timeout=30
        )
        for name in names
    ]
    codes = [call.code() for call in calls]
    assert codes.count(Code.OK) == 1
    assert set(codes) <= {Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION}
    assert api.list() == [names[codes.index(Code.OK)]]


# Remove


def test_a_parent_goes_after_its_children(api: Api) -> None:
    below = api.layer("a")
    top = api.layer("a", "b", parent=below)
    child = api.key(f"extract-1-x {chain_of(['a', 'b', 'c'])}")
    api.prepare(child, top)
    text = refused(Code.FAILED_PRECONDITION, api.remove, below)
    assert top in text
    assert "remove" in text  # containerd's conformance suite looks for it
    assert child in refused(Code.FAILED_PRECONDITION, api.remove, top)
    for key in (child, top, below):
        api.remove(key)
    assert api.list() == []
    # Bytes are for Cleanup.
    assert len(api.daemon.layer_files()) == 2


def test_what_is_not_there_is_not_removed(api: Api) -> None:
    key = api.key("k")
    api.prepare(key)
    api.remove(key)
    for absent in (key, "", "default/9/nobody"):
        assert repr(absent) in refused(Code.NOT_FOUND, api.remove, absent)
    wait_for("its directory goes", lambda: not api.directories())


def test_a_snapshot_goes_with_all_that_is_in_it(api: Api) -> None:
    active, view = api.key("a"), api.key("v")
    (mount,) = api.prepare(active)
    api.view(view)
    (Path(mount.source) / "deep").mkdir()
    (Path(mount.source) / "deep" / "file").write_text("x")
    (Path(mount.source) / "link").symlink_to(api.daemon.directory)
    api.remove(active)
    api.remove(view)
    wait_for("their directories go", lambda: not api.directories())
    assert api.daemon.address.exists()


def test_a_removed_key_is_free_again(api: Api) -> None:
    key = api.key("k")
    first = api.prepare(key, labels={"a": "1"})
    (Path(first[0].source) / "file").write_text("x")
    api.remove(key)
    second = api.prepare(key)
    assert first[0].source != second[0].source
    assert not list(Path(second[0].source).iterdir())
    assert not api.stat(key).labels


# Stat and Update


def test_what_is_not_there_has_no_facts(api: Api) -> None:
    api.prepare("default/1/k")
    # containerd goes over a NOT_FOUND of Stat, and over nothing else.
    for absent in ("", "k", "default/1/k ", "default/1/K", "default/1/k\0", "default/1/%", "default/1/_"):
        for call in (api.stat, api.mounts, api.usage):
            refused(Code.NOT_FOUND, call, absent)
        refused(Code.NOT_FOUND, api.update, absent, {"a": "b"}, "labels")


def test_updates_change_labels_by_their_mask(api: Api) -> None:
    key = api.key("k")
    api.prepare(key, labels={"a": "1", "b": "2"})
    created, updated = at(api.stat(key))

    def labels(new: Mapping[str, str], *paths: str) -> dict[str, str]:
        nonlocal updated
        info = api.update(key, new, *paths)
        assert info == api.stat(key)
        assert at(info)[0] == created
        assert at(info)[1] > updated
        updated = at(info)[1]
        return dict(info.labels)

    assert labels({"a": "3", "c": "4"}, "labels.a") == {"a": "3", "b": "2"}
    assert labels({"c": "4", "d": "5"}, "labels.c", "labels.d") == {"a": "3", "b": "2", "c": "4", "d": "5"}
    odd = "containerd.io/snapshot/x.y/z"
    assert labels({odd: "6"}, f"labels.{odd}") == {"a": "3", "b": "2", "c": "4", "d": "5", odd: "6"}
    assert labels({"a": "7"}, "labels") == {"a": "7"}
    assert labels({"b": "8", "c": "9"}) == {"b": "8", "c": "9"}
    # A label that the mask names and the request lacks is deleted, and so is one that becomes empty.
    assert labels({}, "labels.b") == {"c": "9"}
    assert labels({"c": "", "d": ""}, "labels.c", "labels.d") == {}
    assert labels({"a": "1", "b": ""}) == {"a": "1"}
    assert labels({}) == {}


def test_nothing_but_labels_can_be_updated(api: Api) -> None:
    key = api.key("k")
    api.prepare(key, labels={"a": "1"})
    before = api.stat(key)
    # Whether it is there comes first.
    refused(Code.NOT_FOUND, api.update, "default/9/absent", {}, "parent")
    for path in ("name", "parent", "kind", "created_at", "label", "labelsx", "Labels.a", "labels/a", "", "*"):
        assert key in refused(Code.INVALID_ARGUMENT, api.update, key, {"a": "2"}, path)
        refused(Code.INVALID_ARGUMENT, api.update, key, {"a": "2"}, "labels.a", path)
    assert api.stat(key) == before
    info = api.update(key, {"a": "2"}, "labels", parent="default/9/other", kind=snapshots_pb2.COMMITTED)
    assert (info.name, info.parent, info.kind) == (before.name, before.parent, before.kind)


def test_labels_of_every_kind_can_be_updated_and_stay(api: Api) -> None:
    keys = [api.key("a"), api.key("v"), api.layer("a")]
    api.prepare(keys[0])
    api.view(keys[1])
    for key in keys:
        assert dict(api.update(key, {"k": "v" * 4000}, "labels").labels) == {"k": "v" * 4000}
    api.daemon.kill()
    api.daemon.restart()
    with api.daemon.client() as client:
        assert all(Api(api.daemon, client).stat(key).labels["k"] == "v" * 4000 for key in keys)


# List


def test_a_listing_is_of_all_namespaces_and_can_be_filtered(api: Api) -> None:
    base = api.layer("a", labels={REF: chain_of(["a"])})
    top = api.layer("a", "b", parent=base, labels={REF: chain_of(["a", "b"])})
    pod, look = "k8s.io/90/pod with blanks", "moby/91/look"
    api.prepare(pod, labels={"word": "x", "a/b.c": "y"})
    api.view(look)
    everything = [base, top, pod, look]
    assert api.list() == everything
    assert api.list("kind==committed") == [base, top]
    assert api.list("kind==active", "kind==view") == [pod, look]
    assert api.list(f'parent=="{base}"') == [top]
    assert api.list('name=="k8s.io/90/pod with blanks"') == [pod]
    assert api.list("name~=/^default/") == [base, top]
    assert api.list("labels.word") == [pod]
    assert api.list('labels."a/b.c"==y,kind!=committed') == [pod]
    assert api.list("kind==nonsense") == []
    infos = [info for message in api.messages() for info in message.info]
    assert infos == [api.stat(name) for name in everything]


def test_the_filter_that_containerd_sends_after_already_exists(api: Api) -> None:
    base = api.layer("a", labels={REF: chain_of(["a"])})
    top = api.layer("a", "b", parent=base, labels={REF: chain_of(["a", "b"])})
    assert api.list(f'labels."{REF}"=={chain_of(["a", "b"])},parent=="{base}"') == [top]
    assert api.list(f'labels."{REF}"=={chain_of(["a", "b"])},parent==""') == []
    assert api.list(f'labels."{REF}"=={chain_of(["a"])},parent==""') == [base]


def test_a_bad_filter_is_an_invalid_argument(api: Api) -> None:
    for bad in ("kind=active", "labels.", "name~=(", 'name=="open', "\n", "x\0", "ü==1"):
        refused(Code.INVALID_ARGUMENT, api.list, bad)
        refused(Code.INVALID_ARGUMENT, api.list, "kind==active", bad)


def test_an_empty_listing_is_an_empty_stream(api: Api) -> None:
    assert [message for message in api.messages() if message.info] == []


def test_many_snapshots_come_in_messages_of_bounded_size(api: Api) -> None:
    keys = [api.key(f"k{number}") for number in range(200)]
    calls = [
        api.stub.Prepare.future(
            snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, labels={"l": "v" * 4000}), timeout=30
        )
        for key in keys
    ]
    assert {call.code() for call in calls} == {Code.OK}
    messages = api.messages()
    assert len(messages) > 1
    assert all(message.ByteSize() < 1 << 20 and len(message.info) <= 100 for message in messages)
    names = [info.name for message in messages for info in message.info]
    assert sorted(names) == sorted(keys)
    assert api.list(f'name=="{keys[77]}"') == [keys[77]]


def test_who_stops_reading_a_listing_does_no_harm(api: Api) -> None:
    for number in range(20):
        api.prepare(api.key(f"k{number}"), labels={"l": "v" * 40_000})
    for _ in range(20):
        stream = api.stub.List(snapshots_pb2.ListSnapshotsRequest(snapshotter=SNAPSHOTTER), timeout=30)
        next(stream)
        stream.cancel()
    assert len(api.list()) == 20


# Usage and Cleanup


def test_usage_is_of_the_snapshot_alone(api: Api) -> None:
    below = api.layer("a")
    top = api.layer("a", "b", parent=below)
    active = api.key("k")
    (mount,) = api.prepare(active)
    size, inodes = api.usage(active)
    assert inodes == 1
    (Path(mount.source) / "file").write_bytes(os.urandom(1 << 20))
    (Path(mount.source) / "same").hardlink_to(Path(mount.source) / "file")
    assert api.usage(active)[0] >= size + (1 << 20)
    assert api.usage(active)[1] == 2
    files = {path.stat().st_size for path in api.daemon.layer_files()}
    for name in (below, top):
        assert api.usage(name)[0] in files
        assert api.usage(name)[1] >= 1


def test_cleanup_deletes_what_no_snapshot_refers_to(api: Api) -> None:
    kept, gone = api.layer("a"), api.layer("b")
    api.cleanup()
    api.remove(gone)
    api.cleanup()
    # The default cache has room for it.
    assert len(api.daemon.layer_files()) == 2
    api.daemon.stop()
    with api.daemon.config.open("a") as file:
        file.write('[cache]\nmax_size = "0"\n')
    api.daemon.restart()
    with api.daemon.client() as client:
        after = Api(api.daemon, client)
        after.cleanup()
        after.cleanup()
        assert [path.name for path in api.daemon.layer_files()] == [digest_of(tar_of("a")).removeprefix("sha256:")]
        assert after.list() == [kept]
        again = after.key("extract-2-y")
        assert after.apply(tar_of("b"), after.prepare(again)) == digest_of(tar_of("b"))


# All of them


def test_a_name_that_is_not_configured_is_refused_by_every_call(api: Api) -> None:
    key = api.key("k")
    api.prepare(key)
    for other in ("overlayfs", "tardev", "", "x\ny"):
        for call, arguments in (
            (api.prepare, ("default/9/new",)),
            (api.view, ("default/9/new",)),
            (api.mounts, (key,)),
            (api.commit, ("default/9/n", key)),
            (api.remove, (key,)),
            (api.stat, (key,)),
            (api.update, (key, {"a": "b"})),
            (api.list, ()),
            (api.usage, (key,)),
            (api.cleanup, ()),
        ):
            assert SNAPSHOTTER in refused(Code.INVALID_ARGUMENT, call, *arguments, snapshotter=other)
    assert api.list() == [key]


HOSTILE = (
    "default/1/a\nb",
    "default/1/a\0b",
    "default/1/\x1b[2J\x07\x7f",
    "default/1/'\"; DROP TABLE snapshots; --",
    "../../../../etc/passwd",
    "/etc/passwd",
    "////",
    " ",
    "default/1/%s%n%00%0a",
    "default/1/\u202eü€😀\ufeff\u2028",
    "default/1/extract-1-x sha256:" + "0" * 63 + "\n",
)
LONG = {
    "megabyte": "default/1/" + "k" * (1 << 20),
    "to be escaped": "default/1/" + "\n" * (1 << 17),
    "wide": "default/1/" + "😀" * (1 << 15),
    # gRPC writes each of them as three bytes into the trailer, which has a bound of its own.
    "percent": "default/1/" + "%" * (1 << 15),
}


def goes_through_everything(api: Api, key: str) -> None:
    """One snapshot's life under this key; errors that name it on the way."""
    labels = {key[:4000]: key[:4000]}
    refused(Code.NOT_FOUND, api.stat, key)
    refused(Code.NOT_FOUND, api.prepare, "default/2/child", key)
    answer = api.prepare(key, labels=labels)
    assert Path(answer[0].source).is_relative_to(api.daemon.root / "snapshots")
    assert api.mounts(key) == answer
    info = api.stat(key)
    assert (info.name, dict(info.labels)) == (key, labels)
    assert api.list() == [key]
    assert api.update(key, {}, f"labels.{key}").name == key
    refused(Code.ALREADY_EXISTS, api.prepare, key)
    refused(Code.INVALID_ARGUMENT, api.prepare, "default/2/child", key)
    refused(Code.FAILED_PRECONDITION, api.commit, f"default/3/{chain_of(['never fetched'])}", key)
    refused(Code.INVALID_ARGUMENT, api.update, key, {}, key)
    refused(Code.INVALID_ARGUMENT, api.list, key)
    api.remove(key)
    refused(Code.NOT_FOUND, api.remove, key)
    assert api.list() == []
    wait_for("its directory goes", lambda: not api.directories())


def logged(daemon: Daemon) -> list[dict[str, Any]]:
    """Every line is a document of its own, whatever was in the calls."""
    lines = daemon.log.read_text().splitlines()
    assert max(map(len, lines)) < 20_000
    return [json.loads(line) for line in lines]


def test_a_key_is_any_text(api: Api) -> None:
    for key in HOSTILE:
        goes_through_everything(api, key)
    assert all("event" in line for line in logged(api.daemon))


@pytest.mark.parametrize("name", LONG)
def test_a_key_has_any_length(api: Api, name: str) -> None:
    goes_through_everything(api, LONG[name])
    assert all("event" in line for line in logged(api.daemon))


def test_bytes_that_are_no_request_end_in_a_status(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.daemon.address}") as channel:

        def raw(method: str, data: bytes) -> object:
            return channel.unary_unary(f"/{method}")(data, timeout=30)

        # field 2 (key), not UTF-8; a length beyond the end; no protobuf at all
        for data in (b"\x12\x02\xff\xfe", b"\x12\x7f", b"\xff" * 100):
            for method in ("Prepare", "Stat", "Remove"):
                with pytest.raises(grpc.RpcError) as caught:
                    raw(f"{SERVICE}/{method}", data)
                assert caught.value.code() in (Code.INTERNAL, Code.UNKNOWN)
        refused(Code.UNIMPLEMENTED, raw, f"{SERVICE}/Nothing", b"")
        refused(Code.UNIMPLEMENTED, raw, "containerd.services.images.v1.Images/List", b"")
        refused(Code.RESOURCE_EXHAUSTED, raw, f"{SERVICE}/Prepare", b"\x12\x80\x80\x80\x04" + bytes(8 << 20))
    assert api.list() == []


def test_bytes_that_are_no_grpc_disturb_nobody(api: Api) -> None:
    for data in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
        os.urandom(100_000),
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(api.daemon.address))
            try:
                client.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass
    assert api.list() == []
    assert api.daemon.alive()


def test_the_daemon_says_that_it_is_healthy(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.daemon.address}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE, "containerd.services.diff.v1.Diff"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        refused(Code.NOT_FOUND, stub.Check, health_pb2.HealthCheckRequest(service="other"), timeout=30)


# The socket and the root directory


PEER = """
import os, socket, sys
user = int(sys.argv[1])
client = socket.socket(socket.AF_UNIX)
client.settimeout(10)
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
try:
    client.connect("s.sock")
    client.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0")
    print("answered" if client.recv(9) else "closed")
except OSError as error:
    print(type(error).__name__)
"""


def as_user(daemon: Daemon, user: int) -> str:
    """What a process of that user gets that speaks HTTP/2's first words; it starts in the socket's directory."""
    return run(sys.executable, "-c", PEER, str(user), cwd=daemon.directory).strip()


def test_the_socket_is_roots_and_so_are_its_peers(api: Api) -> None:
    daemon = api.daemon
    status = daemon.address.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == 0
    daemon.directory.chmod(0o711)
    assert as_user(daemon, 0) == "answered"
    assert as_user(daemon, NOBODY) == "PermissionError"
    # Somebody has opened it up: who connects is asked all the same.
    daemon.address.chmod(0o666)
    assert as_user(daemon, NOBODY) in ("closed", "ConnectionResetError", "BrokenPipeError")
    assert as_user(daemon, 0) == "answered"
    assert api.list() == []
    assert f'"uid": {NOBODY}' in daemon.log.read_text()


def test_the_root_directory_is_roots_alone_even_where_it_was_open(daemon: Daemon) -> None:
    """Behind it lies the socket that asks nobody who he is."""
    assert stat.S_IMODE(daemon.root.stat().st_mode) == 0o700
    assert daemon.root.stat().st_uid == 0
    daemon.stop()
    daemon.root.chmod(0o777)
    daemon.restart()
    assert stat.S_IMODE(daemon.root.stat().st_mode) == 0o700


def test_a_stop_leaves_no_socket_and_a_kill_no_obstacle(daemon: Daemon) -> None:
    process = daemon.process
    assert process is not None
    daemon.stop()
    assert process.returncode == 0
    assert not daemon.address.exists()
    daemon.restart()
    daemon.kill()
    assert daemon.address.exists()
    daemon.restart()
    with daemon.client() as client:
        assert Api(daemon, client).list() == []


def start_in_vain(config: Path) -> str:
    """The one line that a daemon says which cannot start."""
    said = config.with_suffix(".said")
    with said.open("wb") as file:
        process = subprocess.Popen(
            [BIN / "tardev-snapshotter", "--config", config], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        wait_for("an end", lambda: process.poll() is not None or '"serving"' in said.read_text())
        assert process.poll() is not None, "it started and serves"
    finally:
        process.kill()
        process.wait()
    assert process.returncode > 0
    lines = [line for line in said.read_text().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, said.read_text()
    return lines[0]


def test_a_root_has_one_daemon_and_the_second_names_it(api: Api) -> None:
    key = api.key("k")
    api.prepare(key)
    before = api.daemon.address.stat()
    assert api.daemon.process is not None
    for _ in range(2):
        line = start_in_vain(api.daemon.config)
        assert str(api.daemon.root) in line
        assert str(api.daemon.process.pid) in line
    after = api.daemon.address.stat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)
    assert api.list() == [key]
    with api.daemon.client() as client:  # a new connection too
        assert Api(api.daemon, client).list() == [key]


def test_an_address_has_one_daemon(api: Api, tmp_path: Path) -> None:
    """Another root, the same socket: containerd's snapshots would be gone from one moment to the next."""
    key = api.key("k")
    api.prepare(key)
    config = tmp_path / "other.toml"
    text = api.daemon.config.read_text().replace(str(api.daemon.root), str(tmp_path / "other-root"))
    config.write_text(text.replace(f"127.0.0.1:{api.daemon.metrics_port}", ""))
    assert str(api.daemon.address) in start_in_vain(config)
    with api.daemon.client() as client:
        assert Api(api.daemon, client).list() == [key]


def test_what_is_no_socket_is_not_replaced(daemon: Daemon) -> None:
    daemon.stop()
    daemon.address.write_text("precious")
    assert str(daemon.address) in start_in_vain(daemon.config)
    assert daemon.address.read_text() == "precious"


@pytest.mark.parametrize("spoilt", ["newer", "garbage"])
def test_metadata_that_cannot_be_read_is_said_in_one_line_and_left_as_it_is(daemon: Daemon, spoilt: str) -> None:
    daemon.stop()
    path = daemon.root / "metadata.db"
    if spoilt == "newer":
        with closing(sqlite3.connect(path)) as beside:
            beside.execute("PRAGMA user_version = 1000")
    else:
        path.write_bytes(b"no database " * 1000)
    before = path.read_bytes()
    assert str(path) in start_in_vain(daemon.config)
    assert path.read_bytes() == before
    assert not daemon.address.exists()


def test_a_configuration_that_cannot_work_is_said_in_one_line(daemon: Daemon) -> None:
    daemon.stop()
    good = daemon.config.read_text()
    for bad, word in (
        (good + "[cash]\n", "cache"),
        (good + '[snapshotters.x]\ncontract = "kata-erofs"\nformat = "tar-index"\n', "kata-erofs"),
        (good.replace(str(daemon.root), "/proc/no"), "/proc/no"),
        (good.replace(f"127.0.0.1:{daemon.metrics_port}", "nowhere"), "metrics.address"),
    ):
        daemon.config.write_text(bad)
        assert word in start_in_vain(daemon.config)
        assert not daemon.address.exists()
    daemon.config.write_text(good)
    daemon.restart()
    assert daemon.alive()
