# SPDX-License-Identifier: Apache-2.0
"""containerd's CRI, the kubelet's path: real containerd, runc and CNI programs, a client of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from pyroute2 import IPRoute, NetlinkError

from snapshotter.metastore import Kind
from tests.conftest import in_every_run
from tests.cri import cri_pb2 as pb
from tests.cri import images
from tests.cri.client import Pod
from tests.cri.images import EXTRA_GID, GID, SEED, UID, Image
from tests.cri.node import BRIDGE, HANDLER, CriNode, Settings, Stored, cri_node, releases_by_version
from tests.harness import SNAPSHOTTER, Registry, wait_for

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

REF = "containerd.io/snapshot.ref"
RUNTIME_HANDLER = "io.containerd.cri.runtime-handler"
LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
RELEASES = releases_by_version()
NEWEST = max(RELEASES)
BY_RUNTIME = [version for version in RELEASES if version >= (1, 7)]


def name_of(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Way:
    """How an image is pulled, and what of it is to be seen."""

    name: str
    since: tuple[int, int]
    transfer: bool
    labels: bool
    options: dict[str, Any]


# 2.1 takes the diff service whenever disable_snapshot_annotations is false.
WAYS = [
    Way("transfer", (2, 1), True, False, {}),
    Way("transfer-annotations", (2, 1), True, True, {"remote_annotations": True}),
    Way("local", (2, 1), False, False, {"local_pull": True}),
    Way("annotations", (1, 6), False, True, {"snapshot_annotations": True}),
]
OLDER = Way("plain", (1, 6), False, False, {})


def ways(version: tuple[int, int]) -> list[Way]:
    return [way for way in WAYS if version >= way.since] + ([OLDER] if version < (2, 1) else [])


@pytest.fixture(scope="module")
def pause(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return images.pause(tmp_path_factory.mktemp("pause"), registry)


@pytest.fixture
def app(request: pytest.FixtureRequest, registry: Registry, tmp_path: Path) -> Image:
    """Of its own for each test: nothing of it is known to any node."""
    name = "".join(char if char.isalnum() else "-" for char in request.node.name.removeprefix("test_"))
    return images.app(tmp_path, registry, name.strip("-").lower())


def hello(image: Image) -> str:
    return image.reference.rpartition("/")[2].removesuffix(":1")


def check_runs(node: CriNode, pod: Pod, image: Image, name: str = "main") -> str:
    """A container of the image sees its files; the container's ID."""
    container = node.cri.run_container(pod, image.reference, name)
    assert node.cri.execute(container, "cat", "/etc/hello").stdout == hello(image)
    return container


def nothing_left(node: CriNode) -> None:
    """Of containers and images: layer files stay in the cache."""
    node.containerd.collect_until("every snapshot is removed", lambda: not node.daemon.snapshots())
    wait_for("every mount is released", lambda: not node.daemon.mounts())
    wait_for("every directory is removed", lambda: not list((node.daemon.root / "snapshots").iterdir()))
    assert not node.daemon.staged()


def check_statistics(node: CriNode, container: str) -> None:
    """Quirk 14: Usage of every active snapshot in each period, Stat of all of them, while a container writes."""
    directory, wanted = str(node.containerd.image_directory), 8 << 20
    before = node.cri.stats(container).writable_layer.used_bytes.value
    assert node.cri.execute(container, "dd", "if=/dev/zero", "of=/tmp/file", "bs=1M", "count=8").exit_code == 0
    wait_for(
        "what a container wrote is in its statistics",
        lambda: node.cri.stats(container).writable_layer.used_bytes.value >= before + wanted,
    )
    for _ in range(5):
        use = node.cri.all_stats()[container].writable_layer
        node.containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    assert use.fs_id.mountpoint == directory
    assert use.inodes_used.value >= 1
    # Layers and containers together are what the kubelet weighs against its limits.
    wait_for(
        "the image file system has it",
        lambda: node.cri.image_filesystems()[directory] >= wanted + sum(
            path.stat().st_size for path in node.daemon.layer_files()
        ),
    )  # fmt: skip
    # Between containerd's list and its question a snapshot may have been committed or removed.
    usages, *good = (
        node.daemon.metric("tardev_rpc_seconds_count", method="Usage", **code)
        for code in ({}, {"code": "OK"}, {"code": "NOT_FOUND"})
    )
    assert 0 < usages <= sum(good)


