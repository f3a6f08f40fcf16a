# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Literal


class VerityError(Exception):
    """Parameters that dm-verity does not allow, or a tree in disorder."""


class VerificationFailed(VerityError):
    """Bytes that the root hash does not vouch for; the message names the first such block.

    `kind`: what the block is, or "end" where the file ends before its geometry does. `level`: of a hash
    block, 0 right above the data; None otherwise. `block`: its number within the data or that level;
    None at the end. `offset_bytes`: where in the file the block starts, or the file ends.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Literal["data", "hash", "end"],
        level: int | None,
        block: int | None,
        offset_bytes: int,
    ) -> None:
        super().__init__(message)
        self.kind, self.level, self.block, self.offset_bytes = kind, level, block, offset_bytes


class VeritysetupFailed(VerityError):
    """cryptsetup's veritysetup refused, or is not there; its own words."""
