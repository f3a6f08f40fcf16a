# SPDX-License-Identifier: Apache-2.0
"""The commands on layer files, without their words on the screen.

Paths of a layer come and go as bytes without a slash in front, `b""` being its root.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blockdev import extract as extraction
from blockdev.errors import BlockdevError, DigestMismatch, FormatError, NotInLayer
from blockdev.formats import erofs, tarfs_reader
from blockdev.formats.compression import MEDIA_TYPES, detect
from blockdev.formats.entry import Entry
from blockdev.formats.layer_diff import Difference, Value, differences
from blockdev.formats.layer_file import LayerFile, format_named, layer_format_named, open_layer_file
from blockdev.formats.layer_place import place
from blockdev.formats.layer_reader import IndexReader, at_or_below, index_reader, pieces, tar_runs
from blockdev.workers.launch import BuildRecord, BuildRequest, run_build
from blockdev.workers.parameters import Output
from snapshotter.cli.output import ProgressBytes, printable, text_of
from verity import veritysetup
from verity.errors import VerificationFailed, VerityError
from verity.table import dm_table
from verity.verify import verify_all

STANDARD_INPUT: Final = Path("-")
_HEAD_BYTES: Final = 4  # what a compression is known by
_PIECE_BYTES: Final = 1 << 20
_SAMPLED_SECONDS: Final = 0.1
_DIFF_ID: Final = re.compile(r"sha256:[0-9a-f]{64}")
_KINDS: Final = {
    stat.S_IFREG: "files",
    stat.S_IFDIR: "directories",
    stat.S_IFLNK: "symlinks",
    stat.S_IFCHR: "character devices",
    stat.S_IFBLK: "block devices",
    stat.S_IFIFO: "fifos",
    stat.S_IFSOCK: "sockets",
}


def _quiet(done: int, total: int | None) -> None:
    pass


def parse_root_hash(text: str) -> bytes:
    """Raises VerityError."""
    try:
        root = bytes.fromhex(text)
    except ValueError:
        root = b""
    if len(root) != 32:
        raise VerityError(f"root hash {text!r} is not 64 hexadecimal digits")
    return root


def _check_diff_id(text: str | None) -> None:
    """Raises DigestMismatch for what no layer can have."""
    if text is not None and not _DIFF_ID.fullmatch(text):
        raise DigestMismatch(f"diff ID {text!r} is not sha256: and 64 hexadecimal digits")


# --- build


@dataclass(frozen=True, slots=True)
class _Blob:
    """`size_bytes`: None where only the end of the stream will tell. `read_bytes`: of it by now."""

    fd: int
    head: bytes
    size_bytes: int | None
    read_bytes: Callable[[], int]


@contextmanager
def _blob(source: Path) -> Iterator[_Blob]:
    fd = os.dup(0) if source == STANDARD_INPUT else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            start = os.lseek(fd, 0, os.SEEK_CUR)
            # The builder reads on from where the descriptor stands, and so moves this one's position too.
            yield _Blob(
                fd, os.pread(fd, _HEAD_BYTES, start), max(0, status.st_size - start),
                lambda: os.lseek(fd, 0, os.SEEK_CUR) - start,
            )  # fmt: skip
        else:
            with _pumped(fd) as blob:
                yield blob
    finally:
        os.close(fd)


@contextmanager
def _pumped(fd: int) -> Iterator[_Blob]:
    """What cannot be read twice: its first bytes go in front of the rest through a pipe of our own."""
    head = b""
    while len(head) < _HEAD_BYTES and (piece := os.read(fd, _HEAD_BYTES - len(head))):
        head += piece
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    source = os.dup(fd)  # the thread's own: it may still wait for a writer when the build has failed
    moved = len(head)

    def pump() -> None:
        nonlocal moved
        try:
            rest = memoryview(head)
            while rest:
                rest = rest[os.write(write_end, rest) :]
                if not rest:
                    piece = os.read(source, _PIECE_BYTES)
                    moved += len(piece)
                    rest = memoryview(piece)
        except BrokenPipeError:
            pass  # the build has failed, and says why
        finally:
            os.close(write_end)
            os.close(source)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield _Blob(read_end, head, None, lambda: moved)
    finally:
        os.close(read_end)


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A new file for what becomes `path` in one step when the block ends well; else nothing is left of it."""
    staged = path.absolute().parent / f".{path.name}.{os.urandom(6).hex()}"
    fd = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield fd
        os.rename(staged, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(staged)
        raise
    finally:
        os.close(fd)


def build(
    source: Path,
    output: Path,
    format: str,
    *,
    strict: bool = False,
    diff_id: str | None = None,
    progress: ProgressBytes = _quiet,
) -> dict[str, Any]:
    """As `build_all`, for one format."""
    return build_all(source, {format: output}, strict=strict, diff_id=diff_id, progress=progress)[0]


def build_all(
    source: Path,
    outputs: Mapping[str, Path],
    *,
    strict: bool = False,
    diff_id: str | None = None,
    progress: ProgressBytes = _quiet,
) -> list[dict[str, Any]]:
    """One pass over `source`, a file or STANDARD_INPUT, makes a layer file of each format, by their names.

    Raises BlockdevError, OSError; no output is then made or changed.
    """
    for name in outputs:
        layer_format_named(name)
    _check_diff_id(diff_id)
    with ExitStack() as files:
        blob = files.enter_context(_blob(source))
        staged = {name: files.enter_context(_replacing(path)) for name, path in outputs.items()}
        spools = {name: files.enter_context(_spool(path.absolute().parent)) for name, path in outputs.items()}
        request = BuildRequest(
            blob_fd=blob.fd,
            outputs=tuple(Output(name, staged[name], spools[name]) for name in outputs),
            media_type=next(name for name, kind in MEDIA_TYPES.items() if kind is detect(blob.head)),
            layer_name="from standard input" if source == STANDARD_INPUT else str(source),
            expected_size_bytes=blob.size_bytes,
            expected_diff_id=diff_id,
            strict=strict,
        )
        records = asyncio.run(_watched(request, blob, progress))
        for fd in staged.values():
            os.fchmod(fd, 0o444)
    return [
        {
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
        for record in records
    ]


@contextmanager
def _spool(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


async def _watched(request: BuildRequest, blob: _Blob, progress: ProgressBytes) -> list[BuildRecord]:
    async def sample() -> None:
        while True:
            progress(blob.read_bytes(), blob.size_bytes)
            await asyncio.sleep(_SAMPLED_SECONDS)

    sampler = asyncio.create_task(sample())
    try:
        return await run_build(request)
    finally:
        sampler.cancel()


# --- layer files


@dataclass(frozen=True, slots=True)
class _Opened:
    fd: int
    layer: LayerFile

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def index(self) -> IndexReader:
        return index_reader(self.layer, self.read_at)

    def tar(self) -> Iterator[bytes]:
        """Raises FormatError."""
        for run in tar_runs(self.layer, self.read_at):
            yield from (run,) if isinstance(run, bytes) else pieces(self.read_at, run.offset_bytes, run.size_bytes)

    def data(self, entry: Entry) -> Iterator[bytes]:
        """Of a regular file. Raises FormatError where the layer file ends before."""
        for offset, size in entry.extents():
            yield from pieces(self.read_at, offset, size)


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    """Raises FormatError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _Opened(fd, open_layer_file(lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size))
    finally:
        os.close(fd)


class BadLayerFile(VerityError):
    """What a verification found; `record` says it again for a program."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def verify(
    path: Path,
    root_hash: str,
    *,
    format: str | None = None,
    diff_id: str | None = None,
    progress: ProgressBytes = _quiet,
) -> dict[str, Any]:
    """Raises FormatError, DigestMismatch; BadLayerFile names the first bad block and what lies there."""
    root = parse_root_hash(root_hash)
    _check_diff_id(diff_id)
    with _opened(path) as opened:
        layer = opened.layer
        name = layer.format.name
        if format is not None:
            # Nothing in a tarfs file says which of the tools that make one made it: the root hash does.
            name = format_named(format).name
            if format_named(format).file_system != layer.format.file_system:
                raise FormatError(f"{path} has the format {layer.format.name}, not {name}")
        _verify(opened, root, progress)
        if diff_id is not None:
            found = _tar_diff_id(opened)
            if found != diff_id:
                what = "table in {} has the identity" if layer.format.of_chain else "tar in {} has the diff ID"
                raise DigestMismatch(f"the {what.format(path)} {found}, not {diff_id}")
    params = layer.geometry.params
    return {
        "format": name,
        _identity_of(layer): diff_id or _digest(layer.diff_id),
        "root_hash": root.hex(),
        "data_size_bytes": layer.data_size_bytes,
        "data_block_bytes": params.data_block_bytes,
        "hash_block_bytes": params.hash_block_bytes,
        "data_blocks": layer.geometry.data_blocks,
        "tree_levels": len(layer.geometry.levels),
        "verified": True,
    }


def _verify(opened: _Opened, root: bytes, progress: ProgressBytes) -> None:
    """Sizes are not bound by the root hash: the format's rules and the file's size decide about them."""
    layer = opened.layer
    total = layer.data_size_bytes + layer.geometry.tree_size_bytes
    done = 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal done
        done += size
        progress(done, total)
        return opened.read_at(offset, size)

    try:
        verify_all(read_at, layer.geometry, root)
    except VerificationFailed as error:
        raise _bad_layer_file(opened, root, error) from None
    if layer.root_hash not in (None, root):
        raise BadLayerFile(
            f"the trailer names the root hash {layer.root_hash.hex() if layer.root_hash else ''},"
            f" though all blocks have that of {root.hex()}",
            {"verified": False, "kind": "trailer"},
        )


def _bad_layer_file(opened: _Opened, root: bytes, error: VerificationFailed) -> BadLayerFile:
    layer = opened.layer
    record: dict[str, Any] = {"verified": False, "kind": error.kind, "error": str(error)}
    message = str(error)
    if layer.root_hash not in (None, root) and layer.root_hash:
        message += f" (the file's own trailer names the root hash {layer.root_hash.hex()})"
    if error.offset_bytes is None:
        return BadLayerFile(message, record)
    record |= {"block": error.block, "level": error.level, "offset_bytes": error.offset_bytes}
    if error.kind == "hash":
        levels = len(layer.geometry.levels)
        record |= {"region": "hash tree"}
        message += f": at byte {error.offset_bytes}, in the hash tree, level {error.level} of {levels} (0: the data's)"
    else:
        found = place(layer, opened.read_at, error.offset_bytes, layer.geometry.params.data_block_bytes)
        paths = ["/" + text_of(path) for path in found.paths]
        record |= {"region": found.region, "region_offset_bytes": found.offset_bytes, "detail": found.detail}
        record |= {"paths": paths}
        message += f": at byte {error.offset_bytes}, in the {found.region} ({found.detail})"
        if paths:
            message += ": " + ", ".join(map(printable, paths))
    return BadLayerFile(message, record)


def _tar_diff_id(opened: _Opened) -> str:
    sha256 = hashlib.sha256()
    for piece in opened.tar():
        sha256.update(piece)
    return "sha256:" + sha256.hexdigest()


def _identity_of(layer: LayerFile) -> str:
    """What is said of a parents layer must not be taken for a layer's diff ID."""
    return "identity" if layer.format.of_chain else "diff_id"


def _digest(raw: bytes | None) -> str | None:
    return "sha256:" + raw.hex() if raw is not None else None


def inspect(path: Path, root_hash: str | None = None) -> dict[str, Any]:
    """What the file says of itself. Raises FormatError; one of the index alone becomes `index_error`."""
    root = parse_root_hash(root_hash) if root_hash is not None else None
    with _opened(path) as opened:
        layer = opened.layer
        geometry, params = layer.geometry, layer.geometry.params
        root = root or layer.root_hash
        record: dict[str, Any] = {
            "format": layer.format.name,
            _identity_of(layer): _digest(layer.diff_id),
            "root_hash": root.hex() if root else None,
            "tar_offset_bytes": layer.format.head_bytes if layer.split is None else None,
            "tar_size_bytes": layer.tar_size_bytes,
            "index_offset_bytes": layer.index_offset_bytes,
            "data_size_bytes": layer.data_size_bytes,
            "tree_size_bytes": geometry.tree_size_bytes,
            "file_size_bytes": layer.file_size_bytes,
            "data_block_bytes": params.data_block_bytes,
            "hash_block_bytes": params.hash_block_bytes,
            "data_blocks": geometry.data_blocks,
            "tree_levels": len(geometry.levels),
            "salt": params.salt.hex(),
            "entries": layer.entries,
            "dm_table": dm_table("DEVICE", geometry, root) if root else None,
            "veritysetup": veritysetup.command_line(_shell_path(path), geometry, root.hex()) if root else None,
            "superblock": _superblock(opened),
            "regions": [
                {"name": region.name, "offset_bytes": region.offset_bytes, "size_bytes": region.size_bytes}
                for region in layer.regions()
            ],
            "levels": [
                {"level": len(geometry.levels) - 1 - depth, "offset_bytes": layer.data_size_bytes + offset, "blocks": n}
                for depth, (offset, n) in enumerate(geometry.levels)
            ],
        }
        try:
            record |= _counts(opened)
        except BlockdevError as error:
            record["index_error"] = str(error)
    return record


def _shell_path(path: Path) -> str:
    """As it is, for a command line; what is not UTF-8 is escaped all the same."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _superblock(opened: _Opened) -> dict[str, Any]:
    layer = opened.layer
    record: dict[str, Any] = {"file_system": layer.format.file_system, "block_bytes": layer.format.block_bytes}
    if layer.format.file_system == "erofs":
        superblock = erofs.Superblock.unpack(
            opened.read_at(erofs.SUPERBLOCK_OFFSET_BYTES, erofs.Superblock.LAYOUT.size)
        )
        raw = superblock.uuid.hex()
        uuid = "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
        return record | {"uuid": uuid, "inodes": superblock.inodes, "root_nid": superblock.root_nid}
    return record | {"inodes": layer.entries, "inode_table_offset_bytes": layer.index_offset_bytes}


def _counts(opened: _Opened) -> dict[str, Any]:
    """By a walk of the index. Raises FormatError, LimitExceeded."""
    reader = opened.index()
    kinds: Counter[str] = Counter()
    inodes: set[int] = set()
    names = 0
    for entry in reader.walk():
        names += 1
        if entry.inode in inodes:
            kinds["further names of hardlinked files"] += 1
            continue
        inodes.add(entry.inode)
        whiteout = stat.S_ISCHR(entry.mode) and entry.rdev == (0, 0)
        kinds["whiteouts" if whiteout else _KINDS[stat.S_IFMT(entry.mode)]] += 1
        if b"trusted.overlay.opaque" in entry.xattrs:
            kinds["opaque directories"] += 1
        if entry.xattrs:
            kinds["with xattrs"] += 1
    warnings = {"inodes without a name": opened.layer.entries - len(inodes)}
    if isinstance(reader, tarfs_reader.Reader):
        warnings["names that the kernel does not show"] = reader.hidden_names
    return {
        "names": names,
        "types": dict(sorted(kinds.items())),
        "warnings": {what: count for what, count in warnings.items() if count},
    }


def layer_path(argument: str) -> bytes:
    """As a user may write it: with or without slashes around it."""
    return os.fsencode(argument).strip(b"/")


def entries(path: Path, below: bytes | None = None) -> Iterator[dict[str, Any]]:
    """Raises FormatError, LimitExceeded, NotInLayer."""
    with _opened(path) as opened:
        walk = opened.index().walk()
        for entry in walk if not below else at_or_below(walk, [below]):
            yield {
                "path": "/" + text_of(entry.path),
                "mode": f"{entry.mode:06o}",
                "uid": entry.uid,
                "gid": entry.gid,
                "size_bytes": entry.size_bytes,
                "mtime": entry.mtime[0],
                "mtime_ns": entry.mtime[1],
                "nlink": entry.nlink,
                "inode": entry.inode,
                "rdev": f"{entry.rdev[0]}:{entry.rdev[1]}",
                "link": text_of(entry.link),
                "xattrs": {text_of(name): value.hex() for name, value in entry.xattrs.items()},
            }


def extract(
    path: Path,
    directory: Path,
    paths: Sequence[bytes] = (),
    *,
    root_hash: str | None = None,
    oci_whiteouts: bool = False,
    progress: ProgressBytes = _quiet,
) -> dict[str, Any]:
    """Raises BadLayerFile before anything is made; FormatError, LimitExceeded, KernelError, NotInLayer."""
    root = parse_root_hash(root_hash) if root_hash is not None else None
    with _opened(path) as opened:
        layer = opened.layer
        if root is not None:
            _verify(opened, root, progress)
        walk = opened.index().walk()
        if paths:
            for _ in at_or_below(opened.index().walk(), paths):  # is all of it there?
                pass
            walk = at_or_below(walk, paths, parents=True)
        done = extraction.extract(
            walk,
            opened.fd,
            directory,
            data_bytes_max=layer.tar_size_bytes,
            every_inode=layer.format.file_system == "tar",
            oci_whiteouts=oci_whiteouts,
            progress=lambda data_bytes: progress(data_bytes, layer.tar_size_bytes),
        )
    return {"entries": done.entries, "data_size_bytes": done.data_size_bytes, "warnings": done.warnings}


def tar(
    path: Path, output: Path | None, *, diff_id: str | None = None, progress: ProgressBytes = _quiet
) -> dict[str, Any]:
    """To a file, or to standard output. Raises FormatError, DigestMismatch; a file is then as it was."""
    _check_diff_id(diff_id)
    with _opened(path) as opened:
        if opened.layer.format.of_chain:
            raise FormatError(f"{path} has the format {opened.layer.format.name}: there is no tar of it")
        if output is None:
            return _write_tar(opened, 1, diff_id, progress)
        with _replacing(output) as fd:
            record = _write_tar(opened, fd, diff_id, progress)
            os.fsync(fd)
        return record


def _write_tar(opened: _Opened, fd: int, diff_id: str | None, progress: ProgressBytes) -> dict[str, Any]:
    layer = opened.layer
    sha256 = hashlib.sha256()
    done = 0
    for piece in opened.tar():
        sha256.update(piece)
        write_all(fd, piece)
        done += len(piece)
        progress(done, layer.tar_size_bytes)
    found = "sha256:" + sha256.hexdigest()
    for expected, whose in ((_digest(layer.diff_id), "the identity record has"), (diff_id, "asked for was")):
        if expected not in (None, found):
            raise DigestMismatch(f"the tar in the layer file has the diff ID {found}; {whose} {expected}")
    return {"diff_id": found, "tar_size_bytes": done, "checked": bool(layer.diff_id or diff_id)}


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def file_content(path: Path, name: bytes) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """Of a regular file in the layer. Raises FormatError, NotInLayer."""
    with _opened(path) as opened:
        entry = next(at_or_below(opened.index().walk(), [name]))  # or it raises that there is none
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFLNK:
            raise NotInLayer(f"/{text_of(name)} is a symlink to {text_of(entry.link)}, which is not followed")
        if kind != stat.S_IFREG:
            raise NotInLayer(f"/{text_of(name)} is no regular file")
        yield entry, opened.data(entry)


def diff(before: Path, after: Path) -> Iterator[dict[str, Any]]:
    """Raises FormatError, LimitExceeded."""
    with _opened(before) as old, _opened(after) as new:
        sides = [(opened.layer, opened.read_at) for opened in (old, new)]
        for found in differences(*sides):
            yield _difference(found)


def _difference(found: Difference) -> dict[str, Any]:
    def shown(name: str, value: Value) -> Any:
        if isinstance(value, bytes):
            if name in ("link", "same file as"):
                return text_of(value)
            return value.hex()
        if name == "mode" and isinstance(value, int):
            return f"{value:06o}"
        return list(value) if isinstance(value, tuple) else value

    changed = {name: [shown(name, value) for value in pair] for name, pair in found.attributes.items()}
    return {"path": "/" + text_of(found.path), "change": found.change, "attributes": changed}
