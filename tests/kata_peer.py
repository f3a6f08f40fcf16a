# SPDX-License-Identifier: Apache-2.0
"""What Microsoft's Kata does with the answer of the contract `kata-tardev`: the shim's part, the agent's, the policy's.

From what their code does, step by step (microsoft/kata-containers, branch 3.2.0.azl4, and msft-main for `plain`:
src/runtime/pkg/containerd-shim-v2/create.go, src/runtime/virtcontainers/{container,kata_agent,clh}.go,
src/agent/src/storage, src/tools/genpolicy/rules.rego). Whatever they refuse raises Refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from snapshotter.contracts import Mount

OPTION: Final = "io.katacontainers.fs-opt."
LAYERS: Final = "/run/kata-containers/sandbox/layers"
CONTAINERS: Final = "/run/kata-containers/shared/containers"
POLICY_PREFIX: Final = "/var/lib/containerd/io.containerd.snapshotter.v1.tardev/layers"
PAGE_BYTES: Final = 4096
SEGMENTS: Final = 10  # of a cloud-hypervisor VM; nothing is plugged into the first
SLOTS: Final = 31  # of each


class Refused(Exception):
    pass


@dataclass(frozen=True)
class LayerMount:
    """An OCI mount that the shim makes of a layer's option."""

    destination: str
    source: str
    type: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Storage:
    driver: str
    source: str
    fstype: str
    options: tuple[str, ...]
    mount_point: str


def shim_layers(mounts: Sequence[Mount], encoding: str) -> list[LayerMount]:
    if len(mounts) != 1:
        raise Refused(f"{len(mounts)} mounts are no rootfs")
    prefix, found = "", []
    for option in mounts[0].options:
        if option.startswith(f"{OPTION}layer-src-prefix=") and encoding == "base64":
            prefix = option.partition("=")[2]
        elif option.startswith(f"{OPTION}layer="):
            text = option.partition("=")[2]
            if encoding == "base64":
                try:
                    text = base64.b64decode(text, validate=True).decode()
                except binascii.Error as error:
                    raise Refused(str(error)) from None
            fields = text.split(",")
            if len(fields) < 2:
                raise Refused("missing fields in rootfs layer")
            source = fields[0] if fields[0].startswith("/") else f"{prefix}/{fields[0]}"
            name = source.rpartition("/")[2]
            found.append(LayerMount(f"{LAYERS}/{name}", source, fields[1], tuple(fields[2:])))
    if not found:
        raise Refused("not a layered rootfs: the shim mounts it on the host")
    return found


def plugged(layers: Sequence[LayerMount]) -> dict[str, str]:
    """Host path → the BDF under which cloud-hypervisor has it; one path is one device, however often it is named."""
    paths = list(dict.fromkeys(layer.source for layer in layers))
    for layer in layers:
        if f"{OPTION}block_device=file" not in layer.options or "ro" not in layer.options:
            raise Refused(f"{layer.source} is no read-only block device")
    if len(paths) > (SEGMENTS - 1) * SLOTS:
        raise Refused(f"{len(paths)} devices do not fit {SEGMENTS - 1} segments")
    return {path: f"{index // SLOTS + 1:04x}:00:{index % SLOTS + 1:02x}.0" for index, path in enumerate(paths)}


def storages(mounts: Sequence[Mount], encoding: str, container: str) -> list[Storage]:
    """Of the request that the agent gets: layers before the overlay."""
    layers = shim_layers(mounts, encoding)
    devices = plugged(layers)
    (mount,) = mounts
    return [
        *(Storage("blk", devices[each.source], each.type, each.options, each.destination) for each in layers),
        Storage("overlayfs", "none", mount.type, mount.options, f"{CONTAINERS}/{container}"),
    ]


def agent_mounts(found: Sequence[Storage], container: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """(verified layers: directory → (fs type, root hash); lower directories of the overlay, topmost first)."""
    verified: dict[str, tuple[str, str]] = {}
    for storage in found[:-1]:
        hashes = [o.partition("=")[2] for o in storage.options if o.startswith(f"{OPTION}root-hash=")]
        if len(hashes) != 1 or len(bytes.fromhex(hashes[0])) != 32 or hashes[0] != hashes[0].lower():
            raise Refused(f"{storage.mount_point} has no root hash")
        if len(storage.mount_point.rpartition("/")[2]) > 127:
            raise Refused("longer than the name of a device-mapper device may be")
        if _data(storage.options) != "ro":
            raise Refused(f"a layer is mounted with {_data(storage.options)}")
        verified[storage.mount_point] = (storage.fstype, hashes[0])
    overlay = found[-1]
    if f"{OPTION}overlay-rw" not in overlay.options:
        raise Refused("a rootfs that cannot be written to")
    run = f"/run/kata-containers/{container}"
    data = _data((*overlay.options, f"upperdir={run}/upper", f"workdir={run}/work"))
    if len(data) + 1 > PAGE_BYTES:
        raise Refused(f"{len(data)} bytes of mount data are over a page")
    (lower,) = [option for option in data.split(",") if option.startswith("lowerdir=")]
    names = lower.removeprefix("lowerdir=").split(":")
    # They are relative: the agent changes into the directory of the layers.
    if [f"{LAYERS}/{name}" for name in names] != list(verified):
        raise Refused("the overlay names other layers than those that are there")
    return verified, names


def _data(options: Sequence[str]) -> str:
    return ",".join(option for option in options if not option.startswith("io.katacontainers."))


def policy_allows(found: Sequence[Storage], names: Sequence[str], root_hashes: Sequence[str]) -> None:
    """genpolicy's rules of branch 3.2.0.azl4, for the layers of an image, topmost first."""
    if len(found) != len(names) + 1:
        raise Refused(f"{len(found)} storages, not {len(names) + 1}")
    for storage, name, root_hash in zip(found, names, root_hashes, strict=False):
        expected = (
            "ro", f"{OPTION}block_device=file", f"{OPTION}is-layer", f"{OPTION}root-hash={root_hash}",
        )  # fmt: skip
        if storage.driver != "blk" or storage.options != expected or storage.mount_point != f"{LAYERS}/{name}":
            raise Refused(f"layer {name}: {storage}")
    overlay = found[-1].options
    if len(overlay) != len(names) + 3:
        raise Refused(f"{len(overlay)} options")
    if overlay[0] != f"{OPTION}layer-src-prefix={POLICY_PREFIX}":
        raise Refused(overlay[0])
    if overlay[-2:] != (f"{OPTION}overlay-rw", f"lowerdir={':'.join(names)}"):
        raise Refused(str(overlay[-2:]))
    for option, name, root_hash in zip(overlay[1:-2], names, root_hashes, strict=True):
        text = base64.b64decode(option.removeprefix(f"{OPTION}layer=")).decode()
        # "tar" is a literal of the rules, whatever the file system.
        wanted = f"{name},tar,ro,{OPTION}block_device=file,{OPTION}is-layer,{OPTION}root-hash={root_hash}"
        if text != wanted:
            raise Refused(text)
