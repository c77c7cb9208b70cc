"""Published files become run folders whose networks give the recorded outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from published_files import fixture, in_another_process, save, state_dict
from torch import Tensor

import sivae_dist
from sivae_dist.cli import main
from sivae_dist.errors import UserError
from sivae_dist.interop.published import read

SINGLE = 1e-5  # relative to the largest entry


def close(new: Tensor, stored: np.ndarray) -> bool:
    return bool(np.abs(new.double().numpy() - stored).max() <= SINGLE * np.abs(stored).max())


def run_import(*arguments: object, capsys: Any) -> str:
    main(["import", *map(str, arguments)])
    return str(capsys.readouterr().out)


def check_outputs(run: Path, name: str, prefix: str = "out/eval/") -> None:
    arrays, trained = fixture(name), sivae_dist.load(run)
    condition = torch.from_numpy(arrays["in/cond"]) if "in/cond" in arrays else None
    q = trained.encode(torch.from_numpy(arrays["in/x"]), condition)
    assert close(q.mu, arrays[f"{prefix}mu"]) and close(q.logvar, arrays[f"{prefix}logvar"])
    with torch.no_grad():
        if f"{prefix}decode" in arrays:
            image = trained.model.decode(torch.from_numpy(arrays["in/z"]), condition)
            assert close(image, arrays[f"{prefix}decode"])
        if "out/train/rec" in arrays:  # the small fixtures keep one picture each
            image = trained.model.train().decode(torch.from_numpy(arrays["out/train/z"]).float(), condition)
            assert close(image, arrays["out/train/rec"])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["residual_1", "residual_3", "residual_4"])
def test_residual(name: str, legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(name)
    path = save({"epoch": 249, "model": state}, tmp_path / "model_epoch_249_iter_1.pth", legacy=legacy)
    said = run_import(path, "--out", tmp_path / "run", capsys=capsys)
    assert said.startswith("soft-introvae-residual: ") and f"{len(state)} entries" in said and "249" in said
    check_outputs(tmp_path / "run", name)
    model: Any = sivae_dist.load(tmp_path / "run").config.model
    assert model.image_size == fixture(name)["cfg/image_size"] and model.zdim == fixture(name)["cfg/zdim"]
    facts = json.loads((tmp_path / "run/imported.json").read_text())
    assert facts["used"].keys() == state.keys() and facts["unused"] == facts["missing"] == []
    assert len(set(facts["used"].values())) == len(state) and facts["epoch"] == 249


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    state = state_dict("residual_1")
    path = save({"epoch": 1, "model": state}, tmp_path / "a.pth")
    library = torch.load(path, weights_only=True)["model"]
    found = read(path)
    assert library.keys() == found.used.keys()
    assert all(torch.equal(value, found.weights[found.used[key]]) for key, value in library.items())


def test_bare_state_dict_and_bootstrap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict("residual_3")
    run_import(save(state, tmp_path / "bare.pth"), "--out", tmp_path / "bare", capsys=capsys)
    check_outputs(tmp_path / "bare", "residual_3")
    target = {key.replace("decoder.", "target_decoder.", 1): v + 1 for key, v in state.items() if key[0] == "d"}
    path = save({"epoch": 3, "model": {**state, **target}}, tmp_path / "bootstrap.pth")
    said = run_import(path, "--out", tmp_path / "bootstrap", capsys=capsys)
    assert said.startswith("soft-introvae-bootstrap") and f"target_decoder.* ({len(target)})" in said
    check_outputs(tmp_path / "bootstrap", "residual_3")
    assert json.loads((tmp_path / "bootstrap/imported.json").read_text())["unused"] == list(target)


def test_twod(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save({"epoch": 0, "model": state_dict("twod_1")}, tmp_path / "twod.pth")
    said = run_import(path, "--out", tmp_path / "run", capsys=capsys)
    assert said.startswith("soft-introvae-2d") and "decoder.* (1)" in said
    check_outputs(tmp_path / "run", "twod_1", "out/")
    assert sivae_dist.load(tmp_path / "run").config.objective.scale == 0.5  # type: ignore[attr-defined]


CONTENT = "{'epoch': 7, 'model': introvae_module(state_dict('introvae_1'))}"
INTROVAE = {
    "zip": f"torch.save({CONTENT}, sys.argv[1])",
    "legacy": f"torch.save({CONTENT}, sys.argv[1], _use_new_zipfile_serialization=False)",
    "torch 0.3": f"save_as_torch_03({CONTENT}, Path(sys.argv[1]))",
}


@pytest.mark.parametrize("how", INTROVAE)
def test_pickled_introvae_module(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = in_another_process(INTROVAE[how], tmp_path / "model_epoch_7_iter_0.pth")
    said = run_import(path, "--out", tmp_path / "run", capsys=capsys)
    assert said.startswith("introvae: ") and "block introvae" in said
    assert "networks" not in sys.modules and "torch.nn.backends.thnn" not in sys.modules
    check_outputs(tmp_path / "run", "introvae_1")
    missing = json.loads((tmp_path / "run/imported.json").read_text())["missing"]
    assert all(key.endswith("num_batches_tracked") for key in missing) and bool(missing) == (how == "torch 0.3")


def test_state_dict_of_introvae_needs_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its names are those of the residual network; only the user knows the order within a block."""
    path = save({"epoch": 7, "model": state_dict("introvae_1")}, tmp_path / "a.pth")
    assert read(path).format == "soft-introvae-residual"
    run_import(path, "--format", "introvae", "--out", tmp_path / "run", capsys=capsys)
    check_outputs(tmp_path / "run", "introvae_1")
    assert sivae_dist.load(tmp_path / "run").config.objective.name == "introvae"


