"""IntCoOp: prompts with a predicted attribute, and context vectors that depend on the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.intcoop.attributes import AttributeSpace, Explanation, attribute_embeddings, nearest_words
from fastsds.intcoop.extractor import AttributeExtractor, frozen_features
from fastsds.intcoop.prompts import ConditionedContext, Features, PromptedCLIP, PromptLosses, Tokenizer, start_context


class IntCoOp(PromptedCLIP):
    """Prompt tuning with predicted attributes (Ghosal, Basu, Feizi and Manocha, EMNLP 2024).

    The prompt of class k for image I is `[start] [h_1(I)] … [h_M(I)] [A(I)] [class tokens k] . [end]` (*reading* of
    the stated structure): the context vectors attend to the image, `A` predicts its attribute's embedding.
    `L = L_CE + attribute_weight L_attr + regulariser_weight L_reg` (*stated*).

    Args:
        clip: an open_clip model with a `VisionTransformer`; frozen in place.
        classnames: of the classes to tell apart.
        tokenizer: the CLIP model's own.
        attributes: words for `explain`; `IntCoOpTrainer` fills in those it trains on.
        context_length: M (*reading*: 4).
        context_init: words that the context vectors start as; None for a random start (*reading*: the field's).
        handwritten: the prompts of `L_reg` (*reading*).
        extractor_tokens, extractor_layers: prompt tokens per layer, and the layers, of the `AttributeExtractor`.
        heads: of the cross-attention.
        attribute_space: of `L_attr`'s targets: `token` embeddings, as stand for a word in a prompt (*reading*), or
            `text` embeddings of the whole tower.
        attribute_weight: lambda1 (not known; 4 did best on the validation pictures of the toy world).
        regulariser_weight: lambda2 (not known; as `attribute_weight`).
        encoder_options: of the `PrefixTextEncoder`.

    Raises:
        TypeError: a vision tower that is not a `VisionTransformer`, which is named.
        ValueError: an option outside its range, class names that do not serve, or a text tower that is not causal.
    """

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer,
        attributes: Sequence[str] = (),
        context_length: int = 4,
        context_init: str | None = "a photo of a",
        handwritten: str = "a photo of a {attribute} {classname}.",
        extractor_tokens: int = 4,
        extractor_layers: Sequence[int] | None = None,
        heads: int = 8,
        attribute_space: AttributeSpace = "token",
        attribute_weight: float = 4.0,
        regulariser_weight: float = 4.0,
        **encoder_options: Any,
    ) -> None:
        for name, value in (("attribute_weight", attribute_weight), ("regulariser_weight", regulariser_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        super().__init__(clip, classnames, tokenizer, **encoder_options)
        self.extractor = AttributeExtractor(
            clip.visual,  # type: ignore[arg-type]
            self.encoder.width,
            tokens=extractor_tokens,
            layers=extractor_layers,
        )
        start = start_context(self.encoder, context_length, context_init)
        self.conditioned = ConditionedContext(start, self.extractor.prompts.shape[-1], heads)
        self.handwritten = handwritten
        self.attribute_space = attribute_space
        self.attribute_weight = attribute_weight
        self.regulariser_weight = regulariser_weight
        self.attributes = tuple(attributes)
        self.to(next(clip.parameters()).device)
        self._targets: dict[str, Tensor] = {}
        self._handwritten_features: dict[str, Tensor] = {}

    @property
    def attributes(self) -> tuple[str, ...]:
        """The words that `explain` chooses from."""
        return self._attributes

    @attributes.setter
    def attributes(self, words: Sequence[str]) -> None:
        self._attributes = tuple(dict.fromkeys(words))

    def for_classes(self, classnames: Sequence[str]) -> IntCoOp:
        other: IntCoOp = super().for_classes(classnames)  # type: ignore[assignment]
        other._handwritten_features = {}
        return other

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "images 3 height width"]) -> dict[str, Tensor]:
        """`embedding` of unit length; `patches`, that the context attends to; `tokens`, that enter the extractor."""
        embedding, patches, tokens = frozen_features(self.clip.visual, images, self.extractor.first_layer)
        return {"embedding": F.normalize(embedding, dim=-1), "patches": patches, "tokens": tokens}

    def text_features(self, features: Features) -> Float[Tensor, "images classes dim"]:
        return self._text_features(features, self.extractor(features["tokens"]))

    def losses(
        self, features: Features, labels: Int[Tensor, "images"], attributes: Sequence[str] | None = None
    ) -> PromptLosses:
        """The three losses.

        `L_attr` is the squared distance between `A(I)` and the embedding of the image's attribute, and `L_reg`
        the squared distance, per class, between the unit-length text features of the learned prompt and of the
        hand-written `a photo of a [attribute] [class]` (*reading*, both); means over images and classes.

        Args:
            attributes: the attribute of every image, in words.

        Raises:
            ValueError: not one attribute per image.
        """
        if attributes is None or len(attributes) != len(labels):
            got = "none" if attributes is None else str(len(attributes))
            raise ValueError(f"attributes: expected one for each of {len(labels)} images, got {got}")
        predicted = self.extractor(features["tokens"])
        text = self._text_features(features, predicted)
        classification = F.cross_entropy(self._similarity(features, text), labels)
        attribute = (predicted - self.attribute_targets(attributes)).square().sum(dim=-1).mean()
        regulariser = (text - self.handwritten_features(attributes)).square().sum(dim=-1).mean()
        loss = classification + self.attribute_weight * attribute + self.regulariser_weight * regulariser
        return PromptLosses(loss, classification, attribute, regulariser)

    @torch.no_grad()
    def handwritten_features(self, attributes: Sequence[str]) -> Float[Tensor, "images classes dim"]:
        """Unit-length features of `a photo of a [attribute] [class]`, computed once per attribute and class."""
        for word in dict.fromkeys(attributes):
            if word not in self._handwritten_features:
                prompts = [self.handwritten.format(attribute=word, classname=name) for name in self.classnames]
                with self._without_autocast():
                    self._handwritten_features[word] = F.normalize(self.encoder.encode_text(prompts), dim=-1)
        return torch.stack([self._handwritten_features[word] for word in attributes]).to(self.encoder.device)

    @torch.no_grad()
    def attribute_targets(self, attributes: Sequence[str]) -> Float[Tensor, "images width"]:
        """What `A(I)` is to be near to for each image's attribute, computed once per attribute."""
        new = [word for word in dict.fromkeys(attributes) if word not in self._targets]
        if new:
            with self._without_autocast():
                embedded = attribute_embeddings(self.encoder, new, self.attribute_space)
            self._targets |= dict(zip(new, embedded, strict=True))
        return torch.stack([self._targets[word] for word in attributes]).to(self.encoder.device)

    @torch.no_grad()
    def explain(
        self, images: Float[Tensor, "images 3 height width"], *, words: Sequence[str] | None = None, top: int = 3
    ) -> Explanation:
        """The attribute words nearest to `A(I)`, with their similarities, and the class of each image.

        Args:
            images: preprocessed.
            words: to choose from; `attributes` by default.
            top: words per image.

        Raises:
            ValueError: no words to choose from.
        """
        chosen = list(self.attributes if words is None else words)
        if not chosen:
            raise ValueError("words: expected attribute words to choose from, got none; pass some or train the model")
        features = self.encode_images(images)
        predicted = self.extractor(features["tokens"])
        names, similarities = nearest_words(predicted, chosen, self.attribute_targets(chosen), top)
        classes = self._similarity(features, self._text_features(features, predicted)).argmax(dim=1)
        return Explanation(names, similarities, [self.classnames[index] for index in classes.tolist()])

    def _without_autocast(self) -> torch.autocast:
        """For what is kept, which must not depend on who asked first."""
        return torch.autocast(self.encoder.device.type, enabled=False)

    def _text_features(self, features: Features, attribute: Tensor) -> Tensor:
        return F.normalize(self.encoder(self.conditioned(features["patches"]), attribute), dim=-1)
