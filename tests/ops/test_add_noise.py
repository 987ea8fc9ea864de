"""`add_noise` against the formula written out in NumPy float64, in every dtype, layout and slice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsds.ops import add_noise

LOW_PRECISION = [torch.float32, torch.float16, torch.bfloat16]
SEED = 1234
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _inputs(
    shape: tuple[int, ...] = (3, 4, 5, 6), draws: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    latents = torch.randn(shape, generator=generator).to(dtype)
    angle = torch.rand(shape[0], draws, generator=generator) * 1.5
    return latents, angle.cos(), angle.sin(), torch.tensor(SEED)


def _expected(oracle: Any, latents: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, start: int = 0) -> Tensor:
    """float64, from the inputs as they are in their dtype."""
    z = latents.detach().double().unsqueeze(1)
    column = (...,) + (None,) * (latents.dim() - 1)
    eps = oracle.noise(SEED, (*alpha_t.shape, *latents.shape[1:]), start=start)
    return alpha_t.double()[column] * z + sigma_t.double()[column] * eps


def _in_dtype(oracle: Any, latents: Tensor, alpha_t: Tensor, sigma_t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain PyTorch at one precision throughout: the error that the op is measured by."""
    column = (...,) + (None,) * (latents.dim() - 1)
    eps = oracle.noise(SEED, (*alpha_t.shape, *latents.shape[1:]), dtype=np.float32).to(dtype)
    return alpha_t.to(dtype)[column] * latents.to(dtype).unsqueeze(1) + sigma_t.to(dtype)[column] * eps


def _assert_as_accurate(actual: Tensor, plain: Tensor, expected: Tensor) -> None:
    error, allowed = (actual.double() - expected).abs().max(), (plain.double() - expected).abs().max()
    assert error <= 2 * allowed + 1e-7, f"error {error:.3g}, plain PyTorch has {allowed:.3g}"


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("output", [None, *LOW_PRECISION])
@pytest.mark.parametrize("coefficients", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_as_accurate_as_plain_pytorch(
    oracle: Any, dtype: torch.dtype, output: torch.dtype | None, coefficients: torch.dtype, layout: torch.memory_format
) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, 4, 4, 6), dtype=dtype)
    latents = latents.to(memory_format=layout)
    noised = add_noise(latents, alpha_t.to(coefficients), sigma_t.to(coefficients), seed, dtype=output)
    assert noised.dtype == (output or dtype)
    assert noised.shape == (2, 2, 4, 4, 6)
    plain = _in_dtype(oracle, latents, alpha_t, sigma_t, output or dtype)
    _assert_as_accurate(noised, plain, _expected(oracle, latents, alpha_t, sigma_t))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_rounded_once(oracle: Any, dtype: torch.dtype) -> None:
    """Against the float32 sum, the result is off by its own rounding and no more."""
    latents, alpha_t, sigma_t, seed = _inputs(dtype=dtype)
    expected = _expected(oracle, latents, alpha_t, sigma_t)
    noised = add_noise(latents, alpha_t, sigma_t, seed).double()
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((noised - expected).abs() <= expected.abs() * half_ulp * 1.01 + 5e-6).all()


