# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from blockdev.formats.layer_file import STORED_FORMATS, TRAILER_BYTES
from blockdev.workers.launch import BuildRecord
from snapshotter import inventory, reconcile
from snapshotter.activation import Activation
from snapshotter.directories import Directories
from snapshotter.errors import ResourceExhausted
from snapshotter.inventory import Inventory, Parts
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.metastore import Kind, Layer, LayerID, LayerState, Metastore, Snapshot, SnapshotID
from snapshotter.reconcile import (
    DeleteLayerFile,
    DeleteLink,
    DeleteQuarantined,
    DeleteSnapshotDirectory,
    DeleteStaged,
    DropSidecar,
    MakeSnapshotDirectory,
    Quarantine,
    ReleaseMounts,
    RemoveDevice,
    SettleLink,
    plan,
)
from snapshotter.trash import Trash, remove_tree
from tests.golden import make_tars
from tests.golden.test_tar_index import build

FORMAT = "tar-index"


def digest(name: str) -> str:
    return "sha256:" + name * 64


def layer(number: int, state: LayerState = LayerState.READY) -> Layer:
    return Layer(
        LayerID(number), digest(format(number, "x")), FORMAT, "0" * 64, 1, 2, 3, 4, 5, {}, state, 0.5, 1_000, 0
    )  # fmt: skip


def snapshot(number: int, kind: Kind = Kind.ACTIVE, layer_id: int | None = None) -> Snapshot:
    return Snapshot(
        SnapshotID(number), "tardev-host", f"k{number}", "", None, kind, False, {}, None,
        LayerID(layer_id) if layer_id else None, 1_000, 1_000,
    )  # fmt: skip


CLEAN = Inventory(
    snapshots=(snapshot(1), snapshot(2, Kind.VIEW), snapshot(3, Kind.COMMITTED, 1), snapshot(4, Kind.COMMITTED, 2)),
    layers=(layer(1), layer(2), layer(3, LayerState.BROKEN)),
    contradictions={},
    layer_files=frozenset({(digest("1"), FORMAT), (digest("2"), FORMAT)}),
    staged=frozenset(),
    snapshot_directories=frozenset({"1", "2"}),
    whole_directories=frozenset({"1", "2"}),
    mounted=frozenset({LayerID(1)}),
    layers_in_use=frozenset({LayerID(1), LayerID(2)}),
)
EMPTY = Inventory((), (), {}, frozenset(), frozenset(), frozenset(), frozenset(), frozenset(), frozenset())


# plan


def test_a_clean_state_needs_nothing() -> None:
    assert plan(CLEAN) == []
    assert plan(EMPTY) == []


def test_what_builds_left_in_staging_goes() -> None:
    assert plan(replace(CLEAN, staged=frozenset({"b", "a"}))) == [DeleteStaged("a"), DeleteStaged("b")]


def test_a_layer_file_without_a_row_goes() -> None:
    files = CLEAN.layer_files | {(digest("9"), FORMAT), (digest("1"), "erofs-4k")}
    assert plan(replace(CLEAN, layer_files=files)) == [
        DeleteLayerFile(digest("1"), "erofs-4k"),
        DeleteLayerFile(digest("9"), FORMAT),
    ]


def test_the_file_of_a_broken_layer_is_put_aside() -> None:
    """Its next build brings another; the row stays for the snapshots that refer to it."""
    files = CLEAN.layer_files | {(digest("3"), FORMAT)}
    [broken] = [each for each in CLEAN.layers if each.state is LayerState.BROKEN]
    assert plan(replace(CLEAN, layer_files=files)) == [Quarantine(broken, "was found broken")]


def test_a_file_that_contradicts_its_row_is_put_aside_and_not_deleted() -> None:
    found = plan(replace(CLEAN, contradictions={LayerID(2): "has 3 bytes, not 4"}))
    assert found == [Quarantine(layer(2), "has 3 bytes, not 4")]


def test_a_ready_layer_whose_file_is_missing_is_no_longer_ready() -> None:
    files = frozenset({(digest("1"), FORMAT)})
    found = plan(replace(CLEAN, layer_files=files, contradictions={LayerID(2): "No such file or directory"}))
    assert found == [Quarantine(layer(2), "No such file or directory")]


