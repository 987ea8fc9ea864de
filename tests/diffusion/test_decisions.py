"""`Race` against its rule written out with SciPy, and against how often early decisions of noise are wrong."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fastsds.diffusion.decisions import Answer, Question, Race, share_kept, spread_order, t_quantile

DRAWS = 64
LATENTS = torch.zeros(2, 4, 2, 2)


def _captions(count: int) -> Question:
    return Question.of_captions(LATENTS[:1], [f"caption {i}" for i in range(count)])


def _timesteps(draws: int = DRAWS) -> Tensor:
    """One timestep in every `draws`-th of 1000, in the order of evaluation, as the scorer's grid has them."""
    place = (torch.tensor(spread_order(draws)) + torch.randint(draws, ())) % draws
    return (place + torch.rand(draws)).mul(1000 / draws).long()


def _play(question: Question, losses: Tensor, t: Tensor, *, first_draws: int = 8, confidence: float) -> Answer:
    """Runs a race over `losses[image, caption, draw]`, each round's in two parts."""
    race = Race(question, t, first_draws=first_draws, confidence=confidence)
    while True:
        pairs, start, stop = race.next_round()
        if not pairs:
            return race.answer()
        middle = (start + stop) // 2
        parts = [(pair, low, high) for low, high in ((start, middle), (middle, stop)) for pair in pairs]
        last = [race.record(pair, low, losses[pair][low:high]) for pair, low, high in parts]
        assert last == [False] * (len(parts) - 1) + [True]


