"""What fastsds is measured against: the loss in eager PyTorch, operation by operation as threestudio writes it.

`torch.compile` takes the same functions. Each gives what is differentiated; `gradients` in `cases` does the rest for
every contender alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def draw_timesteps(
    alphas_cumprod: Float[Tensor, "timesteps"], batch: int, draws: int, strategy: str, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Timesteps `[batch, draws]` with their alpha_t, sigma_t and weight: a draw and a chain of gathers.

    Args:
        probabilities: of the timesteps, for `importance`.
    """
    timesteps, count, device = len(alphas_cumprod), batch * draws, alphas_cumprod.device
    correction: Tensor | float = 1.0
    if strategy == "uniform":
        t = torch.randint(0, timesteps, (batch, draws), device=device)
    elif strategy == "antithetic":
        half = torch.randint(0, timesteps, ((count + 1) // 2,), device=device)
        t = torch.stack([half, timesteps - 1 - half], dim=1).flatten()[:count].view(batch, draws)
    else:
        place = torch.rand(draws, batch, device=device).argsort(dim=1).T
        part = torch.rand(batch, draws, device=device).argsort(dim=1)
        quantile = (part * batch + place.gather(1, part) + torch.rand(batch, draws, device=device)) / count
        if strategy == "stratified":
            t = (quantile * timesteps).long().clamp(max=timesteps - 1)
        else:
            t = torch.searchsorted(probabilities.cumsum(0), quantile).clamp(max=timesteps - 1)
            correction = 1.0 / (timesteps * probabilities[t])
    alpha_t = alphas_cumprod[t] ** 0.5
    sigma_t = (1 - alphas_cumprod[t]) ** 0.5
    return t, alpha_t, sigma_t, (1 - alphas_cumprod[t]) * correction


def add_noise(
    latents: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    t: Int[Tensor, "n"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, "n *latent"]:
    """As diffusers' schedulers: both coefficients gathered at each call, two multiplications and a sum."""
    alphas_cumprod = alphas_cumprod.to(latents.dtype)
    ones = [1] * (latents.dim() - 1)
    alpha_t = (alphas_cumprod[t] ** 0.5).view(-1, *ones)
    sigma_t = ((1 - alphas_cumprod[t]) ** 0.5).view(-1, *ones)
    return alpha_t * latents + sigma_t * noise


def noised(
    latents: Float[Tensor, "batch *latent"],
    t: Int[Tensor, "batch draws"],
    alphas_cumprod: Float[Tensor, "timesteps"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"]]:
    """Noised latents in the teacher's dtype, and the noise, of `batch * draws` rows."""
    repeated = latents.repeat_interleave(t.shape[1], dim=0)
    noise = torch.randn_like(repeated)
    return add_noise(repeated, noise, t.flatten(), alphas_cumprod).to(dtype), noise


def full_loss(
    prediction: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    t: Int[Tensor, "batch draws"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, ""]:
    """`w(t) ‖prediction - noise‖²`, to be differentiated through the U-Net."""
    weight = (1 - alphas_cumprod[t.flatten()]).view(-1, *[1] * (noise.dim() - 1))
    return (weight * F.mse_loss(prediction.float(), noise, reduction="none")).mean()


def skip_loss(
    latents: Float[Tensor, "batch *latent"],
    prediction: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    t: Int[Tensor, "batch draws"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, ""]:
    """DreamFusion's gradient `w(t) (prediction - noise)`, handed to the latents by a squared error against a target."""
    repeated = latents.repeat_interleave(t.shape[1], dim=0)
    with torch.no_grad():
        weight = (1 - alphas_cumprod[t.flatten()]).view(-1, *[1] * (noise.dim() - 1))
        gradient = torch.nan_to_num(weight * (prediction.float() - noise))
        target = repeated - gradient
    return 0.5 * F.mse_loss(repeated, target, reduction="sum") / len(repeated)


def full_step(
    latents: Tensor, prediction: Tensor, alphas_cumprod: Tensor, draws: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Everything around the U-Net whose output `prediction` is, by backpropagation: noised latents and loss."""
    t = torch.randint(0, len(alphas_cumprod), (len(latents), draws), device=latents.device)
    noised_latents, noise = noised(latents, t, alphas_cumprod, dtype)
    return noised_latents, full_loss(prediction, noise, t, alphas_cumprod)


def skip_step(
    latents: Tensor, prediction: Tensor, alphas_cumprod: Tensor, draws: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Everything around the U-Net whose output `prediction` is, without its Jacobian: noised latents and loss."""
    t = torch.randint(0, len(alphas_cumprod), (len(latents), draws), device=latents.device)
    with torch.no_grad():
        noised_latents, noise = noised(latents, t, alphas_cumprod, dtype)
    return noised_latents, skip_loss(latents, prediction, noise, t, alphas_cumprod)
