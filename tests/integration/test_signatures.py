# SPDX-License-Identifier: Apache-2.0
"""Signatures are required: what a real containerd pulls then, and what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from policy import signature, signature_store
from policy.signature_store import SignedImage, SignedLayer
from tests.conftest import in_every_run
from tests.harness import SNAPSHOTTER, ProcessFailed, Registry
from tests.integration.conftest import Node, a_node
from tests.signers import Signer

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool]


def sign_all(node: Node, file: Path, signer: Signer, root_hash: str = "") -> None:
    """What the daemon has built; `root_hash`: the one to sign instead."""
    layers = [layer for layer in node.daemon.layers() if not layer.format.endswith("-parents")]
    assert layers
    signed = tuple(
        SignedLayer(
            layer.diff_id, layer.root_hash, signature.sign(root_hash or layer.root_hash, signer.key, signer.certificate)
        )
        for layer in layers
    )
    signature_store.add(file, SignedImage("all", signed))


def refused(node: Node, reference: str) -> str:
    with pytest.raises(ProcessFailed) as caught:
        node.containerd.pull(reference)
    assert "signatures are required here" in str(caught.value)
    assert "sha256:" in str(caught.value)
    assert not any(each["kind"] == "committed" for each in node.daemon.tardevctl("snapshots"))
    return str(caught.value)


@pytest.mark.parametrize("label", in_every_run(["1.6", "later"], lambda label: label == "later"))
def test_only_what_is_signed_is_pulled_and_runs(label: str, registry: Registry, images: Path, tmp_path: Path) -> None:
    """One daemon that is never started again: a signature counts from the moment on at which its file is there."""
    trusted, other = Signer(tmp_path, "trusted"), Signer(tmp_path, "other")
    expired = Signer(tmp_path, "expired", days=(-9, -1))
    store = tmp_path / "signatures"
    extra = (
        f'[signatures]\nrequired = true\nstore = "{store}"\n'
        f'certificates = ["{trusted.certificate_path}", "{expired.certificate_path}"]\n'
    )
    reference = registry.push(images / "hello.tar", "hello:signed")
    file = store / "signatures.json"
    with a_node(tmp_path / "node", label, extra) as node:
        assert f"it has no signature in {store}" in refused(node, reference)  # which does not exist
        store.mkdir()
        assert "it has no signature in" in refused(node, reference)  # stored already, and still refused
        sign_all(node, file, other)
        assert "not trusted" in refused(node, reference)
        sign_all(node, file, trusted, root_hash="ab" * 32)
        assert "not a signature of the root hash" in refused(node, reference)
        for broken in (b"", b"[" * 100_000, b'[{"name": 1}]', b"\0" * (9 << 20)):
            file.write_bytes(broken)
            assert "1 broken files there" in refused(node, reference)
        (store / "broken.json").write_text("not JSON")
        node.daemon.kill()
        node.daemon.restart()
        assert "2 broken files there" in refused(node, reference)
        file.unlink()
        sign_all(node, file, trusted)
        node.containerd.pull(reference)
        assert node.containerd.cat(reference, "signed", "/etc/hello").strip()
        assert "counts for nothing" in node.daemon.log.read_text()


@pytest.mark.soak
def test_every_layer_of_an_image_must_be_signed(registry: Registry, images: Path, tmp_path: Path) -> None:
    """Layer by layer. The parents layer on top, which the node makes, needs no signature."""
    signer, store = Signer(tmp_path), tmp_path / "signatures"
    reference = registry.push(images / "layers.tar", "layers:signed")
    extra = f'[signatures]\nrequired = true\nstore = "{store}"\ncertificates = ["{signer.certificate_path}"]\n'
    store.mkdir()
    with a_node(tmp_path / "node", "later", extra) as node:
        refusals = 0
        while refusals < 30:
            try:
                node.containerd.pull(reference)
                break
            except ProcessFailed as error:
                if "signatures are required here" not in str(error):
                    raise
                refusals += 1
                sign_all(node, store / "signatures.json", signer)
        assert refusals > 1
        assert node.containerd.cat(reference, "signed", "/etc/hello").strip()


@pytest.mark.soak
def test_a_layer_that_is_not_downloaded_must_be_signed_too(registry: Registry, images: Path, tmp_path: Path) -> None:
    signer, store = Signer(tmp_path), tmp_path / "signatures"
    one, two = (registry.push(images / "hello.tar", f"hello:{name}") for name in ("skip-one", "skip-two"))
    store.mkdir()
    extra = (
        f'[signatures]\nrequired = true\nstore = "{store}"\ncertificates = ["{signer.certificate_path}"]\n'
        f'[snapshotters.{SNAPSHOTTER}]\ncontract = "host"\nformat = "tar-index"\nskip_download = true\n'
    )
    with a_node(tmp_path / "node", "later", extra) as node:
        refused(node, one)
        refused(node, two)
        assert '"method": "Prepare", "code": "FAILED_PRECONDITION"' in node.daemon.log.read_text()
        sign_all(node, store / "signatures.json", signer)
        node.containerd.pull(two)
        assert node.containerd.cat(two, "signed", "/etc/hello").strip()
