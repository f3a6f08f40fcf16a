# SPDX-License-Identifier: Apache-2.0
"""The files of a layer, written to a directory. Names and attributes are taken for hostile.

Every call is relative to a descriptor of the directory that it is about, makes a name that was not
there, and follows no symlink; no path is ever put together. One directory is open at a time, whatever
the depth. Needs /proc: attributes of what cannot be opened are set through it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.errors import FormatError, KernelError
from blockdev.formats.entry import Entry

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SEARCH_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAKE_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_AT: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_COPIED_AT_ONCE_BYTES: Final = 16 << 20
_READ_BYTES: Final = 1 << 20
_ID_MAX: Final = (1 << 32) - 2
# Said of a way of copying: not between these files, or not by this kernel.
_NO_SUCH_COPY: Final = frozenset((errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM))
# Said of an attribute or a device: not by this user, not on this file system, or not in this user namespace.
_NOT_FOR_US: Final = frozenset((errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL))
_ACLS: Final[tuple[bytes, ...]] = (b"system.posix_acl_access", b"system.posix_acl_default")
_OPAQUE: Final = b"trusted.overlay.opaque"


@dataclass(frozen=True, slots=True)
class Extracted:
    """`warnings`: what could not be set, by kind."""

    entries: int
    data_size_bytes: int
    warnings: dict[str, int]


def extract(
    entries: Iterable[Entry],
    layer_fd: int,
    directory: Path,
    *,
    data_bytes_max: int,
    every_inode: bool = False,
    oci_whiteouts: bool = False,
    progress: Callable[[int], object] = lambda data_bytes: None,
) -> Extracted:
    """Write a walk's `entries` below `directory`, which is absent or empty; data comes from `layer_fd`.

    `data_bytes_max`: of all files together, so that a forged index cannot make much of little. Names
    of one inode become hardlinks where their nlink says that there are several, with `every_inode`
    always. `oci_whiteouts`: as `.wh.` files instead of overlay's marks. What the user, the file system
    or the kernel does not allow to set is counted.

    Raises FormatError, LimitExceeded, KernelError; what was made by then stays.
    """
    try:
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        top = os.open(directory, _OPEN_DIRECTORY)
    except OSError as error:
        raise KernelError(f"cannot extract to {directory}: {error.strerror}") from None
    extraction = _Extraction(layer_fd, top, data_bytes_max, every_inode, oci_whiteouts, progress)
    try:
        with os.scandir(top) as found:
            if any(found):
                raise KernelError(f"cannot extract to {directory}: it is not empty")
        return extraction.run(entries)
    finally:
        extraction.close()
        os.close(top)


class _Level:
    """A directory that is being filled. What the walk to it needs, and what it gets when it is left."""

    __slots__ = ("acls", "gid", "identity", "mode", "mtime", "parent_path_bytes", "uid")

    def __init__(self, entry: Entry, parent_path_bytes: int, identity: tuple[int, int]) -> None:
        self.parent_path_bytes, self.identity = parent_path_bytes, identity
        self.mode, self.uid, self.gid, self.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
        self.acls = {name: entry.xattrs[name] for name in _ACLS if name in entry.xattrs}


class _Extraction:
    def __init__(
        self,
        layer_fd: int,
        top: int,
        data_bytes_max: int,
        every_inode: bool,
        oci_whiteouts: bool,
        progress: Callable[[int], object],
    ) -> None:
        self._layer_fd, self._top, self._data_bytes_max = layer_fd, top, data_bytes_max
        self._every_inode, self._oci_whiteouts, self._progress = every_inode, oci_whiteouts, progress
        self._levels: list[_Level] = []
        self._current = -1  # descriptor of the directory at the end of `_levels`
        self._path = b""  # its path
        self._first_names: dict[int, bytes | None] = {}  # of inodes with several; None: could not be made
        self._source: tuple[bytes, int] | None = None  # the directory that the last hardlink came from
        self._copy: Callable[[int, int, int], int] = self._by_copy_file_range
        self._data_bytes = self._made = 0
        self._warnings: Counter[str] = Counter()

    def close(self) -> None:
        if self._current >= 0:
            os.close(self._current)
            self._current = -1
        self._forget_source()

    def run(self, entries: Iterable[Entry]) -> Extracted:
        for entry in entries:
            try:
                self._add(entry)
            except OSError as error:
                raise KernelError(f"cannot extract {entry.path[:200]!r}: {error.strerror}") from None
            self._made += 1
        while self._levels:
            path = self._path
            try:
                self._leave()
            except OSError as error:
                raise KernelError(f"cannot extract {path[:200]!r}: {error.strerror}") from None
        return Extracted(self._made, self._data_bytes, dict(sorted(self._warnings.items())))

    def _add(self, entry: Entry) -> None:
        if not self._levels:
            self._enter_top(entry)
            return
        parent, _, name = entry.path.rpartition(b"/")
        while len(self._path) > len(parent):
            self._leave()
        if parent != self._path or name in (b"", b".", b"..") or entry.path.startswith(b"/"):
            raise FormatError(f"the name {entry.path[:200]!r} is in no directory that came before it")
        if stat.S_ISDIR(entry.mode):
            os.mkdir(name, 0o700, dir_fd=self._current)
            self._enter(name, entry)
            return
        shared = entry.nlink > 1 or self._every_inode
        if shared and entry.inode in self._first_names:
            first = self._first_names[entry.inode]
            if first is not None:
                self._link(first, name)
            else:
                self._warnings["unmade_devices"] += 1
            return
        made = self._make(name, entry)
        if shared:
            self._first_names[entry.inode] = entry.path if made else None

    # --- directories

    def _enter_top(self, entry: Entry) -> None:
        if entry.path or not stat.S_ISDIR(entry.mode):
            raise FormatError("the first name of a layer is not its root directory")
        self._current = os.dup(self._top)
        status = os.fstat(self._top)
        # What is below is nobody's until it has its owner and mode; and nothing is to inherit from here.
        with suppress(OSError):
            os.fchmod(self._top, 0o700)
        for name in _ACLS:
            with suppress(OSError):
                os.removexattr(self._top, name)
        self._levels.append(_Level(entry, 0, (status.st_dev, status.st_ino)))
        self._fill_directory(entry)

    def _enter(self, name: bytes, entry: Entry) -> None:
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=self._current)
        os.close(self._current)
        self._current = fd
        status = os.fstat(fd)
        self._levels.append(_Level(entry, len(self._path), (status.st_dev, status.st_ino)))
        self._path = entry.path
        self._fill_directory(entry)

    def _fill_directory(self, entry: Entry) -> None:
        opaque = _OPAQUE in entry.xattrs and self._oci_whiteouts
        if opaque:
            os.close(os.open(b".wh..wh..opq", _MAKE_FILE, 0o600, dir_fd=self._current))
        # ACLs wait: a default one would be inherited by what is made here.
        dropped = (*_ACLS, _OPAQUE) if opaque else _ACLS
        self._set_xattrs(self._current, {name: entry.xattrs[name] for name in entry.xattrs if name not in dropped})

    def _leave(self) -> None:
        """Back to the directory above, by its `..`: it must be the one that we came from."""
        level = self._levels.pop()
        left, self._current = self._current, -1
        try:
            if self._levels:
                self._current = os.open("..", _OPEN_DIRECTORY, dir_fd=left)
                status = os.fstat(self._current)
                if (status.st_dev, status.st_ino) != self._levels[-1].identity:
                    raise KernelError(f"the directory {self._path[:200]!r} was moved while it was filled")
            self._path = self._path[: level.parent_path_bytes]
            self._set_attributes(left, level.mode, level.uid, level.gid, level.mtime, level.acls)
        finally:
            os.close(left)

    # --- everything else

    def _make(self, name: bytes, entry: Entry) -> bool:
        """False for a device that could not be made: only root may, and not every number."""
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFREG:
            fd = os.open(name, _MAKE_FILE, 0o600, dir_fd=self._current)
            try:
                self._write_data(fd, entry)
                self._set_attributes(fd, entry.mode, entry.uid, entry.gid, entry.mtime, entry.xattrs)
            finally:
                os.close(fd)
            return True
        if kind == stat.S_IFCHR and entry.rdev == (0, 0) and self._oci_whiteouts:
            os.close(os.open(b".wh." + name, _MAKE_FILE, 0o600, dir_fd=self._current))
            return True
        if kind == stat.S_IFLNK:
            os.symlink(entry.link, name, dir_fd=self._current)
        else:
            try:
                os.mknod(name, kind | 0o600, os.makedev(*entry.rdev), dir_fd=self._current)
            except OSError as error:
                self._count("unmade_devices", error)
                return False
        fd = os.open(name, _LOOK_AT, dir_fd=self._current)
        try:
            # The magic link leads to the very file, a symlink too, and not to where that points.
            self._set_attributes(
                f"/proc/self/fd/{fd}", entry.mode, entry.uid, entry.gid, entry.mtime, entry.xattrs
            )  # fmt: skip
        finally:
            os.close(fd)
        return True

    def _link(self, first: bytes, name: bytes) -> None:
        parent, _, first_name = first.rpartition(b"/")
        source = self._current if parent == self._path else self._directory(parent)
        os.link(first_name, name, src_dir_fd=source, dst_dir_fd=self._current, follow_symlinks=False)

    def _directory(self, path: bytes) -> int:
        """A descriptor, good until the next call, of a directory that this extraction has made."""
        if self._source is None or self._source[0] != path:
            self._forget_source()
            fd = os.dup(self._top)
            try:
                for name in path.split(b"/") if path else ():
                    below = os.open(name, _SEARCH_DIRECTORY, dir_fd=fd)
                    os.close(fd)
                    fd = below
            except BaseException:
                os.close(fd)
                raise
            self._source = path, fd
        return self._source[1]

    def _forget_source(self) -> None:
        if self._source is not None:
            os.close(self._source[1])
            self._source = None

    # --- attributes

    def _set_attributes(
        self, target: int | str, mode: int, uid: int, gid: int, mtime: tuple[int, int], xattrs: dict[bytes, bytes]
    ) -> None:
        """In the order in which one does not undo another: chown drops capabilities and set-ID bits."""
        owned = self._set_owner(target, uid, gid)
        self._set_xattrs(target, xattrs)
        if not stat.S_ISLNK(mode):
            if not owned and mode & (stat.S_ISUID | stat.S_ISGID):
                # It would lend the rights of another than the layer means.
                self._warnings["unset_set_id_bits"] += 1
                mode &= ~(stat.S_ISUID | stat.S_ISGID)
            try:
                os.chmod(target, stat.S_IMODE(mode))
            except OSError as error:
                self._count("unset_modes", error)
        nanoseconds = mtime[0] * 1_000_000_000 + mtime[1]
        try:
            os.utime(target, ns=(nanoseconds, nanoseconds))
        except OSError as error:
            self._count("unset_times", error)

    def _set_owner(self, target: int | str, uid: int, gid: int) -> bool:
        if uid > _ID_MAX or gid > _ID_MAX:  # chown takes it for "as it is"
            self._warnings["unset_owners"] += 1
            return False
        try:
            os.chown(target, uid, gid)
        except OSError as error:
            self._count("unset_owners", error)
            return False
        return True

    def _set_xattrs(self, target: int | str, xattrs: dict[bytes, bytes]) -> None:
        for name, value in xattrs.items():
            try:
                os.setxattr(target, name, value)
            except OSError as error:
                self._count("unset_xattrs", error)

    def _count(self, kind: str, error: OSError) -> None:
        if error.errno not in _NOT_FOR_US:
            raise error
        self._warnings[kind] += 1

    # --- data

    def _write_data(self, fd: int, entry: Entry) -> None:
        self._data_bytes += entry.size_bytes
        if self._data_bytes > self._data_bytes_max:
            raise FormatError("the files have more data than the tar")
        behind = entry.size_bytes
        for offset, left in entry.extents():
            while left:
                done = self._copy(fd, offset, min(left, _COPIED_AT_ONCE_BYTES))
                if not done:
                    raise FormatError(f"layer file ends at byte {offset}")
                offset, left, behind = offset + done, left - done, behind - done
                self._progress(self._data_bytes - behind)

    def _by_copy_file_range(self, fd: int, offset: int, size: int) -> int:
        try:
            return os.copy_file_range(self._layer_fd, fd, size, offset)
        except OSError as error:
            if error.errno not in _NO_SUCH_COPY:
                raise
            self._copy = self._by_sendfile
            return self._copy(fd, offset, size)

    def _by_sendfile(self, fd: int, offset: int, size: int) -> int:
        try:
            return os.sendfile(fd, self._layer_fd, offset, size)
        except OSError as error:
            if error.errno not in _NO_SUCH_COPY:
                raise
            self._copy = self._by_read
            return self._copy(fd, offset, size)

    def _by_read(self, fd: int, offset: int, size: int) -> int:
        return os.write(fd, os.pread(self._layer_fd, min(size, _READ_BYTES), offset))
