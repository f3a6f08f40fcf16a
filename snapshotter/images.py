# SPDX-License-Identifier: Apache-2.0
"""An image: which blobs are its layers, and what its config says of them and of its process (OCI image specification:
manifest.md, image-index.md, config.md, image-layout.md; Docker's image manifest version 2, schema 2).

Where it lies, a `Content` knows. Every document is bounded, and is what its digest says.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import grpc

from policy import documents
from policy.chain import ChainID, chain_ids, is_digest
from policy.documents import (
    DEPTH_MAX,
    DOCUMENT_BYTES_MAX,
    INDEXES,
    LAYERS_MAX,
    MANIFESTS,
    REFERENCE_NAME,
    Config,
    Descriptor,
    Index,
    Listed,
    Manifest,
    Process,
    host_platform,
)
from policy.errors import ImageError
from snapshotter.api.proto import images_pb2, images_pb2_grpc
from snapshotter.containerd import CALL_SECONDS, refused
from snapshotter.content import Blob, Caller, Content, blob_of
from snapshotter.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, SnapshotterError

_IN_LAYOUT: Final = re.compile(r"oci-layout|index\.json|blobs/sha256/[0-9a-f]{64}")
_PIECE_BYTES: Final = 1 << 20

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Image:
    """`layers` and `diff_ids`: the first one first; as many of one as of the other, at least one."""

    name: str
    layers: tuple[Blob, ...]
    diff_ids: tuple[str, ...]
    process: Process

    def chain_id(self) -> ChainID:
        """Of the whole image: the name of its topmost committed snapshot."""
        return chain_ids(self.diff_ids)[-1]


async def from_containerd(content: Content, reference: str, caller: Caller) -> Image:
    """Raises NotFound, Unavailable, and as `resolved`."""
    stub = images_pb2_grpc.ImagesStub(content.channel())  # type: ignore[no-untyped-call]
    try:
        reply = await stub.Get(
            images_pb2.GetImageRequest(name=reference), metadata=caller.metadata(), timeout=CALL_SECONDS
        )
    except grpc.aio.AioRpcError as error:
        raise refused("images", error.code(), error.details()) from None
    target = reply.image.target
    root = _blob(Listed(target.digest, target.size, target.media_type), reference)
    return await resolved(content, reference, root, caller)


async def with_layer(content: Content, diff_id: str, caller: Caller) -> list[str]:
    """Names of the caller's images that have the layer, of those whose manifest and config are there. Raises
    Unavailable."""
    stub = images_pb2_grpc.ImagesStub(content.channel())  # type: ignore[no-untyped-call]
    try:
        reply = await stub.List(images_pb2.ListImagesRequest(), metadata=caller.metadata(), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise refused("images", error.code(), error.details()) from None
    found = []
    for image in reply.images:
        target = image.target
        with suppress(SnapshotterError):
            root = _blob(Listed(target.digest, target.size, target.media_type), image.name)
            if diff_id in (await resolved(content, image.name, root, caller)).diff_ids:
                found.append(image.name)
    return found


async def from_layout(content: Content, directory: Path, tag: str = "") -> Image:
    """Of the images in an OCI layout the one of that name; without a name, the only one for this machine.

    Raises NotFound, InvalidArgument, and as `resolved`.
    """
    name = f"{directory}:{tag}" if tag else str(directory)
    try:
        with (directory / "index.json").open("rb") as file:
            text = file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as error:
        raise NotFound(f"{directory} is no OCI image layout: {error}") from None
    if len(text) > DOCUMENT_BYTES_MAX:
        raise InvalidArgument(f"image {name}: its index has over {DOCUMENT_BYTES_MAX} bytes")
    listed = _decoded(text, Index, f"image {name}: index.json").manifests
    if tag:
        listed = [each for each in listed if (each.annotations or {}).get(REFERENCE_NAME) == tag]
    root = _chosen(listed, name)
    return await resolved(content, name, _blob(root, name), Caller(""))


async def resolved(content: Content, name: str, root: Blob, caller: Caller) -> Image:
    """What a manifest, or the one for this machine in an index, names.

    Raises NotFound (a blob; no manifest for this machine), DataLoss (other bytes than the digest's),
    InvalidArgument (no image that we know), FailedPrecondition (not one, but several), Unavailable.
    """
    for _ in range(DEPTH_MAX):
        text = await _document(content, name, root, caller)
        if root.media_type in MANIFESTS:
            break
        if root.media_type not in INDEXES:
            raise InvalidArgument(f"image {name}: {root.digest} is of the media type {root.media_type!r}")
        root = _blob(_chosen(_decoded(text, Index, f"image {name}: {root.digest}").manifests, name), name)
    else:
        raise InvalidArgument(f"image {name}: indexes in indexes, over {DEPTH_MAX} of them")
    manifest = _decoded(text, Manifest, f"image {name}: manifest {root.digest}")
    described = _blob(manifest.config, name)
    config = _decoded(await _document(content, name, described, caller), Config, f"image {name}: config")
    diff_ids = config.rootfs.diff_ids
    if not 1 <= len(manifest.layers) <= LAYERS_MAX or len(diff_ids) != len(manifest.layers):
        raise InvalidArgument(
            f"image {name}: {len(manifest.layers)} layers and {len(diff_ids)} diff IDs;"
            f" as many of one as of the other, 1 to {LAYERS_MAX}, are possible"
        )
    if not all(map(is_digest, diff_ids)):
        raise InvalidArgument(f"image {name}: its config has a diff ID that is no sha256 digest")
    layers = tuple(_blob(layer, name) for layer in manifest.layers)
    return Image(name, layers, tuple(diff_ids), config.config or Process())


def _chosen(listed: Sequence[Listed], name: str) -> Listed:
    try:
        return documents.chosen(listed, name, host_platform())
    except documents.SeveralImages as error:
        raise FailedPrecondition(str(error)) from None
    except documents.NoSuchImage as error:
        raise NotFound(str(error)) from None


def _blob(descriptor: Descriptor, name: str) -> Blob:
    blob = blob_of(descriptor)
    if blob is None:
        raise InvalidArgument(f"image {name}: a descriptor names no blob: {descriptor.digest[:80]!r}")
    return blob


async def _document(content: Content, name: str, blob: Blob, caller: Caller) -> bytes:
    if blob.size_bytes > DOCUMENT_BYTES_MAX:
        raise InvalidArgument(f"image {name}: {blob.digest} has {blob.size_bytes} bytes, over {DOCUMENT_BYTES_MAX}")
    async with content.open(blob, caller) as fd:
        text = await asyncio.to_thread(_read, fd, blob.size_bytes + 1)
    if len(text) != blob.size_bytes or f"sha256:{hashlib.sha256(text).hexdigest()}" != blob.digest:
        raise DataLoss(f"image {name}: the bytes of {blob.digest} are others")
    return text


def _read(fd: int, count: int) -> bytes:
    """Up to so many bytes, fewer only at the end."""
    read = b""
    while len(read) < count and (piece := os.read(fd, count - len(read))):
        read += piece
    return read


def _decoded(text: bytes, kind: type[_T], what: str) -> _T:
    try:
        return documents.decoded(text, kind, what)
    except ImageError as error:
        raise InvalidArgument(str(error)) from None


def unpack_archive(archive: Path, directory: Path) -> None:
    """The OCI layout in a tar, as `skopeo copy … oci-archive:` writes it; what belongs to none is left out.

    Raises InvalidArgument for what is no such archive, OSError.
    """
    try:
        with closing(tarfile.open(archive, "r:")) as tar:
            for member in tar:
                name = str(PurePosixPath(member.name))
                # A sparse one could be larger than the archive.
                if _IN_LAYOUT.fullmatch(name) and member.isreg() and not member.issparse():
                    _write(tar, member, directory / name)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{archive} is no OCI archive: {error}") from None


def _write(tar: Any, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    with path.open("wb") as target:
        while piece := source.read(_PIECE_BYTES):
            target.write(piece)
