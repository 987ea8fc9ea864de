"""Every test of an op runs on every backend that serves it here, and on memory that is NaN until it is written."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastsds.ops import BackendUnavailableError, _dispatch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# A backend that its tool could have provided is missing by mistake, and its tests fail.
TOOLS = {
    "cpp": shutil.which("c++"),
    "cuda": shutil.which("nvcc"),
    "triton": importlib.util.find_spec("triton"),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("gpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.rpartition("test_")[2]
    backends = _dispatch._registry.get(op, {})
    servers = [
        (op, backend, device)
        for device in DEVICES
        for backend, (device_types, _) in backends.items()
        if backend == "reference" or device in device_types
    ]
    if servers:
        metafunc.parametrize("backend", servers, indirect=True, ids=["-".join(server[1:]) for server in servers])


@pytest.fixture(scope="session", autouse=True)
def _rounding_interpreter() -> None:
    """The interpreter cuts float32 down to bfloat16, where every GPU rounds to nearest, ties to even."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not TOOLS["triton"]:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def round_to_nearest(builder: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return truncate(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_fp_trunc = round_to_nearest


@pytest.fixture(scope="session", autouse=True)
def _multiplying_interpreter() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of it as such."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not TOOLS["triton"]:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float()
        return TensorHandle(wide.numpy(), tl.float32)

    def multiply_widened(builder: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return multiply(builder, widened(a), widened(b), *arguments)

    InterpreterBuilder.create_dot = multiply_widened


@pytest.fixture(scope="session", autouse=True)
def _indexing_interpreter() -> None:
    """Triton 3.6's interpreter asks NumPy for the number in an array of one, which NumPy 2.5 refuses."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not TOOLS["triton"]:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that is forced for this test, and the device on which its new tensors lie: `triton-cuda`."""
    op, name, device = getattr(request, "param", ("", "", "cpu"))
    if name:
        monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, name)
        try:
            _dispatch.choose(op, device)
        except BackendUnavailableError as error:
            if TOOLS[name]:
                raise
            pytest.skip(f"{name}: {error}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    if device != "cpu":
        torch.set_default_device(device)
    yield f"{name}-{device}"
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
