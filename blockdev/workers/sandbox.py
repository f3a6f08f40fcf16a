# SPDX-License-Identifier: Apache-2.0
"""What each kind of worker may do, and how it gives up all the rest before it reads the first hostile byte.

A profile is data: descriptors, bounds, rules about system calls. `shut` applies one, in this order: other
descriptors, bounding set, user, capabilities, no-new-privs, Landlock, resource limits, seccomp. It runs when
all modules are loaded, and while there is one thread, for Landlock and capabilities are a thread's own.

What this is worth when a worker is taken over: its code can compute, and write bytes to the descriptors
that it has. It can open nothing, start nothing, reach nobody. One kind more is one function more that
returns a Profile.

Linux: include/uapi/linux/{prctl,capability,securebits,landlock,sched,futex}.h; man 7 capabilities, landlock.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from contextlib import suppress
from typing import Final, NamedTuple

from blockdev.errors import BuildFailed
from blockdev.workers.ring import RingEnd
from blockdev.workers.seccomp import RET_KILL_PROCESS, Argument, Refusal, Rule, assemble, machine_here

try:
    from blockdev.workers import _sandbox as _calls
except ImportError:  # the extension is optional
    from blockdev.workers import _sandbox_ctypes as _calls  # type: ignore[no-redef]

# "nobody": owns no file, and is mapped in most user namespaces.
UNPRIVILEGED_ID: Final = 65534
# What `shut` may answer; that of Landlock with the version of its ABI behind it.
PROTECTIONS: Final = ("bounding-set", "user", "capabilities", "no-new-privs", "landlock-abi", "seccomp")

_PROT_EXEC: Final = 0x4
_MAP_ANONYMOUS: Final = 0x20
_FUTEX_COMMAND: Final = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME
_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAIT_BITSET, _FUTEX_WAKE_BITSET = 0, 1, 9, 10
# VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID: what pthread_create of glibc
# asks for, and with CLONE_DETACHED, which the kernel ignores, that of musl.
_THREAD_FLAGS: Final = 0x003D_0F00
_CLONE_DETACHED: Final = 0x0040_0000


class Bounds(NamedTuple):
    """Of one process. Its threads share them."""

    address_space_bytes: int
    cpu_seconds: int
    file_size_bytes: int


class Profile(NamedTuple):
    """`capabilities`: what it keeps of those that it has, as numbers, and with them its user. `opens`: files that it
    may have open beside `descriptors`, for reading."""

    name: str
    descriptors: frozenset[int]
    bounds: Bounds
    threads: bool
    rules: tuple[Rule, ...]
    refusals: tuple[Refusal, ...]
    capabilities: frozenset[int] = frozenset()
    opens: int = 0


def _descriptor_rules(calls: str, descriptors: frozenset[int]) -> tuple[Rule, ...]:
    return tuple(Rule(call, (Argument(0, tuple(sorted(descriptors))),)) for call in calls.split())


def _refused(calls: str, error: int = errno.EPERM) -> tuple[Refusal, ...]:
    return tuple(Refusal(call, error) for call in calls.split())


# The interpreter's and the C library's own needs: locks, memory without code, clocks that the vDSO does not
# know, the hash seed of a set, the end.
_COMPUTING: Final = (
    Rule("futex", (Argument(1, (_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAIT_BITSET, _FUTEX_WAKE_BITSET), _FUTEX_COMMAND),)),
    Rule("mmap", (Argument(2, (0,), _PROT_EXEC), Argument(3, (_MAP_ANONYMOUS,), _MAP_ANONYMOUS))),
    Rule("munmap"),
    Rule("mremap"),
    Rule("madvise"),
    Rule("mprotect", (Argument(2, (0,), _PROT_EXEC),)),
    Rule("brk"),
    Rule("rt_sigreturn"),
    Rule("rt_sigprocmask"),
    Rule("restart_syscall"),
    Rule("clock_gettime"),
    Rule("getrandom"),
    Rule("exit"),
    Rule("exit_group"),
)

# Threads, and nothing that clone(2) makes otherwise.
_THREADS: Final = (
    Rule("clone", (Argument(0, (_THREAD_FLAGS, _THREAD_FLAGS | _CLONE_DETACHED)),)),
    Rule("set_robust_list"),
    Rule("rseq"),
    Rule("sched_yield"),
    Rule("sched_getaffinity"),  # malloc: how many arenas
    Rule("clock_nanosleep"),
    Rule("gettid"),
    Rule("getpid"),
)


# What the interpreter and the C library try on their own, mostly on their way to an error message: a late
# import, the source line of a traceback, a terminal to be asked for. To be killed for it would hide the error.
_ON_ITS_OWN: Final = (
    *_refused("open openat stat lstat newfstatat statx access faccessat faccessat2", errno.EACCES),
    *_refused("readlink readlinkat getcwd", errno.EACCES),
    *_refused("fstat getdents64 ioctl fcntl lseek uname sysinfo getrusage getcpu prlimit64 prctl"),
    # abort(3): it then ends by an illegal instruction, a crash as it should be.
    *_refused("rt_sigaction sigaltstack writev tgkill"),
)
# glibc then makes its threads with clone, whose flags a filter can see.
_NO_CLONE3: Final = (Refusal("clone3", errno.ENOSYS),)


def decompressor(
    status_fd: int, *, compressed: RingEnd, tar: RingEnd, address_space_bytes: int, cpu_seconds: int, report_bytes: int
) -> Profile:
    """From ring to ring, both mapped by now; its report to standard error."""
    return Profile(
        name="decompressor",
        descriptors=frozenset((0, 1, 2, status_fd, compressed.full_fd, compressed.free_fd, tar.full_fd, tar.free_fd)),
        bounds=Bounds(address_space_bytes, cpu_seconds, file_size_bytes=report_bytes),
        threads=False,
        rules=(
            *_descriptor_rules("read", frozenset((compressed.full_fd, tar.free_fd, status_fd))),
            *_descriptor_rules("write", frozenset((compressed.free_fd, tar.full_fd, 2))),
            *_descriptor_rules("close", frozenset((tar.full_fd, tar.free_fd))),
            *_COMPUTING,
        ),
        refusals=(*_ON_ITS_OWN, *_refused("gettid getpid sched_getaffinity")),
    )


def builder(status_fd: int, *, sources: frozenset[int], pipes: frozenset[int], files: frozenset[int],
            bounds: Bounds) -> Profile:  # fmt: skip
    """`sources` are read in order, `pipes` are written in order, `files` are read and written anywhere."""
    return Profile(
        name="builder",
        descriptors=sources | pipes | files | {1, 2, status_fd},
        bounds=bounds,
        threads=True,
        rules=(
            *_descriptor_rules("read readv", sources | {status_fd}),
            *_descriptor_rules("write", pipes | {1, 2}),
            *_descriptor_rules("pread64 pwrite64 fdatasync fsync", files),
            *_descriptor_rules("close", sources | pipes),
            *_COMPUTING,
            *_THREADS,
        ),
        refusals=(*_ON_ITS_OWN, *_NO_CLONE3),
    )


def archiver(status_fd: int, *, source_fd: int, out_fd: int, bounds: Bounds) -> Profile:
    """Reads files below the directory `source_fd`, whoever owns them, or that file; writes to `out_fd` in order."""
    return Profile(
        name="archiver",
        descriptors=frozenset((source_fd, out_fd, 1, 2, status_fd)),
        bounds=bounds,
        threads=False,
        rules=(
            *_descriptor_rules("write", frozenset((out_fd, 1, 2))),
            Rule("openat", (Argument(2, (0,), os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),)),
            Rule("fcntl", (Argument(1, (_F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC)),)),
            *(Rule(call) for call in _READING.split()),
            *_COMPUTING,
        ),
        refusals=tuple(
            refusal
            for refusal in (*_ON_ITS_OWN, *_refused("gettid getpid sched_getaffinity"))
            if refusal.call not in {"openat", "fcntl", *_READING.split()}
        ),
        capabilities=frozenset((_CAP_DAC_READ_SEARCH, _CAP_SYS_ADMIN)),
        opens=_ARCHIVER_OPENS,
    )


# Nothing of it changes anything; CAP_SYS_ADMIN, without which the kernel hides trusted.*, has no other use with it.
_READING: Final = (
    "read preadv preadv2 lseek close fstat newfstatat getdents64 readlinkat getxattr fgetxattr listxattr flistxattr"
)
_CAP_DAC_READ_SEARCH: Final = 2
_CAP_SYS_ADMIN: Final = 21
_F_SETFD: Final = 2
_F_GETFL: Final = 3
_F_DUPFD_CLOEXEC: Final = 1030
_ARCHIVER_OPENS: Final = 16


def open_status() -> int:
    """A descriptor of the caller's own /proc/self/status: behind the door nothing can be opened any more."""
    return os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)


