# SPDX-License-Identifier: Apache-2.0
"""The archiver program: a tar, out of a directory or of a layer file, written to a pipe, compressed if asked for.

argv: PARAMETERS (JSON); report on standard output. The directory is hostile: a container wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, Final

from blockdev.changeset import write_changeset
from blockdev.errors import FormatError
from blockdev.formats.compression import Compression, Compressor, compressor
from blockdev.formats.layer_file import open_layer_file
from blockdev.formats.layer_reader import tar_runs
from blockdev.formats.limits import Limits
from blockdev.workers import protocol, sandbox
from verity.buffers import Buffer

# Beside what a directory's names take: interpreter, buffers, a compressor's window.
_ADDRESS_SPACE_BYTES: Final = 3 << 30


@dataclass(frozen=True, slots=True)
class ArchiverParameters:
    """File descriptor numbers are the archiver's own.

    `source_fd` is a directory, or where `layer_size_bytes` is given a layer file.
    With `digests` those of the tar and of what is written are taken.
    """

    source_fd: int
    out_fd: int
    layer_size_bytes: int | None
    latest_mtime: int | None
    compression: Compression
    digests: bool
    limits: Limits
    cpu_seconds: int
    parent_pid: int

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> ArchiverParameters:
        fields = json.loads(text)
        fields["compression"] = Compression(fields["compression"])
        return cls(**{**fields, "limits": Limits(**fields["limits"])})


class _Output:
    """Bytes of the tar go in, those of the blob go out."""

    def __init__(self, fd: int, packer: Compressor | None, *, digests: bool) -> None:
        self._fd, self._packer = fd, packer
        self.tar = hashlib.sha256() if digests else None
        # Of a plain tar both are the same.
        self.blob = hashlib.sha256() if digests and packer else self.tar
        self.size_bytes = 0

    def write(self, data: Buffer) -> None:
        if self.tar is not None:
            self.tar.update(data)
        if self._packer is None:
            self._out(data)
        else:
            self._packed(self._packer.compress(data))

    def finish(self) -> None:
        if self._packer is not None:
            self._packed(self._packer.flush())

    def _packed(self, data: bytes) -> None:
        if self.blob is not None:
            self.blob.update(data)
        self._out(data)

    def _out(self, data: Buffer) -> None:
        view = memoryview(data)
        self.size_bytes += len(view)
        while view:
            view = view[os.write(self._fd, view) :]


def _copy_tar(source_fd: int, layer_size: int, output: _Output) -> int:
    """Out of a layer file, whatever its bytes are; how much it was. Raises FormatError."""

    def read_at(offset: int, size: int) -> bytes:
        piece = bytearray(size)
        del piece[os.preadv(source_fd, [piece], offset) :]
        return bytes(piece)

    buffer, written = bytearray(protocol.PIECE_BYTES), 0
    for run in tar_runs(open_layer_file(read_at, layer_size), read_at):
        if isinstance(run, bytes):
            output.write(run)
            written += len(run)
        else:
            _copy(source_fd, run.offset_bytes, run.size_bytes, output, buffer)
            written += run.size_bytes
    return written


def _copy(source_fd: int, offset: int, size: int, output: _Output, buffer: bytearray) -> None:
    """Raises FormatError where the file is shorter."""
    while size:
        piece = memoryview(buffer)[:size]
        got = os.preadv(source_fd, [piece], offset)
        if not got:
            raise FormatError(f"layer file ends at byte {offset}")
        output.write(piece[:got])
        offset, size = offset + got, size - got


def _work(parameters: ArchiverParameters, packer: Compressor | None, status_fd: int) -> dict[str, Any]:
    output = _Output(parameters.out_fd, packer, digests=parameters.digests)
    entries, left_out = 0, dict[str, int]()
    try:
        if parameters.layer_size_bytes is None:
            written = write_changeset(
                parameters.source_fd, output.write, limits=parameters.limits, latest_mtime=parameters.latest_mtime
            )
            entries, tar_size, left_out = written.entries, written.tar_size_bytes, written.left_out
        else:
            tar_size = _copy_tar(parameters.source_fd, parameters.layer_size_bytes, output)
        output.finish()
    except BrokenPipeError:
        # Who reads has given up and says why.
        return {"abandoned": True, **protocol.usage(status_fd)}
    return {
        "tar_size_bytes": tar_size,
        "blob_size_bytes": output.size_bytes,
        "diff_id": f"sha256:{output.tar.hexdigest()}" if output.tar else "",
        "blob_digest": f"sha256:{output.blob.hexdigest()}" if output.blob else "",
        "entries": entries,
        "left_out": left_out,
        **protocol.usage(status_fd),
    }


def main() -> None:
    parameters = ArchiverParameters.decode(sys.argv[1])
    status_fd = sandbox.open_status()
    hashlib.sha256()  # OpenSSL reads its configuration with the first one
    packer = compressor(parameters.compression)
    profile = sandbox.archiver(
        status_fd,
        source_fd=parameters.source_fd,
        out_fd=parameters.out_fd,
        bounds=sandbox.Bounds(
            address_space_bytes=parameters.limits.metadata_bytes + _ADDRESS_SPACE_BYTES,
            cpu_seconds=parameters.cpu_seconds,
            file_size_bytes=protocol.MESSAGE_BYTES_MAX,
        ),
    )
    protocol.answer(1, profile, parameters.parent_pid, lambda: _work(parameters, packer, status_fd))


if __name__ == "__main__":
    main()
