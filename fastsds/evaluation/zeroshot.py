"""Zero-shot classification: an image is the class whose prompts it is most similar to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastsds.evaluation.similarity import Tokenizer, encode_captions, encode_images, similarity


def zero_shot_accuracy(
    clip: nn.Module,
    tokenizer: Tokenizer,
    images: Float[Tensor, "images 3 height width"],
    labels: Int[Tensor, "images"],
    classnames: Sequence[str],
    templates: Sequence[str] = ("a photo of {}",),
) -> float:
    """Share of images whose class is the single most similar one, in [0, 1]; a tie is wrong.

    A class is the normalised mean of its prompts' embeddings, `{}` standing for the class name.

    Raises:
        ValueError: a template without `{}`, or labels that are not positions in `classnames`.
    """
    check_templates(templates)
    if len(labels) != len(images) or not bool(((labels >= 0) & (labels < len(classnames))).all()):
        span = f" from {int(labels.min())} to {int(labels.max())}" if len(labels) else ""
        raise ValueError(f"labels: expected {len(images)} positions below {len(classnames)}, got {len(labels)}{span}")
    classes = class_embeddings(lambda prompts: encode_captions(clip, tokenizer, prompts), classnames, templates)
    return strict_hits(similarity(encode_images(clip, images), classes), labels).double().mean().item()


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


def strict_hits(logits: Float[Tensor, "images classes"], labels: Int[Tensor, "images"]) -> Bool[Tensor, "images"]:
    """Whether each image's class has the single highest logit; a tie is wrong."""
    own = logits.gather(1, labels.to(logits.device).unsqueeze(1))
    return (logits >= own).sum(dim=1) == 1
