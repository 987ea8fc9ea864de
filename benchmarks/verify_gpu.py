"""`python3 benchmarks/verify_gpu.py`: everything that only a CUDA machine can show, in one go of under ten minutes.

Wants torch, nvcc and Triton, and takes what else is missing from a folder of wheels, without a network: builds the
extension for this GPU, runs the ops' tests on it with compute-sanitizer over them at the same time, then, one after
the other, what is timed: the benchmarks' bars, a step and a large batch with a U-Net of Stable Diffusion 2.1's size,
the text tower at ImageNet's number of classes; then the rest of the test suite and the whole table of benchmarks, for
which the time may be lacking. Each step is a process with a limit of its own. One JSON file is written again after
every step, so that what was done is kept; the exit status is 0 only if every step ended well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGET_SECONDS = 570.0
TAIL_CHARACTERS = 4000
OP_TESTS = tuple(
    f"tests/ops/test_{op}.py"
    for op in ("add_noise", "sds_loss", "sample_timesteps", "prefix_attention", "embed_prompts")
)
GPU_TESTS = ("tests/ops", "tests/diffusion/test_schedule.py", "tests/training/test_gpu.py")
SANITIZED = (
    "(triton-cuda or cuda-cuda) and (views or sizes or any_latent_shape or empty or replays or gradient)"
    " and not graph and not float64"  # no capture without the caching allocator; gradcheck only repeats its launches
)


@dataclass(frozen=True)
class Step:
    """A command, in the repository's root, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    figures: Path | None = None
    """Where the command leaves its figures as JSON."""
    needs: str | None = None
    """A program without which the step is left out, with a word about it."""
    optional: bool = False
    """Takes what time is left: that there was not enough is no failure."""


def run_steps(
    groups: Sequence[Sequence[Step]],
    save: Callable[[list[dict[str, Any]]], None],
    budget_seconds: float = BUDGET_SECONDS,
) -> list[dict[str, Any]]:
    """Runs the groups one after the other, whatever became of those before, the steps of a group side by side.

    All records are saved after every step. A record holds `status`: `passed`, `failed`, `timed out`,
    `not run: <why>`; the last of these where a program is missing or no time is left.
    """
    deadline = time.monotonic() + budget_seconds
    records: list[dict[str, Any]] = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for done in as_completed([pool.submit(_run_in_time, step, deadline, budget_seconds) for step in group]):
                records.append(done.result())
                save(records)
    return records


def _run_in_time(step: Step, deadline: float, budget_seconds: float) -> dict[str, Any]:
    left = deadline - time.monotonic()
    if step.needs is not None and shutil.which(step.needs) is None:
        record: dict[str, Any] = {"name": step.name, "status": f"not run: no {step.needs} was found"}
    elif left <= 0:
        record = {"name": step.name, "status": f"not run: the {budget_seconds:.0f} s were spent"}
    else:
        print(f"== {step.name}", flush=True)
        record = _run(step, min(step.limit_seconds, left))
    if step.optional:
        record["optional"] = True
    print(f"{record.get('output', '')}\n== {step.name}: {record['status']}", flush=True)
    return record


def ended_well(record: Mapping[str, Any]) -> bool:
    """Passed, or had not the time that it was allowed to lack."""
    return record["status"] == "passed" or (record.get("optional", False) and record["status"] != "failed")


