"""A published checkpoint becomes a run folder: sivae_dist.load, evaluate, and train (which goes on from it) take it."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import RunConfig, from_dict, merge, read_yaml, to_dict, to_yaml
from sivae_dist.engine.run_folder import RunFolder, environment
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically, write_json
from sivae_dist.interop import published
from sivae_dist.interop.published import Format, Published
from sivae_dist.models import ModelConfig

# A format's settings where no recipe tells more: the defaults of the public code.
DEFAULTS: dict[Format, dict[str, Any]] = {
    "introvae": {"objective": {"name": "introvae"}},
    "soft-introvae-2d": {"objective": {"scale": 0.5}},
    "soft-introvae-style": {
        "objective": {
            "beta_kl": 0.2,
            "beta_rec": 0.1,  # FFHQ; CelebA-HQ 0.05 (see the recipes)
            "beta_neg": 512,
            "scale": 5e-6,
            "decoder_z": "reencode",
            "draws": "fresh",
        },
        "optim": {
            "name": "lreq_adam",
            "encoder": {"lr": 0.0015, "beta1": 0.0, "beta2": 0.99},
            "decoder": {"lr": 0.0015, "beta1": 0.0, "beta2": 0.99},
        },
    },
}


@dataclass(frozen=True)
class Imported:
    """What was imported, and where to. assumed: whether the images seen were chosen here, for a recipe that grows."""

    found: Published
    config: RunConfig
    checkpoint: Path
    assumed: bool = False


def import_published(
    path: Path,
    out: Path,
    *,
    format: Format | None = None,
    recipe: Path | None = None,
    data_url: str = "",
    kimg: float | None = None,
) -> Imported:
    """Reads a published file and writes a run folder with one checkpoint.

    format: None tells it from the content. recipe: a YAML whose sections besides `model` the run gets; its model must
    be the file's. data_url: shards to evaluate or train on. kimg: thousand images the network has seen, which files do
    not tell; None: none, or where the recipe grows the network, as many as it takes to be at full size. Raises
    UserError for what cannot be imported, and for a folder that holds a run already.
    """
    if kimg is not None and not 0 <= kimg < 1e12:
        raise UserError(f"--kimg is {kimg}, expected a number of thousand images", "leave it out when it is not known")
    folder = RunFolder(out)
    if folder.config.exists() or checkpoint.complete(folder.checkpoints):
        raise UserError(f"{out} already holds a run", "choose another --out, or remove that folder")
    found = published.read(path, format)
    config = _config(found, recipe, data_url)
    model = config.model.build()
    nimg = _images_seen(config, model.levels, kimg)
    checkpoint.load_weights(model, found.weights, str(path))
    average = copy.deepcopy(model)
    if found.average is not None:
        checkpoint.load_weights(average, found.average, str(path))
    facts = {
        "file": path.name,
        "sha256": _sha256(path),
        "format": found.format,
        "epoch": found.epoch,
        "average": found.average is not None,
        "used": found.used,
        "unused": found.unused,
        "missing": found.missing,
        "nonfinite_values": found.nonfinite,
    }
    state = {
        "plan_salt": 0,
        "sums": {},
        "metrics": {},
        "data": "",  # not known; see engine.resume
        "config": to_dict(config),
        "imported": {key: facts[key] for key in ("file", "sha256", "format", "epoch")},
    }
    folder.create()
    try:
        write_atomically(folder.config, to_yaml(config))
        write_json(folder.manifest, {**environment(), "imported": facts})
        write_json(folder.root / "imported.json", facts)
        written = checkpoint.write(folder.checkpoints, checkpoint.snapshot(nimg, model, average, {}, state))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "make room, or choose another --out") from error
    return Imported(found, config, written, assumed=kimg is None and config.progressive.enabled)


def _images_seen(config: RunConfig, levels: int, kimg: float | None) -> int:
    """Where the run stands. Raises UserError for a `kimg` at which the recipe would still use a coarser network.

    The weights of published files are those of all levels, so what a network that grows shows follows from this alone.
    """
    told = 0 if kimg is None else round(kimg * 1000)
    if not config.progressive.enabled:
        return told
    needed = config.progressive.grown(levels)
    if kimg is None:
        return needed
    if told < needed:
        raise UserError(
            f"--kimg is {kimg:g}, but the recipe grows the network, which is at full size from {needed / 1000} kimg on",
            f"give --kimg {needed / 1000} or more, leave it out, or set progressive.enabled to False in the recipe",
        )
    return told


def _config(found: Published, recipe: Path | None, data_url: str) -> RunConfig:
    """The recipe's sections, or the format's defaults, around the file's model."""
    values = read_yaml(recipe) if recipe is not None else copy.deepcopy(DEFAULTS.get(found.format, {}))
    told = values.pop("model", None)
    if data_url:
        values = merge(values, {"data": {"url": data_url}})
    values["model"] = {"name": found.model.name}
    config = replace(from_dict(values, str(recipe or "the defaults")), model=found.model)
    if told is not None:
        other = from_dict({"model": told}, str(recipe)).model
        if other != found.model:
            raise UserError(
                f"the model of {recipe} is not the file's: {_difference(other, found.model)}",
                "give the recipe of this network, or none",
            )
    return config


def _difference(told: ModelConfig, found: ModelConfig) -> str:
    if type(told) is not type(found):
        return f"model.name is {told.name}, in the file {found.name}"
    pairs = [(f.name, getattr(told, f.name), getattr(found, f.name)) for f in fields(told)]
    return ", ".join(f"model.{name} is {a}, in the file {b}" for name, a, b in pairs if a != b)


def describe(done: Imported) -> list[str]:
    """The report for people; imported.json lists every key."""
    found = done.found
    lines = [f"{found.format}: {_network(found.model)}"]
    lines.append(f"used     {len(found.used)} entries of the file" + _averages(found))
    if found.unused:
        lines.append(f"unused   {_grouped(found.unused)}")
    if found.missing:
        lines.append(f"missing  {_grouped(found.missing)}, set to 0")
    if found.nonfinite:
        lines.append(f"WARNING  {found.nonfinite} values are NaN or infinite")
    if found.epoch is not None:
        lines.append(f"epoch    {found.epoch}, as the file says; images seen: {done.checkpoint.name}")
    if done.assumed:
        seen = checkpoint.nimg_of(done.checkpoint) / 1000
        lines.append(f"images   {seen} kimg are taken as seen: from there on the recipe has the network at full size")
    lines.append(f"written  {done.checkpoint}")
    return lines


def _averages(found: Published) -> str:
    return ", and averaged weights" if found.average is not None else "; no averaged weights, both are the same"


def _network(model: ModelConfig) -> str:
    shown = {f.name: getattr(model, f.name) for f in fields(model)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _grouped(keys: list[str]) -> str:
    """Keys by their first word: target_decoder.* (91)."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{word}.* ({count})" for word, count in counts.items())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
