"""What an objective is: a sequence of phases, each a pure function from networks and data to per-sample terms.

An objective imports only torch. It never calls backward() or item(), and never learns of ranks, devices, precision or
optimizers: the engine owns those. Everything it needs comes in as callables:

    players.encoder(x) -> posterior with .mu and .logvar, each (B, ...)       x: (B, ...) in the model's input range
    players.decoder(z, name, from_prior=False) -> x_hat (B, ...); name and from_prior matter to a decoder that draws
                          random numbers itself (see Decoder)
    players.prior      -> .mu and .logvar of the diagonal Gaussian prior (floats or tensors), .shape of one latent
    noise(name)        -> standard normal (B, *prior.shape); the same name gives the same draw within an iteration
    batch_mean(v)      -> the mean of a (B,) tensor over the whole batch on all ranks, detached (for the published
                          hinge, which acts on the batch mean)

"mean" always means: sum over the data dimensions, mean over the batch. Units: rec in squared (or absolute) input units
summed over the data dimensions, kl in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Gaussian(Protocol):
    """Diagonal Gaussian, as an encoder returns it."""

    @property
    def mu(self) -> Tensor: ...  # noqa: D102

    @property
    def logvar(self) -> Tensor: ...  # noqa: D102


class Prior(Protocol):
    """Diagonal Gaussian prior N(mu, exp(logvar)) over latents of `shape`."""

    @property
    def mu(self) -> float | Tensor: ...  # noqa: D102

    @property
    def logvar(self) -> float | Tensor: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


class Decoder(Protocol):
    """z (B, ...) -> x_hat (B, ...), with what a decoder that draws noise maps or mixes styles needs to know.

    name: of the draw that made z. The same name gives the same draws within an iteration, so decoding the same z once
    more under its name makes the same image. from_prior: z is a sample from the prior, not the code of an image.
    """

    def __call__(self, z: Tensor, name: str = "", *, from_prior: bool = False) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Players:
    """The two networks and the prior, as the objective sees them."""

    encoder: Callable[[Tensor], Gaussian]
    decoder: Decoder
    prior: Prior


@dataclass(frozen=True)
class Draws:
    """All outside help a phase gets besides the networks and the data."""

    noise: Callable[[str], Tensor]
    batch_mean: Callable[[Tensor], Tensor] = lambda per_sample: per_sample.detach().mean()


@dataclass
class Terms:
    """What a phase returns.

    loss:  (B,) what the phase minimises; the engine takes sum(loss) / global batch.
    named: (B,) each, detached: rec, kl_real, kl_rec, kl_fake, exp_elbo_rec, ... for reports and tests.
    carry: detached tensors handed to the later phases of the same iteration (the z that the decoder phase reuses).
    """

    loss: Tensor
    named: dict[str, Tensor]
    carry: dict[str, Tensor] = field(default_factory=dict)


PhaseFunction = Callable[[Players, Tensor, Draws, dict[str, Tensor]], Terms]


@dataclass(frozen=True)
class Phase:
    """One optimisation step within an iteration.

    trains:     players that step ("encoder", "decoder"); the others are frozen but differentiated through.
    loss:       the pure function (players, x_real, draws, carry) -> Terms.
    statistics: players whose batch-norm running statistics move in this phase. All networks always use batch statistics
                while training, the frozen one too, as published.
    decoded_again: names of draws whose z a later phase of the iteration decodes once more, under the same name and with
                the same weights of the decoder, which this phase does not train. Whoever runs the phases may keep it.
    """

    name: str
    trains: tuple[str, ...]
    loss: PhaseFunction
    statistics: tuple[str, ...] = ("encoder", "decoder")
    decoded_again: tuple[str, ...] = ()


@dataclass
class Strength:
    """The one number of an objective that may be changed between iterations: it decides where the KL of fakes settles.

    The phases stay pure: they read `value` and never write it.

    name:    the configuration field it starts from and stands in for ("beta_neg", "margin").
    value:   what the phases use.
    settles: (kl in nats, mean rec of fakes) -> the value with which fakes settle at about that KL.
    """

    name: str
    value: float
    settles: Callable[[float, float], float]


class Objective(Protocol):
    """A built objective."""

    @property
    def strength(self) -> Strength | None:
        """What may be adjusted between iterations; None where nothing can."""
        ...

    def phases(self, nimg: int) -> tuple[Phase, ...]:
        """The phases of the iteration that starts after `nimg` images (warm-ups make this depend on nimg)."""
        ...


@dataclass(frozen=True)
class ObjectiveConfig:
    """Base of every objective's configuration; `name` selects the class."""

    name: str = ""

    def build(self, sample_shape: tuple[int, ...], **_: Any) -> Objective:
        """sample_shape: shape of one data sample, e.g. (3, 256, 256); its size sets the published loss scale."""
        raise NotImplementedError
