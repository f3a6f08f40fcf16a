# SPDX-License-Identifier: Apache-2.0
"""Blobs of containerd's content store, and which of them may be the layer of a chain ID.

Layout of the store (containerd: plugins/content/local): blobs/sha256/HEX, in place once complete.
Manifests and configs in it come from registries: they are typed and bounded here, and only ever
propose; what a blob really is, its build finds out.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import msgspec

from blockdev.errors import EXHAUSTED
from policy.chain import ChainID, chain_id, is_digest
from policy.documents import DOCUMENT_BYTES_MAX, LAYERS_MAX, Descriptor
from snapshotter.api.proto import content_pb2, content_pb2_grpc
from snapshotter.errors import InvalidArgument, NotFound, SnapshotterError, Unavailable, translate
from snapshotter.names import namespace_of

_TEXT_MAX: Final = 255
_INDEX_BYTES_MAX: Final = 64 << 20
_CALL_SECONDS: Final = 10.0
_TICK_NS: Final = 10**9  # more than that of any file system


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as containerd sees it: from the call's metadata, else from the key."""

    namespace: str
    lease: str = ""

    @classmethod
    def of(cls, metadata: dict[str, str], key: str) -> Caller:
        """containerd 1.6 sends no namespace; its keys begin with one. Raises InvalidArgument."""
        of_key = namespace_of(key)
        return cls(
            metadata.get("containerd-namespace") or (of_key if _is_sendable(of_key) else ""),
            metadata.get("containerd-lease", ""),
        )

    def __post_init__(self) -> None:
        for text in (self.namespace, self.lease):
            if not _is_sendable(text):
                raise InvalidArgument(f"no namespace or lease of containerd's: {text[:80]!r}")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        lease = (("containerd-lease", self.lease),) if self.lease else ()
        return (("containerd-namespace", self.namespace or "default"), *lease)


def _is_sendable(text: str) -> bool:
    """As gRPC metadata, which is printable ASCII; containerd's own names are narrower still."""
    return text.isascii() and text.isprintable() and len(text) <= _TEXT_MAX


@dataclass(frozen=True, slots=True)
class Blob:
    """A descriptor's words about a layer blob; `digest` with "sha256:"."""

    digest: str
    size_bytes: int
    media_type: str


class _Rootfs(msgspec.Struct):
    diff_ids: list[str]


class _Document(msgspec.Struct):
    """A manifest has `config` and `layers`, a config has `rootfs`; others have neither."""

    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    rootfs: _Rootfs | None = None


class _ConfigDocument(msgspec.Struct):
    rootfs: _Rootfs


_decode_manifest = msgspec.json.Decoder(_Document)
# A config's own "config" is no descriptor.
_decode_config = msgspec.json.Decoder(_ConfigDocument)


