#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Deterministic test layers for tar index / dm-verity golden values (stdlib only).

usage: make_tars.py OUTDIR   -> writes OUTDIR/<name>.tar for every case
Two styles: cases made with the tarfile module (ordinary layers) and cases made with the raw
header writer below (odd layers that tarfile refuses or cannot express).
"""
import hashlib
import io
import os
import sys
import tarfile

T0 = 1700000000
CASES = {}


def case(fn):
    CASES[fn.__name__.replace("_", "-")] = fn
    return fn


def prng(n, seed=b"golden"):
    out = bytearray()
    i = 0
    while len(out) < n:
        out += hashlib.sha256(seed + i.to_bytes(8, "big")).digest()
        i += 1
    return bytes(out[:n])


# ---------------------------------------------------------------- tarfile style
class T:
    def __init__(self, fmt=tarfile.GNU_FORMAT):
        self.b = io.BytesIO()
        self.t = tarfile.open(fileobj=self.b, mode="w", format=fmt)

    def add(self, name, typ=tarfile.REGTYPE, data=b"", mode=None, uid=0, gid=0, mtime=T0,
            link="", dev=(0, 0), pax=None):
        i = tarfile.TarInfo(name)
        i.type = typ
        i.mode = mode if mode is not None else (0o755 if typ == tarfile.DIRTYPE else 0o644)
        i.uid, i.gid, i.mtime, i.linkname = uid, gid, mtime, link
        i.devmajor, i.devminor = dev
        i.pax_headers = pax or {}
        if typ == tarfile.REGTYPE:
            i.size = len(data)
            self.t.addfile(i, io.BytesIO(data))
        else:
            self.t.addfile(i)

    def d(self, name, **k):
        self.add(name, tarfile.DIRTYPE, **k)

    def f(self, name, data=b"", **k):
        self.add(name, tarfile.REGTYPE, data, **k)

    def s(self, name, link, **k):
        self.add(name, tarfile.SYMTYPE, link=link, mode=k.pop("mode", 0o777), **k)

    def h(self, name, link, **k):
        self.add(name, tarfile.LNKTYPE, link=link, **k)

    def done(self):
        self.t.close()
        return self.b.getvalue()


# ---------------------------------------------------------------- raw style
USTAR, GNU, V7 = (b"ustar\0", b"00"), (b"ustar ", b" \0"), (b"\0" * 6, b"\0" * 2)


def octal(v, n):
    return b"%0*o\0" % (n - 1, v)


def b256(v, n):
    m = v & ((1 << (8 * n)) - 1)
    r = bytearray(m.to_bytes(n, "big"))
    r[0] |= 0x80
    return bytes(r)


def hdr(name, typ=b"0", size=0, mode=0o644, uid=0, gid=0, mtime=T0, link=b"", magic=USTAR,
        prefix=b"", dev=(0, 0), raw=None):
    f = {
        "name": name[:100].ljust(100, b"\0"), "mode": octal(mode, 8), "uid": octal(uid, 8),
        "gid": octal(gid, 8), "size": octal(size, 12), "mtime": octal(mtime, 12),
        "link": link[:100].ljust(100, b"\0"), "dmaj": octal(dev[0], 8), "dmin": octal(dev[1], 8),
        "prefix": prefix[:155].ljust(155, b"\0"), "tail": b"\0" * 12,
    }
    if magic == V7:
        f["dmaj"] = f["dmin"] = b"\0" * 8
    f.update(raw or {})
    b = (f["name"] + f["mode"] + f["uid"] + f["gid"] + f["size"] + f["mtime"] + b" " * 8 + typ
         + f["link"] + magic[0] + magic[1] + b"\0" * 64 + f["dmaj"] + f["dmin"] + f["prefix"]
         + f["tail"])
    assert len(b) == 512, len(b)
    s = sum(b)
    return b[:148] + b"%06o\0 " % s + b[156:]


def pad(b):
    return b + b"\0" * (-len(b) % 512)


def F(name, data=b"", **k):
    return hdr(name, b"0", len(data), **k) + pad(data)


def D(name, **k):
    k.setdefault("mode", 0o755)
    return hdr(name, b"5", **k)


def S(name, link, **k):
    k.setdefault("mode", 0o777)
    return hdr(name, b"2", link=link, **k)


def H(name, link, **k):
    return hdr(name, b"1", link=link, **k)


def PX(*recs, typ=b"x"):
    body = b""
    for k, v in recs:
        n = len(k) + len(v) + 3
        while len(str(n)) + len(k) + len(v) + 3 != n:
            n = len(str(n)) + len(k) + len(v) + 3
        body += str(n).encode() + b" " + k + b"=" + v + b"\n"
    return hdr(b"PaxHeaders/x", typ, len(body)) + pad(body)


def LL(value, typ=b"L"):
    value += b"\0"
    return hdr(b"././@LongLink", typ, len(value), magic=GNU, mtime=0) + pad(value)


EOA = b"\0" * 1024


# ================================================================ ordinary layers
@case
def plain():
    t = T()
    t.f("hello.txt", b"hello world\n")
    t.f("empty", b"")
    t.f("run.sh", b"#!/bin/sh\necho hi\n", mode=0o755, uid=1000, gid=1001, mtime=T0 + 5)
    return t.done()


@case
def nested():
    t = T()
    t.d("etc/", mtime=T0 + 1)
    t.d("etc/conf.d/", mode=0o700, uid=5, gid=6)
    t.f("etc/conf.d/a.conf", b"a=1\n")
    t.f("etc/conf.d/b.conf", b"b=2\n")
    t.d("usr/")
    t.d("usr/share/")
    t.d("usr/share/doc/")
    t.f("usr/share/doc/README", prng(700))
    t.f("zz", b"zz")
    t.f("aa", b"aa")
    return t.done()


@case
def dot_slash():
    t = T()
    t.d("./", mode=0o755, mtime=T0 + 9, uid=7, gid=8)
    t.d("./bin/")
    t.f("./bin/tool", b"x" * 513, mode=0o755)
    t.f(".//bin/./other", b"y")
    return t.done()


@case
def missing_parents():
    t = T()
    t.f("opt/app/lib/libx.so", b"lib")
    t.f("opt/app/bin/x", b"bin", mode=0o755)
    t.d("var/lib/empty/")
    return t.done()


@case
def hardlinks():
    t = T()
    t.d("d/")
    t.f("d/orig", b"shared data\n", mode=0o640, uid=3)
    t.h("d/link1", "d/orig")
    t.h("top", "./d/orig")
    t.h("d/chain", "d/link1")
    return t.done()


@case
def symlinks():
    t = T()
    t.d("bin/")
    t.f("bin/busybox", b"bb")
    t.s("bin/sh", "busybox")
    t.s("abs", "/bin/sh")
    t.s("dangling", "nowhere/at/all", uid=1, gid=2, mtime=T0 + 3)
    t.s("hundred", "h" * 100)
    return t.done()


@case
def gnu_long():
    t = T(tarfile.GNU_FORMAT)
    ln = "d" * 60 + "/" + "e" * 60 + "/" + "f" * 90
    t.d("d" * 60 + "/")
    t.d("d" * 60 + "/" + "e" * 60 + "/")
    t.f(ln, b"long named")
    t.s("short-to-long", ln)
    t.h("hard-to-long", ln)
    t.s(("d" * 60 + "/" + "e" * 60 + "/") + "g" * 40, "t" * 150)
    return t.done()


@case
def pax_long():
    t = T(tarfile.PAX_FORMAT)
    ln = "p" * 60 + "/" + "q" * 60 + "/" + "r" * 180
    t.d("p" * 60 + "/")
    t.d("p" * 60 + "/" + "q" * 60 + "/")
    t.f(ln, b"pax long named")
    t.s("s-to-long", ln)
    t.h("h-to-long", ln)
    t.f("uni-\u00e9\u4e16", b"utf8 name")
    return t.done()


@case
def ustar_prefix():
    t = T(tarfile.USTAR_FORMAT)
    p = "a" * 70 + "/" + "b" * 60
    t.d("a" * 70 + "/")
    t.d(p + "/")
    t.f(p + "/file", b"prefix")
    t.f("back\\slash", b"bs")
    return t.done()


@case
def xattrs():
    t = T(tarfile.PAX_FORMAT)
    t.d("d/", pax={"SCHILY.xattr.user.dir": "dv"})
    t.f("d/cap", b"cap", pax={"SCHILY.xattr.user.k": "value", "SCHILY.xattr.trusted.overlay.x": "y"})
    t.f("d/nl", b"nl", pax={"SCHILY.xattr.user.nl": "two\nlines", "path": "d/nl-renamed"})
    t.f("d/plain", b"plain")
    return t.done()


@case
def devices():
    t = T()
    t.d("dev/")
    t.add("dev/null", tarfile.CHRTYPE, dev=(1, 3), mode=0o666)
    t.add("dev/loop300", tarfile.BLKTYPE, dev=(7, 300), mode=0o660, gid=6)
    t.add("dev/fifo", tarfile.FIFOTYPE, mode=0o600)
    t.add("dev/zero", tarfile.CHRTYPE, dev=(0, 0), mode=0o600)
    return t.done()


@case
def whiteouts():
    t = T()
    t.d("etc/")
    t.f("etc/.wh.gone", b"")
    t.f("etc/kept", b"kept")
    t.f(".wh.topgone", b"")
    t.d("usr/", mtime=T0 + 1)
    t.f("usr/x", b"x", mode=0o755, uid=9)
    t.f("usr/.wh.x", b"")
    t.f("nodir/sub/.wh.y", b"")
    return t.done()


@case
def opaque():
    t = T()
    t.d("a/")
    t.f("a/.wh..wh..opq", b"")
    t.f("a/new", b"new")
    t.f("b/.wh..wh..opq", b"")
    t.d("b/")
    t.f("b/after", b"after")
    t.f(".wh..wh..opq", b"")
    t.f(".wh..wh.plnk", b"")
    return t.done()


@case
def duplicates():
    t = T()
    t.f("f", b"first")
    t.f("f", b"second version", mode=0o600, mtime=T0 + 1)
    t.f("to-dir", b"file")
    t.d("to-dir/")
    t.f("to-dir/x", b"x")
    t.d("dir/")
    t.f("dir/lost", b"lost by the second entry of dir")
    t.d("dir/", mode=0o711)
    t.f("dir/kept", b"kept")
    t.s("l", "f")
    t.f("l", b"was a link")
    return t.done()


@case
def empty_layer():
    return T().done()


@case
def big5m():
    t = T()
    t.f("big.bin", prng(5 * 1024 * 1024))
    t.f("after", b"z")
    return t.done()


@case
def sizes():
    t = T()
    for n in (0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 12288, 65536, 65537):
        t.f("s%05d" % n, prng(n, b"s%d" % n))
    return t.done()


@case
def many3000():
    t = T()
    t.d("d/")
    for i in range(3000):
        t.f("d/file-%04d" % ((i * 7919) % 3000), b"%d\n" % i, mtime=T0 + i)
    return t.done()


@case
def deep():
    t = T()
    p = ""
    for i in range(60):
        p += "l%02d/" % i
        t.d(p)
    t.f(p + "leaf", b"leaf")
    return t.done()


@case
def sort_order():
    t = T()
    for n in ("b", "a", "B", "_", "a.b", "a-b", "a b", "\u00e9", "~", "ab", "0", "a/"):
        t.d("x" + n) if n == "a/" else t.f("x" + n, n.encode())
    return t.done()


@case
def modes():
    t = T()
    t.f("suid", b"s", mode=0o4755)
    t.f("sgid", b"s", mode=0o2755)
    t.d("sticky/", mode=0o1777)
    t.f("none", b"", mode=0)
    t.f("typed", b"", mode=0o100644)
    return t.done()


@case
def level_128():
    """Exactly 128 data blocks of 4096 with the index: one full tree block."""
    # index of one file in the root: 8192 bytes when the tar is 126 * 4096 long
    body = F(b"f", prng(126 * 4096 - 512 - 1024)) + EOA
    return body


@case
def level_129():
    return F(b"f", prng(127 * 4096 - 512 - 1024)) + EOA


# ================================================================ odd layers
@case
def odd_mtimes():
    return (F(b"y2106", b"a", mtime=0o40000000000 - 1) + F(b"neg", b"b", raw={"mtime": b256(-5, 12)})
            + F(b"far", b"c", raw={"mtime": b256(0x1234567890, 12)})
            + PX((b"mtime", b"1700000001.987654321")) + F(b"pax", b"d")
            + F(b"blank", b"e", raw={"mtime": b"\0" * 12})
            + F(b"spaces", b"f", raw={"mtime": b"  1234567  \0"}) + EOA)


@case
def odd_ids():
    return (F(b"b256", b"a", magic=GNU, raw={"uid": b256(3000000000, 8), "gid": b256(2 ** 33 + 5, 8)})
            + F(b"neg", b"a", magic=GNU, raw={"uid": b256(-2, 8)})
            + PX((b"uid", b"4000000000"), (b"gid", b"77")) + F(b"pax", b"b", uid=1, gid=2)
            + F(b"blank", b"c", raw={"uid": b"\0" * 8, "gid": b" " * 8}) + EOA)


@case
def odd_modes():
    """mode fields: unparsable ones are skipped silently"""
    return (F(b"ok", b"1") + F(b"bad", b"2", raw={"mode": b"9999999\0"})
            + F(b"blank", b"3", raw={"mode": b"\0" * 8}) + F(b"b256", b"4", raw={"mode": b256(0o644, 8)})
            + F(b"space", b"5", raw={"mode": b"   644 \0"}) + F(b"last", b"6") + EOA)


@case
def paths():
    return (F(b"/abs/file", b"1") + F(b"a/../b", b"2") + F(b"../escape", b"3") + F(b"a/../../c", b"4")
            + F(b"a//./d/", b"5") + D(b"dir") + F(b"dir/..", b"root becomes this?") + EOA)


@case
def root_late():
    return F(b"early", b"lost") + D(b"./", mode=0o700) + F(b"late", b"kept") + EOA


@case
def no_eoa():
    return F(b"a", b"1") + F(b"b", prng(600))


@case
def one_zero_block():
    return F(b"a", b"1") + b"\0" * 512


@case
def zero_then_more():
    return F(b"a", b"1") + b"\0" * 512 + F(b"hidden", b"2") + EOA


@case
def trailing_junk():
    return F(b"a", b"1") + EOA + prng(777)


@case
def zero_bytes():
    return b""


@case
def short_header():
    return F(b"a", b"1") + F(b"b", b"2")[:300]


@case
def short_data():
    return F(b"a", b"1") + hdr(b"b", b"0", 5000) + prng(1000)


@case
def unpadded_last():
    return F(b"a", b"1") + hdr(b"b", b"0", 10) + b"0123456789"


@case
def bad_checksum():
    b = bytearray(F(b"a", b"1") + F(b"b", b"2") + EOA)
    b[1024 + 150] ^= 1
    return bytes(b)


@case
def special_links_in_order():
    """long link texts whose archive order equals the breadth-first order"""
    return (PX((b"linkpath", b"A" * 120)) + S(b"a", b"A" * 100) + PX((b"linkpath", b"B" * 130))
            + S(b"b", b"B" * 100) + F(b"z", b"z") + EOA)


@case
def special_links_out_of_order():
    return (D(b"d") + PX((b"linkpath", b"X" * 120)) + S(b"d/deep", b"X" * 100)
            + PX((b"linkpath", b"Y" * 130)) + S(b"b", b"Y" * 100)
            + PX((b"linkpath", b"Z" * 140)) + S(b"a", b"Z" * 100) + EOA)


@case
def special_link_overwritten():
    """the text of an overwritten link stays in the file, names move"""
    return (PX((b"linkpath", b"A" * 120)) + S(b"a", b"A" * 100) + F(b"a", b"file now")
            + PX((b"linkpath", b"B" * 110)) + S(b"b", b"B" * 100) + F(b"c", b"c") + EOA)


@case
def special_link_same_text():
    """pax linkpath equal to the header field: not special"""
    return PX((b"linkpath", b"target")) + S(b"l", b"target") + EOA


@case
def special_link_no_header_text():
    return LL(b"some/target", b"K") + S(b"l", b"", magic=GNU) + S(b"nolink", b"") + EOA


@case
def hardlink_odd():
    return (F(b"f", b"data") + S(b"sl", b"f") + H(b"to-missing", b"no/such/file") + H(b"to-symlink", b"sl")
            + H(b"to-dir", b"d") + D(b"d") + H(b"to-dir2", b"d") + H(b"bad", b"../f") + H(b"../bad2", b"f")
            + H(b"new/parent/h", b"f") + H(b".wh.lit", b"f") + EOA)


@case
def hardlink_shared_change():
    """an overwrite or whiteout through one name changes every name"""
    return (F(b"a", b"old", mode=0o600) + H(b"b", b"a") + F(b"a", b"newer", mode=0o644)
            + F(b"c", b"ccc") + H(b"d", b"c") + F(b".wh.c") + F(b"e", b"e") + H(b"e2", b"e")
            + D(b"e") + F(b"e/in", b"in") + EOA)


@case
def file_as_parent():
    return F(b"f", b"data") + F(b"f/child", b"child") + S(b"l", b"f") + F(b"l/child", b"c2") + EOA


@case
def pax_odd():
    return (PX((b"path", b"first"), (b"path", b"second")) + F(b"hdr", b"1")
            + PX((b"size", b"5")) + hdr(b"paxsize", b"0", 0) + pad(b"12345")
            + PX((b"size", b"3")) + F(b"hdrsize-wins", b"1234567")
            + PX((b"comment", b"x\n\ny"), (b"path", b"hidden-by-blank-line")) + F(b"blankline", b"2")
            + PX((b"path", b"global-path"), typ=b"g") + F(b"afterg", b"3")
            + PX((b"path", b"lost-to-g")) + PX((b"comment", b"c"), typ=b"g") + F(b"afterxg", b"4")
            + LL(b"from-L") + PX((b"path", b"from-x")) + F(b"both", b"5", magic=GNU) + EOA)


@case
def pax_twice():
    return PX((b"path", b"one")) + PX((b"path", b"two")) + F(b"x", b"1") + EOA


@case
def pax_at_end():
    return F(b"x", b"1") + PX((b"path", b"one")) + EOA


@case
def long_name_v7():
    """an L entry with no magic is not recognised"""
    v = b"longlonglong\0"
    return hdr(b"././@LongLink", b"L", len(v), magic=V7) + pad(v) + F(b"short", b"1", magic=V7) + EOA


@case
def types_odd():
    return (hdr(b"contig", b"7", 3) + pad(b"abc") + hdr(b"nultype", b"\0", 3) + pad(b"abc")
            + hdr(b"slash/", b"0", 3) + pad(b"abc") + hdr(b"unknown", b"Z", 3) + pad(b"abc")
            + hdr(b"dirdata", b"5", 3) + pad(b"abc") + hdr(b"volume", b"V") + F(b"end", b"e") + EOA)


@case
def v7_all():
    return (D(b"d", magic=V7) + F(b"d/f", b"1", magic=V7) + hdr(b"c", b"3", magic=V7, dev=(1, 3))
            + S(b"l", b"d/f", magic=V7) + EOA)


@case
def gnu_sparse():
    # real size 8192: hole 4096, data 512 at 4096, hole to 8192
    tail = bytearray(167)
    sp = octal(4096, 12) + octal(512, 12) + octal(8192, 12) + octal(0, 12)
    # bytes 345.. : atime ctime offset longnames unused sparse[4] isextended realsize
    body = b"\0" * 41 + sp + b"\0" * (24 * 2) + b"\0" + octal(8192, 12) + b"\0" * 17
    assert len(body) == 167
    return (hdr(b"sparse", b"S", 512, magic=GNU, raw={"prefix": body[:155], "tail": body[155:]})
            + prng(512) + F(b"after", b"a") + EOA)


@case
def pax_sparse_1_0():
    m = pad(b"1\n4096\n512\n")
    return (PX((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"sparse"),
               (b"GNU.sparse.realsize", b"8192")) + hdr(b"GNUSparseFile.0/sparse", b"0", 1024) + m
            + prng(512) + F(b"after", b"a") + EOA)


@case
def dev_big():
    return (hdr(b"c", b"3", dev=(0o7777777, 0o7777777)) + hdr(b"blankdev", b"3", raw={"dmaj": b"\0" * 8})
            + hdr(b"b256dev", b"4", magic=GNU, raw={"dmaj": b256(300, 8), "dmin": b256(70000, 8)}) + EOA)


@case
def wh_shapes():
    return (D(b"d") + F(b"d/x", b"x") + F(b".wh.d") + F(b"d/again", b"y")
            + F(b".wh.", b"") + D(b".wh.asdir") + PX((b"linkpath", b"Q" * 120)) + S(b".wh.aslink", b"q")
            + F(b"o/.wh..wh..opq") + F(b"o/.wh..wh..opq/x", b"1") + EOA)


# ================================================================ rules of the tar-index format, one or few a case
@case
def ti_whiteout_and_name():
    """A whiteout and its name in one layer, both orders; a directory also becomes opaque."""
    return (F(b"a/.wh.f") + F(b"a/f", b"new") + F(b"a/g", b"new") + F(b"a/.wh.g")
            + F(b"a/.wh.d") + D(b"a/d") + F(b"a/d/x", b"1") + D(b"a/e") + F(b"a/e/x", b"1") + F(b"a/.wh.e") + EOA)


@case
def ti_whiteout_synthesised():
    """The name whited out exists only as an invented parent; opaque markers on invented parents and the root."""
    return F(b"p/q/r", b"1") + F(b"p/.wh.q") + F(b"s/.wh..wh..opq") + F(b"s/t/u", b"2") + F(b".wh..wh..opq") + EOA


@case
def ti_whiteout_types():
    """Whiteouts of any member type; other aufs names; a marker as a middle component."""
    return (D(b"d") + D(b"d/.wh.dir") + S(b"d/.wh.sym", b"t") + F(b"d/.wh.reg", b"data that is skipped")
            + F(b"d/.wh..wh.plnk", b"x") + F(b"d/.wh.foo/bar", b"real") + EOA)


@case
def ti_markers_follow_the_node():
    """A directory that is replaced loses the markers that it had."""
    return (D(b"d") + F(b"d/.wh.x") + F(b"d/.wh..wh..opq") + F(b"d", b"file now") + D(b"d", mode=0o711) + F(b"d/y", b"1") + EOA)


@case
def ti_dir_over_dir():
    """Attributes replaced, children kept, xattrs joined."""
    return (PX((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.b", b"1")) + D(b"d", mode=0o700, uid=1)
            + F(b"d/x", b"1") + PX((b"SCHILY.xattr.user.b", b"2"), (b"SCHILY.xattr.user.c", b"2")) + D(b"d", mode=0o755, uid=2, mtime=T0 + 7)
            + EOA)


@case
def ti_hardlink_header():
    """The link's own header changes the shared inode; a file capability goes unless the link carries one."""
    cap = b"\x01\x00\x00\x02\x00\x04\x00\x00" + b"\0" * 12
    return (PX((b"SCHILY.xattr.security.capability", cap), (b"SCHILY.xattr.user.a", b"1")) + F(b"f", b"data", mode=0o755)
            + hdr(b"g", b"1", link=b"f", mode=0o640, uid=9, gid=8, mtime=T0 + 3)
            + PX((b"SCHILY.xattr.security.capability", cap)) + F(b"h", b"data2", mode=0o755)
            + PX((b"SCHILY.xattr.security.capability", cap), (b"SCHILY.xattr.user.z", b"2")) + hdr(b"i", b"1", link=b"h", mode=0o700)
            + S(b"s", b"f") + H(b"s2", b"s") + EOA)


