# SPDX-License-Identifier: Apache-2.0
"""Loop devices (Linux: include/uapi/linux/loop.h), for kernels that cannot mount EROFS from a file."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from blockdev.errors import KernelExhausted, kernel_error

_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LO_FLAGS_READ_ONLY: Final = 1
_LO_FLAGS_AUTOCLEAR: Final = 4
# struct loop_config: u32 fd, u32 block_size, struct loop_info64 (lo_flags at 52 of its 232), u64 reserved[8]
_CONFIG: Final = struct.Struct("<II52xI176x64x")
assert _CONFIG.size == 304
_ATTEMPTS: Final = 32


def attach_read_only(file_fd: int, block_bytes: int) -> int:
    """A loop device over the file, gone by itself with its last user; an open descriptor of it.

    Raises KernelError.
    """
    config = _CONFIG.pack(file_fd, block_bytes, _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise kernel_error(f"no loop devices: {error}", error.errno) from None
    try:
        for _ in range(_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process was quicker
                    raise
            else:
                return device
    except OSError as error:
        raise kernel_error(f"loop device could not be set up: {error}", error.errno) from None
    finally:
        os.close(control)
    raise KernelExhausted(f"no free loop device in {_ATTEMPTS} attempts")
