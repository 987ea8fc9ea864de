from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import DataError
from fastsds.evaluation import caption_choice_outcomes, read_sugarcrepe
from fastsds.evaluation.sugarcrepe import SPLITS


@pytest.fixture
def folders(tmp_path: Path, paint: Any) -> tuple[Path, Path]:
    """Seven splits of one to seven samples on a red image; in the last sample of each the wrong caption looks right."""
    images = tmp_path / "val2017"
    paint(images / "000000000139.png", "red")
    for count, split in enumerate(SPLITS, start=1):
        rows = {
            str(at): {
                "filename": "000000000139.png",
                "caption": "a red one" if at < count - 1 or count == 1 else "a blue one",
                "negative_caption": "a green one" if at < count - 1 or count == 1 else "a red one",
            }
            for at in range(count)
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path, images


def test_the_seven_splits_are_groups_and_figures(folders: tuple[Path, Path], colour_judge: Any) -> None:
    examples = read_sugarcrepe(*folders)
    assert len(examples) == 28
    assert (examples[1].key, examples[1].group) == ("add_obj/0", "add_obj")
    assert {example.right for example in examples} == {0}
    outcomes = caption_choice_outcomes(colour_judge(), examples, "sugarcrepe").with_groups_of("accuracy")
    figures = outcomes.figures
    assert list(figures) == ["accuracy", *SPLITS]
    expected = [1, 1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6, 6 / 7]
    assert [figures[split].micro for split in SPLITS] == pytest.approx(expected)
    assert figures["accuracy"].micro == pytest.approx(22 / 28)
    assert figures["accuracy"].macro == pytest.approx(sum(expected) / 7)


def test_some_splits_may_be_read_alone(folders: tuple[Path, Path]) -> None:
    (folders[0] / "add_att.json").unlink()
    assert {example.group for example in read_sugarcrepe(*folders, ["swap_obj", "add_obj"])} == {"swap_obj", "add_obj"}
    with pytest.raises(DataError, match=r"path: could not read .*add_att\.json: No such file"):
        read_sugarcrepe(*folders)