@case
def ti_hardlink_over():
    """Links over existing names: over a file, and a partner that lives on."""
    return F(b"a", b"1") + F(b"b", b"2") + H(b"c", b"b") + H(b"b", b"a") + F(b"a", b"3") + EOA


@case
def ti_hardlink_replaces_its_target():
    """Refused: the directory that the link replaces holds the target."""
    return D(b"d") + F(b"d/x", b"1") + H(b"d", b"d/x") + EOA


@case
def ti_hardlink_later():
    return H(b"b", b"a") + F(b"a", b"1") + EOA


@case
def ti_hardlink_with_size():
    """Refused as containerd refuses it: the size of a link is not followed, so what comes next is no header."""
    return F(b"a", b"1") + hdr(b"b", b"1", link=b"a", size=600) + pad(b"z" * 600) + EOA


@case
def ti_xattr_order():
    """Order by name index, then by name bytes; empty value; several namespaces; user.* on a symlink is dropped."""
    recs = [(b"SCHILY.xattr." + k, v) for k, v in (
        (b"user.zz", b"1"), (b"security.selinux", b"system_u:object_r:bin_t:s0\0"), (b"trusted.b", b"2"), (b"user.a", b""),
        (b"user.aa", b"3"), (b"trusted.overlay.opaque", b"y"), (b"trusted.overlay.redirect", b"/x"), (b"nonsense.x", b"4"))]
    return PX(*recs) + F(b"f", b"1") + PX(*recs) + D(b"d") + PX(*recs) + S(b"l", b"f") + EOA


