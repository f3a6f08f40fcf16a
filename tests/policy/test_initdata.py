# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import gzip
import hashlib
import json
import subprocess
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.errors import PolicyError
from policy.initdata import (
    ALGORITHMS,
    HOSTDATA_BYTES,
    MRCONFIGID_BYTES,
    POLICY_KEY,
    Initdata,
    annotation,
    digest,
    document,
    fitted,
    opened,
    policy_annotation,
    policy_digest,
)

POLICY = 'package agent_policy\n\ndefault allow := false\n# "ü" \\ \t\x7f\n'

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.dictionaries(texts, texts, max_size=4), st.sampled_from(ALGORITHMS))
def test_what_was_put_in_comes_out(data: dict[str, str], algorithm: str) -> None:
    """By TOML's own reader, whatever the text."""
    toml = document(Initdata(algorithm, data))
    assert tomllib.loads(toml.decode()) == {"version": "0.1.0", "algorithm": algorithm, "data": data}
    assert opened(annotation(toml)) == (Initdata(algorithm, data), toml)


def test_it_is_a_function_of_what_is_in_it() -> None:
    one = Initdata("sha384", {POLICY_KEY: POLICY, "aa.toml": "x"})
    two = Initdata("sha384", {"aa.toml": "x", POLICY_KEY: POLICY})
    assert annotation(document(one)) == annotation(document(two))
    # No time, no name, whoever compresses it (RFC 1952).
    assert base64.b64decode(annotation(document(one)))[:8] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00"


@pytest.mark.tool
def test_other_programs_read_it() -> None:
    toml = document(Initdata("sha256", {POLICY_KEY: POLICY}))
    raw = base64.b64decode(annotation(toml))
    assert subprocess.run(["gzip", "-dc"], input=raw, capture_output=True, check=True).stdout == toml
    said = subprocess.run(["sha256sum"], input=toml, capture_output=True, check=True).stdout.split()[0].decode()
    assert digest(toml, "sha256").hex() == said


def test_digests_fit_what_a_report_has_room_for() -> None:
    toml = document(Initdata("sha256", {}))
    assert fitted(digest(toml, "sha256"), HOSTDATA_BYTES) == hashlib.sha256(toml).digest()
    assert fitted(digest(toml, "sha384"), HOSTDATA_BYTES) == hashlib.sha384(toml).digest()[:32]
    assert fitted(digest(toml, "sha256"), MRCONFIGID_BYTES) == hashlib.sha256(toml).digest() + bytes(16)
    assert fitted(digest(toml, "sha512"), MRCONFIGID_BYTES) == hashlib.sha512(toml).digest()[:48]


def test_microsofts_is_the_text_itself() -> None:
    assert base64.b64decode(policy_annotation(POLICY)).decode() == POLICY
    assert policy_digest(POLICY) == hashlib.sha256(POLICY.encode()).digest()


def packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode())).decode()


@pytest.mark.parametrize(
    ("annotated", "words"),
    [
        ("", "gzip"),
        ("!", "initdata"),
        ("eA==", "initdata"),
        (packed("version"), "initdata"),
        (packed('version = "0.2.0"\nalgorithm = "sha256"\n[data]'), "version '0.2.0'"),
        (packed('algorithm = "sha256"\n[data]'), "version None"),
        (packed('version = "0.1.0"\nalgorithm = "md5"\n[data]'), "algorithm 'md5'"),
        (packed('version = "0.1.0"\nalgorithm = "sha256"'), "no table of texts"),
        (packed('version = "0.1.0"\nalgorithm = "sha256"\ndata = 1'), "no table of texts"),
        (packed('version = "0.1.0"\nalgorithm = "sha256"\n[data]\nx = 1'), "no table of texts"),
        (base64.b64encode(gzip.compress(b"x")[:-4]).decode(), "gzip"),
        (base64.b64encode(gzip.compress(b"x") * 2).decode(), "gzip"),
        (base64.b64encode(gzip.compress(bytes(17 << 20))).decode(), "over 16777216 bytes"),
    ],
)
def test_what_is_none_is_refused(annotated: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        opened(annotated)


def test_an_algorithm_that_a_guest_does_not_know_is_not_written() -> None:
    with pytest.raises(PolicyError, match="no algorithm 'sha1'"):
        document(Initdata("sha1", {}))


def test_the_text_is_one_line_of_a_basic_string() -> None:
    toml = document(Initdata("sha256", {POLICY_KEY: POLICY})).decode()
    [line] = [line for line in toml.splitlines() if line.startswith('"policy.rego"')]
    assert json.loads(line.partition(" = ")[2]) == POLICY
