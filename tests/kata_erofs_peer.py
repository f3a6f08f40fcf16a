# SPDX-License-Identifier: Apache-2.0
"""What containerd and upstream Kata do with the answer of the contract `kata-erofs`: the mount manager's part, the
shim's (runtime-rs), the agent's.

From what their code does, step by step (containerd: core/mount/manager; kata-containers/kata-containers:
src/runtime-rs/crates/resource/src/rootfs/erofs_rootfs.rs, src/libs/kata-types/src/{gpt_disk,dmverity}.rs,
src/agent/src/storage/multi_layer_erofs.rs). Whatever they refuse raises Refused; what they let pass passes here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from snapshotter.contracts import Mount
from tests.kata_peer import PAGE_BYTES, Refused

SECTOR_BYTES: Final = 512
ALIGNMENT_SECTORS: Final = 2048
PARTITIONS_MAX: Final = 128
DEVICES_MAX: Final = 129
EXTENT_SECTORS_MAX: Final = 0x80000000 >> 9
SIDECAR_BYTES_MAX: Final = 64 << 10
OVERLAYS: Final = ("overlay", "format/overlay", "format/mkdir/overlay")
ALLOWED: Final = ("mkdir/", "format/")  # and erofs: what the shim wants to see as it is
ZERO_SALT: Final = "0" * 64


@dataclass(frozen=True)
class Storage:
    """Of the request that the agent gets. `source`: the disk, in the guest."""

    fstype: str
    source: str
    options: tuple[str, ...]
    mount_point: str = "/run/kata-containers/shared/containers/c/rootfs"


@dataclass(frozen=True)
class Partition:
    number: int
    path: Path
    first_lba: int
    last_lba: int
    name: str


@dataclass(frozen=True)
class Plan:
    """`partitions`: of the one disk; empty where there is a single layer, which is handed over as it is."""

    storages: list[Storage]
    partitions: list[Partition] = field(default_factory=list)
    extents: list[tuple[Path | None, int, int]] = field(default_factory=list)  # file or metadata, sectors, offset
    writable: Path | None = None


def activated(mounts: Sequence[Mount]) -> list[Mount]:
    """containerd from 2.2 on, for a shim that says mkdir/*, format/* and erofs: it makes the file system of `mkfs/`."""
    found = []
    for mount in mounts:
        if not mount.type.startswith("mkfs/"):
            found.append(mount)
            continue
        values = dict(option.partition("=")[::2] for option in mount.options)
        kind, size = values.get("X-containerd.mkfs.fs", "ext4"), values.get("X-containerd.mkfs.size", "")
        if kind not in ("ext2", "ext3", "ext4", "xfs") or not size.isdigit() or not int(size):
            raise Refused(f"a file system of type {kind!r}, size {size!r}")
        rest = tuple(option for option in mount.options if not option.startswith("X-containerd.mkfs."))
        found.append(replace(mount, type=mount.type.removeprefix("mkfs/"), options=rest))
    return found


def shim(mounts: Sequence[Mount], disk: str = "/dev/vda") -> Plan:
    if len(mounts) < 2 or not any(mount.type == "erofs" for mount in mounts):
        raise Refused("no rootfs of several layers")
    if not any(mount.type in OVERLAYS for mount in mounts):
        raise Refused("no overlay")
    layers = [mount for mount in mounts if mount.type == "erofs"]
    uppers = [mount for mount in mounts if mount.type == "ext4"]
    if len(layers) + len(uppers) > DEVICES_MAX:
        raise Refused(f"exceeded maximum block devices: {len(layers) + len(uppers)} > {DEVICES_MAX}")
    storages = []
    for mount in uppers:
        kept = [option for option in mount.options if option != "loop"]
        storages.append(Storage("ext4", "/dev/vdz", (*kept, "X-kata.overlay-upper", "X-kata.multi-layer=true")))
    for mount in layers:
        if not Path(mount.source).is_file():
            raise Refused(f"{mount.source} is not a regular file")
    hints = tuple(
        "X-kata.mkdir.path=" + option.removeprefix("X-containerd.mkdir.path=")
        for mount in mounts
        if mount.type in OVERLAYS
        for option in mount.options
        if option.startswith("X-containerd.mkdir.path=")
    )
    writable = Path(uppers[0].source) if uppers else None
    if len(layers) == 1:
        # Here what the sidecar says is lost.
        kept = [o for o in layers[0].options if o != "loop" and not o.startswith(("device=", "X-kata."))]
        lost = (*kept, "X-kata.overlay-lower", "X-kata.multi-layer=true", *hints)
        return Plan([*storages, Storage("erofs", disk, lost)], writable=writable)
    partitions = _partitions([Path(mount.source) for mount in layers])
    for number, mount in enumerate(layers):
        options = (
            "X-kata.overlay-lower", "X-kata.multi-layer=true", "X-kata.gpt-partitioned=true",
            f"X-kata.partition-number={number + 1}", *_verity_options(mount), *(hints if not number else ()),
        )  # fmt: skip
        storages.append(Storage("erofs", disk, options))
    return Plan(storages, partitions, _extents(partitions), writable)


def _partitions(paths: Sequence[Path]) -> list[Partition]:
    if len(paths) > PARTITIONS_MAX:
        raise Refused(f"exceeds maximum {PARTITIONS_MAX} partitions")
    found, at = [], ALIGNMENT_SECTORS
    for index, path in enumerate(paths):
        sectors = -(-path.stat().st_size // SECTOR_BYTES)
        if not sectors:
            raise Refused(f"{path} is empty")
        start = -(-at // ALIGNMENT_SECTORS) * ALIGNMENT_SECTORS
        name = f"erofs-{index}-s{path.parent.name}"[:36]
        found.append(Partition(index + 1, path, start, start + sectors - 1, name))
        at = start + sectors
    return found


def _extents(partitions: Sequence[Partition]) -> list[tuple[Path | None, int, int]]:
    found: list[tuple[Path | None, int, int]] = [(None, ALIGNMENT_SECTORS, 0)]
    end = ALIGNMENT_SECTORS - 1
    for part in partitions:
        if part.first_lba > end + 1:
            found.append((None, part.first_lba - end - 1, 0))
        left, offset = part.last_lba - part.first_lba + 1, 0
        while left:
            sectors = min(left, EXTENT_SECTORS_MAX)
            found.append((part.path, sectors, offset))
            left, offset = left - sectors, offset + sectors
        end = part.last_lba
    return found


def _verity_options(mount: Mount) -> list[str]:
    sidecars = [option.partition("=")[2] for option in mount.options if option.startswith("X-containerd.dmverity=")]
    if not sidecars:
        return []
    try:
        raw = Path(sidecars[-1]).read_bytes()
        if len(raw) > SIDECAR_BYTES_MAX:
            raise Refused(f"{sidecars[-1]} is too large")
        found = json.loads(raw)
        root_hash, offset, salt = found["roothash"], found["hashoffset"], found.get("salt")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"failed to parse dm-verity metadata file {sidecars[-1]}: {error}") from None
    if not isinstance(root_hash, str) or type(offset) is not int or offset < 0 or not isinstance(salt, str | None):
        raise Refused(f"failed to parse dm-verity metadata file {sidecars[-1]}")
    with open(mount.source, "rb") as file:
        file.seek(offset)
        superblock = file.read(512)
    has_superblock = superblock.startswith(b"verity\0\0")
    if salt is None:
        salt = superblock[256 - 64 : 256].hex() if has_superblock else ZERO_SALT
    return [
        "X-kata.dmverity-enabled=true", f"X-kata.dmverity.roothash={root_hash}",
        f"X-kata.dmverity.hashoffset={offset}", f"X-kata.dmverity.salt={salt}",
        f"X-kata.dmverity.no-superblock={'false' if has_superblock else 'true'}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Guest:
    """`tables`: parameters of the dm-verity target of each layer, topmost first, as dmsetup takes them; "" of a layer
    that is mounted as the host gives it. `overlay`: data of the overlay's mount."""

    tables: list[str]
    overlay: str
    made: list[str]


def agent(storages: Sequence[Storage], container: str = "c" * 64) -> Guest:
    uppers = [storage for storage in storages if "X-kata.overlay-upper" in storage.options]
    lowers = [storage for storage in storages if "X-kata.overlay-lower" in storage.options]
    if len(uppers) > 1 or any(storage.fstype != "ext4" for storage in uppers):
        raise Refused("at most one upper layer, of ext4")
    if not lowers:
        raise Refused("missing erofs lower layer storage")
    lowers = sorted(lowers, key=lambda storage: int(_value(storage, "X-kata.partition-number") or 0))
    base = f"/run/kata-containers/{container}/multi-layer"
    made = []
    for storage in storages:
        for option in storage.options:
            if option.startswith("X-kata.mkdir.path="):
                path = option.removeprefix("X-kata.mkdir.path=").partition(":")[0]
                path = path.replace("{{ mount 0 }}", f"{base}/upper").replace("{{ mount 1 }}", f"{base}/lower-0")
                if not path.startswith(f"{base}/") or ".." in path:
                    raise Refused(f"path traversal detected in mkdir path {path}")
                made.append(path)
    # The lower directories are named from the directory that they share.
    lower = ":".join(f"lower-{number}" for number in range(len(lowers)))
    data = f"upperdir={base}/upper/upper,lowerdir={lower},workdir={base}/upper/work"
    if len(data) + 1 > PAGE_BYTES:
        raise Refused(f"{len(data)} bytes of mount data are over a page")
    return Guest([_table(storage) for storage in lowers], data, made)


def _value(storage: Storage, key: str) -> str:
    return next((o.partition("=")[2] for o in storage.options if o.startswith(f"{key}=")), "")


def _table(storage: Storage) -> str:
    if "X-kata.dmverity-enabled=true" not in storage.options:
        return ""
    device = storage.source + (_value(storage, "X-kata.partition-number") or "")
    root_hash, offset = _value(storage, "X-kata.dmverity.roothash"), int(_value(storage, "X-kata.dmverity.hashoffset"))
    data_block = int(_value(storage, "X-kata.dmverity.blocksize") or 4096)
    hash_block = int(_value(storage, "X-kata.dmverity.hashsize") or 4096)
    salt = _value(storage, "X-kata.dmverity.salt") or "-"
    if not offset or offset % data_block or offset % hash_block:
        raise Refused(f"dm-verity hashoffset {offset} is not aligned")
    if len(root_hash) != 64 or not set(root_hash.lower()) <= set("0123456789abcdef"):
        raise Refused(f"invalid hash value {root_hash}")
    start = offset // hash_block
    if _value(storage, "X-kata.dmverity.no-superblock") != "true":
        start += -(-512 // hash_block)
    return f"1 {device} {device} {data_block} {hash_block} {offset // data_block} {start} sha256 {root_hash} {salt}"
