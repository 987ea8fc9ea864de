"""Prompt tuning on the common loop: few shots, and the frozen image tower run once per image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastsds.data.captions import DataError
from fastsds.data.fewshot import FewShotDataset, sample_shots
from fastsds.data.workers import read_batches, worker_options
from fastsds.intcoop.model import IntCoOp
from fastsds.intcoop.prompts import PromptedCLIP, PromptLosses
from fastsds.training.config import TrainConfig
from fastsds.training.trainer import Evaluate, Trainer


@dataclass(frozen=True)
class IntCoOpConfig(TrainConfig):
    """Options of a prompt-tuning run."""

    out: Path = Path("runs/intcoop")
    lr: float = 2e-3
    """Peak learning rate (*reading*: the field's, which trains with SGD)."""
    epochs: int = 50
    shots: int | None = 16
    """Images of every class that are drawn from the loader's data by the field's rule, with `seed` (*stated*: 16);
    None trains on all of them."""
    cache_features: bool = True
    """Run the frozen image tower once per image and keep what it gives. Without it the tower runs at every step, as
    random augmentation needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"shots: expected at least 1 or None, got {self.shots}")


class IntCoOpTrainer(Trainer):
    """Trains the prompts of an `IntCoOp`, or of a baseline.

    Args:
        model: an `IntCoOp`, `CoOp` or `CoCoOp`.
        loader: over a `FewShotDataset` of the model's classes; its batch size and workers are used. `IntCoOp` needs an
            attribute for every image.
        config: of the run.
        evaluate: called with the model in evaluation mode; its figures are logged.

    Raises:
        TypeError: data of another kind.
        DataError: fewer images of a class than `shots`, images without attributes, or labels the model has no class
            for.
    """

    def __init__(
        self,
        model: PromptedCLIP,
        loader: DataLoader[Any],
        config: IntCoOpConfig | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        config = config or IntCoOpConfig()
        self.model = model
        dataset = _draw(loader.dataset, config)
        _check_classes(dataset, model)
        if isinstance(model, IntCoOp):
            words = _attributes(dataset)
            model.attributes = model.attributes or sorted(set(words))
        data: Dataset[dict[str, Any]] = dataset
        if config.cache_features:
            images = DataLoader(dataset, loader.batch_size, **worker_options(loader.num_workers))
            data = CachedFeatures(model, images)
        prompts_loader = DataLoader(
            data,
            loader.batch_size,
            shuffle=True,
            drop_last=loader.drop_last,
            num_workers=0 if config.cache_features else loader.num_workers,
        )
        evaluate_model = None if evaluate is None else lambda _: evaluate(model)
        super().__init__(PromptTuning(model), prompts_loader, config, evaluate_model)


class PromptTuning(nn.Module):
    """A `PromptedCLIP` as the loop trains it: batches to losses, trained tensors and identity its own."""

    def __init__(self, model: PromptedCLIP) -> None:
        super().__init__()
        self.model = model
        self.trained_parameters = model.trained_parameters
        self.identity = model.identity
        self.require_identity = model.require_identity
        self.random_streams = model.random_streams

    def forward(self, labels: Tensor, attributes: Sequence[str] | None = None, **inputs: Tensor) -> PromptLosses:
        """
        Args:
            inputs: the features that `encode_images` gives, or `images`.
        """
        features = self.model.encode_images(inputs["images"]) if "images" in inputs else inputs
        return self.model.losses(features, labels, attributes)


class CachedFeatures(Dataset[dict[str, Any]]):
    """The rows of a few-shot loader with what the model's frozen image tower makes of the images in their place."""

    def __init__(self, model: PromptedCLIP, loader: DataLoader[Any]) -> None:
        device = next(model.parameters()).device
        pieces: list[dict[str, Tensor]] = []
        self._rest: list[dict[str, Any]] = []
        for batch in read_batches(loader):
            encoded = model.encode_images(batch.pop("images").to(device))
            pieces.append({name: value.cpu() for name, value in encoded.items()})
            self._rest += [{name: column[row] for name, column in batch.items()} for row in range(len(batch["labels"]))]
        self._features = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self._features.items()} | self._rest[index]


def _draw(dataset: Any, config: IntCoOpConfig) -> FewShotDataset:
    if not isinstance(dataset, FewShotDataset):
        raise TypeError(f"loader: expected one over a FewShotDataset, got one over {type(dataset).__name__}")
    if config.shots is None:
        return dataset
    drawn = sample_shots(dataset.items, config.shots, random.Random(config.seed), part="training")
    return FewShotDataset(drawn, dataset.preprocess)


def _check_classes(dataset: FewShotDataset, model: PromptedCLIP) -> None:
    for item in dataset.items:
        if not 0 <= item.label < len(model.classnames):
            raise DataError(
                f"labels: expected positions below {len(model.classnames)}, the model's classes, got {item.label} "
                f"({item.classname!r})"
            )
        if model.classnames[item.label] != item.classname:
            raise DataError(
                f"labels: label {item.label} is {item.classname!r} in the data and "
                f"{model.classnames[item.label]!r} in the model"
            )


def _attributes(dataset: FewShotDataset) -> list[str]:
    words = [item.attribute for item in dataset.items if item.attribute]
    if len(words) < len(dataset):
        raise DataError(
            f"attributes: expected one for each of {len(dataset)} training images, "
            f"{len(dataset) - len(words)} have none; give them with FewShotSplit.with_attributes"
        )
    return words
