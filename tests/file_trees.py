# SPDX-License-Identifier: Apache-2.0
"""All that a program can see of a directory tree, for comparing two of them."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any


def observe(top: Path, *, xattrs: bool = True) -> dict[bytes, dict[str, Any]]:
    """By path, the top's being empty. Directories' sizes and link counts are their file system's own affair."""
    found: dict[bytes, dict[str, Any]] = {}
    first_names: dict[tuple[int, int], bytes] = {}  # overlay has several devices
    todo = [b""]
    while todo:
        path = todo.pop()
        full = os.path.join(os.fsencode(top), path)
        status = os.lstat(full)
        seen: dict[str, Any] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime_ns": status.st_mtime_ns,
        }
        if xattrs:
            seen["xattrs"] = {name: _xattr(full, name) for name in os.listxattr(full, follow_symlinks=False)}
        if stat.S_ISDIR(status.st_mode):
            todo += sorted((os.path.join(path, name) for name in os.listdir(full)), reverse=True)
        else:
            seen["nlink"] = status.st_nlink
            seen["same as"] = first_names.setdefault((status.st_dev, status.st_ino), path)
            seen["rdev"] = status.st_rdev
            seen["size"] = status.st_size
        if stat.S_ISLNK(status.st_mode):
            seen["target"] = os.readlink(full)
        elif stat.S_ISREG(status.st_mode):
            with open(full, "rb") as file:
                seen["content"] = hashlib.file_digest(file, "sha256").hexdigest()
        found[path] = seen
    return found


def _xattr(path: bytes, name: str) -> bytes | str:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:  # an ACL that the kernel does not take
        return f"errno {error.errno}"


def differences(left: dict[bytes, dict[str, Any]], right: dict[bytes, dict[str, Any]]) -> dict[bytes, Any]:
    """Empty where both trees are the same."""
    found: dict[bytes, Any] = {}
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            found[path] = "only in the " + ("first" if other is None else "second")
        elif one != other:
            found[path] = {key: (one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)}
    return found
