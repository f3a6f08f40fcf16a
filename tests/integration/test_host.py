# SPDX-License-Identifier: Apache-2.0
"""The contract `host`: mounts of layers that are shared, counted and released; limits; user namespaces."""

from __future__ import annotations

import os
import random
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from blockdev.kernel.mounts import mounted_below, mounts_files
from snapshotter.api.proto import types_pb2
from snapshotter.idmap import GID_LABEL, UID_LABEL
from snapshotter.layerstore import UNTOUCHED_NS
from tests.harness import Daemon, run, wait_for
from tests.integration.test_snapshots_api import Api, Code, chain_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs]

NAME = '[snapshotters.tardev-host]\ncontract = "host"\nformat = "tar-index"\n'
MAPPED = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}


@contextmanager
def an_api(directory: Path, extra: str) -> Iterator[Api]:
    """On a daemon with these lines in its configuration."""
    (directory / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    daemon = Daemon(directory / "daemon", directory / "containerd", extra)
    daemon.start()
    try:
        with daemon.client() as client:
            yield Api(daemon, client)
    finally:
        daemon.clean_up()


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Api]:
    with daemon.client() as client:
        yield Api(daemon, client)


def chain(api: Api, *names: str) -> list[str]:
    """The committed snapshots of a chain, bottom first."""
    made: list[str] = []
    for count in range(1, len(names) + 1):
        made.append(api.layer(*names[:count], parent=made[-1] if made else ""))
    return made


