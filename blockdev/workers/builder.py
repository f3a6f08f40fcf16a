# SPDX-License-Identifier: Apache-2.0
"""The builder program: hashes, scans and writes one layer. argv: PARAMETERS (JSON); report on stdout."""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from blockdev.errors import BlockdevError, DigestMismatch, LimitExceeded
from blockdev.formats.layer_file import format_named
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.workers import protocol, sandbox
from blockdev.workers.parameters import BuilderParameters
from blockdev.workers.pipeline import Pipeline, page_aligned
from blockdev.workers.ring import RingReader, RingWriter
from verity.buffers import Buffer
from verity.hasher import ONE_PASS, LeafStore, StreamHash

_PIECES: Final = 16
_PUMPED_PIECES: Final = 4
# Beside the file tree: interpreter, buffers, and the stacks and arenas of its threads, mostly never touched.
_ADDRESS_SPACE_BYTES: Final = 3 << 30
_LEAVES_IN_MEMORY_BYTES: Final = 8 << 20
_SYNCED_AT_ONCE_BYTES: Final = 64 << 20
# Head, trailer, padding.
_FILE_BEYOND_BYTES: Final = 64 << 20


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Sequential:
    """Written from an offset on; what stands in front of that is written last."""

    def __init__(self, fd: int, offset_bytes: int) -> None:
        self._fd, self._offset = fd, offset_bytes

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self._offset)
            self._offset += written
            view = view[written:]

    def write_head(self, data: bytes) -> None:
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError("short write of the head")

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)


class StagedFile(_Sequential):
    """Sequential writes to a descriptor, synced piece by piece on a thread of its own.

    So the disk writes, and flushes its cache, while the build still computes: at the end little is
    left to wait for.
    """

    def __init__(self, fd: int, offset_bytes: int) -> None:
        super().__init__(fd, offset_bytes)
        self._handed_over = offset_bytes
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._sync_early, daemon=True)
        self._thread.start()

    def write(self, data: Buffer) -> None:
        super().write(data)
        if self._offset - self._handed_over >= _SYNCED_AT_ONCE_BYTES:
            self._requests.put(True)
            self._handed_over = self._offset

    def sync(self) -> None:
        """All of it is on the disk when this returns. Raises OSError."""
        self._requests.put(False)
        self._thread.join()
        if self._error is not None:
            raise self._error
        os.fsync(self._fd)

    def _sync_early(self) -> None:
        while self._requests.get():
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._error = error  # the kernel tells it once (man 2 fsync): the last sync would know nothing of it
                return


class IndexFile(_Sequential):
    """What is written has its place in a layer file, of which it is all that is kept; the rest are holes."""

    def skip(self, size: int) -> None:
        self._offset += size

    def sync(self) -> None:
        pass


def _fill(fd: int, view: memoryview) -> int:
    size = 0
    while size < len(view):
        got = os.readv(fd, [view[size:]])
        if not got:
            break
        size += got
    return size


class _Blob:
    """The compressed bytes: hashed whole, whatever becomes of them behind the ring."""

    def __init__(self, fd: int, expected_size_bytes: int | None, hasher: _Hash) -> None:
        self._fd, self._expected, self.hasher = fd, expected_size_bytes, hasher
        self.size_bytes = 0
        self.error: BaseException | None = None

    def read(self, view: memoryview) -> int:
        try:
            size = _fill(self._fd, view)
        except OSError as error:
            self.error = error  # nothing can be said of its digest
            raise
        self.size_bytes += size
        if self._expected is not None and self.size_bytes > self._expected:
            raise DigestMismatch(f"blob is longer than its {self._expected} bytes")
        return size

    def pump(self, into: RingWriter) -> None:
        """Thread: everything into the decompressor, hashed on the way."""
        open_end = True

        def write(piece: Buffer) -> None:
            nonlocal open_end
            try:
                if open_end:
                    into.write(piece)
            except BrokenPipeError:
                open_end = False  # it has failed and says why; the digest is still wanted

        try:
            Pipeline((self.hasher.update, write), pieces=_PUMPED_PIECES, piece_bytes=protocol.PIECE_BYTES).run(
                self.read
            )
        except BaseException as error:
            self.error = error
            into.abandon()
        else:
            into.close()

    def finish(self, hasher: Callable[[Buffer], None]) -> None:
        view = page_aligned(protocol.PIECE_BYTES)
        while size := self.read(view):
            hasher(view[:size])

    def check(self, expected_digest: str | None) -> str:
        """The digest. Raises DigestMismatch."""
        if self.error is not None:
            raise self.error
        digest = "sha256:" + self.hasher.hexdigest()
        if self._expected is not None and self.size_bytes != self._expected:
            raise DigestMismatch(f"blob has {self.size_bytes} bytes, not {self._expected}")
        if expected_digest is not None and digest != expected_digest:
            raise DigestMismatch(f"blob has digest {digest}, not {expected_digest}")
        return digest


