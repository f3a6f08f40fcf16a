# SPDX-License-Identifier: Apache-2.0
"""Layers stacked at one mount point, all of which goes when that is unmounted, and at once when this process dies.

The layers are mounted in a mount namespace of their own, which ends with this call; the stack on top of them, which
holds what it needs of them, is moved out of it (man 2 open_tree, move_mount).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from blockdev.errors import KernelError
from blockdev.kernel import tree

# Linux: include/uapi/linux/mount.h, sched.h
_CLONE_NEWNS: Final = 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 0x1, 0x2, 0x4
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_READ_ONLY: Final = _MS_RDONLY | _MS_NOSUID | _MS_NODEV

_libc = ctypes.CDLL(None, use_errno=True)

MountLayer = Callable[[Path], None]  # mounts a layer at an empty directory


def mount_stack(layers: Sequence[MountLayer], target: Path) -> None:
    """`layers`, topmost first, read-only at `target`: an overlay, or the only one itself.

    For a program of its own, with one thread: it changes its mount namespace on the way. Raises KernelError, OSError,
    and what a layer raises; then nothing is mounted.
    """
    outside = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "a mount namespace")
        try:
            stack = _stacked(layers, target)
        finally:
            _check(_libc.setns(outside, _CLONE_NEWNS), "the mount namespace of before")
    finally:
        os.close(outside)
    try:
        tree.move(stack, target)
    except OSError as error:
        raise KernelError(f"mount at {target}: {error.strerror}") from None
    finally:
        os.close(stack)


def _stacked(layers: Sequence[MountLayer], place: Path) -> int:
    """A descriptor of the stack's mount, which is in no namespace. `place`: hidden, here alone, by what it needs."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", str(place), "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0700")
    # Overlay's directories are named from here: the options of a mount share a page.
    os.chdir(place)
    names = [format(number, "x") for number in range(len(layers))]
    for name, mount_layer in zip(names, layers, strict=True):
        os.mkdir(name, 0o700)
        mount_layer(Path(name))
    top = names[0]
    if len(names) > 1:
        top = "stack"
        os.mkdir(top, 0o700)
        options = f"index=off,redirect_dir=off,metacopy=off,lowerdir={':'.join(names)}"
        _mount("overlay", top, "overlay", _READ_ONLY, options)
    try:
        return tree.clone(top)
    except OSError as error:
        raise KernelError(f"the stack: {error.strerror}") from None


def _mount(source: str, target: str, fs_type: str, flags: int, data: str = "") -> None:
    arguments = (os.fsencode(source), os.fsencode(target), fs_type.encode(), ctypes.c_ulong(flags))
    _check(_libc.mount(*arguments, data.encode() if data else None), f"mount of {source} at {target}")


def _check(result: int, what: str) -> None:
    """Raises KernelError."""
    if result < 0:
        raise KernelError(f"{what}: {os.strerror(ctypes.get_errno())}")
