"""A run's configuration: the dataclasses that live beside the parts they configure, composed, read and written.

A YAML file holds only differences from the defaults, with at most one `base:` file under it. `model.name`,
`objective.name` and `data.name` choose the classes of these sections before anything else is read.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sivae_dist.data import DataConfig
from sivae_dist.distributed.launch import DistributedConfig
from sivae_dist.engine.checkpoint_writer import CheckpointConfig
from sivae_dist.engine.controller import ControllerConfig
from sivae_dist.engine.ema import EmaConfig
from sivae_dist.engine.evaluate import EvalConfig
from sivae_dist.engine.guard import GuardConfig
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.precision import PrecisionConfig
from sivae_dist.engine.schedule import TrainConfig
from sivae_dist.engine.tracking import TrackingConfig
from sivae_dist.errors import UserError, nearest
from sivae_dist.models import ModelConfig
from sivae_dist.objectives import ObjectiveConfig
from sivae_dist.registry import component

# Sections whose class depends on their `name`: package, base class, default name.
NAMED: dict[str, tuple[str, type, str]] = {
    "model": ("sivae_dist.models", ModelConfig, "residual"),
    "objective": ("sivae_dist.objectives", ObjectiveConfig, "soft_introvae"),
    "data": ("sivae_dist.data", DataConfig, "shards"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def from_dict(values: dict[str, Any], source: str) -> RunConfig:
    """A RunConfig from nested plain values (as YAML gives them).

    source: where the values come from, for messages. Raises UserError naming the key, the value and what was expected.
    """
    unknown = values.keys() - {f.name for f in dataclasses.fields(RunConfig)}
    for key in sorted(unknown):
        names = (f.name for f in dataclasses.fields(RunConfig))
        raise UserError(f"{source}: there is no section {key!r}", nearest(str(key), names))
    sections: dict[str, Any] = {}
    for section in dataclasses.fields(RunConfig):
        given = values.get(section.name) or {}
        if section.name in NAMED:
            package, base, default = NAMED[section.name]
            if not isinstance(given, dict):
                raise _wrong(source, section.name, given, "keys and values")
            cls = component(package, base, str(given.get("name", default)), kind=section.name)
        else:
            cls = typing.get_type_hints(RunConfig)[section.name]
        sections[section.name] = _convert(given, cls, section.name, source)
    return RunConfig(**sections)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (lists for tuples) that `from_dict` turns back into an equal RunConfig."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, sections in their order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's values, laid over those of its `base:` file if it names one (relative to itself)."""
    values = _load(path)
    base = values.pop("base", None)
    if base is None:
        return values
    base_path = path.parent / str(base)
    below = _load(base_path)
    if "base" in below:
        raise UserError(
            f"{path}: its base {base_path} has a base itself ({below['base']!r}); one level is allowed",
            "write the differences into one file",
        )
    return merge(below, values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section. A section that changes its `name` forgets what lay below."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        renamed = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) != old.get("name")
        )
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not renamed else value
    return result


def _load(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no config file {path}", "give a YAML file, for example configs/quickstart.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}", "give a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}", "mend the line it names"
        ) from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", "a config has sections and keys, two levels") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not sections with keys", "see configs/ for examples")
    return values


def _convert(value: Any, wanted: Any, where: str, source: str) -> Any:
    """`value` as the annotated type `wanted`, or a UserError."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _convert_dataclass(value, wanted, where, source)
    if origin in {typing.Union, types.UnionType}:
        if value is None or value == "None":
            if type(None) in arguments:
                return None
        else:
            (inner,) = [a for a in arguments if a is not type(None)]
            return _convert(value, inner, where, source)
    elif origin is Literal:
        if value in arguments:
            return value
        raise _wrong(
            source, where, value, f"one of {', '.join(map(str, arguments))}", nearest(str(value), map(str, arguments))
        )
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], where, source) for item in items)
        if len(items) == len(arguments):
            return tuple(_convert(i, a, where, source) for i, a in zip(items, arguments, strict=True))
    elif wanted is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-8 as a string
        except (TypeError, ValueError):
            pass
    elif (wanted is int and isinstance(value, int) and not isinstance(value, bool)) or (
        wanted in {bool, str} and isinstance(value, wanted)
    ):
        return value
    raise _wrong(source, where, value, _describe(wanted))


def _convert_dataclass(value: Any, wanted: type, where: str, source: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(source, where, value, "keys and values")
    hints = typing.get_type_hints(wanted)
    names = [f.name for f in dataclasses.fields(wanted)]
    for key in value:
        if key not in names:
            raise UserError(f"{source}: there is no key {where}.{key}", nearest(str(key), names))
    return wanted(**{key: _convert(item, hints[key], f"{where}.{key}", source) for key, item in value.items()})


def _wrong(source: str, where: str, value: Any, expected: str, fix: str = "") -> UserError:
    return UserError(f"{source}: {where} is {value!r}, expected {expected}", fix or "correct the value")


def _describe(wanted: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "True or False", str: "a text", type(None): "None"}
    if wanted in names:
        return names[wanted]
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) is tuple:
        return f"a list of {_describe(arguments[0])}s".replace("a list of a ", "a list of ")
    return " or ".join(_describe(a) for a in arguments) or str(wanted)