def _layer_writers(parameters: BuilderParameters) -> Iterator[tuple[StagedFile | IndexFile, LeafStore, LayerWriter]]:
    for output in parameters.outputs:
        layer_format = format_named(output.format)
        staged: StagedFile | IndexFile
        if output.index_only:
            staged = IndexFile(output.staged_fd, layer_format.head_bytes)
        else:
            staged = StagedFile(output.staged_fd, layer_format.head_bytes)
        leaves = LeafStore(threshold_bytes=_LEAVES_IN_MEMORY_BYTES, spool_fd=output.spool_fd)
        yield (
            staged,
            leaves,
            LayerWriter(
                layer_format,
                write=staged.write,
                write_head=staged.write_head,
                # A tar that is not there cannot be read; the index, which is all that a split one needs, can.
                read_back=staged.read if layer_format.split or not output.index_only else None,
                leaves=leaves,
                limits=parameters.limits,
                strict=parameters.strict,
                skip=staged.skip if isinstance(staged, IndexFile) else None,
            ),
        )


def _work(
    parameters: BuilderParameters, compressed_ring: RingWriter | None, tar: RingReader | None, status_fd: int
) -> dict[str, Any]:
    files = list(_layer_writers(parameters))
    tar_digest = StreamHash()
    blob = _Blob(parameters.blob_fd, parameters.expected_size_bytes, hashlib.sha256() if tar else tar_digest)
    pump: threading.Thread | None = None
    if compressed_ring:
        pump = threading.Thread(target=blob.pump, args=(compressed_ring,), daemon=True)
        pump.start()
    total = 0

    def fill(view: memoryview) -> int:
        nonlocal total
        size = tar.read_into(view) if tar else blob.read(view)
        total += size
        limits = parameters.limits
        # Of the whole blob: what was read of it by now depends on how the processes happened to run.
        compressed = max(blob.size_bytes, parameters.expected_size_bytes or 0)
        if tar and total > max(limits.expansion_floor_bytes, limits.expansion_ratio * compressed):
            raise LimitExceeded(f"blob of {compressed} bytes expands more than {limits.expansion_ratio} times")
        return size

    digest_is_whole = True

    def whole(sink: Callable[[Buffer], object]) -> Callable[[Buffer], None]:
        def guarded(data: Buffer) -> None:
            nonlocal digest_is_whole
            try:
                sink(data)
            except BaseException:
                digest_is_whole = False
                raise

        return guarded

    failure: BaseException | None = None
    built: list[BuiltLayer] = []
    try:
        # One format's leaves are hashed along with the tar, where that is the cheaper way.
        along = tar_digest if ONE_PASS else None
        *others, hashing = files[0][2].sinks(along)
        sinks = [whole(hashing) if along else hashing, *others]
        sinks += [sink for _, _, layer in files[1:] for sink in layer.sinks()]
        if along is None:
            sinks.append(tar_digest.update)
        Pipeline(sinks, pieces=_PIECES, piece_bytes=protocol.PIECE_BYTES).run(fill)
        built = [layer.finish(tar_digest.digest()) for _, _, layer in files]
    except (BlockdevError, OSError) as error:
        failure = error
    if tar and pump:
        tar.close()  # a failed build lets the decompressor go
        pump.join()
    elif failure is not None and blob.error is None and not isinstance(failure, DigestMismatch):
        blob.finish(tar_digest.update)
    if failure is not None and not tar and not digest_is_whole:
        raise failure  # the digest of a plain blob is the tar's: nothing can be said of it
    # A rotten blob explains every other failure, so it is said first.
    digest = blob.check(parameters.expected_digest)
    if failure is not None:
        raise failure
    diff_id = "sha256:" + tar_digest.hexdigest()
    if parameters.expected_diff_id not in (None, diff_id):
        raise DigestMismatch(f"blob {digest} unpacks to diff ID {diff_id}, not {parameters.expected_diff_id}")
    started = time.monotonic()
    for (staged, _, layer), output in zip(files, parameters.outputs, strict=True):
        if output.table_fd is not None:
            _write_table(output.table_fd, layer.directory_table(tar_digest.digest()))
        staged.sync()
    waited = time.monotonic() - started
    spooled = sum(leaves.bytes_spooled for _, leaves, _ in files)
    used = protocol.usage(status_fd)
    return {
        "diff_id": diff_id,
        "tar_size_bytes": total,
        "blob_digest": digest,
        "blob_size_bytes": blob.size_bytes,
        "layers": [
            {
                "format": layer.format,
                "root_hash": layer.root_hash.hex(),
                "data_size_bytes": layer.data_size_bytes,
                "tree_size_bytes": layer.tree_size_bytes,
                "file_size_bytes": layer.file_size_bytes,
                "entries": layer.entries,
                "warnings": layer.warnings,
            }
            for layer in built
        ],
        "usage": {"builder": {**used, "spooled_bytes": spooled, "sync_wait_seconds": round(waited, 3)}},
    }


