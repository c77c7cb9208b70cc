"""The modulated networks, and what both families of style-based decoders have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.draws import PositionDraws
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.models.modulated import ModulatedAutoencoder, ModulatedConfig
from sivae_dist.models.modulated.encoder import EncoderBlock
from sivae_dist.models.modulated.layers import Affine, Conv, PixelNorm, StyledConv, ToRgb, make_norm
from sivae_dist.models.style import StyleConfig
from sivae_dist.models.style.styled import StyledDecoder
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.ops import setup_filter, upsample2d
from sivae_dist.ops.modulated_layer import following_factor

TINY = ModulatedConfig.tiny()
# Wide enough for averages over channels to mean something, small enough to be quick.
WIDE = ModulatedConfig(image_size=64, channel_base=8192, channel_max=128, latent_size=64, mapping_layers=4)
FAMILIES: list[Any] = [TINY, StyleConfig.tiny()]
both = pytest.mark.parametrize("config", FAMILIES, ids=[config.name for config in FAMILIES])


def build(config: Any = TINY, seed: int = 0) -> Any:
    """With noise strengths and biases that matter (they start at zero)."""
    torch.manual_seed(seed)
    model = config.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "noise" in name or ("bias" in name and "affine" not in name):
                parameter.normal_(0, 0.3)
    return model


def draws(position: Tensor, *, from_prior: bool = False, key: int = 7, batch: int = 0) -> PositionDraws:
    return PositionDraws(key, position, batch, torch.float32, from_prior, lambda rows: rows.mean(0))


# ---- magnitudes ----------------------------------------------------------------------------------------------------


def second_moments(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, float]:
    """Filled by the next forward pass: mean square of the outputs of all modules of these kinds."""
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, options: dict[str, Any], output: Tensor) -> None:
            if options.get("next_styles") is not None:  # the map comes out scaled for the next layer
                output = output / following_factor(options["next_styles"])[:, :, None, None]
            found[name] = float(output.detach().square().mean())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(note(name), with_kwargs=True)
    return found


def test_magnitudes_at_the_start() -> None:
    """About one through the decoder's whole depth, and an image of order one. Averages of three networks."""
    sums: dict[str, float] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = WIDE.build()
        found = second_moments(model.decoder, StyledConv)
        z = torch.randn(8, 64)
        found["image"] = float(model.decode(z).detach().square().mean())
        found["style"] = float(model.decoder.map(z).detach().square().mean())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value / 3
    assert len(sums) == 2 * WIDE.layer_count - 1 + 2
    assert all(0.3 < value < 2.5 for value in sums.values()), sums


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_spread_of_the_styles_at_the_start(spread: float) -> None:
    """Styles stand around one that far apart, an image moves with its code accordingly, and the rates stay."""
    torch.manual_seed(0)
    model = replace(WIDE, style_spread=spread).build()
    w = torch.randn(512, 64)
    affines = [module for module in model.decoder.modules() if isinstance(module, Affine)]
    assert len(affines) == 3 * WIDE.layer_count - 1  # two convolutions a level (one at 4 pixels), one toRGB
    for affine in affines:
        styles = affine(w).detach()
        assert float(styles.mean()) == pytest.approx(1.0, abs=0.1 * spread)
        assert float(styles.std(0).mean()) == pytest.approx(spread, rel=0.1)
    images = model.decode(torch.randn(64, 64)).detach()
    moved = float(images.std(0).square().mean() / images.square().mean())
    assert moved > 0.3 if spread == 1 else moved < 0.1
    rates = model.decoder.lr_multipliers()
    assert all(rates[name] == 1 / 8 for name in rates if name.endswith("affine.weight"))


