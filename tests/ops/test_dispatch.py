"""Who serves a call: the environment variable, the order of backends, and what is said when one cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsds.ops import BackendUnavailableError, _checks, _dispatch

VARIABLE = _dispatch.ENVIRONMENT_VARIABLE


def _check(x: Tensor, times: int) -> None:
    _checks.expect(times >= 0, lambda: f"times: expected at least 0, got {times}")


@pytest.fixture(scope="module", autouse=True)
def _probe() -> Iterator[None]:
    """An op that the extension does not know, and so does not serve without asking."""
    _dispatch.define(
        "probe",
        "(Tensor x, int times) -> Tensor",
        check=_check,
        fake=lambda x, times: torch.empty_like(x),
        reference=lambda x, times: x * times,
    )
    yield
    _dispatch._registry.pop("probe")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees the reference only, and what it registers is gone after it."""
    only_reference = {name: {"reference": backends["reference"]} for name, backends in _dispatch._registry.items()}
    monkeypatch.setattr(_dispatch, "_registry", only_reference)
    monkeypatch.delenv(VARIABLE, raising=False)


def _call(times: int = 1) -> Tensor:
    return torch.ops.fastsds.probe(torch.ones(2, 3), times)


def _seven(x: Tensor, times: int) -> Tensor:
    return torch.full_like(x, 7.0)


def _unavailable(cause: str) -> Callable[[], Any]:
    def load() -> Any:
        raise BackendUnavailableError(cause)

    return load


def test_every_op_is_registered() -> None:
    expected = {"add_noise", "add_noise_backward", "sample_timesteps", "sds_loss", "sds_loss_backward"}
    assert expected <= set(_dispatch.ops())
    for name in expected:
        assert hasattr(torch.ops.fastsds, name)


def test_reference_serves_where_nothing_else_does() -> None:
    choice = _dispatch.choose("probe", "cpu")
    assert choice.backend == "reference"
    assert "no kernel for cpu tensors" in choice.reason


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    _dispatch.register_backend("probe", "cpp", ("cpu",), lambda: _seven)
    monkeypatch.setenv(VARIABLE, "reference")
    choice = _dispatch.choose("probe", "cpu")
    assert choice.backend == "reference"
    assert VARIABLE in choice.reason
    assert torch.equal(_call(), torch.ones(2, 3))


@pytest.mark.parametrize("forced", ["triton", "cuda", "cpp"])
def test_forcing_a_backend_that_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    _dispatch.register_backend("probe", "triton", ("cuda",), lambda: _seven)
    monkeypatch.setenv(VARIABLE, forced)
    with pytest.raises(
        BackendUnavailableError, match=rf"{VARIABLE}={forced} .*probe on cpu .*available there: reference\."
    ):
        _call()


def test_forcing_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(BackendUnavailableError, match=r"expected one of .*'reference'.*got 'nonsense'"):
        _call()


def test_forcing_a_backend_that_fails_to_load_gives_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    _dispatch.register_backend("probe", "cpp", ("cpu",), _unavailable("built for another PyTorch"))
    monkeypatch.setenv(VARIABLE, "cpp")
    with pytest.raises(BackendUnavailableError, match="built for another PyTorch"):
        _call()


def test_registered_backend_is_preferred() -> None:
    _dispatch.register_backend("probe", "cpp", ("cpu",), lambda: _seven)
    choice = _dispatch.choose("probe", "cpu")
    assert choice.backend == "cpp"
    assert "first choice for cpu" in choice.reason
    assert torch.equal(_call(), torch.full((2, 3), 7.0))
    assert _dispatch.choose("probe", "cuda").backend == "reference"
    assert _dispatch.choose("sds_loss", "cpu").backend == "reference"


def test_order_of_preference() -> None:
    for backend in ("cpp", "triton", "cuda"):
        _dispatch.register_backend("probe", backend, ("cuda",), lambda: _seven)
        assert _dispatch.choose("probe", "cuda").backend == backend


def test_contract_is_checked_before_any_backend() -> None:
    _dispatch.register_backend("probe", "cpp", ("cpu",), _unavailable("must not be reached"))
    with pytest.raises(RuntimeError, match="times: expected at least 0, got -1"):
        _call(times=-1)


def test_unavailable_backend_falls_back_and_says_why() -> None:
    _dispatch.register_backend("probe", "cpp", ("cpu",), _unavailable("the extension was not built"))
    choice = _dispatch.choose("probe", "cpu")
    assert choice.backend == "reference"
    assert "cpp: the extension was not built" in choice.reason
    assert torch.equal(_call(), torch.ones(2, 3))


def test_other_errors_of_a_backend_are_not_hidden() -> None:
    def load() -> Any:
        raise OSError("a broken library")

    _dispatch.register_backend("probe", "cpp", ("cpu",), load)
    with pytest.raises(OSError, match="a broken library"):
        _call()


def test_unknown_backend_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'numpy'"):
        _dispatch.register_backend("probe", "numpy", ("cpu",), lambda: _seven)