def test_float64_latents(oracle: Any) -> None:
    """The normals are float32 by contract; everything else is float64."""
    latents, alpha_t, sigma_t, seed = _inputs(dtype=torch.float64)
    latents = latents + torch.randn_like(latents) * 1e-9
    noised = add_noise(latents, alpha_t.double(), sigma_t.double(), seed)
    assert noised.dtype == torch.float64
    torch.testing.assert_close(noised, _expected(oracle, latents, alpha_t, sigma_t), rtol=0, atol=5e-6)
    signal = add_noise(latents, alpha_t.double(), torch.zeros_like(sigma_t), seed)
    torch.testing.assert_close(
        signal, alpha_t.double()[..., None, None, None] * latents.unsqueeze(1), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 5), (1, 1), (2, 3, 4, 5), (2, 2, 3, 2, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("draws", [1, 3])
def test_any_latent_shape(oracle: Any, shape: tuple[int, ...], draws: int) -> None:
    """Sizes whose elements do not fill the blocks of four, down to one element."""
    latents, alpha_t, sigma_t, seed = _inputs(shape, draws)
    noised = add_noise(latents, alpha_t, sigma_t, seed)
    assert noised.shape == (shape[0], draws, *shape[1:])
    torch.testing.assert_close(noised.double(), _expected(oracle, latents, alpha_t, sigma_t), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("numel", [127, 128, 129, 255, 511, 512, 513, 516, 1023, 1025])
def test_sizes_around_blocks(oracle: Any, numel: int) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, numel), draws=1)
    noised = add_noise(latents, alpha_t, sigma_t, seed)
    torch.testing.assert_close(noised.double(), _expected(oracle, latents, alpha_t, sigma_t), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0), (0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    latents, alpha_t, sigma_t, seed = _inputs(shape)
    latents.requires_grad_()
    noised = add_noise(latents, alpha_t, sigma_t, seed)
    assert noised.shape == (shape[0], 2, *shape[1:])
    noised.sum().backward()
    assert latents.grad is not None
    assert latents.grad.shape == shape


def test_no_draws() -> None:
    latents, alpha_t, sigma_t, seed = _inputs(draws=0)
    assert add_noise(latents, alpha_t, sigma_t, seed).shape == (3, 0, 4, 5, 6)


def test_draws_have_noise_of_their_own() -> None:
    latents, _, _, seed = _inputs()
    noise = add_noise(latents, torch.zeros(3, 2), torch.ones(3, 2), seed).flatten(2)
    correlation = torch.corrcoef(noise.flatten(0, 1))
    assert (correlation - torch.eye(6)).abs().max() < 4 / 120**0.5


@pytest.mark.smoke
def test_replays_by_seed() -> None:
    latents, alpha_t, sigma_t, seed = _inputs()
    noised = add_noise(latents, alpha_t, sigma_t, seed)
    assert torch.equal(noised, add_noise(latents, alpha_t, sigma_t, seed.reshape(1)))
    assert not torch.isclose(noised, add_noise(latents, alpha_t, sigma_t, seed + 1)).any()


# Channels that are a power of two or not, more of them than a block has, and pixels that fill fours or do not.
@pytest.mark.parametrize("latent", [(4, 5, 6), (4, 8, 8), (16, 6, 6), (2, 2, 2), (3, 4, 4), (256, 2, 2), (8, 1, 3)])
def test_channels_last_is_contiguous_transposed(latent: tuple[int, ...]) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, *latent))
    contiguous = add_noise(latents, alpha_t, sigma_t, seed)
    strided = latents.to(memory_format=torch.channels_last).requires_grad_()
    noised = add_noise(strided, alpha_t, sigma_t, seed)
    assert torch.equal(noised, contiguous)
    upstream = torch.randn(noised.shape)
    (expected,) = torch.autograd.grad(noised, strided, upstream, retain_graph=True)
    laid_out = torch.empty_like(noised).copy_(upstream)
    assert laid_out.stride() == noised.stride()
    (gradient,) = torch.autograd.grad(noised, strided, laid_out)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", [None, torch.float16])
def test_channels_last_in_channels_last_out(output: torch.dtype | None) -> None:
    latents, alpha_t, sigma_t, seed = _inputs()
    contiguous = add_noise(latents, alpha_t, sigma_t, seed, dtype=output)
    assert contiguous.is_contiguous()
    strided = add_noise(latents.to(memory_format=torch.channels_last), alpha_t, sigma_t, seed, dtype=output)
    assert strided.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert strided.stride() == (2 * 120, 120, 1, 6 * 4, 4)
    assert torch.equal(strided, contiguous)


