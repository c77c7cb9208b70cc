"""Every registered architecture, and the options of the residual one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sivae_dist.data import Batch
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine import checkpoint
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import Iteration, IterationReport
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.engine.precision import Precision
from sivae_dist.errors import UserError
from sivae_dist.interop import published_keys
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives import ObjectiveConfig
from sivae_dist.registry import components

REGISTERED = components("sivae_dist.models", ModelConfig)
OBJECTIVES = components("sivae_dist.objectives", ObjectiveConfig)
STATE: dict[str, Any] = {"plan_salt": 0, "sums": {}, "data": ""}  # what a checkpoint must say besides tensors
SMALL = {"image_size": 12, "channels": (4, 6), "zdim": 5}
VARIANTS: dict[str, ModelConfig] = {name: cls.tiny() for name, cls in REGISTERED.items()} | {
    "introvae block": ResidualConfig(**SMALL, block="introvae"),
    "group norm": ResidualConfig(**SMALL, norm="group"),
    "sigmoid": ResidualConfig(**SMALL, output="sigmoid"),
    "conditional": ResidualConfig(**SMALL, condition_dim=3),
    "one width": ResidualConfig(image_size=6, channels=(4,), zdim=2, channels_in=1),
}
variants = pytest.mark.parametrize("config", list(VARIANTS.values()), ids=list(VARIANTS))


def build(config: ModelConfig, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return config.build()


def inputs(model: Autoencoder, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    low, high = model.input_range or (-2.0, 2.0)
    x = low + (high - low) * torch.rand(batch, *model.sample_shape, generator=generator)
    z = torch.randn(batch, *model.prior.shape, generator=generator)
    condition = None
    if model.condition_dim:
        condition = torch.nn.functional.one_hot(torch.arange(batch) % model.condition_dim, model.condition_dim).float()
    return x, z, condition


def test_the_published_ones_are_registered() -> None:
    assert {"residual", "mlp", "style"} <= REGISTERED.keys()


@variants
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_shapes_and_finite(config: ModelConfig, batch: int) -> None:
    """Also for the empty batch, which a rank may hold."""
    model = build(config).eval()
    x, z, condition = inputs(model, batch)
    q, x_hat = model.encode(x, condition), model.decode(z, condition)
    assert q.mu.shape == q.logvar.shape == (batch, *model.prior.shape)
    assert x_hat.shape == x.shape
    assert all(bool(t.isfinite().all()) for t in (q.mu, q.logvar, x_hat))


@variants
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    """At one of its levels, where a model has several."""
    model = build(config).train()
    for level in range(model.levels):
        model.set_level(level)
        x, _, condition = inputs(model)
        q = model.encode(x, condition)
        z = q.mu + torch.exp(0.5 * q.logvar)
        (model.decode(z, condition) - x).square().sum().backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not silent


@variants
def test_levels(config: ModelConfig) -> None:
    """A model is built at its finest level; half faded in it is finite; what it does not have is refused."""
    model = build(config).eval()
    finest = model.sample_shape
    for level in range(model.levels):
        for blend in (1.0, 0.5) if level else (1.0,):
            model.set_level(level, blend)
            x, z, condition = inputs(model)
            assert model.encode(x, condition).mu.isfinite().all()
            assert model.decode(z, condition).isfinite().all() and model.decode(z, condition).shape == x.shape
    assert model.sample_shape == finest
    for level, blend in ((-1, 1.0), (model.levels, 1.0), (0, 0.5), (0, 1.5)):
        with pytest.raises(ValueError, match="levels"):
            model.set_level(level, blend)


# ---- in the engine -------------------------------------------------------------------------------------------------


class Trained:
    """A small model with all that trains it."""

    def __init__(self, config: ModelConfig, objective: str, *, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        self.model = build(config)
        self.optim = OptimConfig(PlayerOptim(lr=1e-3), PlayerOptim(lr=1e-3))
        players = {"encoder": self.model.encoder, "decoder": self.model.decoder}
        self.optimizers = self.optim.build(players)
        built = OBJECTIVES[objective]().build(self.model.sample_shape)
        strategy = Replicated(players, self.optimizers)
        self.iteration = Iteration(self.model, built, strategy, precision=Precision(dtype))
        self.ema, self.nimg = Ema(EmaConfig(), self.model), 0

    def step(self) -> IterationReport:
        x, _, condition = inputs(self.model, batch=4, seed=self.nimg)
        label = None if condition is None else condition.argmax(1)
        batch = Batch(x, torch.arange(self.nimg, self.nimg + 4), label)
        report = self.iteration(batch, nimg=self.nimg, global_batch=4)
        self.nimg += 4
        self.ema.update(self.model, self.nimg, 4)
        return report


@variants
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_an_iteration_of_every_objective(config: ModelConfig, objective: str, dtype: Literal["fp32", "bf16"]) -> None:
    trained = Trained(config, objective, dtype=dtype)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    report = trained.step()
    assert report.sums and all(bool(total.isfinite()) for total in report.sums.values())
    assert {"encoder", "decoder"} == report.grad_norm.keys()
    assert all(bool(norm.isfinite()) for norm in report.grad_norm.values())
    after = trained.model.state_dict()
    assert all(bool(t.isfinite().all()) and t.dtype in (torch.float32, torch.int64) for t in after.values())
    moved = {name.split(".")[0] for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved == {"encoder", "decoder"}


@variants
def test_resumes_to_the_last_bit(config: ModelConfig, tmp_path: Path) -> None:
    whole = Trained(config, "soft_introvae")
    whole.step()
    saved = checkpoint.snapshot(whole.nimg, whole.model, whole.ema.model, whole.optimizers, STATE)
    checkpoint.write(tmp_path, saved)
    whole.step()
    resumed = Trained(config, "soft_introvae")
    resumed.nimg = saved.nimg
    path = checkpoint.latest(tmp_path)
    assert path is not None
    checkpoint.restore(checkpoint.read(path), resumed.model, resumed.ema.model, resumed.optimizers)
    resumed.step()
    for one, two in ((whole.model, resumed.model), (whole.ema.model, resumed.ema.model)):
        state = two.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


@variants
def test_state_dict_round_trip(config: ModelConfig) -> None:
    one, two = build(config, seed=0).train(), build(config, seed=1)
    x, z, condition = inputs(one)
    one.decode(z, condition), one.encode(x, condition)  # moves running statistics
    two.load_state_dict(one.state_dict(), strict=True)
    one.eval(), two.eval()
    assert torch.equal(one.decode(z, condition), two.decode(z, condition))
    assert torch.equal(one.encode(x, condition).mu, two.encode(x, condition).mu)
    assert torch.equal(one.encode(x, condition).logvar, two.encode(x, condition).logvar)


@variants
def test_same_seed_same_weights(config: ModelConfig) -> None:
    one, two, other = build(config, 3).state_dict(), build(config, 3).state_dict(), build(config, 4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@variants
def test_in_place_activations_suit_the_synchronised_batch_norm(config: ModelConfig) -> None:
    """The networks overwrite the output of their norms; the gradient must not notice with the project's own norm."""
    plain, synced = build(config).double().train(), build(config).double().train()
    pretend = Group(rank=0, ranks=2)  # converts the layers, which then count on one rank again
    synchronise_batch_norm(synced, pretend)
    for layer in synced.modules():
        if hasattr(layer, "group"):
            layer.group = Group()
    gradients = []
    for model in (plain, synced):
        x, _, condition = inputs(model)
        q = model.encode(x.double(), None if condition is None else condition.double())
        x_hat = model.decode(q.mu + q.logvar, None if condition is None else condition.double())
        (x_hat - x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-9)


