"""`fastsds evaluate diffusion-score`: the diffusion model itself on the benchmarks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import fastsds
from fastsds.commands.benchmarks import Benchmark, SugarCrepeSplit, read_examples
from fastsds.commands.configs import say
from fastsds.commands.evaluate import pick_device
from fastsds.commands.results import check_places, save_results
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.source import TeacherSource
from fastsds.evaluation.diffusion_score import Fit, diffusion_outcomes
from fastsds.evaluation.sugarcrepe import SPLITS

COST_FILE = "cost.json"


@dataclass(frozen=True)
class DiffusionScoreEvaluation:
    """The denoising diffusion score on a benchmark: the lowest distance decides, a tie is wrong.

    Timesteps and noise are shared by what is compared, and what can no longer win is dropped.

    examples:
      fastsds evaluate diffusion-score --benchmark winoground --data winoground --teacher.dtype bfloat16 \\
        --teacher.source stable-diffusion-v1-5/stable-diffusion-v1-5 --out results/diffusion
      fastsds evaluate diffusion-score --benchmark winoground --data toyworld-data/winoground --teacher.source toyworld
    """

    benchmark: Benchmark
    data: Path | str
    """Winoground's folder or hub id, ARO's JSON file, or SugarCrepe's folder of JSON files."""
    teacher: TeacherSource
    images: Path | None = None
    """Folder that image paths start from; that of `data` by default."""
    splits: tuple[SugarCrepeSplit, ...] = SPLITS  # type: ignore[assignment]
    """Of sugarcrepe."""
    fit: Fit = "whole"
    """How images come to the teacher's shape: resized whole, or cut about the centre, as in training."""
    draws: int = 256
    """Timesteps of the full grid of every example."""
    first_draws: int = 8
    """Timesteps before anything may be dropped."""
    confidence: float = 0.99
    """Nominal probability that a decision is the full grid's; 1 evaluates the full grid."""
    unet_batch: int = 64
    """Noised latents per U-Net call."""
    t_range: tuple[int, int] | None = None
    """First timestep and the one after the last; the whole schedule by default."""
    seed: int = 0
    """Of the noise."""
    out: Path | None = None
    """Folder that receives results.md, results.json, results.csv, outcomes.json, cost.json and config.yaml."""
    compare: Path | None = None
    """Results of another model on the same data: the differences are tested sample by sample, this model minus that."""
    device: str = "auto"
    """cuda where there is one, else cpu."""


def run_diffusion_score(config: DiffusionScoreEvaluation) -> None:
    check_places(config.out, config.compare)
    examples = read_examples(config.benchmark, config.data, config.images, config.splits)
    scorer = DiffusionScorer(
        config.teacher.load(pick_device(config.device)),
        t_range=config.t_range, unet_batch=config.unet_batch, seed=config.seed,
    )  # fmt: skip
    outcomes, cost, _ = diffusion_outcomes(
        scorer, examples, config.benchmark,
        draws=config.draws, first_draws=config.first_draws, confidence=config.confidence, fit=config.fit,
    )  # fmt: skip
    if config.benchmark == "sugarcrepe":
        outcomes = outcomes.with_groups_of("accuracy")
    description = {
        "model": f"diffusion score of {config.teacher.source}",
        "data": config.data,
        "fit": config.fit,
        "U-Net evaluations per decision": round(cost.per_decision, 1),
        "times fewer than the full grid": round(cost.saving, 2),
        "fastsds": fastsds.__version__,
    }
    save_results(
        config.out, outcomes, before=config.compare, description=description,
        config=config, command="evaluate diffusion-score", files={COST_FILE: json.dumps(cost.to_json(), indent=1)},
    )  # fmt: skip
    say(
        f"{cost.per_decision:.1f} U-Net evaluations per decision, {cost.saving:.1f} times fewer than the full grid of "
        f"{config.draws}; {cost.ties} ties"
    )
