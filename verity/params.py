# SPDX-License-Identifier: Apache-2.0
"""dm-verity parameters (Linux: Documentation/admin-guide/device-mapper/verity.rst), version 1, sha256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from verity.errors import VerityError

DIGEST_BYTES: Final = 32
BLOCK_BYTES: Final = (512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Params:
    """Block sizes in bytes; the salt goes in front of every hashed block.

    Raises VerityError for sizes that are no power of two from 512 to 4096 or a salt over 256 bytes.
    """

    data_block_bytes: int
    hash_block_bytes: int
    salt: bytes = bytes(32)

    def __post_init__(self) -> None:
        for name, size in (("data", self.data_block_bytes), ("hash", self.hash_block_bytes)):
            if size not in BLOCK_BYTES:
                raise VerityError(f"{name} block size {size} is none of {BLOCK_BYTES}")
        if len(self.salt) > 256:
            raise VerityError(f"salt of {len(self.salt)} bytes is over 256")

    @property
    def digests_per_block(self) -> int:
        return self.hash_block_bytes // DIGEST_BYTES


PRESETS: Final = {"tar-index": Params(512, 4096), "erofs-4k": Params(4096, 4096), "tarfs": Params(4096, 4096)}
