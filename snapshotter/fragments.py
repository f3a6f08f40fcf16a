# SPDX-License-Identifier: Apache-2.0
"""What a containerd needs in its configuration, for the snapshotters that the daemon has: one text for each version.

containerd: docs/man/containerd-config.toml.5.md, docs/cri/config.md, docs/transfer.md; the differences between versions
are those of its plugins. `config/containerd-*.toml` are these texts for the default configuration.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Final

from snapshotter.config import Config, SnapshotterName
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.errors import ConfigError

# Each stands for those that follow it, too, up to the next.
VERSIONS: Final = ("1.6", "1.7", "2.0", "2.1")
DIFFER: Final = "tardev-diff"
# Of the runtime that a contract is for: its name in containerd's table and its type.
_RUNTIMES: Final = {
    "kata-tardev": ("kata-cc", "io.containerd.kata-cc.v2"),
    "kata-erofs": ("kata", "io.containerd.kata.v2"),
}
_WIDTH: Final = 118  # of a comment
_EXAMPLE: Final = "tardev"  # of a name for Kata, where the daemon has none


def version_of(text: str) -> str:
    """The one of VERSIONS whose text "1.7.27" or "2.2" wants. Raises ConfigError."""
    try:
        wanted = tuple(int(part) for part in text.removeprefix("v").split(".")[:2])
    except ValueError:
        wanted = ()
    fitting = [known for known in VERSIONS if tuple(map(int, known.split("."))) <= wanted]
    if len(wanted) != 2 or not fitting:
        raise ConfigError(f"no configuration for containerd {text!r}; there is one for {', '.join(VERSIONS)} and later")
    return fitting[-1]


def fragment(version: str, settings: Config, platform: str = "linux/amd64") -> str:
    """`version`: one of VERSIONS. `platform`: of the node."""
    return "\n".join(_lines(VERSIONS.index(version), version, settings, platform)) + "\n"


def _lines(age: int, version: str, settings: Config, platform: str) -> Iterator[str]:
    """`age`: the version's place in VERSIONS."""
    hosts = {name: each for name, each in settings.snapshotters.items() if _is_host(each)}
    katas = {name: each for name, each in settings.snapshotters.items() if not _is_host(each)}
    # Who serves all pods: runc's where there is one, for containerd 1.6 has one for all.
    main = next(iter(hosts or katas))
    later = " and later" if version == VERSIONS[-1] else ""
    yield "# SPDX-License-Identifier: Apache-2.0"
    yield from _said(
        f"containerd {version}{later} with tardev-snapshotter. Merge it into /etc/containerd/config.toml, "
        "then restart containerd. docs/containerd.md says more, and when `imports` can take the file as "
        "it is."
    )
    yield f"version = {3 if age >= 2 else 2}"
    yield ""
    if not age:
        yield from _said(
            "There is no diff plugin here, and there must be none: containerd 1.6 dies at start when one is "
            'configured ("panic: plugin: no type"). Its own differ unpacks each layer in vain; the daemon '
            "finds the blob itself."
        )
        yield ""
    names = [main, *(name for name in (*hosts, *katas) if name != main)]
    for name in names:
        yield from _snapshot_plugin(age, name, settings, explained=name == main)
        yield ""
    if age:
        yield from _said(
            "A plugin has one type, so the differ needs a table and a name of its own. The socket is the same."
        )
        yield f"[proxy_plugins.{DIFFER}]"
        yield '  type = "diff"'
        yield f"  address = {_quoted(settings.address)}"
        yield ""
        yield from _diff_service(age)
        yield ""
    if age >= 2:
        yield from _transfer(age, names, platform)
        yield ""
    yield from _images(age, main)
    for name, chosen in katas.items():
        yield ""
        yield from _runtime(age, name, chosen.contract, platform)
    if not katas:
        yield ""
        yield from _commented(_kata_example(age, settings, platform))


def _is_host(chosen: SnapshotterName) -> bool:
    return CONTRACTS[chosen.contract].PLACE is Place.MOUNTED


def _said(text: str, indent: int = 0) -> Iterator[str]:
    """A comment."""
    lines = textwrap.wrap(text, _WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False)
    return (f"{' ' * indent}# {line}" for line in lines)


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def _snapshot_plugin(age: int, name: str, settings: Config, *, explained: bool) -> Iterator[str]:
    chosen = settings.snapshotters.get(name)
    if explained:
        yield from _said(
            "The name: what clients say with --snapshotter. The daemon has a table [snapshotters.NAME] for it."
        )
    yield f"[proxy_plugins.{name}]"
    yield '  type = "snapshot"'
    if explained:
        yield from _said(
            "The `address` of the daemon's configuration. It need not be there when containerd starts.", indent=2
        )
    yield f"  address = {_quoted(settings.address)}"
    if chosen is not None and chosen.remap_ids and age >= 2:
        yield '  capabilities = ["remap-ids"]'
    elif explained and age >= 2:
        yield from _said(
            "User namespaces, together with `remap_ids = true` in the daemon's configuration; one without "
            "the other does not work.",
            indent=2,
        )
        yield '  # capabilities = ["remap-ids"]'
    if explained and age >= 3:
        yield from _said(
            "From 2.2 on: layers of one image unpacked in parallel, together with `max_concurrent_unpacks = "
            '3` in the table [plugins."io.containerd.transfer.v1.local"]. Several capabilities stand in one '
            "list.",
            indent=2,
        )
        yield '  # capabilities = ["rebase"]'
    if age:
        yield f"  [proxy_plugins.{name}.exports]"
        if explained:
            yield from _said(
                "The `root` of the daemon's configuration. The kubelet watches the space of its file system.", indent=4
            )
        yield f"    root = {_quoted(settings.root)}"


