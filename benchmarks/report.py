"""What is made of the suites' figures: a table, a JSON file and a plot."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.timing import OURS
from fastsds.ops import _dispatch
from fastsds.training.report import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("fastsds", "torch", "triton", "numpy", "diffusers")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where figures come from: device, threads, versions, and the backend that served each op."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": threads,
        "versions": versions,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "backends": {op: _dispatch.choose(op, device).backend for op in _dispatch.ops()},
    }


def cpu_name() -> str:
    """As the system calls the processor, with the vector instructions that PyTorch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def collect(benchmark_json: Path) -> dict[str, list[dict[str, Any]]]:
    """The suites' own records from the file that pytest-benchmark writes, as they are written down: rounded."""
    tests = json.loads(benchmark_json.read_text(encoding="utf-8"))["benchmarks"]
    records: dict[str, list[dict[str, Any]]] = {"result": [], "bandwidth": [], "variance": []}
    for test in tests:
        for kind, record in test["extra_info"].items():
            records[kind].append(record)
    kinds = {"timings": "result", "bandwidths": "bandwidth", "variances": "variance"}
    return {name: _rounded(records[kind]) for name, kind in kinds.items()}


def ratio(timing: dict[str, Any], baseline: str) -> float:
    """How many times as long as fastsds the baseline took, by the medians."""
    contenders = timing["contenders"]
    return contenders[baseline]["median_s"] / contenders[OURS]["median_s"]


def bars(records: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str, bool]]:
    """Every bar that was measured: what, the figure beside what is needed, and whether it is met."""
    for timing in records["timings"]:
        for baseline, needed in timing["bars"].items():
            measured = ratio(timing, baseline)
            yield (
                f"{timing['suite']} [{timing['case']}] against {baseline}",
                f"{measured:.2f}x of {needed:g}x",
                measured >= needed,
            )
    for bandwidth in records["bandwidths"]:
        if "met" in bandwidth:
            yield (
                f"{bandwidth['suite']} [{bandwidth['case']}], share of copy bandwidth",
                f"{bandwidth['share']:.0%} of {bandwidth['needed_share']:.0%}",
                bandwidth["met"],
            )
    for variance in records["variances"]:
        for strategy, figures in variance["strategies"].items():
            if "met" in figures:
                yield (
                    f"variance, batch {variance['batch']}, draws {variance['draws']}, {strategy} over uniform",
                    f"{figures['ratio']:.2f} of at most {figures['needed']:g}",
                    figures["met"],
                )


def tables(records: dict[str, list[dict[str, Any]]]) -> str:
    """All figures as Markdown, ending with the bars."""
    parts = []
    if records["timings"]:
        rows = [
            [
                timing["suite"], timing["case"], timing["dtype"].removeprefix("torch."),
                _seconds(timing["contenders"][OURS]["median_s"]),
                *(
                    f"{_seconds(timing['contenders'][name]['median_s'])} ({ratio(timing, name):.2f}x)"
                    if name in timing["contenders"] else "–"
                    for name in ("eager", "torch.compile")
                ),
                *(
                    "; ".join(
                        f"{name} {_seconds(figures['median_s'])} ({ratio(timing, name):.2f}x)"
                        for name, figures in timing["contenders"].items()
                        if name not in (OURS, "eager", "torch.compile")
                    ),
                ),
            ]
            for timing in records["timings"]
        ]  # fmt: skip
        parts.append(markdown_table(["suite", "shape", "dtype", OURS, "eager", "torch.compile", "others"], rows))
    if any("peak_bytes" in timing["contenders"][OURS] for timing in records["timings"]):
        rows = [
            [
                timing["suite"],
                timing["case"],
                *(f"{name} {figures['peak_bytes'] / 2**20:.1f} MiB" for name, figures in timing["contenders"].items()),
            ]
            for timing in records["timings"]
        ]
        width = max(map(len, rows))
        header = ["peak memory", "shape", *[""] * (width - 2)]
        parts.append(markdown_table(header, [row + [""] * (width - len(row)) for row in rows]))
    if records["bandwidths"]:
        rows = [
            [
                each["suite"], each["case"], f"{each['bytes_moved'] / 2**20:.1f} MiB",
                f"{each['bytes_per_second'] / 1e9:.0f} GB/s", f"{each['copy_bytes_per_second'] / 1e9:.0f} GB/s",
                f"{each['share']:.0%}",
            ]
            for each in records["bandwidths"]
        ]  # fmt: skip
        parts.append(markdown_table(["kernel", "shape", "moved", "achieved", "copy", "share"], rows))
    for variance in records["variances"]:
        header = [
            "batch {batch}, draws {draws}, w(t) {weighting}, {repetitions} calls".format(**variance),
            "mean", "variance", "over uniform", "95 % interval",
        ]  # fmt: skip
        rows = [
            [
                strategy, f"{each['mean']:.4f}", f"{each['variance']:.2e}", f"{each['ratio']:.2f}",
                f"{each['low']:.2f} to {each['high']:.2f}",
            ]
            for strategy, each in variance["strategies"].items()
        ]  # fmt: skip
        parts.append(markdown_table(header, rows))
    measured = list(bars(records))
    if measured:
        parts.append(
            markdown_table(
                ["bar", "measured", "met"], [[what, figure, "yes" if met else "no"] for what, figure, met in measured]
            )
        )
    return "\n".join(parts)


