# SPDX-License-Identifier: Apache-2.0
"""How QEMU is to run the guest: with KVM where that runs one, else in software (TCG).

That /dev/kvm opens says little: inside some virtual machines it does, and every guest dies. So the image is
booted once, and the answer kept beside it until the host boots again. TARDEV_ACCEL=kvm or =tcg decides otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from uvm.errors import MachineError
from uvm.image import Image

KINDS: Final = ("kvm", "tcg")
VARIABLE: Final = "TARDEV_ACCEL"
PROBE_SECONDS: Final = 3.0
_MEMORY: Final = "accelerator.json"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


async def chosen(image: Image, boots_with_kvm: Callable[[], Awaitable[bool]]) -> str:
    """One of KINDS; `boots_with_kvm` is asked at most once for each boot of the host. Raises MachineError."""
    if override := os.environ.get(VARIABLE):
        if override not in KINDS:
            raise MachineError(f"{VARIABLE}={override} is none of {', '.join(KINDS)}")
        return override
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    question = _question(image)
    answer = _remembered(image, question)
    if answer is None:
        answer = "kvm" if await boots_with_kvm() else "tcg"
        _remember(image, question, answer)
    return answer


def _question(image: Image) -> list[object]:
    """What an answer holds for: this kernel of the guest, and this boot of the host."""
    status = image.kernel.stat()
    return [_BOOT_ID.read_text().strip(), status.st_size, status.st_mtime_ns]


def _remembered(image: Image, question: list[object]) -> str | None:
    try:
        asked, answer = json.loads((image.directory / _MEMORY).read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    return answer if asked == question and answer in KINDS else None


def _remember(image: Image, question: list[object], answer: str) -> None:
    draft = image.directory / f".{_MEMORY}.{os.getpid()}"
    with contextlib.suppress(OSError):  # an image of somebody else's: then each run asks
        draft.write_text(json.dumps([question, answer]))
        draft.rename(image.directory / _MEMORY)
