"""Small models of the genuine classes, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsds.toyworld import models


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    models.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_parts(tokenizer_folder: Path) -> dict[str, Any]:
    """The objects of a tiny Stable Diffusion pipeline, by their names there; do not change them."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return {
        "unet": UNet2DConditionModel(**models.UNET_CONFIG),
        "vae": AutoencoderKL(**models.VAE_CONFIG),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **models.TEXT_ENCODER_CONFIG)),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**models.SCHEDULER_CONFIG),
    }


@pytest.fixture
def teacher(teacher_parts: dict[str, Any]) -> Any:
    """A tiny `DiffusionTeacher` of its own for the test (8 x 8 latents of 4 channels, v-prediction)."""
    from fastsds.diffusion import DiffusionTeacher

    parts = {name: copy.deepcopy(part) for name, part in teacher_parts.items()}
    return DiffusionTeacher(**parts)


@pytest.fixture(scope="session")
def pipeline_folder(teacher_parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine Stable Diffusion folder of the same models."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("pipeline")
    StableDiffusionPipeline(
        **teacher_parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def clip_tokenizer(tokenizer_folder: Path) -> Any:
    from open_clip.tokenizer import HFTokenizer

    return HFTokenizer(str(tokenizer_folder), context_length=models.CONTEXT_LENGTH)


@pytest.fixture(params=["CLIP", "CustomTextCLIP"])
def clip(request: pytest.FixtureRequest, clip_tokenizer: Any) -> Any:
    """A tiny open_clip model of either class (32 x 32 images, 16 tokens, 32 dimensions)."""
    import open_clip

    text = {"context_length": models.CONTEXT_LENGTH, "vocab_size": len(clip_tokenizer.tokenizer)}
    return getattr(open_clip, request.param)(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={**text, "width": 32, "heads": 2, "layers": 2},
    ).eval()
