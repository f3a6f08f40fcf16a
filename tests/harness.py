# SPDX-License-Identifier: Apache-2.0
"""Real servers with private directories and sockets: our daemon, containerd, a registry. For tests and the demo."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import grpc

from blockdev.formats.layer_file import FORMATS
from blockdev.kernel.mounts import mounted_below, parse_mountinfo
from snapshotter import metastore
from snapshotter.api.proto import diff_pb2_grpc, snapshots_pb2_grpc
from verity import veritysetup

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = CHECKOUT / ".cache"
BIN = Path(sys.executable).parent
SNAPSHOTTER = "tardev-host"
EROFS_UTILS = CACHE / "forky-erofs" / "root"
# The Go programs of tests/build-go.
UNPACK = CACHE / "go" / "unpack"  # containerd's unpacker: tests/differential/unpack
# containerd's snapshotter suite, by its version, and a server that passes it: tests/conformance
CONFORMANCE = {version: CACHE / "go" / f"conformance-{version}" for version in ("1.6", "1.7")}
LATER_CONFORMANCE = "1.7"  # the other one is for ./dev soak, and built there
CONFORMANCE_REFERENCE = CACHE / "go" / "conformance-reference"
UVM_IMAGE = CACHE / "uvm"
# Of all waits that have no reason for another bound: nothing when things go well, enough for a machine at its limit.
PATIENCE_SECONDS: Final = 120.0
_TIMES_SAID = 3
_PROGRAMS = (b"containerd-shim", b"docker-registry", b"tardev-snapshotter", b"blockdev.workers")


class ProcessFailed(Exception):
    pass


def run(*argv: str | Path, timeout: float = PATIENCE_SECONDS, check: bool = True, **options: object) -> str:
    """Standard output. Raises ProcessFailed with what the program said."""
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [str(arg) for arg in argv],
        capture_output=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if check and done.returncode:
        raise ProcessFailed(f"{' '.join(map(str, argv))}: status {done.returncode}\n{out}{err}")
    return out


def wait_for(what: str, check: object, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen in {seconds} s")
        time.sleep(0.02)


def unmount_below(directory: Path) -> None:
    for entry in reversed(mounted_below(directory)):
        run("umount", "-l", entry.mount_point, check=False)


def host_state() -> frozenset[str]:
    """Mounts, busy loop and dm devices, processes of ours or containerd's: a test leaves them as they were."""
    mountinfo = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    found = {f"mount {entry.mount_point}" for entry in parse_mountinfo(mountinfo)}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.add(f"loop device over {backing.read_text().strip()}")
    for name in Path("/sys/block").glob("dm-*/dm/name"):
        with contextlib.suppress(OSError):
            found.add(f"dm device {name.read_text().strip()}")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (process / "cmdline").read_bytes().split(b"\0")
            if any(argument.rpartition(b"/")[2].startswith(_PROGRAMS) for argument in argv[:4]):
                found.add(f"process {process.name} {b' '.join(argv).decode(errors='replace').strip()}")
    return frozenset(found)


def remove_container_state(namespace: str) -> None:
    """What runc and the shims of a namespace leave in /run/containerd, whatever containerd's own state directory."""
    for directory in (Path("/run/containerd/runc") / namespace, Path("/run/containerd/fifo")):
        with contextlib.suppress(OSError):
            directory.rmdir()


def without_uvm() -> str:
    """Why there is no image of the reference UVM; empty where there is one."""
    return "" if (UVM_IMAGE / "initramfs").exists() else "no image of the UVM; ./dev setup builds it"


