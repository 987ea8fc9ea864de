"""The pictures of the demo's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastsds.toyworld.experiment import Arm
    from fastsds.toyworld.tasks import CompositionPairs

_SHOWN_SCENES = 6
_GREY = "#9aa5b1"
_COLOURS = ("#8d99ae", "#e07a5f", "#6c8ead", "#3d5a80", "#d1495b", "#b8c4d0", "#7b8fa6", "#9b2335")


def bars(report: Mapping[str, Any], arms: Sequence[Arm], columns: Mapping[str, str]) -> Figure:
    """Zero-shot, attribute and relation pairs by arm, with intervals, chance and the teacher's score."""
    figure = _figure(12, 4.2)
    shown = ("zero_shot", "attribute_pair", "relation_pair")
    names = ["start", *(arm.name for arm in arms)]
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, column in zip(axes, shown, strict=True):
        figures = [report["arms"][name][column] for name in names]
        means = [100 * figure["mean"] for figure in figures]
        errors = [
            [max(0.0, 100 * (entry["mean"] - entry["low"])) for entry in figures],
            [max(0.0, 100 * (entry["high"] - entry["mean"])) for entry in figures],
        ]
        axis.barh(names, means, xerr=errors, color=[_GREY, *_COLOURS[: len(arms)]], error_kw={"lw": 1, "capsize": 2})
        if column in report["teacher"]:
            axis.axvline(100 * report["teacher"][column]["mean"], color="#2a9d8f", lw=1.5, label="teacher")
        if column != "zero_shot":
            axis.axvline(50, color="black", lw=0.8, ls=":", label="chance")
            axis.legend(loc="lower left", fontsize=7)
        axis.set(title=columns[column], xlim=(0, 103), xlabel="%")
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    losses: Mapping[str, Sequence[Mapping[str, float]]],
    arms: Sequence[Arm],
) -> Figure:
    """Validation accuracy on relation pairs, and the parts of the loss, against steps."""
    figure = _figure(12, 3.6)
    accuracy, contrastive, ranking = figure.subplots(1, 3)
    for arm, colour in zip(arms, _COLOURS, strict=False):
        history, loss = histories[arm.name], losses[arm.name]
        accuracy.plot(
            [record["step"] for record in history],
            [100 * record["relation_pair"] for record in history],
            marker="o", ms=3, color=colour, label=arm.name,
        )  # fmt: skip
        for axis, part in ((contrastive, "contrastive"), (ranking, "ranking")):
            values = _smooth([record[part] for record in loss])
            if any(values):
                axis.plot(range(1, len(values) + 1), values, color=colour, lw=1)
    accuracy.axhline(50, color="black", lw=0.8, ls=":")
    accuracy.set(title="relation pairs, validation", xlabel="step", ylabel="%", ylim=(0, 103))
    contrastive.set(title="contrastive loss", xlabel="step", yscale="log")
    ranking.set(title="ranking loss", xlabel="step", yscale="log")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=7)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def examples(preferences: Mapping[str, Sequence[Sequence[bool]]], pairs: CompositionPairs) -> Figure:
    """The first scenes with their two captions, and for every model whether it picks the true one."""
    figure = _figure(12, 2.1 * _SHOWN_SCENES)
    axes = figure.subplots(_SHOWN_SCENES, 2)
    for row, (captions, images) in enumerate(
        zip(pairs.captions[:_SHOWN_SCENES], pairs.images[:_SHOWN_SCENES], strict=True)
    ):
        for column in range(2):
            axis = axes[row][column]
            axis.imshow(images[column].permute(1, 2, 0).numpy())
            axis.set_axis_off()
            marks = [f"{'✓' if chosen[row][column] else '✗'} {name}" for name, chosen in preferences.items()]
            axis.text(1.05, 0.95, captions[column], transform=axis.transAxes, fontsize=8, weight="bold", va="top")
            axis.text(1.05, 0.83, captions[1 - column], transform=axis.transAxes, fontsize=8, va="top")
            axis.text(1.05, 0.68, "\n".join(marks), transform=axis.transAxes, fontsize=6.5, va="top")
    figure.subplots_adjust(wspace=1.2, left=0.02, right=0.8, top=0.99, bottom=0.01)
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, so that no window system is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