def _views(latents: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layouts of one tensor: the buffer around it, filled with a sentinel, and the view with its values."""
    batch, channels, height, width = latents.shape
    views = {}
    for offset in (1, 3, 5):
        buffer = torch.full((latents.numel() + 16,), 99.0)
        views[f"offset {offset}"] = buffer, buffer[offset : offset + latents.numel()].view(latents.shape)
    buffer = torch.full((batch + 2, channels + 1, height + 2, 2 * width + 1), 99.0)
    views["strided"] = buffer, buffer[1:-1, :-1, 2:, 1::2]
    buffer = torch.full((width, height, channels, batch), 99.0)
    views["transposed"] = buffer, buffer.permute(3, 2, 1, 0)
    for _, view in views.values():
        view.copy_(latents)
    buffer = latents[:, :1].clone()
    views["expanded"] = buffer, buffer.expand(latents.shape)
    return views


@pytest.mark.parametrize("layout", ["offset 1", "offset 3", "offset 5", "strided", "transposed", "expanded"])
def test_views(layout: str) -> None:
    latents, alpha_t, sigma_t, seed = _inputs()
    buffer, view = _views(latents)[layout]
    before, coefficients = buffer.clone(), torch.stack([alpha_t, sigma_t], dim=2)
    expected = add_noise(view.clone(memory_format=torch.contiguous_format), alpha_t, sigma_t, seed)
    noised = add_noise(view, coefficients[..., 0], coefficients[..., 1], seed)
    assert torch.equal(noised, expected)
    assert torch.equal(buffer, before)


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the kernel has no huge pages")
def test_large_results_ask_for_huge_pages(backend: str) -> None:
    """Mapped anew for each call, which in pages of 4 KiB takes longer than the noise."""
    if backend != "cpp-cpu":
        pytest.skip("a matter of the extension's memory")
    noised = add_noise(torch.zeros(1, 12 * 2**20), torch.ones(1, 1), torch.ones(1, 1), torch.tensor(SEED))
    assert "hg" in _flags_of_mapping(noised.data_ptr() + noised.nbytes // 2)


def _flags_of_mapping(address: int) -> list[str]:
    """The kernel's flags for the memory at an address: `hg` says that huge pages are wanted."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


def test_inputs_are_not_written_to_nor_returned() -> None:
    inputs = _inputs()
    before = [tensor.clone() for tensor in inputs]
    noised = add_noise(inputs[0], torch.ones(3, 2), torch.zeros(3, 2), inputs[3])
    noised.zero_()
    add_noise(*inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 7)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_slices_have_the_noise_of_the_whole(shape: tuple[int, ...], size: int) -> None:
    latents, alpha_t, sigma_t, seed = _inputs(shape, draws=3)
    whole = add_noise(latents, alpha_t, sigma_t, seed)
    pieces = [
        add_noise(latents[i : i + size], alpha_t[i : i + size], sigma_t[i : i + size], seed, batch_offset=i)
        for i in range(0, 5, size)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_batch_offset_past_32_bits(oracle: Any) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, 7), draws=3)
    offset = 2**33 + 5
    noised = add_noise(latents, alpha_t, sigma_t, seed, batch_offset=offset)
    expected = _expected(oracle, latents, alpha_t, sigma_t, start=offset * 21)
    torch.testing.assert_close(noised.double(), expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("numel", [2048, 2052])
def test_counters_on_both_sides_of_32_bits(oracle: Any, numel: int) -> None:
    """Where the counter's upper word begins to count: between two latents that fill whole blocks, and within one."""
    latents, alpha_t, sigma_t, seed = _inputs((2, numel), draws=1)
    offset = 2**34 // numel - (numel == 2048)
    noised = add_noise(latents, alpha_t, sigma_t, seed, batch_offset=offset)
    assert offset * numel < 2**34 < (offset + 2) * numel
    expected = _expected(oracle, latents, alpha_t, sigma_t, start=offset * numel)
    torch.testing.assert_close(noised.double(), expected, rtol=1e-6, atol=5e-6)


def test_gradient_in_float64(backend: str) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, 3, 2, 2), draws=3, dtype=torch.float64)
    latents.requires_grad_()
    interpreted = backend == "triton-cpu"  # which takes a second for a few dozen calls
    assert torch.autograd.gradcheck(lambda z: add_noise(z, alpha_t, sigma_t, seed), (latents,), fast_mode=interpreted)


def test_second_derivatives() -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, 3, 2), dtype=torch.float64)
    latents.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda z: add_noise(z, alpha_t, sigma_t, seed).pow(3), (latents,), fast_mode=True
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16])
def test_gradient_is_summed_over_draws_before_rounding(dtype: torch.dtype, output: torch.dtype) -> None:
    latents, alpha_t, sigma_t, seed = _inputs(draws=5, dtype=dtype)
    latents.requires_grad_()
    noised = add_noise(latents, alpha_t, sigma_t, seed, dtype=output)
    upstream = torch.randn(noised.shape).to(output)
    (gradient,) = torch.autograd.grad(noised, latents, upstream)
    assert gradient.dtype == dtype
    expected = (alpha_t.double()[..., None, None, None] * upstream.double()).sum(dim=1)
    rounding = torch.finfo(dtype).eps / 2
    assert ((gradient.double() - expected).abs() <= expected.abs() * rounding * 1.01 + 2e-6).all()


def test_coefficients_are_not_differentiated() -> None:
    latents, alpha_t, sigma_t, seed = _inputs()
    alpha_t.requires_grad_()
    add_noise(latents.requires_grad_(), alpha_t, sigma_t, seed).sum().backward()
    assert alpha_t.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format) -> None:
    latents, alpha_t, sigma_t, seed = _inputs((2, 3, 2, 2))
    latents = latents.to(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.fastsds.add_noise.default, (latents, alpha_t, sigma_t, seed, torch.bfloat16, 3))


