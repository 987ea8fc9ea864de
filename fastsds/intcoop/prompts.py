"""What prompt-tuned CLIP models have in common, and the context vectors that depend on the image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.text import PrefixTextEncoder

Tokenizer = Callable[[list[str]], Tensor]
Features = Mapping[str, Tensor]
"""What the frozen image tower gives, `[images, …]` each: `embedding`, and what else the method reads."""


class PromptLosses(NamedTuple):
    """Scalars of one step; `loss` is what to differentiate, the others are unweighted parts of it."""

    loss: Float[Tensor, ""]
    """The weighted sum of the others."""
    classification: Float[Tensor, ""]
    """Cross-entropy over the classes."""
    attribute: Float[Tensor, ""]
    """0 for methods without attributes."""
    regulariser: Float[Tensor, ""]
    """0 for methods without attributes."""


class PromptedCLIP(nn.Module):
    """A frozen CLIP model whose class prompts are made by a subclass.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP`; frozen in place.
        classnames: as they stand in the prompts, different and not empty.
        tokenizer: the CLIP model's own.
        encoder_options: of the `PrefixTextEncoder`: `suffix_template`, `class_chunk`, `memory_budget`, `dense`.

    Raises:
        ValueError: class names that are empty, come twice or are too long, or a text tower that is not causal.
    """

    def __init__(
        self, clip: nn.Module, classnames: Sequence[str], tokenizer: Tokenizer, **encoder_options: Any
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.classnames = tuple(classnames)
        self.encoder_options = encoder_options
        self.encoder = PrefixTextEncoder(clip, self.classnames, tokenizer=tokenizer, **encoder_options)

    def for_classes(self, classnames: Sequence[str]) -> PromptedCLIP:
        """The same model, its tensors shared, for other classes."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.classnames = tuple(classnames)
        other.encoder = PrefixTextEncoder(self.clip, other.classnames, tokenizer=self.tokenizer, **self.encoder_options)
        return other

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "images 3 height width"]) -> dict[str, Tensor]:
        """The frozen tower's features, which training computes once per image: `embedding`, of unit length."""
        return {"embedding": self.clip.encode_image(images, normalize=True)}  # type: ignore[operator]

    def text_features(self, features: Features) -> Float[Tensor, "prompts classes dim"]:
        """Class embeddings of unit length; `prompts` is the number of images, or 1 where all share their prompts."""
        raise NotImplementedError

    def logits(self, features: Features) -> Float[Tensor, "images classes"]:
        """`exp(logit_scale)` times the cosine similarities of images and classes."""
        return self._similarity(features, self.text_features(features))

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        """Logits of preprocessed images."""
        return self.logits(self.encode_images(images))

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "images 3 height width"]) -> list[str]:
        """The name of each image's most similar class."""
        return [self.classnames[index] for index in self(images).argmax(dim=1).tolist()]

    def losses(
        self, features: Features, labels: Int[Tensor, "images"], attributes: Sequence[str] | None = None
    ) -> PromptLosses:
        """Cross-entropy; `attributes` are for methods that learn them."""
        classification = F.cross_entropy(self.logits(features), labels)
        zero = classification.new_zeros(())
        return PromptLosses(classification, classification, zero, zero)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to, as JSON."""
        return {
            "clip": ClipIdentity.of(self.clip).to_json(),
            "method": type(self).__name__,
            "classnames": list(self.classnames),
        }

    def require_identity(self, recorded: dict[str, Any]) -> None:
        """Raises `ModelMismatchError` where a checkpoint belongs to another model, method or set of classes."""
        ClipIdentity.of(self.clip).require_match(recorded["clip"])
        for name, value in self.identity().items():
            if name != "clip" and recorded[name] != value:
                raise ModelMismatchError(
                    f"checkpoint: {name} was {recorded[name]!r} when it was written and is {value!r} in this model"
                )

    def random_streams(self) -> dict[str, Any]:
        return {}

    def train(self, mode: bool = True) -> PromptedCLIP:
        """The CLIP model stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def _similarity(self, features: Features, text: Tensor) -> Tensor:
        image, text = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (features["embedding"], text)
        )
        product = image @ text[0].T if len(text) == 1 else torch.einsum("nd,nkd->nk", image, text)
        return self.clip.logit_scale.exp() * product  # type: ignore[operator]


def start_context(encoder: PrefixTextEncoder, length: int, text: str | None) -> Float[Tensor, "length width"]:
    """Context vectors to start from: the token embeddings of `text`, or normal ones of CoOp's size (0.02).

    Raises:
        ValueError: a text of another number of tokens, or no context vectors.
    """
    if length < 1:
        raise ValueError(f"context_length: expected at least 1, got {length}")
    if text is None:
        return torch.randn(length, encoder.width) * 0.02
    embedded = encoder.embed_words(text)
    if len(embedded) != length:
        raise ValueError(
            f"context_init: expected {length} tokens, as context_length says, got {len(embedded)} in {text!r}; "
            f"pass None for a random start"
        )
    return embedded.float()


class ConditionedContext(nn.Module):
    """`h_1(I) … h_M(I)`: the context vectors of an image (*stated*: multi-head cross-attention with its features).

    The context vectors are the queries, the image's patch features keys and values (*reading*), and what is attended
    to is added to the context vectors (*reading*); the sum starts at the context vectors themselves.

    Args:
        context: to start from, `[M, width]`.
        image_width: of the patch features.
        heads: of the attention (*reading*: 8).
    """

    def __init__(self, context: Float[Tensor, "length width"], image_width: int, heads: int = 8) -> None:
        super().__init__()
        width = context.shape[1]
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the text width {width}, got {heads}")
        self.context = nn.Parameter(context)
        self.attention = nn.MultiheadAttention(width, heads, kdim=image_width, vdim=image_width, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, patches: Float[Tensor, "images patches image_width"]) -> Float[Tensor, "images length width"]:
        patches = patches.to(self.context.dtype)
        context = self.context.expand(len(patches), -1, -1)
        attended, _ = self.attention(context, patches, patches, need_weights=False)
        return context + attended
