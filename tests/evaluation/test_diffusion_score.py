"""The diffusion model as a judge: on the toy world, whose teacher is right, and on images prepared by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from fastsds import toyworld
from fastsds.data import DataError
from fastsds.diffusion import DiffusionScorer, DiffusionTeacher, TensorCache
from fastsds.diffusion.decisions import Answer
from fastsds.evaluation.diffusion_score import DecisionCost, diffusion_outcomes
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo
from fastsds.toyworld.tasks import composition_pairs

EXAMPLES = 4


@pytest.fixture(scope="module")
def scorer() -> DiffusionScorer:
    return DiffusionScorer(toyworld.load_teacher())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[TwoByTwo]:
    """Winoground-style examples, their images in files larger than the teacher's."""
    folder, task = tmp_path_factory.mktemp("images"), composition_pairs("relation", EXAMPLES)
    examples = []
    for i, (images, captions) in enumerate(zip(task.images, task.captions, strict=True)):
        paths = [folder / f"{i}_{side}.png" for side in (0, 1)]
        for path, image in zip(paths, images, strict=True):
            to_pil_image(image).resize((96, 80), Image.Resampling.BICUBIC).save(path)
        examples.append(TwoByTwo(f"pair {i}", (paths[0], paths[1]), captions, group="left of"))
    return examples


def test_winoground_figures(scorer: DiffusionScorer, pairs: list[TwoByTwo]) -> None:
    """Every other example has its images exchanged, so that all its figures are wrong."""
    examples = [
        TwoByTwo(pair.key, pair.images[:: (1, -1)[i % 2]], pair.captions, pair.group)  # type: ignore[arg-type]
        for i, pair in enumerate(pairs)
    ]
    outcomes, cost, answers = diffusion_outcomes(scorer, examples, "winoground", draws=64)
    assert outcomes.benchmark == "winoground"
    for name in ("text", "image", "group"):
        assert outcomes.figures[name].hits == (1.0, 0.0, 1.0, 0.0)
        assert outcomes.figures[name].groups == ("left of",) * EXAMPLES
    assert outcomes.figures["pair"].hits == (1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    assert [answer.choices for answer in answers] == [(0, 1, 0, 1), (1, 0, 1, 0)] * 2
    assert (cost.decisions, cost.ties, cost.full_grid) == (4 * EXAMPLES, 0, 4 * EXAMPLES * 64)
    assert cost.evaluations == sum(int(answer.evaluations.sum()) for answer in answers) < cost.full_grid / 2


def test_caption_choices(scorer: DiffusionScorer, pairs: list[TwoByTwo]) -> None:
    """Also of unequally many captions, and of an image cut out of another."""
    first, second = pairs[0].load()
    beside = Image.new("RGB", (first.width * 2, first.height))
    beside.paste(first, (0, 0))
    beside.paste(second, (first.width, 0))
    (own, other), (_, third) = pairs[0].captions, pairs[1].captions
    box = (first.width, 0, 2 * first.width, first.height)
    examples = [
        CaptionChoice("a", first, (own, other), 0, group="x"),
        CaptionChoice("b", first, (other, own, third), 0, group="x"),
        CaptionChoice("c", beside, (own, other), 1, group="y", box=box),
    ]
    outcomes, cost, _ = diffusion_outcomes(scorer, examples, "choice", draws=64)
    assert outcomes.figures["accuracy"].hits == (1.0, 0.0, 1.0)
    assert outcomes.figures["accuracy"].macro == 0.75
    assert outcomes.figures["accuracy"].chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert cost.decisions == 3
    assert cost.full_grid == (2 + 3 + 2) * 64


@pytest.mark.parametrize("fit", ["whole", "centre"])
def test_images_of_another_shape(teacher: DiffusionTeacher, fit: Any) -> None:
    """What stands at the edge of a wide image is resized with the rest by default, and cut off where asked."""
    image = Image.new("RGB", (96, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    images: list[torch.Tensor] = []
    teacher.vae.encoder.register_forward_pre_hook(lambda _, args: images.append(args[0]))
    examples = [CaptionChoice("a", image, ("x", "y"), 0)]
    diffusion_outcomes(
        DiffusionScorer(teacher), examples, "choice", draws=8, **({} if fit == "whole" else {"fit": fit})
    )
    assert images[0].shape == (1, 3, 32, 32)
    assert (images[0][..., 2].mean() > 0.9) == (fit == "whole")
    assert images[0][..., 16:].mean() < -0.9


def test_latents_are_kept_in_the_cache(teacher_parts: dict[str, Any], tmp_path: Path) -> None:
    teacher = DiffusionTeacher(**teacher_parts, cache=TensorCache(tmp_path, 10**7))
    encoded: list[int] = []
    hook = teacher.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    examples = [CaptionChoice(str(i), Image.new("RGB", (32, 32), (80 * i, 0, 0)), ("x", "y"), 0) for i in range(2)]
    runs = [diffusion_outcomes(DiffusionScorer(teacher), examples, "choice", draws=8) for _ in range(2)]
    hook.remove()
    assert encoded == [1, 1]
    assert torch.equal(runs[0].answers[1].distances, runs[1].answers[1].distances)


def test_a_tie_is_wrong_and_counted(teacher: DiffusionTeacher) -> None:
    examples = [CaptionChoice("a", Image.new("RGB", (32, 32)), ("x", "x"), 0)]
    scorer = DiffusionScorer(teacher, unet_batch=8)
    outcomes, cost, _ = diffusion_outcomes(scorer, examples, "choice", draws=8)
    assert outcomes.figures["accuracy"].hits == (0.0,)
    assert cost.ties == 1


def test_cost() -> None:
    answers = [
        Answer((0, 1), torch.zeros(1, 2), torch.tensor([[8, 16]]), 512),
        Answer((None,), torch.zeros(1, 2), torch.tensor([[128, 128]]), 256),
    ]
    cost = DecisionCost.of(answers)
    assert cost == DecisionCost(decisions=3, ties=1, evaluations=280, full_grid=768)
    assert cost.to_json() == {
        "decisions": 3, "ties": 1, "evaluations": 280, "full_grid": 768, "per_decision": 280 / 3, "saving": 768 / 280,
    }  # fmt: skip


def test_no_examples_are_refused(teacher: DiffusionTeacher) -> None:
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        diffusion_outcomes(DiffusionScorer(teacher), [], "choice")


def test_an_image_that_is_not_there_is_named(teacher: DiffusionTeacher, tmp_path: Path) -> None:
    examples = [CaptionChoice("a", tmp_path / "absent.png", ("x", "y"), 0)]
    with pytest.raises(DataError, match=r"absent\.png"):
        diffusion_outcomes(DiffusionScorer(teacher), examples, "choice", draws=8)
