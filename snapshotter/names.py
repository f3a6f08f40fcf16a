# SPDX-License-Identifier: Apache-2.0
"""Keys and names, as containerd writes them.

A key arrives as "namespace/number/client key", and client keys hold blanks, colons and slashes. Of
an unpack the last component is "extract-… CHAINID" (containerd: pkg/unpack); of a committed layer it
is the chain ID (OCI image specification: config.md, "Layer ChainID").
"""

from __future__ import annotations

from typing import Final

from policy.chain import ChainID, is_digest

_EXTRACT: Final = "extract-"


def last_component(key: str) -> str:
    return key.rpartition("/")[2]


def namespace_of(key: str) -> str:
    return key.partition("/")[0]


def is_extraction(key: str) -> bool:
    """An unpack's key; a container may be called extract-… too, but has no chain ID behind it."""
    return last_component(key).startswith(_EXTRACT) and chain_id_of(key) is not None


def chain_id_of(key: str) -> ChainID | None:
    """The chain ID that a name is, or that an extraction's key ends with."""
    last = last_component(key).rpartition(" ")[2]
    return ChainID(last) if is_digest(last) else None
