# SPDX-License-Identifier: Apache-2.0
"""The model notices: each of these faults of order or of a check is seeded in turn, and must be found.

usage: python -m tests.model.mutants [RULE...]   -> prints the faults that nothing notices; status 1 if there are some
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.golden.mutants import Finder, Mutant, mutants

_EXAMPLES: Final = 1000

MUTANTS: Final = [
    *mutants(
        "snapshotter.snapshots",
        ("a commit is cut in two", "await to_the_end(self._commit(snapshot", "await (self._commit(snapshot"),
        (
            "a failed prepare stays",
            "            await to_the_end(self._undo(snapshot))\n            raise\n\n    async def _make_directory",
            "            raise\n\n    async def _make_directory",
        ),
        ("a cancelled prepare stays", "await to_the_end(self._undo_once_made(creating))", "pass"),
        (
            "a directory stays with its commit",
            'self._background.later("what a committed snapshot leaves", partial(self._leave, snapshot))',
            "pass",
        ),
        (
            "a link stays with its removal",
            'self._background.later("a removed snapshot\'s link", partial(self._links.release, snapshot))',
            "pass",
        ),
        ("any chain ID will do", "if is_digest(promised) and chain != promised:", "if False:"),
        ("a second layer is taken", "if snapshot.layer_id not in (None, layer.id):", "if False:"),
    ),
    *mutants(
        "snapshotter.collector",
        (
            "a sweep takes no lock",
            "async with self._builder.publishing:\n            if layer.id",
            "if True:\n            if layer.id",
        ),
        ("a sweep takes what was handed out lately", "layer.id in self._builder.recent() or not", "not"),
    ),
    *mutants(
        "snapshotter.metastore",
        ("a commit finds another snapshot under its key", "or found.id != snapshot.id:", "or False:"),
        ("a parent is removed", "        if child:\n", "        if False:\n"),
        ("a parents layer that is in use goes", ' UNION ALL SELECT 1 FROM snapshots WHERE parents_layer_id = ?1"', '"'),
        (
            "a container on what is not committed",
            "            if above.kind is not Kind.COMMITTED:\n                raise InvalidArgument",
            "            if False:\n                raise InvalidArgument",
        ),
        ("a link is nobody's", "links = ? AND links != '' LIMIT 1", "links = ? AND links = '' LIMIT 1"),
        (
            "what is committed goes with an undo",
            "DELETE FROM snapshots WHERE id = ? AND kind != ?",
            "DELETE FROM snapshots WHERE id = ? AND ? != ''",
        ),
    ),
    *mutants(
        "snapshotter.builder",
        (
            "a new layer is nobody's",
            "            raise\n        self.touch(layer)\n        return layer",
            "            raise\n        return layer",
        ),
        (
            "a stored layer is answered without the lock",
            "        async with self.publishing:\n            layer = await self._metastore.layer(diff_id, format)",
            "        if True:\n            layer = await self._metastore.layer(diff_id, format)",
        ),
        (
            "two builds publish at once",
            "        async with self.publishing:\n            there = await",
            "        if True:\n            there = await",
        ),
    ),
    *mutants(
        "snapshotter.links",
        (
            "a link is given up without the lock",
            "        if gone.links and gone.chain_id:\n            async with self._lock:\n",
            "        if gone.links and gone.chain_id:\n            if True:\n",
        ),
        (
            "a link is made without the lock",
            "        async with self._lock:\n            try:\n                await self._make",
            "        if True:\n            try:\n                await self._make",
        ),
    ),
    *mutants(
        "snapshotter.reconcile",
        ("a start leaves what was staged", "[DeleteStaged(name) for name in sorted(inventory.staged)]", "[]"),
        ("a start leaves files without a row", "sorted(inventory.layer_files - known)", "()"),
        ("a start leaves directories", "sorted(inventory.snapshot_directories - wanted)", "()"),
        ("a start makes no directory", "str(snapshot.id) not in inventory.whole_directories", "False"),
        ("a start leaves links", "[DeleteLink(path) for path in inventory.stray_links]", "[]"),
    ),
]


def _notices(content: Path) -> bool:
    from tests.model.test_interleavings import play
    from tests.model.world import write_content

    write_content(content)
    # Not by hypothesis, which would look for the smallest case.
    for seed in range(_EXAMPLES):
        source = random.Random(seed)
        try:
            play(content, _rounds(source), source.randrange(64), applies=bool(seed % 2))
        except (Exception, BaseExceptionGroup) as error:
            if os.environ.get("MUTANTS_SHOW"):
                print(f"{seed}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            return True
    return False


def _rounds(source: random.Random) -> list[tuple[object, ...]]:
    from tests.model.clients import KINDS

    def client() -> tuple[int, ...]:
        numbers = [source.randrange(KINDS), *(source.randrange(64) for _ in range(3))]
        return (*numbers, source.choice((0, 0, source.randint(1, 80))))

    return [
        (
            [client() for _ in range(source.randint(1, 4))],
            source.randbytes(source.randint(0, 80)),
            source.choice((0, 0, source.randint(1, 250))),
            source.random() < 0.5,
        )
        for _ in range(source.randint(3, 8))
    ]


def _child(mutant: Mutant) -> int:
    """0: nothing notices; 1: it is noticed; 2: the text is not there, or is no program any more."""
    try:
        text = mutant.text()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    sys.meta_path.insert(0, Finder(mutant.module, text))
    try:
        importlib.import_module(mutant.module)
    except Exception as error:
        print(f"{mutant.rule}: not even imported: {error}", file=sys.stderr)
        return 2
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        return int(_notices(Path(directory, "content")))


def survivors(chosen: Iterable[Mutant]) -> list[str]:
    """What nothing notices, or what is not where it was."""
    found = []
    for mutant in chosen:
        pid = os.fork()
        if not pid:
            os._exit(_child(mutant))
        status = os.waitpid(pid, 0)[1]
        if not status:
            found.append(f"nothing notices: {mutant.rule}")
            print(found[-1], file=sys.stderr, flush=True)
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
            found.append(f"not where it was: {mutant.rule}: {mutant.module}, {mutant.old.strip()!r}")
    return found


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.rule in sys.argv[1:]]
    found = survivors(chosen)
    print("\n".join([*found, f"{len(chosen)} changes, {len(found)} not noticed"]))
    return bool(found or not chosen)


if __name__ == "__main__":
    sys.exit(main())
