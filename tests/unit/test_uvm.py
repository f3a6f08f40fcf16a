# SPDX-License-Identifier: Apache-2.0
"""The parts of the reference UVM that need no machine: its policy, read by both sides, its archive, its frames."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import CACHE
from uvm import accel, cpio, image
from uvm.errors import ImageError, MachineError, PolicyError
from uvm.frames import Decoder, Frame, Kind
from uvm.policy import Policy, PolicyLayer, Process, kernel_command_line
from verity.params import PRESETS, Params

INIT = Path(image.__file__).parent / "init"
GUEST_SIDE = Path(__file__).parent.parent / "uvm" / "policy_check.c"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion", "-Wvla", "-Wformat=2", "-Wstrict-prototypes")
PACKAGES = CACHE / "trixie-kernel" / "root"
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
needs_kernel = pytest.mark.skipif(not (PACKAGES / "boot").exists(), reason="no kernel package; ./dev setup fetches it")

LAYER = PolicyLayer("layer-0", "tar-index", bytes(range(32)), 8192, PRESETS["tar-index"])
TEXT = (
    b'{"version":1,"layers":[{"name":"layer-0","format":"tar-index",'
    b'"root_hash":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",'
    b'"data_size":8192,"data_block":512,"hash_block":4096}],'
    b'"process":{"args":["/bin/a","\\"\\\\\\u0001"],"env":["A=\xc3\xa9"],"cwd":"/","user":"1:2"}}'
)


@pytest.fixture(scope="module")
def guest_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("guest") / "policy_check"
    # With what ends it at the first byte read or written in a wrong place.
    sources = [GUEST_SIDE, *(INIT / name for name in ("policy.c", "sha256.c"))]
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
    subprocess.run(["gcc", *WARNINGS, *sanitizers, f"-I{INIT}", "-o", program, *sources], check=True)
    return program


def read_by_guest(program: Path, text: bytes) -> tuple[int, list[str]]:
    done = subprocess.run([program], input=text, capture_output=True, check=False)
    lines = done.stdout.decode("ascii", "replace").splitlines()
    assert lines[0] == f"sha256 {hashlib.sha256(text).hexdigest()}"
    return done.returncode, lines[1:]


def hexes(name: str, *texts: str) -> str:
    return " ".join([name, *(text.encode().hex() for text in texts)])


def test_the_text_of_a_policy_is_this() -> None:
    policy = Policy([LAYER], Process(["/bin/a", '"\\\x01'], ["A=é"], "/", "1:2"))
    assert policy.text() == TEXT
    assert kernel_command_line(TEXT) == f"tardev.policy=sha256:{hashlib.sha256(TEXT).hexdigest()}"


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@needs_gcc
@settings(max_examples=100)
@given(
    args=st.lists(texts, max_size=4), env=st.lists(texts, max_size=4), cwd=texts, user=texts,
    sizes=st.lists(st.integers(2, 1 << 40), min_size=1, max_size=5), disk=st.sampled_from(["", "layers", "l1"]),
)  # fmt: skip
def test_the_guest_reads_what_the_host_wrote(
    guest_side: Path, args: list[str], env: list[str], cwd: str, user: str, sizes: list[int], disk: str
) -> None:
    names = ["tar-index", "tarfs", "erofs-4k"]
    layers = [
        PolicyLayer(f"l{i}", names[i % 3], hashlib.sha256(b"%d" % i).digest(), 4096 * size, PRESETS[names[i % 3]])
        for i, size in enumerate(sizes)
    ]
    text = Policy(layers, Process(["x", *args], env, f"/{cwd}", user), disk).text()
    assert read_by_guest(guest_side, text) == (0, [
        *([f"disk {disk}"] if disk else []),
        *(f"layer {layer.name} {layer.format} {layer.root_hash.hex()} {layer.data_size_bytes}"
          f" {layer.params.data_block_bytes} {layer.params.hash_block_bytes}" for layer in layers),
        hexes("args", "x", *args), hexes("env", *env), hexes("cwd", f"/{cwd}"), hexes("user", user),
    ])  # fmt: skip


REFUSED = {
    "empty": (TEXT, b"", "byte 0: expected {"),
    "white space": (b'"version":1', b'"version": 1', "expected {"),
    "version": (b'"version":1', b'"version":2', "expected {"),
    "no disk": (b'"layers":[', b'"disk":"","layers":[', "a name has 1 to 20 of a-z, 0-9 and -"),
    "name of the disk": (b'"layers":[', b'"disk":"A","layers":[', "a name has 1 to 20 of a-z, 0-9 and -"),
    "two disks": (b'"layers":[', b'"disk":"a","disk":"b","layers":[', 'expected "layers":['),
    "disk that is a number": (b'"layers":[', b'"disk":1,"layers":[', 'expected "'),
    "order of keys": (b'"process":{"args"', b'"process":{"env"', 'expected ],"process":{"args":'),
    "no layer": (TEXT[TEXT.index(b"[") + 1 : TEXT.index(b"]")], b"", 'expected {"name":'),
    "a key more": (b'"user":"1:2"', b'"user":"1:2","more":1', "expected }}"),
    "something behind": (b"}}", b"}}\n", "something follows the policy"),
    "cut": (b"}}", b"}", "expected }}"),
    "name": (b"layer-0", b"Layer-0", "a name has 1 to 20 of a-z, 0-9 and -"),
    "long name": (b"layer-0", b"l" * 21, "a name has 1 to 20 of a-z, 0-9 and -"),
    "format": (b'"tar-index"', b'"tar-indes"', "layer layer-0 has a format that is not known"),
    "root hash": (b"0001", b"000", "the root hash of layer layer-0 is not 64 hexadecimal digits"),
    "upper case": (b"1e1f", b"1E1F", "the root hash of layer layer-0 is not 64 hexadecimal digits"),
    "leading zero": (b":8192", b":08192", "expected a whole number up to 2^53"),
    "negative": (b":8192", b":-8192", "expected a whole number up to 2^53"),
    "too large": (b":8192", b":9007199254740993", "expected a whole number up to 2^53"),
    "overflow": (b":8192", b":18446744073709559808", "expected"),
    "one block": (b":8192", b":4096", "no whole number of hash blocks, or less than two"),
    "odd size": (b":8192", b":8704", "no whole number of hash blocks, or less than two"),
    "blocks": (b'"data_block":512', b'"data_block":4096', "has blocks of 4096 and 4096 bytes, format"),
    "escape": (b"\\u0001", b"\\n", "escape that is not"),
    "NUL": (b"\\u0001", b"\\u0000", "escape that is not"),
    "escaped letter": (b"\\u0001", b"\\u0041", "escape that is not"),
    "raw control": (b"\\u0001", b"\x01", "control character in a string"),
    "open string": (b'1:2"}}', b"1:2", 'expected "'),
    "no command": (b'"/bin/a","\\"\\\\\\u0001"', b"", "there is no command"),
    "empty command": (b'"/bin/a"', b'""', "there is no command"),
    "relative": (b'"cwd":"/"', b'"cwd":"x"', "the working directory is no absolute path"),
    "many arguments": (b'"/bin/a"', b",".join([b'"a"'] * 1025), "more than 1024 strings"),
}  # fmt: skip


@needs_gcc
@pytest.mark.parametrize("case", REFUSED)
def test_the_guest_refuses_any_other_form(guest_side: Path, case: str) -> None:
    old, new, reason = REFUSED[case]
    assert old in TEXT
    status, said = read_by_guest(guest_side, TEXT.replace(old, new, 1))
    assert status == 1
    assert said[0].startswith("policy, byte ")
    assert reason in said[0]


@needs_gcc
def test_the_guest_refuses_two_layers_of_one_name(guest_side: Path) -> None:
    layer = TEXT[TEXT.index(b"[") + 1 : TEXT.index(b"]")]
    status, said = read_by_guest(guest_side, TEXT.replace(layer, layer + b"," + layer))
    assert (status, said[0].partition(": ")[2]) == (1, "two layers have the name layer-0")


@needs_gcc
@settings(max_examples=200)
@given(at=st.integers(0, len(TEXT) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_no_changed_policy_crashes_the_guest(guest_side: Path, at: int, byte: int, cut: bool) -> None:
    text = TEXT[:at] if cut else TEXT[:at] + bytes([byte]) + TEXT[at + 1 :]
    assert read_by_guest(guest_side, text)[0] in (0, 1)


@pytest.mark.parametrize(
    ("layers", "process", "reason"),
    [
        ([], Process(["a"]), "0 layers"),
        ([LAYER] * 129, Process(["a"]), "129 layers"),
        ([LAYER, LAYER], Process(["a"]), "two layers"),
        ([LAYER], Process([]), "no command"),
        ([LAYER], Process(["a"], cwd="x"), "no absolute path"),
        ([LAYER], Process(["a\0b"]), "NUL"),
        ([LAYER], Process(["a", "\udcff"]), "not UTF-8"),
        ([LAYER], Process(["a"] * 1025), "1024"),
        ([LAYER], Process(["a" * (256 << 10)]), "over 262144"),
        ([PolicyLayer("Ä", "tar-index", bytes(32), 8192, Params(512, 4096))], Process(["a"]), "no name of a layer"),
        ([PolicyLayer("a", "tar-index", bytes(31), 8192, Params(512, 4096))], Process(["a"]), "32 bytes"),
    ],
)
def test_the_host_says_what_a_policy_cannot_hold(layers: list[PolicyLayer], process: Process, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Policy(layers, process).text()


def test_the_host_says_what_no_disk_can_be_called() -> None:
    with pytest.raises(PolicyError, match="'Layers' is no name of a disk"):
        Policy([LAYER], Process(["a"]), "Layers").text()


def test_frames_come_out_whole_however_they_arrive() -> None:
    stream = b"P\x05\0\0\0a 123" + b"O\0\0\0\0" + b"R\x03\0\0\0x\n\xff" + b"D\0\0\0\0"
    decoder = Decoder()
    found = [frame for at in range(len(stream)) for frame in decoder.feed(stream[at : at + 1])]
    assert found == [
        Frame(Kind.PHASE, b"a 123"), Frame(Kind.STDOUT, b""), Frame(Kind.REFUSED, b"x\n\xff"), Frame(Kind.DONE, b""),
    ]  # fmt: skip
    assert found[2].text == "x\ufffd\ufffd"


@pytest.mark.parametrize(("stream", "reason"), [(b"Z\0\0\0\0", "type 90"), (b"O\x01\x80\0\0", "32769 bytes")])
def test_what_is_no_frame_is_an_error(stream: bytes, reason: str) -> None:
    with pytest.raises(MachineError, match=reason):
        list(Decoder().feed(stream))


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    members = [
        cpio.Member("d", stat.S_IFDIR | 0o755),
        cpio.Member("d/file", stat.S_IFREG | 0o600, b"12345"),
        cpio.Member("d/null", stat.S_IFCHR | 0o666, rdev=(1, 3)),
    ]
    raw = cpio.archive(members)
    assert raw == cpio.archive(members)
    busybox = shutil.which("busybox")
    if not busybox:
        pytest.skip("no busybox")
    listed = subprocess.run([busybox, "cpio", "-itv"], input=raw, capture_output=True, check=True).stdout.decode()
    assert [line.split()[0] for line in listed.splitlines()] == ["drwxr-xr-x", "-rw-------", "crw-rw-rw-"]
    subprocess.run([busybox, "cpio", "-id", "d", "d/file"], input=raw, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "d/file").read_bytes() == b"12345"


@needs_gcc
def test_the_init_compiles_without_a_warning() -> None:
    program = image.compiled_init((*WARNINGS, "-Wno-format-truncation"))
    assert program.startswith(b"\x7fELF")


@needs_gcc
@needs_kernel
def test_two_builds_of_the_image_are_the_same_bytes(tmp_path: Path) -> None:
    one, other = (image.build(PACKAGES, tmp_path / name) for name in ("one", "other"))
    assert one.identity() == other.identity()
    assert {path.name for path in one.directory.iterdir()} == {"kernel", "initramfs"}


def test_what_is_no_kernel_package_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has 0 kernels"):
        image.build(tmp_path, tmp_path / "out")
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-1").write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="no bzImage"):
        image.build(tmp_path, tmp_path / "out")
    with pytest.raises(ImageError, match="no image of a UVM"):
        image.Image(tmp_path / "nothing").check()


class Probe:
    def __init__(self, boots: bool) -> None:
        self.boots, self.asked = boots, 0

    async def __call__(self) -> bool:
        self.asked += 1
        return self.boots


@pytest.fixture
def an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> image.Image:
    """On a host whose /dev/kvm opens."""
    monkeypatch.delenv(accel.VARIABLE, raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    (tmp_path / "kernel").write_bytes(b"kernel")
    return image.Image(tmp_path)


@pytest.mark.parametrize(("boots", "kind"), [(True, "kvm"), (False, "tcg")])
async def test_kvm_is_tried_once_for_each_boot_and_kernel(an_image: image.Image, boots: bool, kind: str) -> None:
    probe = Probe(boots)
    assert [await accel.chosen(an_image, probe) for _ in range(3)] == [kind] * 3
    assert probe.asked == 1
    an_image.kernel.write_bytes(b"another kernel")
    assert await accel.chosen(an_image, probe) == kind
    assert probe.asked == 2
    memory = an_image.directory / "accelerator.json"
    for garbage in ("", "1", "[]", '[["x", 1, 2], "kvm"]', '[1, "xen"]', '{"a": "b", "c": "d"}'):
        memory.write_text(garbage)
        assert await accel.chosen(an_image, probe) == kind
    assert probe.asked == 8


async def test_a_person_decides_otherwise(an_image: image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(True)
    monkeypatch.setenv(accel.VARIABLE, "tcg")
    assert (await accel.chosen(an_image, probe), probe.asked) == ("tcg", 0)
    monkeypatch.setenv(accel.VARIABLE, "xen")
    with pytest.raises(MachineError, match="TARDEV_ACCEL=xen is none of kvm, tcg"):
        await accel.chosen(an_image, probe)
