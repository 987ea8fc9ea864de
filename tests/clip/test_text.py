"""`PrefixTextEncoder` against whole prompts of 77 tokens, built as CoOp does, through the model's own forward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from fastsds.clip import PrefixTextEncoder, UnsupportedTowerError

WIDTH, DIM, CONTEXT_LENGTH = 32, 24, 77
END_TOKEN = 49407
NAMES = ["cat", "golden retriever", "windsor chair made of wood and much else", "tree frog", "yin yang", "ox"]
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"width": WIDTH, "heads": 4, "layers": 3, "context_length": CONTEXT_LENGTH}

CUSTOM_BLOCK = dict.fromkeys(["qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"], True)
TOWERS: dict[str, Any] = {
    "CLIP": ("CLIP", {}, {}),
    "QuickGELU": ("CLIP", {}, {"quick_gelu": True}),
    "eos": ("CLIP", {"pool_type": "eos", "eos_id": END_TOKEN}, {}),
    "CustomTextCLIP": ("CustomTextCLIP", {}, {}),
    "last": ("CustomTextCLIP", {"pool_type": "last"}, {}),
    "linear projection": ("CustomTextCLIP", {"proj_bias": True}, {}),
    "no projection": ("CustomTextCLIP", {"proj_type": "none"}, {}),
    "LayerScale": ("CustomTextCLIP", {"ls_init_value": 0.3}, {}),
    "custom block": ("CustomTextCLIP", CUSTOM_BLOCK, {}),
    "one layer": ("CustomTextCLIP", {"layers": 1, "norm_kwargs": {"eps": 1e-3}}, {}),
    "transformers": ("CLIPModel", {"eos_token_id": END_TOKEN}, {}),
    "transformers, old end token": ("CLIPModel", {"eos_token_id": 2}, {}),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A small tower with weights large enough that every token matters."""
    kind, text, model = TOWERS[name]
    if kind == "CLIPModel":
        from transformers import CLIPConfig, CLIPModel

        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "num_hidden_layers": 3}
        config = CLIPConfig(
            text_config={**sizes, "vocab_size": END_TOKEN + 1, "bos_token_id": END_TOKEN - 1, **text},
            vision_config={**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
            projection_dim=DIM,
        )
        clip = CLIPModel(config)
    else:
        clip = getattr(open_clip, kind)(embed_dim=DIM, vision_cfg=VISION, text_cfg={**TEXT, **text}, **model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return clip.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.SimpleTokenizer()


@pytest.fixture(params=list(TOWERS))
def tower(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def embedding_of(clip: Any) -> tuple[Any, str]:
    """Where the model keeps its token embedding."""
    if hasattr(clip, "text_model"):
        return clip.text_model.embeddings, "token_embedding"
    text = getattr(clip, "text", clip)
    if hasattr(text, "token_embedding"):
        return text, "token_embedding"
    return text.transformer.embeddings, "word_embeddings"


class Given(nn.Module):
    """Stands where the token embedding stood and gives these."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__()
        self.prompts = prompts

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape == self.prompts.shape[:-1]
        return self.prompts


@contextmanager
def given(clip: Any, prompts: Tensor) -> Iterator[None]:
    owner, name = embedding_of(clip)
    genuine = getattr(owner, name)
    setattr(owner, name, Given(prompts))
    try:
        yield
    finally:
        setattr(owner, name, genuine)


def encode(clip: Any, tokens: Tensor) -> Tensor:
    if hasattr(clip, "encode_text"):
        return clip.encode_text(tokens)
    features = clip.get_text_features(tokens)
    return features if isinstance(features, Tensor) else features.pooler_output


def dense(
    clip: Any,
    tokenizer: Any,
    names: list[str],
    context: Tensor | None = None,
    attribute: Tensor | None = None,
    position: str = "end",
) -> Tensor:
    """Every image by itself, every class in full: "X X X X name." with the learned vectors in the place of the X's."""
    images = next((len(learned) for learned in (context, attribute) if learned is not None), 1)
    count = 0 if context is None else context.shape[-2]
    described = attribute is not None
    words = [len(tokenizer.encode(name)) for name in names]
    tokens = torch.cat([tokenizer(" ".join(["X"] * (count + described) + [name]) + ".") for name in names])
    owner, attribute_name = embedding_of(clip)
    looked_up = getattr(owner, attribute_name)(tokens)
    features = []
    for image in range(images):
        prompts = []
        for index, length in enumerate(words):
            row = looked_up[index]
            learned = count + described
            start, name, rest = row[:1], row[1 + learned : 1 + learned + length], row[1 + learned + length :]
            if context is None:
                vectors = row[:0]
            else:
                vectors = context[image, index] if context.dim() == 4 else context[image]
            before = {"front": 0, "middle": count // 2, "end": count}[position]
            description = row[:0] if attribute is None else attribute[image : image + 1]
            prompts.append(torch.cat([start, vectors[:before], description, name, vectors[before:], rest]))
        with given(clip, torch.stack(prompts)):
            features.append(encode(clip, tokens))
    return torch.stack(features)


def learned(images: int, count: int, *, classes: int | None = None, described: bool = True) -> list[Tensor | None]:
    """Context and attribute, float64 leaves."""
    shape = (images, count, WIDTH) if classes is None else (images, classes, count, WIDTH)
    context = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return [context, torch.randn(images, WIDTH, dtype=torch.float64, requires_grad=True) if described else None]


def value_and_gradients(features: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(5)).to(features)
    asked = [leaf for leaf in leaves if leaf is not None and leaf.numel()]
    return [features.detach(), *torch.autograd.grad((features * upstream).sum(), asked)]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """In the largest error relative to the largest value."""
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == reference.shape
        assert (result - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize(("images", "count", "described"), [(3, 4, True), (2, 3, False), (3, 0, True), (1, 1, False)])
def test_equals_the_dense_tower(tower: Any, tokenizer: Any, images: int, count: int, described: bool) -> None:
    leaves = learned(images, count, described=described)
    expected = value_and_gradients(dense(tower, tokenizer, NAMES, *leaves), leaves)
    encoder = PrefixTextEncoder(tower, NAMES, tokenizer=tokenizer)
    assert_close(value_and_gradients(encoder(*leaves), leaves), expected, 1e-10)


@pytest.mark.parametrize("name", list(TOWERS))
def test_float32_equals_the_dense_tower(tokenizer: Any, name: str) -> None:
    clip = build(name, torch.float32)
    leaves = [leaf.detach().float().requires_grad_() for leaf in learned(2, 4)]
    expected = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves), leaves)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)
    results = value_and_gradients(encoder(*leaves), leaves)
    assert all(result.dtype == torch.float32 for result in results)
    assert_close(results, expected, 1e-5)


@pytest.mark.parametrize("name", ["CLIP", "custom block", "transformers"])
def test_bfloat16_loses_no_more_than_the_dense_tower(tokenizer: Any, name: str) -> None:
    leaves = [leaf.detach().bfloat16().double().requires_grad_() for leaf in learned(2, 4)]
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    clip = build(name).bfloat16()
    exact = value_and_gradients(dense(build(name).bfloat16().double(), tokenizer, NAMES, *leaves), leaves)
    lossy = value_and_gradients(dense(clip, tokenizer, NAMES, *low), low)
    results = value_and_gradients(PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)(*low), low)
    for result, reference, truth in zip(results, lossy, exact, strict=True):
        assert result.dtype == torch.bfloat16
        assert (result.double() - truth).norm() <= 2 * (reference.double() - truth).norm()


def test_half_precision_weights_behind_float32_embeddings(tokenizer: Any) -> None:
    """What open_clip makes of precision="bf16": some tensors stay float32, and activations are bfloat16."""
    clip = build("CLIP", torch.float32)
    open_clip.convert_weights_to_lp(clip, torch.bfloat16)
    assert clip.token_embedding.weight.dtype == torch.float32
    for module in clip.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = open_clip.transformer.LayerNormFp32
    leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in learned(2, 4)]
    expected = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves), leaves)
    results = value_and_gradients(PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)(*leaves), leaves)
    assert results[0].dtype == torch.bfloat16
    assert_close(results, expected, 0.05)


