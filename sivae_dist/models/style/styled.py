"""What every style-based decoder does before it draws: latent to styles, mixing, average style, truncation; and noise.

Applications that mix, interpolate or truncate styles need a `StyledDecoder` and nothing of how it draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sivae_dist import counters
from sivae_dist.models.base import DecoderDraws
from sivae_dist.models.style.layers import Mapping, lr_multipliers, unit_second_moment, wide

MapNoise = Literal["random", "batch_constant", "fixed", "off"]
AverageUpdates = Literal["training", "published"]


def noise_map(
    kind: MapNoise,
    size: tuple[int, int],
    name: str,
    draws: DecoderDraws | None,
    *,
    like: Tensor,
    shared: bool = False,
) -> Tensor | None:
    """A noise map of size (H, W): (B or 1, 1, H, W), on the device of `like`; None where there is none.

    random: one for every sample; batch_constant: one for the whole global batch; fixed: always the same; off: none.
    Without draws the first two give the fixed map. shared: random counts as batch_constant.
    """
    if kind == "off":
        return None
    shape = (1, *size)
    if kind == "fixed" or draws is None:
        only = torch.zeros(1, dtype=torch.int64, device=like.device)
        return counters.normal(counters.key(0, "fixed noise", name), only, shape, wide(like[:0]).dtype)
    if kind == "batch_constant" or shared:
        return draws.shared_normal(name, shape)
    return draws.normal(name, shape)


class StyledDecoder(nn.Module):
    """z (B, latent_size) -> styles, one a layer from coarse to fine -> x_hat (B, C, S, S), unbounded.

    mapping: the network from z to a style. layers: styles it takes at its finest level.
    mixing_prob: how often a batch of prior samples takes its finer layers' style from a second z, in training.
    average_beta: weight of the old value when the average style moves; average_updates: when it does (training: every
    decoding in training; published: in evaluation, too). truncation_cutoff: layers on which truncation acts.
    dlatent_avg (layers, latent_size): running average of the mapped z, towards which truncation pulls.
    """

    dlatent_avg: Tensor

    def __init__(
        self,
        mapping: Mapping,
        *,
        layers: int,
        latent_size: int,
        mixing_prob: float,
        average_beta: float,
        average_updates: AverageUpdates,
        truncation_cutoff: int,
    ) -> None:
        super().__init__()
        self.mapping = mapping
        self.mixing_prob, self.truncation_cutoff = mixing_prob, truncation_cutoff
        self.average_beta, self.average_updates = average_beta, average_updates
        self.register_buffer("dlatent_avg", torch.zeros(layers, latent_size))

    @property
    def layers_in_use(self) -> int:
        """Layers that the present resolution has."""
        return len(self.dlatent_avg)

    def style_resolutions(self) -> list[int]:
        """Pixels a side at which each layer in use acts, the coarsest first."""
        raise NotImplementedError

    def running_averages(self) -> Iterator[tuple[Tensor, float]]:
        """See `models.averages`."""
        yield self.dlatent_avg, self.average_beta

    def hold_average(self) -> None:
        """From now on decoding in evaluation mode moves no average, whatever average_updates was."""
        self.average_updates = "training"

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Inside, no noise maps are added. The published stand-in for noise, which is no map, stays."""
        kinds = ("random", "batch_constant", "fixed")
        noisy: list[Any] = [module for module in self.modules() if getattr(module, "noise", None) in kinds]
        before = [m.noise for m in noisy]
        try:
            for module in noisy:
                module.noise = "off"
            yield
        finally:
            for module, noise in zip(noisy, before, strict=True):
                module.noise = noise

    def lr_multipliers(self) -> dict[str, float]:
        """Parameter name -> learning-rate multiplier; parameters that are not named count 1."""
        return lr_multipliers(self)

    def forward(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        draws: DecoderDraws | None = None,
        *,
        truncation_psi: float | None = None,
    ) -> Tensor:
        """Decodes. There is no conditional variant.

        draws: noise maps and style mixing; without them the result is a function of z alone.
        truncation_psi: weight of z's own style against the average one in the coarse layers; None truncates nothing.
        """
        styles = self.styles(z, draws)
        if truncation_psi is not None:
            styles = self.truncate(styles, truncation_psi)
        return self.synthesise(styles, draws)

    def map(self, z: Tensor) -> Tensor:
        """z (B, latent_size), brought to unit second moment, through the mapping network: w (B, latent_size)."""
        w: Tensor = self.mapping(unit_second_moment(z))
        return w

    def styles(self, z: Tensor, draws: DecoderDraws | None = None) -> Tensor:
        """One style a layer, (B, layers, latent_size), mixed where that is due. Moves the running average."""
        w = self.map(z)
        self._move_average(w, draws)
        styles = w[:, None].expand(-1, len(self.dlatent_avg), -1)
        # Only in training, and only samples from the prior: the code of an image must give that image.
        if draws is None or not self.training or not draws.from_prior or draws.uniform("mixing") >= self.mixing_prob:
            return styles
        in_use = self.layers_in_use
        cutoff = 1 + int(draws.uniform("mixing_cutoff") * in_use)  # 1 ... in_use; the last leaves all layers alone
        other = self.map(draws.normal("z2", z.shape[1:]).to(z.dtype))
        return torch.where(self._layer() < cutoff, styles, other[:, None])

    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        """average + psi (style - average) in the first `truncation_cutoff` layers (psi 1 changes nothing)."""
        average = self.dlatent_avg.to(styles.dtype)
        return torch.where(self._layer() < self.truncation_cutoff, torch.lerp(average, styles, psi), styles)

    def synthesise(self, styles: Tensor, draws: DecoderDraws | None = None) -> Tensor:
        """styles (B, layers, latent_size) -> x_hat (B, C, S, S)."""
        raise NotImplementedError

    def _layer(self) -> Tensor:
        return torch.arange(len(self.dlatent_avg), device=self.dlatent_avg.device)[None, :, None]

    @torch.no_grad()
    def _move_average(self, w: Tensor, draws: DecoderDraws | None) -> None:
        """average <- beta average + (1 - beta) batch mean of w, over all ranks. Non-finite ones are passed by."""
        if not self.training and self.average_updates == "training":
            return
        w = wide(w)
        mean = w.mean(dim=0) if draws is None else draws.batch_mean(w)
        moved = torch.lerp(mean.to(self.dlatent_avg.dtype), self.dlatent_avg, self.average_beta)
        self.dlatent_avg.copy_(torch.where(mean.isfinite().all(), moved, self.dlatent_avg))
