"""Winoground's scores (Thrush et al., CVPR 2022): two images and two captions that differ in word order alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsds.evaluation.similarity import Tokenizer, encode_captions, encode_images


@dataclass(frozen=True)
class WinogroundScores:
    """Shares of examples (of images for `pair`), in [0, 1]. A tie is wrong."""

    pair: float
    """An image prefers its own caption to the other; chance is 1/2."""
    text: float
    """Both images prefer their own caption; chance is 1/4."""
    image: float
    """Both captions prefer their own image; chance is 1/4."""
    group: float
    """Both; chance is 1/6."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def winoground_scores(similarity: Float[Tensor, "examples 2 2"]) -> WinogroundScores:
    """Scores of `similarity[example, caption, image]`, where caption 0 belongs to image 0.

    Raises:
        ValueError: another shape, no examples, or values that are not finite.
    """
    if similarity.dim() != 3 or similarity.shape[1:] != (2, 2) or len(similarity) == 0:
        raise ValueError(f"similarity: expected [examples, 2, 2] with examples, got {list(similarity.shape)}")
    if not bool(similarity.isfinite().all()):
        raise ValueError("similarity: expected finite values")
    first, second = prefers_own_caption(similarity).unbind(dim=1)
    text = first & second
    image = (similarity[:, 0, 0] > similarity[:, 0, 1]) & (similarity[:, 1, 1] > similarity[:, 1, 0])
    shares = (torch.stack([first, second]), text, image, text & image)
    return WinogroundScores(*(share.double().mean().item() for share in shares))


def prefers_own_caption(similarity: Float[Tensor, "examples 2 2"]) -> Bool[Tensor, "examples 2"]:
    """For each of an example's images: is its own caption strictly more similar than the other?"""
    own = similarity.diagonal(dim1=1, dim2=2)  # s(c0, i0), s(c1, i1)
    other = similarity.flip(1).diagonal(dim1=1, dim2=2)  # s(c1, i0), s(c0, i1)
    return own > other


def winoground_similarity(
    clip: nn.Module,
    tokenizer: Tokenizer,
    images: Float[Tensor, "examples 2 3 height width"],
    captions: Sequence[tuple[str, str]],
) -> Float[Tensor, "examples 2 2"]:
    """`[example, caption, image]` cosine similarities of a CLIP model.

    Raises:
        ValueError: not two captions for every two images.
    """
    if len(captions) != len(images) or images.shape[1:2] != (2,) or any(len(pair) != 2 for pair in captions):
        raise ValueError(
            f"captions: expected two for each of {len(images)} examples of two images, "
            f"got {len(captions)} rows for images {list(images.shape)}"
        )
    image_features = encode_images(clip, images.flatten(0, 1)).unflatten(0, (-1, 2))
    text_features = encode_captions(clip, tokenizer, [caption for pair in captions for caption in pair])
    return torch.einsum("ecd,eid->eci", text_features.unflatten(0, (-1, 2)), image_features)
