from __future__ import annotations

import errno
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsds.training import CheckpointError, Trainer, checkpoint


def _optimizer() -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """An AdamW that has made two steps."""
    parameters = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.eye(2))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for factor in (1.0, 3.0):
        optimizer.zero_grad()
        (factor * (parameters["a"].square().sum() + parameters["b"].sum())).backward()
        optimizer.step()
    return dict(parameters), optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = checkpoint.checkpoint_folder(tmp_path, 12)
    tensors, optimizer = _optimizer()
    checkpoint.save_checkpoint(folder, tensors, optimizer, {"step": 12})
    return folder


def test_a_checkpoint_gives_back_what_it_was_given(saved: Path) -> None:
    assert saved.name == "step-00000012"
    assert sorted(path.name for path in saved.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "trained.safetensors",
    ]
    expected, expected_optimizer = _optimizer()
    into = {"a": torch.zeros(2), "b": torch.zeros(2, 2)}
    checkpoint.load_tensors(saved, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in expected.items())
    state = checkpoint.load_state(saved)
    assert state["step"] == 12 and state["libraries"]["torch"] == version("torch")
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))], lr=0.7)
    checkpoint.load_optimizer(saved, fresh, state)
    found, wanted = fresh.state_dict(), expected_optimizer.state_dict()
    assert found["param_groups"] == json.loads(json.dumps(wanted["param_groups"]))
    for index, entries in wanted["state"].items():
        assert all(torch.equal(found["state"][index][name], value) for name, value in entries.items())


def test_others_may_read_a_checkpoint(saved: Path) -> None:
    plain = saved.parent / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {plain.stat().st_mode}


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"a": (2,)}, r"1 differ, first b: expected none, got \[2, 2\]"),
        ({"a": (2,), "b": (2, 2), "c": (1,)}, r"1 differ, first c: expected \[1\], got none"),
        ({"a": (3,), "b": (4,)}, r"2 differ, first a: expected \[3\], got \[2\]; use the options it was trained with"),
    ],
)
def test_other_tensors_are_refused_and_nothing_is_copied(
    saved: Path, into: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in into.items()}
    with pytest.raises(
        CheckpointError, match=f"step-00000012: its trained tensors are not those of this run: {message}"
    ):
        checkpoint.load_tensors(saved, tensors)
    assert all(not tensor.any() for tensor in tensors.values())


def _truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def _write_state(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "state.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _truncate("trained.safetensors"),
            r"could not read .*step-00000004.trained\.safetensors: .*; resume from an earlier",
        ),
        (_truncate("optimizer.safetensors"), r"could not read .*step-00000004.optimizer\.safetensors"),
        (_truncate("state.json"), r"could not read .*step-00000004.state\.json"),
        (_write_state(""), r"could not read .*state\.json"),
        (_write_state("[]"), r"could not read .*state\.json: expected a JSON object, got list"),
        (lambda folder: (folder / "state.json").unlink(), r"could not read .*state\.json: .*No such file"),
        (lambda folder: (folder / "trained.safetensors").unlink(), r"could not read .*trained\.safetensors"),
        (
            lambda folder: _write_state((folder / "state.json").read_text().replace('"format": 1', '"format": 2'))(
                folder
            ),
            r"step-00000004: expected checkpoint format 1, got 2; it was written by another version of fastsds",
        ),
        (_write_state("{}"), "expected checkpoint format 1, got None"),
    ],
)
def test_damaged_checkpoints_are_named_on_resume(
    toy: Any, loader: Any, config: Any, damage: Callable[[Path], Any], message: str
) -> None:
    result = Trainer(toy(), loader(), config(steps=4)).fit()
    damage(result.checkpoint)
    module = toy()
    with pytest.raises(CheckpointError, match=message):
        Trainer(module, loader(), config(steps=4)).fit(resume=True)
    assert module.seen == []


def test_a_full_disk_leaves_the_last_checkpoint_good(
    toy: Any, loader: Any, config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file, calls = checkpoint.save_file, []

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second file of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    options = {"steps": 9, "save_every": 3}
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fail)
        with pytest.raises(CheckpointError) as caught:
            Trainer(toy(), loader(), config(**options)).fit()
    checkpoints = config().out / "checkpoints"
    message = str(caught.value)
    assert f"could not write {checkpoints / 'step-00000006'}: [Errno 28] No space left on device" in message
    assert f"The last good checkpoint is {checkpoints / 'step-00000003'}; free some space and resume" in message
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]

    resumed, whole = toy(), toy()
    assert Trainer(resumed, loader(), config(**options)).fit(resume=True).step == 9
    Trainer(whole, loader(), config(**options, out=tmp_path / "whole")).fit()
    assert torch.equal(resumed.linear.weight, whole.linear.weight)


def test_an_interrupted_write_leaves_nothing_and_the_old_folder_stands(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_text("old")

    def write(fail: bool) -> None:
        with checkpoint.atomic_folder(folder) as staging:
            (staging / "state.json").write_text("new")
            assert (folder / "state.json").read_text() == "old"
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(fail=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (folder / "state.json").read_text() == "old"
    write(fail=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (folder / "state.json").read_text() == "new"


def test_what_a_killed_write_left_is_neither_taken_nor_in_the_way(tmp_path: Path) -> None:
    for name in ("step-00000002", ".step-00000009.partial", "step-9", "step-00000003.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000009.partial" / "stale").touch()
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    tensors, optimizer = _optimizer()
    checkpoint.save_checkpoint(checkpoint.checkpoint_folder(tmp_path, 9), tensors, optimizer, {"step": 9})
    assert not (tmp_path / ".step-00000009.partial").exists()
    assert not (tmp_path / "step-00000009" / "stale").exists()
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-00000009"


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "absent") is None


def test_the_global_generators_go_on_where_they_were() -> None:
    import random

    def draw() -> tuple[float, float, float, float]:
        # the Gaussians keep a second value back, which is part of the state
        return random.gauss(0, 1), random.random(), float(np.random.randn()), float(torch.rand(()))  # noqa: NPY002

    draw()
    state = json.loads(json.dumps(checkpoint.random_state()))
    expected = [draw() for _ in range(3)]
    checkpoint.set_random_state(state)
    assert [draw() for _ in range(3)] == expected
