#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make small OCI images for tests, with the file tree each must unpack to.

    mkimage.py build OUTDIR [NAME ...]     write NAME.tar and NAME.json
    mkimage.py check NAME.json ROOTFS      compare a mounted root file system
    mkimage.py list

NAME.tar is an OCI image layout that `ctr image import` takes; the image in it
is called localhost/tardev-test/NAME:latest.  NAME.json tells digests, diff IDs,
chain IDs and, under "tree", every path of the merged root file system.  The tree
comes from a model of the layer rules in this file, not from unpacking anything.

Nothing but the Python standard library and a static busybox is needed.  The
same busybox gives the same diff IDs everywhere; the digests of gzip layers may
differ between zlib builds.  Paths that are not UTF-8 are written in JSON with
surrogate escapes, as os.fsdecode gives them.
"""

import argparse
import hashlib
import json
import os
import shutil
import stat
import struct
import sys
import zlib

EPOCH = 1700000000
BLOCK = 512


# --- tar -------------------------------------------------------------------

class Entry:
    """One member of a layer. Paths are bytes, relative, without './'."""

    def __init__(self, kind, path, *, mode=0o644, uid=0, gid=0, mtime=(EPOCH, 0),
                 data=b"", link=b"", rdev=(0, 0), xattrs=None, style="pax", name=None):
        self.kind = kind            # file dir symlink hardlink char block fifo
        self.path = raw(path)
        self.mode, self.uid, self.gid, self.mtime = mode, uid, gid, mtime
        self.data, self.link, self.rdev = data, raw(link), rdev
        self.xattrs = {k: raw(v) for k, v in (xattrs or {}).items()}
        self.style = style          # pax, gnu or v7: how the header is written
        self.name = raw(name) if name is not None else self.path + (b"/" if kind == "dir" else b"")


def raw(text):
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


TYPEFLAG = {"file": b"0", "hardlink": b"1", "symlink": b"2", "char": b"3",
            "block": b"4", "dir": b"5", "fifo": b"6"}


def number(value, width):
    """An octal field, or GNU base-256 where octal has no room."""
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def header(name, mode, uid, gid, size, mtime, flag, link=b"", rdev=(0, 0), magic=b"ustar\x0000"):
    block = bytearray(struct.pack(
        "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x",
        name[:100], number(mode, 8), number(uid, 8), number(gid, 8), number(size, 12),
        number(mtime, 12), b" " * 8, flag, link[:100], magic, b"", b"",
        number(rdev[0], 8) if magic else b"", number(rdev[1], 8) if magic else b"", b""))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def pax_records(pairs):
    out = b""
    for key, value in pairs:
        body = b" %s=%s\n" % (key, value)
        size = len(body) + 1
        while len(b"%d" % size) + len(body) != size:
            size += 1
        out += b"%d%s" % (size, body)
    return out


def pax_header(pairs, flag=b"x"):
    body = pax_records(pairs)
    # Some unpackers make the directory of a global header's name: give it none.
    name = b"pax_global_header" if flag == b"g" else b"PaxHeaders/0"
    return header(name, 0o644, 0, 0, len(body), EPOCH, flag) + padded(body)


def member(e):
    """The bytes of one entry: extra headers, header, content."""
    flag, name, link = TYPEFLAG[e.kind], e.name, e.link
    size = len(e.data) if e.kind == "file" else 0
    seconds, nanos = e.mtime
    uid, gid = e.uid, e.gid
    front, magic = b"", b"ustar\x0000"
    if e.style == "v7":
        flag, magic = (b"\0" if e.kind == "file" else flag), b""
        assert len(name) <= 100 and not e.xattrs and not nanos
    elif e.style == "gnu":
        magic = b"ustar  \0"
        assert not e.xattrs and not nanos
        for text, kind in ((name, b"L"), (link, b"K")):
            if len(text) > 100:
                front += header(b"././@LongLink", 0, 0, 0, len(text) + 1, 0, kind, magic=magic)
                front += padded(text + b"\0")
    else:
        pairs = []
        if len(name) > 100 or not name.isascii() and valid_utf8(name):
            pairs.append((b"path", name))
        if len(link) > 100 or not link.isascii():
            pairs.append((b"linkpath", link))
        if uid >= 8 ** 7:
            pairs.append((b"uid", b"%d" % uid))
            uid = 0
        if gid >= 8 ** 7:
            pairs.append((b"gid", b"%d" % gid))
            gid = 0
        if nanos:
            pairs.append((b"mtime", b"%d.%09d" % (seconds, nanos)))
        pairs += sorted((b"SCHILY.xattr." + raw(k), v) for k, v in e.xattrs.items())
        if pairs:
            front = pax_header(pairs)
    return front + header(name, e.mode, uid, gid, size, seconds, flag, link, e.rdev, magic) + (
        padded(e.data) if size else b"")


def valid_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def layer_tar(entries, *, global_header=False):
    out = pax_header([(b"comment", b"made by mkimage")], b"g") if global_header else b""
    out += b"".join(member(e) for e in entries)
    return out + bytes(2 * BLOCK)


# --- compression -------------------------------------------------------------

def gzipped(data, members=1):
    step = -(-len(data) // members) or 1
    out = b""
    for at in range(0, max(len(data), 1), step):
        c = zlib.compressobj(6, zlib.DEFLATED, 31)
        out += c.compress(data[at:at + step]) + c.flush()
    return out


def zstd_stored(data, frames=1):
    """A valid zstd stream without a compressor: raw blocks, and run-length blocks
    where a whole block is one byte. With several frames, a skippable one sits
    between them, as in zstd:chunked layers."""
    step = -(-len(data) // frames) or 1
    out = []
    for at in range(0, max(len(data), 1), step):
        part = data[at:at + step]
        if at:
            out.append(struct.pack("<II", 0x184D2A50, 4) + b"skip")
        # single segment, 8-byte content size, no checksum, no dictionary
        out.append(struct.pack("<IBQ", 0xFD2FB528, 0xE0, len(part)))
        chunks = [part[i:i + 65536] for i in range(0, len(part), 65536)] or [b""]
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            run = len(chunk) > 1 and chunk.count(chunk[:1]) == len(chunk)
            out.append((last | run << 1 | len(chunk) << 3).to_bytes(3, "little"))
            out.append(chunk[:1] if run else chunk)
    return b"".join(out)


OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
COMPRESSION = {          # name: (media type, function)
    "gzip": (OCI + "layer.v1.tar+gzip", gzipped),
    "gzip-members": (OCI + "layer.v1.tar+gzip", lambda d: gzipped(d, 3)),
    "zstd": (OCI + "layer.v1.tar+zstd", zstd_stored),
    "zstd-frames": (OCI + "layer.v1.tar+zstd", lambda d: zstd_stored(d, 3)),
    "none": (OCI + "layer.v1.tar", lambda d: d),
    "docker": (DOCKER + "image.rootfs.diff.tar.gzip", gzipped),
}


# --- the rules of layers -------------------------------------------------------

class Node:
    def __init__(self, e=None):
        self.kind = e.kind if e else "dir"
        self.mode = e.mode if e else 0o755
        self.uid, self.gid = (e.uid, e.gid) if e else (0, 0)
        self.mtime = e.mtime if e else None     # None: not to be compared
        self.link = e.link if e else b""
        self.rdev = e.rdev if e else (0, 0)
        self.xattrs = dict(e.xattrs) if e else {}
        self.data = e.data if e else b""


def parents(path):
    parts = path.split(b"/")
    return [b"/".join(parts[:i]) for i in range(1, len(parts))]


def apply_layer(tree, entries):
    """Lay one layer over the tree (path -> Node; hard links share a Node)."""
    here = set()                # what this layer has put down
    explicit, changed = set(), set()

    def remove(path, itself=True):
        for p in [p for p in tree if (itself and p == path) or p.startswith(path + b"/")]:
            if p not in here:
                del tree[p]

    for e in entries:
        if not e.path:
            continue            # the root directory itself is not compared
        changed.update(parents(e.path))
        for p in parents(e.path):
            if p not in tree or tree[p].kind != "dir":
                tree[p] = Node()
                here.add(p)
        head, _, base = e.path.rpartition(b"/")
        if base == b".wh..wh..opq":
            remove(head, itself=False)
        elif base.startswith(b".wh."):
            remove((head + b"/" if head else b"") + base[4:])
        else:
            if e.kind == "hardlink":
                node = tree[e.link]
            else:
                node = Node(e)
            if e.path in tree and not (tree[e.path].kind == node.kind == "dir"):
                for p in [p for p in tree if p == e.path or p.startswith(e.path + b"/")]:
                    del tree[p]
            tree[e.path] = node
            here.add(e.path)
            if e.kind == "dir":
                explicit.add(e.path)
    for p in changed - explicit:
        if p in tree:
            tree[p].mtime = None


def describe(tree):
    names = {}
    for path, node in tree.items():
        names.setdefault(id(node), []).append(path)
    out = {}
    for path in sorted(tree):
        n = tree[path]
        item = {"type": n.kind, "mode": "%04o" % n.mode, "uid": n.uid, "gid": n.gid}
        if n.kind == "symlink":
            item["mode"] = "0777"
            item["linkname"] = os.fsdecode(n.link)
        if n.kind == "file":
            item["size"] = len(n.data)
            item["sha256"] = hashlib.sha256(n.data).hexdigest()
            if len(names[id(n)]) > 1:
                item["links"] = sorted(map(os.fsdecode, names[id(n)]))
        if n.kind in ("char", "block"):
            item["rdev"] = list(n.rdev)
        if n.xattrs:
            item["xattrs"] = {k: v.hex() for k, v in sorted(n.xattrs.items())}
        if n.mtime:
            item["mtime"] = "%d.%09d" % n.mtime
        out[os.fsdecode(path)] = item
    return out


# --- checking a real tree --------------------------------------------------------

KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink",
         stat.S_IFCHR: "char", stat.S_IFBLK: "block", stat.S_IFIFO: "fifo",
         stat.S_IFSOCK: "socket"}
IGNORED_XATTRS = ("trusted.overlay.", "user.overlay.", "security.selinux")


def scan(root):
    root = os.fsencode(root)
    out, inodes = {}, {}

    def walk(rel):
        for entry in sorted(os.scandir(os.path.join(root, rel)), key=lambda x: x.name):
            path = os.path.join(rel, entry.name)
            full = os.path.join(root, path)
            try:
                st = os.lstat(full)
            except FileNotFoundError:
                # listed but not there: overlayfs does this for a whiteout in a
                # directory that has no lower counterpart
                out[os.fsdecode(path)] = {"type": "ghost"}
                continue
            kind = KINDS[stat.S_IFMT(st.st_mode)]
            item = {"type": kind, "mode": "%04o" % stat.S_IMODE(st.st_mode), "uid": st.st_uid,
                    "gid": st.st_gid,
                    "mtime": "%d.%09d" % divmod(st.st_mtime_ns, 10 ** 9)}
            if kind == "symlink":
                item["linkname"] = os.fsdecode(os.readlink(full))
            if kind == "file":
                item["size"] = st.st_size
                digest = hashlib.sha256()
                with open(full, "rb") as f:
                    while chunk := f.read(1 << 20):
                        digest.update(chunk)
                item["sha256"] = digest.hexdigest()
                inodes.setdefault((st.st_dev, st.st_ino), []).append(os.fsdecode(path))
                item["ino"] = (st.st_dev, st.st_ino)
                item["nlink"] = st.st_nlink
            if kind in ("char", "block"):
                item["rdev"] = [os.major(st.st_rdev), os.minor(st.st_rdev)]
            attrs = {k: os.getxattr(full, k, follow_symlinks=False).hex()
                     for k in os.listxattr(full, follow_symlinks=False)
                     if not k.startswith(IGNORED_XATTRS)}
            if attrs:
                item["xattrs"] = dict(sorted(attrs.items()))
            out[os.fsdecode(path)] = item
            if kind == "dir":
                walk(path)

    walk(b"")
    for item in out.values():
        ino, nlink = item.pop("ino", None), item.pop("nlink", 1)
        if ino and (len(inodes[ino]) > 1 or nlink > 1):
            item["links"] = sorted(inodes[ino])
            if nlink != len(inodes[ino]):
                item["links"].append("(nlink %d)" % nlink)
    return out


def differences(expected, actual):
    """Lines telling where two trees differ. An expected entry without an mtime
    (a directory no layer dates) takes any."""
    lines = []
    for path in sorted(expected.keys() | actual.keys()):
        if path not in actual:
            lines.append("missing: %r" % path)
        elif path not in expected:
            lines.append("unexpected: %r (%s)" % (path, actual[path]["type"]))
        else:
            want, got = expected[path], actual[path]
            for key in sorted(want.keys() | got.keys()):
                if key == "mtime" and key not in want:
                    continue
                if want.get(key) != got.get(key):
                    lines.append("%r: %s is %r, expected %r" % (path, key, got.get(key), want.get(key)))
    return lines


# --- images ------------------------------------------------------------------------

def noise(seed, size):
    """Bytes that do not compress, the same everywhere."""
    out = bytearray()
    n = 0
    while len(out) < size:
        out += hashlib.sha256(b"%s %d" % (raw(seed), n)).digest()
        n += 1
    return bytes(out[:size])


def D(path, mode=0o755, **kw):
    return Entry("dir", path, mode=mode, **kw)


def F(path, data=b"", mode=0o644, **kw):
    return Entry("file", path, data=raw(data), mode=mode, **kw)


def L(path, target, **kw):
    return Entry("symlink", path, link=target, mode=0o777, **kw)


def H(path, target, **kw):
    return Entry("hardlink", path, link=target, **kw)


def W(path):
    head, _, base = raw(path).rpartition(b"/")
    return Entry("file", (head + b"/" if head else b"") + b".wh." + base)


def O(path):
    return Entry("file", raw(path) + b"/.wh..wh..opq")


def base_layer(busybox):
    applets = "cat echo find ls md5sum mount sh sha256sum sleep stat test true".split()
    return [D("", name="./"), D("bin"), F("bin/busybox", busybox, 0o755),
            *[L("bin/" + a, "busybox") for a in applets],
            D("dev"), D("etc"), F("etc/hello", "hello from a tar layer\n"),
            F("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            D("proc"), D("root", 0o700), D("sys"), D("tmp", 0o1777)]


def image_hello(busybox):
    return [base_layer(busybox)]


# VFS_CAP_REVISION_2, effective, cap_net_bind_service
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


def image_layers(busybox):
    long_part = "n" * 255
    deep = "/".join(["deep%02d" % i for i in range(40)])
    return [
        base_layer(busybox),
        # 1: one of everything
        [D("types"), F("types/empty"), F("types/one", "1"),
         *[F("types/size-%d" % n, noise("size", n)) for n in (511, 512, 513, 4095, 4096, 4097, 65536, 300001)],
         F("types/zeros", bytes(200000)),
         L("types/rel", "one"), L("types/abs", "/types/one"), L("types/dangling", "no/such"),
         L("types/up", "../etc/hello"), L("types/longlink", "x/" * 150 + "y"),
         Entry("char", "types/null", mode=0o666, rdev=(1, 3)),
         Entry("char", "types/big-minor", mode=0o600, rdev=(10, 1048575)),
         Entry("block", "types/loop", mode=0o660, gid=6, rdev=(7, 0)),
         Entry("fifo", "types/fifo", mode=0o622),
         F("types/link-a", "three names\n"), H("types/link-b", "types/link-a"),
         D("types/sub"), H("types/sub/link-c", "types/link-a"),
         F("types/suid", "x", 0o4755), F("types/sgid", "x", 0o2755), F("types/none", "x", 0),
         D("types/sticky", 0o1777), D("types/sgid-dir", 0o2775, gid=50),
         F("types/owner", "x", uid=1000, gid=1001), F("types/big-owner", "x", uid=3000000000, gid=2097152),
         F("types/nanos", "x", mtime=(EPOCH, 123456789)), F("types/old", "x", mtime=(1, 0)),
         F("types/future", "x", mtime=(4102444800, 0)), L("types/nanolink", "one", mtime=(EPOCH, 5)),
         D("types/dir-nanos", mtime=(EPOCH, 7))],
        # 2: names and extended attributes
        [D("names"), F("names/\u00e4\u00f6\u00fc", "latin"), F("names/\u65e5\u672c\u8a9e", "cjk"),
         F("names/\U0001f433", "emoji"), F("names/e\u0301", "decomposed"), F("names/\u00e9", "composed"),
         F(b"names/not-utf8-\xe4\xff", "bytes"), F("names/ space ", "s"), F("names/new\nline", "n"),
         F("names/back\\slash", "b"), F("names/-dash", "d"), F("names/colon:comma,equals=", "c"),
         F("names/quote'\"", "q"), F("names/...", "dots"), F("names/wh.not", "not a whiteout"),
         F("names/" + long_part, "255"), D("names/" + "d" * 255), F("names/" + "d" * 255 + "/" + long_part, "512"),
         F("names/" + "u" * 94, "exactly 100"), F("names/" + "v" * 95, "101"),
         D("xattr"), F("xattr/user", "x", xattrs={"user.one": "1", "user.two": "zwei \u00fc"}),
         F("xattr/binary", "x", xattrs={"user.bin": bytes(range(256)), "user.newline": "a\nb=c\n"}),
         F("xattr/empty", "x", xattrs={"user.empty": b""}),
         F("xattr/long", "x", xattrs={"user.long": noise("xattr", 2000)}),
         F("xattr/cap", "x", 0o755, xattrs={"security.capability": CAPABILITY}),
         D("xattr/dir", xattrs={"user.dir": "d"}), F("xattr/gone", "x", xattrs={"user.gone": "x"}),
         F("xattr/linked", "x", xattrs={"user.l": "1"}), H("xattr/linked2", "xattr/linked")],
        # 3: written the GNU and the old way; parents without entries of their own
        [D("gnu", style="gnu"), F("gnu/" + "g" * 200, "long", style="gnu"),
         L("gnu/link", "t/" * 100, style="gnu"), F("gnu/owner", "x", uid=3000000000, style="gnu"),
         F("gnu/v7", "old\n", style="v7"), F("gnu/dot", "with ./\n", name="./gnu/dot", style="gnu"),
         F("gnu/slash", "with /\n", name="/gnu/slash", style="gnu"),
         F(deep + "/leaf", "implied parents\n"),
         D("tree"), *[D("tree/d%d" % i) for i in range(6)],
         *[F("tree/d%d/f%d" % (i, j), "%d %d\n" % (i, j)) for i in range(6) for j in range(4)],
         D("tree/d0/sub"), F("tree/d0/sub/x", "x"), L("tree/tolink", "d1"), L("tree/todir", "d1"),
         F("tree/tofile", "file"), D("tree/dirtofile"), F("tree/dirtofile/x", "x"),
         D("tree/dirtolink", uid=7), F("tree/dirtolink/x", "x"),
         D("tree/attrs", 0o700, uid=5, gid=5, xattrs={"user.keep": "1"}), F("tree/attrs/old", "old")],
        # 4: deletions
        [W("tree/d0"), W("tree/d1/f0"), W("tree/d1/f1"), 
         D("tree/d2"), O("tree/d2"), F("tree/d2/new", "only this\n"),
         D("tree/d3"), F("tree/d3/new", "marker comes last\n"), O("tree/d3"),
         W("xattr/gone"), W("types/link-b"), W("names/\u65e5\u672c\u8a9e"), W("names/" + long_part[:251])],
        # 5: one type over another; attributes only; a directory's content kept
        [D("tree/todir"), F("tree/todir/in", "was a link to d1\n"),
         L("tree/dirtolink", "d5"), F("tree/dirtofile", "was a directory\n"),
         D("tree/tofile"), F("tree/tofile/in", "was a file\n"), F("tree/tolink", "was a link\n"),
         D("tree/attrs", 0o750, uid=6, gid=7, xattrs={"user.new": "2"}),
         D("tree/d4", 0o711, uid=9), F("tree/d4/f0", "0 4\n", 0o600),
         F("xattr/user", "x", xattrs={"user.two": "changed"}), F("xattr/cap", "x", 0o755),
         F("types/link-a", "no longer linked\n"), F("types/suid", "x", 0o755),
         L("types/one", "empty"), F("types/null", "was a device\n"), Entry("fifo", "types/abs", mode=0o644)],
        # 6: deleted things come back; deleted parents get new children
        [D("tree/d0", 0o705), F("tree/d0/back", "again\n"), F("tree/d1/f0", "back\n"),
         W("types/size-512"), W("types/sub"), D("types2"), F("types2/a", "pair\n"), H("types2/b", "types2/a"),
         F("tree/d2/f3", "a lower name again\n"), W("tree/d5/f0"), F("tree/d5/f9", "beside a deletion\n")],
        # 7: the last word, behind a global header; the whole of one name space opaque
        [D("tree/d4"), O("tree/d4"), F("etc/hello", "hello from layer 7\n"),
         F("tree/attrs/newer", "implied parent keeps its attributes\n"), D("gnu"),
         F("last", noise("last", 1 << 20)), H("last2", "last")],
    ]


def image_many(busybox):
    layers = [base_layer(busybox)]
    for i in range(1, 60):
        layer = [D("many"), F("many/f%02d" % i, "layer %d\n" % i), F("many/top", "%d\n" % i),
                 D("many/each"), O("many/each"), F("many/each/only%02d" % i, "%d\n" % i),
                 D("many/d%d" % (i % 7)), F("many/d%d/%02d" % (i % 7, i), noise("many%d" % i, 3000))]
        if i > 5 and i % 3 == 0:
            layer.append(W("many/f%02d" % (i - 5)))
        layers.append(layer)
    return layers


def image_dup(busybox):
    a = [D("dup"), F("dup/a", "from A\n"), F("dup/shared", "A\n"), W("dup/b")]
    b = [D("dup"), F("dup/b", "from B\n"), F("dup/shared", "B\n"), W("dup/a")]
    empty = []
    return [base_layer(busybox), a, a, empty, b, empty, a]


def image_edge(busybox):
    """Layers that the specification leaves open or that unpackers differ on. The
    tree written for it is one reading, not a requirement."""
    return [
        base_layer(busybox),
        [D("e"), D("e/real"), F("e/real/kept", "1"), L("e/sym", "real"), F("e/low", "lower\n"),
         D("e/redo"), F("e/redo/old", "1"), F("e/file", "1"), D("e/both"), F("e/both/old", "1")],
        # whiteout and new directory of the same name in one layer
        [W("e/redo"), D("e/redo"), F("e/redo/new", "2"),
         # whiteout and new file of the same name
         W("e/file"), F("e/file", "2"),
         # the same path twice in one layer: the later wins
         F("e/twice", "first"), F("e/twice", "second"),
         # deletions of what never was, beside something and in a new directory
         W("e/never"), W("never/was/here"), F("never/was/there", "1"),
         # a child below a lower layer's non-directory, without an entry for it
         F("e/low/child", "3")],
    ]


IMAGES = {
    "hello": (image_hello, ["gzip"]),
    "hello-zstd": (image_hello, ["zstd"]),
    "hello-plain": (image_hello, ["none"]),
    "hello-docker": (image_hello, ["docker"]),
    "layers": (image_layers, ["gzip"]),
    "layers-zstd": (image_layers, ["zstd"]),
    "layers-plain": (image_layers, ["none"]),
    "layers-mixed": (image_layers, ["gzip", "zstd", "none", "gzip-members", "zstd-frames"]),
    "many": (image_many, ["gzip"]),
    "dup": (image_dup, ["gzip"]),
    "edge": (image_edge, ["gzip"]),
}


def static_busybox(path=None):
    path = path or shutil.which("busybox") or sys.exit("no busybox: install busybox-static")
    with open(path, "rb") as f:
        data = f.read()
    phoff, = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if any(struct.unpack_from("<I", data, phoff + i * size)[0] == 3 for i in range(count)):
        sys.exit(path + " is not static: install busybox-static")
    return data


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def build(name, outdir, busybox):
    make, compressions = IMAGES[name]
    layers = make(busybox)
    docker = "docker" in compressions
    blobs, tree, descriptors, diff_ids, chain = {}, {}, [], [], []

    def put(data):
        blobs[digest(data)] = data
        return {"digest": digest(data), "size": len(data)}

    for i, entries in enumerate(layers):
        tar = layer_tar(entries, global_header=(i == 7))
        media, compress = COMPRESSION[compressions[i % len(compressions)]]
        descriptors.append({"mediaType": media, **put(compress(tar))})
        diff_ids.append(digest(tar))
        chain.append(digest(raw(chain[-1] + " " + diff_ids[-1])) if chain else diff_ids[0])
        apply_layer(tree, entries)

    def as_json(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    config = put(as_json({
        "architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/cat", "/etc/hello"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}}))
    manifest_type = DOCKER + "distribution.manifest.v2+json" if docker else OCI + "manifest.v1+json"
    manifest = put(as_json({
        "schemaVersion": 2, "mediaType": manifest_type, "layers": descriptors,
        "config": {"mediaType": DOCKER + "container.image.v1+json" if docker else OCI + "config.v1+json",
                   **config}}))
    image = "localhost/tardev-test/%s:latest" % name
    index = as_json({"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": [{
        "mediaType": manifest_type, **manifest, "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"io.containerd.image.name": image, "org.opencontainers.image.ref.name": "latest"}}]})

    members = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index}
    members.update(("blobs/sha256/" + d[7:], blobs[d]) for d in sorted(blobs))
    with open(os.path.join(outdir, name + ".tar"), "wb") as f:
        f.write(layer_tar([F(path, data) for path, data in members.items()]))
    with open(os.path.join(outdir, name + ".json"), "w", encoding="ascii") as f:
        json.dump({"image": image, "manifest": manifest["digest"], "config": config["digest"],
                   "layers": descriptors, "diff_ids": diff_ids, "chain_ids": chain,
                   "tree": describe(tree)}, f, indent=1, sort_keys=True)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("build")
    p.add_argument("outdir")
    p.add_argument("names", nargs="*", metavar="NAME")
    p.add_argument("--busybox", help="a static busybox (default: the one on PATH)")
    p = sub.add_parser("check")
    p.add_argument("expected")
    p.add_argument("rootfs")
    sub.add_parser("list")
    args = parser.parse_args()
    if args.command == "list":
        print("\n".join(IMAGES))
    elif args.command == "check":
        with open(args.expected, encoding="ascii") as f:
            lines = differences(json.load(f)["tree"], scan(args.rootfs))
        print("\n".join(lines) if lines else "same")
        sys.exit(bool(lines))
    else:
        unknown = set(args.names) - IMAGES.keys()
        if unknown:
            sys.exit("no such image: " + ", ".join(sorted(unknown)))
        os.makedirs(args.outdir, exist_ok=True)
        busybox = static_busybox(args.busybox)
        for name in args.names or IMAGES:
            build(name, args.outdir, busybox)


if __name__ == "__main__":
    main()