def free_port() -> int:
    """Not of those that the kernel gives to clients: one of them could have it before the server does."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """One process, its output in a file."""

    name = "server"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def _start(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(arg) for arg in argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_until(self, what: str, check: object, seconds: float = PATIENCE_SECONDS) -> None:
        def look() -> bool:
            if not self.alive():
                raise ProcessFailed(f"{self.name} died before {what}:\n{self.log.read_text(errors='replace')[-4000:]}")
            return bool(check())  # type: ignore[operator]

        wait_for(f"{self.name}: {what}", look, seconds)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            if self.alive():
                self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


class Daemon(Server):
    """Ours."""

    name = "daemon"

    def __init__(self, directory: Path, containerd_root: Path, extra: str = "", containerd_socket: str = "") -> None:
        super().__init__(directory)
        self.root = directory / "root"
        self.address = directory / "s.sock"
        self.metrics_port = free_port()
        self.config = directory / "config.toml"
        self.config.write_text(
            f'root = "{self.root}"\naddress = "{self.address}"\n'
            f'[containerd]\naddress = "{containerd_socket or "/nonexistent"}"\n'
            f'content = "{containerd_root}/io.containerd.content.v1.content"\n'
            f'[metrics]\naddress = "127.0.0.1:{self.metrics_port}"\n'
            f'[builds]\nfree_space_reserve = "0"\n{extra}'
        )

    def launch(self, env: Mapping[str, str] | None = None) -> None:
        self._start([BIN / "tardev-snapshotter", "--config", self.config], env)

    def start(self, env: Mapping[str, str] | None = None) -> None:
        self.launch(env)
        self.wait_until("serves", lambda: '"event": "serving"' in self.log.read_text().rpartition("reset")[2])

    def restart(self, env: Mapping[str, str] | None = None) -> None:
        with self.log.open("a") as log:
            log.write("reset\n")
        self.start(env)

    def metric(self, name: str, **labels: str) -> float:
        """Summed over the series that have the labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE_SECONDS) as reply:
            text = reply.read().decode()
        total = 0.0
        for line in text.splitlines():
            match = re.match(r"([a-z_]+)(?:\{(.*)\})? (\S+)$", line)
            if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
                total += float(match[3])
        return total

    def staged(self) -> list[Path]:
        return sorted((self.root / "staging").iterdir())

    def layer_files(self) -> list[Path]:
        return sorted(path for path in (self.root / "layers").rglob("*") if path.is_file())

    def await_kill(self) -> None:
        """Until it has killed itself at the point that it was started for."""
        assert self.process is not None
        assert self.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL, "the point was never reached"
        self.process = None

    def snapshots(self) -> list[metastore.Snapshot]:
        """Parents first. From the database: `tardevctl snapshots` says the same, and takes its time to start."""
        return metastore.read(self.root / metastore.FILE_NAME)[0]

    def layers(self) -> list[metastore.Layer]:
        return metastore.read(self.root / metastore.FILE_NAME)[1]

    def verify_layer(self, layer: Mapping[str, Any]) -> None:
        """cryptsetup's veritysetup, which knows nothing of us, about a row of `tardevctl layers`."""
        path = self.root / "layers" / layer["format"] / layer["diff_id"].removeprefix("sha256:")
        geometry = FORMATS[layer["format"]].geometry(layer["data_size_bytes"])
        veritysetup.verify(str(path), geometry, bytes.fromhex(layer["root_hash"]))

    def mounts(self) -> list[str]:
        return [entry.mount_point for entry in mounted_below(self.root)]

    def tardevctl(self, *arguments: str) -> Any:
        return json.loads(run(BIN / "tardevctl", *arguments, "--json", "--config", self.config))

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        with grpc.insecure_channel(f"unix:{self.address}") as channel:
            yield Client(snapshots_pb2_grpc.SnapshotsStub(channel), diff_pb2_grpc.DiffStub(channel))

    def clean_up(self) -> None:
        self.stop()
        unmount_below(self.directory)


@dataclass
class Client:
    """Stubs of what containerd calls."""

    snapshots: snapshots_pb2_grpc.SnapshotsStub
    diff: diff_pb2_grpc.DiffStub


@dataclass(frozen=True)
class Release:
    """A containerd with its ctr."""

    label: str
    containerd: Path
    ctr: Path

    @cached_property
    def full_version(self) -> str:
        match = re.search(r"\d+\.\d+\.\d+", run(self.containerd, "--version"))
        assert match
        return match[0]

    @property
    def version(self) -> tuple[int, int]:
        major, minor, _ = self.full_version.split(".")
        return int(major), int(minor)


def releases() -> dict[str, Release]:
    """ "system": Debian's own, 1.6 or 1.7; "1.6", "1.7" and "later" (2.1 or later): of Debian suites, by name."""
    found = {}
    system = shutil.which("containerd")
    if system:
        found["system"] = Release("system", Path(system), Path(shutil.which("ctr") or "ctr"))
    for label, suite in (("1.6", "bookworm"), ("1.7", "trixie"), ("later", "forky")):
        programs = CACHE / suite / "root" / "usr" / "bin"
        if (programs / "containerd").exists():
            found[label] = Release(label, programs / "containerd", programs / "ctr")
    return found


RELEASES: Final = frozenset({"system", "1.6", "1.7", "later"})  # what ./dev setup provides


# Without pauses in proportion: on a busy machine a snapshot is else collected many seconds after its removal.
EAGER_COLLECTION: Final = "[plugins.'io.containerd.gc.v1.scheduler']\npause_threshold = 0.5\n"


