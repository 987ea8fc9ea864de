"""`embed_prompts` in Triton: a program looks up one token of one image, and norms it while it is in the registers."""

from __future__ import annotations

from importlib import import_module

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds.kernels import tiles


@triton.jit
def embed_prompts_kernel(
    ids,  # [tokens]
    token_embedding,  # [vocabulary, width]
    context,  # [images, vectors, width]
    attribute,  # [images, width]
    position_embedding,  # [context_length, width]
    positions,  # [tokens]
    norm_weight,  # [width]
    norm_bias,
    embeddings,  # [images, tokens, width]
    normed,
    tokens, vectors, width,
    HAS_CONTEXT: tl.constexpr, HAS_ATTRIBUTE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`token or vector + position`, and its LayerNorm. What is absent points at `token_embedding`."""
    program = tl.program_id(0)
    image, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    dtype: tl.constexpr = embeddings.dtype.element_ty
    number = tl.load(ids + token)
    vector = -1 - number
    x = tl.load(token_embedding + number * width + column, mask=mask & (number >= 0), other=0.0).to(dtype)
    if HAS_CONTEXT:
        here = mask & (number < 0) & (vector < vectors)
        row = tl.load(context + (image * vectors + vector) * width + column, mask=here, other=0.0)
        x = tl.where(here, row.to(dtype), x)
    if HAS_ATTRIBUTE:
        here = mask & (number < 0) & (vector == vectors)
        x = tl.where(here, tl.load(attribute + image * width + column, mask=here, other=0.0).to(dtype), x)
    x = x.to(COMPUTE)
    if HAS_POSITIONS:
        position = tl.load(positions + token)
        x += tl.load(position_embedding + position * width + column, mask=mask, other=0.0).to(dtype).to(COMPUTE)
    to = (image * tokens + token) * width + column
    tiles.store(embeddings + to, x, mask)
    if HAS_NORM:
        x = x.to(dtype).to(COMPUTE)  # as it was stored
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(mask, x - mean, 0.0)
        y = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + tl.full([], EPS, COMPUTE))
        if HAS_WEIGHT:
            y *= tl.load(norm_weight + column, mask=mask, other=0.0).to(COMPUTE)
        if HAS_BIAS:
            y += tl.load(norm_bias + column, mask=mask, other=0.0).to(COMPUTE)
        tiles.store(normed + to, y, mask)


@triton.jit
def in_vectors_kernel(
    grad,  # [images, tokens, width]
    grad_normed,
    embeddings,
    ids,  # [tokens]
    norm_weight,  # [width]
    in_context,  # [images, vectors, width]
    in_attribute,  # [images, width]
    tokens, vectors, first, count, width,
    EPS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in one learned vector of one image: the sum over the tokens in whose place it stands, in order."""
    program = tl.program_id(0)
    image, vector = (program // count).to(tl.int64), (program % count + first).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros([BLOCK], COMPUTE)
    for token in range(tokens):
        if tl.load(ids + token) == -1 - vector:
            at = (image * tokens + token) * width + column
            total += tl.load(grad + at, mask=mask, other=0.0).to(COMPUTE)
            if HAS_NORM:
                x = tl.load(embeddings + at, mask=mask, other=0.0).to(COMPUTE)
                upstream = tl.load(grad_normed + at, mask=mask, other=0.0).to(COMPUTE)
                if HAS_WEIGHT:
                    upstream *= tl.load(norm_weight + column, mask=mask, other=0.0).to(COMPUTE)
                centred = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
                inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + tl.full([], EPS, COMPUTE))
                whitened = centred * inverse
                along = tl.sum(upstream * whitened, axis=0) / width
                total += inverse * (upstream - tl.sum(upstream, axis=0) / width - whitened * along)
    if vector < vectors:
        tiles.store(in_context + (image * vectors + vector) * width + column, total, mask)
    else:
        tiles.store(in_attribute + image * width + column, total, mask)


def options(embeddings: Tensor) -> dict[str, object]:
    """What a launch is compiled for."""
    return {
        "COMPUTE": tl.float64 if embeddings.dtype == torch.float64 else tl.float32,
        "BLOCK": triton.next_power_of_2(embeddings.shape[-1]),
    }


def embed_prompts(
    results: tuple[Tensor, Tensor],  # embeddings, normed [images, *tokens, width]
    tokens: Tensor,
    token_embedding: Tensor,
    context: Tensor | None,
    attribute: Tensor | None,
    position_embedding: Tensor | None,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> None:
    """Fills `results`, which are contiguous."""
    embeddings, normed = results
    if embeddings.numel() == 0:
        return
    given = (context, attribute, position_embedding, positions, norm_weight, norm_bias)
    table = token_embedding.contiguous()
    with torch.cuda.device_of(tokens):
        embed_prompts_kernel[len(embeddings) * tokens.numel(),](
            tokens.contiguous(), table, *(table if tensor is None else tensor.contiguous() for tensor in given),
            embeddings, normed, tokens.numel(), 0 if context is None else context.shape[1], table.shape[1],
            HAS_CONTEXT=context is not None, HAS_ATTRIBUTE=attribute is not None, EPS=eps or 0.0,
            HAS_POSITIONS=positions is not None, HAS_NORM=eps is not None, HAS_WEIGHT=norm_weight is not None,
            HAS_BIAS=norm_bias is not None, **options(embeddings),
        )  # fmt: skip


def embed_prompts_backward(
    gradients: tuple[Tensor, ...],  # of context, attribute, and the four tensors of the tower; empty: not needed
    grad: Tensor,
    grad_normed: Tensor,
    embeddings: Tensor,
    tokens: Tensor,
    token_embedding: Tensor,
    context: Tensor | None,
    attribute: Tensor | None,
    position_embedding: Tensor | None,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype | None,
    needs: list[bool],
) -> None:
    """Fills `gradients`, which are contiguous. Where the tower's own tensors are trained, by the definition."""
    if any(needs[2:]):
        definition = import_module("fastsds.ops.embed_prompts").reference_backward(
            grad, grad_normed, embeddings, tokens, token_embedding, context, attribute, position_embedding, positions,
            norm_weight, norm_bias, eps, dtype, needs,
        )  # fmt: skip
        for gradient, value in zip(gradients, definition, strict=True):
            gradient.copy_(value)
        return
    in_context, in_attribute = gradients[:2]
    vectors = 0 if context is None else context.shape[1]
    first = 0 if context is not None and needs[0] else vectors
    last = vectors + (attribute is not None and needs[1])
    if (programs := len(embeddings) * (last - first)) == 0 or embeddings.shape[-1] == 0:
        return
    grad, grad_normed, embeddings = (tensor.contiguous() for tensor in (grad, grad_normed, embeddings))
    with torch.cuda.device_of(tokens):
        in_vectors_kernel[programs,](
            grad, grad_normed, embeddings, tokens.contiguous(), grad if norm_weight is None else norm_weight,
            in_context, in_attribute, tokens.numel(), vectors, first, last - first, embeddings.shape[-1],
            EPS=eps or 0.0, HAS_NORM=eps is not None, HAS_WEIGHT=norm_weight is not None, **options(embeddings),
            num_warps=8,
        )  # fmt: skip
