"""A step of distillation with a U-Net of Stable Diffusion 2.1's size and random weights, on a GPU.

`python -m benchmarks.unet step` times it against diffusers and eager PyTorch; `python -m benchmarks.unet memory`
measures the memory of a large contrastive batch. Both print their figures as JSON and write them to `--figures`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, report, timing
from fastsds import DiffusionTeacher, SDSDistiller, SDSLoss
from fastsds.ops.sds_loss import Jacobian

SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD21_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
}  # fmt: skip
EAGER = "diffusers and eager PyTorch"
TOKENS = 77
STEP_BATCH, NEEDED_SPEED, MOST_OUTSIDE = 32, 1.5, 0.01
CONTRASTIVE_BATCH, TEACHER_BATCH, MOST_GIB = 256, 8, 24.0


def make_unet(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config)
    return unet.to(device, dtype).requires_grad_(False).eval()


def make_scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**SD21_SCHEDULER)


def eager_step(unet: Any, scheduler: Any, latents: Tensor, text: Tensor, jacobian: Jacobian) -> Tensor:
    """The step by diffusers and eager PyTorch: v-prediction, `w(t) = sigma_t²`; gives the latents' gradient."""
    dtype = next(unet.parameters()).dtype
    alphas_cumprod = scheduler.alphas_cumprod.to(latents.device)
    t = torch.randint(0, len(alphas_cumprod), (len(latents),), device=latents.device)
    with torch.set_grad_enabled(jacobian == "full"):
        noise = torch.randn_like(latents)
        noised = scheduler.add_noise(latents, noise, t)
        output = unet(noised.to(dtype), t, encoder_hidden_states=text).sample.float()
        alpha_t, sigma_t = ((value[t] ** 0.5).view(-1, 1, 1, 1) for value in (alphas_cumprod, 1 - alphas_cumprod))
        prediction = alpha_t * output + sigma_t * noised
    if jacobian == "full":
        loss = baselines.full_loss(prediction, noise, t.unsqueeze(1), alphas_cumprod)
    else:
        loss = baselines.skip_loss(latents, prediction, noise, t.unsqueeze(1), alphas_cumprod)
    return torch.autograd.grad(loss, latents)[0]


def unet_alone(unet: Any, noised: Tensor, t: Tensor, text: Tensor, jacobian: Jacobian, piece: int) -> None:
    """The part of a step that no loss can spare: the U-Net forward and, under `full`, its backward to the input."""
    for start in range(0, len(noised), piece):
        rows = slice(start, start + piece)
        latents = noised[rows].detach().requires_grad_(jacobian == "full")
        with torch.set_grad_enabled(jacobian == "full"):
            output = unet(latents, t[rows], encoder_hidden_states=text[rows]).sample
        if jacobian == "full":
            torch.autograd.grad(output, latents, torch.ones_like(output))


def measure_step(
    device: torch.device, config: dict[str, Any] = SD21_UNET, batch: int = STEP_BATCH, rounds: int = 3
) -> dict[str, Any]:
    """Seconds and peak memory of a step by each side, interleaved, and the share of ours outside the U-Net.

    Ours runs with the whole batch in one U-Net call, as the other side does, and with `TEACHER_BATCH` latents at a
    time. A side that does not fit into memory says so in place of its figures.
    """
    dtype, size = torch.bfloat16, config["sample_size"]
    scheduler = make_scheduler()
    plain = make_unet(config, device, dtype)
    text = torch.randn(batch, TOKENS, config["cross_attention_dim"], device=device, dtype=dtype)
    latents = torch.randn(batch, 4, size, size, device=device, requires_grad=True)
    teacher = DiffusionTeacher(make_unet(config, device, dtype), None, None, None, scheduler)
    teacher.to(memory_format=torch.channels_last)
    noised = latents.detach().to(dtype, memory_format=torch.channels_last)
    t = torch.randint(0, len(teacher.schedule), (batch,), device=device)
    figures: dict[str, Any] = {
        "batch": batch, "dtype": str(dtype), "rounds": rounds,
        "needed_speed": NEEDED_SPEED, "most_outside_unet": MOST_OUTSIDE,
    }  # fmt: skip
    for jacobian in ("skip", "full"):
        sides: dict[str, Callable[[], Any]] = {
            EAGER: lambda: eager_step(plain, scheduler, latents, text, jacobian),
        }
        for name, piece in (("whole", batch), (f"{TEACHER_BATCH} at a time", TEACHER_BATCH)):
            loss = SDSLoss(teacher, weighting="sds", jacobian=jacobian, teacher_batch=piece)
            sides[f"fastsds, {name}"] = lambda loss=loss: torch.autograd.grad(loss(latents, text), latents)
            sides[f"U-Net alone, {name}"] = lambda piece=piece: unet_alone(
                teacher.unet, noised, t, text, jacobian, piece
            )
        figures[f"jacobian {jacobian}"] = _with_ratios(timing.interleaved(sides, rounds, device))
    return figures


def measure_memory(
    device: torch.device, config: dict[str, Any] = SD21_UNET, batch: int = CONTRASTIVE_BATCH, clip: str = "ViT-B-32"
) -> dict[str, Any]:
    """Peak memory of a training step, backward included, of CLIP and the U-Net."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(clip).to(device)
    teacher = DiffusionTeacher(make_unet(config, device, torch.bfloat16), None, None, None, make_scheduler())
    teacher.to(memory_format=torch.channels_last)
    distiller = SDSDistiller(model, teacher, teacher_batch=TEACHER_BATCH)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images = torch.randn(batch, 3, height, width, device=device)
    tokens = torch.arange(model.context_length, device=device).repeat(batch, 1)
    text = torch.randn(batch, TOKENS, config["cross_attention_dim"], device=device, dtype=torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(device.type, torch.bfloat16):
        output = distiller(images, tokens, text)
    output.loss.backward()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "clip": clip, "batch": batch, "teacher_batch": TEACHER_BATCH, "loss": output.loss.item(),
        "peak_gib": peak, "most_gib": MOST_GIB, "met": peak < MOST_GIB,
    }  # fmt: skip


def _with_ratios(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times as fast as the other side ours is, and its share outside the U-Net."""
    for name, figures in measured.items():
        if not name.startswith("fastsds") or "median_s" not in figures:
            continue
        for key, other in (("speed", EAGER), ("share_outside_unet", name.replace("fastsds", "U-Net alone"))):
            if "median_s" in measured[other]:
                ratio = measured[other]["median_s"] / figures["median_s"]
                figures[key] = ratio if key == "speed" else 1 - ratio
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unet", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "memory"))
    parser.add_argument("--figures", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    measure = {"step": measure_step, "memory": measure_memory}[options.what]
    report.write_figures(measure(torch.device("cuda")), options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