@pytest.mark.parametrize("norm", ["none", "group", "pixel"])
def test_magnitudes_of_the_encoder(norm: Any) -> None:
    torch.manual_seed(0)
    model = replace(WIDE, encoder_norm=norm).build()
    found = second_moments(model.encoder, EncoderBlock, Conv)
    x = torch.nn.functional.interpolate(torch.randn(8, 3, 8, 8), size=64, mode="bilinear").clamp(-1, 1)
    q = model.encode(x)
    found = {name: value for name, value in found.items() if name.count(".") < 2}
    assert len(found) == WIDE.layer_count + 1  # from_rgb, the blocks, the last convolution
    low = 0.03 if norm == "none" else 0.15  # filters take from every map what is too fine; nothing puts it back
    assert all(low < value < 2.5 for value in found.values()), found
    assert (
        max(float(q.mu.detach().square().mean()), float(q.logvar.detach().square().mean())) < 0.1
    )  # close to the prior


@pytest.mark.parametrize("norm", ["none", "group", "pixel"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_images_and_latents_give_finite_gradients(norm: Any, value: float) -> None:
    """Fresh networks of 64 pixels: biases are zero, so grey makes every map of the encoder zero."""
    torch.manual_seed(0)
    model = replace(WIDE, channel_max=16, encoder_norm=norm).build()
    x = torch.full((2, *model.sample_shape), value, requires_grad=True)
    z = torch.zeros(2, 64, requires_grad=True)
    q = model.encode(x)
    (q.mu.square().sum() + q.mu.sum() + q.logvar.sum() + model.decode(z).square().sum()).backward()
    for name, tensor in (("x", x), ("z", z), *model.named_parameters()):
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all()), name
        assert float(tensor.grad.norm()) < 1e15, name  # its square is finite, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_half_precision_with_large_weights(dtype: torch.dtype, size: float) -> None:
    """Demodulation makes the image independent of the weights' size; half precision must not notice it either."""
    model = build(replace(WIDE, image_size=32, channel_max=64)).eval()
    z, x = torch.randn(2, 64), torch.rand(2, 3, 32, 32) * 2 - 1
    expected = model.decode(z)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StyledConv):
                module.weight.mul_(size)
                module.affine.weight.mul_(size)
                module.affine.bias.mul_(size)
    torch.testing.assert_close(model.decode(z), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=dtype):
        image, q = model.decode(z), model.encode(x)
    assert image.dtype == q.mu.dtype == torch.float32
    error = (image - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)  # fourteen layers, each rounded to 8 or 11 bits
    (image.square().sum() + q.mu.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.decoder.parameters())


def test_activations_are_bounded() -> None:
    for clamp, low, high in ((256.0, 2.0, 256.0), (None, 1e3, 1e9)):
        model = replace(TINY, clamp=clamp).build()
        found = second_moments(model, StyledConv)
        for module in model.modules():
            if isinstance(module, StyledConv):
                nn.init.constant_(module.bias, 1e3)  # type: ignore[arg-type]
        model.decode(torch.randn(2, 5))
        assert low**2 < max(found.values()) <= high**2


# ---- the networks --------------------------------------------------------------------------------------------------


def test_sizes_of_published_shape() -> None:
    """Channel widths of StyleGAN2 at 256 and 1024 pixels (configuration F), and how many parameters that makes."""
    for size, base, widths in (
        (256, 16384, [512, 512, 512, 512, 256, 128, 64]),
        (1024, 32768, [512, 512, 512, 512, 512, 256, 128, 64, 32]),
    ):
        config = ModulatedConfig(image_size=size, channel_base=base)
        assert [config.width(4 << i) for i in range(config.layer_count)] == widths
        with torch.device("meta"):
            model = config.build()
        assert model.decoder.dlatent_avg.shape == (2 * len(widths), 512)
        assert model.sample_shape == (3, size, size) and model.levels == 1
    # StyleGAN2's generator at 1024 pixels has 30,370,060 with its mapping network (noise buffers not counted).
    assert sum(p.numel() for p in model.decoder.parameters()) == 30_370_060


