"""The demo: composition of the toy CLIP before and after distillation, beside its controls."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fastsds.evaluation.statistics import summarise
from fastsds.toyworld import load_clip, load_teacher
from fastsds.toyworld.experiment import Arm, Evaluation, Setting, measure_teacher, teacher_scores, train_arm
from fastsds.toyworld.figures import bars, curves, examples
from fastsds.toyworld.runs import one_thread, percent, refuse_existing
from fastsds.training.metrics import read_metrics
from fastsds.training.report import Page, markdown_table, png, write_report

ARMS = (
    Arm("control", "contrastive only, LayerNorm"),
    Arm("sds", "SDS-CLIP as published, LayerNorm", sds_weight=1e-3),
    Arm("control_all", "contrastive only, all weights", tune="all", lr=4e-4),
    Arm("control_labels", "labelled hard negatives, all weights", tune="all", lr=4e-4, ranking="labels"),
    Arm(
        "sds_ranking", "SDS-CLIP + teacher ranking (ours), all weights",
        tune="all", lr=4e-4, sds_weight=1e-3, ranking="teacher",
    ),
    Arm("control_unstated", "contrastive only, all weights", tune="all", lr=4e-4, relation_stated=False),
    Arm(
        "control_labels_unstated", "labelled hard negatives, all weights",
        tune="all", lr=4e-4, ranking="labels", relation_stated=False,
    ),
    Arm(
        "sds_ranking_unstated", "SDS-CLIP + teacher ranking (ours), all weights",
        tune="all", lr=4e-4, sds_weight=1e-3, ranking="teacher", relation_stated=False,
    ),
)  # fmt: skip
TEACHER_PAIRS = 100  # of each kind, that the teacher itself is measured on
MAIN_ARMS = ("control", "sds", "sds_ranking")
COLUMNS = {
    "zero_shot": "zero-shot",
    "attribute_pair": "attribute pair",
    "relation_pair": "relation pair",
    "relation_text": "relation text",
    "relation_image": "relation image",
    "relation_group": "relation group",
}


@dataclass(frozen=True)
class DemoConfig:
    """Distil the toy teacher into the toy CLIP and compare with the controls.

    examples:
      fastsds demo
      fastsds demo --seeds 3 --steps 800 --out report
    """

    out: Path = Path("fastsds-demo")
    """Folder of the report."""
    seeds: int = 1
    """Runs of every arm; with several, intervals are over seeds."""
    steps: int = 600
    """Optimizer steps of every arm."""
    workers: int = os.cpu_count() or 1
    """Arms trained side by side, each on one thread."""
    arms: tuple[str, ...] = MAIN_ARMS
    """What to train beside the start: control, sds, control_all, control_labels, sds_ranking, and on captions without
    relation control_unstated, control_labels_unstated, sds_ranking_unstated."""
    overwrite: bool = False
    """Replace the report that is in `out`."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        names = [arm.name for arm in ARMS]
        if not self.arms or not set(self.arms) <= set(names):
            raise ValueError(f"arms: expected some of {', '.join(names)}; got {', '.join(self.arms) or 'none'}")

    @property
    def chosen_arms(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in ARMS if arm.name in self.arms)


