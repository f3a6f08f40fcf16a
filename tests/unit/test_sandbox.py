# SPDX-License-Identifier: Apache-2.0
"""What a worker can still do behind its door. Each attempt is made in a fresh program, started as builds start it."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.errors import BlockdevError, BuildFailed, DigestMismatch, LimitExceeded
from blockdev.formats.layer_file import open_layer_file
from blockdev.workers import launch, sandbox, seccomp
from blockdev.workers.launch import BuildRecord
from blockdev.workers.ring import RingEnd
from tests.unit import worker_probe
from tests.unit.test_workers import Run, children, command, digest_of
from tests.unit.test_workers import run as run  # the fixture
from tests.unit.worker_probe import KILLED, REFUSED, TARS, WITHOUT_EXTENSION, X86_64, here

WORKERS = ("builder", "decompressor")
BLOB = gzip.compress(TARS["expected"], 1)


def is_root() -> bool:
    return os.geteuid() == 0


class Probe:
    """Builds in which one worker does something else."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def __call__(self, worker: str, does: str, **fields: object) -> BuildRecord:
        plain = worker == "builder"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(launch.PROGRAMS, worker, worker_probe.__name__)
            patch.setitem(launch._ENVIRONMENT, "PROBE", does)
            return await self._run(TARS["expected"] if plain else BLOB, "" if plain else "+gzip", **fields)

    async def says(self, worker: str, does: str, **fields: object) -> str:
        with pytest.raises(BlockdevError) as caught:
            await self(worker, does, **fields)
        return str(caught.value)


@pytest.fixture
def probe(run: Run) -> Probe:
    return Probe(run)


def filtered() -> bool:
    return Path("/proc/sys/kernel/seccomp/actions_avail").exists() and os.uname().machine in seccomp.AUDIT_ARCHS


needs_filter = pytest.mark.skipif(not filtered(), reason="this kernel or architecture has no seccomp filters")


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("call", here(KILLED))
async def test_a_call_that_no_worker_makes_ends_it(probe: Probe, worker: str, call: str) -> None:
    assert f"the {worker} was killed: it tried a system call that it may not make" in await probe.says(worker, call)


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("call", here(REFUSED))
async def test_a_call_that_is_made_in_good_faith_fails(probe: Probe, worker: str, call: str) -> None:
    assert f"errno {REFUSED[call][3]}" in await probe.says(worker, call)


@needs_filter
@pytest.mark.skipif(not X86_64, reason="an x86_64 kernel alone has other ABIs beside its own")
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("call", ["x32 getpid", "x32 read", "i386 getpid"])
async def test_no_other_abi_leads_past_the_filter(probe: Probe, worker: str, call: str) -> None:
    # Without IA32 emulation the instruction itself is a fault.
    assert re.search("a system call that it may not make|SIGSEGV", await probe.says(worker, call))


@needs_filter
async def test_only_the_builder_makes_threads_and_nothing_else_by_them(probe: Probe) -> None:
    assert "a thread ran 1 time" in await probe.says("builder", "thread")
    assert f"errno {errno.ENOSYS}" in await probe.says("builder", "clone3")
    for deed in ("thread", "clone3"):
        assert "a system call that it may not make" in await probe.says("decompressor", deed)


@pytest.mark.parametrize("worker", WORKERS)
async def test_an_error_is_told_though_nothing_can_be_opened_for_it(probe: Probe, worker: str) -> None:
    assert re.search("PermissionError|ModuleNotFoundError", await probe.says(worker, "late import"))
    assert "Permission denied" in await probe.says(worker, "open in Python")
    assert "a word" in await probe.says(worker, "traceback")


@pytest.mark.parametrize("worker", WORKERS)
async def test_a_crash_fails_that_build_in_words(probe: Probe, worker: str) -> None:
    for deed in ("segfault", "abort"):
        text = await probe.says(worker, deed)
        assert re.search(f"layer some layer: the {worker} crashed: signal \\d+, SIG(SEGV|ABRT|ILL|TRAP)", text)


