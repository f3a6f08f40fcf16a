# SPDX-License-Identifier: Apache-2.0
"""Whether a policy lets an agent mount what a node would ask it to; by a real Rego engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from policy.errors import PolicyError
from policy.storages import Storage

_QUERY: Final = "allow = data.tardev.storages.allow; reasons = data.tardev.storages.reasons"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a container of the policy, by its place there, is not the one: the rule, the storage by its place in the
    request, or -1, and what of it is another."""

    container: int
    rule: str
    storage: int
    field: str


@dataclass(frozen=True, slots=True)
class Verdict:
    allowed: bool
    reasons: tuple[Reason, ...] = ()


def check(policy_data: Mapping[str, Any], storages: Sequence[Storage], container_id: str) -> Verdict:
    """Of one container. `policy_data`: as genpolicy writes it. Raises PolicyError where that is none."""
    import regopy  # takes its time to load

    engine = regopy.Interpreter()
    try:
        engine.add_module("storages.rego", (files("policy") / "rego" / "storages.rego").read_text())
        engine.add_data_json(json.dumps({"policy_data": policy_data}))
        engine.set_input({"storages": [each.document() for each in storages], "container_id": container_id})
        bindings = json.loads(str(engine.query(_QUERY)))["bindings"]
    except (regopy.RegoError, ValueError, KeyError) as error:
        raise PolicyError(f"the policy's data cannot be evaluated: {str(error).splitlines()[0]}") from None
    reasons = sorted(
        (int(number), each["rule"], each["storage"], each["field"])
        for number, found in bindings["reasons"].items()
        for each in found
    )
    return Verdict(bool(bindings["allow"]), tuple(Reason(*each) for each in reasons))
