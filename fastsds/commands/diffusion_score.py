"""`fastsds evaluate diffusion-score`: the diffusion model itself on the benchmarks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import fastsds
from fastsds.commands.benchmarks import Benchmark, SugarCrepeSplit, read_classified, read_examples
from fastsds.commands.configs import say
from fastsds.commands.evaluate import pick_device
from fastsds.commands.results import check_places, save_results
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.source import TeacherSource
from fastsds.evaluation.classification import read_templates
from fastsds.evaluation.diffusion_score import (
    DiffusionOutcomes,
    Fit,
    diffusion_outcomes,
    diffusion_retrieval_outcomes,
    diffusion_zero_shot_outcomes,
)
from fastsds.evaluation.retrieval import read_captioned_images
from fastsds.evaluation.sugarcrepe import SPLITS

COST_FILE = "cost.json"
Judged: TypeAlias = Literal[Benchmark, "zeroshot", "retrieval"]


@dataclass(frozen=True)
class DiffusionScoreEvaluation:
    """The denoising diffusion score on a benchmark: the lowest distance decides, a tie is wrong.

    Timesteps and noise are shared by what is compared, and what can no longer win is dropped. In zeroshot an image is
    the class whose caption has the lowest distance (Diffusion Classifier, Li et al., ICCV 2023). Retrieval gives R@1
    both ways; R@5 and R@10 need whole rankings, which dropping does not give. Both set every image against every
    caption, and first print what that costs.

    examples:
      fastsds evaluate diffusion-score --benchmark winoground --data winoground --teacher.dtype bfloat16 \\
        --teacher.source stable-diffusion-v1-5/stable-diffusion-v1-5 --out results/diffusion
      fastsds evaluate diffusion-score --benchmark winoground --data toyworld-data/winoground --teacher.source toyworld
      fastsds evaluate diffusion-score --benchmark zeroshot --data imagenet/part --classnames imagenet \\
        --teacher.source stable-diffusion-v1-5/stable-diffusion-v1-5 --teacher.dtype bfloat16 --fit centre
      fastsds evaluate diffusion-score --benchmark retrieval --data coco_part.json --images coco \\
        --teacher.source stable-diffusion-v1-5/stable-diffusion-v1-5 --teacher.dtype bfloat16
    """

    benchmark: Judged
    data: Path | str
    """Winoground's folder or hub id, ARO's JSON file, SugarCrepe's folder of JSON files, or what evaluate zeroshot and
    evaluate retrieval take."""
    teacher: TeacherSource
    images: Path | None = None
    """Folder that image paths start from; that of `data` by default."""
    splits: tuple[SugarCrepeSplit, ...] = SPLITS  # type: ignore[assignment]
    """Of sugarcrepe."""
    torchvision: str | None = None
    """Of zeroshot: a data set by torchvision's name, such as CIFAR10, that lies in `data`; nothing is downloaded."""
    classnames: Path | str | None = None
    """Of zeroshot: imagenet, or a text or JSON file; the folders' or torchvision's own names by default."""
    templates: Path | str = "photo"
    """Of zeroshot: photo (a photo of a {}.), or a text or JSON file of one: distances are not averaged over prompts."""
    split: str = "test"
    """Of retrieval, in Karpathy's own file."""
    captions: int | None = 5
    """Of retrieval, the first so many of every image; None for all."""
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

    def __post_init__(self) -> None:
        for name in ("torchvision", "classnames"):
            if getattr(self, name) is not None and self.benchmark != "zeroshot":
                raise ValueError(f"{name}: expected with benchmark=zeroshot alone, got benchmark={self.benchmark}")


def run_diffusion_score(config: DiffusionScoreEvaluation) -> None:
    check_places(config.out, config.compare)
    outcomes, cost, _ = _judge(config)
    if config.benchmark == "sugarcrepe":
        outcomes = outcomes.with_groups_of("accuracy")
    description = {
        "model": f"diffusion score of {config.teacher.source}",
        "data": config.torchvision or config.data,
        "fit": config.fit,
        **({"templates": config.templates} if config.benchmark == "zeroshot" else {}),
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
        f"{config.draws} draws of each pair; {cost.ties} ties"
    )


def _judge(config: DiffusionScoreEvaluation) -> DiffusionOutcomes:
    """The data is read before the teacher is loaded."""
    options: dict[str, Any] = {
        "draws": config.draws, "first_draws": config.first_draws, "confidence": config.confidence, "fit": config.fit,
    }  # fmt: skip
    if config.benchmark == "zeroshot":
        template = _one_template(config.templates)
        classified = read_classified(Path(config.data), config.torchvision, config.classnames)
        _say_cost(config, len(classified.keys) * len(set(classified.classnames)))
        return diffusion_zero_shot_outcomes(_scorer(config), classified, template, **options)
    if config.benchmark == "retrieval":
        path = Path(config.data)
        captioned = read_captioned_images(path, config.images or path.parent, config.split, config.captions)
        captions = {text for texts in captioned.captions for text in texts}
        _say_cost(config, 2 * len(captioned.images) * len(captions))
        return diffusion_retrieval_outcomes(_scorer(config), captioned, **options)
    examples = read_examples(config.benchmark, config.data, config.images, config.splits)
    return diffusion_outcomes(_scorer(config), examples, config.benchmark, **options)


def _scorer(config: DiffusionScoreEvaluation) -> DiffusionScorer:
    teacher = config.teacher.load(pick_device(config.device))
    return DiffusionScorer(teacher, t_range=config.t_range, unet_batch=config.unet_batch, seed=config.seed)


def _one_template(source: Path | str) -> str:
    templates = read_templates(source)
    if len(templates) > 1:
        raise ValueError(
            f"templates: expected one, as the diffusion score has no mean over prompts, got {len(templates)} of "
            f"{source}; give photo, or a file of one line"
        )
    return templates[0]


def _say_cost(config: DiffusionScoreEvaluation, pairs: int) -> None:
    least = config.draws if config.confidence == 1 else config.first_draws
    say(
        f"{pairs:,} pairs of an image and a caption: at least {pairs * least:,} U-Net evaluations, "
        f"{pairs * config.draws:,} in the full grid"
    )
