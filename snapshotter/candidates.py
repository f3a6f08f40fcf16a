# SPDX-License-Identifier: Apache-2.0
"""The layer that completes a chain ID, where no Apply names its blob: containerd 1.6 has no diff plugins.

Any image can list another's diff IDs beside blobs of its own. So a chain ID has candidates, and what
each is, its build finds out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from snapshotter.builder import Builder
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import DataLoss, NotFound, SnapshotterError, Unavailable, translate
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, Metastore, Snapshot, SnapshotID
from snapshotter.names import ChainID, chain_id

_POLL_SECONDS: Final = (0.05, 2.0)  # first and longest wait for a blob that is still being fetched


class Candidates:
    """`formats`: of each snapshotter's name."""

    def __init__(self, formats: Mapping[str, str], metastore: Metastore, builder: Builder, content: Content) -> None:
        self._formats = formats
        self._metastore, self._builder, self._content = metastore, builder, content
        self._early: dict[SnapshotID, asyncio.Task[None]] = {}
        # What failed for a snapshot is not tried again for it; None: it is another layer.
        self._struck: dict[SnapshotID, dict[Blob, SnapshotterError | None]] = {}
        self._log = get_logger()

    async def layer(
        self, snapshot: Snapshot, chain: ChainID, parent_chain: ChainID | None, caller: Caller
    ) -> Layer | None:
        """None where no blob of the store is the layer. Raises what the first candidate failed with that failed."""
        layer_format = self._formats[snapshot.snapshotter]
        struck = self._struck.setdefault(snapshot.id, {})
        known: list[Blob] = []
        unknown: list[Blob] = []
        for blob in await self._content.candidates(chain):
            if blob in struck:
                continue
            diff_id = await self._builder.mapping(blob)
            if diff_id is None:
                unknown.append(blob)
            elif chain_id(parent_chain, diff_id) == chain:
                known.append(blob)
            else:
                struck[blob] = None
        # One that is built already first: containerd waits in its write transaction.
        for blob in (*known, *unknown):
            try:
                layer = await self._builder.build(blob, layer_format, caller)
            except (Unavailable, NotFound):
                continue  # may be there the next time
            except SnapshotterError as error:
                struck[blob] = error
                continue
            if chain_id(parent_chain, layer.diff_id) == chain:
                return layer
            self._log.warning("blob is not the layer that an image claims", blob=blob.digest, chain_id=chain)
            struck[blob] = None
        failure = next((error for error in struck.values() if error is not None), None)
        if failure is not None:
            raise failure
        if rotten := self._content.rotten(chain):
            raise DataLoss(rotten)
        return None

    def build_early(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        """As soon as a blob is complete, for Commit to find or to join."""
        task = asyncio.create_task(self._build_early(snapshot, chain, caller))
        self._early[snapshot.id] = task
        task.add_done_callback(lambda _: self._early.pop(snapshot.id, None))

    async def _build_early(self, snapshot: Snapshot, chain: ChainID, caller: Caller) -> None:
        wait, longest = _POLL_SECONDS
        try:
            parent = await self._metastore.by_id(snapshot.parent_id) if snapshot.parent_id else None
            while True:
                with suppress(SnapshotterError):  # Commit meets it again, and tells it
                    if await self.layer(snapshot, chain, parent.chain_id if parent else None, caller):
                        return
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
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
        self._struck.pop(snapshot_id, None)

    async def close(self) -> None:
        tasks = list(self._early.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
