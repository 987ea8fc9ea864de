"""Small CLIP models in the formats of open_clip and transformers, saved by these libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from fastsds.toyworld import models


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at once where a test would reach for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def make_transformers_clip(tokenizer_folder: Path) -> Callable[..., CLIPModel]:
    """A tiny transformers `CLIPModel` with random weights of every kind."""
    vocab_size = len(CLIPTokenizer.from_pretrained(tokenizer_folder))

    def make(*, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> CLIPModel:
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        length = {"vocab_size": vocab_size, "max_position_embeddings": models.CONTEXT_LENGTH}
        model = CLIPModel(
            CLIPConfig(
                projection_dim=24,
                vision_config={**size, "image_size": 32, "patch_size": 8, "projection_dim": 24, **(vision or {})},
                text_config={**size, **length, "eos_token_id": vocab_size - 1, "projection_dim": 24, **(text or {})},
            )
        ).eval()
        _stir(model)
        return model

    return make


@pytest.fixture
def save_transformers_folder(tokenizer_folder: Path) -> Callable[..., Path]:
    def save(model: CLIPModel, folder: Path, **processor: Any) -> Path:
        size = model.config.vision_config.image_size
        images = CLIPImageProcessor(
            **{"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, **processor}
        )
        model.save_pretrained(folder)
        CLIPProcessor(images, CLIPTokenizer.from_pretrained(tokenizer_folder)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def make_open_clip() -> Callable[..., Any]:
    """A tiny open_clip model with random weights of every kind; `vision` and `text` change its towers."""

    def make(kind: str = "CLIP", *, vision: Any = None, text: Any = None, **config: Any) -> Any:
        torch.manual_seed(0)
        length = {"context_length": models.CONTEXT_LENGTH, "vocab_size": 64}
        clip = getattr(open_clip, kind)(
            embed_dim=24,
            vision_cfg={
                "image_size": 32,
                "layers": 2,
                "width": 32,
                "head_width": 16,
                "patch_size": 8,
                **(vision or {}),
            },
            text_cfg={**length, "width": 32, "heads": 2, "layers": 2, **(text or {})},
            **config,
        ).eval()
        _stir(clip)
        return clip

    return make


@pytest.fixture(scope="session")
def assert_same_features() -> Callable[..., None]:
    """Features of random images and of texts that end at different places, relative to the largest."""

    def check(one: Any, other: Any, *, size: int = 32, rtol: float = 1e-5) -> None:
        vocab_size = next(model.vocab_size for model in (one, other) if hasattr(model, "vocab_size"))
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
        tokens = torch.randint(
            0, vocab_size - 1, (4, models.CONTEXT_LENGTH), generator=torch.Generator().manual_seed(2)
        )
        tokens[range(4), [2, 5, 8, models.CONTEXT_LENGTH - 1]] = vocab_size - 1
        for got, expected in zip(_features(one, images, tokens), _features(other, images, tokens), strict=True):
            assert (got - expected).abs().max() <= rtol * expected.abs().max()
        assert torch.equal(one.logit_scale.reshape(()), other.logit_scale.reshape(()))

    return check


def _stir(model: nn.Module) -> None:
    """Moves every parameter away from its start, so that none is left out of a comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@torch.no_grad()
def _features(clip: Any, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of open_clip's or transformers' model, not normalised."""
    if isinstance(clip, CLIPModel):
        image = clip.visual_projection(clip.vision_model(images).pooler_output)
        return image, clip.text_projection(clip.text_model(tokens).pooler_output)
    return clip.encode_image(images), clip.encode_text(tokens)
