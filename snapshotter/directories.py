# SPDX-License-Identifier: Apache-2.0
"""The directories of active snapshots: <root>/snapshots/ID/{fs,work}, and l where a container needs mounts of its own.

What lies in them a container chose, or an image that an unpacker wrote there: any depth, any names,
mounts. Nothing here recurses, follows a symlink, or builds a path out of theirs.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.kernel import mounts
from snapshotter.metastore import SnapshotID

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PARTS: Final = ("fs", "work")
# containerd asks for every active snapshot's use each 10 s. A walk's result holds for some times the
# time that it took, so that walks never take more than a part of a processor.
_USE_HOLDS_TIMES: Final = 10
_ID_DIGITS_MAX: Final = 18  # a row's id has 63 bits


@dataclass(frozen=True, slots=True)
class Use:
    """Of storage: bytes and inodes."""

    size_bytes: int
    inodes: int


class Directories:
    def __init__(self, root: Path) -> None:
        self._directory = root / "snapshots"
        # Of their own: a walk or a removal may take minutes, and everything else would wait behind them.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="directories")
        self._walks: dict[SnapshotID, asyncio.Future[Use]] = {}

    def prepare(self) -> None:
        self._directory.mkdir(mode=0o711, exist_ok=True)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def path(self, snapshot_id: SnapshotID) -> Path:
        return self._directory / str(snapshot_id)

    def filled(self, snapshot_id: SnapshotID) -> Path:
        """What a container, or an unpacker, writes to."""
        return self.path(snapshot_id) / "fs"

    def work(self, snapshot_id: SnapshotID) -> Path:
        return self.path(snapshot_id) / "work"

    def lowers(self, snapshot_id: SnapshotID) -> Path:
        """Where the layers are mounted once more for this snapshot alone."""
        return self.path(snapshot_id) / "l"

    def owner(self, filled: str) -> SnapshotID | None:
        """The snapshot whose `filled` this path is, if it is one of ours."""
        path = Path(os.path.normpath(filled))
        number = path.parent.name
        ours = path.name == "fs" and path.parent.parent == self._directory
        if ours and number.isascii() and number.isdigit() and len(number) <= _ID_DIGITS_MAX:
            return SnapshotID(int(number))
        return None

    def make(self, snapshot_id: SnapshotID) -> None:
        """Whole when it returns; may be done again. Raises OSError."""
        path = self.path(snapshot_id)
        path.mkdir(mode=0o700, exist_ok=True)
        self.filled(snapshot_id).mkdir(exist_ok=True)
        self.filled(snapshot_id).chmod(0o755)  # whatever the umask: a container sees it as its root's mode
        self.work(snapshot_id).mkdir(mode=0o711, exist_ok=True)

    def own(self, snapshot_id: SnapshotID, user: int, group: int) -> None:
        """Give `filled` itself, which a container sees as its root directory, to its root. Raises OSError."""
        os.chown(self.filled(snapshot_id), user, group, follow_symlinks=False)

    def names(self) -> tuple[frozenset[str], frozenset[str]]:
        """(all that is there, what of it is whole)."""
        with os.scandir(self._directory) as entries:
            found = frozenset(entry.name for entry in entries)
        return found, frozenset(
            name for name in found if all((self._directory / name / part).is_dir() for part in _PARTS)
        )

    async def remove(self, name: str) -> None:
        """`name`: a snapshot's id, or whatever else lies there. Raises OSError, KernelError."""

        def work() -> None:
            path = self._directory / name
            for entry in reversed(mounts.mounted_below(path)):
                mounts.unmount(Path(entry.mount_point), lazily=True)
            remove_tree(path)

        await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def use(self, snapshot_id: SnapshotID) -> Use:
        """As it was at most some seconds ago; one walk at a time, whoever asks."""
        loop = asyncio.get_running_loop()
        walk = self._walks.get(snapshot_id)
        if walk is None:
            walk = loop.run_in_executor(self._threads, _use_below, self.filled(snapshot_id))
            self._walks[snapshot_id] = walk
            started = loop.time()

            def done(_: object) -> None:
                holds = _USE_HOLDS_TIMES * (loop.time() - started)
                loop.call_later(holds, self._walks.pop, snapshot_id, None)

            walk.add_done_callback(done)
        return await asyncio.shield(walk)

    async def is_empty(self, snapshot_id: SnapshotID) -> bool:
        """Whether nothing was written to `filled`."""

        def look() -> bool:
            with suppress(FileNotFoundError), os.scandir(self.filled(snapshot_id)) as entries:
                return not any(entries)
            return True

        return await asyncio.to_thread(look)


def _use_below(top: Path) -> Use:
    """Symlinks are counted, not followed; a directory whose path is too long for the kernel is left out."""
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    todo = [str(top)]
    with suppress(OSError):
        size, inodes = os.lstat(top).st_blocks * 512, 1
    while todo:
        with suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (status.st_dev, status.st_ino) in seen:
                            continue
                        seen.add((status.st_dev, status.st_ino))
                    size, inodes = size + status.st_blocks * 512, inodes + 1
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
    return Use(size, inodes)


def remove_tree(path: Path) -> None:
    """A directory with all below it, or a file; nothing to do where it is gone. Raises OSError.

    Every directory found is moved up to the top before it is looked into, so that depth costs
    neither stack nor descriptors nor long paths.
    """
    try:
        top = os.open(path, _OPEN_DIRECTORY)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(path)
        return
    try:
        prefix, number = os.urandom(8).hex(), 0
        todo: list[str] = []
        with os.scandir(top) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                todo.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=top)
        while todo:
            name = todo.pop()
            directory = os.open(name, _OPEN_DIRECTORY, dir_fd=top)
            try:
                with os.scandir(directory) as entries:
                    found = list(entries)
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        number += 1
                        moved = f"{prefix}-{number}"
                        os.rename(entry.name, moved, src_dir_fd=directory, dst_dir_fd=top)
                        todo.append(moved)
                    else:
                        os.unlink(entry.name, dir_fd=directory)
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)
