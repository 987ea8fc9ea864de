"""A few-shot task in the toy world: shapes to tell apart in faded pictures, colour and size as their attribute.

On its own pictures the toy CLIP makes no mistakes, so these are faded to grey, with noise; the shifted domain tilts
them as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torchvision.transforms.functional as TF
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fastsds.data.fewshot import FewShotSplit, LabelledImage
from fastsds.toyworld.scenes import COLOURS, SHAPES, SIZES, Scene, Thing, render

ATTRIBUTES = tuple(f"{size} {colour}" for size in SIZES for colour in COLOURS)
"""The word that is said of an image: `small red`."""
_SEEDS = {"train": 40_000, "val": 50_000, "test": 60_000}


@dataclass(frozen=True)
class Domain:
    """How a rendered scene becomes a picture."""

    contrast: float
    """Factor of the scene's colours."""
    grey: float
    """What is added to them, in [0, 1]."""
    noise: float
    """Standard deviation of the noise of each pixel and channel."""
    tilt: float = 0.0
    """Degrees that pictures are turned by at most, to either side."""


SOURCE = Domain(contrast=0.6, grey=0.36, noise=0.1)
SHIFTED = Domain(contrast=0.6, grey=0.36, noise=0.1, tilt=25.0)


def few_shot_task(
    train_per_class: int = 40, val_per_class: int = 100, test_per_class: int = 100, *, domain: Domain = SOURCE
) -> FewShotSplit:
    """Pictures of single things in six classes, the shapes; every picture has its attribute."""
    parts = {
        part: _pictures(part, count, domain)
        for part, count in (("train", train_per_class), ("val", val_per_class), ("test", test_per_class))
    }
    return FewShotSplit(**parts)


def fade(
    images: Float[Tensor, "images 3 height width"], domain: Domain, seed: int
) -> Float[Tensor, "images 3 height width"]:
    """Images in [0, 1] as the domain shows them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    if domain.tilt:
        angles = [rng.uniform(-domain.tilt, domain.tilt) for _ in images]
        turned = [
            TF.rotate(image, angle, TF.InterpolationMode.BILINEAR, fill=image[:, 0, 0].tolist())
            for image, angle in zip(images, angles, strict=True)
        ]
        images = torch.stack(turned)
    noise = torch.randn(images.shape, generator=generator)
    return (domain.contrast * images + domain.grey + domain.noise * noise).clamp(0, 1)


def _pictures(part: str, per_class: int, domain: Domain) -> tuple[LabelledImage, ...]:
    rng = random.Random(f"few-shot {_SEEDS[part]}")
    things = [
        Thing(shape, rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))) for shape in SHAPES for _ in range(per_class)
    ]
    images = fade(render([Scene((thing,)) for thing in things], rng.getrandbits(32)), domain, rng.getrandbits(32))
    return tuple(
        LabelledImage(
            to_pil_image(image),
            SHAPES.index(thing.shape),
            thing.shape,
            f"{part}/{index}",
            f"{thing.size} {thing.colour}",
        )
        for index, (image, thing) in enumerate(zip(images, things, strict=True))
    )
