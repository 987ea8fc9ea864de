"""Where an op meets its backends: registration with PyTorch's dispatcher and the choice of who serves a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "fastsds"
BACKENDS = ("cuda", "triton", "cpp", "reference")  # in order of preference
ENVIRONMENT_VARIABLE = "FASTSDS_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend cannot serve an op; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves an op on a device type, and why."""

    backend: str
    reason: str
    function: Callable[..., Any] = field(repr=False)


# op -> backend -> (device types, loader of the function); `reference` serves every device type.
_Backends = dict[str, tuple[tuple[str, ...], Callable[[], Callable[..., Any]]]]
_registry: dict[str, _Backends] = {}
# (op, device type, what is forced) -> the backends that were to choose from, and the choice.
_choices: dict[tuple[str, str, str | None], tuple[_Backends, Choice]] = {}


def define(
    name: str, schema: str, *, check: Callable[..., Any], fake: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Registers `torch.ops.fastsds.<name>`: `check` (the contract) runs before `fake` and before every backend.

    `schema` is the signature after the name, in PyTorch's schema language. `check`, `fake` and `reference` take the
    op's arguments as they come.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    _registry[name] = {"reference": ((), lambda: reference)}

    @torch.library.register_fake(qualified)
    def _(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    @torch.library.impl(qualified, "default")
    def _(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        device = next(argument for argument in args if isinstance(argument, torch.Tensor)).device
        return choose(name, device.type).function(*args, **kwargs)


def register_backend(
    name: str, backend: str, device_types: tuple[str, ...], load: Callable[[], Callable[..., Any]]
) -> None:
    """Offers `load()` as the implementation of an op on some device types.

    `load` is called when the op is needed there; where it cannot serve it raises `BackendUnavailableError` with the
    cause.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    _registry[name][backend] = (device_types, load)
    _choices.clear()


def ops() -> tuple[str, ...]:
    """The names of all registered ops."""
    return tuple(_registry)


def choose(name: str, device_type: str) -> Choice:
    """The backend that serves `name` on `device_type` now.

    Raises:
        BackendUnavailableError: `FASTSDS_BACKEND` forces a backend that cannot serve.
    """
    backends, forced = _registry[name], os.environ.get(ENVIRONMENT_VARIABLE)
    known = _choices.get((name, device_type, forced))
    if known is not None and known[0] is backends:
        return known[1]
    choice = _forced_choice(name, device_type, forced) if forced else _free_choice(name, device_type)
    _choices[name, device_type, forced] = backends, choice
    return choice


def _free_choice(name: str, device_type: str) -> Choice:
    backends = _registry[name]
    unavailable: list[str] = []
    for backend in BACKENDS[:-1]:
        device_types, load = backends.get(backend, ((), None))
        if load is None or device_type not in device_types:
            continue
        try:
            return Choice(backend, f"first choice for {device_type} tensors", load())
        except BackendUnavailableError as error:
            unavailable.append(f"{backend}: {error}")
    reason = "; ".join(unavailable) or f"no kernel for {device_type} tensors"
    return Choice("reference", reason, backends["reference"][1]())


def _forced_choice(name: str, device_type: str, forced: str) -> Choice:
    backends = _registry[name]
    if forced not in BACKENDS:
        raise BackendUnavailableError(f"{ENVIRONMENT_VARIABLE}: expected one of {BACKENDS}, got {forced!r}")
    serving = [known for known, (types, _) in backends.items() if known == "reference" or device_type in types]
    if forced not in serving:
        raise BackendUnavailableError(
            f"{ENVIRONMENT_VARIABLE}={forced} cannot serve fastsds::{name} on {device_type} tensors; "
            f"available there: {', '.join(serving)}. Unset it to let the library choose."
        )
    return Choice(forced, f"forced by {ENVIRONMENT_VARIABLE}", backends[forced][1]())
