"""The plumbing of `make verify-gpu`, with commands that need no GPU, and its U-Net figures on a tiny one."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from benchmarks import timing, unet, verify_gpu
from benchmarks.verify_gpu import Step, ended_well, missing_wheels, plan, run_steps
from fastsds.toyworld import models

TINY_UNET = models.UNET_CONFIG
SUITE = ("tests", "tests, the rest")


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_step_is_kept_whatever_the_others_do(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text("of an earlier run", encoding="utf-8")
    steps = [
        Step("fails", _python("import sys; print('why'); sys.exit(3)"), 60),
        Step("is not there", [str(tmp_path / "nothing")], 60),
        Step("hangs", _python("import time; print('begun', flush=True); time.sleep(600)"), 5),
        Step("lacks a tool", _python("pass"), 60, needs="no-such-program"),
        Step("sees", _python("import os; print(os.environ['GIVEN'])"), 60, {"GIVEN": "a word"}),
        Step("measures", _python(f"open({str(figures)!r}, 'w').write('[1, 2]')"), 60, figures=figures),
    ]
    saved: list[list[str]] = []
    records = run_steps([[step] for step in steps], lambda done: saved.append([record["status"] for record in done]))
    missing = "not run: no no-such-program was found"
    assert [record["status"] for record in records] == ["failed", "failed", "timed out", missing, "passed", "passed"]
    assert saved == [[record["status"] for record in records[: done + 1]] for done in range(len(steps))]
    assert (records[0]["exit_status"], records[0]["output"]) == (3, "why\n")
    assert "nothing" in records[1]["output"]
    assert records[2]["output"] == "begun\n" and 5 <= records[2]["seconds"] < 60
    assert records[4]["output"] == "a word\n"
    assert records[5]["figures"] == [1, 2]


def test_steps_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for what the other leaves."""
    program = "import sys, time, pathlib; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
    program += "while not other.exists(): time.sleep(0.05)"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    group = [Step("one", [*_python(program), one, two], 60), Step("two", [*_python(program), two, one], 60)]
    saved: list[int] = []
    records = run_steps([group, [Step("last", _python("pass"), 60)]], lambda done: saved.append(len(done)))
    assert [record["status"] for record in records] == ["passed"] * 3
    assert records[2]["name"] == "last" and saved == [1, 2, 3]


def test_what_takes_the_time_that_is_left_may_lack_it_but_not_fail(tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    writes = f"import time; open({str(cut)!r}, 'w').write('{{'); time.sleep(600)"
    steps = [
        Step("fails", _python("raise SystemExit(1)"), 60, optional=True),
        Step("is cut off", _python(writes), 3, figures=cut, optional=True),
        Step("hangs", _python("import time; time.sleep(600)"), 1),
    ]
    records = run_steps([[step] for step in steps], lambda _: None)
    assert [ended_well(record) for record in records] == [False, True, False]
    assert records[1]["status"] == "timed out" and records[1]["figures"].startswith("not readable")


def test_the_budget_ends_a_step_and_those_after_it() -> None:
    start = time.monotonic()
    steps = [Step("hangs", _python("import time; time.sleep(600)"), 600), Step("comes late", _python("pass"), 60)]
    records = run_steps([[step] for step in steps], lambda _: None, budget_seconds=2)
    assert [record["status"] for record in records] == ["timed out", "not run: the 2 s were spent"]
    assert time.monotonic() - start < 60


def test_a_step_ends_with_the_processes_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (record,) = run_steps([[Step("has a child", _python(parent), 1)]], lambda _: None)
    assert record["status"] == "timed out"
    time.sleep(5)
    assert not mark.exists()


def test_wheels_of_what_is_installed_are_left_alone(tmp_path: Path) -> None:
    for name in ("torch-99.0-py3-none-any.whl", "no_such_distribution-1.0-py3-none-any.whl", "notes.txt"):
        (tmp_path / name).touch()
    assert [wheel.name for wheel in missing_wheels(tmp_path)] == ["no_such_distribution-1.0-py3-none-any.whl"]


def test_plan_names_files_that_exist(tmp_path: Path) -> None:
    steps = [step for group in plan(tmp_path, tmp_path, [tmp_path / "a.whl"], "a-gpu", "9.0") for step in group]
    assert [step.name for step in steps][:2] == ["build", "wheels"]
    assert steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    paths = [word for step in steps for word in step.command if word.startswith("tests")]
    assert paths and all((verify_gpu.ROOT / word).exists() for word in paths)


def test_plan_runs_the_whole_suite(tmp_path: Path) -> None:
    """What a GPU changes first and in any case, the rest once the timings that need the time are done."""
    groups = plan(tmp_path, tmp_path, [], "a-gpu", "9.0")
    order = {step.name: number for number, group in enumerate(groups) for step in group}
    tests, rest = (next(step for group in groups for step in group if step.name == name) for name in SUITE)
    assert order[tests.name] < order["benchmarks, bars"] < order[rest.name] < order["benchmarks, full"]
    assert rest.optional and not tests.optional
    assert [word for word in tests.command if word.startswith("tests")] == list(verify_gpu.GPU_TESTS)
    left_out = [word for word in rest.command if word.startswith("--ignore=")]
    assert "tests" in rest.command and left_out == [f"--ignore={path}" for path in verify_gpu.GPU_TESTS]


@pytest.mark.parametrize("marked", [True, False])
def test_a_gpu_is_hidden_from_tests_that_are_not_marked(
    marked: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    conftest = request.config.pluginmanager.get_plugin(str(verify_gpu.ROOT / "tests" / "conftest.py"))
    asked: list[str] = []
    item = SimpleNamespace(get_closest_marker=lambda name: asked.append(name) or marked)
    hook = conftest.pytest_runtest_protocol(item)
    next(hook)
    assert asked == ["gpu"]
    assert torch.cuda.is_available() == marked
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if marked else "")
    with pytest.raises(StopIteration):
        next(hook)
    assert torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_every_test_that_takes_a_gpu_is_among_those_run_first() -> None:
    tests = verify_gpu.ROOT / "tests"
    marking = [
        file for file in tests.rglob("*.py") if re.search(r"mark\.gpu|add_marker\(.gpu", file.read_text("utf-8"))
    ]
    named = [verify_gpu.ROOT / path for path in verify_gpu.GPU_TESTS]
    assert len(marking) >= len(named)
    assert all(any(file.is_relative_to(path) for path in named) for file in marking if file != Path(__file__))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "benchmarks/verify_gpu.py", "--out", str(tmp_path)],
        cwd=verify_gpu.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert f"verify_gpu: expected a CUDA device, but torch {torch.__version__}" in process.stderr
    assert not list(tmp_path.iterdir())


