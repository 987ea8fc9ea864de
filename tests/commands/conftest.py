"""The toy world as files, and a distilled model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsds import cli


def run(*arguments: str | Path) -> None:
    """Runs a command that is to succeed."""
    words = [str(word) for word in arguments]
    assert cli.main([*words, "--debug"]) == 0, " ".join(words)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fastsds toyworld` writes, small."""
    folder = tmp_path_factory.mktemp("commands") / "world"
    run(
        "toyworld",
        "--out",
        folder,
        "--captions",
        "48",
        "--pairs",
        "8",
        "--train-per-class",
        "3",
        "--test-per-class",
        "4",
    )
    return folder


@pytest.fixture(scope="session")
def distil(world: Path) -> list[str]:
    """Words of a short distillation of the toy world."""
    return [
        "distill", "--clip.name", "toyworld", "--teacher.source", "toyworld",
        "--captions.path", str(world / "coco/annotations/captions_train.json"),
        "--captions.images", str(world / "coco/train"), "--winoground", str(world / "winoground"),
        "--train.steps", "4", "--train.lr", "1e-3", "--train.no-tensorboard", "--train.no-progress",
        "--sds.projector-images", "32", "--batch-size", "8", "--workers", "0",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def distilled(distil: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "sds-clip"
    run(*distil, "--train.out", out)
    return out


@pytest.fixture(scope="session")
def tune(world: Path) -> list[str]:
    """Words of a short prompt tuning of the toy world."""
    return [
        "intcoop", "--clip.name", "toyworld", "--data.images", str(world / "fewshot"),
        "--data.attributes", str(world / "fewshot/attributes.jsonl"), "--train.shots", "2", "--train.epochs", "2",
        "--train.lr", "8e-3", "--batch-size", "3", "--train.no-tensorboard", "--train.no-progress",
        "--loading.workers", "0",
    ]  # fmt: skip
