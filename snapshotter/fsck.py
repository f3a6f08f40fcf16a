# SPDX-License-Identifier: Apache-2.0
"""Whether what is stored is what the metadata says, to the last block; and, where asked, making it so.

Beside a daemon that serves: nothing of a build or a container under way counts as left over (`inventory.take`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from blockdev.formats.layer_file import of_chain
from snapshotter import inventory, reconcile
from snapshotter.activation import BrokenLayer
from snapshotter.builder import Builder
from snapshotter.desync import Unknown
from snapshotter.errors import translate
from snapshotter.inventory import Parts
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerID, LayerState
from snapshotter.pace import Pace, Stopped
from snapshotter.parents import BrokenTable
from snapshotter.reconcile import (
    Action,
    DeleteLayerFile,
    DeleteLink,
    DeleteQuarantined,
    DeleteSnapshotDirectory,
    DeleteStaged,
    DropSidecar,
    MakeSnapshotDirectory,
    Quarantine,
    ReleaseMounts,
    RemoveDevice,
    SettleLink,
)
from snapshotter.repair import Repair

# While nothing is due; a layer's time may come earlier by a repair that is asked for.
_LOOK_AGAIN_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem` of `what`. `outcome`: "found", "repaired", or "not repaired" with the reason in `advice`."""

    what: str
    problem: str
    outcome: str = "found"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """So many bytes of so many."""

    done_bytes: int
    total_bytes: int


class Fsck:
    def __init__(
        self, parts: Parts, builder: Builder, repair: Repair, unknown: Callable[[], Awaitable[list[Unknown]]]
    ) -> None:
        """`unknown`: to containerd."""
        self._parts, self._builder, self._repair, self._unknown = parts, builder, repair, unknown
        self._log = get_logger()

    async def check(
        self, *, repair: bool, bytes_per_second: int = 0, blocks_only: bool = False
    ) -> AsyncGenerator[Finding | Checked, None]:
        """What is wrong, one by one. Without `repair` nothing is changed. `blocks_only`: of layer files alone, without
        what is left over or lost beside them. Raises OSError, KernelError, Internal."""
        told: set[LayerID] = set()
        if not blocks_only:
            for action, finding in await self._left_over(repair=repair):
                if isinstance(action, Quarantine):
                    told.add(action.layer.id)
                yield finding
            for each in await self._unknown():
                advice = f"run: {each.commands}, and pull the namespace's images again after some seconds"
                what = f"{each.count} snapshots of {each.snapshotter} in namespace {each.namespace}"
                yield Finding(
                    what,
                    "are unknown to containerd: its metadata was lost, or is an older copy",
                    "not repaired" if repair else "found",
                    advice,
                )
        layers = await self._parts.metastore.layers()
        layers.sort(key=lambda layer: (of_chain(layer.format), layer.verified_ns))
        total, done = sum(layer.file_size_bytes for layer in layers), 0
        pace = Pace(bytes_per_second)
        for layer in layers:
            for error in [found async for found in self._wrong(layer, pace)] if layer.id not in told else ():
                yield await self._told(error, repair=repair)
            done += layer.file_size_bytes
            yield Checked(done, total)

    async def tidy(self) -> None:
        """What a start would mend, while it serves. Raises OSError, KernelError, Internal."""
        await self._left_over(repair=True)

    async def scrub(self, interval_seconds: float, bytes_per_second: int) -> None:
        """For ever: every block of every layer once in so much time, at so many bytes a second at the most. What is
        wrong is repaired, or logged and not handed out any more."""
        pace = Pace(bytes_per_second)
        while True:
            wait = _LOOK_AGAIN_SECONDS
            layers = [layer for layer in await self._parts.metastore.layers() if layer.state is LayerState.READY]
            if layers:
                layer = min(layers, key=lambda each: each.verified_ns)
                wait = min(wait, layer.verified_ns / 1e9 + interval_seconds - time.time())
                if wait <= 0:
                    async for error in self._wrong(layer, pace):
                        await self._told(error, repair=True)
                    continue
            await asyncio.sleep(wait)

    async def _left_over(self, *, repair: bool) -> list[tuple[Action, Finding]]:
        async with self._builder.publishing:
            actions = reconcile.plan(await inventory.take(self._parts))
            reasons = await reconcile.apply(actions, self._parts) if repair else [""] * len(actions)
        findings: list[tuple[Action, Finding]] = []
        for action, why in zip(actions, reasons, strict=True):
            what, problem = _described(action)
            if isinstance(action, Quarantine):
                finding = await self._told(BrokenLayer(action.layer, action.reason), repair=repair)
            elif not repair:
                finding = Finding(what, problem)
            elif why:
                finding = Finding(what, problem, "not repaired", why)
            else:
                finding = Finding(what, problem, "repaired")
            findings.append((action, finding))
        return findings

    async def _wrong(self, layer: Layer, pace: Pace) -> AsyncGenerator[BrokenLayer, None]:
        """At most one of the file, and one of its table."""
        now = await self._parts.metastore.layer_by_id(layer.id)
        if now is None:
            return  # deleted meanwhile
        if now.state is not LayerState.READY:
            yield BrokenLayer(now, "was found broken")
            return
        why = await self._damage(now, pace)
        again = await self._parts.metastore.layer_by_id(layer.id)
        if why and again is not None:
            yield BrokenLayer(now, why)
        elif again is not None:
            await self._parts.metastore.mark_verified(layer.id, time.time_ns())
            try:
                await self._repair.parents.check_table(now)
            except BrokenTable as error:
                yield error

    async def _damage(self, layer: Layer, pace: Pace) -> str:
        task = asyncio.create_task(asyncio.to_thread(self._parts.store.damage, layer, pace))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            pace.stop()
            with suppress(Stopped, OSError):
                await task
            raise

    async def _told(self, error: BrokenLayer, *, repair: bool) -> Finding:
        layer = error.layer
        what = f"layer {layer.diff_id} ({layer.format})"
        problem = f"its directory table: {error.why}" if isinstance(error, BrokenTable) else f"its file {error.why}"
        if not repair:
            return Finding(what, problem)
        try:
            await self._repair.layer(error)
        except Exception as failure:
            text = str(translate(failure))
            self._log.error("a layer cannot be repaired", diff_id=layer.diff_id, error=text)
            return Finding(what, problem, "not repaired", text)
        return Finding(what, problem, "repaired")


def _described(action: Action) -> tuple[str, str]:
    """What it is about, and what is wrong with that."""
    match action:
        case DeleteStaged(name):
            return f"staging/{name}", "is of a build that did not end"
        case DeleteLayerFile(diff_id, layer_format):
            return f"layer file {diff_id} ({layer_format})", "has no layer in the metadata"
        case Quarantine(layer, reason):
            return f"layer {layer.diff_id} ({layer.format})", f"its file {reason}"
        case DeleteSnapshotDirectory(name):
            return f"snapshots/{name}", "is of no snapshot"
        case MakeSnapshotDirectory(snapshot_id):
            return f"snapshots/{snapshot_id}", "is missing or not whole"
        case ReleaseMounts():
            return "mounts", "of layers that no container needs"
        case SettleLink(snapshot):
            return f"link of snapshot {snapshot.name!r}", "is missing, or not where the configuration has it"
        case DeleteLink(path):
            return f"link {path}", "is of no snapshot"
        case DropSidecar(layer, reason):
            return f"sidecar of layer {layer.diff_id} ({layer.format})", reason
        case DeleteQuarantined(path):
            return f"quarantine/{path.name}", "is old"
        case RemoveDevice(name):
            return f"dm device {name}", "is used by nobody"
