# SPDX-License-Identifier: Apache-2.0
"""What the guest is told to run, and on which layers: one JSON text with one form (docs/uvm.md, "The policy").

The guest's kernel command line carries the text's sha256, in the place of a measured field of a confidential VM.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from uvm.errors import PolicyError
from verity.params import DIGEST_BYTES, Params

LAYERS_MAX: Final = 128
STRINGS_MAX: Final = 1024
BYTES_MAX: Final = 256 << 10
_NAME: Final = re.compile(r"[a-z0-9-]{1,20}")  # also the serial of a virtio-blk device, which has 20 bytes


@dataclass(frozen=True, slots=True)
class PolicyLayer:
    """What vouches for one layer. A root hash alone binds neither length nor levels, so the geometry is here too."""

    name: str
    format: str
    root_hash: bytes
    data_size_bytes: int
    params: Params


@dataclass(frozen=True, slots=True)
class Process:
    """As the image says. `user`: USER or USER:GROUP, names or numbers of the image; empty for root."""

    args: Sequence[str]
    env: Sequence[str] = ()
    cwd: str = "/"
    user: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """`disk`: the serial of the disk whose partitions the layers are, the topmost the first; "": each has a disk."""

    layers: Sequence[PolicyLayer]  # top first
    process: Process
    disk: str = ""

    def text(self) -> bytes:
        """Raises PolicyError for what the guest would not take."""
        process = self.process
        if not 1 <= len(self.layers) <= LAYERS_MAX:
            raise PolicyError(f"{len(self.layers)} layers; 1 to {LAYERS_MAX} are possible")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise PolicyError("two layers have one name")
        if not process.args or not process.args[0]:
            raise PolicyError("there is no command")
        if not process.cwd.startswith("/"):
            raise PolicyError(f"working directory {process.cwd!r} is no absolute path")
        if max(len(process.args), len(process.env)) > STRINGS_MAX:
            raise PolicyError(f"over {STRINGS_MAX} arguments or environment variables")
        if any("\0" in text for text in (*process.args, *process.env, process.cwd, process.user)):
            raise PolicyError("a NUL in an argument, the environment, the working directory or the user")
        if self.disk and not _NAME.fullmatch(self.disk):
            raise PolicyError(f"{self.disk!r} is no name of a disk: 1 to 20 of a-z, 0-9 and -")
        document = {
            "version": 1,
            **({"disk": self.disk} if self.disk else {}),
            "layers": [_layer(layer) for layer in self.layers],
            "process": {
                "args": list(process.args), "env": list(process.env), "cwd": process.cwd, "user": process.user,
            },
        }  # fmt: skip
        try:
            text = _json(document).encode("utf-8")
        except UnicodeEncodeError:
            raise PolicyError("command, environment, working directory or user is not UTF-8") from None
        if len(text) > BYTES_MAX:
            raise PolicyError(f"the policy has {len(text)} bytes, over {BYTES_MAX}")
        return text


def kernel_command_line(policy_text: bytes) -> str:
    """All of it: the guest refuses anything beside."""
    return f"tardev.policy=sha256:{hashlib.sha256(policy_text).hexdigest()}"


def _layer(layer: PolicyLayer) -> dict[str, Any]:
    if not _NAME.fullmatch(layer.name):
        raise PolicyError(f"{layer.name!r} is no name of a layer: 1 to 20 of a-z, 0-9 and -")
    if len(layer.root_hash) != DIGEST_BYTES:
        raise PolicyError(f"layer {layer.name}: a root hash has {DIGEST_BYTES} bytes")
    return {
        "name": layer.name,
        "format": layer.format,
        "root_hash": layer.root_hash.hex(),
        "data_size": layer.data_size_bytes,
        "data_block": layer.params.data_block_bytes,
        "hash_block": layer.params.hash_block_bytes,
    }


def _json(value: Any) -> str:
    """No white space, keys in their order, and of escapes only those that JSON demands, below a blank as \\u00XX."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f]", lambda match: f"\\u{ord(match[0]):04x}", escaped) + '"'
    return json.dumps(value)
