# SPDX-License-Identifier: Apache-2.0
"""The root hashes of an image's layers: each is streamed through the build's processes, and nothing of it is kept but
its index, in an unnamed file, until the parents layer of the chain is known."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from blockdev.errors import BlockdevError
from blockdev.formats import directory_table, parents
from blockdev.formats.directory_table import Record
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import FORMATS, layer_format_named
from blockdev.formats.parents import Cursor
from blockdev.small_layer import write_layer
from blockdev.workers.launch import BuildRecord, BuildRequest, run_build
from blockdev.workers.parameters import Output
from policy.cache import Cache
from policy.chain import ChainID, chain_ids
from policy.documents import ImageDocuments, LayerBlob, Platform, Process
from policy.errors import ImageError
from policy.hashed import HashedImage, HashedLayer
from policy.sources.source import Source, Stream

JOBS: Final = 2
_SAMPLED_SECONDS: Final = 0.1

# (bytes of blobs that were read, of all that are read; None where that is not known)
Progress = Callable[[int, int | None], None]


@dataclass(slots=True)
class _Built:
    """One layer in one format. The files are there where it was built now, and not known from before."""

    root_hash: str
    data_size_bytes: int
    made_directories: bool
    blob_digest: str
    diff_id: str
    index_fd: int = -1
    table_fd: int = -1

    @property
    def has_table(self) -> bool:
        return self.made_directories

    def made(self) -> Iterator[Record]:
        size = os.fstat(self.table_fd).st_size
        if not size:
            return iter(())
        return directory_table.read_layer_table(
            lambda offset, count: os.pread(self.table_fd, count, offset), size,
            bytes.fromhex(self.diff_id.removeprefix("sha256:")),
        )  # fmt: skip

    def cursor(self) -> Cursor:
        # Written by the build just now, and by nobody else.
        read_at = lambda offset, size: os.pread(self.index_fd, size, offset)  # noqa: E731
        return Cursor(Reader(read_at, self.data_size_bytes, verified=True))


_Key = tuple[str, str]  # diff ID and format


def hash_image(
    source: Source,
    formats: Sequence[str],
    *,
    platform: Platform | None = None,
    jobs: int = JOBS,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, HashedImage]:
    """By format. The image is resolved once, and each layer read once, for all of them.

    Raises ImageError, RegistryError, OSError; FormatError for a format that no layer has.
    """
    for name in formats:
        layer_format_named(name)
    image = source.image(platform)
    with ExitStack() as files:
        work = _Work(source, image, tuple(dict.fromkeys(formats)), cache, files)
        asyncio.run(work.run(jobs, progress))
        return {name: work.result(name) for name in formats}


class _Work:
    def __init__(
        self, source: Source, image: ImageDocuments, formats: tuple[str, ...], cache: Cache | None, files: ExitStack
    ) -> None:
        self._source, self._image, self._formats, self._cache, self._files = source, image, formats, cache, files
        self._built: dict[_Key, _Built] = {}
        self._on_top: dict[str, HashedLayer | None] = {}
        self._streams: dict[str, Stream] = {}

    async def run(self, jobs: int, progress: Progress | None) -> None:
        if self._cache is not None and self._known(self._cache):
            return
        # What is missing is built; where a parents layer is to be found out, every layer's index is needed for it.
        missing: dict[str, tuple[LayerBlob, list[str]]] = {}
        for name in self._formats:
            for layer in self._image.layers:
                if (layer.diff_id, name) not in self._built:
                    missing.setdefault(layer.diff_id, (layer, []))[1].append(name)
        slots = asyncio.Semaphore(jobs)
        total = _sum([layer.size_bytes for layer, _ in missing.values()])
        sampler = asyncio.create_task(self._sample(progress, total)) if progress else None
        tasks = [asyncio.create_task(self._one(layer, names, slots)) for layer, names in missing.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if sampler:
                sampler.cancel()
        for name in self._formats:
            if name not in self._on_top:
                self._on_top[name] = self._parents(name)

    def _known(self, cache: Cache) -> bool:
        """Whether all is; what is, is taken over."""
        for name in self._formats:
            entries = {layer.diff_id: cache.layer(layer.diff_id, name) for layer in self._image.layers}
            known = {diff_id: entry for diff_id, entry in entries.items() if entry is not None}
            alone = FORMATS[name].parents is None
            if not alone and len(known) == len(entries):
                above = [known[layer.diff_id] for layer in self._image.layers[1:]]
                if not any(entry.made_directories for entry in above):
                    self._on_top[name] = None
                elif (chain := cache.chain(self._chain(), name)) is not None:
                    self._on_top[name] = (
                        HashedLayer(chain.identity, chain.on_top_format, chain.root_hash, chain.data_size_bytes)
                        if chain.identity
                        else None
                    )
            if alone:
                self._on_top[name] = None
            if name in self._on_top:
                for diff_id, entry in known.items():
                    digest = next(layer.digest for layer in self._image.layers if layer.diff_id == diff_id)
                    self._built[diff_id, name] = _Built(
                        entry.root_hash, entry.data_size_bytes, entry.made_directories, digest, diff_id
                    )
        return len(self._built) == len(self._formats) * len({layer.diff_id for layer in self._image.layers})

    def _chain(self) -> ChainID:
        return chain_ids(layer.diff_id for layer in self._image.layers)[-1]

    async def _sample(self, progress: Progress, total: int | None) -> None:
        while True:
            progress(sum(stream.read_bytes() for stream in self._streams.values()), total)
            await asyncio.sleep(_SAMPLED_SECONDS)

    async def _one(self, layer: LayerBlob, names: Sequence[str], slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                records = await self._build(layer, names)
            except BlockdevError as error:
                raise ImageError(f"image {self._image.name}: {error}") from None
        for name, record in zip(names, records, strict=True):
            built = self._built[layer.diff_id, name]
            built.root_hash, built.data_size_bytes = record.root_hash, record.data_size_bytes
            built.made_directories = os.fstat(built.table_fd).st_size > 0
            if self._cache is not None:
                self._cache.put_layer(
                    layer.diff_id, name, root_hash=built.root_hash, data_size_bytes=built.data_size_bytes,
                    made_directories=built.made_directories,
                )  # fmt: skip

    async def _build(self, layer: LayerBlob, names: Sequence[str]) -> list[BuildRecord]:
        outputs = []
        for name in names:
            index, table = self._unnamed(), self._unnamed()
            self._built[layer.diff_id, name] = _Built("", 0, False, layer.digest, layer.diff_id, index, table)
            outputs.append(Output(name, index, self._unnamed(), table, index_only=True))
        with ExitStack() as held:
            stream = await asyncio.to_thread(held.enter_context, self._source.blob(layer))
            self._streams[layer.diff_id] = stream
            try:
                return await run_build(
                    BuildRequest(
                        blob_fd=stream.fd,
                        outputs=tuple(outputs),
                        media_type=layer.media_type,
                        layer_name=layer.digest or layer.diff_id,
                        expected_digest=layer.digest or None,
                        expected_size_bytes=layer.size_bytes,
                        expected_diff_id=layer.diff_id,
                    )
                )
            except BlockdevError:
                if stream.failure is not None:
                    raise stream.failure from None  # the build has seen only what came of it
                raise
            finally:
                self._streams[layer.diff_id] = _Done(stream.read_bytes())

    def _unnamed(self) -> int:
        return self._files.enter_context(tempfile.TemporaryFile(buffering=0)).fileno()

    def _parents(self, name: str) -> HashedLayer | None:
        """Raises ImageError."""
        above = FORMATS[name].parents
        if above is None:
            return None
        try:
            carried = parents.carried_by([self._built[layer.diff_id, name] for layer in self._image.layers])
            found = _hashed_table(parents.pack(carried), above, self._unnamed()) if carried is not None else None
        except BlockdevError as error:
            raise ImageError(f"image {self._image.name}: its parents layer: {error}") from None
        if self._cache is not None:
            self._cache.put_chain(
                self._chain(), name,
                identity=found.diff_id if found else "", on_top_format=found.format if found else "",
                root_hash=found.root_hash if found else "", data_size_bytes=found.data_size_bytes if found else 0,
            )  # fmt: skip
        return found

    def result(self, name: str) -> HashedImage:
        image, layers = self._image, []
        for layer in image.layers:
            built = self._built[layer.diff_id, name]
            layers.append(HashedLayer(layer.diff_id, name, built.root_hash, built.data_size_bytes, layer.digest))
        process = image.config.config or Process()
        return HashedImage(
            reference=image.name,
            digest=image.digest,
            index_digest=image.index_digest,
            platform=str(image.config.platform()),
            layers=tuple(layers),
            on_top=self._on_top[name],
            entrypoint=tuple(process.entrypoint or ()),
            command=tuple(process.cmd or ()),
            environment=tuple(process.env or ()),
            user=process.user or "",
            working_directory=process.working_dir or "",
        )


@dataclass(frozen=True, slots=True)
class _Done:
    """A stream that has been read: for the progress."""

    size_bytes: int
    fd: int = -1
    failure: Exception | None = None

    def read_bytes(self) -> int:
        return self.size_bytes


def _hashed_table(table: bytes, format: str, fd: int) -> HashedLayer:
    built = write_layer(fd, table, FORMATS[format])
    identity = "sha256:" + hashlib.sha256(table).hexdigest()
    return HashedLayer(identity, format, built.root_hash.hex(), built.data_size_bytes)


def _sum(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(size for size in sizes if size is not None)
