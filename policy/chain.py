# SPDX-License-Identifier: Apache-2.0
"""Digests, chain IDs (OCI image specification: config.md, "Layer ChainID"), and the names that are made of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final, NewType

ChainID = NewType("ChainID", str)  # "sha256:" and 64 hexadecimal digits

_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")


def is_digest(text: str) -> bool:
    return _SHA256.match(text) is not None


def chain_id(parent: ChainID | None, diff_id: str) -> ChainID:
    if parent is None:
        return ChainID(diff_id)
    return ChainID("sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode("ascii")).hexdigest())


def chain_ids(diff_ids: Iterable[str]) -> tuple[ChainID, ...]:
    """Of each layer with those below it, the first one first."""
    found: list[ChainID] = []
    for diff_id in diff_ids:
        found.append(chain_id(found[-1] if found else None, diff_id))
    return tuple(found)


def layer_name(chain: ChainID) -> str:
    """Microsoft's, of the file of a chain's topmost layer, and of its mount point in the guest."""
    return hashlib.sha256(chain.encode("ascii")).hexdigest()