@pytest.mark.parametrize("worker", WORKERS)
async def test_what_a_worker_may_use_ends_and_is_named(probe: Probe, worker: str) -> None:
    with pytest.raises(LimitExceeded, match=f"the {worker} was killed: over its CPU time of 1 s"):
        await probe(worker, "spin", cpu_seconds=1)
    with pytest.raises(LimitExceeded, match=f"the {worker} is over its memory of \\d+ bytes"):
        await probe(worker, "memory")
    with pytest.raises(BlockdevError, match=f"the {worker}.* over its file size of|without a report") as caught:
        await probe(worker, "file size")
    # Into its report the decompressor writes until nothing more goes in, so that no word fits behind it.
    assert type(caught.value) is (LimitExceeded if worker == "builder" else BuildFailed)


def expected_protections() -> set[str]:
    root = {"bounding-set", "user"} if is_root() else set()
    return root | {"capabilities", "no-new-privs", "seccomp"}


@needs_filter
async def test_a_build_says_what_protected_it(run: Run) -> None:
    record = await run(BLOB, "+gzip")
    assert set(record.sandbox) == set(WORKERS)
    for said in record.sandbox.values():
        assert {what for what in said if not what.startswith("landlock")} == expected_protections()


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
async def test_without_the_extension_it_is_the_same(probe: Probe, worker: str) -> None:
    assert "blockdev.workers._sandbox_ctypes" in await probe.says(worker, WITHOUT_EXTENSION)
    assert f"errno {errno.EACCES}" in await probe.says(worker, f"{WITHOUT_EXTENSION}: openat")
    assert "a system call that it may not make" in await probe.says(worker, f"{WITHOUT_EXTENSION}: socket")
    record = await probe(worker, f"{WITHOUT_EXTENSION}: kernel as it is")
    assert {what for what in record.sandbox[worker] if not what.startswith("landlock")} == expected_protections()


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
async def test_an_old_kernel_builds_with_less_and_says_so(probe: Probe, worker: str) -> None:
    record = await probe(worker, "kernel without landlock")
    assert not any(what.startswith("landlock") for what in record.sandbox[worker])
    record = await probe(worker, "kernel without seccomp")
    assert "seccomp" not in record.sandbox[worker]


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
async def test_a_kernel_that_has_filters_but_refuses_one_ends_the_build(probe: Probe, worker: str) -> None:
    with pytest.raises(BuildFailed, match=f"the {worker} could not give up its privileges: .*not permitted"):
        await probe(worker, "kernel without leave for seccomp")


def threads_of(pid: int) -> list[dict[str, str]]:
    """/proc/PID/task/*/status"""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    return [dict(re.findall(r"^(\w+):[ \t]*(.*)$", path.read_text(), re.M)) for path in tasks]


def descriptors_of(pid: int) -> list[str]:
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]


def limits_of(pid: int) -> dict[str, str]:
    """Soft limits, from /proc/PID/limits."""
    return dict(re.findall(r"^Max (\w+(?: \w+)*) +(\w+) ", Path(f"/proc/{pid}/limits").read_text(), re.M))


async def confined(name: str) -> int:
    """A worker whose door is shut."""
    for _ in range(20_000):
        for pid in children():
            program = command(pid)  # empty until it is that of the worker
            if launch.PROGRAMS[name].encode() in program and all(task["Seccomp"] == "2" for task in threads_of(pid)):
                return pid
        await asyncio.sleep(0.005)
    raise TimeoutError(name)


@pytest.fixture
def endless() -> Iterator[tuple[int, int]]:
    """A blob that does not come to its end: both ends of a pipe."""
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


