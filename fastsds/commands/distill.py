"""`fastsds distill`: SDS-CLIP from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.commands.configs import default_workers, is_main_process, say
from fastsds.commands.latents import fit_projector, with_latents
from fastsds.commands.runs import BAD_IMAGES, fit, recorded, run_folder
from fastsds.data.captions import CaptionDataset
from fastsds.data.loader import caption_loader
from fastsds.data.source import CaptionSource
from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.source import TeacherSource
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.evaluation.judge import ClipJudge, two_by_two_outcomes
from fastsds.evaluation.winoground import read_winoground
from fastsds.ops.sample_timesteps import Strategy
from fastsds.ops.sds_loss import Jacobian
from fastsds.sdsclip.distiller import SDSDistiller, SDSOn
from fastsds.training.checkpoint import latest_checkpoint
from fastsds.training.distill import DistillConfig, DistillTrainer
from fastsds.training.processes import start_accelerator

TEACHER = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class SDSOptions:
    """The distillation loss. *stated*: in the paper; *secondary*: a third party's summary; *reading*: ours."""

    sds_weight: float = 1e-3
    """lambda (*secondary*: 1e-3). 0 is the contrastive-only control, for which no teacher is loaded."""
    tune: str = "layernorm"
    """Of CLIP: layernorm (*stated*), projector (nothing of CLIP), all, or a regular expression over its parameters."""
    teacher_batch: int | None = None
    """Latents per U-Net call. The gradient does not depend on it, the memory does; the whole batch by default."""
    draws: int = 1
    """Noise draws per image and step (*reading*: 1)."""
    strategy: Strategy = "uniform"
    """How timesteps are drawn (*secondary*: uniform); stratified has less variance at no cost."""
    weighting: Weighting = "uniform"
    """w(t) (*stated*: none, which is uniform)."""
    jacobian: Jacobian = "full"
    """full differentiates through the U-Net (*reading*), skip hands its residual to the latents, as DreamFusion."""
    t_range: tuple[int, int] | None = None
    """First timestep and the one after the last; the whole schedule by default (*secondary*)."""
    guidance_scale: float = 1.0
    """Of the teacher; 1 is none (*reading*)."""
    sds_on: SDSOn = "image"
    """The embedding that is judged: the image's (*stated*), the caption's or both (ours)."""
    normalize: bool = True
    """Whether the projector sees the unit-length embedding (*reading*)."""
    projector_images: int = 4096
    """Images that the projector is fitted to by ridge regression before training (*reading*: its start is not known);
    0 leaves a random start."""
    projector_ridge: float = 1e-3
    """Penalty of that regression, relative to the mean variance of the embedding."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.projector_images < 0:
            raise ValueError(f"projector_images: expected at least 0, got {self.projector_images}")
        if not self.projector_ridge > 0:
            raise ValueError(f"projector_ridge: expected a number above 0, got {self.projector_ridge}")


@dataclass(frozen=True)
class RankingOptions:
    """Teacher ranking (ours, off by default): the teacher's scores of a caption and of the caption with its phrases
    exchanged are soft targets of CLIP's similarities. The latents of all images are kept in memory."""

    weight: float = 0.0
    """Of the ranking loss; 0 leaves it out. The toy world's demo takes 4."""
    temperature: float = 0.005
    """Of the teacher's scores."""
    draws: int = 2
    """Noise draws per image and candidate, in every step."""
    t_range: tuple[int, int] | None = None
    """First timestep and the one after the last, of the scores; the whole schedule by default."""


@dataclass(frozen=True)
class DistillRun:
    """Distil a text-to-image diffusion model into CLIP (SDS-CLIP; Basu et al., EMNLP 2024).

    examples:
      fastsds distill --clip.name ViT-B-32 --clip.pretrained openai --captions.path annotations/captions_train2017.json
      fastsds distill --clip.name toyworld --teacher.source toyworld \\
        --captions.path toyworld-data/coco/annotations/captions_train.json --captions.images toyworld-data/coco/train
      fastsds distill --config runs/sds-clip/config.yaml --resume
      fastsds distill --config runs/sds-clip/config.yaml --train.out runs/control --sds.sds-weight 0
      accelerate launch --multi_gpu -m fastsds distill --config runs/sds-clip/config.yaml --train.out runs/all-gpus
    """

    clip: ClipSource
    captions: CaptionSource
    teacher: TeacherSource = field(default_factory=lambda: TeacherSource(TEACHER))
    sds: SDSOptions = field(default_factory=SDSOptions)
    ranking: RankingOptions = field(default_factory=RankingOptions)
    train: DistillConfig = field(default_factory=DistillConfig)
    batch_size: int = 32
    """Pairs per step, over all processes (*secondary*: 32)."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images, by default 4 or one per core; 0 reads them in the training process."""
    winoground: Path | None = None
    """A Winoground folder that is measured every `train.evaluate_every` steps and at the end."""
    resume: bool = False
    """Go on from the last checkpoint in `train.out`; where there is none the run starts."""


