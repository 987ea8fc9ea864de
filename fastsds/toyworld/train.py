"""The recipe of the shipped weights: `python -m fastsds.toyworld.train --out FOLDER`.

Trains the tiny CLIP, the tiny VAE and the tiny latent-diffusion teacher from nothing, saves them in the formats of
the public ones (an open_clip folder, a diffusers Stable Diffusion folder) and prints how well they do on held-out
scenes. About an hour on two cores; every part can be trained alone (`--parts clip`).
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import save_image

from fastsds.toyworld import load_clip, load_teacher, models
from fastsds.toyworld.experiment import Evaluation, measure_teacher
from fastsds.toyworld.scenes import Scene, random_pair, random_single, render, training_caption

console = Console()
PARTS = ("clip", "vae", "teacher", "report")


@dataclass(frozen=True)
class TrainConfig:
    """Options of the recipe; the defaults made the shipped weights."""

    out: Path = Path("toyworld-weights")
    """Folder that receives `clip/` and `teacher/`."""
    parts: tuple[str, ...] = PARTS
    """What to do; `teacher` needs the VAE, and `report` all the others, of this or an earlier run."""
    clip_steps: int = 4000
    clip_batch: int = 64
    clip_lr: float = 1e-3
    clip_single_share: float = 0.5
    """Share of CLIP's training scenes that show one thing."""
    clip_stated_share: float = 0.4
    """Share of CLIP's captions of two things that state their relation, as few captions of photographs do."""
    vae_steps: int = 1400
    vae_batch: int = 32
    vae_lr: float = 2e-3
    teacher_scenes: int = 30_000
    """Scenes encoded once and seen many times by the teacher."""
    teacher_binding_steps: int = 3200
    """Steps in the noisiest part of the schedule, where the caption alone says what goes where."""
    teacher_full_steps: int = 2000
    """Steps over the whole schedule afterwards, so that the teacher also generates."""
    teacher_batch: int = 64
    teacher_lr: float = 2e-3
    binding_t_min: int = 850
    """First timestep of the noisiest part."""
    report_pairs: int = 300
    """Pairs of each kind that the report measures."""
    seed: int = 0


def scenes(count: int, rng: random.Random, single_share: float) -> list[Scene]:
    """Random scenes, `single_share` of them of one thing."""
    return [random_single(rng) if rng.random() < single_share else random_pair(rng) for _ in range(count)]


def main(config: TrainConfig) -> None:
    unknown = set(config.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"parts: expected any of {', '.join(PARTS)}; got {sorted(unknown)}")
    if "clip" in config.parts:
        train_clip(config, config.out / "clip")
    if "vae" in config.parts:
        train_vae(config, config.out / "teacher")
    if "teacher" in config.parts:
        train_teacher(config, config.out / "teacher")
    if "report" in config.parts:
        report(config)


def train_clip(config: TrainConfig, folder: Path) -> None:
    """Contrastive training on true captions: in-batch negatives almost never need the relation."""
    import open_clip

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    models.write_tokenizer(folder)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=models.CONTEXT_LENGTH)
    model_config = json.loads(json.dumps(models.CLIP_CONFIG))
    model_config["text_cfg"]["vocab_size"] = len(tokenizer.tokenizer)
    model = open_clip.CLIP(**model_config)
    normalise = lambda images: (images - 0.5) / 0.5  # noqa: E731
    loss_function = open_clip.ClipLoss()

    def loss() -> Tensor:
        batch = scenes(config.clip_batch, rng, config.clip_single_share)
        images = normalise(render(batch, rng.getrandbits(32)))
        tokens = tokenizer([training_caption(scene, rng, config.clip_stated_share) for scene in batch])
        return loss_function(*model(images, tokens))

    optimise(model.parameters(), loss, config.clip_steps, config.clip_lr, "CLIP", weight_decay=0.05)
    model_config["text_cfg"]["hf_tokenizer_name"] = "fastsds/toyworld"
    preprocess = {
        "mean": models.CLIP_MEAN,
        "std": models.CLIP_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=2) + "\n", encoding="utf-8"
    )
    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "open_clip_model.safetensors")
    console.print(f"CLIP saved to {folder}: {count_parameters(model):,} parameters")


