# SPDX-License-Identifier: Apache-2.0
"""The verity record of the tardev family: 16 bytes, 512 before the end of a layer file.

0  4  data block size, bytes      8  8  number of data blocks
4  4  hash block size, bytes         all little-endian
"""

from __future__ import annotations

import struct
from typing import Final

_LAYOUT: Final = struct.Struct("<IIQ")
RECORD_BYTES: Final = _LAYOUT.size
FROM_END_BYTES: Final = 512


def pack(data_block_bytes: int, hash_block_bytes: int, data_blocks: int) -> bytes:
    return _LAYOUT.pack(data_block_bytes, hash_block_bytes, data_blocks)


def unpack(raw: bytes) -> tuple[int, int, int]:
    """(data block size, hash block size, data blocks), unchecked."""
    data_block, hash_block, blocks = _LAYOUT.unpack(raw[:RECORD_BYTES])
    return data_block, hash_block, blocks
