"""Prompts as rows of token ids with slots for learned vectors, and rows packed behind the prefix they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

ClassPosition = Literal["front", "middle", "end"]


def slot(vector: int) -> int:
    """The id that stands in a row for the learned vector of that number; ids of tokens are not negative."""
    return -1 - vector


def _common(row: Sequence[int], other: Sequence[int]) -> int:
    """The length of the run that both begin with; a loop, because PyTorch 2.11 compiles no `takewhile`."""
    shared = min(len(row), len(other))
    for at in range(shared):
        if row[at] != other[at]:
            return at
    return shared


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts of different lengths without padding, behind the run of tokens that all of them begin with."""

    prefix: Int[Tensor, "prefix"]
    """Token ids and slots."""
    suffixes: Int[Tensor, "tokens"]
    """One prompt's after the other's."""
    positions: Int[Tensor, "tokens"]
    """Of the suffixes' tokens in their prompts."""
    offsets: Int[Tensor, "prompts+1"]
    """int32: the suffix of prompt `p` is `suffixes[offsets[p] : offsets[p + 1]]`."""
    bounds: tuple[int, ...]
    """`offsets`, known without asking the device."""
    learned_prefix: bool
    learned_suffixes: bool
    """Whether there are slots."""

    @classmethod
    def pack(cls, rows: Sequence[list[int]], device: torch.device) -> PackedPrompts:
        """`rows` end with the token that the tower reads, which is never part of the prefix."""
        # What the first and the last row in order share, all rows between them share.
        shared = min(_common(min(rows), max(rows)), min(map(len, rows)) - 1)
        suffixes = [row[shared:] for row in rows]
        bounds = [0]
        for suffix in suffixes:
            bounds.append(bounds[-1] + len(suffix))
        tokens = [token for suffix in suffixes for token in suffix]
        positions = [shared + step for suffix in suffixes for step in range(len(suffix))]
        return cls(
            prefix=torch.tensor(rows[0][:shared], device=device, dtype=torch.int64),
            suffixes=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            offsets=torch.tensor(bounds, device=device, dtype=torch.int32),
            bounds=tuple(bounds),
            learned_prefix=any(token < 0 for token in rows[0][:shared]),
            learned_suffixes=any(token < 0 for token in tokens),
        )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def slice(self, start: int, stop: int) -> PackedPrompts:
        """The prompts `start` to `stop`, behind the same prefix."""
        if (start, stop) == (0, len(self)):
            return self
        first, last = self.bounds[start], self.bounds[stop]
        return PackedPrompts(
            prefix=self.prefix,
            suffixes=self.suffixes[first:last],
            positions=self.positions[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            bounds=tuple(bound - first for bound in self.bounds[start : stop + 1]),
            learned_prefix=self.learned_prefix,
            learned_suffixes=self.learned_suffixes,
        )

    @property
    def device(self) -> torch.device:
        return self.prefix.device

    @property
    def max_length(self) -> int:
        """Tokens of the longest suffix."""
        return max(stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False))


class PromptTokenizer:
    """A tokenizer, and where the tower reads: gives rows that end with the token that is read."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        context_length: int,
        pooling: str,
        end_token: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.pooling = pooling
        self._end_token = end_token
        self._pads_itself = not hasattr(tokenizer, "pad_token_id")
        first, second = self._tokens(["a", "b"])
        if first[0] != second[0]:
            raise ValueError(f"tokenizer: expected one start token in every text, got {first[0]} and {second[0]}")
        self.start_token = first[0]
        self.pad_token = first[-1] if self._pads_itself else tokenizer.pad_token_id or 0

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Per text: start token, words, end token.

        Raises:
            ValueError: a text has no end token.
        """
        rows = []
        for text, tokens in zip(texts, self._tokens(texts), strict=True):
            end = self._end(tokens)
            if end is None:
                raise ValueError(
                    f"tokenizer: expected the end token {self._end_token} in every text, got none in {text!r}"
                )
            rows.append(tokens[: end + 1])
        return rows

    def complete(self, row: list[int]) -> list[int]:
        """A row up to the token that the tower reads: for `last`, that of the whole context."""
        return self.pad(row) if self.pooling == "last" else row

    def pad(self, row: list[int]) -> list[int]:
        """A row of the whole context."""
        return [*row, *[self.pad_token] * (self.context_length - len(row))]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._pads_itself:
            return self._tokenizer(list(texts))["input_ids"]
        # Longer than the context, so that no text is cut in silence.
        return self._tokenizer(list(texts), context_length=4 * self.context_length).tolist()

    def _end(self, tokens: list[int]) -> int | None:
        if self._end_token is not None:
            return tokens.index(self._end_token) if self._end_token in tokens else None
        if self.pooling == "argmax":
            return tokens.index(max(tokens))
        if not self._pads_itself:
            return len(tokens) - 1
        padding = sum(1 for _ in takewhile(lambda token: token == self.pad_token, reversed(tokens)))
        return len(tokens) - 1 - padding


def class_rows(
    tokenizer: PromptTokenizer, classnames: Sequence[str], suffix_template: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Per class, the tokens of its name and those after the name, with the end token."""
    head, _ = suffix_template.split("{}")
    whole = tokenizer.rows([suffix_template.format(name) for name in classnames])
    names = tokenizer.rows([f"{head}{name}" for name in classnames])
    cuts = [_common(name[:-1], row) for name, row in zip(names, whole, strict=True)]
    return (
        [row[1:cut] for row, cut in zip(whole, cuts, strict=True)],
        [row[cut:] for row, cut in zip(whole, cuts, strict=True)],
    )


def arrange(
    start_token: int,
    names: Sequence[Sequence[int]],
    tails: Sequence[Sequence[int]],
    *,
    context_tokens: int,
    attribute: bool,
    class_specific: bool,
    class_position: ClassPosition,
) -> list[list[int]]:
    """The prompt of every class as a row of token ids and slots.

    The attribute stands right before the class name, its slot after those of all context vectors; half of the
    context (the larger half, where it is odd, after the name) stands before it for `middle`, all or none of it for
    `end` and `front`.
    """
    before = {"front": 0, "middle": context_tokens // 2, "end": context_tokens}[class_position]
    vectors = context_tokens * (len(names) if class_specific else 1)
    rows = []
    for index, (name, tail) in enumerate(zip(names, tails, strict=True)):
        first = index * context_tokens if class_specific else 0
        context = [slot(first + vector) for vector in range(context_tokens)]
        described = [slot(vectors)] if attribute else []
        rows.append([start_token, *context[:before], *described, *name, *context[before:], *tail])
    return rows
