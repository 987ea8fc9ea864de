from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from fastsds.data import DataError
from fastsds.evaluation import CaptionedImages, ClipJudge, read_captioned_images, retrieval, retrieval_outcomes
from fastsds.evaluation.retrieval import retrieval_ranks


def _image(*colour: int) -> Image.Image:
    return Image.new("RGB", (2, 2), colour)


def _ranks(scores: np.ndarray, owner: list[int]) -> tuple[list[int], list[int]]:
    """Definition: wrong candidates at least as good as one's own."""
    images, captions = scores.shape
    of_captions = [
        sum(scores[other, at] >= scores[owner[at], at] for other in range(images) if other != owner[at])
        for at in range(captions)
    ]
    of_images = []
    for image in range(images):
        best = max(scores[image, at] for at in range(captions) if owner[at] == image)
        of_images.append(sum(scores[image, at] >= best for at in range(captions) if owner[at] != image))
    return of_captions, of_images


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 512])
@pytest.mark.parametrize("levels", [3, 1000])  # few levels are many ties
def test_ranks_agree_with_their_definition(monkeypatch: Any, chunk: int, levels: int) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK", chunk)
    rng = np.random.default_rng(levels)
    owner = [0, 0, 1, 3, 2, 3, 4, 5, 6, 6, 6, 1]
    for _ in range(20):
        scores = rng.integers(-levels, levels, (7, len(owner))).astype(np.float32)
        table = torch.from_numpy(scores)
        of_captions, of_images = retrieval_ranks(lambda rows, t=table: t[rows].clone(), torch.tensor(owner), 7)
        assert (of_captions.tolist(), of_images.tolist()) == _ranks(scores, owner)


def test_recall_by_hand(colour_judge: Any) -> None:
    """Three images, two captions each; yellow is as near to red as to green."""
    data = CaptionedImages(
        (_image(255, 0, 0), _image(0, 255, 0), _image(0, 0, 255)),
        (("a red one", "a yellow one"), ("a green one", "a blue one"), ("a blue one", "a red one")),
    )
    figures = retrieval_outcomes(colour_judge(), data, ks=(1, 2)).figures
    assert list(figures) == ["text-to-image R@1", "text-to-image R@2", "image-to-text R@1", "image-to-text R@2"]
    # captions: right; tied with green; right; blue of the green image; right; red of the blue image
    assert figures["text-to-image R@1"].hits == (1, 0, 1, 0, 1, 0)
    # the last two images are as far from red, and green and red as far from blue: ties again
    assert figures["text-to-image R@2"].hits == (1, 1, 1, 0, 1, 0)
    # images: red's caption comes twice in the set, once wrong; green's is alone; blue's comes twice
    assert figures["image-to-text R@1"].hits == (0, 1, 0)
    assert figures["image-to-text R@2"].hits == (1, 1, 1)
    assert figures["image-to-text R@1"].keys == tuple(f"{at} an image in memory of 2 x 2 pixels" for at in range(3))
    assert len(set(figures["text-to-image R@1"].keys)) == 6


def test_chance_is_that_of_random_order(colour_judge: Any) -> None:
    data = CaptionedImages((_image(255, 0, 0), _image(0, 255, 0)), (("a red one", "a white one"), ("a green one",)))
    figures = retrieval_outcomes(colour_judge(), data, ks=(1, 2, 5)).figures
    orders = list(itertools.permutations(range(3)))
    for k in (1, 2, 5):
        own = [sum(any(at in wanted for at in order[:k]) for order in orders) / len(orders) for wanted in ({0, 1}, {2})]
        assert figures[f"image-to-text R@{k}"].chance == pytest.approx(sum(own) / 2)
        assert figures[f"text-to-image R@{k}"].chance == pytest.approx(min(k, 2) / 2)


def test_equal_captions_tie_whatever_is_rounded(colour_judge: Any) -> None:
    """Both images have the same caption, among many: each one's is as good as the other's."""
    rng = np.random.default_rng(0)
    table = {f"caption {at}": rng.normal(size=3).tolist() for at in range(30)}
    images = tuple(_image(*rng.integers(1, 255, 3).tolist()) for _ in range(60))
    captions = tuple((f"caption {at % 30}",) for at in range(60))
    figures = retrieval_outcomes(colour_judge(table), CaptionedImages(images, captions)).figures
    assert figures["image-to-text R@1"].micro == 0


