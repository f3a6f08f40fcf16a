# SPDX-License-Identifier: Apache-2.0
"""Many at once: nothing is built twice, exactly one wins where one must, and nobody's end is another's."""

from __future__ import annotations

import gzip
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blockdev.formats.layer_file import of_chain
from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.harness import SNAPSHOTTER, Daemon, Registry, oci_archive, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import promised, reference
from tests.integration.test_parallel_unpack import big_tar, put
from tests.integration.test_snapshots_api import PLAIN, Api, Code, chain_of, digest_of, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Api]:
    with daemon.client() as client:
        yield Api(daemon, client)


def beginning_of(images: Path, name: str, count: int, target: Path) -> list[str]:
    """An image of the first layers of another, with the same blobs; its diff IDs."""
    whole: dict[str, Any] = promised(images, name)
    layers = []
    with tarfile.open(images / f"{name}.tar") as archive:
        for layer in whole["layers"][:count]:
            member = archive.extractfile(f"blobs/sha256/{layer['digest'].removeprefix('sha256:')}")
            assert member
            layers.append(member.read())
    diff_ids = list(whole["diff_ids"][:count])
    oci_archive(target, reference(target.stem), layers, f"{PLAIN}+gzip", diff_ids)
    return diff_ids


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_fifty_pulls_at_once_build_each_layer_once(
    later_node: Node, registry: Registry, images: Path, tmp_path: Path
) -> None:
    daemon, containerd = later_node.daemon, later_node.containerd
    distinct: set[str] = set()
    references = []
    for name in ("hello", "layers", "dup"):
        distinct |= set(promised(images, name)["diff_ids"])
        references.append(registry.push(images / f"{name}.tar", f"{name}:fifty"))
    for count in (3, 6):
        archive = tmp_path / f"first{count}.tar"
        distinct |= set(beginning_of(images, "layers", count, archive))
        references.append(registry.push(archive, f"first{count}:fifty"))
    namespaces = [f"n{number}" for number in range(10)]
    pulls = [(name, namespace) for namespace in namespaces for name in references]
    with ThreadPoolExecutor(len(pulls)) as threads:
        list(threads.map(lambda pull: containerd.pull(pull[0], namespace=pull[1]), pulls))
    assert daemon.metric("tardev_builds_total") == daemon.metric("tardev_builds_total", result="ok") == len(distinct)
    layers = daemon.tardevctl("layers")
    assert {layer["diff_id"] for layer in layers if not of_chain(layer["format"])} == distinct
    assert len(daemon.layer_files()) == len(layers)
    out = containerd.cat(references[1], "one", "/etc/hello", namespace=namespaces[-1])
    assert out.strip() == "hello from layer 7"
    rows = daemon.tardevctl("snapshots")
    assert {row["kind"] for row in rows} == {"committed"}
    # Each namespace has each chain once: its name is NAMESPACE/NUMBER/CHAINID.
    assert set(Counter(tuple(row["name"].split("/")[::2]) for row in rows).values()) == {1}


def test_who_began_a_build_goes_and_the_others_get_it(api: Api) -> None:
    data = gzip.compress(big_tar(150), 1)
    put(api, data)
    descriptor = types_pb2.Descriptor(media_type=f"{PLAIN}+gzip", digest=digest_of(data), size=len(data))

    def begin(number: int) -> Any:
        mounts = api.prepare(api.key(f"extract-{number}-x {chain_of(['z'])}"))
        return api.diff.Apply.future(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=120)

    first = begin(0)
    wait_for("the build runs", lambda: api.daemon.metric("tardev_builds_running") == 1)
    others = [begin(number) for number in (1, 2, 3)]
    wait_for("they have joined it", lambda: api.daemon.metric("tardev_builds_joined_total") == 3)
    first.cancel()
    others[0].cancel()
    assert {call.result().applied.digest for call in others[1:]} == {digest_of(gzip.decompress(data))}
    assert api.daemon.metric("tardev_builds_total") == api.daemon.metric("tardev_builds_total", result="ok") == 1


