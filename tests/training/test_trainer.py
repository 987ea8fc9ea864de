from __future__ import annotations

import copy
import itertools
import json
import math
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastsds.clip import ModelMismatchError
from fastsds.diffusion import DiffusionTeacher, TimestepSampler
from fastsds.diffusion.timesteps import SeedStream
from fastsds.sdsclip import SDSDistiller
from fastsds.training import CheckpointError, DistillConfig, DistillTrainer, NonFiniteLossError, Trainer
from fastsds.training.checkpoint import latest_checkpoint
from fastsds.training.metrics import read_metrics

# A distillation of 6 batches an epoch; run as a program it kills itself in the forward of step `kill`.
DISTILLATION = """
import json, os, signal, sys
from pathlib import Path

import open_clip, torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from open_clip.tokenizer import HFTokenizer
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastsds.diffusion import DiffusionTeacher
from fastsds.sdsclip import SDSDistiller
from fastsds.toyworld import models
from fastsds.training import DistillConfig, DistillTrainer


class Mortal(SDSDistiller):
    kill, forwards = None, 0

    def forward(self, *args, **kwargs):
        self.forwards += 1
        if self.forwards == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)


def run(folder, out, save_every, log_every, kill=None, resume=False):
    torch.manual_seed(0)
    tokens = CLIPTokenizer.from_pretrained(folder)
    tokenizer = HFTokenizer(folder, context_length=models.CONTEXT_LENGTH)
    clip = open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={
            "context_length": models.CONTEXT_LENGTH, "vocab_size": len(tokens),
            "width": 32, "heads": 2, "layers": 2,
        },
    )
    teacher = DiffusionTeacher(
        UNet2DConditionModel(**models.UNET_CONFIG),
        None,
        CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **models.TEXT_ENCODER_CONFIG)),
        tokens,
        DDIMScheduler(**models.SCHEDULER_CONFIG),
    )
    words = ["red circle", "blue circle", "red square", "blue square"]
    captions = [f"a {size} {word}" for size in ("small", "large", "red") for word in words]
    images = torch.randn(12, 3, 32, 32)
    rows = list(zip(images, tokenizer(captions), captions))

    def collate(rows):
        images, tokens, captions = zip(*rows)
        return {"images": torch.stack(images), "tokens": torch.stack(tokens), "captions": list(captions)}

    distiller = Mortal(clip, teacher, sds_weight=0.1, teacher_batch=1)
    distiller.kill = kill
    config = DistillConfig(
        out=Path(out), steps=20, lr=1e-3, warmup_steps=4, save_every=save_every, log_every=log_every, progress=False,
        tensorboard=False,
    )
    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    DistillTrainer(distiller, loader, config).fit(resume=resume)
    return {name: parameter.detach().clone() for name, parameter in distiller.trained_parameters().items()}


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, tokenizer_folder: Path) -> None:
    script = tmp_path / "distillation.py"
    script.write_text(DISTILLATION, encoding="utf-8")
    killed = {"folder": str(tokenizer_folder), "out": str(tmp_path / "killed"), "save_every": 5, "log_every": 2}
    process = subprocess.run(
        [sys.executable, str(script), json.dumps({**killed, "kill": 14})], capture_output=True, text=True, timeout=600
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    # in the middle of the third epoch; the metrics are ahead of the checkpoint and have to be cut
    last = latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert last is not None and last.name == "step-00000010"
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl", "train")[-1]["step"] == 12

    run = runpy.run_path(str(script))["run"]
    resumed = run(**killed, resume=True)
    whole = run(str(tokenizer_folder), str(tmp_path / "whole"), save_every=7, log_every=3)
    assert whole.keys() == resumed.keys() and len(whole) == 22 + 2
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    lines = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("killed", "whole")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(1, 21))


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a run from within."""