def test_directories_of_removed_and_of_committed_snapshots_go() -> None:
    directories = frozenset({"1", "2", "3", "77", "stray"})
    assert plan(replace(CLEAN, snapshot_directories=directories)) == [
        DeleteSnapshotDirectory("3"),
        DeleteSnapshotDirectory("77"),
        DeleteSnapshotDirectory("stray"),
    ]


def test_a_snapshot_that_lacks_its_directory_gets_it() -> None:
    missing = [MakeSnapshotDirectory(SnapshotID(1)), MakeSnapshotDirectory(SnapshotID(2))]
    assert plan(replace(CLEAN, snapshot_directories=frozenset(), whole_directories=frozenset())) == missing
    assert plan(replace(CLEAN, whole_directories=frozenset({"2"}))) == missing[:1]


def test_a_view_of_layers_has_no_directory_and_needs_none() -> None:
    view = replace(snapshot(5, Kind.VIEW), parent="k3", parent_id=SnapshotID(3))
    assert plan(replace(CLEAN, snapshots=(*CLEAN.snapshots, view))) == []


def test_mounts_are_released_only_where_one_is_not_needed() -> None:
    assert plan(replace(CLEAN, mounted=frozenset({LayerID(1), LayerID(2)}))) == []
    assert plan(replace(CLEAN, mounted=frozenset({LayerID(1), LayerID(9)}))) == [ReleaseMounts()]
    assert plan(replace(CLEAN, layers_in_use=frozenset())) == [ReleaseMounts()]


def test_everything_at_once() -> None:
    messy = replace(
        CLEAN,
        staged=frozenset({"tmp"}),
        layer_files=CLEAN.layer_files | {(digest("9"), FORMAT)},
        contradictions={LayerID(1): "why"},
        snapshot_directories=frozenset({"1", "5"}),
        whole_directories=frozenset({"1"}),
        mounted=frozenset({LayerID(8)}),
        unsettled_links=(snapshot(3, Kind.COMMITTED, 1),),
        stray_links=(Path("/l/9"),),
        bad_sidecars=((layer(2), "has another salt than the layer"),),
        old_quarantined=(Path("/q/old"),),
        unused_devices=("tardev-0-1",),
    )
    assert plan(messy)[-5:] == [
        SettleLink(snapshot(3, Kind.COMMITTED, 1)),
        DeleteLink(Path("/l/9")),
        DropSidecar(layer(2), "has another salt than the layer"),
        DeleteQuarantined(Path("/q/old")),
        RemoveDevice("tardev-0-1"),
    ]
    assert {type(action) for action in plan(messy)} == set(reconcile.Action.__args__)
    assert plan(messy) == plan(messy)


# take and apply, on a directory


def layer_file(name: str) -> tuple[BuildRecord, bytes]:
    """Of a tar with one file of that name."""
    tar = make_tars.T()
    tar.f(name, name.encode())
    built, data = build(bytes(tar.done()))
    diff_id = "sha256:" + built.diff_id.hex()
    record = BuildRecord(
        FORMAT, diff_id, built.root_hash.hex(), built.tar_size_bytes, built.data_size_bytes, built.tree_size_bytes,
        built.file_size_bytes, built.entries, {}, digest("b"), 1, {},
    )  # fmt: skip
    return record, data


def layer_bytes(name: str) -> bytes:
    return layer_file(name)[1]


@dataclass
class Place:
    root: Path
    metastore: Metastore
    store: LayerStore
    directories: Directories
    activation: Activation
    links: Links

    @property
    def parts(self) -> Parts:
        return Parts(self.metastore, self.store, self.directories, self.activation, self.links)

    async def mend(self) -> list[reconcile.Action]:
        actions = plan(await inventory.take(self.parts))
        await self.apply(actions)
        return actions

    async def apply(self, actions: Iterable[reconcile.Action]) -> None:
        await reconcile.apply(list(actions), self.parts)

    async def layer(self, name: str) -> Layer:
        """Stored, with its row."""
        record, data = layer_file(name)
        async with self.store.staged() as staged:
            os.write(staged.fd, data)
            self.store.publish(staged, record.diff_id, FORMAT)
        return await self.metastore.publish(record, "none", 0.1)

    async def snapshot(self, key: str, kind: Kind = Kind.ACTIVE) -> Snapshot:
        made = await self.metastore.create("tardev-host", key, "", kind, {}, extraction=False)
        self.directories.make(made.id)
        return made


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    store = LayerStore(root)
    store.prepare()
    directories = Directories(root, store.trash)
    directories.prepare()
    activation = Activation(root, store)
    activation.prepare()
    metastore = Metastore(root / "metadata.db")
    links = Links({"tardev": root / "layers"}, metastore, store)
    links.prepare()
    yield Place(root, metastore, store, directories, activation, links)
    store.trash.close()
    await metastore.close()


