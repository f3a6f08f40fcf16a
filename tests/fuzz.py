# SPDX-License-Identifier: Apache-2.0
"""Fuzz the engine against the reference model, the decompressors against others, the reader against itself.

usage: python -m tests.fuzz [--seconds N] [--seed S] [--jobs J] [--target NAME]... [--replay FILE]

A seed gives the same inputs again. A finding is saved under .cache/fuzz-findings: the input, and beside it
what was wrong; `--target NAME --replay FILE` runs one again. The status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import os
import queue
import re
import resource
import signal
import stat
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Final

from zstandard import ZstdDecompressor, ZstdError

from blockdev.errors import BlockdevError, CompressionError, FormatError, LimitExceeded
from blockdev.formats.compression import Compression, decompress
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import Identity, Trailer
from blockdev.formats.layer_writer import BuiltLayer
from blockdev.formats.limits import Limits
from blockdev.formats.tar_split import Run, tar_runs
from tests.chains import make_of
from tests.golden import make_tars, more_tars
from tests.property import mutations, reference
from tests.should_fail import make_corpus

FINDINGS: Final = Path(__file__).parent.parent / ".cache" / "fuzz-findings"
SECONDS_PER_INPUT: Final = 20
ADDRESS_SPACE_BYTES: Final = 4 << 30
OUTPUT_BYTES_MAX: Final = 64 << 20
# The model has no bounds of its own: those that the engine may be told not to have.
LIMITS: Final = Limits(path_bytes=1 << 30)
_AT: Final = re.compile(r"tar header at byte (\d+) ")


EROFS_FORMATS: Final = ("tar-index", "erofs-4k")


class Finding(AssertionError):
    pass


class TooSlow(Exception):
    pass


# --- the three targets; each says what became of the input


def build(tar: bytes, cuts: list[int], layer_format: str = "tar-index") -> tuple[BuiltLayer, bytes]:
    pieces = [tar[start:end] for start, end in zip([0, *cuts], [*cuts, len(tar)], strict=True)]
    made = make_of(pieces, layer_format, LIMITS)
    return made.built, made.file


def check_tar(tar: bytes, cuts: list[int], layer_format: str = "tar-index") -> str:
    """The engine refuses what the model refuses, at the same header; else both write the same bytes."""
    expected: reference.Layer | reference.Refused
    try:
        expected = reference.layer_file(tar, layer_format)
    except reference.Refused as refused:
        expected = refused
    try:
        built, file = build(tar, cuts, layer_format)
    except BlockdevError as error:
        if not isinstance(expected, reference.Refused):
            raise Finding(f"the engine refuses what the model takes: {type(error).__name__}: {error}") from None
        place = _AT.search(str(error))
        if expected.at is not None and place is not None and int(place[1]) != expected.at:
            raise Finding(f"refused at {place[1]}: {error}; by the model at {expected.at}: {expected}") from None
        return "refused"
    if isinstance(expected, reference.Refused):
        raise Finding(f"the engine takes what the model refuses: {expected}, at {expected.at}")
    if (built.root_hash, built.data_size_bytes, built.entries) != (
        expected.root_hash, expected.data_size, expected.inodes,
    ) or file != expected.file:  # fmt: skip
        raise Finding(f"another layer file than the model's: {built}")
    check_walk(file, expected)
    return "accepted"


def check_walk(file: bytes, expected: reference.Layer) -> None:
    """What the reader finds in the file is the tree of the model."""
    entries = Reader(lambda offset, size: file[offset : offset + size], expected.data_size).walk()
    found = {entry.path: entry for entry in entries}
    nodes, counts = reference.flat(expected.root), reference.link_counts(expected.root)
    if found.keys() != nodes.keys():
        raise Finding(f"other names: {sorted(found.keys() ^ nodes.keys())[:5]}")
    inodes: dict[int, reference.Node] = {}
    for path, node in nodes.items():
        entry = found[path]
        data = b"".join(file[at : at + size] for at, size in entry.extents()) if node.kind == "file" else b""
        ours = (entry.mode, entry.uid, entry.gid, entry.mtime, entry.rdev, entry.link, entry.xattrs, entry.nlink, data)
        theirs = (
            reference.FORMAT_BITS[node.kind] | node.mode, node.uid, node.gid, node.mtime, node.rdev, node.target,
            node.xattrs, counts[id(node)], node.data,
        )  # fmt: skip
        if ours != theirs:
            raise Finding(f"{path!r}: {ours} instead of {theirs}")
        if inodes.setdefault(entry.inode, node) is not node:
            raise Finding(f"{path!r} shares an inode that it must not share")
    if len(inodes) != expected.inodes:
        raise Finding("an inode twice")


def unpacked(kind: Compression, stream: bytes, piece_bytes: int) -> bytes | None:
    """None where it is refused."""
    out = bytearray()
    try:
        for piece in decompress(kind, io.BytesIO(stream).read, piece_bytes):
            if not 0 < len(memoryview(piece)) <= piece_bytes:
                raise Finding(f"a piece of {len(memoryview(piece))} bytes instead of {piece_bytes}")
            out += piece
            if len(out) > OUTPUT_BYTES_MAX:
                break  # the builder's to bound
    except (CompressionError, LimitExceeded):
        return None
    return bytes(out)


def by_zlib(stream: bytes) -> bytes | None:
    out = b""
    while True:
        inflater = zlib.decompressobj(31)
        if len(stream) > 3 and stream[3] & 0xE0 and not stream[3] & 2:
            # Go's reader, like ours, does not look at the reserved flags; zlib does.
            stream = stream[:3] + bytes([stream[3] & 0x1F]) + stream[4:]
        try:
            out += inflater.decompress(stream, OUTPUT_BYTES_MAX)
        except zlib.error:
            return None
        if not inflater.eof:
            return None
        stream = inflater.unused_data
        if not stream.strip(b"\0"):
            return out
        if stream.startswith(b"\0"):
            return None


def by_zstd(stream: bytes) -> bytes | None:
    """The library's own loop over frames. It takes a stream that is cut short for a whole one."""
    try:
        reader = ZstdDecompressor(max_window_size=128 << 20).stream_reader(stream, read_across_frames=True)
        return bytes(reader.read(OUTPUT_BYTES_MAX + 1))
    except ZstdError:
        return None