def _stop_at(call: int) -> Callable[[int], None]:
    def stop(current: int) -> None:
        if current == call:
            raise _Stop

    return stop


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _train_metrics(config: Any) -> list[dict[str, float]]:
    return read_metrics(config.out / "metrics.jsonl", "train")


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        ({"save_every": 4}, 10),  # between two checkpoints, in the middle of an epoch
        ({}, 8),  # a checkpoint at the end of the epoch
        ({"save_every": 2, "accumulation": 2, "steps": 8}, 12),
        ({"save_every": 100}, 5),  # before the first checkpoint
    ],
)
def test_resumed_runs_draw_the_same_dropout_and_order(
    toy: Any, loader: Any, config: Any, tmp_path: Path, options: dict[str, Any], stop: int
) -> None:
    options = {"steps": 15, **options}
    whole = toy(dropout=0.5)
    torch.manual_seed(3)
    Trainer(whole, loader(), config(**options, out=tmp_path / "whole")).fit()

    stopped = toy(dropout=0.5, on_forward=_stop_at(stop))
    torch.manual_seed(3)
    with pytest.raises(_Stop):
        Trainer(stopped, loader(), config(**options)).fit()
    resumed = toy(dropout=0.5)
    torch.manual_seed(3 if options.get("save_every") == 100 else 4)  # the state is the checkpoint's
    Trainer(resumed, loader(), config(**options)).fit(resume=True)
    assert all(torch.equal(tensor, _weights(whole)[name]) for name, tensor in _weights(resumed).items())
    assert whole.seen[-len(resumed.seen) :] == resumed.seen
    assert _train_metrics(config()) == _train_metrics(config(out=tmp_path / "whole"))


def test_a_trainer_goes_on_after_an_error_as_a_new_one_does(toy: Any, loader: Any, config: Any, tmp_path: Path) -> None:
    """It was ended between the two batches of a step, and its losses were not written yet."""
    options = {"steps": 6, "save_every": 2, "accumulation": 2}
    whole, stopped = toy(), toy(on_forward=_stop_at(8))
    Trainer(whole, loader(), config(**options, out=tmp_path / "whole")).fit()
    trainer = Trainer(stopped, loader(), config(**options))
    with pytest.raises(_Stop):
        trainer.fit()
    assert trainer.fit(resume=True).step == 6
    assert all(torch.equal(tensor, _weights(whole)[name]) for name, tensor in _weights(stopped).items())
    assert _train_metrics(config()) == _train_metrics(config(out=tmp_path / "whole"))


def test_resuming_with_a_lower_rate_uses_it_at_once(toy: Any, loader: Any, config: Any) -> None:
    with pytest.raises(_Stop):
        Trainer(toy(on_forward=_stop_at(8)), loader(), config(steps=12, save_every=5)).fit()
    Trainer(toy(), loader(), config(steps=12, save_every=5, lr=0.01)).fit(resume=True)
    expected = [(0.05 if step < 5 else 0.01) * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert [record["lr"] for record in _train_metrics(config())] == pytest.approx(expected)


def test_a_finished_run_has_nothing_left_to_do(toy: Any, loader: Any, config: Any) -> None:
    first = Trainer(toy(), loader(), config(steps=4)).fit()
    module = toy()
    again = Trainer(module, loader(), config(steps=4)).fit(resume=True)
    assert module.seen == []
    assert (again.step, again.checkpoint) == (first.step, first.checkpoint)
    assert len(_train_metrics(config())) == 4


def test_a_folder_with_a_run_is_not_written_over(toy: Any, loader: Any, config: Any) -> None:
    Trainer(toy(), loader(), config(steps=2)).fit()
    before = (config().out / "metrics.jsonl").read_bytes()
    module = toy()
    with pytest.raises(
        FileExistsError, match=rf"out: {config().out} exists and is not empty; resume the run in it, or name"
    ):
        Trainer(module, loader(), config(steps=2)).fit()
    assert module.seen == [] and (config().out / "metrics.jsonl").read_bytes() == before


def test_an_empty_folder_may_be_used_and_resuming_nothing_starts(toy: Any, loader: Any, config: Any) -> None:
    config().out.mkdir()
    assert Trainer(toy(), loader(), config(steps=2)).fit().step == 2
    other = config(steps=2, out=config().out / "other")
    assert Trainer(toy(), loader(), other).fit(resume=True).step == 2


def test_only_trained_parameters_move(toy: Any, loader: Any, config: Any) -> None:
    module = toy()
    before = _weights(module)
    result = Trainer(module, loader(), config(epochs=2, weight_decay=0.1)).fit()
    after = _weights(module)
    assert torch.equal(after["frozen"], before["frozen"])
    assert not torch.equal(after["linear.weight"], before["linear.weight"])
    stored = load_file(result.checkpoint / "trained.safetensors")
    assert stored.keys() == {"linear.weight", "linear.bias"}
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored.items())
    losses = [record["loss"] for record in _train_metrics(config())]
    assert sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize("log_every", [1, 4, 100])