def test_all_who_waited_for_a_build_go_and_a_retry_finds_it(api: Api) -> None:
    data = big_tar(150)
    put(api, data)
    descriptor = types_pb2.Descriptor(media_type=PLAIN, digest=digest_of(data), size=len(data))
    mounts = api.prepare(api.key(f"extract-1-x {chain_of(['z'])}"))
    request = diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts)
    calls = [api.diff.Apply.future(request) for _ in range(3)]
    wait_for("the build runs", lambda: api.daemon.metric("tardev_builds_running") == 1)
    for call in calls:
        call.cancel()
    time.sleep(0.1)
    assert api.diff.Apply(request, timeout=120).applied.digest == digest_of(data)
    assert api.daemon.metric("tardev_builds_total") == api.daemon.metric("tardev_builds_total", result="ok") == 1


def test_equal_calls_at_once(api: Api) -> None:
    """Exactly one removes, all update, all see the same."""
    named: dict[str, Any] = {"snapshotter": SNAPSHOTTER}
    parent = api.layer("a")
    key = api.key("k")
    answer = api.prepare(key, parent)
    stub = api.stub

    def codes(calls: list[Any]) -> Counter[str]:
        return Counter(call.code().name for call in calls)

    mounts = [stub.Mounts.future(snapshots_pb2.MountsRequest(**named, key=key), timeout=30) for _ in range(20)]
    assert all(list(call.result().mounts) == answer for call in mounts)
    assert len(api.daemon.mounts()) == 1
    updates = [
        stub.Update.future(
            snapshots_pb2.UpdateSnapshotRequest(
                **named,
                info=snapshots_pb2.Info(name=key, labels={f"l{number}": "x"}),
                update_mask={"paths": [f"labels.l{number}"]},
            ),
            timeout=30,
        )
        for number in range(20)
    ]
    assert codes(updates) == {"OK": 20}
    assert set(api.stat(key).labels) == {f"l{number}" for number in range(20)}
    cleanups = [stub.Cleanup.future(snapshots_pb2.CleanupRequest(**named), timeout=30) for _ in range(10)]
    assert codes(cleanups) == {"OK": 10}
    removals = [
        stub.Remove.future(snapshots_pb2.RemoveSnapshotRequest(**named, key=key), timeout=30) for _ in range(20)
    ]
    assert codes(removals) == {"OK": 1, "NOT_FOUND": 19}
    extraction = api.prepare(api.key(f"extract-1-x {chain_of(['b'])}"))
    data = tar_of("b")
    put(api, data)
    descriptor = types_pb2.Descriptor(media_type=PLAIN, digest=digest_of(data), size=len(data))
    applies = [
        api.diff.Apply.future(diff_pb2.ApplyRequest(diff=descriptor, mounts=extraction), timeout=60) for _ in range(20)
    ]
    assert codes(applies) == {"OK": 20}
    assert api.daemon.metric("tardev_builds_total") == 2


def test_parents_and_children_come_and_go_at_once(api: Api) -> None:
    """Whatever the order, a child has its parent: each Prepare succeeds or its parent was gone, each Remove as well."""
    for _ in range(10):
        parent = api.layer("a")
        keys = [api.key(f"child{number}") for number in range(8)]
        children = [
            api.stub.Prepare.future(
                snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=parent), timeout=30
            )
            for key in keys
        ]
        removal = api.stub.Remove.future(
            snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=parent), timeout=30
        )
        made = {key for key, call in zip(keys, children, strict=True) if call.code() is Code.OK}
        assert {call.code() for call in children} <= {Code.OK, Code.NOT_FOUND}
        assert removal.code() is (Code.FAILED_PRECONDITION if made else Code.OK)
        assert set(api.list()) == made | ({parent} if made else set())
        for key in made:
            api.remove(key)
        if made:
            api.remove(parent)
    wait_for("nothing is left", lambda: not api.directories() and not api.daemon.mounts())
