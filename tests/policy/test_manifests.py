# SPDX-License-Identifier: Apache-2.0
"""Manifests as people and programs write them: what is changed is what was meant, and not a byte beside it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from policy.errors import ManifestError
from policy.initdata import POLICY_ANNOTATION
from policy.manifests import Manifests, load

CORPUS = sorted((Path(__file__).parent / "manifests").glob("*.yaml"))
PINNED = "@sha256:" + "ab" * 32
HEAD = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n"
SPEC = "spec:\n  containers:\n  - name: c\n    image: i\n"


def text_of(path: Path) -> str:
    return path.read_bytes().decode()


def loaded(text: str) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(text))


def test_there_are_enough_shapes() -> None:
    assert len(CORPUS) >= 12


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_only_annotation_and_images_change(path: Path) -> None:
    text = text_of(path)
    found = load(text, path.name)
    assert found.pods
    assert found.changed() == text
    expected = loaded(text)
    for pod in found.pods:
        found.annotate(pod, POLICY_ANNOTATION, "bmV3")
        template = expected[pod.document]
        for step in pod.place:
            template = template[step]
        template.setdefault("metadata", {}).setdefault("annotations", {})[POLICY_ANNOTATION] = "bmV3"
        for container in pod.containers:
            if "@" not in container.image:
                found.set_image(pod, container, container.image + PINNED)
                template["spec"][container.kind][container.place[-1]]["image"] += PINNED
    changed = found.changed()
    assert loaded(changed) == expected
    # Line by line: what is new holds what was meant, what is gone comes again with it.
    before, after = text.splitlines(keepends=True), changed.splitlines(keepends=True)
    for line in difflib.ndiff(before, after):
        if line.startswith("+ "):
            assert any(word in line for word in (POLICY_ANNOTATION, PINNED, "annotations:", "metadata:")), line
        elif line.startswith("- "):
            assert "image" in line or "b2xk" in line or "agent:1" in line, line
    assert [each[-2:] for each in before if each.endswith("\r\n")] == [] or all(each.endswith("\r\n") for each in after)
    # Once more: nothing is added twice.
    again = load(changed, path.name)
    for pod in again.pods:
        again.annotate(pod, POLICY_ANNOTATION, "bmV3")
    assert again.changed() == changed


def test_what_there_is() -> None:
    found = load(text_of(CORPUS[[path.stem for path in CORPUS].index("ephemeral")]), "e.yaml")
    [pod] = found.pods
    assert [(each.kind, each.name, each.image) for each in pod.containers] == [
        ("initContainers", "sidecar", "sidecar:1"),
        ("containers", "app", "app:1"),
        ("ephemeralContainers", "debugger", "busybox"),
    ]
    found = load(text_of(CORPUS[[path.stem for path in CORPUS].index("job")]), "j.yaml")
    assert found.pods[0].containers[0].command == ("python", "-c")
    assert found.notes == ("j.yaml, document 1: Job: its name is made by the cluster, from 'import-'",)
    found = load(text_of(CORPUS[[path.stem for path in CORPUS].index("helm")]), "h.yaml")
    assert [note.partition(": runs nothing")[0] for note in found.notes] == [
        "h.yaml, document 1: ServiceAccount 'release-name-chart'",
        "h.yaml, document 2: ConfigMap 'release-name-chart'",
    ]


BAD = {
    "anchors": (HEAD + SPEC.replace("image: i", "image: &x i"), "line 8: anchors and aliases"),
    "an alias": ("a: &x 1\nb: *x\n", "line 1: anchors and aliases"),
    "a merge key": ("a: &x {b: 1}\nc: {<<: *x}\n", "anchors and aliases"),
    "a key twice": (HEAD + "kind: Pod\n" + SPEC, "duplicate key"),
    "a tab": (HEAD + "spec:\n\tcontainers: []\n", "line 6"),
    "no yaml": ("a: [1\n", "m.yaml: line"),
    "an unknown kind": (HEAD.replace("Pod", "Rollout") + SPEC, "not known whether kind 'Rollout' runs a pod"),
    "no kind": ("apiVersion: v1\n", "not known whether kind None"),
    "a kind that is no text": ("kind: [Pod]\n", "not known whether kind"),
    "a list as a document": ("- kind: Pod\n", "is no mapping"),
    "a text as a document": ("hello\n", "is no mapping"),
    "no spec": (HEAD, "has no pod's spec at spec"),
    "no template": (HEAD.replace("Pod", "Deployment") + "spec: {}\n", "has no pod's spec at spec.template.spec"),
    "no containers": (HEAD + "spec: {}\n", "has no containers"),
    "an empty list of containers": (HEAD + "spec:\n  containers: []\n", "has no containers"),
    "containers that are no list": (HEAD + "spec:\n  containers: x\n", "containers is no list"),
    "a container without a name": (HEAD + "spec:\n  containers:\n  - image: i\n", r"containers\[0\] has no name"),
    "a container without an image": (HEAD + "spec:\n  containers:\n  - name: c\n", "container 'c' has no image"),
    "an image that is no text": (HEAD + SPEC.replace("image: i", "image: 1"), "container 'c' has no image"),
    "an image with a line end": (HEAD + SPEC.replace("image: i", 'image: "i\\n"'), "container 'c' has no image"),
    "a command that is no list": (HEAD + SPEC + "    command: sh\n", "command is no list of texts"),
    "a command of numbers": (HEAD + SPEC + "    command: [1]\n", "command is no list of texts"),
    "a name twice": (HEAD + SPEC + "  - name: c\n    image: j\n", "two containers have one name"),
    "a list without items": ("kind: List\n", "a List without items"),
    "an item that is none": ("kind: List\nitems: [x]\n", "item 1 is no mapping"),
    "lines that end in two ways": (HEAD.replace("\n", "\r\n") + SPEC, "lines end in different ways"),
    "lines that end with a carriage return": (HEAD.replace("\n", "\r"), "lines end in different ways"),
    "depth": ("a: " + "[" * 3000 + "]" * 3000, "in one another, over 100"),
    "a tag": (HEAD + "x: !!python/object:os.system {}\n" + SPEC, "m.yaml"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_understood_is_refused(what: str) -> None:
    text, words = BAD[what]
    with pytest.raises(ManifestError, match=words):
        load(text, "m.yaml")


IN_BRACES = HEAD.replace("metadata:\n  name: p\n", "metadata: {name: p}\n") + SPEC
AND_EMPTY = HEAD + "  annotations:\n" + SPEC
NO_TEXT = HEAD + "  annotations:\n    io.katacontainers.config.agent.policy: [x]\n" + SPEC


@pytest.mark.parametrize(
    ("text", "words"),
    [(IN_BRACES, "write it in lines"), (AND_EMPTY, "is there and empty"), (NO_TEXT, "is no text"),
     (HEAD + "  annotations: x\n" + SPEC, "annotations are no mapping"),
     ("apiVersion: v1\nkind: Pod\nmetadata: x\n" + SPEC, "metadata is no mapping")],
)  # fmt: skip
def test_what_cannot_be_changed_in_its_place_is_refused(text: str, words: str) -> None:
    found = load(text, "m.yaml")
    with pytest.raises(ManifestError, match=words):
        found.annotate(found.pods[0], POLICY_ANNOTATION, "x")
    assert found.changed() == text


plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=30)


@given(
    st.dictionaries(plain, st.one_of(plain, st.integers(), st.booleans(), st.none()), max_size=4),
    st.sampled_from([2, 4]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_else_is_there_stays(labels: dict[str, Any], indent: int, offset: bool, crlf: bool) -> None:
    """A document that a YAML library wrote, with texts of all kinds."""
    import io

    writer = YAML()
    writer.indent(mapping=indent, sequence=indent, offset=indent - 2 if offset else 0)
    out = io.StringIO()
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": labels or {"x": "y"}},
        "spec": {"containers": [{"name": "c", "image": "busybox:1", "env": [{"name": "E", "value": repr(labels)}]}]},
    }  # fmt: skip
    writer.dump(pod, out)
    text = out.getvalue().replace("\n", "\r\n") if crlf else out.getvalue()
    try:
        found: Manifests = load(text, "m.yaml")
    except ManifestError:
        return
    found.annotate(found.pods[0], POLICY_ANNOTATION, "eA==")
    changed = found.changed()
    [again] = loaded(changed)
    assert again["metadata"].pop("annotations") == {POLICY_ANNOTATION: "eA=="}
    assert [again] == loaded(text)
    lines = changed.splitlines(keepends=True)
    kept = [line for line in lines if POLICY_ANNOTATION not in line and line.strip() != "annotations:"]
    assert "".join(kept) == text
