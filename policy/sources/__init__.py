# SPDX-License-Identifier: Apache-2.0
"""Where an image lies. `source.Source` is what all have in common; `opened` makes one of what a person types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from policy.errors import ImageError
from policy.sources.archive import DockerArchive, LayoutArchive
from policy.sources.directory import ContentDirectory, LayoutDirectory
from policy.sources.source import Source

LAYOUT: Final = "oci:"
LAYOUT_ARCHIVE: Final = "oci-archive:"
DOCKER_ARCHIVE: Final = "docker-archive:"
CONTENT: Final = "containerd:"
REGISTRY: Final = "docker://"  # may be left out


@dataclass(frozen=True, slots=True)
class Access:
    """How registries are reached. `mirrors`: host → what is asked in its place, first; itself, if that fails."""

    plain_http: bool = False
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@contextmanager
def opened(reference: str, access: Access | None = None) -> Iterator[Source]:
    """Raises ImageError, RegistryError, OSError."""
    source = _source(reference, access or Access())
    try:
        yield source
    finally:
        source.close()


def _source(reference: str, access: Access) -> Source:
    for prefix, make in ((LAYOUT, LayoutDirectory), (LAYOUT_ARCHIVE, LayoutArchive), (DOCKER_ARCHIVE, DockerArchive)):
        if reference.startswith(prefix):
            path, name = _split(reference.removeprefix(prefix))
            return make(reference, path, name)
    if reference.startswith(CONTENT):
        directory, at, digest = reference.removeprefix(CONTENT).rpartition("@")
        if not at:
            raise ImageError(
                f"image {reference}: containerd:DIRECTORY@sha256:DIGEST, for names are not in the directory"
            )
        return ContentDirectory(reference, Path(directory), digest)
    from policy.sources.registry import RegistrySource  # its libraries are slow to load

    return RegistrySource(reference.removeprefix(REGISTRY), access.plain_http, access.mirrors)


def _split(text: str) -> tuple[Path, str]:
    """Path and name, of which a path that is there has none. A path has no colon then, but a name may."""
    if Path(text).exists():
        return Path(text), ""
    path, _, name = text.partition(":")
    return Path(path), name