def test_image_is_the_sum_of_all_levels() -> None:
    model = build().eval()
    parts: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, ToRgb):
            module.register_forward_hook(lambda m, i, output: parts.append(output))
    image = model.decode(torch.randn(2, 5))
    assert [part.shape[-1] for part in parts] == [4, 8, 16]
    f = setup_filter([1, 3, 3, 1])
    torch.testing.assert_close(image, upsample2d(upsample2d(parts[0], f) + parts[1], f) + parts[2])
    assert all(float(part.detach().abs().mean()) > 1e-3 for part in parts)


def test_each_layer_has_its_own_style() -> None:
    """Changing the style of layer i changes the image from level i // 2 on: all layers act, the coarse ones first."""
    model = build().eval()
    styles = model.decoder.styles(torch.randn(1, 5)).clone()
    parts: list[Tensor] = []
    for block in model.decoder.blocks:
        block.register_forward_hook(lambda m, i, output: parts.append(output[0]))
    model.decoder.synthesise(styles)
    before, first_changed = [part.clone() for part in parts], []
    for layer in range(styles.shape[1]):
        parts.clear()
        other = styles.clone()
        other[:, layer] += 1
        image = model.decoder.synthesise(other)
        assert not torch.allclose(image, model.decoder.synthesise(styles), atol=1e-4), layer
        changed = [not torch.equal(a, b) for a, b in zip(before, parts[:3], strict=True)]
        first_changed.append(changed.index(True) if any(changed) else None)
    assert first_changed == [0, 1, 1, 2, 2, None]  # the last one is toRGB's alone; 1 and 3 are shared with toRGB's


@pytest.mark.parametrize("norm", ["none", "group", "pixel"])
def test_the_encoder_looks_at_one_sample(norm: Any) -> None:
    model = build(replace(TINY, encoder_norm=norm)).train()
    x = torch.randn(3, *model.sample_shape)
    torch.testing.assert_close(model.encode(x).mu[:1], model.encode(x[:1]).mu, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.encoder.named_buffers() if not name.endswith("fir.taps")] == []


def test_norms_by_their_definition() -> None:
    x = torch.randn(2, 8, 5, 5) * 3 + 1
    torch.testing.assert_close(PixelNorm()(x), x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt())
    pairs = x.reshape(2, 4, -1)
    expected = (pairs - pairs.mean(2, keepdim=True)) / (pairs.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(make_norm("group", 8)(x), expected.reshape(x.shape))
    assert torch.equal(make_norm("none", 8)(x), x)


def test_contrast_reaches_the_head_past_the_norm() -> None:
    """Fainter images have other codes, although the norm before the convolutions takes contrast out."""
    model = build().eval()
    x = torch.rand(2, *model.sample_shape) - 0.5
    mu, faint = model.encode(x).mu, model.encode(0.3 * x).mu
    assert float((mu - faint).detach().abs().mean()) > 0.05 * float(mu.detach().abs().mean())


def test_rates_are_equalised() -> None:
    model: ModulatedAutoencoder = build()
    for player in (model.encoder, model.decoder):
        rates = player.lr_multipliers()
        for name, parameter in player.named_parameters():
            if name.endswith("weight"):
                fan_in, mapping = parameter[0].numel(), 2**0.5 * 0.1 if name.startswith("mapping") else 1.0
                gain = (2 * 3) ** -0.5 if "to_rgb.weight" in name else mapping
                assert rates[name] == pytest.approx(gain * fan_in**-0.5), name
            elif name.startswith("mapping"):
                assert rates[name] == pytest.approx(0.1), name
            else:
                assert rates.get(name, 1.0) == 1.0, name


def train(config: ModelConfig, *, parts: int = 1) -> dict[str, Tensor]:
    """Two iterations, optionally as micro-batches; the weights."""
    model: Autoencoder = build(config).double()
    players = {"encoder": model.encoder, "decoder": model.decoder}
    optim = PlayerOptim(lr=0.002, beta1=0.0, beta2=0.99, eps=1e-4)
    objective = SoftIntroVaeConfig(decoder_z="reencode", draws="fresh", beta_neg=4.0).build(model.sample_shape)
    iteration = Iteration(
        model, objective, Replicated(players, OptimConfig(optim, optim).build(players)), accumulation=parts
    )
    for nimg in (0, 4):
        position = torch.arange(nimg, nimg + 4)
        x = counters.normal(3, position, model.sample_shape, torch.float64).tanh()
        report = iteration(Batch(x, position), nimg=nimg, global_batch=4)
        assert all(bool(norm.isfinite()) for norm in report.grad_norm.values())
    return model.state_dict()


def test_training_does_not_depend_on_micro_batches() -> None:
    one, two = (train(replace(TINY, dlatent_avg_beta=1.0), parts=parts) for parts in (1, 3))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-7, atol=1e-9)


