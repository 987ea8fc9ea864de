"""Prompt checkpoints against the layout of CoOp's code, put together here without fastsds."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsds.clip import ClipSourceError, ModelMismatchError
from fastsds.commands.configs import writing
from fastsds.intcoop import CoCoOp, CoOp, IntCoOp, ZeroShot, export_coop, load_coop, load_prompts, save_prompts

CLASSNAMES = ("circle", "large square", "ring")
WIDTH, DIM = 32, 32


def _prefix_and_suffix(clip: Any, tokenizer: Any, vectors: int, classnames: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """CoOp's buffers: the embeddings of `X X … name.`, without those of the X."""
    tokens = tokenizer([" ".join(["a"] * vectors + [f"{name}."]) for name in classnames])
    embeddings = getattr(clip, "text", clip).token_embedding(tokens).detach()
    return embeddings[:, :1].clone(), embeddings[:, 1 + vectors :].clone()


def _coop_state(
    clip: Any, tokenizer: Any, context: Tensor, classnames: tuple[str, ...] = CLASSNAMES
) -> dict[str, Tensor]:
    prefix, suffix = _prefix_and_suffix(clip, tokenizer, context.shape[-2], classnames)
    return {"ctx": context, "token_prefix": prefix, "token_suffix": suffix}


def _meta_net(hidden: int = 2) -> dict[str, Tensor]:
    shapes = {"linear1.weight": (hidden, DIM), "linear1.bias": (hidden,), "linear2.weight": (WIDTH, hidden)}
    return {f"meta_net.{name}": torch.randn(shape) for name, shape in {**shapes, "linear2.bias": (WIDTH,)}.items()}


def _save(file: Path, state: dict[str, Tensor]) -> Path:
    """As CoOp's trainer leaves it: the optimizer's state, and a schedule whose successor is pickled as an object."""
    file.parent.mkdir(parents=True, exist_ok=True)
    context = nn.Parameter(state["ctx"].clone())
    context.grad = torch.ones_like(context)
    optimizer = torch.optim.SGD([context], lr=0.002, momentum=0.9)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    scheduler = {"successor": successor, "warmup_epoch": 1, "cons_lr": 1e-5, "last_epoch": 50}
    document = {"state_dict": state, "epoch": 50, "optimizer": optimizer.state_dict(), "scheduler": scheduler}
    torch.save({**document, "val_result": np.float64(71.4)}, file)
    return file


def _text_features(clip: Any, tokenizer: Any, state: dict[str, Tensor], shift: Tensor | None = None) -> Tensor:
    """CoOp's forward pass: prefix, context and suffix side by side through open_clip's own tower."""
    tower = getattr(clip, "text", clip)
    context = state["ctx"] if shift is None else state["ctx"] + shift
    vectors = context.shape[-2]
    context = context.expand(len(CLASSNAMES), -1, -1)
    x = torch.cat([state["token_prefix"], context, state["token_suffix"]], dim=1) + tower.positional_embedding
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    end = tokenizer([" ".join(["a"] * vectors + [f"{name}."]) for name in CLASSNAMES]).argmax(dim=-1)
    return F.normalize(x[range(len(x)), end] @ tower.text_projection, dim=-1)


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_coop_checkpoint_classifies_as_coop(
    class_specific: bool, clip: Any, clip_tokenizer: Any, images: Tensor, tmp_path: Path
) -> None:
    context = torch.randn(*([3] if class_specific else []), 4, WIDTH) * 0.1
    state = _coop_state(clip, clip_tokenizer, context)
    file = _save(tmp_path / "prompt_learner" / "model.pth.tar-50", state)
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, class_specific=class_specific)
    load_coop(file, model)
    assert torch.equal(model.context, context)
    got = model.text_features(model.encode_images(images))[0]
    torch.testing.assert_close(got, _text_features(clip, clip_tokenizer, state), rtol=1e-4, atol=1e-5)