def _diff_service(age: int) -> Iterator[str]:
    if age == 2:
        yield from _said("Who unpacks by the diff service: CRI, `ctr run`, `ctr images pull --local`, nerdctl.")
    elif age == 3:
        yield from _said(
            "Who unpacks by the diff service: `ctr run`, `ctr images pull --local`, nerdctl; and CRI where "
            "it unpacks an image that was pulled for another snapshotter."
        )
    yield '[plugins."io.containerd.service.v1.diff-service"]'
    yield from _said(
        'In this order: after "walking", which takes every layer, the daemon would never be asked. It '
        "refuses what is not its snapshotter's with UNIMPLEMENTED, and containerd goes on to the next.",
        indent=2,
    )
    yield f'  default = ["{DIFFER}", "walking"]'


def _unpack(platform: str, snapshotter: str, differ: str) -> Iterator[str]:
    yield '[[plugins."io.containerd.transfer.v1.local".unpack_config]]'
    yield f"  platform = {_quoted(platform)}"
    yield f'  snapshotter = "{snapshotter}"'
    yield f'  differ = "{differ}"'


def _transfer(age: int, names: Iterable[str], platform: str) -> Iterator[str]:
    who = "`ctr images pull`" if age == 2 else "CRI pulls, `ctr images pull`"
    yield from _said(
        f"Who unpacks by the transfer service: {who} and `import` without --local. One differ for each "
        'snapshotter; without an entry a pull for it fails with "no unpack platforms defined".'
    )
    for name in names:
        yield from _unpack(platform, name, DIFFER)
    yield ""
    yield from _said("The list replaces the built-in one, so what that holds is said again.")
    yield from _unpack(platform, "overlayfs", "walking")


def _images(age: int, main: str) -> Iterator[str]:
    table = '"io.containerd.cri.v1.images"' if age >= 2 else '"io.containerd.grpc.v1.cri".containerd'
    yield f"[plugins.{table}]"
    if not age:
        yield from _said(
            "All pods: 1.6 cannot choose by runtime class. Leave the line out where only ctr or nerdctl use "
            "the snapshotter.",
            indent=2,
        )
    elif age == 1:
        yield from _said(
            "All pods. For those of a runtime class only, set `snapshotter` in the table of that runtime instead.",
            indent=2,
        )
    else:
        yield from _said(
            'All pods. For those of a runtime class only, see docs/containerd.md, "One runtime class".', indent=2
        )
    yield f'  snapshotter = "{main}"'
    yield from _said(
        "Keep blobs after unpacking: a layer is built from its blob, for a second snapshotter or after a repair too.",
        indent=2,
    )
    if age == 3:
        yield from _said("True would also take CRI's pulls from the transfer service to the diff service.", indent=2)
    yield "  discard_unpacked_layers = false"


def _runtime(age: int, name: str, contract: str, platform: str) -> Iterator[str]:
    handler, kind = _RUNTIMES.get(contract, _RUNTIMES["kata-tardev"])
    if age >= 2:
        yield f'[plugins."io.containerd.cri.v1.images".runtime_platforms.{handler}]'
        yield f"  platform = {_quoted(platform)}"
        yield f'  snapshotter = "{name}"'
    table = "io.containerd.cri.v1.runtime" if age >= 2 else "io.containerd.grpc.v1.cri"
    yield f'[plugins."{table}".containerd.runtimes.{handler}]'
    yield f'  runtime_type = "{kind}"'
    if age:
        yield f'  snapshotter = "{name}"'
    yield "  privileged_without_host_devices = true"
    yield '  pod_annotations = ["io.katacontainers.*"]'


def _kata_example(age: int, settings: Config, platform: str) -> Iterator[str]:
    text = (
        f"For Kata containers{' as well' if age else ''}. The daemon needs a table [snapshotters.{_EXAMPLE}], contract"
        " kata-tardev: docs/kata.md."
    )
    if not age:
        text += (
            " 1.6 has one snapshotter for all pods, so a node has either these or those of runc: `snapshotter` above is"
            f' then "{_EXAMPLE}".'
        )
    elif age >= 2:
        text += (
            " Upstream's: contract kata-erofs, the same lines with the name of its runtime and type"
            " io.containerd.kata.v2."
        )
    yield from textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    yield from _snapshot_plugin(age, _EXAMPLE, settings, explained=False)
    if age >= 2:
        yield from _unpack(platform, _EXAMPLE, DIFFER)
    yield from _runtime(age, _EXAMPLE, "kata-tardev", platform)


def _commented(lines: Iterable[str]) -> Iterator[str]:
    return (f"# {line}" for line in lines)
