# SPDX-License-Identifier: Apache-2.0
"""References to images in registries, as Docker and Kubernetes read them (distribution/reference: "normalize")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from policy.chain import is_digest
from policy.errors import ImageError

DOCKER_HUB: Final = "docker.io"
_OFFICIAL: Final = "library/"
_NAME_MAX: Final = 255
_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_PART}(?:/{_PART})*")
_HOST: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_TAG: Final = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """`tag`: "latest" where neither tag nor digest is given. With a digest the tag is only said."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ImageError."""
        name, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise ImageError(f"image {text[:200]}: {digest[:80]!r} is no sha256 digest")
        head, slash, rest = name.partition("/")
        if slash and (set(head) & set(".:") or head == "localhost" or head != head.lower()):
            host, path = head, rest
        else:
            host, path = DOCKER_HUB, name
        path, colon, tag = path.partition(":")
        if host in (DOCKER_HUB, f"index.{DOCKER_HUB}"):
            host = DOCKER_HUB
            path = path if "/" in path else _OFFICIAL + path
        if not (_HOST.fullmatch(host) and _REPOSITORY.fullmatch(path) and len(path) <= _NAME_MAX):
            raise ImageError(f"image {text[:200]}: no name of an image")
        if colon and not _TAG.fullmatch(tag):
            raise ImageError(f"image {text[:200]}: {tag[:200]!r} is no tag")
        return cls(host, path, tag if tag or digest else "latest", digest)

    def __str__(self) -> str:
        tag, digest = self.tag and f":{self.tag}", self.digest and f"@{self.digest}"
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def is_local(self) -> bool:
        """On this machine: as Docker does, plain HTTP is good enough then."""
        host = self.host.rpartition(":")[0] or self.host
        return host in ("localhost", "[::1]") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None
