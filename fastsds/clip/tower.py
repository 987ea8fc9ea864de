"""The text tower of a CLIP model by its parts: what packed tokens are run through. The tensors are the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Pooling = Literal["argmax", "eos", "last"]

SUPPORTED = (
    "open_clip CLIP and CustomTextCLIP with a causal TextTransformer that pools `argmax`, `eos` or `last`, and "
    "transformers CLIPModel"
)


class UnsupportedTowerError(ValueError):
    """A text tower cannot be run on packed tokens; the message says why, and what can."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        super().__init__(
            f"clip: {type(model).__name__} cannot be encoded on packed tokens: {reason}. Supported: {SUPPORTED}. "
            "Pass dense=True to run every token of every prompt through the model's own encode_text."
        )


class Block(Protocol):
    """One pre-norm transformer block, cut at its attention."""

    @property
    def block(self) -> nn.Module:
        """The model's own."""

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm before the attention."""

    def project(self, normed: Tensor, parts: str) -> tuple[Tensor, ...]:
        """`[..., width]` -> one `[..., heads, head_dim]` for each of `parts`, a run of "qkv"."""

    def complete(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output `[..., width]` from its input and what its heads attended to, `[..., heads, head_dim]`."""


@dataclass(frozen=True)
class TextTower:
    """A causal text tower that reads one token."""

    model: nn.Module
    """The whole CLIP model."""
    text: Any
    """The module with `token_embedding`, `positional_embedding`, `ln_final` and `text_projection`, in open_clip's
    names."""
    blocks: tuple[Block, ...]
    context_length: int
    pooling: Pooling
    end_token: int | None
    """Id of the end token, where the pooling is `eos`."""
    hidden_width: int
    """Width inside the blocks' MLPs."""

    @property
    def token_embedding(self) -> Float[Tensor, "vocabulary width"]:
        return self.text.token_embedding.weight

    @property
    def position_embedding(self) -> Float[Tensor, "context_length width"]:
        return self.text.positional_embedding

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings and, outside of autocast, of everything after them."""
        return self.text.transformer.get_cast_dtype()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the text tower."""
        yield from self.text.token_embedding.parameters()
        yield from self.text.ln_final.parameters()
        for block in self.blocks:
            yield from block.block.parameters()

    def project(self, x: Float[Tensor, "*prompts width"]) -> Float[Tensor, "*prompts dim"]:
        """The text embeddings, not normalised, from the last block's output at the end tokens."""
        pooled, projection = self.text.ln_final(x), self.text.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


@dataclass(frozen=True)
class OpenClipBlock:
    """open_clip's `ResidualAttentionBlock` and `CustomResidualAttentionBlock`."""

    block: Any

    @property
    def norm(self) -> nn.LayerNorm:
        return self.block.ln_1

    def project(self, normed: Tensor, parts: str) -> tuple[Tensor, ...]:
        attention = self.block.attn
        width = attention.in_proj_weight.shape[1]
        first = "qkv".index(parts)
        rows = slice(first * width, (first + len(parts)) * width)
        bias = attention.in_proj_bias
        projected = F.linear(normed, attention.in_proj_weight[rows], None if bias is None else bias[rows])
        heads = projected.unflatten(-1, (len(parts), attention.num_heads, -1)).unbind(-3)
        norms: dict[str, Any] = {"q": getattr(attention, "ln_q", None), "k": getattr(attention, "ln_k", None)}
        # No name is bound in the expression: PyTorch 2.11 does not compile that.
        return tuple(norms[part](head) if norms.get(part) else head for part, head in zip(parts, heads, strict=True))

    def complete(self, x: Tensor, attended: Tensor) -> Tensor:
        block, attention = self.block, self.block.attn
        if getattr(attention, "head_scale", None) is not None:
            attended = attended * attention.head_scale.squeeze(-1)
        attended = attended.flatten(-2)
        if hasattr(attention, "ln_inner"):
            attended = attention.ln_inner(attended)
        attended = attention.out_proj(attended)
        if hasattr(block, "ln_attn"):
            attended = block.ln_attn(attended)
        x = x + block.ls_1(attended)
        return x + block.ls_2(block.mlp(block.ln_2(x)))


