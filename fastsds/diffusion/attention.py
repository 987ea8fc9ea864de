"""Which kernels serve the denoiser's attention."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

Attention = Literal["torch", "xformers"]


def use_attention(denoiser: Any, attention: Attention) -> None:
    """Sets a diffusers model's attention; where xformers cannot serve, PyTorch's stays and a warning says why.

    Raises:
        ValueError: another name.
    """
    if attention not in get_args(Attention):
        raise ValueError(f"attention: expected one of {get_args(Attention)}, got {attention!r}")
    if attention == "torch":
        return
    parameter = next(denoiser.parameters())
    try:
        for head_dim in sorted(_head_dims(denoiser)):
            _probe_xformers(head_dim, parameter.device, parameter.dtype)
        denoiser.enable_xformers_memory_efficient_attention()
    except Exception as error:  # what fails here, and how, is up to xformers' build, the device and the dtype
        cause = str(error).strip().split("\n")[0]
        warnings.warn(
            f"attention: xformers cannot serve {parameter.dtype} on {parameter.device} "
            f"({type(error).__name__}: {cause}); PyTorch's attention is used",
            stacklevel=2,
        )


def _head_dims(denoiser: Any) -> set[int]:
    return {module.inner_dim // module.heads for module in denoiser.modules() if hasattr(module, "to_q")}


def _probe_xformers(head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """One small call, forward and backward: a build without kernels for this device imports well and fails here."""
    from xformers.ops import memory_efficient_attention

    generator = torch.Generator(device).manual_seed(0)
    query, key, value = torch.randn(3, 1, 8, head_dim, device=device, dtype=dtype, generator=generator)
    query.requires_grad_()
    with torch.enable_grad():
        output = memory_efficient_attention(query, key, value)
        output.sum().backward()
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    if not torch.allclose(output.float(), expected, rtol=0.02, atol=0.02):
        raise RuntimeError("its result is not that of attention")
