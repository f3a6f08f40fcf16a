# SPDX-License-Identifier: Apache-2.0
"""One stage of a build alone, or the whole, as a program of its own: argv STAGE and its arguments.

Prints one JSON object: `seconds` of the work itself, without the interpreter's start and without giving
back what temporary files hold, and what the stage has to say.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from bench.layers import MEDIA_TYPES
from blockdev.formats.compression import Compression, decompress
from blockdev.formats.layer_file import HEAD_BYTES, format_named
from blockdev.formats.layer_writer import VerifiedWriter, index_writer
from blockdev.formats.limits import Limits
from blockdev.workers.builder import StagedFile
from blockdev.workers.launch import BuildRecord, BuildRequest, run_build
from blockdev.workers.parameters import Output
from blockdev.workers.pipeline import page_aligned
from verity import veritysetup
from verity.hasher import LeafStore, StreamHash, block_digests, leaf_digests
from verity.params import PRESETS
from verity.tree import Geometry, HashTree
from verity.verify import verify_all

PIECE_BYTES: Final = 1 << 20
_HASH_ROUNDS: Final = 300
_PARAMS: Final = PRESETS["tar-index"]
_COMPRESSIONS: Final = {"gzip": Compression.GZIP, "zstd": Compression.ZSTD, "plain": Compression.NONE}


_started = 0.0


def _elapsed() -> float:
    return time.monotonic() - _started


def inflate(kind: str, path: str) -> dict[str, Any]:
    with open(path, "rb", buffering=0) as file:
        total = sum(len(memoryview(piece)) for piece in decompress(_COMPRESSIONS[kind], file.read, PIECE_BYTES))
    return {"bytes": total}


def _pieces(path: str, work: Callable[[memoryview], object]) -> dict[str, Any]:
    """Reading the tar from the page cache is part of it: each stage of a build reads from a buffer, too."""
    buffer = page_aligned(PIECE_BYTES)
    total = 0
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            work(buffer[:size])
            total += size
    return {"bytes": total}


def sha256(path: str) -> dict[str, Any]:
    return _pieces(path, hashlib.sha256().update)


def leaves(path: str, layer_format: str) -> dict[str, Any]:
    params = format_named(layer_format).params
    block = params.data_block_bytes
    return _pieces(path, lambda view: leaf_digests(view[: len(view) - len(view) % block], params))


def write(size: str, directory: str) -> dict[str, Any]:
    """As many bytes as the layer file has, with the builder's own way of writing, and fsync."""
    piece = page_aligned(PIECE_BYTES)
    piece[:] = os.urandom(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=directory) as file:
        staged = StagedFile(file.fileno(), HEAD_BYTES)
        left = int(size)
        while left:
            staged.write(piece[:left])
            left -= min(left, PIECE_BYTES)
        staged.sync()
        return {"bytes": int(size), "seconds": _elapsed()}


def _request(files: ExitStack, kind: str, path: str, directory: str, *layer_formats: str) -> BuildRequest:
    """A build as the daemon does it; `files` holds what it reads and writes."""

    def empty() -> int:
        return files.enter_context(tempfile.TemporaryFile(dir=directory)).fileno()

    return BuildRequest(
        blob_fd=files.enter_context(open(path, "rb", buffering=0)).fileno(),
        outputs=tuple(Output(name, empty(), empty()) for name in layer_formats),
        media_type=MEDIA_TYPES[kind],
        layer_name=path,
        expected_size_bytes=os.path.getsize(path),
    )


def _build(*arguments: str) -> tuple[BuildRecord, float]:
    """The record of the first format, and the seconds without what it takes to throw the files away."""
    with ExitStack() as files:
        request = _request(files, *arguments)
        started = time.monotonic()
        return asyncio.run(run_build(request))[0], time.monotonic() - started


def build(kind: str, path: str, directory: str, *layer_formats: str) -> dict[str, Any]:
    """One pass, a layer file for each format. The facts are those of the first one."""
    record, seconds = _build(kind, path, directory, *layer_formats)
    return {
        "seconds": seconds,
        "root_hash": record.root_hash,
        "entries": record.entries,
        "file_size_bytes": record.file_size_bytes,
        "data_size_bytes": record.data_size_bytes,
        "usage": record.usage,
    }


