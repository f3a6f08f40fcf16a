# SPDX-License-Identifier: Apache-2.0
"""Real images through a real containerd: what a container sees is what the image promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.formats.layer_file import of_chain
from tests.conftest import IMAGES, in_every_run
from tests.harness import SNAPSHOTTER, Registry, check_tree, make_images, wait_for
from tests.integration.conftest import Node, a_node

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

HELLO = {name: "hello from layer 7" if name.startswith("layers") else "hello from a tar layer" for name in IMAGES}


def reference(name: str) -> str:
    return f"localhost/tardev-test/{name}:latest"


def promised(images: Path, name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((images / f"{name}.json").read_text())
    return found


IN_4K = f'[snapshotters.{SNAPSHOTTER}]\ncontract = "host"\nformat = "erofs-4k"\n'


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((version, ""), id=version, marks=pytest.mark.soak) for version in ("1.6", "1.7")),
        pytest.param(("later", IN_4K), id="later-erofs-4k", marks=pytest.mark.soak),
        pytest.param(("later", ""), id="later"),
    ],
)
def shared_node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with a_node(tmp_path_factory.mktemp("node"), *request.param) as made:
        yield made


# Each layer and each compression; the others have the same layers, compressed in another way.
EVERY_RUN = {"hello-zstd", "hello-docker", "layers-mixed", "many", "dup"}


@pytest.mark.parametrize("name", in_every_run(IMAGES, EVERY_RUN.__contains__))
def test_a_container_sees_the_promised_tree(shared_node: Node, images: Path, tmp_path: Path, name: str) -> None:
    containerd = shared_node.containerd
    containerd.import_image(images / f"{name}.tar")
    output = containerd.cat(reference(name), f"run-{name}", "/etc/hello")
    assert output.strip() == HELLO[name]
    with containerd.rootfs(promised(images, name)["chain_ids"][-1], tmp_path / name) as rootfs:
        differences = check_tree(images / f"{name}.json", rootfs)
    assert differences == ""
    assert not shared_node.daemon.staged()


# The image `edge` has what the specification leaves open: docs/compatibility.md. Its tree is one reading of it.
EDGE = {SNAPSHOTTER: set[str](), "overlayfs": {"unexpected: 'e/redo/old' (file)"}}
GHOST = "unexpected: 'never/was/here' (ghost)"


def test_what_unpackers_differ_on(shared_node: Node, tmp_path: Path) -> None:
    """Ours hides what an image removed and made again, containerd's own tree does not; the kernel is one for both."""
    images = make_images(tmp_path / "images", "edge")
    for snapshotter, differs in EDGE.items():
        shared_node.containerd.ctr("images", "import", "--snapshotter", snapshotter, images / "edge.tar")
        chain_id = promised(images, "edge")["chain_ids"][-1]
        with shared_node.containerd.rootfs(chain_id, tmp_path / snapshotter, snapshotter=snapshotter) as rootfs:
            assert set(check_tree(images / "edge.json", rootfs).splitlines()) - {""} == differs | {GHOST}
    shared_node.containerd.ctr("images", "rm", "--sync", reference("edge"))


def test_every_layer_file_is_accepted(shared_node: Node, images: Path) -> None:
    """By veritysetup, from what `tardevctl layers` lists; runs after the images of this module."""
    layers = shared_node.daemon.tardevctl("layers")
    distinct = {diff_id for name in IMAGES for diff_id in promised(images, name)["diff_ids"]}
    of_chains = [layer for layer in layers if of_chain(layer["format"])]
    assert distinct <= {layer["diff_id"] for layer in layers if layer not in of_chains}
    # The last layer of `layers` and its likes adds to a directory without an entry for it.
    assert of_chains
    for layer in layers:
        shared_node.daemon.verify_layer(layer)


def test_compression_does_not_matter_and_nothing_is_built_twice(shared_node: Node) -> None:
    """Of the images above many share layers: there are as many layer files as distinct diff IDs."""
    layers = shared_node.daemon.tardevctl("layers")
    assert len(shared_node.daemon.layer_files()) == len(layers)
    assert all(layer["state"] == "ready" for layer in layers)


def test_pulls_that_share_layers_build_nothing(node: Node, registry: Registry, images: Path) -> None:
    daemon, containerd = node.daemon, node.containerd
    hello = registry.push(images / "hello.tar", "hello:one")
    containerd.pull(hello)
    assert daemon.metric("tardev_builds_total") == 1
    assert containerd.cat(hello, "one", "/etc/hello").strip() == HELLO["hello"]

    # another tag, another namespace
    containerd.pull(registry.push(images / "hello.tar", "hello:two"))
    containerd.pull(hello, namespace="other")
    assert containerd.cat(hello, "two", "/etc/hello", namespace="other").strip() == HELLO["hello"]
    assert daemon.metric("tardev_builds_total") == 1

    # another image: its base is the first one's layer, the seven above are new
    layers = registry.push(images / "layers.tar", "layers:one")
    assert promised(images, "layers")["diff_ids"][0] == promised(images, "hello")["diff_ids"][0]
    containerd.pull(layers)
    assert daemon.metric("tardev_builds_total") == 8
    assert containerd.cat(layers, "three", "/etc/hello").strip() == HELLO["layers"]
    containerd.pull(layers, namespace="other")
    assert daemon.metric("tardev_builds_total", result="ok") == daemon.metric("tardev_builds_total") == 8
    assert daemon.metric("tardev_builds_cached_total") >= 1 + 7
    shared = {layer["diff_id"]: layer["shared_by"] for layer in daemon.tardevctl("layers")}
    assert shared[promised(images, "hello")["diff_ids"][0]] == 2
    containerd.collect_until("every mount is released", lambda: not daemon.mounts())


def test_removing_images_releases_everything(node: Node, images: Path) -> None:
    daemon, containerd = node.daemon, node.containerd
    containerd.import_image(images / "dup.tar")
    containerd.run_container(reference("dup"), "one", "/bin/true")
    containerd.ctr("images", "rm", "--sync", reference("dup"))
    containerd.collect_until("every snapshot is removed", lambda: not daemon.snapshots())
    wait_for("every mount is released", lambda: not daemon.mounts())
    wait_for("every directory is removed", lambda: not list((daemon.root / "snapshots").iterdir()))
    # kept for the next pull
    assert len(daemon.layer_files()) == 4
    before = daemon.metric("tardev_builds_total")
    containerd.import_image(images / "dup.tar")
    assert daemon.metric("tardev_builds_total") == before
