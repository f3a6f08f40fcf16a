# SPDX-License-Identifier: Apache-2.0
"""`tardevctl image`: what a person types and sees."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from policy import cache as caches
from policy.hashed import HashedImage, HashedLayer
from policy.image_hash import JOBS, hash_image
from policy.sources import Access, opened
from snapshotter.cli.output import AsJSON, progress, reported, rows, show_json, warn

app = typer.Typer(no_args_is_help=True, help="Images, wherever they lie: the root hashes of their layers.")

_TARFS: Final = "tarfs"


class Variant(enum.StrEnum):
    """Which tool's reading of a tar a `tarfs` root hash is of; the node's is the default."""

    NODE = "node"
    GENPOLICY = "genpolicy"
    GENPOLICY_UPSTREAM = "genpolicy-upstream"


@app.callback()
def _group() -> None:
    """So that `hash` is a command of its own, the only one by now."""


@app.command("hash")
@reported()
def hash_(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            help="registry/name:tag, oci:DIR[:tag], oci-archive:FILE[:tag], docker-archive:FILE[:name], or"
            " containerd:DIR@sha256:HEX with containerd's content directory and a manifest or index in it.",
        ),
    ],
    format: Annotated[list[str] | None, typer.Option(help="tar-index by default; several take one pass.")] = None,
    platform: Annotated[str | None, typer.Option(metavar="OS/ARCH", help="This machine's, by default.")] = None,
    variant: Annotated[
        Variant, typer.Option(help="Of tarfs: as the node computes it, or as one of Microsoft's genpolicy tools does.")
    ] = Variant.NODE,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="For registries without TLS elsewhere.")] = False,
    mirror: Annotated[
        list[str] | None, typer.Option(metavar="HOST=HOST", help="A registry, and what to ask in its place first.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Layers at once.")] = JOBS,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep what was computed.")] = False,
    cache_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="genpolicy's layers-cache.json: compare its hashes, and write them again."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Compute the root hash of every layer of images, as a node does, without keeping anything of them."""
    from policy.documents import Platform

    formats = list(dict.fromkeys(format or ["tar-index"]))
    if variant is not Variant.NODE and _TARFS not in formats:
        raise typer.BadParameter(f"only the format {_TARFS} has variants", param_hint="--variant")
    if cache_file is not None and _TARFS not in formats:
        raise typer.BadParameter(f"genpolicy knows the format {_TARFS} alone", param_hint="--cache-file")
    wanted = Platform.parse(platform) if platform else None
    access = Access(plain_http, _mirrors(mirror or []))
    cache = None if no_cache else caches.Cache(caches.default_directory(), warn)
    computed = _computed(formats)
    images: list[dict[str, HashedImage]] = []
    for reference in references:
        with opened(reference, access) as source, progress(f"hashing {reference}") as report:
            images.append(hash_image(source, computed, platform=wanted, jobs=jobs, cache=cache, progress=report))
    for found in images:
        _warn_of_variants(found)
    shown = [_of_variant(found[name], variant, found) for found in images for name in formats]
    if cache_file is not None:
        _compare_and_write(cache_file, [image for image in shown if image.layers[0].format.startswith(_TARFS)])
    _show(shown, as_json)


def _mirrors(given: list[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        host, equals, mirror = text.partition("=")
        if not (host and equals and mirror):
            raise typer.BadParameter(f"{text!r} is not HOST=HOST", param_hint="--mirror")
        found[host] = (*found.get(host, ()), mirror)
    return found


def _computed(formats: list[str]) -> list[str]:
    """tarfs with its variants, so that where they differ can be said."""
    found = list(formats)
    if _TARFS in formats:
        found += [f"{_TARFS}-{variant}" for variant in Variant if variant is not Variant.NODE]
    return list(dict.fromkeys(found))


def _warn_of_variants(found: dict[str, HashedImage]) -> None:
    if _TARFS not in found:
        return
    own = found[_TARFS]
    for variant in Variant:
        name = f"{_TARFS}-{variant}"
        for number, (layer, other) in enumerate(zip(own.layers, found.get(name, own).layers, strict=True), 1):
            if layer.root_hash != other.root_hash:
                warn(
                    f"image {own.reference}: layer {number}, {layer.diff_id}: Microsoft's {variant} computes"
                    f" {other.root_hash} in place of the node's {layer.root_hash}, and so refuses it;"
                    f" --variant {variant} prints its own"
                )


def _of_variant(image: HashedImage, variant: Variant, found: dict[str, HashedImage]) -> HashedImage:
    if variant is Variant.NODE or image.layers[0].format != _TARFS:
        return image
    return found[f"{_TARFS}-{variant}"]


def _compare_and_write(path: Path, images: list[HashedImage]) -> None:
    """What the file says is compared and never used: it has no sizes, and nobody vouches for it."""
    listed = caches.read_list(path, warn)
    for image in images:
        for layer in image.layers:
            if listed.get(layer.diff_id, layer.root_hash) != layer.root_hash:
                warn(f"{path}: layer {layer.diff_id} has {layer.root_hash} in format {layer.format}: written anew")
            listed[layer.diff_id] = layer.root_hash
    caches.write_list(path, listed)


def _row(layer: HashedLayer) -> dict[str, Any]:
    return {
        "diff_id": layer.diff_id,
        "blob_digest": layer.blob_digest,
        "format": layer.format,
        "root_hash": layer.root_hash,
        "data_size_bytes": layer.data_size_bytes,
        "data_block_bytes": layer.data_block_bytes,
        "hash_block_bytes": layer.hash_block_bytes,
    }


_COLUMNS: Final = ("layer", "diff_id", "format", "root_hash", "data_size_bytes", "data_block_bytes", "hash_block_bytes")


def _show(images: list[HashedImage], as_json: bool) -> None:
    if as_json:
        show_json(
            [
                {
                    "reference": image.reference,
                    "digest": image.digest,
                    "index_digest": image.index_digest,
                    "platform": image.platform,
                    "layers": [_row(layer) for layer in image.layers],
                    "parents_layer": _row(image.on_top) if image.on_top else None,
                }
                for image in images
            ]
        )
        return
    for number, image in enumerate(images):
        blank = "\n" if number else ""
        sys.stdout.write(f"{blank}{image.reference}  {image.platform}  {image.digest}\n")
        found = [{"layer": str(place), **_row(layer)} for place, layer in enumerate(image.layers, 1)]
        if image.on_top:
            found.append({"layer": "parents", **_row(image.on_top)})
        rows(found, _COLUMNS, as_json=False)
