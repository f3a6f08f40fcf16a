# SPDX-License-Identifier: Apache-2.0
"""The contract `kata-tardev`: what a shim is told by a real daemon, and the links that it will open."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from policy.chain import ChainID, layer_name
from snapshotter.api.proto import types_pb2
from snapshotter.contracts import Mount
from snapshotter.contracts.kata_tardev import MAX_LAYERS, ROOT_HASH_LABEL
from tests import kata_peer
from tests.conftest import in_every_run
from tests.harness import BIN, SNAPSHOTTER, Daemon, ProcessFailed, run, wait_for
from tests.integration.conftest import a_node
from tests.integration.test_images import promised, reference
from tests.integration.test_snapshots_api import Api, Code, chain_of, digest_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.tool]


def named(layer_format: str = "tarfs", **keys: str) -> str:
    """The name that the tests use, with the contract of Kata."""
    lines = [f"[snapshotters.{SNAPSHOTTER}]", 'contract = "kata-tardev"', f'format = "{layer_format}"']
    return "\n".join([*lines, *(f'{key} = "{value}"' for key, value in keys.items())]) + "\n"


@dataclass
class Kata:
    api: Api
    directory: Path  # of the links

    @property
    def daemon(self) -> Daemon:
        return self.api.daemon

    def link(self, *layers: str) -> Path:
        """Of the chain of these layers of `tar_of`."""
        return self.directory / layer_name(ChainID(chain_of(layers)))

    def links(self) -> set[Path]:
        return {path for path in self.directory.iterdir() if not path.is_dir()}

    def file(self, layer: str, layer_format: str = "tarfs") -> Path:
        return self.daemon.root / "layers" / layer_format / digest_of(tar_of(layer)).removeprefix("sha256:")

    def restart(self, env: dict[str, str] | None = None) -> None:
        self.daemon.stop()
        self.daemon.restart(env)


@contextmanager
def kata(directory: Path, extra: str, links: str = "layers") -> Iterator[Kata]:
    (directory / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    daemon = Daemon(directory / "daemon", directory / "containerd", extra)
    daemon.start()
    try:
        with daemon.client() as client:
            yield Kata(Api(daemon, client), daemon.root / links)
    finally:
        daemon.clean_up()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Kata]:
    with kata(tmp_path, named()) as made:
        yield made


def told(mounts: Sequence[types_pb2.Mount]) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in mounts]


def chain(api: Api, *layers: str) -> str:
    """The name of the topmost."""
    parent = ""
    for number in range(len(layers)):
        parent = api.layer(*layers[: number + 1], parent=parent)
    return parent


FILE_SYSTEMS = {"tarfs": "tar", "tar-index": "erofs"}


@pytest.mark.parametrize(
    "way",
    in_every_run(
        itertools.product(FILE_SYSTEMS, ["base64", "plain"]), {("tarfs", "base64"), ("tar-index", "plain")}.__contains__
    ),
    ids="-".join,
)
def test_the_peers_find_every_layer_of_a_container(tmp_path: Path, way: tuple[str, str]) -> None:
    layer_format, encoding = way
    file_system = FILE_SYSTEMS[layer_format]
    with kata(tmp_path, named(layer_format, encoding=encoding)) as node:
        top = chain(node.api, "a", "b", "a")
        mounts = node.api.prepare(node.api.key("pod"), top)
        assert node.api.view(node.api.key("view"), top) == node.api.mounts("default/7/pod") == mounts
        found = kata_peer.storages(told(mounts), encoding, "c" * 64)
        verified, _ = kata_peer.agent_mounts(found, "c" * 64)
        rows = {row["diff_id"]: row for row in node.daemon.tardevctl("layers")}
        expected = [(file_system, rows[digest_of(tar_of(name))]["root_hash"]) for name in ("a", "b", "a")]
        assert list(verified.values()) == expected
        for layer, stored in zip(kata_peer.shim_layers(told(mounts), encoding), ("a", "b", "a"), strict=True):
            assert os.path.samefile(layer.source, node.file(stored, layer_format))
            root_hash = rows[digest_of(tar_of(stored))]["root_hash"]
            run(BIN / "tardevctl", "layer", "verify", layer.source, "--root-hash", root_hash, "--format", layer_format)
        assert node.daemon.mounts() == []


def test_microsofts_policy_for_the_image_allows_it_but_for_the_directory(node: Kata) -> None:
    mounts = told(node.api.prepare(node.api.key("pod"), chain(node.api, "a", "b")))
    (mount,) = mounts
    moved = [Mount(mount.type, mount.source, tuple(
        option.replace(str(node.directory), kata_peer.POLICY_PREFIX) for option in mount.options
    ))]  # fmt: skip
    rows = {row["diff_id"]: row["root_hash"] for row in node.daemon.tardevctl("layers")}
    names = [node.link("a", "b").name, node.link("a").name]
    hashes = [rows[digest_of(tar_of(name))] for name in ("b", "a")]
    kata_peer.policy_allows(kata_peer.storages(moved, "base64", "c" * 64), names, hashes)


def test_a_link_is_there_as_long_as_any_snapshot_has_the_chain(node: Kata) -> None:
    first, second = node.api.layer("a"), node.api.layer("a")
    other = node.api.layer("b")
    assert node.links() == {node.link("a"), node.link("b")}
    node.api.remove(first)
    node.api.remove(other)
    wait_for("the other's link goes", lambda: node.links() == {node.link("a")})
    node.api.prepare(node.api.key("pod"), second)
    refused(Code.FAILED_PRECONDITION, node.api.remove, second)
    node.api.remove("default/7/pod")
    node.api.remove(second)
    wait_for("its link goes", lambda: not node.links())
    # In the cache the layers stay, and come back without a build.
    assert node.file("a").exists()
    node.api.layer("a")
    assert node.links() == {node.link("a")}


def test_two_names_share_a_directory(tmp_path: Path) -> None:
    second = named().replace(SNAPSHOTTER, "second")
    with kata(tmp_path, named() + second) as node:
        one = node.api.layer("a")
        key = node.api.key(f"extract-1-x {chain_of(['a'])}")
        node.api.apply(tar_of("a"), node.api.prepare(key, snapshotter="second"))
        node.api.commit(node.api.key(chain_of(["a"])), key, snapshotter="second")
        (two,) = node.api.list(snapshotter="second")
        node.api.remove(one)
        node.restart()
        assert node.links() == {node.link("a")}
        with node.daemon.client() as client:
            Api(node.daemon, client).remove(two, "second")
        wait_for("its link goes", lambda: not node.links())


def test_the_root_hash_is_shown_and_nobody_else_says_it(node: Kata) -> None:
    name = node.api.layer("a", labels={ROOT_HASH_LABEL: "forged", "containerd.io/snapshot/x": "y"})
    (row,) = node.daemon.tardevctl("layers")
    expected = {ROOT_HASH_LABEL: row["root_hash"], "containerd.io/snapshot/x": "y"}
    assert dict(node.api.stat(name).labels) == expected
    assert dict(node.api.update(name, {ROOT_HASH_LABEL: "forged"}, f"labels.{ROOT_HASH_LABEL}").labels) == expected
    assert dict(node.api.update(name, {"containerd.io/snapshot/x": "y"}, "labels").labels) == expected
    (message,) = node.api.messages(f'labels."{ROOT_HASH_LABEL}"=={row["root_hash"]}')
    assert [dict(info.labels) for info in message.info] == [expected]
    assert node.api.list(f'labels."{ROOT_HASH_LABEL}"==forged') == []
    # What is no layer has none, whatever its labels say: a sandbox's come from its pod.
    key = node.api.key("pod")
    node.api.prepare(key, name, labels={ROOT_HASH_LABEL: "forged"})
    assert dict(node.api.stat(key).labels) == {}


def test_beyond_the_agents_page_nothing_is_prepared(node: Kata) -> None:
    """Equal layers count: each has a name of its own in the page."""
    most = chain(node.api, *["a"] * MAX_LAYERS)
    more = node.api.layer(*["a"] * (MAX_LAYERS + 1), parent=most)
    mounts = told(node.api.prepare(node.api.key("pod"), most))
    kata_peer.agent_mounts(kata_peer.storages(mounts, "base64", "c" * 64), "c" * 64)
    for call in (node.api.prepare, node.api.view):
        text = refused(Code.FAILED_PRECONDITION, call, node.api.key("more"), more)
        key = f"max_layers of [snapshotters.{SNAPSHOTTER}]"
        for part in (more, f"{MAX_LAYERS + 1} layers", f" {MAX_LAYERS}:", key):
            assert part in text
    assert len(node.links()) == MAX_LAYERS + 1


def test_what_a_container_wrote_is_in_its_vm(node: Kata) -> None:
    key = node.api.key("pod")
    node.api.prepare(key, node.api.layer("a"))
    assert "in its VM" in refused(Code.FAILED_PRECONDITION, node.api.commit, node.api.key("mine"), key)


def test_without_layers_there_is_only_a_directory(node: Kata) -> None:
    """As with every contract: a client may bring one's layer by Apply, or its files."""
    (mount,) = node.api.prepare(node.api.key("none"))
    assert (mount.type, list(mount.options)) == ("bind", ["rbind", "rw"])
    (mount,) = node.api.view(node.api.key("view of none"))
    assert (mount.type, list(mount.options)) == ("bind", ["rbind", "ro"])


