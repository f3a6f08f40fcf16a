# SPDX-License-Identifier: Apache-2.0
"""Snapshots that containerd does not know: its metadata was lost, or an older copy was put back.

containerd then counts its keys from an old number on and meets names that we have. It takes our ALREADY_EXISTS for a
layer that is unpacked, and has no record of it; what it does not know its garbage collector removes, once anything was
removed from the snapshotter (containerd: core/metadata/snapshot.go, garbageCollect).
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc

from snapshotter.api.proto import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.content import Caller, Content
from snapshotter.errors import InvalidArgument
from snapshotter.log import get_logger
from snapshotter.metastore import Metastore, Snapshot, SnapshotID
from snapshotter.names import namespace_of

# containerd knows a snapshot only when its own transaction has ended, which began before ours.
_LOOK_AGAIN_SECONDS: Final = 3.0
_CALL_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Unknown:
    """So many snapshots of a namespace of containerd's, and the commands that have it remove them."""

    snapshotter: str
    namespace: str
    count: int
    commands: str


async def unknown(metastore: Metastore, content: Content, snapshotters: Iterable[str]) -> list[Unknown]:
    """Nothing where containerd cannot be asked. Raises Internal."""
    wanted, channel = frozenset(snapshotters), content.channel()
    try:
        found = await _unknown(metastore, channel, wanted)
        if found:
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
            again = await _unknown(metastore, channel, wanted)
            found = {number: snapshot for number, snapshot in again.items() if number in found}
    except grpc.aio.AioRpcError as error:
        get_logger().warning("containerd does not say which snapshots it knows", error=error.details())
        return []
    counted: dict[tuple[str, str], int] = {}
    for snapshot in found.values():
        place = (snapshot.snapshotter, namespace_of(snapshot.name))
        counted[place] = counted.get(place, 0) + 1
    return [Unknown(*place, count, _commands(content.address, *place)) for place, count in sorted(counted.items())]


def _commands(address: str, snapshotter: str, namespace: str) -> str:
    words = ("ctr", "-a", address, "-n", namespace, "snapshots", "--snapshotter", snapshotter)
    call = shlex.join(words)
    return f"{call} prepare tardev-fsck && {call} rm tardev-fsck"


async def _unknown(
    metastore: Metastore, channel: grpc.aio.Channel, snapshotters: frozenset[str]
) -> dict[SnapshotID, Snapshot]:
    stub = snapshots_pb2_grpc.SnapshotsStub(channel)  # type: ignore[no-untyped-call]
    ours: dict[tuple[str, str], list[Snapshot]] = {}
    for snapshot in await metastore.snapshots():
        namespace, number, name = (*snapshot.name.split("/", 2), "", "")[:3]
        # Other names nobody has by way of containerd.
        if snapshot.snapshotter in snapshotters and name and number.isdigit():
            ours.setdefault((snapshot.snapshotter, namespace), []).append(snapshot)
    found = {}
    for (snapshotter, namespace), snapshots in ours.items():
        try:
            metadata = Caller(namespace).metadata()
        except InvalidArgument:
            continue  # a spoilt row
        known = set()
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter)
        async for reply in stub.List(request, timeout=_CALL_SECONDS, metadata=metadata):
            known |= {info.name for info in reply.info}
        # Of two with one name containerd has the later one.
        for snapshot in reversed(snapshots):
            name = snapshot.name.split("/", 2)[2]
            if name in known:
                known.discard(name)
            else:
                found[snapshot.id] = snapshot
    return found
