# SPDX-License-Identifier: Apache-2.0
"""From what is there to what should be: `plan` is pure, `apply` does it. Each action may be done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blockdev.kernel import devmapper
from snapshotter import metrics
from snapshotter.inventory import Inventory, Parts
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerState, Snapshot, SnapshotID
from snapshotter.trace import trace


@dataclass(frozen=True, slots=True)
class DeleteStaged:
    """A build that did not end."""

    name: str


@dataclass(frozen=True, slots=True)
class DeleteLayerFile:
    """Renamed into place, but the transaction did not follow; or its row is gone already."""

    diff_id: str
    format: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A layer file that contradicts its row, or whose row says that it was found broken."""

    layer: Layer
    reason: str


@dataclass(frozen=True, slots=True)
class DeleteSnapshotDirectory:
    """Of a snapshot that is gone, or that is committed and owns no bytes."""

    name: str


@dataclass(frozen=True, slots=True)
class MakeSnapshotDirectory:
    """The transaction of a Prepare came through, not all of its directories did."""

    snapshot_id: SnapshotID


@dataclass(frozen=True, slots=True)
class ReleaseMounts:
    """Layers that no container's snapshot needs are still mounted."""


@dataclass(frozen=True, slots=True)
class SettleLink:
    """Lost, or not where the configuration has it now."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Made, but the transaction did not follow; or its snapshot is gone already."""

    path: Path


@dataclass(frozen=True, slots=True)
class DropSidecar:
    """It says something else than the layer's row."""

    layer: Layer
    reason: str


@dataclass(frozen=True, slots=True)
class DeleteQuarantined:
    """Nobody has come to look at it."""

    path: Path


@dataclass(frozen=True, slots=True)
class RemoveDevice:
    """A verity device that was made, and not mounted any more."""

    name: str


Action: TypeAlias = (
    DeleteStaged
    | DeleteLayerFile
    | Quarantine
    | DeleteSnapshotDirectory
    | MakeSnapshotDirectory
    | ReleaseMounts
    | SettleLink
    | DeleteLink
    | DropSidecar
    | DeleteQuarantined
    | RemoveDevice
)


def plan(inventory: Inventory) -> list[Action]:
    actions: list[Action] = [DeleteStaged(name) for name in sorted(inventory.staged)]
    known = {(layer.diff_id, layer.format) for layer in inventory.layers}
    actions += [DeleteLayerFile(*file) for file in sorted(inventory.layer_files - known)]
    for layer in inventory.layers:
        if layer.id in inventory.contradictions:
            actions.append(Quarantine(layer, inventory.contradictions[layer.id]))
        elif layer.state is LayerState.BROKEN and (layer.diff_id, layer.format) in inventory.layer_files:
            actions.append(Quarantine(layer, "was found broken"))
    wanted = {str(snapshot.id) for snapshot in inventory.snapshots if snapshot.has_directory}
    actions += [DeleteSnapshotDirectory(name) for name in sorted(inventory.snapshot_directories - wanted)]
    actions += [
        MakeSnapshotDirectory(snapshot.id)
        for snapshot in inventory.snapshots
        if snapshot.has_directory and str(snapshot.id) not in inventory.whole_directories
    ]
    if inventory.mounted - inventory.layers_in_use:
        actions.append(ReleaseMounts())
    actions += [SettleLink(snapshot) for snapshot in inventory.unsettled_links]
    actions += [DeleteLink(path) for path in inventory.stray_links]
    actions += [DropSidecar(layer, reason) for layer, reason in inventory.bad_sidecars]
    actions += [DeleteQuarantined(path) for path in inventory.old_quarantined]
    actions += [RemoveDevice(name) for name in inventory.unused_devices]
    return actions


async def apply(actions: Sequence[Action], parts: Parts) -> list[str]:
    """Every action that can be done; the others are logged, and wait for the next time. For each, why it was not done;
    "" where it was."""
    log = get_logger()
    reasons = []
    for action in actions:
        log.info("reconcile", action=type(action).__name__, detail=str(action))
        trace("reconcile.action")
        why = ""
        try:
            await _do(action, parts)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            log.error("reconcile failed", action=str(action), error=why)
        metrics.RECONCILED.labels(type(action).__name__, "failed" if why else "ok").inc()
        reasons.append(why)
        trace("reconcile.done")
    return reasons


async def _do(action: Action, parts: Parts) -> None:
    metastore, store, directories = parts.metastore, parts.store, parts.directories
    match action:
        case DeleteStaged(name):
            await asyncio.to_thread(store.trash.put, store.staging / name)
        case DeleteLayerFile(diff_id, layer_format):
            await asyncio.to_thread(store.delete, diff_id, layer_format)
        case Quarantine(layer, _):
            await metastore.mark_broken([layer.id])
            trace("reconcile.marked")
            await asyncio.to_thread(store.quarantine, layer.diff_id, layer.format)
        case DeleteSnapshotDirectory(name):
            await directories.remove(name)
        case MakeSnapshotDirectory(snapshot_id):
            await asyncio.to_thread(directories.make, snapshot_id)
            if await metastore.by_id(snapshot_id) is None:
                await directories.remove(str(snapshot_id))
        case ReleaseMounts():
            await parts.activation.release_unused(metastore.layers_in_use)
        case SettleLink(snapshot):
            await parts.links.settle(snapshot)
        case DeleteLink(path):
            await parts.links.drop_stray(path)
        case DropSidecar(layer, _):
            await asyncio.to_thread(store.drop_sidecar, layer)
        case DeleteQuarantined(path):
            await asyncio.to_thread(store.trash.put, path)
        case RemoveDevice(name):
            await asyncio.to_thread(devmapper.remove, name)
