# SPDX-License-Identifier: Apache-2.0
"""The grammar is containerd's (pkg/filters): what it takes is taken, what it refuses is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest

from snapshotter.errors import InvalidArgument
from snapshotter.filters import Subject, compile_filters

CHAIN = "sha256:" + "ab" * 32
REF = "containerd.io/snapshot.ref"

BASE = Subject("default/1/base", "", "committed", {REF: CHAIN})
TOP = Subject("default/2/top", "default/1/base", "committed", {REF: "sha256:other", "a.b.c": "dots", "a/b": "slash"})
POD = Subject("default/3/pod one", "default/2/top", "active", {"word": "true", "my-label": "hyphen", "1": "digit"})
LOOK = Subject("k8s.io/4/view", "default/2/top", "view", {'q"uote\\d': "x", "with space": "too complex, yo"})
ALL = (BASE, TOP, POD, LOOK)


def matching(*filters: str) -> list[Subject]:
    wanted = compile_filters(filters)
    return [subject for subject in ALL if wanted(subject)]


def test_no_filter_lets_everything_through() -> None:
    assert matching() == list(ALL)
    assert matching("") == list(ALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind==active", [POD]),
        ("kind==view", [LOOK]),
        ("kind==committed", [BASE, TOP]),
        ("kind==Committed", []),
        ("kind!=committed", [POD, LOOK]),
        ('kind=="active"', [POD]),
        ("name==default/1/base", [BASE]),
        ('name=="default/3/pod one"', [POD]),
        ("parent==default/2/top", [POD, LOOK]),
        ("parent!=default/2/top", [BASE, TOP]),
        ("name~=^default/", [BASE, TOP, POD]),
        ("name~=one$", [POD]),
        ("name~=default", [BASE, TOP, POD]),
        ("labels.word", [POD]),
        ("labels.word==true", [POD]),
        ("labels.word==false", []),
        ("labels.word!=true", [BASE, TOP, LOOK]),
        ("labels.1==digit", [POD]),
        ("labels.my-label==hyphen", [POD]),
        ("labels.nobody", []),
        ("nosuchfield", []),
        ("nosuchfield==x", []),
        ("labels", []),
        ("name.more==default/1/base", []),
    ],
)
def test_one_condition(text: str, expected: list[Subject]) -> None:
    assert matching(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'labels."{REF}"', [BASE, TOP]),
        (f'labels."{REF}"=={CHAIN}', [BASE]),
        ('labels."a.b.c"==dots', [TOP]),
        # Unquoted, a label's name is the parts again, joined by dots.
        ("labels.a.b.c==dots", [TOP]),
        ('labels.a."b.c"==dots', [TOP]),
        ('"labels"."a"."b"."c"==dots', [TOP]),
        ('labels."a/b"==slash', [TOP]),
        ('labels."q\\"uote\\\\d"==x', [LOOK]),
        ('labels."with space"=="too complex, yo"', [LOOK]),
    ],
)
def test_labels_with_dots_slashes_and_quotes(text: str, expected: list[Subject]) -> None:
    assert matching(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind==committed,name~=base", [BASE]),
        ("kind==committed , name~=base", [BASE]),
        (" kind == committed", [BASE, TOP]),
        ("kind==committed,kind==active", []),
        ('labels.word,parent==default/2/top,name!="x"', [POD]),
        ('labels."with space"=="too complex, yo",kind==view', [LOOK]),
    ],
)
def test_conditions_of_one_filter_must_all_hold(text: str, expected: list[Subject]) -> None:
    assert matching(text) == expected


def test_filters_are_alternatives() -> None:
    assert matching("kind==active", "kind==view") == [POD, LOOK]
    assert matching("kind==active,labels.nobody", "name~=base") == [BASE]
    assert matching("kind==active", "") == list(ALL)


def test_the_one_filter_that_containerd_sends() -> None:
    """Right after an ALREADY_EXISTS to a Prepare: without the hit the pull fails."""
    other = Subject("default/9/else", "default/1/base", "committed", {REF: CHAIN})
    wanted = compile_filters([f'labels."{REF}"=={CHAIN},parent=="default/1/base"'])
    assert [wanted(subject) for subject in (*ALL, other)] == [False, False, False, False, True]
    wanted = compile_filters([f'labels."{REF}"=={CHAIN},parent==""'])
    assert [wanted(subject) for subject in (*ALL, other)] == [True, False, False, False, False]


def test_a_snapshot_without_parent_has_the_empty_one() -> None:
    assert matching('parent==""') == [BASE]
    assert matching('parent!=""') == [TOP, POD, LOOK]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name~=/^default/", [BASE, TOP, POD]),
        ("name~=|^default/|", [BASE, TOP, POD]),
        (r"name~=/^default\/[12]/", [BASE, TOP]),
        ("name~=/[ab]{1,2}ase/,kind==committed", [BASE]),
        ('labels."with space"~=/complex, y/', [LOOK]),
        (r"name~=|base\|top|", [BASE, TOP]),
        ('name~="base|top"', [BASE, TOP]),
        ("name~=base|top", [BASE, TOP]),
        (r'name~="pod\\sone"', [POD]),
        (r"name~=/pod\\sone/", [POD]),
    ],
)
def test_expressions_may_stand_between_slashes_and_bars(text: str, expected: list[Subject]) -> None:
    assert matching(text) == expected


@pytest.mark.parametrize(
    ("quoted", "value"),
    [
        (r'"\n\t\r\a\b\f\v"', "\n\t\r\a\b\f\v"),
        (r'"\\\""', '\\"'),
        (r'"\x41\x7e"', "A~"),
        (r'"\101"', "A"),
        (r'"\u20ac"', "€"),
        (r'"\U0001f600"', "😀"),
        ('"€"', "€"),
        ('""', ""),
        ('"a,b==c.d"', "a,b==c.d"),
        ("a.b-c_d:e/f@g", "a.b-c_d:e/f@g"),
        ('a"b', 'a"b'),
        ("ü€", "ü€"),
    ],
)
def test_values(quoted: str, value: str) -> None:
    wanted = compile_filters([f"labels.x=={quoted}"])
    assert wanted(Subject("n", "", "active", {"x": value}))
    assert not wanted(Subject("n", "", "active", {"x": value + "."}))
    assert not wanted(Subject("n", "", "active", {}))


@pytest.mark.parametrize(
    "text",
    [
        " ",
        ",",
        "kind==active,",
        ",kind==active",
        "kind==active,,name",
        "labels.",
        ".labels",
        "labels..x",
        "kind==",
        "kind=active",
        "kind=",
        "kind===active",
        "kind<=active",
        "kind active",
        "kind==active name",
        "==active",
        'labels."open',
        'labels."open==x',
        'name=="open',
        "name~=/open",
        "name~=|open",
        'labels."a"b==x',
        'name=="a"b',
        "labels.?x==y",
        "labels.a/b==slash",
        "labels.|word|==true",
        "labels./word/==true",
        "name~=(",
        "name~=[",
        "name~=*",
        "name~=" + "(" * 30_000,
        "name==" + "x" * 70_000,
        # As containerd: no other escapes than Go's, bars and slashes only around expressions.
        r'name=="\q"',
        r'name=="\xzz"',
        r'name=="\x4"',
        r'name=="\400"',
        r'name=="\18"',
        r'name=="\U00110000"',
        r"name~=/a\.b/",
        'name=="a\nb"',
        "name==/base/",
        "name==|base|",
    ],
)
def test_what_is_no_filter_is_an_invalid_argument(text: str) -> None:
    with pytest.raises(InvalidArgument, match="filter") as caught:
        compile_filters([text])
    assert len(str(caught.value)) < 1000


def test_one_bad_filter_spoils_them_all() -> None:
    with pytest.raises(InvalidArgument):
        compile_filters(["kind==active", "kind=="])


def test_an_error_names_the_filter_and_the_place() -> None:
    with pytest.raises(InvalidArgument, match=r"'kind==active,,name'.* at 13"):
        compile_filters(["kind==active,,name"])


@pytest.mark.timeout(1)
def test_an_expression_takes_no_exponential_time() -> None:
    """RE2, which containerd has, is linear; the daemon's one loop would stand still meanwhile."""
    with suppress(InvalidArgument):
        assert not compile_filters(["name~=(a+)+$"])(Subject("a" * 40 + "!", "", "active", {}))


@pytest.mark.parametrize(
    ("filters", "names", "parents"),
    [
        ([], None, None),
        ([""], None, None),
        ([f'labels."{REF}"=={CHAIN},parent=="default/1/base"'], None, {"default/1/base"}),
        ([f'labels."{REF}"=={CHAIN},parent==""'], None, {""}),
        (["name==a", "name==b,kind==active"], {"a", "b"}, None),
        (["name==a", "kind==active"], None, None),
        (["name==a", ""], None, None),
        (["name!=a"], None, None),
        (["name~=a"], None, None),
        (["name"], None, None),
        (["name.x==a"], None, None),
        (["name==a,parent==p"], {"a"}, {"p"}),
        (["name==a,name==b"], {"a"}, None),
        (["labels.name==a"], None, None),
    ],
)
def test_what_filters_say_of_names_and_parents(
    filters: list[str], names: set[str] | None, parents: set[str] | None
) -> None:
    compiled = compile_filters(filters)
    assert compiled.only("name") == names
    assert compiled.only("parent") == parents
