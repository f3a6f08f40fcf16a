# SPDX-License-Identifier: Apache-2.0
"""`tardevctl layer` in more than one format: pipes, bad blocks, extraction, tar, cat, diff."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotter.cli import layer as cli_layer
from snapshotter.cli import output as cli_output
from snapshotter.trash import remove_tree
from tests.conftest import in_every_run
from tests.file_trees import differences, observe
from tests.golden import make_tars, test_tarfs
from tests.golden.test_tar_index import build
from tests.unit.test_cli import TARDEVCTL, output, some_tar, tardevctl

ROOT = os.geteuid() == 0
FORMATS = ("tar-index", "erofs-4k", "tarfs")
ODD = b"\xff\x1b[31m\\n\n"


def many_kinds() -> bytes:
    tar = make_tars.T()
    tar.d("d", mode=0o750)
    tar.f("d/file", b"content" * 1000, mode=0o4755, mtime=1_700_000_000)
    tar.h("z-link", "d/file", mode=0o4755, mtime=1_700_000_000)
    tar.s("link", "d/file")
    tar.d("empty")
    tar.f("d/.wh.gone")
    tar.f("empty/.wh..wh..opq")
    tar.f(ODD.decode("utf-8", "surrogateescape"), b"odd")
    return bytes(tar.done())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One layer in all formats."""
    (tmp_path / "tar").write_bytes(many_kinds())
    found = {"tar": tmp_path / "tar"}
    for layer_format in FORMATS:
        found[layer_format] = tmp_path / layer_format
        cli_layer.build(found["tar"], found[layer_format], layer_format)
    return found


