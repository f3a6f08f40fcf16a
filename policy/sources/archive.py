# SPDX-License-Identifier: Apache-2.0
"""Images in one tar: OCI archives (`skopeo copy … oci-archive:`), and what `docker save` writes, in its old form
(a directory for each layer) and its new one (an OCI layout with the old form's manifest.json)."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from blockdev.formats.compression import MEDIA_TYPES, detect
from policy import documents
from policy.documents import (
    DOCUMENT_BYTES_MAX,
    Config,
    Descriptor,
    ImageDocuments,
    LayerBlob,
    NoSuchImage,
    Platform,
    SeveralImages,
)
from policy.errors import ImageError
from policy.sources.directory import of_layout
from policy.sources.reference import Reference
from policy.sources.source import PIECE_BYTES, Stream, piped
from verity.buffers import Buffer

_MEMBERS_MAX: Final = 100_000
_LINKS_MAX: Final = 8
_BLOB: Final = re.compile(r"(?:.*/)?blobs/sha256/([0-9a-f]{64})")


class _Archive:
    """Where each regular file of a plain tar lies. Of a name that is there twice the last one counts, as it would
    when the archive is unpacked."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._places: dict[str, tuple[int, int] | str] = {}  # a str: of a symlink, where it leads
        try:
            self._list()
        except BaseException:
            os.close(self._fd)
            raise

    def _list(self) -> None:
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for count, member in enumerate(tar):
                    if count >= _MEMBERS_MAX:
                        raise ImageError(f"image {self.name}: {self._path} has over {_MEMBERS_MAX} members")
                    name = posixpath.normpath(member.name)
                    # A sparse one could be larger than the archive.
                    if member.isreg() and not member.issparse():
                        self._places[name] = (member.offset_data, member.size)
                    elif member.issym() or member.islnk():
                        base = posixpath.dirname(name) if member.issym() else ""
                        self._places[name] = posixpath.normpath(posixpath.join(base, member.linkname))
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise ImageError(f"image {self.name}: {self._path} is no plain tar: {error}") from None

    def _place(self, member: str) -> tuple[int, int]:
        at: tuple[int, int] | str | None = posixpath.normpath(member)
        for _ in range(_LINKS_MAX):
            if not isinstance(at, str):
                break
            at = self._places.get(at)
        if at is None or isinstance(at, str):
            raise NoSuchImage(f"image {self.name}: {member[:200]!r} is not in {self._path}")
        return at

    def _read(self, member: str) -> bytes:
        offset, size = self._place(member)
        if size > DOCUMENT_BYTES_MAX:
            raise ImageError(f"image {self.name}: {member[:200]!r} has over {DOCUMENT_BYTES_MAX} bytes")
        return os.pread(self._fd, size, offset)

    @contextmanager
    def _piped(self, member: str) -> Iterator[Stream]:
        offset, size = self._place(member)

        def produce(write: Callable[[Buffer], None]) -> None:
            at, end = offset, offset + size
            while at < end and (piece := os.pread(self._fd, min(PIECE_BYTES, end - at), at)):
                write(piece)
                at += len(piece)

        with piped(produce) as stream:
            yield stream

    def close(self) -> None:
        os.close(self._fd)


class LayoutArchive(_Archive):
    def __init__(self, name: str, path: Path, tag: str) -> None:
        super().__init__(name, path)
        self._tag = tag

    def image(self, wanted: Platform | None) -> ImageDocuments:
        return of_layout(self.name, self._read("index.json"), self._tag, wanted, self._document)

    def _document(self, descriptor: Descriptor) -> bytes:
        text = self._read("blobs/" + descriptor.digest.replace(":", "/"))
        return documents.check_document(descriptor, text, self.name)

    @contextmanager
    def blob(self, layer: LayerBlob) -> Iterator[Stream]:
        with self._piped("blobs/" + layer.digest.replace(":", "/")) as stream:
            yield stream


def _whole_name(text: str) -> str:
    """Docker leaves out what it adds itself, others do not. What is no name stays as it is."""
    try:
        return str(Reference.parse(text))
    except ImageError:
        return text


class _Saved(msgspec.Struct, rename="pascal"):
    """In manifest.json, which is a list of them."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class DockerArchive(_Archive):
    """It has no manifest with a digest: the config's diff IDs bind the layers."""

    def __init__(self, name: str, path: Path, wanted: str) -> None:
        super().__init__(name, path)
        self._wanted = wanted
        self._members: dict[str, str] = {}  # by diff ID

    def image(self, wanted: Platform | None) -> ImageDocuments:
        name = self.name
        saved = self._saved()
        text = self._read(saved.config)
        # Both forms name the config by its digest.
        hexadecimal = posixpath.basename(saved.config).removesuffix(".json")
        if re.fullmatch(r"[0-9a-f]{64}", hexadecimal) and documents.digest_of(text) != f"sha256:{hexadecimal}":
            raise documents.OtherBytes(f"image {name}: the bytes of its config {hexadecimal} are others")
        config = documents.decoded_strictly(text, Config, f"image {name}: config")
        documents.check_config(config, len(saved.layers), name)
        own = config.platform()
        if wanted and own.os and not own.suits(wanted):
            raise NoSuchImage(f"image {name}: its config says that it is for {own}, not {wanted}")
        self._members = dict(zip(config.rootfs.diff_ids, saved.layers, strict=True))
        layers = tuple(map(self._layer, saved.layers, config.rootfs.diff_ids))
        return ImageDocuments(name, "", "", config, layers)

    def _saved(self) -> _Saved:
        what = f"image {self.name}: manifest.json"
        found = documents.decoded(self._read("manifest.json"), list[_Saved], what)
        tags = sorted(tag for each in found for tag in each.repo_tags or ())
        if self._wanted:
            wanted = _whole_name(self._wanted)
            found = [each for each in found if wanted in map(_whole_name, each.repo_tags or ())]
        if not found:
            raise NoSuchImage(f"image {self.name}: not in the archive; there is {', '.join(tags) or 'nothing'}")
        if len(found) > 1:
            raise SeveralImages(f"image {self.name}: {len(found)} images: give one of {', '.join(tags)}")
        return found[0]

    def _layer(self, member: str, diff_id: str) -> LayerBlob:
        offset, size = self._place(member)
        kind = detect(os.pread(self._fd, 4, offset))
        media_type = next(name for name, each in MEDIA_TYPES.items() if each is kind)
        match = _BLOB.fullmatch(member)
        return LayerBlob(f"sha256:{match[1]}" if match else "", size, media_type, diff_id)

    @contextmanager
    def blob(self, layer: LayerBlob) -> Iterator[Stream]:
        with self._piped(self._members[layer.diff_id]) as stream:
            yield stream
