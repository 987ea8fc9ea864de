"""Results as tables: Markdown to read, CSV and JSON to compute with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsds.evaluation.compare import Comparison
from fastsds.evaluation.outcomes import OUTCOMES_FILE, Outcomes
from fastsds.evaluation.statistics import share_interval
from fastsds.training.checkpoint import atomic_folder

_RESULT_NAMES = {"results.md", "results.json", "results.csv", "comparison.csv", OUTCOMES_FILE}
_INTERVALS = (
    "Intervals: percentile bootstrap, within groups for macro; samples of one image, or of one Winoground example, "
    "are drawn and tested together."
)
Row = dict[str, Any]


def write_results(
    folder: Path,
    outcomes: Outcomes,
    *,
    comparison: Comparison | None = None,
    description: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `results.md`, `results.json`, `results.csv` and `outcomes.json` as `folder`: all of them or none.

    Args:
        folder: replaced where it holds earlier results.
        comparison: with another model's outcomes; also goes into `comparison.csv`.
        description: what was evaluated (model, data, versions); goes into `results.json`, and into `results.md` as a
            list.
        files: more files of the folder by their names, such as the resolved config.

    Raises:
        ValueError: the folder holds anything but earlier results, which would be lost.
        OSError: the disk refuses; what was there stays.
    """
    extra = dict(files or {})
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name not in {*_RESULT_NAMES, *extra})
        if others:
            raise ValueError(f"folder: {folder} holds other files than results, first {others[0]}; name a new folder")
    rows = result_rows(outcomes)
    document: dict[str, Any] = {
        "benchmark": outcomes.benchmark,
        **({"description": dict(description)} if description else {}),
        "figures": {
            row["figure"]: {
                **{name: value for name, value in row.items() if name != "figure"},
                "by_group": outcomes.figures[row["figure"]].group_means(),
            }
            for row in rows
        },
    }
    texts = {
        **extra,
        OUTCOMES_FILE: json.dumps(outcomes.to_json()),
        "results.csv": to_csv(rows),
        "results.md": results_markdown(outcomes, comparison, description),
    }
    if comparison is not None:
        document["comparison"] = comparison.to_json()["figures"]
        texts["comparison.csv"] = to_csv(comparison_rows(comparison))
    texts["results.json"] = json.dumps(document, indent=1)
    with atomic_folder(folder) as staging:
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")


def result_rows(outcomes: Outcomes) -> list[Row]:
    """A row per figure: samples, micro and macro means with 95 % intervals, groups, chance; in [0, 1]."""
    rows: list[Row] = []
    for name, figure in outcomes.figures.items():
        low, high = share_interval(figure.hits, None, figure.units)
        macro_low = macro_high = None
        if figure.groups is not None:
            macro_low, macro_high = share_interval(figure.hits, figure.groups, figure.units)
        rows.append({
            "figure": name, "samples": len(figure.hits), "micro": figure.micro, "low": low, "high": high,
            "macro": figure.macro, "macro_low": macro_low, "macro_high": macro_high,
            "groups": len(figure.group_means()) or None, "chance": figure.chance,
        })  # fmt: skip
    return rows


def comparison_rows(comparison: Comparison) -> list[Row]:
    """A row per figure, of `FigureComparison`'s fields."""
    return [{"figure": name, **row} for name, row in comparison.to_json()["figures"].items()]


def results_markdown(
    outcomes: Outcomes, comparison: Comparison | None = None, description: Mapping[str, Any] | None = None
) -> str:
    """The page of `results.md`; shares in per cent."""
    parts = [f"# {outcomes.benchmark}\n"]
    if description:
        parts.append("".join(f"- {name}: {value}\n" for name, value in description.items()))
    parts.append(results_table(outcomes))
    if comparison is not None:
        parts.append(f"## Before and after\n\n{comparison_table(comparison)}")
    return "\n".join(parts)


def results_table(outcomes: Outcomes) -> str:
    """Markdown; macro columns appear where a figure has groups."""
    rows = result_rows(outcomes)
    with_macro = any(row["macro"] is not None for row in rows)
    header = ["figure", "%", "95 % interval", *(["macro %", "95 % interval", "groups"] if with_macro else []),
              "chance %", "n"]  # fmt: skip
    body = [
        [
            row["figure"], _percent(row["micro"]), _interval(row["low"], row["high"]),
            *([_percent(row["macro"]), _interval(row["macro_low"], row["macro_high"]), _count(row["groups"])]
              if with_macro else []),
            _percent(row["chance"]), str(row["samples"]),
        ]
        for row in rows
    ]  # fmt: skip
    return _markdown(header, body) + f"\n{_INTERVALS} Where that is a point, as where all are right: Wilson's.\n"


def comparison_table(comparison: Comparison) -> str:
    """Markdown; differences in percentage points, after minus before."""
    with_macro = any(row.macro_difference is not None for row in comparison.figures.values())
    header = ["figure", "before %", "after %", "difference", "95 % interval", "gained", "lost", "p",
              *(["macro difference", "95 % interval"] if with_macro else []), "n"]  # fmt: skip
    body = [
        [
            name, _percent(row.before), _percent(row.after), _percent(row.difference, signed=True),
            _interval(row.low, row.high, signed=True), str(row.gained), str(row.lost), f"{row.p_value:.2g}",
            *([_percent(row.macro_difference, signed=True), _interval(row.macro_low, row.macro_high, signed=True)]
              if with_macro else []),
            str(row.samples),
        ]
        for name, row in comparison.figures.items()
    ]  # fmt: skip
    return f"{_markdown(header, body)}\np: McNemar's exact test, two-sided. {_INTERVALS}\n"


def to_csv(rows: Sequence[Row]) -> str:
    """A header and the rows; None is empty."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _percent(share: float | None, *, signed: bool = False) -> str:
    return "" if share is None else f"{100 * share:{'+' if signed else ''}.1f}"


def _interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    return "" if low is None else f"{_percent(low, signed=signed)} to {_percent(high, signed=signed)}"


def _count(number: int | None) -> str:
    return "" if number is None else str(number)
