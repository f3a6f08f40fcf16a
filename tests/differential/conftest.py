# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import harness


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """In the checkout: wherever /tmp is, here is a file system that holds layers with all attributes."""
    with tempfile.TemporaryDirectory(dir=harness.CACHE, prefix="differential-") as directory:
        (Path(directory) / "mnt").mkdir()
        yield Path(directory)
