# SPDX-License-Identifier: Apache-2.0
"""What the guest needs beside a `tarfs` layer, whose own index only Microsoft's kernel module reads.

An EROFS index over the layer's tar (blockdev.formats.tar_mount), with a hash tree and the bare trailer of its own: the
guest verifies it as it verifies a layer, so the policy names its root hash too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

from blockdev.formats.layer_file import bare_trailer, open_layer_file
from blockdev.formats.layer_writer import VerifiedWriter
from blockdev.formats.limits import Limits
from blockdev.formats.tar_mount import TarMountWriter
from uvm.errors import ImageError
from uvm.policy import PolicyLayer
from verity.hasher import LeafStore
from verity.params import PRESETS
from verity.tree import HashTree

INDEX_FORMAT: Final = "tarfs-index"
_PIECE_BYTES: Final = 1 << 20


def write_index(layer: Path, index: Path, name: str) -> PolicyLayer:
    """Write the index of a `tarfs` layer file. In a policy it comes next below its layer.

    Raises BlockdevError for a layer that cannot be read, ImageError for one of another format, OSError.
    """
    params = PRESETS["tar-index"]
    with layer.open("rb") as source:
        found = open_layer_file(
            lambda offset, size: os.pread(source.fileno(), size, offset), os.fstat(source.fileno()).st_size
        )
        if found.format.name != "tarfs":
            raise ImageError(f"{layer} is a layer file of format {found.format.name}, not tarfs")
        writer, digest, left = TarMountWriter(Limits()), hashlib.sha256(), found.tar_size_bytes
        while left and (piece := source.read(min(left, _PIECE_BYTES))):
            writer.feed(piece)
            digest.update(piece)
            left -= len(piece)
    leaves = LeafStore()
    try:
        tree = HashTree(leaves, params)
        with index.open("wb") as file:
            size = writer.write(VerifiedWriter(file.write, tree, params).write, digest.digest())
            root_hash = tree.write(file.write)
            file.write(bare_trailer(params, size // params.data_block_bytes))
    finally:
        leaves.close()
    return PolicyLayer(name, INDEX_FORMAT, root_hash, size, params)
