"""The toy world's files, read by the readers of real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from fastsds import cli
from fastsds.data.attributes import read_attributes
from fastsds.data.captions import open_image
from fastsds.data.fewshot import FewShotSplit
from fastsds.data.source import CaptionSource
from fastsds.evaluation.winoground import read_winoground
from fastsds.toyworld import files
from fastsds.toyworld.files import ToyWorldConfig, write_toyworld
from fastsds.toyworld.scenes import SHAPES
from fastsds.toyworld.tasks import composition_pairs, training_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "world"
    write_toyworld(ToyWorldConfig(out, captions=6, pairs=5, train_per_class=3, test_per_class=2, seed=4))
    return out


def test_captions_are_coco(folder: Path) -> None:
    images, captions = CaptionSource(
        folder / "coco/annotations/captions_train.json", images=folder / "coco/train"
    ).read()
    scenes = training_scenes(6, 4)
    assert [text for (text,) in captions] == scenes.captions
    for image, scene in zip(images, scenes.images, strict=True):
        assert torch.allclose(to_tensor(open_image(image)), scene, atol=1 / 255 + 1e-6)


def test_pairs_are_winoground(folder: Path) -> None:
    examples = read_winoground(folder / "winoground")
    relation, attribute = composition_pairs("relation", 3), composition_pairs("attribute", 2)
    assert [example.captions for example in examples] == [*relation.captions, *attribute.captions]
    assert [example.group for example in examples] == ["Relation"] * 3 + ["Attribute"] * 2
    first, second = examples[0].load()
    for image, scene in zip((first, second), relation.images[0], strict=True):
        assert torch.allclose(to_tensor(image), scene, atol=1 / 255 + 1e-6)


def test_few_shots_are_folders_and_a_split_of_the_same_images(folder: Path) -> None:
    root = folder / "fewshot"
    by_folder, by_file = FewShotSplit.from_folders(root), FewShotSplit.from_json(root / "split.json", root)
    assert by_folder.classnames == by_file.classnames == tuple(sorted(SHAPES))
    for part, count in (("train", 3), ("val", 3), ("test", 2)):
        found, listed = ({(item.key, item.label) for item in getattr(split, part)} for split in (by_folder, by_file))
        assert found == listed
        assert len(found) == count * len(SHAPES)
    attributes = read_attributes(root / "attributes.jsonl")
    assert {item.key for item in by_folder.with_attributes(attributes).train} == attributes.keys()


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["toyworld", "--out", str(tmp_path / "world"), "--captions", "2", "--pairs", "2"]
    words += ["--train-per-class", "1", "--test-per-class", "1"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_few_shot", interrupt)
        assert cli.main(words) == 130
    assert not list(tmp_path.iterdir())
    assert cli.main(words) == 0
    assert {path.name for path in (tmp_path / "world").iterdir()} == {"coco", "winoground", "fewshot", "config.yaml"}


def test_an_existing_folder_is_refused(folder: Path) -> None:
    before = json.loads((folder / "fewshot/split.json").read_text(encoding="utf-8"))
    with pytest.raises(FileExistsError, match=r"out: .*world exists; name another folder"):
        write_toyworld(ToyWorldConfig(folder))
    assert json.loads((folder / "fewshot/split.json").read_text(encoding="utf-8")) == before


@pytest.mark.parametrize(("option", "least"), [("captions", 1), ("pairs", 2), ("train_per_class", 1)])
def test_numbers_below_the_least_are_refused(option: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected at least {least}, got 0"):
        ToyWorldConfig(**{option: 0})
