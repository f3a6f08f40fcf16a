# SPDX-License-Identifier: Apache-2.0
"""What `_sandbox.c` has, through ctypes: for an installation without a compiler. Each raises OSError."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_GET_ACTION_AVAIL: Final = 2
# x86_64 and the generic table, which aarch64 and riscv64 use.
_CAPSET, _SECCOMP = (126, 317) if os.uname().machine == "x86_64" else (91, 277)
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_RESTRICT_SELF: Final = 446


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _call(number: int, *arguments: Any) -> int:
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words))


def prctl(option: int, *arguments: int) -> int:
    return _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4])))


def capset(header: bytes, data: bytes) -> int:
    # A copy: the kernel writes its version into the header that it does not know.
    return _call(_CAPSET, ctypes.create_string_buffer(header, len(header)), data)


def landlock_create_ruleset(attributes: bytes | None, flags: int) -> int:
    return _call(_LANDLOCK_CREATE_RULESET, attributes, len(attributes or b""), flags)


def landlock_restrict_self(ruleset_fd: int, flags: int) -> int:
    return _call(_LANDLOCK_RESTRICT_SELF, ruleset_fd, flags)


def seccomp_action_available(action: int) -> int:
    return _call(_SECCOMP, _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(ctypes.c_uint32(action)))


def seccomp_set_filter(program: bytes, flags: int) -> int:
    fprog = _Program(len(program) // 8, program)
    return _call(_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog))
