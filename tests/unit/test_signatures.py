# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from policy import signature, signature_store
from policy.signature_store import SignedImage, SignedLayer
from snapshotter import signatures
from snapshotter.errors import FailedPrecondition
from snapshotter.metastore import Layer, LayerID, LayerState
from snapshotter.signatures import Signatures
from tests.signers import Signer

LAYER = Layer(
    LayerID(1), "sha256:" + "1" * 64, "tar-index", "ab" * 32, 0, 0, 0, 0, 0, {}, LayerState.READY, 0.0, 0
)  # fmt: skip


class Place:
    def __init__(self, directory: Path) -> None:
        self.signer, self.store = Signer(directory), directory / "store"
        self.store.mkdir()
        self.signatures = Signatures([self.signer.certificate_path], self.store)

    def sign(self, name: str, layer: Layer = LAYER) -> None:
        der = signature.sign(layer.root_hash, self.signer.key, self.signer.certificate)
        signed = SignedLayer(layer.diff_id, layer.root_hash, der)
        signature_store.add(self.store / name, SignedImage("n", (signed,)))

    async def refused(self, *layers: Layer) -> str:
        with pytest.raises(FailedPrecondition) as caught:
            await self.signatures.check(layers or [LAYER])
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_each_layer_is_asked_for(place: Place) -> None:
    other = replace(LAYER, diff_id="sha256:" + "2" * 64, root_hash="cd" * 32)
    assert LAYER.diff_id in await place.refused()
    place.sign("a.json")
    await place.signatures.check([LAYER])
    assert other.diff_id in await place.refused(LAYER, other)
    place.sign("b.json", other)
    await place.signatures.check([LAYER, other])
    (place.store / "a.json").unlink()
    assert LAYER.diff_id in await place.refused(other, LAYER)


async def test_a_certificate_that_goes_or_breaks_is_not_trusted(place: Place) -> None:
    place.sign("a.json")
    good = place.signer.certificate_path.read_bytes()
    for bad in (b"", b"no certificate", None):
        place.signer.certificate_path.write_bytes(good)
        await place.signatures.check([LAYER])
        if bad is None:
            place.signer.certificate_path.unlink()
        else:
            place.signer.certificate_path.write_bytes(bad)
        assert "not trusted" in await place.refused()


async def test_what_is_no_file_and_what_is_too_much(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(place.store / "a-pipe")
    (place.store / "b-directory").mkdir()
    (place.store / "c-link").symlink_to("nowhere")
    assert "3 broken files" in await place.refused()
    place.sign("d.json")
    await place.signatures.check([LAYER])
    monkeypatch.setattr(signatures, "FILES_MAX", 3)
    assert "4 broken files" in await place.refused()
    monkeypatch.setattr(signatures, "FILES_MAX", 4)
    await place.signatures.check([LAYER])
    monkeypatch.setattr(signatures, "BYTES_MAX", 10)
    assert "broken" in await place.refused()
