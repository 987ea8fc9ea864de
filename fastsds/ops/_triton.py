"""The Triton kernels as a backend, imported when an op first needs them."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from fastsds.ops import _dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def register(op: str, empty: Callable[..., Any]) -> None:
    """Offers the kernel of an op's name: `empty` makes the results from the op's arguments, the kernel fills them.

    It serves CUDA tensors; in Triton's interpreter CPU tensors too, but only where `FASTSDS_BACKEND` forces it.
    """
    device_types = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    _dispatch.register_backend(op, "triton", device_types, functools.partial(_load, op, empty))


def _load(op: str, empty: Callable[..., Any]) -> Callable[..., Any]:
    if INTERPRETED and os.environ.get(_dispatch.ENVIRONMENT_VARIABLE) != "triton":
        raise _dispatch.BackendUnavailableError(
            f"TRITON_INTERPRET=1, and the interpreter serves only under {_dispatch.ENVIRONMENT_VARIABLE}=triton"
        )
    fill = _kernel(op)
    if isinstance(fill, ImportError):
        raise _dispatch.BackendUnavailableError(f"Triton cannot be imported: {fill}") from fill
    return functools.partial(_filled, empty, fill)


def _filled(empty: Callable[..., Any], fill: Callable[..., None], *arguments: Any) -> Any:
    results = empty(*arguments)
    fill(results, *arguments)
    return results


@functools.cache
def _kernel(op: str) -> Callable[..., None] | ImportError:
    try:
        module = importlib.import_module(f"fastsds.kernels.{op.removesuffix('_backward')}")
    except ImportError as error:
        return error
    return getattr(module, op)
