"""The attribute extractor `A`: deep visual prompts on CLIP's frozen vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AttributeExtractor(nn.Module):
    """Predicts from an image the embedding of its attribute (*stated*: deep visual prompts, at several layers).

    Before each of the prompted layers the prompt tokens of the layer before are dropped and its own are appended
    (Jia et al., ECCV 2022, "deep"). The class token that leaves the tower goes through a linear layer. What enters
    the first prompted layer depends on the frozen tower alone, so that it need be computed only once per image.

    Args:
        visual: open_clip's `VisionTransformer`, frozen by the caller.
        text_width: of the prediction.
        tokens: prompt tokens per layer (*reading*: 4; not known).
        layers: indices of the prompted layers, from 0 (*reading*: the upper half; not known).

    Raises:
        TypeError: another kind of vision tower, which is named.
        ValueError: fewer than one token, or layers that the tower has not.
    """

    def __init__(
        self, visual: nn.Module, text_width: int, *, tokens: int = 4, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        blocks = vision_blocks(visual)
        chosen = range(len(blocks) // 2, len(blocks)) if layers is None else sorted(layers)
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(len(blocks))):
            raise ValueError(
                f"layers: expected different indices from 0 to {len(blocks) - 1}, at least one, got {list(chosen)}"
            )
        self.visual = visual
        self.layers = tuple(chosen)
        tower: Any = visual
        width = len(tower.class_embedding)
        self.prompts = nn.Parameter(torch.randn(len(self.layers), tokens, width) * 0.02)
        self.head = nn.Linear(width, text_width)
        # Token embeddings are small: a layer of the usual size would start far outside what the text tower knows.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def first_layer(self) -> int:
        return self.layers[0]

    def forward(self, tokens: Float[Tensor, "images tokens width"]) -> Float[Tensor, "images text_width"]:
        """The predicted attribute embedding.

        Args:
            tokens: what enters the first prompted layer, as `frozen_features` gives it: class token, then patches.
        """
        length = tokens.shape[1]
        prompts_of = dict(zip(self.layers, self.prompts, strict=True))
        x = tokens
        for index, block in enumerate(vision_blocks(self.visual)[self.first_layer :], start=self.first_layer):
            if index in prompts_of:
                prompts = prompts_of[index].to(x.dtype).expand(len(x), -1, -1)
                x = torch.cat([x[:, :length], prompts], dim=1)
            x = block(x)
        pooled, _ = self.visual._pool(x[:, :length])  # type: ignore[operator]
        return self.head(pooled.to(self.head.weight.dtype))


@torch.no_grad()
def frozen_features(
    visual: Any, images: Float[Tensor, "images 3 height width"], first_layer: int
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "images patches width"], Float[Tensor, "images tokens width"]]:
    """One pass of the frozen tower: the image embedding (not normalised), the last layer's patch features after its
    LayerNorm, and the tokens that enter layer `first_layer`.

    Raises:
        TypeError: another kind of vision tower than open_clip's `VisionTransformer`, which is named.
    """
    blocks = vision_blocks(visual)
    x = visual._embeds(images)
    for block in blocks[:first_layer]:
        x = block(x)
    entering = x
    for block in blocks[first_layer:]:
        x = block(x)
    pooled, _ = visual._pool(x)
    embedding = pooled if visual.proj is None else pooled @ visual.proj
    patches = x[:, 1:] if visual.final_ln_after_pool else visual.ln_post(x[:, 1:])
    return embedding, patches, entering


def vision_blocks(visual: Any) -> nn.ModuleList:
    """The layers of an open_clip `VisionTransformer`.

    Raises:
        TypeError: another kind of tower, or one that pools by attention or keeps the batch second.
    """
    import open_clip.transformer

    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        raise TypeError(
            f"clip.visual: expected open_clip's VisionTransformer, whose layers take visual prompts, "
            f"got {type(visual).__name__}; use a ViT, such as ViT-B-16"
        )
    if visual.attn_pool is not None:
        raise TypeError("clip.visual: expected a VisionTransformer that pools its class token, got attentional pooling")
    if not visual.transformer.batch_first:
        raise TypeError("clip.visual: expected a VisionTransformer with the batch first, got batch_first=False")
    return visual.transformer.resblocks
