# SPDX-License-Identifier: Apache-2.0
"""The daemon's parts in this process, under the scheduler: real metadata, files and links, with the build's two
processes alone replaced by the same writer here. It can crash at every tick, and start again on what it left."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import structlog

from blockdev.formats.limits import Limits
from blockdev.workers.launch import BuildRecord, BuildRequest
from policy.chain import ChainID, chain_id, layer_name
from snapshotter import builder as builder_module
from snapshotter import inventory, reconcile, trace
from snapshotter.activation import Activation
from snapshotter.builder import Builder
from snapshotter.collector import Collector
from snapshotter.content import Blob, Caller, Content
from snapshotter.contracts import CONTRACTS, Mount, Place
from snapshotter.contracts.kata_erofs import sidecar_path
from snapshotter.contracts.kata_tardev import ROOT_HASH_LABEL
from snapshotter.directories import Directories
from snapshotter.errors import SnapshotterError
from snapshotter.inventory import Parts
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.metastore import FILE_NAME, Kind, LayerState, Metastore, Snapshot
from snapshotter.repair import Repair
from snapshotter.snapshots import Named, Snapshots
from tests.chains import Made, make
from tests.model.scheduler import Crash, Loop, owner
from tests.model.states import CANCELLED, OK, UNKNOWN, Call, Labels, Snap, State, ends, shown

NAMES: Final = {
    "tardev": Named("kata-tardev", "tar-index", 59, encoding="base64"),
    "tardev-erofs": Named("kata-erofs", "erofs-4k", 59),
    "tardev-host": Named("host", "tar-index", 59),
}
_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
_RECENT_SECONDS: Final = 301.0


# The images


def _tar(*members: tuple[str, int | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what, int):
                member.type, member.mode = tarfile.DIRTYPE, what
                tar.addfile(member)
            else:
                member.size = len(what)
                tar.addfile(member, io.BytesIO(what))
    return out.getvalue()


# The second one adds to directories that only the first one describes: its chain needs a parents layer.
_TARS: Final = (
    _tar(("usr", 0o711), ("usr/share", 0o750), ("etc", 0o755), ("etc/a", b"a")),
    _tar(("usr/share/b", b"b")),
    _tar(("c", b"c" * 600)),
    _tar(("etc/d", b"d")),
)
DIFF_IDS: Final = tuple("sha256:" + hashlib.sha256(tar).hexdigest() for tar in _TARS)
_BYTES: Final = {
    **{("plain", number): tar for number, tar in enumerate(_TARS)},
    ("gzip", 0): gzip.compress(_TARS[0], mtime=0),
}
# One layer comes as two blobs.
IMAGES: Final = (
    (("plain", 0), ("plain", 1), ("plain", 2)),
    (("gzip", 0), ("plain", 3)),
)


def blob_of(which: tuple[str, int]) -> Blob:
    data = _BYTES[which]
    suffix = "+gzip" if which[0] == "gzip" else ""
    return Blob("sha256:" + hashlib.sha256(data).hexdigest(), len(data), _TAR + suffix)


def chains_of(image: int) -> list[ChainID]:
    found: list[ChainID] = []
    for _, number in IMAGES[image]:
        found.append(chain_id(found[-1] if found else None, DIFF_IDS[number]))
    return found


# Of each chain ID the diff ID that completes it.
COMPLETES: Final = {
    chain: DIFF_IDS[number]
    for image in range(len(IMAGES))
    for chain, (_, number) in zip(chains_of(image), IMAGES[image], strict=True)
}


def write_content(directory: Path) -> None:
    """As containerd's content store has it after the images were fetched."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def write(data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return f"sha256:{name}"

    for image in IMAGES:
        config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [DIFF_IDS[number] for _, number in image]}})
        layers = []
        for which in image:
            blob = blob_of(which)
            write(_BYTES[which])
            layers.append({"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes})
        about = {"mediaType": "application/vnd.oci.image.config.v1+json", "size": len(config)}
        write(json.dumps({"config": {**about, "digest": write(config.encode())}, "layers": layers}).encode())


_built: dict[tuple[str, str], Made] = {}


async def _run_build(request: BuildRequest) -> list[BuildRecord]:
    """In place of the two processes: what is tested is the order of things, and not the bytes."""
    [output] = request.outputs

    def build() -> BuildRecord:
        raw = os.pread(request.blob_fd, 1 << 20, 0)
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        if (digest, output.format) not in _built:
            plain = gzip.decompress(raw) if request.media_type.endswith("gzip") else raw
            _built[digest, output.format] = make(plain, output.format)
        made = _built[digest, output.format]
        os.pwrite(output.staged_fd, made.file, 0)
        if output.table_fd is not None and made.table:
            os.pwrite(output.table_fd, made.table, 0)
        built = made.built
        return BuildRecord(
            built.format, "sha256:" + built.diff_id.hex(), built.root_hash.hex(), built.tar_size_bytes,
            built.data_size_bytes, built.tree_size_bytes, built.file_size_bytes, built.entries, built.warnings,
            digest, len(raw), {},
        )  # fmt: skip

    return [await asyncio.to_thread(build)]


class _Clock:
    """The scheduler's, for the builder's time of grace."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


# The daemon


@dataclass
class _Parts:
    loop: Loop
    metastore: Metastore
    store: LayerStore
    directories: Directories
    activation: Activation
    links: Links
    builder: Builder
    content: Content
    snapshots: Snapshots


@dataclass(frozen=True)
class Client:
    """`play` makes its calls one after the other, through World.call. `cancelled_at`: ticks after which it goes away, 0
    for never."""

    play: Callable[[World], Coroutine[Any, Any, None]]
    cancelled_at: int = 0


class World:
    def __init__(self, root: Path, content: Path) -> None:
        self.root, self._content = root, content
        self._clock = _Clock()
        self.state: State = {}
        self.makers: dict[int, int] = {}  # snapshot's id -> number of the call that made it
        self.errors: list[str] = []
        self.counts = {"rounds": 0, "calls": 0, "crashes": 0, "cancelled": 0, "states": 0}
        self.ends: Counter[tuple[str, str]] = Counter()
        self._number = 0
        self._calls: list[Call] = []
        self._parts: _Parts | None = None
        self._changes = -1

    @contextmanager
    def in_place(self) -> Iterator[World]:
        """Until its end, time, builds, trace points and log are the test's."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder_module, "time", self._clock)
            patch.setattr(builder_module, "run_build", _run_build)
            patch.setattr(trace, "hook", self._at_trace_point)
            structlog.configure(
                processors=[self._note], wrapper_class=structlog.make_filtering_bound_logger(40),
                logger_factory=structlog.ReturnLoggerFactory(), cache_logger_on_first_use=False,
            )  # fmt: skip
            try:
                yield self
            finally:
                if self._parts is not None:
                    self.parts.loop.crashed = True
                    self._abandon()
                structlog.reset_defaults()

    def _at_trace_point(self, point: str) -> None:
        if self._parts is not None:  # and not while they are being made
            self._parts.loop.at_trace_point(point)

    def _note(self, logger: object, method: str, event: Any) -> str:
        if not self.parts.loop.crashed:
            self.errors.append(str(dict(event)))
        return ""

    @property
    def parts(self) -> _Parts:
        assert self._parts is not None
        return self._parts

    def boot(self, choices: bytes, crash_at: int = 0) -> None:
        """As `daemon.run` does. Raises Crash."""
        loop = Loop()
        loop.now = self._clock.now
        asyncio.set_event_loop(None)
        root = self.root
        contracts = {name: CONTRACTS[named.contract] for name, named in NAMES.items()}
        unmounted = frozenset(name for name, contract in contracts.items() if contract.PLACE is not Place.MOUNTED)
        metastore = Metastore(root / FILE_NAME, unmounted=unmounted)
        store = LayerStore(root)
        directories = Directories(root, store.trash)
        activation = Activation(root, store)
        links = Links({"tardev": root / "layers"}, metastore, store)
        for part in (store, directories, activation, links):
            part.prepare()
        content = Content(self._content, "")
        builder = Builder(
            metastore, store, content, workers=2, limits=Limits(), timeout_seconds=1800, per_namespace=False,
            renew=links.renew,
        )  # fmt: skip
        collector = Collector(metastore, store, builder, cache_bytes=0, unused_seconds=1e9)
        repair = Repair(metastore, store, content, builder)
        snapshots = Snapshots(
            NAMES, metastore, store, directories, builder, content, activation, links, collector, repair,
            None,
        )  # fmt: skip
        self._parts = _Parts(loop, metastore, store, directories, activation, links, builder, content, snapshots)
        self._changes = -1
        loop.on_crash, loop.on_turn = self._on_crash, self._on_turn
        loop.crash_at = crash_at

        async def start() -> None:
            known = Parts(metastore, store, directories, activation, links)
            await reconcile.apply(reconcile.plan(await inventory.take(known)), known)
            await snapshots.resume()

        starting: list[asyncio.Task[None]] = []
        loop.waiting.append((0, lambda: starting.append(loop.create_task(start()))))
        loop.busy = lambda: not starting[0].done()
        self._settle(choices)
        loop.crash_at = 0
        starting[0].result()

    def _settle(self, choices: bytes) -> None:
        """Raises Crash, after which the files are as it left them."""
        try:
            self.parts.loop.settle(choices)
        except Crash:
            self.counts["crashes"] += 1
            self._abandon()
            raise
        finally:
            self._clock.now = max(self._clock.now, self.parts.loop.now) if self._parts else self._clock.now

    # A crash: what is under way must not reach the files any more, so they are moved aside until it is over.

    @property
    def _aside(self) -> Path:
        return self.root.with_name(f"{self.root.name}-aside")

    def _on_crash(self) -> None:
        os.rename(self.root, self._aside)
        for suffix in ("", "-wal"):
            path = self._aside / f"{FILE_NAME}{suffix}"
            if path.exists():
                shutil.copyfile(path, f"{path}.kept")

    def _abandon(self) -> None:
        parts = self.parts
        if not self._aside.exists():
            self._on_crash()
        parts.loop.abandon()
        parts.metastore._database.connection.close()
        parts.metastore._thread.shutdown()
        parts.store.trash.close()
        parts.snapshots._usage._thread.shutdown(wait=False)
        for suffix in ("", "-wal", "-shm"):
            path = self._aside / f"{FILE_NAME}{suffix}"
            path.unlink(missing_ok=True)
            kept = path.with_name(f"{path.name}.kept")
            if kept.exists():
                os.rename(kept, path)
        os.rename(self._aside, self.root)
        self._parts = None

    # Calls

    def round(self, clients: list[Client], choices: bytes, crash_at: int = 0) -> None:
        """All clients at once, to their end or a crash; then what is there is held against the model."""
        self.counts["rounds"] += 1
        self._calls = []
        loop = self.parts.loop
        tasks: list[asyncio.Task[None]] = []
        due: list[tuple[int, asyncio.Task[None]]] = []

        def begin(number: int, client: Client) -> None:
            token = owner.set(number)
            task = loop.create_task(client.play(self))
            owner.reset(token)
            tasks.append(task)
            if client.cancelled_at:
                due.append((loop.ticks + client.cancelled_at, task))

        def on_turn() -> None:
            for at, task in due:
                if at <= loop.ticks and not task.done():
                    task.cancel()
            due[:] = [(at, task) for at, task in due if at > loop.ticks]
            self._on_turn()

        loop.waiting = [(number, partial(begin, number, client)) for number, client in enumerate(clients, 1)]
        loop.busy = lambda: not all(task.done() for task in tasks)
        loop.on_turn = on_turn
        loop.crash_at = loop.ticks + crash_at if crash_at else 0
        crashed = False
        try:
            self._settle(choices)
        except Crash:
            crashed = True
        if crashed:
            self._boot_again(choices, crash_at)
        self.parts.loop.crash_at = 0
        for task in tasks:
            if not crashed and not task.cancelled():
                task.result()
        self.compare(restarted=crashed)

    def _boot_again(self, choices: bytes, crash_at: int) -> None:
        """Which may be cut short, too."""
        if crash_at % 3 == 0:
            try:
                self.boot(choices[::-1], crash_at // 3)
            except Crash:
                pass
            else:
                return
        self.boot(choices)

    def restart(self, choices: bytes) -> None:
        """Killed while nothing was under way."""
        self.parts.loop.crashed = True
        self._on_crash()
        self._abandon()
        self.boot(choices)
        self.compare(restarted=True)

    def later(self) -> None:
        """Nothing was handed out lately."""
        self.parts.loop.now += _RECENT_SECONDS
        self._clock.now = self.parts.loop.now

    def overlaps(self, snapshotter: str, key: str) -> bool:
        """Whether another call of this round may have changed what the key stands for."""
        ours = [call for call in self._calls if (call.snapshotter, call.key) == (snapshotter, key)]
        return any(call.what in ("remove", "commit") for call in ours) or len(ours) > 2

    def check_named(self, snapshotter: str, mounts: list[Mount]) -> None:
        """The files that a runtime is told of are there, and so are their sidecars."""
        contract = CONTRACTS[NAMES[snapshotter].contract]
        if mounts[0].type == "bind":
            return
        for path in contract.layer_files(mounts):
            assert path.exists(), f"{path} is named to a runtime"
            assert contract.PLACE is not Place.STORED or sidecar_path(path).exists(), f"{path} has no sidecar"

    def owner(self, mounts: list[Mount]) -> int:
        """The id in an unpacker's or parentless container's mounts."""
        return int(Path(mounts[0].source).parent.name)

    async def call(self, what: str, snapshotter: str, **fields: Any) -> tuple[str, Any]:
        """(how it ended, the answer)."""
        loop, number = self.parts.loop, self._number
        self._number += 1
        index = len(self._calls)
        blob, mounts = fields.pop("blob", None), fields.pop("mounts", None)
        self._calls.append(Call(number, what, snapshotter, begun=loop.ticks, **fields))
        end: str = UNKNOWN
        answer: Any = None
        try:
            answer = await self._make(self._calls[index], blob, mounts)
            end = OK
        except SnapshotterError as error:
            end = type(error).__name__
            if end in ("Internal", "Unavailable"):
                raise AssertionError(f"{what} of {fields}: {end}: {error}") from error
        except asyncio.CancelledError:
            end = CANCELLED
            self.counts["cancelled"] += 1
            raise
        finally:
            if not loop.crashed:
                self.counts["calls"] += 1
                self.ends[what, end] += 1
                seen = answer if what in ("stat", "list") else None
                ended = {"end": end, "over": loop.ticks, "answer": seen}
                self._calls[index] = Call(**{**_fields(self._calls[index]), **ended})
                if end == OK and what in ("unpack", "prepare", "view") and answer[0].type == "bind":
                    self.makers[self.owner(answer)] = number
        return end, answer

    async def _make(self, call: Call, blob: Blob | None, mounts: list[Mount] | None) -> Any:
        service, name, key = self.parts.snapshots, call.snapshotter, call.key
        caller, labels = Caller.of({}, key or "a/1/x"), dict(call.labels)
        match call.what:
            case "prepare" | "unpack":
                return await service.prepare(name, key, call.parent, labels, caller)
            case "view":
                return await service.view(name, key, call.parent, labels)
            case "apply":
                assert blob is not None
                assert mounts is not None
                return await service.apply(blob, mounts, caller)
            case "commit":
                return await service.commit(name, call.name, key, "", labels, caller)
            case "remove":
                return await service.remove(name, key)
            case "update":
                return _shown(await service.update(name, key, labels, ["labels"]))
            case "stat":
                return _shown(await service.stat(name, key))
            case "list":
                return frozenset([_shown(snapshot) async for snapshot in service.walk(name, [])])
            case "mounts":
                return await service.mounts(name, key)
            case "usage":
                return await service.usage(name, key)
            case "cleanup":
                return await service.cleanup(name)
        raise AssertionError(call.what)

    # What must hold

    def _on_turn(self) -> None:
        """Whatever is under way: each committed snapshot has its layer, whole and in place, and its link."""
        database = self.parts.metastore._database
        connection = database.connection
        if connection.in_transaction or connection.total_changes == self._changes:
            return
        self._changes = connection.total_changes
        self._check_committed(database.snapshots(None))

    def _check_committed(self, snapshots: list[Snapshot]) -> None:
        database, store = self.parts.metastore._database, self.parts.store
        for snapshot in snapshots:
            if snapshot.kind is not Kind.COMMITTED:
                continue
            for layer_id in (snapshot.layer_id, snapshot.parents_layer_id):
                layer = database.layer_by_id(layer_id) if layer_id else None
                if layer is None:
                    assert layer_id is None, f"{snapshot.name}: its layer has no row"
                    continue
                assert layer.state is LayerState.READY, f"{snapshot.name}: {layer.format} is {layer.state}"
                path = store.path(layer.diff_id, layer.format)
                assert path.exists(), f"{snapshot.name}: {path.name} of {layer.format} is gone"
                assert path.stat().st_size == layer.file_size_bytes
            assert snapshot.layer_id is not None
            above = database.by_id(snapshot.parent_id) if snapshot.parent_id else None
            assert snapshot.parent_id is None or (above is not None and above.kind is Kind.COMMITTED)
            assert snapshot.chain_id == chain_id(above.chain_id if above else None, _diff_id(database, snapshot))
            if snapshot.snapshotter == "tardev":
                assert snapshot.chain_id is not None
                name = layer_name(snapshot.chain_id)
                assert (self.root / "layers" / name).exists(), f"{snapshot.name}: no link"

    def compare(self, *, restarted: bool) -> None:
        """Once nothing is under way: rows are a state that the calls may have led to, and nothing else is there."""
        parts = self.parts
        database = parts.metastore._database
        rows = database.snapshots(None)
        found = {(row.snapshotter, row.name): row for row in rows}
        assert not self.errors, self.errors
        for state in ends(self.state, self._calls):
            self.counts["states"] += 1
            if self._is(state, found):
                self.state = state
                break
        else:
            listed = [f"{row.id}: {_shown(row)}" for row in rows]
            raise AssertionError(
                f"no order of the calls explains it\n{self._calls}\nbefore: {self.state}\nnow: {listed}"
            )
        self._calls = []
        self.makers.update({row.id: self.state[name].maker for name, row in found.items()})
        self._check_committed(rows)
        self._check_files(rows)
        if not restarted:
            self._check_memory(rows)

    def _is(self, state: State, found: dict[tuple[str, str], Snapshot]) -> bool:
        if state.keys() != found.keys():
            return False
        for name, row in found.items():
            snap = state[name]
            if shown(name[1], snap) != _shown(row) or snap.extraction != row.extraction:
                return False
            if self.makers.get(row.id, snap.maker) != snap.maker:
                return False
            if snap.diff_id != _diff_id(self.parts.metastore._database, row):
                return False
        return True

    def _check_files(self, rows: list[Snapshot]) -> None:
        parts, database = self.parts, self.parts.metastore._database
        store = parts.store
        assert not list(store.staging.iterdir()), "staging is not empty"
        there, whole = parts.directories.names()
        wanted = {str(row.id) for row in rows if row.has_directory}
        assert there == whole == wanted, f"directories: {sorted(there)}, of which whole {sorted(whole)}, not {wanted}"
        layers = database.layers()
        ready = {(layer.diff_id, layer.format) for layer in layers if layer.state is LayerState.READY}
        assert set(store.listing()) == ready, f"layer files: {store.listing()}, not {ready}"
        for layer in layers:
            assert not store.contradiction(layer)
            assert not store.lacks_table(layer)
            assert not store.sidecar_contradiction(layer)
        unsettled, strays = parts.links.look(rows, layers)
        assert not unsettled, f"links of {unsettled}"
        assert not strays, f"links of nobody: {strays}"

    def _check_memory(self, rows: list[Snapshot]) -> None:
        service = self.parts.snapshots
        assert not self.parts.builder._running, "a build runs for nobody"
        assert not service._background._tasks, "work is left behind the replies"
        assert not self.parts.loop.jobs
        active = {row.id for row in rows if row.kind is Kind.ACTIVE}
        for what in (service._candidates._early, service._candidates._known):
            assert what.keys() <= active, f"remembered for nobody: {what}"


def _fields(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in Call.__dataclass_fields__}


def _shown(row: Snapshot) -> tuple[str, str, str, Labels]:
    labels = tuple(sorted((name, value) for name, value in row.labels.items() if name != ROOT_HASH_LABEL))
    return row.name, str(row.kind), row.parent, labels


def _diff_id(database: Any, row: Snapshot) -> str:
    layer = database.layer_by_id(row.layer_id) if row.layer_id else None
    return layer.diff_id if layer else ""


__all__ = ["COMPLETES", "IMAGES", "NAMES", "Client", "Snap", "World", "blob_of", "chains_of", "write_content"]