@pytest.mark.parametrize(
    ("version", "way"),
    [
        pytest.param(
            version,
            way,
            id=f"{name_of(version)}-{way.name}",
            marks=() if (version, way) in ((NEWEST, WAYS[0]), (min(RELEASES), OLDER)) else pytest.mark.soak,
        )
        for version in RELEASES
        for way in ways(version)
    ],
)
def test_a_pod_lives_and_leaves_nothing(
    version: tuple[int, int], way: Way, pause: Image, app: Image, tmp_path: Path
) -> None:
    """PullImage, RunPodSandbox, CreateContainer, ExecSync, ContainerStats, and all of it removed again."""
    settings = Settings(pause.reference, **way.options)
    with cri_node(tmp_path, RELEASES[version], settings) as node:
        cri, daemon = node.cri, node.daemon
        config = cri.pod_config("life")
        cri.pull(pause.reference)
        image_id = cri.pull(app.reference, config)
        status = cri.image(app.reference)
        assert status is not None
        assert (status.id, status.username) == (image_id, "app")
        assert status.size > 0
        assert image_id in cri.image_ids()

        # Which way it went, and what it told us.
        taken = f"with snapshotter {SNAPSHOTTER} using {'transfer service' if way.transfer else 'client.Pull()'}"
        assert node.containerd.log.read_text().count(taken) == (2 if version >= (2, 1) else 0)
        applied = daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK")
        assert applied == (3 if version >= (1, 7) else 0)
        assert daemon.metric("tardev_builds_total", result="ok") == 3
        labels = {row.diff_id: row.labels for row in node.snapshots(Kind.COMMITTED)}
        assert set(labels) == {*pause.diff_ids, *app.diff_ids}
        for image in (pause, app):
            for diff_id, chain_id, blob in zip(image.diff_ids, image.chain_ids, image.blobs, strict=True):
                assert labels[diff_id][REF] == chain_id
                assert labels[diff_id].get(LAYER_DIGEST) == (blob if way.labels else None)

        pod = cri.run_pod(config)
        container = check_runs(node, pod, app)
        assert cri.container_status(container).image_ref
        assert len(node.snapshots(Kind.ACTIVE)) == 2
        assert len(daemon.mounts()) == 3
        if way in (WAYS[0], OLDER):
            check_statistics(node, container)

        cri.remove_container(container)
        cri.remove_pod(pod.id)
        for image in (app, pause):
            cri.remove_image(image.reference)
            assert cri.image(image.reference) is None
        # RemoveImage answers when containerd's garbage collector has run; in 1.6 nothing but this makes it take
        # the containers' snapshots soon.
        nothing_left(node)


# One node for each version. On 1.7 and later images are for overlayfs there, unless the pod is of our class.


@pytest.fixture(scope="module", params=in_every_run(RELEASES, NEWEST.__eq__), ids=name_of)
def node(request: pytest.FixtureRequest, pause: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CriNode]:
    version = request.param
    settings = Settings(
        pause.reference,
        snapshotter="overlayfs" if version in BY_RUNTIME else SNAPSHOTTER,
        daemon='[cache]\nmax_size = "0"\n',
    )
    with cri_node(tmp_path_factory.mktemp("node"), RELEASES[version], settings) as made:
        pull(made, pause)
        yield made


only_by_runtime = pytest.mark.parametrize("node", in_every_run(BY_RUNTIME, NEWEST.__eq__), indirect=True, ids=name_of)


@pytest.fixture
def pods(node: CriNode) -> Iterator[list[Pod]]:
    """Those that a test puts here are removed after it."""
    made: list[Pod] = []
    yield made
    for pod in made:
        node.cri.remove_pod(pod.id)


def run_pod(node: CriNode, pods: list[Pod], config: pb.PodSandboxConfig) -> Pod:
    """Of our class, where there are classes."""
    handler = HANDLER if node.containerd.release.version in BY_RUNTIME else ""
    pods.append(node.cri.run_pod(config, handler))
    return pods[-1]


def pull(node: CriNode, image: Image) -> None:
    """For our snapshotter: on 1.7 and later by the annotation that says which runtime the pod has."""
    node.cri.pull(image.reference, node.cri.pod_config("pull", {RUNTIME_HANDLER: HANDLER}))


def ours(node: CriNode, image: Image) -> list[Stored]:
    """The committed snapshots that our daemon has of the image's layers."""
    return [row for row in node.snapshots(Kind.COMMITTED) if row.diff_id in image.diff_ids]


