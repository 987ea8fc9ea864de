"""The toy few-shot task: what is in its pictures, and how its domains differ."""

from __future__ import annotations

import statistics

import torch
from torchvision.transforms.functional import to_tensor

from fastsds.toyworld.fewshot import ATTRIBUTES, SHIFTED, SOURCE, Domain, fade, few_shot_task
from fastsds.toyworld.scenes import COLOURS, SHAPES, Scene, Thing, render


def test_every_class_has_its_pictures_and_every_picture_its_attribute() -> None:
    task = few_shot_task(3, 2, 4)
    assert task.classnames == SHAPES
    for part, count in (("train", 3), ("val", 2), ("test", 4)):
        items = getattr(task, part)
        assert [item.label for item in items] == [label for label in range(6) for _ in range(count)]
        assert {item.attribute for item in items} <= set(ATTRIBUTES)
    assert len({item.key for item in (*task.train, *task.val, *task.test)}) == 9 * 6
    assert few_shot_task(3, 2, 4).train[5].image.tobytes() == task.train[5].image.tobytes()


def test_attributes_are_true_of_the_pictures() -> None:
    items = few_shot_task(1, 1, 30, domain=Domain(contrast=1.0, grey=0.0, noise=0.0)).test
    shares = {"small": [], "large": []}
    for item in items:
        size, colour = item.attribute.split()
        image = to_tensor(item.image)
        thing = (image - image[:, :1, :1]).abs().sum(0) > 0.3
        shares[size].append(thing.float().mean().item())
        seen = image[:, thing].median(dim=1).values
        nearest = min(COLOURS, key=lambda name: (seen / seen.norm() - _direction(name)).norm().item())
        assert nearest == colour
    assert max(shares["small"]) < statistics.fmean(shares["large"])


def _direction(colour: str) -> torch.Tensor:
    value = torch.tensor(COLOURS[colour])
    return value / value.norm()


def test_fading_scales_shifts_and_adds_noise() -> None:
    images = render([Scene((Thing("circle", "red", "large"),))] * 200, seed=1)
    faded = fade(images, Domain(contrast=0.5, grey=0.3, noise=0.05), seed=2)
    difference = faded - (0.5 * images + 0.3)
    assert abs(difference.mean().item()) < 1e-3
    assert abs(difference.std().item() - 0.05) < 1e-3
    assert torch.equal(fade(images, SHIFTED, seed=2), fade(images, SHIFTED, seed=2))
    assert faded.min() >= 0
    assert faded.max() <= 1


def test_the_shifted_domain_tilts_and_is_else_the_source() -> None:
    assert Domain(SOURCE.contrast, SOURCE.grey, SOURCE.noise, tilt=25.0) == SHIFTED
    scene = [Scene((Thing("square", "red", "large"),))] * 40
    still, turned = (
        fade(render(scene, seed=1), Domain(contrast=1.0, grey=0.0, noise=0.0, tilt=tilt), seed=3)
        for tilt in (0.0, 25.0)
    )
    # A turned square covers columns that an upright one leaves empty, and as many pixels.
    columns = [((images[:, 0] > 0.4).any(dim=1)).sum().item() for images in (still, turned)]
    pixels = [(images[:, 0] > 0.4).sum().item() for images in (still, turned)]
    assert columns[1] > 1.1 * columns[0]
    assert abs(pixels[1] / pixels[0] - 1) < 0.1
