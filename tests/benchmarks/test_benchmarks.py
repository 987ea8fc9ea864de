"""The benchmarks run, gates included; no figure of theirs is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import report

ROOT = Path(__file__).parents[2]
JSON = "--benchmark-json="


@pytest.mark.slow
def test_smallest_run_writes_its_results(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--extent", "tiny", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "FASTSDS_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (document,) = tmp_path.glob("*.json")
    assert document.with_suffix(".png").stat().st_size > 10_000
    results = json.loads(document.read_text(encoding="utf-8"))
    assert results["machine"]["backends"]["sds_loss"] in process.stdout
    suites = {timing["suite"].split(",")[0] for timing in results["timings"]}
    assert {"add_noise", "sds_loss", "sample_timesteps", "step"} <= suites
    for timing in results["timings"]:
        assert "fastsds" in timing["contenders"] and len(timing["contenders"]) > 1
        assert all(0 < each["min_s"] <= each["median_s"] for each in timing["contenders"].values())
        assert timing["suite"] in process.stdout
    assert [each["draws"] for each in results["variances"]] == [1, 4]


@pytest.mark.parametrize("words", [[], ["--quick"], ["--extent", "tiny"], ["--only", "sds_loss"]])
def test_a_part_does_not_replace_the_record_of_the_whole(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(arguments: list[str]) -> int:
        (figures,) = (word.removeprefix(JSON) for word in arguments if word.startswith(JSON))
        Path(figures).write_text(json.dumps({"benchmarks": []}), encoding="utf-8")
        return 0

    monkeypatch.setattr(pytest, "main", measure)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert program.main([*words, "--device", "cpu"]) == 0
    assert (tmp_path / "results").exists() == (not words)
    assert ("not written: --out FOLDER" in capsys.readouterr().out) == bool(words)
    assert program.main([*words, "--device", "cpu", "--out", str(tmp_path / "named")]) == 0
    assert len(list((tmp_path / "named").glob("*.json"))) == 1


def test_bars_are_judged_by_their_figures() -> None:
    timing = {
        "suite": "step", "case": "32x1x4x64x64", "dtype": "float32", "bars": {"eager": 4.0, "torch.compile": 1.5},
        "contenders": {name: {"median_s": seconds} for name, seconds in
                       {"eager": 0.9, "torch.compile": 0.4, "fastsds": 0.2}.items()},
    }  # fmt: skip
    bandwidth = {"suite": "sds_loss", "case": "256x4x4x64x64", "share": 0.7, "needed_share": 0.75, "met": False}
    strategies = {"uniform": {"ratio": 1.0}, "stratified": {"ratio": 0.2, "needed": 0.5, "met": True}}
    variance = {"batch": 32, "draws": 1, "strategies": strategies}
    measured = list(report.bars({"timings": [timing], "bandwidths": [bandwidth], "variances": [variance]}))
    assert [(figure, met) for _, figure, met in measured] == [
        ("4.50x of 4x", True),
        ("2.00x of 1.5x", True),
        ("70% of 75%", False),
        ("0.20 of at most 0.5", True),
    ]
    timing["bars"] = {"eager": 4.6}
    assert [met for *_, met in report.bars({"timings": [timing], "bandwidths": [], "variances": []})] == [False]
