"""`DiffusionScorer` against the denoising diffusion score written out with the bare U-Net."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds import toyworld
from fastsds.diffusion import DiffusionScorer, DiffusionTeacher, SeedStream
from fastsds.diffusion.decisions import Question, share_kept, spread_order
from fastsds.ops import philox, sample_timesteps
from fastsds.toyworld import models
from fastsds.toyworld.tasks import composition_pairs

CAPTIONS = [["a red circle", "a blue square", "a red circle"], ["a green triangle", "a green triangle", "a large cube"]]


@pytest.fixture
def teacher64(teacher: DiffusionTeacher) -> DiffusionTeacher:
    return teacher.double()


def _latents(images: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(images, 4, 8, 8, dtype=dtype)


@pytest.mark.parametrize("strategy", ["stratified", "uniform"])
def test_score_is_the_formula(teacher64: DiffusionTeacher, strategy: Any) -> None:
    latents, draws, seed = _latents(), 3, torch.tensor(9)
    weights = torch.linspace(0.5, 2, 1000)
    scorer = DiffusionScorer(teacher64, draws, strategy=strategy, weighting=weights, t_range=(100, 900), seed=9)
    scores = scorer.score_latents(latents, CAPTIONS)
    draw = sample_timesteps(teacher64.schedule, 2, draws, seed, strategy=strategy, t_range=(100, 900))
    eps = philox.normal(seed, (2, draws, 4, 8, 8)).double()
    alpha_bar = diffusers.DDIMScheduler(**models.SCHEDULER_CONFIG).alphas_cumprod.double()
    expected = torch.zeros(2, 3).double()
    for i in range(2):
        for column, caption in enumerate(CAPTIONS[i]):
            text = teacher64.encode_text([caption]).embeddings
            for d in range(draws):
                t = draw.t[i, d]
                alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
                noised = alpha * latents[i : i + 1] + sigma * eps[i, d]
                with torch.no_grad():
                    velocity = teacher64.unet(noised, t, encoder_hidden_states=text).sample
                eps_hat = alpha * velocity + sigma * noised
                expected[i, column] += weights[t] * (eps_hat - eps[i, d]).square().mean() / draws
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
    assert scores.shape == (2, 3)


def test_captions_of_an_image_share_the_noise(teacher: DiffusionTeacher) -> None:
    scores = DiffusionScorer(teacher, draws=4).score_latents(_latents(dtype=torch.float32), CAPTIONS)
    assert scores.dtype == torch.float32
    assert scores[0, 0] == scores[0, 2]
    assert scores[1, 0] == scores[1, 1]
    assert scores[0, 0] != scores[0, 1]


def test_images_have_noise_of_their_own(teacher: DiffusionTeacher) -> None:
    latents = _latents(1, torch.float32).expand(2, -1, -1, -1)
    scores = DiffusionScorer(teacher, draws=2).score_latents(latents, [["a"], ["a"]])
    assert scores[0, 0] != scores[1, 0]


@pytest.mark.parametrize("unet_batch", [1, 2, 3, 5])
def test_unet_batch_does_not_change_scores(teacher64: DiffusionTeacher, unet_batch: int) -> None:
    """Also where it does not divide images times draws, and so cuts through an image's draws."""
    sizes: list[int] = []
    latents = _latents()
    expected = DiffusionScorer(teacher64, draws=4).score_latents(latents, CAPTIONS)
    teacher64.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    scores = DiffusionScorer(teacher64, draws=4, unet_batch=unet_batch).score_latents(latents, CAPTIONS)
    assert max(sizes) == unet_batch
    assert sum(sizes) == 2 * 4 * 3
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=0)


def test_seeds(teacher: DiffusionTeacher) -> None:
    latents = _latents(dtype=torch.float32)
    scorer = DiffusionScorer(teacher, draws=2, seed=3)
    scores = scorer.score_latents(latents, CAPTIONS)
    assert torch.equal(scorer.score_latents(latents, CAPTIONS), scores)
    assert torch.equal(DiffusionScorer(teacher, 2).score_latents(latents, CAPTIONS, seed=torch.tensor(3)), scores)
    assert not torch.isclose(DiffusionScorer(teacher, 2, seed=4).score_latents(latents, CAPTIONS), scores).any()


