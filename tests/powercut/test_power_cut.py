# SPDX-License-Identifier: Apache-2.0
"""Power cuts at each barrier of a recorded journey: what was acknowledged is there and whole, nothing else is left.

The recordings need a guest, for dm-log-writes; the disks are recovered and looked at by this machine's kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import SNAPSHOTTER
from tests.nodes.conftest import Boot
from tests.powercut.cuts import FILE_SYSTEMS, check, record, summary

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.tool, pytest.mark.containerd, pytest.mark.soak]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
@pytest.mark.parametrize("journey", ["direct", SNAPSHOTTER])
def test_nothing_acknowledged_is_lost_and_nothing_is_left(
    boot: Boot, images: Path, tmp_path: Path, journey: str, kind: str
) -> None:
    figures = check(record(boot, tmp_path, images, journey, kind), journey, kind, tmp_path)
    print(summary(figures))
    assert figures.points > 50
    assert figures.acknowledged > figures.points
    assert figures.retried
    assert (figures.lost, figures.left, figures.failed) == ([], [], [])


@pytest.mark.timeout(7200)
def test_the_same_eyes_see_what_containerds_own_snapshotter_loses(boot: Boot, images: Path, tmp_path: Path) -> None:
    """Beside ours, and the proof that this would see a loss: overlayfs syncs no file that it unpacks."""
    figures = check(record(boot, tmp_path, images, "overlayfs", "ext4"), "overlayfs", "ext4", tmp_path, 3)
    print(summary(figures))
    assert figures.acknowledged
    assert figures.lost
