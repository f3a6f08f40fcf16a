# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.api.generate import generate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("directory", ["snapshotter/api/proto", "tests/cri"])
def test_the_committed_code_is_what_the_proto_files_give(tmp_path: Path, directory: str) -> None:
    generate(tmp_path, ROOT / directory)
    fresh = {path.name: path.read_text() for path in (tmp_path / directory).iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / directory).iterdir() if "_pb2" in path.name}
    assert fresh == kept
