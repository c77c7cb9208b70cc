"""The papers' theorems on finite spaces, where every expectation is a sum and every network a table of probabilities.

Soft-IntroVAE (Daniel & Tamar 2021, section on theory): E maximises, over q(z|x) for every x,
    sum_x p_data(x) W(x) - sum_x p_d(x) exp(alpha W(x)) / alpha,         W(x) the ELBO of x under q and d,
D maximises, over d(x|z),
    sum_x p_data(x) W(x) + gamma sum_x p_d(x) W(x),                       p_d(x) = sum_z p(z) d(x|z).
Claim: (q, d) with d a minimiser of KL(p_data || p_d) + gamma H(p_d) and q its posterior p_d(z|x) is a Nash equilibrium,
provided p_d(x)^(alpha + 1) <= p_data(x) wherever p_data(x) > 0.

IntroVAE (Huang et al. 2018, theorem 1, equations 5 and 6): E minimises V = sum_x p_data(x) E(x) + p_G(x) [m - E(x)]+,
G minimises U = sum_x p_G(x) E(x). Claim: (E, G) is a saddle point if and only if p_G = p_data and E is a constant in
[0, m], where p_data > 0 everywhere.

What is shown: that gradient play from random tables arrives at the theorems' optimum, computed independently of it, and
that nobody gains by leaving it alone. ELBO, exp(alpha ELBO) and hinge are those of `sivae_dist.objectives`. What is
not: anything about networks, sampling noise or continuous data, where tables are not free and IntroVAE's E is a KL
beside a reconstruction error; nor that play always converges (IntroVAE's theorem says nothing of it: plain alternating
steps circle, see `introvae`). gamma_r and the stopped gradients of the published code have no part in the theorem, nor
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sivae_dist.objectives import Draws, terms
from sivae_dist.objectives.introvae import IntroVae, IntroVaeConfig

DOUBLE = torch.float64


@dataclass(frozen=True)
class SoftEquilibrium:
    """Where play ended, and what the theorem says. Distributions over x: (X,).

    decoder:   p_d that was reached; optimum: the minimiser of KL(p_data || p) + gamma H(p)
    objective: KL + gamma H at either; condition: max over x of p_d^(alpha + 1) - p_data (the theorem needs <= 0)
    posterior_gap: largest |q(z|x) - p_d(z|x)|
    gains: what encoder and decoder gain at most (by many gradient steps) when they alone leave (posterior, optimum)
    """

    decoder: Tensor
    optimum: Tensor
    objective: tuple[float, float]
    condition: float
    posterior_gap: float
    gains: tuple[float, float]

    @property
    def distance(self) -> float:
        """Total variation between p_d and the theorem's optimum."""
        return 0.5 * float((self.decoder - self.optimum).abs().sum())


