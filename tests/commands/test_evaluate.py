"""The benchmarks from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsds import cli
from fastsds.clip.source import ClipSource
from fastsds.data.captions import open_image
from fastsds.evaluation.zeroshot import zero_shot_accuracy


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def evaluate(*arguments: str | Path) -> None:
    words = ["evaluate", *map(str, arguments), "--debug"]
    assert cli.main(words) == 0, " ".join(words)


MODEL = ("--clip.name", "toyworld", "--workers", "0")


def test_zeroshot(world: Path, tmp_path: Path) -> None:
    folder = world / "fewshot/test"
    evaluate("zeroshot", "--data", folder, *MODEL, "--out", tmp_path / "out")
    clip = ClipSource("toyworld").load()
    names = sorted(path.name for path in folder.iterdir())
    paths = [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    images = torch.stack([clip.preprocess(open_image(path)) for path, _ in paths])
    labels = torch.tensor([label for _, label in paths])
    expected = zero_shot_accuracy(clip.model, clip.tokenizer, images, labels, names, ["a photo of a {}."])
    assert results(tmp_path / "out")["figures"]["accuracy"]["micro"] == pytest.approx(expected)


def test_retrieval(world: Path, tmp_path: Path) -> None:
    coco = world / "coco"
    data = ("--data", coco / "annotations/captions_train.json", "--images", coco / "train")
    evaluate("retrieval", *data, *MODEL, "--out", tmp_path / "out")
    shares = [figure["micro"] for name, figure in results(tmp_path / "out")["figures"].items() if "text-to" in name]
    assert shares == sorted(shares)
    assert shares[-1] > 0.5  # at chance 10 of 48


def test_sugarcrepe_and_aro_read_their_files(world: Path, tmp_path: Path) -> None:
    """Made of the Winoground pairs: the other caption is the wrong one."""
    rows = [json.loads(line) for line in (world / "winoground/examples.jsonl").read_text(encoding="utf-8").splitlines()]
    images = world / "winoground/images"
    crepe = {
        str(row["id"]): {
            "filename": f"{row['image_0']}.png", "caption": row["caption_0"], "negative_caption": row["caption_1"],
        }
        for row in rows
    }  # fmt: skip
    (tmp_path / "swap_obj.json").write_text(json.dumps(crepe), encoding="utf-8")
    box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 32, "bbox_h": 32}
    aro = [
        {
            "image_path": f"{row['image_0']}.png", "true_caption": row["caption_0"],
            "false_caption": row["caption_1"], "relation_name": row["tag"], **box,
        }
        for row in rows
    ]  # fmt: skip
    (tmp_path / "relation.json").write_text(json.dumps(aro), encoding="utf-8")
    evaluate(
        "sugarcrepe",
        "--data",
        tmp_path,
        "--images",
        images,
        "--splits",
        "swap_obj",
        *MODEL,
        "--out",
        tmp_path / "crepe",
    )
    evaluate(
        "aro", "--task", "vg-relation", "--data", tmp_path / "relation.json", "--images", images, *MODEL,
        "--leave-out", "attribute", "--out", tmp_path / "aro",
    )  # fmt: skip
    asked, published = (results(tmp_path / "aro")["figures"][name] for name in ("accuracy", "published"))
    assert results(tmp_path / "crepe")["figures"]["accuracy"]["micro"] == asked["micro"]
    assert published["micro"] == asked["by_group"]["relation"]
    evaluate(
        "diffusion-score", "--benchmark", "sugarcrepe", "--data", tmp_path, "--images", images, "--splits", "swap_obj",
        "--teacher.source", "toyworld", "--draws", "8", "--out", tmp_path / "teacher", "--compare", tmp_path / "crepe",
    )  # fmt: skip
    assert results(tmp_path / "teacher")["comparison"].keys() == {"accuracy", "swap_obj"}


def test_zeroshot_asks_for_the_split_of_a_data_set(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world / "fewshot"
    assert cli.main(["evaluate", "zeroshot", "--data", str(folder), *MODEL]) == 1
    first = min(path.name for path in folder.iterdir() if path.is_dir())
    expected = f"root: expected folders of classes in {folder}, got {first}; name that folder"
    assert capsys.readouterr().err == f"fastsds: {expected}\n"


def test_the_diffusion_score_beside_clip(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", world / "winoground")
    evaluate("winoground", *data, *MODEL, "--out", tmp_path / "clip")
    capsys.readouterr()
    evaluate(
        "diffusion-score", "--benchmark", "winoground", *data, "--teacher.source", "toyworld", "--draws", "32",
        "--t-range", "850", "1000", "--out", tmp_path / "teacher", "--compare", tmp_path / "clip",
    )  # fmt: skip
    printed = capsys.readouterr().out
    cost = json.loads((tmp_path / "teacher/cost.json").read_text(encoding="utf-8"))
    assert f"{cost['per_decision']:.1f} U-Net evaluations per decision" in printed
    assert cost["evaluations"] < cost["full_grid"]
    figures = results(tmp_path / "teacher")
    assert figures["figures"]["group"]["by_group"]["Relation"] == 1.0  # the toy CLIP is at chance there
    assert figures["comparison"]["group"]["difference"] > 0


@pytest.fixture
def few(world: Path, tmp_path: Path) -> Path:
    """Two of the toy world's classes, as files of EuroSAT and as COCO's captions of two classes' names."""
    rows, notes = [], []
    for number, name in enumerate(("circle", "square")):
        folder = tmp_path / "eurosat/2750" / name
        shutil.copytree(world / "fewshot/train" / name, folder)
        for path in sorted(folder.iterdir())[2:]:
            path.unlink()
        (path, *_) = sorted(folder.iterdir())
        rows.append({"id": number, "file_name": path.relative_to(tmp_path).as_posix()})
        notes += [{"id": at, "image_id": number, "caption": f"{text} {name}"} for at, text in enumerate(("a", "the"))]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows, "annotations": notes}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("judged", "data", "clip", "pairs"),
    [
        ("zeroshot", ("--data", "eurosat/2750"), (), 4 * 2),
        ("zeroshot", ("--data", "", "--torchvision", "EuroSAT"), (), 4 * 2),
        ("retrieval", ("--data", "captions.json"), ("--ks", "1"), 2 * 2 * 4),
    ],
)
def test_the_diffusion_score_of_a_whole_set(
    few: Path, judged: str, data: tuple[str, ...], clip: tuple[str, ...], pairs: int, capsys: Any
) -> None:
    """Its figures have the samples of CLIP's, and the cost is said first."""
    where = ("--data", few / data[1], *data[2:])
    evaluate(judged, *where, *clip, *MODEL, "--out", few / "clip")
    capsys.readouterr()
    evaluate(
        "diffusion-score", "--benchmark", judged, *where, "--teacher.source", "toyworld", "--draws", "16",
        "--compare", few / "clip", "--out", few / "teacher",
    )  # fmt: skip
    printed = capsys.readouterr().out
    said = f"at least {8 * pairs} U-Net evaluations, {16 * pairs} in the full grid"
    assert printed.startswith(f"{pairs} pairs of an image and a caption: {said}\n")
    found, cost = results(few / "teacher"), json.loads((few / "teacher/cost.json").read_text(encoding="utf-8"))
    assert found["figures"].keys() == found["comparison"].keys() == results(few / "clip")["figures"].keys()
    assert found["description"]["data"] == (data[3] if data[2:] else str(few / data[1]))
    assert found["description"].get("templates") == ("photo" if judged == "zeroshot" else None)
    assert 8 * pairs <= cost["evaluations"] <= cost["full_grid"] == 16 * pairs
    for name, figure in found["figures"].items():
        assert f"| {name} | {100 * figure['micro']:.1f} |" in printed
        assert f"| {name} | {100 * figure['micro']:.1f} |" in (few / "teacher/results.md").read_text(encoding="utf-8")


