# SPDX-License-Identifier: Apache-2.0
"""A worker in the hands of somebody else: started by the launcher in place of the real one, it shuts the real
one's door by the real one's `main`, then does what PROBE in its environment names, as taken-over code would.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import mmap
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

from blockdev import workers
from blockdev.workers import builder, decompressor, sandbox
from blockdev.workers.ring import RingWriter
from tests.golden import make_tars

WITHOUT_EXTENSION: Final = "without extension"
X86_64: Final = os.uname().machine == "x86_64"
_libc: Final = ctypes.CDLL(None, use_errno=True)
_CLONE_VM_THREAD_WITHOUT_SIGHAND: Final = 0x0001_0100
_SIGCHLD: Final = 17
_CLONE_NEWUSER: Final = 0x1000_0000
_AT_FDCWD: Final = -100
_PATH: Final = ctypes.create_string_buffer(b"/etc/passwd")
_ARGV: Final = (ctypes.c_char_p * 2)(b"/bin/true", None)
_ROOM: Final = ctypes.create_string_buffer(4096)
_PAGE: Final = mmap.PAGESIZE

# On x86_64 and aarch64: asm/unistd_64.h, asm-generic/unistd.h. Calls that no worker makes, not even by mistake.
KILLED: Final[dict[str, tuple[int, int | None, tuple[Any, ...]]]] = {
    "socket": (41, 198, (1, 1, 0)),
    "socketpair": (53, 199, (1, 1, 0, _ROOM)),
    "connect": (42, 203, (0, _ROOM, 16)),
    "bind": (49, 200, (0, _ROOM, 16)),
    "sendmsg": (46, 211, (1, _ROOM, 0)),
    "recvmsg": (47, 212, (0, _ROOM, 0)),
    "execve": (59, 221, (_ARGV[0], _ARGV, None)),
    "execveat": (322, 281, (_AT_FDCWD, _ARGV[0], _ARGV, None, 0)),
    "fork": (57, None, ()),
    "vfork": (58, None, ()),
    "clone of a process": (56, 220, (_SIGCHLD, 0, 0, 0, 0)),
    "clone of half a thread": (56, 220, (_CLONE_VM_THREAD_WITHOUT_SIGHAND, 0, 0, 0, 0)),
    "clone into a user namespace": (56, 220, (_CLONE_NEWUSER | _SIGCHLD, 0, 0, 0, 0)),
    "ptrace": (101, 117, (0, 0, 0, 0)),
    "kill": (62, 129, (os.getppid(), 0)),
    "kill of all": (62, 129, (-1, 9)),
    "tkill": (200, 130, (os.getppid(), 9)),
    "pidfd_open": (434, 434, (os.getppid(), 0)),
    "pidfd_send_signal": (424, 424, (0, 9, None, 0)),
    "process_vm_readv": (310, 270, (os.getppid(), _ROOM, 1, _ROOM, 1, 0)),
    "process_vm_writev": (311, 271, (os.getppid(), _ROOM, 1, _ROOM, 1, 0)),
    "memfd_create": (319, 279, (_PATH, 0)),
    "memfd_secret": (447, 447, (0,)),
    "io_uring_setup": (425, 425, (8, _ROOM)),
    "bpf": (321, 280, (0, _ROOM, 72)),
    "perf_event_open": (298, 241, (_ROOM, 0, -1, -1, 0)),
    "userfaultfd": (323, 282, (1,)),
    "keyctl": (250, 219, (0, -3, 1)),
    "add_key": (248, 217, (_PATH, _PATH, _ROOM, 8, -3)),
    "mount": (165, 40, (_PATH, _PATH, _PATH, 4096, None)),
    "umount2": (166, 39, (_PATH, 2)),
    "fsopen": (430, 430, (_PATH, 0)),
    "open_tree": (428, 428, (_AT_FDCWD, _PATH, 1)),
    "unshare": (272, 97, (_CLONE_NEWUSER,)),
    "setns": (308, 268, (0, 0)),
    "chroot": (161, 51, (_PATH,)),
    "pivot_root": (155, 41, (_PATH, _PATH)),
    "setuid": (105, 146, (0,)),
    "setresuid": (117, 147, (0, 0, 0)),
    "setresgid": (119, 149, (0, 0, 0)),
    "setgroups": (116, 159, (0, None)),
    "capset": (126, 91, (_ROOM, _ROOM)),
    "seccomp": (317, 277, (1, 0, _ROOM)),
    "landlock_create_ruleset": (444, 444, (None, 0, 1)),
    "personality": (135, 92, (0x0400_0000,)),  # READ_IMPLIES_EXEC
    "setrlimit": (160, 164, (9, _ROOM)),
    "sched_setaffinity": (203, 122, (0, 8, _ROOM)),
    "openat2": (437, 437, (_AT_FDCWD, _PATH, _ROOM, 24)),
    "creat": (85, None, (_PATH, 0o600)),
    "truncate": (76, 45, (_PATH, 0)),
    "ftruncate": (77, 46, (1, 0)),
    "unlinkat": (263, 35, (_AT_FDCWD, _PATH, 0)),
    "mkdirat": (258, 34, (_AT_FDCWD, _PATH, 0o700)),
    "renameat2": (316, 276, (_AT_FDCWD, _PATH, _AT_FDCWD, _PATH, 0)),
    "fchmodat": (268, 53, (_AT_FDCWD, _PATH, 0o777)),
    "chdir": (80, 49, (_PATH,)),
    "dup": (32, 23, (1,)),
    "pipe2": (293, 59, (_ROOM, 0)),
    "sendfile": (40, 71, (1, 0, None, 1)),
    "splice": (275, 76, (0, None, 1, None, 1, 0)),
    "shmget": (29, 194, (0, 4096, 0o600)),
    "msgget": (68, 186, (0, 0o600)),
    "inotify_init1": (294, 26, (0,)),
    "eventfd2": (290, 19, (0, 0)),
    "epoll_create1": (291, 20, (0,)),
    "timer_create": (222, 107, (0, None, _ROOM)),
    "init_module": (175, 105, (_ROOM, 8, _PATH)),
    "kexec_load": (246, 104, (0, 0, None, 0)),
    "reboot": (169, 142, (0, 0, 0, None)),
    "wait4": (61, 260, (-1, None, 1, None)),
    "mmap of code": (9, 222, (0, _PAGE, 7, 0x22, -1, 0)),
    "mmap of a file": (9, 222, (0, _PAGE, 1, 0x2, 1, 0)),
    "mprotect to code": (10, 226, ("writable page", _PAGE, 5)),
    "pkey_mprotect": (329, 288, ("writable page", _PAGE, 5, -1)),
    "remap_file_pages": (216, 234, ("writable page", _PAGE, 0, 0, 0)),
    "futex that hands over": (202, 98, (_ROOM, 4, 0, 1, _ROOM, 0)),  # FUTEX_CMP_REQUEUE
    "futex with priorities": (202, 98, (_ROOM, 6, 0, None, None, 0)),  # FUTEX_LOCK_PI
    "read of what is only written": (0, 63, (1, _ROOM, 1)),
    "write to what is only read": (1, 64, ("read only", _ROOM, 1)),
    "write to no descriptor": (1, 64, (999, _ROOM, 1)),
}
# Calls that fail, and with what: the C library or the interpreter may make them in good faith.
REFUSED: Final[dict[str, tuple[int, int | None, tuple[Any, ...], int]]] = {
    "open": (2, None, (_PATH, 0), errno.EACCES),
    "openat": (257, 56, (_AT_FDCWD, _PATH, 0), errno.EACCES),
    "openat to create": (257, 56, (_AT_FDCWD, _PATH, 0o101, 0o600), errno.EACCES),
    "openat beside the status": (257, 56, ("status", _PATH, 0), errno.EACCES),
    "readlinkat": (267, 78, (_AT_FDCWD, _PATH, _ROOM, 100), errno.EACCES),
    "prctl(PR_SET_DUMPABLE)": (157, 167, (4, 1, 0, 0, 0), errno.EPERM),
    "prctl(PR_SET_NO_NEW_PRIVS)": (157, 167, (38, 0, 0, 0, 0), errno.EPERM),
    "prctl(PR_SET_SECCOMP)": (157, 167, (22, 0, 0, 0, 0), errno.EPERM),
    "prctl(PR_SET_SECUREBITS)": (157, 167, (28, 0, 0, 0, 0), errno.EPERM),
    "prctl(PR_CAP_AMBIENT_RAISE)": (157, 167, (47, 2, 21, 0, 0), errno.EPERM),
    "prctl(PR_SET_PDEATHSIG)": (157, 167, (1, 0, 0, 0, 0), errno.EPERM),
    "prlimit64": (302, 261, (0, 9, None, _ROOM), errno.EPERM),
    "prlimit64 of the parent": (302, 261, (os.getppid(), 9, _ROOM, None), errno.EPERM),
    "ioctl": (16, 29, (1, 0x5412, _ROOM), errno.EPERM),  # TIOCSTI
    "fcntl(F_DUPFD)": (72, 25, (1, 0, 10), errno.EPERM),
    "tgkill": (234, 131, (os.getppid(), os.getppid(), 9), errno.EPERM),
    "rt_sigaction": (13, 134, (24, None, _ROOM, 8), errno.EPERM),
}


def _number(numbers: tuple[int, int | None]) -> int:
    number = numbers[not X86_64]
    assert number is not None
    return number


def here(calls: dict[str, Any]) -> list[str]:
    """Those that this architecture has."""
    return [name for name, call in calls.items() if call[not X86_64] is not None]


def _syscall(number: int, arguments: tuple[Any, ...]) -> str:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = _libc.syscall(ctypes.c_long(number), *words)
    return f"errno {ctypes.get_errno()}" if result < 0 else f"it returned {result}"


def _calls() -> Any:
    return vars(sandbox)["_calls"]


class Given:
    """What the worker would have worked with."""

    def __init__(self, read_fd: int, status_fd: int, files: tuple[int, ...]) -> None:
        self.read_fd, self.status_fd, self.files = read_fd, status_fd, files


# Made before the door shuts, as is all that the probes bring along.
_writable_page: Final = mmap.mmap(-1, _PAGE)
_writable_page_address: Final = ctypes.addressof(ctypes.c_char.from_buffer(_writable_page))


def _machine_code(code: bytes) -> Callable[[], int]:
    page = mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return function


# push %rbx; mov $20, %eax (getpid of i386); int $0x80; pop %rbx; ret
_i386_getpid: Final = _machine_code(bytes.fromhex("53b814000000cd805bc3")) if X86_64 else None


def _call(name: str, given: Given) -> str:
    first, second, arguments = (KILLED.get(name) or REFUSED[name])[:3]
    stand_ins = {
        "writable page": ctypes.c_void_p(_writable_page_address),
        "read only": given.read_fd,
        "status": given.status_fd,
    }
    words = tuple(stand_ins[value] if isinstance(value, str) else value for value in arguments)
    return _syscall(_number((first, second)), words)


def _thread(given: Given) -> str:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(1))
    thread.start()
    thread.join()
    return f"a thread ran {len(done)} time"


def _late_import(given: Given) -> str:
    import tomllib  # not loaded by a worker, and not loaded now

    return tomllib.__name__


def _open_in_python(given: Given) -> str:
    with open("/etc/passwd") as file:
        return file.read()


def _spin(given: Given) -> str:
    while True:
        hashlib.sha256(bytes(1 << 20))


def _exhaust_memory(given: Given) -> str:
    held = []
    while True:
        held.append(bytes(64 << 20))


def _exhaust_file(given: Given) -> str:
    if given.files:
        os.pwrite(given.files[0], b"x", 1 << 50)
    else:
        os.write(2, bytes(1 << 20))
        os.write(2, b"x")
    return "written"


def _traceback(given: Given) -> str:
    """An error of no kind that is expected, printed by the interpreter as it prints those."""
    sys.excepthook(ValueError, ValueError("a word"), None)
    raise ValueError("a word")


DEEDS: Final[dict[str, Callable[[Given], str]]] = {
    "thread": _thread,
    "late import": _late_import,
    "open in Python": _open_in_python,
    "x32 getpid": lambda given: _syscall(0x4000_0000 | 39, ()),
    "x32 read": lambda given: _syscall(0x4000_0000, (given.read_fd, _ROOM, 1)),
    "i386 getpid": lambda given: f"it returned {_i386_getpid() if _i386_getpid else 0}",
    "clone3": lambda given: _syscall(435, (_ROOM, 88)),
    "segfault": lambda given: str(ctypes.string_at(0)),
    "abort": lambda given: str(_libc.abort()),
    "spin": _spin,
    "memory": _exhaust_memory,
    "file size": _exhaust_file,
    "traceback": _traceback,
    WITHOUT_EXTENSION: lambda given: _calls().__name__,
}


def _tar(name: str) -> bytes:
    tar = make_tars.T()
    tar.f(
        "expected" if name == "expected" else "other", b"other bytes" if name != "expected" else b"what was asked for"
    )
    if name == "bigger":
        tar.f("more", bytes(1 << 20))
    return bytes(tar.done())


# Of a decompressor that answers any blob with a tar of its own choice.
TARS: Final = {
    "expected": _tar("expected"),
    "other": _tar("other"),
    "bigger": _tar("bigger"),
    "smaller": _tar("expected")[:-512],
    "cut short": _tar("expected")[:700],
    "nothing": b"",
    "no tar": hashlib.shake_128(b"no tar").digest(10240),
}
_LIE: Final = "lies about the size"


def _unpack(name: str, ring: RingWriter) -> dict[str, Any]:
    tar = TARS.get(name, TARS["expected"])
    ring.write(tar)
    ring.close()
    return {"size_bytes": len(tar) + (name == _LIE), "cpu_seconds": 0.0, "peak_rss_bytes": 0}


class Said(Exception):
    """Reaches the launcher as the text of an error."""


def _deed(name: str, given: Given) -> NoReturn:
    if name in DEEDS:
        raise Said(DEEDS[name](given))
    raise Said(_call(name, given))


def main() -> None:
    name = os.environ["PROBE"]
    if name.startswith(WITHOUT_EXTENSION):
        sys.modules["blockdev.workers._sandbox"] = None  # type: ignore[assignment]
        vars(workers).pop("_sandbox", None)
        importlib.reload(sandbox)
        name = name.removeprefix(f"{WITHOUT_EXTENSION}: ")
    if name.startswith("kernel without "):
        _kernel_without(name.removeprefix("kernel without "))
    if len(sys.argv) > 2:
        if name in TARS or name == _LIE:
            decompressor._work = lambda kind, compressed, tar, status_fd: _unpack(name, tar)
        elif not name.startswith("kernel"):
            decompressor._work = lambda kind, compressed, tar, status_fd: _deed(
                name, Given(compressed._end.full_fd, status_fd, ())
            )
        decompressor.main()
    elif not name.startswith("kernel"):
        builder._work = lambda parameters, compressed_ring, tar, status_fd: _deed(
            name,
            Given(parameters.blob_fd, status_fd, (parameters.outputs[0].staged_fd, parameters.outputs[0].spool_fd)),
        )
    builder.main()


def _kernel_without(what: str) -> None:
    calls = _calls()

    def failing(error: int) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            raise OSError(error, os.strerror(error))

        return call

    if what == "landlock":
        calls.landlock_create_ruleset = failing(errno.ENOSYS)
    elif what == "seccomp":
        calls.seccomp_action_available = failing(errno.EINVAL)
    elif what == "leave for seccomp":
        calls.seccomp_set_filter = failing(errno.EPERM)