@needs_filter
@pytest.mark.parametrize("worker", WORKERS)
async def test_the_kernel_says_the_same_of_every_thread(run: Run, endless: tuple[int, int], worker: str) -> None:
    os.write(endless[1], BLOB[:100])
    building = asyncio.ensure_future(
        run(b"", "+gzip", blob_fd=endless[0], expected_size_bytes=None, expected_digest=None)
    )
    try:
        pid = await confined(worker)
        for status in threads_of(pid):
            assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
            for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(status[kind], 16) == 0, kind
            if is_root():
                assert int(status["CapBnd"], 16) == 0
                assert status["Uid"].split() == status["Gid"].split() == [str(sandbox.UNPRIVILEGED_ID)] * 4
                assert not status["Groups"].split()
        if is_root():  # not dumpable: to others its descriptors are closed
            found = descriptors_of(pid)
            kinds = [re.sub(r"\d+", "N", Path(target).name) for target in found]
            given = {
                "decompressor": [*["pipe:[N]"] * 4, "null", "null", "memfd:report (deleted)", "status"],
                # the blob, two rings; the report twice, as standard output and error
                "builder": [
                    *["pipe:[N]"] * 5, "staged", "spool", *["memfd:report (deleted)"] * 2, "status",
                ],
            }[worker]  # fmt: skip
            assert sorted(kinds) == sorted(given)
            assert [target for target in found if target.endswith("status")] == [f"/proc/{pid}/status"]
            limits = limits_of(pid)
            assert limits["core file size"] == limits["open files"] == "0"
            assert limits["cpu time"] == "3600"
    finally:
        building.cancel()
        with pytest.raises(asyncio.CancelledError):
            await building


