"""Learned prompts in files: CoOp's and CoCoOp's own checkpoints, and ours, one safetensors file."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsds.clip.errors import ClipSourceError, one_line_errors
from fastsds.clip.export import whole_path
from fastsds.clip.identity import ModelMismatchError
from fastsds.intcoop.baselines import CoCoOp, CoOp
from fastsds.intcoop.model import IntCoOp
from fastsds.intcoop.prompts import PromptedCLIP

IDENTITY_KEY, ATTRIBUTES_KEY = "prompts_identity", "attributes"
"""In the metadata of our files, as JSON: `PromptedCLIP.identity()`, and the attribute words of an `IntCoOp`."""


def export_coop(file: Path, model: CoOp | CoCoOp, *, epoch: int = 0) -> None:
    """Writes the checkpoint that CoOp's code reads: `prompt_learner/model.pth.tar-50` for `epoch` 50.

    With the context go the embeddings of start token and class names, `token_prefix` `[classes, 1, width]` and
    `token_suffix` `[classes, tokens, width]`.

    Raises:
        FileExistsError: the file exists.
        OSError: it cannot be written.
        TypeError: another method than CoOp and CoCoOp.
    """
    tensors: dict[str, Tensor] = dict(_coop_parameters(model))
    classes = model.encoder.embed_classes(model.context.shape[-2])
    tensors |= {"token_prefix": classes[:, :1], "token_suffix": classes[:, 1:]}
    state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    document = io.BytesIO()  # of a disk that is full, torch.save says no more than a position
    torch.save({"state_dict": state, "epoch": epoch}, document)
    with whole_path(file) as staging:
        staging.write_bytes(document.getbuffer())


@torch.no_grad()
def load_coop(file: Path, model: CoOp | CoCoOp) -> None:
    """Copies the prompts of a CoOp or CoCoOp checkpoint into a model of the same CLIP.

    No code of the file is run: what CoOp's trainer keeps beside the prompts, optimizer and schedule, is passed over.

    Raises:
        ClipSourceError: the file cannot be read, or asks for code.
        ModelMismatchError: the prompts are of another method, length, width, CLIP, or of other classes; nothing is
            copied then.
        TypeError: another method than CoOp and CoCoOp.
    """
    own = _coop_parameters(model)
    with one_line_errors(f"file: {file}"):
        document = _load_tensors(file)
    stored = document.get("state_dict") if isinstance(document, Mapping) else None
    if not isinstance(stored, Mapping) or not isinstance(stored.get("ctx"), Tensor):
        raise ModelMismatchError(f"file: {file} is no checkpoint of CoOp: expected state_dict with ctx in it")
    _require_same(file, stored, own, model)
    for name, parameter in own.items():
        parameter.copy_(stored[name])


def save_prompts(file: Path, model: PromptedCLIP) -> None:
    """Writes what a model of any method has learned as one safetensors file, with what it belongs to in its metadata.

    Raises:
        FileExistsError: the file exists.
        ValueError: the model learns nothing.
    """
    trained = model.trained_parameters()
    if not trained:
        raise ValueError(f"model: expected learned prompts, got {type(model).__name__}, which learns nothing")
    metadata = {IDENTITY_KEY: json.dumps(model.identity()), "format": "pt"}
    if isinstance(model, IntCoOp):
        metadata[ATTRIBUTES_KEY] = json.dumps(model.attributes)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    with whole_path(file) as staging:
        save_file(tensors, staging, metadata)


@torch.no_grad()
def load_prompts(file: Path, model: PromptedCLIP) -> None:
    """Copies what `save_prompts` wrote into a model of the same CLIP, method and classes.

    Attribute words come along where the model has none. For other classes, use the loaded model's `for_classes`.

    Raises:
        ClipSourceError: the file cannot be read, or is not of `save_prompts`.
        ModelMismatchError: another CLIP, method, classes or options; nothing is copied then.
    """
    with one_line_errors(f"file: {file}"), safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if IDENTITY_KEY not in metadata:
            raise ClipSourceError(f"file: {file} holds no prompts that save_prompts wrote")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    model.require_identity(json.loads(metadata[IDENTITY_KEY]))
    own = model.trained_parameters()
    shapes = [{name: list(tensor.shape) for name, tensor in side.items()} for side in (own, tensors)]
    if shapes[0] != shapes[1]:
        name = min(name for name in own.keys() | tensors.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ModelMismatchError(
            f"file: {file}: expected {name} {shapes[0].get(name, 'not at all')}, got {shapes[1].get(name, 'none')}; "
            f"create the model with the options it was trained with"
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
    if isinstance(model, IntCoOp) and not model.attributes:
        model.attributes = tuple(json.loads(metadata.get(ATTRIBUTES_KEY, "[]")))


def _coop_parameters(model: CoOp | CoCoOp) -> dict[str, nn.Parameter]:
    """What is learned, by the names of CoOp's code."""
    if isinstance(model, CoOp):
        return {"ctx": model.context}
    if not isinstance(model, CoCoOp):
        raise TypeError(f"model: expected a CoOp or CoCoOp, got {type(model).__name__}; use save_prompts, load_prompts")
    names = {"0.": "meta_net.linear1.", "2.": "meta_net.linear2."}
    shift = {names[name[:2]] + name[2:]: parameter for name, parameter in model.shift.named_parameters()}
    return {"ctx": model.context, **shift}