def test_autocast(tokenizer: Any) -> None:
    clip = build("CLIP", torch.float32)
    leaves = [leaf.detach().float().requires_grad_() for leaf in learned(2, 4)]
    exact = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        lossy = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves), leaves)
        results = value_and_gradients(PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)(*leaves), leaves)
    assert results[0].dtype == lossy[0].dtype == torch.bfloat16
    for result, reference, truth in zip(results, lossy, exact, strict=True):
        assert (result - truth).norm() <= 2 * (reference - truth).norm()


@pytest.mark.parametrize("options", [{}, {"class_chunk": 2}, {"dense": True}])
def test_prompts_are_placed_on_the_device_once(tokenizer: Any, placements: Any, options: dict[str, Any]) -> None:
    encoder = PrefixTextEncoder(build("CLIP"), NAMES, tokenizer=tokenizer, **options)
    layouts = [learned(2, 4), learned(2, 3, described=False), learned(1, 2, classes=len(NAMES))]
    with placements() as first:
        results = [encoder(*leaves) for leaves in layouts]
    assert first.count > 0
    with placements() as again:
        assert all(torch.equal(encoder(*leaves), result) for leaves, result in zip(layouts, results, strict=True))
    assert again.count == 0


@pytest.mark.parametrize("options", [{}, {"dense": True}])
def test_training_after_inference(tokenizer: Any, options: dict[str, Any]) -> None:
    encoder, leaves = PrefixTextEncoder(build("CLIP"), NAMES, tokenizer=tokenizer, **options), learned(2, 3)
    with torch.inference_mode():
        inferred = encoder(*leaves).clone()
    assert torch.equal(value_and_gradients(encoder(*leaves), leaves)[0], inferred)