def check_stream(kind: Compression, stream: bytes, piece_bytes: int) -> str:
    """What both accept is the same; zlib accepts just what we do, and zstd at least what we do."""
    out = unpacked(kind, stream, piece_bytes)
    other = by_zlib(stream) if kind is Compression.GZIP else by_zstd(stream)
    if out is None:
        # Of zstd's the reference does not notice that one is cut short.
        if other is not None and kind is Compression.GZIP and len(other) < OUTPUT_BYTES_MAX:
            raise Finding(f"refused, but for the reference {len(other)} bytes")
        return "refused"
    if len(out) > OUTPUT_BYTES_MAX:
        return "accepted"
    if other is None and kind is Compression.ZSTD:
        return "accepted, known not to be right"  # see KNOWN: only where its last block is empty
    if other != out:
        raise Finding(f"{len(out)} bytes, of the reference {other if other is None else len(other)}, from one stream")
    return "accepted"


def check_layer(area: bytes) -> str:
    """Its index, and what is kept of the tar."""

    def read_at(offset: int, size: int) -> bytes:
        return area[offset : offset + size]

    try:
        for entry in Reader(read_at, len(area)).walk():
            if stat.S_ISREG(entry.mode) and any(at + size > len(area) for at, size in entry.extents()):
                raise Finding(f"{entry.path!r} lies outside the data area")
        split = Identity.unpack(area[:4096]).split
        if split is not None and split.end_bytes <= len(area):
            for run in tar_runs(split, read_at):
                if isinstance(run, Run) and run.offset_bytes + run.size_bytes > len(area):
                    raise Finding("a piece of the tar lies outside the data area")
    except (FormatError, LimitExceeded):
        return "refused"
    return "accepted"


# --- inputs


@cache
def seeds() -> list[bytes]:
    """Small tars: golden ones and those of the corpus."""
    cases = make_tars.CASES | more_tars.CASES
    tars = [bytes(case()) for name, case in cases.items() if name not in ("big5m", "many3000", "mt-three-levels")]
    tars += [case.blob for case in [*make_corpus.BAD.values(), *make_corpus.NEUTRALISED.values()] if not case.packed]
    return [tar for tar in tars if len(tar) <= 40_000]


@cache
def layers() -> list[tuple[bytes, int]]:
    """Layer files with the sizes of their data areas."""
    found = []
    for tar in seeds():
        for layer_format in EROFS_FORMATS:
            try:
                file = build(tar, [], layer_format)[1]
            except BlockdevError:
                continue
            if len(file) < 60_000:
                found.append((file, Trailer.unpack(file[-4096:]).data_size_bytes))
    return found


@dataclass(frozen=True)
class Target:
    """`make` an input; `check` it, with a source of randomness for what is not in it."""

    make: Callable[[Random], bytes]
    check: Callable[[bytes, Random], str]


def make_tar(rng: Random) -> bytes:
    form = rng.randrange(4)
    if form == 0:
        return mutations.tar(rng)
    base = mutations.tar(rng) if form == 1 else rng.choice(seeds())
    return mutations.mutate_tar(rng, base, rng.choice(seeds()))


def cut_tar(tar: bytes, rng: Random) -> str:
    cuts = sorted(rng.randrange(len(tar) + 1) for _ in range(rng.choice([0, 1, 4, 20])))
    return check_tar(tar, cuts, rng.choice(EROFS_FORMATS))


