"""The denoising diffusion score: how well a caption explains an image, in the eyes of the diffusion model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.diffusion.decisions import Answer, Pair, Question, Race, spread_order
from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.diffusion.timesteps import SeedStream
from fastsds.ops import TimestepDraw, add_noise, sample_timesteps, sds_loss
from fastsds.ops.sample_timesteps import Strategy


class DiffusionScorer:
    """`d(x, c) = E_{t,eps} ‖eps_theta(alpha_t v(x) + sigma_t eps, t, c) − eps‖²` (*stated*); lower is a better match.

    The captions of one image are compared under the same timesteps and noise, which cancels most of the variance
    of a comparison.

    Args:
        teacher: the diffusion model.
        draws: noise draws per image; stratified over the timesteps by default.
        t_range: first timestep and the one after the last; the whole schedule by default.
        unet_batch: noised latents per U-Net call.
        seed: of the noise; the same seed gives the same scores.
    """

    def __init__(
        self,
        teacher: DiffusionTeacher,
        draws: int = 16,
        *,
        strategy: Strategy = "stratified",
        weighting: Weighting | Float[Tensor, "timesteps"] = "uniform",
        t_range: tuple[int, int] | None = None,
        unet_batch: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value in (("draws", draws), ("unet_batch", unet_batch)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.teacher = teacher
        self.draws = draws
        self.strategy = strategy
        self.weighting = weighting
        self.t_range = t_range
        self.unet_batch = unet_batch
        self.seed = seed

    def score_images(
        self, images: Float[Tensor, "images 3 height width"], captions: Sequence[Sequence[str]]
    ) -> Float[Tensor, "images captions"]:
        """Scores images in [0, 1] against their captions; see `score_latents`."""
        encoded = [self.teacher.encode_images(chunk) for chunk in images.split(self.unet_batch)]
        return self.score_latents(torch.cat(encoded), captions)

    @torch.no_grad()
    def score_latents(
        self,
        latents: Float[Tensor, "images channels height width"],
        captions: Sequence[Sequence[str]],
        *,
        seed: Int[Tensor, ""] | None = None,
    ) -> Float[Tensor, "images captions"]:
        """`d` for every image and each of its captions, float32 on the teacher's device.

        Args:
            latents: VAE latents, on the teacher's device.
            captions: for every image as many candidates, at least one.
            seed: one int64 on the device, in place of the scorer's own.

        Raises:
            ValueError: another number of caption lists than images, or lists of unequal length.
        """
        candidates = {len(row) for row in captions}
        if len(captions) != len(latents) or len(candidates) != 1 or 0 in candidates:
            raise ValueError(
                f"captions: expected for each of {len(latents)} images equally many captions, "
                f"got {len(captions)} lists of lengths {sorted(candidates)}"
            )
        if seed is None:
            seed = torch.tensor(self.seed, device=latents.device)
        schedule = self.teacher.schedule
        draw = sample_timesteps(
            schedule, len(latents), self.draws, seed,
            strategy=self.strategy, t_range=self.t_range, weighting=self.weighting,
        )  # fmt: skip
        noised = add_noise(latents, draw.alpha_t, draw.sigma_t, seed, dtype=self.teacher.dtype)
        flat, flat_t = noised.flatten(0, 1), draw.t.flatten()
        scores = []
        for column in range(candidates.pop()):
            repeated = [row[column] for row in captions for _ in range(self.draws)]
            losses = sds_loss(
                self._predict(flat, flat_t, repeated).view(noised.shape), latents, draw.alpha_t, draw.sigma_t,
                draw.weight, seed, prediction_type=schedule.prediction_type,
            )  # fmt: skip
            scores.append(losses.mean(dim=1))
        return torch.stack(scores, dim=1)

    @torch.no_grad()
    def decide(
        self,
        questions: Iterable[Question],
        *,
        draws: int = 256,
        first_draws: int = 8,
        confidence: float = 0.99,
    ) -> list[Answer]:
        """Which pair of each decision has the lowest `d`, with no more U-Net evaluations than it takes to tell.

        A question has a grid of `draws` timesteps and noises of its own (stratified, whatever the scorer's
        `strategy`), which all its pairs share. Pairs are evaluated in rounds of 1, 1, 2, 4, … times `first_draws`
        draws, each spread over the whole range, and dropped as `Race` says. What is decided early is thus decided
        on a part of the same sum that the full grid has.

        Questions are taken from their iterator as the U-Net can take more, and share its batches: every batch but
        the last ones has `unet_batch` noised latents.

        Args:
            draws: of the full grid; a power of two spreads best.
            first_draws: of the first round, at least 4.
            confidence: nominal probability that a decision is the full grid's; 1 evaluates the full grid.

        Returns:
            One answer for each question, in order; to rounding the same for every `unet_batch`.

        Raises:
            ValueError: an option outside its range, or losses that are not finite.
        """
        if not 4 <= first_draws <= draws:
            raise ValueError(f"first_draws: expected from 4 to draws={draws}, got {first_draws}")
        if not 0 < confidence <= 1:
            raise ValueError(f"confidence: expected a probability in (0, 1], got {confidence}")
        seeds = SeedStream(self.seed)
        source = enumerate(questions)
        answers: dict[int, Answer] = {}
        queue: deque[_Piece] = deque()
        queued = 0

        def enqueue(run: _Run) -> None:
            nonlocal queued
            pairs, start, stop = run.race.next_round()
            queue.extend(_Piece(run, pair, start, stop) for pair in pairs)
            queued += len(pairs) * (stop - start)
            if not pairs:
                answers[run.position] = run.race.answer()

        while True:
            while queued < self.unet_batch and (entry := next(source, None)) is not None:
                position, question = entry
                # On the CPU, whose generator gives the same seeds to every teacher.
                seed = seeds.next(torch.device("cpu")).to(self.teacher.device)
                grid = self._grid(draws, seed)
                race = Race(question, grid.t[:, 0], first_draws=first_draws, confidence=confidence)
                enqueue(_Run(position, race, question.latents.to(self.teacher.device), grid, seed))
            if not queue:
                return [answers[position] for position in range(len(answers))]
            pieces = _take(queue, self.unet_batch)
            queued -= sum(piece.stop - piece.start for piece in pieces)
            for piece, losses in zip(pieces, self._losses(pieces), strict=True):
                if piece.run.race.record(piece.pair, piece.start, losses):
                    enqueue(piece.run)

    def _grid(self, draws: int, seed: Tensor) -> TimestepDraw:
        """Stratified timesteps and their coefficients, each `[draws, 1]`, in the order of evaluation."""
        order = torch.tensor(spread_order(draws), device=seed.device)
        draw = sample_timesteps(
            self.teacher.schedule, 1, draws, seed,
            strategy="stratified", t_range=self.t_range, weighting=self.weighting,
        )  # fmt: skip
        return TimestepDraw(*(value[0, order].unsqueeze(1) for value in draw))

    def _losses(self, pieces: Sequence[_Piece]) -> Sequence[Float[Tensor, "draws"]]:
        """The losses of each piece's draws, on the CPU, from one U-Net call."""
        noised = [
            add_noise(
                piece.latents, piece.draw.alpha_t, piece.draw.sigma_t, piece.run.seed,
                dtype=self.teacher.dtype, batch_offset=piece.start,
            )[:, 0]
            for piece in pieces
        ]  # fmt: skip
        captions = [piece.caption for piece in pieces for _ in range(piece.start, piece.stop)]
        prediction = self._predict(torch.cat(noised), torch.cat([piece.draw.t[:, 0] for piece in pieces]), captions)
        sizes = [piece.stop - piece.start for piece in pieces]
        losses = [
            sds_loss(
                predicted.unsqueeze(1), piece.latents, piece.draw.alpha_t, piece.draw.sigma_t, piece.draw.weight,
                piece.run.seed, prediction_type=self.teacher.schedule.prediction_type, batch_offset=piece.start,
            )[:, 0]
            for piece, predicted in zip(pieces, prediction.split(sizes), strict=True)
        ]  # fmt: skip
        return torch.cat(losses).cpu().split(sizes)

    def _predict(self, noised: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """The teacher's output for one caption per noised latent, `unet_batch` at a time."""
        chunks = [slice(start, start + self.unet_batch) for start in range(0, len(noised), self.unet_batch)]
        return torch.cat(
            [self.teacher.predict(noised[rows], t[rows], self.teacher.encode_text(captions[rows])) for rows in chunks]
        )


class _Run(NamedTuple):
    """A race with what its evaluation needs, on the teacher's device."""

    position: int
    race: Race
    latents: Float[Tensor, "images channels height width"]
    grid: TimestepDraw  # [draws, 1]
    seed: Int[Tensor, ""]


class _Piece(NamedTuple):
    """Consecutive draws of one pair."""

    run: _Run
    pair: Pair
    start: int
    stop: int

    @property
    def latents(self) -> Float[Tensor, "draws channels height width"]:
        image, _ = self.pair
        return self.run.latents[image].expand(self.stop - self.start, -1, -1, -1)

    @property
    def draw(self) -> TimestepDraw:
        return TimestepDraw(*(value[self.start : self.stop] for value in self.run.grid))

    @property
    def caption(self) -> str:
        return self.run.race.question.captions[self.pair[1]]


def _take(queue: deque[_Piece], count: int) -> list[_Piece]:
    """The first pieces of the queue, `count` draws together where it has them; what is cut off stays first."""
    taken: list[_Piece] = []
    while queue and count > 0:
        piece = queue.popleft()
        if piece.stop - piece.start > count:
            queue.appendleft(piece._replace(start=piece.start + count))
            piece = piece._replace(stop=piece.start + count)
        count -= piece.stop - piece.start
        taken.append(piece)
    return taken