def test_compiled_in_one_graph(tokenizer: Any) -> None:
    clip, leaves = build("one layer", torch.float32), [leaf.detach().float().requires_grad_() for leaf in learned(2, 3)]
    expected = value_and_gradients(PrefixTextEncoder(clip, NAMES[:2], tokenizer=tokenizer)(*leaves), leaves)
    encoder = PrefixTextEncoder(clip, NAMES[:2], tokenizer=tokenizer)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the prompts are placed in the first, and found in the second
        assert_close(value_and_gradients(compiled(*leaves), leaves), expected, 1e-6)


@pytest.mark.parametrize("position", ["front", "middle", "end"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("described", [False, True])
def test_coop_variants(tokenizer: Any, position: Any, class_specific: bool, described: bool) -> None:
    clip = build("CLIP")
    leaves = learned(2, 5, classes=len(NAMES) if class_specific else None, described=described)
    expected = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves, position=position), leaves)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer, class_position=position)
    assert_close(value_and_gradients(encoder(*leaves), leaves), expected, 1e-10)


def test_zero_shot_is_the_models_own(tower: Any, tokenizer: Any) -> None:
    expected = encode(tower, tokenizer([f"{name}." for name in NAMES]))
    encoder = PrefixTextEncoder(tower, NAMES, tokenizer=tokenizer)
    assert_close([encoder()[0]], [expected], 1e-10)
    empty = encoder(torch.zeros(3, 0, WIDTH, dtype=torch.float64))
    assert_close([empty], [expected.expand(3, -1, -1)], 1e-10)


@pytest.mark.parametrize(
    "texts",
    [
        [f"a photo of a {name}, a type of animal." for name in NAMES],
        ["one text"],
        ["", "a cat", "a cat and a dog"],
        ["the same", "the same"],
        [" ".join(["long"] * 75), "short"],
    ],
)
def test_plain_texts_are_the_models_own(tower: Any, tokenizer: Any, texts: list[str]) -> None:
    encoder = PrefixTextEncoder(tower, NAMES, tokenizer=tokenizer)
    assert_close([encoder.encode_text(texts)], [encode(tower, tokenizer(texts))], 1e-10)


