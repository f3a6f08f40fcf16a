# SPDX-License-Identifier: Apache-2.0
"""Images in directories of blobs: OCI layouts (image-layout.md), and containerd's content store."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policy import documents
from policy.chain import is_digest
from policy.documents import (
    DOCUMENT_BYTES_MAX,
    REFERENCE_NAME,
    Descriptor,
    ImageDocuments,
    Index,
    LayerBlob,
    NoSuchImage,
    Platform,
)
from policy.errors import ImageError
from policy.sources.source import FileStream, Stream


class _Blobs:
    """blobs/sha256/HEX below a directory."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self._directory = name, directory

    def _read(self, path: Path, what: str) -> bytes:
        try:
            with path.open("rb") as file:
                text = file.read(DOCUMENT_BYTES_MAX + 1)
        except OSError as error:
            raise NoSuchImage(f"image {self.name}: {what} is not there: {error}") from None
        if len(text) > DOCUMENT_BYTES_MAX:
            raise ImageError(f"image {self.name}: {what} has over {DOCUMENT_BYTES_MAX} bytes")
        return text

    def _path(self, digest: str) -> Path:
        assert is_digest(digest)
        return self._directory / "blobs" / digest.replace(":", "/")

    def _document(self, descriptor: Descriptor) -> bytes:
        text = self._read(self._path(descriptor.digest), descriptor.digest)
        return documents.check_document(descriptor, text, self.name)

    @contextmanager
    def blob(self, layer: LayerBlob) -> Iterator[Stream]:
        try:
            fd = os.open(self._path(layer.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NoSuchImage(f"image {self.name}: layer {layer.digest} is not there: {error}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(f"image {self.name}: layer {layer.digest} is no regular file")
            yield FileStream(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        pass


class LayoutDirectory(_Blobs):
    def __init__(self, name: str, directory: Path, tag: str) -> None:
        super().__init__(name, directory)
        self._tag = tag

    def image(self, wanted: Platform | None) -> ImageDocuments:
        return of_layout(
            self.name, self._read(self._directory / "index.json", "index.json"), self._tag, wanted,
            self._document,
        )  # fmt: skip


def of_layout(
    name: str, index: bytes, tag: str, wanted: Platform | None, document: documents.ReadDocument
) -> ImageDocuments:
    """By the text of its index.json. Without a tag: the only image for the platform."""
    listed = documents.decoded_strictly(index, Index, f"image {name}: index.json").manifests
    if tag:
        listed = [each for each in listed if (each.annotations or {}).get(REFERENCE_NAME) == tag]
    if len({each.digest for each in listed}) == 1 and listed[0].platform is None:
        root: Descriptor = listed[0]
    else:
        root = documents.chosen(listed, name, wanted or documents.host_platform())
    return documents.resolved(name, documents.checked(root, name), document, wanted)


class ContentDirectory(_Blobs):
    """`directory`: io.containerd.content.v1.content. Names of images are in containerd's database, not here."""

    def __init__(self, name: str, directory: Path, digest: str) -> None:
        super().__init__(name, directory)
        if not is_digest(digest):
            raise ImageError(f"image {name}: {digest[:80]!r} is no sha256 digest")
        self._digest = digest

    def image(self, wanted: Platform | None) -> ImageDocuments:
        text = self._read(self._path(self._digest), self._digest)
        media_type = documents.media_type_within(text, f"image {self.name}: {self._digest}")
        root = Descriptor(self._digest, len(text), media_type)
        return documents.resolved(self.name, root, self._document, wanted)
