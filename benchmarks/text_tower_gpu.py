"""`python -m benchmarks.text_tower_gpu`: the text side of prompt tuning at ImageNet's size, on a GPU, in bfloat16.

A step is forward and backward to context and attribute, ViT-B/16's text tower, random weights. The loop is CoCoOp's:
image by image, all 77 tokens of every prompt through the tower's own modules; so is the loop under `torch.compile`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report, text_tower, timing

CLASSES, BATCH = 1000, 32
LOOP_IMAGES = 4
"""The loop's time grows with its images alone: it runs these and is counted per image."""
MOST_ERROR = 0.05
"""Relative to the largest: bfloat16 keeps eight bits, and twelve layers add up their roundings."""


def measure(
    device: torch.device, classes: int = CLASSES, batch: int = BATCH, rounds: int = 3, *, clip: Any = None
) -> dict[str, Any]:
    """Milliseconds per image and peak memory of a step, ours and the loop's, after a gate on values and gradients."""
    clip = (text_tower.make_tower() if clip is None else clip).to(device, torch.bfloat16)
    packed, dense = (text_tower.make_encoder(clip, classes, dense=each) for each in (False, True))
    torch._dynamo.reset()
    compiled = torch.compile(dense, dynamic=False)
    few, leaves = min(LOOP_IMAGES, batch), _learned(batch, packed.width, device)
    first = [leaf[:few].detach().requires_grad_() for leaf in leaves]
    error = _largest_error(text_tower.step(packed, first), text_tower.loop(dense, first))
    if not error <= MOST_ERROR:
        raise AssertionError(f"expected results equal to {MOST_ERROR}, got a relative error of {error:.3f}")
    sides: dict[str, tuple[Callable[[], Any], int]] = {
        "fastsds": (partial(text_tower.step, packed, leaves), batch),
        "loop": (partial(text_tower.loop, dense, first), few),
        "loop, torch.compile": (partial(text_tower.loop, compiled, first), few),
    }
    counts = {name: images for name, (_, images) in sides.items()}
    measured = timing.interleaved({name: side for name, (side, _) in sides.items()}, rounds, device)
    return {
        "classes": classes, "batch": batch, "dtype": "bfloat16", "rounds": rounds, "relative_error": error,
        "sides": _per_image(measured, counts),
    }  # fmt: skip


def _learned(images: int, width: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((images, text_tower.CONTEXT, width), (images, width))
    return [(torch.randn(shape) * 0.02).to(device, torch.bfloat16).requires_grad_() for shape in shapes]


def _largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(results, expected, strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


def _per_image(measured: dict[str, dict[str, Any]], images: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step for an image, and how many times as long as ours a side takes."""
    for name, figures in measured.items():
        if "median_s" in figures:
            figures["ms_per_image"] = 1000 * figures.pop("median_s") / images[name]
    ours = measured[timing.OURS]
    for name, figures in measured.items():
        if name != timing.OURS and {"ms_per_image"} <= ours.keys() & figures.keys():
            figures["over_fastsds"] = figures["ms_per_image"] / ours["ms_per_image"]
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_tower_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    report.write_figures(measure(torch.device("cuda")), options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
