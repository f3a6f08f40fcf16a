# SPDX-License-Identifier: Apache-2.0
"""`kata-overlay SOURCE TARGET -o OPTIONS`: what `mount.fuse3` starts for a mount of the contract `kata-tardev`.

containerd looks into a container's root file system on the host where the image has a user by name or a volume
(containerd: core/mount/mount_linux.go). The layers are then mounted here, read-only and without verity: what is seen
decides about user and volume of a container, which the policy in the VM checks for itself.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from blockdev.errors import BlockdevError
from blockdev.formats.layer_file import LayerFile, open_layer_file
from blockdev.formats.limits import Limits
from blockdev.formats.tar_mount import TarMountWriter
from blockdev.kernel import mounts
from blockdev.kernel.stack import mount_stack
from snapshotter.contracts.kata_tardev import NamedLayer, named_layers
from snapshotter.errors import one_line

_PIECE_BYTES: Final = 1 << 20


def mounting(layer: NamedLayer) -> Callable[[Path], None]:
    """Raises BlockdevError, OSError, ValueError where it is no layer file of that file system."""
    with _open(layer.path) as (_, found):
        if found.format.file_system != layer.file_system:
            raise ValueError(
                f"{layer.path} has format {found.format.name}, which is not mounted as {layer.file_system}"
            )
    if layer.file_system == "tar":
        return partial(_mount_tar, layer.path)
    return lambda target: mounts.mount_erofs(layer.path, target, found.format.block_bytes)


def _mount_tar(path: Path, target: Path) -> None:
    """The kernel of a host has no `tar` file system: through an index that is made here."""
    with _open(path) as (fd, found):
        writer = TarMountWriter(Limits())
        with mmap.mmap(fd, found.tar_size_bytes, prot=mmap.PROT_READ) as tar, memoryview(tar) as view:
            for at in range(0, found.tar_size_bytes, _PIECE_BYTES):
                writer.feed(view[at : at + _PIECE_BYTES])
        index_fd = os.memfd_create("index", os.MFD_CLOEXEC)
        try:
            with os.fdopen(index_fd, "wb", closefd=False) as index:
                writer.write(index.write, bytes(32))
            mounts.mount_tar(index_fd, path, target)
        finally:
            os.close(index_fd)


@contextmanager
def _open(path: Path) -> Iterator[tuple[int, LayerFile]]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd, open_layer_file(lambda offset, count: os.pread(fd, count, offset), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kata-overlay", description="mounts a container's layers, read-only")
    parser.add_argument("source", help="of no meaning")
    parser.add_argument("target", type=Path)
    parser.add_argument("-o", dest="options", action="append", default=[], help="the mount's options")
    given = parser.parse_args(arguments)
    try:
        layers = named_layers(given.options)
        if not layers:
            raise ValueError("no option names a layer")
        mount_stack([mounting(layer) for layer in layers], Path(os.path.realpath(given.target)))
    except (BlockdevError, OSError, ValueError) as error:
        sys.stderr.write(f"kata-overlay: {one_line(str(error))}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