# Loss and crashes


@pytest.mark.parametrize("point", ["links.made", "commit.committed"])
def test_killed_in_a_commit(node: Kata, point: str) -> None:
    node.api.layer("b")
    node.restart({"TARDEV_TRACE_KILL": point})
    with node.daemon.client() as client:
        api = Api(node.daemon, client)
        key = api.unpacked("a")
        with pytest.raises(grpc.RpcError):
            api.commit(api.key(chain_of(["a"])), key)
    node.daemon.await_kill()
    assert node.link("a").exists()
    node.daemon.restart()
    committed = point == "commit.committed"
    assert node.links() == {node.link("b"), *([node.link("a")] if committed else [])}
    if not committed:
        with node.daemon.client() as client:
            Api(node.daemon, client).commit(f"default/9/{chain_of(['a'])}", key)
        assert node.links() == {node.link("a"), node.link("b")}


@pytest.mark.parametrize("point", ["remove.removed", "links.removed"])
def test_killed_in_a_remove(node: Kata, point: str) -> None:
    node.api.layer("b")
    gone = node.api.layer("a")
    node.restart({"TARDEV_TRACE_KILL": point})
    with node.daemon.client() as client:
        with suppress(grpc.RpcError):  # links go behind the reply, which may be under way still
            Api(node.daemon, client).remove(gone)
        node.daemon.await_kill()
    node.daemon.restart()
    assert node.links() == {node.link("b")}


