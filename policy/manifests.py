# SPDX-License-Identifier: Apache-2.0
"""Kubernetes manifests: the containers of their pods, and the few places in the text that are changed.

The text is not written anew: what is changed is cut out and put in by its place, so that all else, comments, order,
quotes and line ends, is byte for byte what it was. What was changed is then read again, and must be what was meant.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy.errors import ManifestError

# Where the pod's template is; a Pod is one itself.
_TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
# Kubernetes' own kinds that run nothing. Of any other kind nobody knows that it does not.
_WITHOUT_PODS: Final = frozenset(
    {
        "ClusterRole", "ClusterRoleBinding", "ConfigMap", "CustomResourceDefinition", "EndpointSlice", "Endpoints",
        "HorizontalPodAutoscaler", "Ingress", "IngressClass", "LimitRange", "Namespace", "NetworkPolicy",
        "PersistentVolume", "PersistentVolumeClaim", "PodDisruptionBudget", "PriorityClass", "ResourceQuota", "Role",
        "RoleBinding", "RuntimeClass", "Secret", "Service", "ServiceAccount", "StorageClass",
    }
)  # fmt: skip
_LISTS: Final = ("initContainers", "containers", "ephemeralContainers")
_BYTES_MAX: Final = 16 << 20
_DEPTH_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Container:
    """`place`: its keys and numbers from the pod's template on. None of the texts is checked beyond being one."""

    kind: str  # one of initContainers, containers, ephemeralContainers
    name: str
    image: str
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    place: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """`where`: for messages. `place`: of its template, from the document on. `name`: as far as it is given."""

    where: str
    name: str
    document: int
    place: tuple[str | int, ...]
    containers: tuple[Container, ...]


@dataclass(slots=True)
class _Edit:
    start: int
    end: int
    text: str