def index(path: str, layer_format: str) -> dict[str, Any]:
    """The work in Python for each entry: scanning, the tree, the index; no data hashed or written."""
    chosen = format_named(layer_format)
    leaves, behind, front = LeafStore(), bytearray(), chosen.head_bytes

    def read_back(offset: int, size: int) -> bytes:
        """Of what stands behind the data alone: a format that splits the tar looks at nothing else."""
        return bytes(behind[offset - front : offset - front + size])

    index = index_writer(chosen, Limits(), leaves, read_back if chosen.split else None)

    def feed(data: memoryview) -> None:
        nonlocal front
        placed = index.feed(data)
        front += len(data) if placed is None else len(placed)

    started = time.process_time()
    read = _pieces(path, feed)
    seconds = time.process_time() - started
    out = VerifiedWriter(behind.extend, HashTree(leaves, chosen.params), chosen.params)
    out.size_bytes = front
    started = time.process_time()
    entries = index.write(out, read["bytes"], bytes(32)).entries
    return {"entries": entries, "work_seconds": seconds + time.process_time() - started}


def pair(*arguments: str) -> dict[str, Any]:
    """Two builds one after the other, then two at once."""

    async def at_once(*requests: BuildRequest) -> None:
        await asyncio.gather(*map(run_build, requests))

    one_by_one = sum(_build(*arguments)[1] for _ in range(2))
    os.sync()
    with ExitStack() as files:
        started = time.monotonic()
        asyncio.run(at_once(*(_request(files, *arguments) for _ in range(2))))
        seconds = time.monotonic() - started
    return {"seconds": seconds, "one_by_one_seconds": one_by_one}


def veritysetup_format(path: str, data_size: str, directory: str) -> dict[str, Any]:
    """Hash tree alone, over the layer's data area."""
    with tempfile.NamedTemporaryFile(dir=directory) as tree:
        root = veritysetup.format_tree(path, tree.name, _PARAMS, int(data_size) // _PARAMS.data_block_bytes)
        os.fsync(tree.fileno())
        return {"root_hash": root.hex(), "seconds": _elapsed()}


def _geometry(data_size: str) -> Geometry:
    return Geometry(int(data_size) // _PARAMS.data_block_bytes, _PARAMS)


def verify(path: str, data_size: str, root_hash: str) -> dict[str, Any]:
    """The whole layer file as `tardevctl layer verify` does it."""
    with open(path, "rb", buffering=0) as file:
        verify_all(
            lambda offset, size: os.pread(file.fileno(), size, offset), _geometry(data_size), bytes.fromhex(root_hash)
        )
    return {}


def veritysetup_verify(path: str, data_size: str, root_hash: str) -> dict[str, Any]:
    veritysetup.verify(path, _geometry(data_size), bytes.fromhex(root_hash))
    return {}


def hashes() -> dict[str, Any]:
    """Bytes per second of hashes over one piece in memory: by turns, the quickest of each counts."""
    piece, salt, stream, own = os.urandom(PIECE_BYTES), _PARAMS.salt, hashlib.sha256(), StreamHash()
    block = _PARAMS.data_block_bytes
    calls: dict[str, Callable[[], object]] = {
        "stream": lambda: stream.update(piece),
        "leaves": lambda: block_digests(piece, block, salt),
        "leaves of 4096 bytes": lambda: block_digests(piece, 4096, salt),
        "both": lambda: own.update_with_leaves(piece, piece, block, salt),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(_HASH_ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: PIECE_BYTES / seconds for name, seconds in best.items()}


STAGES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "inflate": inflate,
    "sha256": sha256,
    "leaves": leaves,
    "write": write,
    "build": build,
    "index": index,
    "pair": pair,
    "veritysetup": veritysetup_format,
    "verify": verify,
    "veritysetup-verify": veritysetup_verify,
    "hashes": hashes,
}


def main() -> None:
    stage, *arguments = sys.argv[1:]
    global _started
    _started = time.monotonic()
    result = STAGES[stage](*arguments)
    print(json.dumps({"seconds": _elapsed(), **result}))


if __name__ == "__main__":
    main()
