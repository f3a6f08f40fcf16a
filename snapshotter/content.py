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
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import msgspec

from snapshotter.api.proto import content_pb2, content_pb2_grpc
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.names import ChainID, chain_id, is_digest, namespace_of

# containerd's own bound for what it reads whole (core/images: "manifest too large").
_DOCUMENT_BYTES_MAX: Final = 8 << 20
_LAYERS_MAX: Final = 1000
_CHAINS_MAX: Final = 200_000
_WAITING_MANIFESTS_MAX: Final = 10_000
_CALL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as containerd sees it: from the call's metadata, else from the key."""

    namespace: str
    lease: str = ""

    @classmethod
    def of(cls, metadata: dict[str, str], key: str) -> Caller:
        return cls(metadata.get("containerd-namespace") or namespace_of(key), metadata.get("containerd-lease", ""))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        lease = (("containerd-lease", self.lease),) if self.lease else ()
        return (("containerd-namespace", self.namespace or "default"), *lease)


@dataclass(frozen=True, slots=True)
class Blob:
    """A descriptor's words about a layer blob; `digest` with "sha256:"."""

    digest: str
    size_bytes: int
    media_type: str


class _Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""


class _Rootfs(msgspec.Struct):
    diff_ids: list[str]


class _Document(msgspec.Struct):
    """A manifest has `config` and `layers`, a config has `rootfs`; others have neither."""

    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    rootfs: _Rootfs | None = None


class _ConfigDocument(msgspec.Struct):
    rootfs: _Rootfs


_decode_manifest = msgspec.json.Decoder(_Document)
# A config's own "config" is no descriptor.
_decode_config = msgspec.json.Decoder(_ConfigDocument)


class ChainIndex:
    """Chain ID → blobs that some image of the store claims for it. Refreshed by what is new in the directory."""

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._seen: set[str] = set()
        # diff IDs by config digest; manifests' layers by the digest of a config that has not come yet
        self._configs: OrderedDict[str, list[str]] = OrderedDict()
        self._waiting: OrderedDict[str, list[list[_Descriptor]]] = OrderedDict()
        self._chains: OrderedDict[ChainID, dict[str, Blob]] = OrderedDict()

    def refresh(self) -> None:
        try:
            with os.scandir(self._blobs) as entries:
                names = {entry.name for entry in entries}
        except FileNotFoundError:
            return
        for name in names - self._seen:
            document = self._read(name)
            if document is not None:
                self._add(f"sha256:{name}", document)
        self._seen = names

    def blobs(self, chain: ChainID) -> tuple[Blob, ...]:
        return tuple(self._chains.get(chain, {}).values())

    def _read(self, name: str) -> bytes | None:
        with suppress(OSError):
            fd = os.open(self._blobs / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode) and status.st_size <= _DOCUMENT_BYTES_MAX:
                    head = file.read(64)
                    if head.lstrip().startswith(b"{"):
                        return head + file.read()
        return None

    def _add(self, digest: str, text: bytes) -> None:
        with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
            diff_ids = _decode_config.decode(text).rootfs.diff_ids
            if len(diff_ids) <= _LAYERS_MAX and all(map(is_digest, diff_ids)):
                self._configs[digest] = diff_ids
                if len(self._configs) > _WAITING_MANIFESTS_MAX:
                    self._configs.popitem(last=False)
                for layers in self._waiting.pop(digest, ()):
                    self._join(layers, diff_ids)
            return
        with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
            document = _decode_manifest.decode(text)
            if document.config is None or not document.layers or len(document.layers) > _LAYERS_MAX:
                return
            known = self._configs.get(document.config.digest)
            if known is not None:
                self._join(document.layers, known)
            else:
                self._waiting.setdefault(document.config.digest, []).append(document.layers)
                if len(self._waiting) > _WAITING_MANIFESTS_MAX:
                    self._waiting.popitem(last=False)

    def _join(self, layers: Sequence[_Descriptor], diff_ids: Sequence[str]) -> None:
        if len(layers) != len(diff_ids):
            return
        chain: ChainID | None = None
        for layer, diff_id in zip(layers, diff_ids, strict=True):
            chain = chain_id(chain, diff_id)
            if is_digest(layer.digest) and layer.size > 0:
                blob = Blob(layer.digest, layer.size, layer.media_type)
                self._chains.setdefault(chain, {})[f"{blob.digest} {blob.media_type} {blob.size_bytes}"] = blob
        while len(self._chains) > _CHAINS_MAX:
            self._chains.popitem(last=False)


class Content:
    """`directory`: containerd's content store. `address`: its socket, for what is not a file there."""

    def __init__(self, directory: Path, address: str) -> None:
        self._blobs = directory / "blobs" / "sha256"
        self._address = address
        self._index = ChainIndex(self._blobs)
        self._refreshing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def present(self, blob: Blob) -> bool:
        """Whether the blob is complete in the directory."""
        try:
            return self._path(blob.digest).stat().st_size == blob.size_bytes
        except OSError:
            return False

    async def candidates(self, chain: ChainID) -> tuple[Blob, ...]:
        """Complete blobs that images claim for the chain ID, in the order in which they were seen."""
        async with self._refreshing:
            await asyncio.to_thread(self._index.refresh)
        return tuple(blob for blob in self._index.blobs(chain) if self.present(blob))

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

        Raises NotFound or Unavailable, at the end too: a stream that broke off explains what its reader saw.
        """
        try:
            fd = os.open(self._path(blob.digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
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
            raise Unavailable(f"containerd at {self._address} does not answer for blob {blob.digest}") from None
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

    def _stub(self) -> content_pb2_grpc.ContentStub:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(f"unix:{self._address}")
        return content_pb2_grpc.ContentStub(self._channel)  # type: ignore[no-untyped-call]

    def _translated(self, error: grpc.aio.AioRpcError, blob: Blob) -> SnapshotterError:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return NotFound(
                f"blob {blob.digest} is neither in {self._blobs} nor in containerd's content API; fetch the image again"
            )
        return Unavailable(f"containerd at {self._address}: blob {blob.digest}: {error.details()}")
