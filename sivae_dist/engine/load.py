"""A trained model for use: `sivae_dist.load(path)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist import counters
from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import RunConfig, from_dict
from sivae_dist.engine.draws import own_draws
from sivae_dist.engine.precision import Precision, wide
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, DecoderDraws, Posterior
from sivae_dist.models.style.styled import StyledDecoder

Noise = Literal["random", "fixed", "off"]
Use = Literal["fp32", "bf16"]


class Trained:
    """A model in evaluation mode. Images are (B, C, H, W) in `input_range`, results at least float32 and on `device`.

    Inputs may lie anywhere; they are moved and taken `batch` at a time, which changes no result but by rounding.

    condition: (B, classes) one-hot, see `condition()`; None for unconditional models.
    noise:     of a decoder that adds noise maps: random (seeded; every sample its own), fixed (the same for all), off.
               Other decoders do not mind.
    truncation_psi: for models with styles: 1 changes nothing, less trades variety for typical images. None: 1.
    """

    def __init__(
        self, model: Autoencoder, config: RunConfig, nimg: int, *, precision: Use = "fp32", batch: int = 32
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}, expected 1 or more", "32 is usual")
        self.model, self.config, self.nimg, self.batch = model.eval().requires_grad_(False), config, nimg, batch
        self.input_range = model.input_range
        if isinstance(model.decoder, StyledDecoder):
            model.decoder.hold_average()  # looking at a model does not change it
        self.precision = Precision(precision, self.device.type)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @property
    def has_styles(self) -> bool:
        """Whether `styles`, `synthesise` and truncation exist."""
        return isinstance(self.model.decoder, StyledDecoder)

    def condition(self, label: int | Tensor | None, n: int) -> Tensor | None:
        """(n, classes) one-hot of a class, or of n of them; None for an unconditional model.

        Raises UserError for a label that the model has no class for, for a label too many and for a missing one.
        """
        classes = self.model.condition_dim
        if classes == 0:
            if label is None:
                return None
            raise UserError("a label was given, and the model is unconditional", "leave the label out")
        if label is None:
            raise UserError("the model is conditional and needs a label", f"give one from 0 to {classes - 1}")
        labels = torch.as_tensor(label, dtype=torch.int64).expand(n)
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise UserError(f"the label {wrong} is no class of the model", f"give one from 0 to {classes - 1}")
        return functional.one_hot(labels, classes).to(self._dtype)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """x (B, *sample_shape) -> Posterior(mu, logvar), each (B, *latent shape)."""
        parts = [self._encode(*part) for part in self._parts(x, condition)]
        return Posterior(torch.cat([p.mu for p in parts]), torch.cat([p.logvar for p in parts]))

    def decode(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        *,
        truncation_psi: float | None = None,
        noise: Noise = "fixed",
        seed: int = 0,
        first: int = 0,
    ) -> Tensor:
        """z (B, *latent shape) -> x_hat (B, *sample_shape), clamped to input_range.

        seed, first: key random noise; z[i] gets that of sample number first + i.
        """
        if truncation_psi is not None:
            if condition is not None:
                raise UserError("there is no conditional model with styles", "leave condition or truncation out")
            return self.synthesise(self.styles(z, truncation_psi=truncation_psi), noise=noise, seed=seed, first=first)
        parts = self._parts(z, condition)
        return self._decoded(
            parts, lambda p, draws: self.model.decode(p[0], p[1] if p[1:] else None, draws), noise, seed, first
        )

    def sample(
        self,
        n: int,
        seed: int = 0,
        condition: Tensor | None = None,
        *,
        truncation_psi: float | None = None,
        noise: Noise = "random",
        first: int = 0,
    ) -> Tensor:
        """Samples number first ... first + n - 1 of the prior. Each is a function of (seed, its number) alone."""
        z = self.z(n, seed, first=first)
        return self.decode(z, condition, truncation_psi=truncation_psi, noise=noise, seed=seed, first=first)

    def z(self, n: int, seed: int = 0, *, first: int = 0) -> Tensor:
        """The codes of these samples, (n, *latent shape)."""
        numbers = torch.arange(first, first + n, device=self.device)
        eps = counters.normal(counters.key(seed, "sample"), numbers, self.model.prior.shape, self._dtype)
        return self.model.prior.sample(eps)

    def reconstruct(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        noise: Noise = "fixed",
        posterior_sample: bool = False,
        seed: int = 0,
        first: int = 0,
    ) -> Tensor:
        """decode(mean of encode(x)), or of a code drawn from the posterior, keyed by (seed, first + place in x)."""
        posterior = self.encode(x, condition)
        z = posterior.mu
        if posterior_sample:
            numbers = torch.arange(first, first + len(x), device=z.device)
            key = counters.key(seed, "posterior sample")
            z = posterior.sample(counters.normal(key, numbers, self.model.prior.shape, z.dtype))
        return self.decode(z, condition, noise=noise, seed=seed, first=first)

    def styles(self, z: Tensor, *, truncation_psi: float | None = None) -> Tensor:
        """z (B, *latent shape) -> styles (B, layers, style size), truncated. Raises UserError where there are none."""
        decoder, parts = self._styled(), []
        for (z_part,) in self._parts(z):
            with torch.no_grad(), self.precision.autocast():
                parts.append(wide(decoder.styles(z_part)))
        styles = torch.cat(parts)
        return styles if truncation_psi is None else self.truncate(styles, truncation_psi)

    @torch.no_grad()
    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        """Styles pulled towards the model's average one. Raises UserError as `styles`, and for psi outside 0 to 2."""
        decoder = self._styled()
        if not 0 <= psi <= 2:
            raise UserError(f"truncation psi is {psi}, expected 0 to 2", "0.7 is usual")
        return decoder.truncate(styles, psi)

    def synthesise(self, styles: Tensor, *, noise: Noise = "fixed", seed: int = 0, first: int = 0) -> Tensor:
        """Styles (B, layers, style size) -> x_hat (B, *sample_shape), clamped. Raises UserError as `styles`."""
        decoder = self._styled()
        parts = self._parts(styles)
        return self._decoded(parts, lambda p, draws: decoder.synthesise(p[0], draws), noise, seed, first)

    def style_resolutions(self) -> list[int]:
        """Pixels a side at which each style in use acts, the coarsest first. Raises UserError as `styles`."""
        return self._styled().style_resolutions()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _styled(self) -> StyledDecoder:
        if isinstance(self.model.decoder, StyledDecoder):
            return self.model.decoder
        raise UserError(
            f"the model ({self.config.model.name}) has no styles, so neither truncation nor mixing nor a style space",
            "leave these options out, or take a model with styles, such as model.name style",
        )

    def _parts(self, *tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        """The tensors `batch` rows at a time on the device; None is left out. No rows give one empty part."""
        given = [tensor for tensor in tensors if tensor is not None]
        for start in range(0, max(1, len(given[0])), self.batch):
            yield tuple(t[start : start + self.batch].to(self.device, self._dtype) for t in given)

    @torch.no_grad()
    def _encode(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        with self.precision.autocast():
            posterior = self.model.encode(x, condition)
        return Posterior(wide(posterior.mu), wide(posterior.logvar))

    def _silence(self) -> AbstractContextManager[None]:
        decoder = self.model.decoder
        return decoder.silenced() if isinstance(decoder, StyledDecoder) else nullcontext()

    @torch.no_grad()
    def _decoded(
        self,
        parts: Iterator[tuple[Tensor, ...]],
        decode: Callable[[tuple[Tensor, ...], DecoderDraws | None], Tensor],
        noise: Noise,
        seed: int,
        first: int,
    ) -> Tensor:
        images = []
        with self._silence() if noise == "off" else nullcontext():
            for part in parts:
                draws = None
                if noise == "random" and self.model.stochastic:
                    numbers = torch.arange(first, first + len(part[0]), device=self.device)
                    draws = own_draws(seed, "sample", numbers, self._dtype, from_prior=False)
                first += len(part[0])
                with self.precision.autocast():
                    x_hat = decode(part, draws)
                images.append(wide(x_hat))
        joined = torch.cat(images)
        return joined.clamp(*self.input_range) if self.input_range is not None else joined


def load(
    path: str | Path,
    *,
    average: bool = True,
    device: str | torch.device = "cpu",
    precision: Use = "fp32",
    batch: int = 32,
) -> Trained:
    """A model from a run folder (its latest checkpoint) or a checkpoint folder.

    average: the averaged weights (EMA) rather than the current ones. device: also "auto", CUDA if there is any.
    precision, batch: number format of the networks' computations, images computed at once.
    Raises UserError when there is no readable checkpoint or no such device.
    """
    folder = Path(path)
    found = folder if (folder / "files.json").is_file() else checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise UserError(f"there is no checkpoint in {folder}", "give a run folder or one of its checkpoints")
    saved = checkpoint.read(found)
    config = from_dict(saved.state.get("config", {}), f"{found}/state.json")
    model = config.model.build()
    checkpoint.load_weights(model, saved.tensors["ema" if average else "weights"], str(found))
    if config.progressive.enabled:  # a model that still grows is used at the level it has reached
        stage = config.progressive.at(max(0, saved.nimg - 1), model.levels)
        model.set_level(stage.level, stage.blend)
    return Trained(_moved(model, str(device)), config, saved.nimg, precision=precision, batch=batch)


def _moved(model: Autoencoder, device: str) -> Autoencoder:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; CUDA that is not there
        if "out of memory" in str(error).lower():
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"the device {device!r} cannot be used: {reason}", "use cpu, cuda or cuda:1") from None
