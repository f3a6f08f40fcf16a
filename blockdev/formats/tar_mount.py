# SPDX-License-Identifier: Apache-2.0
"""An EROFS file system of metadata alone, whose files lie in a tar on another device (mount option `device=`).

So a kernel without the module `tar` mounts the tar of a `tarfs` layer. The tree is that of `tar-index`, which is
what containerd unpacks; Microsoft's module shows another one where docs/formats.md says that `tarfs` comes out
wrong. It is no layer format: nothing stores it, it is made again from the tar whenever it is needed.

    0      1024  zero
    1024   128   superblock with one extra device (Linux: fs/erofs/erofs_fs.h, erofs_super_block)
    2048   128   that device's slot (erofs_deviceslot): its blocks, and where they are taken to lie
    4096   M     metadata area, zeros up to a multiple of 4096; the tar is taken to follow
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from blockdev.errors import LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.erofs_writer import ContentsInTar, MetadataWriter
from blockdev.formats.file_tree import FileTree
from blockdev.formats.layer_file import ALIGNMENT_BYTES, align, layer_uuid
from blockdev.formats.limits import Limits
from blockdev.formats.tar import TarScanner
from verity.buffers import Buffer

BLOCK_BYTES: Final = 512  # of the file system: a member's data begins at any multiple of it
_METADATA_OFFSET_BYTES: Final = 4096
_SLOT_OFFSET_BYTES: Final = 2048
_SLOT_BYTES: Final = 128
_INCOMPAT_DEVICE_TABLE: Final = 0x8
# Of the superblock: feature_incompat; extra_devices and devt_slotoff, the latter in slots
_INCOMPAT_AT, _DEVICES_AT = 80, 86
_DEVICES: Final = struct.Struct("<HH")
_SLOT: Final = struct.Struct("<64sII56x")  # tag, blocks, uniaddr
assert _SLOT.size == _SLOT_BYTES
_BLOCKS_MAX: Final = (1 << 32) - 2  # Linux: EROFS_NULL_ADDR


class TarMountWriter:
    """`feed` it the tar in pieces of any size, then `write` the file system.

    Both raise FormatError, UnsupportedError and LimitExceeded, as the builder of `tar-index` does.
    """

    def __init__(self, limits: Limits) -> None:
        self._tree = FileTree(limits)
        self._scanner = TarScanner(self._tree.add, limits)
        self._tar_size_bytes = 0

    def feed(self, data: Buffer) -> None:
        self._tar_size_bytes += memoryview(data).nbytes
        self._scanner.feed(data)

    def write(self, write: Callable[[Buffer], object], diff_id: bytes) -> int:
        """Front to back, once; the size in bytes, a multiple of 4096. `diff_id` gives the UUID."""
        self._scanner.close()
        contents = ContentsInTar(0, BLOCK_BYTES)
        metadata = MetadataWriter(self._tree.finish(), BLOCK_BYTES, contents)
        area = metadata.layout()
        size = contents.offset_bytes = align(_METADATA_OFFSET_BYTES + area.size_bytes, ALIGNMENT_BYTES)
        tar_blocks = -(-self._tar_size_bytes // BLOCK_BYTES)
        if size // BLOCK_BYTES + tar_blocks > _BLOCKS_MAX:
            raise LimitExceeded("layer is over the 2 TiB that 32-bit block addresses reach")
        superblock = bytearray(
            erofs.Superblock(
                block_bits=BLOCK_BYTES.bit_length() - 1,
                root_nid=area.root_nid,
                inodes=area.inodes,
                blocks=size // BLOCK_BYTES,
                meta_block=_METADATA_OFFSET_BYTES // BLOCK_BYTES,
                uuid=layer_uuid("tar-mount", diff_id),
            )
            .pack()
            .ljust(BLOCK_BYTES, b"\0")
        )
        struct.pack_into("<I", superblock, _INCOMPAT_AT, _INCOMPAT_DEVICE_TABLE)
        _DEVICES.pack_into(superblock, _DEVICES_AT, 1, _SLOT_OFFSET_BYTES // _SLOT_BYTES)
        struct.pack_into("<I", superblock, 4, erofs.crc32c(superblock))
        head = bytearray(_METADATA_OFFSET_BYTES)
        head[erofs.SUPERBLOCK_OFFSET_BYTES : erofs.SUPERBLOCK_OFFSET_BYTES + BLOCK_BYTES] = superblock
        _SLOT.pack_into(head, _SLOT_OFFSET_BYTES, b"tar", tar_blocks, size // BLOCK_BYTES)
        write(bytes(head))
        metadata.emit(write, _METADATA_OFFSET_BYTES)
        write(bytes(size - _METADATA_OFFSET_BYTES - area.size_bytes))
        return size
