"""Short runs on the toy world's models. As a program: the runs named in the arguments, in every process of a launch.

accelerate launch --multi_gpu --num_processes 2 tests/training/toyworld_runs.py FOLDER NAME…
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from fastsds import toyworld
from fastsds.data import CaptionDataset, caption_loader
from fastsds.data.fewshot import FewShotDataset
from fastsds.diffusion import TimestepSampler
from fastsds.intcoop import IntCoOp
from fastsds.sdsclip import SDSDistiller
from fastsds.sdsclip.ranking import swap_phrases
from fastsds.toyworld.fewshot import few_shot_task
from fastsds.toyworld.scenes import SHAPES, random_pair, random_single, render
from fastsds.training import DistillConfig, DistillTrainer, IntCoOpConfig, IntCoOpTrainer, Trainer, TrainingInterrupted
from fastsds.training.processes import leave_launch

LR = 1e-3
QUIET: dict[str, Any] = {"lr": LR, "log_every": 2, "tensorboard": False, "progress": False}


def distillation(out: Path, rows: int = 10, batch_size: int = 4, workers: int = 0, **options: Any) -> Trainer:
    """Batches from pictures, the last one smaller; some captions have no candidate beside their own."""
    torch.manual_seed(0)
    clip, preprocess, tokenizer = toyworld.load_clip()
    clip.logit_scale.data.fill_(1.0)  # as trained, it tells these few captions apart and has nothing to learn
    rng = random.Random(1)
    scenes = [random_single(rng) if row % 3 == 0 or row in (8, 9) else random_pair(rng) for row in range(rows)]
    captions = [scene.caption for scene in scenes]
    candidates = [(caption, swapped) if (swapped := swap_phrases(caption)) else None for caption in captions]
    data = CaptionDataset(
        [to_pil_image(image) for image in render(scenes, seed=1)], captions, preprocess, tokenizer,
        candidates=candidates, extra={"candidate_scores": torch.tensor([0.01, 0.015]).expand(rows, 2)},
    )  # fmt: skip
    run = {"steps": 4, "save_every": 100, **options.pop("run", {})}
    bins = options.pop("bins", None)
    distiller = SDSDistiller(clip, toyworld.load_teacher(), sds_weight=0.1, **options)
    if bins is not None:
        distiller.sds_loss.sampler = TimestepSampler(1000, bins=bins, warmup=1)
    loader = caption_loader(data, batch_size, workers, drop_last=False)
    return DistillTrainer(distiller, loader, DistillConfig(out=out, **QUIET | run))


def prompt_tuning(out: Path) -> Trainer:
    torch.manual_seed(0)
    clip, preprocess, tokenizer = toyworld.load_clip()
    data = FewShotDataset(few_shot_task(3, 1, 1).train, preprocess)
    model = IntCoOp(clip, SHAPES, tokenizer=tokenizer)
    return IntCoOpTrainer(model, DataLoader(data, 4), IntCoOpConfig(out=out, shots=3, steps=6, **QUIET))


def raise_at(trainer: Trainer, call: int, number: signal.Signals) -> None:
    """Makes the process send itself a signal in a forward."""
    calls = iter(range(1, 1000))

    def hook(*_: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), number)

    trainer.module.register_forward_pre_hook(hook)


RUNS = {
    "distillation": lambda out: distillation(out, teacher_batch=1),
    "importance": lambda out: distillation(
        out, strategy="importance", draws=2, bins=2, sds_on="both", ranking_weight=1.0, run={"accumulation": 2}
    ),
    "stratified": lambda out: distillation(out, strategy="stratified", draws=3, jacobian="skip", guidance_scale=2.0),
    "intcoop": prompt_tuning,
    "saving": lambda out: distillation(out, run={"steps": 7, "save_every": 2}),
    "odd": lambda out: distillation(out, rows=11),
}


# Runs that one process of a launch disturbs, by what they are without it.
DISTURBED = {"stopped": ("distillation", 2, signal.SIGINT), "killed": ("saving", 6, signal.SIGKILL)}


def main(folder: Path, names: list[str]) -> dict[str, str]:
    """Does the runs, each in a folder of its name, and gives what it came to: `step 4`, or the error.

    `resumed NAME` goes on with a run; `odd` has data that two processes cannot share.
    """
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    outcome = {}
    for name in names:
        run = name.removeprefix("resumed ")
        resume = run != name
        kind, call, number = DISTURBED.get(run, (run, 0, signal.SIGINT))
        try:
            trainer = RUNS[kind](folder / run)
            if call and last and not resume:
                raise_at(trainer, call, number)
            outcome[name] = f"step {trainer.fit(resume=resume).step}"
        except (TrainingInterrupted, ValueError, FileExistsError) as error:
            outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    outcome = main(out, sys.argv[2:])
    (out / f"outcome-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(outcome), encoding="utf-8")
    leave_launch()
