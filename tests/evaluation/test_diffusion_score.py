"""The diffusion model as a judge: on the toy world, whose teacher is right, and on images prepared by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from fastsds import toyworld
from fastsds.data import DataError
from fastsds.diffusion import DiffusionScorer, DiffusionTeacher, SeedStream, TensorCache
from fastsds.diffusion.decisions import Answer, spread_order
from fastsds.evaluation import CaptionedImages, ClassifiedImages, read_captioned_images, read_class_folders
from fastsds.evaluation.diffusion_score import (
    DecisionCost,
    diffusion_outcomes,
    diffusion_retrieval_outcomes,
    diffusion_zero_shot_outcomes,
)
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo
from fastsds.ops import philox, sample_timesteps
from fastsds.toyworld.tasks import composition_pairs, training_scenes

EXAMPLES = 4
GRID = 32
NOISIEST = (850, 1000)


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


def _distances(teacher: DiffusionTeacher, images: Sequence[Path], captions: Sequence[str], seed: Tensor) -> Tensor:
    """`[images, captions]` on all draws of one grid of the noisiest timesteps, by the bare U-Net."""
    order = spread_order(GRID)
    draw = sample_timesteps(teacher.schedule, 1, GRID, seed, strategy="stratified", t_range=NOISIEST)
    t, alpha, sigma = (value[0, order] for value in (draw.t, draw.alpha_t, draw.sigma_t))
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    eps = philox.normal(seed, (GRID, 4, 8, 8))
    found = torch.empty(len(images), len(captions))
    for row, path in enumerate(images):
        noised = alpha * teacher.encode_images(to_tensor(Image.open(path)).unsqueeze(0)) + sigma * eps
        for column, caption in enumerate(captions):
            text = teacher.encode_text([caption]).embeddings.expand(GRID, -1, -1)
            with torch.no_grad():
                velocity = teacher.unet(noised, t, encoder_hidden_states=text).sample
            found[row, column] = (alpha * velocity + sigma * noised - eps).square().mean()
    return found


@pytest.fixture(scope="module")
def noisiest(scorer: DiffusionScorer) -> DiffusionScorer:
    return DiffusionScorer(scorer.teacher, t_range=NOISIEST, seed=3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Pictures of single things in files, each with its caption, all different."""
    folder, drawn = tmp_path_factory.mktemp("scenes"), training_scenes(12, 0)
    found = []
    for place, (image, caption) in enumerate(zip(drawn.images, drawn.captions, strict=True)):
        to_pil_image(image).save(folder / f"{place}.png")
        found.append((folder / f"{place}.png", caption))
    return found[:4]


@pytest.mark.parametrize("confidence", [0.99, 1.0])
def test_an_image_is_the_class_of_the_lowest_distance(
    noisiest: DiffusionScorer, scenes: list[tuple[Path, str]], tmp_path: Path, confidence: float
) -> None:
    """Of ImageNet's layout; two folders have one name, and the last has another's picture."""
    classes, own = ("purple cross", "purple ring", "green diamond", "purple cross", "red ring"), [0, 1, 2, 0, 3]
    images = [tmp_path / f"n{label}" / "1.png" for label in range(5)]
    for path, place in zip(images, (0, 1, 2, 0, 1), strict=True):
        path.parent.mkdir()
        path.write_bytes(scenes[place][0].read_bytes())
    outcomes, cost, answers = diffusion_zero_shot_outcomes(
        noisiest, read_class_folders(tmp_path, classes), "a {}", draws=GRID, confidence=confidence
    )
    captions, seeds = [f"a {name}" for name in dict.fromkeys(classes)], SeedStream(3)
    expected = torch.cat(
        [_distances(noisiest.teacher, [path], captions, seeds.next(torch.device("cpu"))) for path in images]
    )
    figure = outcomes.figures["accuracy"]
    assert figure.hits == tuple((expected.argmin(dim=1) == torch.tensor(own)).float().tolist())
    assert figure.hits == (1, 1, 1, 1, 0)
    assert figure.keys == tuple(f"n{label}/1.png" for label in range(5))
    assert (figure.groups, figure.chance) == (classes, 1 / 4)
    assert (cost.decisions, cost.full_grid) == (5, 5 * 4 * GRID)
    assert cost.evaluations < cost.full_grid if confidence < 1 else cost.evaluations == cost.full_grid
    if confidence == 1:
        found = torch.cat([answer.distances for answer in answers]).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("confidence", [0.99, 1.0])
