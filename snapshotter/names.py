# SPDX-License-Identifier: Apache-2.0
"""Keys, names and chain IDs, as containerd writes them.

A key arrives as "namespace/number/client key", and client keys hold blanks, colons and slashes. Of
an unpack the last component is "extract-… CHAINID" (containerd: pkg/unpack); of a committed layer it
is the chain ID (OCI image specification: config.md, "Layer ChainID").
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, NewType

ChainID = NewType("ChainID", str)  # "sha256:" and 64 hexadecimal digits

_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_EXTRACT: Final = "extract-"


def is_digest(text: str) -> bool:
    return _SHA256.match(text) is not None


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


def chain_id(parent: ChainID | None, diff_id: str) -> ChainID:
    if parent is None:
        return ChainID(diff_id)
    return ChainID("sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode("ascii")).hexdigest())
