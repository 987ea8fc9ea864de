"""`fastsds evaluate base-to-novel`: a run of `fastsds intcoop` on the classes it was trained on and on the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import fastsds
from fastsds.commands.configs import say
from fastsds.commands.evaluate import pick_device
from fastsds.commands.fewshot import FewShotSource, Loading, base_to_novel, harmonic_mean
from fastsds.commands.intcoop import load_run, read_run
from fastsds.commands.results import check_places, save_results


@dataclass(frozen=True)
class BaseToNovelEvaluation:
    """Base-to-novel generalisation (Zhou et al., CVPR 2022) of a prompt-tuning run; a tie is wrong.

    examples:
      fastsds evaluate base-to-novel --run runs/intcoop --out results/intcoop
      fastsds evaluate base-to-novel --run runs/intcoop --compare results/coop
    """

    run: Path
    """Folder of a run of fastsds intcoop --base-to-novel."""
    images: Path | None = None
    """Where the images are now; the run's own data by default."""
    split: Path | None = None
    """Where the split file is now, with `images`."""
    out: Path | None = None
    """Folder that receives results.md, results.json, results.csv, outcomes.json and config.yaml; else only printed."""
    compare: Path | None = None
    """Results of another run on the same data: the differences are tested sample by sample, this run minus that."""
    loading: Loading = field(default_factory=Loading)
    device: str = "auto"
    """cuda where there is one, else cpu."""


def run_base_to_novel(config: BaseToNovelEvaluation) -> None:
    check_places(config.out, config.compare)
    run = read_run(config.run)
    source = run.data if config.images is None else FewShotSource(config.images, config.split)
    split = source.load()
    model, clip = load_run(config.run, pick_device(config.device))
    outcomes = base_to_novel(model, split, clip, config.loading)
    description = {"model": f"{run.method} {config.run}", "data": source.images, "fastsds": fastsds.__version__}
    description["harmonic mean"] = f"{harmonic_mean(outcomes):.1%}"
    save_results(
        config.out, outcomes, before=config.compare, description=description,
        config=config, command="evaluate base-to-novel",
    )  # fmt: skip
    say(f"harmonic mean of base and novel: {harmonic_mean(outcomes):.1%}")
