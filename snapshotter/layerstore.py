# SPDX-License-Identifier: Apache-2.0
"""Layer files on disk: <root>/layers/FORMAT/HEX, and <root>/staging for what is being written.

A file in `layers` is whole: it was synced, then renamed, then its directory was synced. Whether it is
also a layer is for the metadata to say. Its modification time is UNTOUCHED_NS: one that somebody has written to
since has another, and is not trusted before every block of it was checked. Beside it there may be its sidecar.
<root>/tables/FORMAT/HEX is the table of the directories that a layer made for want of an entry, which most have none
of: there before the layer, gone after it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.errors import FormatError
from blockdev.formats.layer_file import STORED_FORMATS, format_named, open_layer_file
from snapshotter.contracts import kata_erofs
from snapshotter.direct import opened_direct
from snapshotter.errors import ResourceExhausted
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerState
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace
from snapshotter.trash import Trash
from verity.errors import VerificationFailed
from verity.verify import verify_all

# Of a whole layer file, in ns since the epoch: what no write(2) and no copy leaves. Whole seconds, for file systems
# that keep no more.
UNTOUCHED_NS: Final = 86_400 * 10**9

Pace = Callable[[int], None]  # told of the bytes that are read next; it may take its time, or raise


@dataclass(frozen=True, slots=True)
class Staged:
    """Three empty files of one build. Spool and table have no name: they are gone with their descriptors."""

    fd: int
    spool_fd: int
    path: Path
    table_fd: int


class LayerStore:
    def __init__(self, root: Path, trash: Trash | None = None, *, reserve_bytes: int = 0) -> None:
        self.root = root
        self.staging = root / "staging"
        self._quarantine = root / "quarantine"
        self.trash = trash or Trash(root)
        self._layers = root / "layers"
        self._tables = root / "tables"
        self._reserve = reserve_bytes
        # By file, of those that contradicted nothing when they were read.
        self._sound: dict[Path, tuple[object, ...]] = {}
        self._in_work: set[str] = set()

    def prepare(self) -> None:
        for directory in (
            self.staging,
            self._layers,
            self._tables,
            *(directory / name for directory in (self._layers, self._tables) for name in STORED_FORMATS),
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.trash.prepare()
        sync_directory(self._layers)
        sync_directory(self._tables)
        sync_directory(self.root)

    def path(self, diff_id: str, format: str) -> Path:
        """Raises FormatError for what only a spoilt row names."""
        return _place(self._layers, diff_id, format)

    def sidecar_path(self, diff_id: str, format: str) -> Path:
        return kata_erofs.sidecar_path(self.path(diff_id, format))

    def table_path(self, diff_id: str, format: str) -> Path:
        return _place(self._tables, diff_id, format)

    def is_short_of_space(self) -> bool:
        """Less is free than builds leave to the others. Raises OSError."""
        space = os.statvfs(self.staging)
        return space.f_bavail * space.f_frsize < self._reserve

    @asynccontextmanager
    async def staged(self) -> AsyncIterator[Staged]:
        """What `publish` has not taken is gone at the end. Raises ResourceExhausted below the reserve, OSError."""
        if self.is_short_of_space():
            raise ResourceExhausted(f"less than {self._reserve} bytes are free below {self.root}: no build is started")
        fd, name = tempfile.mkstemp(dir=self.staging)
        opened = [fd]
        self._in_work.add(os.path.basename(name))

        def discard() -> None:
            try:
                os.unlink(name)
                trace("staged.discarded")
            except FileNotFoundError:
                pass
            except OSError as error:
                get_logger().error("left in staging for the next start", path=name, error=str(error))
            for each in opened:
                os.close(each)
            self._in_work.discard(os.path.basename(name))

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
        os.utime(staged.fd, ns=(time.time_ns(), UNTOUCHED_NS))
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
        """Why the file cannot be the layer that the row describes; "" where it can. Reads head and trailer, and every
        block where somebody has written to the file; of one that has not changed since no more than its inode: a
        container may have hundreds of layers.

        Raises OSError where it cannot be looked at: that says nothing of the file, and must cost no good layer.
        """
        if layer.state is LayerState.BROKEN:
            return "was found broken"
        try:
            path = self.path(layer.diff_id, layer.format)
        except FormatError as error:
            return str(error)
        try:
            status = path.lstat()
            if self._sound.get(path) == _look(status, layer):
                return ""
            why = self._contradiction(path, layer)
            if not why and status.st_mtime_ns != UNTOUCHED_NS:
                why, status = self._bad_block(layer), path.lstat()
        except FileNotFoundError as error:
            why = error.strerror or str(error)
        if why or status.st_mtime_ns != UNTOUCHED_NS:
            self._sound.pop(path, None)
        else:
            self._sound[path] = _look(status, layer)
        return why

    def damage(self, layer: Layer, pace: Pace) -> str:
        """As `contradiction`, of everything in the file, whatever is known of it. Raises OSError, and what `pace`
        raises."""
        try:
            return self._contradiction(self.path(layer.diff_id, layer.format), layer) or self._bad_block(layer, pace)
        except FileNotFoundError as error:
            return error.strerror or str(error)
        except FormatError as error:
            return str(error)

    def _bad_block(self, layer: Layer, pace: Pace | None = None) -> str:
        """The first block that does not have its digest; "" where all have. Geometry and root hash are the row's, so
        whatever head and trailer say is of no matter here. A file in which nothing is wrong counts as untouched again.

        Where `pace` is given, one thread reads, and from the disk: what pods have in memory neither hides what is wrong
        there nor is driven out. Raises OSError (FileNotFoundError too), and what `pace` raises.
        """
        geometry = format_named(layer.format).geometry(layer.data_size_bytes)
        path = self.path(layer.diff_id, layer.format)
        with path.open("rb", buffering=0) as file, opened_direct(path) as read_direct:
            before = os.fstat(file.fileno())

            def read_at(offset: int, count: int) -> bytes:
                if pace is None:
                    return os.pread(file.fileno(), count, offset)
                pace(count)
                return read_direct(offset, count)

            try:
                verify_all(read_at, geometry, bytes.fromhex(layer.root_hash), threads=None if pace is None else 1)
            except VerificationFailed as error:
                return f"is damaged: {error}"
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return f"cannot be read: {error.strerror}"
            if before.st_mtime_ns == os.fstat(file.fileno()).st_mtime_ns != UNTOUCHED_NS:
                os.utime(file.fileno(), ns=(before.st_atime_ns, UNTOUCHED_NS))
        return ""

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
        self._in_work.add(os.path.basename(name))
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
        finally:
            self._in_work.discard(os.path.basename(name))
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
        try:
            self.path(diff_id, format)
        except FormatError:
            return
        self._quarantine.mkdir(mode=0o700, exist_ok=True)
        for path in (self.sidecar_path(diff_id, format), self.table_path(diff_id, format)):
            path.unlink(missing_ok=True)
        target = self._quarantine / f"{format}-{diff_id.removeprefix('sha256:')}"
        with suppress(FileNotFoundError):
            os.rename(self.path(diff_id, format), target)
            # When it came here: what is old goes.
            os.utime(target)
            trace("quarantine.renamed")

    def quarantined(self) -> list[tuple[Path, os.stat_result]]:
        """The oldest first."""
        with suppress(FileNotFoundError):
            found = [(Path(entry.path), entry.stat(follow_symlinks=False)) for entry in os.scandir(self._quarantine)]
            return sorted(found, key=lambda each: each[1].st_mtime_ns)
        return []

    def left_in_staging(self) -> frozenset[str]:
        """Names that belong to no build of this process."""
        found = {entry.name for entry in os.scandir(self.staging)}
        return frozenset(name for name in found if name.partition(".")[0] not in self._in_work)

    def delete(self, diff_id: str, format: str) -> None:
        """Out of their places, into the trash."""
        try:
            self.path(diff_id, format)
        except FormatError:
            return
        self._sound.pop(self.path(diff_id, format), None)
        for path in (
            self.sidecar_path(diff_id, format), self.path(diff_id, format), self.table_path(diff_id, format),
        ):  # fmt: skip
            if self.trash.put(path):
                trace("delete.unlinked")
                sync_directory(path.parent)
                trace("delete.settled")


def _place(directory: Path, diff_id: str, format: str) -> Path:
    name = diff_id.removeprefix("sha256:")
    for part in (name, format):
        if part in ("", ".", "..") or "/" in part or "\0" in part:
            raise FormatError(f"is none: no layer has the diff ID {diff_id!r} and the format {format!r}")
    return directory / format / name


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
