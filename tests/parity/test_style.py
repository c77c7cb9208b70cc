"""The style network against the public implementation: every part, every level, and whole training steps."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_files import Golden, comparing, files, of
from style import RecordedDraws, load_style, replay
from torch import Tensor

from sivae_dist.engine.progressive import blended
from sivae_dist.interop import published_keys
from sivae_dist.models.style import StyleAutoencoder, StyleConfig

NAMES = of("style")
NOISE = {"dec_noise": "random", "dec_batch_constant": "batch_constant"}
RUNS = [(name, run) for name in NAMES for run in files()[name].runs()]


def having(pattern: str, *values: str) -> list[tuple[str, str]]:
    """(file, value) for which the file holds the array that `pattern` makes of the value."""
    return [(name, value) for name in NAMES for value in values if pattern.format(value) in files()[name]]


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return files()[request.param]


def model_of(golden: Golden, dtype: torch.dtype, **settings: object) -> StyleAutoencoder:
    model = load_style(golden, dtype, **settings).model.eval()
    assert isinstance(model, StyleAutoencoder)
    return model


def settings_of(golden: Golden, name: str) -> tuple[int, float]:
    """(level, blend) of the forward cases."""
    if name == "lod0":
        return 0, 1.0
    if name == "final":
        return golden.value("cfg/final_lod"), 1.0
    return golden.value("cfg/mid_lod"), golden.value("cfg/mid_blend") if name == "mid" else 1.0


def center(image: Tensor) -> Tensor:
    low = (image.shape[-1] - 8) // 2
    return image[..., low : low + 8, low : low + 8]


def test_config_follows_from_shapes(golden: Golden, dtype: torch.dtype) -> None:
    cfg = {name: golden.array(key).tolist() for name, key in golden.under("cfg/").items()}
    built = StyleConfig(
        channels_in=cfg["channels"],
        image_size=2 ** (cfg["layer_count"] + 1),
        startf=cfg["startf"],
        maxf=cfg["maxf"],
        latent_size=cfg["latent_size"],
        mapping_layers=cfg["mapping_layers"],
    ).build()
    model = model_of(golden, dtype)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(golden.tensor("in/x_final", dtype)) == cfg["batch"]
    assert model.levels == cfg["layer_count"]


def test_learning_rate_multipliers(golden: Golden) -> None:
    net = load_style(golden, torch.float64)
    for player in ("encoder", "decoder"):
        known = getattr(net.model, player).lr_multipliers()
        found = {name: known.get(ours.removeprefix(f"{player}."), 1.0) for name, ours in net.table_of(player).items()}
        for name, value in found.items():
            if f"lreq_coef/{name}" in golden:
                assert value == pytest.approx(golden.value(f"lreq_coef/{name}"), rel=1e-15), name
            elif "lreq_without_coef" in golden:
                assert value == 1.0 and name in {*golden.array("lreq_without_coef").tolist(), "dlatent_avg.buff"}


@pytest.mark.parametrize(("name", "case"), having("out/{}/enc_out", "final", "mid", "mid_noblend"))
def test_encode(name: str, case: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    model = model_of(golden, dtype)
    model.set_level(*settings_of(golden, case))
    x = golden.tensor("in/x_final" if case == "final" else "in/x_mid", dtype)
    assert x.shape[1:] == model.sample_shape
    with torch.no_grad(), comparing(golden, dtype) as compare:
        q = model.encode(x)
        found = {"enc_out": model.encoder.read_style(x)[:, None], "mu": q.mu, "logvar": q.logvar}
        for what, value in found.items():
            compare.both(f"out/{case}/{what}", f"out32/{case}/{what}", value, "forward")


def test_mappings(golden: Golden, dtype: torch.dtype) -> None:
    model = model_of(golden, dtype)
    with torch.no_grad(), comparing(golden, dtype) as compare:
        q = model.encoder.posterior(golden.tensor("in/enc_out", dtype)[:, 0])
        compare.both("out/mapping_tl", "out32/mapping_tl", torch.stack([q.mu, q.logvar], dim=1), "forward")
        styles = model.decoder.styles(golden.tensor("in/z", dtype))
        assert torch.equal(styles, styles[:, :1].expand_as(styles))
        compare.both("out/mapping_fl", "out32/mapping_fl", styles[:, 0], "forward")


@pytest.mark.parametrize(("name", "case"), having("out/{}/dec_deterministic", "final", "mid", "mid_noblend", "lod0"))
def test_decode_without_noise(name: str, case: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    model = model_of(golden, dtype, noise="published_bump")
    model.set_level(*settings_of(golden, case))
    with torch.no_grad(), comparing(golden, dtype) as compare:
        compare.close(f"out/{case}/dec_deterministic", model.decoder.synthesise(golden.tensor("in/w", dtype)))


@pytest.mark.parametrize(
    ("name", "case"), having("out/{}", *(f"{case}/{kind}" for case in ("final", "mid") for kind in NOISE))
)
def test_decode_with_noise(name: str, case: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    case, kind = case.split("/")
    model = model_of(golden, dtype, noise=NOISE[kind])
    model.set_level(*settings_of(golden, case))
    draws = RecordedDraws(golden, f"in/{case}/{kind}/", dtype)
    with torch.no_grad(), comparing(golden, dtype) as compare:
        compare.close(f"out/{case}/{kind}", model.decoder.synthesise(golden.tensor("in/w", dtype), draws))


def test_truncation(golden: Golden, dtype: torch.dtype) -> None:
    """The average is that of the weights: evaluation does not move it here."""
    model = model_of(golden, dtype, noise="published_bump", truncation_cutoff=golden.value("cfg/truncation_cutoff"))
    z, before = golden.tensor("in/z", dtype), model.decoder.dlatent_avg.clone()
    with torch.no_grad(), comparing(golden, dtype) as compare:
        compare.close("out/generate_trunc/styles_before", model.decoder.styles(z)[:, :1])
        image = model.decoder(z, truncation_psi=golden.value("cfg/truncation_psi"))
        compare.close("out/generate_trunc/image_center", center(image))
        if "out/generate_trunc/image" in golden:
            compare.close("out/generate_trunc/image", image)
        if "out/generate_notrunc/image" in golden:
            compare.close("out/generate_notrunc/image", model.decode(z))
    assert torch.equal(model.decoder.dlatent_avg, before)
    assert not torch.equal(image, model.decode(z))


def test_mixing(golden: Golden, dtype: torch.dtype) -> None:
    """Samples from the prior, in training only."""
    model = model_of(golden, dtype, noise="published_bump", style_mixing_prob=1.0).train()
    z, cutoff = golden.tensor("in/z", dtype), golden.value("cfg/mixing_cutoff_fwd")
    given = {"in/z2": golden.array("in/z2"), "in/mixing_u": torch.tensor(0.5).numpy()}
    given["in/mixing_cutoff"] = torch.tensor(cutoff).numpy()
    recorded = copy.copy(golden)
    recorded.arrays, recorded.used = given, set()
    mixing = RecordedDraws(recorded, "in/", dtype, from_prior=True, mixing_choices=2 * model.levels)
    with torch.no_grad(), comparing(golden, dtype) as compare:
        image = model.decode(z, None, mixing)
        compare.close("out/generate_mixed/image_center", center(image))
        if "out/generate_mixed/image" in golden:
            compare.close("out/generate_mixed/image", image)
        plain = RecordedDraws(recorded, "in/", dtype, from_prior=False, mixing_choices=2 * model.levels)
        assert torch.equal(model.decode(z, None, plain), model.decode(z))
        assert torch.equal(model.eval().decode(z, None, mixing), model.decode(z))


@pytest.mark.parametrize(("updates", "training"), [("published", False), ("training", True)])
def test_average_style(golden: Golden, dtype: torch.dtype, updates: str, training: bool) -> None:
    model = model_of(golden, dtype, dlatent_avg_updates=updates).train(training)
    with torch.no_grad(), comparing(golden, dtype) as compare:
        for i, name in enumerate(("z", "z2")):
            model.decode(golden.tensor(f"in/{name}", dtype))
            compare.close(f"out/dlatent_avg_after{i + 1}", model.decoder.dlatent_avg)


@pytest.mark.parametrize(("name", "key"), having("{}", "out/mid/x_blended"))
def test_blended_input(name: str, key: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    x, blend = golden.tensor("in/x_mid", dtype), golden.value("cfg/mid_blend")
    with comparing(golden, dtype) as compare:
        compare.close(key, blended(x, blend))


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_training(name: str, run: str, dtype: torch.dtype) -> None:
    replay(files()[name], run, dtype)


def test_dropped_are_the_blur_kernels(golden: Golden) -> None:
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    dropped = [key for key in golden.under("sd/") if published_keys.is_dropped("style", key)]
    for key in dropped:
        stored = golden.tensor(f"sd/{key}", torch.float32)
        assert torch.equal(stored, kernel.expand_as(stored))
