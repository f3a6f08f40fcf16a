# SPDX-License-Identifier: Apache-2.0
"""Layer files on disk: <root>/layers/FORMAT/HEX, and <root>/staging for what is being written.

A file in `layers` is whole: it was synced, then renamed, then its directory was synced. Whether it is
also a layer is for the metadata to say. Beside it there may be its sidecar. <root>/tables/FORMAT/HEX is the
table of the directories that a layer made for want of an entry, which most have none of: there before the
layer, gone after it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blockdev.errors import FormatError
from blockdev.formats.layer_file import STORED_FORMATS, format_named, open_layer_file
from snapshotter.contracts import kata_erofs
from snapshotter.errors import ResourceExhausted
from snapshotter.metastore import Layer
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace


@dataclass(frozen=True, slots=True)
class Staged:
    """Three empty files of one build. Spool and table have no name: they are gone with their descriptors."""

    fd: int
    spool_fd: int
    path: Path
    table_fd: int


class LayerStore:
    def __init__(self, root: Path, *, reserve_bytes: int = 0) -> None:
        self.root = root
        self.staging = root / "staging"
        self._layers = root / "layers"
        self._tables = root / "tables"
        self._reserve = reserve_bytes
        # By file, of those that contradicted nothing when they were read.
        self._sound: dict[Path, tuple[object, ...]] = {}

    def prepare(self) -> None:
        for directory in (
            self.staging,
            self._layers,
            self._tables,
            *(directory / name for directory in (self._layers, self._tables) for name in STORED_FORMATS),
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(self._layers)
        sync_directory(self._tables)
        sync_directory(self.root)

    def path(self, diff_id: str, format: str) -> Path:
        return self._layers / format / diff_id.removeprefix("sha256:")

    def sidecar_path(self, diff_id: str, format: str) -> Path:
        return kata_erofs.sidecar_path(self.path(diff_id, format))

    def table_path(self, diff_id: str, format: str) -> Path:
        return self._tables / format / diff_id.removeprefix("sha256:")

    @asynccontextmanager
    async def staged(self) -> AsyncIterator[Staged]:
        """What `publish` has not taken is gone at the end. Raises ResourceExhausted below the reserve, OSError."""
        space = os.statvfs(self.staging)
        if space.f_bavail * space.f_frsize < self._reserve:
            raise ResourceExhausted(f"less than {self._reserve} bytes are free below {self.root}: no build is started")
        fd, name = tempfile.mkstemp(dir=self.staging)
        opened = [fd]

        def discard() -> None:
            with suppress(FileNotFoundError):
                os.unlink(name)
                trace("staged.discarded")
            for each in opened:
                os.close(each)

        try:
            for mode in (0o600, 0o400):
                opened.append(os.open(self.staging, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode))
            yield Staged(fd, opened[1], Path(name), opened[2])
        finally:
            # Giving back the space of a large file takes its time.
            await to_the_end(asyncio.to_thread(discard))

    def publish(self, staged: Staged, diff_id: str, format: str) -> None:
        """Durable in its place when this returns; the builder has synced the content already."""
        trace("publish.staged")
        if os.fstat(staged.table_fd).st_size:
            self._publish_table(staged, self.table_path(diff_id, format))
        os.fchmod(staged.fd, 0o400)
        os.fsync(staged.fd)
        target = self.path(diff_id, format)
        trace("publish.synced")
        os.rename(staged.path, target)
        trace("publish.renamed")
        sync_directory(target.parent)
        trace("publish.settled")

    def _publish_table(self, staged: Staged, target: Path) -> None:
        os.fsync(staged.table_fd)
        trace("publish.table_synced")
        named = staged.path.with_suffix(".table")
        # Only with a descriptor does Python follow the link there; the path is absolute, it means nothing.
        os.link(f"/proc/self/fd/{staged.table_fd}", named, src_dir_fd=staged.table_fd)
        trace("publish.table_linked")
        os.rename(named, target)
        trace("publish.table_renamed")
        sync_directory(target.parent)
        trace("publish.table_settled")

    def contradiction(self, layer: Layer) -> str:
        """Why the file cannot be the layer that the row describes; "" where it can. Reads head and trailer, of a file
        that has not changed since no more than its inode: a container may have hundreds of layers.

        Raises OSError where it cannot be looked at: that says nothing of the file, and must cost no good layer.
        """
        path = self.path(layer.diff_id, layer.format)
        try:
            look = _look(path.lstat(), layer)
            if self._sound.get(path) == look:
                return ""
            why = self._contradiction(path, layer)
        except FileNotFoundError as error:
            why = error.strerror or str(error)
        if why:
            self._sound.pop(path, None)
        else:
            self._sound[path] = look
        return why

    def _contradiction(self, path: Path, layer: Layer) -> str:
        try:
            with path.open("rb", buffering=0) as file:
                fd = file.fileno()
                size = os.fstat(fd).st_size
                if size != layer.file_size_bytes:
                    return f"has {size} bytes, not {layer.file_size_bytes}"
                found = open_layer_file(lambda offset, count: os.pread(fd, count, offset), size)
        except FormatError as error:
            return str(error)
        named = (found.format.name, found.tar_size_bytes, found.data_size_bytes)
        if named != (layer.format, layer.tar_size_bytes, layer.data_size_bytes):
            return "is another layer's"
        # Not every format says of which layer it is.
        if found.diff_id is not None and "sha256:" + found.diff_id.hex() != layer.diff_id:
            return "is another layer's"
        if found.root_hash is not None and found.root_hash.hex() != layer.root_hash:
            return "is another layer's"
        return ""

    def sidecar_contradiction(self, layer: Layer) -> str | None:
        """Why the sidecar is not what the row gives; "" where it is, None where there is none. Raises OSError."""
        path = self.sidecar_path(layer.diff_id, layer.format)
        try:
            with path.open("rb") as file:
                raw = file.read(kata_erofs.SIDECAR_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        return kata_erofs.sidecar_contradiction(raw, *_of_sidecar(layer))

    def write_sidecar(self, layer: Layer) -> None:
        """Durable when this returns. Raises OSError."""
        fd, name = tempfile.mkstemp(dir=self.staging)
        try:
            try:
                content = kata_erofs.sidecar(*_of_sidecar(layer))
                if os.write(fd, content) != len(content):
                    raise OSError(f"short write of {name}")
                os.fchmod(fd, 0o400)
                os.fsync(fd)
            finally:
                os.close(fd)
            target = self.sidecar_path(layer.diff_id, layer.format)
            trace("sidecars.synced")
            os.rename(name, target)
            trace("sidecars.renamed")
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_directory(target.parent)

    def drop_sidecar(self, layer: Layer) -> None:
        """The next container that needs it gets a new one."""
        self.sidecar_path(layer.diff_id, layer.format).unlink(missing_ok=True)

    def lacks_table(self, layer: Layer) -> bool:
        """What is missing keeps no container from starting, and every other chain from being committed on the layer."""
        return layer.has_table and not self.table_path(layer.diff_id, layer.format).exists()

    def drop_table(self, layer: Layer) -> None:
        """A bad one: the next build of the layer makes it again."""
        self.table_path(layer.diff_id, layer.format).unlink(missing_ok=True)

    def listing(self) -> list[tuple[str, str]]:
        """(diff ID, format) of every file, whatever its worth, of every sidecar and of every table."""
        found = {
            (f"sha256:{kata_erofs.layer_of_sidecar(entry.name)}", directory.name)
            for top in (self._layers, self._tables)
            for directory in top.iterdir()
            if directory.is_dir()
            for entry in directory.iterdir()
        }
        return sorted(found, key=lambda file: (file[1], file[0]))

    def quarantine(self, diff_id: str, format: str) -> None:
        """Out of the way, for somebody to look at."""
        place = self.root / "quarantine"
        place.mkdir(mode=0o700, exist_ok=True)
        self.sidecar_path(diff_id, format).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            os.rename(self.path(diff_id, format), place / f"{format}-{diff_id.removeprefix('sha256:')}")

    def delete(self, diff_id: str, format: str) -> None:
        self._sound.pop(self.path(diff_id, format), None)
        for path in (
            self.sidecar_path(diff_id, format), self.path(diff_id, format), self.table_path(diff_id, format),
        ):  # fmt: skip
            with suppress(FileNotFoundError):
                path.unlink()
                trace("delete.unlinked")
                sync_directory(path.parent)
                trace("delete.settled")


def _look(status: os.stat_result, layer: Layer) -> tuple[object, ...]:
    """What is the same as long as file and row are. Not the time of the inode, which changes with its links."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, layer.root_hash, layer.tar_size_bytes)


def _of_sidecar(layer: Layer) -> tuple[str, int, bytes]:
    return layer.root_hash, layer.data_size_bytes, format_named(layer.format).params.salt


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
