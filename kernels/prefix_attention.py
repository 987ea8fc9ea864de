"""`prefix_attention` in Triton: blocks of packed queries of many prompts, keys and values read where they lie.

A query sees the whole prefix and the run of suffix tokens from its prompt's start to its own position, so a block of
queries sees one run of keys, from the start of its first prompt to the position of its last query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds.kernels import tiles

PREFIX_BLOCK = 16  # keys of the prefix; the least that a matrix product takes
FORWARD_WARPS, IN_QUERIES_WARPS, IN_KEYS_WARPS = {2: 8, 4: 8, 8: 4}, {2: 8, 4: 4, 8: 8}, {2: 8, 4: 8, 8: 8}


@triton.jit
def locate(queries, heads, BLOCK: tl.constexpr):
    """The image, head and block that this program works on, int64."""
    program, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK)
    image = program // (blocks * heads)
    return image.to(tl.int64), (program // blocks % heads).to(tl.int64), (program % blocks).to(tl.int64)


@triton.jit
def prompt_of(offsets, token, prompts, STEPS: tl.constexpr):
    """The prompt whose suffix holds a packed token: the last one that starts at it or before."""
    prompt = tl.zeros_like(token)
    for step in tl.static_range(STEPS):
        candidate = prompt + (1 << (STEPS - 1 - step))
        start = tl.load(offsets + candidate, mask=candidate < prompts, other=0)
        prompt = tl.where((candidate < prompts) & (start <= token), candidate, prompt)
    return prompt


@triton.jit
def span(offsets, query, inside, prompts, ENDS_ONLY: tl.constexpr, STEPS: tl.constexpr):
    """The first and the last suffix token that queries see; an empty span outside."""
    if ENDS_ONLY:
        first = tl.load(offsets + query, mask=inside, other=0)
        last = tl.load(offsets + query + 1, mask=inside, other=0) - 1
    else:
        prompt = prompt_of(offsets, tl.where(inside, query, 0), prompts, STEPS)
        first, last = tl.load(offsets + prompt), tl.where(inside, query, -1)
    return first.to(tl.int64), last.to(tl.int64)


@triton.jit
def rows(pointer, number, stride, inside, dim, BLOCK_DIM: tl.constexpr):
    """`[numbers, BLOCK_DIM]` of one head, zero outside."""
    column = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (column < dim)[None, :]
    return tl.load(pointer + number[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def product(a, b, COMPUTE: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=COMPUTE)


@triton.jit
def gather_values(scores, seen, values, largest, total, attended, COMPUTE: tl.constexpr):
    """One step of the running softmax: scores `[queries, keys]` of the keys whose values are given."""
    scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp(largest - now)
    weights = tl.exp(scores - now[:, None])
    attended = attended * shrink[:, None] + product(weights.to(values.dtype), values, COMPUTE)
    return now, total * shrink + tl.sum(weights, axis=1), attended


@triton.jit
def prefix_attention_kernel(
    q,  # [images, queries, heads, dim]
    k,  # [images, tokens, heads, dim]
    v,
    prefix_k,  # [images, prefix, heads, dim]
    prefix_v,
    offsets,  # [prompts + 1]
    out,  # [images, queries, heads, dim]
    log_sums,  # [images, queries, heads]
    q_image, q_token, k_image, k_token, v_image, v_token, pk_image, pk_token, pv_image, pv_token,  # strides
    queries, prompts, prefix, heads, dim,
    SCALE: tl.constexpr, ENDS_ONLY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PREFIX: tl.constexpr,
    BLOCK_DIM: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What a block of queries attends to, and the logarithms of its softmax's sums."""
    scale = tl.full([], SCALE, COMPUTE)
    image, head, block = locate(queries, heads, BLOCK)
    query = block * BLOCK + tl.arange(0, BLOCK)
    inside = query < queries
    first, last = span(offsets, query, inside, prompts, ENDS_ONLY, STEPS)
    column = head * dim
    asked = rows(q + image * q_image + column, query, q_token, inside, dim, BLOCK_DIM)
    largest = tl.full([BLOCK], float("-inf"), COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    attended = tl.zeros([BLOCK, BLOCK_DIM], COMPUTE)
    for start in range(0, prefix, BLOCK_PREFIX):
        key = start + tl.arange(0, BLOCK_PREFIX).to(tl.int64)
        keys = rows(prefix_k + image * pk_image + column, key, pk_token, key < prefix, dim, BLOCK_DIM)
        values = rows(prefix_v + image * pv_image + column, key, pv_token, key < prefix, dim, BLOCK_DIM)
        scores = scale * product(asked, tl.trans(keys), COMPUTE)
        seen = (key < prefix)[None, :] & (query >= 0)[:, None]
        largest, total, attended = gather_values(scores, seen, values, largest, total, attended, COMPUTE)
    for start in range(tl.min(tl.where(inside, first, 2**62)), tl.max(last) + 1, BLOCK):
        key = start + tl.arange(0, BLOCK).to(tl.int64)
        stored = key <= tl.max(last)
        keys = rows(k + image * k_image + column, key, k_token, stored, dim, BLOCK_DIM)
        values = rows(v + image * v_image + column, key, v_token, stored, dim, BLOCK_DIM)
        scores = scale * product(asked, tl.trans(keys), COMPUTE)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        largest, total, attended = gather_values(scores, seen, values, largest, total, attended, COMPUTE)
    row = (image * queries + query) * heads + head
    depth = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (depth < dim)[None, :]
    tiles.store(out + row[:, None] * dim + depth[None, :], attended / total[:, None], mask)
    tl.store(log_sums + row, largest + tl.log(total), mask=inside)


@triton.jit
def in_scores(asked, upstream, keys, values, mean, log_sum, seen, scale, COMPUTE: tl.constexpr):
    """The softmax's weights `[queries, keys]`, made anew, and the gradients in `scale q k`, times `scale`."""
    scores = scale * product(asked, tl.trans(keys), COMPUTE)
    weights = tl.where(seen, tl.exp(scores - log_sum[:, None]), 0.0)
    return weights, scale * weights * (product(upstream, tl.trans(values), COMPUTE) - mean[:, None])


@triton.jit
def in_queries_kernel(
    grad,  # [images, queries, heads, dim]
    out,
    log_sums,  # [images, queries, heads]
    q, k, v, prefix_k, prefix_v, offsets,
    means,  # [images, queries, heads], written: the products of grad and out
    in_q,  # [images, queries, heads, dim]
    in_prefix,  # [2, images, blocks, prefix, heads, dim], every block's share of the sums over queries
    q_image, q_token, k_image, k_token, v_image, v_token, pk_image, pk_token, pv_image, pv_token,
    images, queries, prompts, prefix, heads, dim,
    SCALE: tl.constexpr, NEEDS_Q: tl.constexpr, ENDS_ONLY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_PREFIX: tl.constexpr, BLOCK_DIM: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient in a block of queries, and the block's share of those in the prefix."""
    scale = tl.full([], SCALE, COMPUTE)
    image, head, block = locate(queries, heads, BLOCK)
    query = block * BLOCK + tl.arange(0, BLOCK)
    inside = query < queries
    first, last = span(offsets, query, inside, prompts, ENDS_ONLY, STEPS)
    column = head * dim
    depth = tl.arange(0, BLOCK_DIM)
    dense = image * queries * heads * dim + column
    asked = rows(q + image * q_image + column, query, q_token, inside, dim, BLOCK_DIM)
    upstream = rows(grad + dense, query, heads * dim, inside, dim, BLOCK_DIM)
    attended = rows(out + dense, query, heads * dim, inside, dim, BLOCK_DIM)
    row = (image * queries + query) * heads + head
    mean = tl.sum(upstream.to(COMPUTE) * attended.to(COMPUTE), axis=1)
    tl.store(means + row, mean, mask=inside)
    log_sum = tl.load(log_sums + row, mask=inside, other=0.0)
    total = tl.zeros([BLOCK, BLOCK_DIM], COMPUTE)
    blocks = tl.cdiv(queries, BLOCK)
    for start in range(0, prefix, BLOCK_PREFIX):
        key = start + tl.arange(0, BLOCK_PREFIX).to(tl.int64)
        keys = rows(prefix_k + image * pk_image + column, key, pk_token, key < prefix, dim, BLOCK_DIM)
        values = rows(prefix_v + image * pv_image + column, key, pv_token, key < prefix, dim, BLOCK_DIM)
        seen = (key < prefix)[None, :] & inside[:, None]
        weights, in_score = in_scores(asked, upstream, keys, values, mean, log_sum, seen, scale, COMPUTE)
        share = (((image * blocks + block) * prefix + key) * heads + head) * dim
        mask = (key < prefix)[:, None] & (depth < dim)[None, :]
        to = in_prefix + share[:, None] + depth[None, :]
        tl.store(to, product(tl.trans(in_score.to(asked.dtype)), asked, COMPUTE), mask=mask)
        of_values = tl.cast(images, tl.int64) * blocks * prefix * heads * dim
        tl.store(to + of_values, product(tl.trans(weights.to(asked.dtype)), upstream, COMPUTE), mask=mask)
        if NEEDS_Q:
            total += product(in_score.to(asked.dtype), keys, COMPUTE)
    if NEEDS_Q:
        for start in range(tl.min(tl.where(inside, first, 2**62)), tl.max(last) + 1, BLOCK):
            key = start + tl.arange(0, BLOCK).to(tl.int64)
            stored = key <= tl.max(last)
            keys = rows(k + image * k_image + column, key, k_token, stored, dim, BLOCK_DIM)
            values = rows(v + image * v_image + column, key, v_token, stored, dim, BLOCK_DIM)
            seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
            _, in_score = in_scores(asked, upstream, keys, values, mean, log_sum, seen, scale, COMPUTE)
            total += product(in_score.to(asked.dtype), keys, COMPUTE)
        mask = inside[:, None] & (depth < dim)[None, :]
        tiles.store(in_q + dense + query[:, None] * heads * dim + depth[None, :], total, mask)


@triton.jit
def in_keys_kernel(
    grad, log_sums, means, q, k, v, offsets,
    in_k,  # [images, tokens, heads, dim]
    in_v,
    q_image, q_token, k_image, k_token, v_image, v_token,
    queries, tokens, prompts, heads, dim,
    SCALE: tl.constexpr, ENDS_ONLY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradients in a block of the suffixes' keys and values, from the queries that see them."""
    scale = tl.full([], SCALE, COMPUTE)
    image, head, block = locate(tokens, heads, BLOCK)
    key = block * BLOCK + tl.arange(0, BLOCK)
    stored = key < tokens
    column = head * dim
    depth = tl.arange(0, BLOCK_DIM)
    keys = rows(k + image * k_image + column, key, k_token, stored, dim, BLOCK_DIM)
    values = rows(v + image * v_image + column, key, v_token, stored, dim, BLOCK_DIM)
    highest = tl.minimum(block * BLOCK + BLOCK, tokens) - 1
    prompt = prompt_of(offsets, tl.where(stored, key, highest), prompts, STEPS).to(tl.int64)
    # The queries that see a key: its prompt's one, or those from its own position to the prompt's end.
    if ENDS_ONLY:
        lowest, above = prompt, prompt + 1
    else:
        lowest, above = key, tl.load(offsets + prompt + 1).to(tl.int64)
    begin, end = tl.min(lowest), tl.max(above)
    in_keys = tl.zeros([BLOCK, BLOCK_DIM], COMPUTE)
    in_values = tl.zeros([BLOCK, BLOCK_DIM], COMPUTE)
    for start in range(begin, end, BLOCK):
        query = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = query < end
        asked = rows(q + image * q_image + column, query, q_token, inside, dim, BLOCK_DIM)
        upstream = rows(grad + image * queries * heads * dim + column, query, heads * dim, inside, dim, BLOCK_DIM)
        row = (image * queries + query) * heads + head
        mean, log_sum = tl.load(means + row, mask=inside, other=0.0), tl.load(log_sums + row, mask=inside, other=0.0)
        seen = (query[:, None] >= lowest[None, :]) & (query[:, None] < above[None, :]) & inside[:, None]
        weights, in_score = in_scores(asked, upstream, keys, values, mean, log_sum, seen, scale, COMPUTE)
        in_keys += product(tl.trans(in_score.to(asked.dtype)), asked, COMPUTE)
        in_values += product(tl.trans(weights.to(asked.dtype)), upstream, COMPUTE)
    to = ((image * tokens + key) * heads + head)[:, None] * dim + depth[None, :]
    mask = stored[:, None] & (depth < dim)[None, :]
    tiles.store(in_k + to, in_keys, mask)
    tiles.store(in_v + to, in_values, mask)


def readable(tensor: Tensor, images: int) -> Tensor:
    """Expanded to all images, with the heads of a token together; a copy only where it does not lie so."""
    together = tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]
    return (tensor if together else tensor.contiguous()).expand(images, -1, -1, -1)


def strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def block_of(q: Tensor) -> int:
    """Queries or keys of suffixes that a program works on: fewer where no 16-bit tensor cores multiply."""
    return 32 if q.dtype.itemsize == 2 else 16


def options(q: Tensor, offsets: Tensor, warps: dict[int, int]) -> dict[str, object]:
    """What a launch is compiled for; `warps` by the bytes of an element, so that no register spills on any GPU."""
    return {
        "num_warps": warps[q.dtype.itemsize],
        "STEPS": (offsets.shape[0] - 1).bit_length(),
        "BLOCK": block_of(q),
        "BLOCK_DIM": max(16, triton.next_power_of_2(q.shape[3])),
        "COMPUTE": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def prefix_attention(
    results: tuple[Tensor, Tensor],  # out [images, queries, heads, dim], log_sums [images, queries, heads]
    q: Tensor,  # [images or 1, queries, heads, dim]
    k: Tensor,  # [images or 1, tokens, heads, dim]
    v: Tensor,
    prefix_k: Tensor,  # [images, prefix, heads, dim]
    prefix_v: Tensor,
    offsets: Tensor,  # [prompts + 1]
    max_length: int,
) -> None:
    """Fills `results`, which are contiguous."""
    (images, prefix), (queries, heads, dim) = prefix_k.shape[:2], q.shape[1:]
    ends_only = queries != k.shape[1]
    read = [readable(tensor, images) for tensor in (q, k, v, prefix_k, prefix_v)]
    grid = (images * heads * triton.cdiv(queries, block_of(q)),)
    if images == 0:
        return
    with torch.cuda.device_of(q):
        prefix_attention_kernel[grid](
            *read, offsets.contiguous(), *results, *strides(*read), queries, offsets.shape[0] - 1, prefix, heads, dim,
            SCALE=dim**-0.5, ENDS_ONLY=ends_only, BLOCK_PREFIX=PREFIX_BLOCK, **options(q, offsets, FORWARD_WARPS),
        )  # fmt: skip


def prefix_attention_backward(
    gradients: tuple[Tensor, ...],  # of the shapes of q, k, v, prefix_k, prefix_v
    grad: Tensor,  # [images, queries, heads, dim]
    out: Tensor,
    log_sums: Tensor,  # [images, queries, heads]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    offsets: Tensor,
    max_length: int,
    needs_suffix: bool,
) -> None:
    """Fills `gradients`, which are contiguous. Sums over blocks of queries are added up in order."""
    (images, prefix), (queries, heads, dim), tokens = prefix_k.shape[:2], q.shape[1:], k.shape[1]
    if images == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    ends_only, prompts = queries != tokens, offsets.shape[0] - 1
    read = [readable(tensor, images) for tensor in (q, k, v, prefix_k, prefix_v)]
    grad, out, offsets = grad.contiguous(), out.contiguous(), offsets.contiguous()
    blocks = triton.cdiv(queries, block_of(q))
    shared = needs_suffix and q.shape[0] != images
    in_q, in_k, in_v = (
        log_sums.new_empty((images, *gradient.shape[1:])) if shared else gradient for gradient in gradients[:3]
    )
    means = torch.empty_like(log_sums)
    in_prefix = log_sums.new_empty((2, images, blocks, prefix, heads, dim))
    with torch.cuda.device_of(q):
        in_queries_kernel[images * heads * blocks,](
            grad, out, log_sums, *read, offsets, means, in_q, in_prefix, *strides(*read), images, queries, prompts,
            prefix, heads, dim, SCALE=dim**-0.5, NEEDS_Q=needs_suffix, ENDS_ONLY=ends_only, BLOCK_PREFIX=PREFIX_BLOCK,
            **options(q, offsets, IN_QUERIES_WARPS),
        )  # fmt: skip
        if needs_suffix:
            in_keys_kernel[images * heads * triton.cdiv(tokens, block_of(k)),](
                grad, log_sums, means, *read[:3], offsets, in_k, in_v, *strides(*read[:3]), queries, tokens, prompts,
                heads, dim, SCALE=dim**-0.5, ENDS_ONLY=ends_only, **options(k, offsets, IN_KEYS_WARPS),
            )  # fmt: skip
    for gradient, share in zip(gradients[3:], in_prefix, strict=True):
        gradient.copy_(share.sum(dim=1))
    if shared:
        for gradient, each in zip(gradients, (in_q, in_k, in_v), strict=False):
            gradient.copy_(each.sum(dim=0, keepdim=True))
