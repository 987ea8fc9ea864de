"""`prefix_attention`: packed suffixes attend causally to themselves and to the prefix of their image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.ops import _checks, _dispatch, _extension, _triton


def prefix_attention(
    q: Float[Tensor, "batch queries heads head_dim"],
    k: Float[Tensor, "batch tokens heads head_dim"],
    v: Float[Tensor, "batch tokens heads head_dim"],
    prefix_k: Float[Tensor, "images prefix heads head_dim"],
    prefix_v: Float[Tensor, "images prefix heads head_dim"],
    offsets: Int[Tensor, "prompts+1"],
    max_length: int,
) -> Float[Tensor, "images queries heads head_dim"]:
    """Softmax attention of packed prompts that begin with the same prefix, with scale `head_dim**-0.5`.

    Token `j` of a prompt's suffix attends to the whole prefix of its image and to the tokens 0 to `j` of its suffix.
    The prefix's keys and values are read where they lie, and never copied per prompt.

    Args:
        q: a query for every token, or one for the last token of every prompt (`queries` is `prompts`).
        k, v: of the suffixes, one prompt's after the other's. `batch` is that of q: `images`, or 1 where the suffixes
            of all images are the same.
        prefix_k, prefix_v: of the prefix, at least one token.
        offsets: int32, rising: the suffix of prompt `p` is `k[:, offsets[p] : offsets[p + 1]]`, at least one token.
        max_length: tokens of the longest suffix.

    Returns:
        In the dtype of q (float32, float16, bfloat16 or float64); sums are float32, or float64 for float64.
        Differentiable in all of q, k, v, prefix_k and prefix_v; the gradients, sums over all prompts of an image or
        all images of a prompt, are the same in every run.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; the message names the argument.
    """
    out, _ = torch.ops.fastsds.prefix_attention(q, k, v, prefix_k, prefix_v, offsets, max_length)
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, offsets: Tensor, max_length: int
) -> None:
    _checks.check_floating("q", q)
    torch._check(q.dim() == 4, lambda: f"q: expected [batch, queries, heads, head_dim], got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        torch._check(
            tensor.dim() == 4 and tensor.shape[2:] == q.shape[2:],
            lambda: f"{name}: expected [batch, tokens, *{list(q.shape[2:])}] as q, got {list(tensor.shape)}",
        )
        torch._check(
            tensor.dtype == q.dtype, lambda: f"{name}: expected the dtype of q ({q.dtype}), got {tensor.dtype}"
        )
    torch._check(k.shape[0] == q.shape[0], lambda: f"k: expected the batch of q ({q.shape[0]}), got {k.shape[0]}")
    torch._check(v.shape == k.shape, lambda: f"v: expected the shape of k {list(k.shape)}, got {list(v.shape)}")
    torch._check(
        prefix_k.shape[1] >= 1, lambda: f"prefix_k: expected a prefix of at least 1 token, got {list(prefix_k.shape)}"
    )
    torch._check(
        prefix_v.shape == prefix_k.shape,
        lambda: f"prefix_v: expected the shape of prefix_k {list(prefix_k.shape)}, got {list(prefix_v.shape)}",
    )
    images = prefix_k.shape[0]
    torch._check(q.shape[0] in (1, images), lambda: f"q: expected a batch of 1 or of images={images}, got {q.shape[0]}")
    torch._check(
        offsets.dim() == 1 and offsets.shape[0] >= 2 and offsets.dtype == torch.int32,
        lambda: f"offsets: expected [prompts + 1] of torch.int32, got {list(offsets.shape)} of {offsets.dtype}",
    )
    prompts, tokens = offsets.shape[0] - 1, k.shape[1]
    torch._check(
        q.shape[1] in (prompts, tokens),
        lambda: f"q: expected queries for {tokens} tokens or {prompts} prompts, got {q.shape[1]}",
    )
    torch._check(
        1 <= max_length <= tokens, lambda: f"max_length: expected 1 to {tokens} (tokens of k), got {max_length}"
    )
    _checks.check_same_device(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, offsets=offsets)


def _empty(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, offsets: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """The result and the logarithms of the softmax's sums `[images, queries, heads]`, not filled."""
    shape = (prefix_k.shape[0], *q.shape[1:])
    return q.new_empty(shape), q.new_empty(shape[:-1], dtype=_checks.compute_dtype(q))