def _require_same(file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor], model: CoOp | CoCoOp) -> None:
    sides = (own, stored)
    context, found = own["ctx"], stored["ctx"]
    checks: list[tuple[str, list[Any]]] = [
        ("method", ["CoCoOp" if any("meta_net" in name for name in side) else "CoOp" for side in sides]),
        ("class_specific", [_sharing(side["ctx"]) for side in sides]),
        ("context_length", [context.shape[-2], found.shape[-2]]),
        ("the text tower's width", [context.shape[-1], found.shape[-1]]),
        *((name, [list(side[name].shape) if name in side else None for side in sides]) for name in own),
    ]
    for name, (expected, got) in checks:
        if expected != got:
            raise ModelMismatchError(
                f"file: {file}: expected {name} {expected}, got {got}; create the model with the options of the file"
            )
    # Half precision, in which CoOp keeps them, loses 2^-11; another CLIP's embeddings are nothing alike.
    classes = model.encoder.embed_classes(context.shape[-2]).float()
    prefix, suffix = stored.get("token_prefix"), stored.get("token_suffix")
    if prefix is not None and not _alike(classes[:1, :1], prefix[:1].to(classes)):
        raise ModelMismatchError(f"file: {file}: its start token is embedded otherwise; it was trained on another CLIP")
    if context.dim() == 3 and suffix is not None and not _alike(classes[:, 1:], suffix.to(classes)):
        raise ModelMismatchError(f"file: {file}: its class names, or their order, are not the model's classnames")


def _sharing(context: Tensor) -> str:
    return f"a context for each of {len(context)} classes" if context.dim() == 3 else "one context for all classes"


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= 1e-2 * one.norm())


class _Inert:
    """Stands for an object of the file that nobody reads: takes what it is given, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _inert_mapping(*_: Any) -> dict[Any, Any]:
    return {}


def _load_tensors(file: Path) -> Any:
    """`torch.load(weights_only=True)`, with inert stand-ins for what is known to lie in CoOp's checkpoints.

    CoOp's trainer pickles its learning-rate schedule and optimizer as objects, and results as NumPy numbers.

    Raises:
        pickle.UnpicklingError: the file names anything else.
    """
    stand_ins: dict[str, Callable[..., Any]] = {"collections.defaultdict": _inert_mapping, "builtins.dict": dict}
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # of the format before zip archives, where it cannot look
        named = []
    allowed: list[Any] = [_Inert]
    for name in named:
        if name.startswith(("torch.optim.", "numpy.")):
            allowed.append((_Inert, name))
        elif name in stand_ins:
            allowed.append((stand_ins[name], name))
        else:
            raise pickle.UnpicklingError(f"it names {name}")
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)
