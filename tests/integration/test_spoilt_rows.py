# SPDX-License-Identifier: Apache-2.0
"""A spoilt row of the metadata: the daemon starts, serves all the others, and tells of the one."""

from __future__ import annotations

import contextlib
import re
import sqlite3

import grpc
import pytest

from snapshotter import metastore
from tests.conftest import in_every_run
from tests.harness import Daemon
from tests.integration.test_damage import fsck
from tests.integration.test_snapshots_api import Api, digest_of, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]

TEXTS = ["''", "'nonsense'", "'../../x'", "CAST(x'ff00fe' AS TEXT)", "'{'", "'[1, 2]'"]
NUMBERS = ["-1", "0", "9223372036854775807"]
COLUMNS = {
    "layers": {
        **dict.fromkeys(("diff_id", "format", "root_hash", "warnings", "state"), TEXTS),
        **dict.fromkeys(
            ("tar_size_bytes", "data_size_bytes", "tree_size_bytes", "file_size_bytes", "entries", "created_ns",
             "used_ns", "verified_ns"),
            NUMBERS,
        ),
    },
    "snapshots": {
        **dict.fromkeys(("snapshotter", "name", "kind", "labels", "chain_id", "links"), TEXTS),
        **dict.fromkeys(("extraction", "created_ns", "updated_ns"), NUMBERS),
    },
    "blobs": {**dict.fromkeys(("digest", "compression", "diff_id"), TEXTS), "size_bytes": NUMBERS},
}  # fmt: skip
CASES = [
    (table, column, value)
    for table, columns in COLUMNS.items()
    for column, values in columns.items()
    for value in values
]
EVERY_RUN = {("layers", "warnings", "'{'"), ("layers", "format", "'../../x'"), ("snapshots", "kind", "'nonsense'")}


@pytest.mark.parametrize("case", in_every_run(CASES, EVERY_RUN.__contains__), ids=lambda case: "-".join(case[:2]))
def test_all_the_others_are_served(daemon: Daemon, case: tuple[str, str, str]) -> None:
    table, column, value = case
    with daemon.client() as client:
        api = Api(daemon, client)
        spoilt, other = api.layer("a"), api.layer("b")
        api.prepare("default/80/on-a", spoilt)
    daemon.stop()
    [layer_id] = [layer.id for layer in daemon.layers() if layer.diff_id == digest_of(tar_of("a"))]
    where = {
        "layers": f"id = {layer_id}",
        "snapshots": f"layer_id = {layer_id}",
        "blobs": f"diff_id = '{digest_of(tar_of('a'))}'",
    }
    with contextlib.closing(sqlite3.connect(daemon.root / metastore.FILE_NAME)) as database:
        assert database.execute(f"UPDATE {table} SET {column} = {value} WHERE {where[table]}").rowcount == 1
        database.commit()
    daemon.restart()
    with daemon.client() as client:
        api = Api(daemon, client)
        assert other in api.list()
        api.prepare("default/90/c", other)
        for call in (
            lambda: api.prepare("default/91/c", spoilt), lambda: api.remove("default/80/on-a"),
            lambda: api.remove(spoilt), api.cleanup,
        ):  # fmt: skip
            refused = None
            try:
                call()
            except grpc.RpcError as error:
                refused = error
            assert refused is None or refused.code() is not grpc.StatusCode.UNKNOWN, refused
        assert other in api.list()
        api.prepare("default/92/c", other)
        api.layer("c")
    status, findings = fsck(daemon)
    assert status in (0, 1)
    assert not [found for found in findings if re.search("Traceback|NoneType", str(found))]
