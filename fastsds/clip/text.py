"""`PrefixTextEncoder`: the text tower on packed tokens, every image's prefix computed once for all classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsds.clip.packed import encode_dense, encode_packed
from fastsds.clip.prompts import ClassPosition, PackedPrompts, PromptTokenizer, arrange, class_rows
from fastsds.clip.tower import DenseTower, read_tower

GIB = 1 << 30


class PrefixTextEncoder(nn.Module):
    """Text embeddings of all classes under prompts with learned vectors, at about four tokens per prompt.

    The prompt of a class is `[start] context attribute class. [end]`. In CLIP's text tower attention is causal and
    only the end token is read, so two things are exact: tokens after the end token are not computed; and the run
    that all prompts of an image begin with is computed once per image, its keys and values read by every class's few
    remaining tokens. Values and gradients are those of the dense tower, to rounding.

    The one encoder serves zero-shot prompts (no context), CoOp (a context for all images: `images` is 1), CoCoOp
    (a context per image) and IntCoOp (a context and an attribute per image). The tower's tensors are the wrapped
    model's own, trained or frozen, on its device and in its dtype; the encoder has no parameters and does not
    register the model as its submodule.

    Args:
        clip: open_clip `CLIP` or `CustomTextCLIP`, or transformers `CLIPModel`.
        classnames: class names, as they stand in a prompt.
        tokenizer: the model's, open_clip's or transformers'.
        suffix_template: what follows the learned vectors; `{}` is the class name.
        class_position: `end`; `front` and `middle` (half of the context before the class name) are CoOp's variants.
        class_chunk: classes encoded at a time, each chunk anew in the backward pass. By default as many as fit
            `memory_budget`; only those beyond it are computed anew.
        memory_budget: bytes for what the backward pass needs, estimated.
        dense: run every token of every prompt through the model's own `encode_text`, whatever the tower.

    Raises:
        UnsupportedTowerError: packed tokens would not be exact for this tower, and `dense` is False.
        ValueError: class names are missing, empty, given twice or too long for the context; a bad template.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Any,
        suffix_template: str = "{}.",
        class_position: ClassPosition = "end",
        class_chunk: int | None = None,
        memory_budget: int = 4 * GIB,
        dense: bool = False,
    ) -> None:
        super().__init__()
        _check_classnames(classnames)
        if suffix_template.count("{}") != 1:
            raise ValueError(f"suffix_template: expected one {{}} for the class name, got {suffix_template!r}")
        if class_position not in get_args(ClassPosition):
            raise ValueError(f"class_position: expected one of {get_args(ClassPosition)}, got {class_position!r}")
        if class_chunk is not None and class_chunk < 1:
            raise ValueError(f"class_chunk: expected at least 1 or None, got {class_chunk}")
        self.classnames = tuple(classnames)
        self.class_position: ClassPosition = class_position
        self.class_chunk = class_chunk
        self.memory_budget = memory_budget
        self._tower = DenseTower.of(clip) if dense else read_tower(clip)
        self._tokenizer = PromptTokenizer(
            tokenizer,
            context_length=self._tower.context_length,
            pooling=self._tower.pooling,
            end_token=self._tower.end_token,
        )
        self._names, self._tails = class_rows(self._tokenizer, self.classnames, suffix_template)
        self._prompts: dict[tuple[int, bool, bool], PackedPrompts | Tensor] = {}
        self._rows(context_tokens=0, attribute=False, class_specific=False)

    def forward(
        self,
        context: Float[Tensor, "images context width"] | Float[Tensor, "images classes context width"] | None = None,
        attribute: Float[Tensor, "images width"] | None = None,
    ) -> Float[Tensor, "images classes dim"]:
        """Text embeddings of every class for every image, as `clip.encode_text` gives them: not normalised.

        Args:
            context: context vectors per image, or for all images (`images` is 1); four-dimensional where every
                class has its own. None, or no vectors, is the prompt without them.
            attribute: an embedding that stands right before the class name, per image or for all.

        Raises:
            ValueError: a shape, dtype or device is not as above, or the prompts of the named classes become too long.
        """
        context, attribute = self._check_learned(context, attribute)
        class_specific = context is not None and context.dim() == 4
        context_tokens = 0 if context is None else context.shape[-2]
        layout = context_tokens, attribute is not None, class_specific
        prompts = self._prompts.get(layout)
        if prompts is None or prompts.device != self.device:
            prompts = self._prompts[layout] = self._place(self._rows(*layout))
        images = next((len(learned) for learned in (context, attribute) if learned is not None), 1)
        vectors = None if context is None or not context_tokens else context.flatten(1, -2)
        return self._encode(prompts, vectors, attribute).expand(images, -1, -1)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Text embeddings of any texts, not normalised; what all of them begin with is computed once.

        Raises:
            ValueError: no text, or texts that are too long for the context.
        """
        if not texts:
            raise ValueError("texts: expected at least one, got none")
        rows = self._tokenizer.rows(texts)
        self._check_lengths("texts", texts, rows)
        return self._encode(self._place([self._tokenizer.complete(row) for row in rows]), None, None)[0]

    def embed_words(self, text: str) -> Float[Tensor, "tokens width"]:
        """The tower's token embeddings of a text's words: where context vectors may start from."""
        (row,), (bare,) = self._tokenizer.rows([text]), self._tokenizer.rows([""])
        words = torch.tensor(row[1 : len(row) - len(bare) + 1], device=self.device, dtype=torch.int64)
        return self._tower.token_embedding.detach()[words]

    def embed_classes(self, context_tokens: int) -> Float[Tensor, "classes tokens width"]:
        """The tower's token embeddings of every class's prompt without its `context_tokens` context vectors: the start
        token, class name, what follows it, and padding up to the context they leave; as `end` puts them in order."""
        length = self._tower.context_length - context_tokens
        rows = self._rows(0, attribute=False, class_specific=False)
        tokens = torch.tensor([self._tokenizer.pad(row)[:length] for row in rows], device=self.device)
        return self._tower.token_embedding.detach()[tokens]

    def extra_repr(self) -> str:
        return f"classes={len(self.classnames)}, class_position={self.class_position!r}"

    @property
    def width(self) -> int:
        """Of context vectors and attribute."""
        return self._tower.token_embedding.shape[1]

    @property
    def device(self) -> torch.device:
        """Of the tower."""
        return self._tower.token_embedding.device

    def _rows(self, context_tokens: int, attribute: bool, class_specific: bool) -> list[list[int]]:
        rows = arrange(
            self._tokenizer.start_token,
            self._names,
            self._tails,
            context_tokens=context_tokens,
            attribute=attribute,
            class_specific=class_specific,
            class_position=self.class_position,
        )
        self._check_lengths("classnames", self.classnames, rows)
        return [self._tokenizer.complete(row) for row in rows]

    def _place(self, rows: list[list[int]]) -> PackedPrompts | Tensor:
        """Rows as the tower takes them, on its device: copied at every call, they would make the host wait for it."""
        with torch.inference_mode(False):  # a later call's backward pass may need them
            if isinstance(self._tower, DenseTower):
                return torch.tensor([self._tokenizer.pad(row) for row in rows], device=self.device)
            return PackedPrompts.pack(rows, self.device)

    def _encode(
        self, prompts: PackedPrompts | Tensor, context: Tensor | None, attribute: Tensor | None
    ) -> Float[Tensor, "images prompts dim"]:
        if isinstance(self._tower, DenseTower):
            assert isinstance(prompts, Tensor)
            return encode_dense(self._tower, prompts, context, attribute, class_chunk=self.class_chunk)
        assert isinstance(prompts, PackedPrompts)
        return encode_packed(
            self._tower,
            prompts,
            context,
            attribute,
            class_chunk=self.class_chunk,
            memory_budget=self.memory_budget,
        )

    def _check_lengths(self, what: str, texts: Sequence[str], rows: list[list[int]]) -> None:
        limit = self._tower.context_length
        long = [f"{text!r} ({len(row)} tokens)" for text, row in zip(texts, rows, strict=True) if len(row) > limit]
        if long:
            shown = ", ".join(long[:3]) + (", …" if len(long) > 3 else "")
            raise ValueError(f"{what}: expected prompts of at most {limit} tokens, got {len(long)} longer: {shown}")

    def _check_learned(self, context: Tensor | None, attribute: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both for the same number of images."""
        classes, width = len(self.classnames), self.width
        if context is not None:
            per_class = context.dim() == 4
            if context.dim() not in (3, 4) or context.shape[-1] != width or (per_class and context.shape[1] != classes):
                raise ValueError(
                    f"context: expected [images, context, width={width}] or [images, classes={classes}, context, "
                    f"width={width}], got {list(context.shape)}"
                )
        if attribute is not None and (attribute.dim() != 2 or attribute.shape[1] != width):
            raise ValueError(f"attribute: expected [images, width={width}], got {list(attribute.shape)}")
        learned = {"context": context, "attribute": attribute}
        given = {name: tensor for name, tensor in learned.items() if tensor is not None}
        for name, tensor in given.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name}: expected on the device of the tower ({self.device}), got {tensor.device}")
        sizes = {len(tensor) for tensor in given.values()}
        images = max(sizes, default=1)
        if sizes - {1, images}:
            raise ValueError(
                f"attribute: expected the images of context ({len(given['context'])}) or 1, "
                f"got {len(given['attribute'])}"
            )
        return tuple(
            None if tensor is None else tensor.expand(images, *tensor.shape[1:]) for tensor in learned.values()
        )  # type: ignore[return-value]


def _check_classnames(classnames: Sequence[str]) -> None:
    if isinstance(classnames, str) or not classnames:
        raise ValueError(f"classnames: expected at least one name in a sequence, got {classnames!r}")
    empty = [index for index, name in enumerate(classnames) if not name.strip()]
    if empty:
        raise ValueError(f"classnames: expected names, got empty ones at {empty[:5]}")
    twice = sorted(name for name, count in Counter(classnames).items() if count > 1)
    if twice:
        raise ValueError(f"classnames: expected each name once, got {len(twice)} more than once: {twice[:5]}")
