from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsds.data import DataError
from fastsds.evaluation import (
    WinogroundScores,
    read_winoground,
    two_by_two_outcomes,
    winoground_scores,
    winoground_similarity,
)
from fastsds.evaluation.winoground import prefers_own_caption


def _table(c0i0: float, c0i1: float, c1i0: float, c1i1: float) -> torch.Tensor:
    """`[1, caption, image]`."""
    return torch.tensor([[[c0i0, c0i1], [c1i0, c1i1]]])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (_table(0.9, 0.1, 0.2, 0.8), WinogroundScores(pair=1, text=1, image=1, group=1)),
        (_table(0.1, 0.9, 0.8, 0.2), WinogroundScores(pair=0, text=0, image=0, group=0)),
        # caption 1 is similar to everything: each caption finds its image, image 0 does not find its caption
        (_table(0.3, 0.1, 0.5, 0.9), WinogroundScores(pair=0.5, text=0, image=1, group=0)),
        # image 1 is similar to everything: each image finds its caption, caption 0 does not find its image
        (_table(0.3, 0.5, 0.1, 0.9), WinogroundScores(pair=1, text=1, image=0, group=0)),
    ],
)
def test_scores_of_one_example(table: torch.Tensor, expected: WinogroundScores) -> None:
    assert winoground_scores(table) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (_table(0.5, 0.1, 0.5, 0.9), WinogroundScores(pair=0.5, text=0, image=1, group=0)),  # s(c0,i0) = s(c1,i0)
        (_table(0.9, 0.5, 0.1, 0.5), WinogroundScores(pair=0.5, text=0, image=1, group=0)),  # s(c1,i1) = s(c0,i1)
        (_table(0.5, 0.5, 0.1, 0.9), WinogroundScores(pair=1, text=1, image=0, group=0)),  # s(c0,i0) = s(c0,i1)
        (_table(0.9, 0.1, 0.5, 0.5), WinogroundScores(pair=1, text=1, image=0, group=0)),  # s(c1,i1) = s(c1,i0)
        (_table(0.5, 0.5, 0.5, 0.5), WinogroundScores(pair=0, text=0, image=0, group=0)),
    ],
)
def test_a_tie_in_any_comparison_is_wrong(table: torch.Tensor, expected: WinogroundScores) -> None:
    assert winoground_scores(table) == expected


def test_shares_are_over_examples() -> None:
    right, wrong = _table(0.9, 0.1, 0.2, 0.8), _table(0.1, 0.9, 0.8, 0.2)
    text_only, image_only = _table(0.3, 0.5, 0.1, 0.9), _table(0.3, 0.1, 0.5, 0.9)
    scores = winoground_scores(torch.cat([right, wrong, text_only, text_only, image_only]))
    assert scores.to_json() == pytest.approx({"pair": 7 / 10, "text": 3 / 5, "image": 2 / 5, "group": 1 / 5})


def test_orders_of_four_values_give_the_chance_that_is_documented() -> None:
    """Of the 24 orders of four similarities, every one as likely as any other without skill."""
    from itertools import permutations

    tables = torch.cat([_table(*order) for order in permutations((0.1, 0.2, 0.3, 0.4))])
    expected = {"pair": 1 / 2, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
    assert winoground_scores(tables).to_json() == pytest.approx(expected)


def test_preference_of_each_image_against_the_definition() -> None:
    values = (0.1, 0.2, 0.3)
    for table in (_table(*cells) for cells in product(values, repeat=4)):
        (c0i0, c0i1), (c1i0, c1i1) = table[0].tolist()
        assert prefers_own_caption(table)[0].tolist() == [c0i0 > c1i0, c1i1 > c0i1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="similarity: expected finite values"):
        winoground_scores(_table(value, 0.1, 0.2, 0.3))


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2), (3, 2, 3), (3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected \[examples, 2, 2\] with examples, got \[{shape[0]}, "):
        winoground_scores(torch.zeros(shape))


def test_similarity_is_by_example_caption_and_image(stub_clip: Any) -> None:
    clip = stub_clip({"x": [2.0, 0.0, 0.0], "y": [0.0, 3.0, 0.0], "z": [0.0, 0.0, 1.0], "xy": [3.0, 4.0, 0.0]})
    images = torch.tensor([[[0.6, 0.8, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 7.0], [0.0, 6.0, 8.0]]]).view(2, 2, 3, 1, 1)
    similarity = winoground_similarity(clip, clip.tokenizer, images, [("x", "y"), ("z", "xy")])
    expected = torch.tensor([
        [[0.6, 1.0], [0.8, 0.0]],  # x with both images of the first example, then y
        [[1.0, 0.8], [0.0, 0.48]],  # z with both of the second, then xy
    ])  # fmt: skip
    torch.testing.assert_close(similarity, expected)
    # the first example's images have each other's captions
    assert winoground_scores(similarity) == WinogroundScores(pair=0.25, text=0, image=0.5, group=0)


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (torch.zeros(2, 2, 3, 1, 1), [("x", "y")]),
        (torch.zeros(1, 3, 3, 1, 1), [("x", "y")]),
        (torch.zeros(1, 2, 3, 1, 1), [("x", "y", "x")]),
        (torch.zeros(1, 2, 3, 1, 1), [("x",)]),
    ],
)
def test_other_than_two_captions_for_two_images_are_refused(
    stub_clip: Any, images: torch.Tensor, captions: list[Any]
) -> None:
    clip = stub_clip({"x": [1.0, 0.0, 0.0], "y": [0.0, 1.0, 0.0]})
    message = rf"two for each of {len(images)} examples of two images, got 1 rows for images \[{len(images)}, "
    with pytest.raises(ValueError, match=message):
        winoground_similarity(clip, clip.tokenizer, images, captions)