def chains_of_overlayfs(node: CriNode) -> set[str]:
    return set(node.containerd.ctr("snapshots", "--snapshotter", "overlayfs", "list").split())


@only_by_runtime
def test_an_image_is_pulled_for_the_snapshotter_of_its_pods_runtime(node: CriNode, app: Image, pods: list[Pod]) -> None:
    pull(node, app)
    assert [row.diff_id for row in ours(node, app)] == list(app.diff_ids)
    assert chains_of_overlayfs(node).isdisjoint(app.chain_ids)
    check_runs(node, run_pod(node, pods, node.cri.pod_config("by-runtime")), app)


@only_by_runtime
def test_an_image_pulled_for_overlayfs_is_unpacked_when_a_container_needs_it(
    node: CriNode, app: Image, pods: list[Pod]
) -> None:
    """Before 2.2 without any label on Prepare: there is the key alone to know an unpack by."""
    config = node.cri.pod_config("on-demand")
    node.cri.pull(app.reference, config)
    assert chains_of_overlayfs(node) >= set(app.chain_ids)
    pod = run_pod(node, pods, config)
    assert not ours(node, app)
    applied = node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK")
    check_runs(node, pod, app)
    assert [row.diff_id for row in ours(node, app)] == list(app.diff_ids)
    assert node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK") == applied + 2
    if node.containerd.release.version < (2, 2):
        assert [row.labels for row in ours(node, app)] == [{}, {}]


def test_annotations_of_a_pod_make_no_unpack_of_its_sandbox(
    node: CriNode, app: Image, pause: Image, pods: list[Pod]
) -> None:
    """containerd hands some of a pod's annotations on as labels of its sandbox's snapshot: they are anybody's word."""
    # Layers that we know, but not for this namespace: who believed the labels would have them at hand.
    node.containerd.pull(app.reference, namespace="default")
    known = ours(node, app)
    assert len(known) == 2
    builds = {name: node.daemon.metric(f"tardev_builds_{name}total") for name in ("", "cached_")}
    forged = {REF: app.chain_ids[0], LAYER_DIGEST: app.blobs[0], "containerd.io/snapshot/diff-id": app.diff_ids[0]}
    pod = run_pod(node, pods, node.cri.pod_config("forged", forged))
    sandbox = node.container_snapshot(pod.id)
    assert (sandbox.labels, sandbox.diff_id) == (forged, "")
    assert sandbox.parent.endswith(f"/{pause.chain_ids[-1]}")
    assert [mount.type for mount in node.mounts(pod.id)] == ["overlay"]
    assert ours(node, app) == known
    assert {name: node.daemon.metric(f"tardev_builds_{name}total") for name in builds} == builds
    # Nor is it in the way of who wants that very image.
    pull(node, app)
    check_runs(node, pod, app)


def test_quirk_15_volume_and_user_of_an_image_are_looked_up_on_the_host(
    node: CriNode, app: Image, pods: list[Pod]
) -> None:
    """containerd mounts the container's snapshot itself, to read /etc/passwd and to copy what the volume holds."""
    pull(node, app)
    pod = run_pod(node, pods, node.cri.pod_config("volume"))
    container = check_runs(node, pod, app)
    names = node.cri.execute(container, "id").stdout.strip()
    assert names == f"uid={UID}(app) gid={GID}(app) groups={GID}(app),{EXTRA_GID}(extra)"
    assert node.cri.execute(container, "cat", "/data/seed").stdout == SEED
    assert node.cri.execute(container, "stat", "-c", "%u:%g %a", "/data/seed").stdout.strip() == f"{UID}:{GID} 640"
    assert node.cri.execute(container, "touch", "/data/new").exit_code == 0
    # In the volume, which is not the snapshot's.
    (mount,) = node.mounts(container)
    (upper,) = (option.removeprefix("upperdir=") for option in mount.options if option.startswith("upperdir="))
    assert not (Path(upper) / "data" / "new").exists()


