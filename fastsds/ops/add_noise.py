"""`add_noise`: `z_t = alpha_t z + sigma_t eps` for several noise draws per latent; `eps` is never stored."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.ops import _checks, _dispatch, _extension, _layout, _triton


def add_noise(
    latents: Float[Tensor, "batch *latent"],
    alpha_t: Float[Tensor, "batch draws"],
    sigma_t: Float[Tensor, "batch draws"],
    seed: Int[Tensor, ""],
    *,
    dtype: torch.dtype | None = None,
    batch_offset: int = 0,
) -> Float[Tensor, "batch draws *latent"]:
    """Noises every latent `draws` times: `z_t = alpha_t * z + sigma_t * eps`, `eps` from `seed` (Philox).

    Args:
        latents: any shape after the batch; float32, float16, bfloat16 or float64; never written to.
        alpha_t, sigma_t: signal and noise scales, float32 or float64. Not differentiated.
        seed: one int64 on the device of `latents`. `sds_loss` with the same seed regenerates the same `eps`.
        dtype: of the result, e.g. the teacher's; that of `latents` by default.
        batch_offset: position of `latents[0]` in a larger logical batch, so that a slice gets the noise it has there.

    Returns:
        `[batch, draws, *latent]`, channels-last where `latents` are. The sum is made in float32 (float64 for
        float64 latents) and rounded once. Differentiable in `latents`.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; the message names the argument.
    """
    return torch.ops.fastsds.add_noise(latents, alpha_t, sigma_t, seed, dtype, batch_offset)


def _check(
    latents: Tensor, alpha_t: Tensor, sigma_t: Tensor, seed: Tensor, dtype: torch.dtype | None, batch_offset: int
) -> None:
    _checks.check_latents(latents)
    _checks.check_coefficients(latents.shape[0], alpha_t=alpha_t, sigma_t=sigma_t)
    _checks.check_seed(seed)
    _checks.check_same_device(latents=latents, alpha_t=alpha_t, sigma_t=sigma_t, seed=seed)
    _checks.check_batch_offset(batch_offset)
    _checks.expect(
        dtype is None or dtype in _checks.LATENT_DTYPES,
        lambda: f"dtype: expected one of {list(_checks.LATENT_DTYPES)} or None, got {dtype}",
    )


def _empty(
    latents: Tensor, alpha_t: Tensor, sigma_t: Tensor, seed: Tensor, dtype: torch.dtype | None, batch_offset: int
) -> Tensor:
    """The result, not filled: the memory format of `latents`, with batch and draws merged."""
    return _layout.empty((*alpha_t.shape, *latents.shape[1:]), latents, dtype=dtype)


def reference(
    latents: Tensor, alpha_t: Tensor, sigma_t: Tensor, seed: Tensor, dtype: torch.dtype | None, batch_offset: int
) -> Tensor:
    """The definition, in plain PyTorch."""
    eps = _checks.draw_noise(seed, latents, alpha_t.shape[1], batch_offset)
    signal = _checks.per_latent(alpha_t, latents) * latents.unsqueeze(1)
    noised = signal + _checks.per_latent(sigma_t, latents) * eps
    return _empty(latents, alpha_t, sigma_t, seed, dtype, batch_offset).copy_(noised)


def _check_backward(grad: Tensor, alpha_t: Tensor, dtype: torch.dtype) -> None:
    _checks.check_coefficients(grad.shape[0], alpha_t=alpha_t)
    _checks.expect(
        grad.shape[:2] == alpha_t.shape,
        lambda: f"grad: expected [batch, draws, *latent] of {list(alpha_t.shape)}, got {list(grad.shape)}",
    )
    _checks.check_floating("grad", grad)
    _checks.check_same_device(grad=grad, alpha_t=alpha_t)


def _empty_backward(grad: Tensor, alpha_t: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the latents, not filled: in the memory format of `grad`."""
    return _layout.empty((grad.shape[0], *grad.shape[2:]), grad, dtype=dtype)


def reference_backward(grad: Tensor, alpha_t: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum over draws of alpha_t * grad`, summed in float32 or wider, then in the dtype of the latents."""
    latents = _empty_backward(grad, alpha_t, dtype)
    alpha = _checks.per_latent(alpha_t, latents)
    return latents.copy_((alpha * grad).sum(dim=1))


_dispatch.define(
    "add_noise",
    "(Tensor latents, Tensor alpha_t, Tensor sigma_t, Tensor seed, ScalarType? dtype, SymInt batch_offset) -> Tensor",
    check=_check,
    fake=_empty,
    reference=reference,
)
_dispatch.define(
    "add_noise_backward",
    "(Tensor grad, Tensor alpha_t, ScalarType dtype) -> Tensor",
    check=_check_backward,
    fake=_empty_backward,
    reference=reference_backward,
)
_extension.register("add_noise", _empty)
_extension.register("add_noise_backward", _empty_backward)
_triton.register("add_noise", _empty)
_triton.register("add_noise_backward", _empty_backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    latents, alpha_t, *_ = inputs
    ctx.save_for_backward(alpha_t)
    ctx.latents_dtype = latents.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (alpha_t,) = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 6
    # Under create_graph the definition, which autograd differentiates in its turn.
    backward = reference_backward if torch.is_grad_enabled() else torch.ops.fastsds.add_noise_backward
    return backward(grad, alpha_t, ctx.latents_dtype), *(None,) * 5


torch.library.register_autograd("fastsds::add_noise", _backward, setup_context=_setup_context)
