"""Checkpoints that the public implementations wrote: which one is this, and what is in it under our names.

    format                   what the file holds
    soft-introvae-residual   {"epoch", "model": state dict}, github.com/taldatech/soft-intro-vae-pytorch
    soft-introvae-bootstrap  the same with target_decoder.* besides
    soft-introvae-2d         the same, fully connected networks
    soft-introvae-3d         the bare state dict of the point-cloud networks
    soft-introvae-style      {"models": {...}, "auxiliary": {...}}, networks of ALAE, averaged weights *_s
    introvae                 {"epoch", "model": the pickled module itself}, github.com/hhb072/IntroVAE

Everything is told from names and shapes; nothing in the file runs (see torch_file).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.interop import published_keys
from sivae_dist.interop.inert_pickle import Inert, Names, shown
from sivae_dist.interop.torch_file import StoredTensor, TorchFile
from sivae_dist.models import ModelConfig
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.models.style import StyleConfig

Format = Literal[
    "soft-introvae-residual",
    "soft-introvae-bootstrap",
    "soft-introvae-style",
    "soft-introvae-2d",
    "soft-introvae-3d",
    "introvae",
]
FORMATS: tuple[Format, ...] = get_args(Format)
FAMILIES: dict[Format, published_keys.Family] = {
    "soft-introvae-residual": "residual",
    "soft-introvae-bootstrap": "residual",
    "soft-introvae-2d": "twod",
    "soft-introvae-style": "style",
    "introvae": "introvae",
}
CONFIGS: dict[published_keys.Family, type[ModelConfig]] = {"twod": MlpConfig, "style": StyleConfig}
# Networks that the project does not have yet.
ABSENT: dict[Format, str] = {"soft-introvae-3d": "point-cloud"}
# Style: sub-networks in the file -> the names they have in the whole network. With "_s" behind: averaged weights.
STYLE_PARTS = {
    "discriminator": "encoder.",
    "generator": "decoder.",
    "mapping_tl": "mapping_tl.",
    "mapping_fl": "mapping_fl.",
}
STYLE_AVERAGE = "dlatent_avg"  # the average style; there is one, which the published scripts use with both
AVERAGED = "_s"

_TORCH_MODULES = (
    "container.Sequential",
    "conv.Conv2d",
    "batchnorm.BatchNorm2d",
    "activation.LeakyReLU",
    "activation.ReLU",
    "pooling.AvgPool2d",
    "linear.Linear",
    "upsampling.Upsample",
)
# Classes of the training code that published files contain; read as inert stand-ins.
KNOWN_CLASSES: Names = {
    ("networks", "IntroVAE"): None,
    ("networks", "Encoder"): None,
    ("networks", "Decoder"): None,
    ("networks", "_Residual_Block"): None,
    ("tracker", "RunningMeanTorch"): None,
    ("tracker", "RunningMean"): None,
    # torch 0.3 and older keep this in every module
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): None,
    **{(f"torch.nn.modules.{m}", name): None for m, _, name in (n.partition(".") for n in _TORCH_MODULES)},
}
COUNTER = "num_batches_tracked"  # of batch norms; torch before 0.4.1 has none, and nothing depends on it here
MOST_MODULES = 10_000
MOST_NAMED = 5  # keys that a message spells out

Stored = dict[str, StoredTensor]


@dataclass
class Published:
    """A published network under our names, and the account of the file's keys."""

    format: Format
    model: ModelConfig
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    """Averaged weights, where the file has them."""
    epoch: int | None
    """Epochs done, as the file says."""
    used: dict[str, str] = field(default_factory=dict)  # key in the file -> our name
    unused: list[str] = field(default_factory=list)  # keys in the file without a counterpart here
    missing: list[str] = field(default_factory=list)  # our names that the file has no value for (set to 0)
    nonfinite: int = 0  # values that are NaN or infinite


def read(path: Path, wanted: Format | None = None) -> Published:
    """Reads a published checkpoint. wanted: its format, None to tell it from the content.

    Raises UserError for a damaged file, one that asks for anything but data, another format than wanted, and networks
    that do not fit ours entry by entry.
    """
    with TorchFile(path, KNOWN_CLASSES) as file:
        possible = detect(file.tree, path)
        if wanted is not None and wanted not in possible:
            raise UserError(f"{path} is no {wanted} checkpoint, but {possible[0]}", "leave --format out")
        kind = wanted or possible[0]
        if kind in ABSENT:
            raise UserError(
                f"{path} is a {kind} checkpoint; the {ABSENT[kind]} network is not part of sivae-dist yet",
                f"importable are: {', '.join(f for f in FORMATS if f not in ABSENT)}",
            )
        if kind == "soft-introvae-style":
            return _read_style(file, path)
        state, epoch = _state(file.tree, path)
        found = _fit(kind, state, path)
        found.epoch = epoch
        found.weights = _load(file, state, found)
        return found