async def test_a_new_root_is_clean(place: Place) -> None:
    assert await place.mend() == []


async def test_a_root_in_use_is_clean(place: Place) -> None:
    stored = await place.layer("a")
    await place.snapshot("active")
    await place.snapshot("view", Kind.VIEW)
    committed = await place.snapshot("extract")
    await place.metastore.commit(committed, "n", {}, stored.id, None, None)
    remove_tree(place.root / "snapshots" / str(committed.id))
    assert await place.mend() == []


async def test_one_pass_mends_everything_and_a_second_finds_nothing(place: Place) -> None:
    good, short, gone, alien = [await place.layer(name) for name in "abcd"]
    for stored, data in ((short, layer_bytes("b")[:-1]), (alien, layer_bytes("a"))):
        path = place.store.path(stored.diff_id, FORMAT)
        path.unlink()
        path.write_bytes(data)
    place.store.path(gone.diff_id, FORMAT).unlink()
    place.store.path(digest("e"), FORMAT).write_bytes(b"renamed, but never recorded")
    (place.store.staging / "half").write_bytes(b"half")
    (place.store.staging / "odd").mkdir()
    (place.store.staging / "odd" / "inside").write_bytes(b"x")
    (place.store.staging / "link").symlink_to("/")
    kept, emptied = await place.snapshot("kept"), await place.snapshot("emptied")
    (place.root / "snapshots" / str(kept.id) / "fs" / "file").write_bytes(b"a container's")
    remove_tree(place.root / "snapshots" / str(emptied.id))
    place.directories.make(SnapshotID(99))

    assert await place.mend()
    assert await place.mend() == []

    assert not list(place.store.staging.iterdir())
    assert place.store.listing() == [(good.diff_id, FORMAT)]
    states = {row.diff_id: row.state for row in await place.metastore.layers()}
    assert states == {
        good.diff_id: LayerState.READY,
        short.diff_id: LayerState.BROKEN,
        gone.diff_id: LayerState.BROKEN,
        alien.diff_id: LayerState.BROKEN,
    }
    aside = {path.name for path in (place.root / "quarantine").iterdir()}
    assert aside == {f"{FORMAT}-{row.diff_id.removeprefix('sha256:')}" for row in (short, alien)}
    directories = place.root / "snapshots"
    assert {path.name for path in directories.iterdir()} == {str(kept.id), str(emptied.id)}
    assert (directories / str(kept.id) / "fs" / "file").read_bytes() == b"a container's"
    assert (directories / str(emptied.id) / "work").is_dir()


async def test_every_action_may_be_done_twice(place: Place) -> None:
    stored = await place.layer("a")
    place.store.path(digest("e"), FORMAT).write_bytes(b"x")
    (place.store.staging / "half").write_bytes(b"x")
    place.directories.make(SnapshotID(99))
    made = await place.snapshot("k")
    remove_tree(place.root / "snapshots" / str(made.id))
    actions: list[reconcile.Action] = [
        DeleteStaged("half"),
        DeleteLayerFile(digest("e"), FORMAT),
        Quarantine(stored, "why"),
        DeleteSnapshotDirectory("99"),
        MakeSnapshotDirectory(made.id),
        MakeSnapshotDirectory(SnapshotID(7)),
        ReleaseMounts(),
        DeleteQuarantined(place.root / "quarantine" / "old"),
    ]
    await place.apply(actions)
    await place.apply(actions)
    assert (place.root / "snapshots" / str(made.id) / "fs").is_dir()
    assert not (place.root / "snapshots" / "7").exists()  # its snapshot has gone meanwhile
    assert place.store.listing() == []


