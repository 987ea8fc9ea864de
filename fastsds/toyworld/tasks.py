"""What is trained on and measured in the toy world: caption data, composition pairs, single things to classify."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fastsds.toyworld.scenes import COLOURS, SHAPES, Scene, Thing, random_pair, random_single, render, training_caption

Swap = Literal["relation", "attribute"]
Split = Literal["train", "validation", "test"]
# Binding all 36 things takes longer than a demo has: pairs are made of these 12, the others are met alone.
PAIR_SHAPES, PAIR_COLOURS = SHAPES[:3], tuple(COLOURS)[:4]
SINGLE_SHARE = 0.6  # of the scenes to distil on
_SPLIT_SEEDS = {"train": 10_000, "validation": 20_000, "test": 30_000}


@dataclass(frozen=True)
class CompositionPairs:
    """Winoground-style examples: two scenes whose captions hold the same words."""

    swap: Swap
    scenes: list[tuple[Scene, Scene]]
    images: Float[Tensor, "examples 2 3 height width"]  # in [0, 1]

    @property
    def captions(self) -> list[tuple[str, str]]:
        return [(first.caption, second.caption) for first, second in self.scenes]


@dataclass(frozen=True)
class SingleThings:
    """Images of one thing each, with the thing's class and the attribute words that hold of it."""

    images: Float[Tensor, "images 3 height width"]  # in [0, 1]
    labels: Int[Tensor, "images"]
    classnames: tuple[str, ...]
    attributes: tuple[str, ...]


def composition_pairs(swap: Swap, count: int, split: Split = "test") -> CompositionPairs:
    """Examples whose captions exchange the noun phrases (`relation`) or the colours (`attribute`)."""
    rng = random.Random(f"{swap} {_SPLIT_SEEDS[split]}")
    firsts = [random_pair(rng, PAIR_SHAPES, PAIR_COLOURS) for _ in range(count)]
    scenes = [(scene, scene.swap_relation() if swap == "relation" else scene.swap_attributes()) for scene in firsts]
    images = render([scene for pair in scenes for scene in pair], seed=rng.getrandbits(32))
    return CompositionPairs(swap, scenes, images.unflatten(0, (count, 2)))


def single_things(count: int, split: Split = "test") -> SingleThings:
    """One thing per image; its class is colour and shape, its attribute the size word."""
    rng = random.Random(f"single {_SPLIT_SEEDS[split]}")
    scenes = [random_single(rng) for _ in range(count)]
    names = tuple(Thing(shape, colour).phrase for colour in COLOURS for shape in SHAPES)
    things = [scene.things[0] for scene in scenes]
    labels = torch.tensor([names.index(Thing(thing.shape, thing.colour).phrase) for thing in things])
    images = render(scenes, seed=rng.getrandbits(32))
    return SingleThings(images, labels, names, tuple(thing.size or "" for thing in things))


@dataclass(frozen=True)
class TrainingScenes:
    """Scenes to distil on: an image, the caption it comes with, and two candidate captions in random order.

    Scenes of two things have as candidates the true caption and the one with the noun phrases exchanged; `labels` says
    which is true (0 for single things), and only tests read it. Single things have no candidates.
    """

    images: Float[Tensor, "scenes 3 height width"]  # in [0, 1]
    captions: list[str]
    candidates: list[list[str] | None]
    labels: Int[Tensor, "scenes"]


def training_scenes(count: int, seed: int = 0, *, relation_stated: bool = True) -> TrainingScenes:
    """Scenes of two things, whose captions state the relation or only name the things, and of single ones."""
    rng = random.Random(f"train {_SPLIT_SEEDS['train'] + seed}")
    scenes = [
        random_single(rng) if rng.random() < SINGLE_SHARE else random_pair(rng, PAIR_SHAPES, PAIR_COLOURS)
        for _ in range(count)
    ]
    images = render(scenes, seed=rng.getrandbits(32))
    captions: list[str] = []
    candidates: list[list[str] | None] = []
    labels: list[int] = []
    for scene in scenes:
        if scene.relation is None:
            captions.append(training_caption(scene, rng))
            candidates.append(None)
            labels.append(0)
            continue
        other = scene.swap_relation()
        row = [scene.caption, other.caption]
        rng.shuffle(row)
        candidates.append(row)
        labels.append(row.index(scene.caption))
        # Unstated captions name the things in random order, so that the mention tells nothing either.
        named = rng.choice((scene, other))
        captions.append(scene.caption if relation_stated else named.unstated_caption)
    return TrainingScenes(images, captions, candidates, torch.tensor(labels))


def preprocess_all(
    preprocess: Callable[[Any], Tensor], images: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images 3 height width"]:
    """A CLIP model's own preprocessing of images in [0, 1], through 8-bit pictures as from a file."""
    return torch.stack([preprocess(to_pil_image(image)) for image in images])