def _by_scipy(losses: np.ndarray, t: np.ndarray, first_draws: int, confidence: float) -> tuple[set[int], list[int]]:
    """The captions left, and how many draws each was evaluated at, of `losses[caption, draw]`."""
    captions, draws = losses.shape
    looks = [n for n in (first_draws * 2**k for k in range(20)) if n < draws]
    left, evaluated = set(range(captions)), [0] * captions
    for n in [*looks, draws]:
        for caption in left:
            evaluated[caption] = n
        best = min(left, key=lambda caption: losses[caption, :n].mean())
        if n == draws:
            return {caption for caption in left if losses[caption].mean() == losses[best].mean()}, evaluated
        level = (1 - confidence) / len(looks) / (captions - 1)
        quantile = scipy.stats.t.isf(level / 2, 2 * (n // 4))
        for caption in left - {best}:
            difference = (losses[caption] - losses[best])[:n]
            ordered = difference[np.argsort(t[:n])]
            variance = sum((b - a) ** 2 for a, b in itertools.pairwise(ordered)) / (2 * (n - 1))
            if difference.mean() > quantile * math.sqrt(variance / n * (1 - n / draws)):
                left = left - {caption}
        if len(left) == 1:
            return left, evaluated
    raise AssertionError


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("captions", [2, 5])
def test_a_race_follows_its_rule(captions: int, confidence: float) -> None:
    lengths = set()
    for _ in range(30):
        t = _timesteps()
        losses = torch.randn(captions, DRAWS).double() + torch.arange(captions).unsqueeze(1) * (1 - t / 1000)
        answer = _play(_captions(captions), losses.unsqueeze(0), t, confidence=confidence)
        left, evaluated = _by_scipy(losses.numpy(), t.numpy(), 8, confidence)
        assert set(answer.choices) == left
        assert answer.evaluations.tolist() == [evaluated]
        means = [losses[caption, :n].mean() for caption, n in enumerate(evaluated)]
        torch.testing.assert_close(answer.distances[0], torch.stack(means))
        assert answer.full_grid == captions * DRAWS
        lengths |= set(evaluated)
    assert lengths == {DRAWS} if confidence == 1 else len(lengths) > 1


@pytest.mark.parametrize(("noise", "tilt"), [("normal", 0.0), ("heavy", 3.0), ("uneven", 3.0)])
def test_early_decisions_between_equals_are_rarely_wrong(noise: str, tilt: float) -> None:
    """No difference in expectation, with and without a trend over the timesteps that sums to nothing."""
    races, early, kept = 300, 0, 0
    for _ in range(races):
        t = _timesteps(256)
        x = torch.randn(256).double()
        if noise == "heavy":
            x = torch.distributions.StudentT(3.0).sample((256,)).double()
        elif noise == "uneven":
            x *= torch.exp(-t / 300)
        difference = x + tilt * (t / 1000 - (t / 1000).mean())
        losses = torch.stack([torch.zeros(256).double(), difference]).unsqueeze(0)
        answer = _play(_captions(2), losses, t, confidence=0.99)
        early += int(answer.evaluations[0, 0]) < 256
        kept += answer.choices[0] == int(difference.mean() < 0)
    assert kept / races >= 0.99
    assert early > 0


def test_a_pair_is_evaluated_while_some_decision_needs_it() -> None:
    """Image 1 cannot tell its captions apart, and caption 1 not its images; the other two decisions are plain."""
    losses = torch.randn(DRAWS).double() * 1e-3 + torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double().unsqueeze(2)
    losses[1, 1] += torch.randn(DRAWS) * 0.1
    answer = _play(Question.two_by_two(LATENTS, ["a", "b"]), losses, _timesteps(), confidence=0.99)
    assert answer.evaluations.tolist() == [[8, DRAWS], [DRAWS, DRAWS]]
    own, other = losses[1, 1].mean(), losses[1, 0].mean()
    assert answer.choices == (0, int(own < other), 0, int(own < losses[0, 1].mean()))
    assert answer.full_grid == 4 * DRAWS


def test_images_of_a_caption_are_one_decision() -> None:
    losses = torch.randn(DRAWS).double() + torch.tensor([[1.0], [0.0], [2.0]]).double().unsqueeze(2)
    answer = _play(Question.of_images(torch.zeros(3, 4, 2, 2), "a"), losses, _timesteps(), confidence=0.99)
    assert answer.choices == (1,)
    assert answer.evaluations.tolist() == [[8], [8], [8]]


def test_equal_pairs_are_a_tie() -> None:
    losses = torch.rand(1, 1, DRAWS).double().repeat(1, 3, 1)
    losses[:, 2] += 1
    answer = _play(_captions(3), losses, _timesteps(), confidence=0.9)
    assert answer.choices == (None,)
    assert answer.evaluations.tolist() == [[DRAWS, DRAWS, 8]]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    losses = torch.rand(1, 2, DRAWS)
    losses[0, 1, 3] = torch.inf
    with pytest.raises(ValueError, match="teacher: expected finite losses, got inf for the caption 'caption 1'; load"):
        _play(_captions(2), losses, _timesteps(), confidence=0.9)


@pytest.mark.parametrize("count", [1, 2, 8, 256])
def test_spread_order_is_even_at_every_power_of_two(count: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for size in (2**k for k in range(9) if 2**k <= count):
        assert sorted(order[:size]) == list(range(0, count, count // size))


def test_spread_order_of_any_count() -> None:
    assert spread_order(5) == [0, 4, 2, 1, 3]


@pytest.mark.parametrize("freedom", [2, 4, 8, 64, 256])
@pytest.mark.parametrize("level", [0.5, 0.05, 1e-3, 1e-7])
def test_t_quantile(freedom: int, level: float) -> None:
    assert t_quantile(freedom, level) == pytest.approx(scipy.stats.t.isf(level / 2, freedom), rel=1e-6)


def test_share_kept() -> None:
    def answer(*choices: int | None) -> Answer:
        return Answer(choices, torch.zeros(1, 2), torch.zeros(1, 2).long(), 2)

    assert share_kept([answer(0, 1), answer(None, 1)], [answer(0, 0), answer(None, 1)]) == 0.75
    with pytest.raises(ValueError, match="full: expected the 2 decisions of `early`, got 1"):
        share_kept([answer(0, 1)], [answer(0)])


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ((), "expected each between two or more different pairs, got ()"),
        ((((0, 0),),), "expected each between two or more different pairs, got (((0, 0),),)"),
        ((((0, 0), (0, 0)),), "expected each between two or more different pairs, got (((0, 0), (0, 0)),)"),
        ((((0, 0), (2, 0)),), "expected pairs of 2 images and 3 captions, got (2, 0)"),
        ((((0, 0), (0, -1)),), "expected pairs of 2 images and 3 captions, got (0, -1)"),
    ],
)
def test_refused_decisions(decisions: tuple[tuple[tuple[int, int], ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"decisions: {message}")):
        Question(LATENTS, ("a", "b", "c"), decisions)


def test_refused_latents() -> None:
    with pytest.raises(ValueError, match=re.escape("latents: expected [images, channels, height, width], got [4, 2]")):
        Question.of_captions(torch.zeros(4, 2), ["a", "b"])
