# SPDX-License-Identifier: Apache-2.0
"""What the kubelet calls, with its requests spelled out (k8s.io/cri-api, runtime.v1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from tests.cri import cri_pb2 as pb
from tests.cri.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub

_TIMEOUT = 120.0


@dataclass(frozen=True)
class Pod:
    id: str
    config: pb.PodSandboxConfig


@dataclass(frozen=True)
class Output:
    stdout: str
    stderr: str
    exit_code: int


class Cri:
    """Each call raises grpc.RpcError. `cgroup_parent`: where the pods' cgroups go, "/NAME"."""

    def __init__(self, channel: grpc.Channel, cgroup_parent: str) -> None:
        self.images, self.runtime = ImageServiceStub(channel), RuntimeServiceStub(channel)
        self._cgroup_parent = cgroup_parent

    def pod_config(
        self, name: str, annotations: Mapping[str, str] | None = None, *, host_network: bool = True
    ) -> pb.PodSandboxConfig:
        network = pb.NODE if host_network else pb.POD
        options = pb.NamespaceOption(network=network, pid=pb.CONTAINER)
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="tests"),
            hostname="" if host_network else name,
            annotations=annotations or {},
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=self._cgroup_parent,
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )

    # Images

    def pull(self, reference: str, config: pb.PodSandboxConfig | None = None) -> str:
        """The image's ID. `config`: of the pod that wants it, as the kubelet says."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), sandbox_config=config)
        return str(self.images.PullImage(request, timeout=_TIMEOUT).image_ref)

    def image(self, reference: str) -> pb.Image | None:
        reply = self.images.ImageStatus(
            pb.ImageStatusRequest(image=pb.ImageSpec(image=reference)), timeout=_TIMEOUT
        )  # fmt: skip
        return reply.image if reply.HasField("image") else None

    def image_ids(self) -> set[str]:
        return {image.id for image in self.images.ListImages(pb.ListImagesRequest(), timeout=_TIMEOUT).images}

    def remove_image(self, reference: str) -> None:
        self.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=_TIMEOUT)

    def image_filesystems(self) -> dict[str, int]:
        """Mountpoint → bytes used."""
        reply = self.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=_TIMEOUT)
        return {use.fs_id.mountpoint: use.used_bytes.value for use in reply.image_filesystems}

    # Pods and containers

    def ready(self) -> bool:
        reply = self.runtime.Status(pb.StatusRequest(), timeout=_TIMEOUT)
        return any(condition.type == "RuntimeReady" and condition.status for condition in reply.status.conditions)

    def run_pod(self, config: pb.PodSandboxConfig, handler: str = "") -> Pod:
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return Pod(str(self.runtime.RunPodSandbox(request, timeout=_TIMEOUT).pod_sandbox_id), config)

    def pod_status(self, pod: Pod) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
        status: pb.PodSandboxStatus = self.runtime.PodSandboxStatus(request, timeout=_TIMEOUT).status
        return status

    def remove_pod(self, pod_id: str) -> None:
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=_TIMEOUT)
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=_TIMEOUT)

    def pods(self) -> list[str]:
        reply = self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=_TIMEOUT)
        return [item.id for item in reply.items]

    def create_container(self, pod: Pod, image: str, name: str = "main") -> str:
        """The container's ID. Command and user are the image's own; the user the kubelet repeats."""
        status = self.image(image)
        network = pod.config.linux.security_context.namespace_options.network
        security = pb.LinuxContainerSecurityContext(
            namespace_options=pb.NamespaceOption(network=network, pid=pb.CONTAINER),
            run_as_username=status.username if status else "",
        )
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            linux=pb.LinuxContainerConfig(security_context=security),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        return str(self.runtime.CreateContainer(request, timeout=_TIMEOUT).container_id)

    def start_container(self, container: str) -> None:
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=_TIMEOUT)

    def run_container(self, pod: Pod, image: str, name: str = "main") -> str:
        container = self.create_container(pod, image, name)
        self.start_container(container)
        return container

    def remove_container(self, container: str) -> None:
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container), timeout=_TIMEOUT)
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=_TIMEOUT)

    def container_status(self, container: str) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=container)
        status: pb.ContainerStatus = self.runtime.ContainerStatus(request, timeout=_TIMEOUT).status
        return status

    def execute(self, container: str, *command: str) -> Output:
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=int(_TIMEOUT))
        reply = self.runtime.ExecSync(request, timeout=_TIMEOUT)
        return Output(reply.stdout.decode(), reply.stderr.decode(), reply.exit_code)

    def stats(self, container: str) -> pb.ContainerStats:
        request = pb.ContainerStatsRequest(container_id=container)
        stats: pb.ContainerStats = self.runtime.ContainerStats(request, timeout=_TIMEOUT).stats
        return stats

    def all_stats(self) -> dict[str, pb.ContainerStats]:
        reply = self.runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=_TIMEOUT)
        return {stats.attributes.id: stats for stats in reply.stats}


@contextmanager
def connect(address: Path, cgroup_parent: str) -> Iterator[Cri]:
    with grpc.insecure_channel(f"unix:{address}") as channel:
        yield Cri(channel, cgroup_parent)
