"""The diffusion model itself as the judge of a benchmark, and what its judgements cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from fastsds.diffusion.cache import content_key
from fastsds.diffusion.decisions import Answer, Question
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.evaluation.classification import ClassifiedImages
from fastsds.evaluation.examples import CaptionChoice, Pictures, TwoByTwo, check_examples
from fastsds.evaluation.outcomes import Figure, Outcomes, choice_outcomes, pairing_outcomes
from fastsds.evaluation.retrieval import CaptionedImages, rank_outcomes
from fastsds.evaluation.zeroshot import check_templates

Fit = Literal["whole", "centre"]


@dataclass(frozen=True)
class DecisionCost:
    """U-Net evaluations, one of them being one noised latent under one caption."""

    decisions: int
    ties: int
    """Decisions whose lowest distance came twice, which are wrong."""
    evaluations: int
    full_grid: int
    """What all draws of all pairs would have taken."""

    @property
    def per_decision(self) -> float:
        """Evaluations; a pair that stands in two decisions is counted once."""
        return self.evaluations / self.decisions

    @property
    def saving(self) -> float:
        """How many times fewer evaluations than the full grid."""
        return self.full_grid / self.evaluations

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"per_decision": self.per_decision, "saving": self.saving}

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> DecisionCost:
        choices = [choice for answer in answers for choice in answer.choices]
        return cls(
            len(choices),
            choices.count(None),
            sum(int(answer.evaluations.sum()) for answer in answers),
            sum(answer.full_grid for answer in answers),
        )


class DiffusionOutcomes(NamedTuple):
    """What `diffusion_outcomes` measured."""

    outcomes: Outcomes
    cost: DecisionCost
    answers: list[Answer]
    """For each question, so that `share_kept` can set them against those of the full grid."""


def diffusion_outcomes(
    scorer: DiffusionScorer,
    examples: Sequence[CaptionChoice] | Sequence[TwoByTwo],
    benchmark: str,
    *,
    draws: int = 256,
    first_draws: int = 8,
    confidence: float = 0.99,
    fit: Fit = "whole",
) -> DiffusionOutcomes:
    """Judges every example by the lowest diffusion score: `accuracy`, or Winoground's figures; a tie is wrong.

    Images are opened as the U-Net comes to them, cut to their box, and brought to the teacher's size. Latents come from
    the teacher's cache where it has one.

    Args:
        examples: all of one kind.
        fit: `whole` resizes the whole image, whatever its shape, so that nothing a caption names is cut off, as
            diffusion-itm does (Krojer et al., NeurIPS 2023); `centre` cuts to the shape about the centre first, as
            Diffusion Classifier does (Li et al., ICCV 2023). Which of the two SDS-CLIP took is not known (*reading*).
        draws, first_draws, confidence: see `DiffusionScorer.decide`; a confidence of 1 evaluates the full grid.

    Raises:
        ValueError: no examples, two of one key, or what `decide` refuses.
        DataError: an image that cannot be read.
    """
    check_examples(examples)
    answers = scorer.decide(
        _questions(scorer.teacher, examples, fit), draws=draws, first_draws=first_draws, confidence=confidence
    )
    return DiffusionOutcomes(_outcomes(benchmark, examples, answers), DecisionCost.of(answers), answers)


def diffusion_zero_shot_outcomes(
    scorer: DiffusionScorer,
    data: ClassifiedImages,
    template: str = "a photo of a {}.",
    benchmark: str = "zeroshot",
    *,
    draws: int = 256,
    first_draws: int = 8,
    confidence: float = 0.99,
    fit: Fit = "whole",
) -> DiffusionOutcomes:
    """`accuracy`: the class whose caption has the lowest diffusion score (Diffusion Classifier); macro is over classes.

    A tie is wrong. Classes of one name are one class, as in `zero_shot_outcomes`, with whose outcomes these compare.

    Args:
        template: one, with `{}` for the class name: distances of captions have no mean over prompts, as embeddings do.
        draws, first_draws, confidence, fit: see `diffusion_outcomes`.

    Raises:
        ValueError: a template without `{}`, a label that is no position in the class names, or what `decide` refuses.
        DataError: an image that cannot be read.
    """
    check_templates([template])
    names = list(dict.fromkeys(data.classnames))
    captions = [template.replace("{}", name) for name in names]
    own: list[str] = []

    def questions() -> Iterator[Question]:
        for index in _progress(range(len(data.keys))):
            image, label = data.load(index)
            if not 0 <= label < len(data.classnames):
                raise ValueError(f"images: expected labels below {len(data.classnames)}, got {label}")
            own.append(data.classnames[label])
            yield Question.of_captions(_latents(scorer.teacher, image, fit), captions)

    answers = scorer.decide(questions(), draws=draws, first_draws=first_draws, confidence=confidence)
    chosen = [None if place is None else names[place] for answer in answers for place in answer.choices]
    hits = tuple(float(name == right) for name, right in zip(chosen, own, strict=True))
    outcomes = Outcomes(benchmark, {"accuracy": Figure(hits, data.keys, tuple(own), 1 / len(names))})
    return DiffusionOutcomes(outcomes, DecisionCost.of(answers), answers)


def diffusion_retrieval_outcomes(
    scorer: DiffusionScorer,
    data: CaptionedImages,
    benchmark: str = "retrieval",
    *,
    draws: int = 256,
    first_draws: int = 8,
    confidence: float = 0.99,
    fit: Fit = "whole",
) -> DiffusionOutcomes:
    """`text-to-image R@1` and `image-to-text R@1` by the lowest diffusion score, by the rule of `retrieval_outcomes`.

    R@5 and R@10 need whole rankings, which candidates that are dropped have no place in. Every image is set against
    every caption, twice over, since the two ways share their noise differently.

    An image asks for each of its captions whether it has a lower distance than all wrong ones: a decision each. Equal
    captions are evaluated once; one that another image has too is a wrong one, which it always ties with.

    Args:
        draws, first_draws, confidence, fit: see `diffusion_outcomes`.

    Raises:
        ValueError: fewer than two images, or what `decide` refuses.
        DataError: an image that cannot be read.
    """
    if len(data.images) < 2:
        raise ValueError(f"images: expected at least two to choose from, got {len(data.images)}")
    owners: dict[str, set[int]] = {}
    for row, texts in enumerate(data.captions):
        for text in texts:
            owners.setdefault(text, set()).add(row)
    latents = torch.cat([_latents(scorer.teacher, image, fit) for image in _progress(Pictures(data.images), "images")])
    asking = [row for row, texts in enumerate(data.captions) if any(owners[text] == {row} for text in texts)]

    def question(asker: int | str) -> Question:
        if isinstance(asker, str):
            return Question.of_images(latents, asker)
        wrong = tuple((0, at) for at, of in enumerate(owners.values()) if of != {asker})
        own = [at for at, of in enumerate(owners.values()) if of == {asker}]
        return Question(latents[asker : asker + 1], tuple(owners), tuple(((0, at), *wrong) for at in own))

    questions = map(question, _progress([*asking, *owners], "questions"))
    answers = scorer.decide(questions, draws=draws, first_draws=first_draws, confidence=confidence)
    found = {row for row, answer in zip(asking, answers[: len(asking)], strict=True) if 0 in answer.choices}
    nearest = {text: answer.choices[0] for text, answer in zip(owners, answers[len(asking) :], strict=True)}
    of_captions = [int(nearest[text] != row) for row, texts in enumerate(data.captions) for text in texts]
    of_images = [int(row not in found) for row in range(len(data.images))]
    outcomes = rank_outcomes(benchmark, data, torch.tensor(of_captions), torch.tensor(of_images), [1])
    return DiffusionOutcomes(outcomes, DecisionCost.of(answers), answers)


def _progress(items: Iterable[Any], name: str = "examples") -> Iterable[Any]:
    return tqdm(items, desc=name, disable=None, leave=False)


def _questions(
    teacher: DiffusionTeacher, examples: Sequence[CaptionChoice] | Sequence[TwoByTwo], fit: Fit
) -> Iterator[Question]:
    for example in _progress(examples):
        if isinstance(example, TwoByTwo):
            latents = torch.cat([_latents(teacher, image, fit) for image in example.load()])
            yield Question.two_by_two(latents, example.captions)
        else:
            yield Question.of_captions(_latents(teacher, example.load(), fit), example.captions)


def _outcomes(
    benchmark: str, examples: Sequence[CaptionChoice] | Sequence[TwoByTwo], answers: Sequence[Answer]
) -> Outcomes:
    choices = [answer.choices for answer in answers]
    pairs = [example for example in examples if isinstance(example, TwoByTwo)]
    if not pairs:
        choice_examples = [example for example in examples if isinstance(example, CaptionChoice)]
        right = [chosen == example.right for (chosen,), example in zip(choices, choice_examples, strict=True)]
        return choice_outcomes(benchmark, choice_examples, right)
    # The four decisions of `Question.two_by_two`, of which 0, 1, 0 and 1 are right.
    own = torch.tensor([[a == 0, b == 1, c == 0, d == 1] for a, b, c, d in choices])
    return pairing_outcomes(benchmark, pairs, own[:, :2], own[:, 2:])


def _latents(teacher: DiffusionTeacher, image: Image.Image, fit: Fit) -> Float[Tensor, "1 channels height width"]:
    from torchvision.transforms.functional import to_tensor  # its import takes over a second

    if fit == "centre":
        image = ImageOps.fit(image, teacher.image_size[::-1], Image.Resampling.BICUBIC)
    pixels = to_tensor(image).unsqueeze(0)
    return teacher.encode_images_cached([content_key(pixels)], pixels)