def shut(profile: Profile, parent_pid: int) -> list[str]:
    """Leave the calling process nothing but its profile; the protections that are now in force.

    The process ends with `parent_pid`. An old kernel may lack Landlock or seccomp; what the kernel has
    and refuses to give is an error. Raises BuildFailed.
    """
    active: list[str] = []
    try:
        _close_others(profile.descriptors)
        if _drop_bounding_set():
            active.append("bounding-set")
        kept = profile.capabilities and profile.capabilities & _permitted()
        if not kept and _change_user():
            active.append("user")
        _drop_capabilities(kept)
        active.append("capabilities")
        # Neither ptrace nor a core file: there are others with this user ID.
        _calls.prctl(_PR_SET_DUMPABLE, 0)
        _calls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
        active.append("no-new-privs")
        if abi := _landlock(reads=bool(profile.opens)):
            active.append(f"landlock-abi{abi}")
        # Not earlier: the kernel forgets it when the user changes (man 2 PR_SET_PDEATHSIG).
        _calls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)  # it died before the line above
        _limit(profile)
        if _filter(profile):
            active.append("seccomp")
    except OSError as error:
        raise BuildFailed(f"the {profile.name} could not give up its privileges: {error}") from None
    return active


def _close_others(descriptors: frozenset[int]) -> None:
    # Not os.closerange: where the C library has no close_range(2) it tries every number up to the last.
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in descriptors:
            with suppress(OSError):  # that of the listing itself
                os.close(int(name))