@dataclass
class Manifests:
    """One file. `notes`: what was left as it is, and what a person may want to know."""

    name: str
    text: str
    pods: tuple[Pod, ...]
    notes: tuple[str, ...]
    _nodes: list[Node | None] = field(repr=False)
    _values: list[Any] = field(repr=False)
    _edits: list[_Edit] = field(default_factory=list, repr=False)

    def annotate(self, pod: Pod, key: str, value: str) -> None:
        """An annotation of the pod's template; one that is there gets the value. Raises ManifestError."""
        template = _at(self._nodes[pod.document], pod.place)
        assert isinstance(template, MappingNode)
        line = f'{key}: "{value}"'
        metadata = _value(template, "metadata")
        if metadata is None or _is_null(metadata):
            self._add(template, "metadata", metadata, ["metadata:", "  annotations:", f"    {line}"], pod)
        elif not isinstance(metadata, MappingNode):
            raise ManifestError(f"{pod.where}: its metadata is no mapping")
        else:
            annotations = _value(metadata, "annotations")
            if annotations is None or _is_null(annotations):
                self._add(metadata, "annotations", annotations, ["annotations:", f"  {line}"], pod)
            elif not isinstance(annotations, MappingNode):
                raise ManifestError(f"{pod.where}: its annotations are no mapping")
            else:
                there = _value(annotations, key)
                if there is None:
                    self._add(annotations, key, None, [line], pod)
                elif isinstance(there, ScalarNode):
                    self._replace(there, f'"{value}"')
                else:
                    raise ManifestError(f"{pod.where}: its annotation {key} is no text")
        wanted = _get(self._values[pod.document], pod.place)
        wanted["metadata"] = wanted.get("metadata") or {}
        wanted["metadata"]["annotations"] = wanted["metadata"].get("annotations") or {}
        wanted["metadata"]["annotations"][key] = value

    def set_image(self, pod: Pod, container: Container, image: str) -> None:
        """Its reference, written as it is written now."""
        node = _at(self._nodes[pod.document], (*pod.place, *container.place, "image"))
        assert isinstance(node, ScalarNode)
        quote = node.style if node.style in ('"', "'") else ""
        self._replace(node, f"{quote}{image}{quote}")
        _get(self._values[pod.document], (*pod.place, *container.place))["image"] = image

    def changed(self) -> str:
        """The text with all changes. Raises ManifestError where it would not say what was meant."""
        text = self.text
        for edit in sorted(self._edits, key=lambda each: each.start, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        if _values(text, self.name) != self._values:
            raise ManifestError(f"{self.name}: this way of writing it cannot be changed in its place")
        return text

    def _replace(self, node: ScalarNode, text: str) -> None:
        start, end = node.start_mark.index, node.end_mark.index
        if node.style in ("|", ">"):  # up to the next line that is not its own
            text += self._line_end()
        self._edits.append(_Edit(start, end, text))

    def _line_end(self) -> str:
        return "\r\n" if "\r\n" in self.text else "\n"

    def _add(self, mapping: MappingNode, key: str, null: Node | None, lines: Sequence[str], pod: Pod) -> None:
        """`null`: the value that the key has already, and that says nothing."""
        if null is not None:
            raise ManifestError(f"{pod.where}: {key} is there and empty; leave it out, or write something into it")
        if mapping.flow_style:
            raise ManifestError(f"{pod.where}: {key} cannot be put into a mapping in braces; write it in lines")
        first = mapping.value[0][0].start_mark
        before = self.text[first.index - first.column : first.index]
        if before.strip():
            raise ManifestError(f"{pod.where}: {key} cannot be put before the first key; write it there")
        added = "".join(f"{before}{line}{self._line_end()}" for line in lines)
        self._edits.append(_Edit(first.index - first.column, first.index - first.column, added))


def load(text: str, name: str) -> Manifests:
    """`name`: for messages. Raises ManifestError for what cannot be understood to the last container."""
    if len(text) > _BYTES_MAX:
        raise ManifestError(f"{name}: over {_BYTES_MAX} characters")
    if "\r" in text.replace("\r\n", "") or ("\r\n" in text and text.count("\n") != text.count("\r\n")):
        raise ManifestError(f"{name}: lines end in different ways")
    _refuse_anchors(text, name)
    nodes, values = _nodes(text, name), _values(text, name)
    pods: list[Pod] = []
    notes: list[str] = []
    for number, value in enumerate(values):
        if value is None:
            continue
        where = f"{name}, document {number + 1}"
        for place, each in _documents(value, where):
            found = _pod(each, place, number, where, notes)
            if found is not None:
                pods.append(found)
    return Manifests(name, text, tuple(pods), tuple(notes), list(nodes), copy.deepcopy(values))


def _documents(value: Any, where: str) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """With their places; those of a List one by one."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: is no mapping")
    kind = value.get("kind")
    if isinstance(kind, str) and kind.endswith("List") and (kind == "List" or isinstance(value.get("items"), list)):
        items = value.get("items")
        if not isinstance(items, list):
            raise ManifestError(f"{where}: a {kind} without items")
        for number, item in enumerate(items):
            if not isinstance(item, dict):
                raise ManifestError(f"{where}: item {number + 1} is no mapping")
            yield ("items", number), item
    else:
        yield (), value


def _pod(value: dict[str, Any], place: tuple[str | int, ...], number: int, where: str, notes: list[str]) -> Pod | None:
    kind = value.get("kind")
    metadata = value.get("metadata")
    named = metadata.get("name") if isinstance(metadata, dict) else None
    called = f"{where}: {kind} {named!r}" if named else f"{where}: {kind}"
    if not isinstance(kind, str):
        raise ManifestError(f"{where}: it is not known whether kind {kind!r} runs a pod")
    if kind in _WITHOUT_PODS:
        notes.append(f"{called}: runs nothing, and is left as it is")
        return None
    if kind not in _TEMPLATES:
        raise ManifestError(f"{where}: it is not known whether kind {kind!r} runs a pod")
    if not named and isinstance(metadata, dict) and metadata.get("generateName"):
        notes.append(f"{called}: its name is made by the cluster, from {metadata['generateName']!r}")
    template: Any = value
    for key in _TEMPLATES[kind]:
        template = template.get(key) if isinstance(template, dict) else None
    spec = template.get("spec") if isinstance(template, dict) else None
    if not isinstance(spec, dict):
        raise ManifestError(f"{called}: has no pod's spec at {'.'.join((*_TEMPLATES[kind], 'spec'))}")
    containers: list[Container] = []
    for each in _LISTS:
        found = spec.get(each)
        if found is None:
            continue
        if not isinstance(found, list):
            raise ManifestError(f"{called}: {each} is no list")
        containers += [_container(each, at, item, called) for at, item in enumerate(found)]
    if not any(container.kind == "containers" for container in containers):
        raise ManifestError(f"{called}: has no containers")
    names = [container.name for container in containers]
    if len(set(names)) != len(names):
        raise ManifestError(f"{called}: two containers have one name")
    return Pod(called, str(named or ""), number, (*place, *_TEMPLATES[kind]), tuple(containers))


def _container(kind: str, number: int, value: Any, where: str) -> Container:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{where}: {kind}[{number}] has no name")
    image = value.get("image")
    if not isinstance(image, str) or not image or image != image.strip() or not image.isprintable():
        raise ManifestError(f"{where}: container {name!r} has no image")
    words: list[tuple[str, ...]] = []
    for key in ("command", "args"):
        found = value.get(key) or []
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise ManifestError(f"{where}: container {name!r}: {key} is no list of texts")
        words.append(tuple(found))
    command, arguments = words
    return Container(kind, name, image, command, arguments, ("spec", kind, number))


def _refuse_anchors(text: str, name: str) -> None:
    """What stands in two places at once cannot be changed in one; and what is too deep takes the reader minutes."""
    depth = 0
    try:
        for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
            if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
                line = event.start_mark.line + 1
                raise ManifestError(f"{name}, line {line}: anchors and aliases: write out what they stand for")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > _DEPTH_MAX:
                raise ManifestError(f"{name}: mappings and lists in one another, over {_DEPTH_MAX} of them")
    except YAMLError as error:
        raise ManifestError(f"{name}: {_said(error)}") from None


def _nodes(text: str, name: str) -> list[Node | None]:
    try:
        return list(YAML(typ="rt", pure=True).compose_all(io.StringIO(text)))
    except (YAMLError, RecursionError, ValueError) as error:
        raise ManifestError(f"{name}: {_said(error)}") from None


def _values(text: str, name: str) -> list[Any]:
    """Plain ones. A key that comes twice, a tab, a tag that is not YAML's own are errors."""
    try:
        return list(YAML(typ="safe", pure=True).load_all(io.StringIO(text)))
    except (YAMLError, RecursionError, ValueError) as error:
        raise ManifestError(f"{name}: {_said(error)}") from None


def _said(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())[:300]


def _value(mapping: MappingNode, key: str) -> Node | None:
    for name, value in mapping.value:
        if isinstance(name, ScalarNode) and name.value == key:
            found: Node = value
            return found
    return None


def _at(node: Node | None, place: Sequence[str | int]) -> Node:
    for step in place:
        if isinstance(step, int):
            assert isinstance(node, SequenceNode)
            node = node.value[step]
        else:
            assert isinstance(node, MappingNode)
            node = _value(node, step)
    assert node is not None
    return node


def _get(value: Any, place: Sequence[str | int]) -> Any:
    for step in place:
        value = value[step]
    return value


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and str(node.tag) == "tag:yaml.org,2002:null"
