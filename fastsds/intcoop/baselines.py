"""What IntCoOp is compared with, on the same encoder: zero-shot, CoOp and CoCoOp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastsds.clip.prompts import ClassPosition
from fastsds.intcoop.prompts import Features, PromptedCLIP, Tokenizer, start_context


class ZeroShot(PromptedCLIP):
    """Hand-written prompts; nothing is trained.

    Args:
        clip, classnames, tokenizer: as `PromptedCLIP` takes them.
        templates: prompts with `{}` for the class name. With several, a class is the normalised mean of its prompts'
            embeddings (Radford et al., ICML 2021: prompt ensembles).

    Raises:
        ValueError: no templates, or one without `{}`.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer,
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ValueError(
                f"templates: expected at least one, each with one {{}} for the class name, got {wrong or templates}"
            )
        super().__init__(clip, classnames, tokenizer)
        self.templates = tuple(templates)
        self._classes = self._encode()

    def for_classes(self, classnames: Sequence[str]) -> ZeroShot:
        other: ZeroShot = super().for_classes(classnames)  # type: ignore[assignment]
        other._classes = other._encode()
        return other

    def text_features(self, features: Features) -> Float[Tensor, "1 classes dim"]:
        return self._classes.to(features["embedding"].device)

    @torch.no_grad()
    def _encode(self) -> Float[Tensor, "1 classes dim"]:
        prompts = [template.format(name) for template in self.templates for name in self.classnames]
        features = F.normalize(self.encoder.encode_text(prompts), dim=-1)
        classes = features.unflatten(0, (len(self.templates), len(self.classnames))).mean(dim=0)
        return F.normalize(classes, dim=-1).unsqueeze(0)


class CoOp(PromptedCLIP):
    """Context vectors that all images share (Zhou et al., IJCV 2022).

    Args:
        clip, classnames, tokenizer, encoder_options: as `PromptedCLIP` takes them.
        context_length: context vectors; CoOp's own experiments use 4 and 16.
        context_init: words that they start as; None for a random start.
        class_specific: every class has context vectors of its own, and the model cannot be used for other classes.
        class_position: of the class name: `end`, `middle` or `front`.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer,
        context_length: int = 4,
        context_init: str | None = "a photo of a",
        class_specific: bool = False,
        class_position: ClassPosition = "end",
        **encoder_options: Any,
    ) -> None:
        super().__init__(clip, classnames, tokenizer, class_position=class_position, **encoder_options)
        start = start_context(self.encoder, context_length, context_init)
        self.class_specific = class_specific
        if class_specific:
            start = start.repeat(len(self.classnames), 1, 1)
        self.context = nn.Parameter(start)
        self.to(next(clip.parameters()).device)

    def for_classes(self, classnames: Sequence[str]) -> CoOp:
        """
        Raises:
            ValueError: the context is class-specific.
        """
        if self.class_specific:
            raise ValueError("classnames: a class-specific context has no vectors for other classes; use a unified one")
        return super().for_classes(classnames)  # type: ignore[return-value]

    def text_features(self, features: Features) -> Float[Tensor, "1 classes dim"]:
        return F.normalize(self.encoder(self.context.unsqueeze(0)), dim=-1)


class CoCoOp(PromptedCLIP):
    """Context vectors shifted by a small network's view of the image (Zhou et al., CVPR 2022).

    Args:
        clip, classnames, tokenizer, encoder_options: as `PromptedCLIP` takes them.
        context_length, context_init: as of `CoOp`.
        reduction: the network's hidden width is the image embedding's divided by this.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer,
        context_length: int = 4,
        context_init: str | None = "a photo of a",
        reduction: int = 16,
        **encoder_options: Any,
    ) -> None:
        super().__init__(clip, classnames, tokenizer, **encoder_options)
        with torch.no_grad():
            dim = self.encoder.encode_text(self.classnames[:1]).shape[1]  # of the joint embedding, whatever the tower
        hidden = max(1, dim // reduction)
        self.context = nn.Parameter(start_context(self.encoder, context_length, context_init))
        self.shift = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, self.encoder.width))
        self.to(next(clip.parameters()).device)

    def text_features(self, features: Features) -> Float[Tensor, "images classes dim"]:
        shift = self.shift(features["embedding"].to(self.context.dtype)).unsqueeze(1)
        return F.normalize(self.encoder(self.context + shift), dim=-1)
