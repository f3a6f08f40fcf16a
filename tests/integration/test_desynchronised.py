# SPDX-License-Identifier: Apache-2.0
"""Our metadata and containerd's know different things: a pull mends it, or an error says which commands do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness import BIN, SNAPSHOTTER, ProcessFailed, check_tree, run, wait_for
from tests.integration.conftest import Node
from tests.integration.test_damage import fsck
from tests.integration.test_images import promised, reference

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

IMAGE = "hello"


def pull(node: Node, images: Path) -> None:
    node.containerd.retry("images", "import", "--snapshotter", SNAPSHOTTER, str(images / f"{IMAGE}.tar"))


def runs(node: Node, images: Path, directory: Path) -> None:
    chain = promised(images, IMAGE)["chain_ids"][-1]
    with node.containerd.rootfs(chain, directory / "m") as rootfs:
        assert check_tree(images / f"{IMAGE}.json", rootfs) == ""


def forget_image(node: Node) -> None:
    node.containerd.retry("images", "rm", "--sync", reference(IMAGE))


def containerds_database(node: Node) -> Path:
    return node.containerd.root / "io.containerd.metadata.v1.bolt" / "meta.db"


def as_fsck_says(node: Node) -> None:
    """Its commands, word for word, until it says no more."""
    status, findings = fsck(node.daemon)
    [finding] = findings
    count = len([row for row in node.daemon.snapshots() if row.kind == "committed"])
    assert (status, finding["what"]) == (1, f"{count} snapshots of {SNAPSHOTTER} in namespace default")
    assert finding["outcome"] == "found"
    said = re.fullmatch(r"run: (.*), and pull the namespace's images again after some seconds", finding["advice"])
    assert said
    for command in said[1].split(" && "):
        _, *arguments = shlex.split(command)
        assert arguments[:4] == ["-a", str(node.containerd.address), "-n", "default"]
        node.containerd.retry(*arguments[4:])
    wait_for("what containerd does not know is gone", lambda: not node.daemon.snapshots())
    assert fsck(node.daemon) == (0, [])


def never_unknown(node: Node) -> None:
    codes = set(re.findall(r'"code": "([A-Z_]+)"', node.daemon.log.read_text()))
    assert not codes & {"UNKNOWN", "INTERNAL"}, codes


def test_ours_is_lost(later_node: Node, images: Path, tmp_path: Path) -> None:
    """The daemon says what to do, word for word."""
    node = later_node
    pull(node, images)
    node.daemon.stop()
    for path in node.daemon.root.glob("metadata.db*"):
        path.unlink()
    said = subprocess.run(
        [BIN / "tardev-snapshotter", "--config", node.daemon.config], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    command = re.search(r"start with nothing: (mv \S+ \S+);", said.stderr)
    assert command, said.stderr
    run(*command[1].split())
    node.daemon.restart()
    node.containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")  # its back-off is over
    with pytest.raises(ProcessFailed, match="not found"):
        node.containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "k", chain(images))
    forget_image(node)
    pull(node, images)
    runs(node, images, tmp_path)
    never_unknown(node)


def chain(images: Path) -> str:
    return str(promised(images, IMAGE)["chain_ids"][-1])


@pytest.mark.soak
@pytest.mark.soak
def test_containerds_is_lost(later_node: Node, images: Path, tmp_path: Path) -> None:
    """It counts its keys from one again, and meets ours: a Commit that ends in ALREADY_EXISTS its unpacker takes for
    done, and its own record of the snapshot is missing, at each pull. Its collector removes what it does not know."""
    node = later_node
    pull(node, images)
    node.containerd.stop()
    containerds_database(node).unlink()
    node.containerd.start()
    as_fsck_says(node)
    pull(node, images)
    runs(node, images, tmp_path)
    never_unknown(node)


@pytest.mark.soak
@pytest.mark.parametrize("whose", ["ours", "containerd's"])
def test_an_older_copy_is_put_back(later_node: Node, images: Path, tmp_path: Path, whose: str) -> None:
    node = later_node
    server = node.daemon if whose == "ours" else node.containerd
    database = node.daemon.root / "metadata.db" if whose == "ours" else containerds_database(node)
    server.stop()
    older = {path: tmp_path / path.name for path in database.parent.glob(f"{database.name}*")}
    for path, copy in older.items():
        shutil.copyfile(path, copy)
    node.daemon.restart() if whose == "ours" else node.containerd.start()
    pull(node, images)
    server.stop()
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()
    for path, copy in older.items():
        shutil.copyfile(copy, path)
    node.daemon.restart() if whose == "ours" else node.containerd.start()
    if whose == "ours":
        forget_image(node)
    else:
        as_fsck_says(node)
    pull(node, images)
    runs(node, images, tmp_path)
    never_unknown(node)


@pytest.mark.soak
def test_a_layer_file_is_deleted(later_node: Node, images: Path, tmp_path: Path) -> None:
    """Found at the next start at the latest; the image again brings it back."""
    node = later_node
    pull(node, images)
    node.daemon.stop()
    for path in node.daemon.layer_files():
        path.unlink()
    node.daemon.restart()
    forget_image(node)
    pull(node, images)
    runs(node, images, tmp_path)
    never_unknown(node)


def topmost_blob(archive: Path) -> str:
    """The digest of the image's last layer."""
    with tarfile.open(archive) as members:

        def document(name: str) -> dict[str, Any]:
            member = members.extractfile(name)
            assert member is not None
            found: dict[str, Any] = json.load(member)
            return found

        [manifest] = document("index.json")["manifests"]
        layers = document("blobs/" + manifest["digest"].replace(":", "/"))["layers"]
        return str(layers[-1]["digest"])


def test_content_is_collected_under_a_retry(node: Node, images: Path, tmp_path: Path) -> None:
    """The daemon dies in an unpack, and the blob is gone before the next one."""
    archive = images / f"{IMAGE}.tar"
    node.daemon.stop()
    node.daemon.restart({"TARDEV_TRACE_KILL": "build.built"})
    node.containerd.retry("images", "import", "--no-unpack", str(archive))
    unpack = ("run", "--rm", "--snapshotter", SNAPSHOTTER, reference(IMAGE), "c", "/hello")
    with pytest.raises(ProcessFailed):
        node.containerd.ctr(*unpack)
    wait_for("the daemon is dead", lambda: not node.daemon.alive())
    node.containerd.ctr("content", "rm", topmost_blob(archive))
    node.daemon.restart()

    def refused() -> bool:
        with pytest.raises(ProcessFailed) as caught:
            node.containerd.ctr(*unpack)
        return "connection error" not in str(caught.value)  # its back-off is over

    wait_for("an answer", refused)
    with pytest.raises(ProcessFailed, match=topmost_blob(archive)):
        node.containerd.ctr(*unpack)
    assert not [row for row in node.daemon.snapshots() if row.kind == "committed"]
    pull(node, images)
    runs(node, images, tmp_path)
    never_unknown(node)
