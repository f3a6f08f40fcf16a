# SPDX-License-Identifier: Apache-2.0
"""One test for each thing that containerd and its clients do and that a snapshotter must bear with.

Other files have more of: 1 (test_snapshots_api.py: any text, any length), 8 (should_fail/test_bad_layers.py: mounts of
others), 9 (property/, should_fail/corpus: members, frames, padding), 12 (test_parallel_unpack.py). 17 to 19
(unit/test_kata_tardev.py, test_kata.py). 16 and 20 to 24 are of the runtimes behind the contracts.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sqlite3
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.golden import make_tars
from tests.harness import SNAPSHOTTER, Daemon, ProcessFailed, oci_archive, run, wait_for
from tests.integration.conftest import Node
from tests.integration.test_images import promised, reference
from tests.integration.test_parallel_unpack import put, put_image, seen
from tests.integration.test_snapshots_api import PLAIN, REF, Api, Code, chain_of, digest_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Api]:
    with daemon.client() as client:
        yield Api(daemon, client)


def test_quirk_01_keys_hold_blanks_slashes_and_colons(api: Api) -> None:
    """No more is read out of one than the last component, its prefix and the chain ID behind its last blank."""
    chain = chain_of(["a"])
    unpacking = (f"ns/1/extract-5-x_-9 {chain}", f"a/b/c:d e/extract- {chain}", f"ns/1/extract-1 2 3 {chain}")
    for key in unpacking:
        assert "noexec" in api.prepare(key)[0].options
        api.remove(key)
    others = (f"ns/1/{chain}", f"ns/1/extract-1-x/{chain}", f"ns/1/x extract-1 {chain}", "ns/1/extract-1-x sha256:ab")
    for key in (*others, f"ns/1/extract-1-x {chain} ", f"extract-1-x {chain}/pod"):
        assert "noexec" not in api.prepare(key)[0].options
        api.remove(key)


def test_quirk_02_a_commit_is_made_again_after_containerd_crashed(api: Api) -> None:
    """It did not hear of the first one; it takes ALREADY_EXISTS for success and removes the key, which is quiet."""
    key = api.unpacked("a")
    name = api.key(chain_of(["a"]))
    api.commit(name, key)
    assert name in refused(Code.ALREADY_EXISTS, api.commit, name, key)
    refused(Code.NOT_FOUND, api.remove, key)
    # Its record of the name is lost as well: it begins again, and its collector finds the first.
    again = api.layer("a")
    assert api.list() == [name, again]
    api.remove(name)


def test_quirk_03_what_an_unpacker_left_can_be_listed_and_removed(api: Api) -> None:
    """containerd restarted between Prepare and Commit, or we did; the collector removes children first."""
    below = api.layer("a")
    prepared, applied = api.key(f"extract-1-x {chain_of(['a', 'b'])}"), api.unpacked("a", "b", parent=below)
    api.prepare(prepared, below)
    half = api.key("half made")
    (mount,) = api.prepare(half)
    shutil.rmtree(Path(mount.source).parent)
    api.daemon.kill()
    api.daemon.restart()
    with api.daemon.client() as client:
        after = Api(api.daemon, client)
        assert set(after.list()) == {below, prepared, applied, half}
        for key in (prepared, applied, half, below):
            after.remove(key)
        assert after.list() == []
        wait_for("their directories go", lambda: not after.directories())


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_quirk_04_containerds_records_outlive_ours(node: Node, images: Path) -> None:
    """Our root was wiped: nothing is stuck that removing the image and pulling it again does not mend."""
    daemon, containerd = node.daemon, node.containerd
    containerd.import_image(images / "hello.tar")
    chain = promised(images, "hello")["chain_ids"][-1]
    daemon.stop()
    shutil.rmtree(daemon.root)
    daemon.restart()
    containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    assert chain not in containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    with pytest.raises(ProcessFailed, match="not found"):
        containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "k", chain)
    containerd.ctr("images", "rm", "--sync", reference("hello"))
    containerd.import_image(images / "hello.tar")
    assert containerd.cat(reference("hello"), "q4", "/etc/hello").strip()


def test_quirk_05_cleanup_beside_prepare_and_apply_of_the_same_content(api: Api) -> None:
    """Nothing in use, and nothing that is about to be, is cleaned up."""
    api.daemon.stop()
    with api.daemon.config.open("a") as file:
        file.write('[cache]\nmax_size = "0"\n')
    api.daemon.restart()
    with api.daemon.client() as client:
        after, over = Api(api.daemon, client), threading.Event()

        def clean() -> None:
            while not over.is_set():
                after.cleanup()

        cleaner = threading.Thread(target=clean)
        cleaner.start()
        try:
            for _ in range(15):
                name = after.layer("a")
                assert len(after.daemon.layer_files()) == 1
                pod = after.key("pod")
                after.prepare(pod, name)
                after.remove(pod)
                after.remove(name)
        finally:
            over.set()
            cleaner.join()


def test_quirk_06_one_spoilt_record_ends_no_listing(api: Api) -> None:
    """Any error in the stream ends containerd's garbage collection, and any of Remove but FAILED_PRECONDITION."""
    keys = [api.key(name) for name in "abcd"]
    for key in keys:
        api.prepare(key)
    with closing(sqlite3.connect(api.daemon.root / "metadata.db")) as beside, beside:
        beside.execute("UPDATE snapshots SET labels = '{' WHERE name = ?", (keys[1],))
        beside.execute("UPDATE snapshots SET kind = 'odd' WHERE name = ?", (keys[2],))
    assert api.list() == keys
    assert api.stat(keys[2]).kind == snapshots_pb2.UNKNOWN
    refused(Code.FAILED_PRECONDITION, api.mounts, keys[2])
    for key in keys:
        api.remove(key)
    assert api.list() == []


