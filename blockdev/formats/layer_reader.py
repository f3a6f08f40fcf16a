# SPDX-License-Identifier: Apache-2.0
"""Index and tar of any layer file, read again. Every byte of it is taken for hostile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Protocol

from blockdev.errors import FormatError, NotInLayer
from blockdev.formats import erofs_reader, tar_split, tarfs_reader
from blockdev.formats.entry import Entry
from blockdev.formats.layer_file import LayerFile, ReadAt
from blockdev.formats.tar_split import Run

_PIECE_BYTES: Final = 1 << 20


class IndexReader(Protocol):
    def walk(self) -> Iterator[Entry]:
        """Every name, the root's b"" first, parents before children, names of a directory in their order.

        Raises FormatError or LimitExceeded.
        """


def pieces(read_at: ReadAt, offset: int, size: int) -> Iterator[bytes]:
    """Raises FormatError where the file ends before."""
    end = offset + size
    while offset < end:
        piece = read_at(offset, min(_PIECE_BYTES, end - offset))
        if not piece:
            raise FormatError(f"layer file ends at byte {offset}")
        yield piece
        offset += len(piece)


def tar_runs(layer: LayerFile, read_at: ReadAt) -> Iterator[Run | bytes]:
    """The tar, or a parents layer's table: bytes, or where in the file they are. Raises FormatError."""
    if layer.split is not None:
        return tar_split.tar_runs(layer.split, read_at)
    return iter((Run(layer.format.head_bytes, layer.tar_size_bytes),))


def index_reader(layer: LayerFile, read_at: ReadAt) -> IndexReader:
    """Raises FormatError where the index is not even begun well."""
    if layer.format.file_system == "tar":
        return tarfs_reader.Reader(read_at, layer.data_size_bytes)
    return erofs_reader.Reader(read_at, layer.data_size_bytes)


def at_or_below(entries: Iterable[Entry], paths: Collection[bytes], *, parents: bool = False) -> Iterator[Entry]:
    """Of a walk the names that `paths` name, and all below them; with `parents` also the directories on the way.

    Raises NotInLayer at the end for a path that was not there.
    """
    missing = set(paths)
    in_order = sorted(paths)
    below: bytes | None = None
    for entry in entries:
        path = entry.path
        if path in missing:
            missing.remove(path)
            if below is None or not _is_below(path, below):
                below = path
        inside = below is not None and (path == below or _is_below(path, below))
        if inside or (parents and _is_on_the_way(path, in_order)):
            yield entry
    for path in sorted(missing):
        raise NotInLayer(f"the layer has no {path[:200]!r}")


def _is_on_the_way(directory: bytes, in_order: list[bytes]) -> bool:
    at = bisect_left(in_order, directory + b"/") if directory else 0
    return at < len(in_order) and _is_below(in_order[at], directory)


def _is_below(path: bytes, directory: bytes) -> bool:
    return not directory or path.startswith(directory + b"/")
