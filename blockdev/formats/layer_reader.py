# SPDX-License-Identifier: Apache-2.0
"""The index of any layer file, read again. Every byte of it is taken for hostile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from blockdev.errors import NotInLayer
from blockdev.formats import erofs_reader, tarfs_reader
from blockdev.formats.entry import Entry
from blockdev.formats.layer_file import LayerFile, ReadAt


class IndexReader(Protocol):
    def walk(self) -> Iterator[Entry]:
        """Every name, the root's b"" first, parents before children, names of a directory in their order.

        Raises FormatError or LimitExceeded.
        """


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