@pytest.mark.parametrize("part", ["loss", "half", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(toy: Any, loader: Any, config: Any, part: str, log_every: int) -> None:
    options = {"steps": 12, "save_every": 3, "log_every": log_every}
    with pytest.raises(NonFiniteLossError) as caught:
        Trainer(toy(bad=(6, part)), loader(), config(**options)).fit()
    message = str(caught.value)
    good = config().out / "checkpoints" / "step-00000003"
    assert "at step 6 " in message
    assert f"(not finite: {'grad_norm' if part == 'gradient' else part})" in message
    assert f"The last good checkpoint is {good};" in message
    # the bad step was due for a checkpoint
    assert sorted(path.name for path in good.parent.iterdir()) == ["step-00000003"]
    assert [record["step"] for record in _train_metrics(config())] == [1, 2, 3, 4, 5]
    assert Trainer(toy(), loader(), config(**options)).fit(resume=True).step == 12


def test_gradients_that_are_not_finite_are_seen_without_clipping(toy: Any, loader: Any, config: Any) -> None:
    with pytest.raises(NonFiniteLossError, match=r"grad_norm.*last good checkpoint is none"):
        Trainer(toy(bad=(2, "gradient")), loader(), config(steps=4, max_grad_norm=None)).fit()


def test_accumulated_batches_equal_one_large_batch(toy: Any, loader: Any, config: Any, tmp_path: Path) -> None:
    large, small = toy().double(), toy().double()
    options = {"steps": 5, "max_grad_norm": 0.7}

    def rows(batch_size: int) -> Any:
        made = loader(batch_size=batch_size, shuffle=False)
        made.dataset.x, made.dataset.y = made.dataset.x.double(), made.dataset.y.double()
        return made

    Trainer(large, rows(4), config(**options)).fit()
    Trainer(small, rows(2), config(**options, accumulation=2, out=tmp_path / "small")).fit()
    assert [len(batch) for batch in large.seen] == [4] * 5 and [len(batch) for batch in small.seen] == [2] * 10
    for name, tensor in _weights(large).items():
        torch.testing.assert_close(_weights(small)[name], tensor, rtol=1e-12, atol=1e-12)
    metrics = _train_metrics(config()), _train_metrics(config(out=tmp_path / "small"))
    for key in ("loss", "half", "grad_norm", "lr"):
        assert [one[key] for one in metrics[1]] == pytest.approx([one[key] for one in metrics[0]], rel=1e-6)


def test_steps_follow_from_epochs_and_accumulation(toy: Any, loader: Any, config: Any) -> None:
    # six batches by four: a step of four and one of the two that are left
    trainer = Trainer(toy(), loader(), config(epochs=3, accumulation=4))
    assert (trainer.steps_per_epoch, trainer.total_steps) == (2, 6)
    assert trainer.fit().step == 6


def test_learning_rate_warms_up_and_falls_as_a_cosine(toy: Any, loader: Any, config: Any) -> None:
    Trainer(toy(), loader(), config(steps=10, warmup_steps=3)).fit()
    expected = [0.05 / 3, 0.1 / 3, 0.05] + [0.025 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert [record["lr"] for record in _train_metrics(config())] == pytest.approx(expected, rel=1e-9)


def test_learning_rate_can_be_held_before_it_falls(toy: Any, loader: Any, config: Any) -> None:
    Trainer(toy(), loader(), config(steps=10, warmup_steps=2, decay_share=0.4)).fit()
    expected = [0.025, *[0.05] * 5] + [0.025 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [record["lr"] for record in _train_metrics(config())] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_decay_share_outside_its_range_is_refused(config: Any, share: float) -> None:
    with pytest.raises(ValueError, match=r"decay_share: expected a share in \(0, 1\], got"):
        config(decay_share=share)


def test_the_logged_rate_is_the_one_applied(toy: Any, loader: Any, config: Any) -> None:
    """Adam's first step moves every weight by the rate, whatever the gradient."""
    module = toy()
    before = _weights(module)["linear.weight"]
    Trainer(module, loader(), config(steps=1, warmup_steps=4)).fit()
    moved = (_weights(module)["linear.weight"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05 / 4), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("limit", "clipped"), [(0.5, True), (1e6, False), (None, False)])
def test_gradients_are_clipped_to_their_norm(
    toy: Any, loader: Any, config: Any, limit: float | None, clipped: bool
) -> None:
    made = loader(shuffle=False)
    module = toy()
    x, y = made.dataset.x[:2], made.dataset.y[:2]
    error = x @ _weights(module)["linear.weight"][0] - y
    # the gradient of the mean square, by hand
    gradient = torch.cat([(error[:, None] * x).sum(dim=0), error.sum()[None]])
    result = Trainer(module, made, config(steps=1, max_grad_norm=limit)).fit()
    (record,) = _train_metrics(config())
    assert record["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert gradient.norm() > 1
    optimizer = load_file(result.checkpoint / "optimizer.safetensors")
    average = torch.cat([optimizer["0.exp_avg"].flatten(), optimizer["1.exp_avg"]])  # a tenth of what Adam was given
    expected = gradient * (limit / gradient.norm()) if clipped else gradient
    torch.testing.assert_close(average, 0.1 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("keep", "expected"), [(1, [10]), (2, [9, 10]), (3, [6, 9, 10]), (10, [3, 6, 9, 10])])
def test_the_last_checkpoints_are_kept(toy: Any, loader: Any, config: Any, keep: int, expected: list[int]) -> None:
    result = Trainer(toy(), loader(), config(steps=10, save_every=3, keep_checkpoints=keep)).fit()
    found = sorted(path.name for path in (config().out / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in expected]
    assert result.checkpoint.name == found[-1]


def test_a_copy_that_a_user_made_beside_the_checkpoints_stays(toy: Any, loader: Any, config: Any) -> None:
    copies = [config().out / "checkpoints" / name for name in ("step-00000001-best", "step-best")]
    for folder in copies:
        folder.mkdir(parents=True)
    result = Trainer(toy(), loader(), config(steps=4, save_every=1, keep_checkpoints=2)).fit(resume=True)
    kept = result.checkpoint.with_name("step-00000003")
    assert sorted(result.checkpoint.parent.iterdir()) == [copies[0], kept, result.checkpoint, copies[1]]


def test_what_a_killed_process_had_begun_to_write_goes(toy: Any, loader: Any, config: Any) -> None:
    begun = config().out / "checkpoints" / ".step-00000009.partial"
    begun.mkdir(parents=True)
    (begun / "trained.safetensors").write_bytes(b"half")
    result = Trainer(toy(), loader(), config(steps=2)).fit(resume=True)
    assert list(begun.parent.iterdir()) == [result.checkpoint]


def test_checkpoints_come_at_the_end_of_epochs_by_default(toy: Any, loader: Any, config: Any) -> None:
    Trainer(toy(), loader(), config(steps=14)).fit()
    found = sorted(path.name for path in (config().out / "checkpoints").iterdir())
    assert found == ["step-00000006", "step-00000012", "step-00000014"]


@pytest.mark.parametrize(("every", "expected"), [(None, [10]), (4, [4, 8, 10]), (5, [5, 10])])
def test_evaluation_is_called_when_due_in_evaluation_mode(
    toy: Any, loader: Any, config: Any, every: int | None, expected: list[int]
) -> None:
    module = toy()
    calls: list[tuple[int, bool, bool, bool]] = []

    def evaluate(evaluated: nn.Module) -> dict[str, float]:
        calls.append((len(module.seen), evaluated is module, evaluated.training, torch.is_grad_enabled()))
        return {"accuracy": len(calls) / 10}

    result = Trainer(module, loader(), config(steps=10, evaluate_every=every), evaluate).fit()
    assert calls == [(step, True, False, False) for step in expected]
    assert module.modes == [True] * 10
    records = read_metrics(config().out / "metrics.jsonl", "evaluation")
    shares = [(number + 1) / 10 for number in range(len(expected))]
    assert [(record["step"], record["accuracy"]) for record in records] == list(zip(expected, shares, strict=True))
    assert result.evaluation == {"accuracy": shares[-1]}


def test_order_differs_by_epoch_and_seed_and_is_the_same_between_runs(
    toy: Any, loader: Any, config: Any, tmp_path: Path
) -> None:
    orders = []
    for name, seed in (("one", 0), ("two", 0), ("three", 11)):
        module = toy()
        torch.manual_seed(len(orders))  # the order hangs on the run's seed alone
        Trainer(module, loader(), config(epochs=3, seed=seed, out=tmp_path / name)).fit()
        orders.append([list(chain.from_iterable(module.seen[start : start + 6])) for start in (0, 6, 12)])
    for epoch in orders[0]:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in orders[0]}) == 3
    assert orders[1] == orders[0] and orders[2][0] != orders[0][0]


def test_bfloat16_computes_in_it_and_keeps_float32_weights(toy: Any, loader: Any, config: Any) -> None:
    module = toy()
    Trainer(module, loader(), config(steps=6, mixed_precision="bf16")).fit()
    assert set(module.dtypes) == {torch.bfloat16}
    assert module.linear.weight.dtype == torch.float32 and module.linear.weight.isfinite().all()
    assert len(_train_metrics(config())) == 6


def _scaled(trainer: Trainer) -> Trainer:
    """With the gradient scaler of fp16, which accelerate gives to a GPU alone."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    trainer._optimizer = AcceleratedOptimizer(trainer._optimizer.optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [trainer._optimizer]
    return trainer


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_scaled_gradient_that_overflows_costs_its_step_alone(
    toy: Any, loader: Any, config: Any, tmp_path: Path, max_grad_norm: float | None
) -> None:
    options = {"steps": 9, "save_every": 5, "max_grad_norm": max_grad_norm}
    configs = {name: config(**options, out=tmp_path / name) for name in ("plain", "whole", "stopped")}
    Trainer(toy(), loader(), configs["plain"]).fit()
    whole, stopped = toy(bad=(4, "gradient")), toy(bad=(4, "gradient"), on_forward=_stop_at(8))
    runs = [Trainer(toy_, loader(), configs[name]) for toy_, name in ((whole, "whole"), (stopped, "stopped"))]
    resumed = Trainer(toy(), loader(), configs["stopped"])
    _scaled(runs[0]).fit()
    scale = runs[0].accelerator.scaler.get_scale()
    assert scale == 2.0**11  # doubled after the third step, halved at the fourth, doubled after the seventh
    with pytest.raises(_Stop):
        _scaled(runs[1]).fit()
    _scaled(resumed).fit(resume=True)
    assert resumed.accelerator.scaler.get_scale() == scale
    assert all(torch.equal(tensor, _weights(whole)[name]) for name, tensor in _weights(resumed.module).items())
    scaled, plain = _train_metrics(configs["stopped"]), _train_metrics(configs["plain"])
    assert [row["step"] for row in scaled if not math.isfinite(row["grad_norm"])] == [4]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in scaled[:3]] == pytest.approx([row[name] for row in plain[:3]], rel=1e-5)


def test_a_loader_without_batches_is_refused(toy: Any, loader: Any, config: Any) -> None:
    with pytest.raises(
        ValueError, match=r"loader: expected at least one batch, got none \(is the data smaller than one"
    ):
        Trainer(toy(), loader(batch_size=50, drop_last=True), config())
    assert not config().out.exists()


def test_a_module_without_trained_parameters_is_refused(toy: Any, loader: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="module: expected parameters to train, got none"):
        Trainer(toy().requires_grad_(False), loader(), config())


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("epochs", 0), ("steps", 0), ("accumulation", -1), ("save_every", 0), ("max_grad_norm", 0.0)],
)
def test_options_outside_their_range_are_refused(config: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0, got {value}"):
        config(**{name: value})


def test_tensorboard_holds_the_metrics(toy: Any, loader: Any, config: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(toy(), loader(), config(steps=3, tensorboard=True), lambda module: {"accuracy": 0.25}).fit()
    events = EventAccumulator(str(config().out / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in _train_metrics(config())]
    assert logged == expected and len(logged) == 3
    assert [(event.step, event.value) for event in events.Scalars("evaluation/accuracy")] == [(3, 0.25)]


def _distill(loader: Any, out: Path, *, tune: str = "layernorm", resume: bool = False, **options: Any) -> None:
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": 16,
            "layers": options.pop("layers", 1),
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        text_cfg={"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        **options,
    )

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        images = torch.stack([row["x"] for row in rows]).view(-1, 3, 1, 1).expand(-1, 3, 16, 16)
        tokens = torch.stack([row["index"] for row in rows]).view(-1, 1).expand(-1, 4)
        return {"images": images, "tokens": tokens, "captions": ["" for _ in rows]}

    config = DistillConfig(out=out, steps=2, progress=False, tensorboard=False)
    distiller = SDSDistiller(clip, None, sds_weight=0, tune=tune)
    DistillTrainer(distiller, loader(collate_fn=collate), config).fit(resume=resume)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quick_gelu": True}, "activation was 'GELU' when it was written and is 'QuickGELU' in this model"),
        ({"layers": 2}, "parameters was"),
        ({"tune": "all"}, "it tunes 14 of CLIP's parameters and this distiller"),
    ],
)
def test_checkpoints_of_another_model_are_refused(
    loader: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    _distill(loader, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ModelMismatchError, match=message):
        _distill(loader, tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    _distill(loader, tmp_path / "run", resume=True)


def test_a_run_of_another_length_is_refused(toy: Any, loader: Any, config: Any) -> None:
    Trainer(toy(), loader(), config(steps=4)).fit()
    with pytest.raises(
        CheckpointError, match="step-00000004: it belongs to a run of 4 steps and this one has 9; the learn"
    ):
        Trainer(toy(), loader(), config(steps=9)).fit(resume=True)


@pytest.mark.parametrize(("before", "after"), [([], ["noise"]), (["noise", "timesteps"], ["noise"])])
def test_a_run_of_other_noise_is_refused(
    toy: Any, loader: Any, config: Any, before: list[str], after: list[str]
) -> None:
    """As where the strategy of the timesteps has changed."""

    def module(names: list[str]) -> Any:
        made = toy()
        made.random_streams = lambda: {name: SeedStream(0) for name in names}
        return made

    Trainer(module(before), loader(), config(steps=4)).fit()
    trainer = Trainer(module(after), loader(), config(steps=4))
    message = f"step-00000004: expected random streams noise, got {', '.join(before) or 'none'}; resume with the opt"
    with pytest.raises(CheckpointError, match=message):
        trainer.fit(resume=True)
    assert Trainer(module(before), loader(), config(steps=4)).fit(resume=True).step == 4


@pytest.mark.parametrize("clip", ["CLIP"], indirect=True)
def test_a_resumed_run_continues_the_learned_timesteps(
    clip: nn.Module, clip_tokenizer: Any, teacher: DiffusionTeacher, tmp_path: Path
) -> None:
    captions = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square", "ring")]
    rows = list(zip(torch.randn(6, 3, 32, 32), clip_tokenizer(captions), captions, strict=True))
    start = copy.deepcopy(clip)

    def collate(rows: list[Any]) -> dict[str, Any]:
        images, tokens, captions = zip(*rows, strict=True)
        return {"images": torch.stack(images), "tokens": torch.stack(tokens), "captions": list(captions)}

    def run(out: str, stop: int | None = None, resume: bool = False) -> SDSDistiller:
        torch.manual_seed(0)
        distiller = SDSDistiller(copy.deepcopy(start), teacher, sds_weight=0.1, strategy="importance", draws=2)
        distiller.sds_loss.sampler = TimestepSampler(1000, bins=2, warmup=2)
        if stop is not None:
            calls = itertools.count(1)
            distiller.register_forward_pre_hook(lambda *_: _stop_at(stop)(next(calls)))
        config = DistillConfig(out=tmp_path / out, steps=10, lr=1e-2, save_every=4, progress=False, tensorboard=False)
        DistillTrainer(distiller, DataLoader(rows, 3, shuffle=True, collate_fn=collate), config).fit(resume=resume)
        return distiller

    whole = run("whole")
    with pytest.raises(_Stop):
        run("stopped", stop=7)
    resumed = run("stopped", resume=True)
    state, expected = (distiller.random_streams()["timesteps"].state_dict() for distiller in (resumed, whole))
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(torch.equal(tensor, _weights(whole)[name]) for name, tensor in _weights(resumed).items())
    cdf = whole.sds_loss.sampler.cdf(torch.device("cpu"))
    assert abs(cdf[499] - 0.5) > 0.01  # it had learned something to lose
