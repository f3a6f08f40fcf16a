# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

from snapshotter.tasks import Background


async def test_what_failed_behind_a_reply_is_done_again() -> None:
    background = Background()
    outcomes = [OSError("first"), OSError("second"), None]
    done: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        done.append("done")

    background.later("some work", work)
    await background.drain()
    assert len(outcomes) == 2
    await background.again()
    assert not done
    await background.again()
    assert done == ["done"]
    await background.again()
    assert not outcomes
