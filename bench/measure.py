# SPDX-License-Identifier: Apache-2.0
"""Wall time, CPU, peak memory and bytes written of programs that end, and of servers that go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import CHECKOUT

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_RUSAGE_BLOCK_BYTES = 512  # man 2 getrusage: ru_oublock


@dataclass(frozen=True)
class Figures:
    """`written_bytes`: of files, as the kernel accounts them to who made the pages dirty (man 5 proc_pid_io)."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int
    said: dict[str, Any] = field(default_factory=dict)


def _start(argv: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.stages", *map(str, argv)],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=CHECKOUT,
    )  # fmt: skip


def program(*argv: str | Path) -> Figures:
    """One of bench.stages to its end, its children counted in; wall time as it says itself."""
    os.sync()  # what the one before has left to the disk is not this one's
    return _finish(_start(argv), argv)


def at_once(*argvs: Sequence[str | Path]) -> Figures:
    """Some of bench.stages side by side: as long as the slowest of them says itself."""
    os.sync()
    processes = [_start(argv) for argv in argvs]
    each = [_finish(process, argv) for process, argv in zip(processes, argvs, strict=True)]
    return Figures(
        max(figures.wall_seconds for figures in each), sum(figures.cpu_seconds for figures in each),
        max(figures.peak_bytes for figures in each), sum(figures.written_bytes for figures in each),
    )  # fmt: skip


def _finish(process: subprocess.Popen[bytes], argv: Sequence[str | Path]) -> Figures:
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(arg) for arg in argv])
    said = json.loads(text)
    return Figures(
        said.pop("seconds"), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024,
        used.ru_oublock * _RUSAGE_BLOCK_BYTES, said,
    )  # fmt: skip


class Watch:
    """What some servers, their children in between included, use while the block runs."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self.figures: Figures | None = None

    def __enter__(self) -> Watch:
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # peak memory counts from here (man 5 proc)
        self._before = [self._read(pid) for pid in self._pids]
        self._started = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        wall = time.monotonic() - self._started
        after = [self._read(pid) for pid in self._pids]
        cpu, written = (sum(new[i] - old[i] for new, old in zip(after, self._before, strict=True)) for i in (0, 1))
        self.figures = Figures(wall, cpu, max(int(new[2]) for new in after), int(written))

    @staticmethod
    def _read(pid: int) -> tuple[float, float, float]:
        """(CPU seconds, bytes written, peak resident bytes), waited-for children in the first two."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu = sum(int(field) for field in fields[11:15]) / _TICKS_PER_SECOND
        written = re.search(r"^write_bytes: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
        peak = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert written
        assert peak
        return cpu, int(written[1]), int(peak[1]) * 1024
