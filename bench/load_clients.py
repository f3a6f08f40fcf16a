# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, each with keys of its own, mixing all calls; each answer is checked. A program of its own, that
its work in Python is not counted as the daemon's: its parameters on stdin, its report on stdout, both JSON."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any, Final

import grpc

from bench.load_store import HOST, KATA
from snapshotter.api.proto import diff_pb2, diff_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc, types_pb2

_TAR: Final = "application/vnd.oci.image.layer.v1.tar"


class Wrong(Exception):
    """An answer that no order of the calls explains."""


class _Calls:
    """The stubs, with the time of each call."""

    def __init__(self, channel: grpc.aio.Channel, seconds: dict[str, list[float]]) -> None:
        snapshots, diff = snapshots_pb2_grpc.SnapshotsStub(channel), diff_pb2_grpc.DiffStub(channel)  # type: ignore[no-untyped-call]
        self._stubs = {"Apply": diff.Apply, **{name: getattr(snapshots, name) for name in _REQUESTS}}
        self._seconds = seconds

    async def __call__(self, method: str, expected: str = "OK", **fields: Any) -> Any:
        """Raises Wrong where it does not end as expected."""
        request = _REQUESTS[method](**fields) if method in _REQUESTS else fields["request"]
        started = time.monotonic()
        answer, code = None, "OK"
        try:
            if method == "List":
                answer = [info async for part in self._stubs[method](request) for info in part.info]
            else:
                answer = await self._stubs[method](request)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            if code != expected:
                raise Wrong(f"{method} of {fields}: {code}, not {expected}: {error.details()}") from None
        self._seconds.setdefault(method, []).append(time.monotonic() - started)
        if code != expected:
            raise Wrong(f"{method} of {fields}: {code}, not {expected}")
        return answer


_REQUESTS: Final[dict[str, Any]] = {
    "Prepare": snapshots_pb2.PrepareSnapshotRequest,
    "View": snapshots_pb2.ViewSnapshotRequest,
    "Mounts": snapshots_pb2.MountsRequest,
    "Commit": snapshots_pb2.CommitSnapshotRequest,
    "Remove": snapshots_pb2.RemoveSnapshotRequest,
    "Stat": snapshots_pb2.StatSnapshotRequest,
    "Update": snapshots_pb2.UpdateSnapshotRequest,
    "List": snapshots_pb2.ListSnapshotsRequest,
    "Usage": snapshots_pb2.UsageRequest,
    "Cleanup": snapshots_pb2.CleanupRequest,
}


def _check(what: bool, said: str) -> None:
    if not what:
        raise Wrong(said)


async def _container(call: _Calls, number: int, turn: int, images: list[str]) -> None:
    name = (HOST, KATA)[number % 2]
    of = {"snapshotter": name, "key": f"load/{turn}/container-{number}"}
    parent = random.choice(images)
    prepared = await call("Prepare", **of, parent=parent, labels={"a": "1"})
    _check((await call("Mounts", **of)).mounts == prepared.mounts, f"{of}: other mounts than Prepare said")
    await call("Prepare", "ALREADY_EXISTS", **of, parent=parent)
    info = (await call("Stat", **of)).info
    _check((info.kind, info.parent, dict(info.labels)["a"]) == (snapshots_pb2.ACTIVE, parent, "1"), f"{of}: {info}")
    changed = snapshots_pb2.Info(name=of["key"], labels={"b": "2"})
    await call("Update", snapshotter=name, info=changed)
    listed = await call("List", snapshotter=name, filters=[f'name=="{of["key"]}"'])
    _check([dict(each.labels) for each in listed] == [{"b": "2"}], f"{of}: labels {listed}")
    await call("Usage", **of)
    view = {"snapshotter": name, "key": f"load/{turn}/view-{number}"}
    await call("View", **view, parent=parent)
    await call("Remove", "FAILED_PRECONDITION", snapshotter=name, key=parent)
    await call("Remove", **view)
    await call("Remove", **of)
    await call("Remove", "NOT_FOUND", **of)
    await call("Stat", "NOT_FOUND", **of)


async def _pull(call: _Calls, number: int, turn: int, blobs: list[tuple[str, int]]) -> None:
    """One layer, of few, under a name of this client's."""
    name = (HOST, KATA)[number % 2]
    digest, size = blobs[(number + turn) % len(blobs)]
    key, committed = f"load{number}/{turn}/extract-1 {digest}", f"load{number}/{turn}/{digest}"
    of = {"snapshotter": name, "key": key}
    prepared = await call("Prepare", **of)
    blob = types_pb2.Descriptor(media_type=_TAR, digest=digest, size=size)
    applied = await call("Apply", request=diff_pb2.ApplyRequest(diff=blob, mounts=prepared.mounts))
    _check(applied.applied.digest == digest, f"{of}: diff ID {applied.applied.digest}")
    await call("Commit", **of, name=committed)
    info = (await call("Stat", snapshotter=name, key=committed)).info
    _check(info.kind == snapshots_pb2.COMMITTED, f"{committed}: {info}")
    _check((await call("Usage", snapshotter=name, key=committed)).size > 0, f"{committed}: no usage")
    await call("Commit", "ALREADY_EXISTS", **of, name=committed)
    await call("Mounts", "FAILED_PRECONDITION", snapshotter=name, key=committed)
    await call("Remove", snapshotter=name, key=committed)
    await call("Cleanup", snapshotter=name)


async def _client(
    address: str, number: int, until: float, asked: dict[str, Any], seconds: dict[str, list[float]]
) -> int:
    turn = 0
    async with grpc.aio.insecure_channel(f"unix:{address}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = _Calls(channel, seconds)
        while time.monotonic() < until:
            turn += 1
            if (number + turn) % 8:
                await _container(call, number, turn, asked["images"])
            else:
                await _pull(call, number, turn, asked["blobs"])
    return turn


async def _main(asked: dict[str, Any]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    until = time.monotonic() + asked["seconds"]
    clients = [_client(asked["address"], number, until, asked, seconds) for number in range(asked["clients"])]
    ended = await asyncio.gather(*clients, return_exceptions=True)
    wrong = Counter(f"{type(each).__name__}: {each}" for each in ended if isinstance(each, BaseException))
    return {"seconds": seconds, "wrong": [text for text, _ in wrong.most_common(5)], "failed": wrong.total()}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_main(json.load(sys.stdin)))))
