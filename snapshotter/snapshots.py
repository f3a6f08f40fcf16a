# SPDX-License-Identifier: Apache-2.0
"""The ten operations of Snapshots v1, Apply of Diff v1, and their rules, in the interface's order.

Durable order: files are synced and in place, then one transaction, then the reply. What a crash
leaves between two of these steps, `reconcile` finishes or undoes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from blockdev.errors import BlockdevError
from blockdev.formats.compression import MEDIA_TYPES
from snapshotter import metrics
from snapshotter.activation import Activation
from snapshotter.builder import Builder
from snapshotter.content import Blob, Caller, Content
from snapshotter.contracts import CONTRACTS, Mount
from snapshotter.contracts.mount import directories_of, extraction_mounts
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    Unimplemented,
    translate,
)
from snapshotter.filters import Subject, compile_filters
from snapshotter.inventory import SNAPSHOTS
from snapshotter.layerstore import LayerStore, remove_tree
from snapshotter.log import get_logger
from snapshotter.metastore import Kind, Layer, Metastore, Snapshot, SnapshotID
from snapshotter.names import ChainID, chain_id, chain_id_of, is_digest, is_extraction, last_component
from snapshotter.reconcile import make_snapshot_directory
from snapshotter.trace import trace

_T = TypeVar("_T")

_POLL_SECONDS: Final = (0.05, 2.0)  # first and longest wait for a blob that is still being fetched


@dataclass(frozen=True, slots=True)
class Use:
    """Of storage: bytes and inodes."""

    size_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Named:
    """What the configuration says of a snapshotter's name."""

    contract: str
    format: str