def test_figures_of_a_step() -> None:
    figures = unet.measure_step(torch.device("cpu"), TINY_UNET, batch=2, rounds=1)
    for jacobian in ("skip", "full"):
        sides = figures[f"jacobian {jacobian}"]
        ours, alone, other = (sides[name]["median_s"] for name in ("fastsds, whole", "U-Net alone, whole", unet.EAGER))
        assert sides["fastsds, whole"]["speed"] == pytest.approx(other / ours)
        assert sides["fastsds, whole"]["share_outside_unet"] == pytest.approx(1 - alone / ours)
    json.dumps(figures)


def test_a_side_that_does_not_fit_says_so() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError

    sides = {unet.EAGER: full, "fastsds, whole": lambda: None, "U-Net alone, whole": lambda: None}
    measured = unet._with_ratios(timing.interleaved(sides, 1, torch.device("cpu")))
    assert measured[unet.EAGER] == {"out_of_memory": True}
    assert measured["fastsds, whole"].keys() == {"median_s", "share_outside_unet"}


@pytest.mark.parametrize("jacobian", ["skip", "full"])
def test_eager_step_has_the_gradient_of_the_loss_on_average(monkeypatch: Any, jacobian: Any) -> None:
    """Under the same timesteps and noise it is the gradient of `SDSLoss`."""
    from fastsds import DiffusionTeacher, SDSLoss
    from fastsds.ops import philox, sample_timesteps

    network = unet.make_unet(TINY_UNET, torch.device("cpu"), torch.float32)
    scheduler = unet.make_scheduler()
    teacher = DiffusionTeacher(network, None, None, None, scheduler)
    text = torch.randn(3, unet.TOKENS, TINY_UNET["cross_attention_dim"])
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)
    seed = torch.tensor(4)
    loss = SDSLoss(teacher, weighting="sds", jacobian=jacobian)(latents, text, seed=seed)
    (expected,) = torch.autograd.grad(loss, latents)
    noise = philox.normal(seed, (3, 1, 4, 8, 8))[:, 0]
    monkeypatch.setattr(torch, "randint", lambda *_, **__: sample_timesteps(teacher.schedule, 3, 1, seed).t[:, 0])
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    gradient = unet.eager_step(network, scheduler, latents, text, jacobian)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("clip", ["CLIP"], indirect=True)
def test_figures_of_memory(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clip.context_length = models.CONTEXT_LENGTH
    monkeypatch.setattr(open_clip, "create_model", lambda _: clip)
    figures = unet.measure_memory(torch.device("cpu"), TINY_UNET, batch=9)
    assert math.isfinite(figures["loss"]) and figures["batch"] == 9