@dataclass(frozen=True)
class TransformersBlock:
    """transformers' `CLIPEncoderLayer`."""

    block: Any

    @property
    def norm(self) -> nn.LayerNorm:
        return self.block.layer_norm1

    def project(self, normed: Tensor, parts: str) -> tuple[Tensor, ...]:
        attention = self.block.self_attn
        return tuple(
            getattr(attention, f"{part}_proj")(normed).unflatten(-1, (attention.num_heads, -1)) for part in parts
        )

    def complete(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.block.self_attn.out_proj(attended.flatten(-2))
        return x + self.block.mlp(self.block.layer_norm2(x))


@dataclass(frozen=True)
class _TransformersText:
    """transformers' CLIP text tower under open_clip's names."""

    model: Any

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.model.text_model.embeddings.token_embedding

    @property
    def positional_embedding(self) -> Tensor:
        return self.model.text_model.embeddings.position_embedding.weight

    @property
    def ln_final(self) -> nn.Module:
        return self.model.text_model.final_layer_norm

    @property
    def text_projection(self) -> nn.Module:
        return self.model.text_projection

    @property
    def transformer(self) -> _TransformersText:
        return self

    def get_cast_dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype


def read_tower(clip: nn.Module) -> TextTower:
    """The parts of `clip`'s text tower.

    Raises:
        UnsupportedTowerError: running only the tokens up to the end token would not be exact, or the tower is unknown.
    """
    import open_clip

    if isinstance(clip, open_clip.CLIP):
        return _read_open_clip(clip, clip, clip.text_pool_type, clip.text_eos_id)
    if isinstance(clip, open_clip.CustomTextCLIP):
        text = clip.text
        if not isinstance(text, open_clip.transformer.TextTransformer):
            raise UnsupportedTowerError(clip, f"its text tower is a {type(text).__name__}")
        if text.cls_emb is not None:
            raise UnsupportedTowerError(clip, "it reads a class token after the text (cls_emb)")
        return _read_open_clip(clip, text, text.pool_type, text.eos_id)
    from transformers import CLIPModel

    if isinstance(clip, CLIPModel):
        return _read_transformers(clip)
    raise UnsupportedTowerError(clip, "the class is unknown")


def _read_open_clip(clip: nn.Module, text: Any, pooling: str, eos_id: int) -> TextTower:
    mask = text.attn_mask
    if mask is None:
        raise UnsupportedTowerError(clip, "its attention is bidirectional (no causal mask)")
    if not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        raise UnsupportedTowerError(clip, "its attention mask is not the causal one")
    if pooling not in ("argmax", "eos", "last"):
        raise UnsupportedTowerError(clip, f"it pools {pooling!r}")
    blocks = list(text.transformer.resblocks)
    if getattr(blocks[0].attn, "logit_scale", None) is not None:
        raise UnsupportedTowerError(clip, "its attention is scaled cosine")
    return TextTower(
        model=clip,
        text=text,
        blocks=tuple(OpenClipBlock(block) for block in blocks),
        context_length=text.positional_embedding.shape[0],
        pooling=pooling,  # type: ignore[arg-type]
        end_token=eos_id if pooling == "eos" else None,
        hidden_width=blocks[0].mlp.c_fc.out_features,
    )


def _read_transformers(clip: Any) -> TextTower:
    config = clip.config.text_config
    if config.attention_dropout:
        raise UnsupportedTowerError(clip, f"its attention has dropout ({config.attention_dropout})")
    return TextTower(
        model=clip,
        text=_TransformersText(clip),
        blocks=tuple(TransformersBlock(layer) for layer in clip.text_model.encoder.layers),
        context_length=config.max_position_embeddings,
        # transformers keeps 2 for checkpoints whose config named the wrong end token, and pools argmax for them.
        pooling="argmax" if config.eos_token_id == 2 else "eos",
        end_token=None if config.eos_token_id == 2 else config.eos_token_id,
        hidden_width=config.intermediate_size,
    )


@dataclass(frozen=True)
class DenseTower:
    """Any model with `encode_text` (or transformers' `get_text_features`), fed with embeddings in place of tokens."""

    model: Any
    context_length: int
    pooling: Pooling
    end_token: int | None

    @classmethod
    def of(cls, clip: Any) -> DenseTower:
        """`clip` as it is; a tower that is not known is given whole contexts, as one that pools `last`."""
        try:
            known = read_tower(clip)
        except UnsupportedTowerError:
            length = getattr(clip, "context_length", None) or clip.config.text_config.max_position_embeddings
            return cls(clip, int(length), "last", None)
        return cls(clip, known.context_length, known.pooling, known.end_token)

    @property
    def token_embedding(self) -> Float[Tensor, "vocabulary width"]:
        return self._embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.dtype

    def encode(
        self, tokens: Int[Tensor, "prompts length"], embeddings: Float[Tensor, "prompts length width"] | None = None
    ) -> Float[Tensor, "prompts dim"]:
        """The model's own text embeddings of `tokens`, with `embeddings` where it would look them up."""
        encode = getattr(self.model, "encode_text", None) or self.model.get_text_features
        if embeddings is None:
            features = encode(tokens)
        else:
            handle = self._embedding.register_forward_hook(lambda *_: embeddings)
            try:
                features = encode(tokens)
            finally:
                handle.remove()
        return features if isinstance(features, Tensor) else features.pooler_output

    @property
    def _embedding(self) -> nn.Embedding:
        text = getattr(self.model, "text_model", None) or getattr(self.model, "text", self.model)
        if hasattr(text, "token_embedding"):
            return text.token_embedding
        return getattr(text, "transformer", text).get_input_embeddings()
