"""Where two runs part: in their settings, their code and libraries, and in what they did.

Only what the runs have written is read: config.yaml, manifest.json and fingerprints.jsonl (see engine/fingerprints).
The first fingerprint in which something differs tells most: things are looked at in the order in which an iteration
makes them, so what differs first is the cause, and the rest follows from it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sivae_dist.engine.agreement import OWN, flat
from sivae_dist.engine.config import from_dict, read_yaml, to_dict
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.tracking import read_metrics
from sivae_dist.errors import UserError

Matter = Literal["matters", "may", "rounding", "nothing"]
Verdict = Literal["same", "rounding", "different"]

_MAX_BYTES = 1 << 30
# What a setting, or a section of them, can do to the course of a training; whatever is not here matters.
_NOTHING = (
    "train.kimg", "train.minutes", "train.recompute_from", "tracking", "checkpoint", "eval", "data.held_out_split",
    "distributed.ranks", "distributed.timeout_s", "distributed.check", *OWN[1:],
)  # fmt: skip
_ROUNDING = ("distributed", "kernels", "precision.channels_last", "train.decode_once")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. facts: of its manifest, by name. rows: its fingerprints by images seen."""

    path: Path
    settings: dict[str, Any]
    facts: dict[str, str]
    rows: dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Fact:
    """Something that is not the same in both runs, before they began. values: one a run, "-" where it has none."""

    name: str
    values: tuple[str, str]
    matter: Matter


@dataclass(frozen=True)
class Thing:
    """Something an iteration makes, in both runs. apart: relative distance of its norm or value; 0 if the bits agree,
    None where only bits are known."""

    name: str
    same: bool
    apart: float | None


@dataclass(frozen=True)
class Step:
    """One fingerprint that both runs have. size: of the iteration, in images; 0: there was none yet.

    things: in the order in which the iteration makes them.
    """

    nimg: int
    size: int
    things: list[Thing]

    def verdict(self, tolerance: float) -> Verdict:
        """Of all things together."""
        apart = [thing for thing in self.things if not thing.same]
        if not apart:
            return "same"
        return "rounding" if all(close(thing, tolerance) for thing in apart) else "different"


@dataclass(frozen=True)
class Diff:
    """Two runs side by side. steps: by images seen."""

    runs: tuple[Run, Run]
    facts: list[Fact]
    steps: list[Step]
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        """Of the whole course: `rounding` where no thing ever came further apart than the tolerance."""
        found = {step.verdict(self.tolerance) for step in self.steps}
        return "different" if "different" in found else "rounding" if "rounding" in found else "same"

    @property
    def pinned(self) -> bool:
        """Whether the iteration before the first difference has a fingerprint, too: then the cause is in this one."""
        places = [step.nimg for step in self.steps]
        first = self.first("rounding", "different")
        return first is not None and (first.size == 0 or first.nimg - first.size in places)

    def first(self, *verdicts: Verdict) -> Step | None:
        """The first step that was judged so."""
        return next((step for step in self.steps if step.verdict(self.tolerance) in verdicts), None)


def close(thing: Thing, tolerance: float) -> bool:
    """Whether other bits may be rounding."""
    return thing.same or (thing.apart is not None and thing.apart <= tolerance)


def diff(one: Path, two: Path, tolerance: float) -> Diff:
    """Raises UserError where a folder is no run, or the runs have no fingerprint in common."""
    if one.resolve() == two.resolve():
        raise UserError(f"{one} is given twice", "name two runs")
    runs = (read_run(one), read_run(two))
    common = sorted(runs[0].rows.keys() & runs[1].rows.keys())
    if not common:
        raise UserError(
            f"the runs have no fingerprint at the same number of images: {_places(runs[0])}; {_places(runs[1])}",
            "train both with one train.batch and tracking.fingerprints_every_kimg above 0, for an iteration at least",
        )
    steps = [_step(nimg, runs[0].rows[nimg], runs[1].rows[nimg]) for nimg in common]
    return Diff(runs, facts(*runs), steps, tolerance)


def _step(nimg: int, one: dict[str, Any], two: dict[str, Any]) -> Step:
    try:
        return Step(nimg, int(one.get("size", 0)), list(_things(one, two)))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UserError(
            f"the fingerprints at {nimg} images are not as a training wrote them: {error!r}"[:500],
            "leave that run out, or take its folder from where it was trained",
        ) from error


