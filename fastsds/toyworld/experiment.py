"""One arm of the toy experiment: what it trains on, how, and what it scores before and after."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from fastsds.data.captions import CaptionDataset, collate_captions
from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.diffusion.timesteps import SeedStream
from fastsds.evaluation.winoground import (
    WinogroundScores,
    prefers_own_caption,
    winoground_scores,
    winoground_similarity,
)
from fastsds.evaluation.zeroshot import zero_shot_accuracy
from fastsds.sdsclip.distiller import SDSDistiller, SDSOn
from fastsds.sdsclip.ranking import swap_phrases
from fastsds.toyworld import CLIP_FOLDER, NOISIEST, TEACHER_FOLDER, load_clip, load_teacher
from fastsds.toyworld.scenes import RELATIONS
from fastsds.toyworld.tasks import (
    CompositionPairs,
    SingleThings,
    Split,
    TrainingScenes,
    composition_pairs,
    preprocess_all,
    single_things,
    training_scenes,
)
from fastsds.training.distill import DistillConfig, DistillTrainer

ZERO_SHOT_TEMPLATES = ("a photo of {}",)
SCORE_DRAWS = 8  # noise draws per image where the teacher is evaluated


@dataclass(frozen=True)
class Arm:
    """A way to train; the defaults are the paper's recipe at the toy world's learning rate."""

    name: str
    title: str
    tune: str = "layernorm"
    lr: float = 1e-3
    sds_weight: float = 0.0
    sds_on: SDSOn = "image"
    t_range: tuple[int, int] | None = None
    weighting: Weighting = "uniform"
    ridge_start: bool = True
    """Whether the projector starts as the ridge regression."""
    ranking: str | None = None
    """Targets of the candidates: `teacher`, `labels`, or None for no ranking."""
    ranking_weight: float = 4.0
    ranking_temperature: float = 0.001
    relation_stated: bool = True
    """Whether the captions state the relation, or only name the things."""


@dataclass(frozen=True)
class Setting:
    """What all arms of an experiment share."""

    steps: int
    batch: int = 64
    train_scenes: int = 10_240
    eval_pairs: int = 400
    eval_singles: int = 1000
    score_draws: int = 2
    """Noise draws per candidate where the teacher's scores are targets."""
    split: Split = "test"
    curve_points: int = 4
    """Evaluations on validation pairs along a run."""
    clip_folder: Path = CLIP_FOLDER
    teacher_folder: Path = TEACHER_FOLDER


class Evaluation:
    """The test sets, preprocessed once for a CLIP model's family."""

    def __init__(self, preprocess: Any, split: Split, pairs: int, singles: int) -> None:
        self.pairs: dict[str, CompositionPairs] = {
            "relation": composition_pairs("relation", pairs, split),
            "attribute": composition_pairs("attribute", pairs, split),
        }
        self.singles: SingleThings = single_things(singles, split)
        self._pair_images = {
            name: preprocess_all(preprocess, task.images.flatten(0, 1)).unflatten(0, (-1, 2))
            for name, task in self.pairs.items()
        }
        self._single_images = preprocess_all(preprocess, self.singles.images)

    def similarity(self, clip: nn.Module, tokenizer: Any, swap: str) -> Tensor:
        return winoground_similarity(clip, tokenizer, self._pair_images[swap], self.pairs[swap].captions)

    def measure(self, clip: nn.Module, tokenizer: Any) -> dict[str, float]:
        """Zero-shot accuracy and the composition scores, as flat names: `relation_pair`, `zero_shot`, …"""
        figures = {
            "zero_shot": zero_shot_accuracy(
                clip,
                tokenizer,
                self._single_images,
                self.singles.labels,
                [name.removeprefix("a ") for name in self.singles.classnames],
                ["a photo of a {}"],
            )
        }
        for swap in self.pairs:
            figures |= flatten_scores(swap, winoground_scores(self.similarity(clip, tokenizer, swap)))
        return figures

    def preferences(self, clip: nn.Module, tokenizer: Any, swap: str) -> Tensor:
        """`[examples, 2]`: whether each image prefers its own caption."""
        return prefers_own_caption(self.similarity(clip, tokenizer, swap))


def flatten_scores(swap: str, scores: WinogroundScores) -> dict[str, float]:
    return {f"{swap}_{name}": value for name, value in scores.to_json().items()}


def measure_teacher(teacher: DiffusionTeacher, evaluation: Evaluation, pairs: int | None = None) -> dict[str, float]:
    """The composition scores of the teacher's own diffusion score (lower distance, higher similarity)."""
    scorer = DiffusionScorer(teacher, SCORE_DRAWS, t_range=NOISIEST)
    figures: dict[str, float] = {}
    for swap, task in evaluation.pairs.items():
        images = task.images[:pairs]
        captions = [captions for captions in task.captions[:pairs] for _ in range(2)]
        distance = scorer.score_images(images.flatten(0, 1), captions)  # [examples * 2 images, 2 captions]
        similarity = -distance.unflatten(0, (-1, 2)).transpose(1, 2)
        figures |= flatten_scores(swap, winoground_scores(similarity))
    return figures


