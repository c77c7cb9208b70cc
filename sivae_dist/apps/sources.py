"""What the tools start from: pictures of folders, shards and files, and codes of seeds and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_dist.data.base import HostBatch, resized
from sivae_dist.data.decode import open_image, prepare
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.pyramid import level_for
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import Access, open_store
from sivae_dist.engine.load import Noise, Trained
from sivae_dist.errors import UserError
from sivae_dist.files import expanded


@dataclass(frozen=True)
class Picture:
    """A picture as the model takes it. x: (1, C, S, S) in its input range; given: (width, height) of the original."""

    name: str
    x: Tensor
    label: int | None
    given: tuple[int, int]

    @property
    def changed(self) -> bool:
        """Whether it had to be cropped or resized."""
        return self.given != (self.x.shape[-1], self.x.shape[-2])


def image_range(trained: Trained) -> tuple[float, float]:
    """The input range. Raises UserError for a model of anything but square pictures, grey or RGB."""
    shape = trained.model.sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or trained.input_range is None:
        raise UserError(
            f"the model ({trained.config.model.name}) makes data of shape {shape}, not pictures",
            "`sivae-dist sample` writes its samples as .npy or .csv; in Python, sivae_dist.load does the rest",
        )
    return trained.input_range


def pictures(where: Sequence[str], trained: Trained, *, limit: int = 0) -> Iterator[Picture]:
    """Pictures of files, of a folder (sub-folders included, in order of name) or of a packed data set, in this order.

    Files and folders go the packer's way: upright, centre square, Lanczos. Of a packed data set the held-out split is
    read, or all when it has none; larger ones are averaged down as in training. Of one packed at several resolutions it
    is that of the model (at its finest level). limit: at most so many; 0 is all.
    Raises UserError.
    """
    image_range(trained)
    count = 0
    for text in where:
        for picture in _of(text, trained):
            yield picture
            count += 1
            if limit and count >= limit:
                return
    if not count:
        raise UserError(f"there are no pictures in {', '.join(where) or 'nothing'}", "give picture files or folders")


def code_of(source: str, trained: Trained, label: int | None = None) -> tuple[Tensor, Picture | None]:
    """(1, *latent shape): sample 0 of a seed (a whole number), or the mean code of a picture (a path)."""
    if source.isdecimal():
        return trained.z(1, int(source)), None
    if source.lstrip("-").isdecimal():
        raise UserError(f"the seed {source} is negative", "seeds are whole numbers from 0")
    if not Path(source).is_file():
        raise UserError(f"{source!r} is neither a seed nor a picture file", "give whole numbers or paths")
    (picture,) = pictures([source], trained, limit=1)
    return trained.encode(picture.x, trained.condition(label, 1)).mu, picture


def name_of(source: str) -> str:
    """What a label calls a source."""
    return f"seed {source}" if source.isdecimal() else Path(source).stem


def described(trained: Trained, *, psi: float | None = None, noise: Noise | None = None, label: str = "") -> str:
    """What a title says of the model and its settings."""
    parts = [f"{trained.config.model.name} {trained.model.sample_shape[-1]} px at {trained.nimg / 1000:g} kimg"]
    if psi is not None:
        parts.append(f"psi {psi:g}")
    if noise is not None and trained.model.stochastic:
        parts.append(f"noise {noise}")
    return ", ".join([*parts, *([label] if label else [])])


def _of(text: str, trained: Trained) -> Iterator[Picture]:
    path, remote = expanded(text), "://" in text
    packed = level_for(text, trained.model.finest_shape[-1], Access(cache_gb=0)) if remote or path.is_dir() else text
    if remote or packed != text or (path / FILE_NAME).is_file():
        yield from _packed(packed, trained)
    elif path.is_dir():
        source = FolderSource(path)
        for item in source.items():
            yield _file(path / str(item.meta["file"]), item.key, trained)
    elif path.is_file():
        yield _file(path, path.stem, trained)
    else:
        raise UserError(f"there is no file or folder {text!r}", "give pictures, a folder of them, or a packed data set")


def _file(path: Path, name: str, trained: Trained) -> Picture:
    channels, side, _ = trained.model.sample_shape
    try:
        with open_image(path) as image:
            pixels = np.asarray(prepare(image, side, channels))
            given = image.size
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.fix) from None
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} cannot be read: {error}", "mend, replace or remove it") from None
    data = torch.from_numpy(pixels.transpose(2, 0, 1).copy() if pixels.ndim == 3 else pixels[None].copy())
    return Picture(name, _in_range(data, trained), None, given)


def _packed(url: str, trained: Trained) -> Iterator[Picture]:
    store = open_store(url)
    try:
        manifest = load_manifest(store)
        channels, side, _ = trained.model.sample_shape
        if manifest.channels != channels or manifest.resolution % side:
            what = f"{url} holds {manifest.resolution} px pictures of {manifest.channels} channels"
            wanted = f"the model wants {channels} channels and {side} px, or a multiple to average down"
            raise UserError(f"{what}; {wanted}", "give a folder of the original pictures")
        shards = manifest.of("val") or manifest.shards
        reader = ShardReader(store, manifest, shards)
        for number, shard in enumerate(shards):
            for i in range(shard.count):
                sample = reader.read(number, i)
                x = resized(_in_range(torch.from_numpy(sample.image), trained), side)
                yield Picture(sample.key, x, sample.label, (manifest.resolution, manifest.resolution))
    finally:
        store.close()


def _in_range(data: Tensor, trained: Trained) -> Tensor:
    """(C, H, W) uint8 -> (1, C, H, W) in the model's input range."""
    batch = HostBatch(data[None], torch.zeros(1, dtype=torch.int64))
    return batch.to(torch.device("cpu"), trained.input_range).x
