# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from blockdev.errors import KernelError
from blockdev.kernel import idmap, loop, mounts
from blockdev.kernel.mounts import MountEntry, kernel_release, mounted_below, parse_mountinfo
from tests.harness import run

# man 5 proc_pid_mountinfo: none, one and several optional fields
TABLE = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
36 22 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
41 22 0:5 / /dev rw shared:2 master:1 propagate_from:3 unbindable - tmpfs tmpfs rw
"""


def test_mounts_with_and_without_optional_fields() -> None:
    assert parse_mountinfo(TABLE) == [
        MountEntry(22, "/", "ext4", "/dev/vda"),
        MountEntry(36, "/mnt2", "ext3", "/dev/root"),
        MountEntry(41, "/dev", "tmpfs", "tmpfs"),
    ]


def test_blanks_tabs_newlines_and_backslashes_come_as_octal_escapes() -> None:
    line = r"50 22 0:6 / /a\040b\011c\012d\134e\043 rw - fuse.x\040y //server\040share/\134040 rw" + "\n"
    (entry,) = parse_mountinfo(line)
    assert entry.mount_point == "/a b\tc\nd\\e#"
    # An escaped backslash is one, and no beginning of the next escape.
    assert entry.source == "//server share/\\040"


def test_a_dash_in_a_name_is_no_separator() -> None:
    (entry,) = parse_mountinfo("50 22 0:6 /-/x /a-b rw,- shared:- - tmpfs - rw\n")
    assert entry == MountEntry(50, "/a-b", "tmpfs", "-")


def test_names_that_are_not_utf8_survive() -> None:
    text = b"50 22 0:6 / /a\xff\xc3\xbc rw - tmpfs tmpfs rw\n".decode("utf-8", "surrogateescape")
    (entry,) = parse_mountinfo(text)
    assert os.fsencode(entry.mount_point) == b"/a\xff\xc3\xbc"


@pytest.mark.parametrize("char", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(char: str) -> None:
    """The kernel escapes blank, tab, newline, backslash and hash; all else in a name comes as it is."""
    entries = parse_mountinfo(f"50 22 0:6 / /a{char}b rw - tmpfs tmpfs rw\n51 22 0:7 / /c rw - tmpfs tmpfs rw\n")
    assert [entry.mount_point for entry in entries] == [f"/a{char}b", "/c"]


def test_of_two_mounts_on_one_point_the_later_comes_last() -> None:
    text = "50 22 0:6 / /m rw - tmpfs low rw\n51 50 0:7 / /m rw - tmpfs high rw\n"
    assert [entry.source for entry in parse_mountinfo(text)] == ["low", "high"]


@pytest.mark.parametrize("text", ["", "\n", "50 22 0:6 / /m rw\n", "50 22 0:6 / - tmpfs tmpfs rw\n", "- tmpfs x rw\n"])
def test_lines_that_are_no_mounts_are_left_out(text: str) -> None:
    assert parse_mountinfo(text) == []


def test_the_running_kernels_table_is_read_whole() -> None:
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    entries = parse_mountinfo(text)
    assert len(entries) == text.count("\n")
    assert "/" in {entry.mount_point for entry in entries}


def test_mounts_below_a_directory_leave_itself_and_its_namesakes_out(tmp_path: Path) -> None:
    assert mounted_below(tmp_path) == []
    for entry in parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")):
        point = Path(entry.mount_point)
        if point.parent != Path("/"):
            assert entry in mounted_below(point.parent)
        assert entry not in mounted_below(point)
        assert entry not in mounted_below(Path(str(point)[:-1] or "/absent"))


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("6.12.2", (6, 12, 2)),
        ("6.12.2-arch1-1", (6, 12, 2)),
        ("6.1.0-42-cloud-amd64", (6, 1, 0)),
        ("6.18.44+deb13", (6, 18, 44)),
        ("6.13-rc1", (6, 13, 0)),
        ("5.15.167.4-microsoft-standard", (5, 15, 167)),
        ("7", (7, 0, 0)),
        ("6.12.", (6, 12, 0)),
        ("", (0, 0, 0)),
        ("next", (0, 0, 0)),
    ],
)
def test_kernel_release(text: str, release: tuple[int, int, int]) -> None:
    assert kernel_release(text) == release


@pytest.mark.parametrize(
    ("release", "able"),
    [((6, 12, 1), False), ((6, 12, 2), True), ((6, 13, 0), True), ((6, 2, 99), False), ((7, 0, 0), True)],
)
def test_files_are_mounted_without_a_loop_device_since_6_12_2(release: tuple[int, int, int], able: bool) -> None:
    assert (release >= mounts._FILE_BACKED_SINCE) is able


class LoopInfo64(ctypes.Structure):
    """Linux: include/uapi/linux/loop.h, written down a second time."""

    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_uint8 * 64),
        ("lo_crypt_name", ctypes.c_uint8 * 64),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class LoopConfig(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", LoopInfo64),
        ("reserved", ctypes.c_uint64 * 8),
    )


def test_the_loop_configuration_is_the_kernels_structure() -> None:
    config = LoopConfig.from_buffer_copy(loop._CONFIG.pack(7, 512, 5))
    assert loop._CONFIG.size == ctypes.sizeof(LoopConfig) == 304
    assert (config.fd, config.block_size, config.info.lo_flags) == (7, 512, 5)
    config.fd = config.block_size = config.info.lo_flags = 0
    assert not any(bytes(config))


def test_unmounting_what_is_not_mounted_is_nothing_to_do(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        mounts.unmount(tmp_path)
        mounts.unmount(tmp_path / "absent", lazily=True)
    else:
        with pytest.raises(KernelError):  # not even asked where there is nothing to unmount
            mounts.unmount(tmp_path)


@pytest.mark.parametrize("file_backed", [True, False])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, file_backed: bool) -> None:
    with pytest.raises(KernelError, match="absent"):
        mounts.mount_erofs(tmp_path / "absent", tmp_path, 512, file_backed=file_backed)


@pytest.mark.root
def test_a_user_namespace_has_the_maps_that_were_asked_for() -> None:
    with idmap.user_namespace("0 100000 10\n10 300000 5\n", "0 200000 65536\n") as fd:
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("user:")
        assert os.stat(f"/proc/self/fd/{fd}").st_ino != os.stat("/proc/self/ns/user").st_ino
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.root
@pytest.mark.parametrize("maps", ["", "0 0 0\n", "0 1 2\n1 5 2\n", "0 1 2\n5 2 3\n", "x\n", "0 4294967295 1\n"])
def test_maps_that_the_kernel_refuses_are_named(maps: str) -> None:
    with pytest.raises(KernelError, match="user namespace"):
        with idmap.user_namespace(maps, maps):
            pass


@pytest.mark.root
def test_what_cannot_be_mounted_with_mapped_ids_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with idmap.user_namespace("0 100000 10\n", "0 100000 10\n") as fd:
        for source in (tmp_path / "absent", Path("/proc")):
            with pytest.raises(KernelError, match=str(source)):
                idmap.mount_mapped(source, tmp_path, fd)
    assert mounted_below(tmp_path.parent) == []


def test_no_mount_is_found_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert mounts.mounted_at(tmp_path, ["empty", "file", "absent"]) == set()
    assert mounts.mounted_at(tmp_path / "absent", ["x"]) == set()
    assert mounts.mounted_at(Path("/"), ["proc", "absent"]) == {"proc"}
    with pytest.raises(KernelError, match="cannot look"):
        mounts.mounted_at(tmp_path / "file", ["x"])


@pytest.mark.root
@pytest.mark.parametrize("name", ["a b", "a\tb\nc", "a\\040b", "#", "\udcff"])
def test_a_directory_of_any_name_finds_its_mounts(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    (place / "m").mkdir(parents=True)
    assert mounted_below(place) == []
    run("mount", "-t", "tmpfs", "none", place / "m")
    try:
        assert [entry.mount_point for entry in mounted_below(place)] == [str(place / "m")]
        assert mounts.mounted_at(place, ["m"]) == {"m"}
    finally:
        assert mounts.unmount(place / "m")
        assert not mounts.unmount(place / "m")
    assert mounted_below(place) == []
