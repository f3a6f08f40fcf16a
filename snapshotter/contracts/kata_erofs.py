# SPDX-License-Identifier: Apache-2.0
"""Upstream Kata 4.x: the mounts of containerd's erofs snapshotter, of which runtime-rs makes one disk with a partition
for each layer, and its agent dm-verity targets (containerd: plugins/snapshots/erofs/erofs.go;
kata-containers/kata-containers: src/runtime-rs/crates/resource/src/rootfs/erofs_rootfs.rs,
src/agent/src/storage/multi_layer_erofs.rs).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blockdev.formats.layer_file import FORMATS as KNOWN_FORMATS
from blockdev.formats.layer_file import Format
from blockdev.vmm.gpt import PARTITIONS_MAX
from snapshotter.contracts.mount import Lower, Mount, Place

# Of data and hashes: nothing tells the agent of others.
BLOCK_BYTES: Final = 4096


def takes(layer_format: Format) -> bool:
    """Whether the agent can verify and mount such a layer."""
    blocks = (layer_format.params.data_block_bytes, layer_format.params.hash_block_bytes)
    return layer_format.stored and layer_format.file_system == "erofs" and blocks == (BLOCK_BYTES, BLOCK_BYTES)


FORMATS: Final = frozenset(name for name, known in KNOWN_FORMATS.items() if takes(known) and not known.of_chain)
PLACE: Final = Place.STORED
ENCODINGS: Final = ("",)
ROOT_HASH_LABEL: Final = ""
NAMES_PARENTS: Final = True
COUNTS_EQUAL_ONCE: Final = False
MAX_LAYERS: Final = PARTITIONS_MAX
# A single one gets no partition, and then no dm-verity either: it would be mounted as the host gives it.
MIN_LAYERS: Final = 2
REMAPS_IDS: Final = False
TAKES_WRITABLE: Final = True

_SIDECAR_SUFFIX: Final = ".dmverity"
SIDECAR_BYTES_MAX: Final = 64 << 10  # what runtime-rs reads


def container_mounts(
    lowers: Sequence[Lower], upper: Path | None, work: Path | None, encoding: str = "", writable_bytes: int = 0
) -> list[Mount]:
    """The numbers in the templates are positions in this list. Raises ValueError for fewer layers than MIN_LAYERS."""
    if len(lowers) < MIN_LAYERS:
        raise ValueError(f"{len(lowers)} layers: with fewer than {MIN_LAYERS} they would not be verified")
    mounts, options = [], []
    if upper is not None and work is not None and writable_bytes:
        image = upper.parent / "rwlayer.img"  # which containerd makes
        size = f"X-containerd.mkfs.size={writable_bytes}"
        mounts.append(Mount("mkfs/ext4", str(image), ("X-containerd.mkfs.fs=ext4", size, "rw", "loop")))
        top = "{{ mount 0 }}"
        options += [f"X-containerd.mkdir.path={top}/{name}:0755" for name in ("upper", "work")]
        options += [f"workdir={top}/work", f"upperdir={top}/upper"]
    elif upper is not None and work is not None:
        # For who mounts them on the host: the agent has a directory of its own.
        options += [f"workdir={work}", f"upperdir={upper}"]
    first = len(mounts)
    for lower in lowers:
        sidecar = f"X-containerd.dmverity={sidecar_path(lower.path)}"
        mounts.append(Mount("erofs", str(lower.path), ("ro", "loop", sidecar)))
    options.append(f"lowerdir={{{{ overlay {first} {len(mounts) - 1} }}}}")
    return [*mounts, Mount("format/mkdir/overlay", "overlay", tuple(options))]


def layer_files(mounts: Sequence[Mount]) -> list[Path]:
    """Raises ValueError."""
    if not mounts or mounts[-1].type != "format/mkdir/overlay":
        raise ValueError(f"mounts of the types {', '.join(mount.type for mount in mounts)} are not of this contract")
    return [Path(mount.source) for mount in mounts if mount.type == "erofs"]


def sidecar_path(layer: Path) -> Path:
    """The file beside a layer file that says where its hash tree is, and under which root hash."""
    return layer.with_name(layer.name + _SIDECAR_SUFFIX)


def layer_of_sidecar(name: str) -> str:
    """The name of the layer file; a name that is one already stays."""
    return name.removesuffix(_SIDECAR_SUFFIX)


def sidecar(root_hash: str, data_size_bytes: int, salt: bytes) -> bytes:
    """Its content. The tree is at once behind the data, without a superblock in between; `root_hash` in hexadecimal."""
    return json.dumps({"roothash": root_hash, "hashoffset": data_size_bytes, "salt": salt.hex()}).encode()


def sidecar_contradiction(raw: bytes, root_hash: str, data_size_bytes: int, salt: bytes) -> str:
    """Why it is not what `sidecar` gives; "" where it is."""
    wanted = sidecar(root_hash, data_size_bytes, salt)
    if raw == wanted:
        return ""
    try:
        found = json.loads(raw) if len(raw) <= SIDECAR_BYTES_MAX else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return "is no description of a hash tree"
    for key, what in (("roothash", "root hash"), ("hashoffset", "offset"), ("salt", "salt")):
        if found.get(key) != json.loads(wanted)[key]:
            return f"has another {what} than the layer"
    return "is written in another way"