class Snapshots:
    def __init__(
        self,
        root: Path,
        names: Mapping[str, Named],
        metastore: Metastore,
        store: LayerStore,
        builder: Builder,
        content: Content,
        activation: Activation,
        *,
        cache_bytes: int,
    ) -> None:
        self._directory = root / SNAPSHOTS
        self._names = names
        self._metastore, self._store, self._builder = metastore, store, builder
        self._content, self._activation = content, activation
        self._cache_bytes = cache_bytes
        self._anticipated: dict[SnapshotID, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        # Once containerd has called Apply it will again, with the very blob: nothing is left to guess.
        self._applies = False
        self._log = get_logger()

    async def close(self) -> None:
        for task in self._anticipated.values():
            task.cancel()
        # What is under way may start more in the background.
        while tasks := [*self._anticipated.values(), *self._background]:
            await asyncio.wait(tasks)

    # Snapshots

    async def prepare(
        self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str], caller: Caller
    ) -> list[Mount]:
        """Raises AlreadyExists, NotFound (parent), InvalidArgument."""
        extraction = is_extraction(key)
        snapshot, mounts = await self._create(snapshotter, key, parent, Kind.ACTIVE, labels, extraction=extraction)
        chain = chain_id_of(key)
        if extraction and chain is not None and not self._applies:
            self._anticipate(snapshot, chain, caller)
        return mounts

    async def view(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Raises AlreadyExists, NotFound (parent), InvalidArgument."""
        _, mounts = await self._create(snapshotter, key, parent, Kind.VIEW, labels, extraction=False)
        return mounts

    async def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        """What prepare or view answered. Raises NotFound, FailedPrecondition (committed)."""
        snapshot = await self._metastore.stat(self._known(snapshotter), key)
        if snapshot.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key!r} is committed: it has no mounts")
        return await self._mounts(snapshot)

    async def commit(
        self, snapshotter: str, name: str, key: str, labels: Mapping[str, str], caller: Caller
    ) -> Snapshot:
        """Raises NotFound, AlreadyExists (name), FailedPrecondition (not active; no layer; wrong chain), and
        what the build of a layer raises that no Apply has brought."""
        snapshot = await self._metastore.stat(self._known(snapshotter), key)
        if snapshot.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key!r} is {snapshot.kind}, not active")
        if not name:
            raise InvalidArgument("a snapshot cannot be committed without a name")
        if await self._metastore.find(snapshotter, name):
            raise AlreadyExists(f"snapshot {name!r} of {snapshotter} exists already")
        parent_chain, parent_is_chain = await self._parent_chain(snapshot)
        layer = await self._layer_of(snapshot, name, parent_chain, caller)
        chain = chain_id(parent_chain, layer.diff_id) if parent_is_chain else None
        promised = last_component(name)
        if is_digest(promised) and chain != promised:
            raise FailedPrecondition(
                f"layer {layer.diff_id} on {snapshot.parent or 'nothing'!r} has the chain ID {chain}, not {promised}"
            )
        trace("commit.checked")

        async def finish() -> None:
            await self._metastore.commit(snapshot, name, labels, layer.id, chain)
            trace("commit.committed")
            self._later(asyncio.to_thread(remove_tree, self._path(snapshot.id)))

        await self._whole(finish())
        return snapshot

    async def remove(self, snapshotter: str, key: str) -> Snapshot:
        """Raises NotFound, FailedPrecondition (has children)."""
        trace("remove.begun")
        self._known(snapshotter)
        return await self._whole(self._remove(snapshotter, key))

    async def _remove(self, snapshotter: str, key: str) -> Snapshot:
        snapshot = await self._metastore.remove(snapshotter, key)
        trace("remove.removed")
        self._stop_anticipating(snapshot.id)
        if snapshot.kind is Kind.COMMITTED:
            return snapshot
        # A view of layers has no directory, which is as well.
        self._later(asyncio.to_thread(remove_tree, self._path(snapshot.id)))
        if not snapshot.extraction:
            try:
                await self._activation.release_unused(self._metastore.layers_in_use)
            except BlockdevError as error:
                # The snapshot is gone; the mount goes with the next removal or start.
                self._log.error("a layer stays mounted", key=key, error=str(error))
        return snapshot

    async def stat(self, snapshotter: str, key: str) -> Snapshot:
        """Raises NotFound."""
        return await self._metastore.stat(self._known(snapshotter), key)

    async def update(self, snapshotter: str, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Labels are all that can change. Raises NotFound, InvalidArgument (another field)."""
        for path in paths:
            if path != "labels" and not path.startswith("labels."):
                raise InvalidArgument(f"cannot update field {path!r} of snapshot {name!r}: only labels change")

        def change(old: dict[str, str]) -> Mapping[str, str]:
            if not paths or "labels" in paths:
                return labels
            for path in paths:
                label = path.removeprefix("labels.")
                if label in labels:
                    old[label] = labels[label]
                else:
                    old.pop(label, None)
            return old

        return await self._metastore.update_labels(self._known(snapshotter), name, change)

    async def walk(self, snapshotter: str, filters: Iterable[str]) -> list[Snapshot]:
        """All namespaces', parents first. Raises InvalidArgument (a filter)."""
        wanted = compile_filters(filters)
        return [
            snapshot
            for snapshot in await self._metastore.snapshots(self._known(snapshotter))
            if wanted(Subject(snapshot.name, snapshot.parent, snapshot.kind, snapshot.labels))
        ]

    async def usage(self, snapshotter: str, key: str) -> Use:
        """Of the snapshot alone, without its parents. Raises NotFound."""
        snapshot = await self._metastore.stat(self._known(snapshotter), key)
        if snapshot.kind is Kind.COMMITTED:
            layer = await self._metastore.layer_by_id(snapshot.layer_id) if snapshot.layer_id else None
            return Use(layer.file_size_bytes, layer.entries) if layer else Use(0, 0)
        return await asyncio.to_thread(_directory_use, self._path(snapshot.id) / "fs")

    async def cleanup(self, snapshotter: str) -> None:
        """Delete layers that nothing refers to, oldest first, as far as the cache is over its size."""
        self._known(snapshotter)
        await self.sweep()

    async def sweep(self) -> None:
        unused = [layer for layer in await self._metastore.layers() if not layer.shared_by]
        spare = sum(layer.file_size_bytes for layer in unused) - self._cache_bytes
        for layer in unused:
            if spare <= 0:
                break
            async with self._builder.publishing:
                if layer.id in self._builder.recent() or not await self._metastore.delete_layer(layer.id):
                    continue
                trace("sweep.deleted")
                await asyncio.to_thread(self._store.delete, layer.diff_id, layer.format)
            spare -= layer.file_size_bytes
            metrics.LAYERS_DELETED.inc()
            self._log.info("layer deleted", diff_id=layer.diff_id, format=layer.format)

    # Diff

    async def apply(self, blob: Blob, mounts: Sequence[Mount], caller: Caller) -> Layer:
        """Raises Unimplemented for mounts that are not ours, so that containerd asks the next differ."""
        snapshot_id = self._ours(mounts)
        if snapshot_id is None:
            raise Unimplemented("these mounts are not of this snapshotter")
        snapshot = await self._metastore.by_id(snapshot_id)
        if snapshot is None or snapshot.kind is not Kind.ACTIVE:
            raise NotFound(f"no active snapshot has the directory {self._path(snapshot_id)}")
        named = self._names.get(snapshot.snapshotter)
        if named is None:
            raise FailedPrecondition(f"snapshotter {snapshot.snapshotter!r} is no longer configured")
        if blob.media_type not in MEDIA_TYPES and not snapshot.extraction:
            raise Unimplemented(f"media type {blob.media_type!r} is no layer's")
        if snapshot.layer_id is None and await asyncio.to_thread(_has_entries, self._path(snapshot_id) / "fs"):
            raise Unimplemented(f"snapshot {snapshot.name!r} holds changes already")
        self._applies = True
        self._stop_anticipating(snapshot_id)
        layer = await self._builder.build(blob, named.format, caller)
        if snapshot.layer_id not in (None, layer.id):
            raise FailedPrecondition(f"snapshot {snapshot.name!r} has another layer already")
        trace("apply.built")
        if not await self._metastore.set_layer(snapshot_id, layer.id):
            raise NotFound(f"snapshot {snapshot.name!r} went away during the build of layer {layer.diff_id}")
        trace("apply.recorded")
        return layer

    def _ours(self, mounts: Sequence[Mount]) -> SnapshotID | None:
        for directory in directories_of(mounts):
            path = Path(os.path.normpath(directory))
            number = path.parent.name
            if path.name == "fs" and path.parent.parent == self._directory and number.isascii() and number.isdigit():
                return SnapshotID(int(number))
        return None

    # Parts

    def _known(self, snapshotter: str) -> str:
        if snapshotter not in self._names:
            raise InvalidArgument(f"snapshotter {snapshotter!r} is not configured; there are: {', '.join(self._names)}")
        return snapshotter

    def _path(self, snapshot_id: SnapshotID) -> Path:
        return self._directory / str(snapshot_id)

    async def _create(
        self, snapshotter: str, key: str, parent: str, kind: Kind, labels: Mapping[str, str], *, extraction: bool
    ) -> tuple[Snapshot, list[Mount]]:
        if not key:
            raise InvalidArgument("a snapshot needs a key")
        snapshot = await self._metastore.create(
            self._known(snapshotter), key, parent, kind, labels, extraction=extraction
        )
        trace("prepare.created")
        try:
            if kind is Kind.ACTIVE or not parent:
                await asyncio.to_thread(make_snapshot_directory, self._path(snapshot.id))
            return snapshot, await self._mounts(snapshot)
        except BaseException:
            with suppress(SnapshotterError):
                await self._metastore.remove(snapshotter, key)
            self._later(asyncio.to_thread(remove_tree, self._path(snapshot.id)))
            raise

    async def _mounts(self, snapshot: Snapshot) -> list[Mount]:
        directory = self._path(snapshot.id)
        if snapshot.extraction:
            return extraction_mounts(directory / "fs")
        contract = CONTRACTS[self._names[snapshot.snapshotter].contract]
        layers = await self._metastore.chain(snapshot.parent_id) if snapshot.parent_id else []
        lowers: list[Path] = []
        if contract.ACTIVATES and layers:
            lowers = await self._activation.ensure(layers)
        if snapshot.kind is Kind.VIEW:
            return contract.container_mounts(lowers or [directory / "fs"], None, None)
        return contract.container_mounts(lowers, directory / "fs", directory / "work")

    async def _parent_chain(self, snapshot: Snapshot) -> tuple[ChainID | None, bool]:
        """The parent's chain ID, and whether what stands on it has one: on a parent without, nothing has."""
        if not snapshot.parent_id:
            return None, True
        parent = await self._metastore.by_id(snapshot.parent_id)
        chain = parent.chain_id if parent else None
        return chain, chain is not None

    async def _layer_of(self, snapshot: Snapshot, name: str, parent_chain: ChainID | None, caller: Caller) -> Layer:
        if snapshot.layer_id is not None:
            layer = await self._metastore.layer_by_id(snapshot.layer_id)
            assert layer is not None  # a foreign key
            return layer
        chain = chain_id_of(name)
        if chain is None:
            raise FailedPrecondition(
                f"snapshot {snapshot.name!r} has no layer, and {name!r} names none:"
                " changes of a container cannot be committed in this version"
            )
        # The anticipated build, if there is one, is joined by asking for the same again.
        self._stop_anticipating(snapshot.id)
        layer = await self._from_candidates(snapshot, chain, parent_chain, caller, set())
        if layer is None:
            namespace = caller.namespace or "default"
            raise FailedPrecondition(
                f"no blob for chain ID {chain} is in containerd's content store; fetch it again:"
                f" ctr -n {namespace} content fetch IMAGE, then pull or run again"
            )
        return layer

    async def _from_candidates(
        self, snapshot: Snapshot, chain: ChainID, parent_chain: ChainID | None, caller: Caller, struck: set[Blob]
    ) -> Layer | None:
        """The layer that completes the chain; None where no blob of the store does. `struck` grows by what failed.

        Raises the first error of a candidate, where none succeeds.
        """
        layer_format = self._names[snapshot.snapshotter].format
        failure: SnapshotterError | None = None
        for blob in await self._content.candidates(chain):
            if blob in struck:
                continue
            try:
                layer = await self._builder.build(blob, layer_format, caller)
            except SnapshotterError as error:
                failure = failure or error
            else:
                if chain_id(parent_chain, layer.diff_id) == chain:
                    return layer
                # Any image can list another's diff IDs beside its own blobs.
                self._log.warning("blob is not the layer that an image claims", blob=blob.digest, chain_id=chain)
            struck.add(blob)
        if failure is not None:
            raise failure
        return None

    def _anticipate(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        task = asyncio.create_task(self._build_early(snapshot, chain, caller))
        self._anticipated[snapshot.id] = task
        task.add_done_callback(lambda _: self._anticipated.pop(snapshot.id, None))

    async def _build_early(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        """Without a diff plugin: build as soon as the blob is complete, for Commit to find or to join."""
        struck: set[Blob] = set()
        wait, longest = _POLL_SECONDS
        try:
            parent_chain, _ = await self._parent_chain(snapshot)
            while True:
                with suppress(SnapshotterError):  # Commit meets it again, and tells it
                    if await self._from_candidates(snapshot, chain, parent_chain, caller, struck):
                        return
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._log.error("early build gave up", key=snapshot.name, error=str(translate(error)))

    def _stop_anticipating(self, snapshot_id: SnapshotID) -> None:
        task = self._anticipated.pop(snapshot_id, None)
        if task is not None:
            task.cancel()

    async def _whole(self, work: Coroutine[Any, Any, _T]) -> _T:
        """To its end, although the caller may go away in the middle."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return await asyncio.shield(task)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Not part of the reply: what does not get done here, the next start does."""

        async def run() -> None:
            try:
                await work
            except OSError as error:
                self._log.error("left for the next start", error=str(error))

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _has_entries(directory: Path) -> bool:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return any(entries)
    return False


def _directory_use(directory: Path) -> Use:
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    for parent, _, files in os.walk(directory):
        for path in [parent, *(os.path.join(parent, name) for name in files)]:
            with suppress(OSError):
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    size, inodes = size + status.st_blocks * 512, inodes + 1
    return Use(size, inodes)