def test_wide_equal_skips_are_told_from_their_keys(tmp_path: Path) -> None:
    from sivae_dist.interop.published_keys import names
    from sivae_dist.models.residual import ResidualConfig

    config = ResidualConfig(image_size=16, channels=(4, 260, 260), zdim=3, block="introvae",
                            equal_width_skip="published_introvae")  # fmt: skip
    published = {
        key.replace("channels", ""): value
        for key, value in _as_published(config.build().state_dict(), image_size=16, widths=3).items()
    }
    assert set(names("introvae", published).values()) == config.build().state_dict().keys()
    path = save({"epoch": 1, "model": published}, tmp_path / "a.pth")
    found = read(path)
    assert (found.format, found.model) == ("introvae", config)


def _as_published(ours: dict[str, Tensor], *, image_size: int, widths: int) -> dict[str, Tensor]:
    """Our names back to published ones, written down independently of the importer's table."""
    parts = {"skip": "conv_expand", "conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2"}
    fixed = {"encoder.stem.conv": "encoder.main.0", "encoder.stem.norm": "encoder.main.1", "encoder.head": "encoder.fc",
             "decoder.head": "decoder.fc.0", "decoder.output": "decoder.main.predict"}  # fmt: skip
    result = {}
    for key, value in ours.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in fixed:
            result[f"{fixed[prefix]}.{leaf}"] = value
            continue
        words = prefix.split(".")
        player, index = words[0], int(words[2]) if words[1] == "stages" else None
        if player == "encoder":
            size = image_size >> (widths if index is None else index + 1)
        else:
            size = 4 << (widths if index is None else index)
        result[f"{player}.main.res_in_{size}.{parts[words[-1]]}.{leaf}"] = value
    return result


