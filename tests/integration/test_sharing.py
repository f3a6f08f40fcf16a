# SPDX-License-Identifier: Apache-2.0
"""Whose bytes answer whom: layers shared by all namespaces, by one only, and the download that is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api.proto import diff_pb2, diff_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc, types_pb2
from tests.harness import SNAPSHOTTER, Client, Daemon, Registry, check_tree, oci_archive, sha256_of, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import HELLO, promised, reference
from tests.integration.test_parallel_unpack import big_tar
from tests.integration.test_snapshots_api import PLAIN, REF, Api, Code, chain_of, digest_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]

GZIP = f"{PLAIN}+gzip"
# Clients hold a lease; for one without, this keeps containerd's garbage collection away.
ROOT = {"containerd.io/gc.root": "x"}


def reconfigured(daemon: Daemon, old: str, new: str) -> None:
    daemon.stop()
    text = daemon.config.read_text()
    assert old in text
    daemon.config.write_text(text.replace(old, new))
    daemon.restart()


def table(name: str, more: str = "") -> str:
    return f'[snapshotters.{name}]\ncontract = "host"\nformat = "tar-index"\n{more}'


# By namespace


@contextmanager
def asking(node: Node, namespace: str) -> Iterator[tuple[Api, Any]]:
    """Our socket, and how a call of that namespace is told from others."""
    with node.daemon.client() as client:
        yield Api(node.daemon, client), (("containerd-namespace", namespace),)


def descriptor_of(node: Node, layer: dict[str, Any]) -> types_pb2.Descriptor:
    digest = layer["digest"]
    blob = node.containerd.root / "io.containerd.content.v1.content/blobs/sha256" / digest.removeprefix("sha256:")
    return types_pb2.Descriptor(media_type=GZIP, digest=digest, size=blob.stat().st_size)


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_by_namespace_nobody_is_answered_from_anothers_bytes(later_node: Node, images: Path, tmp_path: Path) -> None:
    node, daemon, containerd = later_node, later_node.daemon, later_node.containerd
    reconfigured(daemon, "[builds]\n", '[builds]\nsharing = "namespace"\n')
    containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    containerd.import_image(images / "hello.tar", namespace="one")
    hello: dict[str, Any] = promised(images, "hello")
    (layer,) = hello["layers"]
    chain = hello["chain_ids"][-1]
    blob = descriptor_of(node, layer)
    # After a start nothing is known of who applies: early builds run, too.
    daemon.kill()
    daemon.restart()
    containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    with asking(node, "two") as (api, two):
        key = f"two/900/extract-1-x {chain}"
        mounts = api.prepare(key)
        request = diff_pb2.ApplyRequest(diff=blob, mounts=mounts)
        # The blob's mapping and its layer are stored; in "two" it is not visible.
        refused(Code.NOT_FOUND, api.diff.Apply, request, timeout=30, metadata=two)
        # A call without a namespace is one of the snapshot's.
        refused(Code.NOT_FOUND, api.diff.Apply, request, timeout=30)
        # A candidate of the other's is none, in an early build or in Commit.
        refused(Code.FAILED_PRECONDITION, api.commit, f"two/901/{chain}", key)
        assert api.stat(key).kind == snapshots_pb2.ACTIVE
        nobody = f"odd\nname/1/extract-1-x {chain}"
        api.prepare(nobody)
        refused(Code.FAILED_PRECONDITION, api.commit, f"odd\nname/2/{chain}", nobody)
        api.remove(nobody)
        api.remove(key)

        # A build that runs for "one" is not joined.
        data = big_tar(150)
        (tmp_path / "layer").write_bytes(data)
        archive = tmp_path / "big.tar"
        oci_archive(archive, reference("big"), [tmp_path / "layer"], PLAIN, [digest_of(data)])
        containerd.ctr("images", "import", "--no-unpack", archive, namespace="one")
        big = types_pb2.Descriptor(media_type=PLAIN, digest=f"sha256:{sha256_of(tmp_path / 'layer')}", size=len(data))
        keys = [f"{name}/902/extract-1-x {digest_of(data)}" for name in ("one", "two")]
        first, second = (diff_pb2.ApplyRequest(diff=big, mounts=api.prepare(key)) for key in keys)
        building = api.diff.Apply.future(first, timeout=120, metadata=(("containerd-namespace", "one"),))
        wait_for("it is built", lambda: daemon.metric("tardev_builds_running") == 1)
        refused(Code.NOT_FOUND, api.diff.Apply, second, timeout=30, metadata=two)
        assert building.result().applied.digest == digest_of(data)
        refused(Code.NOT_FOUND, api.diff.Apply, second, timeout=30, metadata=two)
        assert daemon.metric("tardev_builds_joined_total") == 0
        for key in keys:
            api.remove(key)
    # Who brings the blob himself gets the layer, and nothing is stored twice.
    files, builds = daemon.layer_files(), daemon.metric("tardev_builds_total")
    containerd.import_image(images / "hello.tar", namespace="two")
    out = containerd.cat(reference("hello"), "two", "/etc/hello", namespace="two")
    assert out.strip() == HELLO["hello"]
    assert (daemon.layer_files(), daemon.metric("tardev_builds_total")) == (files, builds)


# Other keys than an unpacker's


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_a_client_with_keys_of_its_own(later_node: Node, images: Path, tmp_path: Path) -> None:
    """As BuildKit: random keys and names, mounts asked for again, the diff service; no ctr, and no chain IDs."""
    containerd, daemon = later_node.containerd, later_node.daemon
    containerd.ctr("images", "import", "--no-unpack", images / "layers.tar")
    image: dict[str, Any] = promised(images, "layers")
    metadata = (("containerd-namespace", "default"),)
    named: dict[str, Any] = {"snapshotter": SNAPSHOTTER}
    with grpc.insecure_channel(f"unix:{containerd.address}") as channel:
        client = Client(snapshots_pb2_grpc.SnapshotsStub(channel), diff_pb2_grpc.DiffStub(channel))
        parent = ""
        for layer in image["layers"]:
            key, name = os.urandom(12).hex(), os.urandom(12).hex()
            client.snapshots.Prepare(
                snapshots_pb2.PrepareSnapshotRequest(**named, key=key, parent=parent, labels=ROOT),
                timeout=60,
                metadata=metadata,
            )
            mounts = client.snapshots.Mounts(
                snapshots_pb2.MountsRequest(**named, key=key), timeout=60, metadata=metadata
            ).mounts
            assert mounts[0].type == ("overlay" if parent else "bind")
            request = diff_pb2.ApplyRequest(diff=descriptor_of(later_node, layer), mounts=mounts)
            applied = client.diff.Apply(request, timeout=60, metadata=metadata).applied
            assert applied.digest in image["diff_ids"]
            client.snapshots.Commit(
                snapshots_pb2.CommitSnapshotRequest(**named, name=name, key=key, labels=ROOT),
                timeout=60,
                metadata=metadata,
            )
            parent = name
    assert daemon.metric("tardev_builds_total", result="ok") == len(set(image["diff_ids"]))
    with containerd.rootfs(parent, tmp_path / "m") as rootfs:
        assert not check_tree(images / "layers.json", rootfs)


# Skipping the download


@pytest.fixture
def skipping(tmp_path: Path) -> Iterator[Api]:
    """Two names on one daemon: one skips, the other does not."""
    directory = tmp_path / "skipping"
    (directory / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    extra = table(SNAPSHOTTER, "skip_download = true\n") + table("plain")
    daemon = Daemon(directory / "daemon", directory / "containerd", extra)
    daemon.start()
    with daemon.client() as client:
        yield Api(daemon, client)
    daemon.clean_up()


def target(api: Api, chain: str, parent: str) -> list[str]:
    """As containerd looks for it after an ALREADY_EXISTS."""
    return api.list(f'labels."{REF}"=={chain},parent=="{parent}"')


def test_what_is_stored_needs_no_download(skipping: Api, tmp_path: Path) -> None:
    api = skipping
    chains = [chain_of(["a"]), chain_of(["a", "b"])]
    # Another name's pull brought the layers, without labels.
    below = api.key(chains[0])
    key = api.key(f"extract-1-x {chains[0]}")
    api.apply(tar_of("a"), api.prepare(key, snapshotter="plain"))
    api.commit(below, key, snapshotter="plain")
    key = api.key(f"extract-1-x {chains[1]}")
    api.apply(tar_of("b"), api.prepare(key, below, snapshotter="plain"))
    api.commit(api.key(chains[1]), key, snapshotter="plain")
    assert api.list() == []

    parent = ""
    for chain in chains:
        labels = {REF: chain, "containerd.io/snapshot/diff-id": "x"}
        refused(Code.ALREADY_EXISTS, api.prepare, f"other/7/extract-1-x {chain}", parent, labels)
        (found,) = target(api, chain, parent)
        info = api.stat(found)
        assert (info.kind, info.parent, dict(info.labels)) == (snapshots_pb2.COMMITTED, parent, labels)
        # A second one takes the same.
        refused(Code.ALREADY_EXISTS, api.prepare, f"third/8/extract-2-y {chain}", parent, labels)
        assert target(api, chain, parent) == [found]
        parent = found
    assert len(api.list()) == 2
    assert not api.directories()
    assert api.daemon.metric("tardev_downloads_skipped_total") == 4
    assert api.daemon.metric("tardev_builds_total") == 2
    api.prepare("other/9/pod", parent)
    assert len(api.daemon.mounts()) == 2


def test_who_does_not_ask_as_an_unpacker_is_never_answered_so(skipping: Api) -> None:
    api = skipping
    first, second = chain_of(["a"]), chain_of(["a", "b"])
    below = api.layer("a", labels={REF: first})
    above = api.layer("a", "b", parent=below, labels={REF: second})
    other = api.layer("c")
    before = api.list()
    refused(Code.ALREADY_EXISTS, api.prepare, f"d/1/extract-1-x {first}", "", {REF: first})
    made = []
    for key, parent, labels in (
        # Pods: their annotations reach a sandbox's Prepare as labels.
        ("d/1/0123456789abcdef", "", {REF: first}),
        ("d/2/0123456789abcdef", below, {REF: second}),
        (f"d/3/{first}", "", {REF: first}),
        ("d/4/extract-", "", {REF: first}),
        (f"d/5/pod extract-1-x {first}", "", {REF: first}),
        # Unpackers that do not ask, or ask for something else.
        (f"d/6/extract-1-x {first}", "", {}),
        (f"d/7/extract-1-x {first}", "", {REF: second}),
        (f"d/8/extract-1-x {first}", "", {REF: ""}),
        # Above the first layer without a parent: it comes with the Commit.
        (f"d/9/extract-1-x {second}", "", {REF: second}),
        # On a parent that the equation does not hold for.
        (f"d/10/extract-1-x {second}", other, {REF: second}),
        (f"d/11/extract-1-x {first}", below, {REF: first}),
        # Never pulled.
        (f"d/12/extract-1-x {chain_of(['z'])}", "", {REF: chain_of(["z"])}),
    ):
        assert api.prepare(key, parent, labels)
        made.append(key)
    assert set(api.list()) == {*before, *made}
    refused(Code.NOT_FOUND, api.prepare, f"d/20/extract-1-x {second}", "d/0/nobody", {REF: second})
    refused(Code.INVALID_ARGUMENT, api.prepare, f"d/21/extract-1-x {second}", made[0], {REF: second})
    # By a name that does not skip.
    assert api.prepare(f"d/22/extract-1-x {first}", "", {REF: first}, snapshotter="plain")
    assert above in api.list()


def test_a_layer_that_is_not_whole_is_downloaded_again(skipping: Api) -> None:
    api, chain = skipping, chain_of(["a"])
    name = api.layer("a", labels={})
    (path,) = api.daemon.layer_files()
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[:-4096])
    key = f"d/1/extract-1-x {chain}"
    mounts = api.prepare(key, "", {REF: chain})
    api.apply(tar_of("a"), mounts)
    assert path.read_bytes() == good
    refused(Code.ALREADY_EXISTS, api.prepare, f"d/2/extract-1-x {chain}", "", {REF: chain})
    assert name in api.list()


def test_it_is_off_unless_it_is_said_and_warns_where_it_is_on(daemon: Daemon, skipping: Api) -> None:
    chain = chain_of(["a"])
    with daemon.client() as client:
        api = Api(daemon, client)
        api.layer("a", labels={REF: chain})
        assert api.prepare(f"d/1/extract-1-x {chain}", "", {REF: chain})
    assert "skip_download" not in daemon.log.read_text()
    assert "content fetch" in skipping.daemon.log.read_text()


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_a_second_namespace_downloads_nothing_and_runs(later_node: Node, registry: Registry, images: Path) -> None:
    daemon, containerd = later_node.daemon, later_node.containerd
    daemon.stop()
    with daemon.config.open("a") as file:
        file.write(table(SNAPSHOTTER, "skip_download = true\n"))
    daemon.restart()
    containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    image = registry.push(images / "layers.tar", "layers:skip")
    containerd.pull(image, namespace="one")
    assert daemon.metric("tardev_downloads_skipped_total") == 0
    containerd.pull(image, namespace="two")
    whole: dict[str, Any] = promised(images, "layers")
    assert daemon.metric("tardev_downloads_skipped_total") == len(whole["layers"])
    blobs = {layer["digest"] for layer in whole["layers"]}
    assert blobs <= set(containerd.ctr("content", "list", "-q", namespace="one").split())
    assert not blobs & set(containerd.ctr("content", "list", "-q", namespace="two").split())
    out = containerd.cat(image, "two", "/etc/hello", namespace="two")
    assert out.strip() == HELLO["layers"]
    # Separate lives: the first one's end is not the second one's.
    containerd.ctr("images", "rm", "--sync", image, namespace="one")
    out = containerd.cat(image, "again", "/etc/hello", namespace="two")
    assert out.strip() == HELLO["layers"]
    containerd.ctr("images", "rm", "--sync", image, namespace="two")
    containerd.collect_until("all snapshots go", lambda: not daemon.snapshots())
    assert daemon.metric("tardev_builds_total") == len(set(whole["diff_ids"]))


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_a_client_of_either_containerd_takes_what_is_there(node: Node, images: Path) -> None:
    """1.6's own ctr sends no label; a client that does, as CRI, goes through containerd's metadata the same way."""
    daemon, containerd = node.daemon, node.containerd
    daemon.stop()
    with daemon.config.open("a") as file:
        file.write(table(SNAPSHOTTER, "skip_download = true\n"))
    daemon.restart()
    containerd.retry("images", "import", "--snapshotter", SNAPSHOTTER, images / "layers.tar")
    chains = promised(images, "layers")["chain_ids"]
    metadata = (("containerd-namespace", "cri"),)
    named: dict[str, Any] = {"snapshotter": SNAPSHOTTER}
    with grpc.insecure_channel(f"unix:{containerd.address}") as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        parent = ""
        for number, chain in enumerate(chains):
            request = snapshots_pb2.PrepareSnapshotRequest(
                **named, key=f"extract-{number}-Ab_- {chain}", parent=parent, labels={REF: chain, **ROOT}
            )
            refused(Code.ALREADY_EXISTS, stub.Prepare, request, timeout=60, metadata=metadata)
            info = stub.Stat(snapshots_pb2.StatSnapshotRequest(**named, key=chain), timeout=60, metadata=metadata).info
            assert (info.name, info.parent, info.kind) == (chain, parent, snapshots_pb2.COMMITTED)
            parent = chain
        pod = snapshots_pb2.PrepareSnapshotRequest(**named, key="pod", parent=parent)
        (mount,) = stub.Prepare(pod, timeout=60, metadata=metadata).mounts
    assert mount.type == "overlay"
    # And the parents layer on top.
    assert len(daemon.mounts()) == len(set(promised(images, "layers")["diff_ids"])) + 1
