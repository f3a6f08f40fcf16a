# SPDX-License-Identifier: Apache-2.0
"""Vectors of parents.json and parents-4k.json, by the model of the document; the engine has no part in it.

usage: python -m tests.golden.make_parents   -> adds those that are missing; what is there is never changed
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from tests.golden.make_tars import EOA, PX, D, F, S
from tests.golden.make_vectors import known
from tests.property import parents_model

VECTORS: Final = {
    "tar-index": Path(__file__).parent / "parents.json",
    "erofs-4k": Path(__file__).parent / "parents-4k.json",
}
ABOUT: Final = (
    "%s-parents v1: chains of tars, the first layer first, and the parents layer that each needs, or none; tars "
    "come from make_parents.py; written by tests/property/parents_model.py; test_parents.py holds them against the "
    'engine, the kernel, "fsck.erofs" and "veritysetup"'
)


def xattrs(*pairs: tuple[bytes, bytes]) -> bytes:
    made: bytes = PX(*((b"SCHILY.xattr." + name, value) for name, value in pairs))
    return made


def whiteout(path: bytes) -> bytes:
    above, _, name = path.rpartition(b"/")
    made: bytes = F((above + b"/" if above else b"") + b".wh." + name)
    return made


OPAQUE: Final = b".wh..wh..opq"
ACL: Final = bytes.fromhex(
    "02000000 01000700ffffffff 02000500e8030000 04000500ffffffff 10000500ffffffff 20000000ffffffff"
)
LOW: Final = (
    D(b"a/", mode=0o2750, uid=7, gid=8) + D(b"a/b/", mode=0o700, uid=300_000) + D(b"a/b/c/", mode=0o711)
    + D(b"plain/") + F(b"a/b/x", b"1") + D(b"z/", mode=0o1777)
)  # fmt: skip

CHAINS: Final[dict[str, list[bytes]]] = {
    "one-layer": [F(b"a/b/x")],
    "no-made-directory": [LOW, D(b"a/", mode=0o701) + F(b"a/y")],
    "made-as-it-was": [LOW, F(b"plain/y")],
    "owner-and-mode": [LOW, F(b"a/y")],
    "ancestors": [LOW, F(b"a/b/c/y")],
    "ancestors-with-entries": [D(b"p/") + D(b"p/q/", mode=0o700), D(b"p/", mode=0o711, uid=5) + F(b"p/q/y")],
    "mode-alone": [D(b"a/", mode=0o711), F(b"a/y")],
    "uid-alone": [D(b"a/", uid=1), F(b"a/y")],
    "gid-alone": [D(b"a/", gid=1), F(b"a/y")],
    "time-alone": [D(b"a/", mtime=5), F(b"a/y")],
    "xattrs": [
        xattrs((b"user.b", b"2"), (b"user.a", b"\0\xff"), (b"security.selinux", b"label\0"),
               (b"system.posix_acl_access", ACL), (b"user.long", b"v" * 3000)) + D(b"a/"),
        F(b"a/y"),
    ],
    "empty-xattr": [xattrs((b"user.empty", b"")) + D(b"a/"), F(b"a/y")],
    "entry-after": [xattrs((b"user.low", b"1"), (b"user.both", b"1")) + D(b"a/", mode=0o700),
                    F(b"a/y") + xattrs((b"user.own", b"2"), (b"user.both", b"2")) + D(b"a/", mode=0o711, uid=9)],
    "entry-before": [xattrs((b"user.low", b"1")) + D(b"a/", mode=0o700), D(b"a/", mode=0o711) + F(b"a/y")],
    "several-layers": [LOW, F(b"z/y"), F(b"a/b/y"), F(b"a/w") + D(b"plain/new/", uid=5), F(b"plain/new/w")],
    "carried-on": [LOW, F(b"a/b/y"), F(b"other/y"), D(b"a/", mode=0o755, uid=1)],
    "covered-by-an-entry": [LOW, F(b"a/y"), D(b"a/", mode=0o705)],
    "made-again": [LOW, F(b"a/y"), F(b"a/w"), F(b"a/v")],
    "whited-out": [LOW, F(b"a/b/y"), whiteout(b"a/b")],
    "whited-out-above": [LOW, F(b"a/b/y"), whiteout(b"a")],
    "whited-out-and-again": [LOW, whiteout(b"a"), F(b"a/b/y")],
    "file-and-again": [LOW, F(b"a/b/y"), F(b"a"), F(b"a/b/w")],
    "symlink-and-again": [LOW, F(b"a/b/y"), S(b"a", b"z"), F(b"a/b/w")],
    "opaque": [LOW, F(b"a/y") + F(b"a/" + OPAQUE)],
    "below-opaque": [LOW, F(b"a/b/y") + F(b"a/" + OPAQUE)],
    "opaque-later": [LOW, F(b"a/b/y"), F(b"a/" + OPAQUE) + D(b"a/", mode=0o700)],
    "opaque-in-between": [LOW, D(b"a/") + F(b"a/" + OPAQUE), F(b"a/b/y")],
    "opaque-root": [LOW, F(OPAQUE) + F(b"a/b/y")],
    "opaque-entry-later": [LOW, F(b"a/b/y"), D(b"a/", mode=0o700) + F(b"a/" + OPAQUE)],
    "opaque-root-in-between": [LOW, F(OPAQUE), F(b"a/b/y")],
    "replaced-within": [LOW, F(b"a/b/y") + F(b"a/b") + whiteout(b"z/n")],
    "group": [D(b"a/", mode=0o2775, gid=50), F(b"a/new/deep/y")],
    "group-without-the-bit": [D(b"a/", mode=0o775, gid=50), F(b"a/new/deep/y")],
    "group-of-one-carried": [D(b"a/", mode=0o2775, gid=50), F(b"a/y"), D(b"a/", mode=0o755, gid=60) + F(b"a/new/y")],
    "group-of-an-entry": [D(b"a/", mode=0o755, gid=50), D(b"a/", mode=0o2775, gid=60) + F(b"a/new/y")],
    "group-before-the-entry": [D(b"a/", mode=0o2775, gid=50), F(b"a/new/y") + D(b"a/", mode=0o711)],
    "through-a-symlink": [LOW, S(b"link", b"a/b") + F(b"link/c/y")],
    "twice-the-same-layer": [LOW, F(b"a/b/y"), LOW, F(b"a/b/y")],
    "names": [b"".join(D(name + b"/", uid=1) for name in (b"!", b"a", b"a!", b"a\xff", b"\xff", b"B", b"n" * 100)),
              b"".join(F(name + b"/y") for name in (b"!", b"a", b"a!", b"a\xff", b"\xff", b"B", b"n" * 100))],
    "many": [b"".join(D(b"d%03d/" % n, uid=n + 1) for n in range(200)),
             b"".join(F(b"d%03d/y" % n) for n in range(200))],
    "deep": [b"".join(D(b"d/" * n, uid=n) for n in range(1, 40)), F(b"d/" * 39 + b"y")],
}  # fmt: skip


def tars_of(name: str) -> list[bytes]:
    return [tar + EOA for tar in CHAINS[name]]


def vector_of(name: str, of: str) -> dict[str, Any]:
    tars = tars_of(name)
    vector: dict[str, Any] = {"name": name, "tar_sha256": [hashlib.sha256(tar).hexdigest() for tar in tars]}
    layer = parents_model.layer_file(tars, of)
    if layer is None:
        return {**vector, "needs": "none"}
    return {
        **vector,
        "identity": layer.diff_id.hex(),
        "table_size": len(parents_model.table(tars)),
        "data_size": layer.data_size,
        "inodes": layer.inodes,
        "root_hash": layer.root_hash.hex(),
        "file_sha256": hashlib.sha256(layer.file).hexdigest(),
        "file_size": len(layer.file),
    }


def main() -> None:
    for of, path in VECTORS.items():
        vectors = known(path)
        for name in CHAINS:
            if name not in vectors:
                vectors[name] = vector_of(name, of)
        path.write_text(
            json.dumps({"about": ABOUT.replace("%s", of), "vectors": list(vectors.values())}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