@pytest.mark.parametrize("by", ["a start", "fsck"])
def test_what_is_lost_odd_or_left_over_is_mended(node: Kata, by: str) -> None:
    top = chain(node.api, "a", "b", "c")
    node.link("a").unlink()
    node.link("a", "b").unlink()
    node.link("a", "b").symlink_to("/etc/passwd")
    node.link("a", "b", "c").unlink()
    node.link("a", "b", "c").write_bytes(b"not a layer")
    (node.directory / ("f" * 64)).write_bytes(b"left over")
    (node.directory / ("." + "e" * 64)).write_bytes(b"left over")
    (node.directory / "stray").write_bytes(b"somebody's")
    if by == "a start":
        node.restart()
    else:
        assert {found["outcome"] for found in node.daemon.tardevctl("fsck", "--repair")} == {"repaired"}
        assert node.daemon.tardevctl("fsck") == []
    for layers in ("a", "ab", "abc"):
        assert os.path.samestat(os.lstat(node.link(*layers)), node.file(layers[-1]).stat())
    assert node.links() == {node.link("a"), node.link("a", "b"), node.link("a", "b", "c"), node.directory / "stray"}
    with node.daemon.client() as client:
        api = Api(node.daemon, client)
        kata_peer.storages(told(api.prepare("default/77/pod", top)), "base64", "c" * 64)