@pytest.mark.root
async def test_a_plain_user_builds_as_well(tmp_path: Path) -> None:
    blob, program = tmp_path / "blob", "from snapshotter.cli.main import main; main()"
    blob.write_bytes(BLOB)
    user = 12345
    os.chown(tmp_path, user, user)
    # pytest's own directories are for the owner alone
    as_user = ("/usr/bin/setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o711)

    async def call(*argv: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *as_user, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd="/"
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    if (await call("test", "-r", str(Path(sandbox.__file__))))[0]:
        pytest.skip("this checkout lies where other users cannot read it")
    status, said = await call(
        sys.executable, "-c", program, "layer", "build", str(blob), "--output", str(tmp_path / "layer"), "--json"
    )
    assert (status, digest_of(TARS["expected"]) in said) == (0, True), said


@pytest.mark.parametrize("tar", [name for name in TARS if name != "expected"])
async def test_a_decompressor_that_writes_other_bytes_is_an_error(probe: Probe, tar: str) -> None:
    text = await probe.says("decompressor", tar, expected_diff_id=digest_of(TARS["expected"]))
    if tar in ("other", "bigger", "smaller"):  # tars, all of them
        assert f"unpacks to diff ID {digest_of(TARS[tar])}, not {digest_of(TARS['expected'])}" in text


@pytest.mark.parametrize("tar", ["expected", "other", "bigger", "smaller"])
async def test_the_diff_id_is_that_of_the_tar_in_the_layer_file(probe: Probe, tmp_path: Path, tar: str) -> None:
    record = await probe("decompressor", tar)
    staged = (tmp_path / "staged").read_bytes()
    layer = open_layer_file(lambda offset, size: staged[offset : offset + size], len(staged))
    stored = staged[layer.format.head_bytes :][: layer.tar_size_bytes]
    assert stored == TARS[tar]
    assert layer.diff_id is not None
    assert record.diff_id == digest_of(stored) == "sha256:" + layer.diff_id.hex()


async def test_the_expected_diff_id_is_no_hindrance_to_itself(run: Run) -> None:
    tar = TARS["expected"]
    for blob, suffix in ((BLOB, "+gzip"), (tar, "")):
        assert (await run(blob, suffix, expected_diff_id=digest_of(tar))).diff_id == digest_of(tar)
        with pytest.raises(DigestMismatch, match=f"blob {digest_of(blob)} unpacks to diff ID {digest_of(tar)}, not"):
            await run(blob, suffix, expected_diff_id=digest_of(b"another"))


async def test_a_decompressor_that_lies_about_the_size_is_not_believed(probe: Probe) -> None:
    assert "disagree about the size" in await probe.says("decompressor", "lies about the size")


# The filters as such, for both architectures, through a machine of our own: classic BPF as the kernel runs it.


def verdict(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    words = [word & 0xFFFF_FFFF_FFFF_FFFF for word in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("=IIQ6Q", number, arch, 0, *words)
    code = list(struct.iter_unpack("=HBBI", program))
    place = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x15:
            place += if_true if accumulator == value else if_false
        elif operation == 0x35:
            place += if_true if accumulator >= value else if_false
        else:
            assert operation == 0x06
            return int(value)


def profiles() -> list[sandbox.Profile]:
    return [
        sandbox.decompressor(
            7,
            compressed=RingEnd(20, 21, 22, 1, 1),
            tar=RingEnd(23, 24, 25, 1, 1),
            address_space_bytes=1,
            cpu_seconds=1,
            report_bytes=1,
        ),
        sandbox.builder(
            7, sources=frozenset({3, 4}), pipes=frozenset({5}), files=frozenset({8, 9}), bounds=sandbox.Bounds(1, 1, 1)
        ),
    ]


MACHINES = tuple(seccomp.AUDIT_ARCHS)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", profiles(), ids=lambda profile: profile.name)
def test_what_no_rule_names_is_killed(profile: sandbox.Profile, machine: str) -> None:
    program = seccomp.assemble(profile.rules, profile.refusals, machine)
    arch = seccomp.AUDIT_ARCHS[machine]
    refused = {seccomp.number_of(refusal.call, machine): refusal.error for refusal in profile.refusals}
    ruled: dict[int | None, seccomp.Rule] = {seccomp.number_of(rule.call, machine): rule for rule in profile.rules}
    assert not set(refused) & set(ruled) - {None}
    for number in [*range(1024), 0x4000_0000, 0x4000_0001, 0x4000_0000 + 231, 0xFFFF_FFFF]:
        rule = ruled.get(number)
        # The lowest that each argument may be, with noise in the half that is not looked at.
        arguments = [0] * 6
        for argument in rule.arguments if rule else ():
            arguments[argument.position] |= argument.values[0] | 1 << 40
        found = verdict(program, number, arch, tuple(arguments))
        if number in refused:
            assert found == seccomp.RET_ERRNO | refused[number]
        else:
            assert found == (seccomp.RET_ALLOW if rule else seccomp.RET_KILL_PROCESS), number
        for argument in rule.arguments if rule else ():
            for wrong in (0xFFFF_FFFF, 0x1234_5678 | argument.mask):
                if wrong & argument.mask not in argument.values:
                    changed = tuple(wrong if at == argument.position else value for at, value in enumerate(arguments))
                    assert verdict(program, number, arch, changed) == seccomp.RET_KILL_PROCESS
        for other in {*seccomp.AUDIT_ARCHS.values(), 0x4000_0003, 0x4000_0028} - {arch}:  # i386, arm
            assert verdict(program, number, other, tuple(arguments)) == seccomp.RET_KILL_PROCESS


@pytest.mark.parametrize("profile", profiles(), ids=lambda profile: profile.name)
def test_a_descriptor_has_its_direction(profile: sandbox.Profile) -> None:
    program = seccomp.assemble(profile.rules, profile.refusals, "x86_64")
    allowed = {
        call: {fd for fd in range(64) if verdict(program, number, 0xC000_003E, (fd,)) == seccomp.RET_ALLOW}
        for call, number in (("read", 0), ("write", 1), ("readv", 19), ("pread64", 17), ("pwrite64", 18), ("close", 3))
    }
    assert allowed == {
        "decompressor": {"read": {21, 25, 7}, "write": {22, 24, 2}, "readv": set(), "pread64": set(),
                         "pwrite64": set(), "close": {24, 25}},
        "builder": {"read": {3, 4, 7}, "write": {1, 2, 5}, "readv": {3, 4, 7}, "pread64": {8, 9}, "pwrite64": {8, 9},
                    "close": {3, 4, 5}},
    }[profile.name]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_the_numbers_are_the_kernels(header: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header} (linux-libc-dev)")
    text = Path(header).read_text()
    theirs = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
    theirs.setdefault("newfstatat", theirs.get("fstatat", -1))
    assert {name: numbers[column] for name, numbers in seccomp.NUMBERS.items()} == {
        name: theirs.get(name) for name in seccomp.NUMBERS
    }
    table = {name: call[column] for name, call in (KILLED | REFUSED).items() if name.isidentifier()}
    # creat and open are x86_64's alone
    assert table == {name: theirs.get(name) for name in table}


def test_the_seed_of_the_tars_stays() -> None:
    """The tars that the two sides of these tests compare are made in two processes."""
    assert len({hashlib.sha256(tar).digest() for tar in TARS.values()}) == len(TARS)
