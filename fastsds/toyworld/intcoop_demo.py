"""The IntCoOp demo: base-to-novel accuracy of IntCoOp and its baselines on the toy world's few-shot task."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torchvision.transforms.functional import to_tensor

from fastsds.evaluation.base_to_novel import summarise_base_to_novel
from fastsds.evaluation.statistics import summarise
from fastsds.toyworld.fewshot import ATTRIBUTES
from fastsds.toyworld.intcoop_experiment import DOMAINS, METHODS, Method, Result, explained_items, run_method
from fastsds.toyworld.intcoop_figures import bars, curves
from fastsds.toyworld.runs import one_thread, percent, refuse_existing
from fastsds.training.metrics import read_metrics
from fastsds.training.report import Page, markdown_table, png, write_report

PARTS = ("base", "novel", "harmonic")
MAIN_METHODS = ("zero_shot", "coop", "cocoop", "intcoop")


@dataclass(frozen=True)
class IntCoOpDemoConfig:
    """Prompt-tune the toy CLIP on a few pictures of half of the shapes, and measure it on both halves.

    examples:
      fastsds intcoop-demo
      fastsds intcoop-demo --seeds 1 --methods coop intcoop
    """

    out: Path = Path("fastsds-intcoop-demo")
    """Folder of the report."""
    seeds: int = 3
    """Draws of the shots, and starts, of every method."""
    shots: int = 16
    """Pictures of every class that are trained on."""
    test_per_class: int = 200
    """Pictures of every class that are measured, in each domain."""
    workers: int = os.cpu_count() or 1
    """Runs side by side, each on one thread."""
    methods: tuple[str, ...] = MAIN_METHODS
    """Any of zero_shot, coop, cocoop, intcoop, and IntCoOp with a loss left out: intcoop_no_attribute,
    intcoop_no_regulariser."""
    overwrite: bool = False
    """Replace the report that is in `out`."""

    def __post_init__(self) -> None:
        for name in ("seeds", "shots", "test_per_class", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        names = [method.name for method in METHODS]
        if not self.methods or not set(self.methods) <= set(names):
            raise ValueError(f"methods: expected some of {', '.join(names)}; got {', '.join(self.methods) or 'none'}")

    @property
    def chosen(self) -> tuple[Method, ...]:
        return tuple(method for method in METHODS if method.name in self.methods)


def run_intcoop_demo(config: IntCoOpDemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains and measures every method under every seed, writes `report.html`, `report.json`, `report.md`, `bars.png`.

    Returns:
        What `report.json` holds: `{"seeds", "shots", "methods": {name: {domain: {"base"|"novel"|"harmonic": {"mean",
        "low", "high", "values"}}}}, "words", "intcoop_minus_coop"}`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set, or holds something other than a report.
    """
    console = console or Console()
    refuse_existing(config.out, overwrite=config.overwrite)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        runs = Path(scratch)
        results = _run_all(config, runs, console)
        splits = {
            method.name: {
                split: read_metrics(runs / f"{method.name}-0" / "metrics.jsonl", split)
                for split in ("train", "evaluation")
            }
            for method in config.chosen
            if method.trained
        }
    report = _summarise(config, results)
    report["minutes"] = round((time.monotonic() - started) / 60, 2)
    header, rows = table_rows(report)
    _print(header, rows, report, console)
    titles = {method.name: method.title for method in config.chosen}
    picture = bars(report["methods"], titles)
    page = Page("IntCoOp on the toy world")
    page.paragraph(
        f"Six shapes in faded pictures; {config.shots} of each of the first three are trained on, with the size and "
        "colour word of each as its attribute. “Novel” shapes are never trained on. The shifted domain tilts the "
        "pictures. All methods tune prompts alone, of the same frozen CLIP, with the settings that did best on "
        "validation pictures in a grid of their own."
    )
    page.heading("Accuracy on classes trained on and on novel ones")
    page.paragraph(f"Percent, {_interval(config)}; a tie is wrong. {_verdict(report)}")
    page.table(header, rows)
    page.figure(picture, "bars of base, novel and harmonic accuracy by method and domain")
    page.heading("Along the run")
    page.paragraph("Accuracy on validation pictures of the source domain, and the training losses, of the first seed.")
    page.figure(curves(splits, titles), "curves of validation accuracy and training losses by method")
    explained = [runs[0].explanation for runs in results.values() if runs[0].explanation is not None]
    if explained:
        items = explained_items(config.test_per_class)
        page.heading("What IntCoOp sees")
        page.paragraph(
            f"Test pictures with the class that IntCoOp gives them and the words nearest to the predicted attribute, "
            f"with their cosine similarities; base shapes above, novel ones below. The true words and class, in "
            f"order: {'; '.join(f'{item.attribute} {item.classname}' for item in items)}. {_word_shares(report)}"
        )
        images = torch.stack([to_tensor(item.image) for item in items])
        page.figure(explained[0].figure(images), "test pictures with predicted class and attribute words")
    write_report(
        config.out,
        {
            "report.html": page.render(),
            "report.json": report,
            "report.md": markdown_table(header, rows),
            "bars.png": png(picture),
        },
    )
    console.print(f"report: {config.out / 'report.html'}  ({report['minutes']} minutes)")
    return report


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a report as strings: a header and a row per method, percentages with their intervals."""
    titles = {method.name: method.title for method in METHODS}
    header = ["", *(f"{part}{'' if domain == 'source' else ', shifted'}" for domain in DOMAINS for part in PARTS)]
    rows = [
        [titles[name], *(percent(figures[domain][part]) for domain in DOMAINS for part in PARTS)]
        for name, figures in report["methods"].items()
    ]
    return header, rows


def _run_all(config: IntCoOpDemoConfig, runs: Path, console: Console) -> dict[str, list[Result]]:
    """Every method under every seed; results by method, in the order of the seeds. Zero-shot has one seed."""
    jobs = [(method, seed) for method in config.chosen for seed in range(config.seeds if method.trained else 1)]
    results: dict[str, list[Any]] = {method.name: [] for method in config.chosen}
    for method, _ in jobs:
        results[method.name].append(None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(
            min(config.workers, len(jobs)), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("prompt tuning", total=len(jobs))
        running: dict[Future[Result], tuple[Method, int]] = {
            pool.submit(
                run_method, method, seed, config.shots, config.test_per_class, runs / f"{method.name}-{seed}"
            ): (method, seed)
            for method, seed in reversed(jobs)  # the longest first
        }
        for job in as_completed(running):
            method, seed = running[job]
            results[method.name][seed] = job.result()
            progress.update(bar, advance=1, description=f"finished {method.title}")
    return results


def _summarise(config: IntCoOpDemoConfig, results: dict[str, list[Result]]) -> dict[str, Any]:
    samples = 3 * config.test_per_class
    report: dict[str, Any] = {
        "seeds": config.seeds,
        "shots": config.shots,
        "methods": {
            name: {domain: summarise_base_to_novel([run.scores[domain] for run in runs], samples) for domain in DOMAINS}
            for name, runs in results.items()
        },
        "words": {
            name: {domain: summarise([run.words[domain] for run in runs], 2 * samples) for domain in DOMAINS}
            for name, runs in results.items()
            if runs[0].words
        },
    }
    if {"coop", "intcoop"} <= results.keys():
        report["intcoop_minus_coop"] = {
            domain: [
                ours.scores[domain].harmonic - theirs.scores[domain].harmonic
                for ours, theirs in zip(results["intcoop"], results["coop"], strict=True)
            ]
            for domain in DOMAINS
        }
    return report


def _print(header: list[str], rows: list[list[str]], report: dict[str, Any], console: Console) -> None:
    table = Table(title="Accuracy of prompt tuning on the toy world's few-shot task, % (chance: 33)")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(_verdict(report))


def _verdict(report: dict[str, Any]) -> str:
    """Whether IntCoOp is above CoOp, in words, whichever way it came out."""
    differences = report.get("intcoop_minus_coop")
    if differences is None:
        return ""
    sentences = []
    for domain, values in differences.items():
        above = sum(value > 0 for value in values)
        sentences.append(
            f"Harmonic mean in the {domain} domain: IntCoOp minus CoOp is {100 * statistics.fmean(values):+.1f} "
            f"points, above in {above} of {len(values)} seeds."
        )
    return " ".join(sentences)


def _word_shares(report: dict[str, Any]) -> str:
    shares = next(iter(report["words"].values()))
    parts = ", ".join(f"{percent(share)} % in the {domain} domain" for domain, share in shares.items())
    return f"The nearest of {len(ATTRIBUTES)} words is the true one for {parts}."


def _interval(config: IntCoOpDemoConfig) -> str:
    if config.seeds == 1:
        return "one seed, with the test set's part of the uncertainty alone"
    return f"means over {config.seeds} seeds with 95 % intervals over the seeds (zero-shot: over the pictures)"