def _run(step: Step, limit_seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    record: dict[str, Any] = {"name": step.name, "command": shlex.join(step.command).replace(sys.executable, "python")}
    if step.figures is not None:
        step.figures.unlink(missing_ok=True)  # those of an earlier run
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            # A session of its own, so that a step's own processes end with it.
            process = subprocess.Popen(
                list(step.command), cwd=ROOT, env={**os.environ, **step.environment}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                record["exit_status"] = process.wait(limit_seconds)
                record["status"] = "passed" if record["exit_status"] == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                record["status"] = "timed out"
        except OSError as error:
            record["status"] = "failed"
            output.write(str(error))
        output.seek(0)
        record["output"] = output.read()[-TAIL_CHARACTERS:].replace(str(ROOT), ".")
    record["seconds"] = round(time.monotonic() - start, 1)
    if step.figures is not None and step.figures.exists():
        try:
            record["figures"] = json.loads(step.figures.read_text(encoding="utf-8"))
        except ValueError as error:  # cut off while it wrote them
            record["figures"] = f"not readable: {error}"
    return record


def missing_wheels(folder: Path) -> list[Path]:
    """The wheels in a folder whose distributions are not installed."""

    def installed(wheel: Path) -> bool:
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    return [wheel for wheel in sorted(folder.glob("*.whl")) if not installed(wheel)]


def plan(out: Path, scratch: Path, wheels: Sequence[Path], device: str, architecture: str) -> list[list[Step]]:
    """What is run: correctness side by side, and what is timed alone, the most telling first."""
    python = sys.executable
    packages = scratch / "packages"
    path = os.pathsep.join(filter(None, [str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": path, "PIP_BREAK_SYSTEM_PACKAGES": "1", "HF_HUB_OFFLINE": "1"}
    build = {
        **environment, "FASTSDS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count() or 1),
    }  # fmt: skip
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    workers = ["-n", str(min(6, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    rest = [*pytest, *workers, "tests", *(f"--ignore={path}" for path in GPU_TESTS), "-m", "not slow"]

    def sanitize(tool: str) -> Step:
        # The imports take longer than it would wait; libraries try calls that the driver refuses, and go on.
        command = [
            "compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--launch-timeout", "150",
            "--report-api-errors", "no", "--error-exitcode", "9",
        ]  # fmt: skip
        # Each tensor an allocation of its own, so that a step outside one is seen.
        uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        tests = [*pytest, *OP_TESTS, "-k", SANITIZED]
        return Step(f"compute-sanitizer {tool}", [*command, *tests], 200, uncached, needs="compute-sanitizer")

    def figures(name: str, limit_seconds: float, module: str, *arguments: str) -> Step:
        document = scratch / f"{module}-{'-'.join(arguments)}.json"
        command = [python, "-m", f"benchmarks.{module}", *arguments, "--figures", str(document)]
        return Step(name, command, limit_seconds, environment, document)

    def benchmarks(extent: str, limit_seconds: float, **options: bool) -> Step:
        folder = out if extent == "full" else out / extent
        # The variance is measured on a CPU, where it takes a minute and comes out the same.
        command = [python, "-m", "benchmarks", "--device", "cuda", "--extent", extent, "--only", "not variance"]
        command += ["--out", str(folder)]
        return Step(f"benchmarks, {extent}", command, limit_seconds, environment, folder / f"{device}.json", **options)

    bars = benchmarks("bars", 200)
    prepare = [
        Step("build", [*pip, "--no-build-isolation", "--editable", "."], 150, build),
        *([Step("wheels", [*pip, "--target", str(packages), *map(str, wheels)], 60, environment)] if wheels else []),
    ]
    check = [
        Step("info", [python, "-m", "fastsds.cli", "info"], 60, environment),
        Step("tests", [*pytest, *workers, *GPU_TESTS, "-m", "not slow"], 300, environment),
        sanitize("memcheck"),
        sanitize("racecheck"),
        # What torch.compile makes of the baselines takes longer than to time it, and is kept for the run that counts.
        Step("benchmarks, compiled beforehand", [*bars.command[:-1], str(scratch)], 200, environment),
    ]
    measure = [
        bars,
        figures("SD 2.1-size U-Net: step", 90, "unet", "step"),
        figures("SD 2.1-size U-Net: memory", 60, "unet", "memory"),
        figures("text tower, 1,000 classes", 120, "text_tower_gpu"),
        Step("tests, the rest", rest, 240, {**environment, "OMP_NUM_THREADS": "2"}, optional=True),
        benchmarks("full", 200, optional=True),
    ]
    return [prepare, check, *([step] for step in measure)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is not installed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plots")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError as error:
        print(f"verify_gpu: PyTorch is needed and cannot be imported: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            f"verify_gpu: expected a CUDA device, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees none; "
            f"`make bench` measures on a CPU",
            file=sys.stderr,
        )
        return 2
    if options.wheels is not None and not options.wheels.is_dir():
        print(f"verify_gpu: --wheels: expected a folder, got {options.wheels}", file=sys.stderr)
        return 2
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None:  # its programs are often not on the path
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(CUDA_HOME, "bin"))])
    name = torch.cuda.get_device_name()
    machine = {
        "device": name, "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip
    out = options.out.resolve()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")  # as `python -m benchmarks` names its files
    document = out / f"verify-{slug}.json"
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())

    def save(records: list[dict[str, Any]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        document.write_text(json.dumps({"machine": machine, "steps": records}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        wheels = missing_wheels(options.wheels.resolve()) if options.wheels is not None else []
        records = run_steps(plan(out, Path(scratch), wheels, slug, architecture), save, options.budget)
    for record in records:
        print(f"{record.get('seconds', 0):>6.1f} s  {record['name']}: {record['status']}")
    print(f"written: {document}")
    return 0 if all(map(ended_well, records)) else 1


if __name__ == "__main__":
    sys.exit(main())
