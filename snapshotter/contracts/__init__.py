# SPDX-License-Identifier: Apache-2.0
"""How a snapshot's layers are phrased as mounts, one pure module per kind of runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from snapshotter.contracts import host, kata_erofs, kata_tardev
from snapshotter.contracts.mount import Lower, Mount, Place


class Contract(Protocol):
    """What each module here offers."""

    @property
    def FORMATS(self) -> frozenset[str]:
        """Formats whose layers it can name."""

    @property
    def PLACE(self) -> Place:
        """Where the layers are when they are named."""

    @property
    def ENCODINGS(self) -> tuple[str, ...]:
        """Ways to write the same mounts, for runtimes that differ in it; the first is a name's default."""

    @property
    def ROOT_HASH_LABEL(self) -> str:
        """By which committed snapshots show their layer's root hash; "" for none."""

    @property
    def NAMES_PARENTS(self) -> bool:
        """Whether a parents layer can be named: one on top, which no chain ID leads to."""

    @property
    def COUNTS_EQUAL_ONCE(self) -> bool:
        """Whether equal layers of a chain are one for the runtime, and so for `max_layers`."""

    @property
    def MAX_LAYERS(self) -> int:
        """Layers that a runtime of this kind takes at the most; a name's default."""

    @property
    def MIN_LAYERS(self) -> int:
        """With fewer, empty layers are named below them."""

    @property
    def REMAPS_IDS(self) -> bool:
        """Whether the layers can be shown under the IDs of a user namespace: those that the daemon mounts."""

    @property
    def TAKES_WRITABLE(self) -> bool:
        """Whether the runtime can be given a file system on the host to write to."""

    def container_mounts(
        self,
        lowers: Sequence[Lower],
        upper: Path | None,
        work: Path | None,
        encoding: str = ...,
        writable_bytes: int = ...,
    ) -> list[Mount]:
        """For a container. `lowers`: topmost layer first, at least MIN_LAYERS; without `upper` the snapshot is a view.
        `writable_bytes`: of the file system that a container writes to; 0 for none."""

    def layer_files(self, mounts: Sequence[Mount]) -> list[Path]:
        """What `container_mounts` named, read back, topmost first; nothing where its PLACE is MOUNTED.

        Raises ValueError for mounts that are none of this contract.
        """


CONTRACTS: Final[dict[str, Contract]] = {"host": host, "kata-tardev": kata_tardev, "kata-erofs": kata_erofs}

__all__ = ["CONTRACTS", "Contract", "Lower", "Mount", "Place"]
