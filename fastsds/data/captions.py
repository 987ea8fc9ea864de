"""Image-caption data: from files to the batches that a distiller takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastsds.data.bad_images import BadImages
from fastsds.data.files import DataError
from fastsds.data.images import ImageSource, image_key, open_image
from fastsds.sdsclip.ranking import CONNECTIVES, swap_phrases

__all__ = ["CaptionDataset", "DataError", "Preprocess", "Tokenizer", "collate_captions", "open_image"]

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
_REMEMBERED = 16384  # texts whose tokens are kept: about 20 MB of CLIP's


class CaptionDataset(Dataset[dict[str, Any]]):
    """Pairs of an image and its caption, with candidate captions where ranking wants them.

    Args:
        images: paths of image files, PIL images, or images that a `CaptionSource` found in shards or tables.
        captions: one per image.
        preprocess: the CLIP model's own.
        tokenizer: the CLIP model's own.
        candidates: for each image equally many candidate captions, or None where an image has none.
        extra: what belongs to the candidates, by `SDSDistiller.forward`'s names, a tensor row per image:
            `candidate_scores`, `candidate_labels`, `latents`. Rows of images without candidates are not read.
        bad_images: skips images that cannot be read; without it they are errors.

    Raises:
        DataError: no images, or columns of unequal length; when a row is read, an image that cannot be, or too many.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        captions: Sequence[str],
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        bad_images: BadImages | None = None,
    ) -> None:
        self.images = images
        self.captions = captions
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.candidates = candidates
        self.extra = dict(extra or {})
        self.bad_images = bad_images
        self._tokens: dict[str, Tensor] = {}
        columns = {"captions": captions, "candidates": candidates, **self.extra}
        if len(images) == 0:
            raise DataError("images: expected at least one, got none")
        for name, column in columns.items():
            if column is not None and len(column) != len(images):
                raise DataError(f"{name}: expected one for each of {len(images)} images, got {len(column)}")

    def with_swapped_candidates(self, connectives: Sequence[str] = CONNECTIVES) -> CaptionDataset:
        """The same data with two candidates for teacher ranking: the caption, and with its phrases exchanged.

        Captions without a connective have no candidates. They come as strings, for the `SDSDistiller`'s `scorer`.
        """
        candidates = _SwappedCandidates(self.captions, connectives)
        return CaptionDataset(
            self.images, self.captions, self.preprocess, self.tokenizer,
            candidates=candidates, bad_images=self.bad_images,
        )  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        """Draws the captions of another epoch, where images have several; workers that run already follow."""
        if isinstance(self.captions, EpochCaptions):
            self.captions.set_epoch(epoch)

    def content_key(self, index: int) -> str:
        """A hash of the image that a row holds, the same wherever it is stored; it is read and not decoded.

        A row whose image is known as bad has the key of the image in its place: read the row first.

        Raises:
            DataError: the image cannot be read.
        """
        return image_key(self.images[index if self.bad_images is None else next(self.bad_images.rows(index))])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, for which a `DataLoader` asks at once."""
        rows, texts = [], []
        for index in indices:
            row, image = self._open(index)
            caption = self.captions[row]
            candidates = None if self.candidates is None else self.candidates[row]
            rows.append((row, self.preprocess(image), caption, candidates))
            texts += [caption, *(candidates or ())]
        tokens = self._tokenize(dict.fromkeys(texts))
        return [self._row(*row, tokens) for row in rows]

    def _tokenize(self, texts: Mapping[str, None]) -> dict[str, Tensor]:
        """The tokens of distinct texts: one call of the tokenizer for those that were not read lately."""
        tokens = {text: self._tokens[text] for text in texts if text in self._tokens}
        if new := [text for text in texts if text not in tokens]:
            fresh = dict(zip(new, self.tokenizer(new), strict=True))
            if len(self._tokens) + len(fresh) > _REMEMBERED:
                self._tokens = {}
            self._tokens |= fresh
            tokens |= fresh
        return tokens

    def _row(
        self, index: int, image: Tensor, caption: str, candidates: Sequence[str] | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"images": image, "tokens": tokens[caption], "captions": caption}
        if self.candidates is None:
            return row | self._extra(index)
        row["candidates"] = None
        if candidates is not None:
            row["candidates"] = {
                "candidate_tokens": torch.stack([tokens[text] for text in candidates]),
                "candidate_captions": list(candidates),
                **self._extra(index),
            }
        return row

    def _extra(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.extra.items()}

    def _open(self, index: int) -> tuple[int, Image.Image]:
        """The row that is to be read, `index` or the one in its place, and its image."""
        if self.bad_images is None:
            return index, open_image(self.images[index])
        rows = self.bad_images.rows(range(len(self))[index])
        while True:
            row = next(rows)
            try:
                return row, open_image(self.images[row])
            except DataError as error:
                self.bad_images.add(row, error)


class EpochCaptions(Sequence[str]):
    """One of each image's captions, drawn anew every epoch.

    Args:
        captions: of every image, at least one.
        seed: of the draw; epoch and image decide the rest.
    """

    def __init__(self, captions: Sequence[Sequence[str]], seed: int = 0) -> None:
        self._captions = captions
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: Any) -> Any:
        return random.Random(f"{self._seed} {int(self._epoch)} {index}").choice(self._captions[index])


class _SwappedCandidates(Sequence["list[str] | None"]):
    """Made when they are read: an epoch's captions are not those of the next."""

    def __init__(self, captions: Sequence[str], connectives: Sequence[str]) -> None:
        self._captions = captions
        self._connectives = connectives

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: Any) -> Any:
        caption = self._captions[index]
        swapped = swap_phrases(caption, self._connectives)
        return None if swapped is None else [caption, swapped]


def collate_captions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks tensors and lists strings: the batch that `SDSDistiller.forward` takes.

    Candidates are given as strings only where their scores or labels are not there already, and `candidate_rows` says
    which images have candidates where some have none.
    """
    batch = _stack([{name: value for name, value in row.items() if name != "candidates"} for row in rows])
    if "candidates" not in rows[0]:
        return batch
    ranked = [index for index, row in enumerate(rows) if row["candidates"] is not None]
    if len(ranked) < len(rows):
        batch["candidate_rows"] = torch.tensor(ranked, dtype=torch.int64)
    if ranked:
        batch |= _stack([rows[index]["candidates"] for index in ranked])
    if "candidate_scores" in batch or "candidate_labels" in batch:
        batch.pop("candidate_captions", None)
    return batch


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(values) if isinstance(values[0], Tensor) else values for name, values in columns.items()}
