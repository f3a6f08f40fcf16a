# SPDX-License-Identifier: Apache-2.0
"""What a node holds now, counted: for metrics, `tardevctl status` and the status page."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshotter.builder import Builder, Underway
from snapshotter.inventory import Parts
from snapshotter.metastore import Totals
from snapshotter.reserve import Reserve


@dataclass(frozen=True, slots=True)
class Amount:
    count: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """`areas`: of what lies below the root beside layers, by the name of its directory. `mounts` are those of layers
    that are held for containers, `devices` the block devices that some have between them and the file."""

    totals: Totals
    areas: Mapping[str, Amount]
    mounts: int
    devices: int
    free_bytes: int
    has_reserve: bool
    builds: tuple[Underway, ...]


async def take(parts: Parts, builder: Builder, reserve: Reserve) -> Figures:
    """Costs some milliseconds for ten thousand snapshots. Raises OSError, KernelError, Internal."""
    totals = await parts.metastore.totals()

    def look() -> tuple[dict[str, Amount], int, int, int, bool]:
        store = parts.store
        quarantined = store.quarantined()
        areas = {
            "quarantine": Amount(len(quarantined), sum(status.st_blocks * 512 for _, status in quarantined)),
            "staging": _amount(store.staging),
            "trash": _amount(store.trash.directory),
            "metadata": Amount(1, sum(_size(path) for path in store.root.glob("metadata.db*"))),
        }
        space = os.statvfs(store.root)
        mounts, devices = parts.activation.held()
        return areas, mounts, devices, space.f_bavail * space.f_frsize, reserve.is_kept()

    areas, mounts, devices, free_bytes, has_reserve = await asyncio.to_thread(look)
    return Figures(totals, areas, mounts, devices, free_bytes, has_reserve, builder.underway())


def _amount(directory: Path) -> Amount:
    """Of what lies in it; a directory there counts as one, without what is in it."""
    sizes = [_size(Path(entry.path)) for entry in os.scandir(directory)]
    return Amount(len(sizes), sum(sizes))


def _size(path: Path) -> int:
    """Bytes on the disk; 0 of one that has gone."""
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0