# ---- what both style-based decoders promise ------------------------------------------------------------------------


@both
def test_decoding_is_mapping_truncating_and_drawing(config: Any) -> None:
    """The parts that applications put together in their own way."""
    model = build(config).eval()
    assert isinstance(model.decoder, StyledDecoder)
    z = torch.randn(3, 5)
    styles = model.decoder.styles(z)
    assert styles.shape == (3, *model.decoder.dlatent_avg.shape)
    assert torch.equal(styles, model.decoder.map(z)[:, None].expand_as(styles))
    assert torch.equal(model.decoder.synthesise(styles), model.decode(z))
    torch.testing.assert_close(model.decoder.map(3 * z), model.decoder.map(z))  # only the direction of z counts
    halfway = torch.lerp(styles[:1], styles[1:2], 0.5)
    assert model.decoder.synthesise(halfway).shape == (1, *model.sample_shape)
    mixed = torch.cat([styles[:1, :2], styles[1:2, 2:]], dim=1)
    image = model.decoder.synthesise(mixed)
    assert not torch.allclose(image, model.decode(z)[:1], atol=1e-3)
    assert not torch.allclose(image, model.decode(z)[1:2], atol=1e-3)


@both
@pytest.mark.parametrize("noise", ["random", "batch_constant", "fixed", "off"])
def test_images_do_not_depend_on_how_a_batch_is_split(config: Any, noise: Any) -> None:
    model = build(replace(config, noise=noise, style_mixing_prob=1.0)).train()
    z, position = torch.randn(5, 5), torch.tensor([3, 4, 9, 1 << 40, 5])
    whole = model.decode(z, None, draws(position, from_prior=True))
    for rows in (slice(0, 2), slice(2, 5)):
        part = model.decode(z[rows], None, draws(position[rows], from_prior=True))
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.decode(z, None, draws(position, from_prior=True)), whole)
    same = model.decode(z, None, draws(position))
    for other in (draws(position + 1), draws(position, key=8), draws(position, batch=5)):
        # The ALAE network's first random map is one for the whole batch, as published.
        random = other.batch == 0 or config.name == "style"
        changes = {"random": random, "batch_constant": other.position is position}.get(noise, False)
        assert torch.equal(model.decode(z, None, other), same) != changes


@both
def test_noise_differs_from_sample_to_sample_or_not(config: Any) -> None:
    z = torch.randn(1, 5).expand(2, -1)
    images = {}
    for noise, differs in (("random", True), ("batch_constant", False), ("fixed", False), ("off", False)):
        model = build(replace(config, noise=noise)).eval()
        one, two = model.decode(z, None, draws(torch.arange(2)))
        assert (not torch.allclose(one, two, atol=1e-4)) == differs, noise
        images[noise] = model.decode(z)
        assert torch.equal(model.decode(z), images[noise])
    assert torch.equal(images["random"], images["fixed"]) and torch.equal(images["batch_constant"], images["fixed"])
    assert not torch.allclose(images["off"], images["fixed"], atol=1e-3)


