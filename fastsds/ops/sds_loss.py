"""`sds_loss`: the noise residual of a teacher's prediction, squared, weighted and averaged, per noise draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.ops import _checks, _dispatch, _extension, _layout, _triton

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Jacobian = Literal["full", "skip"]
PREDICTION_TYPES, JACOBIANS = get_args(PredictionType), get_args(Jacobian)


def sds_loss(
    prediction: Float[Tensor, "batch draws *latent"],
    latents: Float[Tensor, "batch *latent"],
    alpha_t: Float[Tensor, "batch draws"],
    sigma_t: Float[Tensor, "batch draws"],
    weight: Float[Tensor, "batch draws"],
    seed: Int[Tensor, ""],
    *,
    prediction_type: PredictionType = "epsilon",
    prediction_uncond: Float[Tensor, "batch draws *latent"] | None = None,
    guidance_scale: float = 1.0,
    jacobian: Jacobian = "full",
    batch_offset: int = 0,
) -> Float[Tensor, "batch draws"]:
    """The score distillation loss of each draw, `weight * mean((eps_hat - eps)**2)`, always in eps-space.

    `eps` is regenerated from `seed`: the noise that `add_noise` used with it. `eps_hat` follows from the prediction
    type, with `z_t = alpha_t z + sigma_t eps`:

    | `prediction_type` | the teacher predicts | `eps_hat - eps` |
    |---|---|---|
    | `epsilon` | `eps` | `prediction - eps` |
    | `v_prediction` | `alpha_t eps - sigma_t z` (alpha² + sigma² = 1) | `alpha_t (prediction - v)` |
    | `sample` | `z` | `-alpha_t / sigma_t (prediction - z)` |
    | `flow` | `eps - z` (alpha + sigma = 1) | `alpha_t (prediction - (eps - z))` |

    Guidance, where `prediction_uncond` is given, is `uncond + guidance_scale * (text - uncond)`, the convention of
    diffusers, in which 1 means no guidance. Some score distillation code writes `text + s (text - uncond)` instead:
    pass `guidance_scale_from_offset(s)` for that.

    Args:
        prediction: the teacher's output for the noised latents and the text.
        latents: the latents before noising.
        alpha_t, sigma_t, weight: float32 or float64. Not differentiated; for a learned weight, pass ones and
            multiply the result.
        seed: one int64 on the device, as given to `add_noise`.
        jacobian: `full` is plain backpropagation of the loss: the gradient reaches `prediction` (and the teacher
            behind it) and, where the prediction type has `z` in its residual, `latents`. `skip` (DreamFusion) hands
            `weight * (eps_hat - eps)` straight to `latents` and nothing to `prediction`. The value is the same.
        batch_offset: position of `latents[0]` in a larger logical batch, as given to `add_noise`.

    Returns:
        float32 (float64 for float64 latents). The mean is over the latent's elements (a reading of the paper's
        squared norm).

    Raises:
        RuntimeError: a shape, dtype, device or name is not as above; the message names the argument.
    """
    return torch.ops.fastsds.sds_loss(
        prediction, latents, alpha_t, sigma_t, weight, seed, prediction_type, prediction_uncond, guidance_scale,
        jacobian, batch_offset,
    )  # fmt: skip


class LossAndGradients(NamedTuple):
    """The loss of each draw and its gradients under a given upstream gradient; None where not asked for."""

    loss: Float[Tensor, "batch draws"]
    """`[batch, draws]`, as `sds_loss` gives it."""
    prediction: Float[Tensor, "batch draws *latent"] | None
    """Gradient in the prediction, `[batch, draws, *latent]`."""
    latents: Float[Tensor, "batch *latent"] | None
    """Gradient in the latents, `[batch, *latent]`."""
    prediction_uncond: Float[Tensor, "batch draws *latent"] | None
    """Gradient in the unconditional prediction, `[batch, draws, *latent]`."""


def sds_loss_and_gradients(
    grad: Float[Tensor, "batch draws"],
    prediction: Float[Tensor, "batch draws *latent"],
    latents: Float[Tensor, "batch *latent"],
    alpha_t: Float[Tensor, "batch draws"],
    sigma_t: Float[Tensor, "batch draws"],
    weight: Float[Tensor, "batch draws"],
    seed: Int[Tensor, ""],
    *,
    prediction_type: PredictionType = "epsilon",
    prediction_uncond: Float[Tensor, "batch draws *latent"] | None = None,
    guidance_scale: float = 1.0,
    jacobian: Jacobian = "full",
    batch_offset: int = 0,
) -> LossAndGradients:
    """`sds_loss` and its backward in one pass, where the upstream gradient `grad` is known beforehand.

    Reads the prediction once and writes its gradient once; autograd, which learns `grad` only after the loss, has to
    read it twice. Gradients have the dtype and memory format of their tensors; under `full` the prediction's and the
    direct one of the latents (None for `epsilon`, which has none), under `skip` the latents' alone. Not
    differentiable itself.
    """
    full = jacobian == "full"
    needs = [full, not full or prediction_type != "epsilon", full and prediction_uncond is not None]
    loss, *gradients = torch.ops.fastsds.sds_loss_backward(
        grad, prediction.detach(), latents.detach(), alpha_t, sigma_t, weight, seed, prediction_type,
        None if prediction_uncond is None else prediction_uncond.detach(),
        guidance_scale, jacobian, batch_offset, needs,
    )  # fmt: skip
    return LossAndGradients(loss, *(value if need else None for value, need in zip(gradients, needs, strict=True)))


def guidance_scale_from_offset(offset_scale: float) -> float:
    """The `guidance_scale` that equals `text + offset_scale * (text - uncond)`."""
    return 1.0 + offset_scale


def _check(
    prediction: Tensor,
    latents: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    weight: Tensor,
    seed: Tensor,
    prediction_type: str,
    prediction_uncond: Tensor | None,
    guidance_scale: float,
    jacobian: str,
    batch_offset: int,
) -> None:
    _checks.check_latents(latents)
    _checks.check_coefficients(latents.shape[0], alpha_t=alpha_t, sigma_t=sigma_t, weight=weight)
    _checks.check_seed(seed)
    _checks.check_batch_offset(batch_offset)
    expected = alpha_t.shape + latents.shape[1:]
    for name, tensor in (("prediction", prediction), ("prediction_uncond", prediction_uncond)):
        if tensor is not None:
            _checks.check_floating(name, tensor)
            _checks.expect(
                tensor.shape == expected,
                lambda: f"{name}: expected [batch, draws, *latent] = {list(expected)}, got {list(tensor.shape)}",
            )
    _checks.check_same_device(
        latents=latents, prediction=prediction, prediction_uncond=prediction_uncond,
        alpha_t=alpha_t, sigma_t=sigma_t, weight=weight, seed=seed,
    )  # fmt: skip
    _checks.expect(
        prediction_type in PREDICTION_TYPES,
        lambda: f"prediction_type: expected one of {PREDICTION_TYPES}, got {prediction_type!r}",
    )
    _checks.expect(jacobian in JACOBIANS, lambda: f"jacobian: expected one of {JACOBIANS}, got {jacobian!r}")
    _checks.expect(
        prediction_uncond is not None or guidance_scale == 1.0,
        lambda: f"prediction_uncond: expected a tensor, because guidance_scale is {guidance_scale}, got None",
    )


def _empty(prediction: Tensor, latents: Tensor, alpha_t: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty(alpha_t.shape, dtype=_checks.compute_dtype(latents), device=latents.device)


def _residual(
    prediction: Tensor,
    latents: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    seed: Tensor,
    prediction_type: str,
    prediction_uncond: Tensor | None,
    guidance_scale: float,
    batch_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eps_hat - eps`, and its slopes in the guided prediction and in the latents: one number per draw each."""
    dtype = _checks.compute_dtype(latents)
    guided = prediction.to(dtype)
    if prediction_uncond is not None:
        uncond = prediction_uncond.to(dtype)
        guided = uncond + guidance_scale * (guided - uncond)
    alpha, sigma = _checks.per_latent(alpha_t, latents), _checks.per_latent(sigma_t, latents)
    z = latents.unsqueeze(1).to(dtype)
    eps = _checks.draw_noise(seed, latents, alpha_t.shape[1], batch_offset)
    if prediction_type == "epsilon":
        slope, target, slope_latents = torch.ones_like(alpha), eps, torch.zeros_like(alpha)
    elif prediction_type == "v_prediction":
        slope, target, slope_latents = alpha, alpha * eps - sigma * z, alpha * sigma
    elif prediction_type == "sample":
        slope, target, slope_latents = -alpha / sigma, z, alpha / sigma
    else:
        slope, target, slope_latents = alpha, eps - z, alpha
    return slope * (guided - target), slope, slope_latents


