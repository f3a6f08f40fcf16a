# SPDX-License-Identifier: Apache-2.0
"""A daemon's root with thousands of layers and snapshots in it, made by the store's own code."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.workers.launch import BuildRecord
from policy.chain import ChainID, chain_id, layer_name
from snapshotter.directories import Directories
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import FILE_NAME, Kind, Layer, Metastore
from snapshotter.metastore import _Database as Database
from tests.chains import make

HOST, KATA = "tardev-host", "tardev"
FORMAT: Final = "tar-index"
LAYERS_OF_IMAGE: Final = 5
_LABELS: Final = {"containerd.io/gc.root": "2026-01-01T00:00:00Z", "containerd.io/snapshot/cri.image-ref": "example"}


@dataclass(frozen=True)
class Stored:
    """`images`: the name of the topmost snapshot of each image, which both snapshotters' names have."""

    images: list[str]
    layers: int
    snapshots: int


def tar_of(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def fill(root: Path, layers: int, snapshots: int) -> Stored:
    """Images of five layers, in two namespaces of the host contract and in one of Kata's, and containers on them for
    the rest of the snapshots."""
    root.mkdir(parents=True)
    return asyncio.run(_fill(root, layers, snapshots))


async def _fill(root: Path, count: int, snapshots: int) -> Stored:
    store = LayerStore(root)
    directories = Directories(root, store.trash)
    for part in (store, directories):
        part.prepare()
    metastore = Metastore(root / FILE_NAME)
    try:
        # The disk's time for each of thousands of syncs is not what is measured.
        database = metastore._database
        database.connection.execute("PRAGMA synchronous = OFF")
        layers = [await _layer(store, metastore, number) for number in range(count)]
        database.connection.execute("BEGIN IMMEDIATE")
        images = _snapshots(database, store, directories, layers, snapshots)
        database.connection.execute("COMMIT")
    finally:
        await metastore.close()
    os.sync()
    return Stored(images, count, snapshots)


async def _layer(store: LayerStore, metastore: Metastore, number: int) -> Layer:
    tar = tar_of(f"file-{number}", f"layer {number}".encode())
    made = make(tar, FORMAT)
    built = made.built
    digest = "sha256:" + hashlib.sha256(tar).hexdigest()
    record = BuildRecord(
        built.format, digest, built.root_hash.hex(), built.tar_size_bytes, built.data_size_bytes, built.tree_size_bytes,
        built.file_size_bytes, built.entries, built.warnings, digest, len(tar), {},
    )  # fmt: skip
    path = store.path(digest, FORMAT)
    path.write_bytes(made.file)
    path.chmod(0o400)
    return await metastore.publish(record, "none", 0.01)


def _snapshots(
    database: Database, store: LayerStore, directories: Directories, layers: list[Layer], count: int
) -> list[str]:
    made, links, images = 0, store.root / "layers", []
    for snapshotter, space in ((HOST, "k8s.io"), (KATA, "k8s.io"), (HOST, "moby")):
        for first in range(0, len(layers), LAYERS_OF_IMAGE):
            parent, chain = "", None
            for layer in layers[first : first + LAYERS_OF_IMAGE]:
                chain = chain_id(chain, layer.diff_id)
                name = f"{space}/{made}/{chain}"
                if space == "k8s.io":
                    # Of both names the same, so that one list serves for both.
                    name = f"{space}/{layer.id}/{chain}"
                parent = _committed(database, store, links, snapshotter, name, parent, chain, layer)
                made += 1
            if space == "k8s.io" and snapshotter == HOST:
                images.append(parent)
    number = 0
    while made < count:
        snapshotter = (HOST, KATA)[number % 2]
        parent = images[number % len(images)]
        key = f"k8s.io/{made}/container-{number}"
        snapshot = database.create(snapshotter, key, parent, Kind.ACTIVE, _LABELS, extraction=False)
        directories.make(snapshot.id)
        made, number = made + 1, number + 1
    return images


def _committed(
    database: Database,
    store: LayerStore,
    links: Path,
    snapshotter: str,
    name: str,
    parent: str,
    chain: ChainID,
    layer: Layer,
) -> str:
    snapshot = database.create(snapshotter, f"{name}-unpack", parent, Kind.ACTIVE, _LABELS, extraction=True)
    if snapshotter == KATA:
        os.link(store.path(layer.diff_id, FORMAT), links / layer_name(chain))
    directory = str(links) if snapshotter == KATA else ""
    database.commit(snapshot, name, _LABELS, layer.id, chain, snapshot.parent_id, None, directory)
    return name
