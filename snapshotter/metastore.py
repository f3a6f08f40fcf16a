# SPDX-License-Identifier: Apache-2.0
"""SQLite: what snapshots, layers and blobs there are. One function per transaction, one thread for all that write.

Reads have connections of their own and never wait for it: each sees what was committed when it began
(sqlite.org/isolation.html). A write whose caller has gone away may still be on its way then.

`synchronous=FULL` in WAL mode syncs the log at each commit, so a transaction that has returned
survives a power cut (sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Concatenate, Final, NewType, ParamSpec, TypeVar

from blockdev.errors import EXHAUSTED
from blockdev.workers.launch import BuildRecord, LayerRecord
from policy.chain import ChainID, chain_id
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapshotterError,
)
from snapshotter.idmap import UID_LABEL
from snapshotter.reserve import Reserve
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

FILE_NAME: Final = "metadata.db"  # below the root

SnapshotID = NewType("SnapshotID", int)
LayerID = NewType("LayerID", int)

_ROOT_HASH: Final = re.compile(r"[0-9a-f]{64}\Z")
_OF_THE_TAR: Final = (
    "root_hash", "tar_size_bytes", "data_size_bytes", "tree_size_bytes", "file_size_bytes", "entries", "warnings",
)  # fmt: skip

_BATCH_ROWS: Final = 256
_PROBE_BYTES: Final = 64 << 10
# SQLite takes at least 999 values in a statement (sqlite.org/limits.html).
_VALUES_MAX: Final = 100

_P = ParamSpec("_P")
_T = TypeVar("_T")

# One entry per schema version, each bringing the one before it forward.
_MIGRATIONS: Final = (
    """
    CREATE TABLE layers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        diff_id TEXT NOT NULL,
        format TEXT NOT NULL,
        root_hash TEXT NOT NULL,
        tar_size_bytes INTEGER NOT NULL,
        data_size_bytes INTEGER NOT NULL,
        tree_size_bytes INTEGER NOT NULL,
        file_size_bytes INTEGER NOT NULL,
        entries INTEGER NOT NULL,
        warnings TEXT NOT NULL,
        state TEXT NOT NULL,
        build_seconds REAL NOT NULL,
        created_ns INTEGER NOT NULL,
        UNIQUE (diff_id, format)
    ) STRICT;
    CREATE TABLE blobs (
        digest TEXT NOT NULL,
        compression TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        diff_id TEXT NOT NULL,
        PRIMARY KEY (digest, compression)
    ) STRICT;
    CREATE TABLE snapshots (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        snapshotter TEXT NOT NULL,
        name TEXT NOT NULL,
        parent_id INTEGER REFERENCES snapshots (id),
        kind TEXT NOT NULL,
        extraction INTEGER NOT NULL,
        labels TEXT NOT NULL,
        chain_id TEXT,
        layer_id INTEGER REFERENCES layers (id),
        parents_layer_id INTEGER REFERENCES layers (id),
        links TEXT NOT NULL DEFAULT '',
        created_ns INTEGER NOT NULL,
        updated_ns INTEGER NOT NULL,
        UNIQUE (snapshotter, name)
    ) STRICT;
    CREATE INDEX snapshots_parent ON snapshots (parent_id);
    CREATE INDEX snapshots_layer ON snapshots (layer_id);
    CREATE INDEX snapshots_parents_layer ON snapshots (parents_layer_id);
    CREATE INDEX snapshots_links ON snapshots (chain_id, links) WHERE links != '';
    CREATE INDEX blobs_diff_id ON blobs (diff_id);
    """,
    """
    ALTER TABLE layers ADD COLUMN used_ns INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE layers ADD COLUMN verified_ns INTEGER NOT NULL DEFAULT 0;
    UPDATE layers SET used_ns = created_ns, verified_ns = created_ns;
    """,
)


class Kind(enum.StrEnum):
    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"
    UNKNOWN = "unknown"  # a spoilt row: it can be listed and removed, and nothing else

    @classmethod
    def _missing_(cls, value: object) -> Kind:
        return cls.UNKNOWN


class LayerState(enum.StrEnum):
    READY = "ready"
    BROKEN = "broken"  # its file is missing or contradicts the row, or the row is spoilt; the next build mends this

    @classmethod
    def _missing_(cls, value: object) -> LayerState:
        return cls.BROKEN


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer file. Sizes in bytes, `diff_id` with "sha256:", `root_hash` in hexadecimal.

    Of a parents layer `diff_id` is the identity and `tar_size_bytes` the size of its table.
    """

    id: LayerID
    diff_id: str
    format: str
    root_hash: str
    tar_size_bytes: int
    data_size_bytes: int
    tree_size_bytes: int
    file_size_bytes: int
    entries: int
    warnings: dict[str, int]
    state: LayerState
    build_seconds: float
    created_ns: int
    used_ns: int = 0  # since when, at the earliest, no committed snapshot refers to it
    verified_ns: int = 0  # when every block of its file was last checked, at its build or since
    shared_by: int = 0  # committed snapshots that refer to it; only where a listing counts them

    @property
    def has_table(self) -> bool:
        """Of directories that it made for want of an entry; an empty one where none of them is left."""
        return bool(self.warnings.get("invented_directories"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`parent` is a name or "". `layer_id` of an active snapshot: what was applied to it.

    `parents_layer_id`: what goes on top of the chain, of a committed snapshot whose chain needs one.
    `links`: the directory in which the layer of a committed snapshot has a link; "" without. `root_hash`: the layer's.
    """

    id: SnapshotID
    snapshotter: str
    name: str
    parent: str
    parent_id: SnapshotID | None
    kind: Kind
    extraction: bool
    labels: dict[str, str]
    chain_id: ChainID | None
    layer_id: LayerID | None
    created_ns: int
    updated_ns: int
    parents_layer_id: LayerID | None = None
    links: str = ""
    root_hash: str = ""

    @property
    def has_directory(self) -> bool:
        """Whether it has bytes or mounts of its own; a committed snapshot and most views of layers have none."""
        return self.kind is Kind.ACTIVE or (self.kind is Kind.VIEW and (not self.parent_id or UID_LABEL in self.labels))


@dataclass(frozen=True, slots=True)
class Totals:
    """How many there are, and bytes of layer files."""

    layers: dict[tuple[str, str], tuple[int, int]]  # by format and state
    unused: tuple[int, int]  # that no snapshot refers to
    snapshots: dict[tuple[str, str], int]  # by snapshotter and kind
    oldest_check_ns: int  # of READY layers, since the epoch; 0 without any


_LAYER: Final = (
    "layers.id, diff_id, format, root_hash, tar_size_bytes, data_size_bytes, tree_size_bytes, file_size_bytes,"
    " entries, warnings, state, build_seconds, layers.created_ns, layers.used_ns, layers.verified_ns"
)
_SNAPSHOT: Final = (
    "s.id, s.snapshotter, s.name, coalesce(p.name, ''), s.parent_id, s.kind, s.extraction, s.labels, s.chain_id,"
    " s.layer_id, s.created_ns, s.updated_ns, s.parents_layer_id, s.links,"
    " coalesce(l.root_hash, '')"
    " FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id LEFT JOIN layers l ON l.id = s.layer_id"
)


def _layer(row: tuple[object, ...]) -> Layer:
    fields = list(row)
    fields[10] = LayerState(str(fields[10]))
    try:
        fields[9] = {str(kind): int(count) for kind, count in json.loads(str(fields[9])).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        fields[9], fields[10] = {}, LayerState.BROKEN
    if not _ROOT_HASH.match(str(fields[3])):
        fields[10] = LayerState.BROKEN
    return Layer(*fields)  # type: ignore[arg-type]


# A row that is spoilt in any part is listed all the same, as far as it can be told: any error of a List ends
# containerd's garbage collection, now and for ever.


def _snapshot(row: tuple[object, ...]) -> Snapshot:
    fields = list(row)
    fields[5], fields[6], fields[7] = Kind(str(fields[5])), bool(fields[6]), _labels(str(fields[7]))
    if not _is_text(str(fields[3])):
        fields[3] = ""  # the parent's name
    return Snapshot(*fields)  # type: ignore[arg-type]


def _labels(text: str) -> dict[str, str]:
    try:
        found = {str(key): str(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if _is_text(key) and _is_text(value)}


def _is_text(text: str) -> bool:
    """Whether it can be told over gRPC: no bytes that are not UTF-8 (a surrogate stands for each) are in it."""
    return not any(0xD800 <= ord(char) < 0xE000 for char in text) if not text.isascii() else True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    """As containerd's own store keeps them: an empty label is none (containerd: core/metadata/boltutil)."""
    return {name: value for name, value in labels.items() if value}


def _translated(error: sqlite3.Error, where: str, directory: Path) -> SnapshotterError:
    """`directory`: that of the database."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(f"{where}: {error}")
    if code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        # SQLite knows the system's error, and Python does not ask it: what else is written there now meets the same.
        try:
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as reason:
            if reason.errno in EXHAUSTED:
                return ResourceExhausted(f"{where}: {error}: {reason.strerror}")
    return Internal(f"{where}: {error}")


def _twice(read: Callable[[], _T]) -> _T:
    """What was short for a moment, descriptors or memory, need not fail a call that changes nothing; and SQLite does
    not tell it from a broken disk."""
    try:
        return read()
    except sqlite3.OperationalError:
        return read()


class _Database:
    """The transactions themselves, synchronous; only the metastore's thread calls them."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        self.connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self.connection.text_factory = _text
        self.connection.create_function("chain_id", 2, chain_id, deterministic=True)
        try:
            self._open(path, read_only=read_only)
        except BaseException:
            self.connection.close()
            raise

    def _open(self, path: Path, *, read_only: bool) -> None:
        self.connection.execute("PRAGMA foreign_keys = ON")
        self.connection.execute("PRAGMA busy_timeout = 10000")
        if not read_only:
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS) or (read_only and version != len(_MIGRATIONS)):
            raise Internal(f"{path} has schema version {version}; this program knows {len(_MIGRATIONS)}")
        for number in range(version, len(_MIGRATIONS)):
            trace("boot.migrating")
            self.connection.executescript(f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")

    def transaction(self, work: Callable[[], _T]) -> _T:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            result = work()
            trace("transaction.ready")
            self.connection.execute("COMMIT")
            trace("transaction.committed")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        return result

    def reading(self, work: Callable[[], _T]) -> _T:
        """All that `work` reads is of one moment."""
        self.connection.execute("BEGIN")
        try:
            return work()
        finally:
            # Some errors have ended it already (sqlite.org/lang_transaction.html).
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def snapshot(self, snapshotter: str, name: str) -> Snapshot | None:
        row = self.connection.execute(
            f"SELECT {_SNAPSHOT} WHERE s.snapshotter = ? AND s.name = ?", (snapshotter, name)
        ).fetchone()
        return _snapshot(row) if row else None

    def existing(self, snapshotter: str, name: str) -> Snapshot:
        found = self.snapshot(snapshotter, name)
        if found is None:
            raise NotFound(f"snapshot {name!r} of {snapshotter} not found")
        return found

    def by_id(self, snapshot_id: SnapshotID) -> Snapshot | None:
        row = self.connection.execute(f"SELECT {_SNAPSHOT} WHERE s.id = ?", (snapshot_id,)).fetchone()
        return _snapshot(row) if row else None

    def snapshots(self, snapshotter: str | None) -> list[Snapshot]:
        rows = self.connection.execute(
            f"SELECT {_SNAPSHOT} WHERE ?1 IS NULL OR s.snapshotter = ?1 ORDER BY s.id", (snapshotter,)
        )
        return _parents_first([_snapshot(row) for row in rows])

    def unfilled(self) -> list[Snapshot]:
        rows = self.connection.execute(
            f"SELECT {_SNAPSHOT} WHERE s.extraction AND s.kind = ? AND s.layer_id IS NULL ORDER BY s.id", (Kind.ACTIVE,)
        )
        return [_snapshot(row) for row in rows]

    def walk(
        self, snapshotter: str, names: frozenset[str] | None, parents: frozenset[str] | None
    ) -> Generator[list[Snapshot], None, None]:
        """In batches, all as of the first one: nothing that is written meanwhile comes in between."""
        # The plus keeps SQLite from an index over all rows of the snapshotter, which would want them sorted first.
        where, values = ["+s.snapshotter = ?"], [snapshotter]
        if names is not None:
            where = [f"s.snapshotter = ? AND s.name IN ({_marks(names)})"]
            values += names
        if parents is not None:
            below = f"SELECT id FROM snapshots WHERE snapshotter = ? AND name IN ({_marks(parents)})"
            roots = "OR s.parent_id IS NULL" if "" in parents else ""
            where.append(f"(s.parent_id IN ({below}) {roots})")
            values += [snapshotter, *parents]
        self.connection.execute("BEGIN")
        rows = self.connection.execute(f"SELECT {_SNAPSHOT} WHERE {' AND '.join(where)} ORDER BY s.id", values)
        # While a statement is open, so is its connection, whoever closes it.
        with closing(rows):
            while batch := rows.fetchmany(_BATCH_ROWS):
                yield [snapshot for snapshot in map(_snapshot, batch) if _is_text(snapshot.name)]

    def create(
        self, snapshotter: str, key: str, parent: str, kind: Kind, labels: Mapping[str, str], *, extraction: bool
    ) -> Snapshot:
        if self.snapshot(snapshotter, key):
            raise AlreadyExists(f"snapshot {key!r} of {snapshotter} exists already")
        parent_id = None
        if parent:
            above = self.existing(snapshotter, parent)
            if above.kind is not Kind.COMMITTED:
                raise InvalidArgument(f"parent {parent!r} is {above.kind}, not committed")
            parent_id = above.id
        now, kept = time.time_ns(), _kept(labels)
        cursor = self.connection.execute(
            "INSERT INTO snapshots (snapshotter, name, parent_id, kind, extraction, labels, created_ns, updated_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (snapshotter, key, parent_id, kind, extraction, _json(kept), now, now),
        )
        return Snapshot(
            SnapshotID(cursor.lastrowid or 0), snapshotter, key, parent, parent_id, kind, extraction, kept,
            None, None, now, now,
        )  # fmt: skip

    def set_layer(self, snapshot_id: SnapshotID, layer_id: LayerID) -> bool:
        cursor = self.connection.execute(
            "UPDATE snapshots SET layer_id = ? WHERE id = ? AND kind = ?", (layer_id, snapshot_id, Kind.ACTIVE)
        )
        return cursor.rowcount == 1

    def commit(
        self,
        snapshot: Snapshot,
        name: str,
        labels: Mapping[str, str],
        layer_id: LayerID,
        chain: ChainID | None,
        parent_id: SnapshotID | None,
        parents_layer_id: LayerID | None = None,
        links: str = "",
    ) -> None:
        if self.snapshot(snapshot.snapshotter, name):
            raise AlreadyExists(f"snapshot {name!r} of {snapshot.snapshotter} exists already")
        found = self.existing(snapshot.snapshotter, snapshot.name)
        if found.kind is not Kind.ACTIVE or found.id != snapshot.id:
            raise FailedPrecondition(f"snapshot {snapshot.name!r} is {found.kind}, not active")
        # Its own it keeps from being removed; one that it is given only now may be gone since it was looked up.
        if parent_id is not None and self.by_id(parent_id) is None:
            raise NotFound(f"the parent for snapshot {snapshot.name!r} was removed")
        now = time.time_ns()
        # A parent that it gets only now may be younger than it: its id is no measure of the order then.
        values = (
            name, Kind.COMMITTED, _json(_kept(labels)), layer_id, chain, parent_id, parents_layer_id, links,
            now, now, snapshot.id,
        )  # fmt: skip
        self.connection.execute(
            "UPDATE snapshots SET name = ?, kind = ?, extraction = 0, labels = ?, layer_id = ?, chain_id = ?,"
            " parent_id = ?, parents_layer_id = ?, links = ?, created_ns = ?, updated_ns = ? WHERE id = ?",
            values,
        )

    def remove(self, snapshotter: str, key: str) -> Snapshot:
        snapshot = self.existing(snapshotter, key)
        child = self.connection.execute("SELECT name FROM snapshots WHERE parent_id = ?", (snapshot.id,)).fetchone()
        if child:
            # containerd's conformance suite looks for the word "remove" in it.
            raise FailedPrecondition(f"cannot remove snapshot {key!r}: it has children, {child[0]!r} is one")
        self.connection.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))
        if snapshot.kind is Kind.COMMITTED:
            self.connection.execute(
                "UPDATE layers SET used_ns = ? WHERE id IN (?, ?)",
                (time.time_ns(), snapshot.layer_id, snapshot.parents_layer_id),
            )
        return snapshot

    def discard(self, snapshot_id: SnapshotID) -> None:
        self.connection.execute("DELETE FROM snapshots WHERE id = ? AND kind != ?", (snapshot_id, Kind.COMMITTED))

    def update_labels(
        self, snapshotter: str, name: str, change: Callable[[dict[str, str]], Mapping[str, str]]
    ) -> Snapshot:
        snapshot = self.existing(snapshotter, name)
        self.connection.execute(
            "UPDATE snapshots SET labels = ?, updated_ns = ? WHERE id = ?",
            (_json(_kept(change(dict(snapshot.labels)))), time.time_ns(), snapshot.id),
        )
        return self.existing(snapshotter, name)

    def chain(self, snapshot_id: SnapshotID | None) -> list[Layer]:
        """Layers of a committed snapshot and its parents, topmost first; the chain's parents layer is on top."""
        rows = self.connection.execute(
            "WITH RECURSIVE up (depth, parent_id, layer_id) AS ("
            " SELECT -1, NULL, parents_layer_id FROM snapshots WHERE id = ?1"
            " UNION ALL SELECT 0, parent_id, layer_id FROM snapshots WHERE id = ?1"
            " UNION ALL SELECT depth + 1, s.parent_id, s.layer_id FROM snapshots s JOIN up ON s.id = up.parent_id)"
            f" SELECT {_LAYER} FROM up JOIN layers ON layers.id = up.layer_id ORDER BY depth",
            (snapshot_id,),
        )
        return [_layer(row) for row in rows]

    def chain_ids(self, snapshot_id: SnapshotID | None) -> list[ChainID | None]:
        """Of a committed snapshot and its parents, topmost first."""
        rows = self.connection.execute(
            "WITH RECURSIVE up (depth, parent_id, chain_id) AS ("
            " SELECT 0, parent_id, chain_id FROM snapshots WHERE id = ?1"
            " UNION ALL SELECT depth + 1, s.parent_id, s.chain_id FROM snapshots s JOIN up ON s.id = up.parent_id)"
            " SELECT chain_id FROM up ORDER BY depth",
            (snapshot_id,),
        )
        return [row[0] for row in rows]

    def linked_layer(self, directory: str, chain: ChainID) -> LayerID | None:
        row = self.connection.execute(
            "SELECT layer_id FROM snapshots WHERE chain_id = ? AND links = ? AND links != '' LIMIT 1",
            (chain, directory),
        ).fetchone()
        return LayerID(row[0]) if row else None

    def links_of(self, layer_id: LayerID) -> list[tuple[str, ChainID]]:
        rows = self.connection.execute(
            "SELECT DISTINCT links, chain_id FROM snapshots"
            " WHERE layer_id = ? AND links != '' AND chain_id IS NOT NULL",
            (layer_id,),
        )
        return [(row[0], ChainID(row[1])) for row in rows]

    def chains_linked(self, directory: str) -> list[ChainID]:
        rows = self.connection.execute(
            "SELECT DISTINCT chain_id FROM snapshots WHERE links = ? AND links != '' AND chain_id IS NOT NULL",
            (directory,),
        )
        return [ChainID(row[0]) for row in rows]

    def set_links(self, snapshot_id: SnapshotID, directory: str) -> None:
        self.connection.execute(
            "UPDATE snapshots SET links = ? WHERE id = ? AND kind = ?", (directory, snapshot_id, Kind.COMMITTED)
        )

    def layers_in_use(self, unmounted: frozenset[str]) -> set[LayerID]:
        """Layers below any container's snapshot: those that a host contract keeps mounted."""
        others = f" AND snapshotter NOT IN ({_marks(unmounted)})" if unmounted else ""
        rows = self.connection.execute(
            # Containers are many, images few.
            "WITH RECURSIVE below (id) AS ("
            " SELECT DISTINCT parent_id FROM snapshots WHERE kind != ? AND NOT extraction AND parent_id IS NOT NULL"
            f"{others}),"
            " up (id) AS (SELECT id FROM below"
            " UNION SELECT s.parent_id FROM snapshots s JOIN up ON s.id = up.id WHERE s.parent_id IS NOT NULL)"
            " SELECT s.layer_id FROM snapshots s JOIN up ON s.id = up.id WHERE s.layer_id IS NOT NULL"
            " UNION SELECT s.parents_layer_id FROM snapshots s JOIN below ON s.id = below.id"
            " WHERE s.parents_layer_id IS NOT NULL",
            (Kind.COMMITTED, *unmounted),
        )
        return {LayerID(row[0]) for row in rows}

    def has_container(self, parent_id: SnapshotID) -> bool:
        row = self.connection.execute(
            "SELECT 1 FROM snapshots WHERE parent_id = ? AND kind != ? AND NOT extraction LIMIT 1",
            (parent_id, Kind.COMMITTED),
        ).fetchone()
        return row is not None

    def layer(self, diff_id: str, format: str) -> Layer | None:
        row = self.connection.execute(
            f"SELECT {_LAYER} FROM layers WHERE diff_id = ? AND format = ?", (diff_id, format)
        ).fetchone()
        return _layer(row) if row else None

    def layer_of_chain(self, parent: ChainID | None, chain: ChainID, format: str) -> Layer | None:
        """A chain ID is a hash: which layer completes it, only trying tells; ten thousand are some milliseconds."""
        row = self.connection.execute(
            f"SELECT {_LAYER} FROM layers WHERE format = ? AND state = ? AND chain_id(?, diff_id) = ?",
            (format, LayerState.READY, parent, chain),
        ).fetchone()
        return _layer(row) if row else None

    def layer_by_id(self, layer_id: LayerID) -> Layer | None:
        row = self.connection.execute(f"SELECT {_LAYER} FROM layers WHERE id = ?", (layer_id,)).fetchone()
        return _layer(row) if row else None

    def layers(self) -> list[Layer]:
        rows = self.connection.execute(
            f"SELECT {_LAYER}, (SELECT count(*) FROM snapshots s WHERE s.layer_id = layers.id AND s.kind = ?)"
            " + (SELECT count(*) FROM snapshots s WHERE s.parents_layer_id = layers.id) FROM layers ORDER BY layers.id",
            (Kind.COMMITTED,),
        )
        return [_layer(row) for row in rows]

    def blob(self, digest: str, compression: str) -> tuple[str, int] | None:
        row = self.connection.execute(
            "SELECT diff_id, size_bytes FROM blobs WHERE digest = ? AND compression = ?", (digest, compression)
        ).fetchone()
        return (row[0], row[1]) if row else None

    def publish(self, record: BuildRecord, compression: str, build_seconds: float) -> Layer:
        trace("publish.in_transaction")
        self.connection.execute(
            "INSERT OR REPLACE INTO blobs (digest, compression, size_bytes, diff_id) VALUES (?, ?, ?, ?)",
            (record.blob_digest, compression, record.blob_size_bytes, record.diff_id),
        )
        return self.publish_layer(record, build_seconds)

    def publish_layer(self, record: LayerRecord, build_seconds: float) -> Layer:
        there = self.layer(record.diff_id, record.format)
        if there is not None and there.root_hash != record.root_hash and _ROOT_HASH.match(there.root_hash):
            # Same tar, same format, other bytes: never to be had, so never to be stored.
            raise Internal(f"layer {record.diff_id} has root hash {there.root_hash}, this build says otherwise")
        now = time.time_ns()
        values = (
            record.diff_id, record.format, record.root_hash, record.tar_size_bytes, record.data_size_bytes,
            record.tree_size_bytes, record.file_size_bytes, record.entries, _json(record.warnings), LayerState.READY,
            build_seconds, now, now, now,
        )  # fmt: skip
        self.connection.execute(
            "INSERT INTO layers (diff_id, format, root_hash, tar_size_bytes, data_size_bytes, tree_size_bytes,"
            " file_size_bytes, entries, warnings, state, build_seconds, created_ns, used_ns, verified_ns)"
            f" VALUES ({', '.join('?' * len(values))}) ON CONFLICT (diff_id, format)"
            # What follows from the tar alone a spoilt row gets again.
            f" DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in _OF_THE_TAR)}, state = 'ready',"
            " verified_ns = iif(state = 'ready', verified_ns, excluded.verified_ns)",
            values,
        )
        layer = self.layer(record.diff_id, record.format)
        assert layer is not None
        return layer

    def totals(self) -> Totals:
        layers = self.connection.execute(
            "SELECT format, state, count(*), sum(file_size_bytes), min(verified_ns) FROM layers GROUP BY 1, 2"
        ).fetchall()
        unused = self.connection.execute(
            "SELECT count(*), coalesce(sum(file_size_bytes), 0) FROM layers WHERE id NOT IN (SELECT layer_id FROM"
            " snapshots WHERE layer_id IS NOT NULL UNION ALL SELECT parents_layer_id FROM snapshots WHERE"
            " parents_layer_id IS NOT NULL)"
        ).fetchone()
        snapshots = self.connection.execute("SELECT snapshotter, kind, count(*) FROM snapshots GROUP BY 1, 2")
        by_kind: dict[tuple[str, str], int] = {}
        for name, kind, count in snapshots:
            by_kind[name, Kind(kind).value] = by_kind.get((name, Kind(kind).value), 0) + count
        by_state: dict[tuple[str, str], tuple[int, int]] = {}
        for layer_format, state, count, size_bytes, _ in layers:
            key = (layer_format, LayerState(state).value)
            before = by_state.get(key, (0, 0))
            by_state[key] = (before[0] + count, before[1] + size_bytes)
        checks = [row[4] for row in layers if row[1] == LayerState.READY]
        return Totals(by_state, (unused[0], unused[1]), by_kind, min(checks, default=0))

    def blobs_of(self, diff_id: str) -> list[tuple[str, str, int]]:
        return self.connection.execute(
            "SELECT digest, compression, size_bytes FROM blobs WHERE diff_id = ? ORDER BY size_bytes", (diff_id,)
        ).fetchall()

    def users(self, layer_id: LayerID) -> list[Snapshot]:
        rows = self.connection.execute(
            f"SELECT {_SNAPSHOT} WHERE s.layer_id = ?1 OR s.parents_layer_id = ?1 ORDER BY s.id", (layer_id,)
        )
        return [_snapshot(row) for row in rows]

    def mark_verified(self, layer_id: LayerID, at_ns: int) -> None:
        self.connection.execute("UPDATE layers SET verified_ns = ? WHERE id = ?", (at_ns, layer_id))

    def mark_broken(self, layer_ids: Iterable[LayerID]) -> None:
        self.connection.executemany(
            "UPDATE layers SET state = ? WHERE id = ?", [(LayerState.BROKEN, layer_id) for layer_id in layer_ids]
        )

    def delete_layer(self, layer_id: LayerID) -> bool:
        """False where a snapshot refers to it."""
        used = (
            "SELECT 1 FROM snapshots WHERE layer_id = ?1 UNION ALL SELECT 1 FROM snapshots WHERE parents_layer_id = ?1"
        )
        if self.connection.execute(f"{used} LIMIT 1", (layer_id,)).fetchone():
            return False
        self.connection.execute(
            "DELETE FROM blobs WHERE diff_id = (SELECT diff_id FROM layers WHERE id = ?1) AND NOT EXISTS"
            " (SELECT 1 FROM layers WHERE layers.diff_id = blobs.diff_id AND layers.id != ?1)",
            (layer_id,),
        )
        return self.connection.execute("DELETE FROM layers WHERE id = ?", (layer_id,)).rowcount == 1