def _read_style(file: TorchFile, path: Path) -> Published:
    """Four sub-networks and the average style, and the averaged four where they are there."""
    kind: Format = "soft-introvae-style"
    models = file.tree["models"]
    known = {*STYLE_PARTS, STYLE_AVERAGE, *(part + AVERAGED for part in STYLE_PARTS)}
    state = _style_state(models, "", path)
    found = _fit(kind, state, path)
    found.weights = _load(file, state, found)
    if any(part + AVERAGED in models for part in STYLE_PARTS):
        averaged = _style_state(models, AVERAGED, path)
        if _fit(kind, averaged, path).model != found.model:
            raise UserError(f"{path}: the averaged network has other sizes than the trained one", "get the file again")
        found.average = _load(file, averaged, found)
    found.unused += [f"models.{key}" for key in models if key not in known]
    auxiliary = file.tree.get("auxiliary")
    if isinstance(auxiliary, dict):
        found.unused += [f"auxiliary.{key}" for key in auxiliary]
        found.epoch = _epoch(auxiliary)
    return found


def _style_state(models: dict[Any, Any], suffix: str, path: Path) -> Stored:
    """Published names of the whole network -> tensors."""
    parts = {prefix: models.get(part + suffix) for part, prefix in STYLE_PARTS.items()}
    parts[f"{STYLE_AVERAGE}."] = models.get(STYLE_AVERAGE)
    state: Stored = {}
    for prefix, part in parts.items():
        if not isinstance(part, dict) or not all(isinstance(v, StoredTensor) for v in part.values()):
            raise _unknown(path, f"models {_some(models)} without all parts of a style network")
        state |= {f"{prefix}{key}": value for key, value in part.items()}
    return state


def _epoch(auxiliary: dict[Any, Any]) -> int | None:
    """The scheduler's count of epochs."""
    node: Any = auxiliary
    for key in ("scheduler", "encoder_optimizer", "last_epoch"):
        node = node.get(key) if isinstance(node, dict) else None
    return _small(node)


def detect(tree: Any, path: Path) -> tuple[Format, ...]:
    """The formats that the content can be of, the most likely one first. Raises UserError for none."""
    if isinstance(tree, dict) and isinstance(tree.get("models"), dict) and "generator" in tree["models"]:
        return ("soft-introvae-style",)
    state, _ = _state(tree, path)
    if "encoder.conv.0.weight" in state and "decoder.model.0.weight" in state:
        return ("soft-introvae-3d",)
    if "encoder.main.input.weight" in state:
        return ("soft-introvae-2d",)
    if "encoder.main.0.weight" not in state:
        raise _unknown(path, f"first entries {_some(state)}")
    if any(key.startswith("target_decoder.") for key in state):
        return ("soft-introvae-bootstrap",)
    if isinstance(_saved(tree), Inert):
        return ("introvae",)
    # The same names in both: the order of operations within a block is not in a state dict. Only IntroVAE's code has
    # 1x1 convolutions between equal widths.
    either: tuple[Format, Format] = ("soft-introvae-residual", "introvae")
    return either[::-1] if _has_equal_width_skip(state) else either


def _has_equal_width_skip(state: Stored) -> bool:
    skips = (tensor.shape for key, tensor in state.items() if key.endswith(".conv_expand.weight"))
    return any(len(shape) == 4 and shape[0] == shape[1] for shape in skips)


def _saved(tree: Any) -> Any:
    """What stands for the network in the file."""
    return tree["model"] if isinstance(tree, dict) and "model" in tree else tree


def _state(tree: Any, path: Path) -> tuple[Stored, int | None]:
    """The network's state dict and the epoch, if it is told."""
    saved = _saved(tree)
    if isinstance(saved, Inert):
        if saved.name != ("networks", "IntroVAE"):
            raise _unknown(path, f"an object of class {shown('.'.join(saved.name))}")
        saved = dict(_module_state(saved))
    if not isinstance(saved, dict) or not saved or not all(isinstance(v, StoredTensor) for v in saved.values()):
        raise _unknown(path, f"entries {_some(saved)}" if isinstance(saved, dict) else f"a {type(saved).__name__}")
    if not all(isinstance(key, str) for key in saved):
        raise _unknown(path, f"entries {_some(saved)}")
    epoch = tree.get("epoch") if isinstance(tree, dict) else None
    return saved, _small(epoch)


