"""The Triton kernels beyond their results: what they compile to, how often they are launched, and what they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsds.ops import _dispatch, _triton, philox

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastsds.kernels import add_noise, sds_loss  # noqa: E402
from fastsds.kernels import philox as device_philox  # noqa: E402

KERNELS = (
    "add_noise_kernel", "add_noise_backward_kernel", "sds_loss_kernel", "prefix_attention_kernel", "in_queries_kernel",
    "in_keys_kernel", "embed_prompts_kernel", "in_vectors_kernel",
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
def test_every_variant_compiles_without_spills_for_every_architecture() -> None:
    """In processes of their own, because the interpreter of this one leaves no compiler behind."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("cubins.py"))
    processes = [
        subprocess.Popen([sys.executable, script, *pair], env=environment, stdout=subprocess.PIPE, text=True)
        for pair in (("80", "90"), ("100", "120"))
    ]
    lines = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    binaries = [json.loads(line) for line in lines]
    for architecture in (80, 90, 100, 120):
        ours = [binary for binary in binaries if binary["architecture"] == architecture]
        for kernel in KERNELS:
            registers = [binary["registers"] for binary in ours if binary["kernel"] == kernel]
            assert registers, f"{kernel} was not compiled for sm_{architecture}"
            print(f"sm_{architecture} {kernel}: {len(registers)} variants, {min(registers)}-{max(registers)} registers")
    spilling = [binary for binary in binaries if binary["stack"] or binary["local"]]
    assert not spilling


@triton.jit
def _words_kernel(words, normals, seed, first: tl.int64, STREAM: tl.constexpr, COUNT: tl.constexpr):  # noqa: N803
    counter = tl.arange(0, COUNT)
    block, at = tl.cast(first, tl.int64) + counter, 4 * counter
    w0, w1, w2, w3 = device_philox.words(tl.load(seed), block, STREAM)
    tl.store(words + at, w0.to(tl.int64))
    tl.store(words + at + 1, w1.to(tl.int64))
    tl.store(words + at + 2, w2.to(tl.int64))
    tl.store(words + at + 3, w3.to(tl.int64))
    n0, n1, n2, n3 = device_philox.normals(tl.load(seed), block)
    tl.store(normals + at, n0)
    tl.store(normals + at + 1, n1)
    tl.store(normals + at + 2, n2)
    tl.store(normals + at + 3, n3)


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 17, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**40 + 3])
@pytest.mark.parametrize("stream", [philox.NOISE_STREAM, philox.ROTATION_STREAM])
def test_words_are_philox_bit_for_bit(oracle: Any, seed: int, first: int, stream: int) -> None:
    words, normals = torch.empty(1024, dtype=torch.int64, device=DEVICE), torch.empty(1024, device=DEVICE)
    _words_kernel[(1,)](words, normals, torch.tensor(seed, device=DEVICE), first, STREAM=stream, COUNT=256)
    assert np.array_equal(words.cpu().numpy(), oracle.words(seed, 1024, start=4 * first, stream=stream))
    expected = oracle.noise(seed, (1024,), start=4 * first)
    # A GPU's square root may be off by an ulp.
    torch.testing.assert_close(normals.cpu().double(), expected, rtol=2**-22, atol=1e-6)


class _Count(TorchDispatchMode):
    """The ATen ops that compute or copy, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func._schema.name.startswith("aten::empty") or "new_empty" in func._schema.name):
            self.ops.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched during the test, by name; none runs."""
    names: list[str] = []
    for module in (add_noise, sds_loss):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "run", lambda *_, name=name, **__: names.append(name), raising=False)
    return names


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