_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_SECUREBITS: Final = 28
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
# NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each with its lock, and KEEP_CAPS locked as it is, off.
_SECUREBITS: Final = 0b1110_1111
_CAPABILITY_VERSION_3: Final = 0x2008_0522


def _drop_bounding_set() -> bool:
    """False where the process has no say in it: without CAP_SETPCAP."""
    try:
        for capability in range(64):
            _calls.prctl(_PR_CAPBSET_DROP, capability)
    except OSError as error:
        if error.errno == errno.EPERM:
            return False
        if error.errno != errno.EINVAL:  # the first that this kernel does not know
            raise
    _calls.prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    return True


def _change_user() -> bool:
    """False where there is nothing to change: a plain user, or root of a user namespace without this ID."""
    if os.geteuid() != 0:
        return False
    try:
        os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        os.setgroups([])
        os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        text = f"{error.strerror}: it starts as root, but without CAP_SETUID and CAP_SETGID"
        raise OSError(error.errno, text) from None
    return True


def _permitted() -> frozenset[int]:
    """The capabilities that this process can have, by their numbers."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        mask = next((int(line.split()[1], 16) for line in status if line.startswith("CapPrm:")), 0)
    return frozenset(number for number in range(64) if mask >> number & 1)


def _drop_capabilities(kept: frozenset[int]) -> None:
    with suppress(OSError):  # Linux before 4.3; what it had is gone with the next call
        _calls.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    mask = sum(1 << number for number in kept)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    # struct __user_cap_data_struct, twice: effective, permitted, inheritable
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    _calls.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), data)


_LANDLOCK_CREATE_RULESET_VERSION: Final = 1


_LANDLOCK_READ: Final = 0b1100  # READ_FILE, READ_DIR


def _landlock(*, reads: bool) -> int:
    """No file system access, or only reading; no TCP, no abstract socket or signal to the outside.

    The ABI version; 0: none.
    """
    try:
        abi = _calls.landlock_create_ruleset(None, _LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0  # not built, or not among the security modules of this boot
    rights = 13 + (abi >= 2) + (abi >= 3)  # the first ones, REFER, TRUNCATE
    file_system = (1 << rights) - 1 | (abi >= 5) << 15  # IOCTL_DEV
    if reads:
        file_system &= ~_LANDLOCK_READ
    network = 0b11 if abi >= 4 else 0  # BIND_TCP, CONNECT_TCP
    scopes = 0b11 if abi >= 6 else 0  # ABSTRACT_UNIX_SOCKET, SIGNAL
    ruleset = _calls.landlock_create_ruleset(struct.pack("=QQQ", file_system, network, scopes), 0)
    try:
        _calls.landlock_restrict_self(ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _limit(profile: Profile) -> None:
    bounds = profile.bounds
    limits = [
        (resource.RLIMIT_AS, bounds.address_space_bytes),
        (resource.RLIMIT_CPU, bounds.cpu_seconds),
        (resource.RLIMIT_FSIZE, bounds.file_size_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        # Those that are open stay so.
        (resource.RLIMIT_NOFILE, max(profile.descriptors) + 1 + profile.opens if profile.opens else 0),
    ]
    if not profile.threads:
        # With threads there is no number to name: all processes of this user count, a container's too.
        limits.append((resource.RLIMIT_NPROC, 0))
    for which, value in limits:
        hard = resource.getrlimit(which)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the hard limit of CPU time the signal is SIGKILL, which would not say why.
        resource.setrlimit(which, (bound, hard if which == resource.RLIMIT_CPU else bound))


_SECCOMP_FILTER_FLAG_TSYNC: Final = 1


def _filter(profile: Profile) -> bool:
    """False where the kernel has no filters, or the architecture no table here."""
    machine = machine_here(os.uname().machine)
    if machine is None:
        return False
    try:
        _calls.seccomp_action_available(RET_KILL_PROCESS)
    except OSError as error:
        # Without CONFIG_SECCOMP, without CONFIG_SECCOMP_FILTER, before Linux 4.14.
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    program = assemble(profile.rules, profile.refusals, machine)
    if thread := _calls.seccomp_set_filter(program, _SECCOMP_FILTER_FLAG_TSYNC):
        raise OSError(errno.EBUSY, f"thread {thread} has a filter of its own")
    return True