# ---- style -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_style(legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The averaged networks become our average, the trained ones our weights; both share the average style."""
    flag = f"_use_new_zipfile_serialization={not legacy}"
    code = f"torch.save(style_content(state_dict('style_1')), sys.argv[1], {flag})"
    path = in_another_process(code, tmp_path / "ffhq_fid_17.55_epoch_270.pth")
    said = run_import(path, "--out", tmp_path / "run", capsys=capsys)
    assert said.startswith("soft-introvae-style: ") and "averaged weights" in said and "270" in said
    assert "tracker" not in sys.modules
    facts = json.loads((tmp_path / "run/imported.json").read_text())
    assert facts["average"] and facts["missing"] == []
    assert all(key.endswith("blur.weight") or key.startswith("auxiliary.") for key in facts["unused"])

    arrays, trained = fixture("style_1"), sivae_dist.load(tmp_path / "run")
    assert trained.config.objective.decoder_z == "reencode"  # type: ignore[attr-defined]
    q = trained.encode(torch.from_numpy(arrays["in/x_final"]).float())
    assert close(q.mu, arrays["out/final/mu"]) and close(q.logvar, arrays["out/final/logvar"])
    decoder: Any = trained.model.decoder
    with torch.no_grad():
        assert close(decoder.map(torch.from_numpy(arrays["in/z"]).float()), arrays["out/mapping_fl"])
        trained.model.set_level(int(arrays["cfg/mid_lod"]))
        decoder.noise = "published_bump"
        image = decoder.synthesise(torch.from_numpy(arrays["in/w"]).float())
    assert close(image, arrays["out/mid_noblend/dec_deterministic"])

    other = sivae_dist.load(tmp_path / "run", average=False).model.state_dict()
    for name, value in trained.model.state_dict().items():
        assert torch.allclose(other[name], value + (0.0 if name == "decoder.dlatent_avg" else 1.0))


def test_style_without_averages_or_with_half_of_them(tmp_path: Path) -> None:
    from published_files import style_content

    sys.modules.pop("tracker", None)
    content = style_content(state_dict("style_1"))
    sys.modules.pop("tracker", None)
    del content["auxiliary"]
    models = content["models"]
    half = {**content, "models": {k: v for k, v in models.items() if k != "generator_s"}}
    none = {**content, "models": {k: v for k, v in models.items() if not k.endswith("_s")}}
    assert read(save(none, tmp_path / "none.pth")).average is None
    with pytest.raises(UserError, match="without all parts of a style network"):
        read(save(half, tmp_path / "half.pth"))
    models["mapping_fl_s"]["map_blocks.99999.fc.weight"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"no soft-introvae-style network has: 'mapping_fl.map_blocks.99999"):
        read(save(content, tmp_path / "odd.pth"))


def test_a_recipe_that_grows_keeps_the_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files do not tell the images seen: at 0 the recipe would have a network of 4 px."""
    code = "torch.save(style_content(state_dict('style_1')), sys.argv[1])"
    path, run, recipe = in_another_process(code, tmp_path / "ffhq.pth"), tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text("progressive: {enabled: true, level_kimg: 0.96, fade_kimg: 0.48}\n")
    arguments = (path, "--config", recipe, "--out")
    said = run_import(*arguments, run, capsys=capsys)
    assert "3.361 kimg are taken as seen" in said and "nimg-000003361" in said
    arrays, trained = fixture("style_1"), sivae_dist.load(run)
    q = trained.encode(torch.from_numpy(arrays["in/x_final"]).float())
    assert close(q.mu, arrays["out/final/mu"]) and close(q.logvar, arrays["out/final/logvar"])
    assert trained.decode(q.mu).shape == (3, 3, 32, 32)
    for nimg in (3360, 3361):  # the iteration before the checkpoint, and the first one after it
        stage = trained.config.progressive.at(nimg, trained.model.levels)
        assert (stage.level, stage.blend) == (3, 1.0)
    assert trained.config.progressive.at(3359, trained.model.levels).blend < 1

    assert "taken as seen" not in run_import(*arguments, tmp_path / "later", "--kimg", 4, capsys=capsys)
    assert sivae_dist.load(tmp_path / "later").sample(1).shape == (1, 3, 32, 32)
    with pytest.raises(SystemExit):
        main(["import", *map(str, arguments), str(tmp_path / "early"), "--kimg", "3.36"])
    told = capsys.readouterr().err
    assert "--kimg is 3.36" in told and "at full size from 3.361 kimg on" in told and not (tmp_path / "early").exists()


# ---- the run folder ------------------------------------------------------------------------------------------------


def test_evaluate_and_train_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is a run: it evaluates, and training starts from the imported weights."""
    from sivae_dist.models.residual import ResidualConfig

    torch.manual_seed(1)
    config = ResidualConfig(image_size=16, channels=(4, 6), zdim=5)
    path = save({"epoch": 2, "model": _as_published(config.build().state_dict(), image_size=16, widths=2)},
                tmp_path / "a.pth")  # fmt: skip
    shards, run = tmp_path / "shards", tmp_path / "run"
    main(["data", "scenes", str(shards), "--resolution", "16", "--count", "24", "--val-count", "8", "--workers", "1"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "model": {"image_size": 16, "channels": [4, 6], "zdim": 5},
        "data": {"url": "elsewhere", "workers": 0, "lanes": 4, "window": 4},
        "train": {"kimg": 2.032, "batch": 8}, "eval": {"images": 8}, "tracking": {"progress": False, "images": 4},
    }))  # fmt: skip
    arguments = ("--config", recipe, "--data", shards, "--kimg", "2")
    said = run_import(path, "--out", run, *arguments, capsys=capsys)
    assert "nimg-000002000" in said
    main(["evaluate", str(run), "--images", "8"])
    assert "eval/psnr" in capsys.readouterr().out
    before = sivae_dist.load(run).model.state_dict()
    main(["train", "--config", str(run / "config.yaml"), "--out", str(run)])
    assert (run / "checkpoints/latest").read_text().strip() == "nimg-000002032"
    after = sivae_dist.load(run, average=False).model.state_dict()
    moved = [float((after[k] - before[k]).abs().max()) for k in before if k.endswith("conv1.weight")]
    assert 0 < max(moved) < 0.01  # four steps of Adam from the imported weights, no new start
    with pytest.raises(SystemExit):
        main(["import", str(path), "--out", str(run)])
    assert "already holds a run" in capsys.readouterr().err


