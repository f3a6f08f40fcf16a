# SPDX-License-Identifier: Apache-2.0
"""Images that lie, and blobs that rot, through a real containerd."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tests.golden import make_tars
from tests.harness import ProcessFailed, oci_archive, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import HELLO, promised, reference

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def archive(path: Path, name: str, layers: list[bytes], diff_ids: list[str]) -> Path:
    oci_archive(path, reference(name), layers, LAYER, diff_ids)
    return path


def evil_layer() -> bytes:
    tar = make_tars.T()
    tar.d("etc/")
    tar.f("etc/hello", b"hello from somebody else\n")
    return gzip.compress(bytes(tar.done()))


def test_an_image_that_lists_anothers_diff_ids(node: Node, images: Path, tmp_path: Path) -> None:
    evil = archive(tmp_path / "evil.tar", "evil", [evil_layer()], promised(images, "hello")["diff_ids"])
    # It is there first, and so its blob is a candidate for the other's chain ID.
    node.containerd.ctr("images", "import", "--no-unpack", evil)
    with pytest.raises(ProcessFailed):
        node.containerd.run_container(reference("evil"), "evil", "/bin/true")
    node.containerd.import_image(images / "hello.tar")
    out = node.containerd.cat(reference("hello"), "good", "/etc/hello")
    assert out.strip() == HELLO["hello"]
    committed = [row for row in node.daemon.tardevctl("snapshots") if row["kind"] == "committed"]
    assert {row["diff_id"] for row in committed} == set(promised(images, "hello")["diff_ids"])
    assert not node.daemon.staged()


def test_a_rotten_blob_fails_and_a_good_one_then_works(node: Node, images: Path) -> None:
    containerd = node.containerd
    containerd.ctr("images", "import", "--no-unpack", images / "hello.tar")
    digest = str(promised(images, "hello")["layers"][0]["digest"])  # type: ignore[index]
    blob = containerd.root / "io.containerd.content.v1.content/blobs/sha256" / digest.removeprefix("sha256:")
    good = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    with pytest.raises(ProcessFailed) as failure:
        containerd.run_container(reference("hello"), "one", "/bin/true")
    if containerd.has_differ:
        assert digest in str(failure.value)
    # 1.6 has met the bad bytes itself, while our build of them was still under way.
    wait_for("staging is empty", lambda: not node.daemon.staged())
    assert not node.daemon.layer_files()
    assert not [row for row in node.daemon.tardevctl("snapshots") if row["kind"] == "committed"]
    containerd.ctr("images", "rm", "--sync", reference("hello"))
    wait_for("containerd drops the blob", lambda: not blob.exists())
    containerd.import_image(images / "hello.tar")
    assert containerd.cat(reference("hello"), "two", "/etc/hello").strip() == HELLO["hello"]


@pytest.mark.parametrize("what", ["gzip-cut", "tar-cut", "not-a-tar"])
def test_a_bad_layer_in_an_image(node: Node, images: Path, tmp_path: Path, what: str) -> None:
    tar = gzip.decompress(evil_layer())
    layer = {
        "gzip-cut": evil_layer()[:-30],
        "tar-cut": gzip.compress(tar[:700]),
        "not-a-tar": gzip.compress(b"no tar at all" * 100),
    }[what]
    bad = archive(tmp_path / "bad.tar", "bad", [layer], ["sha256:" + hashlib.sha256(tar).hexdigest()])
    with pytest.raises(ProcessFailed):
        node.containerd.import_image(bad)
    assert not node.daemon.layer_files()
    wait_for("staging is empty", lambda: not node.daemon.staged())
    node.containerd.import_image(images / "hello.tar")
    assert node.containerd.cat(reference("hello"), "one", "/etc/hello").strip() == HELLO["hello"]
    assert len(node.daemon.layer_files()) == 1


def test_overlayfs_beside_us_still_works(node: Node, images: Path) -> None:
    """containerd asks our differ first about every snapshotter's layers."""
    node.containerd.ctr("images", "import", "--snapshotter", "overlayfs", images / "layers.tar")
    out = node.containerd.says(
        "run", "--rm", "--snapshotter", "overlayfs", reference("layers"), "one", "/bin/cat", "/etc/hello"
    )
    assert out.strip() == HELLO["layers"]
    if node.containerd.has_differ:
        node.containerd.ctr("images", "import", "--local", "--snapshotter", "overlayfs", images / "dup.tar")
        out = node.containerd.says(
            "run", "--rm", "--snapshotter", "overlayfs", reference("dup"), "two", "/bin/cat", "/etc/hello"
        )
        assert out.strip() == HELLO["dup"]
    assert not node.daemon.layer_files()


def test_the_content_api_serves_where_the_directory_does_not(later_node: Node, images: Path) -> None:
    node = later_node
    node.daemon.stop()
    text = node.daemon.config.read_text()
    node.daemon.config.write_text(text.replace("io.containerd.content.v1.content", "nowhere"))
    node.daemon.restart()
    node.containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
    node.containerd.import_image(images / "layers-mixed.tar")
    out = node.containerd.cat(reference("layers-mixed"), "one", "/etc/hello")
    assert out.strip() == HELLO["layers-mixed"]


def test_sharing_by_namespace(later_node: Node, images: Path) -> None:
    node = later_node
    node.daemon.stop()
    text = node.daemon.config.read_text()
    node.daemon.config.write_text(text.replace("[builds]\n", '[builds]\nsharing = "namespace"\n'))
    node.daemon.restart()
    node.containerd.retry("snapshots", "--snapshotter", "tardev-host", "list")
    for namespace in ("one", "two"):
        node.containerd.import_image(images / "hello.tar", namespace=namespace)
    assert node.daemon.metric("tardev_builds_total") == 1
