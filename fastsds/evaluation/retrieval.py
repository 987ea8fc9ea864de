"""Retrieval of captions and images among all of a data set's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.data.coco import read_coco
from fastsds.data.files import DataError, read_json
from fastsds.data.images import ImageSource, image_name
from fastsds.evaluation.examples import Pictures
from fastsds.evaluation.judge import ClipJudge
from fastsds.evaluation.outcomes import Figure, Outcomes
from fastsds.evaluation.records import check_images, check_row
from fastsds.evaluation.similarity import similarity

_CHUNK = 512  # images whose similarities to every caption are in memory at once


@dataclass(frozen=True)
class CaptionedImages:
    """Images and each one's captions.

    Raises:
        DataError: no images, or an image without captions.
    """

    images: tuple[ImageSource, ...]
    captions: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.images or len(self.captions) != len(self.images) or not all(self.captions):
            raise DataError(
                f"captions: expected at least one for each of at least one image, got {len(self.images)} images, "
                f"{sum(map(bool, self.captions))} with captions"
            )


def read_captioned_images(path: Path, images: Path, split: str = "test", captions: int | None = 5) -> CaptionedImages:
    """Reads a retrieval set in one of three formats, told apart by their content.

    - `coco_karpathy_test.json`, `flickr30k_test.json`: rows `{"image", "caption": [...]}`;
    - Karpathy's own `dataset_coco.json`: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`;
    - COCO's own `captions_val2017.json`.

    Args:
        images: folder that the paths start from.
        split: of Karpathy's own file; the other two hold one.
        captions: the first so many of every image, as the field's 5,000-image test does; all with None.

    Raises:
        DataError: a file that is missing, empty or of none of the formats, or images that are absent.
    """
    document = read_json(path)
    if isinstance(document, dict) and "annotations" in document:
        pairs = read_coco(path, images)
        found = [(Path(str(image)), list(texts)) for image, texts in zip(pairs.images, pairs.captions, strict=True)]
    elif isinstance(document, dict):
        found = _read_karpathy(document, path, images, split)
    else:
        found = _read_list(document, path, images)
    check_images([image for image, _ in found], path)
    return CaptionedImages(tuple(image for image, _ in found), tuple(tuple(texts[:captions]) for _, texts in found))


def retrieval_outcomes(
    judge: ClipJudge, data: CaptionedImages, benchmark: str = "retrieval", ks: Sequence[int] = (1, 5, 10)
) -> Outcomes:
    """`text-to-image R@k` (a sample is a caption) and `image-to-text R@k` (a sample is an image).

    A query counts as found among the first k if fewer than k wrong candidates are as similar as its own, or more: ties
    are wrong. An image's own is the most similar of its captions.

    Raises:
        ValueError: embeddings that are not finite, or a k below 1.
        DataError: an image that cannot be read.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected at least one, each at least 1, got {tuple(ks)}")
    images, texts = judge.encode_images(Pictures(data.images)), [text for row in data.captions for text in row]
    owner = torch.tensor([row for row, texts in enumerate(data.captions) for _ in texts], device=images.device)
    captions = judge.encode_captions(texts)
    if not bool(images.isfinite().all() & captions.isfinite().all()):
        raise ValueError("embeddings: expected finite values")
    ranks = retrieval_ranks(lambda rows: similarity(images[rows], captions), owner, len(images))
    return rank_outcomes(benchmark, data, *ranks, ks)


def rank_outcomes(
    benchmark: str,
    data: CaptionedImages,
    of_captions: Int[Tensor, "captions"],
    of_images: Int[Tensor, "images"],
    ks: Sequence[int],
) -> Outcomes:
    """The figures of `retrieval_outcomes`, of how many wrong candidates every caption and every image has first."""
    image_keys = tuple(f"{row} {Path(image_name(image)).name}" for row, image in enumerate(data.images))
    caption_keys = tuple(
        f"{key} caption {at}" for key, texts in zip(image_keys, data.captions, strict=True) for at in range(len(texts))
    )
    figures = {}
    of_one_image = tuple(key for key, row in zip(image_keys, data.captions, strict=True) for _ in row)
    for name, ranks, keys, units, right, candidates in (
        ("text-to-image", of_captions, caption_keys, of_one_image, [1], len(data.images)),
        ("image-to-text", of_images, image_keys, None, [len(row) for row in data.captions], len(caption_keys)),
    ):
        for k in ks:
            chance = statistics.fmean(_chance(k, own, candidates) for own in right)
            figures[f"{name} R@{k}"] = Figure(tuple((ranks < k).double().tolist()), keys, None, chance, units)
    return Outcomes(benchmark, figures)


def retrieval_ranks(
    scores_of: Callable[[slice], Float[Tensor, "rows captions"]], owner: Int[Tensor, "captions"], images: int
) -> tuple[Int[Tensor, "captions"], Int[Tensor, "images"]]:
    """Of every caption, and of every image, how many wrong candidates are at least as similar as its own.

    Args:
        scores_of: similarities of a slice of the images to all captions; asked for every slice twice.
        owner: position of each caption's image.
    """
    at = torch.arange(len(owner), device=owner.device)
    own = torch.empty(len(owner), device=owner.device)
    of_captions, of_images = torch.zeros_like(owner), []
    slices = [slice(start, min(start + _CHUNK, images)) for start in range(0, images, _CHUNK)]
    mine = {rows.start: at[(owner >= rows.start) & (owner < rows.stop)] for rows in slices}
    for rows in slices:
        here = mine[rows.start]
        own[here] = scores_of(rows)[owner[here] - rows.start, here]
    best = own.new_full((images,), -torch.inf).scatter_reduce(0, owner, own, "amax")
    for rows in slices:
        here = mine[rows.start]
        scores = scores_of(rows)
        scores[owner[here] - rows.start, here] = -torch.inf
        of_captions += (scores >= own).sum(dim=0)
        of_images.append((scores >= best[rows].unsqueeze(1)).sum(dim=1))
    return of_captions, torch.cat(of_images)


def _chance(k: int, own: int, candidates: int) -> float:
    """That at least one of `own` is among the first k of all candidates in random order."""
    return 1 - math.comb(candidates - own, k) / math.comb(candidates, k) if k <= candidates else 1.0


def _read_list(rows: Any, path: Path, images: Path) -> list[tuple[Path, list[str]]]:
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"path: expected a list of rows, or objects `images` and `annotations`, in {path}, got {rows!r:.40}"
        )
    for number, row in enumerate(rows, start=1):
        check_row(row, {"image": str, "caption": list}, f"row {number} of {path}")
    return [(images / row["image"], list(map(str, row["caption"]))) for row in rows]


def _read_karpathy(document: dict[str, Any], path: Path, images: Path, split: str) -> list[tuple[Path, list[str]]]:
    rows = document.get("images")
    if not isinstance(rows, list):
        raise DataError(f"path: {path} has no list `images`; it has {', '.join(document) or 'nothing'}")
    for number, row in enumerate(rows, start=1):
        check_row(row, {"filename": str, "split": str, "sentences": list}, f"image {number} of {path}")
        check_row({"filepath": "", **row}, {"filepath": str}, f"image {number} of {path}")
        for sentence in row["sentences"]:
            check_row(sentence, {"raw": str}, f"a sentence of image {number} of {path}")
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        raise DataError(f"split: expected one of {sorted({row['split'] for row in rows})} of {path}, got {split!r}")
    return [
        (images / row.get("filepath", "") / row["filename"], [sentence["raw"] for sentence in row["sentences"]])
        for row in chosen
    ]
