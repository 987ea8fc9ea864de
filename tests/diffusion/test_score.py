"""`DiffusionScorer` against the denoising diffusion score written out with the bare U-Net."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds.diffusion import DiffusionScorer, DiffusionTeacher
from fastsds.ops import philox, sample_timesteps
from fastsds.toyworld import models

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
            text = teacher64.encode_text([caption])
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
