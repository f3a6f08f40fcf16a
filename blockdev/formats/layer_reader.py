# SPDX-License-Identifier: Apache-2.0
"""The index of any layer file, read again. Every byte of it is taken for hostile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

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
