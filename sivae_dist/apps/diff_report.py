"""What `sivae-dist diff` says, for people and for programs."""

from __future__ import annotations

import math
from typing import Any

from sivae_dist.apps.diff import Diff, Fact, Step, Thing, close

_KINDS = {
    "matters": "changes the training",
    "may": "may change the training",
    "rounding": "changes the rounding only",
    "nothing": "changes nothing in the training",
}
_LONGEST = 60


def text(found: Diff) -> str:
    """Settings and versions, then where the courses part, then one line that sums up."""
    lines = [f"A: {found.runs[0].path}", f"B: {found.runs[1].path}", ""]
    lines += [*_facts(found.facts), "", *_course(found), summary(found)]
    return "\n".join(lines)


def summary(found: Diff) -> str:
    """The verdict in one line."""
    last, common = found.steps[-1].nimg, len(found.steps)
    if found.verdict == "same":
        return f"same: every bit of {common} fingerprints up to {last} images"
    first = found.first("rounding", "different")
    assert first is not None
    cause = next(thing for thing in first.things if not thing.same)
    begun = f"from {first.nimg} images, beginning with {cause.name}"
    if found.verdict == "rounding":
        return f"differ in rounding {begun}: at most {_largest(found):.1e} apart up to {last} images"
    beyond = found.first("different")
    assert beyond is not None
    if beyond is not first:
        return f"different: rounding {begun}, has grown beyond {found.tolerance:g} at {beyond.nimg} images"
    return f"different {begun}"


def _facts(facts: list[Fact]) -> list[str]:
    if not facts:
        return ["settings, code, libraries and launch are the same"]
    width = min(_LONGEST, max(len(fact.name) for fact in facts))
    values = min(_LONGEST, max(len(fact.values[0]) for fact in facts))
    lines = []
    for kind, meaning in _KINDS.items():
        rows = [fact for fact in facts if fact.matter == kind]
        lines += [f"{meaning}:"] * bool(rows)
        lines += [
            f"  {fact.name:<{width}}  A {fact.values[0][:_LONGEST]:<{values}}  B {fact.values[1][:_LONGEST]}"
            for fact in rows
        ]
    return lines


def _course(found: Diff) -> list[str]:
    first = found.first("rounding", "different")
    if first is None:
        return []
    before = [step.nimg for step in found.steps if step.nimg < first.nimg]
    lines = [_before(before), *_step(first, found.tolerance)]
    cause = next(thing for thing in first.things if not thing.same)
    if found.pinned:
        lines.append(f"what it begins with: {cause.name}; {_hint(cause)}")
    elif not cause.name.startswith(("data", "noise", "size")):
        lines.append(
            f"between {before[-1] if before else 0} and {first.nimg} images are iterations without a fingerprint: the "
            "cause may be in one of them, and what comes first here its consequence. To see more, train both from the "
            "last checkpoint before with a smaller --tracking.fingerprints_every_kimg"
        )
    last = found.steps[-1]
    if last is not first:
        groups = {thing.name.partition(":")[0]: 0.0 for thing in last.things}
        for thing in last.things:
            name = thing.name.partition(":")[0]
            groups[name] = max(groups[name], math.inf if thing.apart is None else thing.apart)
        lines.append(
            f"at {last.nimg} images, the furthest apart: " + ", ".join(f"{k} {v:.1e}" for k, v in groups.items() if v)
        )
    return [*lines, ""]


def _before(places: list[int]) -> str:
    if not places:
        return "different from the first fingerprint on"
    return f"the same bit for bit up to {places[-1]} images" if places[-1] else "the weights begin alike, bit for bit"


_HINTS = {
    "size of the batch": "train.batch, or where it grows",
    "data: positions": "other samples: train.seed, data.lanes, data.window, the salt, or where the run resumed",
    "data: values": "the same samples with other contents: the data, augmentation, or decoding",
    "noise: salt": "one of them was taken back by its guard and went on with other data and noise",
    "noise: draws": "train.seed, the shape of the codes, or arithmetic of the device",
    "loss": "the same data and noise, another loss: objective, networks, kernels, precision, or weights before",
    "gradient": "the same losses, other gradients: the backward pass, sums over ranks, clipping",
    "optimizer": "the same gradients, another step: the optimizer's settings",
    "weights": "the same gradients, another step: learning rate or optimizer (before the first iteration: the seed, "
    "the model, or the libraries that initialise it)",
    "average": "the same weights, another average: ema",
}


def _hint(thing: Thing) -> str:
    return _HINTS.get(thing.name) or _HINTS[thing.name.partition(":")[0]]


def _step(step: Step, tolerance: float) -> list[str]:
    apart = [thing for thing in step.things if not thing.same]
    width = max(len(thing.name) for thing in apart)
    lines = [f"at {step.nimg} images, in the order in which they are made:"]
    lines += [f"  {thing.name:<{width}}  {_apart(thing, tolerance)}" for thing in apart]
    groups = {thing.name.partition(":")[0] for thing in apart}
    same = [t.name if t.name.partition(":")[0] in groups else t.name.partition(":")[0] for t in step.things if t.same]
    return [*lines, f"  the same: {', '.join(dict.fromkeys(same))}"] if same else lines


def _apart(thing: Thing, tolerance: float) -> str:
    if thing.apart is None:
        return "different"
    kind = "rounding" if close(thing, tolerance) else "different"
    return f"{kind}, values {thing.apart:.1e} apart" if thing.apart else f"{kind}, other bits of the same norm"


def _largest(found: Diff) -> float:
    return max((thing.apart or 0.0 for step in found.steps for thing in step.things), default=0.0)


def plain(found: Diff) -> dict[str, Any]:
    """For programs: plain values. An infinite distance is null."""
    first = found.first("rounding", "different")
    beyond = found.first("different")
    return {
        "runs": [str(run.path) for run in found.runs],
        "verdict": found.verdict,
        "summary": summary(found),
        "tolerance": found.tolerance,
        "facts": [{"name": f.name, "values": list(f.values), "matter": f.matter} for f in found.facts],
        "first_difference": _place(first),
        "first_beyond_rounding": _place(beyond),
        "steps": [{"nimg": step.nimg, "verdict": step.verdict(found.tolerance)} for step in found.steps],
    }


def _place(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    apart = [
        {"name": t.name, "apart": t.apart if t.apart is not None and math.isfinite(t.apart) else None}
        for t in step.things
        if not t.same
    ]
    return {"nimg": step.nimg, "things": apart}
