# SPDX-License-Identifier: Apache-2.0
"""The directories of active snapshots: <root>/snapshots/ID/{fs,work}, and l where a container needs mounts of its own.

What lies in them a container chose, or an image that an unpacker wrote there: any depth, any names,
mounts. Nothing here recurses, follows a symlink, or builds a path out of theirs.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from blockdev.kernel import idmap, mounts
from snapshotter.errors import NotFound
from snapshotter.idmap import IDMapping
from snapshotter.metastore import SnapshotID
from snapshotter.trace import trace
from snapshotter.trash import Trash

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME: Final = "snapshots"
_PARTS: Final = ("fs", "work")
_ID_DIGITS_MAX: Final = 18  # a row's id has 63 bits


def owner(filled: str, root: Path) -> SnapshotID | None:
    """The snapshot that has this path for what is written to it, below this root."""
    path = Path(os.path.normpath(filled))
    number = path.parent.name
    ours = path.name == "fs" and path.parent.parent == root / _NAME
    if ours and number.isascii() and number.isdigit() and len(number) <= _ID_DIGITS_MAX:
        return SnapshotID(int(number))
    return None


class Directories:
    def __init__(self, root: Path, trash: Trash) -> None:
        self.root = root
        self._directory = root / _NAME
        self._trash = trash

    def prepare(self) -> None:
        self._directory.mkdir(mode=0o711, exist_ok=True)

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

    def open_filled(self, snapshot_id: SnapshotID, mapping: IDMapping | None) -> int:
        """A descriptor of it, with owners as the container sees them. Raises NotFound, OSError, KernelError."""
        path = self.filled(snapshot_id)
        try:
            if mapping is None:
                return os.open(path, _OPEN_DIRECTORY)
            with idmap.user_namespace(*mapping.inverse.maps) as user_namespace_fd:
                os.stat(path)
                return idmap.mapped_tree(path, user_namespace_fd)
        except FileNotFoundError:
            raise NotFound(f"directory {path} was committed or removed meanwhile") from None

    def owner(self, filled: str) -> SnapshotID | None:
        """The snapshot whose `filled` this path is, if it is one of ours."""
        return owner(filled, self.root)

    def make(self, snapshot_id: SnapshotID) -> None:
        """Whole when it returns; may be done again. Raises OSError."""
        path = self.path(snapshot_id)
        path.mkdir(mode=0o700, exist_ok=True)
        trace("directory.made")
        self.filled(snapshot_id).mkdir(exist_ok=True)
        trace("directory.filled")
        self.filled(snapshot_id).chmod(0o755)  # whatever the umask: a container sees it as its root's mode
        self.work(snapshot_id).mkdir(mode=0o711, exist_ok=True)
        trace("directory.whole")

    def own(self, snapshot_id: SnapshotID, user: int, group: int) -> None:
        """Give `filled` itself, which a container sees as its root directory, to its root. Raises OSError."""
        os.chown(self.filled(snapshot_id), user, group, follow_symlinks=False)
        trace("directory.owned")

    def names(self) -> tuple[frozenset[str], frozenset[str]]:
        """(all that is there, what of it is whole)."""
        with os.scandir(self._directory) as entries:
            found = frozenset(entry.name for entry in entries)
        # A start looks at thousands of them: paths are plain text here.
        top = str(self._directory)
        return found, frozenset(name for name in found if all(os.path.isdir(f"{top}/{name}/{part}") for part in _PARTS))

    async def remove(self, name: str) -> None:
        """`name`: a snapshot's id, or whatever else lies there. What is in it goes with the trash. Raises OSError,
        KernelError."""

        def work() -> None:
            path = self._directory / name
            for entry in reversed(mounts.mounted_below(path)):
                mounts.unmount(Path(entry.mount_point), lazily=True)
                trace("directory.unmounted")
            self._trash.put(path)
            trace("directory.removed")

        await asyncio.to_thread(work)

    async def is_empty(self, snapshot_id: SnapshotID) -> bool:
        """Whether nothing was written to `filled`."""

        def look() -> bool:
            with suppress(FileNotFoundError), os.scandir(self.filled(snapshot_id)) as entries:
                return not any(entries)
            return True

        return await asyncio.to_thread(look)
