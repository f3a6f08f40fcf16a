# SPDX-License-Identifier: Apache-2.0
"""`tardevctl layer`: what a person types and sees."""

from __future__ import annotations

import base64
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from snapshotter.cli import layer
from snapshotter.cli.output import AsJSON, printable, progress, reported, show, show_json, stream_json, text_of, warn

app = typer.Typer(no_args_is_help=True, help="Layer files: build, verify, look into, take apart.")

LayerFile = Annotated[Path, typer.Argument(metavar="FILE", help="A layer file.", exists=True, dir_okay=False)]
DiffID = Annotated[str | None, typer.Option(metavar="sha256:HEX", help="The diff ID that the layer must have.")]
_ROOT_HASH_HELP = "64 hexadecimal digits."


@app.command()
@reported()
def build(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A layer: tar, plain, gzip or zstd; - for standard input.")
    ],
    output: Annotated[list[Path], typer.Option(help="Where the layer file goes; replaced in one step.")],
    format: Annotated[
        list[str] | None,
        typer.Option(help="Its format, tar-index by default; several, each with an --output, take one pass."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what would come out wrong in the guest.")] = False,
    diff_id: DiffID = None,
    as_json: AsJSON = False,
) -> None:
    """Build the layer file of a layer, byte for byte what a node builds, and print its root hash."""
    if source != layer.STANDARD_INPUT and not source.exists():
        raise typer.BadParameter(f"{source} does not exist", param_hint="IN")
    formats = format or ["tar-index"]
    if len(output) != len(formats) or len(set(formats)) != len(formats):
        raise typer.BadParameter(f"{len(formats)} formats, all different, need as many outputs", param_hint="--output")
    outputs = dict(zip(formats, output, strict=True))
    with progress(f"building {', '.join(map(str, output))}") as report:
        records = layer.build_all(source, outputs, strict=strict, diff_id=diff_id, progress=report)
    if as_json and len(records) > 1:
        show_json(records)
        return
    for record in records:
        show(record, as_json)


@app.command()
@reported()
def verify(
    file: LayerFile,
    root_hash: Annotated[str, typer.Option(help=_ROOT_HASH_HELP)],
    format: Annotated[str | None, typer.Option(help="The format that the file must have.")] = None,
    diff_id: DiffID = None,
    as_json: AsJSON = False,
) -> None:
    """Check every block of a layer file against a root hash, as dm-verity in a guest would.

    The first bad block is named, with what lies there.
    """
    try:
        with progress(f"verifying {file}") as report:
            result = layer.verify(file, root_hash, format=format, diff_id=diff_id, progress=report)
    except layer.BadLayerFile as error:
        if as_json:
            show_json(error.record)
        raise
    show(result, as_json)


@app.command()
@reported()
def inspect(
    file: LayerFile,
    root_hash: Annotated[str | None, typer.Option(help="For the device-mapper table. " + _ROOT_HASH_HELP)] = None,
    as_json: AsJSON = False,
) -> None:
    """What a layer file says of itself. Nothing of it is verified: see `layer verify`."""
    record = layer.inspect(file, root_hash)
    if as_json:
        show_json(record)
    else:
        lists = {name: record.pop(name) for name in ("regions", "levels")}
        show(record, as_json=False)
        for region in lists["regions"]:
            sys.stdout.write(f"{region['offset_bytes']:>16} {region['size_bytes']:>16}  {region['name']}\n")
        for level in lists["levels"]:
            sys.stdout.write(
                f"{level['offset_bytes']:>16} {level['blocks']:>9} blocks  level {level['level']} of the hash tree\n"
            )
    if "index_error" in record:
        sys.stderr.write(f"tardevctl: the index cannot be read: {printable(record['index_error'])}\n")
        raise typer.Exit(1)


@app.command()
@reported()
def ls(
    file: LayerFile,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Only this one, and what is below it.")] = "",
    as_json: AsJSON = False,
) -> None:
    """The files in a layer, as its index has them."""
    entries = layer.entries(file, layer.layer_path(path))
    if as_json:
        stream_json(entries)
        return
    for entry in entries:
        sys.stdout.write(long_line(entry) + "\n")


def long_line(entry: dict[str, Any]) -> str:
    """As `ls -l` shows it; control characters escaped."""
    mode = int(entry["mode"], 8)
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["mtime"]))
    except (OSError, OverflowError, ValueError):  # beyond what the C library can say
        when = f"@{entry['mtime']}"
    size = entry["rdev"] if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else entry["size_bytes"]
    name = entry["path"] + (f" -> {entry['link']}" if entry["link"] else "")
    owner = f"{entry['uid']}:{entry['gid']}"
    return f"{stat.filemode(mode)} {entry['nlink']:>3} {owner:>11} {size:>10} {when} {printable(name)}"


