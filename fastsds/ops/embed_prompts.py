"""`embed_prompts`: embeddings of prompts with learned vectors among their tokens, and the first LayerNorm of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.ops import _checks, _dispatch, _triton


class EmbeddedPrompts(NamedTuple):
    """Both `[images, *tokens, width]`, in the dtype that was asked for."""

    embeddings: Float[Tensor, "images *tokens width"]
    """Of the tokens and what stands in their place, with the positions' added."""
    normed: Float[Tensor, "images *tokens width"] | None
    """After the LayerNorm; None without one."""


def embed_prompts(
    tokens: Int[Tensor, "*tokens"],
    token_embedding: Float[Tensor, "vocabulary width"],
    *,
    context: Float[Tensor, "images vectors width"] | None = None,
    attribute: Float[Tensor, "images width"] | None = None,
    position_embedding: Float[Tensor, "context_length width"] | None = None,
    positions: Int[Tensor, "*tokens"] | None = None,
    norm_weight: Float[Tensor, "width"] | None = None,
    norm_bias: Float[Tensor, "width"] | None = None,
    eps: float | None = None,
    dtype: torch.dtype | None = None,
) -> EmbeddedPrompts:
    """Embeds token ids and, in the slots between them, every image's context vectors and attribute.

    An id of 0 or more is a row of `token_embedding`; `-1 - i` is context vector `i`; the attribute's id is the one
    after those of all context vectors. The ids have any shape: packed, `[tokens]`, or dense, `[classes, length]`.

    Args:
        tokens: int64.
        context, attribute: of any floating dtype. Without both of them the
            prompts are the same for all images, and `images` is 1.
        position_embedding, positions: `position_embedding[positions]` is added; positions are int64.
        norm_weight, norm_bias: scale and shift of the LayerNorm.
        eps: of the LayerNorm; None for none.
        dtype: that all embeddings are rounded to before they are added; that of `token_embedding` by default.

    Returns:
        Sums and the LayerNorm's statistics are float32 (float64 for float64); `normed` follows from the rounded
        `embeddings`. Differentiable in everything but ids and positions; gradients in context and attribute are sums
        over the tokens in whose place they stand, the same in every run.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; the message names the argument.
    """
    embeddings, normed = torch.ops.fastsds.embed_prompts(
        tokens, token_embedding, context, attribute, position_embedding, positions, norm_weight, norm_bias, eps, dtype
    )
    return EmbeddedPrompts(embeddings, None if eps is None else normed)


