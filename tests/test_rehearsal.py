"""A dress rehearsal at real size: every shape, dtype and file of ViT-B/32 under Stable Diffusion 1.5, random weights.

Real folders are written and loaded, and the commands run as a user runs them: two steps of distillation with a kill
between them, resumption, export, evaluation. Time and peak memory of each are printed (`pytest -s`).
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastsds
from fastsds.toyworld.files import write_captions, write_winoground
from fastsds.training.metrics import read_metrics

SD15_UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
SD15_VAE: dict[str, Any] = {
    "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
SD15_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
}  # fmt: skip
LAYERNORM_NUMBERS = 65_536
IMAGES, BATCH, LIMIT_SECONDS = 4, 4, 1500

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models and data on disk: `sd15`, `vit-b-32.safetensors`, `coco`, `winoground`."""
    folder = tmp_path_factory.mktemp("rehearsal")
    write_stable_diffusion(folder / "sd15")
    torch.manual_seed(1)
    clip = open_clip.create_model("ViT-B-32")
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "vit-b-32.safetensors"
    )
    write_captions(folder / "coco", IMAGES)
    for path in (folder / "coco" / "train").iterdir():
        Image.open(path).resize((640, 480)).save(path)
    write_winoground(folder / "winoground", 4)
    yield folder
    shutil.rmtree(folder)  # gigabytes


def write_stable_diffusion(folder: Path) -> None:
    """A pipeline folder of 1.5's own configuration and tokenizer, in bfloat16."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = folder.with_name("tokenizer")
    write_clip_vocabulary(tokenizer)
    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel(**SD15_UNET),
        "vae": AutoencoderKL(**SD15_VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15_TEXT)),
    }
    StableDiffusionPipeline(
        **{name: part.to(torch.bfloat16) for name, part in parts.items()},
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer), scheduler=DDIMScheduler(**SD15_SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_clip_vocabulary(folder: Path) -> None:
    """CLIP's own tokenizer as transformers keeps it, from the merges that open_clip ships."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        }),
        encoding="utf-8",
    )  # fmt: skip


@pytest.fixture
def fastsds_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def run(*words: object, until: Path | None = None) -> None:
        """Runs a command to its end, or kills it as soon as a file or folder is there."""
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "fastsds", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if until is not None:
            while process.poll() is None and not until.exists():
                assert time.monotonic() - started < LIMIT_SECONDS
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        expected = 0 if until is None else -signal.SIGKILL
        assert process.returncode == expected, output
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        with capfd.disabled():
            print(f"\n{words[0]}: {time.monotonic() - started:.0f} s, peak memory so far {peak:.1f} GiB")

    return run


def test_distill_kill_resume_export_evaluate(world: Path, tmp_path: Path, fastsds_command: Callable[..., None]) -> None:
    run = tmp_path / "run"
    distill: list[object] = [
        "distill", "--clip.name", "ViT-B-32", "--clip.pretrained", world / "vit-b-32.safetensors",
        "--teacher.source", world / "sd15", "--teacher.dtype", "bfloat16", "--teacher.cache", tmp_path / "cache",
        "--captions.path", world / "coco" / "annotations" / "captions_train.json",
        "--captions.images", world / "coco" / "train",
        "--batch-size", BATCH, "--sds.teacher-batch", 1, "--sds.projector-images", IMAGES, "--workers", 1,
        "--train.out", run, "--train.steps", 2, "--train.save-every", 1, "--train.log-every", 1,
    ]  # fmt: skip
    fastsds_command(*distill, until=run / "checkpoints" / "step-00000001")
    fastsds_command(*distill, "--resume")
    steps = read_metrics(run / "metrics.jsonl", "train")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["sds"] > 0 and step["contrastive"] > 0 for step in steps)
    last = load_file(run / "checkpoints" / "step-00000002" / "trained.safetensors")
    assert last["projector.linear.weight"].shape == (4 * 64 * 64, 512)
    assert sum(tensor.numel() for name, tensor in last.items() if name.startswith("clip.")) == LAYERNORM_NUMBERS

    exported, patch = tmp_path / "exported", tmp_path / "layernorm.safetensors"
    fastsds_command("export", "--run", run, "--format", "open-clip", "--out", exported)
    fastsds_command("export", "--run", run, "--format", "tuned", "--out", patch)
    with safe_open(patch, "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == LAYERNORM_NUMBERS  # noqa: SIM118
    fastsds_command(
        "evaluate", "winoground", "--checkpoint", run, "--data", world / "winoground", "--out", tmp_path / "results"
    )
    results = json.loads((tmp_path / "results" / "outcomes.json").read_text(encoding="utf-8"))
    assert results["benchmark"] == "winoground"

    name = f"local-dir:{exported}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    image = Image.open(next((world / "coco" / "train").iterdir()))
    expected = features(model, preprocess, open_clip.get_tokenizer(name), image)
    for ours, plain in zip(features(*fastsds.load_distilled(patch), image), expected, strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


@torch.no_grad()
def features(model: Any, preprocess: Any, tokenizer: Any, image: Image.Image) -> list[torch.Tensor]:
    tokens = tokenizer(["a red circle left of a blue square"])
    return [model.encode_image(preprocess(image)[None]), model.encode_text(tokens)]
