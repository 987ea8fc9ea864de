"""Scenes say what they show."""

from __future__ import annotations

import random

import pytest
import torch

from fastsds.toyworld.scenes import (
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    Scene,
    Thing,
    random_pair,
    random_single,
    render,
    training_caption,
)

RED_CIRCLE, BLUE_SQUARE = Thing("circle", "red"), Thing("square", "blue")


def centre_of(image: torch.Tensor, colour: str) -> tuple[float, float]:
    """Mean (x, y) of the pixels whose hue is the colour's."""
    target = torch.tensor(COLOURS[colour])
    bright = image.amax(dim=0) > 0.4
    similarity = torch.nn.functional.cosine_similarity(image, target.view(3, 1, 1), dim=0)
    y, x = torch.nonzero(bright & (similarity > 0.97), as_tuple=True)
    assert len(x) > 10, f"no {colour} pixels"
    return x.double().mean().item(), y.double().mean().item()


def test_captions_say_the_relation_or_leave_it_out() -> None:
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "left of")
    assert scene.caption == "a red circle left of a blue square"
    assert scene.unstated_caption == "a red circle and a blue square"
    assert scene.swap_relation().caption == "a blue square left of a red circle"
    assert scene.swap_attributes().caption == "a blue circle left of a red square"


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_picture_shows_the_stated_relation(relation: str) -> None:
    scenes = [Scene((RED_CIRCLE, BLUE_SQUARE), relation)] * 50
    for image in render(scenes, seed=3):
        (first_x, first_y), (second_x, second_y) = centre_of(image, "red"), centre_of(image, "blue")
        across, down = first_x - second_x, first_y - second_y
        along = {"left of": -across, "right of": across, "above": -down, "below": down}[relation]
        other = abs(down) if relation in ("left of", "right of") else abs(across)
        assert along > 9 > 5 > other


def test_sizes_are_visible() -> None:
    small, large = (render([Scene((Thing("circle", "red", size),))] * 20, seed=0) for size in ("small", "large"))
    covered = [(images[:, 0] > 0.5).sum(dim=(1, 2)).float() for images in (small, large)]
    assert covered[0].max() * 1.5 < covered[1].min()


def test_rendering_replays_and_stays_in_range() -> None:
    rng = random.Random(0)
    scenes = [random_pair(rng) for _ in range(20)] + [random_single(rng) for _ in range(20)]
    images = render(scenes, seed=5)
    assert images.shape == (40, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, render(scenes, seed=5))
    assert not torch.equal(images, render(scenes, seed=6))


def test_random_pairs_differ_in_shape_and_colour() -> None:
    rng = random.Random(1)
    for _ in range(200):
        first, second = random_pair(rng).things
        assert first.shape != second.shape
        assert first.colour != second.colour


def test_training_captions_state_the_share_asked_for() -> None:
    rng = random.Random(2)
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "above")
    stated = sum(training_caption(scene, rng, 0.4) == scene.caption for _ in range(2000))
    assert 0.36 < stated / 2000 < 0.44
    assert training_caption(scene, rng) == scene.caption


@pytest.mark.parametrize(
    ("things", "relation"), [((), None), ((RED_CIRCLE,), "above"), ((RED_CIRCLE, BLUE_SQUARE), "beside")]
)
def test_impossible_scenes_are_refused(things: tuple[Thing, ...], relation: str | None) -> None:
    with pytest.raises(ValueError, match="a scene is one thing without a relation"):
        Scene(things, relation)