def test_quirk_07_labels_are_replaced_by_commit_and_update_and_take_nothing_of_ours_along(api: Api) -> None:
    """What a layer is stands in no label: a client that replaces them all erases nothing, and forges nothing."""
    key = api.unpacked("a", labels={REF: chain_of(["a"]), "of": "prepare"})
    name = api.key(chain_of(["a"]))
    api.commit(name, key, {"of": "commit"})
    assert dict(api.stat(name).labels) == {"of": "commit"}
    usage, layers = api.usage(name), api.daemon.tardevctl("layers")
    api.update(name, {})
    api.update(name, {"io.katacontainers.dm-verity.root-hash": "00" * 32}, "labels")
    assert dict(api.stat(name).labels) == {"io.katacontainers.dm-verity.root-hash": "00" * 32}
    assert api.usage(name) == usage
    assert api.daemon.tardevctl("layers") == layers
    api.prepare(api.key("pod"), name)


def test_quirk_08_what_is_not_ours_is_left_to_the_next_differ(api: Api, tmp_path: Path) -> None:
    """Only at UNIMPLEMENTED does the diff service ask it; at INVALID_ARGUMENT overlayfs beside us could not pull."""
    foreign = [types_pb2.Mount(type="bind", source=str(tmp_path), options=["rbind", "rw"])]
    refused(Code.UNIMPLEMENTED, api.apply, tar_of("a"), foreign)
    descriptor = types_pb2.Descriptor(media_type="no/such", digest="none", size=-1)
    refused(Code.UNIMPLEMENTED, api.diff.Apply, diff_pb2.ApplyRequest(diff=descriptor, mounts=foreign), timeout=30)
    refused(Code.UNIMPLEMENTED, api.diff.Diff, diff_pb2.DiffRequest(left=foreign, right=foreign), timeout=30)


def test_quirk_09_several_members_and_zeros_behind_them_are_one_stream(api: Api) -> None:
    """The diff ID is of all that comes out, to the last byte."""
    tar = tar_of("a") + bytes(4096)
    half = len(tar) // 2
    blob = gzip.compress(tar[:half]) + gzip.compress(tar[half:]) + bytes(1000)
    put(api, blob)
    mounts = api.prepare(api.key(f"extract-1-x {digest_of(tar)}"))
    descriptor = types_pb2.Descriptor(media_type=f"{PLAIN}+gzip", digest=digest_of(blob), size=len(blob))
    applied = api.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60).applied
    assert (applied.digest, applied.size, applied.media_type) == (digest_of(tar), len(tar), PLAIN)


