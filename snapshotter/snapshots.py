# SPDX-License-Identifier: Apache-2.0
"""The ten operations of Snapshots v1, Apply and Diff of Diff v1, and their rules, in the interface's order.

Durable order: files are synced and in place, then one transaction, then the reply. What a crash
leaves between two of these steps, `reconcile` finishes or undoes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from blockdev.formats.compression import MEDIA_TYPES
from blockdev.formats.layer_file import of_chain
from policy.chain import ChainID, chain_id, is_digest
from snapshotter import metrics
from snapshotter.activation import Activation, BrokenLayer
from snapshotter.builder import Builder
from snapshotter.candidates import Candidates
from snapshotter.collector import Collector
from snapshotter.content import Blob, Caller, Content
from snapshotter.contracts import CONTRACTS, Contract, Lower, Mount, Place
from snapshotter.contracts.limit import check_layers
from snapshotter.contracts.mount import directories_of, extraction_mounts, own_directory
from snapshotter.differ import Differ
from snapshotter.directories import Directories, owner
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    Unimplemented,
)
from snapshotter.filters import Subject, compile_filters
from snapshotter.idmap import GID_LABEL, UID_LABEL, IDMapping, keeping, mapping_of
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.log import get_logger
from snapshotter.metastore import Kind, Layer, LayerID, LayerState, Metastore, Snapshot, SnapshotID
from snapshotter.names import chain_id_of, is_extraction, last_component, namespace_of
from snapshotter.repair import Repair
from snapshotter.sidecars import Sidecars
from snapshotter.tasks import Background, to_the_end
from snapshotter.trace import trace
from snapshotter.usage import Usage, Use

if TYPE_CHECKING:
    from snapshotter.signatures import Signatures

_T = TypeVar("_T")

_REF: Final = "containerd.io/snapshot.ref"


@dataclass(frozen=True, slots=True)
class Named:
    """What the configuration says of a snapshotter's name."""

    contract: str
    format: str
    max_layers: int
    remap_ids: bool = False
    skip_download: bool = False
    encoding: str = ""
    writable_bytes: int = 0


def applied_to(mounts: Sequence[Mount], root: Path) -> SnapshotID | None:
    """The snapshot below this root that an Apply into these mounts would fill."""
    return next((found for path in directories_of(mounts) if (found := owner(path, root)) is not None), None)


