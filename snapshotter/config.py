# SPDX-License-Identifier: Apache-2.0
"""The configuration file: one TOML file, every key with a default. config/config.toml documents them."""

from __future__ import annotations

import difflib
import os.path
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from blockdev.formats.layer_file import FORMATS, LAYER_FORMATS
from blockdev.formats.limits import Limits
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.errors import ConfigError

DEFAULT_PATH: Final = Path("/etc/tardev-snapshotter/config.toml")
_UNITS: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# 18 digits: more than any disk has bytes.
_SIZE: Final = re.compile(r"(\d{1,18})\s*([KMGT]?i?B)?\Z")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `([^`]*)`")
_STATE: Final = "/var/lib/containerd"
_SOCKET_PATH_BYTES_MAX: Final = 107  # Linux: include/uapi/linux/un.h, without the NUL at the end
_LINKS_BYTES_MAX: Final = 1024
_WRITABLE_BYTES_MIN: Final = 1 << 20
# What grpc.sock below the root needs of that.
_ROOT_BYTES_MAX: Final = _SOCKET_PATH_BYTES_MAX - len("/grpc.sock")

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


def parse_size(text: str) -> int:
    """Bytes from "20GiB", "512MiB" or "4096". Raises ConfigError."""
    match = _SIZE.match(text)
    if not match or (match[2] or "") not in _UNITS:
        raise ConfigError(f"{text!r} is no size: a whole number with KiB, MiB, GiB or TiB")
    return int(match[1]) * _UNITS[match[2] or ""]


class _Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    pass


class Containerd(_Table, frozen=True):
    address: str = "/run/containerd/containerd.sock"
    content: str = f"{_STATE}/io.containerd.content.v1.content"


class Builds(_Table, frozen=True):
    workers: _Count = 2
    sharing: Literal["node", "namespace"] = "node"
    timeout: _Seconds = 1800.0
    max_layer_size: str = "64GiB"
    max_entries: _Count = 4_000_000
    max_path_length: _Count = 64 << 10
    max_xattr_size: str = "256KiB"
    max_expansion_ratio: _Count = 1100
    free_space_reserve: str = "512MiB"

    def limits(self) -> Limits:
        return Limits(
            tar_bytes=parse_size(self.max_layer_size),
            entries=self.max_entries,
            path_bytes=self.max_path_length,
            xattr_bytes=min(parse_size(self.max_xattr_size), Limits().xattr_bytes),
            expansion_ratio=self.max_expansion_ratio,
        )


class Cache(_Table, frozen=True):
    max_size: str = "20GiB"
    max_age: _Seconds = 30 * 86400.0
    delete_rate: str = "1GiB"


class Scrub(_Table, frozen=True):
    interval: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 30 * 86400.0
    rate: str = "32MiB"


class Host(_Table, frozen=True):
    mount_through: Literal["auto", "loop"] = "auto"
    verity: Literal["off", "require"] = "off"


class Signatures(_Table, frozen=True):
    required: bool = False
    certificates: list[str] = []  # msgspec gives each its own
    store: str = f"{_STATE}/io.containerd.snapshotter.v1.tardev/signatures"


class Metrics(_Table, frozen=True):
    address: str = "127.0.0.1:9476"


class Log(_Table, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class SnapshotterName(_Table, frozen=True):
    contract: str
    format: str
    skip_download: bool = False
    max_layers: _Count = 0  # until a contract fills in its own
    remap_ids: bool = False
    writable_size: str = "0"
    encoding: str = ""  # until a contract fills in its own
    layers: str = ""

    def __post_init__(self) -> None:
        if self.contract in CONTRACTS:
            contract = CONTRACTS[self.contract]
            if not self.max_layers:
                msgspec.structs.force_setattr(self, "max_layers", contract.MAX_LAYERS)
            if not self.encoding:
                msgspec.structs.force_setattr(self, "encoding", contract.ENCODINGS[0])


class Config(_Table, frozen=True):
    root: str = f"{_STATE}/io.containerd.snapshotter.v1.tardev"
    address: str = "/run/containerd/tardev-snapshotter.sock"
    containerd: Containerd = Containerd()
    builds: Builds = Builds()
    cache: Cache = Cache()
    scrub: Scrub = Scrub()
    host: Host = Host()
    signatures: Signatures = Signatures()
    metrics: Metrics = Metrics()
    log: Log = Log()
    snapshotters: dict[str, SnapshotterName] = msgspec.field(
        default_factory=lambda: {"tardev-host": SnapshotterName(contract="host", format="tar-index")}
    )

    def links(self) -> dict[str, Path]:
        """Of each name whose contract names layers by chain IDs: the directory of their links."""
        return {
            name: Path(chosen.layers or f"{self.root}/layers")
            for name, chosen in self.snapshotters.items()
            if CONTRACTS[chosen.contract].PLACE is Place.LINKED
        }


def load(path: Path) -> Config:
    """Raises ConfigError."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def of_the_node(path: Path | None) -> Config:
    """That of a file; without one of the usual file, where it exists. Raises ConfigError."""
    path = path or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    return load(path) if path else Config()


def parse(text: str) -> Config:
    """Raises ConfigError: not TOML, a wrong type, an unknown key (with the nearest known one), a bad value."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
        raise ConfigError(f"not TOML: {error}") from None
    try:
        config = msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), data)) from None
    _check(config)
    return config


def _check(config: Config) -> None:
    for key, path, most in (
        ("root", config.root, _ROOT_BYTES_MAX),
        ("address", config.address, _SOCKET_PATH_BYTES_MAX),
        ("containerd.address", config.containerd.address, _SOCKET_PATH_BYTES_MAX),
        ("containerd.content", config.containerd.content, 4095),
    ):
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"{key} must be an absolute path")
        if len(path.encode()) > most:
            raise ConfigError(f"{key} is over the {most} bytes that its path may have, for a unix socket")
    if any(char in config.root for char in ",:\\"):
        raise ConfigError(
            "root must hold no comma, colon or backslash: overlay's mount options cannot name such a path"
        )
    for key, path in (
        ("store", config.signatures.store),
        *(("certificates", p) for p in config.signatures.certificates),
    ):
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"signatures.{key}: {path!r} is no absolute path")
    if config.signatures.required and not config.signatures.certificates:
        raise ConfigError("signatures.required without signatures.certificates: no layer could be committed")
    if not config.snapshotters or "" in config.snapshotters:
        raise ConfigError("no [snapshotters.NAME], or one without a name: nothing to serve")
    for key, size in (
        ("builds.max_layer_size", config.builds.max_layer_size),
        ("builds.max_xattr_size", config.builds.max_xattr_size),
        ("builds.free_space_reserve", config.builds.free_space_reserve),
        ("cache.max_size", config.cache.max_size),
        ("cache.delete_rate", config.cache.delete_rate),
        ("scrub.rate", config.scrub.rate),
    ):
        try:
            parse_size(size)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    for name, chosen in config.snapshotters.items():
        if chosen.contract not in CONTRACTS:
            raise ConfigError(
                f"snapshotters.{name}: contract {chosen.contract!r} is not in this version;"
                f" it has: {', '.join(CONTRACTS)}"
            )
        if chosen.format not in LAYER_FORMATS:
            raise ConfigError(
                f"snapshotters.{name}: format {chosen.format!r} is not in this version;"
                f" it has: {', '.join(LAYER_FORMATS)}"
            )
        if chosen.format not in CONTRACTS[chosen.contract].FORMATS:
            raise ConfigError(
                f"snapshotters.{name}: contract {chosen.contract} cannot use format {_described(chosen.format)};"
                f" it can use: {', '.join(map(_described, sorted(CONTRACTS[chosen.contract].FORMATS)))}"
            )
        most = CONTRACTS[chosen.contract].MAX_LAYERS
        if chosen.max_layers > most:
            raise ConfigError(f"snapshotters.{name}.max_layers: {most} are the most for contract {chosen.contract}")
        if chosen.remap_ids and not CONTRACTS[chosen.contract].REMAPS_IDS:
            raise ConfigError(f"snapshotters.{name}.remap_ids: contract {chosen.contract} cannot map IDs")
        if chosen.skip_download and config.builds.sharing == "namespace":
            raise ConfigError(
                f"snapshotters.{name}.skip_download answers from what any namespace has pulled:"
                ' it cannot go with builds.sharing = "namespace"'
            )
        _check_links(config, name, chosen)
        _check_writable(name, chosen)
    owners: dict[str, str] = {}
    for name, directory in config.links().items():
        first = owners.setdefault(os.path.normpath(directory), name)
        if config.snapshotters[first].format != config.snapshotters[name].format:
            raise ConfigError(
                f"snapshotters.{name}.layers: {directory} holds the layers of {first}, which are of another format;"
                " give one of them another directory"
            )


def _described(layer_format: str) -> str:
    known = FORMATS[layer_format]
    blocks = f"{known.params.data_block_bytes}/{known.params.hash_block_bytes}"
    return f"{layer_format} (file system {known.file_system}, verity blocks of {blocks} bytes)"


def _check_writable(name: str, chosen: SnapshotterName) -> None:
    try:
        size = parse_size(chosen.writable_size)
    except ConfigError as error:
        raise ConfigError(f"snapshotters.{name}.writable_size: {error}") from None
    if size and not CONTRACTS[chosen.contract].TAKES_WRITABLE:
        raise ConfigError(f"snapshotters.{name}.writable_size: contract {chosen.contract} has nothing to write to")
    if 0 < size < _WRITABLE_BYTES_MIN:
        raise ConfigError(f"snapshotters.{name}.writable_size: a file system has {_WRITABLE_BYTES_MIN} bytes or more")


def _check_links(config: Config, name: str, chosen: SnapshotterName) -> None:
    contract = CONTRACTS[chosen.contract]
    if chosen.encoding not in contract.ENCODINGS:
        known = ", ".join(filter(None, contract.ENCODINGS)) or "none"
        raise ConfigError(
            f"snapshotters.{name}.encoding: contract {chosen.contract} has no {chosen.encoding!r}; it has: {known}"
        )
    if not chosen.layers:
        return
    if contract.PLACE is not Place.LINKED:
        raise ConfigError(f"snapshotters.{name}.layers: contract {chosen.contract} gives layers no names by chain ID")
    if not chosen.layers.startswith("/") or any(char in chosen.layers for char in "\0,:\\"):
        raise ConfigError(f"snapshotters.{name}.layers must be an absolute path without comma, colon or backslash")
    if len(chosen.layers.encode()) > _LINKS_BYTES_MAX:
        raise ConfigError(f"snapshotters.{name}.layers is over {_LINKS_BYTES_MAX} bytes")
    root, directory = os.path.normpath(config.root), os.path.normpath(chosen.layers)
    inside = directory == root or directory.startswith(f"{root}/")
    if inside and directory != f"{root}/layers" and not directory.startswith(f"{root}/links/"):
        raise ConfigError(f"snapshotters.{name}.layers: below root only {root}/layers and {root}/links/NAME can be it")


def _explain(message: str, data: dict[str, Any]) -> str:
    """msgspec's message, with the path in TOML's words and the nearest known key."""
    match = _UNKNOWN.search(message)
    if not match:
        # msgspec says [...] for a key of a dictionary: find the name that lacks or spoils something.
        for name, value in data.get("snapshotters", {}).items() if "[...]" in message else ():
            try:
                msgspec.convert(value, SnapshotterName)
            except msgspec.ValidationError:
                message = message.replace("[...]", f".{name}")
                break
        return message.replace("`$.", "`")
    wrong = match[1]
    path = re.search(r"at `\$\.?([^`]*)`", message)
    where = path[1] if path else ""
    table: type[msgspec.Struct] = Config
    if where.startswith("snapshotters"):
        table = SnapshotterName
        # msgspec says [...] for a key of a dictionary: find the name that has it.
        where = next((f"snapshotters.{name}" for name, value in data["snapshotters"].items() if wrong in value), where)
    elif where:
        table = type(getattr(Config(), where))
    near = difflib.get_close_matches(wrong, table.__struct_fields__, 1, 0.5)
    full = f"{where}.{wrong}" if where else wrong
    return f"unknown key {full}" + (f"; did you mean {near[0]}?" if near else "")
