# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from policy.chain import ChainID, chain_id, is_digest
from snapshotter.names import chain_id_of, is_extraction, last_component, namespace_of

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
# printf '%s %s' A B | sha256sum, and then of that and C
AB = "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"
ABC = "sha256:c1377126441fb2f5ec2c21ae2a60255331d639e830f0ee1b40a36e52d4c40588"


def test_a_chain_id_is_that_of_the_image_specification() -> None:
    first = chain_id(None, A)
    assert first == A
    assert chain_id(first, B) == AB
    assert chain_id(chain_id(first, B), C) == ABC


def test_the_order_of_layers_is_part_of_a_chain_id() -> None:
    assert chain_id(ChainID(A), B) != chain_id(ChainID(B), A)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (A, True),
        ("sha256:" + "0123456789abcdef" * 4, True),
        (A + "\n", False),
        (A + "a", False),
        (A[:-1], False),
        ("sha256:" + "A" * 64, False),
        ("SHA256:" + "a" * 64, False),
        ("sha256:" + "g" * 64, False),
        ("sha256:" + "\u0661" * 64, False),
        ("sha512:" + "a" * 64, False),
        ("a" * 64, False),
        (" " + A, False),
        ("sha256:../../etc/passwd", False),
        ("", False),
    ],
)
def test_a_digest_is_sha256_and_64_small_hexadecimal_digits(text: str, is_one: bool) -> None:
    assert is_digest(text) is is_one


@pytest.mark.parametrize(
    ("key", "namespace", "last", "extraction", "chain"),
    [
        (f"k8s.io/812/extract-726613471-Tr40 {A}", "k8s.io", f"extract-726613471-Tr40 {A}", True, A),
        (f"k8s.io/813/{A}", "k8s.io", A, False, A),
        ("k8s.io/814/" + "f" * 64, "k8s.io", "f" * 64, False, None),
        # Without a chain ID it is no unpack's: a container may be called so.
        ("default/1/extract-1-x", "default", "extract-1-x", False, None),
        ("default/1/extract-1-x nonsense", "default", "extract-1-x nonsense", False, None),
        # Clients choose their keys: blanks, colons and slashes are all theirs.
        (f"default/2/a b c {A}", "default", f"a b c {A}", False, A),
        (f"default/3/{A}/extract-1-x {B}", "default", f"extract-1-x {B}", True, B),
        (f"default/4/extract-1-x {A}/mine", "default", "mine", False, None),
        ("default/5/not-extract-1", "default", "not-extract-1", False, None),
        ("default/6/ends with a slash/", "default", "", False, None),
        ("default/7/a:b:c", "default", "a:b:c", False, None),
        (A, A, A, False, A),
        ("", "", "", False, None),
    ],
)
def test_no_more_of_a_key_is_read_than_its_last_component(
    key: str, namespace: str, last: str, extraction: bool, chain: str | None
) -> None:
    assert namespace_of(key) == namespace
    assert last_component(key) == last
    assert is_extraction(key) is extraction
    assert chain_id_of(key) == chain