def test_the_kubelets_image_collection(
    node: CriNode, app: Image, pods: list[Pod], registry: Registry, tmp_path: Path
) -> None:
    """Snapshots go with the image, then layer files by Cleanup; what a pod uses stays, over restarts too."""
    other = images.app(tmp_path, registry, f"{hello(app)}-other")
    for image in (app, other):
        pull(node, image)
    container = check_runs(node, run_pod(node, pods, node.cri.pod_config("collection")), app)
    # Cleanup leaves layers that were built in the last five minutes; a daemon that starts again has built none.
    node.daemon.stop()
    node.containerd.stop()
    node.daemon.restart()
    node.containerd.start()
    node.wait_until_ready()
    assert node.cri.execute(container, "cat", "/etc/hello").stdout == hello(app)
    cleanups = node.daemon.metric("tardev_rpc_seconds_count", method="Cleanup", code="OK")
    node.cri.remove_image(other.reference)
    wait_for("its snapshots are removed", lambda: not ours(node, other))

    def stored() -> set[str]:
        return {f"sha256:{path.name}" for path in node.daemon.layer_files()}

    wait_for("its layer files are deleted", lambda: stored().isdisjoint(other.diff_ids))
    assert node.daemon.metric("tardev_rpc_seconds_count", method="Cleanup", code="OK") > cleanups
    assert stored() >= set(app.diff_ids)
    # Without its image a container goes on, and so do its layers.
    node.cri.remove_image(app.reference)
    assert node.cri.execute(container, "cat", "/etc/base").stdout == hello(app)
    assert [row.diff_id for row in ours(node, app)] == list(app.diff_ids)


@only_by_runtime
def test_unpacking_on_demand_needs_the_blobs(node: CriNode, app: Image, pods: list[Pod]) -> None:
    """The container is refused with a text that names the blob, and made once it has been fetched again."""
    config = node.cri.pod_config("no-blobs")
    node.cri.pull(app.reference, config)
    pod = run_pod(node, pods, config)
    node.containerd.ctr("content", "rm", app.blobs[1])
    blob = node.containerd.root / "io.containerd.content.v1.content/blobs/sha256" / app.blobs[1].removeprefix("sha256:")
    wait_for("containerd's collector has deleted the blob", lambda: not blob.exists())
    with pytest.raises(grpc.RpcError) as refused:
        node.cri.create_container(pod, app.reference)
    assert f"blob {app.blobs[1]} is neither in " in refused.value.details()
    node.containerd.ctr("content", "fetch", "--plain-http", app.reference)

    def made() -> bool:
        """As the kubelet does, again and again: containerd's collector may take the first layer, which the attempt
        above has left and nothing refers to, from under the next one."""
        try:
            check_runs(node, pod, app)
        except grpc.RpcError as error:
            if "does not exist: not found" not in error.details():
                raise
            return False
        return True

    wait_for("a container is made", made)


@pytest.mark.parametrize(
    ("unpack_for", "refused"),
    [((), SNAPSHOTTER), ((SNAPSHOTTER,), "overlayfs")],
    ids=["without-an-entry", "ours-replaces-the-built-in-one"],
)
def test_the_trap_of_unpack_config(
    unpack_for: tuple[str, ...], refused: str, pause: Image, app: Image, tmp_path: Path
) -> None:
    version = NEWEST
    settings = Settings(pause.reference, snapshotter=refused, unpack_for=unpack_for)
    with cri_node(tmp_path, RELEASES[version], settings) as node:
        with pytest.raises(grpc.RpcError) as error:
            node.cri.pull(app.reference)
        assert "no unpack platforms defined" in error.value.details()


@pytest.fixture
def bridge(node: CriNode) -> Iterator[None]:
    """The kernel makes bridges and pairs of interfaces; what the CNI program made of them is gone afterwards."""
    with IPRoute() as ip:
        try:
            ip.link("add", ifname=BRIDGE, kind="bridge")
            ip.link("add", ifname=f"{BRIDGE}a", kind="veth", peer={"ifname": f"{BRIDGE}b"})
        except NetlinkError as error:
            pytest.skip(f"this kernel has no bridge or veth: {error}")
        finally:
            remove_links(ip)
        node.containerd.write_network()
        yield
        remove_links(ip)


def remove_links(ip: IPRoute) -> None:
    for name in (BRIDGE, f"{BRIDGE}a"):
        for link in ip.link_lookup(ifname=name):
            ip.link("del", index=link)


def test_a_pod_with_a_network_of_its_own(node: CriNode, app: Image, pods: list[Pod], bridge: None) -> None:
    """By the CNI programs; all other pods here share the host's network."""
    pull(node, app)
    pod = run_pod(node, pods, node.cri.pod_config("network", host_network=False))
    address = node.cri.pod_status(pod).network.ip
    container = check_runs(node, pod, app)
    assert f"inet {address}/24" in node.cri.execute(container, "ip", "address", "show", "eth0").stdout
    node.cri.remove_pod(pods.pop().id)
