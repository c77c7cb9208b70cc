"""Training runs of the style network: every draw of every decoder call is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from golden_files import Comparison, Golden, comparing
from runs import Net, load
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.models import DecoderDraws
from sivae_dist.objectives import Phase, Terms
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig

FLIPPED_AT_MOST = 0.01  # of the activations of a map may lie on another side in single precision
EMA_HALF_LIFE_KIMG = 10  # of the published averaging: b = 0.5^(batch / 10000)

# Our name of a draw -> (recorded phase, call), by what is drawn: z or eps, and what the decoder draws for that z.
SOFT_NOISE = {
    "z_prior": "E/fake/z",
    "z_post": "E/real/eps",
    "encoder/rec": "E/rec/eps",
    "encoder/fake": "E/fake/eps",
    "decoder/z_prior": "D/fake/z",
    "decoder/z_post": "D/real/eps",
    "decoder/rec": "D/rec/eps",
    "decoder/fake": "D/fake/eps",
}
SOFT_CALLS = {
    "z_prior": "E/fake",
    "z_post": "E/rec",
    "encoder/rec": "E/rec_rec",
    "encoder/fake": "E/rec_fake",
    "decoder/z_prior": "D/fake",
    "decoder/z_post": "D/rec",
    "decoder/rec": "D/rec_rec",
    "decoder/fake": "D/rec_fake",
}
PLAIN_NOISE, PLAIN_CALLS = {"z_post": "V/real/eps"}, {"z_post": "V/rec"}

E, D, V = "encoder", "decoder", "joint"
VALUES = {
    "E/loss_rec": (E, "rec"),
    "E/lossE_real_kl": (E, "kl_real"),
    "E/expelbo_rec": (E, "exp_elbo_rec"),
    "E/expelbo_fake": (E, "exp_elbo_fake"),
    "E/loss": (E, "loss"),
    "D/loss_rec": (D, "rec"),
    "D/lossD_rec_kl": (D, "kl_rec"),
    "D/lossD_fake_kl": (D, "kl_fake"),
    "D/loss_rec_rec": (D, "rec_rec"),
    "D/loss_fake_rec": (D, "rec_fake"),
    "D/loss": (D, "loss"),
}
ROWS = {
    "E/kl_rec": (E, "kl_rec"),
    "E/kl_fake": (E, "kl_fake"),
    "E/loss_rec_rec_e": (E, "rec_rec"),
    "E/loss_rec_fake_e": (E, "rec_fake"),
}
PLAIN_VALUES = {"V/loss_rec": (V, "rec"), "V/loss_kl": (V, "kl_real"), "V/loss": (V, "loss")}


@dataclass(frozen=True)
class RecordedDraws:
    """A decoder call's draws, from arrays under `prefix`."""

    golden: Golden
    prefix: str
    dtype: torch.dtype
    from_prior: bool = False
    mixing_choices: int = 0

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Noise maps stand in a folder of their own in training runs."""
        nested = f"{self.prefix}noise/{name}"
        drawn = self.golden.tensor(nested if nested in self.golden else self.prefix + name, self.dtype)
        assert tuple(drawn.shape[1:]) == shape
        return drawn

    def shared_normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = self.normal(name, shape)
        assert len(drawn) == 1
        return drawn

    def uniform(self, name: str) -> float:
        if name == "mixing":
            key = f"{self.prefix}mixing_u"
            return float(self.golden.value(key)) if key in self.golden else 1.0
        # The recorded cutoff is the value; 1 + floor(choices * u) must give it back.
        return (self.golden.value(f"{self.prefix}mixing_cutoff") - 0.5) / self.mixing_choices

    def batch_mean(self, rows: Tensor) -> Tensor:
        return rows.detach().mean(0)


class Trained:
    """One recorded run, ready to be repeated by the project's engine."""

    def __init__(self, golden: Golden, run: str, dtype: torch.dtype) -> None:
        self.golden, self.prefix, self.dtype = golden, f"run/{run}/", dtype
        self.cfg: dict[str, Any] = {n: golden.value(k) for n, k in golden.under(f"{self.prefix}cfg/").items()}
        self.plain = f"{self.prefix}out/V/loss" in golden
        self.net = load_style(golden, dtype, style_mixing_prob=max(0.0, self.cfg["style_mixing_prob"]))
        self.net.model.set_level(self.cfg["lod"], self.cfg["blend"])
        settings = PlayerOptim(lr=self.cfg["lr"], beta1=0, beta2=0.99)
        self.optim = OptimConfig(settings, settings, "lreq_adam")
        players = {"encoder": self.net.model.encoder, "decoder": self.net.model.decoder}
        weights = {name: self.cfg[name] for name in ("beta_rec", "beta_kl", "beta_neg", "gamma_r", "scale")}
        warmup = 1e9 if self.plain else 0
        objective = SoftIntroVaeConfig(
            **weights, decoder_z="reencode", draws="fresh", vae_warmup_kimg=warmup, vae_warmup_scale="one"
        )
        strategy = Replicated(players, self.optim.build(players))
        self.iteration = Iteration(self.net.model, objective.build(self.net.model.sample_shape), strategy)
        self.ema = Ema(EmaConfig(half_life_kimg=EMA_HALF_LIFE_KIMG, rampup=0), self.net.model)
        self.rates = {name: settings.lr for name in ("encoder", "decoder", "mapping_tl", "mapping_fl", "dlatent_avg")}
        self.terms: dict[str, dict[str, Tensor]] = {}
        self.gradients: dict[str, dict[str, Tensor]] = {}

    def _observe(self, phase: Phase, terms: Terms) -> None:
        self.terms[phase.name] = {**terms.named, "loss": terms.loss.detach()}
        players = {p: self.net.table_of(p) for p in phase.trains}
        found = self.net.gradients()
        self.gradients[phase.name] = {n: g for n, g in found.items() if any(n in t for t in players.values())}

    def iterate(self, number: int, x: Tensor) -> None:
        inputs = f"{self.prefix}in/{number}/"
        noises, calls = (PLAIN_NOISE, PLAIN_CALLS) if self.plain else (SOFT_NOISE, SOFT_CALLS)

        def noise(name: str) -> Tensor:
            return self.golden.tensor(inputs + noises[name], self.dtype)

        def drawing(name: str, from_prior: bool) -> DecoderDraws:
            assert from_prior == name.endswith("z_prior")
            choices = 2 * (self.cfg["lod"] + 1)
            return RecordedDraws(self.golden, f"{inputs}{calls[name]}/", self.dtype, from_prior, choices)

        position = torch.arange(len(x)) + number * len(x)
        self.iteration(
            Batch(x, position),
            nimg=number * len(x),
            global_batch=len(x),
            noise=noise,
            drawing=drawing,
            observe=self._observe,
        )
        self.ema.update(self.net.model, nimg=0, batch=self.cfg["ema_batch"])

    def logged(self) -> dict[str, Tensor]:
        if self.plain:
            return {name: self.terms[phase][term].mean() for name, (phase, term) in PLAIN_VALUES.items()}
        out = {name: self.terms[phase][term].mean() for name, (phase, term) in VALUES.items()}
        rows = {name: self.terms[phase][term] for name, (phase, term) in ROWS.items()}
        real = self.cfg["beta_rec"] * out["E/loss_rec"] + self.cfg["beta_kl"] * out["E/lossE_real_kl"]
        derived = {
            "E/lossE_real": self.cfg["scale"] * real,
            "E/lossE_fake": 0.25 * (out["E/expelbo_rec"] + out["E/expelbo_fake"]),
        }
        return out | rows | derived