def reference(
    prediction: Tensor,
    latents: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    weight: Tensor,
    seed: Tensor,
    prediction_type: str,
    prediction_uncond: Tensor | None,
    guidance_scale: float,
    jacobian: str,
    batch_offset: int,
) -> Tensor:
    """The definition, in plain PyTorch."""
    arguments = (alpha_t, sigma_t, seed, prediction_type, prediction_uncond, guidance_scale, batch_offset)
    residual, _, _ = _residual(prediction, latents, *arguments)
    return (weight.to(residual.dtype) * residual.square().flatten(2).mean(dim=2)).contiguous()


def _check_backward(grad: Tensor, prediction: Tensor, latents: Tensor, alpha_t: Tensor, *arguments: Any) -> None:
    _check(prediction, latents, alpha_t, *arguments[:-1])
    _checks.expect(
        grad.shape == alpha_t.shape,
        lambda: f"grad: expected [batch, draws] = {list(alpha_t.shape)}, got {list(grad.shape)}",
    )
    _checks.check_same_device(latents=latents, grad=grad)


def _empty_backward(
    grad: Tensor, prediction: Tensor, latents: Tensor, alpha_t: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The loss and the gradients in prediction, latents and prediction_uncond, not filled; empty where not needed."""
    *_, prediction_uncond, _guidance_scale, _jacobian, _batch_offset, needs = arguments
    gradients = (
        _layout.empty(tensor.shape, tensor) if tensor is not None and need else latents.new_empty(0)
        for tensor, need in zip((prediction, latents, prediction_uncond), needs, strict=True)
    )
    return _empty(prediction, latents, alpha_t), *gradients


def reference_backward(
    grad: Tensor,
    prediction: Tensor,
    latents: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    weight: Tensor,
    seed: Tensor,
    prediction_type: str,
    prediction_uncond: Tensor | None,
    guidance_scale: float,
    jacobian: str,
    batch_offset: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The loss, and the gradients in prediction, latents and prediction_uncond; those not in `needs` are empty."""
    arguments = (alpha_t, sigma_t, seed, prediction_type, prediction_uncond, guidance_scale, batch_offset)
    residual, slope, slope_latents = _residual(prediction, latents, *arguments)
    loss, *gradients = _empty_backward(
        grad, prediction, latents, alpha_t, prediction_uncond, guidance_scale, jacobian, batch_offset, needs
    )
    loss.copy_(weight.to(residual.dtype) * residual.square().flatten(2).mean(dim=2))
    scaled = _checks.per_latent(grad.to(residual.dtype) * weight, latents) * residual
    if jacobian == "skip":
        nothing = torch.zeros_like(scaled)
        values = (nothing, scaled.sum(dim=1), nothing)
    else:
        scaled = scaled * (2.0 / max(math.prod(latents.shape[1:]), 1))
        text_share = 1.0 if prediction_uncond is None else guidance_scale
        in_guided = slope * scaled
        values = (text_share * in_guided, (slope_latents * scaled).sum(dim=1), (1.0 - text_share) * in_guided)
    for gradient, value in zip(gradients, values, strict=True):
        if gradient.shape == value.shape:
            gradient.copy_(value)
    return loss, *gradients


_ARGUMENTS = (
    "Tensor prediction, Tensor latents, Tensor alpha_t, Tensor sigma_t, Tensor weight, Tensor seed, "
    "str prediction_type, Tensor? prediction_uncond, float guidance_scale, str jacobian, SymInt batch_offset"
)
_dispatch.define(
    "sds_loss",
    f"({_ARGUMENTS}) -> Tensor",
    check=_check,
    fake=_empty,
    reference=reference,
)
_dispatch.define(
    "sds_loss_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_empty_backward,
    reference=reference_backward,
)
_extension.register("sds_loss", _empty)
_triton.register("sds_loss", _empty)
_extension.register("sds_loss_backward", _empty_backward)
_triton.register("sds_loss_backward", _empty_backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, prediction_type, prediction_uncond, guidance_scale, jacobian, batch_offset = inputs
    ctx.save_for_backward(*tensors, prediction_uncond)
    ctx.options = (prediction_type, guidance_scale, jacobian, batch_offset)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    *tensors, prediction_uncond = ctx.saved_tensors
    prediction_type, guidance_scale, jacobian, batch_offset = ctx.options
    differentiable = jacobian == "full"
    needs = [
        ctx.needs_input_grad[0] and differentiable,
        ctx.needs_input_grad[1] and not (differentiable and prediction_type == "epsilon"),
        ctx.needs_input_grad[7] and differentiable,
    ]
    # Under create_graph the definition, which autograd differentiates in its turn.
    backward: Callable[..., Any] = (
        reference_backward if torch.is_grad_enabled() else torch.ops.fastsds.sds_loss_backward
    )
    _, *gradients = backward(
        grad, *tensors, prediction_type, prediction_uncond, guidance_scale, jacobian, batch_offset, needs
    )
    prediction, latents, uncond = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return prediction, latents, *(None,) * 5, uncond, *(None,) * 3


torch.library.register_autograd("fastsds::sds_loss", _backward, setup_context=_setup_context)