def test_killed_while_mending(node: Kata) -> None:
    chain(node.api, "a", "b")
    node.daemon.stop()
    for path in node.links():
        path.unlink()
    with pytest.raises(ProcessFailed):
        node.daemon.restart({"TARDEV_TRACE_KILL": "links.made_again"})
    assert len(node.links()) == 1
    node.daemon.process = None
    node.daemon.restart()
    assert node.links() == {node.link("a"), node.link("a", "b")}


def test_a_link_lost_while_it_runs_is_made_for_the_next_container(node: Kata) -> None:
    name = node.api.layer("a")
    key = node.api.key("pod")
    mounts = node.api.prepare(key, name)
    node.link("a").unlink()
    assert node.api.mounts(key) == mounts
    assert os.path.samefile(node.link("a"), node.file("a"))


def test_a_layer_that_is_built_again_has_its_links_renewed(node: Kata) -> None:
    name = node.api.layer("a")
    good = node.file("a").read_bytes()
    node.file("a").unlink()
    node.file("a").write_bytes(good[:-4096] + bytes(4096))
    blobs = node.daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs"
    os.rename(blobs, aside := blobs.with_name("aside"))
    refused(Code.DATA_LOSS, node.api.prepare, node.api.key("pod"), name)
    os.rename(aside, blobs)
    node.api.prepare(node.api.key("pod"), name)
    assert os.path.samefile(node.link("a"), node.file("a"))
    assert node.link("a").read_bytes() == good


# Configuration


def reconfigure(node: Kata, extra: str) -> None:
    node.daemon.stop()
    text = node.daemon.config.read_text()
    node.daemon.config.write_text(text.partition("[snapshotters")[0] + extra)
    node.daemon.restart()


def test_links_follow_the_configuration(node: Kata) -> None:
    node.api.layer("a")
    elsewhere = node.daemon.directory / "links"
    reconfigure(node, named(layers=str(elsewhere)))
    assert not node.links()
    assert [path.name for path in elsewhere.iterdir()] == [node.link("a").name]
    reconfigure(node, named("tar-index").replace("kata-tardev", "host"))
    assert not list(elsewhere.iterdir())
    reconfigure(node, named())
    assert node.links() == {node.link("a")}


def test_a_directory_never_has_one_chain_in_two_formats(node: Kata) -> None:
    """After a change of format the containers of the first keep their layers, until its images are removed."""
    first = node.api.layer("a")
    reconfigure(node, named("tar-index"))
    with node.daemon.client() as client:
        api = Api(node.daemon, client)
        key = f"default/50/extract-1-x {chain_of(['a'])}"
        api.apply(tar_of("a"), api.prepare(key))
        text = refused(Code.FAILED_PRECONDITION, api.commit, f"default/51/{chain_of(['a'])}", key)
        assert "another format" in text
        assert os.path.samefile(node.link("a"), node.file("a"))
        api.remove(first)
        wait_for("its link goes", lambda: not node.links())
        api.commit(f"default/51/{chain_of(['a'])}", key)
        assert os.path.samefile(node.link("a"), node.file("a", "tar-index"))


def fails_to_start(daemon: Daemon) -> str:
    with pytest.raises(ProcessFailed) as caught:
        run(BIN / "tardev-snapshotter", "--config", daemon.config, timeout=60)
    return str(caught.value)


def test_a_directory_of_links_on_another_file_system_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", other)
    try:
        daemon = Daemon(tmp_path / "daemon", tmp_path / "containerd", named(layers=str(other / "links")))
        text = fails_to_start(daemon)
    finally:
        run("umount", other)
    assert f"snapshotters.{SNAPSHOTTER}.layers: {other}/links is not on the file system of root" in text


