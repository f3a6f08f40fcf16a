# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockdev.formats.layer_file import FORMATS
from snapshotter.config import Config
from snapshotter.contracts import CONTRACTS, Lower, Mount, host
from snapshotter.contracts.limit import check_layers
from snapshotter.contracts.mount import directories_of, extraction_mounts, lowers_of, own_directory
from snapshotter.errors import FailedPrecondition

UPPER, WORK = Path("/r/snapshots/7/fs"), Path("/r/snapshots/7/work")
PAGE_BYTES = 4096
OVERLAY_LOWERS = 500  # Linux: fs/overlayfs/params.h, OVL_MAX_STACK
# What containerd appends to the options under SELinux; and the same after a client split it at its comma.
CONTEXTS = (
    ('context="system_u:object_r:container_file_t:s0:c1,c2"',),
    ('context="system_u:object_r:container_file_t:s0:c1', 'c2"'),
    ("context=system_u:object_r:container_file_t:s0",),
    ('context="upperdir=/x,lowerdir=/y:/z"',),
)


def lowers(*names: str) -> list[Lower]:
    return [Lower(Path("/r/m", name), "tar-index", "0" * 64) for name in names]


def test_a_container_stands_on_its_layers_topmost_first() -> None:
    (mount,) = host.container_mounts(lowers("c", "b", "a"), UPPER, WORK)
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert set(mount.options) == {
        "index=off",
        "redirect_dir=off",
        "metacopy=off",
        "upperdir=/r/snapshots/7/fs",
        "workdir=/r/snapshots/7/work",
        "lowerdir=/r/m/c:/r/m/b:/r/m/a",
    }


def test_a_container_on_one_layer_is_an_overlay_too() -> None:
    (mount,) = host.container_mounts(lowers("a"), UPPER, WORK)
    assert mount.type == "overlay"
    assert "lowerdir=/r/m/a" in mount.options


def test_a_snapshot_without_layers_is_its_own_directory() -> None:
    assert own_directory(UPPER, read_only=False) == [Mount("bind", str(UPPER), ("rbind", "rw"))]
    assert own_directory(UPPER, read_only=True) == [Mount("bind", str(UPPER), ("rbind", "ro"))]


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


def as_containerd_mounts(options: list[str], *, read_only: bool) -> str:
    """The data of mount(2). containerd 1.6 to 2.x, mount package: options of 3,584 bytes and more have the lower
    directories relative to the directory of their longest common prefix; to look into a rootfs without changing it,
    the upper directory becomes the topmost lower one."""
    values = dict(option.partition("=")[::2] for option in options)
    lower = values["lowerdir"].split(":")
    if read_only:
        lower = [values["upperdir"], *lower]
        options = [option for option in options if not option.startswith(("upperdir=", "workdir="))]
    options = [option for option in options if not option.startswith("lowerdir=")]
    whole = [*options, "lowerdir=" + ":".join(lower)]
    if sum(map(len, whole)) >= PAGE_BYTES - 512:
        shared = os.path.dirname(os.path.commonprefix(lower)) + "/"  # noqa: RUF071, it goes by characters
        whole = [*options, "lowerdir=" + ":".join(name.removeprefix(shared) for name in lower)]
    return ",".join(whole)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("root", [Config().root, "/" + "r" * 96], ids=["default", "longest"])
def test_as_many_layers_as_the_contract_takes_fit_the_page_of_mount_options(root: str, mapped: bool) -> None:
    """Whatever their numbers, and with the label that containerd adds under SELinux."""
    Config(root=root)
    directory = Path(root, "snapshots", "1000000000")
    below = directory / "l" if mapped else Path(root, "m")
    stack = [below / format(0xFFFFFF - number, "x") for number in range(host.MAX_LAYERS)]
    named = [Lower(path, "tar-index", "0" * 64) for path in stack]
    (mount,) = host.container_mounts(named, directory / "fs", directory / "work")
    options = [*mount.options, 'context="' + "c" * 200 + '"']
    for read_only in (False, True):
        data = as_containerd_mounts(options, read_only=read_only)
        assert data.count(":") + 1 >= host.MAX_LAYERS
        assert len(data) < PAGE_BYTES
    # One directory of the kernel's limit is the upper one when it is looked at read-only.
    assert host.MAX_LAYERS + 1 <= OVERLAY_LOWERS


def test_layers_beyond_the_limit_are_refused_with_the_limit_and_the_key() -> None:
    layers = [SimpleNamespace(id=number) for number in (1, 2, 3, 2, 1)]
    for once, count in ((True, 3), (False, 5)):
        check_layers(layers, count, "mine", "top", equal_once=once)  # type: ignore[arg-type]
        with pytest.raises(FailedPrecondition) as caught:
            check_layers(layers, count - 1, "mine", "top", equal_once=once)  # type: ignore[arg-type]
        for part in ("'top'", f" {count} layers", f" {count - 1}:", "max_layers", "[snapshotters.mine]"):
            assert part in str(caught.value)
        assert ("equal ones counted once" in str(caught.value)) == once


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


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([], []),
        ([Mount("bind", "/a", ("rbind", "ro"))], ["/a"]),
        ([Mount("overlay", "overlay", ("lowerdir=/l:/m", "x"))], ["/l", "/m"]),
        ([Mount("overlay", "overlay", ("lowerdir+=/l", "lowerdir+=/m"))], ["/l", "/m"]),
        ([Mount("overlay", "overlay", ("lowerdir=/l", "upperdir=/u", "workdir=/w"))], []),
        ([Mount("erofs", "/a", ())], []),
        ([Mount("bind", "/a", ()), Mount("bind", "/a", ())], []),
    ],
)
def test_what_a_view_shows(mounts: list[Mount], expected: list[str]) -> None:
    assert lowers_of(mounts) == expected


def test_our_own_answers_are_recognised() -> None:
    assert directories_of(extraction_mounts(UPPER)) == [str(UPPER)]
    assert directories_of(host.container_mounts(lowers("a"), UPPER, WORK)) == [str(UPPER)]
    assert directories_of(own_directory(UPPER, read_only=False)) == [str(UPPER)]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("answer", ["extraction", "container", "view", "no layers"])
def test_options_that_containerd_appends_under_selinux_change_nothing(context: tuple[str, ...], answer: str) -> None:
    (mount,) = {
        "extraction": extraction_mounts(UPPER),
        "container": host.container_mounts(lowers("b", "a"), UPPER, WORK),
        "view": host.container_mounts(lowers("b", "a"), None, None),
        "no layers": own_directory(UPPER, read_only=False),
    }[answer]
    for options in ((*mount.options, *context), (*context, *mount.options)):
        labelled = Mount(mount.type, mount.source, options)
        assert directories_of([labelled]) == directories_of([mount]) == ([] if answer == "view" else [str(UPPER)])


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_names_formats_that_exist(name: str) -> None:
    assert CONTRACTS[name].FORMATS
    assert not CONTRACTS[name].FORMATS - set(FORMATS)
