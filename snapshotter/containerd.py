# SPDX-License-Identifier: Apache-2.0
"""containerd as we call it: leases, and what its refusals are to our caller."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import grpc

from snapshotter.api.proto import leases_pb2, leases_pb2_grpc
from snapshotter.content import Caller
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapshotterError,
    Unavailable,
)
from snapshotter.log import get_logger

CALL_SECONDS: Final = 10.0
_EXPIRES: Final = "containerd.io/gc.expire"
_FAMILY: Final = {
    kind.code: kind for kind in (AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted)
}


def refused(what: str, code: grpc.StatusCode, details: str | None) -> SnapshotterError:
    """The family's member for how a call of ours ended; `what` it was about."""
    return _FAMILY.get(code, Unavailable)(f"containerd's {what}: {details or code.name}")


class Leases:
    """What a lease names, containerd's garbage collection leaves, at most until the lease expires."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = leases_pb2_grpc.LeasesStub(channel)  # type: ignore[no-untyped-call]
        self._metadata = caller.metadata()

    async def create(self, name: str, seconds: int) -> None:
        """Raises SnapshotterError."""
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        request = leases_pb2.CreateRequest(id=name, labels={_EXPIRES: until.strftime("%Y-%m-%dT%H:%M:%SZ")})
        try:
            await self._stub.Create(request, metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise refused("leases", error.code(), error.details()) from None

    async def add_content(self, name: str, digest: str) -> None:
        """Raises SnapshotterError."""
        resource = leases_pb2.Resource(id=digest, type="content")
        request = leases_pb2.AddResourceRequest(id=name, resource=resource)
        try:
            await self._stub.AddResource(request, metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise refused("leases", error.code(), error.details()) from None

    async def delete(self, name: str) -> None:
        """Never raises: what cannot be deleted expires."""
        try:
            await self._stub.Delete(leases_pb2.DeleteRequest(id=name), metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            get_logger().warning("a lease stays until it expires", lease=name, error=error.details())
