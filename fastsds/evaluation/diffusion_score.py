"""The diffusion model itself as the judge of a benchmark, and what its judgements cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo, check_examples
from fastsds.evaluation.outcomes import Outcomes, choice_outcomes, pairing_outcomes

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
    """For each example, so that `share_kept` can set them against those of the full grid."""


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


def _questions(
    teacher: DiffusionTeacher, examples: Sequence[CaptionChoice] | Sequence[TwoByTwo], fit: Fit
) -> Iterator[Question]:
    for example in tqdm(examples, desc="examples", disable=None, leave=False):
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
