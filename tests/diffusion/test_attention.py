"""xformers' attention where it works, PyTorch's with a line that says so where it does not."""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import diffusers.models.attention_processor as diffusers_attention
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsds.diffusion.attention import use_attention


@pytest.fixture(params=["sd", "sdxl", "sd3"])
def denoiser(request: pytest.FixtureRequest) -> Any:
    parts = request.getfixturevalue("teacher_parts" if request.param == "sd" else f"{request.param}_parts")
    return copy.deepcopy(parts["transformer" if request.param == "sd3" else "unet"])


def _predict(denoiser: Any) -> Tensor:
    torch.manual_seed(0)
    channels, config = denoiser.config.in_channels, denoiser.config
    noised, t = torch.randn(2, channels, 8, 8), torch.tensor([10.0, 500.0])
    if hasattr(config, "joint_attention_dim"):
        return denoiser(
            noised,
            timestep=t,
            encoder_hidden_states=torch.randn(2, 12, config.joint_attention_dim),
            pooled_projections=torch.randn(2, config.pooled_projection_dim),
        ).sample
    conditions = {"text_embeds": torch.randn(2, 24), "time_ids": torch.full((2, 6), 32.0)}
    text = torch.randn(2, 12, config.cross_attention_dim)
    return denoiser(noised, t, text, added_cond_kwargs=conditions if config.addition_embed_type else None).sample


@pytest.fixture
def install_xformers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Puts a stand-in for xformers, with the given attention, where diffusers and the library look for it."""

    def install(attention: Callable[..., Tensor]) -> None:
        package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
        package.ops, ops.memory_efficient_attention = ops, attention  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        monkeypatch.setattr(diffusers_attention, "xformers", package, raising=False)
        monkeypatch.setattr(diffusers_attention, "is_xformers_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # diffusers asks, and tries it on cuda
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *args, device=None, **kwargs: randn(*args, **kwargs))

    return install


def test_xformers_serves_where_it_works(denoiser: Any, install_xformers: Any) -> None:
    calls = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(query.shape)
        return F.scaled_dot_product_attention(query, key, value, scale=options.get("scale"))

    expected = _predict(denoiser)
    install_xformers(attention)
    use_attention(denoiser, "xformers")
    calls.clear()
    torch.testing.assert_close(_predict(denoiser), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(denoiser.attn_processors) > 0


def _no_kernels(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query: …")


def _no_gradient(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value).detach()


@pytest.mark.parametrize(
    ("attention", "cause"),
    [
        (_no_kernels, "NotImplementedError: No operator found for `memory_efficient_attention_forward` with inputs:"),
        (_no_gradient, "RuntimeError: element 0 of tensors does not require grad"),
        (lambda query, key, value, **_: 2 * value + query, "RuntimeError: its result is not that of attention"),
    ],
)
def test_pytorch_serves_where_xformers_fails(denoiser: Any, install_xformers: Any, attention: Any, cause: str) -> None:
    install_xformers(attention)
    _serves_as_before(denoiser, cause)


def test_pytorch_serves_without_xformers(denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    _serves_as_before(denoiser, "ModuleNotFoundError: import of xformers")


def _serves_as_before(denoiser: Any, cause: str) -> None:
    expected, processors = _predict(denoiser), dict(denoiser.attn_processors)
    message = f"attention: xformers cannot serve torch.float32 on cpu ({cause}"
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        use_attention(denoiser, "xformers")
    assert str(caught[0].message).endswith("); PyTorch's attention is used")
    assert "\n" not in str(caught[0].message)
    assert denoiser.attn_processors == processors
    assert torch.equal(_predict(denoiser), expected)


def test_pytorch_is_not_probed(denoiser: Any, recwarn: pytest.WarningsRecorder) -> None:
    processors = dict(denoiser.attn_processors)
    use_attention(denoiser, "torch")
    assert denoiser.attn_processors == processors
    assert not recwarn


def test_refused_name(denoiser: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("attention: expected one of ('torch', 'xformers'), got 'flash'")):
        use_attention(denoiser, "flash")  # type: ignore[arg-type]
