# SPDX-License-Identifier: Apache-2.0
"""The part of cloud-hypervisor's HTTP API that a disk needs, served on a unix socket.

Not a cloud-hypervisor: Debian has none, and it runs on KVM only. It holds every request to the
schema below, and its own answers too, so that neither side of a test can stray from what the API's
document (cloud-hypervisor's vmm/src/api/openapi/cloud-hypervisor.yaml, v52) says. Behaviour, from its
sources (vmm/src/{lib,vm,device_manager}.rs): one call at a time; a removed device leaves the
configuration at once and the device tree when the guest has let it go; 31 devices to a segment.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from aiohttp import web

Json = dict[str, Any]

# Everything that DiskConfig may have; the document allows more keys, this does not.
_DISK_PROPERTIES: Json = {
    "path": {"type": "string", "pattern": "^/"},
    "readonly": {"type": "boolean"},
    "direct": {"type": "boolean"},
    "iommu": {"type": "boolean"},
    "num_queues": {"type": "integer", "minimum": 1},
    "queue_size": {"type": "integer", "minimum": 1},
    "vhost_user": {"type": "boolean"},
    "vhost_socket": {"type": "string"},
    "rate_limiter_config": {"type": "object"},
    "rate_limit_group": {"type": "string"},
    "queue_affinity": {"type": "array"},
    "pci_segment": {"type": "integer", "minimum": 0, "maximum": 95},
    "pci_device_id": {"type": "integer", "minimum": 0, "maximum": 31},
    "id": {"type": "string", "pattern": "^(?!__)."},
    "serial": {"type": "string"},
    "backing_files": {"type": "boolean"},
    "sparse": {"type": "boolean"},
    "image_type": {"enum": ["FlatVmdk", "FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"]},
    "lock_granularity": {"enum": ["ByteRange", "Full"]},
}
_DISK: Json = {"type": "object", "properties": _DISK_PROPERTIES, "required": ["path"], "additionalProperties": False}
REQUESTS: dict[str, tuple[str, Json | None]] = {
    "/api/v1/vmm.ping": ("GET", None),
    "/api/v1/vm.info": ("GET", None),
    "/api/v1/vm.add-disk": ("PUT", _DISK),
    "/api/v1/vm.remove-device": (
        "PUT",
        {
            "type": "object",
            "properties": {"id": {"type": "string"}},
            "required": ["id"],
            "additionalProperties": False,
        },
    ),
}
_BDF: Json = {"type": "string", "pattern": "^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\\.[0-7]$"}
ANSWERS: dict[str, Json] = {
    "/api/v1/vmm.ping": {
        "type": "object",
        "properties": {
            "build_version": {"type": "string"},
            "version": {"type": "string"},
            "pid": {"type": "integer"},
            "features": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["version"],
        "additionalProperties": False,
    },
    "/api/v1/vm.info": {
        "type": "object",
        "properties": {
            "config": {
                "type": "object",
                "properties": {
                    "payload": {"type": "object"},
                    "disks": {"type": ["array", "null"], "items": _DISK},
                    "platform": {
                        "type": ["object", "null"],
                        "properties": {"num_pci_segments": {"type": "integer", "minimum": 1, "maximum": 96}},
                    },
                },
                "required": ["payload"],
            },
            "state": {"enum": ["Created", "Running", "Shutdown", "Paused", "BreakPoint"]},
            "memory_actual_size": {"type": "integer"},
            "device_tree": {
                "type": ["object", "null"],
                "additionalProperties": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "resources": {"type": "array"},
                        "parent": {"type": ["string", "null"]},
                        "children": {"type": "array", "items": {"type": "string"}},
                        "pci_bdf": {"anyOf": [_BDF, {"type": "null"}]},
                    },
                    "additionalProperties": False,
                },
            },
        },
        "required": ["config", "state"],
        "additionalProperties": False,
    },
    "/api/v1/vm.add-disk": {
        "type": "object",
        "properties": {"id": {"type": "string"}, "bdf": _BDF},
        "required": ["id", "bdf"],
        "additionalProperties": False,
    },
}

_VALIDATORS = {id(schema): jsonschema.Draft202012Validator(schema) for schema in ANSWERS.values()}
_VALIDATORS |= {id(schema): jsonschema.Draft202012Validator(schema) for _, schema in REQUESTS.values() if schema}


def _validate(value: object, schema: Json) -> None:
    _VALIDATORS[id(schema)].validate(value)


@dataclass
class CloudHypervisorApi:
    """A VMM with one VM. `strays`: what a client did that the API does not know; must stay empty."""

    socket: Path
    version: str = "v52.0"
    segments: int = 10
    booted: bool = True
    exists: bool = True
    guest_lets_go_after_s: float | None = 0.0  # None: never
    delays_s: dict[str, float] = field(default_factory=dict)  # by endpoint, once
    refuse: dict[str, list[tuple[int, object]]] = field(default_factory=dict)  # by endpoint, the next answers
    drop: set[str] = field(default_factory=set)  # endpoints that close the connection instead
    strays: list[str] = field(default_factory=list)
    requests: list[tuple[str, Json | None]] = field(default_factory=list)
    adding: asyncio.Event = field(default_factory=asyncio.Event)  # a vm.add-disk has been read
    disks: list[Json] = field(default_factory=list)
    tree: dict[str, Json] = field(default_factory=dict)
    _runner: web.AppRunner | None = None
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    _ejects: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        if self.booted:
            self._plug("_net0", 0)
        application = web.Application(client_max_size=51200)  # micro_http's bound
        application.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def stop(self) -> None:
        assert self._runner
        await self._runner.cleanup()
        for task in self._ejects:
            task.cancel()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        endpoint = request.path.rpartition("/")[2]
        async with self._one_at_a_time:
            problem = self._problem(request, body)
            if problem:
                self.strays.append(problem)
                return web.json_response([problem], status=400)
            data = json.loads(body) if body else None
            self.requests.append((endpoint, data))
            if endpoint == "vm.add-disk":
                self.adding.set()
            if endpoint in self.drop:
                assert request.transport
                request.transport.close()
                return web.Response()
            await asyncio.sleep(self.delays_s.pop(endpoint, 0))
            if queue := self.refuse.get(endpoint):
                status, answer = queue.pop(0)
                if isinstance(answer, bytes):
                    return web.Response(status=status, body=answer)
                return web.json_response(answer, status=status)
            if not self.exists and endpoint != "vmm.ping":
                return web.json_response(["VM is not created"], status=404)
            answer = self._answer(endpoint, data or {})
            if isinstance(answer, web.Response):
                return answer
            _validate(answer, ANSWERS[request.path])
            return web.json_response(answer)

    def _problem(self, request: web.Request, body: bytes) -> str:
        method, schema = REQUESTS.get(request.path, ("", None))
        if request.method != method or request.query_string:
            return f"{request.method} {request.path_qs}"
        if "Transfer-Encoding" in request.headers:  # micro_http reads by Content-Length alone
            return f"{endpoint_of(request)}: chunked"
        if schema is None:
            return f"{endpoint_of(request)}: a body" if body else ""
        if request.headers.get("Content-Type") != "application/json":
            return f"{endpoint_of(request)}: Content-Type {request.headers.get('Content-Type')}"
        try:
            _validate(json.loads(body), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{endpoint_of(request)}: {error}"
        return ""

    def _answer(self, endpoint: str, data: Json) -> Json | web.Response:
        if endpoint == "vmm.ping":
            return {"build_version": self.version, "version": self.version, "pid": 1, "features": []}
        if endpoint == "vm.info":
            config = {"payload": {}, "disks": self.disks or None, "platform": {"num_pci_segments": self.segments}}
            if not self.booted:
                return {"config": config, "state": "Created", "memory_actual_size": 0, "device_tree": None}
            return {"config": config, "state": "Running", "memory_actual_size": 1 << 28, "device_tree": self.tree}
        if endpoint == "vm.add-disk":
            return self._add(data)
        return self._remove(data["id"])

    def _add(self, config: Json) -> Json | web.Response:
        if any(disk.get("id") == config["id"] for disk in self.disks) or config["id"] in self.tree:
            knows = int(self.version.removeprefix("v").partition(".")[0]) >= 51
            return web.json_response([f"Identifier {config['id']} is not unique"], status=409 if knows else 500)
        segment = config.get("pci_segment", 0)
        if segment >= self.segments:
            return web.json_response(["Invalid PCI segment"], status=400)
        if not self.booted:
            self.disks.append(config)
            return web.Response(status=204)
        bdf = self._plug(config["id"], segment)
        if not bdf:
            return web.json_response(["Could not find an available device slot on the PCI bus"], status=500)
        self.disks.append(config)
        return {"id": config["id"], "bdf": bdf}

    def _remove(self, name: str) -> web.Response:
        if name not in self.tree and not any(disk["id"] == name for disk in self.disks):
            return web.json_response([f"Unknown device {name}"], status=404)
        self.disks[:] = [disk for disk in self.disks if disk["id"] != name]
        if self.guest_lets_go_after_s is not None:
            self.let_go(name, self.guest_lets_go_after_s)
        return web.Response(status=204)

    def let_go(self, name: str, after_s: float = 0.0) -> None:
        """What the guest's ACPI eject does."""

        async def eject() -> None:
            await asyncio.sleep(after_s)
            self.tree.pop(name, None)
            self.tree.pop(f"_virtio-pci-{name}", None)

        task = asyncio.create_task(eject())
        self._ejects.add(task)

    def _plug(self, name: str, segment: int) -> str:
        taken = {node.get("pci_bdf") for node in self.tree.values()}
        for slot in range(1, 32):
            bdf = f"{segment:04x}:00:{slot:02x}.0"
            if bdf not in taken:
                transport = f"_virtio-pci-{name}"
                self.tree[transport] = {"id": transport, "resources": [], "children": [name], "pci_bdf": bdf}
                self.tree[name] = {"id": name, "resources": [], "parent": transport, "children": [], "pci_bdf": None}
                return bdf
        return ""


def endpoint_of(request: web.Request) -> str:
    return request.path.rpartition("/")[2]