def test_equal_images_tie_wherever_they_stand(monkeypatch: Any) -> None:
    """Every image comes twice, each with captions of its own; the last stands alone in its matrix product."""
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    mix, texts = torch.randn(3, 200), torch.randn(500, 200)

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.device = torch.nn.Parameter(torch.zeros(1))

        def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.nn.functional.normalize((images[:, :, 0, 0, None] * mix).sum(dim=1), dim=-1)

        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.nn.functional.normalize(texts[tokens], dim=-1)

    colours = torch.randint(1, 255, (25, 3)).tolist()
    images = tuple(_image(*colours[at % 25]) for at in range(50))
    judge = ClipJudge(Clip(), to_tensor, lambda captions: torch.tensor([int(caption) for caption in captions]))
    data = CaptionedImages(images, tuple(tuple(f"{at}{place}" for place in range(10)) for at in range(50)))
    assert retrieval_outcomes(judge, data).figures["text-to-image R@1"].micro == 0


def test_embeddings_that_are_not_finite_are_no_wrong_answers(colour_judge: Any) -> None:
    data = CaptionedImages((_image(255, 0, 0), _image(0, 255, 0)), (("a red one",), ("broken",)))
    with pytest.raises(ValueError, match="embeddings: expected finite values"):
        retrieval_outcomes(colour_judge({"broken": [float("nan"), 0.0, 0.0]}), data)


@pytest.mark.parametrize("ks", [(), (1, 0)])
def test_refused_ks(colour_judge: Any, ks: tuple[int, ...]) -> None:
    data = CaptionedImages((_image(255, 0, 0),), (("a red one",),))
    with pytest.raises(ValueError, match=re.escape(f"ks: expected at least one, each at least 1, got {ks}")):
        retrieval_outcomes(colour_judge(), data, ks=ks)


def test_karpathys_test_file_keeps_five_captions(tmp_path: Path, paint: Any) -> None:
    paths = [paint(tmp_path / "val2014" / f"{name}.png", "red") for name in "ab"]
    rows = [{"image": f"val2014/{path.name}", "caption": [f"{path.stem}{at}" for at in range(6)]} for path in paths]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(rows))
    data = read_captioned_images(tmp_path / "coco_karpathy_test.json", tmp_path)
    assert data.images == tuple(paths)
    assert data.captions == (("a0", "a1", "a2", "a3", "a4"), ("b0", "b1", "b2", "b3", "b4"))
    everything = read_captioned_images(tmp_path / "coco_karpathy_test.json", tmp_path, captions=None)
    assert [len(texts) for texts in everything.captions] == [6, 6]


def test_karpathys_own_file_has_splits(tmp_path: Path, paint: Any) -> None:
    for name in "abc":
        paint(tmp_path / f"{name}.png", "red")
    rows = [
        {"filename": f"{name}.png", "split": split, "sentences": [{"raw": f"{name} {at}"} for at in range(2)]}
        for name, split in (("a", "train"), ("b", "test"), ("c", "test"))
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    data = read_captioned_images(tmp_path / "dataset_flickr30k.json", tmp_path)
    assert data.captions == (("b 0", "b 1"), ("c 0", "c 1"))
    assert read_captioned_images(tmp_path / "dataset_flickr30k.json", tmp_path, "train").captions == (("a 0", "a 1"),)
    with pytest.raises(DataError, match=r"split: expected one of \['test', 'train'\] of .*, got 'val'"):
        read_captioned_images(tmp_path / "dataset_flickr30k.json", tmp_path, "val")


def test_cocos_captions_are_gathered_by_image(tmp_path: Path, paint: Any) -> None:
    for name in "ab":
        paint(tmp_path / f"{name}.png", "red")
    document = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "annotations": [{"id": at, "image_id": image, "caption": f"{at}"} for at, image in enumerate([3, 7, 3, 7, 7])],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(document))
    data = read_captioned_images(tmp_path / "captions_val2017.json", tmp_path)
    assert data.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert data.captions == (("1", "3", "4"), ("0", "2"))