def test_a_cocoop_checkpoint_classifies_as_cocoop(
    clip: Any, clip_tokenizer: Any, images: Tensor, tmp_path: Path
) -> None:
    meta = _meta_net()
    state = {**_coop_state(clip, clip_tokenizer, torch.randn(4, WIDTH) * 0.1), **meta}
    model = CoCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    load_coop(_save(tmp_path / "model.pth.tar-10", state), model)
    got = model.text_features(model.encode_images(images))
    features = clip.encode_image(images, normalize=True)
    hidden = F.relu(features @ meta["meta_net.linear1.weight"].T + meta["meta_net.linear1.bias"])
    shifts = hidden @ meta["meta_net.linear2.weight"].T + meta["meta_net.linear2.bias"]
    expected = torch.stack([_text_features(clip, clip_tokenizer, state, shift) for shift in shifts])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["CoOp", "class-specific CoOp", "CoCoOp"])
def test_export_is_what_coops_code_holds(method: str, clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    options = {"class_specific": True} if method.startswith("class") else {}
    make: Any = CoCoOp if method == "CoCoOp" else CoOp
    model = make(clip, CLASSNAMES, tokenizer=clip_tokenizer, **options)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    file = tmp_path / "prompt_learner" / "model.pth.tar-50"
    export_coop(file, model, epoch=50)
    document = torch.load(file, weights_only=True)
    state = document["state_dict"]
    prefix, suffix = _prefix_and_suffix(clip, clip_tokenizer, 4, CLASSNAMES)
    assert document["epoch"] == 50
    assert torch.equal(state["token_prefix"], prefix)
    assert torch.equal(state["token_suffix"], suffix)
    meta = set(_meta_net()) if method == "CoCoOp" else set()
    assert set(state) == {"ctx", "token_prefix", "token_suffix"} | meta
    again = make(clip, CLASSNAMES, tokenizer=clip_tokenizer, **options)
    load_coop(file, again)
    for name, parameter in model.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter)
    with pytest.raises(FileExistsError, match=r"out: .*model.pth.tar-50 exists; name another place"):
        export_coop(file, model)


@pytest.mark.parametrize("write", [export_coop, save_prompts])
def test_a_disk_that_is_full_is_told_and_leaves_nothing(
    write: Any, clip: Any, clip_tokenizer: Any, tmp_path: Path
) -> None:
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"out: could not write .*prompts: .*[Tt]oo large"),
            writing(tmp_path / "prompts"),
        ):
            write(tmp_path / "prompts", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_half_precision_and_other_classes_of_a_unified_context(clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    context = torch.randn(4, WIDTH)
    state = _coop_state(clip, clip_tokenizer, context, ("cross", "triangle", "square", "ring", "circle"))
    file = _save(tmp_path / "model.pth.tar-50", {name: tensor.half() for name, tensor in state.items()})
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    load_coop(file, model)
    assert torch.equal(model.context, context.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "ctx": torch.zeros(16, WIDTH)}, "expected context_length 4, got 16"),
        (lambda state: {**state, "ctx": torch.zeros(4, 512)}, "expected the text tower's width 32, got 512"),
        (
            lambda state: {**state, "ctx": torch.zeros(5, 4, WIDTH)},
            "expected class_specific one context for all classes, got a context for each of 5 classes",
        ),
        (lambda state: {**state, **_meta_net()}, "expected method CoOp, got CoCoOp"),
        (lambda state: {**state, "token_prefix": -state["token_prefix"]}, "it was trained on another CLIP"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_copied(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, clip: Any, clip_tokenizer: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    before = model.context.detach().clone()
    file = _save(tmp_path / "model.pth.tar-50", change(_coop_state(clip, clip_tokenizer, torch.zeros(4, WIDTH))))
    with pytest.raises(ModelMismatchError, match=f"^file: .*model.pth.tar-50: .*{re.escape(message)}"):
        load_coop(file, model)
    assert torch.equal(model.context, before)


def test_class_specific_prompts_of_other_classes(clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, class_specific=True)
    state = _coop_state(clip, clip_tokenizer, torch.zeros(3, 4, WIDTH), CLASSNAMES[::-1])
    with pytest.raises(ModelMismatchError, match="its class names, or their order, are not the model's classnames"):
        load_coop(_save(tmp_path / "order", state), model)
    state = _coop_state(clip, clip_tokenizer, torch.zeros(2, 4, WIDTH), CLASSNAMES[:2])
    with pytest.raises(
        ModelMismatchError, match="a context for each of 3 classes, got a context for each of 2 classes"
    ):
        load_coop(_save(tmp_path / "count", state), model)
    state = _coop_state(clip, clip_tokenizer, torch.zeros(4, WIDTH))
    with pytest.raises(ModelMismatchError, match="a context for each of 3 classes, got one context for all classes"):
        load_coop(_save(tmp_path / "unified", state), model)


def test_cocoop_of_another_method_or_size(clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    model = CoCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    state = _coop_state(clip, clip_tokenizer, torch.zeros(4, WIDTH))
    with pytest.raises(ModelMismatchError, match="expected method CoCoOp, got CoOp"):
        load_coop(_save(tmp_path / "coop", state), model)
    message = r"expected meta_net.linear1.weight \[2, 32\], got \[8, 32\]; create the model with the options of"
    with pytest.raises(ModelMismatchError, match=message):
        load_coop(_save(tmp_path / "wide", {**state, **_meta_net(8)}), model)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_no_code_of_a_file_is_run(
    clip: Any, clip_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    torch.save({"state_dict": {"ctx": torch.zeros(4, WIDTH)}, "scheduler": _Evil()}, tmp_path / "evil")
    with pytest.raises(ClipSourceError, match=r"file: .*evil: expected tensors alone, got a pickle that weights_only"):
        load_coop(tmp_path / "evil", model)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"weight": torch.zeros(2)}}, "is no checkpoint of CoOp: expected state_dict with ctx in it"),
        ([1, 2], "is no checkpoint of CoOp"),
        (None, "could not be loaded: .*No such file"),
    ],
)
def test_files_that_are_no_checkpoints(
    content: Any, message: str, clip: Any, clip_tokenizer: Any, tmp_path: Path
) -> None:
    if content is not None:
        torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=message) as caught:
        load_coop(tmp_path / "file", CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer))
    assert "\n" not in str(caught.value)


