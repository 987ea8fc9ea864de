"""The pictures of the IntCoOp demo's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#9aa5b1", "#6c8ead", "#e9c46a", "#d1495b", "#2a9d8f", "#7b5ea7")


def bars(methods: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Figure:
    """Base, novel and harmonic accuracy by method, a panel per domain, with intervals."""
    figure = _figure(12, 3.8)
    domains = list(next(iter(methods.values())))
    axes = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    width = 0.8 / len(methods)
    for axis, domain in zip(axes, domains, strict=True):
        for position, (name, figures) in enumerate(methods.items()):
            entries = list(figures[domain].values())
            means = [100 * entry["mean"] for entry in entries]
            errors = [
                [max(0.0, 100 * (entry["mean"] - entry["low"])) for entry in entries],
                [max(0.0, 100 * (entry["high"] - entry["mean"])) for entry in entries],
            ]
            places = [group + (position - (len(methods) - 1) / 2) * width for group in range(len(entries))]
            axis.bar(
                places, means, width, yerr=errors, color=_COLOURS[position], label=titles[name],
                error_kw={"lw": 1, "capsize": 2},
            )  # fmt: skip
        axis.set_xticks(range(len(figures[domain])), list(figures[domain]))
        axis.axhline(100 / 3, color="black", lw=0.8, ls=":")
        axis.set(title=f"{domain} domain", ylabel="%", ylim=(25, 100))
    axes[0].legend(fontsize=7, ncols=2, loc="upper left")
    figure.tight_layout()
    return figure


def curves(splits: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], titles: Mapping[str, str]) -> Figure:
    """Validation accuracy of both halves and the training losses against steps, by method."""
    figure = _figure(12, 3.6)
    base, novel, classification, attribute = figure.subplots(1, 4)
    for position, (name, records) in enumerate(splits.items(), start=1):
        style = {"color": _COLOURS[position], "lw": 1.2, "label": titles[name]}
        evaluation, train = records["evaluation"], records["train"]
        for axis, part in ((base, "base"), (novel, "novel")):
            axis.plot(
                [record["step"] for record in evaluation],
                [100 * record[part] for record in evaluation],
                marker="o", ms=3, **style,
            )  # fmt: skip
        for axis, part in ((classification, "classification"), (attribute, "attribute")):
            if any(record[part] for record in train):
                axis.plot([record["step"] for record in train], [record[part] for record in train], **style)
    for axis, title in ((base, "base, validation"), (novel, "novel, validation")):
        axis.set(title=title, xlabel="step", ylabel="%")
    for axis, title in ((classification, "cross-entropy"), (attribute, "squared distance to the attribute")):
        axis.set(title=title, xlabel="step", yscale="log")
    figure.legend(*base.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=7)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, so that no window system is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))