@contextmanager
def mounted(mounts: list[types_pb2.Mount], target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    (mount,) = mounts
    kind = [] if mount.type == "bind" else ["-t", mount.type]
    run("mount", *kind, "-o", ",".join(mount.options), mount.source, target)
    try:
        yield target
    finally:
        run("umount", target)


def sources(daemon: Daemon) -> set[str]:
    return {entry.source for entry in mounted_below(daemon.root) if entry.fs_type == "erofs"}


def released(api: Api) -> None:
    wait_for("nothing is mounted", lambda: not api.daemon.mounts() and not list((api.daemon.root / "m").iterdir()))


@pytest.mark.parametrize("through", ["auto", "loop"])
def test_layers_are_mounted_from_the_file_or_through_a_loop_device(tmp_path: Path, through: str) -> None:
    with an_api(tmp_path, f'[host]\nmount_through = "{through}"\n') as api:
        top = chain(api, "a", "b", "c")[-1]
        pod = api.key("pod")
        answer = api.prepare(pod, top)
        assert len(sources(api.daemon)) == 3
        from_files = sources(api.daemon) == {str(path) for path in api.daemon.layer_files()}
        assert from_files == (through == "auto" and mounts_files())
        devices = {Path(source).name for source in sources(api.daemon) if source.startswith("/dev/loop")}
        assert len(devices) == (0 if from_files else 3)
        with mounted(answer, tmp_path / "rootfs") as rootfs:
            assert {path.name: path.read_text() for path in rootfs.iterdir()} == {"a": "a", "b": "b", "c": "c"}
            (rootfs / "a").write_text("changed")
            # A container that runs does not need them any more, and so holds nobody up.
            api.remove(pod)
            released(api)
            assert (rootfs / "b").read_text() == "b"
        in_use = [Path("/sys/block", name, "loop/backing_file") for name in devices]
        wait_for("the loop devices are free again", lambda: not any(path.exists() for path in in_use))


def test_a_layer_is_mounted_once_however_many_containers_stand_on_it(api: Api) -> None:
    low, _, high = chain(api, "a", "b", "c")
    other = api.layer("a", "x", parent=low)
    keys = [api.key(f"pod {number}") for number in range(6)]
    for key, parent in zip(keys, [high, high, other, other, low, low], strict=True):
        api.prepare(key, parent)
    assert len(api.daemon.mounts()) == 4
    before = {entry.mount_point: entry.mount_id for entry in mounted_below(api.daemon.root)}
    for key in keys[::2]:
        api.remove(key)
    api.daemon.kill()
    api.daemon.restart()
    with api.daemon.client() as client:
        after = Api(api.daemon, client)
        for key in keys[1::2]:
            after.mounts(key)
        # The very same mounts: a new daemon neither mounts again nor on top.
        assert {entry.mount_point: entry.mount_id for entry in mounted_below(api.daemon.root)} == before
        after.remove(keys[1])
        wait_for("b and c are released", lambda: len(api.daemon.mounts()) == 2)
        after.remove(keys[3])
        wait_for("x is released", lambda: len(api.daemon.mounts()) == 1)
        after.remove(keys[5])
        released(api)


@pytest.mark.parametrize("obstacle", ["file lost", "mount point taken", "mount refused"])
def test_a_mount_that_fails_leaves_none_of_those_before_it(api: Api, obstacle: str) -> None:
    """The lowest layer comes last."""
    low, _, high = chain(api, "a", "b", "c")
    (digest,) = [path for path in api.daemon.layer_files() if path.name in chain_of(["a"])]
    point = api.daemon.root / "m" / "1"
    if obstacle == "file lost":
        digest.rename(digest.parent / "lost")
        for blob in (api.daemon.directory.parent / "containerd").rglob("blobs/sha256/*"):
            blob.unlink()  # or it would be built again
        code = Code.DATA_LOSS
    elif obstacle == "mount point taken":
        point.write_text("in the way")
        code = Code.INTERNAL
    else:
        # Its head and trailer are whole, and nothing else.
        with digest.open("r+b") as file:
            file.seek(1536)
            file.write(b"\xff" * (digest.stat().st_size - 1536 - 4096))
        os.utime(digest, ns=(0, UNTOUCHED_NS))  # as a disk does it
        code = Code.INTERNAL
    key = api.key("pod")
    for answer in (api.prepare, api.view):
        assert refused(code, answer, key, high)
        assert api.daemon.mounts() == []
        assert [path.name for path in (api.daemon.root / "m").iterdir()] == ["1"] * (obstacle == "mount point taken")
        assert key not in api.list()
        wait_for("no directory is left", lambda: not api.directories())
    if obstacle == "mount point taken":
        point.unlink()
        api.prepare(key, high)
        assert len(api.daemon.mounts()) == 3
        api.remove(key)
        released(api)
    assert api.stat(low)


def test_containers_come_and_go_at_once_and_none_lacks_a_layer(api: Api) -> None:
    low, middle, high = chain(api, "a", "b", "c")
    other = api.layer("a", "x", parent=low)
    wrong: list[str] = []

    def live(worker: int) -> None:
        chance = random.Random(worker)
        with api.daemon.client() as client:
            mine = Api(api.daemon, client)
            for number in range(25):
                key = f"default/1/{worker} {number}"
                prepare = mine.prepare if chance.random() < 0.8 else mine.view
                (mount,) = prepare(key, chance.choice([low, middle, high, other]))
                listed = next((option for option in mount.options if option.startswith("lowerdir=")), "")
                lowers = listed.removeprefix("lowerdir=").split(":") if listed else [mount.source]
                for lower in lowers:
                    if not list(Path(lower).iterdir()):
                        wrong.append(f"{key}: {lower} is empty")
                if chance.random() < 0.5:
                    mine.mounts(key)
                mine.remove(key)

    workers = [threading.Thread(target=live, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    released(api)
    wait_for("their directories go", lambda: not api.directories())


def test_beyond_the_layers_of_a_name_nothing_is_prepared(tmp_path: Path) -> None:
    with an_api(tmp_path, f"{NAME}max_layers = 3\n") as api:
        two, three, four = chain(api, "a", "b", "c", "d")[1:]
        repeated = chain(api, "a", "b", "c", "a", "b")[-1]
        for call in (api.prepare, api.view):
            text = refused(Code.FAILED_PRECONDITION, call, api.key("pod"), four)
            for part in (four, "4 layers", " 3:", "max_layers", "[snapshotters.tardev-host]"):
                assert part in text
        assert api.daemon.mounts() == []
        assert not api.directories()
        assert len(api.list()) == 4 + 5
        # An image may go on being pulled: another name may take it.
        extraction = api.key(f"extract-1-x {chain_of(['a', 'b', 'c', 'd', 'e'])}")
        api.prepare(extraction, four)
        api.remove(extraction)
        # Equal layers are one.
        kept = {key: api.prepare(key, parent) for key, parent in (("default/9/x", three), ("default/9/y", repeated))}
        api.daemon.stop()
        text = api.daemon.config.read_text()
        api.daemon.config.write_text(text.replace("max_layers = 3", "max_layers = 2"))
        api.daemon.restart()
        with api.daemon.client() as client:
            after = Api(api.daemon, client)
            refused(Code.FAILED_PRECONDITION, after.prepare, api.key("new"), three)
            after.prepare(api.key("new"), two)
            # What a container has been given is not taken back.
            assert {key: after.mounts(key) for key in kept} == kept


def test_mounts_that_selinux_has_labelled_are_ours_all_the_same(api: Api) -> None:
    mounts = api.prepare(api.key(f"extract-1-x {chain_of(['a'])}"))
    for mount in mounts:
        mount.options.append('context="system_u:object_r:container_file_t:s0:c1,c2"')
    assert api.apply(tar_of("a"), mounts) == chain_of(["a"])
    # A client with keys of its own: an overlay with an empty upper directory.
    low = api.layer("b")
    other = api.prepare(api.key("buildkit"), low)
    other[0].options.append('context="system_u:object_r:container_file_t:s0:c1,c2"')
    assert api.apply(tar_of("c"), other) == chain_of(["c"])


# User namespaces


def test_without_remap_ids_a_mapping_is_ignored(api: Api, tmp_path: Path) -> None:
    top = chain(api, "a", "b")[-1]
    plain = api.prepare(api.key("plain"), top)
    for labels in (MAPPED, {UID_LABEL: "nonsense"}):
        key = api.key("pod")
        answer = api.prepare(key, top, labels)
        assert dict(api.stat(key).labels) == labels
        assert [option.partition("=")[0] for option in answer[0].options] == [
            option.partition("=")[0] for option in plain[0].options
        ]
        with mounted(answer, tmp_path / "rootfs") as rootfs:
            assert {path.stat().st_uid for path in (rootfs, *rootfs.iterdir())} == {0}
    assert "remap_ids is off" in api.daemon.log.read_text()


@pytest.fixture
def remapping(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path, f"{NAME}remap_ids = true\n") as api:
        yield api


def owners(rootfs: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_uid, path.stat().st_gid) for path in (rootfs, *rootfs.iterdir())}


def test_a_mapped_container_sees_its_layers_under_its_ids(remapping: Api, tmp_path: Path) -> None:
    api = remapping
    top = chain(api, "a", "b")[-1]
    plain, pod, other = api.key("plain"), api.key("pod"), api.key("other")
    api.prepare(plain, top)
    answer = api.prepare(pod, top, MAPPED)
    several = {UID_LABEL: "0:300000:1,1:500000:65535", GID_LABEL: "0:400000:5,10:600000:100"}
    other_answer = api.prepare(other, top, several)
    # containerd would map, of these, the directory that they share.
    assert not [option for option in answer[0].options if "idmap" in option or "gidmap" in option]
    assert len(api.daemon.mounts()) == 2 + 2 + 2
    with mounted(answer, tmp_path / "rootfs") as rootfs:
        assert set(owners(rootfs).values()) == {(100000, 200000)}
        # A copy in the upper directory keeps the owner; one that the container makes has the IDs of who makes it.
        (rootfs / "a").chmod(0o600)
        (rootfs / "new").touch()
        assert owners(rootfs)["a"] == (100000, 200000)
    with mounted(other_answer, tmp_path / "rootfs") as rootfs:
        assert set(owners(rootfs).values()) == {(300000, 400000)}
    with mounted(api.mounts(plain), tmp_path / "rootfs") as rootfs:
        assert set(owners(rootfs).values()) == {(0, 0)}

    before = {entry.mount_point: entry.mount_id for entry in mounted_below(api.daemon.root)}
    api.daemon.kill()
    api.daemon.restart()
    with api.daemon.client() as client:
        after = Api(api.daemon, client)
        assert (after.mounts(pod), after.mounts(other)) == (answer, other_answer)
        assert {entry.mount_point: entry.mount_id for entry in mounted_below(api.daemon.root)} == before
        after.remove(pod)
        wait_for("its mounts go", lambda: len(api.daemon.mounts()) == 4)
        after.remove(plain)
        after.remove(other)
        released(api)
        wait_for("their directories go", lambda: not api.directories())


def test_changes_of_a_mapped_container_are_committed_with_its_own_ids(remapping: Api, tmp_path: Path) -> None:
    """Whoever runs the image next may map others, or none."""
    api = remapping
    pod, name, later = api.key("pod"), api.key("saved"), api.key("later")
    with mounted(api.prepare(pod, chain(api, "a")[-1], MAPPED), tmp_path / "rootfs") as rootfs:
        (rootfs / "new").touch()
        os.chown(rootfs / "new", 100005, 200007)
        os.setxattr(rootfs / "new", "system.posix_acl_access", acl(100005))
        (rootfs / "a").chmod(0o600)
        api.commit(name, pod)
    with mounted(api.view(later, name), tmp_path / "rootfs") as rootfs:
        assert owners(rootfs) == {"rootfs": (0, 0), "a": (0, 0), "new": (5, 7)}
        assert os.getxattr(rootfs / "new", "system.posix_acl_access") == acl(5)
        assert stat.S_IMODE((rootfs / "a").stat().st_mode) == 0o600


def acl(user: int) -> bytes:
    """For that user, too, to read (Linux: include/uapi/linux/posix_acl_xattr.h)."""
    entries = [(1, 6, -1), (2, 4, user), (4, 4, -1), (16, 4, -1), (32, 4, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def test_mapped_mounts_of_a_snapshot_that_is_gone_go_at_the_next_start(remapping: Api) -> None:
    api = remapping
    top = chain(api, "a", "b")[-1]
    plain, pod = api.key("plain"), api.key("pod")
    api.prepare(plain, top)
    api.prepare(pod, top, MAPPED)
    api.daemon.stop()
    api.daemon.restart({"TARDEV_TRACE_KILL": "remove.removed"})
    with api.daemon.client() as client:
        with pytest.raises(grpc.RpcError):
            Api(api.daemon, client).remove(pod)
    wait_for("the daemon is dead", lambda: not api.daemon.alive())
    assert len(api.daemon.mounts()) == 4
    api.daemon.restart()
    wait_for("only the other's mounts are left", lambda: len(api.daemon.mounts()) == 2)
    assert len(api.directories()) == 1


def test_a_mapped_view_and_a_mapped_container_without_layers(remapping: Api, tmp_path: Path) -> None:
    api = remapping
    low, top = chain(api, "a", "b")
    for parent, names in ((low, {"a"}), (top, {"a", "b"})):
        key = api.key("view")
        answer = api.view(key, parent, MAPPED)
        assert api.mounts(key) == answer
        with mounted(answer, tmp_path / "rootfs") as rootfs:
            found = owners(rootfs)
            assert found.keys() == {"rootfs", *names}
            assert set(found.values()) == {(100000, 200000)}
            with pytest.raises(OSError, match="Read-only"):
                (rootfs / "new").touch()
        api.remove(key)
    empty = api.key("empty")
    with mounted(api.prepare(empty, labels=MAPPED), tmp_path / "rootfs") as rootfs:
        assert owners(rootfs) == {"rootfs": (100000, 200000)}
    api.remove(empty)
    released(api)
    wait_for("their directories go", lambda: not api.directories())


NO_MAPPINGS = [
    {UID_LABEL: "0:100000:65536"},
    {GID_LABEL: "0:100000:65536"},
    {UID_LABEL: "", GID_LABEL: ""},
    {UID_LABEL: "0:100000:65536", GID_LABEL: "0:1"},
    {UID_LABEL: "0:100000:10,5:300000:10", GID_LABEL: "0:100000:65536"},
    {UID_LABEL: "1:100000:10", GID_LABEL: "0:100000:65536"},
    {UID_LABEL: ",".join(f"{n}:{n}:1" for n in range(400)), GID_LABEL: "0:100000:65536"},
    {UID_LABEL: "0:1:2\n" * 1000, GID_LABEL: "0:100000:65536"},
]


def test_a_mapping_that_is_none_is_refused_before_anything_is_made(remapping: Api) -> None:
    api = remapping
    low = api.layer("a")
    for labels in NO_MAPPINGS:
        assert_no_mapping(api, low, labels)


def assert_no_mapping(api: Api, low: str, labels: Mapping[str, str]) -> None:
    for call in (api.prepare, api.view):
        for parent in (low, ""):
            assert "mapping" in refused(Code.INVALID_ARGUMENT, call, api.key("pod"), parent, labels)
    assert api.list() == [low]
    assert api.daemon.mounts() == []
    wait_for("no directory is left", lambda: not api.directories())
    # To what is unpacked no mapping applies, whatever a publisher wrote beside a layer.
    extraction = api.key(f"extract-1-x {chain_of(['a', 'b'])}")
    (mount,) = api.prepare(extraction, low, labels)
    assert Path(mount.source).stat().st_uid == 0
    assert api.apply(tar_of("b"), [mount]) == chain_of(["b"])
    api.remove(extraction)


def test_an_update_cannot_take_a_mapping_away_or_change_it(remapping: Api) -> None:
    api = remapping
    key = api.key("pod")
    answer = api.prepare(key, api.layer("a"), MAPPED)
    assert dict(api.update(key, {"a": "b"}).labels) == {"a": "b", **MAPPED}
    assert dict(api.update(key, {}, f"labels.{UID_LABEL}").labels) == {"a": "b", **MAPPED}
    refused(Code.INVALID_ARGUMENT, api.update, key, {UID_LABEL: "0:5:5"}, f"labels.{UID_LABEL}")
    refused(Code.INVALID_ARGUMENT, api.update, key, {**MAPPED, GID_LABEL: "0:5:5"})
    assert api.mounts(key) == answer
