# SPDX-License-Identifier: Apache-2.0
"""What was written above a snapshot's layers, as the changeset of an OCI layer: an upper directory of overlay
becomes a tar. What lies in it a container chose.

Equal directories give equal bytes: names come in their byte order, a directory before what is in it; no
clock, user name, inode number or host is in the tar. Marks of overlay become those of OCI (image
specification: layer.md, "Whiteouts"; Linux: filesystems/overlayfs.rst, fs/overlayfs/overlayfs.h):

    character device 0:0, NAME             .wh.NAME
    trusted.overlay.opaque = y             .wh..wh..opq in the directory, before all else in it
    trusted.overlay.whiteout, in a directory with trusted.overlay.opaque = x     .wh.NAME

Every name is looked up in a descriptor of its directory, and every file reached through the descriptor
that was looked at: no symlink is followed, no device opened, no path put together. One directory is open
at a time, whatever the depth. What changes meanwhile ends in an error. Needs /proc, and CAP_SYS_ADMIN for
the kernel to show overlay's marks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blockdev.errors import LimitExceeded, SourceChanged, UnsupportedError, kernel_error
from blockdev.formats import tar_writer
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType
from verity.buffers import Buffer

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_AT: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Never to wait, whatever it has become since it was looked at.
_READ_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_READ_BYTES: Final = 1 << 20
_ZEROS: Final = memoryview(bytes(_READ_BYTES))
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_OVERLAY: Final = b"trusted.overlay."
# Labels of the host's security modules and its key's digests: not of the file, but of where it lies. The
# modules keep overlay from copying them up, too (Linux: security_inode_copy_up_xattr).
_OF_THE_HOST: Final = (b"security.selinux", b"security.evm", b"security.SMACK64")
# Said of a name that was listed, or of an attribute.
_GONE: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENODATA))
_TYPES: Final = {
    stat.S_IFREG: MemberType.FILE,
    stat.S_IFLNK: MemberType.SYMLINK,
    stat.S_IFCHR: MemberType.CHAR,
    stat.S_IFBLK: MemberType.BLOCK,
    stat.S_IFDIR: MemberType.DIRECTORY,
    stat.S_IFIFO: MemberType.FIFO,
}
_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Changeset:
    """What was written. `left_out`: what no layer holds, by kind: `sockets`, `trusted_xattrs`."""

    entries: int
    tar_size_bytes: int
    left_out: dict[str, int]


def write_changeset(
    top_fd: int, write: Callable[[Buffer], object], *, limits: Limits, latest_mtime: int | None = None
) -> Changeset:
    """The tar of all below the directory `top_fd`, handed to `write` piece by piece; a piece is good until it returns.

    The directory itself has no entry, as in the tars of containerd. `latest_mtime`, in seconds since 1970:
    what is later counts as that.

    Raises SourceChanged, UnsupportedError (what a layer cannot say), LimitExceeded, KernelError, and what
    `write` raises.
    """
    walk = _Walk(write, limits, latest_mtime)
    try:
        return walk.run(top_fd)
    finally:
        walk.close()


class _Level:
    """A directory whose names are being written; `names` are those still to come, the next one last."""

    __slots__ = ("identity", "mtime_ns", "names", "parent_path_bytes", "whiteout_files")

    def __init__(self, status: os.stat_result, names: list[bytes], parent_path_bytes: int, marks: _Marks) -> None:
        self.identity = status.st_dev, status.st_ino
        self.mtime_ns = status.st_mtime_ns
        self.names, self.parent_path_bytes = names, parent_path_bytes
        self.whiteout_files = marks.opaque == b"x"


class _Marks:
    """Of overlay's own attributes, those that mean something in an upper directory."""

    __slots__ = ("opaque", "whiteout")

    def __init__(self) -> None:
        self.opaque = b""
        self.whiteout = False


