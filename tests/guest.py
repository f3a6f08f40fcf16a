# SPDX-License-Identifier: Apache-2.0
"""A small Linux guest for tests of hot-plug: Debian's cloud kernel, busybox as init, a shell on a serial port."""

from __future__ import annotations

import io
import lzma
import platform
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.harness import CACHE

ON_THIS_MACHINE = platform.machine() == "x86_64"
QEMU = "qemu-system-x86_64"
BUSYBOX = Path("/bin/busybox")
KERNEL = CACHE / "trixie-kernel" / "root"
# The shell is on the second port, since the kernel and the firmware talk on the first.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
insmod /virtio_blk.ko
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
status=0
while echo "<$status>" && read -r line; do
    sh -c "$line" </dev/null
    status=$?
done
"""
_PROMPT = re.compile(rb"<([0-9]+)>\n$")
_BOOT_SECONDS = 120.0
_COMMAND_SECONDS = 60.0


def missing() -> str:
    """What this machine lacks to run a guest; empty if nothing."""
    if not ON_THIS_MACHINE:
        return "the guests of these tests are x86-64"
    if not shutil.which(QEMU):
        return "qemu-system-x86 is not installed; ./dev setup does"
    if not BUSYBOX.exists():
        return "busybox-static is not installed; ./dev setup does"
    if not list(KERNEL.glob("boot/vmlinuz-*")):
        return "no kernel for a guest; ./dev setup fetches one"
    return ""


def kernel_image() -> Path:
    (image,) = KERNEL.glob("boot/vmlinuz-*")
    return image


def make_initramfs() -> bytes:
    """A cpio archive ("newc", Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    (module,) = KERNEL.glob("usr/lib/modules/*/kernel/drivers/block/virtio_blk.ko.xz")
    files: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys")]
    files.append(("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes()))
    files.append(("virtio_blk.ko", stat.S_IFREG | 0o644, lzma.decompress(module.read_bytes())))
    files.append(("init", stat.S_IFREG | 0o755, _INIT.encode()))
    files.append(("TRAILER!!!", 0, b""))
    out = io.BytesIO()
    for number, (name, mode, data) in enumerate(files, 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.write(bytes(-out.tell() % 4))
        out.write(data)
        out.write(bytes(-out.tell() % 4))
    return out.getvalue()


class Guest:
    """One QEMU, without network and with nothing of the host's but its sockets in `directory`."""

    def __init__(self, directory: Path, arguments: Sequence[str], initramfs: Path | None = None) -> None:
        """Without `initramfs` there is only the firmware, and nobody answers to hot-plug."""
        directory.mkdir(parents=True, exist_ok=True)
        self.qmp = directory / "qmp"
        self.second_qmp = directory / "qmp2"  # a monitor serves one client at a time
        self._shell = directory / "shell"
        self.console = directory / "console"
        self._connection: socket.socket | None = None
        boot = []
        if initramfs:
            boot = ["-kernel", str(kernel_image()), "-initrd", str(initramfs), "-append", "console=ttyS0 panic=-1"]
        # TCG: KVM is not to be had on every machine that runs tests, and nothing here depends on it.
        command = [
            QEMU, "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "192", "-smp", "1",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self.second_qmp},server=on,wait=off",
            "-serial", f"file:{self.console}", "-serial", f"unix:{self._shell},server=on,wait=off",
            *arguments, *boot,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            self._wait(bool(initramfs))
        except BaseException:
            self.stop()
            raise

    def _wait(self, boots: bool) -> None:
        deadline = time.monotonic() + _COMMAND_SECONDS
        while not (self.qmp.exists() and self.second_qmp.exists() and self._shell.exists()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"QEMU did not start (status {self.process.poll()})")
            time.sleep(0.02)
        if boots:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(str(self._shell))
            self._answer(_BOOT_SECONDS)

    def run(self, command: str, seconds: float = _COMMAND_SECONDS) -> str:
        """Standard output and error of one line of shell in the guest. Raises RuntimeError with its status."""
        assert self._connection
        self._connection.sendall(f"{command}\n".encode())
        output, status = self._answer(seconds)
        if status:
            raise RuntimeError(f"{command}: status {status}\n{output}")
        return output

    def _answer(self, seconds: float) -> tuple[str, int]:
        """What the guest writes until its next prompt, which is the status of what it ran."""
        assert self._connection
        self._connection.settimeout(seconds)
        text = b""
        while not (end := _PROMPT.search(text)):
            try:
                piece = self._connection.recv(65536)
            except TimeoutError:
                piece = b""
            if not piece:
                raise RuntimeError(f"no answer of the guest but {text!r}; console: {self.console.read_text()[-2000:]}")
            text += piece
        return text[: end.start()].decode(errors="replace"), int(end[1])

    def stop(self) -> None:
        if self._connection:
            self._connection.close()
        self.process.kill()  # SIGSTOP or not
        self.process.wait()