def test_the_diffusion_score_takes_one_template(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher, which does not exist, is not looked for."""
    words = ["evaluate", "diffusion-score", "--benchmark", "zeroshot", "--data", str(few / "eurosat/2750")]
    assert cli.main([*words, "--teacher.source", "none", "--templates", "simple"]) == 1
    said = "templates: expected one, as the diffusion score has no mean over prompts, got 7 of simple; give photo, or a"
    assert capsys.readouterr().err == f"fastsds: {said} file of one line\n"


def test_class_options_of_other_benchmarks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "diffusion-score", "--benchmark", "winoground", "--data", "x", "--teacher.source", "toyworld"]
    assert cli.main([*words, "--torchvision", "CIFAR10"]) == 2
    said = "torchvision: expected with benchmark=zeroshot alone, got benchmark=winoground"
    assert capsys.readouterr().err == f"fastsds: {said}; see fastsds evaluate diffusion-score --help\n"


def test_a_model_is_asked_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "winoground", "--data", str(world / "winoground")]) == 1
    expected = "fastsds: clip.name: expected a CLIP model, or --checkpoint with a distilled one, got neither\n"
    assert capsys.readouterr().err == expected


def test_unknown_benchmarks_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "winogroud"]) == 2
    expected = "fastsds: evaluate winogroud: there is no such command; did you mean evaluate winoground?\n"
    assert capsys.readouterr().err == expected


def test_results_of_other_data_are_not_compared(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("zeroshot", "--data", world / "fewshot/test", *MODEL, "--out", tmp_path / "out")
    words = ["evaluate", "winoground", "--data", str(world / "winoground"), *MODEL, "--compare", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(words) == 1
    assert "benchmark: expected the same of both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--compare",
            "fastsds: path: could not read {}/outcomes.json: No such file or directory; name a folder of results",
        ),
        ("--out", "fastsds: out: {} exists and holds no results; name another folder"),
    ],
)
def test_places_are_checked_before_anything_is_measured(
    option: str, message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, which does not exist, is not looked for."""
    (tmp_path / "notes.txt").touch()
    words = ["evaluate", "winoground", "--data", str(world / "winoground"), "--clip.name", "none"]
    assert cli.main([*words, option, str(tmp_path)]) == 1
    assert capsys.readouterr().err == message.format(tmp_path) + "\n"


def test_results_are_replaced_by_results(world: Path, tmp_path: Path) -> None:
    data = ("--data", world / "fewshot/test", *MODEL, "--out", tmp_path / "out")
    evaluate("zeroshot", *data)
    evaluate("zeroshot", *data, "--templates", "simple")
    assert results(tmp_path / "out")["description"]["templates"] == "simple"