def _write_unpacked(root: Path, paint: Any) -> None:
    rows = []
    for number, (tags, colours) in enumerate(
        [({"tag": "Noun", "collapsed_tag": "Object"}, ("red", "green")), ({"tag": "Verb-Transitive"}, ("blue", "red"))]
    ):
        names = [f"ex_{number}_img_{side}" for side in (0, 1)]
        for name, colour in zip(names, colours, strict=True):
            paint(root / "images" / f"{name}.png", colour)
        row = {"id": number, "caption_0": f"a {colours[0]} one", "caption_1": f"a {colours[1]} one", **tags}
        rows.append(json.dumps({**row, "image_0": names[0], "image_1": names[1], "num_main_preds": 1}))
    (root / "examples.jsonl").write_text("\n".join(rows) + "\n")


def test_the_unpacked_folder_is_read(tmp_path: Path, paint: Any, colour_judge: Any) -> None:
    _write_unpacked(tmp_path, paint)
    first, second = read_winoground(tmp_path)
    assert (first.key, first.group, second.key, second.group) == ("0", "Object", "1", "Verb-Transitive")
    assert second.captions == ("a blue one", "a red one")
    assert second.images == tuple(tmp_path / "images" / f"ex_1_img_{side}.png" for side in (0, 1))
    figures = two_by_two_outcomes(colour_judge(), [first, second]).figures
    assert {figure.micro for figure in figures.values()} == {1}


def test_captions_may_hold_any_character(tmp_path: Path, paint: Any) -> None:
    """Characters at which Python, but not JSON, ends a line; written as they are."""
    _write_unpacked(tmp_path, paint)
    path = tmp_path / "examples.jsonl"
    captions = ["ein Hündchen\u2028auf Gras", "犬\x85と猫"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= {"caption_0": captions[0], "caption_1": captions[1]}
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_winoground(tmp_path)[1].captions == tuple(captions)


@pytest.mark.parametrize("saved_by", ["save_to_disk", "dataset dict", "parquet"])
def test_what_datasets_saves_is_read(tmp_path: Path, paint: Any, saved_by: str, monkeypatch: Any) -> None:
    """As the hub has it: both images inside the rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = _hub_table(tmp_path, paint)
    folder = tmp_path / "saved"
    if saved_by == "save_to_disk":
        table.save_to_disk(folder)
    elif saved_by == "dataset dict":
        datasets.DatasetDict(test=table).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        table.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    first, second = read_winoground(folder)
    assert (first.key, first.group, first.captions) == ("171", "Both", ("a red one", "a green one"))
    assert [image.getpixel((0, 0)) for example in (first, second) for image in example.load()] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 0),
    ]  # fmt: skip


def test_tables_that_are_none_of_winoground_are_named(tmp_path: Path, paint: Any, monkeypatch: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = _hub_table(tmp_path, paint)
    table.rename_column("caption_1", "text").save_to_disk(tmp_path / "renamed")
    with pytest.raises(DataError, match=r"source: .*renamed has no column 'caption_1'; it has \[.*'text'.*\]"):
        read_winoground(tmp_path / "renamed")
    (tmp_path / "empty").mkdir()
    table.select([]).to_parquet(tmp_path / "empty" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"path: .*empty is absent, empty or damaged"):
        read_winoground(tmp_path / "empty")
    table.save_to_disk(tmp_path / "broken")
    arrow = next((tmp_path / "broken").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match=r"path: .*broken .*; name a folder with examples\.jsonl"):
        read_winoground(tmp_path / "broken")


def test_a_truncated_image_in_a_row_is_named(tmp_path: Path, paint: Any) -> None:
    _hub_table(tmp_path, paint, keep=40).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="image: image_1 of row 0 cannot be read"):
        read_winoground(tmp_path / "saved")[0].load()


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(DataError, match=rf"source: {source} does not exist; name the folder of examples\.jsonl, or"):
        read_winoground(source)


def _hub_table(root: Path, paint: Any, *, keep: int | None = None) -> Any:
    """As the hub has it, with the content of image files in the rows (of image_1, the first `keep` bytes)."""
    import datasets

    colours = [("red", "green"), ("blue", "red")]
    content = {name: paint(root / f"{name}.png", name).read_bytes() for name in ("red", "green", "blue")}
    columns = {
        "id": [171, 172],
        "image_0": [{"bytes": content[first], "path": None} for first, _ in colours],
        "image_1": [{"bytes": content[second][:keep], "path": None} for _, second in colours],
        **{f"caption_{side}": [f"a {pair[side]} one" for pair in colours] for side in (0, 1)},
        "tag": ["Noun", "Noun"],
        "collapsed_tag": ["Both", "Object"],
    }
    texts = dict.fromkeys(("caption_0", "caption_1", "tag", "collapsed_tag"), datasets.Value("string"))
    images = dict.fromkeys(("image_0", "image_1"), datasets.Image())
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({"id": datasets.Value("int32"), **images, **texts})
    )
