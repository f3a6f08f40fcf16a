# SPDX-License-Identifier: Apache-2.0
"""Documents of an image, read strictly (OCI image specification: manifest.md, image-index.md, config.md, descriptor.md;
Docker's image manifest version 2, schema 2).

What is not understood is an ImageError that names the image. Nothing here knows where the documents lie.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import msgspec

from blockdev.formats.compression import MEDIA_TYPES
from policy.chain import is_digest
from policy.errors import ImageError

# containerd's own bound for what it reads whole (core/images: "manifest too large").
DOCUMENT_BYTES_MAX: Final = 8 << 20
LAYERS_MAX: Final = 1000
DEPTH_MAX: Final = 4  # of indexes in indexes
REFERENCE_NAME: Final = "org.opencontainers.image.ref.name"  # an annotation

MANIFESTS: Final = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
INDEXES: Final = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
_CONFIGS: Final = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
_SCHEMA_1: Final = re.compile(r"application/vnd\.docker\.distribution\.manifest\.v1\+(json|prettyjws)")
_FOREIGN: Final = ("nondistributable", "foreign")
# As images spell what uname(2) says (Go: GOARCH).
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_PLATFORM: Final = re.compile(r"([a-z0-9]+)/([a-z0-9_]+)(?:/([a-z0-9.]+))?")
# Names that Go's JSON reads in any case, of documents whose parts decide what is run.
_DECISIVE: Final = ("schemaversion", "mediatype", "config", "layers", "manifests", "rootfs")

_T = TypeVar("_T")


class NoSuchImage(ImageError):
    """Nothing of that name, or none for that platform."""


class SeveralImages(ImageError):
    """Not one, but several."""


class OtherBytes(ImageError):
    """Not what the digest or the size says."""


class Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ImageError."""
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise ImageError(f"{text!r} is no platform: os/architecture, or os/architecture/variant")
        return cls(match[1], match[2], match[3] or "")

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def suits(self, wanted: Platform) -> bool:
        """A variant counts only where one is asked for."""
        return (self.os, self.architecture) == (wanted.os, wanted.architecture) and (
            not wanted.variant or wanted.variant == self.variant
        )


def host_platform() -> Platform:
    machine = platform.machine()
    return Platform("linux", _ARCHITECTURES.get(machine, machine))


class Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""


# Gives the bytes of a document, checked against their descriptor.
ReadDocument = Callable[[Descriptor], bytes]


class Listed(Descriptor):
    """In an index."""

    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct):
    manifests: list[Listed]


class LayerDescriptor(Descriptor):
    urls: list[str] | None = None


class Manifest(msgspec.Struct):
    config: Descriptor
    layers: list[LayerDescriptor]


class _Rootfs(msgspec.Struct):
    diff_ids: list[str]
    type: str = "layers"


class Process(msgspec.Struct, rename="pascal"):
    """What an image runs. Each may be missing, or null."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None

    def arguments(self, command: Sequence[str]) -> list[str]:
        """`command` takes the place of the image's own, behind its entrypoint."""
        return [*(self.entrypoint or ()), *(command or self.cmd or ())]


class Config(msgspec.Struct):
    rootfs: _Rootfs
    os: str = ""
    architecture: str = ""
    variant: str = ""
    config: Process | None = None

    def platform(self) -> Platform:
        return Platform(self.os, self.architecture, self.variant)


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """`digest`: "" and `size_bytes`: None where only the diff ID is known. `media_type` is one that we unpack."""

    digest: str
    size_bytes: int | None
    media_type: str
    diff_id: str


@dataclass(frozen=True, slots=True)
class ImageDocuments:
    """What a manifest, or the one for a platform in an index, names. `layers`: the first one first."""

    name: str
    digest: str  # of the manifest; "" where there is none
    index_digest: str  # of the outermost index; "" without one
    config: Config
    layers: tuple[LayerBlob, ...]


