# SPDX-License-Identifier: Apache-2.0
"""The engine and the model that was written from the document agree, on sound tars and on hostile ones."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdev.errors import LimitExceeded
from blockdev.formats.compression import Compression
from blockdev.formats.erofs_reader import Reader
from tests import fuzz
from tests.golden import make_tars, more_tars
from tests.golden.make_tars import EOA, PX, D, F, H, S
from tests.property import mutations, reference, test_layer
from tests.should_fail import make_corpus

VECTORS: Final[list[dict[str, Any]]] = [
    vector
    for path in sorted(Path(make_tars.__file__).parent.glob("tar-index*.json"))
    for vector in json.loads(path.read_text())["vectors"]
]
CASES: Final = make_tars.CASES | more_tars.CASES
FUZZED_INPUTS: Final = 4000
sources = st.randoms(use_true_random=False)
# A generator that draws much is slow to be told so.
slow = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_model_writes_the_golden_layers(vector: dict[str, Any]) -> None:
    tar = bytes(CASES[vector["name"]]())
    if "refused" in vector:
        with pytest.raises(reference.Refused):
            reference.layer_file(tar)
        return
    layer = reference.layer_file(tar)
    assert (layer.root_hash.hex(), layer.data_size, layer.inodes, len(layer.file)) == (
        vector["root_hash"], vector["data_size"], vector["inodes"], vector["file_size"],
    )  # fmt: skip
    assert hashlib.sha256(layer.file).hexdigest() == vector["file_sha256"]


@pytest.mark.parametrize("layer_format", fuzz.EROFS_FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_both_agree_on_every_golden_tar(name: str, layer_format: str) -> None:
    fuzz.check_tar(bytes(CASES[name]()), [], layer_format)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in (make_corpus.BAD | make_corpus.NEUTRALISED).items()
        if not case.packed and case.expected["media_type"] == make_corpus.OCI and not case.expected.get("limits")
    ],
)
@pytest.mark.parametrize("layer_format", fuzz.EROFS_FORMATS)
def test_both_agree_on_the_corpus(name: str, layer_format: str) -> None:
    fuzz.check_tar((make_corpus.BAD | make_corpus.NEUTRALISED)[name].blob, [], layer_format)


@slow
@given(rng=sources)
def test_both_agree_on_any_members(rng: Random) -> None:
    fuzz.cut_tar(mutations.tar(rng), rng)


@slow
@given(name=st.sampled_from(range(len(fuzz.seeds()))), other=st.sampled_from(range(len(fuzz.seeds()))), rng=sources)
def test_both_agree_on_mutated_tars(name: int, other: int, rng: Random) -> None:
    fuzz.cut_tar(mutations.mutate_tar(rng, fuzz.seeds()[name], fuzz.seeds()[other]), rng)


@slow
@given(kind=st.sampled_from([Compression.GZIP, Compression.ZSTD]), rng=sources)
def test_a_mutated_stream_is_what_others_read_or_refused(kind: Compression, rng: Random) -> None:
    fuzz.cut_stream(kind)(fuzz.make_stream(kind, rng), rng)


@slow
@given(number=st.integers(0, len(fuzz.layers()) - 1), rng=sources)
def test_a_mutated_layer_file_is_read_or_refused(number: int, rng: Random) -> None:
    fuzz.check_layer(mutations.mutate_layer(rng, *fuzz.layers()[number]))


def test_a_short_run_of_the_fuzzer_finds_nothing() -> None:
    results: Counter[tuple[str, str]] = Counter()
    for target, result, _, text in fuzz.loop("the test", list(fuzz.TARGETS), inputs=FUZZED_INPUTS):
        assert not text, text
        results[target, result] += 1
    # A fuzzer whose inputs are all refused finds nothing either.
    for target in fuzz.TARGETS:
        total = sum(count for (name, _), count in results.items() if name == target)
        assert results[target, "accepted"] > total / 20, results
        assert results[target, "refused"] > total / 20, results


# --- where they are known not to agree


def xattr(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return b"SCHILY.xattr.user." + name, value


def test_a_whiteout_of_a_long_name_that_ends_in_a_dot() -> None:
    name = b".wh." + b"n" * 255
    reference.read_tar(PX((b"path", name)) + F(b"x") + EOA)
    fuzz.build(PX((b"path", name)) + F(b"x") + EOA, [])
    fuzz.build(PX((b"path", name + b"/.")) + F(b"x") + EOA, [])


def test_attributes_that_fit_once_all_of_them_are_joined() -> None:
    first = PX(*(xattr(b"%d" % n, b"v" * 60000) for n in range(4))) + D(b"d")
    tar = first + PX(xattr(b"new", b"v" * 60000), xattr(b"0", b"")) + D(b"d") + EOA
    reference.read_tar(tar)
    fuzz.build(tar, [])


@pytest.mark.parametrize("blocks", [b"\x01\0\0", b"\x20\0\0" + b"data" + b"\x01\0\0"])
def test_a_zstd_frame_that_holds_less_than_it_says(blocks: bytes) -> None:
    """A frame of 64 bytes by its header. The zstd tool and containerd's decoder refuse it."""
    assert fuzz.unpacked(Compression.ZSTD, b"\x28\xb5\x2f\xfd\x20\x40" + blocks, 1 << 16) is None


def test_reading_names_that_share_large_attributes_does_not_read_them_again_and_again() -> None:
    bodies = [PX(*(xattr(b"%d" % n, b"v" * 60000) for n in range(4))) + F(name) for name in (b"f", b"g")]
    links = [H(b"%03d%s" % (n, target), target) for n in range(100) for target in (b"f", b"g")]
    file = fuzz.build(b"".join(bodies + links) + EOA, [])[1]
    read = 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal read
        read += size
        return file[offset : offset + size]

    assert len(list(Reader(read_at, len(file) // 4096 * 4096).walk())) == 203
    assert read < 10 * len(file)


def test_a_path_is_bounded_wherever_symlinks_lead() -> None:
    """Symlinks on the way to a parent make directories deeper than any name says: 255 times 16 names, and some."""
    deep = b"/".join([b"n" * 255] * 16)[:4095]
    names = [b"l%d" % n for n in range(255)]
    members = [PX((b"path", b"/".join(names[: n + 1])), (b"linkpath", deep)) + S(b"x", b"x") for n in range(len(names))]
    last = PX((b"path", b"/".join([*names, *[b"n" * 255] * 20, b"f"]))) + F(b"x")
    with pytest.raises(LimitExceeded, match=r"path of 65... bytes, over the limit of 65536"):
        test_layer.build(b"".join(members) + last + EOA)
