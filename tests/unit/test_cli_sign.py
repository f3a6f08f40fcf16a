# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from snapshotter.cli.main import app
from tests.signers import Signer

DIGEST, ROOT_HASH, OTHER = "sha256:" + "1" * 64, "ab" * 32, "cd" * 32
LAYER = f"{DIGEST}={ROOT_HASH}"


def run(command: str, *arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [command, *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def sign(signer: Signer, store: Path, *layers: str, name: str = "app") -> tuple[int, str, str]:
    key = ("--key", signer.key_path, "--cert", signer.certificate_path)
    return run("sign", *layers, "--name", name, *key, "--store", store, "--json")


def test_what_is_signed_verifies_and_nothing_else_does(tmp_path: Path) -> None:
    signer, other, store = Signer(tmp_path), Signer(tmp_path, "other"), tmp_path / "store.json"
    status, out, _ = sign(signer, store, LAYER)
    assert (status, json.loads(out)[0]["root_hash"]) == (0, ROOT_HASH)
    trusted = ("--store", store, "--cert", signer.certificate_path)
    status, out, _ = run("verify", LAYER, *trusted, "--json")
    assert (status, json.loads(out)[0]["signer"]) == (0, "CN=signer")
    status, out, why = run("verify", LAYER, f"{DIGEST}={OTHER}", *trusted)
    assert (status, out) == (1, "")
    assert f"layer {DIGEST} (root hash {OTHER}): no signature in" in why
    status, _, why = run("verify", LAYER, "--store", store, "--cert", other.certificate_path)
    assert status == 1
    assert "not trusted" in why


@pytest.mark.parametrize("bad", ["x", f"{DIGEST}={ROOT_HASH[1:]}", f"{DIGEST}", f"sha256:1={ROOT_HASH}"])
def test_nothing_is_written_where_one_layer_is_wrong(bad: str, tmp_path: Path) -> None:
    store = tmp_path / "store.json"
    status, out, why = sign(Signer(tmp_path), store, LAYER, bad)
    assert (status, out) == (1, "")
    assert why.startswith("tardevctl: ")
    assert not store.exists()


def test_nothing_is_written_with_the_wrong_key_or_over_a_broken_store(tmp_path: Path) -> None:
    signer, other, store = Signer(tmp_path), Signer(tmp_path, "other"), tmp_path / "store.json"
    signer.certificate_path = other.certificate_path
    status, _, why = sign(signer, store, LAYER)
    assert status == 1
    assert "not that of the certificate" in why
    assert not store.exists()
    store.write_text("broken")
    status, _, why = sign(other, store, LAYER)
    assert status == 1
    assert str(store) in why
    assert store.read_text() == "broken"
