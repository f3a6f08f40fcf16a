# SPDX-License-Identifier: Apache-2.0
"""A host that cheats: each case in a real guest, with what the guest must say. None ever gives other data."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev.formats.layer_file import TRAILER_BYTES, Identity
from tests.conftest import in_every_run
from tests.images import mkimage
from tests.uvm.conftest import Guest, Layer, agreed, write_layer
from uvm.frames import Kind
from uvm.policy import Policy, kernel_command_line
from uvm.runner import Disk, Result
from verity.hasher import LeafStore, leaf_digests
from verity.params import PRESETS
from verity.tree import Geometry, write_tree

pytestmark = [pytest.mark.uvm, pytest.mark.slow]

SMALL_FILES = 60
CONTENT = mkimage.noise("content", 9 << 20)  # of so many blocks that the tree has three levels
TARGET = "layer-1"  # the layer in the middle of three is the one that suffers


def middle_layer(content: bytes) -> bytes:
    small = (mkimage.F(f"big/f{number}", mkimage.noise(f"f{number}", 5000)) for number in range(SMALL_FILES))
    entries = [mkimage.D("big"), *small, mkimage.F("big/data", content), mkimage.F("big/last", "last\n")]
    return bytes(mkimage.layer_tar(entries))


def top_layer(content: bytes) -> bytes:
    return bytes(mkimage.layer_tar([mkimage.D("top"), mkimage.F("top/file", content)]))


@dataclass(frozen=True, slots=True)
class Chain:
    layers: list[Layer]  # bottom first
    directory: Path

    @property
    def target(self) -> Layer:
        return self.layers[1]

    def offset_of(self, content: bytes) -> int:
        return self.target.path.read_bytes().index(content)

    def level(self, number: int) -> int:
        """Where a level of the target's tree starts; 0 is that of the data."""
        built = self.target.built
        blocks = built.data_size_bytes // 512
        levels = Geometry(blocks, PRESETS["tar-index"]).levels
        assert len(levels) == 3
        return built.data_size_bytes + levels[len(levels) - 1 - number][0]

    def trailer(self) -> int:
        return self.target.built.file_size_bytes - TRAILER_BYTES


