"""One run of the IntCoOp demo: a method, the shots of a seed, and what it scores on both halves of the classes."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastsds.data.fewshot import FewShotDataset, FewShotSplit, LabelledImage
from fastsds.evaluation.base_to_novel import BaseToNovelScores, base_to_novel
from fastsds.intcoop.attributes import Explanation
from fastsds.intcoop.baselines import CoCoOp, CoOp, ZeroShot
from fastsds.intcoop.model import IntCoOp
from fastsds.intcoop.prompts import PromptedCLIP
from fastsds.toyworld import load_clip
from fastsds.toyworld.fewshot import ATTRIBUTES, SHIFTED, SOURCE, few_shot_task
from fastsds.training.intcoop import IntCoOpConfig, IntCoOpTrainer

DOMAINS = {"source": SOURCE, "shifted": SHIFTED}
BATCH = 16
EXPLAINED = 6  # test pictures of each half that the report shows with their words


@dataclass(frozen=True)
class Method:
    """A way to make prompts, with the settings that did best on the validation pictures in a grid of its own."""

    name: str
    title: str
    kind: type[PromptedCLIP]
    lr: float = 8e-3
    epochs: int = 40
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.kind is not ZeroShot


METHODS = (
    Method("zero_shot", "zero-shot", ZeroShot),
    Method("coop", "CoOp", CoOp, epochs=10),
    Method("cocoop", "CoCoOp", CoCoOp),
    Method("intcoop", "IntCoOp", IntCoOp),
    Method("intcoop_no_attribute", "IntCoOp without L_attr", IntCoOp, options={"attribute_weight": 0.0}),
    Method("intcoop_no_regulariser", "IntCoOp without L_reg", IntCoOp, options={"regulariser_weight": 0.0}),
)


@dataclass(frozen=True)
class Result:
    """What one run of a method measured on the test pictures."""

    scores: dict[str, BaseToNovelScores]
    """By domain."""
    words: dict[str, float]
    """Share of pictures whose nearest words are the true ones, by domain; empty for methods without attributes."""
    explanation: Explanation | None
    """Of `explained_items`."""


def run_method(method: Method, seed: int, shots: int, test_per_class: int, out: Path) -> Result:
    """Trains a method on the shots of a seed and measures it on the test pictures of both domains.

    Args:
        out: folder of the run, with its metrics.
    """
    torch.manual_seed(seed)
    clip, preprocess, tokenizer = load_clip()
    task = _task("source", test_per_class)
    novel_names = task.novel().classnames
    model: Any = method.kind(clip, task.base().classnames, tokenizer=tokenizer, **method.options)
    if method.trained:
        train = FewShotDataset(task.few_shot(shots, seed).base().train, preprocess)
        steps = method.epochs * -(-len(train) // BATCH)
        config = IntCoOpConfig(
            out=out, lr=method.lr, steps=steps, shots=shots, seed=seed, evaluate_every=max(steps // 5, 1),
            save_every=steps, tensorboard=False, progress=False,
        )  # fmt: skip
        base_val, novel_val = (list(_loader(half.val, preprocess)) for half in (task.base(), task.novel()))
        evaluate = lambda _: base_to_novel(model, base_val, novel_val, novel_names).to_json()  # noqa: E731
        IntCoOpTrainer(model, DataLoader(train, BATCH), config, evaluate).fit()
    model.eval()
    scores, words = {}, {}
    for domain in DOMAINS:
        tested = _task(domain, test_per_class)
        base_test, novel_test = (_loader(half.test, preprocess) for half in (tested.base(), tested.novel()))
        scores[domain] = base_to_novel(model, base_test, novel_test, novel_names)
        if isinstance(model, IntCoOp):
            words[domain] = _share_of_true_words(model, tested.test, preprocess)
    explanation = _explain(model, novel_names, preprocess, test_per_class) if isinstance(model, IntCoOp) else None
    return Result(scores, words, explanation)


def explained_items(test_per_class: int) -> list[LabelledImage]:
    """Test pictures of the source domain: base classes, then novel ones, spread over the classes of each."""
    task = _task("source", test_per_class)
    chosen: list[LabelledImage] = []
    for half in (task.base(), task.novel()):
        chosen += half.test[:: max(len(half.test) // EXPLAINED, 1)][:EXPLAINED]
    return chosen


def _explain(model: IntCoOp, novel_names: tuple[str, ...], preprocess: Any, test_per_class: int) -> Explanation:
    images = torch.stack([preprocess(item.image) for item in explained_items(test_per_class)])
    halves = zip((model, model.for_classes(novel_names)), images.chunk(2), strict=True)
    base, novel = (half.explain(pictures, words=ATTRIBUTES) for half, pictures in halves)
    return Explanation(
        base.words + novel.words,
        torch.cat([base.similarities, novel.similarities]),
        base.classnames + novel.classnames,
    )


def _share_of_true_words(model: IntCoOp, items: tuple[LabelledImage, ...], preprocess: Any) -> float:
    nearest: list[str] = []
    for batch in _loader(items, preprocess):
        nearest += [words[0] for words in model.explain(batch["images"], words=ATTRIBUTES, top=1).words]
    return statistics.fmean(word == item.attribute for word, item in zip(nearest, items, strict=True))


@functools.cache
def _task(domain: str, test_per_class: int) -> FewShotSplit:
    return few_shot_task(test_per_class=test_per_class, domain=DOMAINS[domain])


def _loader(items: tuple[LabelledImage, ...], preprocess: Any) -> DataLoader[Any]:
    return DataLoader(FewShotDataset(items, preprocess), batch_size=300)
