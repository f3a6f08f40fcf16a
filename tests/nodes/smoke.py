# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: an image is imported, a container of it runs, and nothing is left."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.nodes.node import a_node


def main() -> None:
    started = time.monotonic()
    said: dict[str, object] = {}
    with a_node(Path("/tmp/node")) as node:
        said["serving_seconds"] = round(time.monotonic() - started, 1)
        node.containerd.import_image(Path("images/hello.tar"))
        said["imported_seconds"] = round(time.monotonic() - started, 1)
        said["output"] = node.containerd.says(
            "run", "--rm", "--snapshotter", "tardev-host", "localhost/tardev-test/hello:latest", "one",
            "/bin/busybox", "echo", "hello",
        )  # fmt: skip
        node.containerd.ctr("images", "rm", "--sync", "localhost/tardev-test/hello:latest")
    said["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
