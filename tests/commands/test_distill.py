"""From files to a distilled CLIP, measured, exported and loaded by open_clip alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fastsds
from fastsds import cli
from fastsds.clip.source import ClipSource
from fastsds.commands.configs import parse
from fastsds.commands.distill import DistillRun, Winoground
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.evaluation.winoground import read_winoground, winoground_scores, winoground_similarity
from fastsds.training.metrics import read_metrics


def run(*arguments: str | Path) -> None:
    words = [str(word) for word in arguments]
    assert cli.main([*words, "--debug"]) == 0, " ".join(words)


def features(clip: Any, world: Path) -> torch.Tensor:
    """Image and text features of a few examples, by open_clip's own calls."""
    model, preprocess, tokenizer = clip
    paths = sorted((world / "winoground/images").glob("*.png"))[:4]
    images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        pieces = [
            model.encode_image(images),
            model.encode_text(tokenizer(["a red circle", "a blue square above a ring"])),
        ]
    return torch.cat(pieces)


def test_distil_evaluate_export_and_load_in_open_clip(
    distilled: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, exported = tmp_path / "before", tmp_path / "after", tmp_path / "exported"
    data = ["--data", world / "winoground", "--workers", "0"]
    run("evaluate", "winoground", "--clip.name", "toyworld", *data, "--out", before)
    capsys.readouterr()
    run("evaluate", "winoground", "--checkpoint", distilled, *data, "--compare", before, "--out", after)
    printed = capsys.readouterr().out
    run("export", "--run", distilled, "--format", "open-clip", "--out", exported)

    place = f"local-dir:{exported}"
    model, preprocess = open_clip.create_model_from_pretrained(place)
    plain = (model.eval(), preprocess, open_clip.get_tokenizer(place))
    assert torch.equal(features(plain, world), features(fastsds.load_distilled(distilled), world))
    assert not torch.allclose(features(plain, world), features(ClipSource("toyworld").load(), world), atol=1e-3)

    examples = read_winoground(world / "winoground")
    pictures = [preprocess(image) for example in examples for image in example.load()]
    captions = [example.captions for example in examples]
    scores = winoground_scores(
        winoground_similarity(model, plain[2], torch.stack(pictures).unflatten(0, (-1, 2)), captions)
    )
    results = json.loads((after / "results.json").read_text(encoding="utf-8"))
    for name, share in scores.to_json().items():
        assert results["figures"][name]["micro"] == pytest.approx(share)
        assert results["comparison"][name]["after"] == pytest.approx(share)
    assert "| figure | before % | after % | difference |" in printed
    assert "McNemar" in printed
    assert {"config.yaml", "outcomes.json", "results.csv", "results.md"} <= {path.name for path in after.iterdir()}


def test_the_tuned_tensors_alone_are_the_layer_norms(distilled: Path, world: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    run("export", "--run", distilled, "--format", "tuned", "--out", file)
    model = ClipSource("toyworld").load().model
    norms = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for parameter in module.parameters()
    )
    assert sum(tensor.numel() for tensor in load_file(file).values()) == norms
    assert torch.equal(
        features(fastsds.load_distilled(file), world), features(fastsds.load_distilled(distilled), world)
    )


def test_a_run_keeps_its_config_and_says_what_comes_next(
    distil: list[str], distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = distilled / "config.yaml"
    config = parse(DistillRun, [*distil[1:], "--train.out", str(distilled)], command="distill")
    assert parse(DistillRun, ["--config", str(file)], command="distill") == config
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["clip"] == ClipSource("toyworld").to_json()

    again = tmp_path / "again"
    capsys.readouterr()
    run("distill", "--config", file, "--train.out", again)
    printed = capsys.readouterr().out
    assert f"fastsds evaluate winoground --checkpoint {again} " in printed
    assert f"fastsds export --run {again} " in printed
    first, second = (read_metrics(out / "metrics.jsonl", "train") for out in (distilled, again))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_a_stopped_run_goes_on_to_the_same_numbers(
    distil: list[str], distilled: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ctrl-C comes in the evaluation after the second of four steps."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Winoground, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT) or {})
        assert cli.main([*distil, "--train.out", str(out), "--train.evaluate-every", "2"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    saved, go_on = out / "checkpoints/step-00000002", f"fastsds distill --config {out / 'config.yaml'} --resume"
    assert last == f"fastsds: stopped after step 2 of 4, saved as {saved}; go on: {go_on}"
    run(*go_on.split()[1:])
    whole, resumed = (read_metrics(folder / "metrics.jsonl", "train") for folder in (distilled, out))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["resume"] is False


def test_a_run_stopped_before_its_first_step_says_how_to_go_on(
    distil: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C comes while the VAE encodes images for the projector."""
    out = tmp_path / "run"

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background jobs, which the tests may be, ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched:
        patched.setattr(DiffusionTeacher, "encode_images_cached", interrupt)
        assert cli.main([*distil, "--train.out", str(out)]) == 130
    signal.signal(signal.SIGINT, before)
    go_on = f"fastsds distill --config {out / 'config.yaml'} --resume"
    assert capsys.readouterr().err.splitlines()[-1] == f"fastsds: interrupted; go on: {go_on}"
    run(*go_on.split()[1:])
    assert len(read_metrics(out / "metrics.jsonl", "train")) == 4


def test_a_run_that_failed_before_it_trained_starts_again(
    distil: list[str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images are mended in the meantime, and none is left out for having been bad."""
    images = tmp_path / "train"
    words = [*distil, "--captions.images", str(images), "--train.out", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert "cannot be read and max_bad_share=" in capsys.readouterr().err
    assert (tmp_path / "run/bad_images.jsonl").is_file()
    images.symlink_to(world / "coco/train")
    run(*words)
    assert "could not be read" not in capsys.readouterr().out
    assert cli.main(words) == 1
    assert "exists; go on with --resume" in capsys.readouterr().err


def test_the_projector_starts_from_the_teachers_latents(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its latents are kept in the teacher's cache, and its fit lowers the first loss."""
    words = [*distil, "--train.steps", "1", "--sds.draws", "8", "--sds.strategy", "stratified"]
    run(*words, "--train.out", tmp_path / "fitted", "--teacher.cache", tmp_path / "cache")
    assert "the projector's start explains" in capsys.readouterr().out
    assert sum(path.stat().st_size > 4 * 8 * 8 * 4 for path in (tmp_path / "cache").rglob("*") if path.is_file()) >= 32
    run(*words, "--train.out", tmp_path / "random", "--sds.projector-images", "0")
    assert "explains" not in capsys.readouterr().out
    fitted, random = (
        read_metrics(tmp_path / name / "metrics.jsonl", "train")[0]["sds"] for name in ("fitted", "random")
    )
    assert fitted < random


def test_the_control_needs_no_teacher(distil: list[str], tmp_path: Path) -> None:
    run(*distil, "--teacher.source", tmp_path / "none", "--sds.sds-weight", "0", "--train.out", tmp_path / "control")
    rows = read_metrics(tmp_path / "control/metrics.jsonl", "train")
    assert all(row["sds"] == 0 and row["loss"] == row["contrastive"] for row in rows)


def test_ranking_asks_the_teacher(distil: list[str], tmp_path: Path) -> None:
    run(*distil, "--sds.sds-weight", "0", "--ranking.weight", "4", "--train.out", tmp_path / "run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert all(row["ranking"] > 0 for row in rows)
    assert all(row["loss"] == pytest.approx(row["contrastive"] + 4 * row["ranking"], rel=1e-5) for row in rows)


def test_evaluation_during_training_is_logged(distil: list[str], tmp_path: Path) -> None:
    run(*distil, "--sds.sds-weight", "0", "--train.evaluate-every", "2", "--train.out", tmp_path / "run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "evaluation")
    assert [row["step"] for row in rows] == [2, 4]
    assert {"winoground_text", "winoground_group"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip.name", "toyworl"], "name: 'toyworl' is no open_clip architecture"),
        (["--captions.path", "none.json"], "path: none.json does not exist"),
        (["--teacher.source", "./none"], "source: expected a diffusers pipeline folder"),
        (
            ["--teacher.source", "none"],
            "source: expected a diffusers pipeline folder with a model_index.json, got none",
        ),
        (["--winoground", "./none"], "source: none does not exist"),
        (["--batch-size", "1000"], "loader: expected at least one batch"),
        (["--sds.tune", "nothing"], "tune: 'nothing' matches none"),
    ],
)
def test_what_does_not_serve_is_told_in_one_line(
    options: list[str], message: str, distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*distil, *options, "--train.out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastsds: ")
    assert error.count("\n") == 1
    assert message in error


def test_an_existing_run_is_not_overwritten(
    distil: list[str], distilled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = (distilled / "config.yaml").stat().st_mtime_ns
    assert cli.main([*distil, "--train.out", str(distilled)]) == 1
    expected = f"fastsds: out: {distilled} exists; go on with --resume, or name another folder\n"
    assert capsys.readouterr().err == expected
    assert (distilled / "config.yaml").stat().st_mtime_ns == stamp


def test_as_a_program_with_workers(distil: list[str], distilled: Path, tmp_path: Path) -> None:
    """It ends, and by the numbers of the run in this process."""
    words = [sys.executable, "-m", "fastsds", *distil, "--workers", "2", "--train.out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "the distilled CLIP is in" in done.stdout
    inside, outside = (read_metrics(out / "metrics.jsonl", "train") for out in (distilled, tmp_path / "run"))
    assert [row["loss"] for row in outside] == pytest.approx([row["loss"] for row in inside], rel=1e-5)
