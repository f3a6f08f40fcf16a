# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.node_guest import NodeGuest

Boot: TypeAlias = Callable[..., NodeGuest]


@pytest.fixture
def boot(tmp_path: Path, images: Path) -> Iterator[Boot]:
    """Guests with the test images in images/ of their checkout; they end with the test."""
    running: list[NodeGuest] = []

    def start(disks: Sequence[Path] = ()) -> NodeGuest:
        more = {f"images/{path.name}": path for path in images.iterdir()}
        running.append(NodeGuest(tmp_path / f"guest{len(running)}", disks, more))
        return running[-1]

    yield start
    for node in running:
        node.stop()
