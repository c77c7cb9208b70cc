"""Do all ranks run the same? Each gives named texts; where they differ, every rank raises one message that names them.

A rank with other code, settings or libraries does not fail by itself: the sums over ranks just mean something else, or
one rank waits in a collective that another never enters. So this is asked before the first such step.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping

from torch import Tensor

from sivae_dist.distributed.digest import digest
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sharding import distributed
from sivae_dist.errors import UserError

_SHOWN = 8  # differences in a message; a rank with another version of everything has hundreds
_LONGEST = 80  # characters of a value


def agree(group: Group, facts: Mapping[str, str], fix: str) -> None:
    """Raises the same UserError on every rank where their facts (name -> value) differ. Collective.

    The message names the ranks in the minority, their machines, and what they have instead.
    """
    if group.ranks == 1:
        return
    everyone = [json.loads(text) for text in group.texts(json.dumps([socket.gethostname(), dict(facts)]))]
    differing = differences([own for _, own in everyone])
    if differing:
        machines = [host for host, _ in everyone] if len({host for host, _ in everyone}) > 1 else None
        raise UserError(f"the ranks differ: {told(differing, machines)}", fix)


def agree_on_tensors(group: Group, tensors: Mapping[str, Mapping[str, Tensor]], fix: str) -> None:
    """As `agree`, of the bits of groups of named tensors that all ranks should hold alike. Collective.

    Of sharded tensors each rank holds another part: they are left out.
    """
    if group.ranks > 1:
        whole = {name: {k: t for k, t in members.items() if not distributed(t)} for name, members in tensors.items()}
        agree(group, {name: digest(members).hash for name, members in whole.items()}, fix)


# A fact in which ranks differ: its name, and each value (None: no such fact) with the ranks that have it, the value of
# the most ranks first (of equally many, that of the lowest rank).
Difference = tuple[str, list[tuple[str | None, list[int]]]]


def differences(facts: list[dict[str, str]]) -> list[Difference]:
    """What is not the same in all of these, one a rank."""
    found: list[Difference] = []
    for name in dict.fromkeys(name for own in facts for name in own):
        ranks: dict[str | None, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(own.get(name), []).append(rank)
        if len(ranks) > 1:
            found.append((name, sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1][0]))))
    return found


def told(differing: list[Difference], machines: list[str] | None) -> str:
    """`rank 3 has torch 2.11.0, the others 2.13.0; ...`. machines: one a rank, None where they are all on one."""
    texts = []
    for name, ((usual, many), *others) in differing[:_SHOWN]:
        rest = f"rank {many[0]}" if len(many) == 1 else "the others" if len(others) == 1 else _ranks(many, None)
        own = [f"{_ranks(ranks, machines)} {_has(ranks)} {_value(name, value)}" for value, ranks in others]
        has = "" if rest == "the others" else f" {_has(many)}"
        texts.append(f"{', '.join(own)}, {rest}{has} {'no such' if usual is None else usual[:_LONGEST]}")
    more = [f"and {len(differing) - _SHOWN} more differences"] if len(differing) > _SHOWN else []
    return "; ".join(texts + more)


def _value(name: str, value: str | None) -> str:
    return f"no {name}" if value is None else f"{name} {value[:_LONGEST]}"


def _has(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _ranks(ranks: list[int], machines: list[str] | None) -> str:
    named = [f"{rank} ({machines[rank]})" if machines else str(rank) for rank in ranks[:_SHOWN]]
    if len(ranks) > _SHOWN:
        named.append(f"{len(ranks) - _SHOWN} more")
    if len(named) == 1:
        return f"rank {named[0]}"
    return f"ranks {', '.join(named[:-1])} and {named[-1]}"