# ---- the residual network ------------------------------------------------------------------------------------------


def test_fresh_statistics_are_clean() -> None:
    state = build(ResidualConfig(**SMALL)).state_dict()
    assert all(int(t) == 0 for name, t in state.items() if name.endswith("num_batches_tracked"))
    assert all(bool((t == 1).all()) for name, t in state.items() if name.endswith("running_var"))


@pytest.mark.parametrize(
    ("size", "channels", "bottom"), [(28, (4, 4), 7), (32, (4, 4, 4), 4), (64, (4, 4, 4, 4), 4), (8, (4, 4, 4), 1)]
)
def test_bottom_map(size: int, channels: tuple[int, ...], bottom: int) -> None:
    config = ResidualConfig(image_size=size, channels=channels, zdim=2)
    assert config.bottom == bottom
    model = build(config).train()
    assert model.encoder.head.in_features == channels[-1] * bottom**2
    assert model.decode(torch.zeros(2, 2)).shape == (2, 3, size, size)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 30, "channels": (4, 4)}, ("30", "multiple of 4", "28 or 32")),
        ({"image_size": 4, "channels": (4, 4, 4)}, ("multiple of 8", "use 8 pixels")),
        ({"channels": ()}, ("model.channels", "one width")),
        ({"channels": (4, 0, 4)}, ("model.channels",)),
        ({"zdim": 0}, ("model.zdim is 0",)),
        ({"condition_dim": -1}, ("model.condition_dim is -1",)),
        ({"input_range": (1.0, 0.0)}, ("model.input_range",)),
        ({"output": "sigmoid", "input_range": (-1.0, 1.0)}, ("sigmoid", "[0, 1]")),
    ],
)
def test_bad_settings(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        ResidualConfig(**fields).build()
    assert all(word in str(caught.value) for word in words) and caught.value.fix


def test_bad_settings_of_the_mlp() -> None:
    with pytest.raises(UserError, match=r"model\.width is 0"):
        MlpConfig(width=0).build()


def test_condition_is_needed_and_matters() -> None:
    model = build(ResidualConfig(**SMALL, condition_dim=3)).eval()
    x, z, condition = inputs(model)
    assert condition is not None
    for call in (lambda c: model.encode(x, c), lambda c: model.decode(z, c)):
        for bad in (None, condition[:, :2], condition[:1]):
            with pytest.raises(UserError, match=r"\(3, 3\)"):
                call(bad)
    other = condition.roll(1, 0)
    assert not torch.equal(model.encode(x, condition).mu, model.encode(x, other).mu)
    assert not torch.equal(model.decode(z, condition), model.decode(z, other))
    plain = build(ResidualConfig(**SMALL)).eval()
    with pytest.raises(UserError, match="condition_dim > 0"):
        plain.encode(x, condition)


def test_group_norm_keeps_samples_apart() -> None:
    for norm, apart in (("group", True), ("batch", False)):
        model = build(ResidualConfig(**SMALL, norm=norm)).train()  # type: ignore[arg-type]
        x, z, _ = inputs(model)
        assert torch.allclose(model.encode(x).mu[:1], model.encode(x[:1]).mu, atol=1e-5) == apart
        assert torch.allclose(model.decode(z)[:1], model.decode(z[:1]), atol=1e-5) == apart


def test_the_blocks_differ_in_their_tail() -> None:
    soft, intro = (build(ResidualConfig(**SMALL, block=block)) for block in ("soft_introvae", "introvae"))  # type: ignore[arg-type]
    intro.load_state_dict(soft.state_dict(), strict=True)
    x, _, _ = inputs(soft)
    assert not torch.allclose(soft.train().encode(x).mu, intro.train().encode(x).mu)


def test_sigmoid_output_is_a_probability() -> None:
    linear, bounded = (build(ResidualConfig(**SMALL, output=output)).eval() for output in ("linear", "sigmoid"))  # type: ignore[arg-type]
    _, z, _ = inputs(linear)
    torch.testing.assert_close(bounded.decode(z), torch.sigmoid(linear.decode(z)))


def test_equal_width_skip() -> None:
    """The published quirk touches equal neighbours above 256 only; the first and last block never."""
    with torch.device("meta"):
        names = {
            quirk: {
                n
                for n in ResidualConfig(image_size=32, channels=(8, 8, 300, 300), zdim=2, equal_width_skip=quirk)  # type: ignore[arg-type]
                .build()
                .state_dict()
                if ".skip." in n
            }
            for quirk in ("identity", "published_introvae")
        }
    assert names["published_introvae"] - names["identity"] == {
        "encoder.stages.2.skip.weight",
        "decoder.stages.1.skip.weight",
    }
    assert names["identity"] == {"encoder.stages.1.skip.weight", "decoder.stages.2.skip.weight"}


# ---- published names -----------------------------------------------------------------------------------------------


def test_foreign_key_is_refused() -> None:
    for family in ("residual", "introvae", "twod"):
        with pytest.raises(UserError, match="mapping_fl"):
            published_keys.names(family, ["mapping_fl.block_1.weight"])


def test_shapes_that_make_no_network_are_refused() -> None:
    for family in ("residual", "introvae", "twod"):
        with pytest.raises(UserError, match=f"not make up a published {family}"):
            published_keys.settings(family, {"encoder.main.0.weight": (4, 3, 5, 5)})


def test_dropped_entries_are_left_out() -> None:
    table = published_keys.to_ours("twod", {"decoder.loggamma": 1, "decoder.main.input.bias": 2})
    assert table == {"decoder.layers.input.bias": 2}