async def test_a_crash_in_the_middle_of_putting_a_layer_aside_is_finished(place: Place) -> None:
    stored = await place.layer("a")
    await place.metastore.mark_broken([stored.id])
    [broken] = await place.metastore.layers()
    assert await place.mend() == [Quarantine(broken, "was found broken")]
    assert await place.mend() == []


async def test_a_half_made_snapshot_directory_is_finished(place: Place) -> None:
    made = await place.snapshot("k")
    remove_tree(place.root / "snapshots" / str(made.id) / "fs")
    remove_tree(place.root / "snapshots" / str(made.id) / "work")
    await place.mend()
    assert (place.root / "snapshots" / str(made.id) / "fs").is_dir()
    assert (place.root / "snapshots" / str(made.id) / "work").is_dir()


async def test_a_broken_layer_that_is_built_again_is_clean(place: Place) -> None:
    stored = await place.layer("a")
    await place.apply([Quarantine(stored, "why")])
    assert (await place.layer("a")).id == stored.id
    assert await place.mend() == []


def test_a_snapshots_directories_are_made_once_and_with_the_modes_of_a_root(tmp_path: Path) -> None:
    directories = Directories(tmp_path, Trash(tmp_path))
    directories.prepare()
    path = directories.path(SnapshotID(7))
    before = os.umask(0o077)
    try:
        directories.make(SnapshotID(7))
        (path / "fs" / "file").write_bytes(b"x")
        directories.make(SnapshotID(7))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    # What a container sees as its "/".
    assert stat.S_IMODE((path / "fs").stat().st_mode) == 0o755
    assert (path / "work").is_dir()
    assert (path / "fs" / "file").exists()


# layerstore


