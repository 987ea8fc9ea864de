"""The IntCoOp demo end to end, in miniature: every method, every file, every figure where it belongs."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastsds.evaluation import BaseToNovelScores
from fastsds.toyworld import intcoop_demo
from fastsds.toyworld.intcoop_demo import IntCoOpDemoConfig, run_intcoop_demo, table_rows
from fastsds.toyworld.intcoop_experiment import EXPLAINED, METHODS, Result, explained_items, run_method

NAMES = tuple(method.name for method in METHODS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of the main methods under two seeds, one epoch each, on a handful of pictures."""
    out = tmp_path_factory.mktemp("demo") / "report"
    config = IntCoOpDemoConfig(out=out, seeds=2, shots=2, test_per_class=4, workers=1)
    short = tuple(dataclasses.replace(method, epochs=1) for method in METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intcoop_demo, "METHODS", short)
        return run_intcoop_demo(config, Console(quiet=True)), out


def test_report_json_has_every_method_domain_and_figure(finished: tuple[dict[str, Any], Path]) -> None:
    _, out = finished
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(report["methods"]) == ["zero_shot", "coop", "cocoop", "intcoop"]
    for name, domains in report["methods"].items():
        assert list(domains) == ["source", "shifted"]
        for figures in domains.values():
            assert list(figures) == ["base", "novel", "harmonic"]
            for entry in figures.values():
                assert len(entry["values"]) == (1 if name == "zero_shot" else 2)
                assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
    assert list(report["words"]) == ["intcoop"]


def test_harmonic_means_and_differences_follow_from_the_figures(finished: tuple[dict[str, Any], Path]) -> None:
    report, _ = finished
    for domains in report["methods"].values():
        for figures in domains.values():
            for base, novel, harmonic in zip(*(figures[part]["values"] for part in figures), strict=True):
                assert harmonic == pytest.approx(statistics.harmonic_mean([base, novel]))
    for domain, differences in report["intcoop_minus_coop"].items():
        ours, theirs = (report["methods"][name][domain]["harmonic"]["values"] for name in ("intcoop", "coop"))
        assert differences == pytest.approx([one - other for one, other in zip(ours, theirs, strict=True)])


def test_report_html_is_self_contained(finished: tuple[dict[str, Any], Path]) -> None:
    _, out = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for title in ("zero-shot", "CoOp", "CoCoOp", "IntCoOp"):
        assert f"<td>{title}</td>" in page
    assert "IntCoOp minus CoOp" in page
    for item in explained_items(4):
        assert f"{item.attribute} {item.classname}" in page


def test_table_agrees_with_the_figures(finished: tuple[dict[str, Any], Path]) -> None:
    report, out = finished
    header, rows = table_rows(report)
    assert header == ["", "base", "novel", "harmonic", "base, shifted", "novel, shifted", "harmonic, shifted"]
    shown = float(rows[3][header.index("novel, shifted")].split()[0])
    assert shown == pytest.approx(100 * report["methods"]["intcoop"]["shifted"]["novel"]["mean"], abs=0.05)
    assert (out / "report.md").read_text(encoding="utf-8").count("\n") == len(rows) + 2


def test_the_verdict_says_what_came_out() -> None:
    def report(values: list[float]) -> dict[str, Any]:
        return {"intcoop_minus_coop": {"source": values}}

    assert "-2.0 points, above in 1 of 3 seeds" in intcoop_demo._verdict(report([0.01, -0.03, -0.04]))
    assert "+2.0 points, above in 3 of 3 seeds" in intcoop_demo._verdict(report([0.01, 0.02, 0.03]))
    assert intcoop_demo._verdict({}) == ""


@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs_and_only_some_have_words(name: str, tmp_path: Path) -> None:
    method = dataclasses.replace(next(one for one in METHODS if one.name == name), epochs=1)
    result = run_method(method, 0, shots=2, test_per_class=2, out=tmp_path / "run")
    assert isinstance(result, Result)
    assert all(isinstance(scores, BaseToNovelScores) for scores in result.scores.values())
    assert bool(result.words) == (result.explanation is not None) == name.startswith("intcoop")
    if result.explanation is not None:
        assert len(result.explanation.words) == 2 * min(EXPLAINED, 6)
    assert (tmp_path / "run").exists() == method.trained


def test_methods_left_without_a_loss_share_all_else() -> None:
    methods = {method.name: method for method in METHODS}
    for name in ("intcoop_no_attribute", "intcoop_no_regulariser"):
        changed = dataclasses.replace(methods[name], name="intcoop", title="IntCoOp", options={})
        assert changed == methods["intcoop"]


def test_unknown_methods_are_named() -> None:
    with pytest.raises(ValueError, match=r"methods: expected some of zero_shot, .*; got maple"):
        IntCoOpDemoConfig(methods=("maple",))
