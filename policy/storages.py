# SPDX-License-Identifier: Apache-2.0
"""What Microsoft's Kata asks its agent to mount for a container's root, and how genpolicy's policy data names it
(microsoft/kata-containers, branch 3.2.0.azl4: src/runtime/virtcontainers/kata_agent.go, src/tools/genpolicy/src).

Topmost layer first, everywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from blockdev.formats.layer_file import format_named
from policy.chain import layer_name
from policy.hashed import HashedImage

DATA_ROOT: Final = "/var/lib/containerd/io.containerd.snapshotter.v1.tardev"
LAYERS: Final = "/run/kata-containers/sandbox/layers"
CONTAINERS: Final = "/run/kata-containers/shared/containers"
_OPTION: Final = "io.katacontainers.fs-opt."


@dataclass(frozen=True, slots=True)
class Storage:
    """One of CreateContainerRequest's storages, under the names that policies see (protocols: agent.proto)."""

    driver: str
    source: str
    fstype: str
    options: tuple[str, ...]
    mount_point: str
    driver_options: tuple[str, ...] = ()
    fs_group: None = None

    def document(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "options": list(self.options), "driver_options": list(self.driver_options)}


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """A layer under the name that its chain has, with all that dm-verity has to be told."""

    name: str
    file_system: str  # "tar" or "erofs"
    root_hash: str
    data_size_bytes: int
    data_block_bytes: int
    hash_block_bytes: int


def named_layers(image: HashedImage) -> list[NamedLayer]:
    """Without a parents layer, which this contract cannot name."""
    return [
        NamedLayer(
            layer_name(chain),
            format_named(layer.format).file_system,
            layer.root_hash,
            layer.data_size_bytes,
            layer.data_block_bytes,
            layer.hash_block_bytes,
        )
        for layer, chain in reversed(list(zip(image.layers, image.chain_ids(), strict=True)))
    ]


def requested(image: HashedImage, container_id: str, data_root: str = DATA_ROOT) -> list[Storage]:
    """As the agent gets them from a node whose snapshotter has the contract kata-tardev, encoding base64.

    `data_root`: the snapshotter's; a policy takes no other than DATA_ROOT.
    """
    layers = named_layers(image)
    found = [
        # The address on the PCI bus is the host's affair, and no policy looks at it.
        Storage("blk", f"0001:00:{number + 1:02x}.0", layer.file_system, _of_layer(layer), f"{LAYERS}/{layer.name}")
        for number, layer in enumerate(layers)
    ]
    options = (
        f"{_OPTION}layer-src-prefix={data_root}/layers",
        *(f"{_OPTION}layer={_encoded(layer)}" for layer in layers),
        f"{_OPTION}overlay-rw",
        "lowerdir=" + ":".join(layer.name for layer in layers),
    )
    found.append(Storage("overlayfs", "none", "fuse3.kata-overlay", options, f"{CONTAINERS}/{container_id}"))
    return found


def of_policy(image: HashedImage) -> list[Storage]:
    """The same in policy data, with its placeholders."""
    layers = named_layers(image)
    found = [Storage("blk", "", "tar", (f"$(hash{number})",), f"$(layer{number})") for number in range(len(layers))]
    names = ":".join(layer.name for layer in layers)
    hashes = ":".join(layer.root_hash for layer in layers)
    found.append(Storage("overlayfs", "", "fuse3.kata-overlay", (names, hashes), "$(cpath)/$(bundle-id)"))
    return found


def _of_layer(layer: NamedLayer) -> tuple[str, ...]:
    return tuple(_words(layer))


def _words(layer: NamedLayer) -> Iterator[str]:
    yield "ro"
    yield f"{_OPTION}block_device=file"
    yield f"{_OPTION}is-layer"
    yield f"{_OPTION}root-hash={layer.root_hash}"


def _encoded(layer: NamedLayer) -> str:
    text = ",".join((layer.name, layer.file_system, *_words(layer)))
    return base64.b64encode(text.encode("ascii")).decode("ascii")