def plot(records: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """How many times as long as fastsds each baseline took, and the variance by strategy."""
    from matplotlib.figure import Figure

    timings, variances = records["timings"], records["variances"]
    figure = Figure(figsize=(12, 1.5 + 0.32 * max(len(timings), 8)), layout="constrained")
    speed, spread = figure.subplots(1, 2, width_ratios=(3, 1))
    names = list(dict.fromkeys(name for timing in timings for name in timing["contenders"] if name != OURS))
    height = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        shown = [(row, ratio(timing, name)) for row, timing in enumerate(timings) if name in timing["contenders"]]
        speed.barh([row + index * height for row, _ in shown], [value for _, value in shown], height, label=name)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(timings))],
        [f"{timing['suite']} [{timing['case']}]" for timing in timings],
        fontsize=7,
    )
    speed.invert_yaxis()
    speed.set_xlabel(f"time over {OURS}'s")
    if names:
        speed.legend(fontsize=8)
    for index, variance in enumerate(variances):
        strategies = variance["strategies"]
        ratios = [each["ratio"] for each in strategies.values()]
        ends = [[max(each["ratio"] - each["low"], 0) for each in strategies.values()]]
        ends.append([max(each["high"] - each["ratio"], 0) for each in strategies.values()])
        spread.bar(
            [place + 0.4 * index for place in range(len(ratios))], ratios, 0.4, yerr=ends,
            label=f"batch {variance['batch']}, draws {variance['draws']}",
        )  # fmt: skip
        spread.set_xticks([place + 0.2 for place in range(len(ratios))], list(strategies), rotation=30, fontsize=8)
    spread.set_ylabel("variance of the loss over uniform's")
    if variances:
        spread.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def write(records: dict[str, list[dict[str, Any]]], where: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """`<device>.json` and `<device>.png` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    device = f"{where['device']} {where['threads']} threads" if where["cuda"] is None else where["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    document, picture = out / f"{slug}.json", out / f"{slug}.png"
    document.write_text(json.dumps({"machine": where, **records}, indent=1) + "\n", encoding="utf-8")
    plot(records, machine_line(where).splitlines()[0]).savefig(picture, dpi=110)
    return document, picture


def write_figures(figures: dict[str, Any], path: Path | None) -> None:
    """Prints figures as JSON, and writes them to a file where one is named."""
    text = json.dumps(figures, indent=1)
    print(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")


def machine_line(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    cuda = "" if where["cuda"] is None else f", CUDA {where['cuda']}"
    served = ", ".join(f"{op}: {backend}" for op, backend in where["backends"].items())
    return f"{where['device']}, {where['threads']} threads{cuda}, {versions}\n{served}"


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e-6:.1f} µs"


def _rounded(value: Any) -> Any:
    """Four significant digits, which is more than any timing repeats."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value
