# SPDX-License-Identifier: Apache-2.0
"""runc and crun: an overlay over EROFS mounts that the daemon keeps (Linux: filesystems/overlayfs.rst)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from snapshotter.contracts.mount import Lower, Mount, Place

FORMATS: Final = frozenset({"tar-index", "erofs-4k"})
PLACE: Final = Place.MOUNTED
ENCODINGS: Final = ("",)
ROOT_HASH_LABEL: Final = ""
NAMES_PARENTS: Final = True
COUNTS_EQUAL_ONCE: Final = True
# Overlay takes 500 lower directories (Linux: fs/overlayfs/params.h, OVL_MAX_STACK), and one of them is the upper
# directory when containerd looks in read-only, for the users of an image. The options of a mount(2) share a page:
# containerd then names directories relative to the one that they all share, here in 9 bytes each up to layer 16777215.
MAX_LAYERS: Final = 400
MIN_LAYERS: Final = 1
REMAPS_IDS: Final = True
TAKES_WRITABLE: Final = False


def container_mounts(
    lowers: Sequence[Lower], upper: Path | None, work: Path | None, encoding: str = "", writable_bytes: int = 0
) -> list[Mount]:
    # Overlay refuses a directory twice; of equal layers only the topmost can be seen.
    stack = list(dict.fromkeys(str(lower.path) for lower in lowers))
    if upper is not None and work is not None:
        return [_overlay(stack, f"upperdir={upper}", f"workdir={work}")]
    if len(stack) == 1:
        return [Mount("bind", stack[0], ("rbind", "ro"))]
    return [_overlay(stack)]


def layer_files(mounts: Sequence[Mount]) -> list[Path]:
    """None: what the mounts name are directories."""
    return []


def _overlay(stack: list[str], *more: str) -> Mount:
    # index=off: an upper directory may be mounted again while a stale mount of it lingers. The other two, which some
    # kernels turn on, leave things in lower directories alone: an upper directory would not hold its changes.
    options = ("index=off", "redirect_dir=off", "metacopy=off", *more, f"lowerdir={':'.join(stack)}")
    return Mount("overlay", "overlay", options)