class _Padded(NamedTuple):
    """Where packed tokens lie in `[prompts, max_length]`."""

    slot: Tensor
    """[prompts, max_length]: number of the packed token; that of the last for padding."""
    inside: Tensor
    """[prompts, max_length]: no padding."""
    prompt: Tensor
    """[tokens]: the token's prompt."""
    step: Tensor
    """[tokens]: its number in the prompt's suffix."""

    @classmethod
    def of(cls, tokens: int, offsets: Tensor, max_length: int) -> _Padded:
        steps = torch.arange(max_length, device=offsets.device)
        slot = offsets[:-1, None] + steps
        number = torch.arange(tokens, device=offsets.device)
        prompt = torch.searchsorted(offsets[1:].contiguous(), number, right=True)
        return cls(slot.clamp(max=tokens - 1), slot < offsets[1:, None], prompt, number - offsets[prompt])


def _logits(q: Tensor, k: Tensor, prefix_k: Tensor, padded: _Padded, ends_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[images, prompts, steps, heads, head_dim]`, keys alike, and logits `[images, prompts, heads, steps,
    prefix + max_length]`, -inf where a query does not look."""
    images, length = prefix_k.shape[0], padded.slot.shape[1]
    q, k = (tensor.expand(images, -1, -1, -1) for tensor in (q, k))
    queries, keys = q[:, :, None] if ends_only else q[:, padded.slot], k[:, padded.slot]
    steps = torch.arange(length, device=q.device)
    visible = padded.inside[:, None] & (ends_only or steps <= steps[:, None])
    own = torch.einsum("icqhd,ickhd->ichqk", queries, keys).masked_fill(~visible[:, None], float("-inf"))
    shared = torch.einsum("icqhd,iphd->ichqp", queries, prefix_k)
    return queries, keys, torch.cat([shared, own], dim=-1) * q.shape[-1] ** -0.5


def reference(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, offsets: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: prompts padded to the longest."""
    dtype, (prefix, tokens) = _checks.compute_dtype(q), (prefix_k.shape[1], k.shape[1])
    results = _empty(q, k, v, prefix_k, prefix_v, offsets, max_length)
    q, k, v, prefix_k, prefix_v = (tensor.to(dtype) for tensor in (q, k, v, prefix_k, prefix_v))
    ends_only = q.shape[1] != tokens
    padded = _Padded.of(tokens, offsets, max_length)
    _, _, logits = _logits(q, k, prefix_k, padded, ends_only)
    values = v[:, padded.slot].expand(logits.shape[0], -1, -1, -1, -1)
    log_sums = logits.logsumexp(dim=-1)
    weights = (logits - log_sums.unsqueeze(-1)).exp()
    out = torch.einsum("ichqp,iphd->icqhd", weights[..., :prefix], prefix_v)
    out = out + torch.einsum("ichqk,ickhd->icqhd", weights[..., prefix:], values)
    for result, value in zip(results, (out, log_sums.transpose(2, 3)), strict=True):
        result.copy_(value[:, :, 0] if ends_only else value[:, padded.prompt, padded.step])
    return results


def _check_backward(
    grad: Tensor, out: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    offsets: Tensor, max_length: int, needs_suffix: bool,
) -> None:  # fmt: skip
    _check(q, k, v, prefix_k, prefix_v, offsets, max_length)
    expected = [prefix_k.shape[0], *q.shape[1:]]
    for name, tensor in (("grad", grad), ("out", out)):
        torch._check(
            list(tensor.shape) == expected,
            lambda: f"{name}: expected [images, queries, heads, head_dim] = {expected}, got {list(tensor.shape)}",
        )
    torch._check(
        list(log_sums.shape) == expected[:-1],
        lambda: f"log_sums: expected [images, queries, heads] = {expected[:-1]}, got {list(log_sums.shape)}",
    )


def _empty_backward(
    grad: Tensor, out: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    offsets: Tensor, max_length: int, needs_suffix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients in q, k, v, prefix_k and prefix_v, not filled; the first three empty where not needed."""
    suffix = (tensor.new_empty(tensor.shape if needs_suffix else (0,)) for tensor in (q, k, v))
    return *suffix, *(tensor.new_empty(tensor.shape) for tensor in (prefix_k, prefix_v))


def reference_backward(
    grad: Tensor, out: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    offsets: Tensor, max_length: int, needs_suffix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients, with the softmax made anew from `log_sums`."""
    gradients = _empty_backward(grad, out, log_sums, q, k, v, prefix_k, prefix_v, offsets, max_length, needs_suffix)
    dtype, (prefix, tokens) = log_sums.dtype, (prefix_k.shape[1], k.shape[1])
    grad, out, q, k, v, prefix_k, prefix_v = (x.to(dtype) for x in (grad, out, q, k, v, prefix_k, prefix_v))
    ends_only = q.shape[1] != tokens
    padded = _Padded.of(tokens, offsets, max_length)
    queries, keys, logits = _logits(q, k, prefix_k, padded, ends_only)
    values = v[:, padded.slot].expand(logits.shape[0], -1, -1, -1, -1)

    def pad(per_query: Tensor, fill: float = 0.0) -> Tensor:
        if ends_only:
            return per_query[:, :, None]
        inside = padded.inside.reshape(*padded.inside.shape, *[1] * (per_query.dim() - 2))
        return torch.where(inside, per_query[:, padded.slot], fill)

    # Padding has weights and gradients of zero, and so adds to no sum.
    grads = pad(grad)
    weights = (logits - pad(log_sums, float("inf")).transpose(2, 3).unsqueeze(-1)).exp()
    in_weights = torch.cat(
        [
            torch.einsum("icqhd,iphd->ichqp", grads, prefix_v),
            torch.einsum("icqhd,ickhd->ichqk", grads, values),
        ],
        dim=-1,
    )
    mean = pad((grad * out).sum(dim=-1)).transpose(2, 3).unsqueeze(-1)
    in_logits = weights * (in_weights - mean) * q.shape[-1] ** -0.5
    shared, own = in_logits[..., :prefix], in_logits[..., prefix:]
    gradients[3].copy_(torch.einsum("ichqp,icqhd->iphd", shared, queries))
    gradients[4].copy_(torch.einsum("ichqp,icqhd->iphd", weights[..., :prefix], grads))
    if needs_suffix:
        in_queries = torch.einsum("ichqp,iphd->icqhd", shared, prefix_k)
        in_queries = in_queries + torch.einsum("ichqk,ickhd->icqhd", own, keys)
        packed = [
            in_queries[:, :, 0] if ends_only else in_queries[:, padded.prompt, padded.step],
            torch.einsum("ichqk,icqhd->ickhd", own, queries)[:, padded.prompt, padded.step],
            torch.einsum("ichqk,icqhd->ickhd", weights[..., prefix:], grads)[:, padded.prompt, padded.step],
        ]
        for gradient, value in zip(gradients[:3], packed, strict=True):
            gradient.copy_(value.sum_to_size(gradient.shape))
    return gradients


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor offsets, SymInt max_length"
_dispatch.define(
    "prefix_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)", check=_check, fake=_empty, reference=reference
)
_dispatch.define(
    "prefix_attention_backward",
    f"(Tensor grad, Tensor out, Tensor log_sums, {_ARGUMENTS}, bool needs_suffix) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_empty_backward,
    reference=reference_backward,
)
_extension.register("prefix_attention", _empty)
_extension.register("prefix_attention_backward", _empty_backward)
_triton.register("prefix_attention", _empty)
_triton.register("prefix_attention_backward", _empty_backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.max_length = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    needs_suffix = any(ctx.needs_input_grad[:3])
    gradients = torch.ops.fastsds.prefix_attention_backward(grad, *ctx.saved_tensors, ctx.max_length, needs_suffix)
    needs = ctx.needs_input_grad[:5]
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


torch.library.register_autograd("fastsds::prefix_attention", _backward, setup_context=_setup_context)
