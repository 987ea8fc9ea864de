"""`python -m benchmarks.text_tower`: training steps of the text side of prompt tuning, ViT-B/16, random weights.

A step is forward and backward to context and attribute. The baselines run all 77 tokens of every prompt through the
same tower's own modules: CoCoOp's loop image by image, CoOp's static prompts in one pass per batch of 32 images.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from benchmarks import report
from fastsds import PrefixTextEncoder
from fastsds.training.report import markdown_table

WIDTH, CONTEXT, COOP_BATCH = 512, 4, 32
CALTECH_101 = (
    "accordion", "airplane", "anchor", "ant", "barrel", "bass", "beaver", "binocular", "bonsai", "brain",
    "brontosaurus", "buddha", "butterfly", "camera", "cannon", "car side", "ceiling fan", "cellphone", "chair",
    "chandelier", "cougar body", "cougar face", "crab", "crayfish", "crocodile", "crocodile head", "cup", "dalmatian",
    "dollar bill", "dolphin", "dragonfly", "electric guitar", "elephant", "emu", "euphonium", "ewer", "face", "ferry",
    "flamingo", "flamingo head", "garfield", "gerenuk", "gramophone", "grand piano", "hawksbill", "headphone",
    "hedgehog", "helicopter", "ibis", "inline skate", "joshua tree", "kangaroo", "ketch", "lamp", "laptop", "leopard",
    "llama", "lobster", "lotus", "mandolin", "mayfly", "menorah", "metronome", "minaret", "motorbike", "nautilus",
    "octopus", "okapi", "pagoda", "panda", "pigeon", "pizza", "platypus", "pyramid", "revolver", "rhino", "rooster",
    "saxophone", "schooner", "scissors", "scorpion", "sea horse", "snoopy", "soccer ball", "stapler", "starfish",
    "stegosaurus", "stop sign", "strawberry", "sunflower", "tick", "trilobite", "umbrella", "watch", "water lilly",
    "wheelchair", "wild cat", "windsor chair", "wrench", "yin yang",
)  # fmt: skip
KINDS = ("", "african", "american", "black", "common", "european", "giant", "red", "small", "white")
GROWTH = ((1, 10), (4, 25), (10, 100), (10, 1000))
"""Images and classes: three decades of prompts."""
BARS = {
    "instance-conditioned, against CoCoOp's loop": ("at least", 20.0),
    "instance-conditioned, time per image over CoOp's": ("at most", 1.5),
    "static, against CoOp's 77 tokens": ("at least", 12.0),
    "peak memory, dense batched form over ours": ("at least", 8.0),
    "1,000 classes, batch 8, peak GB": ("at most", 12.0),
}


def class_names(count: int) -> list[str]:
    """Caltech-101's, and from the hundred-and-first on with a kind before them."""
    return [f"{kind} {name}".strip() for kind in KINDS for name in CALTECH_101][:count]


def make_tower() -> Any:
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"]["layers"] = 1  # not run
    return open_clip.CLIP(**config).eval().requires_grad_(False)


def make_encoder(clip: Any, classes: int, **options: Any) -> PrefixTextEncoder:
    return PrefixTextEncoder(clip, class_names(classes), tokenizer=open_clip.SimpleTokenizer(), **options)


def learned(images: int, *, described: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(images)
    context = torch.randn(images, CONTEXT, WIDTH, generator=generator).mul_(0.02).requires_grad_()
    return [context, torch.randn(images, WIDTH, generator=generator).mul_(0.02).requires_grad_() if described else None]


def step(encoder: PrefixTextEncoder, leaves: list[Tensor | None]) -> list[Tensor]:
    """Text embeddings and the gradients of their sum of squares."""
    features = encoder(*leaves)
    asked = [leaf for leaf in leaves if leaf is not None]
    return [features.detach(), *torch.autograd.grad(features.square().sum(), asked)]


def loop(encoder: PrefixTextEncoder, leaves: list[Tensor | None]) -> list[Tensor]:
    """`step`, image by image."""
    each = [step(encoder, [leaf[i : i + 1] for leaf in leaves]) for i in range(len(leaves[0]))]  # type: ignore[index]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def check(results: list[Tensor], expected: list[Tensor]) -> None:
    """The gate before any timing: values and gradients, relative to the largest."""
    for result, reference in zip(results, expected, strict=True):
        error = ((result - reference).abs().max() / reference.abs().max()).item()
        assert error <= 1e-5, f"expected equal results, got a relative error of {error:.1e}"


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least seconds of each contender, all of them run in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - start)
    return {name: min(durations) for name, durations in times.items()}


def speed(clip: Any, classes: int, images: int, rounds: int) -> dict[str, Any]:
    packed, dense = make_encoder(clip, classes), make_encoder(clip, classes, dense=True)
    per_image, static = learned(images), learned(1, described=False)
    check(step(packed, per_image), loop(dense, per_image))
    check(step(packed, static), step(dense, static))
    seconds = interleaved(
        {
            "instance-conditioned": partial(step, packed, per_image),
            "CoCoOp's loop": partial(loop, dense, per_image),
            "static": partial(step, packed, static),
            "CoOp": partial(step, dense, static),
        },
        rounds,
    )
    return {"classes": classes, "images": images, "seconds": seconds}