def run_demo(config: DemoConfig, console: Console | None = None, setting: Setting | None = None) -> dict[str, Any]:
    """Trains and measures every arm, writes `report.html`, `report.json`, `report.md` and `bars.png`.

    Returns:
        What `report.json` holds: `{"seeds", "arms": {name: {figure: {"mean", "low", "high", "values"}}}, "teacher"}`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set, or holds something other than a report.
    """
    console = console or Console()
    refuse_existing(config.out, overwrite=config.overwrite)
    started = time.monotonic()
    setting = setting or Setting(steps=config.steps)
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        runs = Path(scratch)
        start, teacher = _measure_start(setting, console)
        results = _train_all(config, setting, runs, console)
        report = _summarise(config, setting, start["figures"], results, teacher)
        report["minutes"] = round((time.monotonic() - started) / 60, 2)
        histories = {
            arm.name: read_metrics(runs / f"{arm.name}-0" / "metrics.jsonl", "evaluation") for arm in config.chosen_arms
        }
        losses = {
            arm.name: read_metrics(runs / f"{arm.name}-0" / "metrics.jsonl", "train") for arm in config.chosen_arms
        }
    _print(report, console)
    header, rows = table_rows(report)
    page = _page(config.chosen_arms, report, start, results, histories, losses)
    picture = png(bars(report, config.chosen_arms, COLUMNS))
    write_report(
        config.out,
        {
            "report.html": page.render(),
            "report.json": report,
            "report.md": markdown_table(header, rows),
            "bars.png": picture,
        },
    )
    console.print(f"picture: {config.out / 'bars.png'}")
    console.print(f"report:  {config.out / 'report.html'}  ({report['minutes']} minutes)")
    return report


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a report as strings: a header and a row per arm, percentages with their intervals."""
    titles = {"start": "start"} | {arm.name: arm.title for arm in ARMS}
    rows = []
    for name, figures in report["arms"].items():
        note = " · captions without relation" if name.endswith("_unstated") else ""
        rows.append([titles[name] + note, *(percent(figures[column]) for column in COLUMNS)])
    teacher = report["teacher"]
    rows.append(
        ["teacher's own score", *(percent(teacher[column]) if column in teacher else "–" for column in COLUMNS)]
    )
    return ["", *COLUMNS.values()], rows


def _measure_start(setting: Setting, console: Console) -> tuple[dict[str, Any], dict[str, float]]:
    console.print("Measuring the start and the teacher …")
    clip, preprocess, tokenizer = load_clip(setting.clip_folder)
    evaluation = Evaluation(preprocess, setting.split, setting.eval_pairs, setting.eval_singles)
    start = {
        "figures": evaluation.measure(clip, tokenizer),
        "preferences": evaluation.preferences(clip, tokenizer, "relation").tolist(),
        "pairs": evaluation.pairs["relation"],
    }
    return start, measure_teacher(load_teacher(setting.teacher_folder), evaluation, TEACHER_PAIRS)


def _train_all(config: DemoConfig, setting: Setting, runs: Path, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Every arm under every seed; results by arm, in the order of the seeds."""
    arms = config.chosen_arms
    results: dict[str, list[Any]] = {arm.name: [None] * config.seeds for arm in arms}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    workers = min(config.workers, len(arms) * config.seeds)
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress(*columns, console=console) as progress,
    ):
        running: dict[Future[Any], tuple[Arm, int]] = {}

        def train(arm: Arm, seed: int, scores: Tensor | None) -> None:
            out = runs / f"{arm.name}-{seed}"
            running[pool.submit(train_arm, arm, seed, setting, out, scores)] = arm, seed

        ranked = [arm for arm in arms if arm.ranking == "teacher"]
        scoring = progress.add_task("the teacher scores the candidates", total=config.seeds if ranked else 0)
        training = progress.add_task("training", total=len(arms) * config.seeds)
        scored = {pool.submit(teacher_scores, setting, seed): seed for seed in range(config.seeds) if ranked}
        for seed in range(config.seeds):
            for arm in arms:
                if arm not in ranked:
                    train(arm, seed, None)
        for scoring_job in as_completed(scored):
            progress.advance(scoring)
            for arm in ranked:
                train(arm, scored[scoring_job], scoring_job.result())
        for training_job in as_completed(running):
            arm, seed = running[training_job]
            results[arm.name][seed] = training_job.result()
            progress.update(training, advance=1, description=f"trained {arm.name}")
    return results


def _summarise(
    config: DemoConfig,
    setting: Setting,
    start: dict[str, float],
    results: dict[str, list[dict[str, Any]]],
    teacher: dict[str, float],
) -> dict[str, Any]:
    def samples(figure: str) -> int:
        if figure == "zero_shot":
            return setting.eval_singles
        return setting.eval_pairs * (2 if figure.endswith("_pair") else 1)

    arms = {"start": {name: summarise([value], samples(name)) for name, value in start.items()}}
    for arm in config.chosen_arms:
        arms[arm.name] = {
            name: summarise([result["figures"][name] for result in results[arm.name]], samples(name)) for name in start
        }
    return {
        "seeds": config.seeds,
        "steps": config.steps,
        "arms": arms,
        "teacher": {
            name: summarise([value], TEACHER_PAIRS * (2 if name.endswith("_pair") else 1))
            for name, value in teacher.items()
        },
    }


def _print(report: dict[str, Any], console: Console) -> None:
    header, rows = table_rows(report)
    table = Table(title="Composition of the toy CLIP, % (chance: pair 50, text and image 25, group 17)")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _page(
    arms: Sequence[Arm],
    report: dict[str, Any],
    start: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    histories: dict[str, list[dict[str, float]]],
    losses: dict[str, list[dict[str, float]]],
) -> Page:
    page = Page("SDS-CLIP on the toy world")
    page.paragraph(
        "A tiny CLIP that cannot tell which thing is left of which, and a tiny diffusion model that can. Every arm "
        f"starts from the same CLIP and trains {report['steps']} steps on the same scenes. “Captions without "
        "relation” name the things and never say where they are: there only the teacher can know."
    )
    interval = (
        f"means over {report['seeds']} seeds with 95 % intervals over the seeds"
        if report["seeds"] > 1
        else "one seed; intervals are the test set's part of the uncertainty alone"
    )
    page.heading("What each arm scores")
    page.paragraph(f"Percent; {interval}. Chance is 50 for pair, 25 for text and image, 17 for group; a tie is wrong.")
    page.table(*table_rows(report))
    page.figure(bars(report, arms, COLUMNS), "bars of the main figures by arm with their intervals")
    page.heading("Along the run")
    page.paragraph("Accuracy on validation pairs and the training losses of the first seed.")
    page.figure(curves(histories, losses, arms), "curves of validation accuracy and losses by arm")
    page.heading("Which caption each model picks")
    page.paragraph("Held-out scenes, first seed; the caption in bold is true, and a mark says that a model picks it.")
    preferences = {"start": start["preferences"]} | {arm.name: results[arm.name][0]["preferences"] for arm in arms}
    page.figure(
        examples(preferences, start["pairs"]), "example scenes with both captions and the models that pick the true one"
    )
    return page
