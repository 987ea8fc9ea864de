"""The extension's loader: what it says where the extension cannot serve; and what native code owes the contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsds.diffusion import NoiseSchedule
from fastsds.ops import BackendUnavailableError, _dispatch, _extension, add_noise, sample_timesteps, sds_loss

Record = Callable[..., None]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Record]:
    """Puts another record of the build in the place of the real one."""

    def forget() -> None:
        _extension.build.cache_clear()
        _extension.failure.cache_clear()
        _dispatch._choices.clear()

    def write(**facts: Any) -> None:
        (tmp_path / "_build.json").write_text(json.dumps({"torch": None, "cuda": None, "problem": None, **facts}))
        monkeypatch.setattr(_extension, "RECORD", tmp_path / "_build.json")
        forget()

    yield write
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"torch": "2.3.1+cu121"},
            f"was built for torch 2.3.1+cu121, this is torch {torch.__version__}; rebuild it with",
        ),
        (
            {"torch": torch.__version__, "cuda": "9.2"},
            f"was built for CUDA 9.2, this torch is for {torch.version.cuda}; rebuild it with",
        ),
        (
            {"problem": "no C++ compiler (c++) was found at install time"},
            "was not built: no C++ compiler (c++) was found at install time; mend that and rebuild it with",
        ),
    ],
)
def test_what_is_said_when_it_cannot_serve(
    record: Record, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], message: str
) -> None:
    record(**facts)
    choice = _dispatch.choose("add_noise", "cpu")
    assert choice.backend == "reference"
    assert message in choice.reason
    assert "`pip install . --no-build-isolation`" in choice.reason
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "cpp")
    with pytest.raises(BackendUnavailableError) as error:
        _dispatch.choose("add_noise", "cpu")
    assert message in str(error.value)


def test_a_missing_record_is_no_failed_import(record: Record) -> None:
    record()
    _extension.RECORD.unlink()
    _extension.build.cache_clear()
    assert "the package was not installed" in _dispatch.choose("sds_loss", "cpu").reason


def test_a_library_that_does_not_load_is_explained(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN2at")

    record(torch=torch.__version__)
    monkeypatch.setattr(_extension, "import_module", broken)
    reason = _dispatch.choose("add_noise", "cpu").reason
    assert f"built for torch {torch.__version__} does not load (undefined symbol: _ZN2at); rebuild" in reason


def test_cuda_is_asked_of_a_build_without_it(record: Record) -> None:
    pytest.importorskip("fastsds._C")
    record(torch=torch.__version__)
    choice = _dispatch.choose("sample_timesteps", "cuda")
    assert choice.backend == "reference"
    assert "built without CUDA" in choice.reason
    assert "FASTSDS_CUDA=1" in choice.reason


@pytest.fixture
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastsds._C")
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "cpp")


@pytest.mark.smoke
@pytest.mark.usefixtures("_native")
def test_the_number_of_threads_changes_no_bit() -> None:
    """A latent of several blocks, the last of them not full."""
    latents, prediction = torch.randn(3, 4, 33, 41), torch.randn(3, 2, 4, 33, 41, requires_grad=True)
    alpha_t, weight, seed = torch.rand(3, 2) + 0.1, torch.rand(3, 2), torch.tensor(11)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            noised = add_noise(latents, alpha_t, 1 - alpha_t, seed)
            loss = sds_loss(prediction, latents, alpha_t, 1 - alpha_t, weight, seed, prediction_type="flow")
            results.append((noised, loss.detach(), *torch.autograd.grad(loss.sum(), prediction)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert torch.equal(first, other)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("offset", [0, 2**34 // 4098, 2**32 - 1025, 2**45])
def test_noise_far_out_in_the_stream(oracle: Any, offset: int) -> None:
    """Past 2**34 elements the counter's second word counts; vector and single-block code meet in 4098 of them."""
    latents, one = torch.zeros(1, 4098), torch.ones(1, 1)
    noise = add_noise(latents, one, one, torch.tensor(-3), batch_offset=offset)
    expected = oracle.noise(-3, (1, 1, 4098), start=offset * 4098)
    torch.testing.assert_close(noise.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.usefixtures("_native")
def test_plain_calls_do_not_go_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not dense does, with the same result."""

    def refuse(name: str, device_type: str) -> Any:
        raise AssertionError(f"{name} asked for its backend")

    latents, one, seed = torch.randn(2, 4, 3, 5, requires_grad=True), torch.ones(2, 1), torch.tensor(4)
    schedule = NoiseSchedule(torch.rand(9), torch.rand(9) + 0.1, torch.arange(9))
    strided = latents.detach().transpose(2, 3).contiguous().transpose(2, 3)
    expected = add_noise(strided, one, one, seed)
    monkeypatch.setattr(_dispatch, "choose", refuse)
    noised = add_noise(latents, one, one, seed)
    assert torch.equal(noised, expected)
    assert torch.equal(*torch.autograd.grad(noised, latents, noised), noised.squeeze(1))
    sds_loss(noised.detach(), latents.detach(), one, one, one, seed)
    sample_timesteps(schedule, 2, 1, seed)
    with pytest.raises(AssertionError, match="add_noise asked for its backend"):
        add_noise(strided, one, one, seed)


def test_gradient_without_the_extension() -> None:
    """In a process that never loads it: Python's own registration serves."""
    program = """
import sys, torch
from fastsds.ops import add_noise
latents, alpha_t = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True), torch.rand(2, 3)
assert torch.autograd.gradcheck(lambda z: add_noise(z, alpha_t, alpha_t, torch.tensor(5)), (latents,))
assert "fastsds._C" not in sys.modules
"""
    environment = {**os.environ, _dispatch.ENVIRONMENT_VARIABLE: "reference"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