def growth(clip: Any, rounds: int, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Seconds of a step by prompts, and the slope of their logarithms from the second decade on."""
    steps = {}
    for images, classes in sizes:
        encoder, leaves = make_encoder(clip, classes), learned(images)
        steps[images * classes] = interleaved({"step": partial(step, encoder, leaves)}, rounds)["step"]
    prompts, seconds = (torch.tensor(list(each), dtype=torch.float64).log() for each in (steps, steps.values()))
    counted = slice(1 if len(steps) > 2 else 0, None)
    x, y = (values[counted] - values[counted].mean() for values in (prompts, seconds))
    return {"seconds": steps, "slope": (x @ y / (x @ x)).item()}


def peak_bytes(classes: int, images: int, dense: bool, threads: int) -> int:
    """Of one step in a process of its own, above what it held before, on Linux."""
    command = [sys.executable, "-m", "benchmarks.text_tower", "--peak", f"{classes},{images},{int(dense)}"]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _print_peak(classes: int, images: int, dense: bool) -> None:
    encoder, leaves = make_encoder(make_tower(), classes, dense=dense), learned(images)
    step(make_encoder(encoder._tower.model, 1), learned(1))  # libraries and their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident_bytes("VmRSS")
    step(encoder, leaves)
    print(_resident_bytes("VmHWM") - before)


def _resident_bytes(what: str) -> int:
    """Of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clip = make_tower()
    tokens = make_encoder(clip, options.classes)._names
    measured = {
        "tokens_per_name": sum(map(len, tokens)) / len(tokens),
        "speed": speed(clip, options.classes, options.images, options.rounds),
        "growth": growth(clip, max(1, options.rounds - 1), GROWTH[:2] if options.quick else GROWTH),
        "peak_bytes": {
            "ours": peak_bytes(options.classes, options.images, False, options.threads),
            "dense": peak_bytes(options.classes, options.images, True, options.threads),
        },
    }
    seconds, peak = measured["speed"]["seconds"], measured["peak_bytes"]
    per_image = seconds["instance-conditioned"] / options.images
    measured["figures"] = {
        "instance-conditioned, against CoCoOp's loop": seconds["CoCoOp's loop"] / seconds["instance-conditioned"],
        "instance-conditioned, time per image over CoOp's": per_image / (seconds["CoOp"] / COOP_BATCH),
        "static, against CoOp's 77 tokens": seconds["CoOp"] / seconds["static"],
        "peak memory, dense batched form over ours": peak["dense"] / peak["ours"],
    }
    if not options.quick:
        peak["1,000 classes, batch 8"] = peak_bytes(1000, 8, False, options.threads)
        measured["figures"]["1,000 classes, batch 8, peak GB"] = peak["1,000 classes, batch 8"] / 1e9
    return measured


def tables(measured: dict[str, Any]) -> str:
    rows = []
    for what, figure in measured["figures"].items():
        side, needed = BARS[what]
        met = figure >= needed if side == "at least" else figure <= needed
        rows.append([what, f"{figure:.2f}", f"{side} {needed:g}", "yes" if met else "no"])
    steps = [[name, f"{seconds:.3f} s"] for name, seconds in measured["speed"]["seconds"].items()]
    steps += [[f"{prompts} prompts", f"{seconds:.3f} s"] for prompts, seconds in measured["growth"]["seconds"].items()]
    return "\n".join(
        [
            markdown_table(["measure", "measured", "bar", "met"], rows),
            markdown_table(["step", "time"], steps),
            f"slope of time over prompts, in logarithms: {measured['growth']['slope']:.3f}",
            f"tokens per class name: {measured['tokens_per_name']:.2f}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_tower", description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file and the plot")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        classes, images, dense = map(int, options.peak.split(","))
        _print_peak(classes, images, bool(dense))
        return 0
    measured = measure(options)
    where = report.machine("cpu", options.threads)
    print(f"{report.machine_line(where)}\n\n{tables(measured)}")
    options.out.mkdir(parents=True, exist_ok=True)
    document, picture = options.out / "text-tower.json", options.out / "text-tower.png"
    document.write_text(json.dumps({"machine": where, **measured}, indent=1) + "\n", encoding="utf-8")
    plot(measured, report.machine_line(where)).savefig(picture, dpi=110)
    print(f"written: {document}, {picture}")
    return 0


def plot(measured: dict[str, Any], title: str) -> Any:
    """Seconds of a step over prompts, both in logarithms, beside a line of slope one."""
    from matplotlib.figure import Figure

    prompts, seconds = zip(*measured["growth"]["seconds"].items(), strict=True)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(prompts, seconds, marker="o", label=f"slope {measured['growth']['slope']:.2f}")
    axes.loglog(prompts, [seconds[-1] * each / prompts[-1] for each in prompts], "--", label="linear")
    axes.set_xlabel("images × classes")
    axes.set_ylabel("seconds of a step")
    axes.legend()
    figure.suptitle(title, fontsize=6)
    return figure


if __name__ == "__main__":
    sys.exit(main())
