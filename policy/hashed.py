# SPDX-License-Identifier: Apache-2.0
"""An image whose layers' root hashes are known: what policies, signatures and evidence are made of."""

from __future__ import annotations

from dataclasses import dataclass

from blockdev.formats.layer_file import format_named
from policy.chain import ChainID, chain_ids


@dataclass(frozen=True, slots=True)
class HashedLayer:
    """One layer file. `diff_id` with "sha256:", `root_hash` in hexadecimal.

    `blob_digest` is that of the blob as the manifest names it; "" for a parents layer, whose `diff_id` is the identity
    of its table. Data and hash tree have `data_size_bytes` and a tree above them; their blocks are the format's.
    """

    diff_id: str
    format: str
    root_hash: str
    data_size_bytes: int
    blob_digest: str = ""

    @property
    def data_block_bytes(self) -> int:
        return format_named(self.format).params.data_block_bytes

    @property
    def hash_block_bytes(self) -> int:
        return format_named(self.format).params.hash_block_bytes


@dataclass(frozen=True, slots=True)
class HashedImage:
    """`reference` as it was asked for. `digest`: of its manifest; `index_digest`: of the index that led there, or "".

    `layers`: the first one first, as in the config. `on_top`: the parents layer, of formats and chains that have one.
    `arguments`, `environment`, `user`, `working_directory`: of its config, "" or () where that says nothing.
    """

    reference: str
    digest: str
    index_digest: str
    platform: str  # "linux/amd64"
    layers: tuple[HashedLayer, ...]
    on_top: HashedLayer | None = None
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    user: str = ""
    working_directory: str = ""

    def chain_ids(self) -> tuple[ChainID, ...]:
        """Of each layer with those below it, the first one first."""
        return chain_ids(layer.diff_id for layer in self.layers)