def load_style(golden: Golden, dtype: torch.dtype, **settings: Any) -> Net:
    """The fixture's network in training mode."""
    return load("style", golden, dtype, dlatent_avg_beta=golden.value("cfg/dlatent_avg_beta"), **settings)


class Sides(TorchFunctionMode):
    """Which side of its kink every LeakyReLU was on: written down, or prescribed.

    A value within rounding of zero may fall on the other side in single precision; one such pixel of a 128-pixel map
    changes every gradient by up to 1 %. With the sides of the double run the single one can be compared tightly.
    """

    def __init__(self, prescribed: list[Tensor] | None = None) -> None:
        super().__init__()
        self.written: list[Tensor] = []
        self.prescribed = None if prescribed is None else iter(prescribed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.leaky_relu:
            return func(*args, **kwargs)
        (x,), slope = args, kwargs["negative_slope"]
        self.written.append(x.detach() > 0)
        side = self.written[-1] if self.prescribed is None else next(self.prescribed)
        differing = float((side != self.written[-1]).double().mean())
        assert differing <= FLIPPED_AT_MOST, f"{differing:.2g} of the activations on another side"
        return torch.where(side, x, slope * x)


def replay(golden: Golden, run: str, dtype: torch.dtype) -> None:
    """Repeats a run and compares everything recorded about it."""
    if dtype == torch.float64:
        _replay(golden, run, dtype)
        return
    with Sides() as double:
        _replay(golden, run, torch.float64)
    with Sides(double.written):
        _replay(golden, run, dtype)


def _replay(golden: Golden, run: str, dtype: torch.dtype) -> None:
    trained = Trained(golden, run, dtype)
    prefix, batches = trained.prefix, golden.tensor(f"run/{run}/in/x", dtype)
    with comparing(golden, dtype) as compare:
        logged: list[dict[str, Tensor]] = []
        for i, x in enumerate(batches):
            trained.iterate(i, x)
            logged.append(trained.logged())
            if i == 0:
                _gradients(compare, trained)
            if golden.under(f"{prefix}sd_after{i + 1}/"):
                compare.updated(f"{prefix}sd_after{i + 1}/", trained.net.kept_state(), trained.rates)
            if golden.under(f"{prefix}ema_after{i + 1}/"):
                _averaged(compare, trained, f"{prefix}ema_after{i + 1}/")
        for name in logged[0]:
            series = torch.stack([entry[name] for entry in logged])
            compare.both(f"{prefix}out/{name}", f"{prefix}out32/{name}", series, "loss")


def _gradients(compare: Comparison, trained: Trained) -> None:
    for letter, phase in (("E", E), ("D", D), ("V", V)):
        if phase not in trained.gradients:
            continue
        found, prefix = trained.gradients[phase], f"{trained.prefix}grad{letter}"
        compare.gradients(f"{prefix}/", found)
        if f"{prefix}_none" in trained.golden:
            silent = set(trained.golden.array(f"{prefix}_none").tolist())
            players = ("encoder", "decoder") if phase == V else (phase,)
            every = {name for player in players for name in trained.net.table_of(player)} - {"dlatent_avg.buff"}
            assert silent == every - found.keys()


def _averaged(compare: Comparison, trained: Trained, prefix: str) -> None:
    """Ours averages the running style as well; the published average never hears of it again."""
    average = trained.net.published(trained.ema.model.state_dict())
    average["dlatent_avg.buff"] = trained.golden.tensor("sd/dlatent_avg.buff", trained.dtype)
    compare.updated(prefix, average, trained.rates)
