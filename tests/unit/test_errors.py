# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import time

import pytest
from grpc import StatusCode

from blockdev import errors as blockdev
from snapshotter import errors
from snapshotter.errors import MESSAGE_BYTES_MAX, SnapshotterError, one_line, translate


def test_a_plain_text_stays_as_it_is() -> None:
    text = "layer sha256:ab: tar ends inside a header; fetch 'it' again (100 %, ~/a\\b)"
    assert one_line(text) == text
    assert one_line("") == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb", "a\\x0ab"),
        ("a\r\n\tb", "a\\x0d\\x0a\\x09b"),
        ("a\0b", "a\\x00b"),
        ("\x1b[31mred\x7f", "\\x1b[31mred\\x7f"),
        ("\x85", "\\x85"),
        ("ü", "\\xfc"),
        ("€", "\\u20ac"),
        ("\u2028", "\\u2028"),
        ("😀", "\\U0001f600"),
        # what os.fsdecode makes of a file name that is not UTF-8
        (b"a\xff".decode("utf-8", "surrogateescape"), "a\\udcff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_not_printable_ascii_is_escaped(text: str, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize("piece", ["a", "\n", "\0", "ü", "€", "😀", "\udcff", "%", "\\"])
@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 1 << 14])
def test_a_line_is_short_ascii_whatever_the_text(piece: str, count: int) -> None:
    line = one_line(piece * count)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= MESSAGE_BYTES_MAX
    assert line.encode("utf-8")
    sent = 3 if piece == "%" else len(one_line(piece))  # gRPC escapes it
    assert line.endswith("...") is (sent * count > MESSAGE_BYTES_MAX)
    assert len(line.replace("%", "%25")) <= MESSAGE_BYTES_MAX


def test_a_text_of_a_megabyte_costs_no_more_than_its_beginning() -> None:
    """Keys and file names are as long as others make them, and the daemon's one loop waits for this."""
    text = "😀" * (1 << 20)
    started = time.process_time()
    assert len(one_line(text)) == MESSAGE_BYTES_MAX
    assert time.process_time() - started < 0.1


def test_a_long_line_keeps_its_beginning() -> None:
    text = "layer sha256:ab: " + "x" * 5000
    assert one_line(text) == text[: MESSAGE_BYTES_MAX - 3] + "..."
    assert one_line(text[:MESSAGE_BYTES_MAX]) == text[:MESSAGE_BYTES_MAX]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.NotFound, StatusCode.NOT_FOUND),
        (errors.AlreadyExists, StatusCode.ALREADY_EXISTS),
        (errors.FailedPrecondition, StatusCode.FAILED_PRECONDITION),
        (errors.InvalidArgument, StatusCode.INVALID_ARGUMENT),
        (errors.DataLoss, StatusCode.DATA_LOSS),
        (errors.Unimplemented, StatusCode.UNIMPLEMENTED),
        (errors.Unavailable, StatusCode.UNAVAILABLE),
        (errors.ResourceExhausted, StatusCode.RESOURCE_EXHAUSTED),
        (errors.DeadlineExceeded, StatusCode.DEADLINE_EXCEEDED),
        (errors.Internal, StatusCode.INTERNAL),
        (SnapshotterError, StatusCode.INTERNAL),
    ],
)
def test_every_kind_has_the_code_that_containerd_knows_it_by(kind: type[SnapshotterError], code: StatusCode) -> None:
    error = kind("why")
    assert error.code is code
    assert translate(error) is error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (blockdev.DigestMismatch("x"), errors.DataLoss),
        (blockdev.FormatError("x"), errors.InvalidArgument),
        (blockdev.CompressionError("x"), errors.InvalidArgument),
        # UNIMPLEMENTED would make containerd unpack the layer unverified.
        (blockdev.UnsupportedError("x"), errors.InvalidArgument),
        (blockdev.LimitExceeded("x"), errors.OverLimit),
        (blockdev.NoSpace("x"), errors.ResourceExhausted),
        (blockdev.NoResources("x"), errors.ResourceExhausted),
        (blockdev.KernelExhausted("x"), errors.ResourceExhausted),
        (blockdev.BuildFailed("x"), errors.Internal),
        (blockdev.KernelError("x"), errors.Internal),
        (blockdev.BlockdevError("x"), errors.Internal),
    ],
)
def test_errors_of_layers_are_translated_and_keep_their_words(
    error: blockdev.BlockdevError, kind: type[SnapshotterError]
) -> None:
    translated = translate(error)
    assert type(translated) is kind
    assert str(translated) == "x"


def test_every_error_of_layers_has_a_translation() -> None:
    kinds = list(blockdev.BlockdevError.__subclasses__())
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        error = kind("words")
        assert "words" in str(translate(error))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_others_may_give_back_is_resource_exhausted(number: int) -> None:
    assert type(translate(OSError(number, "none left"))) is errors.ResourceExhausted
    assert type(translate(blockdev.kernel_error("mount", number))) is errors.ResourceExhausted
    assert type(translate(blockdev.build_failed("start", OSError(number, "none left")))) is errors.ResourceExhausted
    assert type(translate(MemoryError())) is errors.ResourceExhausted


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_resource_exhausted(number: int) -> None:
    translated = translate(OSError(number, "full", "/somewhere"))
    assert type(translated) is errors.ResourceExhausted
    assert "/somewhere" in str(translated)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), ValueError("odd"), KeyError("k"), RuntimeError()])
def test_what_nobody_expected_is_internal_and_names_its_type(error: Exception) -> None:
    translated = translate(error)
    assert type(translated) is errors.Internal
    assert type(error).__name__ in str(translated)