def _parents_first(snapshots: list[Snapshot]) -> list[Snapshot]:
    """Mostly the order of the ids is that already; a commit can give a snapshot a parent younger than itself."""
    by_id = {snapshot.id: snapshot for snapshot in snapshots}
    done: dict[SnapshotID, Snapshot] = {}
    for snapshot in snapshots:
        line: list[Snapshot] = []
        above: Snapshot | None = snapshot
        while above is not None and above.id not in done:
            line.append(above)
            above = by_id.get(above.parent_id) if above.parent_id else None
        for member in reversed(line):
            done[member.id] = member
    return list(done.values())


def _few(values: frozenset[str] | None) -> frozenset[str] | None:
    """None, as if any would do, where they are too many for a statement."""
    return values if values is not None and len(values) <= _VALUES_MAX else None


def _marks(values: Sized) -> str:
    return ", ".join("?" * len(values))


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(dict(value), sort_keys=True)


class Metastore:
    """The transactions as coroutines. Every one raises what it says itself, Internal where SQLite fails, and
    ResourceExhausted where the disk is full.

    A caller that is cancelled leaves its transaction to end: it happened or it did not. `unmounted`: names of
    snapshotters whose containers need no layer mounted on the host. `reserve`: what a full disk has for transactions
    that make room.
    """

    def __init__(self, path: Path, *, unmounted: frozenset[str] = frozenset(), reserve: Reserve | None = None) -> None:
        self._path, self._unmounted, self._reserve = path, unmounted, reserve
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metastore")
        self._scanning = ThreadPoolExecutor(1, thread_name_prefix="metastore-scan")
        with ExitStack() as undo:
            try:
                self._database = self._thread.submit(_Database, path, read_only=False).result()
                undo.callback(self._database.connection.close)
                self._looked_in = _Database(path, read_only=True)
                undo.callback(self._looked_in.connection.close)
                self._scanned = _Database(path, read_only=True)
            except sqlite3.Error as error:
                raise _translated(error, str(path), path.parent) from error
            undo.pop_all()

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._scanning, self._scanned.connection.close)
        self._looked_in.connection.close()
        await loop.run_in_executor(self._thread, self._database.connection.close)
        self._scanning.shutdown()
        self._thread.shutdown()

    async def _make_room(
        self, work: Callable[Concatenate[_Database, _P], _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        """As `_run`, and on a full disk from the reserve."""
        try:
            return await self._run(work, *arguments, **named)
        except ResourceExhausted:
            if self._reserve is None or not self._reserve.give_up():
                raise
        return await self._run(work, *arguments, **named)

    async def _run(self, work: Callable[Concatenate[_Database, _P], _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        def call() -> _T:
            try:
                return self._database.transaction(lambda: work(self._database, *arguments, **named))
            except sqlite3.Error as error:
                raise _translated(error, "metadata", self._path.parent) from error

        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    async def _look(
        self, work: Callable[Concatenate[_Database, _P], _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        """Few rows, found by an index: some tens of microseconds of the event loop, less than a thread would cost it.
        They come from memory, for they are read all the time."""
        return self._read(self._looked_in, work, *arguments, **named)

    async def _scan(
        self, work: Callable[Concatenate[_Database, _P], _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        """All rows, in a thread."""
        call = partial(self._read, self._scanned, work, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._scanning, call)

    def _read(
        self,
        database: _Database,
        work: Callable[Concatenate[_Database, _P], _T],
        *arguments: _P.args,
        **named: _P.kwargs,
    ) -> _T:
        try:
            return _twice(lambda: database.reading(lambda: work(database, *arguments, **named)))
        except sqlite3.Error as error:
            raise _translated(error, "metadata", self._path.parent) from error

    async def stat(self, snapshotter: str, name: str) -> Snapshot:
        """Raises NotFound."""
        return await self._look(_Database.existing, snapshotter, name)

    async def find(self, snapshotter: str, name: str) -> Snapshot | None:
        return await self._look(_Database.snapshot, snapshotter, name)

    async def by_id(self, snapshot_id: SnapshotID) -> Snapshot | None:
        return await self._look(_Database.by_id, snapshot_id)

    async def snapshots(self, snapshotter: str | None = None) -> list[Snapshot]:
        """Parents before their children."""
        return await self._scan(_Database.snapshots, snapshotter)

    async def unfilled(self) -> list[Snapshot]:
        """Those that an unpacker has asked for, and that have no layer yet."""
        return await self._scan(_Database.unfilled)

    async def walk(
        self, snapshotter: str, names: frozenset[str] | None = None, parents: frozenset[str] | None = None
    ) -> AsyncGenerator[list[Snapshot], None]:
        """All of the snapshotter's as they are at one moment, in batches, in the order in which they were prepared:
        few are in memory at once. `names`, `parents`: only those that have one of these; the parent of none is "".

        Reads through a connection of its own, so that however slowly its caller reads on, no transaction waits.
        """

        def first() -> Generator[list[Snapshot], None, None]:
            database = _twice(lambda: _Database(self._path, read_only=True))
            at_end.callback(database.connection.close)
            return at_end.enter_context(closing(database.walk(snapshotter, _few(names), _few(parents))))

        with ExitStack() as at_end:
            try:
                batches = await to_the_end(asyncio.to_thread(first))
                while (batch := await to_the_end(asyncio.to_thread(next, batches, None))) is not None:
                    yield batch
            except sqlite3.Error as error:
                raise _translated(error, "metadata", self._path.parent) from error

    async def create(
        self, snapshotter: str, key: str, parent: str, kind: Kind, labels: Mapping[str, str], *, extraction: bool
    ) -> Snapshot:
        """Raises AlreadyExists, NotFound (parent), InvalidArgument (parent not committed)."""
        return await self._run(_Database.create, snapshotter, key, parent, kind, labels, extraction=extraction)

    async def set_layer(self, snapshot_id: SnapshotID, layer_id: LayerID) -> bool:
        """False where the snapshot is no longer active."""
        return await self._run(_Database.set_layer, snapshot_id, layer_id)

    async def commit(
        self,
        snapshot: Snapshot,
        name: str,
        labels: Mapping[str, str],
        layer_id: LayerID,
        chain: ChainID | None,
        parent_id: SnapshotID | None,
        parents_layer_id: LayerID | None = None,
        links: str = "",
    ) -> None:
        """Raises AlreadyExists (name), NotFound (it, or its parent), FailedPrecondition (not active)."""
        await self._run(_Database.commit, snapshot, name, labels, layer_id, chain, parent_id, parents_layer_id, links)

    async def remove(self, snapshotter: str, key: str) -> Snapshot:
        """Raises NotFound, FailedPrecondition (has children)."""
        return await self._make_room(_Database.remove, snapshotter, key)

    async def discard(self, snapshot_id: SnapshotID) -> None:
        """An active snapshot or view that was never answered for."""
        await self._make_room(_Database.discard, snapshot_id)

    async def update_labels(
        self, snapshotter: str, name: str, change: Callable[[dict[str, str]], Mapping[str, str]]
    ) -> Snapshot:
        """Raises NotFound, and what `change` raises."""
        return await self._run(_Database.update_labels, snapshotter, name, change)

    async def chain(self, snapshot_id: SnapshotID | None) -> list[Layer]:
        return await self._look(_Database.chain, snapshot_id)

    async def layers_in_use(self) -> set[LayerID]:
        return await self._scan(_Database.layers_in_use, self._unmounted)

    async def chain_ids(self, snapshot_id: SnapshotID | None) -> list[ChainID | None]:
        """In the order of `chain`, without a parents layer, which has none."""
        return await self._look(_Database.chain_ids, snapshot_id)

    async def linked_layer(self, directory: str, chain: ChainID) -> LayerID | None:
        """The layer that any snapshot has linked there under the chain ID."""
        return await self._look(_Database.linked_layer, directory, chain)

    async def links_of(self, layer_id: LayerID) -> list[tuple[str, ChainID]]:
        """(links directory, chain ID) of each link to its file."""
        return await self._look(_Database.links_of, layer_id)

    async def chains_linked(self, directory: str) -> list[ChainID]:
        """Those whose layer has a link there."""
        return await self._scan(_Database.chains_linked, directory)

    async def set_links(self, snapshot_id: SnapshotID, directory: str) -> None:
        """Of a committed snapshot."""
        await self._run(_Database.set_links, snapshot_id, directory)

    async def has_container(self, parent_id: SnapshotID) -> bool:
        """Whether a container stands on it, and so on all layers below it."""
        return await self._look(_Database.has_container, parent_id)

    async def layer(self, diff_id: str, format: str) -> Layer | None:
        return await self._look(_Database.layer, diff_id, format)

    async def layer_of_chain(self, parent: ChainID | None, chain: ChainID, format: str) -> Layer | None:
        """The READY layer that completes the chain above `parent`."""
        return await self._scan(_Database.layer_of_chain, parent, chain, format)

    async def layer_by_id(self, layer_id: LayerID) -> Layer | None:
        return await self._look(_Database.layer_by_id, layer_id)

    async def layers(self) -> list[Layer]:
        return await self._scan(_Database.layers)

    async def blob(self, digest: str, compression: str) -> tuple[str, int] | None:
        """(diff ID, size in bytes) of a blob that was built before."""
        return await self._look(_Database.blob, digest, compression)

    async def publish(self, record: BuildRecord, compression: str, build_seconds: float) -> Layer:
        """The layer READY and the mapping from its blob, in one transaction. Raises Internal."""
        return await self._run(_Database.publish, record, compression, build_seconds)

    async def publish_layer(self, record: LayerRecord, build_seconds: float) -> Layer:
        """As `publish`, of a layer that no blob leads to. Raises Internal."""
        return await self._run(_Database.publish_layer, record, build_seconds)

    async def totals(self) -> Totals:
        return await self._scan(_Database.totals)

    async def blobs_of(self, diff_id: str) -> list[tuple[str, str, int]]:
        """(digest, compression, size in bytes) of the blobs that a build has found to be the layer; smallest first."""
        return await self._look(_Database.blobs_of, diff_id)

    async def users(self, layer_id: LayerID) -> list[Snapshot]:
        """Snapshots that refer to the layer."""
        return await self._look(_Database.users, layer_id)

    async def mark_verified(self, layer_id: LayerID, at_ns: int) -> None:
        """Every block was checked, at this time since the epoch."""
        await self._run(_Database.mark_verified, layer_id, at_ns)

    async def mark_broken(self, layer_ids: Iterable[LayerID]) -> None:
        await self._run(_Database.mark_broken, list(layer_ids))

    async def delete_layer(self, layer_id: LayerID) -> bool:
        """The layer and the blobs that lead to it; False where a snapshot refers to it."""
        return await self._make_room(_Database.delete_layer, layer_id)


def read(path: Path) -> tuple[list[Snapshot], list[Layer]]:
    """All there is, for a tool beside the daemon. Raises Internal."""
    try:
        database = _Database(path, read_only=True)
        try:
            return database.snapshots(None), database.layers()
        finally:
            database.connection.close()
    except sqlite3.Error as error:
        raise _translated(error, str(path), path.parent) from None