def test_quirk_10_a_retry_brings_the_same_blob_with_a_new_key(api: Api) -> None:
    tar, name = tar_of("a"), api.key(chain_of(["a"]))
    keys = [api.key(f"extract-{number}-x {chain_of(['a'])}") for number in range(3)]
    for key in keys:
        mounts = api.prepare(key)
        assert api.apply(tar, mounts) == api.apply(tar, mounts) == digest_of(tar)
    assert api.daemon.metric("tardev_builds_total") == 1
    api.remove(keys[0])
    api.commit(name, keys[2])
    refused(Code.ALREADY_EXISTS, api.commit, name, keys[1])
    api.remove(keys[1])
    assert api.list() == [name]
    assert len(api.daemon.layer_files()) == 1


def test_quirk_11_an_unpackers_last_mount_is_writable(api: Api) -> None:
    """containerd 2.4 takes a read-only one, type erofs, or an overlay without upper directory for a staged layer: it
    skips the download, Apply, and commits."""
    below = api.layer("a")
    for key, parent in ((f"d/1/extract-1-x {chain_of(['z'])}", ""), (f"d/2/extract-1-x {chain_of(['y'])}", below)):
        last = api.prepare(key, parent)[-1]
        assert "ro" not in last.options
        assert last.type in ("bind", "overlay")
        assert last.type == "bind" or any(option.startswith("upperdir=") for option in last.options)
        assert api.mounts(key)[-1] == last
    # Any other key may be unpacked into as well.
    last = api.prepare("d/3/by another client", below)[-1]
    assert last.type == "overlay"
    assert any(option.startswith("upperdir=") for option in last.options)


def test_quirk_12_a_layer_is_prepared_without_its_parent(api: Api, tmp_path: Path) -> None:
    """Only with the capability "rebase"; its chain ID is then in the key and the label alone."""
    names = [api.key(chain_of(["a"])), api.key(chain_of(["a", "b"]))]
    keys = [api.unpacked("a"), api.unpacked("a", "b")]
    api.commit(names[0], keys[0])
    api.commit(names[1], keys[1], parent=names[0])
    assert api.stat(names[1]).parent == names[0]
    assert seen(api, names[1], tmp_path / "m") == {"a", "b"}


def test_quirk_13_an_unpack_on_demand_has_no_labels_and_perhaps_no_blob(api: Api) -> None:
    """The key alone says what is wanted; and the error says what to do about a blob that is not there."""
    data = tar_of("a")
    put_image(api, [digest_of(data)], [data], layers=False)
    key = api.key(f"extract-1-x {chain_of(['a'])}")
    mounts = api.prepare(key)
    descriptor = types_pb2.Descriptor(media_type=PLAIN, digest=digest_of(data), size=len(data))
    with pytest.raises(grpc.RpcError) as caught:
        api.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=30)
    assert caught.value.code() in (Code.NOT_FOUND, Code.UNAVAILABLE)
    text = refused(Code.FAILED_PRECONDITION, api.commit, f"default/9/{chain_of(['a'])}", key)
    assert "ctr -n default content fetch" in text
    put(api, data)
    api.commit(api.key(chain_of(["a"])), key)


def test_quirk_14_storms_of_usage_stat_and_mounts(api: Api) -> None:
    """CRI asks for every active snapshot each 10 s, whatever is in it; nobody waits for a walk."""
    name = api.layer("a")
    pods = [api.key(f"pod{number}") for number in range(20)]
    answers = {pod: api.prepare(pod, name) for pod in pods}
    requests = [snapshots_pb2.UsageRequest(snapshotter=SNAPSHOTTER, key=pod) for pod in pods]
    for _ in range(3):
        usages = [api.stub.Usage.future(request, timeout=30) for request in requests]
        assert all(usage.result().inodes == 1 for usage in usages)
        assert {api.stat(pod).parent for pod in pods} == {name}
        assert {pod: api.mounts(pod) for pod in pods} == answers
    assert len(api.daemon.mounts()) == 1