def test_no_graph_is_built(teacher: DiffusionTeacher) -> None:
    latents = _latents(dtype=torch.float32).requires_grad_()
    assert not DiffusionScorer(teacher, draws=1).score_latents(latents, CAPTIONS).requires_grad


@pytest.mark.parametrize("unet_batch", [1, 64])
def test_images_are_encoded_first(teacher64: DiffusionTeacher, unet_batch: int) -> None:
    """Their latents are float32, so that equality is to that precision; the VAE too sees no more at a time."""
    images, sizes = torch.rand(2, 3, 32, 32), []
    teacher64.vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    scores = DiffusionScorer(teacher64, draws=2, unet_batch=unet_batch).score_images(images, CAPTIONS)
    assert max(sizes) == min(unet_batch, 2)
    expected = DiffusionScorer(teacher64, draws=2).score_latents(teacher64.encode_images(images), CAPTIONS)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a"]], "for each of 2 images equally many captions, got 1 lists of lengths [1]"),
        ([["a"], ["a", "b"]], "for each of 2 images equally many captions, got 2 lists of lengths [1, 2]"),
        ([[], []], "for each of 2 images equally many captions, got 2 lists of lengths [0]"),
    ],
)  # fmt: skip
def test_refused_captions(teacher: DiffusionTeacher, captions: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("captions: expected " + message)):
        DiffusionScorer(teacher).score_latents(_latents(dtype=torch.float32), captions)


