"""Attribute words: their embeddings, and which of them an image's predicted attribute is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastsds.clip.text import PrefixTextEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AttributeSpace = Literal["token", "text"]


def attribute_embeddings(
    encoder: PrefixTextEncoder, attributes: Sequence[str], space: AttributeSpace = "token"
) -> Float[Tensor, "attributes width"]:
    """What `A(I)` is to be near to, for each attribute: a word or a phrase.

    Args:
        space: `token`, the embedding that stands for the attribute in a prompt, the mean over its tokens where it has
            several; `text`, the text tower's unit-length embedding of the attribute alone.

    Raises:
        ValueError: an attribute without tokens, or `text` where the joint embedding is not as wide as a token's.
    """
    if space == "text":
        embedded = F.normalize(encoder.encode_text(list(attributes)), dim=-1)
        if embedded.shape[1] != encoder.width:
            raise ValueError(
                f"attribute_space: text needs a joint embedding of the text tower's width {encoder.width}, "
                f"got {embedded.shape[1]}; use token"
            )
        return embedded
    empty = [attribute for attribute in attributes if not attribute.strip()]
    if empty:
        raise ValueError(f"attributes: expected a word each, got {empty[0]!r}")
    return torch.stack([encoder.embed_words(attribute).mean(dim=0) for attribute in attributes])


@dataclass(frozen=True)
class Explanation:
    """The attribute words that images were given, nearest first."""

    words: list[list[str]]
    """`[images][words]`."""
    similarities: Float[Tensor, "images words"]
    """Cosine of the predicted attribute's embedding and the word's."""
    classnames: list[str]
    """The class that each image was given."""

    def figure(self, images: Float[Tensor, "images 3 height width"], columns: int = 6) -> Figure:
        """The images, in [0, 1], with their classes and words.

        Raises:
            ValueError: another number of images.
        """
        from matplotlib.figure import Figure

        if len(images) != len(self.words):
            raise ValueError(f"images: expected the {len(self.words)} that were explained, got {len(images)}")
        rows = -(-len(images) // columns)
        figure = Figure(figsize=(2 * columns, 3 * rows))
        for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axis.set_axis_off()
            if index >= len(images):
                continue
            axis.imshow(images[index].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            scores = zip(self.words[index], self.similarities[index].tolist(), strict=True)
            axis.set_title(
                "\n".join([self.classnames[index], *(f"{word} {score:.2f}" for word, score in scores)]), fontsize=8
            )
        figure.tight_layout()
        return figure


def nearest_words(
    embeddings: Float[Tensor, "images width"],
    words: Sequence[str],
    word_embeddings: Float[Tensor, "words width"],
    top: int,
) -> tuple[list[list[str]], Float[Tensor, "images top"]]:
    """The `top` words of highest cosine similarity to each embedding, highest first, with the similarities.

    Raises:
        ValueError: no words, or `top` below 1.
    """
    if not words:
        raise ValueError("words: expected attribute words to choose from, got none")
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    similarity = F.normalize(embeddings.float(), dim=-1) @ F.normalize(word_embeddings.float(), dim=-1).T
    best = similarity.topk(min(top, len(words)), dim=1)
    return [[words[index] for index in row] for row in best.indices.tolist()], best.values
