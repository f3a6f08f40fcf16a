# SPDX-License-Identifier: Apache-2.0
"""How a policy reaches a guest, and the digest of it that the guest's TEE reports.

Microsoft's Kata (branch 3.2.0.azl4: src/runtime/virtcontainers/clh.go): the text itself, in an annotation, and its
sha256. Upstream's (src/libs/kata-types/src/initdata.rs): a TOML document with the text in it, compressed, in another
annotation; the document names the algorithm of its own digest, which is cut, or filled up with zeros, to what a TEE has
room for.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import json
import tomllib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from policy.errors import PolicyError

POLICY_ANNOTATION: Final = "io.katacontainers.config.agent.policy"
INITDATA_ANNOTATION: Final = "io.katacontainers.config.hypervisor.cc_init_data"
VERSION: Final = "0.1.0"
ALGORITHMS: Final = ("sha256", "sha384", "sha512")
POLICY_KEY: Final = "policy.rego"
# What the TEE's report has room for, in bytes.
HOSTDATA_BYTES: Final = 32  # SEV-SNP
MRCONFIGID_BYTES: Final = 48  # TDX
_DOCUMENT_BYTES_MAX: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Initdata:
    """`data`: texts by their keys, POLICY_KEY among them."""

    algorithm: str
    data: Mapping[str, str]


def policy_annotation(policy: str) -> str:
    return base64.b64encode(policy.encode()).decode("ascii")


def policy_digest(policy: str) -> bytes:
    """HOSTDATA under Microsoft's Kata."""
    return hashlib.sha256(policy.encode()).digest()


def document(initdata: Initdata) -> bytes:
    """The TOML; equal for equal data. Raises PolicyError."""
    if initdata.algorithm not in ALGORITHMS:
        raise PolicyError(f"initdata has no algorithm {initdata.algorithm!r}; there are {', '.join(ALGORITHMS)}")
    lines = [f"version = {_quoted(VERSION)}", f"algorithm = {_quoted(initdata.algorithm)}", "", "[data]"]
    lines += [f"{_quoted(key)} = {_quoted(text)}" for key, text in sorted(initdata.data.items())]
    return ("\n".join(lines) + "\n").encode()


def _quoted(text: str) -> str:
    """A basic string of TOML (toml.io/en/v1.0.0#string): JSON's escapes, and DEL's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def annotation(toml: bytes) -> str:
    """Equal for equal documents: no time and no name is in it."""
    return base64.b64encode(gzip.compress(toml, mtime=0)).decode("ascii")


def digest(toml: bytes, algorithm: str) -> bytes:
    return hashlib.new(algorithm, toml).digest()


def fitted(digest: bytes, size_bytes: int) -> bytes:
    """As the runtimes put it into HOSTDATA or MRCONFIGID."""
    return digest[:size_bytes].ljust(size_bytes, b"\0")


def opened(annotated: str) -> tuple[Initdata, bytes]:
    """What an annotation holds, and its document. Raises PolicyError."""
    try:
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        toml = inflater.decompress(base64.b64decode(annotated, validate=True), _DOCUMENT_BYTES_MAX + 1)
        if not inflater.eof or inflater.unused_data or len(toml) > _DOCUMENT_BYTES_MAX:
            raise PolicyError(f"initdata: no gzip member, or one of over {_DOCUMENT_BYTES_MAX} bytes")
        return parsed(toml), toml
    except (binascii.Error, zlib.error, ValueError) as error:
        raise PolicyError(f"initdata: {error}") from None


def parsed(toml: bytes) -> Initdata:
    """Raises PolicyError."""
    try:
        found: dict[str, Any] = tomllib.loads(toml.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"initdata: {error}") from None
    data, algorithm = found.get("data"), found.get("algorithm")
    if found.get("version") != VERSION:
        raise PolicyError(f"initdata has the version {found.get('version')!r}; known is {VERSION}")
    if algorithm not in ALGORITHMS:
        raise PolicyError(f"initdata has the algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        raise PolicyError("initdata has no table of texts called data")
    return Initdata(algorithm, data)
