# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from blockdev.workers.launch import BuildRecord
from policy.chain import ChainID
from snapshotter import metastore as module
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from snapshotter.metastore import Kind, Layer, LayerID, LayerState, Metastore, Snapshot, SnapshotID, read

S = "tardev-host"
DIFF_ID = "sha256:" + "d" * 64


def record(name: str = "d", **changes: object) -> BuildRecord:
    made = BuildRecord(
        format="tar-index",
        diff_id="sha256:" + name * 64,
        root_hash=name * 64,
        tar_size_bytes=1,
        data_size_bytes=2,
        tree_size_bytes=3,
        file_size_bytes=4,
        entries=5,
        blob_digest="sha256:" + name.upper() * 64,
        blob_size_bytes=6,
        warnings={"odd": 7},
        usage={"builder": {"cpu_seconds": 1.0}},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.db"


@pytest_asyncio.fixture
async def store(path: Path) -> AsyncIterator[Metastore]:
    opened = Metastore(path)
    yield opened
    await opened.close()


@contextmanager
def beside(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else's."""
    with closing(sqlite3.connect(path)) as connection, connection:
        yield connection


async def create(
    store: Metastore, key: str, parent: str = "", kind: Kind = Kind.ACTIVE, *, extraction: bool = False
) -> Snapshot:
    return await store.create(S, key, parent, kind, {}, extraction=extraction)


async def committed(store: Metastore, name: str, layer: Layer, parent: str = "") -> Snapshot:
    active = await create(store, f"extract {name}", parent, extraction=True)
    await store.set_layer(active.id, layer.id)
    await store.commit(active, name, {}, layer.id, ChainID(f"chain of {name}"), active.parent_id)
    return await store.stat(S, name)


# Snapshots


async def test_a_new_snapshot_is_as_it_was_asked_for(store: Metastore) -> None:
    before = time.time_ns()
    labels = {"a": "b", "ü": "€", "quote": "'\"; DROP TABLE snapshots; --", "line": "1\n2"}
    made = await store.create(S, "k", "", Kind.ACTIVE, labels, extraction=True)
    assert made == await store.stat(S, "k") == await store.find(S, "k") == await store.by_id(made.id)
    assert (made.snapshotter, made.name, made.parent, made.parent_id) == (S, "k", "", None)
    assert (made.kind, made.extraction, made.labels) == (Kind.ACTIVE, True, labels)
    assert (made.chain_id, made.layer_id) == (None, None)
    assert before <= made.created_ns == made.updated_ns <= time.time_ns()


@pytest.mark.parametrize("kind", [Kind.ACTIVE, Kind.VIEW])
async def test_a_child_knows_its_parent(store: Metastore, kind: Kind) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    parent = await committed(store, "p", layer)
    child = await create(store, "c", "p", kind)
    assert (child.parent, child.parent_id, child.kind) == ("p", parent.id, kind)
    assert await store.stat(S, "c") == child


async def test_a_key_is_taken_whatever_kind_has_it(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await create(store, "active")
    await create(store, "view", kind=Kind.VIEW)
    await committed(store, "committed", layer)
    for key in ("active", "view", "committed"):
        for kind in (Kind.ACTIVE, Kind.VIEW):
            with pytest.raises(AlreadyExists, match=key):
                await create(store, key, kind=kind)


async def test_every_snapshotter_has_keys_of_its_own(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await committed(store, "p", layer)
    other = await store.create("other", "p", "", Kind.ACTIVE, {}, extraction=False)
    assert other.snapshotter == "other"
    with pytest.raises(NotFound):
        await store.create("third", "c", "p", Kind.ACTIVE, {}, extraction=False)
    assert [row.snapshotter for row in await store.snapshots()] == [S, "other"]
    assert [row.name for row in await store.snapshots("other")] == ["p"]
    assert await store.snapshots("third") == []


async def test_a_parent_must_exist_and_be_committed(store: Metastore) -> None:
    await create(store, "active")
    await create(store, "view", kind=Kind.VIEW)
    with pytest.raises(NotFound, match="nobody"):
        await create(store, "c", "nobody")
    for parent in ("active", "view"):
        with pytest.raises(InvalidArgument, match=parent):
            await create(store, "c", parent)
    assert await store.find(S, "c") is None


async def test_what_is_not_there_is_not_found(store: Metastore) -> None:
    assert await store.find(S, "k") is None
    assert await store.by_id(SnapshotID(7)) is None
    with pytest.raises(NotFound, match="'k'"):
        await store.stat(S, "k")
    with pytest.raises(NotFound, match="'k'"):
        await store.remove(S, "k")
    with pytest.raises(NotFound, match="'k'"):
        await store.update_labels(S, "k", lambda labels: labels)
    assert not await store.set_layer(SnapshotID(7), LayerID(1))


async def test_a_commit_renames_replaces_labels_and_keeps_the_place(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    active = await store.create(S, "k", "", Kind.ACTIVE, {"old": "1", "both": "1"}, extraction=True)
    await store.commit(active, "n", {"new": "2", "both": "2"}, layer.id, ChainID(DIFF_ID), None)
    done = await store.stat(S, "n")
    assert (done.id, done.kind, done.extraction) == (active.id, Kind.COMMITTED, False)
    assert (done.labels, done.layer_id, done.chain_id) == ({"new": "2", "both": "2"}, layer.id, DIFF_ID)
    assert await store.find(S, "k") is None


async def test_a_commit_sets_both_times(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    active = await create(store, "k")
    moment = time.time_ns()
    await store.commit(active, "n", {}, layer.id, None, None)
    done = await store.stat(S, "n")
    assert moment <= done.updated_ns
    assert done.created_ns == done.updated_ns


async def test_a_commit_of_what_is_no_active_snapshot(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    view = await create(store, "view", kind=Kind.VIEW)
    done = await committed(store, "done", layer)
    for snapshot in (view, done):
        with pytest.raises(FailedPrecondition, match=snapshot.name):
            await store.commit(snapshot, "n", {}, layer.id, None, None)
    gone = await create(store, "gone")
    await store.remove(S, "gone")
    with pytest.raises(NotFound, match="gone"):
        await store.commit(gone, "n", {}, layer.id, None, None)
    # The key is taken again, by another snapshot than the one that was checked.
    await create(store, "gone")
    with pytest.raises(FailedPrecondition):
        await store.commit(gone, "n", {}, layer.id, None, None)
    assert await store.find(S, "n") is None


async def test_a_commit_under_a_taken_name(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await committed(store, "done", layer)
    await create(store, "other")
    active = await create(store, "k")
    for name in ("done", "other", "k"):
        with pytest.raises(AlreadyExists, match=name):
            await store.commit(active, name, {}, layer.id, None, None)
    assert await store.stat(S, "k") == active


async def test_a_commit_with_a_layer_that_is_not_there_changes_nothing(store: Metastore) -> None:
    active = await create(store, "k")
    with pytest.raises(Internal):
        await store.commit(active, "n", {}, LayerID(99), None, None)
    assert await store.stat(S, "k") == active
    assert await store.find(S, "n") is None


async def test_only_a_snapshot_without_children_is_removed(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    done = await committed(store, "p", layer)
    for kind in (Kind.ACTIVE, Kind.VIEW):
        child = await create(store, "c", "p", kind)
        with pytest.raises(FailedPrecondition, match=r"children.*'c'"):
            await store.remove(S, "p")
        assert await store.remove(S, "c") == child
    assert await store.remove(S, "p") == done
    assert await store.snapshots() == []
    with pytest.raises(NotFound):
        await store.remove(S, "p")


async def test_an_id_is_never_given_twice(store: Metastore) -> None:
    """Directories and mount points are named by it."""
    first = await create(store, "k")
    await store.remove(S, "k")
    assert (await create(store, "k")).id > first.id
    layer = await store.publish(record(), "gzip", 1.0)
    assert await store.delete_layer(layer.id)
    assert (await store.publish(record(), "gzip", 1.0)).id > layer.id


async def test_labels_are_changed_and_the_time_with_them(store: Metastore) -> None:
    made = await store.create(S, "k", "", Kind.ACTIVE, {"a": "1"}, extraction=False)
    seen: list[dict[str, str]] = []

    def change(labels: dict[str, str]) -> dict[str, str]:
        seen.append(dict(labels))
        return {"b": "2"}

    done = await store.update_labels(S, "k", change)
    assert seen == [{"a": "1"}]
    assert done == await store.stat(S, "k")
    assert done.labels == {"b": "2"}
    assert done.updated_ns > made.updated_ns
    assert replace(done, labels=made.labels, updated_ns=made.updated_ns) == made


async def test_a_change_that_is_refused_leaves_the_labels(store: Metastore) -> None:
    made = await store.create(S, "k", "", Kind.ACTIVE, {"a": "1"}, extraction=False)

    def change(labels: dict[str, str]) -> dict[str, str]:
        labels.clear()
        raise InvalidArgument("no")

    with pytest.raises(InvalidArgument, match="no"):
        await store.update_labels(S, "k", change)
    assert await store.stat(S, "k") == made


async def test_parents_are_listed_before_their_children(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    parent = ""
    for number in range(20):
        await committed(store, f"n{number}", layer, parent)
        parent = f"n{number}"
        await create(store, f"c{number}", parent)
    rows = await store.snapshots()
    place = {row.name: number for number, row in enumerate(rows)}
    assert len(rows) == 40
    assert all(place[row.parent] < place[row.name] for row in rows if row.parent)


async def walked(store: Metastore, **only: frozenset[str]) -> list[str]:
    return [row.name async for batch in store.walk(S, **only) for row in batch]


@pytest.mark.parametrize(
    "spoil",
    [
        "labels = '{'",
        "labels = '[]'",
        'labels = \'{"a": "\\ud83d", "\\udc00": "b"}\'',
        "labels = CAST(x'7b2261223a22ff227d' AS TEXT)",
        "kind = ''",
        "kind = CAST(x'ff' AS TEXT)",
        "chain_id = CAST(x'ff' AS TEXT)",
        "created_ns = -1, updated_ns = 9223372036854775807",
    ],
)
async def test_a_listing_survives_one_spoilt_row(store: Metastore, path: Path, spoil: str) -> None:
    """containerd's garbage collection stops at any error of a List, and at one of a Remove."""
    for key in ("a", "b", "c"):
        await create(store, key)
    with beside(path) as other:
        other.execute(f"UPDATE snapshots SET {spoil} WHERE name = 'b'")
    assert await walked(store) == [row.name for row in await store.snapshots()] == ["a", "b", "c"]
    row = await store.stat(S, "b")
    assert not row.labels
    for text in (*row.labels, *row.labels.values(), row.kind, row.parent):
        text.encode()
    if "kind" in spoil:
        assert row.kind is Kind.UNKNOWN
        with pytest.raises(InvalidArgument):
            await create(store, "child", "b")
        with pytest.raises(FailedPrecondition):
            await store.commit(row, "n", {}, LayerID(1), None, None)
    await store.remove(S, "b")
    assert await walked(store) == ["a", "c"]


async def test_a_row_whose_name_cannot_be_told_is_left_out_of_a_listing(store: Metastore, path: Path) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await committed(store, "p", layer)
    await create(store, "child", "p")
    with beside(path) as other:
        other.execute("UPDATE snapshots SET name = CAST(x'70ff' AS TEXT) WHERE name = 'p'")
    assert await walked(store) == ["child"]
    # A parent that is not listed would hide the child from containerd's garbage collection.
    assert (await store.stat(S, "child")).parent == ""


async def test_a_walk_goes_in_batches_over_what_was_there_at_its_begin(store: Metastore) -> None:
    names = [f"k{number}" for number in range(3 * module._BATCH_ROWS + 1)]
    for name in names:
        await create(store, name)
    await store.create("other", "k", "", Kind.ACTIVE, {}, extraction=False)
    seen: list[str] = []
    async for batch in store.walk(S):
        assert len(batch) <= module._BATCH_ROWS
        if not seen:
            # Nobody waits for a walk, and it does not see what others do meanwhile.
            await store.remove(S, names[-1])
            await store.remove(S, names[5])
            await create(store, "new")
        seen += [row.name for row in batch]
    assert seen == names
    assert await walked(store) == [*names[:5], *names[6:-1], "new"]


async def test_a_walk_that_is_given_up_leaves_nothing_open(store: Metastore, path: Path) -> None:
    for number in range(2 * module._BATCH_ROWS):
        await create(store, f"k{number}")

    def descriptors() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(path)) for fd in os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(5):
        walk = store.walk(S)
        await anext(walk)
        assert descriptors() > before
        await walk.aclose()
        # One stays, for the next: to close it would drop the locks of the whole process (sqlite: os_unix.c).
        assert descriptors() <= before + 1


async def test_a_walk_can_be_told_names_and_parents(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await committed(store, "p", layer)
    await committed(store, "q", layer, "p")
    for parent in ("", "p", "q"):
        await create(store, f"child of {parent}", parent)
    assert await walked(store, parents=frozenset([""])) == ["p", "child of "]
    assert await walked(store, parents=frozenset(["p"])) == ["q", "child of p"]
    assert await walked(store, parents=frozenset(["", "q"])) == ["p", "child of ", "child of q"]
    assert await walked(store, parents=frozenset(["absent"])) == []
    assert await walked(store, names=frozenset(["q", "absent"])) == ["q"]
    assert await walked(store, names=frozenset(["q"]), parents=frozenset([""])) == []
    assert await walked(store, names=frozenset(map(str, range(1000)))) == await walked(store)
    other = store.walk("other", parents=frozenset(["p"]))
    assert [batch async for batch in other] == []


async def test_a_walk_for_one_parent_reads_its_children_alone(store: Metastore, path: Path) -> None:
    """What containerd asks after an ALREADY_EXISTS, of however many rows."""
    with beside(path) as other:
        for parents in (frozenset(["p"]), frozenset([""])):
            plan: list[str] = []
            other.set_trace_callback(plan.append)
            database = module._Database(path, read_only=True)
            database.connection.set_trace_callback(plan.append)
            assert list(database.walk(S, None, parents)) == []
            (statement,) = [text for text in plan if "ORDER BY" in text]
            steps = [row[3] for row in other.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not any(step.startswith("SCAN s") for step in steps), steps
            database.connection.close()


async def test_an_empty_label_is_none(store: Metastore) -> None:
    made = await store.create(S, "k", "", Kind.ACTIVE, {"a": "1", "b": ""}, extraction=False)
    assert made == await store.stat(S, "k")
    assert made.labels == {"a": "1"}
    assert (await store.update_labels(S, "k", lambda old: {**old, "c": "2", "d": ""})).labels == {"a": "1", "c": "2"}
    layer = await store.publish(record(), "gzip", 1.0)
    await store.commit(made, "n", {"e": "3", "f": ""}, layer.id, None, None)
    assert (await store.stat(S, "n")).labels == {"e": "3"}


@pytest.mark.parametrize("key", ["k\nl", "k\0l", " ", "'", '"', "%", "_", "k" * (1 << 20), "€😀", "..", "a/../b"])
async def test_a_key_is_any_text(store: Metastore, key: str) -> None:
    made = await create(store, key)
    assert await store.stat(S, key) == made
    assert [row.name for row in await store.snapshots()] == [key]
    if len(key) > 1:
        assert await store.find(S, key[:-1]) is None
    with pytest.raises(AlreadyExists):
        await create(store, key)
    await store.remove(S, key)


# Layers


async def test_a_layer_is_as_it_was_built(store: Metastore) -> None:
    before = time.time_ns()
    layer = await store.publish(record(), "gzip", 2.5)
    assert layer == await store.layer(DIFF_ID, "tar-index") == await store.layer_by_id(layer.id)
    assert (layer.diff_id, layer.format, layer.root_hash) == (DIFF_ID, "tar-index", "d" * 64)
    assert (layer.tar_size_bytes, layer.data_size_bytes, layer.tree_size_bytes, layer.file_size_bytes) == (1, 2, 3, 4)
    assert (layer.entries, layer.warnings, layer.build_seconds) == (5, {"odd": 7}, 2.5)
    assert layer.state is LayerState.READY
    assert before <= layer.created_ns <= time.time_ns()
    assert await store.blob(record().blob_digest, "gzip") == (DIFF_ID, 6)


async def test_layers_and_blobs_that_are_not_there(store: Metastore) -> None:
    await store.publish(record(), "gzip", 1.0)
    assert await store.layer(DIFF_ID, "erofs-4k") is None
    assert await store.layer("sha256:" + "e" * 64, "tar-index") is None
    assert await store.layer_by_id(LayerID(99)) is None
    assert await store.blob(record().blob_digest, "zstd") is None
    assert await store.blob("sha256:x", "gzip") is None


async def test_the_same_layer_from_another_blob_only_adds_the_mapping(store: Metastore) -> None:
    first = await store.publish(record(), "gzip", 1.0)
    again = await store.publish(record(blob_digest="sha256:zstd", blob_size_bytes=9), "zstd", 5.0)
    assert again == first
    assert await store.blob(record().blob_digest, "gzip") == (DIFF_ID, 6)
    assert await store.blob("sha256:zstd", "zstd") == (DIFF_ID, 9)
    assert len(await store.layers()) == 1


async def test_a_broken_layer_is_ready_when_it_was_built_again(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    other = await store.publish(record("e"), "gzip", 1.0)
    await store.mark_broken([layer.id])
    await store.mark_broken([])
    assert (await store.layer_by_id(layer.id) or other).state is LayerState.BROKEN
    assert (await store.layer_by_id(other.id) or layer).state is LayerState.READY
    again = await store.publish(record(), "gzip", 1.0)
    assert again.verified_ns > layer.verified_ns
    assert replace(again, verified_ns=layer.verified_ns) == layer


@pytest.mark.parametrize("spoilt", ["", "d" * 63, "x" * 64, "d" * 64 + "\n"])
async def test_a_layer_whose_row_has_no_root_hash_is_broken(store: Metastore, path: Path, spoilt: str) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE layers SET root_hash = ?", (spoilt,))
        other.commit()
    assert (await store.layer_by_id(layer.id) or layer).state is LayerState.BROKEN
    again = await store.publish(record(), "gzip", 1.0)
    assert (again.state, again.root_hash) == (LayerState.READY, layer.root_hash)


async def test_other_bytes_for_the_same_layer_are_refused_and_not_mapped(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await store.mark_broken([layer.id])
    with pytest.raises(Internal, match="root hash"):
        await store.publish(record(root_hash="f" * 64, blob_digest="sha256:other"), "gzip", 1.0)
    assert await store.blob("sha256:other", "gzip") is None
    assert await store.layer_by_id(layer.id) == replace(layer, state=LayerState.BROKEN)


async def test_one_diff_id_has_a_layer_of_each_format(store: Metastore) -> None:
    one = await store.publish(record(), "gzip", 1.0)
    two = await store.publish(record(format="erofs-4k", root_hash="e" * 64), "gzip", 1.0)
    assert one.id != two.id
    # The mapping goes with the last of them.
    assert await store.delete_layer(one.id)
    assert await store.blob(record().blob_digest, "gzip") == (DIFF_ID, 6)
    assert await store.delete_layer(two.id)
    assert await store.blob(record().blob_digest, "gzip") is None


async def test_a_layer_goes_with_all_blobs_that_lead_to_it(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await store.publish(record(blob_digest="sha256:zstd"), "zstd", 1.0)
    await store.publish(record("e"), "gzip", 1.0)
    assert await store.delete_layer(layer.id)
    assert await store.layer_by_id(layer.id) is None
    assert await store.blob(record().blob_digest, "gzip") is None
    assert await store.blob("sha256:zstd", "zstd") is None
    assert await store.blob(record("e").blob_digest, "gzip") is not None
    assert not await store.delete_layer(layer.id)


async def test_a_layer_that_any_snapshot_refers_to_stays(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    active = await create(store, "k", extraction=True)
    assert await store.set_layer(active.id, layer.id)
    assert not await store.delete_layer(layer.id)
    await store.commit(active, "n", {}, layer.id, None, None)
    assert not await store.delete_layer(layer.id)
    assert await store.layer_by_id(layer.id) == layer
    assert await store.blob(record().blob_digest, "gzip") is not None
    await store.remove(S, "n")
    assert await store.delete_layer(layer.id)


async def test_a_layer_is_set_for_active_snapshots_only(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    active = await create(store, "k")
    view = await create(store, "v", kind=Kind.VIEW)
    assert await store.set_layer(active.id, layer.id)
    assert (await store.stat(S, "k")).layer_id == layer.id
    assert not await store.set_layer(view.id, layer.id)
    await store.commit(active, "n", {}, layer.id, None, None)
    assert not await store.set_layer(active.id, layer.id)


async def test_a_listing_counts_who_shares_a_layer(store: Metastore) -> None:
    one, two, three = [await store.publish(record(name), "gzip", 1.0) for name in "def"]
    await committed(store, "a", one)
    await committed(store, "b", one)
    await committed(store, "c", two)
    assert [(row.id, row.shared_by) for row in await store.layers()] == [(one.id, 2), (two.id, 1), (three.id, 0)]


async def test_a_chain_is_topmost_first_and_holds_equal_layers_as_often_as_they_come(store: Metastore) -> None:
    one, two = [await store.publish(record(name), "gzip", 1.0) for name in "de"]
    await committed(store, "1", one)
    await committed(store, "2", two, "1")
    top = await committed(store, "3", one, "2")
    pod = await create(store, "pod", "3")
    assert [layer.id for layer in await store.chain(top.id)] == [one.id, two.id, one.id]
    assert await store.chain(pod.parent_id) == await store.chain(top.id)
    assert [layer.id for layer in await store.chain((await store.stat(S, "1")).id)] == [one.id]
    assert await store.chain(None) == []
    assert await store.chain(SnapshotID(999)) == []


async def test_a_chain_may_be_very_long(store: Metastore, path: Path) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    top = await committed(store, "0", layer)
    with beside(path) as other:
        for number in range(1, 1000):
            other.execute(
                "INSERT INTO snapshots SELECT NULL, snapshotter, ?, max(id), kind, extraction, labels, chain_id,"
                " layer_id, parents_layer_id, links, created_ns, updated_ns FROM snapshots",
                (str(number),),
            )
    top = await store.stat(S, "999")
    assert len(await store.chain(top.id)) == 1000


async def test_a_container_keeps_all_below_its_parent(store: Metastore) -> None:
    base = await store.create("s", "base", "", Kind.ACTIVE, {}, extraction=True)
    layer = await store.publish(record(), "gzip", 1.0)
    await store.commit(base, "committed", {}, layer.id, None, None)
    assert not await store.has_container(base.id)
    await store.create("s", "extraction", "committed", Kind.ACTIVE, {}, extraction=True)
    assert not await store.has_container(base.id)
    for key, kind in (("container", Kind.ACTIVE), ("view", Kind.VIEW)):
        await store.create("s", key, "committed", kind, {}, extraction=False)
        assert await store.has_container(base.id)
        await store.remove("s", key)
        assert not await store.has_container(base.id)


async def test_layers_in_use_are_those_below_containers(store: Metastore) -> None:
    layers = [await store.publish(record(name), "gzip", 1.0) for name in "0123456"]
    await committed(store, "a", layers[0])
    await committed(store, "b", layers[1], "a")
    await committed(store, "c", layers[2], "b")
    await committed(store, "other", layers[3])
    assert await store.layers_in_use() == set()
    # Unpacking onto a chain mounts none of it.
    unpacking = await create(store, "extract-1-x y", "c", extraction=True)
    await store.set_layer(unpacking.id, layers[4].id)
    assert await store.layers_in_use() == set()
    await create(store, "pod", "b")
    assert await store.layers_in_use() == {layers[0].id, layers[1].id}
    await create(store, "view", "other", Kind.VIEW)
    await create(store, "alone")
    assert await store.layers_in_use() == {layers[0].id, layers[1].id, layers[3].id}
    await store.remove(S, "pod")
    assert await store.layers_in_use() == {layers[3].id}


async def on_top(store: Metastore, name: str, layer: Layer, parents: Layer, parent: str) -> Snapshot:
    """Committed, with a parents layer."""
    active = await create(store, f"extract {name}", parent, extraction=True)
    await store.commit(active, name, {}, layer.id, None, active.parent_id, parents.id)
    return await store.stat(S, name)


async def test_a_parents_layer_is_on_top_of_its_own_chain_alone(store: Metastore) -> None:
    low, high, top = [await store.publish(record(name), "gzip", 1.0) for name in "012"]
    parents = await store.publish_layer(record("a", format="tar-index-parents"), 0.1)
    assert await store.blob(record("a").blob_digest, "gzip") is None
    await committed(store, "low", low)
    middle = await on_top(store, "middle", high, parents, "low")
    assert middle.parents_layer_id == parents.id
    above = await committed(store, "above", top, "middle")
    assert above.parents_layer_id is None
    assert [layer.id for layer in await store.chain(middle.id)] == [parents.id, high.id, low.id]
    assert [layer.id for layer in await store.chain(above.id)] == [top.id, high.id, low.id]
    # In use for who stands on that very chain.
    await create(store, "pod", "above")
    assert await store.layers_in_use() == {low.id, high.id, top.id}
    await create(store, "other pod", "middle")
    assert await store.layers_in_use() == {low.id, high.id, top.id, parents.id}


async def test_a_parents_layer_that_a_snapshot_refers_to_stays(store: Metastore) -> None:
    low, high = [await store.publish(record(name), "gzip", 1.0) for name in "01"]
    parents = await store.publish_layer(record("a", format="tar-index-parents"), 0.1)
    await committed(store, "low", low)
    await on_top(store, "one", high, parents, "low")
    await on_top(store, "two", high, parents, "low")
    assert [(row.id, row.shared_by) for row in await store.layers()] == [(low.id, 1), (high.id, 2), (parents.id, 2)]
    await store.remove(S, "one")
    assert not await store.delete_layer(parents.id)
    await store.remove(S, "two")
    assert await store.delete_layer(parents.id)
    assert await store.layer_by_id(parents.id) is None


# The file


async def test_each_transaction_is_synced(store: Metastore, path: Path) -> None:
    connection = store._database.connection
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    with beside(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_foreign_keys_hold(store: Metastore) -> None:
    active = await create(store, "k")
    with pytest.raises(Internal, match="FOREIGN KEY"):
        await store.set_layer(active.id, LayerID(99))
    assert (await store.stat(S, "k")).layer_id is None


async def test_all_of_it_is_there_after_a_restart(path: Path) -> None:
    first = Metastore(path)
    layer = await first.publish(record(), "gzip", 1.0)
    done = await committed(first, "n", layer)
    await create(first, "c", "n")
    before = (await first.snapshots(), await first.layers())
    await first.close()
    second = Metastore(path)
    assert (await second.snapshots(), await second.layers()) == before
    assert await second.stat(S, "n") == done
    await second.close()


def user_version(path: Path, version: int) -> None:
    with beside(path) as other:
        other.execute(f"PRAGMA user_version = {version}")


def test_a_newer_schema_is_refused_and_left_as_it_is(path: Path) -> None:
    async def used() -> None:
        store = Metastore(path)
        await create(store, "k")
        await store.close()

    asyncio.run(used())
    known = len(module._MIGRATIONS)
    user_version(path, known + 1)
    before = path.read_bytes()
    for opening in (Metastore, read):
        with pytest.raises(Internal, match=f"version {known + 1}.*{known}") as caught:
            opening(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    user_version(path, known)
    assert [row.name for row in read(path)[0]] == ["k"]


def test_a_tool_does_not_migrate(path: Path) -> None:
    user_version(path, 0)
    before = path.read_bytes()
    with pytest.raises(Internal, match="version 0"):
        read(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_as_such(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(Internal, match=str(path)):
        read(path)
    with pytest.raises(Internal, match=str(path)):
        Metastore(path)


def test_a_tool_makes_no_file(path: Path) -> None:
    with pytest.raises(Internal, match=str(path)):
        read(path)
    assert not path.exists()


async def test_a_tool_reads_beside_the_daemon(store: Metastore, path: Path) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    await committed(store, "n", layer)
    assert read(path) == (await store.snapshots(), await store.layers())
    # A transaction of the daemon is under way: what was before it is seen, and nobody waits.
    store._database.connection.execute("BEGIN IMMEDIATE")
    store._database.connection.execute("DELETE FROM snapshots")
    assert [row.name for row in read(path)[0]] == ["n"]
    store._database.connection.execute("ROLLBACK")


async def test_a_tool_reads_when_no_daemon_runs(path: Path) -> None:
    store = Metastore(path)
    await create(store, "k")
    await store.close()
    assert [row.name for row in read(path)[0]] == ["k"]


async def test_a_full_disk_is_resource_exhausted_and_spoils_nothing(store: Metastore) -> None:
    made = await create(store, "k")
    (pages,) = store._database.connection.execute("PRAGMA page_count").fetchone()
    store._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ResourceExhausted):
        await store.create(S, "big", "", Kind.ACTIVE, {"x": "y" * 100_000}, extraction=False)
    assert await store.snapshots() == [made]
    store._database.connection.execute("PRAGMA max_page_count = 1000000")
    await create(store, "big")


async def test_a_caller_that_goes_away_leaves_its_transaction_to_end(store: Metastore) -> None:
    task = asyncio.create_task(create(store, "k"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # What is written later comes behind it, what is read meanwhile may come before.
    with pytest.raises(AlreadyExists):
        await create(store, "k")
    assert (await store.stat(S, "k")).name == "k"


async def test_of_many_at_once_exactly_one_gets_the_key(store: Metastore) -> None:
    results = await asyncio.gather(*(create(store, "k") for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(result, Snapshot) for result in results) == 1
    assert sum(isinstance(result, AlreadyExists) for result in results) == 19


async def test_a_commit_may_bring_a_parent_younger_than_the_snapshot(store: Metastore) -> None:
    """Layers that are unpacked side by side get their parents at the end, and containerd walks parents first."""
    layer = await store.publish(record(), "gzip", 1.0)
    top, bottom = await create(store, "k top"), await create(store, "k bottom")
    await store.commit(bottom, "bottom", {}, layer.id, None, None)
    await store.commit(top, "top", {}, layer.id, None, bottom.id)
    assert [(row.name, row.parent) for row in await store.snapshots()] == [("bottom", ""), ("top", "bottom")]
    assert [found.id for found in await store.chain(top.id)] == [layer.id, layer.id]


async def test_a_parent_that_is_gone_at_the_commit_is_not_found(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    top = await create(store, "k top")
    bottom = await committed(store, "bottom", layer)
    await store.remove(S, "bottom")
    with pytest.raises(NotFound, match="parent"):
        await store.commit(top, "top", {}, layer.id, None, bottom.id)
    assert await store.stat(S, "k top") == top


async def test_a_snapshot_that_was_never_answered_for_is_discarded(store: Metastore) -> None:
    layer = await store.publish(record(), "gzip", 1.0)
    done = await committed(store, "done", layer)
    active = await create(store, "k", "done")
    await store.discard(active.id)
    await store.discard(done.id)
    assert [row.name for row in await store.snapshots()] == ["done"]


async def test_a_read_that_fails_for_a_moment_is_read_again(
    store: Metastore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(store, "k")
    failures = 0
    real = module._Database.existing

    def existing(database: object, snapshotter: str, name: str) -> Snapshot:
        nonlocal failures
        if failures:
            failures -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return real(database, snapshotter, name)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Database, "existing", existing)
    failures = 1
    assert (await store.stat(S, "k")).name == "k"
    failures = 2
    with pytest.raises(Internal, match="disk I/O error"):
        await store.stat(S, "k")
    assert failures == 0
    # Nothing is open of it: what is written now is seen.
    await create(store, "l")
    assert (await store.stat(S, "l")).name == "l"