def train_vae(config: TrainConfig, folder: Path) -> None:
    """A reconstruction loss with a slight pull towards unit Gaussian latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed + 1)
    vae = AutoencoderKL(**models.VAE_CONFIG)

    def loss() -> Tensor:
        images = render(scenes(config.vae_batch, rng, 0.25), rng.getrandbits(32)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        difference = reconstruction - images
        return difference.abs().mean() + difference.square().mean() + 1e-4 * posterior.kl().mean() / images[0].numel()

    optimise(vae.parameters(), loss, config.vae_steps, config.vae_lr, "VAE")
    with torch.no_grad():
        images = render(scenes(2000, rng, 0.25), rng.getrandbits(32)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        vae.register_to_config(scaling_factor=1 / posterior.sample().std().item())
        error = (vae.decode(posterior.mode()).sample - images).square().mean()
    vae.half().save_pretrained(folder / "vae")
    console.print(
        f"VAE saved to {folder / 'vae'}: {count_parameters(vae):,} parameters, reconstruction "
        f"{10 * math.log10(4 / error):.1f} dB, scaling factor {vae.config.scaling_factor:.3f}"
    )


def train_teacher(config: TrainConfig, folder: Path) -> None:
    """First the noisiest timesteps, where the words must be bound to places, then the whole schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed + 2)
    models.write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **models.TEXT_ENCODER_CONFIG))
    unet = UNet2DConditionModel(**models.UNET_CONFIG)
    scheduler = DDIMScheduler(**models.SCHEDULER_CONFIG)
    vae = AutoencoderKL.from_pretrained(folder / "vae")

    training = scenes(config.teacher_scenes, rng, single_share=0.15)
    captions = [training_caption(scene, rng) for scene in training]
    captions = ["" if rng.random() < 0.05 else caption for caption in captions]  # for classifier-free guidance
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = encode(vae, training, rng)

    def loss(t_min: int) -> Tensor:
        rows = torch.randint(len(latents), (config.teacher_batch,))
        t = torch.randint(t_min, scheduler.config.num_train_timesteps, (config.teacher_batch,))
        clean, noise = latents[rows], torch.randn(config.teacher_batch, *latents.shape[1:])
        prediction = unet(
            scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=text_encoder(tokens[rows])[0]
        ).sample
        return F.mse_loss(prediction, scheduler.get_velocity(clean, noise, t))

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimise(parameters, lambda: loss(config.binding_t_min), config.teacher_binding_steps, config.teacher_lr, "binding")

    def full_loss() -> Tensor:
        return loss(config.binding_t_min if rng.random() < 0.5 else 0)

    optimise(parameters, full_loss, config.teacher_full_steps, config.teacher_lr / 2, "whole schedule")

    # The text encoder stays in float32: transformers loads the dtype that it finds, diffusers float32.
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    staging = folder.with_name(folder.name + ".partial")
    pipeline.save_pretrained(staging)
    for path in staging.rglob("config.json"):  # diffusers notes where it loaded the VAE from
        config_json = json.loads(path.read_text(encoding="utf-8"))
        config_json.pop("_name_or_path", None)
        path.write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    staging.rename(folder)
    console.print(
        f"teacher saved to {folder}: U-Net {count_parameters(unet):,}, text encoder {count_parameters(text_encoder):,}"
    )


def report(config: TrainConfig) -> None:
    """Measures the saved models on held-out scenes through the public loaders, and draws samples of the teacher."""
    clip, preprocess, tokenizer = load_clip(config.out / "clip")
    evaluation = Evaluation(preprocess, "validation", config.report_pairs, 1000)
    figures = evaluation.measure(clip, tokenizer)
    console.print("CLIP: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items()))
    teacher = load_teacher(config.out / "teacher")
    figures = measure_teacher(teacher, evaluation)
    console.print("teacher: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items()))
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    console.print(f"weights together: {size / 1e6:.1f} MB")
    captions = [pair[0] for pair in evaluation.pairs["relation"].captions[:16]]
    images = generate(config.out / "teacher", captions, config.seed)
    path = config.out.with_name(config.out.name + "-samples.png")
    save_image(torch.nn.functional.interpolate(images, scale_factor=4), path, nrow=8)
    console.print(f"samples of the teacher in {path}, row by row: {'; '.join(captions)}")


def generate(folder: Path, captions: list[str], seed: int) -> Tensor:
    """Images in [0, 1] that the teacher's pipeline draws for the captions."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        captions, num_inference_steps=50, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    return images.float()


@torch.no_grad()
def encode(vae: Any, training: Sequence[Scene], rng: random.Random) -> Tensor:
    """Scaled VAE latents of the scenes, `[scenes, 4, 8, 8]`."""
    encoded = []
    for start in track(range(0, len(training), 500), "encoding scenes", console=console):
        images = render(training[start : start + 500], rng.getrandbits(32)) * 2 - 1
        encoded.append(vae.encode(images).latent_dist.sample() * vae.config.scaling_factor)
    return torch.cat(encoded)


def optimise(
    parameters: Iterator[nn.Parameter] | list[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    name: str,
    weight_decay: float = 0.0,
) -> None:
    """AdamW, one warm-up of 100 steps, cosine to zero, gradients clipped to norm 1."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warmup = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    running = 0.0
    for step in track(range(1, steps + 1), name, console=console):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += value.item()
        if step % 500 == 0:
            console.print(f"{name} step {step}: loss {running / 500:.4f}")
            running = 0.0


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    import tyro

    main(tyro.cli(TrainConfig))