def test_intcoop_is_not_coop(clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    model: Any = IntCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    with pytest.raises(
        TypeError, match="model: expected a CoOp or CoCoOp, got IntCoOp; use save_prompts, load_prompts"
    ):
        export_coop(tmp_path / "file", model)


@pytest.mark.parametrize("method", [CoOp, CoCoOp, IntCoOp])
def test_one_file_gives_the_logits_back(
    method: Any, clip: Any, clip_tokenizer: Any, images: Tensor, tmp_path: Path
) -> None:
    model = method(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if method is IntCoOp:
        model.attributes = ("red", "small")
    save_prompts(tmp_path / "prompts.safetensors", model)
    again = method(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    assert not torch.allclose(again(images), model(images), atol=1e-3)
    load_prompts(tmp_path / "prompts.safetensors", again)
    assert torch.equal(again(images), model(images))
    if method is IntCoOp:
        assert again.attributes == ("red", "small")
        again.attributes = ("blue",)
        load_prompts(tmp_path / "prompts.safetensors", again)
        assert again.attributes == ("blue",)
    with safe_open(tmp_path / "prompts.safetensors", framework="pt") as stored:
        identity = json.loads(stored.metadata()["prompts_identity"])
    assert (identity["method"], identity["classnames"]) == (method.__name__, list(CLASSNAMES))
    with pytest.raises(FileExistsError, match=r"out: .*prompts.safetensors exists"):
        save_prompts(tmp_path / "prompts.safetensors", model)


def test_one_file_of_another_model(clip: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    save_prompts(file, CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer))
    with pytest.raises(ModelMismatchError, match="method was 'CoOp' when it was written and is 'CoCoOp'"):
        load_prompts(file, CoCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer))
    with pytest.raises(ModelMismatchError, match="classnames was "):
        load_prompts(file, CoOp(clip, CLASSNAMES[:2], tokenizer=clip_tokenizer))
    longer = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, context_length=3, context_init=None)
    with pytest.raises(
        ModelMismatchError, match=r"expected context \[3, 32\], got \[4, 32\]; create the model with the"
    ):
        load_prompts(file, longer)
    save_file({"context": torch.zeros(4, WIDTH)}, tmp_path / "plain.safetensors")
    with pytest.raises(ClipSourceError, match=r"plain.safetensors holds no prompts that save_prompts wrote"):
        load_prompts(tmp_path / "plain.safetensors", longer)
    with pytest.raises(ValueError, match="model: expected learned prompts, got ZeroShot, which learns nothing"):
        save_prompts(tmp_path / "none.safetensors", ZeroShot(clip, CLASSNAMES, tokenizer=clip_tokenizer))
