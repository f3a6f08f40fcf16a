# SPDX-License-Identifier: Apache-2.0
"""What containers wrote, committed as a layer and given out as a diff: by real containerds, on real overlays."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.conftest import in_every_run
from tests.file_trees import differences, observe
from tests.harness import BIN, SNAPSHOTTER, Containerd, Daemon, ProcessFailed, oci_archive, run, wait_for
from tests.integration.conftest import Node, a_node
from tests.integration.test_images import promised, reference
from tests.integration.test_snapshots_api import PLAIN, Api, chain_of, digest_of, refused, tar_of
from tests.integration.test_snapshots_api import api as api  # the fixture
from tests.unit.test_tar_writer import scanned

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.slow]
on_a_node = [pytest.mark.containerd, pytest.mark.tool]

Code = grpc.StatusCode
IMAGE_TIME_NS = 1_700_000_000 * 10**9
SETTLED_NS = 1_600_000_000_123_456_789
CAPABILITY = struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0)
EMPTY_TAR = digest_of(bytes(1024))


def change(root: Path) -> None:
    """One of each, through the container's own mount."""
    (root / "etc/added").write_text("added")
    (root / "etc/hello").write_text("overwritten")
    (root / "etc/passwd").unlink()
    (root / "tmp").rmdir()  # replaced by one that hides what the lower one may hold
    (root / "tmp").mkdir(mode=0o700)
    (root / "tmp/inside").symlink_to("../etc/added")
    (root / "bin/true").unlink()
    (root / "bin/true").mkdir()
    (root / "root").chmod(0o1711)
    os.chown(root / "root", 1000, 3_000_000)
    os.chown(root / "bin/cat", 5, 6, follow_symlinks=False)
    (root / "etc/caps").write_text("x")
    os.setxattr(root / "etc/caps", "security.capability", CAPABILITY)
    os.setxattr(root / "etc/caps", "user.note", b"\0\xff")
    (root / "etc/first").write_text("linked")
    (root / "bin/second").hardlink_to(root / "etc/first")
    (root / "etc/moving").mkdir()
    (root / "etc/moving").rename(root / "moved")
    (root / "bin/echo").rename(root / "bin/said")
    with (root / "etc/sparse").open("wb") as file:
        file.truncate(5_000_000)
    os.mkfifo(root / "etc/fifo")
    os.mknod(root / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with open(os.fsencode(root / "etc") + b"/\xff" + b"n" * 200, "wb"):
        pass


def settle(root: Path) -> None:
    """Times are part of a layer: what is to be the same layer twice needs the same times."""
    for directory, _, names in os.walk(root, topdown=False):
        for path in (*(os.path.join(directory, name) for name in names), directory):
            # Those of the image are left alone, or all of it would be copied up.
            if os.lstat(path).st_mtime_ns != IMAGE_TIME_NS:
                os.utime(path, ns=(SETTLED_NS, SETTLED_NS), follow_symlinks=False)


def snapshots(containerd: Containerd, *arguments: str | Path) -> str:
    return containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, *arguments)


@contextmanager
def mounted(containerd: Containerd, key: str, at: Path) -> Iterator[Path]:
    """What a container with the snapshot sees."""
    at.mkdir(exist_ok=True)
    for command in snapshots(containerd, "mounts", at, key).splitlines():
        run(*shlex.split(command), env={**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})
    try:
        yield at
    finally:
        run("umount", at)


def tree(root: Path) -> dict[bytes, dict[str, Any]]:
    """The root directory itself has no entry in a layer."""
    found = observe(root)
    del found[b""]
    return found