@pytest.mark.parametrize("name", ["draws", "unet_batch"])
def test_refused_options(teacher: DiffusionTeacher, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DiffusionScorer(teacher, **{name: 0})


def _questions(count: int, dtype: torch.dtype = torch.float64) -> list[Question]:
    return [Question.two_by_two(_latents(2, dtype), [f"a red circle {i}", f"a blue square {i}"]) for i in range(count)]


def _grid_losses(teacher: DiffusionTeacher, question: Question, draws: int, seed: Tensor) -> Tensor:
    """`[images, captions, draws]` in the order of evaluation, by the bare U-Net one draw at a time."""
    t = sample_timesteps(teacher.schedule, 1, draws, seed, strategy="stratified").t[0, spread_order(draws)]
    eps = philox.normal(seed, (draws, 4, 8, 8)).double()
    alpha_bar = diffusers.DDIMScheduler(**models.SCHEDULER_CONFIG).alphas_cumprod.double()[t]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    losses = torch.empty(len(question.latents), len(question.captions), draws).double()
    for image, latent in enumerate(question.latents):
        for column, caption in enumerate(question.captions):
            text = teacher.encode_text([caption]).embeddings
            eps_hat = torch.empty_like(eps)
            for d in range(draws):
                noised = (alpha[d] * latent + sigma[d] * eps[d]).unsqueeze(0)
                with torch.no_grad():
                    velocity = teacher.unet(noised, t[d], encoder_hidden_states=text).sample
                eps_hat[d] = (alpha[d] * velocity + sigma[d] * noised)[0]
            losses[image, column] = (eps_hat - eps).square().mean(dim=(1, 2, 3))
    return losses


@pytest.mark.parametrize("confidence", [0.5, 1.0])
def test_decisions_are_on_the_first_draws_of_one_grid(teacher64: DiffusionTeacher, confidence: float) -> None:
    """Noise and timesteps are shared by both images and captions of a question, and another question has others."""
    questions, draws = _questions(2), 8
    answers = DiffusionScorer(teacher64, seed=5).decide(questions, draws=draws, first_draws=4, confidence=confidence)
    seeds = SeedStream(5)
    for question, answer in zip(questions, answers, strict=True):
        losses = _grid_losses(teacher64, question, draws, seeds.next(torch.device("cpu")))
        for image, caption in question.pairs:
            n = int(answer.evaluations[image, caption])
            expected = losses[image, caption, :n].mean()
            torch.testing.assert_close(answer.distances[image, caption], expected, rtol=1e-5, atol=0)
        if confidence == 1:
            assert bool((answer.evaluations == draws).all())
            d = losses.mean(dim=2)
            assert answer.choices == tuple(map(int, [*d.argmin(dim=1), *d.argmin(dim=0)]))


def test_decisions_do_not_depend_on_the_batch(teacher64: DiffusionTeacher) -> None:
    questions = _questions(3)
    expected = DiffusionScorer(teacher64).decide(questions, draws=8, first_draws=4, confidence=0.5)
    answers = DiffusionScorer(teacher64, unet_batch=7).decide(questions, draws=8, first_draws=4, confidence=0.5)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.choices == other.choices
        assert torch.equal(answer.evaluations, other.evaluations)
        torch.testing.assert_close(answer.distances, other.distances, rtol=1e-6, atol=0)


def test_unet_batches_are_full_while_there_are_questions(teacher: DiffusionTeacher) -> None:
    sizes: list[int] = []
    taken: list[int] = []
    teacher.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def questions() -> Iterator[Question]:
        for question in _questions(6, torch.float32):
            taken.append(len(sizes))
            yield question

    scorer = DiffusionScorer(teacher, unet_batch=40)
    answers = scorer.decide(questions(), draws=16, first_draws=4, confidence=0.5)
    assert sum(sizes) == sum(int(answer.evaluations.sum()) for answer in answers)
    assert set(sizes[: taken[-1]]) == {40}
    assert max(sizes) == 40
    # Three questions of 16 draws fill the first batch, and later ones come as it goes on.
    assert taken[:4] == [0, 0, 0, taken[3]]
    assert 0 < taken[3] <= taken[-1]


def test_decisions_follow_range_and_weighting(teacher: DiffusionTeacher) -> None:
    questions, times = _questions(1, torch.float32), []
    teacher.unet.register_forward_pre_hook(lambda _, args, told: times.append(told["timestep"]), with_kwargs=True)
    scorer = DiffusionScorer(teacher, t_range=(850, 1000))
    (plain,) = scorer.decide(questions, draws=8, confidence=1)
    assert int(torch.cat(times).min()) >= 850
    scorer.weighting = torch.full((1000,), 3.0)
    (weighted,) = scorer.decide(questions, draws=8, confidence=1)
    torch.testing.assert_close(weighted.distances, 3 * plain.distances)


@pytest.mark.slow
def test_early_decisions_are_those_of_the_full_grid_at_a_tenth_of_its_evaluations() -> None:
    """On the toy world, over the whole schedule."""
    teacher = toyworld.load_teacher()
    questions = []
    for pairs in (composition_pairs("relation", 4), composition_pairs("attribute", 4)):
        latents = teacher.encode_images(pairs.images.flatten(0, 1)).unflatten(0, (-1, 2))
        questions += [Question.two_by_two(*example) for example in zip(latents, pairs.captions, strict=True)]
    scorer = DiffusionScorer(teacher)
    early, full = scorer.decide(questions), scorer.decide(questions, confidence=1)
    assert share_kept(early, full) >= 0.99
    evaluations = [sum(int(answer.evaluations.sum()) for answer in answers) for answers in (early, full)]
    assert evaluations[1] == sum(answer.full_grid for answer in early) >= 10 * evaluations[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 16, "first_draws": 3}, "first_draws: expected from 4 to draws=16, got 3"),
        ({"draws": 7}, "first_draws: expected from 4 to draws=7, got 8"),
        ({"confidence": 0.0}, "confidence: expected a probability in (0, 1], got 0.0"),
        ({"confidence": 99}, "confidence: expected a probability in (0, 1], got 99"),
    ],
)
def test_refused_options_of_decisions(teacher: DiffusionTeacher, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionScorer(teacher).decide([], **options)


def test_no_questions_have_no_answers(teacher: DiffusionTeacher) -> None:
    assert DiffusionScorer(teacher).decide([]) == []
