# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from snapshotter.api.generate import generate

COMMITTED = Path(__file__).parents[2] / "snapshotter" / "api" / "proto"


def test_the_committed_code_is_what_the_proto_files_give(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "snapshotter/api/proto").iterdir()}
    kept = {path.name: path.read_text() for path in COMMITTED.iterdir() if "_pb2" in path.name and path.is_file()}
    assert fresh == kept