class SoftGame:
    """Tables of logits: encoder (X, Z) for q(z|x), decoder (Z, X) for d(x|z); the prior over z is uniform."""

    def __init__(self, p_data: Tensor, *, alpha: float, gamma: float, codes: int | None = None) -> None:
        self.p_data, self.alpha, self.gamma = p_data.to(DOUBLE), alpha, gamma
        self.codes = codes or len(p_data)
        self.prior = torch.full((self.codes,), 1 / self.codes, dtype=DOUBLE)

    def elbo(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """W(x) of every x, (X,): E_q [log d(x|z)] - KL(q(z|x) || p(z)), both sums over all z."""
        log_q = encoder.log_softmax(1)
        q = log_q.exp()
        rec = -(q * decoder.log_softmax(1).T).sum(1)  # minus expected log-likelihood, in place of the squared error
        kl = (q * (log_q - self.prior.log())).sum(1)
        return terms.elbo(rec, kl, scale=1.0, beta_rec=1.0, beta_kl=1.0)

    def p_d(self, decoder: Tensor) -> Tensor:
        """(X,): what the decoder generates."""
        return self.prior @ decoder.softmax(1)

    def encoder_value(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """What E maximises."""
        w = self.elbo(encoder, decoder)
        return (self.p_data * w).sum() - (self.p_d(decoder) * terms.exp_elbo(w, self.alpha)).sum() / self.alpha

    def decoder_value(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """What D maximises; the gradient also runs through the points that d generates, p_d(x)."""
        w = self.elbo(encoder, decoder)
        return (self.p_data * w).sum() + self.gamma * (self.p_d(decoder) * w).sum()

    def posterior(self, decoder: Tensor) -> Tensor:
        """log p_d(z|x), (X, Z): logits of the exact posterior."""
        return (self.prior.log()[:, None] + decoder.log_softmax(1)).T.log_softmax(1)

    def theorem_objective(self, p: Tensor) -> Tensor:
        """KL(p_data || p) + gamma H(p)."""
        return (self.p_data * (self.p_data.log() - p.log())).sum() - self.gamma * torch.xlogy(p, p).sum()


def soft_introvae(
    p_data: Tensor, *, alpha: float, gamma: float, steps: int = 600, rate: float = 0.1, seed: int = 0
) -> SoftEquilibrium:
    """Encoder and decoder take turns, one Adam step each, from random tables. p_data: (X,), positive."""
    game = SoftGame(p_data, alpha=alpha, gamma=gamma)
    random = torch.Generator().manual_seed(seed)
    encoder, decoder = (
        torch.randn(shape, generator=random, dtype=DOUBLE).requires_grad_()
        for shape in ((len(p_data), game.codes), (game.codes, len(p_data)))
    )
    players = [(encoder, game.encoder_value), (decoder, game.decoder_value)]
    optimizers = [torch.optim.Adam([table], lr=rate) for table, _ in players]
    for step in range(steps):
        for (table, value), optimizer in zip(players, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            (table.grad,) = torch.autograd.grad(-value(encoder, decoder), [table])
            optimizer.step()
    with torch.no_grad():
        reached = game.p_d(decoder)
        optimum = minimiser(game)
        values = float(game.theorem_objective(reached)), float(game.theorem_objective(optimum))
        condition = float((optimum ** (alpha + 1) - game.p_data).max())
        gap = float((encoder.softmax(1) - game.posterior(decoder).exp()).abs().max())
    return SoftEquilibrium(reached, optimum, values, condition, gap, deviations(game, optimum))


def minimiser(game: SoftGame, *, starts: int = 8, steps: int = 400) -> Tensor:
    """argmin of KL(p_data || p) + gamma H(p) over the simplex, (X,): best of several starts (H is concave)."""
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(starts, len(game.p_data), generator=random, dtype=DOUBLE)
    noise[0] = 0  # from the data themselves
    logits = (game.p_data.log() + noise).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
            log_p = logits.log_softmax(1)
            value = -(game.p_data * log_p).sum(1) - game.gamma * (log_p.exp() * log_p).sum(1)
            (logits.grad,) = torch.autograd.grad(value.sum(), [logits])
            optimizer.step()
    return logits[value.argmin()].detach().softmax(0)


def deviations(game: SoftGame, optimum: Tensor, *, steps: int = 150, tries: int = 2) -> tuple[float, float]:
    """(encoder, decoder): most that one player gains over the pair (posterior of d, d with p_d = optimum) by itself.

    By gradient ascent from the pair itself and from random tables around it: evidence, no proof. d(x|z) is tried as
    the optimum blended with a permutation, so that z tells something of x.
    """
    x = len(optimum)
    decoder = 0.5 * optimum.expand(game.codes, x) + 0.5 * torch.eye(x, dtype=DOUBLE)  # rows, z by x
    decoder = decoder * (optimum / (game.prior @ decoder))  # Sinkhorn: p_d to the optimum, rows to 1
    for _ in range(500):
        decoder = decoder / decoder.sum(1, keepdim=True)
        decoder = decoder * (optimum / (game.prior @ decoder))
    d, q = decoder.log(), game.posterior(decoder.log())
    random = torch.Generator().manual_seed(2)
    gains = []
    for player in range(2):
        value = (game.encoder_value, game.decoder_value)[player]
        before = float(value(q, d))
        best = -float("inf")
        for attempt in range(tries):
            pair = [q.clone(), d.clone()]
            pair[player] = pair[player] + 0.5 * attempt * torch.randn(q.shape, generator=random, dtype=DOUBLE)
            table = pair[player].requires_grad_()
            optimizer = torch.optim.Adam([table], lr=0.05)
            with torch.enable_grad():
                for _ in range(steps):
                    now = value(*pair)
                    best = max(best, float(now.detach()))
                    (table.grad,) = torch.autograd.grad(-now, [table])
                    optimizer.step()
        gains.append(best - before)
    return gains[0], gains[1]


@dataclass(frozen=True)
class HingeSaddle:
    """Where play ended in IntroVAE's game.

    generator: p_G, (X,); energy: E(x), (X,); distance: total variation of p_G from p_data; gap: how much both players
    together would gain by their best answers, 0 exactly at saddle points; circling: the distance of plain alternating
    steps, at its largest within the last half of the play
    """

    generator: Tensor
    energy: Tensor
    distance: float
    gap: float
    circling: float


def introvae(p_data: Tensor, *, margin: float, steps: int = 1000, rate: float = 1.5, seed: int = 0) -> HingeSaddle:
    """Extragradient play (Korpelevich 1976) on E >= 0 and the logits of p_G, from random values; p_data: (X,).

    The hinge is the objective's own, per sample as in the paper (the batch-mean hinge of the public code is another
    game). Steps are in units of the margin, E starts within it: from
    beyond, the hinge is closed and play may circle for ever. Extragradient because plain simultaneous or alternating
    steps circle around a saddle point anyway.
    """
    p = p_data.to(DOUBLE)
    objective = IntroVaeConfig(margin=margin, hinge="per_sample").build((1,))
    random = torch.Generator().manual_seed(seed)
    energy = min(margin, 1.0) * torch.rand(len(p), generator=random, dtype=DOUBLE)
    logits = torch.randn(len(p), generator=random, dtype=DOUBLE)
    plain, far = (energy.clone(), logits.clone()), 0.0
    for step in range(steps):
        half = _moved(objective, p, (energy, logits), (energy, logits), rate)
        energy, logits = _moved(objective, p, half, (energy, logits), rate)
        first = _moved(objective, p, plain, plain, rate)[0]
        plain = (first, _moved(objective, p, (first, plain[1]), plain, rate)[1])
        if step >= steps // 2:
            far = max(far, _distance(plain[1].softmax(0), p))
    generator = logits.softmax(0)
    return HingeSaddle(generator, energy, _distance(generator, p), saddle_gap(p, generator, energy, margin), far)


def saddle_gap(p_data: Tensor, generator: Tensor, energy: Tensor, margin: float) -> float:
    """[V(E, G) - min_E V(., G)] + [U(E, G) - min_G U(E, .)], both minima exact: zero if and only if a saddle point.

    min over E: at each x the better of E = 0 and E = m (V is linear between and rises beyond). min over G: all mass
    where E is least.
    """
    v = (p_data * energy + generator * (margin - energy).clamp(min=0)).sum()
    best = margin * torch.minimum(p_data, generator).sum()
    return float(v - best + (generator * energy).sum() - energy.min())


def _moved(
    objective: IntroVae, p_data: Tensor, at: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], rate: float
) -> tuple[Tensor, Tensor]:
    """`start` moved by the gradients of V and U `at` a point. Steps on p_G are multiplicative (mirror descent)."""
    energy, logits, margin = at[0].clone().requires_grad_(), at[1], objective.config.margin
    generator = logits.softmax(0)
    hinge = objective.hinge(energy, cast(Draws, None))  # per sample: no help is asked for
    (slope,) = torch.autograd.grad((p_data * energy + generator * hinge).sum(), [energy])  # of V, equation 5
    moved = start[1] - rate / margin * energy.detach()  # of U in p_G, equation 6
    return (start[0] - rate * margin * slope).clamp(min=0), moved.log_softmax(0)


def _distance(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())
