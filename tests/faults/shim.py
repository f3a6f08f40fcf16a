# SPDX-License-Identifier: Apache-2.0
"""shim.c, built and spoken to: which calls a daemon has made below its root, and which one is to fail."""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness import run

SOURCE: Final = Path(__file__).parent / "shim.c"
_HEAD: Final = struct.Struct("<6I64I")
_ENTRY: Final = struct.Struct("<3I116s")
_LOGGED: Final = 8192
_HEX: Final = re.compile(r"[0-9a-f]{32,64}")
_STAGED: Final = re.compile(r"staging/[^/]*")
_NUMBER: Final = re.compile(r"(?<=/)[0-9a-f]{1,8}(?=/|$)")
_MOVED: Final = re.compile(r"[0-9a-f]{16}-\d+")


def build(directory: Path) -> Path:
    target = directory / "shim.so"
    run("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", target, SOURCE, "-ldl")
    return target


def functions() -> list[str]:
    """In the order of their numbers."""
    text = SOURCE.read_text()
    listed = text[text.index("#define FUNCTIONS(X)") : text.index("enum function")]
    return re.findall(r"X\((\w+)\)", listed)


@dataclass(frozen=True)
class Call:
    function: str
    worker: bool
    error: int  # with which it failed; 0 where it did not
    path: str  # below the root

    @property
    def place(self) -> str:
        """The kind of the file: names that are different each time stand for themselves."""
        path = _STAGED.sub("staging/*", self.path.removesuffix(" (deleted)"))
        path = _MOVED.sub("*", _HEX.sub("*", path))
        return ("worker: " if self.worker else "") + _NUMBER.sub("*", path)


class Shim:
    """The page that it shares with the daemon of `root`."""

    def __init__(self, library: Path, directory: Path, root: Path) -> None:
        directory.mkdir(exist_ok=True)
        page = directory / "faults"
        size = _HEAD.size + _LOGGED * _ENTRY.size
        page.write_bytes(bytes(size))
        page.chmod(0o666)
        with page.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.functions = functions()
        self.env = {
            "LD_PRELOAD": str(library),
            "TARDEV_FAULT_ROOT": str(root),
            "TARDEV_FAULT_CONTROL": str(page),
        }

    def arm(self, function: str = "", nth: int = 0, error: int = 0, *, lasting: bool = False) -> None:
        """Counting begins anew; without a function nothing fails. `lasting`: then all that takes space does, too."""
        self._map[:] = bytes(len(self._map))
        number = self.functions.index(function) if function else 0
        self._map[: 6 * 4] = struct.pack("<6I", number, nth, error, lasting, 0, 0)

    def disarm(self) -> None:
        """What was counted stays."""
        self._map[4:8] = bytes(4)

    @property
    def fired(self) -> int:
        return int(struct.unpack_from("<I", self._map, 16)[0])

    def calls(self) -> list[Call]:
        (total,) = struct.unpack_from("<I", self._map, 20)
        assert total <= _LOGGED, "more calls than the page has room for"
        found = []
        for number in range(total):
            function, worker, error, path = _ENTRY.unpack_from(self._map, _HEAD.size + number * _ENTRY.size)
            text = path.rstrip(b"\0").decode("utf-8", "replace")
            found.append(Call(self.functions[function], bool(worker), error, text))
        return found

    def failed(self) -> list[Call]:
        return [call for call in self.calls() if call.error]