def test_opcheck_backward() -> None:
    grad = torch.randn(2, 3, 4, 2, 2).to(memory_format=torch.channels_last_3d)
    torch.library.opcheck(torch.ops.fastsds.add_noise_backward.default, (grad, torch.rand(2, 3), torch.float16))


def test_more_than_2_31_elements_in_shape() -> None:
    """Of the fake, on any machine; `test_more_than_2_31_elements` runs it."""
    with FakeTensorMode():
        latents, coefficient = torch.empty(3, 2**20, 1000, dtype=torch.bfloat16), torch.empty(3, 2)
        noised = add_noise(latents, coefficient, coefficient, torch.empty((), dtype=torch.int64), batch_offset=2**40)
    assert noised.shape == (3, 2, 2**20, 1000)
    assert noised.stride() == (2**21 * 1000, 2**20 * 1000, 1000, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 8 GB and seconds on a GPU, minutes on a CPU")
def test_more_than_2_31_elements(oracle: Any, backend: str) -> None:
    """The last of more than 2**31 elements: no index has wrapped around."""
    if backend != "triton-cuda":
        pytest.skip("of the GPU's kernels")
    batch, numel = 2**16 + 8, 2**15 + 4
    latents = torch.zeros(batch, numel, dtype=torch.bfloat16)
    alpha_t, sigma_t = torch.ones(batch, 1), torch.ones(batch, 1)
    noised = add_noise(latents, alpha_t, sigma_t, torch.tensor(SEED))
    expected = oracle.noise(SEED, (numel,), start=(batch - 1) * numel)
    torch.testing.assert_close(noised[-1, 0].double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_graph_replays_with_the_noise_of_the_seed_in_place(backend: str) -> None:
    if not backend.startswith(("triton-cuda", "cuda-cuda")):
        pytest.skip("of the GPU's kernels")
    latents, alpha_t, sigma_t, seed = _inputs()
    add_noise(latents, alpha_t, sigma_t, seed)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noised = add_noise(latents, alpha_t, sigma_t, seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(noised, add_noise(latents, alpha_t, sigma_t, torch.tensor(value)))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    latents, alpha_t, sigma_t, seed = _inputs((2, 4, 2, 2))

    def function(z: Tensor) -> Tensor:
        return add_noise(2 * z, alpha_t, sigma_t, seed, batch_offset=1).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        z = latents.clone().requires_grad_()
        value = run(z)
        value.backward()
        results.append((value.detach(), z.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.ones(3)}, "latents: expected [batch, *latent], at least 2-D, got [3]"),
        ({"latents": torch.ones(3, 4, dtype=torch.int64)}, "latents: expected one of [torch.float32, "),
        ({"latents": torch.ones(3, 4, dtype=torch.complex64)}, "got torch.complex64"),
        ({"alpha_t": torch.ones(4, 2)}, "alpha_t: expected [batch=3, draws], got [4, 2]"),
        ({"alpha_t": torch.ones(3)}, "alpha_t: expected [batch=3, draws], got [3]"),
        ({"alpha_t": torch.ones(3, 2).half()}, "alpha_t: expected one of [torch.float32, torch.float64], got"),
        ({"sigma_t": torch.ones(3, 1)}, "sigma_t: expected the shape of alpha_t [3, 2], got [3, 1]"),
        ({"sigma_t": torch.ones(3, 2).bfloat16()}, "sigma_t: expected one of [torch.float32, torch.float64], got"),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed: expected one int64 in a tensor, got shape [] of torch"),
        ({"seed": torch.tensor([1, 2])}, "seed: expected one int64 in a tensor, got shape [2] of torch.int64"),
        ({"dtype": torch.int8}, "dtype: expected one of [torch.float32, torch.float16, torch.bfloat16, torch.float64]"),
        ({"batch_offset": -1}, "batch_offset: expected at least 0, got -1"),
        ({"alpha_t": torch.ones(3, 2, device="meta")}, "alpha_t: expected on the device of latents (cpu), got meta"),
        ({"seed": torch.tensor(1, device="meta")}, "seed: expected on the device of latents (cpu), got meta"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("latents", "alpha_t", "sigma_t", "seed"), _inputs((3, 4)), strict=True))
    message = message.replace("(cpu)", f"({arguments['latents'].device})")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        add_noise(**{**arguments, **changes})