class ChainIndex:
    """Chain ID → blobs that some image of the store claims for it. Follows what comes and goes in the directory.

    Bounded in memory: past the bound the documents seen first are left out until others go.
    """

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._seen: set[str] = set()  # names of the directory that were looked at
        self._documents: dict[str, _Claim | tuple[str, ...]] = {}  # by name: a manifest, or a config's diff IDs
        self._size_bytes = 0
        self._left_out: set[str] = set()
        self._by_config: dict[str, set[str]] = {}  # config digest → names of manifests
        self._chains: dict[ChainID, _Claimed] = {}
        self._as_of_ns = -1  # the directory's own time, as far as that says that nothing has come or gone since

    def refresh(self) -> None:
        """Costs one stat(2) while nothing changes: who waits for a blob asks again and again. Raises OSError for want
        of descriptors or memory; what it could not look into for that, it looks into the next time."""
        as_of_ns = self._as_of_ns
        self._as_of_ns = -1
        with suppress(FileNotFoundError):
            changed_ns = os.stat(self._blobs).st_mtime_ns
            if changed_ns == as_of_ns:
                self._as_of_ns = as_of_ns
                return
            # What comes within a tick of the clock leaves no other trace.
            as_of_ns = changed_ns if time.time_ns() - changed_ns > _TICK_NS else -1
        try:
            with os.scandir(self._blobs) as entries:
                names = {entry.name for entry in entries}
        except FileNotFoundError:
            names = set()
        gone = [name for name in self._seen - names if self._forget(name)]
        self._seen &= names
        if gone:
            self._seen -= self._left_out
            self._left_out.clear()
        for name in names - self._seen:
            text = self._read(name)
            document = _parse(text) if text is not None else None
            if document is not None:
                self._add(name, document)
            self._seen.add(name)
        self._as_of_ns = as_of_ns

    def blobs(self, chain: ChainID) -> tuple[Blob, ...]:
        claimed = self._chains.get(chain)
        return tuple(claimed.blobs) if claimed else ()

    def diff_id(self, chain: ChainID) -> str | None:
        """Of the layer that completes the chain; no image can claim another: the chain ID is a hash of it."""
        claimed = self._chains.get(chain)
        return claimed.diff_id if claimed else None

    def _read(self, name: str) -> bytes | None:
        """None for what is no document. Raises OSError where it may yet be one."""
        try:
            fd = os.open(self._blobs / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode) and status.st_size <= DOCUMENT_BYTES_MAX:
                    head = os.pread(fd, 64, 0)
                    if head.lstrip().startswith(b"{"):
                        return os.pread(fd, DOCUMENT_BYTES_MAX, 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
        return None

    def _add(self, name: str, document: _Claim | tuple[str, ...]) -> None:
        self._documents[name] = document
        self._size_bytes += _size_of(document)
        if isinstance(document, _Claim):
            self._by_config.setdefault(document.config, set()).add(name)
        self._count(name, document, 1)
        while self._size_bytes > _INDEX_BYTES_MAX:
            oldest = next(iter(self._documents))
            self._forget(oldest)
            self._left_out.add(oldest)

    def _forget(self, name: str) -> bool:
        document = self._documents.get(name)
        if document is None:
            return False
        self._count(name, document, -1)
        del self._documents[name]
        self._size_bytes -= _size_of(document)
        if isinstance(document, _Claim):
            names = self._by_config[document.config]
            names.discard(name)
            if not names:
                del self._by_config[document.config]
        return True

    def _count(self, name: str, document: _Claim | tuple[str, ...], by: int) -> None:
        """A document that comes or goes makes, or ends, the claims of the images that it completes."""
        if isinstance(document, _Claim):
            diff_ids = self._documents.get(document.config.removeprefix("sha256:"))
            if isinstance(diff_ids, tuple):
                self._claim(document, diff_ids, by)
            return
        for manifest in self._by_config.get(f"sha256:{name}", ()):
            claim = self._documents[manifest]
            assert isinstance(claim, _Claim)
            self._claim(claim, document, by)

    def _claim(self, claim: _Claim, diff_ids: tuple[str, ...], by: int) -> None:
        if len(claim.layers) != len(diff_ids):
            return
        chain: ChainID | None = None
        for blob, diff_id in zip(claim.layers, diff_ids, strict=True):
            chain = chain_id(chain, diff_id)
            if blob is None:
                continue
            blobs = self._chains.setdefault(chain, _Claimed(diff_id, {})).blobs
            blobs[blob] = blobs.get(blob, 0) + by
            if not blobs[blob]:
                del blobs[blob]
                if not blobs:
                    del self._chains[chain]


@dataclass(frozen=True, slots=True)
class _Claimed:
    """Of one chain ID."""

    diff_id: str
    blobs: dict[Blob, int]  # with the number of images that claim it


@dataclass(frozen=True, slots=True)
class _Claim:
    """A manifest: its config's digest and its layers; None where a descriptor names no blob."""

    config: str
    layers: tuple[Blob | None, ...]


def _parse(text: bytes) -> _Claim | tuple[str, ...] | None:
    with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        diff_ids = _decode_config.decode(text).rootfs.diff_ids
        return tuple(diff_ids) if len(diff_ids) <= LAYERS_MAX and all(map(is_digest, diff_ids)) else None
    with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        document = _decode_manifest.decode(text)
        if document.config and document.layers and len(document.layers) <= LAYERS_MAX:
            return _Claim(document.config.digest[:_TEXT_MAX], tuple(map(blob_of, document.layers)))
    return None


def blob_of(layer: Descriptor) -> Blob | None:
    """None where the descriptor's words are none of a blob."""
    if is_digest(layer.digest) and 0 < layer.size < 1 << 63 and len(layer.media_type) <= _TEXT_MAX:
        return Blob(layer.digest, layer.size, layer.media_type)
    return None


def _size_of(document: _Claim | tuple[str, ...]) -> int:
    """About what it costs in memory, the claims that it makes included; in bytes."""
    return 1000 + 500 * len(document.layers if isinstance(document, _Claim) else document)


class Content:
    """`directory`: containerd's content store, or an OCI image layout, which looks the same. `address`: containerd's
    socket, for what is not a file there; "" where nobody else has it."""

    def __init__(self, directory: Path, address: str) -> None:
        self._blobs = directory / "blobs" / "sha256"
        self.address = address
        self._index = ChainIndex(self._blobs)
        self._refreshing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    @property
    def blobs(self) -> Path:
        """Where it looks for files."""
        return self._blobs

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def _size(self, blob: Blob) -> int | None:
        """Of the file in the directory, where containerd puts a blob once it is complete."""
        try:
            return self._path(blob.digest).stat().st_size
        except OSError:
            return None

    async def candidates(self, chain: ChainID) -> tuple[str | None, tuple[Blob, ...]]:
        """The diff ID of the layer that completes the chain, where some image has it; and complete blobs that images
        claim for it, in the order in which they were seen: which of them is that layer, a build finds out. Raises
        ResourceExhausted."""
        async with self._refreshing:
            try:
                await asyncio.to_thread(self._index.refresh)
            except OSError as error:
                raise translate(error) from None
        complete = tuple(blob for blob in self._index.blobs(chain) if self._size(blob) == blob.size_bytes)
        return self._index.diff_id(chain), complete

    def rotten(self, chain: ChainID) -> str:
        """Of the blobs that `candidates` left out, what is wrong with one that is there; "" where none is."""
        for blob in self._index.blobs(chain):
            size = self._size(blob)
            if size not in (None, blob.size_bytes):
                return f"layer {blob.digest}: blob has {size} bytes, not {blob.size_bytes}"
        return ""

    async def visible(self, blob: Blob, caller: Caller) -> bool:
        """Whether containerd shows the blob to the caller's namespace. Raises Unavailable."""
        try:
            await self._stub().Info(
                content_pb2.InfoRequest(digest=blob.digest), metadata=caller.metadata(), timeout=_CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return False
            raise self._translated(error, blob) from None
        return True

    @asynccontextmanager
    async def open(self, blob: Blob, caller: Caller) -> AsyncIterator[int]:
        """A descriptor that gives the blob's bytes in order: of the file, else of a pipe from the content API.

        Raises NotFound or Unavailable, at the end too: a stream that broke off explains what its reader saw; OSError.
        """
        try:
            fd = os.open(self._path(blob.digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            if not self.address:
                raise NotFound(f"blob {blob.digest} is not in {self._blobs}") from None
            async with self._stream(blob, caller) as fd:
                yield fd
            return
        try:
            yield fd
        finally:
            os.close(fd)

    @asynccontextmanager
    async def _stream(self, blob: Blob, caller: Caller) -> AsyncIterator[int]:
        call = self._stub().Read(content_pb2.ReadContentRequest(digest=blob.digest), metadata=caller.metadata())
        try:
            first = await asyncio.wait_for(call.read(), _CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, blob) from None
        except TimeoutError:
            call.cancel()
            raise Unavailable(f"containerd at {self.address} does not answer for blob {blob.digest}") from None
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        pump = asyncio.create_task(self._pump(call, first, write_fd))
        try:
            try:
                yield read_fd
            finally:
                os.close(read_fd)
                if not pump.done():
                    call.cancel()
        except SnapshotterError:
            raise
        except Exception:
            await asyncio.wait([pump])
            if not pump.cancelled() and isinstance(cause := pump.exception(), grpc.aio.AioRpcError):
                raise self._translated(cause, blob) from None
            raise
        finally:
            await asyncio.wait([pump])
            if not pump.cancelled():
                pump.exception()

    @staticmethod
    async def _pump(call: grpc.aio.UnaryStreamCall, message: content_pb2.ReadContentResponse, fd: int) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(fd, "wb", 0))
        writer = asyncio.StreamWriter(transport, protocol, None, loop)
        try:
            while message is not grpc.aio.EOF:
                writer.write(message.data)
                await writer.drain()
                message = await call.read()
        except (BrokenPipeError, ConnectionResetError):
            call.cancel()  # the reader has seen enough
        finally:
            writer.close()

    def channel(self) -> grpc.aio.Channel:
        """To containerd, connected when it is first used."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(f"unix:{self.address}")
        return self._channel

    def _stub(self) -> content_pb2_grpc.ContentStub:
        return content_pb2_grpc.ContentStub(self.channel())  # type: ignore[no-untyped-call]

    def _translated(self, error: grpc.aio.AioRpcError, blob: Blob) -> SnapshotterError:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return NotFound(
                f"blob {blob.digest} is neither in {self._blobs} nor in containerd's content API; fetch the image again"
            )
        return Unavailable(f"containerd at {self.address}: blob {blob.digest}: {error.details()}")
