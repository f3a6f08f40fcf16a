# SPDX-License-Identifier: Apache-2.0
"""Bounds that hostile layers run into. Each is a clear error, never a crash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Configurable bounds of one build; sizes in bytes."""

    tar_bytes: int = 64 << 30
    entries: int = 4_000_000
    path_bytes: int = 64 << 10
    xattr_bytes: int = 262_148  # of one inode, as the index stores them; also the most that it can
    extended_header_bytes: int = 1 << 20
    # What the file tree may take in memory: inodes, names, link texts and attributes together.
    metadata_bytes: int = 2 << 30
    # A stream may grow this many times over its blob, once it is past the floor below it.
    expansion_ratio: int = 1100
    expansion_floor_bytes: int = 64 << 20
