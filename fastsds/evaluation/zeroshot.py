"""Zero-shot classification: an image is the class whose prompts it is most similar to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastsds.evaluation.classification import ClassifiedImages
from fastsds.evaluation.judge import ClipJudge, Preprocess
from fastsds.evaluation.outcomes import Figure, Outcomes
from fastsds.evaluation.similarity import Tokenizer, encode_captions, encode_images, similarity, strict_hits


def zero_shot_accuracy(
    clip: nn.Module,
    tokenizer: Tokenizer,
    images: Float[Tensor, "images 3 height width"],
    labels: Int[Tensor, "images"],
    classnames: Sequence[str],
    templates: Sequence[str] = ("a photo of {}",),
) -> float:
    """Share of images whose class is the single most similar one, in [0, 1]; a tie is wrong.

    A class is the normalised mean of its prompts' embeddings, `{}` standing for the class name. Classes of one name are
    one class.

    Raises:
        ValueError: a template without `{}`, labels that are not positions in `classnames`, or similarities that are
            not finite.
    """
    check_templates(templates)
    if len(labels) != len(images) or not bool(((labels >= 0) & (labels < len(classnames))).all()):
        span = f" from {int(labels.min())} to {int(labels.max())}" if len(labels) else ""
        raise ValueError(f"labels: expected {len(images)} positions below {len(classnames)}, got {len(labels)}{span}")
    names, labels = _by_name(classnames, labels)
    classes = class_embeddings(lambda prompts: encode_captions(clip, tokenizer, prompts), names, templates)
    return strict_hits(similarity(encode_images(clip, images), classes), labels).double().mean().item()


def zero_shot_outcomes(
    judge: ClipJudge, data: ClassifiedImages, templates: Sequence[str], benchmark: str = "zeroshot"
) -> Outcomes:
    """`accuracy`: the image's class is the single most similar one; macro is over the classes.

    Classes of one name are one class: their prompts are the same, and would always tie. Of open_clip's names for
    ImageNet, `missile` and `sunglasses` come twice.

    Raises:
        ValueError: a template without `{}`, labels that are not positions in the class names, or similarities that are
            not finite.
        DataError: an image that cannot be read.
    """
    features, labels = judge.encode_dataset(_Labelled(data, judge.preprocess))
    assert labels is not None
    if not bool(((labels >= 0) & (labels < len(data.classnames))).all()):
        raise ValueError(
            f"images: expected labels below {len(data.classnames)}, got {int(labels.min())} to {int(labels.max())}"
        )
    names, of_name = _by_name(data.classnames, labels)
    logits = similarity(features, class_embeddings(judge.encode_captions, names, templates))
    hits = tuple(strict_hits(logits, of_name).double().tolist())
    groups = tuple(names[number] for number in of_name.tolist())
    return Outcomes(benchmark, {"accuracy": Figure(hits, data.keys, groups, 1 / len(names))})


def class_embeddings(
    encode: Callable[[Sequence[str]], Float[Tensor, "prompts width"]],
    classnames: Sequence[str],
    templates: Sequence[str],
) -> Float[Tensor, "classes width"]:
    """The normalised mean of every class's prompt embeddings (Radford et al., ICML 2021).

    Raises:
        ValueError: a template without `{}`, or no templates.
    """
    check_templates(templates)
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    return F.normalize(encode(prompts).unflatten(0, (len(classnames), len(templates))).mean(dim=1), dim=-1)


def check_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates: expected each to hold {{}} for the class name, got {template!r}")
    if not templates:
        raise ValueError("templates: expected at least one, got none")


def _by_name(classnames: Sequence[str], labels: Int[Tensor, "images"]) -> tuple[list[str], Int[Tensor, "images"]]:
    """The distinct names, and the labels as positions among these."""
    position = {name: number for number, name in enumerate(dict.fromkeys(classnames))}
    return list(position), torch.tensor([position[name] for name in classnames])[labels.cpu()]


class _Labelled(Dataset[dict[str, Any]]):
    def __init__(self, data: ClassifiedImages, preprocess: Preprocess) -> None:
        self.data = data
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data.load(index)
        return {"images": self.preprocess(image), "labels": label}
