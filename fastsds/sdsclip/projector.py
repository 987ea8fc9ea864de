"""`h_w`: the linear map from CLIP's embedding to the teacher's latents, and its closed-form start."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LatentProjector(nn.Module):
    """One linear layer (*stated*), `[batch, embed_dim]` to `[batch, *latent_shape]`.

    For ViT-B/32 and Stable Diffusion: 512 to 4 x 64 x 64, 8,388,608 weights and 16,384 biases.
    """

    def __init__(self, embed_dim: int, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.linear = nn.Linear(embed_dim, math.prod(latent_shape))

    def forward(self, embedding: Float[Tensor, "batch embed_dim"]) -> Float[Tensor, "batch channels height width"]:
        return self.linear(embedding).unflatten(1, self.latent_shape)

    @torch.no_grad()
    def fit_ridge(
        self,
        pairs: Iterable[tuple[Float[Tensor, "batch embed_dim"], Float[Tensor, "batch channels height width"]]],
        ridge: float = 1e-3,
    ) -> float:
        """Sets the layer to the ridge regression of latents on embeddings: one streaming pass, one solve.

        With CLIP frozen this is the best linear map there is, without a learning rate (our *reading*: the paper's
        start of `h_w` is not known). The bias is not penalised.

        Args:
            pairs: batches of embeddings and the VAE latents of the same images.
            ridge: penalty, relative to the mean variance of the embedding's dimensions.

        Returns:
            The share of the latents' variance that the map explains on the same pairs.

        Raises:
            ValueError: no pairs, shapes that do not fit the layer, or embeddings that do not vary.
        """
        device = self.linear.weight.device
        width, target_width = self.linear.in_features, self.linear.out_features
        count = 0
        sum_x = torch.zeros(width, dtype=torch.float64, device=device)
        sum_y = torch.zeros(target_width, dtype=torch.float64, device=device)
        sum_yy = torch.zeros_like(sum_y)
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        cross = torch.zeros(width, target_width, dtype=torch.float64, device=device)
        for embedding, latents in pairs:
            if embedding.shape[1:] != (width,) or latents.shape[1:] != self.latent_shape:
                raise ValueError(
                    f"pairs: expected [batch, {width}] and [batch, {', '.join(map(str, self.latent_shape))}], "
                    f"got {list(embedding.shape)} and {list(latents.shape)}"
                )
            x, y = embedding.to(device, torch.float64), latents.flatten(1).to(device, torch.float64)
            count += len(x)
            sum_x += x.sum(0)
            sum_y += y.sum(0)
            sum_yy += y.square().sum(0)
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, y)
        if count == 0:
            raise ValueError("pairs: expected at least one batch, got none")
        mean_x, mean_y = sum_x / count, sum_y / count
        covariance = gram / count - torch.outer(mean_x, mean_x)
        cross = cross / count - torch.outer(mean_x, mean_y)
        scale = covariance.diagonal().mean()
        if not bool(scale > 1e-12):
            raise ValueError(f"pairs: expected embeddings that vary, got {count} with mean variance {scale.item():.2e}")
        penalised = covariance + ridge * scale * torch.eye(width, dtype=torch.float64, device=device)
        solution = torch.linalg.solve(penalised, cross)  # [embed_dim, latent elements]
        self.linear.weight.copy_(solution.T)
        self.linear.bias.copy_(mean_y - mean_x @ solution)
        variance = (sum_yy / count - mean_y.square()).sum()
        explained = 2 * (solution * cross).sum() - (solution * (covariance @ solution)).sum()
        return (explained / variance.clamp(min=1e-300)).item()