def test_recipe_of_another_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save({"epoch": 2, "model": state_dict("residual_1")}, tmp_path / "a.pth")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {zdim: 99}\n")
    with pytest.raises(SystemExit):
        main(["import", str(path), "--out", str(tmp_path / "run"), "--config", str(recipe)])
    assert "model.zdim is 99, in the file 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- what does not fit -----------------------------------------------------------------------------------------------


def _without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


CHANGES: dict[str, Any] = {
    "missing: 'encoder.last.conv1.weight'": lambda s: _without(s, "encoder.main.res_in_4.conv1.weight"),
    "no soft-introvae-residual network has: 'encoder.mian.7'": lambda s: {**s, "encoder.mian.7": torch.zeros(2)},
    "in excess: 'decoder.main.predict.extra'": lambda s: {**s, "decoder.main.predict.extra": torch.zeros(2)},
    "encoder.main.1.bias (7,) instead of (6,)": lambda s: {**s, "encoder.main.1.bias": torch.zeros(7)},
    "encoder.main.1.bias torch.int64": lambda s: {**s, "encoder.main.1.bias": torch.zeros(6, dtype=torch.int64)},
    "do not make up a published residual network": lambda s: {**s, "encoder.fc.bias": torch.zeros(20)},
    "holds no published network": lambda s: {"x": torch.zeros(2)},
    "holds no published network: entries 'x'": lambda s: {"x": {"y": 1}},
    "point-cloud network is not part": lambda s: {"encoder.conv.0.weight": torch.zeros(64, 3, 1),
                                                  "decoder.model.0.weight": torch.zeros(64, 128)},
}  # fmt: skip


@pytest.mark.parametrize("says", CHANGES)
def test_what_does_not_fit_is_named(says: str, tmp_path: Path) -> None:
    path = save({"epoch": 0, "model": CHANGES[says](state_dict("residual_1"))}, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        read(path)
    assert says in caught.value.what


def test_wrong_format_is_told(tmp_path: Path) -> None:
    path = save({"epoch": 0, "model": state_dict("twod_1")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no introvae checkpoint, but soft-introvae-2d"):
        read(path, "introvae")


def test_nan_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict("residual_3")
    state["encoder.fc.bias"][:3] = torch.tensor([float("nan"), float("inf"), 0.0])
    path = save({"epoch": 0, "model": state}, tmp_path / "a.pth")
    assert "2 values are NaN or infinite" in run_import(path, "--out", tmp_path / "run", capsys=capsys)


def test_the_command_offers_every_format() -> None:
    from typing import get_args

    from sivae_dist.cli.import_published import Choice
    from sivae_dist.interop.published import FORMATS

    assert get_args(Choice) == ("auto", *FORMATS)
