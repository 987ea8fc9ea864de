"""Packed prompts through a causal text tower: the prefix once per image, the suffixes in chunks of classes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastsds.clip.prompts import PackedPrompts
from fastsds.clip.tower import DenseTower, TextTower
from fastsds.ops.embed_prompts import embed_prompts
from fastsds.ops.prefix_attention import prefix_attention


def encode_packed(
    tower: TextTower,
    prompts: PackedPrompts,
    context: Float[Tensor, "images vectors width"] | None,
    attribute: Float[Tensor, "images width"] | None,
    *,
    class_chunk: int | None,
    memory_budget: int,
) -> Float[Tensor, "images prompts dim"]:
    """The text embeddings, not normalised, of all prompts for every image; one image where nothing is learned."""
    images = next((len(learned) for learned in (context, attribute) if learned is not None), 1)
    prefix = _encode_prefix(tower, prompts, context, attribute, images)
    features = []
    for start, stop, anew in _chunks(tower, prompts, images, context, attribute, class_chunk, memory_budget):
        chunk = partial(_encode_suffixes, tower, prompts.slice(start, stop), context, attribute)
        if anew:
            features.append(checkpoint(chunk, *prefix, use_reentrant=False, preserve_rng_state=False))
        else:
            features.append(chunk(*prefix))
    return torch.cat(features, dim=1)


def encode_dense(
    tower: DenseTower,
    prompts: Int[Tensor, "prompts context_length"],
    context: Float[Tensor, "images vectors width"] | None,
    attribute: Float[Tensor, "images width"] | None,
    *,
    class_chunk: int | None,
) -> Float[Tensor, "images prompts dim"]:
    """`encode_packed` for any tower: prompts of one length through the model's own modules.

    Args:
        prompts: token ids and slots, padded.
        class_chunk: prompts encoded at a time, each chunk anew in the backward pass; all of them by default.
    """
    images = next((len(learned) for learned in (context, attribute) if learned is not None), 1)
    # Where the tower looks at token ids, a learned vector passes for the first word of its prompt.
    first = 1 + (prompts[:, 1:] >= 0).int().argmax(dim=1, keepdim=True)
    tokens = torch.where(prompts < 0, prompts.gather(1, first), prompts)

    def encode(prompts: Tensor, tokens: Tensor) -> Tensor:
        embeddings, _ = embed_prompts(prompts, tower.token_embedding, context=context, attribute=attribute)
        embeddings = embeddings.expand(images, -1, -1, -1).flatten(0, 1)
        return tower.encode(tokens.repeat(images, 1), embeddings).unflatten(0, (images, -1))

    if class_chunk is None or class_chunk >= len(prompts):
        return encode(prompts, tokens)
    chunks = zip(prompts.split(class_chunk), tokens.split(class_chunk), strict=True)
    return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks], dim=1)


def _chunks(
    tower: TextTower,
    prompts: PackedPrompts,
    images: int,
    context: Tensor | None,
    attribute: Tensor | None,
    class_chunk: int | None,
    memory_budget: int,
) -> Iterator[tuple[int, int, bool]]:
    """Start, stop and whether the chunk is computed anew in the backward pass, so that its activations are not kept."""
    count = len(prompts)
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    learned = any(tensor is not None and tensor.requires_grad for tensor in (context, attribute))
    backward = torch.is_grad_enabled() and (trained or learned)
    if class_chunk is None:
        per_class = images * prompts.bounds[-1] / count * _bytes_per_token(tower, backward, trained)
        kept = count if count * per_class <= memory_budget else int(0.75 * memory_budget / per_class)
        size = max(1, int(0.25 * memory_budget / per_class))
    else:
        kept, size = (count if class_chunk >= count else 0), class_chunk
    if kept:
        yield 0, kept, False
    for start in range(kept, count, size):
        yield start, min(start + size, count), backward


def _bytes_per_token(tower: TextTower, backward: bool, trained: bool) -> int:
    """What autograd keeps of a token over all blocks; one block's worth where there is no backward pass."""
    width, hidden = tower.token_embedding.shape[1], tower.hidden_width
    # The block's and the MLP's input, qkv and what was attended to; the MLP's hidden layer and QuickGELU's factors.
    numbers = 6 * width + 2 * hidden
    if trained:
        numbers += 3 * width + hidden
    return numbers * tower.token_embedding.element_size() * (len(tower.blocks) if backward else 1)


def _encode_prefix(
    tower: TextTower, prompts: PackedPrompts, context: Tensor | None, attribute: Tensor | None, images: int
) -> list[Tensor]:
    """The prefix's keys and values in every block, `[images, prefix, heads, head_dim]`: k, v, k, v, …"""
    positions = torch.arange(len(prompts.prefix), device=prompts.prefix.device)
    learned = (context, attribute) if prompts.learned_prefix else (None, None)
    x, normed = _embed(tower, prompts.prefix, positions, *learned)
    keys_values: list[Tensor] = []
    *others, last = tower.blocks
    for block in others:
        q, k, v = block.project(normed, "qkv")
        keys_values += [k, v]
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = block.complete(x, attended.transpose(1, 2))
        normed = tower.blocks[len(keys_values) // 2].norm(x)
    keys_values += last.project(normed, "kv")
    return [tensor.expand(images, -1, -1, -1) for tensor in keys_values]


def _encode_suffixes(
    tower: TextTower, prompts: PackedPrompts, context: Tensor | None, attribute: Tensor | None, *prefix: Tensor
) -> Float[Tensor, "images prompts dim"]:
    """Suffixes that hold no learned vector are the same for every image up to the first block's attention."""
    learned = (context, attribute) if prompts.learned_suffixes else (None, None)
    x, normed = _embed(tower, prompts.suffixes, prompts.positions, *learned)
    ends = prompts.offsets[1:] - 1
    last, max_length = len(tower.blocks) - 1, prompts.max_length
    for index, block in enumerate(tower.blocks):
        if index:
            normed = block.norm(x)
        if index < last:
            q, k, v = block.project(normed, "qkv")
        else:
            k, v = block.project(normed, "kv")
            (q,) = block.project(normed.index_select(1, ends), "q")
            x = x.index_select(1, ends)
        prefix_k, prefix_v = prefix[2 * index : 2 * index + 2]
        attended = prefix_attention(q, k, v, prefix_k, prefix_v, prompts.offsets, max_length)
        x = block.complete(x, attended)
    return tower.project(x)


def _embed(
    tower: TextTower, tokens: Tensor, positions: Tensor, context: Tensor | None, attribute: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The first block's input, and what its norm makes of it."""
    norm = tower.blocks[0].norm
    embeddings, normed = embed_prompts(
        tokens,
        tower.token_embedding,
        context=context,
        attribute=attribute,
        position_embedding=tower.position_embedding,
        positions=positions,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        dtype=tower.dtype,
    )
    assert normed is not None
    return embeddings, normed
