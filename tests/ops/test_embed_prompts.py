"""`embed_prompts` against a loop over images and tokens, and PyTorch's own LayerNorm."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fastsds.ops import embed_prompts

WIDTH, VECTORS, EPS = 20, 3, 1e-5
PACKED = [5, -1, -2, -3, -4, 7, 0, 5]
DENSE = [[5, -1, -2, -3, -4, 7], [5, -1, -2, -4, 0, 0]]


class Case:
    """Two images, three context vectors and an attribute, in float64."""

    def __init__(self, tokens: list[Any], *, context: bool = True, attribute: bool = True, norm: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.ones(1).device)

        self.tokens = torch.tensor(tokens)
        self.positions = torch.arange(self.tokens.numel()).reshape(self.tokens.shape) % 7
        self.tensors: dict[str, Tensor | None] = {
            "token_embedding": random(9, WIDTH),
            "context": random(2, VECTORS, WIDTH) if context else None,
            "attribute": random(2, WIDTH) if attribute else None,
            "position_embedding": random(7, WIDTH),
            "norm_weight": random(WIDTH) if norm else None,
            "norm_bias": random(WIDTH) if norm else None,
        }
        self.eps = EPS if norm else None

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to(dtype).requires_grad_()
            for name, tensor in self.tensors.items()
            if tensor is not None
        }

    def call(self, leaves: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
        tensors = {"positions": self.positions, "eps": self.eps, **leaves, **options}
        result = embed_prompts(self.tokens, tensors.pop("token_embedding"), **tensors)
        return tuple(tensor for tensor in result if tensor is not None)

    def loop(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        context, attribute = leaves.get("context"), leaves.get("attribute")
        images = 1 if context is None and attribute is None else 2
        rows = []
        for image in range(images):
            for token, position in zip(self.tokens.flatten().tolist(), self.positions.flatten().tolist(), strict=True):
                if token >= 0:
                    vector = leaves["token_embedding"][token]
                elif context is not None and -1 - token < VECTORS:
                    vector = context[image, -1 - token]
                else:
                    vector = attribute[image]
                rows.append(vector + leaves["position_embedding"][position])
        x = torch.stack(rows).reshape(images, *self.tokens.shape, WIDTH)
        if self.eps is None:
            return (x,)
        return x, layer_norm(x, (WIDTH,), leaves["norm_weight"], leaves["norm_bias"], self.eps)


def value_and_gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(output.shape, generator=generator, device="cpu").to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


CASES = {
    "packed": (PACKED, {}),
    "dense": (DENSE, {}),
    "context alone": ([5, -1, -2, -3, 7], {"attribute": False}),
    "attribute alone": ([5, -1, 7], {"context": False}),
    "tokens alone": ([5, 2, 7], {"context": False, "attribute": False}),
    "no norm": (DENSE, {"norm": False}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    tokens, options = CASES[request.param]
    return Case(tokens, **options)


def test_equals_the_loop_in_value_and_gradient(case: Case) -> None:
    leaves = case.leaves()
    results = value_and_gradients(case.call(leaves), leaves)
    expected = value_and_gradients(case.loop(leaves), leaves)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)


def test_gradients_of_frozen_towers_reach_the_learned_vectors_alone(case: Case) -> None:
    learned = {name: tensor for name, tensor in case.leaves().items() if name in ("context", "attribute")}
    frozen = {name: tensor.detach() for name, tensor in case.leaves().items() if name not in learned}
    outputs = case.call({**frozen, **learned})
    assert all(output.requires_grad == bool(learned) for output in outputs)
    if learned:
        results = value_and_gradients(outputs, learned)
        expected = value_and_gradients(case.loop({**frozen, **learned}), learned)
        for result, reference in zip(results, expected, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_where_a_tower_rounds(case: Case, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs: each result is off by its own rounding, and that of the sum."""
    leaves = case.leaves(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    results = value_and_gradients(case.call(leaves), leaves)
    expected = value_and_gradients(case.loop(exact), exact)
    step = torch.finfo(dtype).eps
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert (result.double() - reference).abs().max() <= 4 * step * reference.abs().max()


def test_result_in_another_dtype() -> None:
    """float32 tables under bfloat16 blocks, as open_clip keeps them: rounded before they are added."""
    case = Case(PACKED)
    leaves = case.leaves(torch.float32)
    embeddings, normed = case.call(leaves, dtype=torch.bfloat16)
    assert embeddings.dtype == normed.dtype == torch.bfloat16
    table, positions = leaves["token_embedding"].bfloat16(), leaves["position_embedding"].bfloat16()
    assert torch.equal(embeddings[:, 0], (table[5] + positions[0]).expand(2, -1))
    gradients = torch.autograd.grad(normed.float().sum() + embeddings.float().sum(), list(leaves.values()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_every_image_has_its_own_vectors() -> None:
    case = Case(PACKED)
    embeddings, _ = case.call(case.leaves())
    assert torch.equal(embeddings[0, 0], embeddings[1, 0])
    assert not torch.equal(embeddings[0, 1], embeddings[1, 1])


def test_inputs_left_alone_and_views() -> None:
    case = Case(DENSE)
    expected = case.call(case.leaves())
    wide = {name: torch.full((*tensor.shape, 2), 99.0, dtype=torch.float64) for name, tensor in case.leaves().items()}
    for name, tensor in case.leaves().items():
        wide[name][..., 0] = tensor.detach()
    before = {name: tensor.clone() for name, tensor in wide.items()}
    views = {name: tensor[..., 0].requires_grad_() for name, tensor in wide.items()}
    results = case.call(views)
    torch.autograd.grad(results[1].sum(), list(views.values()))
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(wide[name].detach(), tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("images", "vectors"), [(0, 3), (2, 0)])
def test_nothing_learned(images: int, vectors: int) -> None:
    context = torch.ones(images, vectors, WIDTH, requires_grad=True)
    tokens = torch.tensor([1, 2] if vectors == 0 else [1, -1, 2])
    embeddings, normed = embed_prompts(tokens, torch.ones(9, WIDTH), context=context)
    assert normed is None
    assert embeddings.shape == (images, len(tokens), WIDTH)
    embeddings.sum().backward()
    assert context.grad is not None
    assert context.grad.shape == context.shape


def test_opcheck() -> None:
    case = Case(DENSE)
    leaves = case.leaves()
    arguments = (
        case.tokens, leaves["token_embedding"], leaves["context"], leaves["attribute"], leaves["position_embedding"],
        case.positions, leaves["norm_weight"], leaves["norm_bias"], EPS, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastsds.embed_prompts.default, arguments)
    upstream = torch.randn(2, *case.tokens.shape, WIDTH, dtype=torch.float64)
    embeddings = torch.ops.fastsds.embed_prompts(*arguments)[0].detach()
    detached = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    torch.library.opcheck(
        torch.ops.fastsds.embed_prompts_backward.default,
        (upstream, upstream, embeddings, *detached, [True, True, False, False, False, False]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    case = Case(PACKED)
    compiled = torch.compile(lambda leaves: case.call(leaves), fullgraph=True, backend="aot_eager")
    leaves = case.leaves()
    results = value_and_gradients(compiled(leaves), leaves)
    for result, reference in zip(results, value_and_gradients(case.call(leaves), leaves), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_embedding": torch.ones(9)}, "token_embedding: expected [vocabulary, width], got [9]"),
        ({"token_embedding": torch.ones(9, 4).int()}, "token_embedding: expected one of [torch.float32, "),
        ({"context": torch.ones(2, 3, 5)}, "context: expected [images, vectors, width=4], got [2, 3, 5]"),
        ({"context": torch.ones(2, 3, 4).int()}, "context: expected one of [torch.float32, "),
        ({"attribute": torch.ones(3, 4)}, "attribute: expected [images=2, width=4], got [3, 4]"),
        ({"attribute": torch.ones(2, 5)}, "attribute: expected [images=2, width=4], got [2, 5]"),
        ({"tokens": torch.ones(3)}, "tokens: expected torch.int64, got torch.float32"),
        ({"positions": torch.ones(3).int()}, "positions: expected torch.int64, got torch.int32"),
        ({"positions": torch.zeros(2).long()}, "positions: expected the shape of tokens [3], got [2]"),
        ({"positions": None}, "positions: expected together with position_embedding, got one of them"),
        ({"position_embedding": torch.ones(7, 5)}, "position_embedding: expected [context_length, width=4], got [7, 5"),
        ({"norm_weight": torch.ones(5)}, "norm_weight: expected [width=4], got [5]"),
        ({"norm_bias": torch.ones(5)}, "norm_bias: expected [width=4], got [5]"),
        ({"dtype": torch.int32}, "dtype: expected one of [torch.float32, "),
        ({"attribute": torch.ones(2, 4, device="meta")}, "attribute: expected on the device of token_embedding ("),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    device = torch.ones(1).device
    arguments: dict[str, Any] = {
        "tokens": torch.tensor([1, -1, 2]), "token_embedding": torch.ones(9, 4), "context": torch.ones(2, 3, 4),
        "attribute": torch.ones(2, 4), "position_embedding": torch.ones(7, 4), "positions": torch.zeros(3).long(),
        "norm_weight": torch.ones(4), "norm_bias": torch.ones(4), "eps": EPS, **changes,
    }  # fmt: skip
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        embed_prompts(arguments.pop("tokens"), arguments.pop("token_embedding"), **arguments)