def test_retrieval_among_all_captions_and_all_images(
    noisiest: DiffusionScorer, scenes: list[tuple[Path, str]], tmp_path: Path, confidence: float
) -> None:
    """Of COCO's layout. Image 0's caption comes twice and image 1 has it too; image 2 has two, image 3 a wrong one."""
    images = [path for path, _ in scenes]
    first, second, third, fourth = (caption for _, caption in scenes)
    texts = ((first, first), (second, first), (third, "a green thing"), (f"{fourth} above a red ring",))
    rows = [{"id": row, "file_name": path.name} for row, path in enumerate(images)]
    notes = [{"id": 0, "image_id": row, "caption": text} for row, own in enumerate(texts) for text in own]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows, "annotations": notes}))
    data = read_captioned_images(tmp_path / "captions.json", images[0].parent)
    assert data.captions == texts
    outcomes, cost, _ = diffusion_retrieval_outcomes(noisiest, data, draws=GRID, confidence=confidence)

    flat = [text for own in texts for text in own]
    owner = torch.tensor([row for row, own in enumerate(texts) for _ in own])
    distinct, seeds = list(dict.fromkeys(flat)), SeedStream(3)
    of_image = torch.zeros(4, len(flat))
    for row in (1, 2, 3):
        distances = _distances(noisiest.teacher, images[row : row + 1], distinct, seeds.next(torch.device("cpu")))[0]
        of_image[row] = distances[[distinct.index(text) for text in flat]]
    to_text = [bool(of_image[row, owner == row].min() < of_image[row, owner != row].min()) for row in range(4)]
    of_text = {
        text: _distances(noisiest.teacher, images, [text], seeds.next(torch.device("cpu")))[:, 0] for text in distinct
    }
    to_image = [bool(of_text[text].argmin() == row) for text, row in zip(flat, owner.tolist(), strict=True)]
    assert to_text[:3] == [False, True, True]  # an equal caption is another's
    assert to_image[:2] == [True, True] and not to_image[3]

    assert list(outcomes.figures) == ["text-to-image R@1", "image-to-text R@1"]
    assert outcomes.figures["image-to-text R@1"].hits == tuple(map(float, to_text))
    assert outcomes.figures["text-to-image R@1"].hits == tuple(map(float, to_image))
    assert cost.full_grid == (3 * 5 + 5 * 4) * GRID
    assert cost.evaluations < cost.full_grid if confidence < 1 else cost.evaluations == cost.full_grid


def test_what_sets_are_refused(teacher: DiffusionTeacher, tmp_path: Path) -> None:
    scorer, image = DiffusionScorer(teacher), Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=r"templates: expected each to hold \{\} for the class name, got 'a photo'"):
        diffusion_zero_shot_outcomes(scorer, ClassifiedImages([(image, 0)], ("a",), ("x", "y")), "a photo")
    for label in (-1, 2):
        data = ClassifiedImages([(image, 0), (image, label)], ("a", "b"), ("x", "y"))
        with pytest.raises(ValueError, match=f"images: expected labels below 2, got {label}"):
            diffusion_zero_shot_outcomes(scorer, data, draws=8)
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        diffusion_zero_shot_outcomes(scorer, ClassifiedImages([(tmp_path / "absent.png", 0)], ("a",), ("x", "y")))
    with pytest.raises(ValueError, match="images: expected at least two to choose from, got 1"):
        diffusion_retrieval_outcomes(scorer, CaptionedImages((image,), (("x", "y"),)))
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        diffusion_retrieval_outcomes(scorer, CaptionedImages((image, tmp_path / "absent.png"), (("x",), ("y",))))
