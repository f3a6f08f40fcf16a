# SPDX-License-Identifier: Apache-2.0
"""Rules about system calls, and the classic BPF program that the kernel runs for each of them. Pure.

Linux: include/uapi/linux/seccomp.h, include/uapi/linux/bpf_common.h, include/uapi/linux/audit.h; man 2 seccomp.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

RET_KILL_PROCESS: Final = 0x8000_0000
RET_ERRNO: Final = 0x0005_0000
RET_ALLOW: Final = 0x7FFF_0000

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
_NUMBER_OFFSET: Final = 0
_ARCH_OFFSET: Final = 4
_ARGUMENTS_OFFSET: Final = 16

# A filter word: BPF_LD | BPF_W | BPF_ABS, and so on.
_LOAD: Final = 0x20
_AND: Final = 0x54
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_OR_EQUAL: Final = 0x35
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")

# Numbers with this bit are x32's: another ABI behind the same AUDIT_ARCH_X86_64.
_X32_BIT: Final = 0x4000_0000

# AUDIT_ARCH_*: ELF machine, 64 bits, little endian.
AUDIT_ARCHS: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

# Names to their numbers on x86_64 (arch/x86/entry/syscalls/syscall_64.tbl) and aarch64
# (include/uapi/asm-generic/unistd.h, which lacks what has a newer form).
NUMBERS: Final[Mapping[str, tuple[int, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "preadv2": (327, 286),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "close": (3, 57),
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "mprotect": (10, 226),
    "futex": (202, 98),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "clone": (56, 220),
    "clone3": (435, 435),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "tgkill": (234, 131),
    "sigaltstack": (131, 132),
    "prctl": (157, 167),
    "open": (2, None),
    "openat": (257, 56),
    "stat": (4, None),
    "lstat": (6, None),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getxattr": (191, 8),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "flistxattr": (196, 13),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "lseek": (8, 62),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "prlimit64": (302, 261),
    "getcpu": (309, 168),
}


class Argument(NamedTuple):
    """Argument `position`, counted from 0, of which `mask` is looked at, must be one of `values`.

    Only its lower 32 bits count: so it is with the kernel itself for descriptors, flags, protections
    and the operations of futex.
    """

    position: int
    values: tuple[int, ...]
    mask: int = 0xFFFF_FFFF


class Rule(NamedTuple):
    """The call goes through if all of `arguments` hold, and otherwise is what no rule names."""

    call: str
    arguments: tuple[Argument, ...] = ()


class Refusal(NamedTuple):
    """The call fails with `error`, and the caller goes on."""

    call: str
    error: int = errno.EPERM


def machine_here(machine: str) -> str | None:
    """`machine` as uname(2) has it, if filters can be written for it and this interpreter."""
    return machine if machine in AUDIT_ARCHS and sys.maxsize > 1 << 32 else None


def number_of(call: str, machine: str) -> int | None:
    """None where the architecture does not have the call."""
    return NUMBERS[call][machine == "aarch64"]


def assemble(rules: Iterable[Rule], refusals: Iterable[Refusal], machine: str) -> bytes:
    """An array of struct sock_filter. What is neither allowed nor refused kills the process."""
    out = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCHS[machine]),
        (_RETURN, 0, 0, RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    if machine == "x86_64":
        out += [(_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, RET_KILL_PROCESS)]
    blocks = [(rule.call, _allowed(rule)) for rule in rules]
    blocks += [(refused.call, [(_RETURN, 0, 0, RET_ERRNO | refused.error)]) for refused in refusals]
    for call, block in blocks:
        number = number_of(call, machine)
        if number is not None:
            # The block ends in a return, so that the accumulator behind it still holds the number.
            out += [(_JUMP_EQUAL, 0, len(block), number), *block]
    out.append((_RETURN, 0, 0, RET_KILL_PROCESS))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in out)


def _allowed(rule: Rule) -> list[tuple[int, int, int, int]]:
    out: list[tuple[int, int, int, int]] = []
    for argument in rule.arguments:
        out.append((_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument.position))
        if argument.mask != 0xFFFF_FFFF:
            out.append((_AND, 0, 0, argument.mask))
        for place, value in enumerate(argument.values):
            # To the instruction behind the return that stands behind the comparisons.
            out.append((_JUMP_EQUAL, len(argument.values) - place, 0, value))
        out.append((_RETURN, 0, 0, RET_KILL_PROCESS))
    out.append((_RETURN, 0, 0, RET_ALLOW))
    return out
