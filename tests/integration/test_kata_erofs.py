# SPDX-License-Identifier: Apache-2.0
"""The contract `kata-erofs`: what containerd, shim and agent are told by a real daemon, and the files they find."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from blockdev.formats.layer_file import FORMATS
from snapshotter import metastore
from snapshotter.api.proto import types_pb2
from snapshotter.contracts import Mount
from snapshotter.contracts.kata_erofs import MAX_LAYERS, sidecar_path
from snapshotter.metastore import Layer
from tests import kata_erofs_peer as peer
from tests.harness import SNAPSHOTTER, wait_for
from tests.integration.test_kata import Kata, chain, kata, reconfigure, told
from tests.integration.test_parents import ADDS, LOW, PLAIN, image
from tests.integration.test_snapshots_api import Api, Code, digest_of, refused, tar_of
from verity import veritysetup
from verity.tree import Geometry

pytestmark = [pytest.mark.root, pytest.mark.tool]

FORMAT = "erofs-4k"
EMPTY = digest_of(bytes(1024))


def named(layer_format: str = FORMAT, **keys: str) -> str:
    """The name that the tests use, with the contract of upstream Kata."""
    lines = [f"[snapshotters.{SNAPSHOTTER}]", 'contract = "kata-erofs"', f'format = "{layer_format}"']
    return "\n".join([*lines, *(f'{key} = "{value}"' for key, value in keys.items())]) + "\n"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Kata]:
    with kata(tmp_path, named()) as made:
        yield made


def stored(node: Kata, digest: str, layer_format: str = FORMAT) -> Path:
    return node.daemon.root / "layers" / layer_format / digest.removeprefix("sha256:")


def rows(node: Kata) -> dict[tuple[str, str], Layer]:
    _, layers = metastore.read(node.daemon.root / metastore.FILE_NAME)
    return {(layer.diff_id, layer.format): layer for layer in layers}


def sidecars(node: Kata) -> set[Path]:
    return set((node.daemon.root / "layers").rglob("*.dmverity"))


def layers_named(mounts: Sequence[Mount]) -> list[Path]:
    return [Path(mount.source) for mount in mounts if mount.type == "erofs"]


def assert_verified(node: Kata, mounts: Sequence[types_pb2.Mount], *digests: str) -> None:
    """By the peers, with root hash and offset of the rows, and by veritysetup. Digests: topmost first."""
    found = rows(node)
    plan = peer.shim(peer.activated(told(mounts)))
    tables = peer.agent(plan.storages).tables
    assert len(tables) == len(plan.partitions) == len(digests)
    for number, (digest, table, partition) in enumerate(zip(digests, tables, plan.partitions, strict=True), 1):
        layer_format = partition.path.parent.name
        assert partition.path == stored(node, digest, layer_format)
        layer = found[digest, layer_format]
        device, blocks = f"/dev/vda{number}", layer.data_size_bytes // 4096
        assert table == f"1 {device} {device} 4096 4096 {blocks} {blocks} sha256 {layer.root_hash} {'0' * 64}"
        geometry = Geometry(blocks, FORMATS[layer_format].params)
        veritysetup.verify(str(partition.path), geometry, bytes.fromhex(layer.root_hash))


def test_the_peers_verify_every_layer_of_a_container(node: Kata) -> None:
    top = chain(node.api, "a", "b", "a")
    assert sidecars(node) == set()
    mounts = node.api.prepare(node.api.key("pod"), top)
    assert node.api.mounts("default/7/pod") == mounts
    digests = [digest_of(tar_of(name)) for name in "aba"]
    assert_verified(node, mounts, *digests)
    assert sidecars(node) == {sidecar_path(stored(node, digest)) for digest in digests}
    view = told(node.api.view(node.api.key("view"), top))
    assert layers_named(view) == layers_named(told(mounts))
    assert view[-1].options == ("lowerdir={{ overlay 0 2 }}",)
    assert node.daemon.mounts() == []
    for path in sidecars(node):
        assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o400, 0)
    node.restart()
    assert sidecars(node) == {sidecar_path(stored(node, digest)) for digest in digests}


def test_a_single_layer_gets_an_empty_one_below_it(node: Kata) -> None:
    mounts = node.api.prepare(node.api.key("pod"), node.api.layer("a"))
    assert_verified(node, mounts, digest_of(tar_of("a")), EMPTY)
    empty = rows(node)[EMPTY, FORMAT]
    assert (empty.tar_size_bytes, empty.entries) == (1024, 1)
    made = node.daemon.log.read_text().count('"layer made"')
    node.api.prepare(node.api.key("second"), node.api.layer("b"))
    assert node.daemon.log.read_text().count('"layer made"') == made == 1
    # A chain of nothing but that.
    key = node.api.key(f"extract-1-x {EMPTY}")
    node.api.apply(bytes(1024), node.api.prepare(key))
    node.api.commit(node.api.key(EMPTY), key)
    assert_verified(node, node.api.prepare(node.api.key("third"), node.api.list(f'name~="{EMPTY}$"')[0]), EMPTY, EMPTY)


@pytest.mark.soak
def test_an_empty_layer_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    with kata(tmp_path, named() + '[cache]\nmax_size = "0"\n') as node:
        key = node.api.key("pod")
        mounts = node.api.prepare(key, node.api.layer("a"))
        empty = stored(node, EMPTY)
        node.restart()  # what was referred to lately is not deleted; this one does not know
        with node.daemon.client() as client:
            api = Api(node.daemon, client)
            api.cleanup()
            wait_for("it goes", lambda: not empty.exists())
            assert not sidecar_path(empty).exists()
            assert api.mounts(key) == mounts
        assert empty.exists()
        assert sidecar_path(empty).exists()


@pytest.mark.erofs
def test_the_parents_layer_is_on_top(node: Kata) -> None:
    with node.daemon.client() as client:
        top = image(node.daemon, client, LOW, ADDS, PLAIN)
        mounts = node.api.prepare(node.api.key("pod"), top)
    (table,) = [diff_id for diff_id, layer_format in rows(node) if layer_format == f"{FORMAT}-parents"]
    assert_verified(node, mounts, table, *map(digest_of, (PLAIN, ADDS, LOW)))


@pytest.mark.soak
def test_a_file_system_to_write_to(tmp_path: Path) -> None:
    with kata(tmp_path, named(writable_size="64MiB")) as node:
        key = node.api.key("pod")
        mounts = told(node.api.prepare(key, chain(node.api, "a", "b")))
        plan = peer.shim(peer.activated(mounts))
        assert f"X-containerd.mkfs.size={64 << 20}" in mounts[0].options
        assert plan.writable is not None
        assert plan.writable.parent.parent == node.daemon.root / "snapshots"
        with plan.writable.open("wb") as file:  # as containerd does
            file.truncate(64 << 20)
        node.api.remove(key)
        wait_for("it goes", lambda: not plan.writable or not plan.writable.parent.exists())
        assert "X-containerd.mkfs" not in str(
            told(node.api.view(node.api.key("view"), node.api.list("kind==committed")[1]))
        )


@pytest.mark.soak
def test_beyond_the_partitions_nothing_is_prepared(node: Kata) -> None:
    most = chain(node.api, *["a"] * MAX_LAYERS)
    more = node.api.layer(*["a"] * (MAX_LAYERS + 1), parent=most)
    assert len(layers_named(told(node.api.prepare(node.api.key("pod"), most)))) == MAX_LAYERS
    for call in (node.api.prepare, node.api.view):
        text = refused(Code.FAILED_PRECONDITION, call, node.api.key("more"), more)
        assert f"{MAX_LAYERS + 1} layers" in text
        assert f"max_layers of [snapshotters.{SNAPSHOTTER}]" in text


@pytest.mark.soak
def test_what_a_container_wrote_is_in_its_vm(node: Kata) -> None:
    key = node.api.key("pod")
    node.api.prepare(key, node.api.layer("a"))
    assert "in its VM" in refused(Code.FAILED_PRECONDITION, node.api.commit, node.api.key("mine"), key)


# Bad sidecars, and layers that cannot be verified

SPOILT = {
    "of another layer": ("roothash", "cd" * 32, "has another root hash than the layer"),
    "another offset": ("hashoffset", 4096, "has another offset than the layer"),
    "another salt": ("salt", "01" * 32, "has another salt than the layer"),
    "no salt": ("salt", None, "has another salt than the layer"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.soak] if number else []) for number, case in enumerate(SPOILT)]
)
def test_a_spoilt_sidecar_is_refused_until_it_is_gone(node: Kata, case: str) -> None:
    key, value, reason = SPOILT[case]
    top = chain(node.api, "a", "b")
    pod = node.api.key("pod")
    mounts = node.api.prepare(pod, top)
    path = sidecar_path(stored(node, digest_of(tar_of("a"))))
    good = path.read_bytes()
    bad = json.loads(good) | {key: value}
    path.write_bytes(json.dumps({key: value for key, value in bad.items() if value is not None}).encode())
    for call in (node.api.prepare, node.api.view):
        text = refused(Code.DATA_LOSS, call, node.api.key("more"), top)
        assert f"{path} {reason}" in text
    assert reason in refused(Code.DATA_LOSS, node.api.mounts, pod)
    if case == "no salt":
        path.unlink()
    else:
        node.restart()
        assert not path.exists()
    with node.daemon.client() as client:
        assert Api(node.daemon, client).mounts(pod) == mounts
    assert path.read_bytes() == good


@pytest.mark.soak
def test_a_sidecar_that_is_missing_is_written_again(node: Kata) -> None:
    top = chain(node.api, "a", "b")
    mounts = node.api.prepare(node.api.key("pod"), top)
    found = {path: path.read_bytes() for path in sidecars(node)}
    for path in found:
        path.unlink()
    assert node.api.mounts("default/5/pod") == mounts
    assert {path: path.read_bytes() for path in sidecars(node)} == found


@pytest.mark.soak
def test_a_sidecar_goes_with_its_layer_and_a_stray_one_at_a_start(tmp_path: Path) -> None:
    with kata(tmp_path, named() + '[cache]\nmax_size = "0"\n') as node:
        name = chain(node.api, "a", "b")
        key = node.api.key("pod")
        node.api.prepare(key, name)
        stray = stored(node, "sha256:" + "ef" * 32).with_suffix(".dmverity")
        stray.write_bytes(b"{}")
        node.restart()
        assert not stray.exists()
        assert len(sidecars(node)) == 2
        with node.daemon.client() as client:
            api = Api(node.daemon, client)
            api.remove(key)
            for each in reversed(api.list("kind==committed")):
                api.remove(each)
            api.cleanup()
            wait_for("they go", lambda: not sidecars(node))


@pytest.mark.soak
def test_a_layer_file_that_is_put_aside_takes_its_sidecar_along(node: Kata) -> None:
    top = chain(node.api, "a", "b")
    node.api.prepare(node.api.key("pod"), top)
    path = stored(node, digest_of(tar_of("a")))
    with open(path, "r+b") as file:
        file.truncate(4096)
    text = refused(Code.DATA_LOSS, node.api.prepare, node.api.key("more"), top)
    assert "its file has 4096 bytes" in text
    node.restart()
    assert not path.exists()
    assert not sidecar_path(path).exists()


def test_layers_of_512_byte_blocks_are_refused(tmp_path: Path) -> None:
    """What was pulled before the name had this contract keeps its format."""
    with kata(tmp_path, named("tar-index").replace("kata-erofs", "host")) as node:
        top = chain(node.api, "a", "b")
        reconfigure(node, named())
        with node.daemon.client() as client:
            api = Api(node.daemon, client)
            for call in (api.prepare, api.view):
                text = refused(Code.FAILED_PRECONDITION, call, "default/70/pod", top)
                assert "has format tar-index, with verity blocks of 512/4096 bytes" in text
        assert sidecars(node) == set()


# Crashes


@pytest.mark.soak
@pytest.mark.parametrize("point", ["sidecars.written", "made.published", "publish.renamed"])
def test_killed_in_a_prepare(node: Kata, point: str) -> None:
    """Of a chain of one layer, so that both are made."""
    top = node.api.layer("a")
    node.restart({"TARDEV_TRACE_KILL": point})
    key = "default/80/pod"
    with node.daemon.client() as client, pytest.raises(grpc.RpcError):
        Api(node.daemon, client).prepare(key, top)
    assert node.daemon.process is not None
    assert node.daemon.process.wait(20) == -signal.SIGKILL
    node.daemon.process = None
    node.daemon.restart()
    assert not node.daemon.staged()
    with node.daemon.client() as client:
        mounts = Api(node.daemon, client).mounts(key)
        assert_verified(node, mounts, digest_of(tar_of("a")), EMPTY)
    assert len(sidecars(node)) == 2
    assert not [path for path in sidecars(node) if not os.path.exists(str(path).removesuffix(".dmverity"))]