class Snapshots:
    def __init__(
        self,
        names: Mapping[str, Named],
        metastore: Metastore,
        store: LayerStore,
        directories: Directories,
        builder: Builder,
        content: Content,
        activation: Activation,
        links: Links,
        collector: Collector,
        repair: Repair,
        signatures: Signatures | None,
    ) -> None:
        self._names = names
        self._metastore, self._store, self._builder = metastore, store, builder
        self._directories, self._activation, self._links = directories, activation, links
        self._collector, self._repair = collector, repair
        self._signatures = signatures
        formats = {name: named.format for name, named in names.items()}
        self._candidates = Candidates(formats, builder, content)
        self._parents = repair.parents
        self._sidecars = Sidecars(store, repair.made)
        self._usage = Usage(directories.filled)
        self._content = content
        self._differ = Differ(
            metastore, store, directories, activation, builder, content, self._mounts, self._mapping_of
        )
        self._background = Background()
        # Once containerd has called Apply it will again, with the very blob: nothing is left to guess.
        self._applies = False
        self._log = get_logger()

    async def resume(self) -> None:
        """What an unpacker may still be filling since before the start; what was found broken, behind the answers."""
        self._background.later("layers that were found broken", self._repair.all_broken)
        for snapshot in await self._metastore.unfilled():
            if snapshot.snapshotter in self._names:
                self._expect(snapshot, Caller.of({}, snapshot.name))

    async def close(self) -> None:
        await self._candidates.close()
        await self._usage.close()
        await self._background.drain()

    # Snapshots

    async def prepare(
        self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str], caller: Caller
    ) -> list[Mount]:
        """Raises AlreadyExists (also where there is nothing to unpack), NotFound (parent), InvalidArgument,
        FailedPrecondition (too many layers)."""
        extraction = is_extraction(key)
        if extraction and self._names[self._known(snapshotter)].skip_download:
            await self._skip(snapshotter, key, parent, labels)
        snapshot, mounts = await self._create(snapshotter, key, parent, Kind.ACTIVE, labels, extraction=extraction)
        if extraction:
            self._expect(snapshot, caller)
        return mounts

    async def view(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Raises AlreadyExists, NotFound (parent), InvalidArgument, FailedPrecondition (too many layers)."""
        _, mounts = await self._create(snapshotter, key, parent, Kind.VIEW, labels, extraction=False)
        return mounts

    async def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        """What prepare or view answered. Raises NotFound, FailedPrecondition (committed)."""
        snapshot = await self._metastore.stat(self._known(snapshotter), key)
        if snapshot.kind not in (Kind.ACTIVE, Kind.VIEW):
            raise FailedPrecondition(f"snapshot {key!r} is {snapshot.kind}: it has no mounts")
        return await self._mounts(snapshot)

    async def commit(
        self, snapshotter: str, name: str, key: str, parent: str, labels: Mapping[str, str], caller: Caller
    ) -> None:
        """Raises AlreadyExists (name), NotFound, FailedPrecondition (not active; no layer; wrong chain; changes while
        it is read; not signed), InvalidArgument (another parent), and what the build of a layer raises that no Apply
        has brought.
        """
        if not name:
            raise InvalidArgument("a snapshot cannot be committed without a name")
        # First: a caller that did not hear of its commit asks again, and its key is gone.
        if await self._metastore.find(self._known(snapshotter), name):
            if is_extraction(key) and await self._metastore.find(snapshotter, key):
                # containerd counts its names, and takes this for success: its own record of the snapshot is missing.
                self._log.warning(
                    "a name that containerd has given before: its metadata was lost, or is an older copy; `tardevctl"
                    " fsck` has the commands after which it can be pulled again",
                    namespace=namespace_of(key),
                    snapshotter=snapshotter,
                    name=name,
                )
            raise AlreadyExists(f"snapshot {name!r} of {snapshotter} exists already")
        snapshot = await self._metastore.stat(snapshotter, key)
        if snapshot.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key!r} is {snapshot.kind}, not active")
        above = await self._parent_at_commit(snapshot, parent)
        parent_chain = above.chain_id if above else None
        layer = await self._layer_of(snapshot, name, caller)
        # On a parent that has no chain ID, nothing has one.
        chain = chain_id(parent_chain, layer.diff_id) if above is None or parent_chain else None
        promised = last_component(name)
        if is_digest(promised) and chain != promised:
            below = repr(above.name) if above else "nothing"
            raise FailedPrecondition(f"layer {layer.diff_id} on {below} has the chain ID {chain}, not {promised}")
        await self._check_signatures(above, layer)
        on_top = await self._on_top(above, layer)
        trace("commit.checked")
        await to_the_end(self._commit(snapshot, name, labels, layer, chain, above, on_top))

    async def _commit(
        self,
        snapshot: Snapshot,
        name: str,
        labels: Mapping[str, str],
        layer: Layer,
        chain: ChainID | None,
        parent: Snapshot | None,
        on_top: LayerID | None,
    ) -> None:
        above = parent.id if parent else None
        async with self._links.made(snapshot.snapshotter, chain, layer) as links:
            await self._metastore.commit(snapshot, name, labels, layer.id, chain, above, on_top, links)
        trace("commit.committed")
        if on_top is not None and not self._contract(snapshot).NAMES_PARENTS:
            self._log.warning(
                "directories of lower layers show made attributes: the contract cannot name a parents layer", key=name
            )
        self._candidates.forget(snapshot.id)
        self._usage.forget(snapshot.id)
        self._background.later("what a committed snapshot leaves", partial(self._leave, snapshot))

    async def remove(self, snapshotter: str, key: str) -> None:
        """Raises NotFound, FailedPrecondition (has children)."""
        trace("remove.begun")
        await to_the_end(self._remove(self._known(snapshotter), key))

    async def _remove(self, snapshotter: str, key: str) -> None:
        snapshot = await self._metastore.remove(snapshotter, key)
        trace("remove.removed")
        self._candidates.forget(snapshot.id)
        self._usage.forget(snapshot.id)
        if snapshot.kind is Kind.COMMITTED:
            self._background.later("a removed snapshot's link", partial(self._links.release, snapshot))
            return
        # Behind the reply: it waits for whoever mounts, and what is left goes with the next Cleanup or start.
        self._background.later("what a removed snapshot leaves", partial(self._leave, snapshot))

    async def stat(self, snapshotter: str, key: str) -> Snapshot:
        """Raises NotFound."""
        return self._shown(await self._metastore.stat(self._known(snapshotter), key))

    async def update(self, snapshotter: str, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Labels are all that can change: "labels" or no path replaces them, "labels.KEY" takes one of the request's,
        or removes it where the request has none; KEY may hold dots and slashes. Raises NotFound, InvalidArgument
        (another field).

        What we know of a layer stands in rows of its own and never in labels, so that no client erases or forges it.
        """

        def change(old: dict[str, str]) -> Mapping[str, str]:
            for path in paths:
                if path != "labels" and not path.startswith("labels."):
                    raise InvalidArgument(f"cannot update field {path!r} of snapshot {name!r}: only labels change")
            if not paths or "labels" in paths:
                return labels
            for path in paths:
                label = path.removeprefix("labels.")
                old[label] = labels.get(label, "")
            return old

        if self._names[self._known(snapshotter)].remap_ids:
            return self._shown(await self._metastore.update_labels(snapshotter, name, keeping(change)))
        return self._shown(await self._metastore.update_labels(snapshotter, name, change))

    async def walk(self, snapshotter: str, filters: Iterable[str]) -> AsyncGenerator[Snapshot, None]:
        """All namespaces', as they are at one moment. Raises InvalidArgument (a filter)."""
        wanted = compile_filters(filters)
        rows = self._metastore.walk(self._known(snapshotter), wanted.only("name"), wanted.only("parent"))
        async with aclosing(rows) as batches:
            async for batch in batches:
                for snapshot in map(self._shown, batch):
                    if wanted(Subject(snapshot.name, snapshot.parent, snapshot.kind, snapshot.labels)):
                        yield snapshot

    async def usage(self, snapshotter: str, key: str) -> Use:
        """Of the snapshot alone, without its parents, at once: of a layer from its row, of an active snapshot what is
        known of its directory, which may be a bound from below (`usage`). Raises NotFound."""
        snapshot = await self._metastore.stat(self._known(snapshotter), key)
        if snapshot.layer_id and (snapshot.kind is Kind.COMMITTED or snapshot.extraction):
            layer = await self._metastore.layer_by_id(snapshot.layer_id)
            return Use(layer.file_size_bytes, layer.entries) if layer else Use(0, 0)
        return await self._usage.of(snapshot.id) if snapshot.has_directory else Use(0, 0)

    async def cleanup(self, snapshotter: str) -> None:
        """Delete what removed snapshots have left, where that failed before, and layers that nothing refers to, as far
        as the cache may not keep them (`collector`)."""
        self._known(snapshotter)
        await self._background.again()
        await self._activation.release_unused(self._metastore.layers_in_use)
        self._store.trash.again()
        await self._collector.collect()

    # Diff

    async def apply(self, blob: Blob, mounts: Sequence[Mount], caller: Caller) -> Layer:
        """Raises Unimplemented for mounts that are not ours, so that containerd asks the next differ."""
        snapshot_id = applied_to(mounts, self._directories.root)
        if snapshot_id is None:
            raise Unimplemented("these mounts are not of this snapshotter")
        snapshot = await self._metastore.by_id(snapshot_id)
        if snapshot is None or snapshot.kind is not Kind.ACTIVE:
            raise NotFound(f"no active snapshot has the directory {self._directories.filled(snapshot_id)}")
        named = self._names.get(snapshot.snapshotter)
        if named is None:
            raise FailedPrecondition(f"snapshotter {snapshot.snapshotter!r} is no longer configured")
        if blob.media_type not in MEDIA_TYPES and not snapshot.extraction:
            raise Unimplemented(f"media type {blob.media_type!r} is no layer's")
        if snapshot.layer_id is None and not await self._directories.is_empty(snapshot_id):
            raise Unimplemented(f"snapshot {snapshot.name!r} holds changes already")
        self._applies = True
        self._candidates.stop(snapshot_id)
        if not caller.namespace:
            caller = Caller.of({"containerd-lease": caller.lease}, snapshot.name)
        layer = await self._builder.build(blob, named.format, caller)
        if snapshot.layer_id not in (None, layer.id):
            raise FailedPrecondition(f"snapshot {snapshot.name!r} has another layer already")
        trace("apply.built")
        if not await self._metastore.set_layer(snapshot_id, layer.id):
            raise NotFound(f"snapshot {snapshot.name!r} went away during the build of layer {layer.diff_id}")
        trace("apply.recorded")
        if snapshot.parent_id:
            # Not waited for in containerd's write transaction, as at Commit.
            await self._on_top(await self._metastore.by_id(snapshot.parent_id), layer)
        return layer

    async def diff(
        self,
        left: Sequence[Mount],
        right: Sequence[Mount],
        media_type: str,
        ref: str,
        labels: Mapping[str, str],
        latest_mtime: int | None,
        caller: Caller,
    ) -> Blob:
        """See Differ.diff."""
        return await self._differ.diff(left, right, media_type, ref, labels, latest_mtime, caller)

    # Parts

    def _known(self, snapshotter: str) -> str:
        if snapshotter not in self._names:
            raise InvalidArgument(f"snapshotter {snapshotter!r} is not configured; there are: {', '.join(self._names)}")
        return snapshotter

    def _contract(self, snapshot: Snapshot) -> Contract:
        return CONTRACTS[self._names[snapshot.snapshotter].contract]

    def _shown(self, snapshot: Snapshot) -> Snapshot:
        """With the label that its contract gives it, whatever clients have put there."""
        label = self._contract(snapshot).ROOT_HASH_LABEL
        if not label:
            return snapshot
        labels = {name: value for name, value in snapshot.labels.items() if name != label}
        if snapshot.kind is Kind.COMMITTED and snapshot.root_hash:
            labels[label] = snapshot.root_hash
        return replace(snapshot, labels=labels)

    def _expect(self, snapshot: Snapshot, caller: Caller) -> None:
        chain = chain_id_of(snapshot.name)
        if chain is not None and not self._applies:
            self._candidates.build_early(snapshot, chain, caller)

    async def _leave(self, snapshot: Snapshot) -> None:
        """Mounts and directory of one that is active no more: in this order, for a call may still be mounting."""
        try:
            if not snapshot.extraction:
                await self._release(snapshot)
        finally:
            await self._directories.remove(str(snapshot.id))

    async def _release(self, gone: Snapshot) -> None:
        if self._contract(gone).PLACE is not Place.MOUNTED:
            return

        async def in_use() -> set[LayerID] | None:
            if gone.parent_id is None or await self._metastore.has_container(gone.parent_id):
                return None
            return await self._metastore.layers_in_use()

        await self._activation.release_unused(in_use)

    async def _create(
        self, snapshotter: str, key: str, parent: str, kind: Kind, labels: Mapping[str, str], *, extraction: bool
    ) -> tuple[Snapshot, list[Mount]]:
        if not key:
            raise InvalidArgument("a snapshot needs a key")
        named = self._names[self._known(snapshotter)]
        if not extraction and self._mapping(named, labels) is None and {UID_LABEL, GID_LABEL} & labels.keys():
            self._log.warning("ID mapping ignored: remap_ids is off", snapshotter=snapshotter, key=key)
        creating = asyncio.create_task(
            self._metastore.create(snapshotter, key, parent, kind, labels, extraction=extraction)
        )
        try:
            snapshot = await asyncio.shield(creating)
        except asyncio.CancelledError:
            await to_the_end(self._undo_once_made(creating))
            raise
        trace("prepare.created")
        try:
            if snapshot.has_directory:
                await self._make_directory(snapshot)
            mounts = await self._mounts(snapshot, new=True)
            trace("prepare.mounts")
            return snapshot, mounts
        except BaseException:
            await to_the_end(self._undo(snapshot))
            raise

    async def _make_directory(self, snapshot: Snapshot) -> None:
        """Raises NotFound where a removal, or a commit, of the snapshot came first: it has taken away what it found,
        and nobody would take away what is made behind it."""
        failure: FileNotFoundError | None = None
        try:
            await to_the_end(asyncio.to_thread(self._directories.make, snapshot.id))
        except FileNotFoundError as error:
            failure = error
        now = await self._metastore.by_id(snapshot.id)
        if now is None or now.kind is not snapshot.kind:
            raise NotFound(f"snapshot {snapshot.name!r} was removed while it was prepared") from failure
        if failure is not None:
            raise failure

    async def _skip(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> None:
        """Raises FailedPrecondition where it must be signed and is not.

        Raises AlreadyExists where a stored layer completes the chain ID: a committed snapshot of ours says so, with
        the caller's labels and parent, which containerd looks for and takes (containerd: core/metadata).

        Only for an unpacker: a key's form and the label must name the same chain ID, for a pod's annotations can set
        the label alone. Without a parent the equation holds for an image's first layer and for no other.
        """
        chain = chain_id_of(key)
        if chain is None or labels.get(_REF) != chain or await self._metastore.find(snapshotter, key):
            return
        above = await self._metastore.find(snapshotter, parent) if parent else None
        if parent and (above is None or above.kind is not Kind.COMMITTED or above.chain_id is None):
            return
        layer = await self._builder.stored(above.chain_id if above else None, chain, self._names[snapshotter].format)
        if layer is None:
            return
        await self._check_signatures(above, layer)
        if not await self._has_target(snapshotter, parent, chain):
            name = f"{key.rpartition('/')[0]}/{chain}".removeprefix("/")
            if not await to_the_end(self._record(snapshotter, key, name, labels, layer, chain, above)):
                return
        metrics.DOWNLOADS_SKIPPED.inc()
        raise AlreadyExists(f"layer {layer.diff_id} is stored: chain ID {chain} needs no download")

    async def _has_target(self, snapshotter: str, parent: str, chain: ChainID) -> bool:
        async with aclosing(self._metastore.walk(snapshotter, parents=frozenset([parent]))) as batches:
            async for batch in batches:
                for found in batch:
                    if found.kind is Kind.COMMITTED and found.chain_id == found.labels.get(_REF) == chain:
                        return True
        return False

    async def _record(
        self,
        snapshotter: str,
        key: str,
        name: str,
        labels: Mapping[str, str],
        layer: Layer,
        chain: ChainID,
        above: Snapshot | None,
    ) -> bool:
        """A commit like any other, of a snapshot that nobody was given. False where the name is taken."""
        parent = above.name if above else ""
        snapshot = await self._metastore.create(snapshotter, key, parent, Kind.ACTIVE, labels, extraction=True)
        try:
            await self._commit(snapshot, name, labels, layer, chain, above, await self._on_top(above, layer))
        except AlreadyExists:
            await self._undo(snapshot)
            return False
        except BaseException:
            await self._undo(snapshot)
            raise
        return True

    async def _undo_once_made(self, creating: asyncio.Task[Snapshot]) -> None:
        """The transaction of a caller that has gone away comes to its end all the same."""
        with suppress(SnapshotterError):
            await self._undo(await creating)

    async def _undo(self, snapshot: Snapshot) -> None:
        """Of one that was not answered for."""

        async def discard() -> None:
            await self._metastore.discard(snapshot.id)
            trace("prepare.discarded")
            await self._leave(snapshot)

        await self._background.now("what a failed prepare leaves", discard)

    def _mapping_of(self, snapshot: Snapshot) -> IDMapping | None:
        """Raises InvalidArgument."""
        return self._mapping(self._names[snapshot.snapshotter], snapshot.labels)

    @staticmethod
    def _mapping(named: Named, labels: Mapping[str, str]) -> IDMapping | None:
        """Of a container; an extraction has none, whatever its labels say. Raises InvalidArgument."""
        # Ignored by containerd's own overlayfs too, where that cannot map.
        return mapping_of(labels) if named.remap_ids else None

    async def _mounts(self, snapshot: Snapshot, *, new: bool = False) -> list[Mount]:
        """`new`: nobody was answered for it yet; only then is it held against the limits of its name, and its root
        directory is nobody's."""
        filled, work = self._directories.filled(snapshot.id), self._directories.work(snapshot.id)
        if snapshot.extraction:
            return extraction_mounts(filled)
        named = self._names[snapshot.snapshotter]
        contract = self._contract(snapshot)
        mapping = self._mapping(named, snapshot.labels)

        async def layers() -> list[Layer]:
            """Raises NotFound where a removal came first: what is mounted for nobody, nobody would release."""
            if await self._metastore.by_id(snapshot.id) is None:
                raise NotFound(f"snapshot {snapshot.name!r} was removed")
            found = await self._metastore.chain(snapshot.parent_id)
            if not contract.NAMES_PARENTS:
                found = [layer for layer in found if not of_chain(layer.format)]
            if new:
                once = contract.COUNTS_EQUAL_ONCE
                check_layers(found, named.max_layers, snapshot.snapshotter, snapshot.parent, equal_once=once)
            return found

        lowers: list[Lower] = []
        if snapshot.parent_id:
            mapped = (self._directories.lowers(snapshot.id), mapping) if mapping else None
            lowers = await self._lowers(snapshot, layers, mapped)
        if new and mapping:
            await to_the_end(asyncio.to_thread(self._directories.own, snapshot.id, *mapping.root))
        view = snapshot.kind is Kind.VIEW
        if not lowers:
            return own_directory(filled, read_only=view)
        if view:
            return contract.container_mounts(lowers, None, None, named.encoding)
        return contract.container_mounts(lowers, filled, work, named.encoding, named.writable_bytes)

    async def _lowers(
        self,
        snapshot: Snapshot,
        layers: Callable[[], Awaitable[Sequence[Layer]]],
        mapped: tuple[Path, IDMapping] | None,
    ) -> list[Lower]:
        """The layers below, where the contract wants them; a broken one is repaired first. Raises BrokenLayer where it
        cannot be."""

        async def ensure() -> list[Lower]:
            contract = self._contract(snapshot)
            match contract.PLACE:
                case Place.MOUNTED:
                    return await self._activation.ensure(layers, mapped)
                case Place.LINKED:
                    return await self._links.ensure(snapshot, layers)
                case Place.STORED:
                    layer_format = self._names[snapshot.snapshotter].format
                    return await self._sidecars.ensure(layers, layer_format, contract.MIN_LAYERS)

        return await self._repairing(ensure)

    async def _check_signatures(self, above: Snapshot | None, layer: Layer) -> None:
        """Of a layer and of those below it, which may be from before signatures were required. A parents layer is made
        here, of the directories of these layers and nothing else: it needs none. Raises FailedPrecondition."""
        if self._signatures is None:
            return
        below = await self._metastore.chain(above.id) if above else []
        await self._signatures.check([layer, *(each for each in below if not of_chain(each.format))])

    async def _on_top(self, above: Snapshot | None, layer: Layer) -> LayerID | None:
        """The parents layer of a chain. Raises as `Parents.of`."""
        return await self._repairing(lambda: self._parents.of(above, layer))

    async def _repairing(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Again after each repair of what it finds broken, once for each layer. Raises BrokenLayer where there is
        none, and what `work` raises."""
        repaired: set[LayerID] = set()
        while True:
            try:
                return await work()
            except BrokenLayer as error:
                if error.layer.id in repaired:
                    raise
                repaired.add(error.layer.id)
                await self._repair.layer(error)

    async def _parent_at_commit(self, snapshot: Snapshot, parent: str) -> Snapshot | None:
        """Its own, or the one that the caller names for a snapshot that was prepared without."""
        if not parent or parent == snapshot.parent:
            return await self._metastore.by_id(snapshot.parent_id) if snapshot.parent_id else None
        if snapshot.parent:
            raise InvalidArgument(f"snapshot {snapshot.name!r} has the parent {snapshot.parent!r}, not {parent!r}")
        found = await self._metastore.stat(snapshot.snapshotter, parent)
        if found.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"parent {parent!r} is {found.kind}, not committed")
        return found

    async def _layer_of(self, snapshot: Snapshot, name: str, caller: Caller) -> Layer:
        if snapshot.layer_id is not None:
            layer = await self._metastore.layer_by_id(snapshot.layer_id)
            assert layer is not None  # a foreign key
            why = await asyncio.to_thread(self._store.contradiction, layer)
            if why or layer.state is not LayerState.READY:
                layer = await self._repair.layer(BrokenLayer(layer, why or "was found broken"))
            if not snapshot.extraction and not await self._directories.is_empty(snapshot.id):
                raise FailedPrecondition(f"snapshot {snapshot.name!r} has a layer, and changes beside it")
            return layer
        if not snapshot.extraction and not is_digest(last_component(name)):
            named = self._names[snapshot.snapshotter]
            if snapshot.parent_id and self._contract(snapshot).PLACE is not Place.MOUNTED:
                raise FailedPrecondition(f"what the container of snapshot {snapshot.name!r} wrote is in its VM")
            mapping = self._mapping_of(snapshot)
            return await self._builder.build_changes(
                partial(self._directories.open_filled, snapshot.id, mapping), snapshot.name, named.format
            )
        chain = chain_id_of(name)
        if chain is None:
            raise FailedPrecondition(f"no layer was applied to snapshot {snapshot.name!r}, and {name!r} names none")
        # What may lie in its directory an unpacker has written: the image's tar, which has the diff ID, it is not.
        # The early build, if there is one, is joined by asking for the same again.
        self._candidates.stop(snapshot.id)
        try:
            found = await self._candidates.layer(snapshot, chain, caller)
        finally:
            # Removed or committed by another call meanwhile: nobody comes for what was learned.
            now = await to_the_end(self._metastore.by_id(snapshot.id))
            if now is None or now.kind is not Kind.ACTIVE:
                self._candidates.forget(snapshot.id)
        if found is None:
            hint = (
                "" if snapshot.extraction else "; changes of a container are committed under a name that is no digest"
            )
            raise FailedPrecondition(
                f"no blob for chain ID {chain} is in containerd's content store, {self._content.blobs} (is that where"
                " containerd has it?); fetch it again:"
                f" ctr -n {caller.namespace or 'default'} content fetch IMAGE, then pull or run again{hint}"
            )
        return found
