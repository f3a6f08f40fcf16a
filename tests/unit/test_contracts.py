# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.formats.layer_file import FORMATS
from snapshotter.config import Config
from snapshotter.contracts import CONTRACTS, Mount, host
from snapshotter.contracts.mount import directories_of, extraction_mounts

UPPER, WORK = Path("/r/snapshots/7/fs"), Path("/r/snapshots/7/work")
PAGE_BYTES = 4096


def lowers(*names: str) -> list[Path]:
    return [Path("/r/m", name) for name in names]


def test_a_container_stands_on_its_layers_topmost_first() -> None:
    (mount,) = host.container_mounts(lowers("c", "b", "a"), UPPER, WORK)
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert set(mount.options) == {
        "index=off",
        "upperdir=/r/snapshots/7/fs",
        "workdir=/r/snapshots/7/work",
        "lowerdir=/r/m/c:/r/m/b:/r/m/a",
    }


def test_a_container_on_one_layer_is_an_overlay_too() -> None:
    (mount,) = host.container_mounts(lowers("a"), UPPER, WORK)
    assert mount.type == "overlay"
    assert "lowerdir=/r/m/a" in mount.options


def test_a_container_on_nothing_gets_its_own_directory() -> None:
    assert host.container_mounts([], UPPER, WORK) == [Mount("bind", str(UPPER), ("rbind", "rw"))]


def test_a_view_has_no_upper_directory() -> None:
    (mount,) = host.container_mounts(lowers("b", "a"), None, None)
    assert mount.type == "overlay"
    assert "lowerdir=/r/m/b:/r/m/a" in mount.options
    assert not any(option.startswith(("upperdir", "workdir")) for option in mount.options)


def test_a_view_of_one_layer_is_that_layer_read_only() -> None:
    """An overlay without an upper directory needs two lower ones."""
    assert host.container_mounts(lowers("a"), None, None) == [Mount("bind", "/r/m/a", ("rbind", "ro"))]


def test_equal_layers_of_one_chain_are_named_once() -> None:
    """Overlay refuses a directory twice; the topmost hides the others anyway."""
    (mount,) = host.container_mounts(lowers("a", "b", "a", "c", "b"), UPPER, WORK)
    assert "lowerdir=/r/m/a:/r/m/b:/r/m/c" in mount.options
    assert host.container_mounts(lowers("a", "a"), None, None) == [Mount("bind", "/r/m/a", ("rbind", "ro"))]


@pytest.mark.parametrize("first", [1, 0x100, 0xFFF00])
def test_sixty_layers_fit_the_page_of_mount_options(first: int) -> None:
    root = Path(Config().root)
    assert str(root) == "/var/lib/containerd/io.containerd.snapshotter.v1.tardev"
    directory = root / "snapshots" / "100000"
    stack = [root / "m" / format(first + i, "x") for i in range(60)]
    (mount,) = host.container_mounts(stack, directory / "fs", directory / "work")
    assert len(",".join(mount.options)) < PAGE_BYTES


def test_an_extraction_may_write_and_run_nothing() -> None:
    (mount,) = extraction_mounts(Path("/r/snapshots/7/fs"))
    assert (mount.type, mount.source) == ("bind", "/r/snapshots/7/fs")
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(mount.options)
    # containerd 2.4 takes a read-only last mount for a layer that is there already.
    assert "ro" not in mount.options
    # Without it, mount(2) takes the type for a file system.
    assert {"bind", "rbind"} & set(mount.options)


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([], []),
        ([Mount("bind", "/a", ("rw",))], ["/a"]),
        ([Mount("rbind", "/a", ())], ["/a"]),
        ([Mount("overlay", "overlay", ("lowerdir=/l", "upperdir=/u", "workdir=/w"))], ["/u"]),
        ([Mount("overlay", "overlay", ("lowerdir=/l:/m",))], []),
        ([Mount("overlay", "overlay", ("lowerdir=/upperdir=/x",))], []),
        ([Mount("ext4", "/dev/sda", ())], []),
        ([Mount("erofs", "/a", ())], []),
        ([Mount("", "/a", ())], []),
        ([Mount("bind", "/a", ()), Mount("bind", "/a", ())], []),
        ([Mount("bind", "/a", ()), Mount("overlay", "overlay", ("upperdir=/u",))], []),
    ],
)
def test_where_an_apply_would_write(mounts: list[Mount], expected: list[str]) -> None:
    assert directories_of(mounts) == expected


def test_our_own_answers_are_recognised() -> None:
    assert directories_of(extraction_mounts(UPPER)) == [str(UPPER)]
    assert directories_of(host.container_mounts(lowers("a"), UPPER, WORK)) == [str(UPPER)]
    assert directories_of(host.container_mounts([], UPPER, WORK)) == [str(UPPER)]


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_names_formats_that_exist(name: str) -> None:
    assert CONTRACTS[name].FORMATS
    assert not CONTRACTS[name].FORMATS - set(FORMATS)
