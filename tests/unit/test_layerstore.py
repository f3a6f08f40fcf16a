# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev.formats.layer_file import LayerFile, open_layer_file
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import Layer, LayerID, LayerState
from tests.images import mkimage
from tests.uvm.conftest import write_layer
from verity.buffers import ReadAt


@pytest.fixture
def stored(tmp_path: Path) -> tuple[LayerStore, Layer]:
    store = LayerStore(tmp_path)
    store.prepare()
    made = write_layer(mkimage.layer_tar([mkimage.F("file", b"x" * 5000)]), tmp_path / "made")
    built = made.built
    layer = Layer(
        LayerID(1), f"sha256:{built.diff_id.hex()}", built.format, built.root_hash.hex(), built.tar_size_bytes,
        built.data_size_bytes, built.tree_size_bytes, built.file_size_bytes, built.entries, {},
        LayerState.READY, build_seconds=0.0, created_ns=0,
    )  # fmt: skip
    os.rename(made.path, store.path(layer.diff_id, layer.format))
    return store, layer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a layer file was looked into."""
    count = 0

    def counted(read_at: ReadAt, size_bytes: int) -> LayerFile:
        nonlocal count
        count += 1
        return open_layer_file(read_at, size_bytes)

    monkeypatch.setattr("snapshotter.layerstore.open_layer_file", counted)
    return lambda: count


def test_a_file_is_read_once_as_long_as_nothing_happens_to_it(
    stored: tuple[LayerStore, Layer], reads: Callable[[], int], tmp_path: Path
) -> None:
    store, layer = stored
    path = store.path(layer.diff_id, layer.format)
    assert store.contradiction(layer) == store.contradiction(layer) == ""
    os.link(path, tmp_path / "link")
    assert store.contradiction(layer) == ""
    assert reads() == 1
    os.utime(path)
    assert store.contradiction(layer) == ""
    assert reads() == 2


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "No such file"),
    "shorter": (lambda path: os.truncate(path, 8192), "has 8192 bytes"),
    "its head": (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "identity record"),
    "its trailer": (lambda path: path.write_bytes(path.read_bytes()[:-100] + bytes(99) + b"x"), "trailer"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("looked", [False, True])
def test_what_happens_to_a_file_is_seen_at_once(stored: tuple[LayerStore, Layer], change: str, looked: bool) -> None:
    store, layer = stored
    path = store.path(layer.diff_id, layer.format)
    raw = path.read_bytes()
    if looked:
        assert store.contradiction(layer) == ""
    act, why = CHANGES[change]
    act(path)
    os.utime(path, (1, 1)) if path.exists() else None  # as if the clock had gone on
    assert why in store.contradiction(layer)
    path.write_bytes(raw)
    assert store.contradiction(layer) == ""


def test_another_row_is_another_look(stored: tuple[LayerStore, Layer]) -> None:
    store, layer = stored
    assert store.contradiction(layer) == ""
    assert "is another layer's" in store.contradiction(replace(layer, root_hash="00" * 32))
    assert "is another layer's" in store.contradiction(replace(layer, tar_size_bytes=layer.tar_size_bytes + 512))
    assert store.contradiction(layer) == ""