def _check(
    tokens: Tensor, token_embedding: Tensor, context: Tensor | None, attribute: Tensor | None,
    position_embedding: Tensor | None, positions: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    torch._check(
        token_embedding.dim() == 2,
        lambda: f"token_embedding: expected [vocabulary, width], got {list(token_embedding.shape)}",
    )
    width = token_embedding.shape[1]
    learned = {"context": context, "attribute": attribute}
    own = {"position_embedding": position_embedding, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in {"token_embedding": token_embedding, **learned, **own}.items():
        if tensor is not None:
            _checks.check_floating(name, tensor)
    for name, ids in (("tokens", tokens), ("positions", positions)):
        if ids is not None:
            torch._check(ids.dtype == torch.int64, lambda: f"{name}: expected torch.int64, got {ids.dtype}")
    if context is not None:
        torch._check(
            context.dim() == 3 and context.shape[2] == width,
            lambda: f"context: expected [images, vectors, width={width}], got {list(context.shape)}",
        )
    if attribute is not None:
        images = attribute.shape[0] if context is None else context.shape[0]
        torch._check(
            attribute.dim() == 2 and attribute.shape[0] == images and attribute.shape[1] == width,
            lambda: f"attribute: expected [images={images}, width={width}], got {list(attribute.shape)}",
        )
    torch._check(
        (position_embedding is None) == (positions is None),
        lambda: "positions: expected together with position_embedding, got one of them",
    )
    if position_embedding is not None and positions is not None:
        torch._check(
            position_embedding.dim() == 2 and position_embedding.shape[1] == width,
            lambda: (
                f"position_embedding: expected [context_length, width={width}], got {list(position_embedding.shape)}"
            ),
        )
        torch._check(
            positions.shape == tokens.shape,
            lambda: f"positions: expected the shape of tokens {list(tokens.shape)}, got {list(positions.shape)}",
        )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            torch._check(
                list(tensor.shape) == [width], lambda: f"{name}: expected [width={width}], got {list(tensor.shape)}"
            )
    torch._check(
        dtype is None or dtype in _checks.LATENT_DTYPES,
        lambda: f"dtype: expected one of {list(_checks.LATENT_DTYPES)} or None, got {dtype}",
    )
    _checks.check_same_device(token_embedding=token_embedding, tokens=tokens, positions=positions, **learned, **own)


def _images(context: Tensor | None, attribute: Tensor | None) -> int:
    return next((tensor.shape[0] for tensor in (context, attribute) if tensor is not None), 1)


def _empty(
    tokens: Tensor, token_embedding: Tensor, context: Tensor | None, attribute: Tensor | None,
    position_embedding: Tensor | None, positions: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float | None, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Embeddings and, unless `eps` is None, what the LayerNorm makes of them, not filled."""
    shape = (_images(context, attribute), *tokens.shape, token_embedding.shape[1])
    dtype = dtype or token_embedding.dtype
    normed_shape = (0,) if eps is None else shape
    return token_embedding.new_empty(shape, dtype=dtype), token_embedding.new_empty(normed_shape, dtype=dtype)


def reference(
    tokens: Tensor, token_embedding: Tensor, context: Tensor | None, attribute: Tensor | None,
    position_embedding: Tensor | None, positions: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float | None, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, in plain PyTorch."""
    embeddings, normed = _empty(
        tokens, token_embedding, context, attribute, position_embedding, positions, norm_weight, norm_bias, eps, dtype
    )
    dtype = embeddings.dtype
    values = token_embedding[tokens.clamp(min=0)].to(dtype).unsqueeze(0)
    vectors = [tensor for tensor in (context, None if attribute is None else attribute[:, None]) if tensor is not None]
    learned = torch.cat([tensor.to(dtype) for tensor in vectors], dim=1) if vectors else None
    if learned is not None and learned.shape[1]:
        values = torch.where(tokens.unsqueeze(-1) < 0, learned[:, (-1 - tokens).clamp(min=0)], values)
    if position_embedding is not None:
        values = values + position_embedding[positions].to(dtype)
    embeddings.copy_(values)
    if eps is not None:
        wide = _checks.compute_dtype(values)
        weight, bias = (None if tensor is None else tensor.to(wide) for tensor in (norm_weight, norm_bias))
        normed.copy_(F.layer_norm(embeddings.to(wide), embeddings.shape[-1:], weight, bias, eps))
    return embeddings, normed


def _check_backward(
    grad: Tensor, grad_normed: Tensor, embeddings: Tensor, tokens: Tensor, token_embedding: Tensor,
    context: Tensor | None, attribute: Tensor | None, position_embedding: Tensor | None, positions: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None,
    dtype: torch.dtype | None, needs: list[bool],
) -> None:  # fmt: skip
    _check(
        tokens, token_embedding, context, attribute, position_embedding, positions, norm_weight, norm_bias, eps, dtype
    )
    expected = [_images(context, attribute), *tokens.shape, token_embedding.shape[1]]
    for name, tensor in (("grad", grad), ("embeddings", embeddings)):
        torch._check(
            list(tensor.shape) == expected,
            lambda: f"{name}: expected [images, *tokens, width] = {expected}, got {list(tensor.shape)}",
        )
    expected = [0] if eps is None else expected
    torch._check(
        list(grad_normed.shape) == expected,
        lambda: f"grad_normed: expected {expected}, got {list(grad_normed.shape)}",
    )


def _empty_backward(
    grad: Tensor, grad_normed: Tensor, embeddings: Tensor, tokens: Tensor, token_embedding: Tensor,
    context: Tensor | None, attribute: Tensor | None, position_embedding: Tensor | None, positions: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None,
    dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients in context, attribute, token_embedding, position_embedding, norm_weight and norm_bias, not
    filled; empty where not needed."""
    tensors = (context, attribute, token_embedding, position_embedding, norm_weight, norm_bias)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else grad.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def reference_backward(
    grad: Tensor, grad_normed: Tensor, embeddings: Tensor, tokens: Tensor, token_embedding: Tensor,
    context: Tensor | None, attribute: Tensor | None, position_embedding: Tensor | None, positions: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None,
    dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients; those not in `needs` are empty."""
    gradients = _empty_backward(
        grad, grad_normed, embeddings, tokens, token_embedding, context, attribute, position_embedding, positions,
        norm_weight, norm_bias, eps, dtype, needs,
    )  # fmt: skip
    wide, width = _checks.compute_dtype(embeddings), token_embedding.shape[1]
    total = grad.to(wide)
    values: list[Tensor | None] = [None] * 6
    if eps is not None:
        x, upstream = embeddings.to(wide), grad_normed.to(wide)
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        inverse = (variance + eps).rsqrt()
        whitened = (x - mean) * inverse
        values[4] = (upstream * whitened).reshape(-1, width).sum(dim=0)
        values[5] = upstream.reshape(-1, width).sum(dim=0)
        scaled = upstream if norm_weight is None else upstream * norm_weight.to(wide)
        centred = scaled - scaled.mean(dim=-1, keepdim=True)
        total = total + inverse * (centred - whitened * (scaled * whitened).mean(dim=-1, keepdim=True))
    ids = tokens.reshape(-1)
    total = total.reshape(total.shape[0], ids.numel(), width)
    vectors = 0 if context is None else context.shape[1]
    # As a product with zeros and ones, which adds in the same order in every run.
    slots = -1 - torch.arange(vectors + 1, device=ids.device)
    in_slots = (slots[:, None] == ids).to(wide) @ total
    values[0], values[1] = in_slots[:, :vectors], in_slots[:, vectors]
    if needs[2]:
        of_tokens = total.sum(dim=0).masked_fill(ids[:, None] < 0, 0)
        values[2] = total.new_zeros(token_embedding.shape).index_add(0, ids.clamp(min=0), of_tokens)
    if needs[3] and position_embedding is not None and positions is not None:
        values[3] = total.new_zeros(position_embedding.shape).index_add(0, positions.reshape(-1), total.sum(dim=0))
    for gradient, value in zip(gradients, values, strict=True):
        if value is not None and gradient.shape == value.shape:
            gradient.copy_(value)
    return gradients


_ARGUMENTS = (
    "Tensor tokens, Tensor token_embedding, Tensor? context, Tensor? attribute, Tensor? position_embedding, "
    "Tensor? positions, Tensor? norm_weight, Tensor? norm_bias, float? eps, ScalarType? dtype"
)
_dispatch.define("embed_prompts", f"({_ARGUMENTS}) -> (Tensor, Tensor)", check=_check, fake=_empty, reference=reference)
_dispatch.define(
    "embed_prompts_backward",
    f"(Tensor grad, Tensor grad_normed, Tensor embeddings, {_ARGUMENTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_empty_backward,
    reference=reference_backward,
)
_triton.register("embed_prompts", _empty)
_triton.register("embed_prompts_backward", _empty_backward)

_DIFFERENTIABLE = (2, 3, 1, 4, 6, 7)  # positions in the op's arguments, in the order of the gradients


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, eps, dtype = inputs
    ctx.options = (eps, dtype)
    ctx.save_for_backward(output[0], *tensors)


def _backward(ctx, grad, grad_normed):  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[index] for index in _DIFFERENTIABLE]
    computed = torch.ops.fastsds.embed_prompts_backward(grad, grad_normed, *ctx.saved_tensors, *ctx.options, needs)
    gradients = [None] * 10
    for index, gradient, need in zip(_DIFFERENTIABLE, computed, needs, strict=True):
        gradients[index] = gradient if need else None
    return tuple(gradients)


torch.library.register_autograd("fastsds::embed_prompts", _backward, setup_context=_setup_context)
