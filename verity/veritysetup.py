# SPDX-License-Identifier: Apache-2.0
"""cryptsetup's veritysetup: the independent second opinion on root hashes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from typing import Final

from verity.errors import VeritysetupFailed
from verity.params import Params
from verity.tree import Geometry

_TIMEOUT_SECONDS: Final = 3600
_SEARCH_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"


def verify(path: str, geometry: Geometry, root_hash: bytes) -> None:
    """Accept or refuse a layer file: data, tree right after it. Raises VeritysetupFailed."""
    options = _options(geometry.params, geometry.data_blocks, geometry.data_size_bytes)
    _run("verify", *options, path, path, root_hash.hex())


def command_line(path: str, geometry: Geometry, root_hash: str) -> str:
    """What `verify` runs, for a person to run."""
    options = _options(geometry.params, geometry.data_blocks, geometry.data_size_bytes)
    return shlex.join(("veritysetup", "verify", *options, path, path, root_hash))


def format_tree(data_path: str, hash_path: str, params: Params, data_blocks: int) -> bytes:
    """Write a tree for `data_path` at the start of `hash_path`; the root hash. Raises VeritysetupFailed."""
    out = _run("format", *_options(params, data_blocks, 0), data_path, hash_path)
    match = re.search(r"^Root hash:\s*([0-9a-f]{64})$", out, re.MULTILINE)
    if not match:
        raise VeritysetupFailed(f"veritysetup format named no root hash: {out[:500]!r}")
    return bytes.fromhex(match[1])


def _options(params: Params, data_blocks: int, hash_offset: int) -> list[str]:
    return [
        "--no-superblock", "--format=1", "--hash=sha256",
        f"--data-block-size={params.data_block_bytes}", f"--hash-block-size={params.hash_block_bytes}",
        f"--data-blocks={data_blocks}", f"--hash-offset={hash_offset}", f"--salt={params.salt.hex() or '-'}",
    ]  # fmt: skip


def _run(*arguments: str) -> str:
    program = shutil.which("veritysetup", path=_SEARCH_PATH)
    if program is None:
        raise VeritysetupFailed("veritysetup is not installed (Debian: cryptsetup-bin)")
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False,
            stdin=subprocess.DEVNULL, env={"LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise VeritysetupFailed(f"veritysetup {arguments[0]} did not end in {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise VeritysetupFailed(f"veritysetup {arguments[0]} ended with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout
