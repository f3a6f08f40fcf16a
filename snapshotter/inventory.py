# SPDX-License-Identifier: Apache-2.0
"""What is there: rows, files, mounts; taken once, as data, for `reconcile` to judge."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from snapshotter.activation import Activation
from snapshotter.directories import Directories
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore, Snapshot


@dataclass(frozen=True, slots=True)
class Inventory:
    snapshots: tuple[Snapshot, ...]
    layers: tuple[Layer, ...]
    contradictions: dict[LayerID, str]  # READY layers whose file cannot be theirs, and why
    layer_files: frozenset[tuple[str, str]]  # (diff ID, format)
    staged: frozenset[str]
    snapshot_directories: frozenset[str]
    whole_directories: frozenset[str]  # those of them with all their parts
    mounted: frozenset[LayerID]
    layers_in_use: frozenset[LayerID]
    unsettled_links: tuple[Snapshot, ...] = ()  # committed ones, without the link that they should have or with another
    stray_links: tuple[Path, ...] = ()
    bad_sidecars: tuple[tuple[Layer, str], ...] = ()  # of READY layers, and why


async def take(
    metastore: Metastore, store: LayerStore, directories: Directories, activation: Activation, links: Links
) -> Inventory:
    """Raises OSError, KernelError, Internal."""
    snapshots = await metastore.snapshots()
    layers = await metastore.layers()
    in_use = await metastore.layers_in_use()

    def look() -> Inventory:
        contradictions = {}
        bad_sidecars = []
        for layer in layers:
            if layer.state is LayerState.READY:
                try:
                    why = store.contradiction(layer)
                    wrong = store.sidecar_contradiction(layer)
                except OSError as error:
                    get_logger().error("a layer file cannot be looked at", diff_id=layer.diff_id, error=str(error))
                    continue
                if why:
                    contradictions[layer.id] = why
                elif wrong:
                    bad_sidecars.append((layer, wrong))
        sound = [layer for layer in layers if layer.id not in contradictions]
        unsettled, strays = links.look(snapshots, sound)
        return Inventory(
            tuple(snapshots),
            tuple(layers),
            contradictions,
            frozenset(store.listing()),
            frozenset(entry.name for entry in store.staging.iterdir()),
            *directories.names(),
            frozenset(activation.mounted()),
            frozenset(in_use),
            tuple(unsettled),
            tuple(strays),
            tuple(bad_sidecars),
        )

    return await asyncio.to_thread(look)
