"""A benchmark's outcomes sample by sample: what figures, intervals and comparisons are computed from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from fastsds.data.files import DataError
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo, groups_of, units_of

OUTCOMES_FILE = "outcomes.json"


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark: for every sample 1 where the model was right and 0 where it was not.

    Raises:
        ValueError: no samples, columns of unequal length, a hit other than 0 and 1, or a key that comes twice.
    """

    hits: tuple[float, ...]
    keys: tuple[str, ...]
    """Names of the samples."""
    groups: tuple[str, ...] | None = None
    """Group of each sample, or None where the benchmark has none."""
    chance: float | None = None
    """What guessing scores, in [0, 1]."""
    units: tuple[str, ...] | None = None
    """What each sample was drawn with, where samples depend on each other: those of one image, or the two images of a
    Winoground example."""

    def __post_init__(self) -> None:
        if not self.hits or not set(self.hits) <= {0, 1}:
            raise ValueError(f"hits: expected at least one, each 0 or 1, got {len(self.hits)}: {self.hits[:5]}")
        for name, column in (("keys", self.keys), ("groups", self.groups), ("units", self.units)):
            if column is not None and len(column) != len(self.hits):
                raise ValueError(f"{name}: expected one for each of {len(self.hits)} hits, got {len(column)}")
        if len(set(self.keys)) < len(self.keys):
            twice = next(key for key in self.keys if self.keys.count(key) > 1)
            raise ValueError(f"keys: expected each once, got {twice!r} {self.keys.count(twice)} times")

    @property
    def micro(self) -> float:
        """The mean over samples."""
        return statistics.fmean(self.hits)

    @property
    def macro(self) -> float | None:
        """The mean of the groups' means, or None without groups."""
        return None if self.groups is None else statistics.fmean(self.group_means().values())

    def subset(self, kept: Sequence[bool]) -> Figure:
        """The samples that `kept` marks; the chance level is that of all.

        Raises:
            ValueError: it marks none, or is of another length.
        """

        def pick(column: tuple[Any, ...] | None) -> Any:
            return None if column is None else tuple(value for value, keep in zip(column, kept, strict=True) if keep)

        return Figure(pick(self.hits), pick(self.keys), pick(self.groups), self.chance, pick(self.units))

    def group_means(self) -> dict[str, float]:
        """The mean over the samples of each group, by the groups' names in order."""
        hits: dict[str, list[float]] = {}
        for group, hit in zip(self.groups or (), self.hits, strict=self.groups is not None):
            hits.setdefault(group, []).append(hit)
        return {group: statistics.fmean(hits[group]) for group in sorted(hits)}


@dataclass(frozen=True)
class Outcomes:
    """Every figure of one model on one benchmark."""

    benchmark: str
    figures: dict[str, Figure]

    def with_groups_of(self, name: str) -> Outcomes:
        """Adds a figure per group of the figure `name`, called as the group is: SugarCrepe's seven splits."""
        figure = self.figures[name]
        figures = {
            group: figure.subset([group == other for other in figure.groups or ()]) for group in figure.group_means()
        }
        return Outcomes(self.benchmark, {**self.figures, **figures})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Outcomes:
        columns = ("hits", "keys", "groups", "units")
        figures = {}
        for name, figure in document["figures"].items():
            hits, keys, groups, units = (None if figure[one] is None else tuple(figure[one]) for one in columns)
            figures[name] = Figure(hits or (), keys or (), groups, figure["chance"], units)
        return cls(document["benchmark"], figures)


def read_outcomes(path: Path) -> Outcomes:
    """Reads `outcomes.json`, or that of a folder of results.

    Raises:
        DataError: it is missing or not what `write_results` writes.
    """
    path = path / OUTCOMES_FILE if path.is_dir() else path
    try:
        return Outcomes.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}; name a folder of results") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"path: {path} does not hold outcomes ({error}); evaluate again") from error


def choice_outcomes(
    benchmark: str, examples: Sequence[CaptionChoice], right: Bool[Tensor, "examples"] | Sequence[bool]
) -> Outcomes:
    """`accuracy`: whether each example's right caption was chosen; examples of one image are a unit."""
    figure = Figure(
        tuple(float(hit) for hit in right),
        tuple(example.key for example in examples),
        groups_of(examples),
        statistics.fmean(1 / len(example.captions) for example in examples) if examples else None,
        units_of(examples),
    )
    return Outcomes(benchmark, {"accuracy": figure})


def pairing_outcomes(
    benchmark: str,
    examples: Sequence[TwoByTwo],
    own_caption: Bool[Tensor, "examples 2"],
    own_image: Bool[Tensor, "examples 2"],
) -> Outcomes:
    """Winoground's `text`, `image` and `group`, and `pair`, in which every image is a sample.

    Args:
        own_caption: whether each image prefers its own caption.
        own_image: whether each caption prefers its own image.
    """
    text, image = own_caption.all(dim=1), own_image.all(dim=1)
    keys, groups = tuple(example.key for example in examples), groups_of(examples)
    figures = {
        name: Figure(tuple(hits.double().tolist()), keys, groups, chance)
        for name, hits, chance in (("text", text, 1 / 4), ("image", image, 1 / 4), ("group", text & image, 1 / 6))
    }
    figures["pair"] = Figure(
        tuple(own_caption.flatten().double().tolist()),
        tuple(f"{key} image {side}" for key in keys for side in (0, 1)),
        None if groups is None else tuple(group for group in groups for _ in (0, 1)),
        1 / 2,
        tuple(key for key in keys for _ in (0, 1)),
    )
    return Outcomes(benchmark, figures)
