"""The score distillation loss of latents against a frozen teacher, in memory that does not grow with the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.diffusion.conditioning import TextConditioning
from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.diffusion.timesteps import SeedStream, TimestepSampler
from fastsds.ops import TimestepDraw, add_noise, sample_timesteps, sds_loss, sds_loss_and_gradients
from fastsds.ops.sample_timesteps import Strategy
from fastsds.ops.sds_loss import Jacobian

Text = Sequence[str] | TextConditioning | Float[Tensor, "batch tokens width"]


class SDSLoss(nn.Module):
    """`E_{t,eps} w(t) ‖eps_theta(alpha_t z + sigma_t eps, t, c) − eps‖²`, the mean over elements, draws and batch.

    The latents are a cut in the graph: the teacher runs forward and backward on `teacher_batch` latents at a time
    and leaves the gradient at the cut, so its memory does not depend on the batch, and the gradient is the one of a
    single pass. Inside the cut gradients are of order one, so that a float16 teacher does not underflow.

    Args:
        teacher: the frozen diffusion model.
        draws: noise draws per latent and call.
        strategy: how timesteps are drawn; see `ops.sample_timesteps`. `importance` learns from every call in training
            mode, in `sampler`.
        weighting: w(t), by name or for every timestep; `uniform` is the paper's.
        jacobian: `full` differentiates through the U-Net, `skip` hands the residual to the latents.
        t_range: first timestep and the one after the last.
        guidance_scale: `uncond + s (text - uncond)`; 1 means none and costs no second pass.
        teacher_batch: latents per U-Net call (each `draws` times); all at once by default.
        seed: of the stream from which every call takes its noise.
    """

    def __init__(
        self,
        teacher: DiffusionTeacher,
        draws: int = 1,
        strategy: Strategy = "uniform",
        weighting: Weighting | Float[Tensor, "timesteps"] = "uniform",
        jacobian: Jacobian = "full",
        *,
        t_range: tuple[int, int] | None = None,
        guidance_scale: float = 1.0,
        teacher_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        if teacher_batch is not None and teacher_batch < 1:
            raise ValueError(f"teacher_batch: expected at least 1 or None, got {teacher_batch}")
        self.teacher = teacher
        self.draws = draws
        self.strategy = strategy
        self.weighting = weighting
        self.jacobian = jacobian
        self.t_range = t_range
        self.guidance_scale = guidance_scale
        self.teacher_batch = teacher_batch
        self.seeds = SeedStream(seed)
        self.sampler: TimestepSampler | None = None
        if strategy == "importance":
            self.sampler = TimestepSampler(len(teacher.schedule), t_range=t_range)

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        text: Text,
        *,
        seed: Int[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of `latents` under `text` (captions, or their conditioning from `teacher.encode_text`).

        Args:
            seed: replays a draw; a fresh one by default.

        Returns:
            A float32 scalar (float64 for float64 latents), differentiable once in `latents`.

        Raises:
            ValueError: latents of other channels, another number of captions, or another device than the teacher's.
        """
        self._check(latents, text)
        if seed is None:
            seed = self.seeds.next(latents.device)
        conditioning = self._conditioning(text)
        uncond = None if self.guidance_scale == 1.0 else self.teacher.encode_no_text().expand(len(latents))
        # Processes share the seed and take their rows of one global batch: as if one process had drawn it.
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        first = rank * len(latents)
        draw = sample_timesteps(
            self.teacher.schedule, processes * len(latents), self.draws, seed,
            strategy=self.strategy, t_range=self.t_range, weighting=self.weighting,
            cdf=None if self.sampler is None else self.sampler.cdf(latents.device),
        )  # fmt: skip
        draw = _rows(draw, slice(first, first + len(latents)))

        def losses_and_gradient(piece: Tensor, rows: slice, scale: float | None) -> tuple[Tensor, Tensor | None]:
            return self._losses_and_gradient(
                piece,
                conditioning[rows],
                None if uncond is None else uncond[rows],
                _rows(draw, rows),
                seed,
                first + rows.start,
                scale,
            )

        # One latent's gradient under `full` is about 1 / elements: inside the cut it is kept at about 1.
        scale = float(latents[0].numel()) if self.jacobian == "full" else 1.0
        needs_gradient = torch.is_grad_enabled() and latents.requires_grad
        loss, per_draw = _CutLoss.apply(
            latents, losses_and_gradient, self.teacher_batch or len(latents), scale if needs_gradient else None
        )
        if self.sampler is not None and self.training:
            self.sampler.update(draw.t, per_draw)
        return loss

    def _losses_and_gradient(
        self,
        latents: Tensor,
        text: TextConditioning,
        uncond: TextConditioning | None,
        draw: TimestepDraw,
        seed: Tensor,
        batch_offset: int,
        scale: float | None,
    ) -> tuple[Float[Tensor, "batch draws"], Float[Tensor, "batch channels height width"] | None]:
        """The draws' losses, and the gradient of their sum times `scale` in the latents where it is given."""
        through_teacher = scale is not None and self.jacobian == "full"
        with torch.set_grad_enabled(through_teacher):
            latents = latents.detach().requires_grad_(through_teacher)
            noised = add_noise(
                latents, draw.alpha_t, draw.sigma_t, seed, dtype=self.teacher.dtype, batch_offset=batch_offset
            )
            prediction, prediction_uncond = self._predict(noised, draw.t, text, uncond)
        arguments = (latents, draw.alpha_t, draw.sigma_t, draw.weight, seed)
        options: dict[str, Any] = {
            "prediction_type": self.teacher.schedule.prediction_type,
            "prediction_uncond": prediction_uncond,
            "guidance_scale": self.guidance_scale,
            "jacobian": self.jacobian,
            "batch_offset": batch_offset,
        }
        if scale is None:
            return sds_loss(prediction, *arguments, **options), None
        upstream = torch.full_like(draw.weight, scale)
        loss, of_prediction, of_latents, of_uncond = sds_loss_and_gradients(upstream, prediction, *arguments, **options)
        if not through_teacher:
            return loss, of_latents
        outputs = [prediction] if prediction_uncond is None else [prediction, prediction_uncond]
        gradients = [of_prediction] if prediction_uncond is None else [of_prediction, of_uncond]
        (gradient,) = torch.autograd.grad(outputs, latents, gradients)
        return loss, gradient if of_latents is None else gradient + of_latents

    def _predict(
        self, noised: Tensor, t: Tensor, text: TextConditioning, uncond: TextConditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's output under the text and, where guidance asks for it, under none."""
        shape = noised.shape
        flat, flat_t, text = noised.flatten(0, 1), t.flatten(), text.repeat_interleave(self.draws)
        if uncond is None:
            return self.teacher.predict(flat, flat_t, text).view(shape), None
        both = TextConditioning.cat([text, uncond.repeat_interleave(self.draws)])
        prediction = self.teacher.predict(torch.cat([flat] * 2), torch.cat([flat_t] * 2), both)
        with_text, without = prediction.chunk(2)
        return with_text.view(shape), without.view(shape)

    def _conditioning(self, text: Text) -> TextConditioning:
        if isinstance(text, TextConditioning):
            return text
        return TextConditioning(text) if isinstance(text, Tensor) else self.teacher.encode_text(text)

    def _check(self, latents: Tensor, text: Text) -> None:
        channels = self.teacher.latent_shape[0]
        if latents.dim() != 4 or latents.shape[1] != channels or len(latents) == 0 or not latents.is_floating_point():
            raise ValueError(
                f"latents: expected floating point [batch, {channels}, height, width] as the teacher takes, batch at "
                f"least 1, got {latents.dtype} {list(latents.shape)}"
            )
        if latents.device != self.teacher.device:
            raise ValueError(
                f"latents: expected on the teacher's device {self.teacher.device}, got {latents.device}; "
                f"move one with .to()"
            )
        if len(text) != len(latents):
            raise ValueError(f"text: expected one caption for each of {len(latents)} latents, got {len(text)}")


def _rows(draw: TimestepDraw, rows: slice) -> TimestepDraw:
    return TimestepDraw(*(value[rows] for value in draw))


class _CutLoss(torch.autograd.Function):
    """The mean of the draws' losses, computed piece by piece, and the losses themselves, without a gradient.

    The mean's gradient at the latents is ready after forward.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        latents: Tensor,
        losses_and_gradient: Callable[[Tensor, slice, float | None], tuple[Tensor, Tensor | None]],
        piece_size: int,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        losses, gradients = [], []
        for start in range(0, len(latents), piece_size):
            rows = slice(start, min(start + piece_size, len(latents)))
            loss, gradient = losses_and_gradient(wide[rows], rows, scale)
            losses.append(loss.detach())
            gradients.append(gradient)
        per_draw = torch.cat(losses)
        ctx.mark_non_differentiable(per_draw)
        if scale is not None:
            whole = torch.cat([gradient for gradient in gradients if gradient is not None])
            ctx.save_for_backward((whole / (scale * per_draw.numel())).to(latents.dtype))
        return per_draw.mean(), per_draw

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None