def _write_table(fd: int, pieces: Iterator[bytes]) -> None:
    """Durable when it returns; most layers have none."""
    size = 0
    for piece in pieces:
        view = memoryview(piece)
        while view:
            written = os.pwrite(fd, view, size)
            size += written
            view = view[written:]
    if size:
        os.fsync(fd)


def _profile(parameters: BuilderParameters, status_fd: int) -> sandbox.Profile:
    limits = parameters.limits
    sources, pipes = {parameters.blob_fd}, set[int]()
    if parameters.compressed:
        sources.add(parameters.compressed.free_fd)
        pipes.add(parameters.compressed.full_fd)
    if parameters.tar:
        sources.add(parameters.tar.full_fd)
        pipes.add(parameters.tar.free_fd)
    return sandbox.builder(
        status_fd,
        sources=frozenset(sources),
        pipes=frozenset(pipes),
        files=frozenset(fd for output in parameters.outputs for fd in output.descriptors()),
        bounds=sandbox.Bounds(
            address_space_bytes=limits.metadata_bytes * len(parameters.outputs) + _ADDRESS_SPACE_BYTES,
            cpu_seconds=parameters.cpu_seconds,
            # The tar, an index that is no larger than the tree in memory, and hash trees, a fifteenth at most; where
            # ends of files are in the index, it has gaps, at most three fifths of the tar.
            file_size_bytes=(limits.tar_bytes + limits.metadata_bytes) * 2 + _FILE_BEYOND_BYTES,
        ),
    )


def main() -> None:
    parameters = BuilderParameters.decode(sys.argv[1])
    status_fd = sandbox.open_status()
    hashlib.sha256()  # OpenSSL reads its configuration with the first one
    # Mapped while that can be done.
    compressed = RingWriter(parameters.compressed) if parameters.compressed else None
    tar = RingReader(parameters.tar) if parameters.tar else None
    protocol.answer(
        1,
        _profile(parameters, status_fd),
        parameters.parent_pid,
        lambda: _work(parameters, compressed, tar, status_fd),
    )


if __name__ == "__main__":
    main()