def row_of(record: BuildRecord) -> Layer:
    return Layer(
        LayerID(1), record.diff_id, FORMAT, record.root_hash, record.tar_size_bytes, record.data_size_bytes,
        record.tree_size_bytes, record.file_size_bytes, record.entries, {}, LayerState.READY, 0.1, 1,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    made = LayerStore(tmp_path)
    made.prepare()
    made.prepare()
    return made


async def publish(store: LayerStore, name: str, data: bytes) -> Path:
    async with store.staged() as staged:
        os.write(staged.fd, data)
        store.publish(staged, digest(name), FORMAT)
    return store.path(digest(name), FORMAT)


async def test_a_published_layer_is_in_its_place_whole_and_read_only(store: LayerStore, tmp_path: Path) -> None:
    path = await publish(store, "a", b"layer")
    assert path == tmp_path / "layers" / FORMAT / ("a" * 64)
    assert path.read_bytes() == b"layer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert not list(store.staging.iterdir())
    assert store.listing() == [(digest("a"), FORMAT)]


async def test_a_layer_file_is_replaced_and_never_written_to(store: LayerStore) -> None:
    """Virtual machines and mounts hold the old one."""
    path = await publish(store, "a", b"old")
    with path.open("rb") as held:
        await publish(store, "a", b"newer")
        assert held.read() == b"old"
        assert os.fstat(held.fileno()).st_ino != path.stat().st_ino
    assert path.read_bytes() == b"newer"


async def test_what_is_staged_and_not_published_is_gone(store: LayerStore) -> None:
    async with store.staged() as staged:
        assert os.fstat(staged.fd).st_size == os.fstat(staged.spool_fd).st_size == 0
        assert os.fstat(staged.spool_fd).st_nlink == 0
        assert list(store.staging.iterdir()) == [staged.path]
        os.write(staged.fd, b"half")
        os.write(staged.spool_fd, b"leaves")
    assert not list(store.staging.iterdir())
    for fd in (staged.fd, staged.spool_fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    with pytest.raises(RuntimeError):
        async with store.staged():
            raise RuntimeError
    assert not list(store.staging.iterdir())
    assert store.listing() == []


async def test_two_builds_are_staged_apart(store: LayerStore) -> None:
    async with store.staged() as one, store.staged() as two:
        assert one.path != two.path
        os.write(one.fd, b"1")
        os.write(two.fd, b"2")
        store.publish(two, digest("b"), FORMAT)
        store.publish(one, digest("a"), FORMAT)
    assert store.path(digest("a"), FORMAT).read_bytes() == b"1"
    assert store.path(digest("b"), FORMAT).read_bytes() == b"2"


async def test_no_build_starts_below_the_reserve(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, reserve_bytes=1 << 62)
    store.prepare()
    with pytest.raises(ResourceExhausted, match=str(1 << 62)):
        async with store.staged():
            pass
    assert not list(store.staging.iterdir())


def test_the_directories_are_roots_alone(store: LayerStore, tmp_path: Path) -> None:
    for path in (store.staging, tmp_path / "layers", *(tmp_path / "layers" / name for name in STORED_FORMATS)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


async def test_a_layer_file_that_fits_its_row_has_no_contradiction(store: LayerStore) -> None:
    record, data = layer_file("a")
    async with store.staged() as staged:
        os.write(staged.fd, data)
        store.publish(staged, record.diff_id, FORMAT)
    assert store.contradiction(row_of(record)) == ""


async def test_a_layer_file_contradicts_its_row(store: LayerStore) -> None:
    record, data = layer_file("a")
    row = row_of(record)
    rotten, torn = bytearray(data), bytearray(data)
    rotten[-TRAILER_BYTES + 100] ^= 1
    torn[1024 + 50] ^= 1
    path = store.path(record.diff_id, FORMAT)
    for bad, word in (
        (data[:-1], "bytes"),
        (data + b"x", "bytes"),
        (b"", "bytes"),
        (bytes(rotten), "trailer"),
        (data[:-TRAILER_BYTES] + bytes(TRAILER_BYTES), "trailer"),
        (bytes(4096) + data[4096:], "identity"),
        (bytes(torn), "superblock"),
        (layer_bytes("b"), "another layer"),
    ):
        path.write_bytes(bad)
        assert word in store.contradiction(row), word
    path.write_bytes(data)
    assert "another layer" in store.contradiction(replace(row, root_hash="b" * 64))
    path.unlink()
    assert "No such file" in store.contradiction(row)


@pytest.mark.parametrize("size", [0, 1, TRAILER_BYTES - 1])
async def test_a_file_shorter_than_a_trailer_contradicts_any_row(store: LayerStore, size: int) -> None:
    await publish(store, "a", bytes(size))
    assert store.contradiction(replace(layer(10), file_size_bytes=size))


async def test_a_layer_that_is_deleted_twice_is_gone(store: LayerStore) -> None:
    await publish(store, "a", b"1")
    await publish(store, "b", b"2")
    store.delete(digest("a"), FORMAT)
    store.delete(digest("a"), FORMAT)
    assert store.listing() == [(digest("b"), FORMAT)]


async def test_a_layer_that_is_put_aside_leaves_its_place(store: LayerStore, tmp_path: Path) -> None:
    await publish(store, "a", b"odd")
    store.quarantine(digest("a"), FORMAT)
    store.quarantine(digest("a"), FORMAT)
    store.quarantine(digest("b"), FORMAT)
    assert store.listing() == []
    (aside,) = (tmp_path / "quarantine").iterdir()
    assert aside.name == f"{FORMAT}-{'a' * 64}"
    assert aside.read_bytes() == b"odd"


def test_a_tree_is_removed_and_what_it_points_to_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    remove_tree(tree)
    (tmp_path / "link").symlink_to(outside)
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "file").exists()


def test_a_tree_of_any_depth_is_removed_with_its_odd_names(tmp_path: Path) -> None:
    """Deeper than Python recurses, and longer than a path may be."""
    tree = tmp_path / "tree"
    tree.mkdir()
    here = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(3000):
        name = ("d" * 200).encode() + b"\xff\n%d" % number
        os.mkdir(name, dir_fd=here)
        os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(tree)
    assert not list(tmp_path.iterdir())


async def test_what_cannot_be_done_keeps_nothing_else_from_being_done(place: Place) -> None:
    (place.root / "snapshots" / "stray").write_bytes(b"x")
    (place.store.staging / "half").write_bytes(b"x")
    await place.apply(
        [DeleteSnapshotDirectory("no/such\0name"), DeleteSnapshotDirectory("stray"), DeleteStaged("half")]
    )
    assert await place.mend() == []
