# SPDX-License-Identifier: Apache-2.0
"""What the builder is started with. A module of its own: the decompressor starts quicker without."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from blockdev.formats.limits import Limits
from blockdev.workers.ring import RingEnd


@dataclass(frozen=True, slots=True)
class Output:
    """One layer file of a build: all three are empty files that can be read and written.

    `table_fd` gets the table of the directories that the layer made, and stays empty without any. `index_only`: the
    tar is hashed and not written, nor are hash tree and trailer; what is written is the index, in its place, and it
    is not durable.
    """

    format: str
    staged_fd: int
    spool_fd: int
    table_fd: int | None = None
    index_only: bool = False

    def descriptors(self) -> tuple[int, ...]:
        files = (self.staged_fd, self.spool_fd)
        return files if self.table_fd is None else (*files, self.table_fd)


@dataclass(frozen=True, slots=True)
class BuilderParameters:
    """File descriptor numbers are the builder's own. A plain blob needs no decompressor, and so no rings."""

    blob_fd: int
    compressed: RingEnd | None  # to the decompressor
    tar: RingEnd | None  # from it
    outputs: tuple[Output, ...]
    strict: bool
    expected_digest: str | None
    expected_size_bytes: int | None
    expected_diff_id: str | None
    limits: Limits
    cpu_seconds: int
    parent_pid: int

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> BuilderParameters:
        fields = json.loads(text)
        return cls(
            **{
                **fields,
                "compressed": RingEnd(*fields["compressed"]) if fields["compressed"] else None,
                "tar": RingEnd(*fields["tar"]) if fields["tar"] else None,
                "outputs": tuple(Output(**output) for output in fields["outputs"]),
                "limits": Limits(**fields["limits"]),
            }
        )
