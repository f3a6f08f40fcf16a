# SPDX-License-Identifier: Apache-2.0
"""How a snapshot's layers are phrased as mounts, one pure module per kind of runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from snapshotter.contracts import host
from snapshotter.contracts.mount import Mount


class Contract(Protocol):
    """What each module here offers."""

    @property
    def FORMATS(self) -> frozenset[str]:
        """Formats whose layers it can name."""

    @property
    def ACTIVATES(self) -> bool:
        """Whether the daemon mounts the layers on the host first."""

    @property
    def MAX_LAYERS(self) -> int:
        """Layers, equal ones counted once, that a runtime of this kind takes at the most; a name's default."""

    @property
    def REMAPS_IDS(self) -> bool:
        """Whether the layers can be shown under the IDs of a user namespace: those that the daemon mounts."""

    def container_mounts(self, lowers: Sequence[Path], upper: Path | None, work: Path | None) -> list[Mount]:
        """For a container. `lowers`: topmost layer first; without `upper` the snapshot is a view."""


CONTRACTS: Final[dict[str, Contract]] = {"host": host}

__all__ = ["CONTRACTS", "Contract", "Mount"]