def refused(done: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("tardevctl: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()
    for word in words:
        assert word in done.stderr


# --- build


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, lambda data: gzip.compress(data[:2000]) + gzip.compress(data[2000:])]
)
@pytest.mark.parametrize("how", ["pipe", "file", "file from its middle"])
def test_a_build_reads_standard_input(tmp_path: Path, pack: Callable[[bytes], bytes], how: str) -> None:
    blob = pack(many_kinds())
    command: list[str | Path] = [TARDEVCTL, "layer", "build", "-", "--output", tmp_path / "layer", "--json"]
    if how == "pipe":
        done = subprocess.run(command, input=blob, capture_output=True, timeout=60, check=False)
    else:
        front = b"front" * 100 if "middle" in how else b""
        (tmp_path / "blob").write_bytes(front + blob)
        with (tmp_path / "blob").open("rb", buffering=0) as file:
            file.seek(len(front))
            done = subprocess.run(command, stdin=file, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert (tmp_path / "layer").read_bytes() == build(many_kinds())[1]
    assert json.loads(done.stdout)["diff_id"] == "sha256:" + hashlib.sha256(many_kinds()).hexdigest()


@pytest.mark.parametrize("blob", [b"", b"\x1f", b"abc", b"\x1f\x8b\x08\x00" + b"x" * 3_000_000, b"x" * 3_000_000])
def test_what_comes_through_a_pipe_and_is_no_layer_is_refused(tmp_path: Path, blob: bytes) -> None:
    """However much of it is left to read."""
    process = subprocess.Popen(
        [TARDEVCTL, "layer", "build", "-", "--output", tmp_path / "layer"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, errors = process.communicate(blob, timeout=60)
    assert process.returncode == (1 if blob else 0)  # nothing at all is an empty layer
    assert (b"standard input" in errors) == bool(blob)
    assert [path.name for path in tmp_path.iterdir()] == ([] if blob else ["layer"])


def test_a_build_with_another_diff_id_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(some_tar())
    arguments = ("layer", "build", tmp_path / "tar", "--output", tmp_path / "layer", "--diff-id")
    refused(tardevctl(*arguments, "sha256:" + "0" * 64), "sha256:" + hashlib.sha256(some_tar()).hexdigest())
    refused(tardevctl(*arguments, "sha256:0"), "64 hexadecimal digits")
    assert [path.name for path in tmp_path.iterdir()] == ["tar"]
    assert tardevctl(*arguments, "sha256:" + hashlib.sha256(some_tar()).hexdigest()).returncode == 0


def test_a_strict_build_refuses_what_the_format_loses(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(many_kinds())
    arguments = ("layer", "build", tmp_path / "tar", "--output", tmp_path / "layer", "--strict", "--format")
    refused(tardevctl(*arguments, "tarfs"), "lost_mode_bits")
    assert tardevctl(*arguments, "tar-index").returncode == 0


def test_progress_is_for_terminals() -> None:
    with cli_output.progress("x") as report:
        report(1, None)  # standard error is a pipe here: nothing happens


@pytest.mark.parametrize("blob", ["file", "pipe"])
def test_the_bytes_of_the_blob_are_reported(tmp_path: Path, blob: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_layer, "_SAMPLED_SECONDS", 0.001)
    tar = make_tars.T()
    tar.f("f", bytes(20_000_000))
    data = tar.done()
    source = tmp_path / "tar"
    seen: list[tuple[int, int | None]] = []
    if blob == "file":
        source.write_bytes(data)
        cli_layer.build(source, tmp_path / "layer", "tar-index", progress=lambda *at: seen.append(at))
    else:
        os.mkfifo(source)
        with subprocess.Popen([sys.executable, "-c", f"open({str(source)!r}, 'wb').write(bytes(20_000_000))"]):
            cli_layer.build(source, tmp_path / "layer", "tar-index", progress=lambda *at: seen.append(at))
    assert {total for _, total in seen} == {len(data) if blob == "file" else None}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] > 1_000_000


# --- verify, inspect


def flipped(path: Path, at: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def bad_block(path: Path, root_hash: str, *words: str) -> dict[str, Any]:
    refused(tardevctl("layer", "verify", path, "--root-hash", root_hash), *words)
    done = tardevctl("layer", "verify", path, "--root-hash", root_hash, "--json")
    assert done.returncode == 1
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["verified"] is False
    return found


@pytest.mark.parametrize("layer_format", ["tar-index", pytest.param("erofs-4k", marks=pytest.mark.soak), "tarfs"])
def test_verify_says_what_lies_in_the_first_bad_block(tmp_path: Path, layer_format: str) -> None:
    (tmp_path / "tar").write_bytes(make_tars.CASES["big5m"]())
    path = tmp_path / "layer"
    record = cli_layer.build(tmp_path / "tar", path, layer_format)
    whole = path.read_bytes()
    shown = output("layer", "inspect", path)
    entry = max(output("layer", "ls", path), key=lambda entry: int(entry["size_bytes"]))
    regions = {region["name"]: region for region in shown["regions"]}
    assert sum(region["size_bytes"] for region in shown["regions"]) == len(whole)
    tree = regions["hash tree"]["offset_bytes"]
    block = shown["data_block_bytes"]

    data = "file data" if layer_format == "erofs-4k" else "tar"
    inside = regions[data]["offset_bytes"] + shown["tar_size_bytes"] // 2
    flipped(path, inside)
    found = bad_block(path, record["root_hash"], entry["path"], "data block")
    assert (found["kind"], found["region"], found["block"]) == ("data", data, inside // block)
    assert found["paths"] == [entry["path"]]
    flipped(path, inside)

    if layer_format == "tar-index":
        flipped(path, shown["tar_offset_bytes"] + 3)
        assert bad_block(path, record["root_hash"], "tar headers")["paths"] == []
        flipped(path, shown["tar_offset_bytes"] + 3)
    if layer_format == "erofs-4k":
        assert shown["tar_offset_bytes"] is None
        flipped(path, regions["tar headers"]["offset_bytes"] + 3)
        assert bad_block(path, record["root_hash"])["region"] == "tar headers"
        flipped(path, regions["tar headers"]["offset_bytes"] + 3)
        flipped(path, regions["index"]["offset_bytes"] + 3)
        assert bad_block(path, record["root_hash"], "the ends of files")["paths"] == ["/after"]
        flipped(path, regions["index"]["offset_bytes"] + 3)

    in_index = regions["index"]["offset_bytes"] + 8
    flipped(path, in_index)
    # In tarfs the index begins where the tar ends, within a block.
    assert bad_block(path, record["root_hash"], "index")["region"] == ("tar" if layer_format == "tarfs" else "index")
    flipped(path, in_index)

    for level in shown["levels"]:
        flipped(path, level["offset_bytes"])
        found = bad_block(path, record["root_hash"], f"level {level['level']} of")
        assert (found["kind"], found["level"], found["block"]) == ("hash", level["level"], 0)
        assert found["offset_bytes"] == level["offset_bytes"]
        flipped(path, level["offset_bytes"])
    assert len(shown["levels"]) > 1
    flipped(path, tree + shown["tree_size_bytes"] - 1)
    assert bad_block(path, record["root_hash"])["kind"] == "hash"
    flipped(path, tree + shown["tree_size_bytes"] - 1)
    assert path.read_bytes() == whole
    assert tardevctl("layer", "verify", path, "--root-hash", record["root_hash"]).returncode == 0


def test_verify_says_which_root_hash_the_file_names(files: dict[str, Path]) -> None:
    named = output("layer", "inspect", files["tar-index"])["root_hash"]
    bad_block(files["tar-index"], "0" * 64, named)


def test_verify_holds_the_file_against_format_and_diff_id(files: dict[str, Path]) -> None:
    diff_id = "sha256:" + hashlib.sha256(many_kinds()).hexdigest()
    for name, other in (("tar-index", "tarfs"), ("tarfs", "tar-index"), ("erofs-4k", "tarfs")):
        root_hash = cli_layer.build(files["tar"], files[name], name)["root_hash"]
        arguments = ("layer", "verify", files[name], "--root-hash", root_hash)
        assert output(*arguments, "--format", name, "--diff-id", diff_id)["diff_id"] == diff_id
        refused(tardevctl(*arguments, "--format", other), name, other)
        refused(tardevctl(*arguments, "--diff-id", "sha256:" + "0" * 64), diff_id)
        refused(tardevctl(*arguments, "--format", "tarf"), "'tarf'")


@pytest.mark.parametrize("layer_format", FORMATS)
def test_inspect_counts_and_says_how_to_open(files: dict[str, Path], layer_format: str) -> None:
    root_hash = cli_layer.build(files["tar"], files[layer_format], layer_format)["root_hash"]
    found = output("layer", "inspect", files[layer_format], "--root-hash", root_hash)
    assert root_hash in found["dm_table"]
    assert f"--data-blocks={found['data_blocks']}" in found["veritysetup"]
    assert found["types"]["directories"] == 3
    assert found["types"]["symlinks"] == found["types"]["whiteouts"] == found["types"]["opaque directories"] == 1
    assert found["types"]["further names of hardlinked files"] == 1
    assert found["names"] == 8
    assert found["warnings"] == {}
    assert found["superblock"]["inodes"] == found["entries"]
    assert ("uuid" in found["superblock"]) == (layer_format != "tarfs")
    assert "hash tree" in tardevctl("layer", "inspect", files[layer_format]).stdout


def test_inspect_counts_what_a_tarfs_layer_hides(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(test_tarfs.build(make_tars.CASES["missing-parents"]())[1])
    assert cli_layer.inspect(tmp_path / "layer")["warnings"]["names that the kernel does not show"] > 0


def test_inspect_shows_the_rest_where_the_index_is_broken(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(build(some_tar())[1])
    flipped(layer, cli_layer.inspect(layer)["index_offset_bytes"] + 64)
    done = tardevctl("layer", "inspect", layer, "--json")
    refused(done, "index")
    assert json.loads(done.stdout)["index_error"]


# --- ls, cat, tar


def test_ls_of_a_path(files: dict[str, Path]) -> None:
    for path in ("d", "/d", "/d/"):
        assert [entry["path"] for entry in output("layer", "ls", files["tar-index"], path)] == [
            "/d",
            "/d/file",
            "/d/gone",
        ]
    assert len(output("layer", "ls", files["tar-index"], "/")) == 8
    refused(tardevctl("layer", "ls", files["tar-index"], "/link/file"), "link/file")


def test_odd_names_are_escaped(files: dict[str, Path]) -> None:
    lines = tardevctl("layer", "ls", files["tar-index"]).stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[-1].endswith(r"/\xff\x1b[31m\\n\n")
    assert output("layer", "ls", files["tar-index"], os.fsdecode(ODD))[0]["path"] == "/\\xff\x1b[31m\\\\n\n"


def test_who_has_read_enough_is_no_error(tmp_path: Path) -> None:
    tar = make_tars.T()
    for number in range(20_000):
        tar.f(f"file-{number}")
    (tmp_path / "layer").write_bytes(build(tar.done())[1])
    done = subprocess.run(
        ["bash", "-c", f"{TARDEVCTL} layer ls {tmp_path}/layer | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[1] == "141"
    assert done.stderr == ""


@pytest.mark.parametrize("layer_format", FORMATS)
def test_cat_gives_the_content(files: dict[str, Path], layer_format: str) -> None:
    file = files[layer_format]
    for name in ("d/file", "/z-link"):
        assert tardevctl("layer", "cat", file, name).stdout == "content" * 1000
        found = output("layer", "cat", file, name)
        assert base64.b64decode(found["content_base64"]) == b"content" * 1000
    assert tardevctl("layer", "cat", file, os.fsdecode(ODD)).stdout == "odd"
    refused(tardevctl("layer", "cat", file, "/link"), "symlink to d/file")
    refused(tardevctl("layer", "cat", file, "/d"), "no regular file")
    refused(tardevctl("layer", "cat", file, "/nothing"), "nothing")
    refused(tardevctl("layer", "cat", file, "/link/file"), "link/file")


@pytest.mark.parametrize("layer_format", FORMATS)
def test_tar_gives_the_tar_and_checks_it(files: dict[str, Path], tmp_path: Path, layer_format: str) -> None:
    diff_id = "sha256:" + hashlib.sha256(many_kinds()).hexdigest()
    file = files[layer_format]
    done = subprocess.run([TARDEVCTL, "layer", "tar", file], capture_output=True, timeout=60, check=True)
    assert done.stdout == many_kinds()
    assert done.stderr.decode() == ("" if layer_format != "tarfs" else f"tardevctl: diff ID {diff_id}\n")
    assert output("layer", "tar", file, "-o", tmp_path / "out")["diff_id"] == diff_id
    assert (tmp_path / "out").read_bytes() == many_kinds()
    refused(tardevctl("layer", "tar", file, "-o", tmp_path / "no", "--diff-id", "sha256:" + "0" * 64), diff_id)
    flipped(file, 5000)
    wrong = tardevctl("layer", "tar", file, "-o", tmp_path / "no", "--diff-id", diff_id)
    refused(wrong, diff_id)
    if layer_format != "tarfs":
        refused(tardevctl("layer", "tar", file, "-o", tmp_path / "no"), diff_id)
    assert not (tmp_path / "no").exists()
    assert tardevctl("layer", "tar", file, "--json").returncode == 2


# --- diff


def test_a_layer_equals_itself(files: dict[str, Path]) -> None:
    done = tardevctl("layer", "diff", files["tar-index"], files["tar-index"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert output("layer", "diff", files["tarfs"], files["tarfs"]) == []
    assert output("layer", "diff", files["tar-index"], files["erofs-4k"]) == []


def test_diff_lists_what_a_format_cannot_express(files: dict[str, Path]) -> None:
    done = tardevctl("layer", "diff", files["tar-index"], files["tarfs"], "--json")
    assert done.returncode == 1
    found = {item["path"]: item for item in json.loads(done.stdout)}
    assert found["/d/file"]["attributes"] == {"mode": ["104755", "100755"], "nlink": [2, 1]}
    assert "mode" in found["/"]["attributes"]
    assert "/empty" not in found


def test_diff_names_attributes_and_contents(tmp_path: Path) -> None:
    tars = [make_tars.T(tarfile.PAX_FORMAT), make_tars.T(tarfile.PAX_FORMAT)]
    for number, tar in enumerate(tars):
        tar.d("d", mode=0o755 - number, pax={"SCHILY.xattr.user.x": str(number)})
        tar.f("d/content", b"one two"[number : number + 3])
        tar.f("d/size", b"x" * number)
        tar.f(f"only-{number}")
        tar.s("symlink", f"to-{number}")
        tar.f("same", b"same")
        tar.f("d!", b"between d and d/")
    for number, tar in enumerate(tars):
        (tmp_path / str(number)).write_bytes(build(tar.done())[1])
    done = tardevctl("layer", "diff", tmp_path / "0", tmp_path / "1", "--json")
    assert done.returncode == 1
    digests = [hashlib.sha256(b"one two"[number : number + 3]).hexdigest() for number in (0, 1)]
    assert {item["path"]: (item["change"], item["attributes"]) for item in json.loads(done.stdout)} == {
        "/d": ("changed", {"mode": ["040755", "040754"], "xattr user.x": ["30", "31"]}),
        "/d/content": ("changed", {"content": digests}),
        "/d/size": ("changed", {"size": [0, 1]}),
        "/only-0": ("removed", {}),
        "/only-1": ("added", {}),
        "/symlink": ("changed", {"link": ["to-0", "to-1"]}),
    }
    lines = tardevctl("layer", "diff", tmp_path / "0", tmp_path / "1").stdout.splitlines()
    assert lines[0].startswith("* /d  mode 040755 -> 040754")
    assert "- /only-0" in lines
    assert "+ /only-1" in lines


def test_diff_has_a_status_for_trouble(files: dict[str, Path]) -> None:
    refused(tardevctl("layer", "diff", files["tar"], files["tarfs"]), "no valid trailer", status=2)


# --- extract


def test_extract_says_what_it_did(files: dict[str, Path], tmp_path: Path) -> None:
    found = output("layer", "extract", files["tar-index"], tmp_path / "out")
    assert (found["entries"], found["data_size_bytes"]) == (8, 7003)
    assert (tmp_path / "out/d/file").read_bytes() == b"content" * 1000
    assert os.path.samefile(tmp_path / "out/d/file", tmp_path / "out/z-link")
    refused(tardevctl("layer", "extract", files["tar-index"], tmp_path / "out"), "not empty")


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_both_formats_come_out_with_the_attributes_they_have(files: dict[str, Path], tmp_path: Path) -> None:
    for layer_format in ("tar-index", "tarfs"):
        done = cli_layer.extract(files[layer_format], tmp_path / f"{layer_format}-out")
        assert done["warnings"] == {}
    left, right = observe(tmp_path / "tar-index-out"), observe(tmp_path / "tarfs-out")
    assert left[b"empty"]["xattrs"] == {"trusted.overlay.opaque": b"y"}
    assert left[b"d/gone"]["rdev"] == 0
    assert stat.S_ISCHR(int(left[b"d/gone"]["mode"], 8))
    found = differences(left, right)
    assert found.pop(b"")
    assert found == {
        b"d/file": {"mode": ("0o104755", "0o100755")},
        b"z-link": {"mode": ("0o104755", "0o100755")},
    }


@pytest.mark.parametrize("layer_format", FORMATS)
def test_whiteouts_as_oci_has_them(files: dict[str, Path], tmp_path: Path, layer_format: str) -> None:
    cli_layer.extract(files[layer_format], tmp_path / "out", oci_whiteouts=True)
    found = observe(tmp_path / "out")
    assert {b"d/.wh.gone", b"empty/.wh..wh..opq"} < set(found)
    assert found[b"empty"]["xattrs"] == {}
    assert found[b"d/.wh.gone"]["size"] == 0


def test_only_some_paths(files: dict[str, Path], tmp_path: Path) -> None:
    layer = files["tar-index"]
    cli_layer.extract(layer, tmp_path / "one", [b"d/file", b"z-link"])
    assert set(observe(tmp_path / "one")) == {b"", b"d", b"d/file", b"z-link"}
    cli_layer.extract(layer, tmp_path / "two", [b"z-link", b"empty"])
    assert set(observe(tmp_path / "two")) == {b"", b"empty", b"z-link"}
    assert (tmp_path / "two/z-link").read_bytes() == b"content" * 1000
    refused(tardevctl("layer", "extract", layer, tmp_path / "three", "d", "d/none"), "d/none")
    assert not (tmp_path / "three").exists()


def test_extract_verifies_first(files: dict[str, Path], tmp_path: Path) -> None:
    layer = files["tar-index"]
    root_hash = output("layer", "inspect", layer)["root_hash"]
    flipped(layer, output("layer", "inspect", layer)["index_offset_bytes"] - 1)
    refused(tardevctl("layer", "extract", layer, tmp_path / "out", "--root-hash", root_hash), "data block")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ways", [("copy_file_range",), ("copy_file_range", "sendfile")])
def test_the_data_comes_however_the_kernel_lets_it(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    for way in ways:
        monkeypatch.setattr(os, way, refuse)
    cli_layer.extract(files["tar-index"], tmp_path / "out")
    assert (tmp_path / "out/d/file").read_bytes() == b"content" * 1000


@pytest.mark.skipif(not ROOT, reason="needs root, to be somebody else")
def test_what_only_root_may_set_is_a_warning_for_others(tmp_path: Path) -> None:
    tar = make_tars.T()
    tar.d("d", mode=0o500, uid=5)
    tar.f("d/file", b"x", mode=0o4755, uid=5)
    tar.add("device", b"3", dev=(1, 3))
    tar.f(".wh.gone")
    tar.d("opaque")
    tar.f("opaque/.wh..wh..opq")
    program = "import sys; from snapshotter.cli.main import main; sys.argv[0] = 'tardevctl'; main()"
    with tempfile.TemporaryDirectory() as place:  # not below pytest's, which is root's alone
        os.chmod(place, 0o777)
        (Path(place) / "layer").write_bytes(build(tar.done())[1])
        done = subprocess.run(
            [sys.executable, "-c", program, "layer", "extract", f"{place}/layer", f"{place}/out", "--json"],
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if "No module named" in done.stderr:
            pytest.skip("the program itself lies where only root can read")
        assert done.returncode == 0, done.stderr
        found = observe(Path(place) / "out")
    warnings = json.loads(done.stdout)["warnings"]
    assert warnings == {"unmade_devices": 1, "unset_owners": 5, "unset_set_id_bits": 1, "unset_xattrs": 1}
    assert "warning: unset owners: 5" in done.stderr
    assert found[b"d/file"]["mode"] == "0o100755"
    assert found[b"d"]["mode"] == "0o40500"
    assert found[b"gone"]["mode"] == "0o20000"
    assert b"device" not in found


@pytest.mark.parametrize("levels", in_every_run([4_000, 30_000], {4_000}.__contains__))
def test_a_very_deep_tree_comes_out_with_few_descriptors(tmp_path: Path, levels: int) -> None:
    name = b"d/" * levels + b"file"
    tar = bytes(make_tars.PX((b"path", name))) + bytes(make_tars.F(b"x", b"deep")) + bytes(make_tars.EOA)
    (tmp_path / "layer").write_bytes(build(tar)[1])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, limits[1]))
    try:
        done = cli_layer.extract(tmp_path / "layer", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert done["entries"] == levels + 2
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    for _ in range(levels):
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with os.fdopen(os.open("file", os.O_RDONLY, dir_fd=fd), "rb") as file:
        assert file.read() == b"deep"
    os.close(fd)
    remove_tree(tmp_path / "out")


def test_several_formats_are_built_at_once(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(make_tars.CASES["plain"]())
    names = ("tarfs", "erofs-4k", "tar-index")
    options = [option for name in names for option in ("--format", name, "--output", tmp_path / name)]
    done = tardevctl("layer", "build", tmp_path / "tar", *options, "--json")
    records = json.loads(done.stdout)
    assert [record["format"] for record in records] == list(names)
    for record in records:
        alone = cli_layer.build(tmp_path / "tar", tmp_path / "alone", record["format"])
        assert alone == record
        assert (tmp_path / "alone").read_bytes() == (tmp_path / record["format"]).read_bytes()
    assert tardevctl("layer", "build", tmp_path / "tar", *options[:-2]).returncode == 2
