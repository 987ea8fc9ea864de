"""Base-to-novel generalisation (Zhou et al., CVPR 2022): trained on half of the classes, measured on both halves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastsds.evaluation.similarity import strict_hits
from fastsds.evaluation.statistics import summarise
from fastsds.intcoop.prompts import PromptedCLIP

Batches = Iterable[Mapping[str, Any]]
"""Mappings of preprocessed `images` and their `labels`, as a loader of a `FewShotDataset` gives them."""


@dataclass(frozen=True)
class BaseToNovelScores:
    """Shares of test images, in [0, 1]."""

    base: float
    """Accuracy on the classes trained on, among them."""
    novel: float
    """Accuracy on the other classes, among them."""

    @property
    def harmonic(self) -> float:
        """The harmonic mean, which is the figure that the field quotes; 0 where one of the two is."""
        total = self.base + self.novel
        return 2 * self.base * self.novel / total if total else 0.0

    def to_json(self) -> dict[str, float]:
        return {"base": self.base, "novel": self.novel, "harmonic": self.harmonic}


def base_to_novel(
    model: PromptedCLIP, base: Batches, novel: Batches, novel_classnames: Sequence[str]
) -> BaseToNovelScores:
    """Measures a model of the base classes on their test images and on those of the novel classes.

    Args:
        model: trained; its classes are the base classes.
        base, novel: test images, each with labels from 0.
        novel_classnames: in the order of the novel labels.

    Raises:
        ValueError: classes that are both base and novel, labels without a class, or no images.
    """
    both = sorted(set(model.classnames) & set(novel_classnames))
    if both:
        raise ValueError(f"novel_classnames: expected classes that are not base, got {', '.join(map(repr, both))}")
    return BaseToNovelScores(
        classification_accuracy(model, base), classification_accuracy(model.for_classes(novel_classnames), novel)
    )


@torch.no_grad()
def classification_accuracy(model: PromptedCLIP, batches: Batches) -> float:
    """Share of the images whose class has the single highest logit, in [0, 1]; a tie is wrong.

    Raises:
        ValueError: no images, labels that are not positions in the model's classes, or logits that are not finite.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    hits = total = 0
    for batch in batches:
        labels = batch["labels"]
        if not bool(((labels >= 0) & (labels < len(model.classnames))).all()):
            raise ValueError(
                f"labels: expected positions below {len(model.classnames)}, the model's classes, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        hits += int(strict_hits(model(batch["images"].to(device)), labels).sum())
        total += len(labels)
    model.train(was_training)
    if total == 0:
        raise ValueError("batches: expected at least one image, got none")
    return hits / total


def summarise_base_to_novel(runs: Sequence[BaseToNovelScores], samples: int) -> dict[str, dict[str, Any]]:
    """Mean and 95 % interval of `base`, `novel` and `harmonic` over the seeds, as `statistics.summarise` gives them.

    The harmonic mean is taken per seed and then averaged, so that its interval is over seeds like the others.
    CoOp's tables take it of the averages.

    Args:
        samples: test images of each half, for the interval where there is one seed.
    """
    rows = [run.to_json() for run in runs]
    return {name: summarise([row[name] for row in rows], samples) for name in ("base", "novel", "harmonic")}
