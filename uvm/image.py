# SPDX-License-Identifier: Apache-2.0
"""The guest's image: a kernel of Debian as it is, and an initramfs of our init and the kernel's modules.

    python -m uvm.image PACKAGES DIRECTORY

PACKAGES is where Debian's kernel package was unpacked. The same package and compiler give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from uvm import cpio
from uvm.errors import ImageError

KERNEL_NAME: Final = "kernel"
INITRAMFS_NAME: Final = "initramfs"
_SOURCES: Final = Path(__file__).with_name("init")
# What depends on the processor is optional: a guest without it hashes with the kernel's portable code.
_MODULES: Final = ("virtio_blk", "qemu_fw_cfg", "sha256_ssse3?", "dm_verity", "erofs", "overlay", "loop")
_CFLAGS: Final = ("-std=gnu17", "-D_GNU_SOURCE", "-O2", "-static", "-s", "-Wl,--build-id=none")
_MODULE_BYTES_MAX: Final = 64 << 20
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# Linux: Documentation/arch/x86/boot.rst, the real-mode header
_SETUP_SECTORS_AT, _MAGIC_AT, _PAYLOAD_AT, _SECTOR_BYTES = 0x1F1, 0x202, 0x248, 512


@dataclass(frozen=True, slots=True)
class Image:
    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / KERNEL_NAME

    @property
    def initramfs(self) -> Path:
        return self.directory / INITRAMFS_NAME

    def check(self) -> Image:
        """Itself. Raises ImageError where it is not there."""
        if not (self.kernel.is_file() and self.initramfs.is_file()):
            raise ImageError(f"no image of a UVM in {self.directory}; ./dev setup builds it")
        return self

    def identity(self) -> str:
        """The sha256 of kernel and initramfs, for what is remembered about this image."""
        digest = hashlib.sha256()
        for path in (self.kernel, self.initramfs):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def build(packages: Path, directory: Path, init: bytes | None = None) -> Image:
    """Write the image into `directory`, each file whole or not at all. `init`: another first program than the guest's.

    Raises ImageError.
    """
    try:
        kernels = sorted((packages / "boot").glob("vmlinuz-*"))
        if len(kernels) != 1:
            raise ImageError(f"{packages}/boot has {len(kernels)} kernels, not one")
        release = kernels[0].name.removeprefix("vmlinuz-")
        files = {
            KERNEL_NAME: unpacked_kernel(kernels[0].read_bytes()),
            INITRAMFS_NAME: initramfs(packages / "usr/lib/modules" / release, init or compiled_init()),
        }
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            draft = directory / f".{name}.{os.getpid()}"
            draft.write_bytes(content)
            draft.rename(directory / name)
    except OSError as error:
        raise ImageError(f"image of the UVM: {error}") from None
    return Image(directory)


def unpacked_kernel(bzimage: bytes) -> bytes:
    """The ELF file inside, which QEMU starts through its PVH entry: a guest without KVM would need a second more to
    unpack it. The file as it is where it is packed in another way than Debian's."""
    if bzimage[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise ImageError("the kernel is no bzImage")
    offset, size = struct.unpack_from("<II", bzimage, _PAYLOAD_AT)
    start = (bzimage[_SETUP_SECTORS_AT] + 1) * _SECTOR_BYTES + offset
    payload = bzimage[start : start + size]
    if not payload.startswith(_ZSTD_MAGIC):
        return bzimage
    try:
        kernel = zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    except zstandard.ZstdError as error:
        raise ImageError(f"the kernel cannot be unpacked: {error}") from None
    return kernel if kernel.startswith(b"\x7fELF") else bzimage


def compiled_init(flags: tuple[str, ...] = (), main: Path | None = None, sources: tuple[str, ...] = ()) -> bytes:
    """A static program. By default the guest's init; tests and benches have another `main` with some of its sources."""
    paths = [main, *(_SOURCES / name for name in sources)] if main else sorted(_SOURCES.glob("*.c"))
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "init"
        command = ["gcc", *_CFLAGS, *flags, f"-I{_SOURCES}", f"-ffile-prefix-map={_SOURCES}=init", "-o", str(program)]
        try:
            done = subprocess.run(
                [*command, *map(str, paths)], cwd=scratch, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise ImageError("no gcc") from None
        if done.returncode:
            raise ImageError(f"init cannot be compiled: {done.stderr.strip()}")
        return program.read_bytes()


def initramfs(modules: Path, init: bytes) -> bytes:
    """The archive, with the modules in the order in which they are loaded. Raises ImageError."""
    directories = [cpio.Member(name, stat.S_IFDIR | 0o755) for name in ("dev", "modules", "proc", "sys")]
    loaded = list(with_dependencies(modules, _MODULES))
    order = "".join(f"{name}\n" for name, _ in loaded).encode()
    return cpio.archive(
        [
            *directories,
            cpio.Member("init", stat.S_IFREG | 0o755, init),
            cpio.Member("modules/order", stat.S_IFREG | 0o644, order),
            *(cpio.Member(f"modules/{name.removeprefix('?')}", stat.S_IFREG | 0o644, code) for name, code in loaded),
        ]
    )


def with_dependencies(modules: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and code of each that is not built in, dependencies first; "?" in front of the name of one that may be
    refused, behind it in `names`. Raises ImageError.

    From the modules themselves: the package has no modules.dep, which depmod would write.
    """
    if not (modules / "modules.builtin").is_file():
        raise ImageError(f"no kernel modules in {modules}")
    built_in = {_module_name(Path(line)) for line in (modules / "modules.builtin").read_text().splitlines()}
    files = {_module_name(path): path for path in sorted(modules.rglob("*.ko*"))}
    done: set[str] = set()

    def load(name: str, mark: str, wanted_by: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name in built_in:
            return
        if name not in files:
            raise ImageError(f"the kernel has no module {name}, which {wanted_by} needs")
        done.add(name)
        code = _unpacked_module(files[name])
        # modinfo(8): NUL-terminated KEY=VALUE in the section .modinfo
        found = re.search(rb"\0depends=([^\0]*)\0", code)
        for dependency in found[1].decode("ascii").split(",") if found and found[1] else ():
            yield from load(dependency.replace("-", "_"), "", name)
        yield mark + name, code

    for wanted in names:
        name = wanted.rstrip("?")
        yield from load(name, "?" if wanted != name else "", "the guest")


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _unpacked_module(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(raw)
        if path.suffix == ".zst":
            return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read(_MODULE_BYTES_MAX)
    except (lzma.LZMAError, zstandard.ZstdError) as error:
        raise ImageError(f"{path.name} cannot be unpacked: {error}") from None
    return raw


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m uvm.image PACKAGES DIRECTORY")
    try:
        image = build(Path(sys.argv[1]), Path(sys.argv[2]))
    except ImageError as error:
        sys.exit(f"error: {error}")
    print(f"{image.kernel} {image.kernel.stat().st_size}\n{image.initramfs} {image.initramfs.stat().st_size}")


if __name__ == "__main__":
    main()
