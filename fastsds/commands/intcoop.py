"""`fastsds intcoop`: prompt tuning from the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from fastsds.clip.errors import ClipSourceError, one_line_errors
from fastsds.clip.prompts import ClassPosition
from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.commands.configs import FILE_NAME, is_main_process, parse, say
from fastsds.commands.fewshot import FewShotSource, Loading, accuracy, base_to_novel, harmonic_mean
from fastsds.commands.results import save_results
from fastsds.commands.runs import fit, recorded, run_folder
from fastsds.data.fewshot import FewShotDataset, FewShotSplit
from fastsds.evaluation.base_to_novel import classification_accuracy
from fastsds.intcoop.attributes import AttributeSpace
from fastsds.intcoop.baselines import CoCoOp, CoOp, ZeroShot
from fastsds.intcoop.checkpoints import IDENTITY_KEY, load_prompts, save_prompts
from fastsds.intcoop.model import IntCoOp
from fastsds.intcoop.prompts import PromptedCLIP
from fastsds.training.intcoop import IntCoOpConfig, IntCoOpTrainer
from fastsds.training.processes import start_accelerator

RESULTS, PROMPTS = "results", "prompts.safetensors"


@dataclass(frozen=True)
class PromptOptions:
    """The prompts. *stated*: in the paper; *reading*: ours, where its text could not be consulted."""

    context_length: int = 4
    """Context vectors, M (*reading*: 4)."""
    context_init: str | None = "a photo of a"
    """Words that the context vectors start as (*reading*); None for a random start."""
    handwritten: str = "a photo of a {attribute} {classname}."
    """intcoop: the prompts of the regulariser (*reading*)."""
    extractor_tokens: int = 4
    """intcoop: prompt tokens per layer of the attribute extractor (*reading*)."""
    extractor_layers: tuple[int, ...] | None = None
    """intcoop: its layers; the upper half by default (*reading*)."""
    heads: int = 8
    """intcoop: of the context's cross-attention to the image (*reading*)."""
    attribute_space: AttributeSpace = "token"
    """intcoop: the embeddings of attributes that are predicted (*reading*)."""
    attribute_weight: float = 4.0
    """intcoop: lambda1 (not known; chosen on the toy world)."""
    regulariser_weight: float = 4.0
    """intcoop: lambda2 (not known; chosen on the toy world)."""
    class_specific: bool = False
    """coop: context vectors of each class's own."""
    class_position: ClassPosition = "end"
    """coop: of the class name in the prompt."""
    reduction: int = 16
    """cocoop: the hidden width of its network is the image embedding's divided by this."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """zeroshot: the hand-written prompts; several are an ensemble."""


@dataclass(frozen=True)
class IntCoOpRun:
    """Prompt-tune CLIP on few shots with IntCoOp (Ghosal et al., EMNLP 2024) or a baseline, and measure it.

    examples:
      fastsds intcoop --clip.name ViT-B-16 --clip.pretrained openai --base-to-novel --data.images oxford_pets/images \\
        --data.split split_zhou_OxfordPets.json --data.attributes attributes.jsonl
      fastsds intcoop --clip.name toyworld --data.images toyworld-data/fewshot \\
        --data.attributes toyworld-data/fewshot/attributes.jsonl --base-to-novel
      fastsds intcoop --config runs/intcoop/config.yaml --method coop --train.out runs/coop
    """

    clip: ClipSource
    data: FewShotSource
    method: Literal["intcoop", "coop", "cocoop", "zeroshot"] = "intcoop"
    base_to_novel: bool = False
    """Train on the first half of the classes and measure on both halves, and by their harmonic mean (*stated*)."""
    prompts: PromptOptions = field(default_factory=PromptOptions)
    train: IntCoOpConfig = field(default_factory=IntCoOpConfig)
    batch_size: int = 32
    """Images per step (not known)."""
    loading: Loading = field(default_factory=Loading)
    resume: bool = False
    """Go on from the last checkpoint in `train.out`; where there is none the run starts."""


def run_intcoop(config: IntCoOpRun) -> None:
    """Trains, measures on the test images, and leaves run, config and results in `train.out`."""
    out = config.train.out
    accelerator = start_accelerator(config.train.mixed_precision, config.train.accumulation)
    with run_folder(accelerator, out, resume=config.resume):
        split = config.data.load()
        few = (
            split
            if config.train.shots is None or config.method == "zeroshot"
            else split.few_shot(config.train.shots, config.train.seed)
        )
        if config.base_to_novel:
            few = few.base()
        if config.method == "intcoop":
            few = config.data.with_attributes(few)
        clip = config.clip.load(accelerator.device)
        model = make_model(config, clip, few.classnames)
        with recorded(out, config, "intcoop"):
            _train_and_measure(config, model, split, few, clip)


def _train_and_measure(
    config: IntCoOpRun, model: PromptedCLIP, split: FewShotSplit, few: FewShotSplit, clip: LoadedCLIP
) -> None:
    out = config.train.out
    if config.method != "zeroshot":
        _train(config, model, few, clip)
    if not is_main_process():
        return
    if config.method != "zeroshot":
        (out / PROMPTS).unlink(missing_ok=True)
        save_prompts(out / PROMPTS, model)
    description: dict[str, Any] = {"model": f"{config.method} {out}", "data": config.data.images}
    if config.base_to_novel:
        outcomes = base_to_novel(model, split, clip, config.loading)
        description["harmonic mean"] = f"{harmonic_mean(outcomes):.1%}"
    else:
        outcomes = accuracy(model, split, clip, config.loading)
    save_results(out / RESULTS, outcomes, description=description)
    if config.base_to_novel:
        say(f"harmonic mean of base and novel: {description['harmonic mean']}")
    again = f"; measure it again: fastsds evaluate base-to-novel --run {out}" if config.base_to_novel else ""
    say(f"the run is in {out}{again}")


def make_model(config: IntCoOpRun, clip: LoadedCLIP, classnames: tuple[str, ...]) -> PromptedCLIP:
    """The untrained model of a config."""
    options = config.prompts

    def chosen(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    given: dict[str, Any] = {"tokenizer": clip.tokenizer}
    context = chosen("context_length", "context_init")
    if config.method == "zeroshot":
        return ZeroShot(clip.model, classnames, templates=options.templates, **given)
    if config.method == "coop":
        return CoOp(clip.model, classnames, **chosen("class_specific", "class_position"), **context, **given)
    if config.method == "cocoop":
        return CoCoOp(clip.model, classnames, reduction=options.reduction, **context, **given)
    own = chosen(
        "handwritten", "extractor_tokens", "extractor_layers", "heads",
        "attribute_space", "attribute_weight", "regulariser_weight",
    )  # fmt: skip
    return IntCoOp(clip.model, classnames, **own, **context, **given)


def read_run(run: Path) -> IntCoOpRun:
    """The config of a run.

    Raises:
        ConfigError: the folder holds none, or another command's.
    """
    return parse(IntCoOpRun, ["--config", str(run / FILE_NAME)], command="intcoop")


def load_run(run: Path, device: str = "cpu") -> tuple[PromptedCLIP, LoadedCLIP]:
    """The model of a finished run, and the CLIP model below it.

    Raises:
        ConfigError: the folder holds no config of `fastsds intcoop`.
        ClipSourceError: the CLIP model or the learned prompts cannot be read.
        ModelMismatchError: the prompts are of another model.
    """
    config = read_run(run)
    clip = config.clip.load(device)
    if config.method == "zeroshot":
        split = config.data.load()
        return make_model(config, clip, (split.base() if config.base_to_novel else split).classnames).eval(), clip
    model = make_model(config, clip, _classnames(run / PROMPTS))
    load_prompts(run / PROMPTS, model)
    return model.eval(), clip


def _classnames(file: Path) -> tuple[str, ...]:
    """Of the classes that a run was trained on."""
    if not file.is_file():
        raise ClipSourceError(f"run: {file.parent} has no {file.name}; finish it: fastsds intcoop --config … --resume")
    with one_line_errors(f"run: {file}"), safe_open(file, framework="pt") as stored:
        return tuple(json.loads((stored.metadata() or {})[IDENTITY_KEY])["classnames"])


def _train(config: IntCoOpRun, model: PromptedCLIP, few: FewShotSplit, clip: LoadedCLIP) -> None:
    loader = DataLoader(
        FewShotDataset(few.train, clip.preprocess), config.batch_size, num_workers=config.loading.workers
    )
    evaluate = None
    if few.val:
        validation = DataLoader(FewShotDataset(few.val, clip.preprocess), config.loading.batch_size)

        def evaluate(_: nn.Module) -> Mapping[str, float]:
            return {"validation": classification_accuracy(model, validation)}

    # The shots are drawn already, before the base classes were taken, as CoOp does.
    fit(IntCoOpTrainer(model, loader, dataclasses.replace(config.train, shots=None), evaluate), "intcoop")
