# SPDX-License-Identifier: Apache-2.0
"""Layer files that are mounted on the host, at <root>/m/ID; for a container in a user namespace the same mounts once
more with its IDs, in the directory of its snapshot.

Whether a layer is mounted is read from the kernel, never remembered: a daemon that starts again
knows its mounts at once. Names are short, for the options of one mount(2) call share a page.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from blockdev.errors import KernelError
from blockdev.formats.layer_file import format_named
from blockdev.kernel import devmapper, idmap, mounts
from snapshotter.contracts.mount import Lower
from snapshotter.errors import ConfigError, DataLoss
from snapshotter.idmap import IDMapping
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import Layer, LayerID
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace


class BrokenLayer(DataLoss):
    """The file is not the layer that its row describes: it is not handed to the kernel."""

    def __init__(self, layer: Layer, why: str, advice: str = "`tardevctl fsck --repair` may build it again") -> None:
        super().__init__(f"layer {layer.diff_id}: its file {why}; {advice}")
        self.layer, self.why = layer, why


class Activation:
    def __init__(self, root: Path, store: LayerStore, *, always_loop: bool = False, verity: bool = False) -> None:
        """`always_loop`: not even where the kernel can is a layer mounted straight from its file. `verity`: through a
        dm-verity device, so that no block is read that the row's root hash does not vouch for."""
        self._directory = root / "m"
        self._verity = verity
        # Of devices: another daemon's root has another one.
        self._prefix = f"tardev-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-"
        self._store = store
        self._file_backed = False if always_loop else None
        # Who mounts asks what is to be mounted, and who releases what is in use, while nobody else does either.
        self._lock = asyncio.Lock()

    def prepare(self) -> None:
        """A mount point that a killed daemon had made, and nothing on it yet, goes. Raises OSError; ConfigError where
        layers are to be verified and the kernel has nothing for it."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._verity:
            try:
                devmapper.check()
            except KernelError as error:
                raise ConfigError(f'host.verity = "require": {error}') from None
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            with suppress(OSError):  # one that is mounted on is busy
                (self._directory / name).rmdir()

    def layer_at(self, path: str) -> LayerID | None:
        """The layer whose mount point this path would be."""
        point = Path(path)
        return LayerID(int(point.name, 16)) if point.parent == self._directory and _is_id(point.name) else None

    async def ensure(
        self,
        layers: Callable[[], Awaitable[Sequence[Layer]]],
        mapped: tuple[Path, IDMapping] | None = None,
    ) -> list[Lower]:
        """The layers at their mount points, in order, mounting what is not: all of it or, where it raises, nothing.

        `mapped`: those in this directory, with these IDs; whoever removes it unmounts them. Raises KernelError,
        BrokenLayer, and what `layers` raises: it is asked when no release can come in between.
        """
        async with self._lock:
            wanted = await layers()
            return await to_the_end(asyncio.to_thread(self._ensure, wanted, mapped))

    def _ensure(self, layers: Sequence[Layer], mapped: tuple[Path, IDMapping] | None) -> list[Lower]:
        """Costs a look at each layer of the chain, whatever else is mounted on the host."""
        wanted = {format(layer.id, "x"): layer for layer in layers}
        directory, there = self._directory, self._mounted_at(wanted)
        made: list[Path] = []
        try:
            for name, layer in wanted.items():
                why = self._store.contradiction(layer)
                if why:
                    raise BrokenLayer(layer, why)
                if name not in there:
                    self._mount(layer, directory / name)
                    made.append(directory / name)
            if mapped:
                _map(directory, wanted, *mapped)
                directory, _ = mapped
        except BaseException:
            for point in reversed(made):
                _unmount_all(point)
            raise
        return [Lower(directory / format(layer.id, "x"), layer.format, layer.root_hash) for layer in layers]

    def _mounted_at(self, names: Iterable[str]) -> set[str]:
        """Where layers are to be verified, those only that are: another configuration may have mounted the others."""
        found = mounts.mounted_at(self._directory, names)
        if self._verity:
            major = devmapper.major()
            found = {name for name in found if os.major(os.lstat(self._directory / name).st_dev) == major}
        return found

    def _mount(self, layer: Layer, point: Path) -> None:
        point.mkdir(mode=0o700, exist_ok=True)
        trace("activation.made")
        try:
            self._mount_file(layer, point)
        except BaseException:
            with suppress(OSError):
                point.rmdir()
            raise
        trace("activation.mounted")

    def _mount_file(self, layer: Layer, point: Path) -> None:
        file, layer_format = self._store.path(layer.diff_id, layer.format), format_named(layer.format)
        if not self._verity:
            mounts.mount_erofs(file, point, layer_format.block_bytes, file_backed=self._file_backed)
            return
        geometry = layer_format.geometry(layer.data_size_bytes)
        name = f"{self._prefix}{layer.id:x}-{os.urandom(4).hex()}"
        mounts.mount_verified(file, point, layer_format.block_bytes, geometry, bytes.fromhex(layer.root_hash), name)

    async def renew(self, layer: Layer) -> None:
        """The layer has a new file: what is mounted from now on shows that. Raises KernelError.

        On top of the old mount, so that there is no moment without one; what stands on that keeps it.
        """
        async with self._lock:
            await to_the_end(asyncio.to_thread(self._renew, layer))

    def _renew(self, layer: Layer) -> None:
        name = format(layer.id, "x")
        if mounts.mounted_at(self._directory, [name]):
            self._mount_file(layer, self._directory / name)
            trace("activation.renewed")

    async def release_unused(self, in_use: Callable[[], Awaitable[set[LayerID] | None]]) -> None:
        """Unmount what no container needs; nothing where `in_use` says None, for all that is mounted.

        Raises KernelError, and what `in_use` raises.
        """
        async with self._lock:
            needed = await in_use()
            if needed is not None:
                await to_the_end(asyncio.to_thread(self._release, needed))

    def _release(self, needed: set[LayerID]) -> None:
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if not _is_id(name):
                with suppress(OSError):
                    (self._directory / name).rmdir()
            elif LayerID(int(name, 16)) not in needed:
                _unmount_all(self._directory / name)

    async def unused_devices(self) -> list[str]:
        """Names of verity devices that a crash left between their making and their mount. Raises KernelError."""
        async with self._lock:
            return await to_the_end(asyncio.to_thread(devmapper.unused, self._prefix))

    def held(self) -> tuple[int, int]:
        """(mounts of layers, devices that they have): loop devices, and dm devices above such. Raises KernelError."""
        entries = [entry for entry in mounts.mounted_below(self._directory) if _is_id(Path(entry.mount_point).name)]
        return len(entries), sum(entry.source.startswith("/dev/") for entry in entries)

    def mounted(self) -> set[LayerID]:
        """From mountinfo, as a new daemon learns of the mounts of the one before it. Raises KernelError."""
        names = [Path(entry.mount_point).name for entry in mounts.mounted_below(self._directory)]
        return {LayerID(int(name, 16)) for name in names if _is_id(name)}


def _map(plain: Path, names: Collection[str], directory: Path, mapping: IDMapping) -> None:
    """The same mounts with these IDs. What fails between two of them the remover of the directory unmounts."""
    missing = set(names) - mounts.mounted_at(directory, names)
    if missing:
        directory.mkdir(mode=0o700, exist_ok=True)
        with idmap.user_namespace(*mapping.maps) as user_namespace_fd:
            for name in missing:
                (directory / name).mkdir(mode=0o700, exist_ok=True)
                idmap.mount_mapped(plain / name, directory / name, user_namespace_fd)
                trace("activation.mapped")


def _unmount_all(point: Path) -> None:
    """Whatever is mounted there, and the directory. Raises KernelError."""
    # An overlay above holds its own clone of the mount. Who else looks in keeps it until he goes.
    while mounts.unmount(point, lazily=True):
        trace("activation.unmounted")
    with suppress(OSError):
        point.rmdir()
        trace("activation.released")


def _is_id(name: str) -> bool:
    return bool(name) and all(char in "0123456789abcdef" for char in name)
