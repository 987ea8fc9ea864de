"""Winoground's scores (Thrush et al., CVPR 2022): two images and two captions that differ in word order alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsds.data.files import DataError
from fastsds.data.huggingface import TableImages, encoded_images, load_table
from fastsds.data.images import ImageSource
from fastsds.evaluation.examples import TwoByTwo
from fastsds.evaluation.records import check_images, read_rows
from fastsds.evaluation.similarity import Tokenizer, encode_captions, encode_images

HUB_ID = "facebook/winoground"
_CAPTIONS: dict[str, type] = {"caption_0": str, "caption_1": str}
_IMAGES = ("image_0", "image_1")


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
    pair = prefers_own_caption(similarity)
    text, image = pair.all(dim=1), prefers_own_caption(similarity.transpose(1, 2)).all(dim=1)
    shares = (pair, text, image, text & image)
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


def read_winoground(source: str | Path = HUB_ID) -> list[TwoByTwo]:
    """Reads Winoground; the group is its `collapsed_tag` (Object, Relation, Both), or `tag` where that is absent.

    Args:
        source: a folder with `examples.jsonl` (or `data/examples.jsonl`) and `images/<name>.png`, as the gated data set
            unpacks; or a folder or hub id that `datasets` loads, with image columns `image_0` and `image_1`.

    Raises:
        DataError: it cannot be read, is empty or not of the format, or images are absent.
    """
    root = Path(source)
    for path in (root / "examples.jsonl", root / "data" / "examples.jsonl"):
        if path.is_file():
            return _read_unpacked(path, root)
    if root.is_dir() and not any(root.rglob("*.parquet")) and not any(root.rglob("state.json")):
        raise DataError(f"source: expected examples.jsonl, data/examples.jsonl or parquet files in {root}, got none")
    if not root.exists() and str(source).count("/") != 1:
        raise DataError(
            f"source: {source} does not exist; name the folder of examples.jsonl, or a hub id like {HUB_ID}"
        )
    return _read_table(str(source))


def _read_unpacked(path: Path, root: Path) -> list[TwoByTwo]:
    rows = read_rows(path, {**_CAPTIONS, **dict.fromkeys(_IMAGES, str), "id": int})
    folder = next((found for found in (path.parent / "images", root / "images") if found.is_dir()), path.parent)
    pairs = [(folder / f"{row['image_0']}.png", folder / f"{row['image_1']}.png") for row in rows]
    check_images([image for pair in pairs for image in pair], path)
    return [_example(row, pair) for row, pair in zip(rows, pairs, strict=True)]


def _read_table(source: str) -> list[TwoByTwo]:
    try:
        table = load_table(source, "test")
    except DataError as error:
        raise DataError(
            f"{error}; name a folder with examples.jsonl, or accept the data set's terms on the hub and log in with "
            f"`hf auth login`"
        ) from error
    lacking = [name for name in (*_CAPTIONS, *_IMAGES) if name not in table.column_names]
    if lacking:
        raise DataError(f"source: {source} has no column {lacking[0]!r}; it has {table.column_names}")
    first, second = (TableImages(encoded_images(table, name), name) for name in _IMAGES)
    rows = table.remove_columns(list(_IMAGES))
    return [_example({"id": number, **row}, (first[number], second[number])) for number, row in enumerate(rows)]


def _example(row: Mapping[str, Any], images: tuple[ImageSource, ImageSource]) -> TwoByTwo:
    group = str(row.get("collapsed_tag") or row.get("tag") or "")
    return TwoByTwo(str(row["id"]), images, (row["caption_0"], row["caption_1"]), group)
