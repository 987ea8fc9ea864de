"""The C++/CUDA extension `fastsds._C`: loaded when an op first needs it; a failure is remembered and explained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastsds.ops import _dispatch

RECORD = Path(__file__).parents[1] / "_build.json"
REBUILD = "rebuild it with `pip install . --no-build-isolation`"


@dataclass(frozen=True)
class Build:
    """What setup.py left beside the modules; it can be read where the extension itself would not load."""

    torch: str | None
    """The torch that the extension was built for."""
    cuda: str | None
    """The CUDA release of its kernels; None without CUDA kernels."""
    problem: str | None
    """Why there is no extension."""


@functools.cache
def build() -> Build:
    try:
        return Build(**json.loads(RECORD.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Build(None, None, "the package was not installed")


@functools.cache
def failure() -> str | None:
    """Why the extension cannot serve, and what to do; None once it is loaded."""
    built = build()
    if built.torch is None:
        return f"the extension was not built: {built.problem}; mend that and {REBUILD}"
    if _release(built.torch) != _release(torch.__version__):
        return f"the extension was built for torch {built.torch}, this is torch {torch.__version__}; {REBUILD}"
    if built.cuda is not None and _major(built.cuda) != _major(torch.version.cuda):
        return f"the extension was built for CUDA {built.cuda}, this torch is for {torch.version.cuda}; {REBUILD}"
    try:
        import_module("fastsds._C")
    except ImportError as error:
        return f"the extension built for torch {built.torch} does not load ({error}); {REBUILD}"
    return None


def describe() -> str:
    """The build in one line: compiler, torch, CUDA and its architectures; or why there is none, and what to do."""
    if (cause := failure()) is not None:
        return cause
    module = import_module("fastsds._C")
    cuda = f"CUDA {build().cuda} for {module.architectures}" if build().cuda else "no CUDA"
    return f"the extension was built by {module.compiler} for torch {module.torch}, with {cuda}"


def register(op: str, empty: Callable[..., Any] | None = None, *, cuda: bool = False) -> None:
    """Offers the extension's op of this name for CPU tensors and, with `cuda`, for CUDA tensors.

    `empty` makes the results from the op's arguments and the op fills them; without it the op makes them itself.
    """
    _dispatch.register_backend(op, "cpp", ("cpu",), functools.partial(_load, op, empty))
    if cuda:
        _dispatch.register_backend(op, "cuda", ("cuda",), functools.partial(_load_cuda, op, empty))


def _load(op: str, empty: Callable[..., Any] | None) -> Callable[..., Any]:
    if (cause := failure()) is not None:
        raise _dispatch.BackendUnavailableError(cause)
    native = getattr(torch.ops.fastsds_native, op).default
    return native if empty is None else functools.partial(_filled, empty, native)


def _load_cuda(op: str, empty: Callable[..., Any] | None) -> Callable[..., Any]:
    native = _load(op, empty)
    if build().cuda is None:
        raise _dispatch.BackendUnavailableError(f"the extension was built without CUDA; {REBUILD} under FASTSDS_CUDA=1")
    return native


def _filled(empty: Callable[..., Any], fill: Callable[..., None], *arguments: Any) -> Any:
    results = empty(*arguments)
    fill(*arguments, *(results if isinstance(results, tuple) else (results,)))
    return results


def _release(version: str) -> tuple[str, ...]:
    """Minor releases of torch differ in their binary interface; patches do not."""
    return tuple(version.split("+")[0].split(".")[:2])


def _major(version: str | None) -> str | None:
    return version and version.split(".")[0]
