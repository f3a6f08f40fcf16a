# SPDX-License-Identifier: Apache-2.0
"""The layer that completes a chain ID, where no Apply names its blob: containerd 1.6 has no diff plugins.

What its diff ID is, the chain ID says: it is a hash of that and of the chain below, so that every image
that has it has the same. But any image can list it beside blobs of its own. So a chain ID has
candidates, and what each is, its build finds out. No parent is needed for any of this: it may come only
with the Commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from policy.chain import ChainID
from snapshotter.builder import Builder
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import (
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    OverLimit,
    SnapshotterError,
    translate,
)
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, Snapshot, SnapshotID

_POLL_SECONDS: Final = (0.05, 2.0)  # first and longest wait for a blob that is still being fetched
_RETRY_SECONDS: Final = (1.0, 60.0)  # and for what kept a build from its end to pass
# What the same bytes end in again. All else passes: a worker that was killed, a full disk.
_LASTING: Final = (InvalidArgument, DataLoss, OverLimit, DeadlineExceeded)


class Candidates:
    """`formats`: of each snapshotter's name."""

    def __init__(self, formats: Mapping[str, str], builder: Builder, content: Content) -> None:
        self._formats = formats
        self._builder, self._content = builder, content
        self._early: dict[SnapshotID, asyncio.Task[None]] = {}
        # What is known of blobs, for a snapshot: a diff ID, or why none will ever come of it.
        self._known: dict[SnapshotID, dict[Blob, str | SnapshotterError]] = {}
        self._log = get_logger()

    async def layer(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> Layer | None:
        """None where no blob of the store is the layer. Raises what a candidate failed with, one that may yet succeed
        before one that will not."""
        known = self._known.get(snapshot.id, {})
        diff_id, blobs = await self._content.candidates(chain)
        built: list[Blob] = []
        unknown: list[Blob] = []
        for blob in blobs:
            what = known.get(blob) or await self._builder.mapping(blob)
            if what is None:
                unknown.append(blob)
            elif what == diff_id:
                built.append(blob)
        passing: SnapshotterError | None = None
        # One that is built already first: containerd waits in its write transaction.
        for blob in (*built, *unknown):
            try:
                layer = await self._builder.build(blob, self._formats[snapshot.snapshotter], caller)
            except NotFound:
                continue  # not for this caller, or not any more
            except SnapshotterError as error:
                if isinstance(error, _LASTING):
                    known = self._learn(snapshot, blob, error)
                else:
                    passing = passing or error
                continue
            if layer.diff_id == diff_id:
                return layer
            self._log.warning("blob is not the layer that an image claims", blob=blob.digest, chain_id=chain)
            known = self._learn(snapshot, blob, layer.diff_id)
        failure = passing or next((what for what in known.values() if isinstance(what, SnapshotterError)), None)
        if failure is not None:
            raise failure
        if rotten := self._content.rotten(chain):
            raise DataLoss(rotten)
        return None

    def _learn(
        self, snapshot: Snapshot, blob: Blob, what: str | SnapshotterError
    ) -> dict[Blob, str | SnapshotterError]:
        """All that is known for the snapshot now."""
        known = self._known.setdefault(snapshot.id, {})
        known[blob] = what
        return known

    def build_early(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        """As soon as a blob is complete, for Commit to find or to join."""
        task = asyncio.create_task(self._build_early(snapshot, chain, caller))
        self._early[snapshot.id] = task
        task.add_done_callback(lambda _: self._early.pop(snapshot.id, None))

    async def _build_early(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        poll, retry = _POLL_SECONDS[0], _RETRY_SECONDS[0]
        try:
            while True:
                try:
                    if await self.layer(snapshot, chain, caller):
                        return
                except SnapshotterError as error:  # Commit meets it again, and tells it
                    if not isinstance(error, _LASTING):
                        await asyncio.sleep(retry)
                        retry = min(2 * retry, _RETRY_SECONDS[1])
                await asyncio.sleep(poll)
                poll = min(2 * poll, _POLL_SECONDS[1])
        except Exception as error:
            self._log.error("early build gave up", key=snapshot.name, error=str(translate(error)))

    def stop(self, snapshot_id: SnapshotID) -> None:
        """The build itself goes on for whoever asks for it again."""
        task = self._early.pop(snapshot_id, None)
        if task is not None:
            task.cancel()

    def forget(self, snapshot_id: SnapshotID) -> None:
        """The snapshot is committed or gone."""
        self.stop(snapshot_id)
        self._known.pop(snapshot_id, None)

    async def close(self) -> None:
        tasks = list(self._early.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
