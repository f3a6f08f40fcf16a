# SPDX-License-Identifier: Apache-2.0
"""How many layers a name takes."""

from __future__ import annotations

from collections.abc import Sequence

from snapshotter.errors import FailedPrecondition
from snapshotter.metastore import Layer


def check_layers(layers: Sequence[Layer], max_layers: int, snapshotter: str, parent: str, *, equal_once: bool) -> None:
    """Raises FailedPrecondition: nothing is wrong with the call, which succeeds where the limit is another."""
    count = len({layer.id for layer in layers}) if equal_once else len(layers)
    if count > max_layers:
        raise FailedPrecondition(
            f"snapshot {parent!r} has {count} layers{', equal ones counted once' if equal_once else ''};"
            f" {snapshotter} takes {max_layers}:"
            f" max_layers of [snapshotters.{snapshotter}] in the configuration of tardev-snapshotter"
        )
