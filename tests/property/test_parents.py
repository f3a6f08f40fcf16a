# SPDX-License-Identifier: Apache-2.0
"""Parents layers of random chains, against a model that applies each layer to the whole tree."""

from __future__ import annotations

import hashlib

from hypothesis import event, given
from hypothesis import strategies as st

from blockdev.formats import directory_table, parents
from tests.chains import carried, make, parents_layer
from tests.golden.make_tars import EOA, PX, D, F, S
from tests.property import parents_model, reference

NAMES = [b"a", b"b", b"c"]
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)
modes = st.sampled_from([0o755, 0o700, 0o2755, 0o1777])
ids = st.sampled_from([0, 7, 1000])


@st.composite
def layers(draw: st.DrawFn) -> bytes:
    tar = b""
    for _ in range(draw(st.integers(1, 6))):
        path = draw(paths)
        name, kind = b"/".join(path), draw(st.sampled_from("ddddfffswo"))
        if kind == "d":
            if draw(st.booleans()):
                tar += PX(
                    (b"SCHILY.xattr.user." + draw(st.sampled_from([b"x", b"y"])), draw(st.sampled_from([b"1", b"2"])))
                )
            tar += D(name + b"/", mode=draw(modes), uid=draw(ids), gid=draw(ids))
        elif kind == "f":
            tar += F(name, b"1")
        elif kind == "s":
            tar += S(name, draw(st.sampled_from([b"b", b"/c", b"../a"])))
        elif kind == "w":
            tar += F(b"/".join([*path[:-1], b".wh." + path[-1]]))
        else:
            tar += F(b"/".join([*path[:-1], b".wh..wh..opq"]))
    return tar + EOA


@given(st.lists(layers(), min_size=2, max_size=6))
def test_any_chain(tars: list[bytes]) -> None:
    taken = []
    for tar in tars:
        try:
            reference.read_tar(tar)
        except reference.Refused:
            continue
        taken.append(tar)
    if not taken:
        return
    made = [make(tar) for tar in taken]
    for length, found in enumerate(carried(made), 1):
        expected = parents_model.table(taken[:length])
        assert (parents.pack(found) if found is not None else b"") == expected
    layer = parents_layer(made)
    event("a parents layer" if layer else "none needed")
    model = parents_model.layer_file(taken)
    assert (layer is None) == (model is None)
    if layer is None or model is None:
        return
    assert layer.file == model.file
    assert layer.built.root_hash == model.root_hash
    table = parents_model.table(taken)
    records = list(directory_table.read_parents_table(lambda at, size: table[at : at + size], len(table)))
    assert parents.pack(parents.unpack(records)) == table
    assert layer.built.diff_id == hashlib.sha256(table).digest()
