# SPDX-License-Identifier: Apache-2.0
"""<root>/trash: what was deleted and still takes room. To come here is one rename(2), so that nobody waits while blocks
are freed: an image's layers may have many gigabytes, a container's directory millions of files.

Emptied in the background, files no quicker than a rate; what a crash leaves here, the next start goes on with.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from snapshotter.log import get_logger
from snapshotter.trace import trace

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK_BYTES: Final = 512  # of st_blocks (man 3 stat)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


class Trash:
    def __init__(
        self, root: Path, *, bytes_per_second: int = 0, in_a_hurry: Callable[[], bool] = lambda: False
    ) -> None:
        """`bytes_per_second`: of files, 0 for no limit; there is none while somebody needs the room, which
        `in_a_hurry` says."""
        self.directory = root / "trash"
        self._rate, self._in_a_hurry = bytes_per_second, in_a_hurry
        # Of their own: a removal may take minutes, and everything else would wait behind it.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="trash")
        self._stop = threading.Event()
        self._busy: set[str] = set()  # those under way, and those that could not be removed
        self._failed: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._came = asyncio.Event()
        self._log = get_logger()

    def prepare(self) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def put(self, path: Path) -> bool:
        """A file or a directory with nothing mounted in it; False where there is none. Raises OSError."""
        target = self.directory / os.urandom(16).hex()
        try:
            os.rename(path, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            # The full disk needs what it holds, and has no room for its new name.
            remove_tree(path, self._stop)
        trace("trash.put")
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._came.set)
        return True

    def names(self) -> frozenset[str]:
        return frozenset(os.listdir(self.directory))

    def again(self) -> None:
        """What could not be removed is tried once more."""
        self._busy -= self._failed
        self._failed.clear()
        self._came.set()

    async def empty_as_it_comes(self) -> None:
        """For ever."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._came.clear()
            try:
                found = await asyncio.to_thread(self._new)
            except OSError as error:
                self._log.error("the trash cannot be looked into", error=str(error))
                found = []
            for name, size_bytes in found:
                self._busy.add(name)
                removal = self._loop.run_in_executor(self._threads, self._remove, name)
                if size_bytes is None:
                    continue  # the next one need not wait for a directory
                await removal
                if self._rate and not self._in_a_hurry():
                    await asyncio.sleep(size_bytes / self._rate)
            await self._came.wait()

    def _new(self) -> list[tuple[str, int | None]]:
        """Names, with the bytes that the removal of a file sets free."""
        found: list[tuple[str, int | None]] = []
        for name in self.names() - self._busy:
            with suppress(FileNotFoundError):
                status = os.lstat(self.directory / name)
                # One that has another name gives nothing back.
                last = status.st_nlink == 1
                size_bytes = status.st_blocks * _BLOCK_BYTES if last else 0
                found.append((name, None if stat.S_ISDIR(status.st_mode) else size_bytes))
        return found

    def _remove(self, name: str) -> None:
        try:
            remove_tree(self.directory / name, self._stop)
        except OSError as error:
            self._log.error("left in the trash for the next Cleanup", name=name, error=str(error))
            self._failed.add(name)
            return
        trace("trash.removed")
        if not self._stop.is_set():
            self._busy.discard(name)


def remove_tree(path: Path, stop: threading.Event | None = None) -> None:
    """A directory with all below it, or a file; nothing to do where it is gone. Raises OSError. `stop`: the rest stays.

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
            if stop is not None and stop.is_set():
                return
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
                        trace("tree.moved")
                        todo.append(moved)
                    else:
                        os.unlink(entry.name, dir_fd=directory)
                        trace("tree.unlinked")
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=top)
            trace("tree.removed")
    finally:
        os.close(top)
    os.rmdir(path)
