"""What `fastsds intcoop` and `fastsds evaluate base-to-novel` have in common: few-shot data, and accuracy on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from fastsds.clip.source import LoadedCLIP
from fastsds.commands.configs import default_workers
from fastsds.data.attributes import read_attributes
from fastsds.data.fewshot import FewShotDataset, FewShotSplit, LabelledImage
from fastsds.data.workers import read_batches, worker_options
from fastsds.evaluation.base_to_novel import BaseToNovelScores
from fastsds.evaluation.outcomes import Figure, Outcomes
from fastsds.evaluation.similarity import strict_hits
from fastsds.intcoop.prompts import PromptedCLIP

BASE_TO_NOVEL = "base-to-novel"


@dataclass(frozen=True)
class FewShotSource:
    """Images of classes, in the formats of CoOp."""

    images: Path
    """Folder that the split file's paths start from; without a split file, of train/<class>, val/<class>, test/<class>.
    """
    split: Path | None = None
    """split_zhou_<Dataset>.json."""
    attributes: Path | None = None
    """JSON lines of every training image's attribute, as `fastsds attributes` writes them; only intcoop needs them."""

    def load(self) -> FewShotSplit:
        """
        Raises:
            DataError: what cannot be read or is not of the format, by name.
        """
        if self.split is None:
            return FewShotSplit.from_folders(self.images)
        return FewShotSplit.from_json(self.split, self.images)

    def with_attributes(self, split: FewShotSplit) -> FewShotSplit:
        """
        Raises:
            ValueError: no file of attributes is named.
            DataError: it cannot be read, or training images have none.
        """
        if self.attributes is None:
            raise ValueError(
                "data.attributes: expected a file, because intcoop learns attributes, got None; "
                "make one with `fastsds attributes`"
            )
        return split.with_attributes(read_attributes(self.attributes))


@dataclass(frozen=True)
class Loading:
    """How images are read for measuring."""

    batch_size: int = 100
    workers: int = field(default_factory=default_workers)
    """Processes that read images, by default 4 or one per core; 0 reads them in this one."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def accuracy(model: PromptedCLIP, split: FewShotSplit, clip: LoadedCLIP, loading: Loading) -> Outcomes:
    """Outcomes of all classes, which are the model's, on the test images; macro is over the classes."""
    return Outcomes("classification", {"accuracy": _figure(model, split.test, clip, loading)})


def base_to_novel(model: PromptedCLIP, split: FewShotSplit, clip: LoadedCLIP, loading: Loading) -> Outcomes:
    """Outcomes of a model of the base classes on the test images of both halves of `split`.

    Raises:
        ValueError: the model has other classes.
    """
    base, novel = split.base(), split.novel()
    if model.classnames != base.classnames:
        raise ValueError(
            f"data: expected the {len(model.classnames)} base classes that the run was trained on, "
            f"got {len(base.classnames)}, first {base.classnames[0]!r} for {model.classnames[0]!r}"
        )
    figures = {
        "base": _figure(model, base.test, clip, loading),
        "novel": _figure(model.for_classes(novel.classnames), novel.test, clip, loading),
    }
    return Outcomes(BASE_TO_NOVEL, figures)


def harmonic_mean(outcomes: Outcomes) -> float:
    """Of base and novel accuracy, which is the figure that the field quotes."""
    return BaseToNovelScores(outcomes.figures["base"].micro, outcomes.figures["novel"].micro).harmonic


@torch.no_grad()
def _figure(model: PromptedCLIP, items: Sequence[LabelledImage], clip: LoadedCLIP, loading: Loading) -> Figure:
    device = next(model.parameters()).device
    model.eval()
    data = FewShotDataset(items, clip.preprocess)
    loader = DataLoader(data, loading.batch_size, **worker_options(loading.workers))
    hits = [strict_hits(model(batch["images"].to(device)), batch["labels"]).cpu() for batch in read_batches(loader)]
    return Figure(
        tuple(torch.cat(hits).double().tolist()),
        tuple(item.key for item in items),
        tuple(item.classname for item in items),
        1 / len(model.classnames),
    )
