"""The denoising diffusion score: how well a caption explains an image, in the eyes of the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.ops import add_noise, sample_timesteps, sds_loss
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
        scores = []
        for column in range(candidates.pop()):
            prediction = self._predict(noised, draw.t, [row[column] for row in captions])
            losses = sds_loss(
                prediction, latents, draw.alpha_t, draw.sigma_t, draw.weight, seed,
                prediction_type=schedule.prediction_type,
            )  # fmt: skip
            scores.append(losses.mean(dim=1))
        return torch.stack(scores, dim=1)

    def _predict(self, noised: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        flat, flat_t = noised.flatten(0, 1), t.flatten()
        repeated = [caption for caption in captions for _ in range(self.draws)]
        outputs = [
            self.teacher.predict(
                flat[start : start + self.unet_batch],
                flat_t[start : start + self.unet_batch],
                self.teacher.encode_text(repeated[start : start + self.unet_batch]),
            )
            for start in range(0, len(flat), self.unet_batch)
        ]
        return torch.cat(outputs).view(noised.shape)