def _small(number: Any) -> int | None:
    return number if isinstance(number, int) and 0 <= number < 10**9 else None


def _module_state(module: Inert) -> Iterator[tuple[str, Any]]:
    """What state_dict() of a pickled torch module would give."""
    todo, visited = [("", module)], 0
    while todo:
        prefix, here = todo.pop()
        visited += 1
        if visited > MOST_MODULES:  # also what contains itself ends here
            raise UserError(f"the pickled network has more than {MOST_MODULES} modules", "get the file again")
        for group in ("_parameters", "_buffers"):
            for name, value in _entries(here, group):
                if value is not None:
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", m) for name, m in _entries(here, "_modules") if isinstance(m, Inert)]
        todo.extend(children[::-1])


def _entries(module: Inert, group: str) -> Iterable[tuple[Any, Any]]:
    found = module.get(group)
    return found.items() if isinstance(found, dict) else ()


def _fit(kind: Format, state: Stored, path: Path) -> Published:
    """Matches the file's entries with ours, by name and shape. Raises UserError with what does not fit."""
    family = FAMILIES[kind]
    unused = [key for key in state if _left_aside(kind, key)]
    offered = {key: stored for key, stored in state.items() if key not in set(unused)}
    strangers = [key for key in offered if not published_keys.belongs(family, key)]
    if strangers:
        raise UserError(
            f"{path} has {len(strangers)} entries that no {kind} network has: {_some(strangers)}",
            "check --format, or get the checkpoint again",
        )
    config = _config(family, published_keys.settings(family, {k: s.shape for k, s in offered.items()}))
    with torch.device("meta"):  # shapes without memory: what the file claims is not allocated before it fits
        own = config.build().state_dict()
    table = published_keys.names(family, offered.keys())
    theirs = {table[key]: stored for key, stored in offered.items()}
    missing = [name for name in own if name not in theirs]
    lacking = [name for name in missing if not name.endswith(COUNTER)]
    extra = [key for key in offered if table[key] not in own]
    wrong = [
        f"{key} {stored.shape} instead of {tuple(own[table[key]].shape)}"
        for key, stored in offered.items()
        if table[key] in own and stored.shape != tuple(own[table[key]].shape)
    ]
    wrong += [
        f"{key} {stored.storage.dtype}"
        for key, stored in offered.items()
        if table[key] in own and stored.storage.dtype.is_floating_point != own[table[key]].is_floating_point()
    ]
    if lacking or extra or wrong:
        parts = [f"{what}: {_some(keys)}" for what, keys in
                 (("missing", lacking), ("in excess", extra), ("of the wrong kind", wrong)) if keys]  # fmt: skip
        raise UserError(
            f"{path} does not make up a {kind} network; {'; '.join(parts)}",
            "check --format, or get the checkpoint again",
        )
    return Published(kind, config, {}, None, None, used=table, unused=unused, missing=missing)


def _left_aside(kind: Format, key: str) -> bool:
    """Entries that are known and have no counterpart here."""
    if kind == "soft-introvae-bootstrap" and key.startswith("target_decoder."):
        return True
    return published_keys.is_dropped(FAMILIES[kind], key)


def _config(family: published_keys.Family, settings: dict[str, Any]) -> ModelConfig:
    return CONFIGS.get(family, ResidualConfig)(**settings)


def _load(file: TorchFile, state: Stored, found: Published) -> dict[str, Tensor]:
    """The tensors under our names; counters that the file lacks are 0."""
    weights = {found.used[key]: file.tensor(stored) for key, stored in state.items() if key in found.used}
    found.nonfinite += sum(int((~torch.isfinite(t)).sum()) for t in weights.values() if t.is_floating_point())
    return weights | {name: torch.zeros((), dtype=torch.int64) for name in found.missing}


def _some(keys: Iterable[Any]) -> str:
    listed = [key if isinstance(key, str) else repr(type(key)) for key in keys]
    rest = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(shown(key) for key in listed[:MOST_NAMED]) + rest


def _unknown(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds no published network: {what}", f"known formats: {', '.join(cast(tuple[str, ...], FORMATS))}"
    )
