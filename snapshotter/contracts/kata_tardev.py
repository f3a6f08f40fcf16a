# SPDX-License-Identifier: Apache-2.0
"""Microsoft's Kata: one mount that the shim does not mount but reads. Each layer becomes a block device of the VM,
which its agent verifies and stacks (microsoft/kata-containers, branch 3.2.0.azl4: src/tardev-snapshotter,
src/runtime/pkg/containerd-shim-v2/create.go, src/agent/src/storage).

Order and number of the options, and every character of them, are compared by the pod's policy (genpolicy: rules.rego).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.formats.layer_file import format_named
from snapshotter.contracts.mount import Lower, Mount, Place

FORMATS: Final = frozenset({"tarfs", "tar-index"})
PLACE: Final = Place.LINKED
# base64: branches 3.2.0.azl4 and erofs-main. plain: msft-main, and upstream's shim in Go, which know neither base64 nor
# the prefix. Which one a node has, nothing tells.
ENCODINGS: Final = ("base64", "plain")
# The agent's mount(2) of the overlay has a page for its data: 65 bytes for each layer's name, and two directories.
MAX_LAYERS: Final = 59
MIN_LAYERS: Final = 1
REMAPS_IDS: Final = False
TAKES_WRITABLE: Final = False
# Names are made of chain IDs, and policies hold as many as the image has layers: one more would be refused.
NAMES_PARENTS: Final = False
COUNTS_EQUAL_ONCE: Final = False
ROOT_HASH_LABEL: Final = "io.katacontainers.dm-verity.root-hash"

_TYPE: Final = "fuse3.kata-overlay"
_OPTION: Final = "io.katacontainers.fs-opt."


def container_mounts(
    lowers: Sequence[Lower],
    upper: Path | None,
    work: Path | None,
    encoding: str = ENCODINGS[0],
    writable_bytes: int = 0,
) -> list[Mount]:
    """Where a container writes, the agent says; so an active snapshot and a view are told the same."""
    plain = encoding == "plain"
    layers = [_layer(lower, str(lower.path) if plain else lower.path.name) for lower in lowers]
    options = [
        # Before the layers: the shim takes it for those that follow.
        *(() if plain else (f"{_OPTION}layer-src-prefix={lowers[0].path.parent}",)),
        *(f"{_OPTION}layer={layer if plain else _base64(layer)}" for layer in layers),
        f"{_OPTION}overlay-rw",
        f"lowerdir={':'.join(lower.path.name for lower in lowers)}",
    ]
    return [Mount(_TYPE, "/", tuple(options))]


def _layer(lower: Lower, source: str) -> str:
    """The shim cuts it at its commas: source, type, options."""
    return ",".join(
        (
            source,
            format_named(lower.format).file_system,
            "ro",
            f"{_OPTION}block_device=file",
            f"{_OPTION}is-layer",
            f"{_OPTION}root-hash={lower.root_hash}",
        )
    )


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")


def layer_files(mounts: Sequence[Mount]) -> list[Path]:
    """Raises ValueError."""
    if [mount.type for mount in mounts] != [_TYPE]:
        raise ValueError(f"mounts of the types {', '.join(mount.type for mount in mounts)} are not of this contract")
    return [layer.path for layer in named_layers(mounts[0].options)]


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """A layer's option, read back. `file_system`: "tar" or "erofs"."""

    path: Path
    file_system: str


def named_layers(options: Iterable[str]) -> list[NamedLayer]:
    """Of a mount's options in either encoding, topmost first. Raises ValueError.

    mount(8) and its helpers join options with commas, at which those of `plain` fall apart: the path comes first.
    """
    pieces = [piece for option in options for piece in option.split(",")]
    prefix, found = "", []
    for number, piece in enumerate(pieces):
        name, _, value = piece.partition("=")
        if name == f"{_OPTION}layer-src-prefix":
            prefix = value
        elif name == f"{_OPTION}layer":
            fields = [value, *pieces[number + 1 : number + 2]]
            if not value.startswith("/"):
                fields = base64.b64decode(value, validate=True).decode().split(",")[:2]
            if len(fields) < 2 or not fields[0]:
                raise ValueError(f"option {piece!r} names no layer")
            path = Path(prefix, fields[0])
            if not path.is_absolute() or ".." in path.parts:
                raise ValueError(f"option {piece!r} has no path of a layer: {path}")
            found.append(NamedLayer(path, fields[1]))
    return found
