"""CLIP's similarities, in float32, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


def similarity(
    images: Float[Tensor, "images width"], texts: Float[Tensor, "texts width"]
) -> Float[Tensor, "images texts"]:
    """Cosine similarities of unit-length embeddings, float32.

    They are rounded from float64, so that equal embeddings tie: a float32 matrix product rounds the same row
    differently in another place.
    """
    return (images.double() @ texts.double().T).float()


def strict_hits(logits: Float[Tensor, "images classes"], labels: Int[Tensor, "images"]) -> Bool[Tensor, "images"]:
    """Whether each image's class has the single highest logit; a tie is wrong.

    Raises:
        ValueError: logits that are not finite, which are no wrong answers.
    """
    if not bool(logits.isfinite().all()):
        raise ValueError(f"logits: expected finite values, got {int((~logits.isfinite()).sum())} that are not")
    own = logits.gather(1, labels.to(logits.device).unsqueeze(1))
    return (logits >= own).sum(dim=1) == 1


@torch.no_grad()
def encode_images(
    clip: nn.Module, images: Float[Tensor, "images 3 height width"], batch_size: int = 256
) -> Float[Tensor, "images width"]:
    """Unit-length image embeddings, float32."""
    device = next(clip.parameters()).device
    pieces = [clip.encode_image(piece.to(device), normalize=True).float() for piece in images.split(batch_size)]  # type: ignore[operator]
    return torch.cat(pieces)


@torch.no_grad()
def encode_captions(
    clip: nn.Module, tokenizer: Tokenizer, captions: Sequence[str], batch_size: int = 256
) -> Float[Tensor, "captions width"]:
    """Unit-length caption embeddings, float32; a caption that comes twice is encoded once."""
    device = next(clip.parameters()).device
    distinct = list(dict.fromkeys(captions))
    tokens = tokenizer(distinct)
    pieces = [clip.encode_text(piece.to(device), normalize=True).float() for piece in tokens.split(batch_size)]  # type: ignore[operator]
    embeddings = torch.cat(pieces)
    position = {caption: row for row, caption in enumerate(distinct)}
    return embeddings[[position[caption] for caption in captions]]
