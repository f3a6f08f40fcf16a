# SPDX-License-Identifier: Apache-2.0
"""Chains of layers, built in memory, with the parents layers that they need."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from blockdev.formats import directory_table, parents
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import FORMATS
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.formats.limits import Limits
from verity.hasher import LeafStore
from verity.tree import Geometry
from verity.verify import VerifiedReader


@dataclass(frozen=True)
class Made:
    """A layer file and its table of made directories, empty without any."""

    built: BuiltLayer
    file: bytes
    table: bytes

    def cursor(self) -> parents.Cursor:
        params = FORMATS[self.built.format].params
        geometry = Geometry(self.built.data_size_bytes // params.data_block_bytes, params)
        read_at = VerifiedReader(lambda at, size: self.file[at : at + size], geometry, self.built.root_hash)
        return parents.Cursor(Reader(read_at, self.built.data_size_bytes, verified=True))

    def made(self) -> Iterator[directory_table.Record]:
        if not self.table:
            return iter(())
        return directory_table.read_layer_table(
            lambda at, size: self.table[at : at + size], len(self.table), self.built.diff_id
        )


def make(content: bytes, layer_format: str = "tar-index", piece_bytes: int = 1 << 20) -> Made:
    """Raises BlockdevError. `content`: a tar, or the table of a parents layer; fed in pieces of `piece_bytes`."""
    return make_of([content[at : at + piece_bytes] for at in range(0, len(content), piece_bytes)], layer_format)


def make_of(pieces: Iterable[bytes], layer_format: str, limits: Limits | None = None) -> Made:
    """Raises BlockdevError."""
    head_bytes = FORMATS[layer_format].head_bytes
    out = io.BytesIO(bytes(head_bytes))
    out.seek(head_bytes)

    def write_head(head: bytes) -> None:
        out.getbuffer()[: len(head)] = head

    leaves = LeafStore()
    writer = LayerWriter(
        FORMATS[layer_format], write=out.write, write_head=write_head, leaves=leaves, limits=limits or Limits(),
        read_back=lambda at, size: bytes(out.getbuffer()[at : at + size]),
    )  # fmt: skip
    sha256 = hashlib.sha256()
    try:
        for piece in pieces:
            writer.feed(piece)
            sha256.update(piece)
        built = writer.finish(sha256.digest())
    finally:
        leaves.close()
    return Made(built, out.getvalue(), b"".join(writer.directory_table(built.diff_id)))


def carried(layers: Sequence[Made]) -> list[parents.Carried | None]:
    """Of each chain of the first layers, one by one, as commits come."""
    found: list[parents.Carried | None] = []
    for number, layer in enumerate(layers):
        below = found[-1] if found else None
        found.append(
            parents.merged(below, layer.made(), layer.cursor(), (other.cursor() for other in layers[:number][::-1]))
        )
    return found


def parents_layer(layers: Sequence[Made]) -> Made | None:
    top = carried(layers)[-1]
    if top is None:
        return None
    above = FORMATS[layers[-1].built.format].parents
    assert above is not None
    return make(parents.pack(top), above)
