from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastsds.data import BadImages, CaptionDataset, DataError, collate_captions
from fastsds.data.images import open_image

ROWS = 20


@pytest.fixture
def folder(tmp_path: Path, pictures: Any) -> Path:
    """Twenty images with texts; 3 is truncated, 7 is no image, and 12 is gone."""
    for number in range(ROWS):
        pictures.save(tmp_path / "set" / f"{number:02}.png", number)
    lines = [{"file_name": f"{number:02}.png", "text": f"picture {number}"} for number in range(ROWS)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    pictures.truncate(tmp_path / "set" / "03.png")
    (tmp_path / "set" / "07.png").write_text("<html>", encoding="utf-8")
    (tmp_path / "set" / "12.png").unlink()
    return tmp_path / "set"


BAD = (3, 7, 12)


def _captions(dataset: CaptionDataset) -> list[str]:
    return [dataset[row]["captions"] for row in range(len(dataset))]


def _listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_rows_take_the_place_of_bad_ones_in_every_process(
    folder: Path, load: Any, pictures: Any, tmp_path: Path, workers: int
) -> None:
    dataset = load(folder, max_bad_share=0.5, bad_images=tmp_path / "run" / "bad_images.jsonl")
    loader = DataLoader(dataset, 4, collate_fn=collate_captions, num_workers=workers, persistent_workers=workers > 0)
    epochs = [list(loader) for _ in range(2)]
    for batches in epochs:
        assert [len(batch["captions"]) for batch in batches] == [4] * 5
        captions = [caption for batch in batches for caption in batch["captions"]]
        for row, caption in enumerate(captions):
            number = int(caption.removeprefix("picture "))
            assert number == row if row not in BAD else number not in BAD
            assert torch.cat([batch["images"] for batch in batches])[row].tolist() == pictures.colour(number)
        assert captions == _captions(load(folder, max_bad_share=0.5))
    assert dataset.bad_images.count == 3
    # Workers that meet a row at the same time may both list it.
    lines = {line["row"]: line for line in _listed(tmp_path / "run" / "bad_images.jsonl")}
    listed = [lines[row] for row in sorted(lines)]
    assert [(line["row"], Path(line["image"]).name) for line in listed] == [(row, f"{row:02}.png") for row in BAD]
    reasons = ("cannot be read (", "cannot be read (it is no image of a known format)", "does not exist")
    assert all(reason in line["reason"] for reason, line in zip(reasons, listed, strict=True))
    assert dataset.bad_images.summary() == (
        f"3 of 20 images could not be read and were skipped; {tmp_path / 'run' / 'bad_images.jsonl'} lists them"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_stops_beyond_the_share_and_names_the_first(folder: Path, load: Any, workers: int) -> None:
    dataset = load(folder, max_bad_share=0.1)  # two
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, 4, collate_fn=collate_captions, num_workers=workers))
    message = str(caught.value)
    assert message.startswith("images: 3 of 20 cannot be read and max_bad_share=0.1 allows 2: ")
    assert all(f"{row:02}.png" in message for row in BAD) and "; the last because: image: " in message
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("rows", "share", "allowed"),
    [(1000, 0.01, 10), (150, 0.01, 1), (5, 0.01, 1), (5, 0.0, 0), (1, 0.5, 0), (4, 1.0, 3), (600000, 0.01, 6000)],
)
def test_small_sets_may_have_one_bad_image_unless_none_may_be(rows: int, share: float, allowed: int) -> None:
    assert BadImages(range(rows), share).allowed == allowed  # type: ignore[arg-type]


def test_a_set_of_bad_images_alone_ends(tmp_path: Path, load: Any) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").touch()
        (tmp_path / f"{number}.txt").write_text("a picture", encoding="utf-8")
    with pytest.raises(DataError, match=r"images: 6 of 6 cannot be read and max_bad_share=1\.0 allows 5: .*0\.png, "):
        load(tmp_path, max_bad_share=1.0)[2]


def test_resumed_runs_know_what_was_listed(
    folder: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "bad_images.jsonl"
    expected = _captions(load(folder, max_bad_share=0.5, bad_images=listing))
    listing.write_bytes(listing.read_bytes() + '{"row": 15, "image": "é'.encode()[:-1])  # killed
    before = listing.read_bytes()
    resumed = load(folder, max_bad_share=0.5, bad_images=listing)
    assert resumed.bad_images.count == 3
    opened: list[Path] = []
    monkeypatch.setattr("fastsds.data.captions.open_image", lambda image: (opened.append(image), open_image(image))[1])
    assert _captions(resumed) == expected
    assert len(opened) == ROWS and not {path.name for path in opened} & {f"{row:02}.png" for row in BAD}
    assert listing.read_bytes() == before


def test_names_that_are_not_utf8_are_listed_and_known_again(tmp_path: Path, load: Any, pictures: Any) -> None:
    folder = tmp_path / "set"
    for number in range(3):
        pictures.save(folder / f"{number}.png", number).with_suffix(".txt").write_text(f"picture {number}")
    (folder / "1.png").write_bytes(b"no image")
    for suffix in ("png", "txt"):
        (folder / f"1.{suffix}").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9." + suffix.encode()))
    dataset = load(folder, max_bad_share=0.5, bad_images=tmp_path / "bad.jsonl")
    assert dataset.bad_images.count == 0
    assert "picture 1" not in _captions(dataset)
    assert load(folder, max_bad_share=0.5, bad_images=tmp_path / "bad.jsonl").bad_images.count == 1


def test_a_listing_of_other_data_is_not_believed(folder: Path, load: Any, tmp_path: Path) -> None:
    lines = [
        {"row": 1, "image": "elsewhere/01.png", "reason": "x"},
        {"row": 500, "image": "a", "reason": "x"},
        {"row": 5, "image": str(folder / "05.png"), "reason": "x"},
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    dataset = load(folder, max_bad_share=0.5, bad_images=tmp_path / "bad.jsonl")
    assert dataset.bad_images.count == 1
    assert dataset[1]["captions"] == "picture 1" and dataset[5]["captions"] != "picture 5"


def test_nothing_is_said_or_written_where_all_is_well(tmp_path: Path, load: Any, pictures: Any) -> None:
    pictures.save(tmp_path / "set" / "0.png", 0)
    (tmp_path / "set" / "0.txt").write_text("zero", encoding="utf-8")
    dataset = load(tmp_path / "set", bad_images=tmp_path / "run" / "bad_images.jsonl")
    assert _captions(dataset) == ["zero"] and dataset.bad_images.summary() == ""
    assert not (tmp_path / "run").exists()


def test_shares_outside_their_range_are_refused(tmp_path: Path, load: Any) -> None:
    with pytest.raises(ValueError, match=r"max_bad_share: expected a share in \[0, 1\], got 1\.5"):
        load(tmp_path, max_bad_share=1.5)
    with pytest.raises(ValueError, match=r"max_share: expected a share in \[0, 1\], got -1"):
        BadImages([], -1)