@pytest.mark.parametrize(
    ("teacher", "latents_layout"),
    [("contiguous", "contiguous"), ("channels_last", "contiguous"), ("channels_last", "channels_last")],
)
@pytest.mark.parametrize(
    ("prediction_type", "jacobian", "guided"),
    [("epsilon", "full", False), ("v_prediction", "full", True), ("flow", "skip", True), ("sample", "full", False)],
)
def test_a_step_is_three_launches_and_nothing_else(
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
    teacher: str,
    latents_layout: str,
    prediction_type: str,
    jacobian: str,
    guided: bool,
) -> None:
    """Noise, loss with gradients, and the noise's backward: no op of PyTorch copies, casts or fills around them."""
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "triton")
    latents = torch.randn(2, 4, 8, 8, device=DEVICE)
    prediction = torch.randn(2, 3, 4, 8, 8, device=DEVICE).bfloat16()
    if latents_layout == "channels_last":
        latents = _channels_last(latents)
    if teacher == "channels_last":
        prediction = _channels_last(prediction)
    coefficient, seed = torch.rand(2, 3, device=DEVICE), torch.tensor(1, device=DEVICE)
    full = jacobian == "full"
    upstream = torch.ones((), device=DEVICE).expand(2, 3)  # as the backward of a sum gives it
    needs = [full, not full or prediction_type != "epsilon", full and guided]
    serve = {op: _dispatch.choose(op, DEVICE).function for op in _dispatch.ops() if "noise" in op or "sds" in op}
    with _Count() as count:
        serve["add_noise"](latents, coefficient, coefficient, seed, torch.bfloat16, 0)
        serve["sds_loss_backward"](
            upstream, prediction, latents, coefficient, coefficient, coefficient, seed, prediction_type,
            prediction if guided else None, 2.0 if guided else 1.0, jacobian, 0, needs,
        )  # fmt: skip
        if full:
            serve["add_noise_backward"](prediction, coefficient, torch.float32)
    expected = ["add_noise_kernel", "sds_loss_kernel", *(["add_noise_backward_kernel"] if full else [])]
    assert launches == expected
    assert count.ops == []


def _noise_and_loss() -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(3)
    latents = torch.randn(1, 4, 12, 12, generator=generator, device=DEVICE)
    prediction = torch.randn(1, 2, 4, 12, 12, generator=generator, device=DEVICE)
    alpha_t, sigma_t, one = (torch.full((1, 2), value, device=DEVICE) for value in (0.8, 0.6, 1.0))
    seed = torch.tensor(4, device=DEVICE)
    noised = torch.ops.fastsds.add_noise(latents, alpha_t, sigma_t, seed, None, 0)
    return noised, *torch.ops.fastsds.sds_loss_backward(
        one, prediction, latents, alpha_t, sigma_t, one, seed, "v_prediction", None, 1.0, "full", 0, [True, True, False]
    )


@pytest.mark.parametrize("max_warps", [1, 2])
def test_launch_shapes_change_no_result(monkeypatch: pytest.MonkeyPatch, max_warps: int) -> None:
    """Noise and gradients are the same to the bit; the loss is summed in another order."""
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "triton")
    noised, loss, *gradients = _noise_and_loss()
    for module, name in ((add_noise, "MAX_WARPS"), (sds_loss, "MAX_WARPS"), (sds_loss, "MAX_WARPS_FOR_SUMS")):
        assert getattr(module, name) > max_warps
        monkeypatch.setattr(module, name, max_warps)
    other_noised, other_loss, *other_gradients = _noise_and_loss()
    assert torch.equal(other_noised, noised)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="Triton compiles here")
def test_interpreter_serves_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert _dispatch.choose("add_noise", "cpu").backend != "triton"
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert _dispatch.choose("add_noise", "cpu").backend == "triton"


def test_without_triton_the_cause_is_given() -> None:
    program = "import sys; sys.modules['triton'] = None; from fastsds.ops import _dispatch; "
    program += "_dispatch.choose('add_noise', 'cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", _dispatch.ENVIRONMENT_VARIABLE: "triton"}
    failed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert re.search(r"BackendUnavailableError: Triton cannot be imported: .*triton", failed.stderr)


def test_triton_is_not_imported_with_the_package() -> None:
    program = "import sys, fastsds.ops; sys.exit('fastsds.kernels.tiles' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
