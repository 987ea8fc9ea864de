"""The shipped models are what the README says, through the public loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsds.toyworld import WEIGHTS, load_clip, load_teacher
from fastsds.toyworld.experiment import Evaluation, measure_teacher


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    _, preprocess, _ = load_clip()
    return Evaluation(preprocess, "validation", pairs=200, singles=400)


def test_weights_fit_in_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 10e6


def test_clip_classifies_things_and_cannot_tell_relations(evaluation: Evaluation) -> None:
    clip, _, tokenizer = load_clip()
    figures = evaluation.measure(clip, tokenizer)
    assert figures["zero_shot"] >= 0.95
    assert figures["attribute_pair"] >= 0.95
    # 400 images: chance is 50 % with a standard error of 2.5 %.
    assert 0.42 < figures["relation_pair"] < 0.58


def test_teacher_tells_attributes_and_relations(evaluation: Evaluation) -> None:
    figures = measure_teacher(load_teacher(), evaluation, pairs=50)
    assert figures["attribute_pair"] >= 0.95
    assert figures["relation_pair"] >= 0.95


@pytest.mark.smoke
def test_teacher_folder_is_a_genuine_pipeline() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "teacher", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["a red circle left of a blue square"] * 4, 25, generator=generator, output_type="pt").images
    left, right = images[..., :16], images[..., 16:]
    # Red leads on the left and blue on the right, as the caption says.
    assert left[:, 0].sum() > 1.5 * left[:, 2].sum()
    assert right[:, 2].sum() > 1.5 * right[:, 0].sum()


@pytest.mark.smoke
def test_clip_folder_is_a_genuine_open_clip_checkpoint() -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS / 'clip'}")
    assert isinstance(model, open_clip.CLIP)
    assert model.visual.image_size == (32, 32)
    assert preprocess is not None
    assert Path(WEIGHTS / "clip" / "open_clip_model.safetensors").is_file()
