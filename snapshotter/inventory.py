# SPDX-License-Identifier: Apache-2.0
"""What is there: rows, files, mounts; taken once, as data, for `reconcile` to judge."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotter.activation import Activation
from snapshotter.directories import Directories
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore, Snapshot

# For somebody to look at what was put aside; then it goes.
_QUARANTINE_SECONDS: Final = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Parts:
    """Who owns what there is."""

    metastore: Metastore
    store: LayerStore
    directories: Directories
    activation: Activation
    links: Links


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
    old_quarantined: tuple[Path, ...] = ()
    unused_devices: tuple[str, ...] = ()


async def take(parts: Parts) -> Inventory:
    """Raises OSError, KernelError, Internal.

    Files and directories of snapshots before rows: what has come in between has its row, and nothing is taken for left
    over that somebody is about to use. Of layers and links that holds with `Builder.publishing` held, or at a start.
    """
    store, directories, links = parts.store, parts.directories, parts.links

    def look() -> tuple[frozenset[tuple[str, str]], frozenset[str], tuple[frozenset[str], frozenset[str]]]:
        return frozenset(store.listing()), store.left_in_staging(), directories.names()

    layer_files, staged, (all_directories, whole_directories) = await asyncio.to_thread(look)
    mounted = await asyncio.to_thread(parts.activation.mounted)
    devices = await parts.activation.unused_devices()
    snapshots = await parts.metastore.snapshots()
    layers = await parts.metastore.layers()
    in_use = await parts.metastore.layers_in_use()

    def judge() -> Inventory:
        contradictions = {}
        bad_sidecars = []
        for layer in layers:
            if layer.state is LayerState.READY:
                wrong = None
                try:
                    why = store.contradiction(layer)
                    if not why:
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
        too_old_ns = time.time_ns() - _QUARANTINE_SECONDS * 10**9
        return Inventory(
            tuple(snapshots),
            tuple(layers),
            contradictions,
            layer_files,
            staged,
            all_directories,
            whole_directories,
            frozenset(mounted),
            frozenset(in_use),
            tuple(unsettled),
            tuple(strays),
            tuple(bad_sidecars),
            tuple(path for path, status in store.quarantined() if status.st_mtime_ns < too_old_ns),
            tuple(devices),
        )

    return await asyncio.to_thread(judge)
