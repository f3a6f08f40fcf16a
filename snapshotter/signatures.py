# SPDX-License-Identifier: Apache-2.0
"""Which layers may be committed where signatures are required: the store directory, and who is trusted.

Files are looked at at each question and read again when they have changed. A broken one is a warning, once for each
state of it, and its signatures count for nothing.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from cryptography import x509

from policy import signature, signature_store
from policy.errors import SignatureError
from snapshotter.errors import FailedPrecondition
from snapshotter.log import get_logger
from snapshotter.metastore import Layer

FILES_MAX: Final = 1024
# Of all files together; what is kept of them in memory is about as much.
BYTES_MAX: Final = 32 << 20
_TRIED_MAX: Final = 16  # signatures of one root hash

_T = TypeVar("_T")
_State: TypeAlias = tuple[int, int, int, int, int]


@dataclass(slots=True)
class _Read(Generic[_T]):
    """Files as they were last read. `broken`: each one's reason."""

    states: dict[Path, _State] = field(default_factory=dict)
    found: dict[Path, _T] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)


class Signatures:
    def __init__(self, certificates: Sequence[Path], store: Path) -> None:
        self._certificates, self._store = certificates, store
        self._trusted: _Read[list[x509.Certificate]] = _Read()
        self._signed: _Read[dict[str, list[bytes]]] = _Read()
        self._reading = threading.Lock()
        self._log = get_logger()

    async def look(self) -> None:
        """At the start: what is broken is said then, not with the first pull."""
        await asyncio.to_thread(self._read)

    async def check(self, layers: Sequence[Layer]) -> None:
        """Raises FailedPrecondition for the first that has no good signature."""
        await asyncio.to_thread(self._check, layers)

    def _check(self, layers: Sequence[Layer]) -> None:
        with self._reading:
            self._read()
            trusted = [each for found in self._trusted.found.values() for each in found]
            for layer in layers:
                why = self._why_not(layer.root_hash, trusted)
                if why:
                    raise FailedPrecondition(
                        f"layer {layer.diff_id} (format {layer.format}, root hash {layer.root_hash}): {why};"
                        " signatures are required here"
                    )

    def _why_not(self, root_hash: str, trusted: Sequence[x509.Certificate]) -> str:
        """Empty where one of its signatures is good."""
        signatures = [each for found in self._signed.found.values() for each in found.get(root_hash, ())]
        why = ""
        for each in signatures[:_TRIED_MAX]:
            try:
                signature.verify(each, root_hash, trusted)
                return ""
            except SignatureError as error:
                why = f"its signature does not count: {error}"
        broken = len(self._signed.broken)
        more = f" ({broken} broken files there: see the log of tardev-snapshotter)" if broken else ""
        return (why or f"it has no signature in {self._store}") + more

    def _read(self) -> None:
        self._refresh(self._trusted, {path: _state(path) for path in self._certificates}, signature.load_certificates)
        self._refresh(self._signed, self._files(), _by_root_hash)

    def _files(self) -> dict[Path, _State | None]:
        try:
            with os.scandir(self._store) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            # Once, as for a file: the state of a directory that cannot be read.
            self._tell(self._signed, self._store, str(error))
            return {self._store: None}
        states: dict[Path, _State | None] = {}
        used = 0
        for number, name in enumerate(names):
            path = self._store / name
            state = _state(path)
            used += state[3] if state else 0
            if number >= FILES_MAX or used > BYTES_MAX:
                self._tell(self._signed, path, f"over {FILES_MAX} files or {BYTES_MAX} bytes in all")
                state = None
            states[path] = state
        return states

    def _refresh(self, read: _Read[_T], now: dict[Path, _State | None], load: Callable[[Path], _T]) -> None:
        for path in [path for path in {*read.states, *read.broken} if path not in now]:
            for old in (read.states, read.found, read.broken):
                old.pop(path, None)
        for path, state in now.items():
            if state is not None and read.states.get(path) == state:
                continue
            read.found.pop(path, None)
            read.states.pop(path, None)
            if state is None:
                if path not in read.broken:
                    self._tell(read, path, "cannot be read, or is no regular file")
                continue
            read.states[path] = state
            try:
                read.found[path] = load(path)
                read.broken.pop(path, None)
            except (SignatureError, OSError, MemoryError) as error:
                self._tell(read, path, str(error))

    def _tell(self, read: _Read[_T], path: Path, why: str) -> None:
        if read.broken.get(path) != why:
            read.broken[path] = why
            self._log.warning("a file of signatures or certificates counts for nothing", file=str(path), reason=why)


def _state(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    if not path.is_file():
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_ctime_ns


def _by_root_hash(path: Path) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for image in signature_store.read(path):
        for layer in image.layers:
            of_one = found.setdefault(layer.root_hash, [])
            if layer.signature not in of_one and len(of_one) < _TRIED_MAX:
                of_one.append(layer.signature)
    return found
