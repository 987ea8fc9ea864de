"""What a denoiser is told about its captions, and keeping it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.diffusion.cache import TensorCache


@dataclass(frozen=True)
class TextConditioning:
    """One row for each caption; takes rows, repeats and joins as a tensor does."""

    embeddings: Float[Tensor, "captions tokens width"]
    """Of the tokens."""
    pooled: Float[Tensor, "captions pooled_width"] | None = None
    """Of the whole caption, where the denoiser takes it: SDXL and SD3."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Sequence[int] | Int[Tensor, "rows"]) -> TextConditioning:
        return self.map(lambda tensor: tensor[rows])

    def repeat_interleave(self, repeats: int) -> TextConditioning:
        """Every row `repeats` times, copies of one row side by side."""
        return self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def expand(self, captions: int) -> TextConditioning:
        """The one row there is as `captions` rows, without copying it."""
        return self.map(lambda tensor: tensor.expand(captions, *tensor.shape[1:]))

    @staticmethod
    def cat(pieces: Sequence[TextConditioning]) -> TextConditioning:
        """The rows of all pieces, in their order."""
        columns = [piece.tensors() for piece in pieces]
        return TextConditioning(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by field."""
        return {"embeddings": self.embeddings} | ({} if self.pooled is None else {"pooled": self.pooled})

    def map(self, change: Callable[[Tensor], Tensor]) -> TextConditioning:
        """The same of changed tensors."""
        return TextConditioning(**{name: change(tensor) for name, tensor in self.tensors().items()})


class ConditioningCache:
    """The conditioning of single captions: the most recently used in memory, and all that fits on disk.

    Args:
        size: captions in memory.
        disk: behind it, or None.
    """

    def __init__(self, size: int, disk: TensorCache | None = None) -> None:
        self.size = size
        self.disk = disk
        self.rows: OrderedDict[str, TextConditioning] = OrderedDict()

    def lookup(
        self, captions: Iterable[str], prefix: str, device: torch.device, dtype: torch.dtype
    ) -> dict[str, TextConditioning]:
        """One row for each caption that is known; on disk, below `prefix`, which says what encoded it."""
        found: dict[str, TextConditioning] = {}
        for caption in dict.fromkeys(captions):
            row = self.rows.get(caption)
            if row is not None and (row.embeddings.device, row.embeddings.dtype) == (device, dtype):
                self.rows.move_to_end(caption)
                found[caption] = row
            elif self.disk is not None and (tensors := self.disk.get(f"{prefix} {caption}")) is not None:
                found[caption] = TextConditioning(**tensors).map(lambda tensor: tensor.to(device, dtype))
                self._remember(caption, found[caption])
        return found

    def keep(self, prefix: str, rows: Mapping[str, TextConditioning]) -> None:
        for caption, row in rows.items():
            self._remember(caption, row)
            if self.disk is not None:
                self.disk.put(f"{prefix} {caption}", row.tensors())

    def _remember(self, caption: str, row: TextConditioning) -> None:
        self.rows[caption] = row
        self.rows.move_to_end(caption)
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)
