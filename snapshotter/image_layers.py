# SPDX-License-Identifier: Apache-2.0
"""The layer files of an image, topmost first, a parents layer included: those of a node, or built for the occasion."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from blockdev.formats.layer_file import format_named
from blockdev.formats.limits import Limits
from snapshotter import metastore
from snapshotter.api.proto import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.builder import Builder
from snapshotter.config import Config
from snapshotter.containerd import CALL_SECONDS, Leases, refused
from snapshotter.content import Caller, Content
from snapshotter.contracts import CONTRACTS, Mount, Place
from snapshotter.errors import DataLoss, FailedPrecondition, Internal
from snapshotter.images import Image
from snapshotter.layerstore import LayerStore
from snapshotter.made import Made
from snapshotter.metastore import Kind, Layer, Metastore, Snapshot
from snapshotter.parents import Parents
from snapshotter.tasks import to_the_end

_LEASE_SECONDS: Final = 3600
_BUILDS_AT_ONCE: Final = 2
_BUILD_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    layer: Layer
    path: Path


@asynccontextmanager
async def on_the_node(
    settings: Config, snapshotter: str, image: Image, content: Content, caller: Caller
) -> AsyncIterator[list[PlacedLayer]]:
    """As the snapshotter's mounts name them, of an image that containerd has unpacked with it.

    The mounts are those of a view, which containerd keeps under a lease until this ends. A parents layer that they
    do not name is the one that the snapshot refers to; so are all layers where the contract mounts them on the host.

    Raises FailedPrecondition (not unpacked; no such snapshotter), Internal (other files than the snapshot's), and what
    containerd's View raises.
    """
    if snapshotter not in settings.snapshotters:
        known = ", ".join(settings.snapshotters)
        raise FailedPrecondition(f"the configuration has no snapshotter {snapshotter!r}; it has: {known}")
    contract = CONTRACTS[settings.snapshotters[snapshotter].contract]
    chain = _chain(settings, snapshotter, image, caller)
    store = LayerStore(Path(settings.root))
    own = [PlacedLayer(layer, store.path(layer.diff_id, layer.format)) for layer in chain]
    if contract.PLACE is Place.MOUNTED:
        yield own
        return
    async with _view(content, snapshotter, image, caller) as mounts:
        try:
            paths = contract.layer_files(mounts)
            if len(own) < contract.MIN_LAYERS:
                paths = paths[: len(own)]  # the others are empty
            named = [_named(path, own) for path in paths]
        except ValueError as error:
            raise Internal(f"snapshotter {snapshotter}: {error}") from None
        missing = [placed for placed in own if placed.layer not in [each.layer for each in named]]
        if any(not format_named(placed.layer.format).of_chain for placed in missing):
            raise Internal(f"the mounts of {image.name} do not name the layer {missing[0].layer.diff_id}")
        yield [*missing, *named]


def _chain(settings: Config, snapshotter: str, image: Image, caller: Caller) -> list[Layer]:
    snapshots, layers = metastore.read(Path(settings.root) / metastore.FILE_NAME)
    wanted = image.chain_id()
    top: Snapshot | None = next(
        (
            each
            for each in snapshots
            if each.snapshotter == snapshotter and each.kind is Kind.COMMITTED and each.chain_id == wanted
        ),
        None,
    )
    if top is None:
        raise FailedPrecondition(
            f"image {image.name} is not unpacked by {snapshotter}:"
            f" ctr --namespace {caller.namespace} images pull --snapshotter {snapshotter} {image.name}"
        )
    by_snapshot, by_layer = {each.id: each for each in snapshots}, {each.id: each for each in layers}
    ids = [top.parents_layer_id]
    step: Snapshot | None = top
    while step is not None:
        ids.append(step.layer_id)
        step = by_snapshot[step.parent_id] if step.parent_id else None
    return [by_layer[layer_id] for layer_id in ids if layer_id is not None]


def _named(path: Path, own: Sequence[PlacedLayer]) -> PlacedLayer:
    for placed in own:
        with suppress(OSError):
            if os.path.samefile(placed.path, path):
                return PlacedLayer(placed.layer, path)
    raise Internal(f"the mounts name {path}, which is no layer of the snapshot")


@asynccontextmanager
async def _view(content: Content, snapshotter: str, image: Image, caller: Caller) -> AsyncIterator[list[Mount]]:
    """Through containerd, which counts it among what it has. One that nobody could remove goes with its lease."""
    stub = snapshots_pb2_grpc.SnapshotsStub(content.channel())  # type: ignore[no-untyped-call]
    leases = Leases(content.channel(), caller)
    key = f"tardev-uvm-{os.urandom(16).hex()}"
    await leases.create(key, _LEASE_SECONDS)
    try:
        leased = Caller(caller.namespace, key).metadata()
        request = snapshots_pb2.ViewSnapshotRequest(snapshotter=snapshotter, key=key, parent=image.chain_id())
        try:
            reply = await stub.View(request, metadata=leased, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise refused("snapshots", error.code(), error.details()) from None
        yield [Mount(mount.type, mount.source, tuple(mount.options)) for mount in reply.mounts]
    finally:
        await to_the_end(_remove(stub, leases, snapshotter, key, caller))


async def _remove(
    stub: snapshots_pb2_grpc.SnapshotsStub, leases: Leases, snapshotter: str, key: str, caller: Caller
) -> None:
    with suppress(grpc.aio.AioRpcError):
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        await stub.Remove(request, metadata=caller.metadata(), timeout=CALL_SECONDS)
    await leases.delete(key)


async def built(content: Content, image: Image, directory: Path, format: str) -> list[PlacedLayer]:
    """Built into `directory`, an empty one, the way the daemon does it. Raises SnapshotterError; DataLoss for another
    diff ID than the image's config names."""
    store = LayerStore(directory)
    store.prepare()
    rows = Metastore(directory / metastore.FILE_NAME)
    try:
        builder = Builder(
            rows, store, content, workers=_BUILDS_AT_ONCE, limits=Limits(), timeout_seconds=_BUILD_SECONDS,
            per_namespace=False, renew=_nothing,
        )  # fmt: skip
        try:
            layers = await asyncio.gather(*(builder.build(blob, format, Caller("")) for blob in image.layers))
            for layer, diff_id in zip(layers, image.diff_ids, strict=True):
                if layer.diff_id != diff_id:
                    raise DataLoss(f"image {image.name}: its config says {diff_id} of the layer {layer.diff_id}")
            on_top = await Parents(rows, store, builder, Made(rows, store, builder)).of_layers(layers)
        finally:
            await builder.close()
    finally:
        await rows.close()
    stack = [*([on_top] if on_top else []), *reversed(layers)]
    return [PlacedLayer(layer, store.path(layer.diff_id, layer.format)) for layer in stack]


async def _nothing(layer: Layer) -> None:
    """Nobody else has a link to a layer of a directory of one's own."""
