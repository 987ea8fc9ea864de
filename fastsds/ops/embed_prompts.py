"""`embed_prompts`: token and position embeddings with learned vectors in their slots, and the first LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_prompts(
    token_embedding: Tensor,
    position_embedding: Tensor | None,
    tokens: Tensor,
    positions: Tensor | None,
    context: Tensor | None = None,
    attribute: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    dtype = token_embedding.dtype
    embeddings = token_embedding[tokens.clamp(min=0)].unsqueeze(0)
    if context is not None or attribute is not None:
        learned = torch.cat(
            [v.to(dtype) for v in (context, None if attribute is None else attribute.unsqueeze(1)) if v is not None], 1
        )
        is_slot = tokens < 0
        embeddings = torch.where(
            is_slot.unsqueeze(-1), learned[:, (-1 - tokens).clamp(0, learned.shape[1] - 1)], embeddings
        )
    if position_embedding is None or positions is None:
        return embeddings, embeddings
    embeddings = embeddings + position_embedding[positions].to(dtype)
    return embeddings, F.layer_norm(embeddings, embeddings.shape[-1:], norm_weight, norm_bias, eps)