def test_a_context_for_all_images_meets_an_attribute_per_image(tokenizer: Any) -> None:
    clip = build("CLIP")
    context, attribute = learned(3, 2)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)
    one = context[:1].detach().requires_grad_()
    expected = value_and_gradients(dense(clip, tokenizer, NAMES, one.expand(3, -1, -1), attribute), [one, attribute])
    assert_close(value_and_gradients(encoder(one, attribute), [one, attribute]), expected, 1e-10)


@pytest.mark.parametrize("length", [1, 2, 30, 60])
def test_names_of_any_length(tokenizer: Any, length: int) -> None:
    clip, leaves = build("CLIP"), learned(2, 4)
    names = [" ".join(["cat"] * length), "dog", "cat house"]
    expected = value_and_gradients(dense(clip, tokenizer, names, *leaves), leaves)
    encoder = PrefixTextEncoder(clip, names, tokenizer=tokenizer)
    assert_close(value_and_gradients(encoder(*leaves), leaves), expected, 1e-10)


@pytest.mark.parametrize("count", [1, 2, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_number_of_classes(tokenizer: Any, count: int) -> None:
    clip, leaves = build("one layer"), learned(1, 4)
    names = [f"{'wild ' * (index % 3)}animal {index}" for index in range(count)]
    expected = value_and_gradients(dense(clip, tokenizer, names, *leaves), leaves)
    encoder = PrefixTextEncoder(clip, names, tokenizer=tokenizer)
    assert_close(value_and_gradients(encoder(*leaves), leaves), expected, 1e-10)


@pytest.mark.parametrize("options", [{"class_chunk": 1}, {"class_chunk": 4}, {"memory_budget": 1}, {"dense": True}])
def test_chunks_and_dense_runs_change_nothing(tokenizer: Any, options: dict[str, Any]) -> None:
    clip, leaves = build("CLIP"), learned(2, 4)
    whole = value_and_gradients(PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)(*leaves), leaves)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer, **options)
    assert_close(value_and_gradients(encoder(*leaves), leaves), whole, 1e-12)


def test_a_dense_run_in_chunks(tokenizer: Any) -> None:
    clip, leaves = build("CLIP"), learned(2, 4)
    whole = value_and_gradients(PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)(*leaves), leaves)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer, dense=True, class_chunk=4)
    assert_close(value_and_gradients(encoder(*leaves), leaves), whole, 1e-10)