def teacher_scores(setting: Setting, seed: int) -> Float[Tensor, "scenes candidates"]:
    """The teacher's score of each candidate of the training scenes of a seed; 0 where a scene has no candidates.

    The noise is another for every 256 scenes.
    """
    scenes = training_scenes(setting.train_scenes, seed)
    scorer = DiffusionScorer(
        load_teacher(setting.teacher_folder), setting.score_draws, t_range=NOISIEST, unet_batch=256
    )
    noise = SeedStream(seed)
    scores = torch.zeros(len(scenes.images), 2)
    ranked = torch.tensor([row for row, candidates in enumerate(scenes.candidates) if candidates is not None])
    for rows in ranked.split(256):
        latents = scorer.teacher.encode_images(scenes.images[rows])
        candidates = [scenes.candidates[row] or [] for row in rows.tolist()]
        scores[rows] = scorer.score_latents(latents, candidates, seed=noise.next(latents.device))
    return scores


def train_arm(arm: Arm, seed: int, setting: Setting, out: Path, scores: Tensor | None) -> dict[str, Any]:
    """Trains one arm from the shipped CLIP; returns its figures and which of the test scenes' captions it prefers.

    Args:
        out: folder of the run, with its metrics.
        scores: `teacher_scores` of this seed, where the arm's ranking is the teacher's.
    """
    torch.manual_seed(seed)
    clip, preprocess, tokenizer = load_clip(setting.clip_folder)
    teacher = load_teacher(setting.teacher_folder) if arm.sds_weight else None
    distiller = SDSDistiller(
        clip, teacher, arm.sds_weight, arm.tune,
        sds_on=arm.sds_on, t_range=arm.t_range, weighting=arm.weighting, strategy="stratified",
        ranking_weight=arm.ranking_weight if arm.ranking else 0.0, ranking_temperature=arm.ranking_temperature,
        seed=seed,
    )  # fmt: skip
    scenes = training_scenes(setting.train_scenes, seed, relation_stated=arm.relation_stated)
    dataset = _dataset(arm, scenes, preprocess, tokenizer, scores)
    if distiller.projector is not None and arm.ridge_start:
        assert teacher is not None
        images = preprocess_all(preprocess, scenes.images)
        pieces = zip(images.split(256), scenes.images.split(256), strict=True)
        distiller.fit_projector((piece, teacher.encode_images(raw)) for piece, raw in pieces)
    loader = DataLoader(dataset, setting.batch, shuffle=True, drop_last=True, collate_fn=collate_captions)
    validation = Evaluation(preprocess, "validation", 100, 100)
    config = DistillConfig(
        out=out, lr=arm.lr, steps=setting.steps, warmup_steps=setting.steps // 20, decay_share=0.7, seed=seed,
        evaluate_every=max(setting.steps // setting.curve_points, 1), save_every=setting.steps, tensorboard=False,
        progress=False,
    )  # fmt: skip
    DistillTrainer(distiller, loader, config, lambda _: validation.measure(clip, tokenizer)).fit()
    evaluation = Evaluation(preprocess, setting.split, setting.eval_pairs, setting.eval_singles)
    return {
        "figures": evaluation.measure(clip, tokenizer),
        "preferences": evaluation.preferences(clip, tokenizer, "relation").tolist(),
    }


def _dataset(
    arm: Arm, scenes: TrainingScenes, preprocess: Any, tokenizer: Any, scores: Tensor | None
) -> CaptionDataset:
    candidates, extra = None, {}
    if arm.ranking == "teacher":
        assert scores is not None
        candidates, extra = scenes.candidates, {"candidate_scores": scores}
    elif arm.ranking == "labels":
        candidates, labels = _labelled(scenes)
        extra = {"candidate_labels": labels}
    images = [to_pil_image(image) for image in scenes.images]
    return CaptionDataset(images, scenes.captions, preprocess, _cached(tokenizer), candidates=candidates, extra=extra)


def _cached(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """The toy world has few different captions: each is tokenized once."""
    tokens_of = functools.cache(lambda caption: tokenizer([caption])[0])
    return lambda captions: torch.stack([tokens_of(caption) for caption in captions])


def _labelled(scenes: TrainingScenes) -> tuple[list[list[str] | None], Tensor]:
    """The caption that an image came with, labelled right, against itself with the noun phrases swapped.

    Where captions state the relation these are the teacher's candidates; where they do not, the swap of `a red circle
    and a blue square` is as true as the caption, which is all that labels can say there.
    """
    rng = random.Random(0)
    candidates: list[list[str] | None] = []
    labels: list[int] = []
    for caption in scenes.captions:
        swapped = swap_phrases(caption, (*RELATIONS, "and"))
        if swapped is None:
            candidates.append(None)
            labels.append(0)
            continue
        row = [caption, swapped]
        rng.shuffle(row)
        candidates.append(row)
        labels.append(row.index(caption))
    return candidates, torch.tensor(labels)
