"""`prefix_attention` against PyTorch's own attention, prompt by prompt, on prefix and suffix put together."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastsds.ops import prefix_attention

HEADS, HEAD_DIM = 2, 12
LENGTHS = [1, 4, 2, 1, 7]
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


class Case:
    """Queries, keys and values in float64."""

    def __init__(
        self,
        lengths: list[int] = LENGTHS,
        *,
        images: int = 3,
        batch: int | None = None,
        prefix: int = 5,
        ends_only: bool = False,
        heads: int = HEADS,
        head_dim: int = HEAD_DIM,
    ) -> None:
        self.generator = torch.Generator().manual_seed(6)
        self.lengths, self.ends_only, self.images = lengths, ends_only, images
        self.offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch, tokens = images if batch is None else batch, sum(lengths)
        queries = len(lengths) if ends_only else tokens
        self.tensors = [
            self.random(batch, queries, heads, head_dim),
            *(self.random(batch, tokens, heads, head_dim) for _ in range(2)),
            *(self.random(images, prefix, heads, head_dim) for _ in range(2)),
        ]

    def random(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn.to(self.offsets.device)

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [tensor.to(dtype).detach().requires_grad_() for tensor in self.tensors]

    def call(self, leaves: list[Tensor]) -> Tensor:
        return prefix_attention(*leaves, self.offsets, max(self.lengths))

    def prompt_by_prompt(self, leaves: list[Tensor]) -> Tensor:
        q, k, v = (leaf.expand(self.images, -1, -1, -1) for leaf in leaves[:3])
        outputs = []
        for prompt, length in enumerate(self.lengths):
            start = int(self.offsets[prompt])
            tokens = slice(start, start + length)
            queries = q[:, prompt : prompt + 1] if self.ends_only else q[:, tokens]
            keys, values = torch.cat([leaves[3], k[:, tokens]], 1), torch.cat([leaves[4], v[:, tokens]], 1)
            causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).tril()[-queries.shape[1] :]
            heads_first = [tensor.transpose(1, 2) for tensor in (queries, keys, values)]
            outputs.append(scaled_dot_product_attention(*heads_first, attn_mask=causal).transpose(1, 2))
        return torch.cat(outputs, dim=1)


def value_and_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(output.shape, generator=generator, device="cpu").to(output)
    return [output, *torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], upstream)]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ends_only", [False, True])
@pytest.mark.parametrize("batch", [3, 1])
def test_equals_attention_prompt_by_prompt(ends_only: bool, batch: int) -> None:
    case = Case(ends_only=ends_only, batch=batch)
    leaves = case.leaves()
    assert_close(
        value_and_gradients(case.call(leaves), leaves), value_and_gradients(case.prompt_by_prompt(leaves), leaves)
    )


@pytest.mark.parametrize(
    ("lengths", "prefix", "heads", "head_dim"),
    [
        ([1], 1, 1, 1),
        ([1, 1, 1], 2, 1, 16),
        ([60], 3, 1, 8),
        ([3] * 40, 4, 1, 8),  # more prompts than a block holds
        ([33, 1, 31, 32], 17, 1, 4),  # around the kernels' blocks
        ([2, 5], 6, 3, 70),
    ],
)
@pytest.mark.parametrize("ends_only", [False, True])
def test_sizes(lengths: list[int], prefix: int, heads: int, head_dim: int, ends_only: bool) -> None:
    case = Case(lengths, images=2, prefix=prefix, heads=heads, head_dim=head_dim, ends_only=ends_only)
    leaves = case.leaves()
    assert_close(
        value_and_gradients(case.call(leaves), leaves), value_and_gradients(case.prompt_by_prompt(leaves), leaves)
    )


@pytest.mark.parametrize("batch", [3, 1])
def test_suffixes_without_gradients(batch: int) -> None:
    """As in a frozen tower's first block, where suffixes depend on nothing learned."""
    case = Case(batch=batch)
    leaves = [leaf.requires_grad_(name.startswith("prefix")) for name, leaf in zip(NAMES, case.leaves(), strict=True)]
    results = value_and_gradients(case.call(leaves), leaves)
    assert len(results) == 3
    assert_close(results, value_and_gradients(case.prompt_by_prompt(leaves), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ends_only", [False, True])
def test_low_precision_loses_no_more_than_pytorch(dtype: torch.dtype, ends_only: bool) -> None:
    case = Case(ends_only=ends_only)
    leaves = case.leaves(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truths = value_and_gradients(case.prompt_by_prompt(exact), exact)
    lossy = value_and_gradients(case.prompt_by_prompt(leaves), leaves)
    for result, truth, reference in zip(value_and_gradients(case.call(leaves), leaves), truths, lossy, strict=True):
        assert result.dtype == dtype
        error, allowed = (result.double() - truth).norm(), (reference.double() - truth).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.norm() / 4


def test_large_logits_do_not_overflow() -> None:
    case = Case()
    leaves = [leaf.detach().mul(100).requires_grad_() for leaf in case.leaves()]
    results = value_and_gradients(case.call(leaves), leaves)
    assert all(result.isfinite().all() for result in results)
    assert_close(results, value_and_gradients(case.prompt_by_prompt(leaves), leaves), 1e-8)


def test_views_are_read_where_they_lie_and_left_alone() -> None:
    case = Case()
    leaves = case.leaves()
    expected = value_and_gradients(case.call(leaves), leaves)
    fused = torch.stack([leaf.detach() for leaf in leaves[:3]], dim=2)
    turned = [leaf.detach().transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves[3:]]
    before = [tensor.clone() for tensor in (fused, *turned)]
    views = [tensor.detach().requires_grad_() for tensor in (*fused.unbind(2), *turned)]
    assert not views[0].is_contiguous()
    assert_close(value_and_gradients(case.call(views), views), expected)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((fused, *turned), before, strict=True))


def test_prefix_that_is_the_same_for_all_images() -> None:
    case = Case()
    q, k, v, *prefix = case.leaves()
    one = [tensor[:1].detach().requires_grad_() for tensor in prefix]
    output = case.call([q, k, v, *(tensor.expand(3, -1, -1, -1) for tensor in one)])
    expected = case.prompt_by_prompt([q, k, v, *(tensor.expand(3, -1, -1, -1) for tensor in one)])
    assert_close(value_and_gradients(output, [q, *one]), value_and_gradients(expected, [q, *one]))


def test_gradients_are_the_same_in_every_run() -> None:
    """Bit for bit; the extension's with any number of threads."""
    case = Case([2] * 70, images=2, heads=1, head_dim=4)
    leaves = case.leaves(torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(value_and_gradients(case.call(leaves), leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_no_images() -> None:
    case = Case(images=0)
    leaves = case.leaves()
    results = value_and_gradients(case.call(leaves), leaves)
    assert [result.shape for result in results] == [leaves[0].shape, *(leaf.shape for leaf in leaves)]


@pytest.mark.parametrize(("ends_only", "batch"), [(False, 2), (True, 1)])
def test_opcheck(ends_only: bool, batch: int) -> None:
    case = Case([1, 3, 2], images=2, batch=batch, ends_only=ends_only, head_dim=4)
    arguments = (*case.leaves(), case.offsets, 3)
    torch.library.opcheck(torch.ops.fastsds.prefix_attention.default, arguments)
    tensors = [leaf.detach() for leaf in case.leaves()]
    out, log_sums = torch.ops.fastsds.prefix_attention(*tensors, case.offsets, 3)
    torch.library.opcheck(
        torch.ops.fastsds.prefix_attention_backward.default,
        (torch.randn_like(out), out, log_sums, *tensors, case.offsets, 3, batch == 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    case = Case()
    compiled = torch.compile(lambda leaves: case.call(leaves).sin(), fullgraph=True, backend="aot_eager")
    leaves = case.leaves()
    assert_close(value_and_gradients(compiled(leaves), leaves), value_and_gradients(case.call(leaves).sin(), leaves))


@pytest.mark.parametrize(
    "offsets", [[0, 1, 5, 7, 8, 14], [1, 2, 5, 7, 8, 15], [0, 5, 1, 7, 8, 15], [0, 1, 1, 7, 8, 15]]
)
def test_offsets_that_do_not_fit_are_refused_by_the_extension(offsets: list[int], backend: str) -> None:
    if backend != "cpp-cpu":
        pytest.skip("elsewhere their values are not read on the host")
    case = Case()
    case.offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"offsets: expected to rise from 0 to 15 in steps of 1 to max_length=7"):
        case.call(case.leaves())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 6, 3)}, "q: expected [batch, queries, heads, head_dim], got [2, 6, 3]"),
        ({"q": torch.ones(2, 6, 3, 4).int()}, "q: expected one of [torch.float32, "),
        ({"q": torch.ones(2, 5, 3, 4)}, "q: expected queries for 6 tokens or 3 prompts, got 5"),
        ({"k": torch.ones(2, 6, 3, 5)}, "k: expected [batch, tokens, *[3, 4]] as q, got [2, 6, 3, 5]"),
        ({"k": torch.ones(1, 6, 3, 4)}, "k: expected the batch of q (2), got 1"),
        ({"k": torch.ones(2, 6, 3, 4).double()}, "k: expected the dtype of q (torch.float32), got torch.float64"),
        ({"v": torch.ones(2, 5, 3, 4)}, "v: expected the shape of k [2, 6, 3, 4], got [2, 5, 3, 4]"),
        ({"prefix_k": torch.ones(2, 0, 3, 4)}, "prefix_k: expected a prefix of at least 1 token, got [2, 0, 3, 4]"),
        ({"prefix_v": torch.ones(2, 1, 3, 4)}, "prefix_v: expected the shape of prefix_k [2, 5, 3, 4], got [2, 1, 3"),
        (
            {name: torch.ones(2, 6, 3, 4) for name in ("q", "k", "v")}
            | {name: torch.ones(3, 5, 3, 4) for name in ("prefix_k", "prefix_v")},
            "q: expected a batch of 1 or of images=3, got 2",
        ),
        ({"offsets": torch.tensor([0, 2, 3, 6])}, "offsets: expected [prompts + 1] of torch.int32, got [4] of torch.i"),
        ({"max_length": 0}, "max_length: expected 1 to 6 (tokens of k), got 0"),
        ({"max_length": 7}, "max_length: expected 1 to 6 (tokens of k), got 7"),
        ({"offsets": torch.tensor([0, 2, 3, 6], dtype=torch.int32, device="meta")}, "offsets: expected on the device"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    device = torch.ones(1).device
    arguments: dict[str, Any] = {
        **{name: torch.ones(2, 6, 3, 4) for name in ("q", "k", "v")},
        **{name: torch.ones(2, 5, 3, 4) for name in ("prefix_k", "prefix_v")},
        "offsets": torch.tensor([0, 2, 3, 6], dtype=torch.int32), "max_length": 3, **changes,
    }  # fmt: skip
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        prefix_attention(**arguments)