@both
def test_mixing_touches_prior_samples_in_training_only(config: Any) -> None:
    model = build(replace(config, style_mixing_prob=1.0)).train()
    z, position = torch.randn(16, 5), torch.arange(16)
    own, layers, cutoffs = model.decoder.map(z)[:, None], len(model.decoder.dlatent_avg), set()
    for batch in range(100):
        styles = model.decoder.styles(z, draws(position, from_prior=True, batch=batch))
        kept = (styles == own).all(dim=2)
        cutoff = int(kept[0].sum())
        assert torch.equal(kept, (torch.arange(layers) < cutoff).expand_as(kept))
        cutoffs.add(cutoff)
    assert cutoffs == set(range(1, layers + 1))
    for quiet in (draws(position), None):
        assert torch.equal(model.decoder.styles(z, quiet), own.expand(-1, layers, -1))
    assert torch.equal(model.eval().decoder.styles(z, draws(position, from_prior=True)), own.expand(-1, layers, -1))


@both
def test_average_style(config: Any) -> None:
    """Moves in training only, by the mean over all ranks, and past what is no number; truncation pulls to it."""
    model = build(replace(config, dlatent_avg_beta=0.5)).train()
    z = torch.randn(4, 5)
    w = model.decoder.map(z).detach()
    model.decode(z)
    torch.testing.assert_close(model.decoder.dlatent_avg, 0.5 * w.mean(0).expand_as(model.decoder.dlatent_avg))
    before = model.decoder.dlatent_avg.clone()
    model.decode(torch.full((4, 5), torch.nan))
    model.decode(torch.zeros(0, 5))
    model.eval()
    image = model.decode(z)
    assert torch.equal(model.decoder.dlatent_avg, before)
    torch.testing.assert_close(model.decoder(z, truncation_psi=1.0), image, rtol=1e-5, atol=1e-5)
    styles = model.decoder.truncate(model.decoder.styles(z), 0.0)
    torch.testing.assert_close(styles[:, :3], before[None, :3].expand(4, -1, -1))
    assert torch.equal(styles[:, 3:], model.decoder.styles(z)[:, 3:])


@both
def test_average_style_is_equal_on_all_ranks(config: Any) -> None:
    """Each rank hands its rows to `batch_mean` and takes what comes back, whatever its own part of the batch is."""
    mean = torch.randn(5)
    after = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 4)):
        model = build(config).train()
        z, position = torch.randn(4, 5)[rows], torch.arange(4)[rows]
        model.decode(z, None, PositionDraws(7, position, 0, torch.float32, True, lambda rows: mean))
        after.append(model.decoder.dlatent_avg)
    assert bool(after[0].any()) and torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


def test_average_model_averages_the_style_too() -> None:
    model = build().train()
    ema = Ema(EmaConfig(half_life_kimg=0.01, rampup=0), model)
    model.decode(torch.randn(4, 5))
    ema.update(model, nimg=10, batch=10)
    torch.testing.assert_close(ema.model.decoder.dlatent_avg, 0.5 * model.decoder.dlatent_avg)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 100}, ("100", "power of two", "64 or 128")),
        ({"image_size": 4}, ("power of two", "8 or 16")),
        ({"channel_base": 0}, ("model.channel_base is 0",)),
        ({"latent_size": -3}, ("model.latent_size",)),
        ({"input_range": (1.0, 0.0)}, ("model.input_range",)),
        ({"style_mixing_prob": 1.5}, ("style_mixing_prob is 1.5", "0 to 1")),
        ({"truncation_cutoff": -1}, ("truncation_cutoff",)),
        ({"mapping_multiplier": 0.0}, ("mapping_multiplier is 0",)),
        ({"style_spread": 0.0}, ("style_spread is 0",)),
        ({"clamp": 0.0}, ("model.clamp is 0",)),
        ({"resample_filter": (1.0, -1.0)}, ("resample_filter", "[1, 3, 3, 1]")),
        ({"resample_filter": ()}, ("resample_filter",)),
    ],
)
def test_bad_settings(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        ModulatedConfig(**fields).build()
    assert all(word in str(caught.value) for word in words)
