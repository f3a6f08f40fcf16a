# SPDX-License-Identifier: Apache-2.0
"""The commands on layer files, without their words on the screen."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from blockdev.formats.compression import MEDIA_TYPES, detect
from blockdev.formats.layer_file import LayerFile, format_named, open_layer_file
from blockdev.formats.layer_reader import index_reader
from blockdev.workers.launch import BuildRequest, run_build
from blockdev.workers.protocol import Output
from verity.errors import VerityError
from verity.table import dm_table
from verity.verify import verify_all


def build(source: Path, output: Path, format: str) -> dict[str, Any]:
    """Raises BlockdevError, OSError; `output` is then as it was."""
    format_named(format)
    directory = output.absolute().parent
    # Unbuffered: the builder reads on from where the descriptor, not the object, stands.
    with source.open("rb", buffering=0) as blob, tempfile.TemporaryFile(dir=directory) as spool:
        head = os.pread(blob.fileno(), 4, 0)
        media_type = next(name for name, kind in MEDIA_TYPES.items() if kind is detect(head))
        fd, staged = tempfile.mkstemp(dir=directory, prefix=f".{output.name}.")
        try:
            request = BuildRequest(
                blob_fd=blob.fileno(),
                outputs=(Output(format, fd, spool.fileno()),),
                media_type=media_type,
                layer_name=str(source),
                expected_size_bytes=os.fstat(blob.fileno()).st_size,
            )
            [record] = asyncio.run(run_build(request))
            os.fchmod(fd, 0o444)
            os.rename(staged, output)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(staged)
            raise
        finally:
            os.close(fd)
    return {
        "format": record.format,
        "diff_id": record.diff_id,
        "root_hash": record.root_hash,
        "tar_size_bytes": record.tar_size_bytes,
        "data_size_bytes": record.data_size_bytes,
        "tree_size_bytes": record.tree_size_bytes,
        "file_size_bytes": record.file_size_bytes,
        "entries": record.entries,
        "warnings": record.warnings,
    }


def _reader(file: BinaryIO) -> Callable[[int, int], bytes]:
    return lambda offset, size: os.pread(file.fileno(), size, offset)


def _open(file: BinaryIO) -> LayerFile:
    """Raises FormatError."""
    return open_layer_file(_reader(file), os.fstat(file.fileno()).st_size)


def verify(path: Path, root_hash: str) -> dict[str, Any]:
    """Raises FormatError, VerityError: the message names the first bad block."""
    try:
        root = bytes.fromhex(root_hash)
    except ValueError:
        root = b""
    if len(root) != 32:
        raise VerityError(f"root hash {root_hash!r} is not 64 hexadecimal digits")
    with path.open("rb") as file:
        # Sizes are not bound by the root hash: the format's rules and the file's size decide about them.
        layer = _open(file)
        verify_all(_reader(file), layer.geometry, root)
    params = layer.geometry.params
    return {
        "format": layer.format.name,
        "diff_id": _digest(layer.diff_id),
        "root_hash": root.hex(),
        "data_size_bytes": layer.data_size_bytes,
        "data_block_bytes": params.data_block_bytes,
        "hash_block_bytes": params.hash_block_bytes,
        "data_blocks": layer.geometry.data_blocks,
        "verified": True,
    }


def inspect(path: Path) -> dict[str, Any]:
    """Raises FormatError."""
    with path.open("rb") as file:
        layer = _open(file)
    params = layer.geometry.params
    return {
        "format": layer.format.name,
        "diff_id": _digest(layer.diff_id),
        "root_hash": layer.root_hash.hex() if layer.root_hash else None,
        "tar_offset_bytes": layer.format.tar_offset_bytes,
        "tar_size_bytes": layer.tar_size_bytes,
        "index_offset_bytes": layer.index_offset_bytes,
        "data_size_bytes": layer.data_size_bytes,
        "tree_size_bytes": layer.geometry.tree_size_bytes,
        "file_size_bytes": layer.file_size_bytes,
        "data_block_bytes": params.data_block_bytes,
        "hash_block_bytes": params.hash_block_bytes,
        "tree_levels": len(layer.geometry.levels),
        "entries": layer.entries,
        "dm_table": dm_table("DEVICE", layer.geometry, layer.root_hash) if layer.root_hash else None,
    }


def _digest(raw: bytes | None) -> str | None:
    return "sha256:" + raw.hex() if raw is not None else None


def _text(raw: bytes) -> str:
    """Names are bytes; what is not UTF-8 is escaped."""
    return raw.decode("utf-8", "backslashreplace")


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Raises FormatError, LimitExceeded."""
    with path.open("rb") as file:
        for entry in index_reader(_open(file), _reader(file)).walk():
            yield {
                "path": "/" + _text(entry.path),
                "mode": f"{entry.mode:06o}",
                "uid": entry.uid,
                "gid": entry.gid,
                "size_bytes": entry.size_bytes,
                "mtime": entry.mtime[0],
                "mtime_ns": entry.mtime[1],
                "nlink": entry.nlink,
                "inode": entry.inode,
                "rdev": f"{entry.rdev[0]}:{entry.rdev[1]}",
                "link": _text(entry.link),
                "xattrs": {_text(name): value.hex() for name, value in entry.xattrs.items()},
            }


def long_line(entry: dict[str, Any]) -> str:
    """As `ls -l` shows it; control characters escaped."""
    mode = int(entry["mode"], 8)
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["mtime"]))
    except (OSError, OverflowError, ValueError):  # beyond what the C library can say
        when = f"@{entry['mtime']}"
    size = entry["rdev"] if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else entry["size_bytes"]
    name = entry["path"] + (f" -> {entry['link']}" if entry["link"] else "")
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
    owner = f"{entry['uid']}:{entry['gid']}"
    return f"{stat.filemode(mode)} {entry['nlink']:>3} {owner:>11} {size:>10} {when} {shown}"
