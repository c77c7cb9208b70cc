"""A run's configuration: the dataclasses that live beside the parts they configure, composed, read and written.

A YAML file holds only differences from the defaults, with at most one `base:` file under it. `model.name`,
`objective.name` and `data.name` choose the classes of these sections before anything else is read.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sivae_dist.data import DataConfig
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.engine.checkpoint_writer import CheckpointConfig
from sivae_dist.engine.controller import ControllerConfig
from sivae_dist.engine.ema import EmaConfig
from sivae_dist.engine.evaluate import EvalConfig
from sivae_dist.engine.guard import GuardConfig
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.precision import PrecisionConfig
from sivae_dist.engine.progressive import GrowthConfig
from sivae_dist.engine.schedule import TrainConfig
from sivae_dist.engine.tracking import TrackingConfig
from sivae_dist.errors import UserError, nearest
from sivae_dist.models import ModelConfig
from sivae_dist.objectives import ObjectiveConfig
from sivae_dist.ops.kernels import KernelConfig
from sivae_dist.registry import component

MAX_BYTES = 1 << 20  # of a config file
LARGEST = 1 << 63  # no setting is a whole number of this size; what computes with them uses 64 bits

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
    kernels: KernelConfig = field(default_factory=KernelConfig)
    progressive: GrowthConfig = field(default_factory=GrowthConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.progressive.enabled and self.controller.enabled:
            raise UserError(
                "progressive.enabled and controller.enabled are both True, and both would set objective.beta_neg",
                "switch one of them off",
            )


def from_dict(values: dict[str, Any], source: str) -> RunConfig:
    """A RunConfig from nested plain values (as YAML gives them).

    source: where the values come from, for messages. Raises UserError naming the key, the value and what was expected.
    """
    names = [f.name for f in dataclasses.fields(RunConfig)]
    if not isinstance(values, dict):
        raise _wrong(source, "the configuration", values, "sections with keys")
    for key in values:
        if key not in names:
            raise UserError(f"{source}: there is no section {_short(key)}", nearest(_text(key), names))
    sections: dict[str, Any] = {}
    for section in dataclasses.fields(RunConfig):
        given = values.get(section.name)
        given = {} if given is None else given
        if section.name in NAMED:
            package, base, default = NAMED[section.name]
            if not isinstance(given, dict):
                raise _wrong(source, section.name, given, "keys and values")
            cls = component(package, base, _name(source, section.name, given, default), kind=section.name)
        else:
            cls = typing.get_type_hints(RunConfig)[section.name]
        sections[section.name] = _convert(given, cls, section.name, source)
    return RunConfig(**sections)


def checkpoint_section(values: dict[str, Any], source: str) -> CheckpointConfig:
    """The section `checkpoint` of a resolved configuration alone, whatever the others hold.

    Raises UserError as `from_dict` does, and where there is no such section: a resolved configuration has all of them.
    """
    if "checkpoint" not in values:
        raise UserError(f"{source} has no section checkpoint", "copy the file again")
    section: CheckpointConfig = _convert(values["checkpoint"], CheckpointConfig, "checkpoint", source)
    return section


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
    try:
        return _with_base(path)
    except RecursionError:  # aliases can make a value that contains itself
        raise UserError(f"{path} is nested too deeply", "a config has sections and keys, two levels") from None


def _with_base(path: Path) -> dict[str, Any]:
    values = _load(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        raise _wrong(str(path), "base", base, "the name of a file beside it")
    base_path = path.parent / base
    if base_path.exists() and not base_path.is_file():  # reading a pipe or a device would never end
        raise UserError(f"{path}: its base {base_path} is no file", "name a YAML file beside it")
    below = _load(base_path)
    if "base" in below:
        raise UserError(
            f"{path}: its base {base_path} has a base itself ({_short(below['base'])}); one level is allowed",
            "write the differences into one file",
        )
    return merge(below, values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section. A section of another class forgets what lay below."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        over = isinstance(old, dict) and isinstance(value, dict) and not _renamed(key, old, value)
        result[key] = merge(old, value) if over else value  # type: ignore[arg-type]
    return result


def _renamed(section: str, old: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether `value` chooses another class for the section than `old`, which has the default one if it names none."""
    if section not in NAMED or "name" not in value:
        return False
    return bool(value["name"] != old.get("name", NAMED[section][2]))


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"the config file {path} has more than {MAX_BYTES} bytes", "a config holds a few settings")
        values = yaml.safe_load(data.decode("utf-8-sig"))
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
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # What the library lets through for values such as the date 2001-99-99 or `!!bool maybe`.
        raise UserError(f"{path} holds a value that is not valid YAML: {error}"[:500], "write it in quotes") from None
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
        if isinstance(value, bool) and ("off", "on")[value] in arguments:
            return ("off", "on")[value]  # YAML reads these words, written bare, as no and yes
        if value in arguments:
            return value
        raise _wrong(
            source,
            where,
            value,
            f"one of {', '.join(map(str, arguments))}",
            nearest(_short(value), map(str, arguments)),
        )
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], where, source) for item in items)
        if len(items) == len(arguments):
            return tuple(_convert(i, a, where, source) for i, a in zip(items, arguments, strict=True))
    elif wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-8 as a string
            if math.isfinite(number):
                return number
            raise _wrong(source, where, value, "a finite number")
        except (ValueError, OverflowError):
            pass
    elif wanted is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < LARGEST:
            return value
        raise _wrong(source, where, value, "a whole number below 2^63")
    elif wanted is str and isinstance(value, str):
        if "\0" not in value:  # no name of a file or a component holds one
            return value
    elif wanted is bool and isinstance(value, bool):
        return value
    raise _wrong(source, where, value, _describe(wanted))


def _convert_dataclass(value: Any, wanted: type, where: str, source: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(source, where, value, "keys and values")
    hints = typing.get_type_hints(wanted)
    names = [f.name for f in dataclasses.fields(wanted)]
    for key in value:
        if key not in names:
            raise UserError(f"{source}: there is no key {where}.{_text(key)}", nearest(_text(key), names))
    return wanted(**{key: _convert(item, hints[key], f"{where}.{key}", source) for key, item in value.items()})


def _wrong(source: str, where: str, value: Any, expected: str, fix: str = "") -> UserError:
    return UserError(f"{source}: {where} is {_short(value)}, expected {expected}", fix or "correct the value")


def _short(value: Any) -> str:
    """`repr` of bounded length and depth: YAML aliases make values whose whole text would fill the memory."""
    text = reprlib.Repr()
    text.maxlevel, text.maxstring, text.maxother = 2, 100, 100
    try:
        return text.repr(value)
    except ValueError:  # Python refuses to print very long whole numbers
        return f"a {type(value).__name__} of many digits"


def _text(key: Any) -> str:
    """A key in a message, in bounded length."""
    return key[:100] if isinstance(key, str) else _short(key)


def _name(source: str, section: str, given: dict[str, Any], default: str) -> str:
    name = given.get("name", default)
    if not isinstance(name, str) or len(name) > 100:
        raise _wrong(source, f"{section}.name", name, "a name")
    return name


def _describe(wanted: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "True or False", str: "a text", type(None): "None"}
    if wanted in names:
        return names[wanted]
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) is tuple:
        return f"a list of {_describe(arguments[0])}s".replace("a list of a ", "a list of ")
    return " or ".join(_describe(a) for a in arguments) or str(wanted)