def kept_for_backward(encoder: PrefixTextEncoder, leaves: list[Tensor | None]) -> int:
    """Bytes of the activations that autograd holds on to after the forward pass, each once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder._tower.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(*leaves)
    assert features.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_memory_budget_bounds_what_is_kept(tokenizer: Any) -> None:
    clip, leaves = build("CLIP", torch.float32), [leaf.float() for leaf in learned(2, 4)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    names = [f"animal {index}" for index in range(400)]
    free = kept_for_backward(PrefixTextEncoder(clip, names, tokenizer=tokenizer), leaves)
    budget = free // 4
    bound = kept_for_backward(PrefixTextEncoder(clip, names, tokenizer=tokenizer, memory_budget=budget), leaves)
    assert budget / 4 < bound < budget
    chunked = kept_for_backward(PrefixTextEncoder(clip, names, tokenizer=tokenizer, class_chunk=10), leaves)
    assert chunked < free / 20


def test_static_prompts_keep_nothing_without_gradients(tokenizer: Any) -> None:
    encoder = PrefixTextEncoder(build("CLIP"), NAMES, tokenizer=tokenizer)
    assert not encoder().requires_grad
    with torch.no_grad():
        assert not encoder(*learned(2, 4)).requires_grad


@pytest.mark.parametrize("name", ["CLIP", "linear projection", "custom block", "transformers"])
def test_gradients_in_trained_weights(tokenizer: Any, name: str) -> None:
    """Through plain texts, whose token embeddings the model looks up as well."""
    clip = build(name)
    text = [parameter for key, parameter in clip.named_parameters() if not key.startswith("vision") and
            not key.startswith("visual") and not key.startswith("logit")]  # fmt: skip
    for parameter in text:
        parameter.requires_grad_()
    texts = ["a photo of a cat.", "a photo of a golden retriever.", "a painting"]
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)
    gradients = []
    for features in (encoder.encode_text(texts), encode(clip, tokenizer(texts))):
        found = torch.autograd.grad(features.square().sum(), text, allow_unused=True)
        gradients.append([gradient for gradient in found if gradient is not None])
    packed, whole = gradients
    # Weights of the padding's positions have gradients of zero in both.
    assert len(packed) == len(whole) >= 3 * 12
    # A bias of all keys has no gradient but rounding, so errors are relative to all gradients together.
    flat, expected = (torch.cat([gradient.flatten() for gradient in found]) for found in (packed, whole))
    assert_close([flat], [expected], 1e-10)


def test_the_weights_are_the_models_own(tokenizer: Any) -> None:
    clip = build("CLIP")
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)
    before = encoder()
    assert list(encoder.parameters()) == []
    assert encoder.state_dict() == {}
    with torch.no_grad():
        clip.transformer.resblocks[1].attn.in_proj_weight.add_(0.1)
    assert_close([encoder()[0]], [encode(clip, tokenizer([f"{name}." for name in NAMES]))], 1e-10)
    assert not torch.allclose(encoder(), before)


def test_transformers_tokenizer(clip_tokenizer: Any, clip: Any) -> None:
    """The toy world's tokenizer, by open_clip's wrapper and bare."""
    names = ["red circle", "blue ring", "square"]
    wrapped = PrefixTextEncoder(clip, names, tokenizer=clip_tokenizer)
    bare = PrefixTextEncoder(clip, names, tokenizer=clip_tokenizer.tokenizer)
    context = torch.randn(2, 3, 32)
    assert_close([bare(context)], [wrapped(context)], 1e-6)
    assert_close([wrapped()[0]], [clip.encode_text(clip_tokenizer([f"{name}." for name in names]))], 1e-5)


def test_words_to_start_context_from(tokenizer: Any) -> None:
    clip = build("CLIP")
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer)
    words = encoder.embed_words("a photo of a")
    assert torch.equal(words, clip.token_embedding(tokenizer("a photo of a")[0, 1:5]))
    expected = encode(clip, tokenizer([f"a photo of a {name}." for name in NAMES]))
    assert_close([encoder(words.unsqueeze(0))[0]], [expected], 1e-10)


def test_suffix_template(tokenizer: Any) -> None:
    clip = build("CLIP")
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer, suffix_template="a photo of a {}, up close")
    expected = encode(clip, tokenizer([f"a photo of a {name}, up close" for name in NAMES]))
    assert_close([encoder()[0]], [expected], 1e-10)


def bidirectional() -> Any:
    return open_clip.CustomTextCLIP(
        embed_dim=DIM, vision_cfg=VISION, text_cfg={**TEXT, "no_causal_mask": True, "pool_type": "first"}
    )


def hugging_face() -> Any:
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    clip = open_clip.CustomTextCLIP(embed_dim=DIM, vision_cfg=VISION, text_cfg=TEXT)
    config = BertConfig(
        vocab_size=END_TOKEN + 1, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=CONTEXT_LENGTH, pad_token_id=0,
    )  # fmt: skip
    clip.text = HFTextEncoder("bert", DIM, config=config, pooler_type="mean_pooler", proj_type="linear")
    return clip


@pytest.mark.parametrize("make", [bidirectional, hugging_face])
def test_other_towers_run_densely(tokenizer: Any, make: Any) -> None:
    clip, leaves = make().double().eval().requires_grad_(False), learned(2, 3)
    expected = value_and_gradients(dense(clip, tokenizer, NAMES, *leaves), leaves)
    encoder = PrefixTextEncoder(clip, NAMES, tokenizer=tokenizer, dense=True)
    assert_close(value_and_gradients(encoder(*leaves), leaves), expected, 1e-10)
    texts = ["a cat", "two dogs in a row"]
    assert_close([encoder.encode_text(texts)], [encode(clip, tokenizer(texts))], 1e-10)


def with_text(**text: Any) -> Any:
    return open_clip.CustomTextCLIP(embed_dim=DIM, vision_cfg=VISION, text_cfg={**TEXT, **text})


def with_dropout() -> Any:
    clip = build("transformers")
    clip.config.text_config.attention_dropout = 0.1
    return clip


def with_another_mask() -> Any:
    clip = build("CLIP")
    clip.attn_mask[3, 5] = 0
    return clip


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bidirectional, "CustomTextCLIP cannot be encoded on packed tokens: its attention is bidirectional"),
        (hugging_face, "its text tower is a HFTextEncoder"),
        (with_another_mask, "its attention mask is not the causal one"),
        (lambda: with_text(embed_cls=True), "it reads a class token after the text (cls_emb)"),
        (lambda: with_text(pool_type="first"), "it pools 'first'"),
        (lambda: with_text(scaled_cosine_attn=True), "its attention is scaled cosine"),
        (with_dropout, "its attention has dropout (0.1)"),
        (lambda: nn.Linear(2, 2), "Linear cannot be encoded on packed tokens: the class is unknown"),
    ],
)
def test_towers_that_are_refused(tokenizer: Any, make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedTowerError, match=re.escape(reason)) as refusal:
        PrefixTextEncoder(make(), NAMES, tokenizer=tokenizer)
    assert "Supported: open_clip CLIP and CustomTextCLIP" in str(refusal.value)
    assert "dense=True" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classnames": []}, "classnames: expected at least one name in a sequence, got []"),
        ({"classnames": "cat"}, "classnames: expected at least one name in a sequence, got 'cat'"),
        ({"classnames": ["cat", " ", ""]}, "classnames: expected names, got empty ones at [1, 2]"),
        ({"classnames": ["cat", "dog", "cat"]}, "classnames: expected each name once, got 1 more than once: ['cat']"),
        ({"classnames": ["cat", "dog " * 80]}, "expected prompts of at most 77 tokens, got 1 longer: 'dog dog"),
        ({"suffix_template": "a photo"}, "suffix_template: expected one {} for the class name, got 'a photo'"),
        ({"class_position": "back"}, "class_position: expected one of ('front', 'middle', 'end'), got 'back'"),
        ({"class_chunk": 0}, "class_chunk: expected at least 1 or None, got 0"),
        ({"tokenizer": lambda texts, **_: torch.tensor([[ord(text[0]), 5] for text in texts])}, "one start token"),
    ],
)
def test_messages(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"classnames": NAMES, "tokenizer": tokenizer, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        PrefixTextEncoder(build("one layer"), **arguments)


@pytest.mark.parametrize(
    ("context", "attribute", "message"),
    [
        (torch.ones(2, 3), None, "context: expected [images, context, width=32] or [images, classes=6, context, width"),
        (torch.ones(2, 3, 31), None, "width=32], got [2, 3, 31]"),
        (torch.ones(2, 5, 3, 32), None, "got [2, 5, 3, 32]"),
        (torch.ones(2, 3, 32).int(), None, "context: expected a floating dtype, got torch.int32"),
        (torch.ones(2, 3, 32, device="meta"), None, "context: expected on the device of the tower (cpu), got meta"),
        (None, torch.ones(2, 31), "attribute: expected [images, width=32], got [2, 31]"),
        (torch.ones(2, 3, 32), torch.ones(3, 32), "attribute: expected the images of context (2) or 1, got 3"),
        (
            torch.ones(2, 70, 32),
            None,
            "classnames: expected prompts of at most 77 tokens, got 1 longer: 'windsor chair",
        ),
    ],
)
def test_messages_of_a_call(tokenizer: Any, context: Any, attribute: Any, message: str) -> None:
    encoder = PrefixTextEncoder(build("one layer"), NAMES, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder(context, attribute)


def test_texts_that_are_refused(tokenizer: Any) -> None:
    encoder = PrefixTextEncoder(build("one layer"), NAMES, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="texts: expected at least one, got none"):
        encoder.encode_text([])
    with pytest.raises(
        ValueError, match=r"texts: expected prompts of at most 77 tokens, got 1 longer: .*\(82 tokens\)"
    ):
        encoder.encode_text(["a " * 80])