def test_a_directory_of_links_that_others_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links").chmod(0o777)
    daemon = Daemon(tmp_path / "daemon", tmp_path / "containerd", named(layers=str(tmp_path / "links")))
    assert "can be written by others" in fails_to_start(daemon)


def test_a_directory_of_links_under_two_paths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "same").symlink_to("links")
    two = named("tar-index", layers=str(tmp_path / "same")).replace(SNAPSHOTTER, "second")
    daemon = Daemon(tmp_path / "daemon", tmp_path / "containerd", named(layers=str(tmp_path / "links")) + two)
    assert "the same way" in fails_to_start(daemon)


HOST = '[snapshotters.runc]\ncontract = "host"\nformat = "tar-index"\n'


@pytest.mark.erofs
def test_a_vm_keeps_nothing_mounted_for_containers_of_the_host(tmp_path: Path) -> None:
    with kata(tmp_path, named("tar-index") + HOST) as node:
        node.api.prepare(node.api.key("pod"), node.api.layer("a"))
        key = node.api.key(f"extract-1-x {chain_of(['a'])}")
        node.api.apply(tar_of("a"), node.api.prepare(key, snapshotter="runc"))
        name = node.api.key(chain_of(["a"]))
        node.api.commit(name, key, snapshotter="runc")
        node.api.prepare("default/60/runs", name, snapshotter="runc")
        assert len(node.daemon.mounts()) == 1
        node.api.remove("default/60/runs", "runc")
        wait_for("its layer is unmounted", lambda: not node.daemon.mounts())


# A real containerd


@pytest.mark.containerd
@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    in_every_run(itertools.product(["1.6", "later"], ["tarfs", "tar-index"]), ("later", "tarfs").__eq__),
    ids="-".join,
)
def test_an_image_of_containerd(tmp_path: Path, images: Path, way: tuple[str, str]) -> None:
    label, layer_format = way
    with a_node(tmp_path, label, named(layer_format)) as node:
        containerd, daemon = node.containerd, node.daemon
        containerd.import_image(images / "layers.tar")
        names = promised(images, "layers")
        rows = {row["diff_id"]: row for row in daemon.tardevctl("layers")}
        chains = [ChainID(each) for each in names["chain_ids"]]
        containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "pod", chains[-1])
        # ctr prints mount(8)'s line; the mounts themselves are ours to ask for, under the key that containerd made.
        printed = containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "mounts", str(tmp_path / "m"), "pod")
        assert "fuse3.kata-overlay" in printed
        (key,) = [row["name"] for row in daemon.tardevctl("snapshots") if row["kind"] == "active"]
        with daemon.client() as client:
            mounts = told(Api(daemon, client).mounts(key))
        (mount,) = mounts
        assert all(option in printed for option in mount.options)
        verified, order = kata_peer.agent_mounts(kata_peer.storages(mounts, "base64", "c" * 64), "c" * 64)
        assert order == [layer_name(each) for each in reversed(chains)]
        hashes = [rows[diff_id]["root_hash"] for diff_id in reversed(names["diff_ids"])]
        assert [root_hash for _, root_hash in verified.values()] == hashes
        for layer, root_hash in zip(kata_peer.shim_layers(mounts, "base64"), hashes, strict=True):
            run(BIN / "tardevctl", "layer", "verify", layer.source, "--root-hash", root_hash)
        info = containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "info", chains[-1])
        assert f'"{ROOT_HASH_LABEL}": "{hashes[0]}"' in info
        containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "rm", "pod")
        containerd.ctr("images", "rm", "--sync", reference("layers"))
        directory = daemon.root / "layers"
        containerd.collect_until(
            "its links go", lambda: not [path for path in directory.iterdir() if not path.is_dir()]
        )
        assert daemon.mounts() == []
