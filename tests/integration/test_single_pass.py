# SPDX-License-Identifier: Apache-2.0
"""Each blob is read once and each layer file written once: what the workers' system calls say."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from snapshotter.cli import layer as cli_layer
from tests.golden import make_tars
from tests.harness import BIN, EROFS_UTILS, erofs_tool, run
from verity import veritysetup
from verity.params import PRESETS
from verity.tree import Geometry

pytestmark = [pytest.mark.tool]

_CALLS = ("read", "readv", "pread64", "preadv", "preadv2", "write", "writev", "pwrite64", "pwritev", "pwritev2",
          "sendfile", "copy_file_range", "splice", "mmap")  # fmt: skip
_LINE = re.compile(r"(?:\d+ +)?(\w+)\((?:\d+<([^>]*)>|[^<]*?, \d+<([^>]*)>)?.* = (\d+)$")


def big_tar(size_bytes: int) -> bytes:
    """Members that neither compress away nor fit one buffer."""
    tar = make_tars.T()
    for number in range(8):
        tar.f(f"f{number}", hashlib.shake_128(b"%d" % number).digest(size_bytes // 8))
    return bytes(tar.done())


def traffic(trace: Path) -> Counter[tuple[str, str]]:
    """Bytes by ("read" or "write", path) over files; no pipes."""
    total: Counter[tuple[str, str]] = Counter()
    pending: dict[str, str] = {}
    for line in trace.read_text(errors="replace").splitlines():
        pid = line.split(" ", 1)[0]
        if "<unfinished" in line:
            pending[pid] = line.split(" <unfinished")[0]
            continue
        if "resumed>" in line:
            line = pending.pop(pid, "") + line.split("resumed>", 1)[1]
        match = re.match(r"\d+ +(\w+)\(", line)
        result = re.search(r"= (\d+)(?: |$)", line)
        path = re.search(r"\d+<(/[^>]*)>", line)
        if match and result and path and match[1] != "mmap":
            way = "write" if "write" in match[1] else "read"
            total[way, path[1].removesuffix(" (deleted)").removesuffix("(deleted)")] += int(result[1])
        elif match and match[1] == "mmap" and path and "MAP_SHARED" in line:
            total["mapped", path[1]] += 1
    return total


@pytest.mark.parametrize("kind", ["gzip", "zstd", "plain"])
def test_each_blob_is_read_once_and_each_layer_file_written_once(tmp_path: Path, kind: str) -> None:
    tar = big_tar(24 << 20)
    blob, out, trace = tmp_path / "blob", tmp_path / "layer", tmp_path / "trace"
    if kind == "gzip":
        blob.write_bytes(gzip.compress(tar, 1))
    elif kind == "zstd":
        (tmp_path / "tar").write_bytes(tar)
        run("zstd", "-q", tmp_path / "tar", "-o", blob)
    else:
        blob.write_bytes(tar)
    subprocess.run(
        ["strace", "-f", "-y", "-s", "0", "-e", f"trace={','.join(_CALLS)}", "-o", str(trace), str(BIN / "tardevctl"),
         "layer", "build", str(blob), "--output", str(out)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    found = traffic(trace)
    # four bytes more: the command looks for the compression's magic before it starts the workers
    assert found["read", str(blob)] == blob.stat().st_size + 4
    written = {path: size for (way, path), size in found.items() if way == "write" and path.startswith(str(tmp_path))}
    staged = [path for path in written if Path(path).name.startswith(".layer.")]
    assert len(staged) == 1
    assert written.pop(staged[0]) == out.stat().st_size
    assert found["read", staged[0]] == 0
    # the rest: leaf digests beyond what is kept in memory, here nothing
    assert not any(written.values()), written
    assert not any(way == "mapped" and path.startswith(str(tmp_path)) for way, path in found)


def test_spooled_leaf_digests_are_all_that_is_written_beside(tmp_path: Path) -> None:
    tar = big_tar(160 << 20)
    blob, out, trace = tmp_path / "blob", tmp_path / "layer", tmp_path / "trace"
    blob.write_bytes(tar)
    subprocess.run(
        ["strace", "-f", "-y", "-s", "0", "-e", "trace=write,writev,pwrite64", "-o", str(trace), str(BIN / "tardevctl"),
         "layer", "build", str(blob), "--output", str(out)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    found = traffic(trace)
    total = sum(size for (way, path), size in found.items() if way == "write" and path.startswith(str(tmp_path)))
    leaves = out.stat().st_size // 512 * 32
    assert out.stat().st_size < total <= out.stat().st_size + leaves


def compressed(tar: bytes, directory: Path) -> dict[str, Path]:
    plain = directory / "plain"
    plain.write_bytes(tar)
    half = len(tar) // 1024 * 512
    (directory / "gzip").write_bytes(gzip.compress(tar))
    (directory / "gzip-members").write_bytes(gzip.compress(tar[:half]) + gzip.compress(tar[half:]) + bytes(512))
    run("zstd", "-q", plain, "-o", directory / "zstd")
    for name, part in (("a", tar[:half]), ("b", tar[half:])):
        (directory / name).write_bytes(part)
        run("zstd", "-q", directory / name, "-o", directory / f"{name}.zst")
    skippable = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped"
    (directory / "zstd-frames").write_bytes(
        (directory / "a.zst").read_bytes() + skippable + (directory / "b.zst").read_bytes()
    )
    return {name: directory / name for name in ("plain", "gzip", "gzip-members", "zstd", "zstd-frames")}


def test_the_same_layer_however_compressed_is_the_same_file(tmp_path: Path) -> None:
    tar = big_tar(3 << 20)
    digests = set()
    for name, path in compressed(tar, tmp_path).items():
        out = tmp_path / f"{name}.layer"
        record = json.loads(run(BIN / "tardevctl", "layer", "build", path, "--output", out, "--json"))
        assert record["diff_id"] == "sha256:" + hashlib.sha256(tar).hexdigest()
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


VECTORS = json.loads((Path(make_tars.__file__).parent / "tar-index.json").read_text())["vectors"]


@pytest.mark.root
@pytest.mark.skipif(not EROFS_UTILS.exists(), reason="no erofs-utils 1.9; ./dev setup brings it")
@pytest.mark.parametrize("name", [vector["name"] for vector in VECTORS if "refused" not in vector])
def test_other_tools_accept_the_golden_layers(tmp_path: Path, name: str) -> None:
    layer = tmp_path / "layer"
    (tmp_path / "tar").write_bytes(bytes(make_tars.CASES[name]()))
    record = cli_layer.build(tmp_path / "tar", layer, "tar-index")
    geometry = Geometry(record["data_size_bytes"] // 512, PRESETS["tar-index"])
    veritysetup.verify(str(layer), geometry, bytes.fromhex(record["root_hash"]))
    cli_layer.verify(layer, record["root_hash"])
    extracted = tmp_path / "extracted"
    erofs_tool("fsck.erofs", f"--extract={extracted}", "--preserve", layer)
    entries = list(cli_layer.entries(layer))
    for entry in entries:
        if entry["mode"].startswith("10") and entry["path"].isprintable() and "\\" not in entry["path"]:
            status = os.lstat(extracted / entry["path"].lstrip("/"))
            found = (status.st_size, status.st_uid, status.st_nlink)
            assert found == (entry["size_bytes"], entry["uid"], entry["nlink"]), entry["path"]
    assert (
        sum(len(files) + len(directories) for _, directories, files in os.walk(os.fsencode(extracted)))
        == len(entries) - 1
    )
