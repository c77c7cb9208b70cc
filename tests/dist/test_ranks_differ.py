"""A rank that is not like the others is found and named before the first step, or at the next checkpoint; no hang."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from launching import accelerate_launch

from sivae_dist.distributed.consistency import agree, differences, told
from sivae_dist.distributed.digest import digest, rows
from sivae_dist.distributed.group import Group
from sivae_dist.engine.agreement import check_start
from sivae_dist.engine.config import from_dict
from sivae_dist.errors import UserError

SETTINGS = {
    "model": {"name": "mlp"},
    "data": {"name": "toy2d"},
    "train": {"kimg": 0.5, "batch": 50},
    "checkpoint": {"every_kimg": 0.1, "best": None},
    "tracking": {"every_kimg": 0.1, "images_every_kimg": 0, "progress": False, "tensorboard": False},
    "eval": {"every_kimg": 0, "at_start": False},
}


def launched(folder: Path, differs: str, *options: object, ranks: int = 2) -> tuple[int, str]:
    """Status and output of a training on CPU ranks of which number 1 differs."""
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    script = str(Path(__file__).with_name("differs.py"))
    given = ["--config", folder / "config.yaml", "--out", folder / "run", *options]
    done = accelerate_launch(ranks, script, *map(str, given), timeout=120, env={"DIFFERS": differs})
    return done.returncode, done.stdout + done.stderr


def refused(folder: Path, differs: str, *says: str, options: tuple[object, ...] = (), ranks: int = 2) -> str:
    status, output = launched(folder, differs, *options, ranks=ranks)
    assert status != 0
    assert output.count("error (rank") == 1 and output.count("fix: ") == 1, output
    for text in says:
        assert output.count(text) == 1, (text, output)
    return output


@pytest.mark.dist
def test_code_versions_and_settings(tmp_path: Path) -> None:
    numpy = __import__("numpy").__version__
    says = ("the ranks differ", f"rank 1 has numpy 1.2.3, the others {numpy}", "sivae_dist/engine/ema.py 0123456789ab")
    setting = "rank 1 has the setting train.seed 7, the others 0"
    refused(tmp_path, "version,code,--train.seed=7", *says, setting, ranks=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_weights_before_the_first_step(tmp_path: Path) -> None:
    output = refused(tmp_path, "weights", "rank 1 has weights of the decoder ")
    assert "encoder" not in output
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ("SIVAE_KERNELS=reference", "rank 1 has the kernels' mode reference, rank 0 has auto"),
        ("--data.density=rings", "rank 1 has the setting data.density rings, rank 0 has "),
    ],
)
def test_other_differences(tmp_path: Path, differs: str, says: str) -> None:
    refused(tmp_path, differs, says)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    """As on machines without shared storage: rank 0 would go on, rank 1 would begin."""
    assert launched(tmp_path, "", "--train.kimg", 0.1)[0] == 0
    says = ("rank 1 has the checkpoint none, rank 0 has nimg-000000100", "rank 1 has images seen 0, rank 0 has 100")
    refused(tmp_path, f"--out={tmp_path / 'elsewhere'}", *says)


@pytest.mark.dist
def test_weights_that_part_are_found_at_the_next_checkpoint(tmp_path: Path) -> None:
    output = refused(tmp_path, "drift", "after 200 images the ranks differ: rank 1 has weights of the encoder ")
    assert "goes on from the last checkpoint" in output
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("nimg-*"))] == ["nimg-000000100"]
    metrics = [json.loads(line)["nimg"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(metrics) <= 200


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("differs", "check"), [("drift", "start"), ("version", "off"), ("", "checkpoints")])
def test_the_switch(tmp_path: Path, differs: str, check: str) -> None:
    assert launched(tmp_path, differs, "--distributed.check", check)[0] == 0


@pytest.mark.parametrize(
    ("ranks", "data", "collective", "refused"),
    [(2, 300, 301.0, False), (2, 300, 300.0, True), (3, 300, 60.5, True), (1, 300, 60.0, False), (2, None, 5.0, False)],
)
def test_data_are_given_up_before_collectives_are(
    ranks: int, data: int | None, collective: float, refused: bool
) -> None:
    source = {"name": "toy2d"} if data is None else {"url": "nowhere", "timeout_s": data}
    config = from_dict({"data": source, "distributed": {"timeout_s": collective, "check": "off"}}, "test")
    if not refused:
        check_start(Group(0, ranks), config, torch.device("cpu"))
        return
    says = rf"data\.timeout_s is 300 and distributed\.timeout_s {collective:g}.*{ranks} ranks"
    with pytest.raises(UserError, match=says):
        check_start(Group(0, ranks), config, torch.device("cpu"))


def test_one_rank_agrees_with_itself() -> None:
    agree(Group(), {"torch": "1"}, "")


def facts_of(values: str) -> list[dict[str, str]]:
    """One rank a word; `-` has no such fact."""
    return [{} if word == "-" else {"torch": word} for word in values.split()]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("a a a", ""),
        ("a a a b", "rank 3 has torch b, the others a"),
        ("b a a b a", "ranks 0 and 3 have torch b, the others a"),
        ("a b", "rank 1 has torch b, rank 0 has a"),
        ("a -", "rank 1 has no torch, rank 0 has a"),
        ("- - b", "rank 2 has torch b, the others no such"),
        ("a a b c", "rank 2 has torch b, rank 3 has torch c, ranks 0 and 1 have a"),
    ],
)
def test_who_is_named(values: str, says: str) -> None:
    assert told(differences(facts_of(values)), None) == says


def test_machines_are_named_where_there_are_several() -> None:
    assert told(differences(facts_of("a a b")), ["one", "one", "two"]) == "rank 2 (two) has torch b, the others a"


def test_a_long_list_of_differences_is_cut() -> None:
    text = told(differences([{str(n): "a" for n in range(300)}, {str(n): "b" * 500 for n in range(300)}]), None)
    assert text.endswith("and 292 more differences") and len(text) < 1500


TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(70000, dtype=torch.float64),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.zeros(0),
    "e": torch.ones(5, dtype=torch.bfloat16),
    "f": torch.tensor([True, False]),
}


def test_a_digest_tells_bits_places_and_names() -> None:
    first = digest(TENSORS)
    assert first == digest(dict(reversed(TENSORS.items())))  # the order does not matter
    assert first.norm == pytest.approx(
        math.sqrt(sum(float((t.double() ** 2).sum()) for n, t in TENSORS.items() if n in "abde"))
    )
    seen = {first.hash}
    for name, tensor in TENSORS.items():
        if not tensor.numel():
            continue
        changed = tensor.clone()
        changed.view(-1)[-1] = ~changed.view(-1)[-1] if tensor.dtype == torch.bool else changed.view(-1)[-1] * 1.01 + 1
        seen.add(digest({**TENSORS, name: changed}).hash)
    seen.add(digest({**TENSORS, "a": TENSORS["a"].flip(0)}).hash)
    seen.add(digest({**TENSORS, "a": TENSORS["a"].reshape(4, 3)}).hash)
    seen.add(digest({n if n != "a" else "z": t for n, t in TENSORS.items()}).hash)
    zero = torch.zeros(3)
    seen |= {digest({"x": zero}).hash, digest({"x": -zero}).hash}
    assert len(seen) == 5 + 1 + 3 + 2


def test_a_digest_does_not_depend_on_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert digest({"x": x}) == digest({"x": x.to(memory_format=torch.channels_last)})


def test_rows_add_up_in_any_order() -> None:
    numbers, values = torch.tensor([3, 9, 4]), torch.randn(3, 2, 2)
    whole = rows(5, numbers, values)
    parts = rows(5, numbers[[2, 0]], values[[2, 0]]) + rows(5, numbers[1:2], values[1:2])
    assert whole == parts
    assert whole != rows(5, numbers, values.flip(0))
    assert whole != rows(6, numbers, values)


@pytest.mark.dist
@pytest.mark.slow
def test_several_ranks_leave_the_fingerprints_of_one(tmp_path: Path) -> None:
    """Data and noise bit for bit, all else up to rounding."""
    from sivae_dist.apps.diff import diff

    runs = []
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        runs.append(tmp_path / str(ranks) / "run")
        assert launched(tmp_path / str(ranks), "", "--train.kimg", 0.2, ranks=ranks)[0] == 0
    for other in runs[1:]:
        found = diff(runs[0], other, 1e-5)
        assert found.verdict == "rounding"
        same = [thing.name for step in found.steps[1:] for thing in step.things if thing.same]
        for name in ("data: positions", "data: values", "noise: draws"):
            assert same.count(name) == 3  # after iterations 1, 2, 4


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_digest_of_shards_is_that_of_the_whole(ranks: int) -> None:
    done = accelerate_launch(ranks, str(Path(__file__).with_name("probe_digest.py")), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