@dataclass
class Containerd(Server):
    release: Release
    directory: Path
    daemon_address: Path
    namespace: str = "default"
    name: str = "containerd"
    snapshotters: tuple[str, ...] = (SNAPSHOTTER,)  # of our daemon
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        Server.__init__(self, self.directory)
        self.root, self.state = self.directory / "root", self.directory / "state"
        self.address = self.directory / "c.sock"
        self.config = self.directory / "config.toml"
        self.config.write_text(self._configuration())

    @property
    def has_differ(self) -> bool:
        return self.release.version >= (1, 7)

    def _configuration(self) -> str:
        modern = self.release.version >= (2, 0)
        text = (
            f"version = {3 if modern else 2}\nroot = '{self.root}'\nstate = '{self.state}'\n"
            "disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images',"
            " 'io.containerd.cri.v1.runtime', 'io.containerd.internal.v1.opt', 'io.containerd.nri.v1.nri',"
            # where / is no mount point, as in a chroot, this one keeps half of containerd from loading
            " 'io.containerd.snapshotter.v1.btrfs']\n"
            f"[grpc]\naddress = '{self.address}'\n[ttrpc]\naddress = '{self.address}.ttrpc'\n"
        )
        for snapshotter in self.snapshotters:
            text += f"[proxy_plugins.{snapshotter}]\ntype = 'snapshot'\naddress = '{self.daemon_address}'\n"
        text += EAGER_COLLECTION
        if self.has_differ:
            text += (
                f"[proxy_plugins.tardev-diff]\ntype = 'diff'\naddress = '{self.daemon_address}'\n"
                "[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['tardev-diff', 'walking']\n"
            )
            for snapshotter, differ in (
                *((name, "tardev-diff") for name in self.snapshotters),
                ("overlayfs", "walking"),
            ):
                text += (
                    "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux/amd64'\n"
                    f"snapshotter = '{snapshotter}'\ndiffer = '{differ}'\n"
                )
        return text

    def start(self) -> None:
        # containerd looks for its shim in PATH first, and would find another version's.
        path = f"{self.release.containerd.parent}:{os.environ['PATH']}"
        self._start([self.release.containerd, "--config", self.config], {"PATH": path})
        self.wait_until("answers", self._answers)

    def _answers(self) -> bool:
        try:
            self.ctr("version", timeout=PATIENCE_SECONDS)
        except (ProcessFailed, subprocess.TimeoutExpired):
            return False
        return True

    def ctr(self, *arguments: str | Path, namespace: str = "", timeout: float = 300) -> str:
        return run(
            self.release.ctr, "--address", self.address, "--namespace", namespace or self.namespace, *arguments,
            timeout=timeout,
        )  # fmt: skip

    def retry(self, *arguments: str | Path, namespace: str = "") -> str:
        """As an orchestrator would: after an outage containerd's gRPC back-off fails calls at once, for up to 3 s."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self.ctr(*arguments, namespace=namespace)
            except ProcessFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def collect_until(self, what: str, check: Callable[[], object]) -> None:
        """Its garbage collector at work until the check holds. By itself it forgets a removal that falls into the end
        of a collection, until the next removal (containerd: plugins/gc/scheduler.go drops events older than that end).
        What it has tried to remove, and could not, it does not try again for this."""

        def collected() -> bool:
            if check():
                return True
            lease = f"collect-{os.urandom(4).hex()}"
            self.ctr("leases", "create", "--id", lease)
            self.ctr("leases", "delete", "--sync", lease)
            return bool(check())

        try:
            wait_for(what, collected)
        except TimeoutError as error:
            said = self.log.read_text(errors="replace").splitlines()
            raise TimeoutError("\n".join([str(error), "containerd's log ends with:", *said[-20:]])) from None

    def import_image(self, archive: Path, *flags: str, namespace: str = "") -> None:
        self.ctr("images", "import", *flags, "--snapshotter", SNAPSHOTTER, archive, namespace=namespace)

    def pull(self, reference: str, *, namespace: str = "", snapshotter: str = SNAPSHOTTER) -> None:
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference, namespace=namespace)

    def says(self, *arguments: str | Path, namespace: str = "") -> str:
        """Standard output of a command that has some. `ctr` ends as soon as its task does, on a busy machine without
        having read what that said: then the command is given again."""
        for _ in range(_TIMES_SAID):
            if out := self.ctr(*arguments, namespace=namespace):
                return out
        return ""

    def cat(self, image: str, name: str, path: str, namespace: str = "") -> str:
        """A file, not an empty one, as a container of the image reads it."""
        return self.says(
            "run", "--rm", "--snapshotter", SNAPSHOTTER, image, name, "/bin/cat", path, namespace=namespace
        )  # fmt: skip

    def run_container(self, image: str, name: str, *command: str, namespace: str = "") -> str:
        return self.ctr(
            "run", "--rm", "--snapshotter", SNAPSHOTTER, image, name, *command, namespace=namespace
        )  # fmt: skip

    @contextlib.contextmanager
    def rootfs(
        self, chain_id: str, target: Path, namespace: str = "", snapshotter: str = SNAPSHOTTER
    ) -> Iterator[Path]:
        """What a container of the image sees: a fresh snapshot on the chain, mounted as the runtime would.

        `ctr images mount` of 1.6 takes overlayfs whatever snapshotter it is told.
        """
        target.mkdir(exist_ok=True)
        key = f"rootfs-of-{target.name}"
        command = self.ctr(
            "snapshots", "--snapshotter", snapshotter, "prepare", "--target", target, key, chain_id,
            namespace=namespace,
        )  # fmt: skip
        # As containerd and runc mount: newer mount(8) hands options over one by one, of 256 bytes each at the most.
        run(*shlex.split(command), env={**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})
        try:
            yield target
        finally:
            run("umount", target)
            self.ctr("snapshots", "--snapshotter", snapshotter, "rm", key, namespace=namespace)

    def clean_up(self) -> None:
        if self.alive():
            for namespace in run(
                self.release.ctr, "--address", self.address, "namespaces", "list", "-q", check=False
            ).split():
                for container in self.ctr("tasks", "list", "-q", namespace=namespace).split():
                    self.ctr("tasks", "delete", "--force", container, namespace=namespace)
        self.stop()
        # A shim that was on its way out when its containerd went away stays for ever.
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                argv = (process / "cmdline").read_bytes().split(b"\0")
                if b"containerd-shim" in argv[0] and os.fsencode(self.address) in argv:
                    os.kill(int(process.name), signal.SIGKILL)
        unmount_below(self.directory)


class Registry(Server):
    """docker-registry on the loopback, plain HTTP."""

    name = "registry"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.host = f"localhost:{self.port}"

    def start(self) -> None:
        config = self.directory / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {self.directory}/data}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'}}\n"
        )
        program = shutil.which("docker-registry") or "docker-registry"
        self._start([program, "serve", config], {"OTEL_TRACES_EXPORTER": "none"})
        self.wait_until("answers", self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.host}/v2/", timeout=PATIENCE_SECONDS):
                return True
        except OSError:
            return False

    def push(self, archive: Path, name: str) -> str:
        """An OCI archive, every layer as it is; the reference to pull."""
        reference = f"{self.host}/{name}"
        run(
            "skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", "--preserve-digests",
            f"oci-archive:{archive}", f"docker://{reference}",
        )  # fmt: skip
        return reference


def erofs_tool(name: str, *arguments: str | Path, check: bool = True) -> str:
    """A program of erofs-utils 1.9 or later, with the C library of its own suite."""
    loader = EROFS_UTILS / "usr/lib64/ld-linux-x86-64.so.2"
    libraries = f"{EROFS_UTILS}/usr/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu"
    return run(loader, "--library-path", libraries, EROFS_UTILS / "usr/bin" / name, *arguments, check=check)


def oci_archive(
    target: Path,
    reference: str,
    layers: Sequence[bytes | Path],
    media_type: str,
    diff_ids: Sequence[str],
    runs_as: Mapping[str, Any] = {},
) -> str:
    """An image whose config promises `diff_ids`, whatever the layers hold; the digest of its manifest.

    `runs_as`: "User", "Volumes" and so on, of the config's own "config".
    """
    blobs: dict[str, bytes | Path] = {}

    def descriptor(blob: bytes | Path, media_type: str) -> dict[str, Any]:
        if isinstance(blob, bytes):
            digest, size = hashlib.sha256(blob).hexdigest(), len(blob)
        else:
            digest, size = sha256_of(blob), blob.stat().st_size
        blobs[digest] = blob
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}

    rootfs = {"type": "layers", "diff_ids": list(diff_ids)}
    document = {"architecture": "amd64", "os": "linux", "config": dict(runs_as), "rootfs": rootfs}
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": descriptor(json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor(layer, media_type) for layer in layers],
    }
    top = descriptor(json.dumps(manifest).encode(), manifest_type)
    names = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference.rpartition(":")[2]}
    index = json.dumps({"schemaVersion": 2, "manifests": [{**top, "annotations": names}]}).encode()
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": index}
    with tarfile.open(target, "w") as tar:
        for name, content in {**files, **{f"blobs/sha256/{digest}": blob for digest, blob in blobs.items()}}.items():
            member = tarfile.TarInfo(name)
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                member.size = source.seek(0, io.SEEK_END)
                source.seek(0)
                tar.addfile(member, source)
    return str(top["digest"])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_images(directory: Path, *names: str) -> Path:
    run(sys.executable, CHECKOUT / "tests/images/mkimage.py", "build", directory, *names)
    return directory


def check_tree(promised: Path, rootfs: Path) -> str:
    """Differences to the promised tree, one a line; "" without any."""
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "tests/images/mkimage.py"), "check", str(promised), str(rootfs)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stdout + done.stderr