@case
def ti_libarchive_xattr():
    return PX((b"LIBARCHIVE.xattr.user.a", b"AAAA"), (b"SCHILY.xattr.user.b", b"1")) + F(b"f", b"1") + EOA


@case
def ti_times():
    """Negative, fractional, truncated and far times."""
    return (PX((b"mtime", b"-1.5")) + F(b"neg", b"") + PX((b"mtime", b"1700000000.1234567899")) + F(b"long", b"")
            + PX((b"mtime", b"9223372036.854775807")) + F(b"last", b"") + PX((b"mtime", b"9223372036.854775808")) + F(b"past", b"")
            + hdr(b"b256neg", b"0", raw={"mtime": b256(-5, 12)}) + hdr(b"b256far", b"0", raw={"mtime": b256(1 << 40, 12)})
            + PX((b"mtime", b"")) + F(b"blank", b"") + PX((b"mtime", b"7.")) + F(b"dot", b"") + EOA)


@case
def ti_global_pax():
    """A global header changes nothing, and drops what was pending."""
    return (PX((b"path", b"global"), (b"uid", b"77"), (b"SCHILY.xattr.user.g", b"1"), typ=b"g") + F(b"f", b"1")
            + PX((b"path", b"lost")) + PX((b"comment", b"c"), typ=b"g") + F(b"kept", b"2") + EOA)