@app.command()
@reported()
def extract(
    file: LayerFile,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made, or empty.")],
    paths: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="Only these.")] = None,
    root_hash: Annotated[str | None, typer.Option(help="Verify the file first. " + _ROOT_HASH_HELP)] = None,
    oci_whiteouts: Annotated[
        bool, typer.Option("--oci-whiteouts", help="As .wh. files, as in the layer's tar, not as overlay has them.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Write the files of a layer to a directory, with modes, owners, times, xattrs, hardlinks and devices.

    What only root may set is left out for others, with a warning.
    """
    with progress(f"extracting {file}") as report:
        record = layer.extract(
            file,
            directory,
            [layer.layer_path(path) for path in paths or ()],
            root_hash=root_hash,
            oci_whiteouts=oci_whiteouts,
            progress=report,
        )
    for what, count in record["warnings"].items():
        warn(f"{what.replace('_', ' ')}: {count}")
    show(record, as_json)


@app.command()
@reported()
def tar(
    file: LayerFile,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")] = None,
    diff_id: DiffID = None,
    as_json: AsJSON = False,
) -> None:
    """The layer's tar, bit for bit as it was. Its digest is checked on the way."""
    if output is None and as_json:
        raise typer.BadParameter("standard output is for the tar: --json needs --output")
    if output is None and sys.stdout.isatty():
        raise typer.BadParameter("a tar is not for a terminal: give --output, or a pipe")
    with progress(f"reading {file}") as report:
        record = layer.tar(file, output, diff_id=diff_id, progress=report)
    if output is not None:
        show(record, as_json)
    elif not record["checked"]:  # nothing in the file, nor the caller, says what it should be
        sys.stderr.write(f"tardevctl: diff ID {record['diff_id']}\n")


@app.command()
@reported()
def cat(
    file: LayerFile,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Of a regular file in the layer.")],
    as_json: AsJSON = False,
) -> None:
    """The content of a file in a layer. Symlinks are not followed."""
    with layer.file_content(file, layer.layer_path(path)) as (entry, pieces):
        if not as_json:
            for piece in pieces:
                layer.write_all(1, piece)
            return
        show_json(
            {
                "path": "/" + text_of(entry.path),
                "size_bytes": entry.size_bytes,
                "content_base64": base64.b64encode(b"".join(pieces)).decode(),
            }
        )


@app.command()
@reported(trouble=2)
def diff(
    before: LayerFile,
    after: LayerFile,
    as_json: AsJSON = False,
) -> None:
    """What differs between two layers, whatever their formats. Exit status: 0 nothing, 1 something, 2 trouble."""
    different = False

    def found() -> Iterator[dict[str, Any]]:
        nonlocal different
        for difference in layer.diff(before, after):
            different = True
            yield difference

    if as_json:
        stream_json(found())
    else:
        for difference in found():
            sys.stdout.write(_difference_line(difference) + "\n")
    if different:
        raise typer.Exit(1)


def _difference_line(difference: dict[str, Any]) -> str:
    sign = {"added": "+", "removed": "-", "changed": "*"}[difference["change"]]
    changed = "; ".join(
        f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in difference["attributes"].items()
    )
    return printable(f"{sign} {difference['path']}" + (f"  {changed}" if changed else ""))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)
