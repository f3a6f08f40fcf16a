# SPDX-License-Identifier: Apache-2.0
"""The device-mapper table line of a layer file (Linux: Documentation/admin-guide/device-mapper/verity.rst)."""

from __future__ import annotations

from typing import Final

from verity.errors import VerityError
from verity.params import DIGEST_BYTES
from verity.tree import Geometry

_SECTOR_BYTES: Final = 512


def dm_table(device: str, geometry: Geometry, root_hash: bytes) -> str:
    """One line for `dmsetup create --readonly`; data and tree on the same device, tree right after the data.

    Raises VerityError where the data is no whole number of hash blocks: the table counts the tree's
    start in those.
    """
    params = geometry.params
    size = geometry.data_size_bytes
    if size % params.hash_block_bytes or len(root_hash) != DIGEST_BYTES:
        raise VerityError("the data area must end on a hash block, and the root hash have 32 bytes")
    return (
        f"0 {size // _SECTOR_BYTES} verity 1 {device} {device} {params.data_block_bytes} {params.hash_block_bytes}"
        f" {geometry.data_blocks} {size // params.hash_block_bytes} sha256 {root_hash.hex()} {params.salt.hex() or '-'}"
    )