def make_stream(kind: Compression, rng: Random) -> bytes:
    pack = mutations.gzip_stream if kind is Compression.GZIP else mutations.zstd_stream
    stream = pack(rng, rng.choice(seeds()))
    if mutations.chance(rng, 10):
        return stream
    stream = mutations.mutate_bytes(rng, stream, pack(rng, rng.choice(seeds())[:600]))
    return mutations.sealed_gzip(stream) if kind is Compression.GZIP and mutations.chance(rng, 2) else stream


def cut_stream(kind: Compression) -> Callable[[bytes, Random], str]:
    return lambda stream, rng: check_stream(kind, stream, rng.choice([1 << 16, 1 << 20, 4096, 511]))


TARGETS: Final = {
    "tar": Target(make_tar, cut_tar),
    "gzip": Target(lambda rng: make_stream(Compression.GZIP, rng), cut_stream(Compression.GZIP)),
    "zstd": Target(lambda rng: make_stream(Compression.ZSTD, rng), cut_stream(Compression.ZSTD)),
    "erofs": Target(
        lambda rng: mutations.mutate_layer(rng, *rng.choice(layers())), lambda area, rng: check_layer(area)
    ),
}
# The tars have the most rules.
_WEIGHTS: Final = {"tar": 6, "gzip": 1, "zstd": 1, "erofs": 2}


# --- the loop


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(target: str, data: bytes, rng: Random) -> tuple[str, str]:
    """(what became of it, a finding's text or "")."""
    try:
        with in_time(SECONDS_PER_INPUT):
            return TARGETS[target].check(data, rng), ""
    except (Exception, TooSlow):  # anything but the family of errors that a check expects
        return "finding", traceback.format_exc()


def names(chosen: list[str]) -> list[str]:
    return [name for name in chosen for _ in range(_WEIGHTS[name])]


def loop(
    seed: str, chosen: list[str], *, inputs: int = 0, seconds: float = 0.0
) -> Iterator[tuple[str, str, bytes, str]]:
    """(target, what became of it, the input, a finding's text) until one of the bounds."""
    end = time.monotonic() + seconds
    weighted, number = names(chosen), 0
    while number < inputs if inputs else time.monotonic() < end:
        name = f"{seed}/{number}"
        target = weighted[number % len(weighted)]
        data = TARGETS[target].make(Random(name))
        result, text = run(target, data, Random(name + "/check"))
        yield target, result, data, text
        number += 1


def save(target: str, data: bytes, text: str) -> Path:
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(text)
    return path


def _worker(seed: str, chosen: list[str], seconds: float, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    counts: Counter[tuple[str, str]] = Counter()
    shown = time.monotonic()
    known: set[str] = set()
    for target, result, data, text in loop(seed, chosen, seconds=seconds):
        counts[target, result] += 1
        # The last line of a finding, its numbers and names left out, stands for all of its kind.
        kind = re.sub(r"b'[^']*'|\d+", "#", text.strip().rpartition("\n")[2])[:120]
        if text and kind not in known:
            known.add(kind)
            results.put(("finding", f"{save(target, data, text)}: {text.strip().rpartition(chr(10))[2][:300]}"))
        if time.monotonic() - shown > 2:
            results.put(("counts", counts))
            counts, shown = Counter(), time.monotonic()
    results.put(("counts", counts))
    results.put(("end", None))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.target or list(TARGETS)
    if arguments.replay:
        result, text = run(chosen[0], arguments.replay.read_bytes(), Random(arguments.seed))
        print(text or result)
        return bool(text)

    print(f"seed {arguments.seed}, {arguments.jobs} processes, {arguments.seconds:.0f} s", flush=True)
    results: Any = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(
            target=_worker, args=(f"{arguments.seed}/{job}", chosen, arguments.seconds, results), daemon=True
        )
        for job in range(arguments.jobs)
    ]
    start = shown = time.monotonic()
    for worker in workers:
        worker.start()
    counts: Counter[tuple[str, str]] = Counter()
    findings, running = 0, len(workers)
    while running:
        try:
            kind, value = results.get(timeout=SECONDS_PER_INPUT)
        except queue.Empty:
            if all(worker.is_alive() for worker in workers):
                continue
            print("a process died; its last inputs are lost: run the seed again with --jobs 1", flush=True)
            findings += 1
            break
        if kind == "end":
            running -= 1
        elif kind == "finding":
            findings += 1
            print(f"FINDING {value}", flush=True)
        else:
            counts += value
        if time.monotonic() - shown > 10 or not running:
            shown = time.monotonic()
            print(report(counts, shown - start), flush=True)
    return bool(findings)


def report(counts: Counter[tuple[str, str]], seconds: float) -> str:
    total = counts.total()
    lines = [f"{seconds:6.0f} s  {total} inputs, {total / max(seconds, 0.1):.0f}/s"]
    for target in TARGETS:
        results = {result: count for (name, result), count in sorted(counts.items()) if name == target}
        if results:
            lines.append(f"          {target:6} " + ", ".join(f"{count} {result}" for result, count in results.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
