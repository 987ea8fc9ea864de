"""Which of several image-caption pairs has the lowest diffusion score, and when a part of the draws can say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

Pair = tuple[int, int]
"""Positions of an image and of a caption."""


@dataclass(frozen=True)
class Question:
    """Images and captions whose pairs are scored under the same timesteps and noise, to decide between pairs.

    Raises:
        ValueError: latents that are not a batch, fewer than two pairs to decide between, or a pair that is not there.
    """

    latents: Float[Tensor, "images channels height width"]
    captions: tuple[str, ...]
    decisions: tuple[tuple[Pair, ...], ...]
    """For each decision the pairs among which the lowest distance is sought; a pair may stand in several."""

    def __post_init__(self) -> None:
        if self.latents.dim() != 4:
            raise ValueError(f"latents: expected [images, channels, height, width], got {list(self.latents.shape)}")
        if not self.decisions or any(len(set(pairs)) < max(2, len(pairs)) for pairs in self.decisions):
            raise ValueError(f"decisions: expected each between two or more different pairs, got {self.decisions}")
        images, captions = len(self.latents), len(self.captions)
        for image, caption in (pair for pairs in self.decisions for pair in pairs):
            if not (0 <= image < images and 0 <= caption < captions):
                raise ValueError(
                    f"decisions: expected pairs of {images} images and {captions} captions, got ({image}, {caption})"
                )

    @classmethod
    def of_captions(cls, latents: Float[Tensor, "1 channels height width"], captions: Sequence[str]) -> Question:
        """Which of the captions belongs to the image: one decision."""
        return cls(latents, tuple(captions), (tuple((0, caption) for caption in range(len(captions))),))

    @classmethod
    def of_images(cls, latents: Float[Tensor, "images channels height width"], caption: str) -> Question:
        """Which of the images belongs to the caption: one decision."""
        return cls(latents, (caption,), (tuple((image, 0) for image in range(len(latents))),))

    @classmethod
    def two_by_two(cls, latents: Float[Tensor, "2 channels height width"], captions: Sequence[str]) -> Question:
        """Winoground's four decisions: the caption of image 0, that of image 1, the image of caption 0, that of 1."""
        return cls(latents, tuple(captions), (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1))))

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that some decision asks for, images first."""
        return sorted({pair for pairs in self.decisions for pair in pairs})


@dataclass(frozen=True)
class Answer:
    """What became of a `Question`."""

    choices: tuple[int | None, ...]
    """For each decision the position of the pair with the lowest distance; None where the lowest comes twice."""
    distances: Float[Tensor, "images captions"]
    """The mean over the draws that a pair was evaluated at, float64; NaN where no decision asked for it."""
    evaluations: Int[Tensor, "images captions"]
    """U-Net evaluations of each pair."""
    full_grid: int
    """U-Net evaluations that all draws of all pairs would have taken."""


def share_kept(early: Sequence[Answer], full: Sequence[Answer]) -> float:
    """Share of the decisions that are the same in both, in [0, 1].

    Raises:
        ValueError: not the same number of decisions.
    """
    choices, of_full = ([choice for row in rows for choice in row.choices] for rows in (early, full))
    if not choices or len(choices) != len(of_full):
        raise ValueError(f"full: expected the {len(choices)} decisions of `early`, got {len(of_full)}")
    return sum(a == b for a, b in zip(choices, of_full, strict=True)) / len(choices)


class Race:
    """A `Question` under way: which pairs are still evaluated, at which draws, and what was decided.

    A round ends at 1, 2, 4, … times `first_draws` and at the last draw. At its end a pair is dropped from a decision
    when the paired differences to the best one so far say that it will not be the lowest on all `draws` either:

    - the mean's standard error is that of systematic sampling without replacement,
      `sqrt((1/n - 1/draws) sum (x_{i+1} - x_i)² / (2 (n - 1)))` over neighbours in t (Wolter, Introduction to
      Variance Estimation, 2007, section 8.2): the trend over the timesteps, which every round covers evenly, is not
      taken for noise;
    - the mean must exceed that by the factor of Student's t with about `n / 2` degrees of freedom, fewer than n - 1
      because neighbouring differences share a term and the variance differs between timesteps (*reading*);
    - the t is two-sided at `(1 - confidence) / (looks * rivals)` (Bonferroni).

    The confidence is nominal: no t is exact for differences that are not normal, and no rule allows for what the draws
    so far have missed. Of simulated ties and near-ties of 256 draws, a confidence of 0.99 kept 99.8 % or more under
    heavy tails (Student's t with 2 or 3 degrees of freedom, log-normal) and 99 % where the noise falls by e^6 over the
    timesteps; but 97 % where 1 draw in 100 decides, and 90 % where the difference swings faster over the timesteps
    than the first draws lie. Only a confidence of 1 is safe from these.

    Args:
        t: timesteps of all draws, in the order of evaluation.
    """

    def __init__(self, question: Question, t: Int[Tensor, "draws"], *, first_draws: int, confidence: float) -> None:
        self.question = question
        self.draws = len(t)
        self._t = t.cpu()
        ends = (first_draws * 2**k for k in range(self.draws.bit_length()))
        self._ends = [end for end in ends if end < self.draws and confidence < 1]
        self._error = (1 - confidence) / max(1, len(self._ends))
        self._left = [list(range(len(pairs))) for pairs in question.decisions]
        self._losses = torch.full(
            (len(question.latents), len(question.captions), self.draws), torch.nan, dtype=torch.float64
        )
        self._done = 0
        self._missing = 0

    def next_round(self) -> tuple[list[Pair], int, int]:
        """The pairs to evaluate, the first draw and the one after the last; no pairs once all is decided."""
        start = self._done
        stop = next((end for end in self._ends if end > start), self.draws)
        undecided = zip(self.question.decisions, self._left, strict=True)
        pairs = sorted({pairs[place] for pairs, left in undecided if len(left) > 1 for place in left})
        if start == self.draws:
            pairs = []
        self._missing = len(pairs) * (stop - start)
        self._done = stop if pairs else start
        return pairs, start, stop

    def record(self, pair: Pair, start: int, losses: Float[Tensor, "draws"]) -> bool:
        """Takes the losses of a pair from draw `start` on; says whether they were the round's last.

        Raises:
            ValueError: a loss that is not finite.
        """
        if not bool(losses.isfinite().all()):
            raise ValueError(
                f"teacher: expected finite losses, got {losses[~losses.isfinite()][0].item()} for the caption "
                f"{self.question.captions[pair[1]]!r}; load the teacher in float32 or bfloat16"
            )
        self._losses[pair][start : start + len(losses)] = losses
        self._missing -= len(losses)
        if self._missing == 0:
            for decision in range(len(self._left)):
                self._drop(decision)
        return self._missing == 0

    def answer(self) -> Answer:
        """What was decided, once there is no further round."""
        return Answer(
            tuple(left[0] if len(left) == 1 else None for left in self._left),
            self._losses.nanmean(dim=2),
            self._losses.isfinite().sum(dim=2),
            len(self.question.pairs) * self.draws,
        )

    def _drop(self, decision: int) -> None:
        """Leaves the pairs that may still have the lowest distance: at the last draw those that have it."""
        left, pairs, n = self._left[decision], self.question.decisions[decision], self._done
        if len(left) == 1:
            return
        losses = torch.stack([self._losses[pairs[place]][:n] for place in left])
        means = losses.mean(dim=1)
        lead = means - means.min()
        if n == self.draws:
            keep = lead == 0
        else:
            by_time = (losses - losses[means.argmin()])[:, self._t[:n].argsort()]
            variance = by_time.diff(dim=1).square().sum(dim=1) / (2 * (n - 1))
            error = (variance * (1 / n - 1 / self.draws)).sqrt()
            # Equal losses have a lead of 0 and an error of 0: kept, to be called a tie.
            keep = lead <= t_quantile(2 * (n // 4), self._error / (len(pairs) - 1)) * error
            keep |= lead == 0
        self._left[decision] = [place for place, kept in zip(left, keep.tolist(), strict=True) if kept]


def spread_order(count: int) -> list[int]:
    """0 … count - 1 in bit-reversed order: for a power of two, its first 2, 4, 8, … lie evenly spaced."""
    bits = (count - 1).bit_length()
    reversed_bits = (sum(((i >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)) for i in range(2**bits))
    return [i for i in reversed_bits if i < count]


@lru_cache
def t_quantile(freedom: int, level: float) -> float:
    """The t that Student's |T| exceeds with probability `level`, for an even number of degrees of freedom.

    With `t = sqrt(2k) tan(a)` for 2k degrees, `P(|T| < t) = sin(a) sum_{j < k} C(2j, j) (cos(a) / 2)^{2j}`.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        term, total, square = 1.0, 0.0, math.cos(angle) ** 2
        for j in range(freedom // 2):
            total += term
            term *= square * (2 * j + 1) / (2 * j + 2)
        low, high = (angle, high) if 1 - math.sin(angle) * total > level else (low, angle)
    return math.sqrt(freedom) * math.tan(high)