class _Walk:
    def __init__(self, write: Callable[[Buffer], object], limits: Limits, latest_mtime: int | None) -> None:
        self._sink, self._limits, self._latest_mtime = write, limits, latest_mtime
        self._levels: list[_Level] = []
        self._current = -1  # descriptor of the directory at the end of `_levels`
        self._path = b""  # its path
        self._device = -1
        self._first_names: dict[int, bytes] = {}  # of inodes with several
        self._buffer = bytearray(_READ_BYTES)
        self._listed = self._entries = self._size = self._linked_bytes = 0
        self._left_out: Counter[str] = Counter()
        self._of_the_sink: OSError | None = None

    def close(self) -> None:
        if self._current >= 0:
            os.close(self._current)
            self._current = -1

    def run(self, top_fd: int) -> Changeset:
        path = b""
        try:
            self._enter_top(top_fd)
            while self._levels:
                names = self._levels[-1].names
                if names:
                    name = names.pop()
                    path = self._path + b"/" + name if self._path else name
                    self._add(name, path)
                else:
                    path = self._path
                    self._leave()
        except OSError as error:
            if error is self._of_the_sink:
                raise
            if error.errno in _GONE:
                raise self._changed(path) from None
            raise kernel_error(f"cannot read {path[:200]!r}: {error.strerror}", error.errno) from None
        self._write(tar_writer.END)
        return Changeset(self._entries, self._size, dict(sorted(self._left_out.items())))

    @staticmethod
    def _changed(path: bytes) -> SourceChanged:
        return SourceChanged(f"{path[:200] or b'/'!r} changed while it was read: stop or pause what writes there")

    # --- directories

    def _enter_top(self, top_fd: int) -> None:
        self._current = os.open(".", _OPEN_DIRECTORY, dir_fd=top_fd)
        status = os.fstat(self._current)
        self._device = status.st_dev
        marks, _ = self._attributes(self._current)
        self._fill_level(b"", status, marks)

    def _enter(self, path: bytes, fd: int, status: os.stat_result, marks: _Marks) -> None:
        # Through the descriptor that was looked at, and not by its name.
        below = os.open(_through(fd), _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        os.close(self._current)
        self._current = below
        self._fill_level(path, status, marks)

    def _fill_level(self, path: bytes, status: os.stat_result, marks: _Marks) -> None:
        names = []
        with os.scandir(self._current) as found:
            for entry in found:
                self._listed += 1
                if self._listed > self._limits.entries:
                    raise LimitExceeded(f"more than {self._limits.entries} entries")
                names.append(os.fsencode(entry.name))
        names.sort(reverse=True)
        self._levels.append(_Level(status, names, len(self._path), marks))
        self._path = path
        if marks.opaque == b"y":
            self._write_mark(path + b"/" + _OPAQUE if path else _OPAQUE)

    def _leave(self) -> None:
        """Back to the directory above, by its `..`: it must be the one that we came from."""
        level = self._levels.pop()
        # Not its ctime: overlay takes marks of its own away when somebody only lists it.
        if os.fstat(self._current).st_mtime_ns != level.mtime_ns:
            raise self._changed(self._path)
        if self._levels:
            above = os.open("..", _OPEN_DIRECTORY, dir_fd=self._current)
            os.close(self._current)
            self._current = above
            status = os.fstat(above)
            if (status.st_dev, status.st_ino) != self._levels[-1].identity:
                raise self._changed(self._path)
        self._path = self._path[: level.parent_path_bytes]

    # --- one name

    def _add(self, name: bytes, path: bytes) -> None:
        if name.startswith(_WHITEOUT):
            # As an entry it would remove, in the layers below, what the container has not.
            raise UnsupportedError(f"{path[:200]!r}: names that begin with .wh. mean whiteouts in a layer; rename it")
        if len(path) > self._limits.path_bytes:
            raise LimitExceeded(f"path of {len(path)} bytes, over the limit of {self._limits.path_bytes}")
        fd = os.open(name, _LOOK_AT, dir_fd=self._current)
        try:
            status = os.fstat(fd)
            if status.st_dev != self._device:
                raise UnsupportedError(f"{path[:200]!r}: another file system is mounted there")
            if stat.S_ISSOCK(status.st_mode):
                self._left_out["sockets"] += 1
            elif stat.S_ISCHR(status.st_mode) and not status.st_rdev:
                self._write_whiteout(name)
            else:
                self._add_member(name, path, fd, status)
        finally:
            os.close(fd)

    def _add_member(self, name: bytes, path: bytes, fd: int, status: os.stat_result) -> None:
        marks, xattrs = self._attributes(fd, path)
        kind = _TYPES[stat.S_IFMT(status.st_mode)]
        if kind is MemberType.FILE and marks.whiteout and not status.st_size and self._levels[-1].whiteout_files:
            self._write_whiteout(name)
            return
        member = Member(
            type=kind,
            name=path,
            link=b"",
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime=self._mtime(status),
            major=0,
            minor=0,
            size_bytes=0,
            data_offset_bytes=0,
            xattrs=xattrs,
        )
        if kind is MemberType.DIRECTORY:
            member.name += b"/"
            self._write_header(member)
            self._enter(path, fd, status, marks)
            return
        first = self._first_names.get(status.st_ino) if status.st_nlink > 1 else None
        if first is not None:
            # Attributes are those of the inode, and are said again: an unpacker sets them by each of its names.
            member.type, member.link = MemberType.HARDLINK, first
            self._write_header(member)
            return
        if kind is MemberType.SYMLINK:
            member.link = os.readlink(b"", dir_fd=fd)
        elif kind in (MemberType.CHAR, MemberType.BLOCK):
            member.major, member.minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        elif kind is MemberType.FILE:
            member.size_bytes = status.st_size
        if status.st_nlink > 1:
            self._linked_bytes += len(path)
            if self._linked_bytes > self._limits.metadata_bytes:
                raise LimitExceeded(f"names of hardlinked files exceed {self._limits.metadata_bytes} bytes")
            self._first_names[status.st_ino] = path
        self._write_header(member)
        if member.size_bytes:
            self._write_data(path, fd, status)

    def _mtime(self, status: os.stat_result) -> tuple[int, int]:
        mtime = divmod(status.st_mtime_ns, _NANOSECONDS)
        return mtime if self._latest_mtime is None else min(mtime, (self._latest_mtime, 0))

    def _attributes(self, fd: int, path: bytes = b"") -> tuple[_Marks, dict[bytes, bytes]]:
        """Overlay's marks, and the extended attributes that go into the layer."""
        marks, xattrs = _Marks(), dict[bytes, bytes]()
        # A descriptor that only looks at the file has no attributes; the magic link leads to the very file.
        where = _through(fd)
        try:
            names = os.listxattr(where)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return marks, xattrs
        for name in map(os.fsencode, names):
            if name.startswith(_OVERLAY):
                self._read_mark(marks, name, where, path)
            elif name.startswith(b"trusted."):
                self._left_out["trusted_xattrs"] += 1
            elif not name.startswith(_OF_THE_HOST):
                xattrs[name] = os.getxattr(where, name)
        return marks, xattrs

    def _read_mark(self, marks: _Marks, name: bytes, where: str, path: bytes) -> None:
        mark = name.removeprefix(_OVERLAY)
        if mark == b"opaque":
            marks.opaque = os.getxattr(where, name)
        elif mark == b"whiteout":
            marks.whiteout = True
        elif mark in (b"redirect", b"metacopy"):
            # The file is elsewhere, in a lower layer: what is here is not what the container sees.
            raise UnsupportedError(
                f"{path[:200]!r} has overlay's mark {mark.decode()}: it was written through a mount with"
                f" {'redirect_dir' if mark == b'redirect' else 'metacopy'}=on, whose upper directory is no changeset"
            )

    # --- the tar

    def _write(self, data: Buffer) -> None:
        self._size += len(data)
        if self._size > self._limits.tar_bytes:
            raise LimitExceeded(f"changes are over the limit of {self._limits.tar_bytes} bytes")
        try:
            self._sink(data)
        except OSError as error:
            self._of_the_sink = error  # says nothing of the directory
            raise

    def _write_header(self, member: Member) -> None:
        try:
            header = tar_writer.member_header(member, self._limits)
        except (UnsupportedError, LimitExceeded) as error:
            raise type(error)(f"{member.name[:200]!r}: {error}") from None
        # Before the first of perhaps very many zeros.
        if self._size + len(header) + member.size_bytes > self._limits.tar_bytes:
            most = self._limits.tar_bytes
            raise LimitExceeded(f"{member.name[:200]!r} of {member.size_bytes} bytes is over the limit of {most}")
        self._entries += 1
        self._write(header)

    def _write_whiteout(self, name: bytes) -> None:
        self._write_mark(b"/".join((self._path, _WHITEOUT + name)) if self._path else _WHITEOUT + name)

    def _write_mark(self, path: bytes) -> None:
        self._write_header(Member(MemberType.FILE, path, b"", 0, 0, 0, (0, 0), 0, 0, 0, 0, {}))

    def _write_data(self, path: bytes, fd: int, status: os.stat_result) -> None:
        size = status.st_size
        source = os.open(_through(fd), _READ_FILE)
        try:
            at = 0
            while at < size:
                start, end = _extent(source, at, size)
                while at < start:
                    zeros = _ZEROS[: start - at]
                    self._write(zeros)
                    at += len(zeros)
                while at < end:
                    piece = memoryview(self._buffer)[: end - at]
                    got = os.preadv(source, [piece], at)
                    if not got:
                        raise self._changed(path)
                    self._write(piece[:got])
                    at += got
            self._write(tar_writer.padding(size))
            # The header has promised this size; and a file that was written to meanwhile is neither old nor new.
            after = os.fstat(source)
        finally:
            os.close(source)
        if _state(after) != _state(status):
            raise self._changed(path)


def _through(fd: int) -> str:
    """man 5 proc_pid_fd"""
    return f"/proc/self/fd/{fd}"


def _extent(fd: int, at: int, size: int) -> tuple[int, int]:
    """Where the next data lies, from `at` on; `size` where only a hole follows (man 2 lseek)."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        if error.errno == errno.EINVAL:  # the file system does not say
            return at, size
        raise
    return min(start, size), min(end, size)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
