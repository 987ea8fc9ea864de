"""The trainers on a GPU, against themselves on the CPU."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from fastsds.training.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SCRIPT = Path(__file__).with_name("toyworld_runs.py")


def _train(maker: str, out: Path, device: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, Any]]:
    """What a run logs; it is made again and resumed at its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
    for resume in (False, True):
        trainer = runpy.run_path(str(SCRIPT))[maker](out / device, **options)
        trainer.fit(resume=resume)
        assert {tensor.device.type for tensor in trainer.module.trained_parameters().values()} == {device}
    return read_metrics(out / device / "metrics.jsonl", "train")


def test_a_distillation_starts_at_the_losses_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contrastive one alone: SDS draws its seeds from the device's generator."""
    options = {"strategy": "importance", "bins": 2, "ranking_weight": 1.0, "run": {"log_every": 1}}
    expected, found = (_train("distillation", tmp_path, device, monkeypatch, **options) for device in ("cpu", "cuda"))
    assert len(found) == len(expected) == 4
    assert found[0]["contrastive"] == pytest.approx(expected[0]["contrastive"], rel=1e-2)
    assert found[0]["ranking"] == pytest.approx(expected[0]["ranking"], rel=1e-2)
    assert all(math.isfinite(value) for record in found for value in record.values() if isinstance(value, float))


def test_prompt_tuning_has_the_losses_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = (_train("prompt_tuning", tmp_path, device, monkeypatch) for device in ("cpu", "cuda"))
    assert len(found) == len(expected) > 0
    for record, expected_record in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(expected_record["loss"], rel=1e-2)