@pytest.fixture(scope="module")
def originals(hello: Layer, tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    directory = tmp_path_factory.mktemp("chain")
    return [
        hello,
        write_layer(middle_layer(CONTENT), directory / "middle.layer"),
        write_layer(top_layer(b"top\n"), directory / "top.layer"),
    ]


@pytest.fixture
def chain(originals: list[Layer], tmp_path: Path) -> Chain:
    """Copies, to be changed."""
    layers = []
    for layer in originals:
        shutil.copy(layer.path, tmp_path / layer.path.name)
        layers.append(dataclasses.replace(layer, path=tmp_path / layer.path.name))
    return Chain(layers, tmp_path)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# Reads everything that the chain has, and says what it could not.
READ_ALL = ("sh", "-c", "cd /big; for f in *; do sha256sum $f; done; cat /top/file")
GOOD = "".join(
    f"{hashlib.sha256(data).hexdigest()}  {name}\n"
    for name, data in sorted(
        [
            ("data", CONTENT),
            ("last", b"last\n"),
            *((f"f{number}", mkimage.noise(f"f{number}", 5000)) for number in range(SMALL_FILES)),
        ]
    )
) + "top\n"  # fmt: skip


def read_all(guest: Guest, chain: Chain) -> Result:
    """With the disks there from the start: a host that cheats hands over what our client of QEMU would not."""
    policy, disks = agreed(chain.layers, *READ_ALL)
    return guest.boot(policy.text(), disks, hot_plug=False)


def flipped(where: Callable[[Chain], int]) -> Callable[[Chain], None]:
    return lambda chain: flip(chain.target.path, where(chain))


def replaced(chain: Chain, other: Layer) -> None:
    shutil.copy(other.path, chain.target.path)


def older(chain: Chain) -> None:
    """The layer as it was before an update: sound in itself, and of the same size."""
    before = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    other = write_layer(middle_layer(before), chain.directory / "older.layer")
    assert other.built.file_size_bytes == chain.target.built.file_size_bytes
    replaced(chain, other)


def swapped(chain: Chain) -> None:
    one, other = chain.layers[1].path, chain.layers[2].path
    content = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(content)


def shortened(by: int) -> Callable[[Chain], None]:
    def shorten(chain: Chain) -> None:
        with chain.target.path.open("r+b") as file:
            file.truncate(chain.target.built.file_size_bytes - by)

    return shorten


def lengthened(chain: Chain) -> None:
    with chain.target.path.open("ab") as file:
        file.write(bytes(4096))


def emptied(chain: Chain) -> None:
    chain.target.path.write_bytes(bytes(4096))


def trailer_says(offset: int, layout: str, value: int) -> Callable[[Chain], None]:
    """A trailer that is sound in itself: the checksum is made again."""

    def write(chain: Chain) -> None:
        raw = bytearray(chain.target.path.read_bytes()[-TRAILER_BYTES:])
        struct.pack_into(layout, raw, offset, value)
        raw[120:152] = hashlib.sha256(raw[:120]).digest()
        overwrite(chain.target.path, chain.trailer(), bytes(raw))

    return write


def level_for_data(chain: Chain) -> None:
    """The hash blocks of level 0 as the data of a file: under the same root hash veritysetup accepts it."""
    content = chain.target.path.read_bytes()
    data_size = chain.target.built.data_size_bytes
    lowest = content[chain.level(0) : chain.trailer()]
    chain.target.path.write_bytes(lowest + content[data_size : chain.level(0)] + content[chain.trailer() :])


def qcow2(chain: Chain) -> None:
    """The head of a qcow2 image with a backing file; were it taken for one, the host would read that."""
    header = struct.pack(">4sIQI", b"QFI\xfb", 3, 104, 11) + struct.pack(">IQ", 16, 1 << 20)
    overwrite(chain.target.path, 0, header.ljust(104, b"\0") + b"/etc/passwd")


def vhd(chain: Chain) -> None:
    overwrite(chain.target.path, chain.target.built.file_size_bytes - 512, b"conectix".ljust(64, b"\1"))


def initdata(chain: Chain) -> None:
    overwrite(chain.target.path, 0, b"initdata" + struct.pack("<Q", 100))


HEAD_UNREADABLE = f"layer {TARGET}: its head cannot be read: Input/output error"
OTHER_SIZE = f"layer {TARGET}: its disk has "
TRAILER = f"layer {TARGET}: its trailer is not what the policy gives, from byte "

# What the host does to the files → the reason why nothing is run.
REFUSED: dict[str, tuple[Callable[[Chain], None], str]] = {
    "a bit of the head": (flipped(lambda chain: 40), HEAD_UNREADABLE),
    "a bit of the superblock": (flipped(lambda chain: 1024 + 8), HEAD_UNREADABLE),
    "a bit of the root directory's inode": (
        flipped(lambda chain: root_inode(chain)), f"layer {TARGET}: mount as EROFS: Input/output error"),
    "a bit of tree level 2": (flipped(lambda chain: chain.level(2)), HEAD_UNREADABLE),
    "a bit of tree level 1": (flipped(lambda chain: chain.level(1) + 7), HEAD_UNREADABLE),
    "a bit of tree level 0": (flipped(lambda chain: chain.level(0) + 31), HEAD_UNREADABLE),
    "a bit of the trailer": (flipped(lambda chain: chain.trailer()), TRAILER + "0 on"),
    "a bit of the diff ID in the trailer": (flipped(lambda chain: chain.trailer() + 88), TRAILER + "88 on"),
    "a bit of the trailer's checksum": (flipped(lambda chain: chain.trailer() + 151), TRAILER + "151 on"),
    "a bit of the trailer's zeros": (flipped(lambda chain: chain.trailer() + 2000), TRAILER + "2000 on"),
    "a bit of Microsoft's record": (flipped(lambda chain: chain.trailer() + 3592), TRAILER + "3592 on"),
    "two layers swapped": (swapped, "layer layer-2: its disk has "),
    "an older layer of the same size": (older, HEAD_UNREADABLE),
    "a block less": (shortened(4096), OTHER_SIZE),
    "a sector less": (shortened(512), OTHER_SIZE),
    "a block more": (lengthened, OTHER_SIZE),
    "an empty file": (emptied, OTHER_SIZE),
    "a level of the tree for the data": (level_for_data, OTHER_SIZE),
    "a trailer with 2^60 blocks": (trailer_says(24, "<Q", 1 << 60), TRAILER + "24 on"),
    "a trailer with no block": (trailer_says(24, "<Q", 0), TRAILER + "24 on"),
    "a trailer with blocks of no bytes": (trailer_says(16, "<I", 0), TRAILER + "17 on"),
    "a trailer with blocks of 4096 bytes": (trailer_says(16, "<I", 4096), TRAILER + "17 on"),
    "a trailer with 2^64 - 1 levels": (trailer_says(48, "<Q", (1 << 64) - 1), TRAILER + "48 on"),
    "a trailer with another root hash": (trailer_says(56, "<Q", 0), TRAILER + "56 on"),
    "the head of a qcow2 image": (qcow2, HEAD_UNREADABLE),
    "the footer of a VHD image": (vhd, TRAILER + "3584 on"),
    "Kata's initdata": (initdata, HEAD_UNREADABLE),
}  # fmt: skip
IN_EVERY_RUN = {"a bit of the superblock", "a bit of tree level 1", "an older layer of the same size"}


def root_inode(chain: Chain) -> int:
    raw = chain.target.path.read_bytes()[:4096]
    identity = Identity.unpack(raw)
    (root_nid,) = struct.unpack_from("<H", raw, 1024 + 14)
    return identity.metadata_offset_bytes + 32 * int(root_nid) + 4


def refusal(result: Result) -> str:
    assert (result.exit_status, bytes(result.stdout), result.layers) == (None, b"", [])
    assert result.refused is not None
    return result.refused


@pytest.mark.parametrize("case", in_every_run(REFUSED, IN_EVERY_RUN.__contains__))
def test_a_changed_file_is_refused(guest: Guest, chain: Chain, case: str) -> None:
    policy, disks = agreed(chain.layers, *READ_ALL)
    change, reason = REFUSED[case]
    change(chain)
    said = refusal(guest.boot(policy.text(), disks, hot_plug=False))
    assert said.startswith(reason)
    assert said == reason or reason.endswith(" has ")


# What lies where the file system comes only when it is used: the read fails, the layer is said to be corrupted.
UNREADABLE: dict[str, Callable[[Chain], None]] = {
    "a bit of a file in the tar": flipped(lambda chain: chain.offset_of(CONTENT) + (5 << 20)),
    "a bit of tree level 0 over that file": flipped(
        lambda chain: chain.level(0) + (chain.offset_of(CONTENT) + (5 << 20)) // 512 * 32),
    "a bit of a directory": flipped(lambda chain: directory(chain)),
}  # fmt: skip


def directory(chain: Chain) -> int:
    """Inside the block with the entries of /big."""
    return chain.target.path.read_bytes().index(b"f0f1f10f11")


def test_a_changed_bit_of_a_file_is_an_error_of_its_reader(guest: Guest, chain: Chain) -> None:
    assert_unreadable(guest, chain, "a bit of a file in the tar")


@pytest.mark.soak
@pytest.mark.parametrize("case", [case for case in UNREADABLE if case != "a bit of a file in the tar"])
def test_a_changed_bit_is_an_error_of_its_reader(guest: Guest, chain: Chain, case: str) -> None:
    assert_unreadable(guest, chain, case)


def assert_unreadable(guest: Guest, chain: Chain, case: str) -> None:
    UNREADABLE[case](chain)
    result = read_all(guest, chain)
    assert result.refused is None
    shown = result.stdout.decode().splitlines()
    assert set(shown) < set(GOOD.splitlines())  # less than all, and nothing else
    assert "Input/output error" in result.stderr.decode() or "I/O error" in result.stderr.decode()
    assert [status.name for status in result.layers if not status.verified] == [TARGET]
    assert any("device-mapper: verity: " in line and "is corrupted" in line for line in result.kernel_log)


@pytest.mark.soak
def test_an_unchanged_chain_is_read(guest: Guest, chain: Chain) -> None:
    result = read_all(guest, chain)
    assert (result.refused, result.exit_status) == (None, 0)
    assert result.stdout.decode() == GOOD
    assert all(status.verified for status in result.layers)


@pytest.mark.soak
def test_a_byte_less_is_the_zero_that_it_was(guest: Guest, chain: Chain) -> None:
    """QEMU fills the last sector of a file with zeros; the guest cannot see the difference, and there is none."""
    shortened(1)(chain)
    result = read_all(guest, chain)
    assert (result.refused, result.stdout.decode()) == (None, GOOD)


def test_a_file_that_changes_while_the_guest_runs(guest: Guest, chain: Chain) -> None:
    """What was read stays what it was, out of the guest's own cache; what was not is an error."""
    # The guest goes through small files that it has not read yet until one is an error: then the host is done.
    script = """
        cd /big
        sha256sum data
        echo ready
        i=0
        while cat f$i >/dev/null 2>&1 && [ $i -lt 59 ]; do i=$((i+1)); sleep 0.3; done
        cat last
        sha256sum data
    """
    policy, disks = agreed(chain.layers, "sh", "-c", script)
    at = chain.offset_of(CONTENT)
    small = [chain.offset_of(mkimage.noise(f"f{number}", 5000)) for number in range(SMALL_FILES)]
    last = chain.offset_of(b"last\n")
    stdout, stderr = bytearray(), bytearray()

    def on_output(kind: Kind, data: bytes) -> None:
        (stdout if kind is Kind.STDOUT else stderr).extend(data)
        if b"ready" in data:
            overwrite(chain.target.path, last, b"lost\n")
            overwrite(chain.target.path, at, bytes(1 << 20))
            for offset in small:
                flip(chain.target.path, offset)

    result = guest.boot(policy.text(), disks, hot_plug=False, on_output=on_output)
    good = f"{hashlib.sha256(CONTENT).hexdigest()}  data"
    assert result.refused is None
    assert stdout.decode().splitlines() == [good, "ready", good]
    assert b"last" not in stdout
    assert "Input/output error" in stderr.decode()
    assert [status.name for status in result.layers if not status.verified] == [TARGET]


Doing = Callable[[Policy, list[Disk], Chain], tuple[Policy, list[Disk]]]


def without_a_disk(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return policy, [disk for disk in disks if disk.serial != TARGET]


def with_a_disk_more(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return policy, [*disks, Disk("layer-3", chain.layers[0].path)]


def with_a_serial_twice(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return policy, [*disks, Disk(TARGET, chain.target.path)]


def with_serials_exchanged(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    top, middle, bottom = disks
    return policy, [Disk(middle.serial, top.path), Disk(top.serial, middle.path), bottom]


def with_other_layer(policy: Policy, **fields: object) -> Policy:
    layers = [
        dataclasses.replace(layer, **fields) if layer.name == TARGET else layer  # type: ignore[arg-type]
        for layer in policy.layers
    ]
    return Policy(layers, policy.process)


def with_hash_of_other_blocks(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    """The same data, its tree of 4096-byte blocks; the format's blocks have 512."""
    params = PRESETS["tarfs"]
    data = chain.target.path.read_bytes()[: chain.target.built.data_size_bytes]
    leaves = LeafStore()
    leaves.append(leaf_digests(data, params))
    out = bytearray(data)
    root_hash = write_tree(leaves, params, out.extend)
    leaves.close()
    chain.target.path.write_bytes(out + chain.target.path.read_bytes()[-TRAILER_BYTES:])
    return with_other_layer(policy, root_hash=root_hash), disks


def with_other_blocks(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    policy, disks = with_hash_of_other_blocks(policy, disks, chain)
    return with_other_layer(policy, params=PRESETS["tarfs"]), disks


def with_less_data(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return with_other_layer(policy, data_size_bytes=chain.target.built.data_size_bytes - 4096), disks


def with_other_format(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return with_other_layer(policy, format="tar-index-parents"), disks


def with_other_root(policy: Policy, disks: list[Disk], chain: Chain) -> tuple[Policy, list[Disk]]:
    return with_other_layer(policy, root_hash=bytes(32)), disks


DISAGREE: dict[str, tuple[Doing, str]] = {
    "one disk less": (without_a_disk, f"layer {TARGET}: no disk has its serial"),
    "one disk more": (with_a_disk_more, "disk vdd has the serial 'layer-3', which the policy does not name"),
    "one serial twice": (with_a_serial_twice, f"layer {TARGET}: two disks have its serial"),
    "serials exchanged": (with_serials_exchanged, "layer layer-2: its disk has "),
    "a root hash over other blocks": (with_hash_of_other_blocks, OTHER_SIZE),
    "other blocks in the policy": (with_other_blocks, "policy, byte "),
    "less data in the policy": (with_less_data, OTHER_SIZE),
    "another format in the policy": (with_other_format, f"layer {TARGET}: it is not of format tar-index-parents"),
    "another root hash in the policy": (with_other_root, HEAD_UNREADABLE),
}


@pytest.mark.parametrize("case", in_every_run(DISAGREE, {"one disk more"}.__contains__))
def test_disks_that_are_not_the_policys_are_refused(guest: Guest, chain: Chain, case: str) -> None:
    disagree, reason = DISAGREE[case]
    policy, disks = disagree(*agreed(chain.layers, *READ_ALL), chain)
    assert refusal(guest.boot(policy.text(), disks, hot_plug=False)).startswith(reason)


@pytest.mark.soak
def test_order_is_the_policys_whatever_the_host_attaches_first(guest: Guest, chain: Chain) -> None:
    policy, disks = agreed(chain.layers, *READ_ALL)
    result = guest.boot(policy.text(), disks[::-1], hot_plug=False)
    assert (result.refused, result.stdout.decode()) == (None, GOOD)


def other_policy(text: bytes) -> tuple[bytes, str]:
    return text.replace(b"sha256sum", b"cat"), kernel_command_line(text)


POLICIES: dict[str, tuple[Callable[[bytes], tuple[bytes, str]], str]] = {
    "another policy": (other_policy, "the policy has another digest than the kernel's command line names"),
    "no policy": (
        lambda text: (b"", kernel_command_line(text)),
        "the policy has another digest than the kernel's command line names",
    ),
    "a policy in another form": (
        lambda text: (text + b"\n", kernel_command_line(text + b"\n")),
        "policy, byte ",
    ),
    "something more on the command line": (
        lambda text: (text, kernel_command_line(text) + " quiet"),
        "the kernel's command line is not tardev.policy=sha256: and 64 hexadecimal digits",
    ),
    "a short digest": (
        lambda text: (text, kernel_command_line(text)[:-1]),
        "the kernel's command line is not tardev.policy=sha256: and 64 hexadecimal digits",
    ),
}


@pytest.mark.parametrize("case", in_every_run(POLICIES, {"another policy"}.__contains__))
def test_a_policy_that_was_not_measured_is_refused(guest: Guest, chain: Chain, case: str) -> None:
    policy, disks = agreed(chain.layers, *READ_ALL)
    change, reason = POLICIES[case]
    text, command_line = change(policy.text())
    assert refusal(guest.boot(text, disks, hot_plug=False, command_line=command_line)).startswith(reason)
