# SPDX-License-Identifier: Apache-2.0
"""Layer files under the names that a runtime knows them by: hard links, one for each chain ID in a links directory.

They are derived: a snapshot's row says in which directory its layer has one, and a link is there as long as any row
says so, of whatever namespace or snapshotter's name. It is made before the row and goes after it; what a crash leaves
between, the next start finishes. Hence nothing here is synced.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from policy.chain import ChainID, layer_name
from snapshotter.activation import BrokenLayer
from snapshotter.contracts.mount import Lower
from snapshotter.errors import ConfigError, FailedPrecondition, ResourceExhausted, SnapshotterError
from snapshotter.layerstore import LayerStore
from snapshotter.log import get_logger
from snapshotter.metastore import Kind, Layer, LayerState, Metastore, Snapshot
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

# With a dot in front: one that is about to take the place of another.
_OURS: Final = re.compile(r"\.?[0-9a-f]{64}\Z")
_PROBE: Final = "." + "0" * 64


class Links:
    """`directories`: of the snapshotters' names that have one, as the configuration writes it."""

    def __init__(self, directories: Mapping[str, Path], metastore: Metastore, store: LayerStore) -> None:
        self._directories = dict(directories)
        self._metastore, self._store = metastore, store
        # Held from a link to its row, and from a row that has gone to its link.
        self._lock = asyncio.Lock()
        self._log = get_logger()

    def prepare(self) -> None:
        """Raises ConfigError for a directory in which no link can be made, or that somebody else could change."""
        seen: dict[tuple[int, int], Path] = {}
        for name, directory in self._directories.items():
            where = f"snapshotters.{name}.layers: {directory}"
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = directory.stat()
                if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise ConfigError(f"{where} can be written by others than root")
                if seen.setdefault((found.st_dev, found.st_ino), directory) != directory:
                    raise ConfigError(f"{where} is the directory of another name, which must write it the same way")
                self._try(directory)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise ConfigError(
                        f"{where} is not on the file system of root, {self._store.root}: it gets hard links to layers"
                    ) from None
                raise ConfigError(f"{where}: {error}") from None

    def _try(self, directory: Path) -> None:
        """By a link: two mounts of one file system look the same, and take none between them."""
        source, target = self._store.staging / _PROBE, directory / _PROBE
        try:
            source.touch(0o600)
            target.unlink(missing_ok=True)
            os.link(source, target)
        finally:
            for path in (source, target):
                path.unlink(missing_ok=True)

    @asynccontextmanager
    async def made(self, snapshotter: str, chain: ChainID | None, layer: Layer) -> AsyncIterator[str]:
        """The directory to record with the snapshot that is committed within, in which its layer has its link; "" where
        the name has none. Raises FailedPrecondition (no chain ID, or it is another layer's there), BrokenLayer,
        ResourceExhausted, OSError; where what is done within raises, no link stays for it."""
        directory = self._directories.get(snapshotter)
        if directory is None:
            yield ""
            return
        if chain is None:
            raise FailedPrecondition(f"layer {layer.diff_id} has no chain ID, by which {snapshotter} names its file")
        async with self._lock:
            try:
                await self._make(directory, chain, layer)
                trace("links.made")
                yield str(directory)
            except BaseException:
                await self._remove_unused(str(directory), chain)
                raise

    async def release(self, gone: Snapshot) -> None:
        """Of a snapshot that was removed. Raises OSError."""
        if gone.links and gone.chain_id:
            async with self._lock:
                await self._remove_unused(gone.links, gone.chain_id)

    async def ensure(self, snapshot: Snapshot, layers: Callable[[], Awaitable[Sequence[Layer]]]) -> list[Lower]:
        """The layers below a container's snapshot and their files, in their order, after a look at each; a link that
        was lost is made again. Raises BrokenLayer, FailedPrecondition, OSError, and what `layers` raises."""
        directory = self._directories[snapshot.snapshotter]
        found = await layers()
        chains = await self._metastore.chain_ids(snapshot.parent_id)
        pairs = list(zip(chains, found, strict=False))
        named = [(directory / layer_name(chain), chain, layer) for chain, layer in pairs if chain]
        if not len(named) == len(chains) == len(found):
            raise FailedPrecondition(f"a layer below snapshot {snapshot.name!r} has no chain ID, by which it is named")
        lost = await asyncio.to_thread(self._look_at, [(path, layer) for path, _, layer in named])
        if lost:
            async with self._lock:
                await layers()  # raises, where the snapshot has gone since: nothing is made for nobody
                for path, chain, layer in named:
                    if path in lost:
                        await self._make(directory, chain, layer)
        return [Lower(path, layer.format, layer.root_hash) for path, _, layer in named]

    def _look_at(self, layers: Iterable[tuple[Path, Layer]]) -> set[Path]:
        lost = set()
        for path, layer in layers:
            why = self._store.contradiction(layer)
            if why:
                raise BrokenLayer(layer, why)
            if not self._is_link(layer, path):
                lost.add(path)
        return lost

    async def renew(self, layer: Layer) -> None:
        """The layer has a new file: its links go there. What fails is logged: the next container's mounts do it."""
        async with self._lock:
            for directory, chain in await self._metastore.links_of(layer.id):
                try:
                    await self._make(Path(directory), chain, layer)
                    trace("links.renewed")
                except (OSError, SnapshotterError) as error:
                    self._log.error("a link is not renewed", directory=directory, chain_id=chain, error=str(error))

    def look(self, snapshots: Iterable[Snapshot], layers: Iterable[Layer]) -> tuple[list[Snapshot], list[Path]]:
        """At a start: committed snapshots whose link or row is not as it should be, and links of no snapshot."""
        ready = {layer.id: layer for layer in layers if layer.state is LayerState.READY}
        unsettled, wanted = [], set()
        for snapshot in snapshots:
            if snapshot.kind is not Kind.COMMITTED or snapshot.layer_id is None or snapshot.chain_id is None:
                continue
            directory = self._directories.get(snapshot.snapshotter)
            layer = ready.get(snapshot.layer_id)
            if directory is not None:
                path = directory / layer_name(snapshot.chain_id)
                wanted.add(path)
                if layer is not None and not self._is_link(layer, path):
                    unsettled.append(snapshot)
                    continue
            if snapshot.links != str(directory or ""):
                unsettled.append(snapshot)
        # What is given up first: its place may be another's now.
        unsettled.sort(key=lambda snapshot: snapshot.snapshotter in self._directories)
        strays = []
        for directory in sorted(set(self._directories.values())):
            names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False))
            strays += [directory / name for name in names if _OURS.match(name) and directory / name not in wanted]
        return unsettled, strays

    async def drop_stray(self, path: Path) -> None:
        """Unless a snapshot has come that wants it. Raises OSError."""
        async with self._lock:
            wanted = await self._metastore.chains_linked(str(path.parent))
            if path.name not in map(layer_name, wanted):
                await asyncio.to_thread(path.unlink, missing_ok=True)
                trace("links.stray_removed")

    async def settle(self, snapshot: Snapshot) -> None:
        """Link and row of a committed snapshot as the configuration has them now. Raises as `made`."""
        directory = self._directories.get(snapshot.snapshotter)
        chain, old = snapshot.chain_id, snapshot.links
        if chain is None or snapshot.layer_id is None:
            return
        async with self._lock:
            if directory is not None:
                layer = await self._metastore.layer_by_id(snapshot.layer_id)
                if layer is not None and layer.state is LayerState.READY:
                    await self._make(directory, chain, layer)
                    trace("links.made_again")
            await self._metastore.set_links(snapshot.id, str(directory or ""))
            if old and old != str(directory or ""):
                await self._remove_unused(old, chain)

    async def _make(self, directory: Path, chain: ChainID, layer: Layer) -> None:
        """With the lock held."""
        other = await self._metastore.linked_layer(str(directory), chain)
        if other not in (None, layer.id):
            raise FailedPrecondition(
                f"{directory} has chain ID {chain} in another format: a links directory has one; remove the images"
                " of the name's former format, or give it another directory (`layers`)"
            )
        await to_the_end(asyncio.to_thread(self._link, layer, directory / layer_name(chain)))

    def _link(self, layer: Layer, path: Path) -> None:
        source = self._store.path(layer.diff_id, layer.format)
        aside = path.with_name(f".{path.name}")
        try:
            try:
                os.link(source, path)
            except FileExistsError:
                if self._is_link(layer, path):
                    return
                # Never is a name without its file: a runtime may be about to open it.
                aside.unlink(missing_ok=True)
                os.link(source, aside)
                trace("links.aside")
                os.rename(aside, path)
        except FileNotFoundError as error:
            if source.exists():
                raise
            raise BrokenLayer(layer, error.strerror or str(error)) from None
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            raise ResourceExhausted(f"layer {layer.diff_id}: the file system takes no more links to its file") from None

    def _is_link(self, layer: Layer, path: Path) -> bool:
        with suppress(FileNotFoundError):
            source = self._store.path(layer.diff_id, layer.format)
            return os.path.samestat(os.lstat(source), os.lstat(path))
        return False

    async def _remove_unused(self, directory: str, chain: ChainID) -> None:
        """With the lock held."""
        if await self._metastore.linked_layer(directory, chain) is None:
            path = Path(directory, layer_name(chain))
            await asyncio.to_thread(path.unlink, missing_ok=True)
            trace("links.removed")
