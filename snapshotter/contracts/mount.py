# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class Place(enum.Enum):
    """Where a runtime is told to look for layers."""

    MOUNTED = enum.auto()  # on the host, by the daemon: and there is what a container writes
    LINKED = enum.auto()  # files under names made of chain IDs: `snapshotter.links`
    STORED = enum.auto()  # files where they are, each with a sidecar: `snapshotter.sidecars`


@dataclass(frozen=True, slots=True)
class Mount:
    """containerd.types.Mount without its target, which no snapshotter of this kind sets."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lower:
    """A layer as a contract is told of it. `path`: where the daemon mounted it, or its file under the name that the
    contract gives it; `root_hash` in lower hexadecimal."""

    path: Path
    format: str
    root_hash: str


def own_directory(directory: Path, *, read_only: bool) -> list[Mount]:
    """Of a snapshot without layers, for which every runtime is told the same."""
    return [Mount("bind", str(directory), ("rbind", "ro" if read_only else "rw"))]


def extraction_mounts(directory: Path) -> list[Mount]:
    """Where a layer may be unpacked in vain: writable, for containerd takes a read-only one as filled already."""
    return [Mount("bind", str(directory), ("rbind", "rw", "nosuid", "nodev", "noexec"))]


def lowers_of(mounts: Sequence[Mount]) -> list[str]:
    """The directories that these mounts show and nobody can write to, topmost first; none where there are others."""
    if len(mounts) != 1:
        return []
    mount = mounts[0]
    if mount.type in ("bind", "rbind"):
        return [mount.source]
    if mount.type != "overlay" or any(option.startswith("upperdir=") for option in mount.options):
        return []
    return [
        path
        for option in mount.options
        for name, _, value in [option.partition("=")]
        if name in ("lowerdir", "lowerdir+")
        for path in value.split(":")
    ]


def directories_of(mounts: Sequence[Mount]) -> list[str]:
    """The directories that an Apply into these mounts would write to: none where it is not one."""
    if len(mounts) != 1:
        return []
    mount = mounts[0]
    if mount.type in ("bind", "rbind"):
        return [mount.source]
    if mount.type == "overlay":
        return [option.removeprefix("upperdir=") for option in mount.options if option.startswith("upperdir=")]
    return []
