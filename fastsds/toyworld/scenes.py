"""Procedural scenes: one or two coloured shapes, their pictures and their captions.

A scene is drawn from a handful of words, so that every caption's truth is known. Scenes of two things carry a
relation; exchanging the noun phrases of their caption keeps every word and changes the meaning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

IMAGE_SIZE = 32  # pixels
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "cyan": (0.10, 0.85, 0.90),
}
SIZES = {"small": (4.0, 5.5), "large": (9.0, 12.0)}  # radius in pixels, of a thing that stands alone
PAIR_RADIUS = (5.0, 6.5)  # radius in pixels, of each of two things
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of the first thing
SINGLE_TEMPLATES = ("{}", "a photo of {}", "a picture of {}")


@dataclass(frozen=True)
class Thing:
    """A shape with its colour; `size` is said only of a thing that stands alone."""

    shape: str
    colour: str
    size: str | None = None

    @property
    def phrase(self) -> str:
        words = (self.size, self.colour, self.shape)
        return "a " + " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """One thing, or two with the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2) or (len(self.things) == 2) != (self.relation in RELATIONS):
            raise ValueError(
                f"a scene is one thing without a relation, or two with one of {tuple(RELATIONS)}; "
                f"got {len(self.things)} things and relation={self.relation!r}"
            )

    @property
    def caption(self) -> str:
        """The true caption: `a red circle left of a blue square`."""
        phrases = [thing.phrase for thing in self.things]
        return f" {self.relation} ".join(phrases)

    @property
    def unstated_caption(self) -> str:
        """The things without their relation: `a red circle and a blue square`."""
        return " and ".join(thing.phrase for thing in self.things)

    def swap_relation(self) -> Scene:
        """The scene whose caption has the noun phrases exchanged."""
        first, second = self.things
        return Scene((second, first), self.relation)

    def swap_attributes(self) -> Scene:
        """The scene whose caption has the colours exchanged."""
        first, second = self.things
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        return Scene(swapped, self.relation)


def random_single(rng: random.Random) -> Scene:
    """One thing of any shape and colour, small or large."""
    return Scene((Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))),))


def random_pair(rng: random.Random, shapes: Sequence[str] = SHAPES, colours: Sequence[str] = tuple(COLOURS)) -> Scene:
    """Two things that differ in shape and in colour, in one of the four relations."""
    chosen = zip(rng.sample(shapes, 2), rng.sample(colours, 2), strict=True)
    first, second = (Thing(shape, colour) for shape, colour in chosen)
    return Scene((first, second), rng.choice(tuple(RELATIONS)))


def training_caption(scene: Scene, rng: random.Random, stated_share: float = 1.0) -> str:
    """The caption of a training image; words for size and a photo template come and go for single things.

    `stated_share` of the captions of two things state their relation.
    """
    if scene.relation:
        return scene.caption if stated_share >= 1 or rng.random() < stated_share else scene.unstated_caption
    (thing,) = scene.things
    if rng.random() < 0.5:
        thing = replace(thing, size=None)
    return rng.choice(SINGLE_TEMPLATES).format(thing.phrase)


def render(scenes: Sequence[Scene], seed: int) -> Float[Tensor, "scenes 3 height width"]:
    """Draws the scenes, in [0, 1], float32; `seed` decides places, sizes and shades within what the words allow."""
    rng = random.Random(seed)
    count = len(scenes)
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    background = torch.tensor([rng.uniform(0.0, 0.15) for _ in range(count)]).view(-1, 1, 1, 1)
    images = background.expand(count, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    placements = [_place(scene, rng) for scene in scenes]
    for position in range(2):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > position]
        if not rows:
            continue
        centre_x, centre_y, radius = (
            torch.tensor([placements[row][position] for row in rows]).T.unsqueeze(-1).unsqueeze(-1)
        )
        shade = torch.tensor([rng.uniform(0.8, 1.0) for _ in rows]).view(-1, 1)
        things = [scenes[row].things[position] for row in rows]
        colour = (torch.tensor([COLOURS[thing.colour] for thing in things]) * shade).view(-1, 3, 1, 1)
        distance = torch.stack(
            [
                d((x - cx) / r, (y - cy) / r) * r
                for d, cx, cy, r in zip(
                    (_DISTANCES[thing.shape] for thing in things), centre_x, centre_y, radius, strict=True
                )
            ]
        )
        coverage = (0.5 - distance).clamp(0, 1).unsqueeze(1)  # one pixel of anti-aliasing
        images[rows] = images[rows] * (1 - coverage) + colour * coverage
    return images


def _place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and radius, in pixels, of every thing of the scene."""
    middle = IMAGE_SIZE / 2
    if scene.relation is None:
        low, high = SIZES[scene.things[0].size or rng.choice(tuple(SIZES))]
        radius = rng.uniform(low, high)
        room = middle - radius - 1
        return [(middle + rng.uniform(-room, room), middle + rng.uniform(-room, room), radius)]
    direction_x, _ = RELATIONS[scene.relation]
    sign = sum(RELATIONS[scene.relation])
    across = rng.uniform(-6, 6)  # shared, so that only the stated relation holds
    placed = []
    for side in (sign, -sign):
        along, off = side * rng.uniform(6.5, 8.5), across + rng.uniform(-1.5, 1.5)
        offset = (along, off) if direction_x else (off, along)
        placed.append((middle + offset[0], middle + offset[1], rng.uniform(*PAIR_RADIUS)))
    return placed


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


# Signed distance to the outline of each shape, in radii; negative inside.
_DISTANCES = {
    "circle": lambda x, y: (x.square() + y.square()).sqrt() - 0.95,
    "square": lambda x, y: _box(x, y, 0.82, 0.82),
    "triangle": lambda x, y: torch.maximum(y - 0.75, (x.abs() * 0.87 + (-y) * 0.5) - 0.5),
    "cross": lambda x, y: torch.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0)),
    "ring": lambda x, y: ((x.square() + y.square()).sqrt() - 0.72).abs() - 0.26,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.1) * 0.71,
}