@case
def ti_name_precedence():
    """GNU long names win over pax, in either order; a second x replaces the first; an empty path keeps the header's."""
    return (PX((b"path", b"from-pax")) + LL(b"from-gnu") + F(b"hdr1", b"1") + LL(b"from-gnu-2") + PX((b"path", b"from-pax-2")) + F(b"hdr2", b"2")
            + PX((b"path", b"first"), (b"uid", b"5")) + PX((b"gid", b"6")) + F(b"hdr3", b"3") + PX((b"path", b"")) + F(b"hdr4", b"4")
            + PX((b"path", b"one"), (b"path", b"two")) + F(b"hdr5", b"5") + EOA)


@case
def ti_types():
    """NUL with and without a trailing slash; 0 with one is a file; sizes of directories and devices are not followed."""
    return (hdr(b"nul", b"\0", 3) + pad(b"abc") + hdr(b"nuldir/", b"\0", mode=0o755) + hdr(b"zero/", b"0", 3) + pad(b"abc")
            + hdr(b"dir", b"5", 512, mode=0o755) + hdr(b"fifo", b"6", 512) + EOA)


@case
def ti_root_entries():
    """Entries for the root change nothing, whatever they are."""
    return D(b"./", mode=0o700, uid=3) + F(b"/", b"abc") + hdr(b".", b"2", link=b"x") + F(b"f", b"1") + EOA