def read_run(path: Path) -> Run:
    """Raises UserError where the folder is no run, or its files are not as a training wrote them."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(
            f"{path} is no run folder (it has no config.yaml)", "give folders that --out of a training made"
        )
    values = read_yaml(folder.config)
    with contextlib.suppress(UserError):  # settings that exist no more are compared as they stand
        values = to_dict(from_dict(values, str(folder.config)))  # what a version did not know yet has its default
    try:
        for file in (folder.fingerprints, folder.manifest):
            if file.is_file() and file.stat().st_size > _MAX_BYTES:
                raise UserError(f"{file} has more than {_MAX_BYTES} bytes", "no run writes so much")
        rows = {int(row["nimg"]): row for row in read_metrics(folder.fingerprints)}
        return Run(path, flat(values), _manifest(folder.manifest), rows)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"cannot read the run {path}: {error!r}"[:500], "it must be as the training wrote it"
        ) from error


def _manifest(path: Path) -> dict[str, str]:
    """Code, versions, data, kernels and launch by name; what an older run does not tell is absent."""
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    found = {"code": known.get("code"), "revision": known.get("revision"), "data": known.get("data")}
    found |= {name: value for name, value in known.get("versions", {}).items()}
    found |= {f"kernels {name}": known.get("kernels", {}).get(name) for name in ("mode", "running")}
    found |= {f"launch {name}": value for name, value in known.get("launch", {}).items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def facts(one: Run, two: Run) -> list[Fact]:
    """Settings, then code, libraries and launch; those that matter most first."""
    found = [
        Fact(name, (_shown(one.settings, name), _shown(two.settings, name)), _matter(name, one, two))
        for name in dict.fromkeys([*one.settings, *two.settings])
        if one.settings.get(name) != two.settings.get(name)
    ]
    for name in dict.fromkeys([*one.facts, *two.facts]):
        if name not in one.facts or name not in two.facts or one.facts[name] != two.facts[name]:
            if name == "revision" and one.facts.get("code") == two.facts.get("code") is not None:
                matter: Matter = "nothing"  # other tests or texts, the same code
            else:
                matter = (
                    "matters" if name == "data" else "rounding" if name.startswith(("launch", "kernels")) else "may"
                )
            found.append(Fact(name, (one.facts.get(name, "-"), two.facts.get(name, "-")), matter))
    order: list[Matter] = ["matters", "may", "rounding", "nothing"]
    return sorted(found, key=lambda fact: order.index(fact.matter))


def _matter(name: str, one: Run, two: Run) -> Matter:
    def within(names: tuple[str, ...]) -> bool:
        return any(name == known or name.startswith(f"{known}.") for known in names)

    same_data = one.facts.get("data") is not None and one.facts.get("data") == two.facts.get("data")
    if within(_NOTHING) or (name == "data.url" and same_data):
        return "nothing"
    return "rounding" if within(_ROUNDING) else "matters"


def _shown(settings: dict[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "-"


def _things(one: dict[str, Any], two: dict[str, Any]) -> Iterator[Thing]:
    """What both rows tell, in the order in which it comes about."""
    places = dict(_order(one))
    for name, path in {**places, **{k: v for k, v in _order(two) if k not in places}}.items():
        a, b = _at(one, path), _at(two, path)
        if (a is None) != (b is None):
            yield Thing(name, False, None)
        elif isinstance(a, list) and isinstance(b, list):
            apart = 0.0 if a == b else _apart(float(a[1]), float(b[1]))
            hashed = a[0] is not None and b[0] is not None  # flat shards have a norm only
            yield Thing(name, a[0] == b[0] if hashed else apart == 0, apart)
        elif isinstance(a, float) or isinstance(b, float):
            apart = _apart(float(a), float(b))
            yield Thing(name, apart == 0, apart)
        else:
            yield Thing(name, a == b, 0.0 if a == b else None)


def _order(row: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and place of everything in a row."""
    if "data" in row:
        yield "size of the batch", ("size",)
        yield "data: positions", ("data", "positions")
        yield "data: values", ("data", "x")
        yield "noise: salt", ("salt",)
        yield "noise: draws", ("noise",)
    phases = list(dict.fromkeys(name.partition("/")[0] for name in row.get("losses", {})))
    trained = {
        name.partition("/")[2]: name.partition("/")[0] for name in row.get("gradients", {})
    }  # player, last phase
    told: set[str] = set()
    for phase in phases:
        for kind, text in (("losses", "loss"), ("gradients", "gradient")):
            for name in row.get(kind, {}):
                if name.partition("/")[0] == phase:
                    yield f"{text}: {name}", (kind, name)
        for player in (name for name, last in trained.items() if last == phase):
            told.add(player)
            yield f"optimizer: {player}", ("optimizer", player)
            yield f"weights: {player}", ("weights", player)
    for kind in ("optimizer", "weights", "average"):
        for name in row.get(kind, {}):
            if kind == "average" or name not in told:
                yield f"{kind}: {name}", (kind, name)


def _at(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = row
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _apart(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _places(run: Run) -> str:
    if not run.rows:
        return f"{run.path} has none"
    return f"{run.path} has {len(run.rows)} from {min(run.rows)} to {max(run.rows)} images"
