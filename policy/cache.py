# SPDX-License-Identifier: Apache-2.0
"""Root hashes that were computed before: one small file for each diff ID and format, and for each chain of layers.

A root hash is a function of diff ID and format alone. An entry is made once a layer was unpacked and found to have its
diff ID, and is asked for by the diff IDs of a config that was checked; what a registry says besides plays no part.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from blockdev.formats.layer_file import FORMATS
from policy.chain import ChainID, is_digest

VERSION: Final = 1
_ENTRY_BYTES_MAX: Final = 4096

_T = TypeVar("_T", bound="_Entry")


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """`of`: a diff ID, or a chain ID. `check`: sha256 of the others, against damage."""

    version: int
    of: str
    format: str
    check: str

    def _content(self) -> bytes:
        return msgspec.json.encode({**msgspec.to_builtins(self), "check": ""}, order="sorted")

    def digest(self) -> str:
        return hashlib.sha256(self._content()).hexdigest()


class LayerEntry(_Entry, forbid_unknown_fields=True):
    """`made_directories`: it adds to directories without an entry for them, so its chain may need a parents layer."""

    root_hash: str
    data_size_bytes: int
    made_directories: bool


class ChainEntry(_Entry, forbid_unknown_fields=True):
    """Its parents layer; all "" and 0 where it needs none."""

    identity: str
    on_top_format: str
    root_hash: str
    data_size_bytes: int


def default_directory() -> Path:
    """XDG base directory specification."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else Path.home() / ".cache") / "tardevctl"


class Cache:
    """Several processes may use one directory: a file appears whole, and whoever comes later writes the same bytes."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        self._directory, self._warn = directory, warn

    def layer(self, diff_id: str, format: str) -> LayerEntry | None:
        return self._read(LayerEntry, "layers", diff_id, format)

    def chain(self, chain: ChainID, format: str) -> ChainEntry | None:
        return self._read(ChainEntry, "chains", chain, format)

    def put_layer(
        self, diff_id: str, format: str, *, root_hash: str, data_size_bytes: int, made_directories: bool
    ) -> None:
        self._write("layers", LayerEntry(VERSION, diff_id, format, "", root_hash, data_size_bytes, made_directories))

    def put_chain(
        self, chain: ChainID, format: str, *, identity: str, on_top_format: str, root_hash: str, data_size_bytes: int
    ) -> None:
        entry = ChainEntry(VERSION, chain, format, "", identity, on_top_format, root_hash, data_size_bytes)
        self._write("chains", entry)

    def _path(self, kind: str, of: str, format: str) -> Path:
        assert is_digest(of)
        assert format in FORMATS
        return self._directory / kind / format / (of.removeprefix("sha256:") + ".json")

    def _read(self, type: type[_T], kind: str, of: str, format: str) -> _T | None:
        """None where there is none, or a bad one."""
        path = self._path(kind, of, format)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cache: {error}")
            return None
        try:
            with open(fd, "rb") as file:
                entry = msgspec.json.decode(file.read(_ENTRY_BYTES_MAX), type=type)
            why = _contradiction(entry, of, format)
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
            why = str(error)
        if why:
            self._warn(f"cache: {path} is damaged, and made again: {why}")
            return None
        return entry

    def _write(self, kind: str, entry: LayerEntry | ChainEntry) -> None:
        """A cache that cannot be written is none: a warning."""
        entry.check = entry.digest()
        path = self._path(kind, entry.of, entry.format)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace(path, msgspec.json.encode(entry) + b"\n")
        except OSError as error:
            self._warn(f"cache: {error}")


def _contradiction(entry: _Entry, of: str, format: str) -> str:
    if entry.version != VERSION:
        return f"version {entry.version}"
    if entry.check != entry.digest():
        return "its checksum is another"
    if (entry.of, entry.format) != (of, format):
        return f"it is about {entry.of[:80]} in format {entry.format[:80]}"
    return ""


def replace(path: Path, content: bytes) -> None:
    """The whole file in one step. Raises OSError."""
    fd, staged = tempfile.mkstemp(prefix=f".{path.name[:80]}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.rename(staged, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(staged)
        raise


# --- Microsoft's form


class _Listed(msgspec.Struct):
    """An element of genpolicy's layers-cache.json, which is a list."""

    diff_id: str
    verity_hash: str


def read_list(path: Path, warn: Callable[[str], None]) -> dict[str, str]:
    """Root hashes by diff ID; nothing where there is no such file, or a damaged one."""
    try:
        found: Any = msgspec.json.decode(path.read_bytes(), type=list[_Listed])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
        warn(f"{path} is damaged, and made again: {error}")
        return {}
    return {each.diff_id: each.verity_hash for each in found}


def write_list(path: Path, root_hashes: dict[str, str]) -> None:
    """Raises OSError."""
    listed = [{"diff_id": diff_id, "verity_hash": root_hash} for diff_id, root_hash in root_hashes.items()]
    replace(path, msgspec.json.format(msgspec.json.encode(listed), indent=2) + b"\n")
