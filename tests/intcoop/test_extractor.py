"""The attribute extractor against the same prompts put in by hooks on open_clip's own layers."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from fastsds.intcoop.extractor import AttributeExtractor, frozen_features


def _vision(layers: int = 4, **options: Any) -> Any:
    config = {"image_size": 32, "layers": layers, "width": 32, "head_width": 16, "patch_size": 8, **options}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=config, text_cfg=text).eval().requires_grad_(False).visual


def _prompted_by_hooks(visual: Any, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """The class token of `visual` after its last LayerNorm, prompts appended before their layers and cut after them."""
    patches = visual.positional_embedding.shape[0]
    handles = []
    for index, block in enumerate(visual.transformer.resblocks):
        if index in prompts:
            added = prompts[index].expand(len(images), -1, -1)
            handles.append(
                block.register_forward_pre_hook(
                    lambda module, inputs, added=added: (torch.cat([inputs[0][:, :patches], added], dim=1),)
                )
            )
    caught: list[Tensor] = []
    handles.append(visual.transformer.register_forward_hook(lambda module, inputs, output: caught.append(output)))
    visual(images)
    for handle in handles:
        handle.remove()
    return visual.ln_post(caught[0])[:, 0]


@pytest.mark.parametrize(("layers", "chosen"), [(None, (2, 3)), ((0, 1, 2, 3), (0, 1, 2, 3)), ([3, 1], (1, 3))])
def test_prompts_act_as_if_put_into_the_tower(images: Tensor, layers: Any, chosen: tuple[int, ...]) -> None:
    visual = _vision()
    extractor = AttributeExtractor(visual, 16, tokens=3, layers=layers)
    assert extractor.layers == chosen
    torch.nn.init.normal_(extractor.prompts)
    torch.nn.init.normal_(extractor.head.weight)
    torch.nn.init.normal_(extractor.head.bias)
    _, _, tokens = frozen_features(visual, images, extractor.first_layer)
    prompts = {layer: extractor.prompts[row] for row, layer in enumerate(chosen)}
    expected = _prompted_by_hooks(visual, images, prompts) @ extractor.head.weight.T + extractor.head.bias
    torch.testing.assert_close(extractor(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1}])
@pytest.mark.parametrize("first_layer", [0, 2])
def test_one_frozen_pass_gives_the_towers_own_features(
    images: Tensor, options: dict[str, Any], first_layer: int
) -> None:
    visual = _vision(**options)
    embedding, patches, tokens = frozen_features(visual, images, first_layer)
    torch.testing.assert_close(embedding, visual(images))
    caught: list[Tensor] = []
    blocks = visual.transformer.resblocks
    with torch.no_grad():
        handle = blocks[first_layer].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        visual.output_tokens = True
        _, own = visual(images)
        handle.remove()
    torch.testing.assert_close(tokens, caught[0])
    torch.testing.assert_close(patches, own)


def test_gradients_reach_the_prompts_and_not_the_tower(images: Tensor) -> None:
    visual = _vision()
    extractor = AttributeExtractor(visual, 16)
    torch.nn.init.normal_(extractor.head.weight)
    extractor(frozen_features(visual, images, extractor.first_layer)[2]).square().sum().backward()
    assert bool((extractor.prompts.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(parameter.grad is None for parameter in visual.parameters())


def test_other_towers_are_refused_by_name() -> None:
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    visual = open_clip.CLIP(embed_dim=24, vision_cfg=resnet, text_cfg=text).visual
    with pytest.raises(TypeError, match=r"clip\.visual: expected open_clip's VisionTransformer.*got ModifiedResNet"):
        AttributeExtractor(visual, 16)
    pooled = _vision(attentional_pool=True, attn_pooler_heads=2)
    with pytest.raises(TypeError, match="pools its class token, got attentional pooling"):
        AttributeExtractor(pooled, 16)


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1]])
def test_layers_that_the_tower_has_not_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"layers: expected different indices from 0 to 3, at least one, got \["):
        AttributeExtractor(_vision(), 16, layers=layers)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        AttributeExtractor(_vision(), 16, tokens=0)