def stopped_container(node: Node, image: str, name: str) -> None:
    """Changed from within and from without; its record keeps the snapshot from being collected."""
    containerd = node.containerd
    containerd.ctr("run", "-d", "--snapshotter", SNAPSHOTTER, image, name, "/bin/sleep", "1000")
    containerd.ctr("tasks", "exec", "--exec-id", "e", name, "/bin/sh", "-c", "echo from within >/etc/within")
    pid = next(line.split()[1] for line in containerd.ctr("tasks", "list").splitlines() if line.startswith(name))
    change(Path(f"/proc/{pid}/root"))
    containerd.ctr("tasks", "kill", "-s", "SIGKILL", name)
    wait_for("the task ends", lambda: "RUNNING" not in containerd.ctr("tasks", "list"))
    containerd.ctr("tasks", "delete", name)


def layer_rows(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {row["diff_id"]: row for row in daemon.tardevctl("layers")}


def layer_path(daemon: Daemon, diff_id: str) -> Path:
    return daemon.root / "layers" / "tar-index" / diff_id.removeprefix("sha256:")


class TestContainers:
    pytestmark = on_a_node

    def test_a_container_is_committed_and_run_again(self, node: Node, images: Path, tmp_path: Path) -> None:
        daemon, containerd = node.daemon, node.containerd
        name = f"changed-{os.getpid()}"
        containerd.import_image(images / "hello.tar")
        image = set(layer_rows(daemon))
        trees = []
        for number in ("1", "2"):
            stopped_container(node, reference("hello"), name + number)
            with mounted(containerd, name + number, tmp_path / "m") as root:
                settle(root)
                trees.append(tree(root))
            snapshots(containerd, "commit", f"committed{number}", name + number)
            containerd.ctr("containers", "delete", name + number)
        # Twice the same changes: one layer, with a root hash like any other.
        [diff_id] = set(layer_rows(daemon)) - image
        row = layer_rows(daemon)[diff_id]
        assert (row["shared_by"], row["state"], row["warnings"]) == (2, "ready", {})
        daemon.verify_layer(row)
        path = layer_path(daemon, diff_id)
        run(BIN / "tardevctl", "layer", "verify", path, "--root-hash", row["root_hash"], "--diff-id", diff_id)
        info = snapshots(containerd, "info", "committed1")
        assert promised(images, "hello")["chain_ids"][-1] in info

        with containerd.rootfs("committed1", tmp_path / "again") as root:
            assert differences(trees[0], tree(root)) == {}
            assert sorted(os.listdir(root / "tmp")) == ["inside"]
            out = containerd.says(
                "run", "--rm", "--rootfs", root, name, "/bin/sh", "-c", "cat /etc/hello /etc/within /tmp/inside"
            )
        assert out == "overwrittenfrom within\nadded"

        # Nothing is left of it all, and of a container that only ran.
        containerd.run_container(reference("hello"), name, "/bin/sh", "-c", "echo x >/etc/x")
        for number in ("1", "2"):
            snapshots(containerd, "rm", f"committed{number}")
        containerd.collect_until("the snapshots go", lambda: len(daemon.snapshots()) == 1)
        wait_for("the mounts go", lambda: not daemon.mounts())
        wait_for("the directories go", lambda: not list((daemon.root / "snapshots").iterdir()))
        assert not daemon.staged()

    def test_commits_on_commits_and_all_kinds_of_names(self, node: Node, images: Path, tmp_path: Path) -> None:
        """As clients do that use a snapshotter for their own ends: BuildKit for one."""
        containerd, daemon = node.containerd, node.daemon
        containerd.import_image(images / "hello.tar")
        below = promised(images, "hello")["chain_ids"][-1]
        expected: dict[bytes, dict[str, Any]] = {}
        for number in range(4):
            key = f"step {number}/of: some"
            snapshots(containerd, "prepare", key, below)
            with mounted(containerd, key, tmp_path / "m") as root:
                (root / f"file{number}").write_text(str(number))
                if number:
                    (root / f"file{number - 1}").unlink()
                    (root / "etc" / "hello").write_text(str(number))
                    (root / "d" / "e").mkdir(parents=True, exist_ok=True)
                    (root / "d" / str(number)).touch()
                if number == 3:
                    run("rm", "-r", root / "d")
                    (root / "d").mkdir()
                expected = tree(root)
                # Still mounted, as conformance suites do it.
                below = f"done {number}"
                snapshots(containerd, "commit", below, key)
        with containerd.rootfs(below, tmp_path / "all") as root:
            assert differences(expected, tree(root)) == {}
        snapshots(containerd, "prepare", "unused", below)
        snapshots(containerd, "commit", "empty", "unused")
        assert EMPTY_TAR in layer_rows(daemon)

    def test_one_that_is_written_to_is_refused_and_can_be_committed_later(
        self, later_node: Node, images: Path, tmp_path: Path
    ) -> None:
        containerd = later_node.containerd
        containerd.import_image(images / "hello.tar")
        snapshots(containerd, "prepare", "busy", promised(images, "hello")["chain_ids"][-1])
        with mounted(containerd, "busy", tmp_path / "m") as root:
            (root / "log").write_bytes(os.urandom(64 << 20))
            writer = subprocess.Popen(["sh", "-c", f"while :; do echo x >>'{root}/log'; done"])
            try:
                with pytest.raises(ProcessFailed, match="changed while it was read"):
                    snapshots(containerd, "commit", "torn", "busy")
            finally:
                writer.kill()
                writer.wait()
            snapshots(containerd, "commit", "whole", "busy")

    def test_a_client_that_goes_away_ends_its_commit(self, later_node: Node, tmp_path: Path) -> None:
        containerd, daemon = later_node.containerd, later_node.daemon
        snapshots(containerd, "prepare", "big")
        with mounted(containerd, "big", tmp_path / "m") as root, (root / "hole").open("wb") as file:
            file.truncate(20 << 30)
        client = subprocess.Popen(
            [str(containerd.release.ctr), "--address", str(containerd.address), "snapshots", "--snapshotter",
             SNAPSHOTTER, "commit", "never", "big"], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for("it is being written", lambda: daemon.staged() and daemon.staged()[0].stat().st_size > 1 << 20)
        client.send_signal(signal.SIGINT)
        client.kill()
        client.wait()
        wait_for("nothing is staged", lambda: not daemon.staged())
        kinds = {row["name"].rpartition("/")[2]: row["kind"] for row in daemon.tardevctl("snapshots")}
        assert kinds == {"big": "active"}


# Diff


def content(containerd: Containerd) -> dict[str, str]:
    """Labels of the store's blobs."""
    rows = [line.split() for line in containerd.ctr("content", "ls").splitlines()[1:]]
    return {row[0]: row[-1] for row in rows}


def blob(containerd: Containerd, digest: str) -> bytes:
    return (
        containerd.root / "io.containerd.content.v1.content/blobs/sha256" / digest.removeprefix("sha256:")
    ).read_bytes()


def uncompressed(data: bytes, media_type: str) -> bytes:
    program = {"gzip": ["gzip", "-dc"], "zstd": ["zstd", "-dc"]}.get(media_type.rpartition("+")[2], ["cat"])
    return subprocess.run(program, input=data, capture_output=True, check=True).stdout


class Differ:
    """A later containerd with an image and, of its own name, one changed snapshot on it; and its differ: ours."""

    def __init__(self, node: Node, images: Path, tmp_path: Path) -> None:
        self.daemon, self.containerd = node.daemon, node.containerd
        self.parent = promised(images, "hello")["chain_ids"][-1]
        self.parent_diff_id = promised(images, "hello")["diff_ids"][-1]
        self._name, self._before = tmp_path.name, 0
        self._before = self.mine()
        self.key = self.name("key")
        snapshots(self.containerd, "prepare", self.key, self.parent)
        with mounted(self.containerd, self.key, tmp_path / "m") as root:
            change(root)
            self.tree = tree(root)

    def name(self, text: str) -> str:
        return f"{text}-of-{self._name}"

    def own(self) -> list[types_pb2.Mount]:
        return self.mounts("mounts", "/x", self.key)

    def view(self, text: str = "view", parent: str | None = None) -> list[types_pb2.Mount]:
        """Of the image, or with "" of nothing."""
        parents = [self.parent] if parent is None else [parent] if parent else []
        found = self.mounts("view", "--target", "/x", self.name(text), *parents)
        # ctr does not say of it that it is to stay
        snapshots(self.containerd, "label", self.name(text), "containerd.io/gc.root=1")
        return found

    def mounts(self, *arguments: str) -> list[types_pb2.Mount]:
        """What containerd would hand to a differ."""
        found = []
        for command in snapshots(self.containerd, *arguments).splitlines():
            words = shlex.split(command)
            options = words[words.index("-o") + 1].split(",")
            found.append(types_pb2.Mount(type=words[2], source=words[3], options=options))
        return found

    def diff(
        self, left: Sequence[types_pb2.Mount], right: Sequence[types_pb2.Mount], media_type: str = "", **fields: Any
    ) -> types_pb2.Descriptor:
        with self.daemon.client() as client:
            request = diff_pb2.DiffRequest(left=left, right=right, media_type=media_type, **fields)
            reply = client.diff.Diff(request, timeout=120, metadata=(("containerd-namespace", "default"),))
            descriptor: types_pb2.Descriptor = reply.diff
            return descriptor

    def mine(self) -> int:
        """How many diffs were ours since this began."""
        return int(self.daemon.metric("tardev_rpc_seconds_count", method="Diff", code="OK")) - self._before


@pytest.fixture(scope="class")
def diff_node(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Node]:
    with a_node(tmp_path_factory.mktemp("node"), "later") as made:
        made.containerd.import_image(images / "hello.tar")
        yield made


@pytest.fixture
def differ(diff_node: Node, images: Path, tmp_path: Path) -> Differ:
    return Differ(diff_node, images, tmp_path)


TYPES = [PLAIN, f"{PLAIN}+gzip", f"{PLAIN}+zstd", "application/vnd.docker.image.rootfs.diff.tar.gzip"]


class TestDiff:
    pytestmark = on_a_node

    def test_the_diff_is_what_a_commit_makes_of_it(self, differ: Differ, tmp_path: Path) -> None:
        """And as a layer of an image it is the same container again."""
        containerd, daemon = differ.containerd, differ.daemon
        first = snapshots_diff(containerd, "--keep", differ.key)
        assert snapshots_diff(containerd, "--keep", differ.key) == first
        assert differ.mine() == 2
        tar = uncompressed(first, "+gzip")
        diff_id = digest_of(tar)
        assert f"containerd.io/uncompressed={diff_id}" in content(containerd)[digest_of(first)]
        assert [member.name for member in scanned(tar)][:3] == [b"bin/", b"bin/cat", b"bin/.wh.echo"]

        archive = tmp_path / "image.tar"
        oci_archive(
            archive, "localhost/tardev-test/changed:latest", [base_layer(differ), first], f"{PLAIN}+gzip",
            [differ.parent_diff_id, diff_id],
        )  # fmt: skip
        containerd.import_image(archive)
        chain = digest_of(f"{differ.parent} {diff_id}".encode())
        with containerd.rootfs(chain, tmp_path / "again") as root:
            assert differences(differ.tree, tree(root)) == {}

        before = daemon.metric("tardev_builds_total")
        snapshots(containerd, "commit", differ.name("committed"), differ.key)
        assert daemon.metric("tardev_builds_total") == before + 1
        assert layer_rows(daemon)[diff_id]["shared_by"] == 2

    def test_every_media_type(self, differ: Differ) -> None:
        containerd = differ.containerd
        diff_ids = set()
        for media_type in TYPES:
            out = snapshots_diff(containerd, "--keep", "--media-type", media_type, differ.key)
            diff_id = digest_of(uncompressed(out, media_type.replace(".gzip", "+gzip")))
            assert f"containerd.io/uncompressed={diff_id}" in content(containerd)[digest_of(out)]
            diff_ids.add(diff_id)
        assert differ.mine() == len(TYPES)
        snapshots(containerd, "commit", differ.name("committed"), differ.key)
        assert diff_ids <= set(layer_rows(differ.daemon))
        assert len(diff_ids) == 1

    def test_a_committed_snapshot_gives_its_layers_own_tar(self, differ: Differ) -> None:
        """Of the image: bit for bit what was pulled. Of changes: what was committed."""
        containerd = differ.containerd
        out = snapshots_diff(containerd, "--media-type", PLAIN, differ.parent)
        assert digest_of(out) == differ.parent_diff_id
        before = differ.daemon.mounts()
        snapshots(containerd, "commit", differ.name("committed"), differ.key)
        out = snapshots_diff(containerd, "--media-type", PLAIN, differ.name("committed"))
        assert digest_of(out) in layer_rows(differ.daemon)
        assert differ.mine() == 2
        # What it looked at is not mounted for nobody.
        wait_for("its own mounts go", lambda: set(differ.daemon.mounts()) <= set(before))

    def test_what_is_not_at_hand_is_left_to_the_next_differ(self, differ: Differ) -> None:
        containerd = differ.containerd
        other = differ.name("other")
        snapshots(containerd, "prepare", other, differ.parent)
        own, view, nothing = differ.own(), differ.view(), differ.view("nothing", "")
        foreign = [types_pb2.Mount(type="bind", source="/etc", options=["rbind", "ro"])]
        changed = [types_pb2.Mount(type=own[0].type, source="overlay", options=[*own[0].options, "volatile"])]
        for left, right in (
            (view, foreign), (foreign, own), (nothing, own), ([], own), (own, view), (view, view), (view, changed),
            (view, []), ([], []),
        ):  # fmt: skip
            refused(Code.UNIMPLEMENTED, differ.diff, left, right)
        refused(Code.UNIMPLEMENTED, differ.diff, view, own, "application/octet-stream")
        assert differ.diff(view, own).digest
        # Through containerd, what is not at hand comes all the same: two snapshots that are not above each other.
        assert uncompressed(snapshots_diff(containerd, differ.key, other), "+gzip")
        assert differ.mine() == 1

    def test_snapshots_without_a_parent(self, differ: Differ, tmp_path: Path) -> None:
        containerd = differ.containerd
        snapshots(containerd, "prepare", "alone")
        with mounted(containerd, "alone", tmp_path / "m") as root:
            (root / "f").write_text("x")
        own = differ.mounts("mounts", "/x", "alone")
        nothing = differ.view("nothing", "")
        one, other = differ.diff([], own, PLAIN), differ.diff(nothing, own, PLAIN)
        assert one == other
        assert [member.name for member in scanned(blob(containerd, one.digest))] == [b"f"]
        assert differ.diff([], nothing, PLAIN).digest == EMPTY_TAR
        snapshots(containerd, "commit", "base", "alone")
        assert digest_of(snapshots_diff(containerd, "--media-type", PLAIN, "base")) == one.digest

    def test_labels_ref_and_epoch(self, differ: Differ) -> None:
        containerd = differ.containerd
        own, view = differ.own(), differ.view()
        plain = differ.diff(view, own, PLAIN, ref="some ref", labels={"a": "b"})
        assert plain.media_type == PLAIN
        assert plain.size == len(blob(containerd, plain.digest))
        assert {f"containerd.io/uncompressed={plain.digest}", "a=b"} <= set(
            content(containerd)[plain.digest].split(",")
        )
        epoch = differ.diff(view, own, PLAIN, source_date_epoch=Timestamp(seconds=1_650_000_000))
        times = {member.mtime for member in scanned(blob(containerd, epoch.digest))}
        assert max(times) == (1_650_000_000, 0)
        assert max(member.mtime for member in scanned(blob(containerd, plain.digest))) > (1_700_000_000, 0)

    def test_what_fails_leaves_no_ingest(self, differ: Differ, tmp_path: Path) -> None:
        containerd = differ.containerd
        own, view = differ.own(), differ.view()
        with mounted(containerd, differ.key, tmp_path / "m") as root:
            (root / "zz").write_bytes(os.urandom(3 << 20))
            (root / "zzz.wh").touch()
            (root / "zzz").mkdir()
            (root / "zzz" / ".wh.x").touch()
        text = refused(Code.INVALID_ARGUMENT, differ.diff, view, own, ref="mine")
        assert "whiteouts" in text
        assert containerd.ctr("content", "active").splitlines()[1:] == []
        with mounted(containerd, differ.key, tmp_path / "m") as root:
            (root / "zzz" / ".wh.x").unlink()
        assert differ.diff(view, own, ref="mine").digest
        # One that is not ours to abort: somebody writes under the ref.
        holder = subprocess.Popen(
            [str(containerd.release.ctr), "--address", str(containerd.address), "content", "ingest", "held"],
            stdin=subprocess.PIPE,
        )
        assert holder.stdin is not None
        holder.stdin.write(b"x" * (1 << 20))
        holder.stdin.flush()
        wait_for("it is held", lambda: "held" in containerd.ctr("content", "active"))
        assert "held" in refused(Code.UNAVAILABLE, differ.diff, view, own, ref="held")
        assert "held" in containerd.ctr("content", "active")
        holder.kill()
        holder.stdin.close()
        holder.wait()

    def test_a_blob_that_is_there_already_is_as_good(self, differ: Differ) -> None:
        containerd = differ.containerd
        own, view = differ.own(), differ.view()
        first = differ.diff(view, own)
        containerd.ctr("content", "label", first.digest, "containerd.io/uncompressed=")
        assert "uncompressed" not in content(containerd)[first.digest]
        assert differ.diff(view, own) == first
        assert "containerd.io/uncompressed=sha256:" in content(containerd)[first.digest]


def snapshots_diff(containerd: Containerd, *arguments: str) -> bytes:
    done = subprocess.run(
        [str(containerd.release.ctr), "--address", str(containerd.address), "snapshots", "--snapshotter", SNAPSHOTTER,
         "diff", *arguments], capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def base_layer(differ: Differ) -> bytes:
    """The image's own layer, gzipped."""
    return subprocess.run(
        ["gzip", "-1"], input=snapshots_diff(differ.containerd, "--media-type", PLAIN, differ.parent),
        capture_output=True, check=True,
    ).stdout  # fmt: skip


# Without containerd


def written(api: Api, parent: str = "") -> tuple[str, Path]:
    key = api.key("container")
    [mount] = api.prepare(key, parent)
    directory = Path(mount.source)
    (directory / "file").write_text("x")
    return key, directory


def test_a_bare_key_is_committed_with_its_changes(api: Api) -> None:
    [mount] = api.prepare("bare")
    (Path(mount.source) / "file").write_text("x")
    api.commit("committed", "bare", labels={"containerd.io/gc.root": "now"})
    info = api.stat("committed")
    assert (info.parent, dict(info.labels)) == ("", {"containerd.io/gc.root": "now"})
    [row] = api.daemon.tardevctl("layers")
    assert api.usage("committed") == (row["file_size_bytes"], row["entries"])
    wait_for("the directory goes", lambda: not api.directories())


def test_of_many_commits_of_changes_exactly_one_wins(api: Api) -> None:
    key, _ = written(api)
    codes = []

    def commit(number: int) -> None:
        try:
            api.commit(f"default/9{number}/n", key)
            codes.append(Code.OK)
        except grpc.RpcError as error:
            codes.append(error.code())

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(commit, range(5)))
    assert codes.count(Code.OK) == 1
    assert set(codes) <= {Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION}
    assert len(api.list()) == 1
    assert not api.daemon.staged()


def test_what_cannot_be_a_layer_is_refused_and_stays(api: Api) -> None:
    key, directory = written(api)
    (directory / ".wh.file").touch()
    assert "whiteouts" in refused(Code.INVALID_ARGUMENT, api.commit, "default/9/x", key)
    (directory / ".wh.file").unlink()
    with (directory / "huge").open("wb") as file:
        file.truncate(1 << 43)
    assert "limit" in refused(Code.RESOURCE_EXHAUSTED, api.commit, "default/9/x", key)
    (directory / "huge").unlink()
    os.mkdir(directory / "d")
    os.setxattr(directory / "d", "trusted.overlay.redirect", b"/etc")
    assert "redirect_dir" in refused(Code.INVALID_ARGUMENT, api.commit, "default/9/x", key)
    os.rmdir(directory / "d")
    assert api.stat(key).name == key
    assert not api.daemon.staged()
    assert not api.daemon.layer_files()
    api.commit("default/9/x", key)


def test_changes_beside_a_layer_are_refused(api: Api) -> None:
    """A client that applies a layer to a snapshot of its own, and then writes there, too."""
    key = api.key("client")
    [mount] = api.prepare(key)
    api.apply(tar_of("a"), [mount])
    (Path(mount.source) / "file").touch()
    assert "beside" in refused(Code.FAILED_PRECONDITION, api.commit, "default/9/x", key)
    (Path(mount.source) / "file").unlink()
    api.commit("default/9/x", key)


def test_a_directory_that_was_unpacked_to_is_no_layer(api: Api) -> None:
    """Its tar would be another than the image's: the blob must be found, and the line that mends it is said."""
    for client_key in ("extract-1-x", "client"):
        chain = chain_of([client_key])
        key = api.key(f"{client_key} {chain}" if client_key.startswith("extract") else client_key)
        [mount] = api.prepare(key)
        (Path(mount.source) / "file").write_text("unpacked")
        text = refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain}", key)
        assert re.search(r"content fetch IMAGE, then pull or run again", text)
        assert "io.containerd.content.v1.content/blobs/sha256" in text
        assert ("no digest" in text) == (client_key == "client")
    assert not api.daemon.layer_files()


POINTS = ["build.staged", "build.built", "publish.renamed", "build.recorded", "commit.checked", "commit.committed"]


@pytest.mark.parametrize("point", in_every_run(POINTS, {"publish.renamed", "commit.committed"}.__contains__))
def test_killed_in_a_commit_of_changes(daemon: Daemon, point: str) -> None:
    with daemon.client() as client:
        key, directory = written(Api(daemon, client))
    daemon.stop()
    daemon.restart({"TARDEV_TRACE_KILL": point})
    with daemon.client() as client, pytest.raises(grpc.RpcError):
        Api(daemon, client).commit("default/9/x", key)
    daemon.await_kill()
    daemon.restart()
    assert not daemon.staged()
    with daemon.client() as client:
        after = Api(daemon, client)
        if point == "commit.committed":
            refused(Code.ALREADY_EXISTS, after.commit, "default/9/x", key)
        else:
            assert (directory / "file").read_text() == "x"
            after.commit("default/9/x", key)
        assert after.list() == ["default/9/x"]
    [row] = daemon.tardevctl("layers")
    daemon.verify_layer(row)
    wait_for("the directory goes", lambda: not list((daemon.root / "snapshots").iterdir()))


def test_the_archiver_ends_with_the_daemon(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        key, directory = written(api)
        with (directory / "hole").open("wb") as file:
            file.truncate(20 << 30)
        request = api.stub.Commit.future(api_commit(key), timeout=60)
        wait_for("it is being written", lambda: daemon.staged() and daemon.staged()[0].stat().st_size > 1 << 20)
        daemon.kill()
        request.exception()
    wait_for("its processes end", lambda: not archivers_of(daemon))
    daemon.restart()
    assert not daemon.staged()


def api_commit(key: str) -> Any:
    return snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name="default/9/x", key=key)


def archivers_of(daemon: Daemon) -> list[str]:
    """Workers that have a file of this daemon's open."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith(f"{daemon.root}/") and descriptor.parts[2] != str(os.getpid()):
            found.append(target)
    return found
