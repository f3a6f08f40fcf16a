# SPDX-License-Identifier: Apache-2.0
"""From what is there to what should be: `plan` is pure, `apply` does it. Each action may be done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from snapshotter.activation import Activation
from snapshotter.inventory import SNAPSHOTS, Inventory
from snapshotter.layerstore import LayerStore, remove_tree
from snapshotter.log import get_logger
from snapshotter.metastore import Kind, Layer, LayerState, Metastore


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
    """A layer file that contradicts its row."""

    layer: Layer
    reason: str


@dataclass(frozen=True, slots=True)
class DeleteSnapshotDirectory:
    """Of a snapshot that is gone, or that is committed and owns no bytes."""

    name: str


@dataclass(frozen=True, slots=True)
class MakeSnapshotDirectory:
    """The transaction of a Prepare came through, its directories did not."""

    name: str


@dataclass(frozen=True, slots=True)
class ReleaseMounts:
    """Layers that no container's snapshot needs are still mounted."""


Action: TypeAlias = (
    DeleteStaged | DeleteLayerFile | Quarantine | DeleteSnapshotDirectory | MakeSnapshotDirectory | ReleaseMounts
)


def plan(inventory: Inventory) -> list[Action]:
    actions: list[Action] = [DeleteStaged(name) for name in sorted(inventory.staged)]
    ready = {(layer.diff_id, layer.format) for layer in inventory.layers if layer.state is LayerState.READY}
    actions += [DeleteLayerFile(*file) for file in sorted(inventory.layer_files - ready)]
    actions += [
        Quarantine(layer, inventory.contradictions[layer.id])
        for layer in inventory.layers
        if layer.id in inventory.contradictions
    ]
    wanted = {str(snapshot.id) for snapshot in inventory.snapshots if snapshot.kind is not Kind.COMMITTED}
    actions += [DeleteSnapshotDirectory(name) for name in sorted(inventory.snapshot_directories - wanted)]
    actions += [MakeSnapshotDirectory(name) for name in sorted(wanted - inventory.snapshot_directories)]
    if inventory.mounted - inventory.layers_in_use:
        actions.append(ReleaseMounts())
    return actions


async def apply(
    actions: Sequence[Action], root: Path, metastore: Metastore, store: LayerStore, activation: Activation
) -> None:
    """Raises OSError, KernelError, Internal."""
    log = get_logger()
    for action in actions:
        log.info("reconcile", action=type(action).__name__, detail=str(action))
        match action:
            case DeleteStaged(name):
                await asyncio.to_thread(remove_tree, store.staging / name)
            case DeleteLayerFile(diff_id, layer_format):
                await asyncio.to_thread(store.delete, diff_id, layer_format)
            case Quarantine(layer, _):
                await metastore.mark_broken([layer.id])
                await asyncio.to_thread(store.quarantine, layer.diff_id, layer.format)
            case DeleteSnapshotDirectory(name):
                await asyncio.to_thread(remove_tree, root / SNAPSHOTS / name)
            case MakeSnapshotDirectory(name):
                await asyncio.to_thread(make_snapshot_directory, root / SNAPSHOTS / name)
            case ReleaseMounts():
                await activation.release_unused(metastore.layers_in_use)


def make_snapshot_directory(path: Path) -> None:
    """`fs`, with the mode that a root directory has, and overlay's `work`."""
    path.mkdir(mode=0o700, exist_ok=True)
    (path / "fs").mkdir(exist_ok=True)
    (path / "fs").chmod(0o755)
    (path / "work").mkdir(mode=0o711, exist_ok=True)
