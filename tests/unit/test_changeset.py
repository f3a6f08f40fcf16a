# SPDX-License-Identifier: Apache-2.0
"""An upper directory as a tar: what is in it, in which order, and what is refused."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.changeset import Changeset, write_changeset
from blockdev.errors import BlockdevError, LimitExceeded, SourceChanged, UnsupportedError
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType
from snapshotter.trash import remove_tree
from tests.unit.test_tar_writer import scanned
from verity.buffers import Buffer

WHEN = 1_600_000_000_123_456_789
OPAQUE = "trusted.overlay.opaque"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    directory = tmp_path / "fs"
    directory.mkdir()
    return directory


def archive(
    top: Path, *, limits: Limits | None = None, on_write: Callable[[Buffer], object] = lambda _: None, **named: int
) -> tuple[bytes, Changeset]:
    pieces: list[bytes] = []

    def write(data: Buffer) -> None:
        pieces.append(bytes(data))
        on_write(data)

    before = set(os.listdir("/proc/self/fd"))
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        changeset = write_changeset(fd, write, limits=limits or Limits(), **named)
    finally:
        os.close(fd)
        assert set(os.listdir("/proc/self/fd")) == before
    tar = b"".join(pieces)
    assert changeset.tar_size_bytes == len(tar)
    return tar, changeset


def members(top: Path) -> list[Member]:
    return scanned(archive(top)[0])


def names(top: Path) -> list[bytes]:
    return [member.name for member in members(top)]


def mknod(path: Path, kind: int = stat.S_IFCHR, device: int = 0) -> None:
    os.mknod(path, kind | 0o600, device)


def test_an_empty_directory_is_an_empty_tar(top: Path) -> None:
    tar, changeset = archive(top)
    assert tar == bytes(1024)
    assert changeset == Changeset(0, 1024, {})


def test_names_come_in_byte_order_and_directories_before_what_is_in_them(top: Path) -> None:
    for name in (b"b/z", b"b/a/x", b"b.c", b"a", b"\xff", b"b-"):
        path = os.path.join(os.fsencode(top), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass
    assert names(top) == [b"a", b"b/", b"b/a/", b"b/a/x", b"b/z", b"b-", b"b.c", b"\xff"]


def test_a_member_has_what_its_file_has(top: Path) -> None:
    path = top / "file"
    path.write_bytes(b"content")
    path.chmod(0o4751)
    os.setxattr(path, "user.a", b"\0\xff")
    os.utime(path, ns=(0, WHEN))
    tar, _ = archive(top)
    [member] = scanned(tar)
    status = path.stat()
    assert (member.type, member.name, member.mode) == (MemberType.FILE, b"file", 0o4751)
    assert (member.uid, member.gid) == (status.st_uid, status.st_gid)
    assert member.mtime == (1_600_000_000, 123_456_789)
    assert member.xattrs == {b"user.a": b"\0\xff"}
    assert tar[member.data_offset_bytes :][: member.size_bytes] == b"content"


def test_times_later_than_asked_for_are_that(top: Path) -> None:
    (top / "old").touch()
    (top / "new").touch()
    os.utime(top / "old", ns=(0, 5))
    found = scanned(archive(top, latest_mtime=1000)[0])
    assert [(member.name, member.mtime) for member in found] == [(b"new", (1000, 0)), (b"old", (0, 5))]


def test_hardlinks_lead_to_the_first_name_and_say_the_attributes_again(top: Path) -> None:
    (top / "b").mkdir()
    (top / "b" / "two").write_bytes(b"data")
    os.setxattr(top / "b" / "two", "user.a", b"1")
    (top / "a-one").hardlink_to(top / "b" / "two")
    (top / "c-link").symlink_to("nowhere")
    os.link(top / "c-link", top / "d-link", follow_symlinks=False)
    one, _, two, link, again = members(top)
    assert (one.type, one.name, one.size_bytes) == (MemberType.FILE, b"a-one", 4)
    assert (two.type, two.name, two.link, two.size_bytes) == (MemberType.HARDLINK, b"b/two", b"a-one", 0)
    assert two.xattrs == one.xattrs == {b"user.a": b"1"}
    assert (link.type, link.link) == (MemberType.SYMLINK, b"nowhere")
    assert (again.type, again.link) == (MemberType.HARDLINK, b"c-link")


def test_symlinks_are_said_and_never_followed(top: Path) -> None:
    (top / "out").symlink_to("/etc")
    (top / "long").symlink_to("x" * 4000)
    (top / "up").symlink_to("../..")
    assert [(member.name, member.link) for member in members(top)] == [
        (b"long", b"x" * 4000), (b"out", b"/etc"), (b"up", b"../.."),
    ]  # fmt: skip


def test_holes_are_zeros_and_data_is_in_its_place(top: Path) -> None:
    size = (5 << 20) + 7
    with open(top / "sparse", "wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"middle", 3 << 20)
    with open(top / "tail", "wb") as file:
        os.pwrite(file.fileno(), b"end", 1 << 20)
    tar, _ = archive(top)
    for member in scanned(tar):
        found = tar[member.data_offset_bytes :][: member.size_bytes]
        assert found == (top / os.fsdecode(member.name)).read_bytes()


def test_a_huge_hole_is_refused_before_its_first_zero(top: Path) -> None:
    with open(top / "huge", "wb") as file:
        file.truncate(1 << 43)
    written: list[int] = []
    with pytest.raises(LimitExceeded, match="huge"):
        archive(top, on_write=lambda data: written.append(len(data)))
    assert sum(written) == 0


def test_sockets_are_left_out_and_counted(top: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(top / "s"))
        _, changeset = archive(top)
    assert changeset.left_out == {"sockets": 1}
    assert changeset.entries == 0


def test_fifos_are_not_opened(top: Path) -> None:
    os.mkfifo(top / "fifo")
    [member] = members(top)
    assert member.type is MemberType.FIFO


def test_any_depth_with_few_descriptors(top: Path) -> None:
    here = os.open(top, os.O_RDONLY)
    depth = 3000
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    most = 0

    def count(_: object) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))

    before = len(os.listdir("/proc/self/fd"))
    tar, changeset = archive(top, on_write=count)
    assert changeset.entries == depth
    assert scanned(tar)[-1].name == b"d/" * depth
    assert most - before <= 4
    remove_tree(top / "d")  # for shutil it is too deep


def test_a_path_over_the_limit_is_refused(top: Path) -> None:
    (top / "a" / "bbbb").mkdir(parents=True)
    with pytest.raises(LimitExceeded, match="path of 6 bytes"):
        archive(top, limits=Limits(path_bytes=5))


def test_more_names_than_the_limit_are_refused(top: Path) -> None:
    for number in range(6):
        (top / str(number)).touch()
    with pytest.raises(LimitExceeded, match="more than 5 entries"):
        archive(top, limits=Limits(entries=5))


def test_more_bytes_than_the_limit_are_refused(top: Path) -> None:
    for number in range(3):
        (top / str(number)).write_bytes(bytes(1000))
    with pytest.raises(LimitExceeded, match="over the limit of 4000"):
        archive(top, limits=Limits(tar_bytes=4000))


@pytest.mark.parametrize("name", [".wh.a", ".wh..wh..opq", ".wh."])
def test_a_file_that_would_be_a_whiteout_is_refused(top: Path, name: str) -> None:
    (top / "d").mkdir()
    (top / "d" / name).touch()
    with pytest.raises(UnsupportedError, match="whiteouts"):
        archive(top)


def test_an_attribute_that_cannot_be_said_is_refused_and_named(top: Path) -> None:
    (top / "f").touch()
    os.setxattr(top / "f", "user.a=b", b"")
    with pytest.raises(UnsupportedError, match=r"b'f'.*user\.a=b"):
        archive(top)


def test_what_the_sink_raises_is_passed_on(top: Path) -> None:
    (top / "f").touch()

    def broken(_: Buffer) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        archive(top, on_write=broken)


# What changes meanwhile


def in_the_middle(act: Callable[[], object]) -> Callable[[Buffer], object]:
    """Does it once, when the first bytes come."""
    acts = [act]
    return lambda _: acts.pop()() if acts else None


def changed(top: Path, act: Callable[[], object], error: type[BlockdevError] = SourceChanged) -> None:
    with pytest.raises(error, match="changed while it was read"):
        archive(top, on_write=in_the_middle(act))


@pytest.fixture
def two_files(top: Path) -> Path:
    (top / "a").write_bytes(bytes(100))
    (top / "b").write_bytes(bytes(100))
    os.utime(top / "a", ns=(0, 0))
    os.utime(top / "b", ns=(0, 0))
    return top


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def test_a_file_that_grows_is_refused(two_files: Path) -> None:
    changed(two_files, lambda: append(two_files / "a"))


def test_a_file_that_shrinks_is_refused(two_files: Path) -> None:
    changed(two_files, lambda: os.truncate(two_files / "a", 10))


def test_a_file_that_is_written_over_is_refused(two_files: Path) -> None:
    changed(two_files, lambda: (two_files / "a").write_bytes(b"x" * 100))


def test_a_name_that_goes_is_refused(two_files: Path) -> None:
    changed(two_files, (two_files / "b").unlink)


def test_a_name_that_comes_is_refused(two_files: Path) -> None:
    os.utime(two_files, ns=(0, 0))
    changed(two_files, (two_files / "c").touch)


def test_a_directory_that_is_moved_away_is_refused(top: Path, tmp_path: Path) -> None:
    """What then is above it is another directory, and no way back."""
    (top / "d").mkdir()
    (top / "d" / "f").touch()
    changed(top, lambda: (top / "d").rename(tmp_path / "elsewhere"))


def test_a_file_that_became_a_symlink_is_not_followed(two_files: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (two_files / "d").mkdir()

    def swap() -> None:
        (two_files / "b").unlink()
        (two_files / "b").symlink_to(tmp_path / "secret")

    seen: list[bytes] = []
    act = in_the_middle(swap)

    def write(data: Buffer) -> None:
        seen.append(bytes(data))
        act(data)

    with pytest.raises(SourceChanged):
        archive(two_files, on_write=write)
    assert b"secret" not in b"".join(seen).replace(os.fsencode(tmp_path / "secret"), b"")


# Marks of overlay: only root can make and see them


@pytest.mark.root
def test_whiteouts_and_opaque_directories_become_those_of_oci(top: Path) -> None:
    mknod(top / "gone")
    os.link(top / "gone", top / "gone too")  # the kernel links them
    (top / "d").mkdir()
    (top / "d" / "+first").touch()
    mknod(top / "d" / "gone")
    os.setxattr(top / "d", OPAQUE, b"y")
    os.setxattr(top / "d", "trusted.overlay.origin", b"\0handle")
    os.setxattr(top / "d", "trusted.overlay.impure", b"y")
    found = members(top)
    assert [member.name for member in found] == [
        b"d/", b"d/.wh..wh..opq", b"d/+first", b"d/.wh.gone", b".wh.gone", b".wh.gone too",
    ]  # fmt: skip
    assert all(not member.xattrs for member in found)
    for member in found:
        if b".wh." in member.name:
            assert (member.type, member.mode, member.mtime, member.uid) == (MemberType.FILE, 0, (0, 0), 0)


@pytest.mark.root
def test_whiteout_files_count_in_a_directory_that_is_said_to_hold_some(top: Path) -> None:
    for directory, value in (("with", b"x"), ("without", b"")):
        (top / directory).mkdir()
        if value:
            os.setxattr(top / directory, OPAQUE, value)
        (top / directory / "gone").touch()
        (top / directory / "full").write_bytes(b"x")
        for name in ("gone", "full"):
            os.setxattr(top / directory / name, "trusted.overlay.whiteout", b"")
    assert names(top) == [b"with/", b"with/full", b"with/.wh.gone", b"without/", b"without/full", b"without/gone"]


@pytest.mark.root
def test_an_opaque_top_is_said(top: Path) -> None:
    os.setxattr(top, OPAQUE, b"y")
    assert names(top) == [b".wh..wh..opq"]


@pytest.mark.root
def test_a_whiteout_of_a_whiteouts_name_is_refused(top: Path) -> None:
    """`.wh.` and `.wh..opq` would be the mark of an opaque directory."""
    mknod(top / ".wh..opq")
    with pytest.raises(UnsupportedError, match="whiteouts"):
        archive(top)


@pytest.mark.root
@pytest.mark.parametrize("mark", ["redirect", "metacopy"])
def test_an_upper_directory_that_leans_on_lower_ones_is_refused(top: Path, mark: str) -> None:
    (top / "d").mkdir()
    os.setxattr(top / "d", f"trusted.overlay.{mark}", b"/elsewhere")
    with pytest.raises(UnsupportedError, match=f"'d' has overlay's mark {mark}"):
        archive(top)


@pytest.mark.root
def test_attributes_of_the_host_and_of_root_stay_there(top: Path) -> None:
    (top / "f").touch()
    capability = struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0)
    os.setxattr(top / "f", "security.capability", capability)
    os.setxattr(top / "f", "trusted.mine", b"x")
    # No overlay of ours has marks with this prefix.
    os.setxattr(top / "f", "user.overlay.opaque", b"y")
    tar, changeset = archive(top)
    assert scanned(tar)[0].xattrs == {b"security.capability": capability, b"user.overlay.opaque": b"y"}
    assert changeset.left_out == {"trusted_xattrs": 1}


@pytest.mark.root
def test_devices_are_said_and_never_opened(top: Path) -> None:
    mknod(top / "c", stat.S_IFCHR, os.makedev(4095, 1048575))
    mknod(top / "b", stat.S_IFBLK, os.makedev(259, 7))
    block, char = members(top)
    assert (block.type, block.major, block.minor) == (MemberType.BLOCK, 259, 7)
    assert (char.type, char.major, char.minor) == (MemberType.CHAR, 4095, 1048575)


@pytest.fixture
def mount(top: Path) -> Iterator[Path]:
    at = top / "mounted"
    at.mkdir()
    assert os.system(f"mount -t tmpfs none '{at}'") == 0
    yield at
    os.system(f"umount '{at}'")


@pytest.mark.root
def test_what_is_mounted_below_is_refused(top: Path, mount: Path) -> None:
    (mount / "of another").touch()
    with pytest.raises(UnsupportedError, match="another file system is mounted there"):
        archive(top)