@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
def test_quirk_15_containerd_mounts_a_containers_snapshot_itself(node: Node, images: Path, tmp_path: Path) -> None:
    """To look up a user's name, read-only, before the container runs."""
    containerd = node.containerd
    containerd.import_image(images / "layers.tar")
    chain = promised(images, "layers")["chain_ids"][-1]
    containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "pod", chain)
    command = containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "mounts", str(tmp_path), "pod")
    options = next(word for word in command.split() if "lowerdir=" in word).split(",")
    # As containerd does (mount.WithReadonlyTempMount): the upper directory becomes the topmost lower one.
    upper = next(option for option in options if option.startswith("upperdir=")).removeprefix("upperdir=")
    lower = next(option for option in options if option.startswith("lowerdir=")).removeprefix("lowerdir=")
    (Path(upper) / "written").write_text("x")
    kept = [option for option in options if not option.startswith(("upperdir=", "workdir=", "lowerdir="))]
    run("mount", "-t", "overlay", "-o", ",".join([*kept, f"lowerdir={upper}:{lower}"]), "overlay", tmp_path,
        env={**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})  # fmt: skip
    try:
        assert (tmp_path / "etc/hello").read_text().strip() == "hello from layer 7"
        assert (tmp_path / "written").exists()
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "new").touch()
    finally:
        run("umount", tmp_path)
    # And containerd itself, for an image that runs as a name.
    user = make_tars.T()
    user.d("etc/")
    user.f("etc/passwd", b"root:x:0:0::/:\ntester:x:1234:56::/:\n")
    user.f("etc/group", b"root:x:0:\nothers:x:77:tester\n")
    hello = promised(images, "hello")
    with tarfile.open(images / "hello.tar") as archive:
        digest = str(hello["layers"][0]["digest"])  # type: ignore[index]
        member = archive.extractfile(f"blobs/sha256/{digest.removeprefix('sha256:')}")
        assert member
        layers = [member.read(), gzip.compress(bytes(user.done()))]
    diff_ids = [*hello["diff_ids"], digest_of(bytes(user.done()))]
    named = tmp_path / "named.tar"
    oci_archive(named, reference("named"), layers, f"{PLAIN}+gzip", diff_ids, {"User": "tester"})
    containerd.import_image(named)
    out = containerd.cat(reference("named"), "q15", "/proc/self/status")
    ids = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith(("Uid:", "Gid:"))}
    assert ids == {"Uid:": "1234", "Gid:": "56"}


def test_quirk_25_a_published_layer_file_is_never_written_to(api: Api) -> None:
    """A VM has it open, and locked: what replaces it is another inode, and the old one stays as it was."""
    parent = api.layer("a")
    (path,) = api.daemon.layer_files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    good, inode = path.read_bytes(), path.stat().st_ino
    with path.open("rb") as held:
        api.layer("a", "b", parent=parent)
        api.apply(tar_of("a"), api.prepare(api.key(f"extract-1-x {chain_of(['z'])}")))
        assert (path.stat().st_ino, path.read_bytes()) == (inode, good)
        # Somebody else spoils it, as far as a new file of that name goes.
        path.unlink()
        path.write_bytes(b"spoilt")
        api.apply(tar_of("a"), api.prepare(api.key(f"extract-1-x {chain_of(['y'])}")))
        assert path.read_bytes() == good == held.read()
        assert path.stat().st_ino != inode


def test_time_goes_on_while_a_record_is_looked_at(api: Api) -> None:
    """Times of a snapshot: of its Prepare, then of its Commit, then of its last Update."""
    moments = [time.time_ns()]
    key = api.unpacked("a")
    prepared = api.stat(key)
    moments.append(time.time_ns())
    name = api.key(chain_of(["a"]))
    api.commit(name, key)
    committed = api.stat(name)
    moments.append(time.time_ns())
    updated = api.update(name, {"a": "b"})
    at = [info.created_at.ToNanoseconds() for info in (prepared, committed, updated)]
    assert moments[0] <= at[0] <= moments[1] <= at[1] <= moments[2]
    assert at[1] == at[2] == committed.updated_at.ToNanoseconds()
    assert moments[2] <= updated.updated_at.ToNanoseconds() <= time.time_ns()