def digest_of(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def checked(descriptor: Descriptor, name: str) -> Descriptor:
    """One that names a blob. Raises ImageError."""
    if not is_digest(descriptor.digest) or descriptor.size < 0:
        raise ImageError(f"image {name}: a descriptor names no blob: {descriptor.digest[:80]!r}, {descriptor.size}")
    return descriptor


def check_document(descriptor: Descriptor, text: bytes, name: str) -> bytes:
    """Raises OtherBytes."""
    if len(text) != descriptor.size or digest_of(text) != descriptor.digest:
        raise OtherBytes(f"image {name}: the bytes of {descriptor.digest} are others")
    return text


def decoded(text: bytes, kind: type[_T], what: str) -> _T:
    """Raises ImageError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ImageError(f"{what}: {error}") from None


def decoded_strictly(text: bytes, kind: type[_T], what: str) -> _T:
    """As `decoded`; a document that others may read in another way is refused, too."""
    found = decoded(text, kind, what)
    try:
        document = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what}: {error}") from None
    odd = [name for name in document if name.casefold() in _DECISIVE and name not in ("schemaVersion", "mediaType")]
    if any(name != name.casefold() for name in odd):
        raise ImageError(f"{what}: {', '.join(map(repr, odd))}: others read these names in any case")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} is there twice")
    return found


def chosen(listed: Sequence[Listed], name: str, wanted: Platform) -> Listed:
    """Of an index. Raises NoSuchImage, SeveralImages."""
    # Of what is no image, builders say that it is for the platform unknown/unknown.
    known = [each for each in listed if each.media_type in MANIFESTS | INDEXES]
    fitting = [each for each in known if each.platform is None or each.platform.suits(wanted)]
    if len({each.digest for each in fitting}) == 1:
        return fitting[0]
    if fitting:
        names = sorted(filter(None, ((each.annotations or {}).get(REFERENCE_NAME) for each in fitting)))
        said = f": give one of {', '.join(names)}" if names else ""
        which = "this machine" if wanted == host_platform() else str(wanted)
        raise SeveralImages(f"image {name}: {len(fitting)} images are for {which}{said}")
    have = ", ".join(f"{each.platform.os}/{each.platform.architecture}" for each in known if each.platform)
    others = sorted({each.media_type for each in listed} - MANIFESTS - INDEXES)
    if others and not known:
        have = f"none at all, but {', '.join(map(repr, others))}"
    raise NoSuchImage(f"image {name}: none for {wanted}; there is {have or 'none at all'}")


def media_type_within(text: bytes, what: str) -> str:
    """What a manifest or index says of itself, or shows by what it has. Raises ImageError."""

    class Said(msgspec.Struct, rename="camel"):
        schema_version: int = 0
        media_type: str = ""
        manifests: Any = None
        layers: Any = None

    said = decoded(text, Said, what)
    if _SCHEMA_1.fullmatch(said.media_type) or said.schema_version == 1:
        raise ImageError(f"{what}: a manifest of Docker's schema 1, whose layers have no diff IDs")
    if said.media_type:
        return said.media_type
    if (said.manifests is None) == (said.layers is None):
        raise ImageError(f"{what}: neither a manifest nor an index")
    return (
        "application/vnd.oci.image.manifest.v1+json"
        if said.manifests is None
        else next(iter(kind for kind in INDEXES if "oci" in kind))
    )


def resolved(
    name: str,
    root: Descriptor,
    document: ReadDocument,
    wanted: Platform | None,
) -> ImageDocuments:
    """`wanted`: None for this machine's in an index,
    and for whatever it is without one. Raises ImageError, and what `document` raises."""
    index_digest = ""
    for _ in range(DEPTH_MAX):
        what = f"image {name}: {root.digest}"
        if _SCHEMA_1.fullmatch(root.media_type):
            raise ImageError(f"{what}: a manifest of Docker's schema 1, whose layers have no diff IDs")
        if root.media_type not in MANIFESTS | INDEXES:
            raise ImageError(f"{what} is of the media type {root.media_type!r}, which is no image")
        text = document(root)
        within = media_type_within(text, what)
        if within != root.media_type and (within in MANIFESTS) != (root.media_type in MANIFESTS):
            raise ImageError(f"{what} says that it is {within!r}, and is named as {root.media_type!r}")
        if root.media_type in MANIFESTS:
            break
        index_digest = index_digest or root.digest
        listed = decoded_strictly(text, Index, what).manifests
        root = checked(chosen(listed, name, wanted or host_platform()), name)
    else:
        raise ImageError(f"image {name}: indexes in indexes, over {DEPTH_MAX} of them")
    manifest = decoded_strictly(text, Manifest, f"image {name}: manifest {root.digest}")
    if manifest.config.media_type not in _CONFIGS:
        raise ImageError(f"image {name}: its config is of the media type {manifest.config.media_type!r}: no image")
    if manifest.config.size > DOCUMENT_BYTES_MAX:
        raise ImageError(f"image {name}: its config has {manifest.config.size} bytes, over {DOCUMENT_BYTES_MAX}")
    config = decoded_strictly(document(checked(manifest.config, name)), Config, f"image {name}: config")
    check_config(config, len(manifest.layers), name)
    own = config.platform()
    if (wanted or index_digest) and own.os and not own.suits(expected := wanted or host_platform()):
        raise NoSuchImage(f"image {name}: its config says that it is for {own}, not {expected}")
    layers = tuple(
        _layer(descriptor, diff_id, number, name)
        for number, (descriptor, diff_id) in enumerate(zip(manifest.layers, config.rootfs.diff_ids, strict=True), 1)
    )
    _check_repetitions(layers, name)
    return ImageDocuments(name, root.digest, index_digest, config, layers)


def check_config(config: Config, layers: int, name: str) -> None:
    """Raises ImageError."""
    diff_ids = config.rootfs.diff_ids
    if config.rootfs.type != "layers":
        raise ImageError(f"image {name}: its config has a rootfs of the type {config.rootfs.type!r}")
    if not 1 <= layers <= LAYERS_MAX or len(diff_ids) != layers:
        raise ImageError(
            f"image {name}: {layers} layers and {len(diff_ids)} diff IDs;"
            f" as many of one as of the other, 1 to {LAYERS_MAX}, are possible"
        )
    bad = next((each for each in diff_ids if not is_digest(each)), None)
    if bad is not None:
        raise ImageError(f"image {name}: its config has a diff ID that is no sha256 digest: {bad[:80]!r}")


def _layer(descriptor: LayerDescriptor, diff_id: str, number: int, name: str) -> LayerBlob:
    checked(descriptor, name)
    kind, what = descriptor.media_type, f"image {name}: layer {number}, {descriptor.digest}"
    if kind.endswith("+encrypted"):
        raise ImageError(f"{what}: is encrypted ({kind!r})")
    if descriptor.urls or any(word in kind for word in _FOREIGN):
        raise ImageError(f"{what}: is a foreign layer ({kind!r}), which registries do not hold")
    if kind not in MEDIA_TYPES:
        raise ImageError(f"{what}: its media type {kind[:200]!r} is no tar layer, plain, gzip or zstd")
    return LayerBlob(descriptor.digest, descriptor.size, kind, diff_id)


def _check_repetitions(layers: Sequence[LayerBlob], name: str) -> None:
    """An image may have a layer twice; then both say the same of it. Raises ImageError."""
    first: dict[str, LayerBlob] = {}
    for layer in layers:
        if first.setdefault(layer.digest, layer) != layer:
            raise ImageError(f"image {name}: layer {layer.digest} is there twice, with different size, type or diff ID")
