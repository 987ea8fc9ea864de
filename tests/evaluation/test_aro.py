from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import DataError
from fastsds.evaluation import (
    Figure,
    Outcomes,
    caption_choice_outcomes,
    read_order,
    read_vg_attribution,
    read_vg_relation,
    with_published_macro,
    write_shuffles,
)
from fastsds.evaluation.shuffles import caption_options, clean_caption

TAGS = {"dog": "NN", "cats": "NNS", "park": "NN", "rex": "NNP", "red": "JJ", "bigger": "JJR", "old": "JJ"}


def _tagger(caption: str) -> list[tuple[str, str]]:
    return [(word, TAGS.get(word.lower(), "IN")) for word in caption.replace(".", " .").split()]


def _rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_visual_genome_is_cut_to_its_boxes(tmp_path: Path, paint: Any, colour_judge: Any) -> None:
    """The image is red on the left and green on the right; only the box tells which caption is right."""
    paint(tmp_path / "images" / "halves.png", "red", "green")
    box = {"bbox_y": 1, "bbox_w": 3, "bbox_h": 4, "image_path": "halves.png"}
    captions = [("a red one", "a green one"), ("a green one", "a red one"), ("a blue one", "a green one")]
    rows = [
        {**box, "bbox_x": left, "true_caption": true, "false_caption": false, "relation_name": relation}
        for left, (true, false), relation in zip((0, 5, 5), captions, ("on", "on", "under"), strict=True)
    ]
    examples = read_vg_relation(_rows(tmp_path / "visual_genome_relation.json", *rows), tmp_path / "images")
    assert [(example.box, example.captions, example.right) for example in examples[:2]] == [
        ((0, 1, 3, 5), ("a green one", "a red one"), 1),
        ((5, 1, 8, 5), ("a red one", "a green one"), 1),
    ]
    figure = caption_choice_outcomes(colour_judge(), examples, "vg-relation").figures["accuracy"]
    assert (figure.hits, figure.groups, figure.chance) == ((1, 1, 0), ("on", "on", "under"), 0.5)
    assert (figure.micro, figure.macro) == (pytest.approx(2 / 3), 0.5)


def test_attributions_group_is_the_pair(tmp_path: Path, paint: Any) -> None:
    paint(tmp_path / "a.png", "red")
    row = {"image_path": "a.png", "true_caption": "the old dog and the red cat", "attributes": ["old", "red"],
           "false_caption": "the red dog and the old cat", **dict.fromkeys(("bbox_x", "bbox_y"), 0),
           **dict.fromkeys(("bbox_w", "bbox_h"), 2)}  # fmt: skip
    (example,) = read_vg_attribution(_rows(tmp_path / "visual_genome_attribution.json", row), tmp_path)
    assert example.group == "old_red"
    assert example.captions[example.right] == "the old dog and the red cat"


def test_the_published_macro_leaves_groups_out() -> None:
    groups = ("on",) * 3 + ("near",) * 4 + ("under",) * 2
    figure = Figure((1, 1, 0, 0, 0, 0, 0, 1, 1), tuple(map(str, range(9))), groups, 0.5)
    outcomes = with_published_macro(Outcomes("vg-relation", {"accuracy": figure}), smallest=3, leave_out=["near"])
    assert outcomes.figures["accuracy"] == figure
    assert outcomes.figures["published"].keys == ("0", "1", "2")
    assert outcomes.figures["published"].macro == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="groups: expected one of 5 samples that is not left out, got none of 3"):
        with_published_macro(Outcomes("vg-relation", {"accuracy": figure}), smallest=5)


def test_orders_options_are_as_stored(tmp_path: Path, paint: Any, colour_judge: Any) -> None:
    paint(tmp_path / "val2014" / "a.png", "red")
    options = ["a red one", "one a red", "red a one", "one red a", "red one a"]
    stored = {"image": "val2014/a.png", "caption": "A red one.", "options": options}
    repeated = {**stored, "options": [options[0], options[0], options[1], options[2], options[1]]}
    path = _rows(tmp_path / "coco_order.json", stored, repeated)
    first, second = read_order(path, tmp_path)
    assert (first.captions, first.right) == (tuple(options), 0)
    assert second.captions == (options[0], options[1], options[2])  # its own words are no alternative, one counts once
    table = {option: [float(at), 1.0, 0.0] for at, option in enumerate(options[1:])}
    figure = caption_choice_outcomes(colour_judge(table), [first, second]).figures["accuracy"]
    assert figure.hits == (1, 1)
    assert figure.chance == pytest.approx((1 / 5 + 1 / 3) / 2)
    _rows(path, {**stored, "options": [options[0]] * 5})
    with pytest.raises(DataError, match=r"row 1 of .*coco_order\.json has no option but its caption 'a red one'"):
        read_order(path, tmp_path)


def test_shuffles_move_what_their_name_says() -> None:
    caption = "The red dog and bigger cats near the old park with rex today"
    words = clean_caption(caption).split()
    content = {at: TAGS[word] for at, word in enumerate(words) if word in TAGS}
    rng = random.Random(0)
    seen: list[set[str]] = [set() for _ in range(5)]
    for _ in range(200):
        options = caption_options(caption, _tagger, rng)
        assert options[0] == " ".join(words)
        for column, option in enumerate(options):
            seen[column].add(option)
            assert Counter(option.split()) == Counter(words)
        nouns_moved, others_moved, within, threes = (option.split() for option in options[1:])
        for at, word in enumerate(words):
            if at in content:  # a noun's place holds a noun, an adjective's an adjective; the others leave both alone
                assert TAGS[nouns_moved[at]][:2] == content[at][:2]
                assert others_moved[at] == word
            else:
                assert nouns_moved[at] == word
        assert [sorted(within[at : at + 3]) for at in range(0, 12, 3)] == [
            sorted(words[at : at + 3]) for at in range(0, 12, 3)
        ]
        text = " ".join(threes)
        assert all(" ".join(words[at : at + 3]) in text for at in range(0, 12, 3))
    assert len(seen[0]) == 1 and all(len(options) > 50 for options in seen[1:])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('A "red" dog; (two) #1 cats: ok!\n', "a red dog two 1 cats ok"),
        ("It's a semi-circle, there.", "it's a semi-circle, there"),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
    ],
)
def test_captions_are_cleaned_as_aro_cleans_them(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


def test_stored_shuffles_are_reproducible_and_readable(tmp_path: Path, paint: Any) -> None:
    rows = [
        {"image": f"val2014/{name}.png", "caption": [f"A red dog near {number} old cats." for number in range(5)]}
        for name in "ab"
    ]
    captions = _rows(tmp_path / "coco_karpathy_test.json", *rows)
    for row in rows:
        paint(tmp_path / str(row["image"]), "red")
    paths = [tmp_path / f"{name}.json" for name in ("first", "again", "other")]
    rows[0]["caption"].append("Dog.")  # has no other order
    _rows(captions, *rows)
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        assert write_shuffles(captions, path, _tagger, seed) == 10
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    examples = read_order(paths[0], tmp_path)
    assert len({example.key for example in examples}) == 10
    assert {example.captions[0] for example in examples} == {f"a red dog near {number} old cats" for number in range(5)}