@case
def ti_numbers():
    """Signed checksum, blanks and NULs around octal, the base-256 sign."""
    h = bytearray(hdr(b"signed-\xff", b"0", raw={"mode": b" 644\0  \0", "uid": b"\0\0\0\0\0\0\0\0"}))
    h[148:156] = b" " * 8
    s = sum(c - 256 if c > 127 else c for c in h)
    h[148:156] = b"%06o\0 " % s
    return bytes(h) + hdr(b"big", b"0", magic=GNU, raw={"uid": b256(4294967294, 8), "gid": b256(2147483648, 8)}) + EOA


@case
def ti_id_negative():
    return hdr(b"f", b"0", raw={"uid": b256(-2, 8)}) + EOA


@case
def ti_star_prefix():
    """A star header (trailer tar) has a prefix of 131 bytes only."""
    h = bytearray(hdr(b"name", b"0", prefix=b"p" * 131 + b"0" * 24))
    h[508:512] = b"tar\0"
    h[148:156] = b" " * 8
    h[148:156] = b"%06o\0 " % sum(h)
    return bytes(h) + EOA


@case
def ti_symlink_parents():
    """Parents that are symlinks of the layer: relative, absolute, above the root, to nothing; links and whiteouts through them."""
    return (D(b"usr") + D(b"usr/lib") + S(b"lib", b"usr/lib") + F(b"lib/a", b"a" * 700) + S(b"abs", b"/usr") + F(b"abs/lib/b", b"b" * 5000)
            + H(b"lib/c", b"abs/lib/a") + S(b"up", b"../../usr/./lib") + F(b"up/d", b"d") + S(b"nowhere", b"new/place") + F(b"nowhere/e", b"e")
            + F(b"lib/.wh.gone") + F(b"nowhere/.wh..wh..opq") + EOA)


