"""`fastsds evaluate`: a CLIP model on the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastsds
from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.commands.benchmarks import AroTask, SugarCrepeSplit, read_classified, read_examples
from fastsds.commands.configs import default_workers
from fastsds.commands.results import check_places, save_results
from fastsds.evaluation.aro import with_published_macro
from fastsds.evaluation.classification import read_templates
from fastsds.evaluation.judge import ClipJudge, caption_choice_outcomes, two_by_two_outcomes
from fastsds.evaluation.outcomes import Outcomes
from fastsds.evaluation.retrieval import read_captioned_images, retrieval_outcomes
from fastsds.evaluation.sugarcrepe import SPLITS
from fastsds.evaluation.winoground import HUB_ID
from fastsds.evaluation.zeroshot import zero_shot_outcomes


@dataclass(frozen=True)
class Evaluation:
    """Which model, and where its results go."""

    clip: ClipSource = field(default_factory=lambda: ClipSource(""))
    checkpoint: Path | None = None
    """A distilled model in place of `clip`: a run's folder or one of its checkpoints, tuned tensors, or an export."""
    out: Path | None = None
    """Folder that receives results.md, results.json, results.csv, outcomes.json and config.yaml; else only printed."""
    compare: Path | None = None
    """Results of another model on the same data: the differences are tested sample by sample, this model minus that."""
    batch_size: int = 256
    """Images, and captions, that are encoded at once."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images, by default 4 or one per core; 0 reads them in this one."""
    device: str = "auto"
    """cuda where there is one, else cpu."""

    def load_clip(self) -> LoadedCLIP:
        """
        Raises:
            ValueError: neither `clip` nor `checkpoint` is named, or the model cannot be loaded.
        """
        device = pick_device(self.device)
        if self.checkpoint is not None:
            return fastsds.load_distilled(self.checkpoint, device, clip=self.clip if self.clip.name else None)
        if not self.clip.name:
            raise ValueError("clip.name: expected a CLIP model, or --checkpoint with a distilled one, got neither")
        return self.clip.load(device)

    def judge(self) -> ClipJudge:
        check_places(self.out, self.compare)
        return ClipJudge(*self.load_clip(), batch_size=self.batch_size, workers=self.workers)

    def describe(self) -> dict[str, Any]:
        """For the head of the results."""
        names = [self.clip.name, self.clip.pretrained, self.checkpoint]
        return {"model": " ".join(str(name) for name in names if name), "fastsds": fastsds.__version__}

    def report(self, outcomes: Outcomes, command: str, **description: Any) -> None:
        about = {**self.describe(), **description}
        save_results(
            self.out, outcomes, before=self.compare, description=about, config=self, command=f"evaluate {command}"
        )


@dataclass(frozen=True, kw_only=True)
class WinogroundEvaluation(Evaluation):
    """Winoground (Thrush et al., CVPR 2022): text, image and group score; a tie is wrong.

    examples:
      fastsds evaluate winoground --clip.name ViT-B-32 --clip.pretrained openai --data winoground --out results/before
      fastsds evaluate winoground --checkpoint runs/sds-clip --data winoground --compare results/before
    """

    data: Path | str = HUB_ID
    """A folder with examples.jsonl and images, as the gated data set unpacks, or a hub id."""


@dataclass(frozen=True, kw_only=True)
class AroEvaluation(Evaluation):
    """ARO (Yuksekgonul et al., ICLR 2023): micro and macro accuracy of one of its four tasks; a tie is wrong.

    examples:
      fastsds evaluate aro --task vg-relation --data visual_genome_relation.json --images images --checkpoint runs/x
      fastsds evaluate aro --task vg-attribution --data visual_genome_attribution.json --images images \\
        --smallest-group 25 --clip.name ViT-B-32 --clip.pretrained openai
    """

    task: AroTask
    data: Path
    """Its JSON file; of the order tasks, stored shuffles (`fastsds.evaluation.shuffles` draws them)."""
    images: Path | None = None
    """Folder that image paths start from; that of `data` by default."""
    smallest_group: int = 1
    """Of what the figure `published` is over, the fewest samples of a relation or pair: ARO's own is 25 for pairs."""
    leave_out: tuple[str, ...] = ()
    """Relations that the figure `published` is not over."""


