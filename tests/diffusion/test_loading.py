"""Pipeline folders as they are found on disks: of half precision alone, incomplete or damaged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from fastsds.diffusion.loading import load_parts

MODELS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "pipeline"))


def _drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, {"format": "pt"})


def test_weights_of_the_fp16_variant_serve_where_there_are_no_others(
    teacher_parts: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline(
        **teacher_parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = load_parts(tmp_path / "half", torch.float32)
    for name in MODELS:
        for key, expected in teacher_parts[name].state_dict().items():
            torch.testing.assert_close(loaded[name].state_dict()[key], expected)
    # Beside others they are passed over.
    for name, stem in MODELS.items():
        (folder / name / f"{stem}.fp16.safetensors").touch()
    assert load_parts(folder, torch.float32)["unet"].dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_a_tensor, r"source: the weights of {name} of {folder} lack 1 tensors, first \S+$"),
        (lambda file: file.unlink(), r"source: {name} of {folder} could not be loaded, .* no file named {file}"),
        (
            lambda file: file.rename(file.with_suffix(".bin")),
            r"source: {name} .*, which takes whole safetensors ",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:999]), r"source: {name} of {folder} could not be loaded, "),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"), r"source: {name} of {folder} cou"),
        (lambda file: shutil.rmtree(file.parent), r"source: {name} of {folder} could not be loaded, "),
    ],
)
def test_weights_that_are_incomplete_are_named(
    name: str, spoil: Callable[[Path], Any], message: str, folder: Path
) -> None:
    file = folder / name / f"{MODELS[name]}.safetensors"
    spoil(file)
    with pytest.raises(
        OSError, match=message.format(name=name, folder=re.escape(str(folder)), file=file.name)
    ) as caught:
        load_parts(folder, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_tokenizer_is_not_made_up(folder: Path, whole: bool) -> None:
    shutil.rmtree(folder / "tokenizer")
    if not whole:
        (folder / "tokenizer").mkdir()
    message = f"source: expected a tokenizer's tokenizer.json or vocab.json or spiece.model in {folder / 'tokenizer'}"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_parts(folder, torch.float32)


def test_sources_that_are_no_pipelines_are_told_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "sd.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"got .*sd\.safetensors; diffusers' from_single_file and save_pretr"):
        load_parts(tmp_path / "sd.safetensors", torch.float32)
    with pytest.raises(OSError, match=r"^source: models/sd15 is no folder, and as a hub id it could not be loaded: "):
        load_parts("models/sd15", torch.float32)
    (folder / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(OSError, match=r"^source: .*pipeline could not be loaded: .* not a valid JSON file"):
        load_parts(folder, torch.float32)
