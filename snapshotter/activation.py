# SPDX-License-Identifier: Apache-2.0
"""Layer files that are mounted on the host, at <root>/m/ID.

Whether a layer is mounted is read from the kernel, never remembered: a daemon that starts again
knows its mounts at once. Names are short, for the options of one mount(2) call share a page.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from blockdev.formats.layer_file import format_named
from blockdev.kernel import mounts
from snapshotter.errors import DataLoss
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import Layer, LayerID
from snapshotter.tasks import to_the_end


class BrokenLayer(DataLoss):
    """The file is not the layer that its row describes: it is not handed to the kernel."""

    def __init__(self, layer: Layer, why: str) -> None:
        super().__init__(f"layer {layer.diff_id}: its file {why}; remove the image from containerd and pull it again")
        self.layer = layer


class Activation:
    def __init__(self, root: Path, store: LayerStore) -> None:
        self._directory = root / "m"
        self._store = store
        # Who mounts asks what is to be mounted, and who releases what is in use, while nobody else does either.
        self._lock = asyncio.Lock()

    def prepare(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def _point(self, layer_id: LayerID) -> Path:
        return self._directory / format(layer_id, "x")

    async def ensure(self, layers: Callable[[], Awaitable[Sequence[Layer]]]) -> list[Path]:
        """Mount points of the layers, in their order, mounting what is not. Raises KernelError, BrokenLayer, and
        what `layers` raises: it is asked when no release can come in between."""
        async with self._lock:
            wanted = await layers()
            return await to_the_end(asyncio.to_thread(self._ensure, wanted))

    def _ensure(self, layers: Sequence[Layer]) -> list[Path]:
        there = self.mounted()
        for layer in layers:
            if layer.id not in there:
                why = self._store.contradiction(layer)
                if why:
                    raise BrokenLayer(layer, why)
                point = self._point(layer.id)
                point.mkdir(mode=0o700, exist_ok=True)
                block_bytes = format_named(layer.format).block_bytes
                mounts.mount_erofs(self._store.path(layer.diff_id, layer.format), point, block_bytes)
                there.add(layer.id)
        return [self._point(layer.id) for layer in layers]

    async def release_unused(self, in_use: Callable[[], Awaitable[set[LayerID]]]) -> None:
        """Unmount what no container needs. Raises KernelError, and what `in_use` raises."""
        async with self._lock:
            needed = await in_use()
            await to_the_end(asyncio.to_thread(self._release, needed))

    def _release(self, needed: set[LayerID]) -> None:
        for layer_id in self._entries():
            if layer_id not in needed:
                # An overlay above holds its own clone of the mount. Who else looks in keeps it until he goes.
                mounts.unmount(self._point(layer_id), lazily=True)
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if not _is_id(name) or LayerID(int(name, 16)) not in needed:
                with suppress(OSError):
                    (self._directory / name).rmdir()

    def mounted(self) -> set[LayerID]:
        """Raises KernelError."""
        return set(self._entries())

    def _entries(self) -> list[LayerID]:
        """One for each mount: two on one point would be two."""
        names = [Path(entry.mount_point).name for entry in mounts.mounted_below(self._directory)]
        return [LayerID(int(name, 16)) for name in names if _is_id(name)]


def _is_id(name: str) -> bool:
    return bool(name) and all(char in "0123456789abcdef" for char in name)
