# SPDX-License-Identifier: Apache-2.0
"""What is told to device-mapper, byte by byte; that it does what is asked for, a guest shows (tests/uvm)."""

from __future__ import annotations

import struct

import pytest

from blockdev.errors import KernelError
from blockdev.formats.layer_file import FORMATS
from blockdev.kernel import devmapper


def test_a_request_is_the_kernels_structure() -> None:
    request = devmapper.pack("tardev-1", 1 << 17, b"data", targets=1)
    # include/uapi/linux/dm-ioctl.h: offsets of struct dm_ioctl on every machine
    assert struct.unpack_from("<3I", request, 0) == (4, 0, 0)
    assert struct.unpack_from("<3I", request, 12) == (len(request), 312, 1)
    assert struct.unpack_from("<i", request, 24) == (0,)  # open_count
    assert struct.unpack_from("<I", request, 28) == (1 << 17,)  # flags
    assert struct.unpack_from("<Q", request, 40) == (0,)  # dev
    assert request[48 : 48 + 128] == b"tardev-1".ljust(128, b"\0")
    assert request[176 : 176 + 129] == bytes(129)  # uuid
    assert request[312:316] == b"data"
    with pytest.raises(ValueError, match="over 127 bytes"):
        devmapper.pack("x" * 128)


def test_a_target_is_aligned_and_ends_with_a_nul() -> None:
    for length in range(20):
        raw = devmapper.pack_target(7, "verity", "p" * length)
        assert struct.unpack_from("<QQiI", raw) == (0, 7, 0, len(raw))
        assert raw[24:40] == b"verity".ljust(16, b"\0")
        assert raw[40:].rstrip(b"\0") == b"p" * length
        assert len(raw) % 8 == 0
        assert raw.endswith(b"\0")


def test_the_table_is_that_of_the_kernels_document() -> None:
    root = bytes(range(32))
    table = devmapper.verity_table("/dev/loop7", FORMATS["tar-index"].geometry(1 << 20), root)
    assert table == f"1 /dev/loop7 /dev/loop7 512 4096 2048 256 sha256 {root.hex()} {'00' * 32}"
    table = devmapper.verity_table("/dev/loop7", FORMATS["erofs-4k"].geometry(1 << 20), root)
    assert table == f"1 /dev/loop7 /dev/loop7 4096 4096 256 256 sha256 {root.hex()} {'00' * 32}"
    with pytest.raises(ValueError, match="hash block"):
        devmapper.verity_table("/dev/loop7", FORMATS["tar-index"].geometry(4096 + 512), root)


def test_a_list_of_devices_is_read_to_its_end() -> None:
    def entry(name: bytes, device: int, following: int) -> bytes:
        return (struct.pack("<QI", device, following) + name + b"\0").ljust(following or 0, b"\0")

    assert devmapper.unpack_names(bytes(4096)) == []
    data = entry(b"one", 0xFD00, 24) + entry(b"two-\xff", 0xFD01, 32) + entry(b"three", 0xFD02, 0)
    assert devmapper.unpack_names(data.ljust(4096, b"\0")) == [
        ("one", 0xFD00),
        ("two-\udcff", 0xFD01),
        ("three", 0xFD02),
    ]


def test_without_device_mapper_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devmapper, "CONTROL", "/nonexistent")
    with pytest.raises(KernelError, match=r"no dm-verity: .*No such file"):
        devmapper.check()
    assert devmapper.unused("tardev-") == []