@case
def ti_symlink_loop():
    return S(b"a", b"b") + S(b"b", b"a") + F(b"a/x", b"1") + EOA


@case
def ti_last_padding_missing():
    return F(b"a", b"1") + hdr(b"b", b"0", 5) + b"12345"


@case
def ti_dangling_extended_header():
    """An extended header that no member follows is nothing."""
    return F(b"a", b"1") + PX((b"path", b"x"))


@case
def ti_one_zero_block_at_the_end():
    return F(b"a", b"1") + b"\0" * 512


@case
def ti_pax_record_without_newline():
    body = b"12 path=aaaa"
    return hdr(b"p", b"x", len(body)) + pad(body) + F(b"f", b"1") + EOA


@case
def ti_names():
    """Bytes that are no UTF-8, 255 bytes, names around '.' in order, spaces, newlines."""
    return b"".join(F(n, b"%d" % i) for i, n in enumerate((b"\xff\xfe", b"n" * 100, b"!x", b"-x", b"...", b".a", b"a b", b"a\nb", b"~")))\
        + PX((b"path", b"N" * 255)) + F(b"short", b"z") + EOA


@case
def ti_inline_limits():
    """Symlinks and directories around the size where their bytes no longer fit beside the inode."""
    out = b"".join(PX((b"linkpath", b"t" * n)) + S(b"s%04d" % n, b"x") for n in (1, 447, 448, 449, 511, 512, 513, 1024, 4095))
    for n in (16, 17, 18, 19, 20, 40):
        out += D(b"d%02d" % n) + b"".join(F(b"d%02d/%010d" % (n, i)) for i in range(n))
    return out + EOA


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    for name, fn in CASES.items():
        with open(os.path.join(out, name + ".tar"), "wb") as f:
            f.write(fn())


if __name__ == "__main__":
    main()
