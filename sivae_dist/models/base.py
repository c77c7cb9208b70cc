"""What a model is: two modules, a prior and the range of its input."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from sivae_dist.errors import UserError
from sivae_dist.models.posterior import Posterior, Prior


class DecoderDraws(Protocol):
    """Randomness for one call of a stochastic decoder on the B samples of a batch (or of this rank's part of it).

    Every draw is a function of its name; the same name gives the same draw. The caller keys them by sample number, so
    that images do not depend on ranks and repeat after a resume.
    """

    @property
    def from_prior(self) -> bool:
        """Whether z was drawn from the prior (and is not the code of an image)."""
        ...

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape), independent from sample to sample."""
        ...

    def shared_normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (1, *shape), the same for every sample of the global batch."""
        ...

    def uniform(self, name: str) -> float:
        """One number in [0, 1) for the whole global batch."""
        ...

    def batch_mean(self, rows: Tensor) -> Tensor:
        """Mean of rows (B, F) over all samples of all ranks, detached (F,)."""
        ...


class Autoencoder(nn.Module):
    """Encoder and decoder with what everyone who handles them must know.

    encoder(x (B, *sample_shape), condition | None) -> Posterior(mu, logvar), each (B, *prior.shape)
    decoder(z (B, *prior.shape), condition | None)  -> x_hat (B, *sample_shape), in `input_range`, not clamped
    condition: (B, condition_dim) one-hot or None; condition_dim 0 means unconditional.
    input_range: (low, high) of the data the model was made for; None where data have no range (2-D points).

    Optional, and different from these defaults only where an architecture says so:

    stochastic: decoder takes a third argument, DecoderDraws or None. Without draws it is deterministic.
    levels:     number of resolutions it can work at, from the coarsest (level 0) to the finest, levels - 1, at which it
                is built. `set_level` chooses; `sample_shape` follows, and x must come at that resolution.
    """

    stochastic: bool = False
    levels: int = 1

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        prior: Prior,
        sample_shape: tuple[int, ...],
        input_range: tuple[float, float] | None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prior, self.sample_shape, self.input_range = prior, sample_shape, input_range
        self.finest_shape = sample_shape  # of all levels; `sample_shape` is that of the present one
        self.condition_dim = condition_dim

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """x (B, *sample_shape) in input_range -> Posterior."""
        posterior: Posterior = self.encoder(x, condition)
        return posterior

    def decode(self, z: Tensor, condition: Tensor | None = None, draws: DecoderDraws | None = None) -> Tensor:
        """z (B, *prior.shape) -> x_hat (B, *sample_shape). draws: ignored by a decoder that is not stochastic."""
        x_hat: Tensor = self.decoder(z, condition, draws) if self.stochastic else self.decoder(z, condition)
        return x_hat

    def set_level(self, level: int, blend: float = 1.0) -> None:
        """Works at resolution `level` from now on, faded in from the level below with weight `blend` in [0, 1].

        Neither is part of the state dict: whoever trains or loads sets them. Parameters of levels that are not in use
        get no gradient (None). Raises ValueError for a level or blend that the model does not have.
        """
        if not 0 <= level < self.levels or not 0 <= blend <= 1 or (level == 0 and blend != 1):
            raise ValueError(
                f"level {level} with blend {blend}: the model has {self.levels} levels, blend is in [0, 1]"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Base of every architecture's configuration; `name` selects the class."""

    name: str = ""
    fused_operators: ClassVar[bool] = True
    """Whether the networks call operators with kernels (`sivae_dist.ops`); without, none are built for a run."""

    def at_resolution(self, size: int) -> Self:
        """The same family of networks for images of `size` pixels a side: levels are added or dropped at the fine end.

        Raises UserError for a size that the family does not have. Architectures whose widths go by level say how.
        """
        if not any(field.name == "image_size" for field in fields(self)):
            raise UserError(f"a model {self.name!r} has no resolution", "ask for it without --resolutions")
        changes: dict[str, Any] = {"image_size": size}
        return replace(self, **changes)

    def build(self) -> Autoencoder:
        """A freshly initialised model in float32 on the CPU (the caller seeds torch's generator)."""
        raise NotImplementedError
