# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.idmap import GID_LABEL, UID_LABEL, IDMapping, Range, keeping, mapping_of

PLAIN = "0:100000:65536"
MOST = (1 << 32) - 1


def labels(uids: str = PLAIN, gids: str = PLAIN) -> dict[str, str]:
    return {UID_LABEL: uids, GID_LABEL: gids, "other": "x"}


def mapping(uids: str, gids: str = PLAIN) -> IDMapping:
    found = mapping_of(labels(uids, gids))
    assert found is not None
    return found


def test_without_labels_nothing_is_mapped() -> None:
    assert mapping_of({}) is None
    assert mapping_of({"containerd.io/snapshot.ref": "x"}) is None


def test_one_range_as_containerd_2_0_and_the_kubelet_send_it() -> None:
    found = mapping("0:100000:65536", "0:200000:65536")
    assert found == IDMapping((Range(0, 100000, 65536),), (Range(0, 200000, 65536),))
    assert found.root == (100000, 200000)
    assert found.maps == ("0 100000 65536\n", "0 200000 65536\n")


def test_several_ranges_as_containerd_2_1_sends_them() -> None:
    found = mapping("1000:6666:64536,0:666:1000")
    assert found.root == (666, 100000)
    assert found.maps[0] == "1000 6666 64536\n0 666 1000\n"


def test_as_many_ranges_as_the_kernel_takes() -> None:
    ranges = [f"{number}:{1000 + number}:1" for number in range(340)]
    assert mapping(",".join(ranges)).maps[0].count("\n") == 340
    with pytest.raises(InvalidArgument, match="340"):
        mapping(",".join([*ranges, "340:5000:1"]))
    with pytest.raises(InvalidArgument, match="340"):
        mapping(",".join(ranges) * 10_000)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "0", "0:1", "0:1:2:3", "0:1:2,", ",0:1:2", "0:1:2,,3:4:5", "a:b:c", "-1:0:5", "0:-1:5", "0:0:-1",
        "+0:1:2", " 0:1:2", "0:1:2 ", "0:1:2\n", "0 1 2", "0:1:2;3:4:5", "0x0:1:2", "1e3:0:1", "0:1.0:2", "٠:1:2",
        "0:1:99999999999", "0:1:0", f"0:0:{MOST + 1}", f"0:1:{MOST}", f"{MOST}:0:1,0:1:1", f"0:{MOST}:1", "0:1:2\0",
    ],
)  # fmt: skip
def test_what_is_no_mapping_is_refused_with_the_label(text: str) -> None:
    with pytest.raises(InvalidArgument, match="uidmapping"):
        mapping_of(labels(uids=text))
    with pytest.raises(InvalidArgument, match="gidmapping"):
        mapping_of(labels(gids=text))


def test_the_whole_range_of_ids() -> None:
    assert mapping(f"0:0:{MOST}").root == (0, 100000)
    assert mapping(f"{MOST - 1}:5:1,0:6:1").root[0] == 6


@pytest.mark.parametrize(
    ("text", "which"),
    [
        ("0:100:10,5:200:10", "container"),
        ("5:200:10,0:100:10", "container"),
        ("0:100:10,0:200:10", "container"),
        ("0:100:10,10:109:10", "host"),
        ("10:100:10,0:100:1", "host"),
        ("0:100:10,20:300:1,40:105:2", "host"),
    ],
)
def test_ids_that_are_mapped_twice(text: str, which: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{which} IDs twice"):
        mapping(text)


def test_neighbours_do_not_overlap() -> None:
    assert len(mapping("0:100:10,10:110:10,20:90:10").uids) == 3


@pytest.mark.parametrize("text", ["1:100:10", "1:100:10,20:200:5"])
def test_a_container_without_a_root_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="root"):
        mapping(text)


@pytest.mark.parametrize("missing", [UID_LABEL, GID_LABEL])
def test_one_label_without_the_other(missing: str) -> None:
    with pytest.raises(InvalidArgument, match="together"):
        mapping_of({label: value for label, value in labels().items() if label != missing})


@given(st.text(alphabet="0123456789:, -x", max_size=60))
def test_any_text_is_a_mapping_that_the_kernel_takes_or_is_refused(text: str) -> None:
    try:
        found = mapping(text)
    except InvalidArgument:
        return
    inside = [number for entry in found.uids for number in (entry.container, entry.container + entry.length - 1)]
    assert max(inside) < MOST
    for first in found.uids:
        assert first.length > 0
        for second in found.uids:
            if first is not second:
                assert not first.container <= second.container < first.container + first.length
                assert not first.host <= second.host < first.host + first.length
    assert found.root[0] in {entry.host for entry in found.uids}


def test_a_long_label_is_not_repeated_whole() -> None:
    with pytest.raises(InvalidArgument) as caught:
        mapping("9" * 100_000)
    assert len(str(caught.value)) < 300


def test_an_update_keeps_the_mapping() -> None:
    old = labels()
    # Who replaces all labels, or names one that the request lacks, may not know of them.
    for new in ({}, {"a": "b"}, {UID_LABEL: ""}, labels()):
        changed = keeping(lambda _, new=new: new)(dict(old))  # type: ignore[misc]
        assert (changed[UID_LABEL], changed[GID_LABEL]) == (PLAIN, PLAIN)
    with pytest.raises(InvalidArgument, match="cannot change"):
        keeping(lambda _: {UID_LABEL: "0:5:5"})(dict(old))


def test_an_update_of_others_is_as_it_was() -> None:
    assert keeping(lambda old: {**old, "b": "2"})({"a": "1"}) == {"a": "1", "b": "2"}