def run_distill(config: DistillRun) -> None:
    """Loads, fits the projector, trains, and leaves the run with its config in `train.out`."""
    out = config.train.out
    accelerator = start_accelerator(config.train.mixed_precision, config.train.accumulation)
    with run_folder(accelerator, out, resume=config.resume):
        clip = config.clip.load(accelerator.device)
        wants_teacher = config.sds.sds_weight > 0 or config.ranking.weight > 0
        teacher = config.teacher.load(accelerator.device) if wants_teacher else None
        progress = config.train.progress and is_main_process()
        dataset = config.captions.load(
            clip.preprocess, clip.tokenizer, seed=config.train.seed, bad_images=out / BAD_IMAGES, progress=progress
        )
        distiller = make_distiller(config, clip, teacher)
        with recorded(out, config, "distill"):
            _train(config, clip, teacher, dataset, distiller)
    _report(out, dataset)


def _train(
    config: DistillRun, clip: LoadedCLIP, teacher: DiffusionTeacher | None, dataset: CaptionDataset,
    distiller: SDSDistiller,
) -> None:  # fmt: skip
    """The projector's start and ranking's latents, where they are wanted, and the training."""
    out = config.train.out
    progress = config.train.progress and is_main_process()
    started = latest_checkpoint(out / "checkpoints") is not None
    if distiller.projector is not None and config.sds.projector_images and not started:
        explained = fit_projector(
            distiller, dataset, config.sds.projector_images, config.sds.projector_ridge,
            workers=config.workers, progress=progress,
        )  # fmt: skip
        say(f"the projector's start explains {explained:.1%} of the variance of the latents it was fitted to")
    if teacher is not None and config.ranking.weight:
        dataset = with_latents(teacher, dataset.with_swapped_candidates(), workers=config.workers, progress=progress)
    loader = caption_loader(dataset, config.batch_size, config.workers, seed=config.train.seed)
    evaluate = None if config.winoground is None else Winoground(config.winoground, clip, config.workers)
    fit(DistillTrainer(distiller, loader, config.train, evaluate), "distill")


def make_distiller(config: DistillRun, clip: LoadedCLIP, teacher: DiffusionTeacher | None) -> SDSDistiller:
    """The distiller of a config; `teacher` may be None where no loss asks one."""
    sds, ranking = config.sds, config.ranking
    scorer = None
    if teacher is not None and ranking.weight:
        scorer = DiffusionScorer(teacher, ranking.draws, t_range=ranking.t_range, seed=sds.seed)
    return SDSDistiller(
        clip.model, teacher, sds.sds_weight, sds.tune, sds.teacher_batch,
        sds_on=sds.sds_on, draws=sds.draws, strategy=sds.strategy, weighting=sds.weighting, jacobian=sds.jacobian,
        t_range=sds.t_range, guidance_scale=sds.guidance_scale, normalize=sds.normalize,
        ranking_weight=ranking.weight, ranking_temperature=ranking.temperature, scorer=scorer, seed=sds.seed,
    )  # fmt: skip


class Winoground:
    """Measures a CLIP model that is being trained."""

    def __init__(self, folder: Path, clip: LoadedCLIP, workers: int) -> None:
        self.examples = read_winoground(folder)
        self.judge = ClipJudge(*clip, workers=workers)

    def __call__(self, _: nn.Module) -> Mapping[str, float]:
        outcomes = two_by_two_outcomes(self.judge, self.examples)
        return {f"winoground_{name}": figure.micro for name, figure in outcomes.figures.items()}


def _report(out: Path, dataset: CaptionDataset) -> None:
    skipped = "" if dataset.bad_images is None else dataset.bad_images.summary()
    if skipped:
        say(skipped)
    say(
        f"the distilled CLIP is in {out}; measure it: fastsds evaluate winoground --checkpoint {out} --data …; hand it "
        f"on: fastsds export --run {out} --format open-clip --out …"
    )
