"""The toy world as files in the formats of real data: a first thing to train on and evaluate, and the tests' own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from fastsds.clip.export import whole_path
from fastsds.data.fewshot import LabelledImage
from fastsds.toyworld.fewshot import few_shot_task
from fastsds.toyworld.scenes import SHAPES
from fastsds.toyworld.tasks import Split, composition_pairs, training_scenes


@dataclass(frozen=True)
class ToyWorldConfig:
    """Write the toy world's scenes as COCO captions, a Winoground folder and few-shot folders with attributes.

    examples:
      fastsds toyworld
      fastsds toyworld --out tiny --captions 64 --pairs 8
    """

    out: Path = Path("toyworld-data")
    """Folder that receives `coco`, `winoground` and `fewshot`; it must not exist."""
    captions: int = 2000
    """Images with a caption, to distil on; 60 % show one thing, the others two in a relation."""
    pairs: int = 400
    """Winoground examples, half with exchanged noun phrases (`relation`) and half with exchanged colours."""
    train_per_class: int = 40
    """Few-shot training pictures of each of the six shapes."""
    test_per_class: int = 100
    """Few-shot test pictures of each of the six shapes."""
    seed: int = 0
    """Of the captioned scenes; the others are always the same."""

    def __post_init__(self) -> None:
        for name, least in (("captions", 1), ("pairs", 2), ("train_per_class", 1), ("test_per_class", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def write_toyworld(config: ToyWorldConfig, files: Mapping[str, str] | None = None) -> None:
    """Writes everything below `config.out`, which appears whole or not at all.

    Args:
        files: more files of the folder, by their names.

    Raises:
        FileExistsError: the folder exists.
    """
    if config.out.exists():
        raise FileExistsError(f"out: {config.out} exists; name another folder")
    with whole_path(config.out) as staging:
        write_captions(staging / "coco", config.captions, config.seed)
        write_winoground(staging / "winoground", config.pairs)
        write_few_shot(staging / "fewshot", config.train_per_class, config.test_per_class)
        for name, text in (files or {}).items():
            (staging / name).write_text(text, encoding="utf-8")


def write_captions(folder: Path, count: int, seed: int = 0) -> None:
    """COCO captions: `annotations/captions_train.json` and the images in `train`."""
    scenes = training_scenes(count, seed)
    pictures = [to_pil_image(image) for image in scenes.images]
    rows = []
    for number, picture in enumerate(pictures, start=1):
        name = f"{number:012d}.png"
        _save(picture, folder / "train" / name)
        rows.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
    annotations = [
        {"id": number, "image_id": number, "caption": caption}
        for number, caption in enumerate(scenes.captions, start=1)
    ]
    _write_json(folder / "annotations" / "captions_train.json", {"images": rows, "annotations": annotations})


def write_winoground(folder: Path, count: int, split: Split = "test") -> None:
    """Winoground's layout: `examples.jsonl` and `images`; the tag says what the captions exchange."""
    lines: list[str] = []
    for swap, share in (("relation", count - count // 2), ("attribute", count // 2)):
        pairs = composition_pairs(swap, share, split)  # type: ignore[arg-type]
        for images, captions in zip(pairs.images, pairs.captions, strict=True):
            number = len(lines)
            names = [f"ex_{number}_img_{side}" for side in (0, 1)]
            for name, image in zip(names, images, strict=True):
                _save(to_pil_image(image), folder / "images" / f"{name}.png")
            row = {
                "id": number, "image_0": names[0], "image_1": names[1],
                "caption_0": captions[0], "caption_1": captions[1],
                "tag": swap, "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": swap.capitalize(),
            }  # fmt: skip
            lines.append(json.dumps(row))
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_few_shot(folder: Path, train_per_class: int, test_per_class: int) -> None:
    """`{train,val,test}/<shape>/<number>.png`, `split.json` of the same images, and `attributes.jsonl` of train's.

    Labels follow the sorted names, as those of folders do.
    """
    task = few_shot_task(train_per_class, min(train_per_class, 4), test_per_class)
    split = {part: _write_part(folder, part, getattr(task, part)) for part in ("train", "val", "test")}
    _write_json(folder / "split.json", split)
    lines = [
        json.dumps({"path": row[0], "attribute": item.attribute})
        for row, item in zip(split["train"], task.train, strict=True)
    ]
    (folder / "attributes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_part(folder: Path, part: str, items: Sequence[LabelledImage]) -> list[list[Any]]:
    names = sorted(SHAPES)
    rows: list[list[Any]] = []
    for number, item in enumerate(items):
        key = f"{part}/{item.classname}/{number:05d}.png"
        assert isinstance(item.image, Image.Image)
        _save(item.image, folder / key)
        rows.append([key, names.index(item.classname), item.classname])
    return rows


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
