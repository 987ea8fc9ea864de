"""From few shots to learned prompts, measured on base and novel classes, saved, loaded and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsds
from fastsds import cli
from fastsds.clip.source import ClipSource
from fastsds.commands.configs import parse
from fastsds.commands.intcoop import IntCoOpRun, load_run
from fastsds.data.captions import open_image
from fastsds.data.fewshot import FewShotSplit
from fastsds.intcoop.baselines import CoOp, ZeroShot
from fastsds.training.metrics import read_metrics


def run(*arguments: str | Path) -> None:
    words = [str(word) for word in arguments]
    assert cli.main([*words, "--debug"]) == 0, " ".join(words)


@pytest.fixture(scope="module")
def tuned(tune: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of IntCoOp on the base classes; do not change it."""
    out = tmp_path_factory.mktemp("tuned") / "intcoop"
    run(*tune, "--base-to-novel", "--train.out", out)
    return out


def figures(folder: Path) -> dict[str, float]:
    results: Any = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {name: figure["micro"] for name, figure in results["figures"].items()}


def hits(model: Any, preprocess: Any, items: Any) -> float:
    """Share of images of the class with the highest logit, image by image."""
    with torch.no_grad():
        right = [model.classify(preprocess(open_image(item.image))[None]) == [item.classname] for item in items]
    return sum(right) / len(right)


def test_train_measure_save_and_load(
    tuned: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = FewShotSplit.from_folders(world / "fewshot")
    model, clip = load_run(tuned)
    assert isinstance(model, fastsds.IntCoOp)
    assert model.classnames == split.base().classnames
    words = {json.loads(line)["attribute"] for line in (world / "fewshot/attributes.jsonl").read_text().splitlines()}
    assert model.attributes
    assert set(model.attributes) <= words

    measured = figures(tuned / "results")
    assert measured["base"] == pytest.approx(hits(model, clip.preprocess, split.base().test))
    novel = model.for_classes(split.novel().classnames)
    assert measured["novel"] == pytest.approx(hits(novel, clip.preprocess, split.novel().test))

    capsys.readouterr()
    run("evaluate", "base-to-novel", "--run", tuned, "--loading.workers", "0", "--out", tmp_path / "again")
    assert figures(tmp_path / "again") == measured
    harmonic = 2 * measured["base"] * measured["novel"] / (measured["base"] + measured["novel"])
    assert f"harmonic mean of base and novel: {harmonic:.1%}" in capsys.readouterr().out


def test_what_is_loaded_gives_the_logits_that_were_trained(
    tune: list[str], tuned: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of the run itself is caught as it is saved."""
    caught: list[Any] = []
    monkeypatch.setattr("fastsds.commands.intcoop.accuracy", lambda model, *_: caught.append(model) or _no_outcomes())
    run(*tune, "--train.out", tmp_path / "run")
    loaded, clip = load_run(tmp_path / "run")
    item = FewShotSplit.from_folders(world / "fewshot").test[0]
    image = clip.preprocess(open_image(item.image))[None]
    with torch.no_grad():
        assert torch.equal(caught[0](image), loaded(image))
    start = fastsds.IntCoOp(ClipSource("toyworld").load().model, loaded.classnames, tokenizer=clip.tokenizer)
    with torch.no_grad():
        assert not torch.allclose(start(image), loaded(image), atol=1e-3)


def _no_outcomes() -> Any:
    from fastsds.evaluation.outcomes import Figure, Outcomes

    return Outcomes("classification", {"accuracy": Figure((1.0,), ("one",))})


def test_the_config_runs_again_with_another_method(
    tune: list[str], tuned: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(IntCoOpRun, [*tune[1:], "--base-to-novel", "--train.out", str(tuned)], command="intcoop")
    assert parse(IntCoOpRun, ["--config", str(tuned / "config.yaml")], command="intcoop") == config

    out, file = tmp_path / "coop", tmp_path / "prompt_learner" / "model.pth.tar-2"
    run("intcoop", "--config", tuned / "config.yaml", "--method", "coop", "--train.out", out)
    model, _ = load_run(out)
    assert isinstance(model, CoOp)
    run("export", "--run", out, "--format", "coop", "--out", file)
    stored: Any = torch.load(file, weights_only=True)
    assert torch.equal(stored["state_dict"]["ctx"], model.context)
    assert stored["epoch"] == 2

    run("evaluate", "base-to-novel", "--run", out, "--loading.workers", "0", "--compare", tuned / "results")
    assert "| base | " in capsys.readouterr().out

    assert cli.main(["export", "--run", str(tuned), "--format", "coop", "--out", str(tmp_path / "x")]) == 1
    expected = "fastsds: format: coop holds prompts of coop and cocoop, got a run of intcoop\n"
    assert capsys.readouterr().err == expected


def test_zero_shot_trains_nothing(tune: list[str], world: Path, tmp_path: Path) -> None:
    out = tmp_path / "zeroshot"
    run(*tune, "--method", "zeroshot", "--prompts.templates", "a picture of a {}", "--train.out", out)
    clip = ClipSource("toyworld").load()
    split = FewShotSplit.from_folders(world / "fewshot")
    model = ZeroShot(clip.model, split.classnames, tokenizer=clip.tokenizer, templates=["a picture of a {}"])
    assert figures(out / "results")["accuracy"] == pytest.approx(hits(model.eval(), clip.preprocess, split.test))
    assert not (out / "checkpoints").exists()


def test_a_split_file_is_read_and_validation_logged(tune: list[str], world: Path, tmp_path: Path) -> None:
    out = tmp_path / "cocoop"
    run(*tune, "--method", "cocoop", "--data.split", world / "fewshot/split.json", "--train.out", out)
    assert "validation" in read_metrics(out / "metrics.jsonl", "evaluation")[-1]
    assert load_run(out)[0].classnames == FewShotSplit.from_folders(world / "fewshot").classnames


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.attributes", "None"],
            "data.attributes: expected a file, because intcoop learns attributes, got None",
        ),
        (["--data.attributes", "none.jsonl"], "path: could not read none.jsonl"),
        (["--data.images", "none"], "root: could not read none/train"),
        (["--train.shots", "9"], "shots: expected 9 train images of every class"),
        (["--prompts.context-length", "3"], "context_init: expected 3 tokens"),
    ],
)
def test_what_does_not_serve_is_told_in_one_line(
    options: list[str], message: str, tune: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*tune, *options, "--train.out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastsds: {message}")
    assert error.count("\n") == 1


def test_an_unfinished_run_is_told_apart(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_bytes((tuned / "config.yaml").read_bytes())
    assert cli.main(["evaluate", "base-to-novel", "--run", str(tmp_path)]) == 1
    assert "has no prompts.safetensors; finish it" in capsys.readouterr().err