@dataclass(frozen=True, kw_only=True)
class SugarCrepeEvaluation(Evaluation):
    """SugarCrepe (Hsieh et al., NeurIPS 2023): accuracy on its seven splits; a tie is wrong.

    examples:
      fastsds evaluate sugarcrepe --data sugar-crepe/data --images val2017 --checkpoint runs/sds-clip
    """

    data: Path
    """Folder of <split>.json."""
    images: Path | None = None
    """COCO's val2017; that of `data` by default."""
    splits: tuple[SugarCrepeSplit, ...] = SPLITS  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class ZeroShotEvaluation(Evaluation):
    """Zero-shot classification by prompt templates; a tie is wrong.

    examples:
      fastsds evaluate zeroshot --data imagenet/val --classnames imagenet --templates openai --checkpoint runs/sds-clip
      fastsds evaluate zeroshot --torchvision CIFAR10 --data data --clip.name ViT-B-32 --clip.pretrained openai
    """

    data: Path
    """<class>/<image> below it; or the folder of torchvision's data sets."""
    torchvision: str | None = None
    """A data set by torchvision's name, such as CIFAR10, that lies in `data`; nothing is downloaded."""
    classnames: Path | str | None = None
    """imagenet, or a text or JSON file; the folders' or torchvision's own names by default. Classes of one name, as two
    pairs of imagenet's are, count as one."""
    templates: Path | str = "photo"
    """photo (a photo of a {}.), simple (CLIP's 7), openai (CLIP's 80), or a text or JSON file."""


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(Evaluation):
    """Retrieval on COCO or Flickr30k: R@1, R@5 and R@10 both ways; a tie is wrong.

    examples:
      fastsds evaluate retrieval --data coco_karpathy_test.json --images coco --checkpoint runs/sds-clip
    """

    data: Path
    """coco_karpathy_test.json, Karpathy's dataset_coco.json, or COCO's captions_val2017.json."""
    images: Path | None = None
    """Folder that image paths start from; that of `data` by default."""
    split: str = "test"
    """Of Karpathy's own file."""
    captions: int | None = 5
    """The first so many of every image; None for all."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Of R@k; 1 alone to compare with the diffusion score."""


def run_winoground(config: WinogroundEvaluation) -> None:
    examples: Any = read_examples("winoground", config.data, None)
    config.report(two_by_two_outcomes(config.judge(), examples), "winoground", data=config.data)


def run_aro(config: AroEvaluation) -> None:
    examples: Any = read_examples(config.task, config.data, config.images)
    outcomes = caption_choice_outcomes(config.judge(), examples, config.task)
    if config.smallest_group > 1 or config.leave_out:
        outcomes = with_published_macro(outcomes, smallest=config.smallest_group, leave_out=config.leave_out)
    config.report(outcomes, "aro", data=config.data)


def run_sugarcrepe(config: SugarCrepeEvaluation) -> None:
    examples: Any = read_examples("sugarcrepe", config.data, config.images, config.splits)
    outcomes = caption_choice_outcomes(config.judge(), examples, "sugarcrepe").with_groups_of("accuracy")
    config.report(outcomes, "sugarcrepe", data=config.data)


def run_zeroshot(config: ZeroShotEvaluation) -> None:
    templates = read_templates(config.templates)
    data = read_classified(config.data, config.torchvision, config.classnames)
    outcomes = zero_shot_outcomes(config.judge(), data, templates)
    config.report(outcomes, "zeroshot", data=config.torchvision or config.data, templates=config.templates)


def run_retrieval(config: RetrievalEvaluation) -> None:
    images = config.data.parent if config.images is None else config.images
    data = read_captioned_images(config.data, images, config.split, config.captions)
    config.report(retrieval_outcomes(config.judge(), data, ks=config.ks), "retrieval", data=config.data)


def pick_device(name: str) -> str:
    """
    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected auto, cpu or a device that is here, got {name!r}: {reason}") from None
    return name
