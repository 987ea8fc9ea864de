"""The demo end to end, in miniature: every arm, every file, every figure where it belongs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastsds.toyworld.demo import ARMS, COLUMNS, DemoConfig, run_demo, table_rows
from fastsds.toyworld.experiment import Setting
from fastsds.toyworld.runs import refuse_existing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of all arms under two seeds, two steps each, on a handful of scenes."""
    out = tmp_path_factory.mktemp("demo") / "report"
    small = Setting(steps=2, batch=8, train_scenes=24, eval_pairs=8, eval_singles=16, score_draws=1, curve_points=1)
    config = DemoConfig(out=out, seeds=2, steps=2, workers=1, arms=tuple(arm.name for arm in ARMS))
    return run_demo(config, Console(quiet=True), setting=small), out


def test_report_json_has_every_arm_and_figure(finished: tuple[dict[str, Any], Path]) -> None:
    _, out = finished
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["seeds"] == 2
    assert list(report["arms"]) == ["start", *(arm.name for arm in ARMS)]
    for name, figures in report["arms"].items():
        assert re.fullmatch(r"start|(control|sds)(_\w+)?", name)
        for column in COLUMNS:
            entry = figures[column]
            assert set(entry) == {"mean", "low", "high", "values"}
            assert len(entry["values"]) == (1 if name == "start" else 2)
            assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
    assert report["teacher"]["relation_pair"]["mean"] > 0.8


def test_report_html_is_self_contained(finished: tuple[dict[str, Any], Path]) -> None:
    _, out = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for arm in ARMS:
        assert arm.title in page
    assert (out / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_table_agrees_with_the_figures(finished: tuple[dict[str, Any], Path]) -> None:
    report, out = finished
    header, rows = table_rows(report)
    assert len(rows) == len(ARMS) + 2
    shown = float(rows[1][1 + list(COLUMNS).index("relation_pair")].split()[0])
    assert shown == pytest.approx(100 * report["arms"]["control"]["relation_pair"]["mean"], abs=0.05)
    assert (out / "report.md").read_text(encoding="utf-8").count("\n") == len(rows) + 2
    assert len(header) == len(rows[0])


def test_arms_that_differ_in_one_option_share_all_others() -> None:
    arms = {arm.name: arm for arm in ARMS}
    for control, treated in (("control", "sds"), ("control_all", "sds_ranking")):
        for option in ("tune", "lr", "relation_stated"):
            assert getattr(arms[control], option) == getattr(arms[treated], option)
    for name in ("control_all", "control_labels", "sds_ranking"):
        unstated = {"control_all": "control_unstated"}.get(name, name + "_unstated")
        assert not arms[unstated].relation_stated
        assert arms[unstated].ranking == arms[name].ranking


def test_an_existing_report_is_replaced_only_when_asked(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, out = finished
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        refuse_existing(out, overwrite=False)
    refuse_existing(out, overwrite=True)
    (tmp_path / "precious.txt").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match="name another folder"):
        refuse_existing(tmp_path, overwrite=True)
