"""Whoever judges which caption belongs to an image, and the outcomes of its judgements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from fastsds.data.workers import read_batches, worker_options
from fastsds.evaluation.examples import CaptionChoice, Pictures, TwoByTwo, check_examples
from fastsds.evaluation.outcomes import Outcomes, choice_outcomes, pairing_outcomes
from fastsds.evaluation.similarity import Tokenizer, encode_captions, encode_images, strict_hits
from fastsds.evaluation.winoground import prefers_own_caption

Preprocess = Callable[[Image.Image], Tensor]


class Judge(Protocol):
    """What scores images against captions."""

    def match(
        self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]
    ) -> Float[Tensor, "images captions"]:
        """For every image the scores of its own captions, equally many of each; higher is a better match.

        `images` may open its items one by one.
        """
        ...


class ClipJudge:
    """Cosine similarity in float32. Images are read by worker processes; an image or caption that several examples have
    is encoded once.

    Args:
        clip: an open_clip model, in eval mode.
        preprocess: the model's own.
        tokenizer: the model's own.
        batch_size: images, and captions, that the model encodes at once.
        workers: processes that read images; 0 reads them in this one.
    """

    def __init__(
        self, clip: nn.Module, preprocess: Preprocess, tokenizer: Tokenizer, *, batch_size: int = 256, workers: int = 0
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.clip = clip
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.workers = workers

    def match(
        self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]
    ) -> Float[Tensor, "images captions"]:
        """Cosine similarities; see `Judge.match`.

        Raises:
            ValueError: another number of caption lists than images, or lists of unequal length.
            DataError: an image that cannot be read.
        """
        counts = {len(row) for row in captions}
        if len(captions) != len(images) or len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"captions: expected for each of {len(images)} images equally many captions, "
                f"got {len(captions)} lists of lengths {sorted(counts)}"
            )
        text = self.encode_captions([caption for row in captions for caption in row])
        # Summed row by row, and not as a matrix product, so that equal embeddings are a tie to the last bit.
        return (self.encode_images(images).unsqueeze(1) * text.unflatten(0, (len(images), -1))).sum(dim=-1)

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Unit-length embeddings, float32, on the model's device."""
        dataset = _Preprocessed(images, self.preprocess)
        if not isinstance(images, Pictures):
            return self.encode_dataset(dataset)[0]
        distinct, which = images.distinct()
        return self.encode_dataset(Subset(dataset, distinct))[0][which]

    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "captions width"]:
        """Unit-length embeddings, float32, on the model's device."""
        return encode_captions(self.clip, self.tokenizer, captions, self.batch_size)

    def encode_dataset(
        self, dataset: Dataset[dict[str, Any]]
    ) -> tuple[Float[Tensor, "images width"], Int[Tensor, "images"] | None]:
        """Embeddings of preprocessed `images`, and their `labels` where the rows of `dataset` have them.

        Raises:
            DataError: an image that cannot be read.
        """
        on_gpu = next(self.clip.parameters()).device.type == "cuda"
        loader = DataLoader(dataset, self.batch_size, pin_memory=on_gpu, **worker_options(self.workers))
        features, labels = [], []
        for batch in tqdm(read_batches(loader), "images", len(loader), unit="batch", disable=None, leave=False):
            features.append(encode_images(self.clip, batch["images"], self.batch_size))
            if "labels" in batch:
                labels.append(batch["labels"])
        return torch.cat(features), torch.cat(labels) if labels else None


def caption_choice_outcomes(
    judge: Judge, examples: Sequence[CaptionChoice], benchmark: str = "caption choice"
) -> Outcomes:
    """`accuracy`: the right caption scores strictly higher than every other one.

    Raises:
        ValueError: no examples, two of one key, or scores that are not finite.
        DataError: an image that cannot be read.
    """
    check_examples(examples)
    width = max(len(example.captions) for example in examples)
    scores = judge.match(Pictures(examples), [_padded(example, width) for example in examples])
    _check_finite(scores)
    right = torch.tensor([example.right for example in examples])
    return choice_outcomes(benchmark, examples, strict_hits(scores, right).tolist())


def two_by_two_outcomes(judge: Judge, examples: Sequence[TwoByTwo], benchmark: str = "winoground") -> Outcomes:
    """Winoground's `text`, `image`, `group` and `pair`, strict on ties.

    Raises:
        ValueError: no examples, two of one key, or scores that are not finite.
        DataError: an image that cannot be read.
    """
    check_examples(examples)
    scores = judge.match(Pictures(examples), [example.captions for example in examples for _ in (0, 1)])
    _check_finite(scores)
    by_image = scores.unflatten(0, (-1, 2))  # [example, image, caption]
    return pairing_outcomes(
        benchmark, examples, prefers_own_caption(by_image.transpose(1, 2)), prefers_own_caption(by_image)
    )


class _Preprocessed(Dataset[dict[str, Any]]):
    def __init__(self, images: Sequence[Image.Image], preprocess: Preprocess) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": self.preprocess(self.images[index])}


def _padded(example: CaptionChoice, width: int) -> list[str]:
    """The captions, a wrong one repeated up to `width`, which decides nothing."""
    wrong = example.captions[0 if example.right else 1]
    return [*example.captions, *[wrong] * (width - len(example.captions))]


def _check_finite(scores: Tensor) -> None:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores: expected finite values, got {int((~scores.isfinite()).sum())} that are not")
