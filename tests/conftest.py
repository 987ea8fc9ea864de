"""Small models of the genuine classes, with random weights."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before PyTorch is imported: where programs share the cores, threads that spin keep the core from those they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton and the ops are imported, which read it once

from fastsds.toyworld import models


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Hides a GPU from what is not marked `gpu`: trainers and commands take it unasked, and tests hold CPU tensors."""
    if item.get_closest_marker("gpu") or not torch.cuda.is_available():
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that it starts
        return (yield)


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
    """A tiny open_clip model of either class (32 x 32 images, 32 dimensions)."""
    import open_clip

    text = {"context_length": models.CONTEXT_LENGTH, "vocab_size": len(clip_tokenizer.tokenizer)}
    return getattr(open_clip, request.param)(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={**text, "width": 32, "heads": 2, "layers": 2},
    ).eval()


class Placements(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers: on a GPU, copies that its host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::lift_fresh"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def placements() -> type[Placements]:
    return Placements


class PhiloxOracle:
    """The noise contract written a second time, in NumPy's unsigned integers and float64 Box-Muller."""

    @staticmethod
    def rounds(counter: Any, key: Any) -> np.ndarray:
        """Philox4x32-10 of counters `[n, 4]` under a key of two words: uint32 `[n, 4]`."""
        counter = np.asarray(counter, dtype=np.uint64).reshape(-1, 4).copy()
        k0, k1 = (int(word) for word in key)
        for _ in range(10):
            first = counter[:, 0] * np.uint64(0xD2511F53)
            second = counter[:, 2] * np.uint64(0xCD9E8D57)
            mixed0 = (second >> np.uint64(32)) ^ counter[:, 1] ^ np.uint64(k0)
            mixed2 = (first >> np.uint64(32)) ^ counter[:, 3] ^ np.uint64(k1)
            low = np.uint64(0xFFFFFFFF)
            counter = np.stack([mixed0, second & low, mixed2, first & low], axis=1)
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return counter.astype(np.uint32)

    @classmethod
    def words(cls, seed: int, count: int, *, start: int = 0, stream: int = 0) -> np.ndarray:
        """The words of the elements `start`, `start + 1`, …: lane n % 4 of counter n // 4."""
        blocks = range(start // 4, (start + count + 3) // 4)
        counters = [[block % 2**32, block // 2**32, 0, stream] for block in blocks]
        key = seed % 2**64
        lanes = cls.rounds(counters, (key % 2**32, key // 2**32)).reshape(-1)
        return lanes[start % 4 : start % 4 + count]

    @classmethod
    def noise(cls, seed: int, shape: tuple[int, ...], *, start: int = 0, dtype: Any = np.float64) -> torch.Tensor:
        """The normals of those elements; uniforms are float32 by contract, the rest is computed in `dtype`."""
        count = math.prod(shape)
        first = start - start % 4
        words = cls.words(seed, -(-(start + count - first) // 4) * 4, start=first)
        uniform = (words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(dtype)
        radius = np.sqrt(dtype(-2) * np.log(uniform[0::2]))
        angle = dtype(2 * np.pi) * uniform[1::2]
        normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        normals = normals[start - first : start - first + count].reshape(shape)
        return torch.from_numpy(normals).to(torch.get_default_device())


@pytest.fixture(scope="session")
def oracle() -> type[PhiloxOracle]:
    return PhiloxOracle
