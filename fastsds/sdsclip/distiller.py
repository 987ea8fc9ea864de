"""SDS-CLIP: `L = L_CLIP + lambda L_SDS` as one module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.tuning import set_tuned
from fastsds.diffusion.loss import SDSLoss, Text
from fastsds.diffusion.schedule import Weighting
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.diffusion.timesteps import SeedStream, TimestepSampler
from fastsds.ops.sample_timesteps import Strategy
from fastsds.ops.sds_loss import Jacobian
from fastsds.sdsclip.projector import LatentProjector
from fastsds.sdsclip.ranking import hard_targets, ranking_loss, soft_targets

SDSOn = Literal["image", "text", "both"]
MAX_LOGIT_SCALE = math.log(100)  # Radford et al., ICML 2021, section 2.5


class DistillOutput(NamedTuple):
    """Scalars of one step; `loss` is what to differentiate, the others are unweighted parts of it."""

    loss: Float[Tensor, ""]
    """`contrastive + sds_weight sds + ranking_weight ranking`."""
    contrastive: Float[Tensor, ""]
    """CLIP's own, over the images and captions of the batch."""
    sds: Float[Tensor, ""]
    """0 where `sds_weight` is 0."""
    ranking: Float[Tensor, ""]
    """0 where `ranking_weight` is 0."""


class SDSDistiller(nn.Module):
    """Distils a frozen text-to-image diffusion model into CLIP.

    The teacher judges CLIP's image embedding, mapped into its latent space by a linear projector, under the image's
    caption; its gradient tunes CLIP's LayerNorms and the projector beside the contrastive loss. `sds_weight=0` and
    `ranking_weight=0` is the contrastive-only control, and needs no teacher.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP`. Parameters that are not tuned are frozen in place.
        teacher: the diffusion model, or None without the losses that ask it.
        sds_weight: lambda (*secondary*: 1e-3).
        tune: `layernorm` (*stated*), `projector`, `all` or a regular expression over CLIP's parameter names; the
            logit scale, where it is tuned, does not rise above 100, and a bias of the logits is not tuned.
        teacher_batch: latents per U-Net call; the gradient does not depend on it, the memory does.
        sds_on: the embeddings that are judged: the image's (*stated*), the caption's through the same projector
            (ours), or both.
        draws, strategy, weighting, jacobian, t_range, guidance_scale: of the `SDSLoss`.
        normalize: whether the projector sees the unit-length embedding (*reading*).
        ranking_weight: of teacher ranking (ours, off by default), or of its labelled control.
        ranking_temperature: of the teacher's scores.
        scorer: gives the scores of candidates during training, with fresh noise at every step; not needed where
            the batches carry scores or labels.
        seed: of the noise.

    Raises:
        ValueError: an option outside its range, or a loss that needs a teacher without one.
    """

    def __init__(
        self,
        clip: nn.Module,
        teacher: DiffusionTeacher | None,
        sds_weight: float = 1e-3,
        tune: str = "layernorm",
        teacher_batch: int | None = None,
        *,
        sds_on: SDSOn = "image",
        draws: int = 1,
        strategy: Strategy = "uniform",
        weighting: Weighting | Float[Tensor, "timesteps"] = "uniform",
        jacobian: Jacobian = "full",
        t_range: tuple[int, int] | None = None,
        guidance_scale: float = 1.0,
        normalize: bool = True,
        ranking_weight: float = 0.0,
        ranking_temperature: float = 0.005,
        scorer: DiffusionScorer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sds_on not in get_args(SDSOn):
            raise ValueError(f"sds_on: expected one of {get_args(SDSOn)}, got {sds_on!r}")
        for name, value in (("sds_weight", sds_weight), ("ranking_weight", ranking_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not ranking_temperature > 0:
            raise ValueError(f"ranking_temperature: expected a number > 0, got {ranking_temperature}")
        if teacher is None and sds_weight:
            raise ValueError(f"teacher: expected a DiffusionTeacher, because sds_weight is {sds_weight}, got None")
        self.clip = clip
        self.tuned = set_tuned(clip, tune)
        self._leave_bias()
        self._max_logit_scale = max(MAX_LOGIT_SCALE, float(clip.logit_scale.max()))  # type: ignore[arg-type, operator]
        self.sds_weight = sds_weight
        self.sds_on = sds_on
        self.normalize = normalize
        self.ranking_weight = ranking_weight
        self.ranking_temperature = ranking_temperature
        self.scorer = scorer
        self.seeds = SeedStream(seed)
        self.sds_loss: SDSLoss | None = None
        self.projector: LatentProjector | None = None
        if teacher is not None and sds_weight:
            self.sds_loss = SDSLoss(
                teacher, draws, strategy, weighting, jacobian,
                t_range=t_range, guidance_scale=guidance_scale, teacher_batch=teacher_batch,
            )  # fmt: skip
            self.projector = LatentProjector(_embed_dim(clip), teacher.latent_shape)
            self.projector.to(next(clip.parameters()).device)
        self._keep_frozen_statistics()

    @property
    def teacher(self) -> DiffusionTeacher | None:
        return None if self.sds_loss is None else self.sds_loss.teacher

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What is tuned, by its name in this module: CLIP's selected parameters and the projector's."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("sds_loss.")
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this distiller belongs to, as JSON."""
        return {"clip": ClipIdentity.of(self.clip).to_json(), "tuned": sorted(self.tuned)}

    def require_identity(self, recorded: dict[str, Any]) -> None:
        """Raises `ModelMismatchError` where a checkpoint belongs to another model or tunes something else."""
        ClipIdentity.of(self.clip).require_match(recorded["clip"])
        if recorded["tuned"] != sorted(self.tuned):
            raise ModelMismatchError(
                f"checkpoint: it tunes {len(recorded['tuned'])} of CLIP's parameters and this distiller "
                f"{len(self.tuned)}; use the `tune` it was trained with"
            )

    def random_streams(self) -> dict[str, SeedStream | TimestepSampler]:
        """The stream of noise and, where it is learned, the density of timesteps, which a resumed run continues."""
        if self.sds_loss is None or self.sds_loss.sampler is None:
            return {"noise": self.seeds}
        return {"noise": self.seeds, "timesteps": self.sds_loss.sampler}

    def train(self, mode: bool = True) -> SDSDistiller:
        """Batch norms whose parameters are frozen keep their statistics."""
        super().train(mode)
        self._keep_frozen_statistics()
        return self

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch context"],
        captions: Text,
        *,
        candidate_tokens: Int[Tensor, "ranked candidates context"] | None = None,
        candidate_scores: Float[Tensor, "ranked candidates"] | None = None,
        candidate_labels: Int[Tensor, "ranked"] | None = None,
        candidate_captions: Sequence[Sequence[str]] | None = None,
        latents: Float[Tensor, "ranked channels latent_height latent_width"] | None = None,
        candidate_rows: Int[Tensor, "ranked"] | None = None,
    ) -> DistillOutput:
        """One step's losses.

        Args:
            images, tokens: a batch of pairs, preprocessed and tokenized for the CLIP model.
            captions: the same captions for the teacher, as strings or as its text conditioning.
            candidate_tokens: for ranking: candidate captions of each image.
            candidate_scores: the teacher's diffusion scores of the candidates, lower is better.
            candidate_labels: in place of scores, the position of the right candidate: the labelled control.
            candidate_captions, latents: in place of scores, what the `scorer` needs to compute them now: the
                candidates as strings and the VAE latents of the images.
            candidate_rows: which images of the batch have candidates, where not all do (a caption may have no
                swapped form); the other candidate arguments then hold these images alone.

        Raises:
            ValueError: a batch of images, tokens or captions of unequal length or another size than the model
                takes, or ranking without what it needs.
        """
        self._check(images, tokens, captions)
        image_embedding = self.clip.encode_image(images)  # type: ignore[operator]
        text_embedding = self.clip.encode_text(tokens)  # type: ignore[operator]
        image_features, text_features = F.normalize(image_embedding, dim=-1), F.normalize(text_embedding, dim=-1)
        logit_scale = self._logit_scale()
        contrastive = _contrastive_loss()(image_features, text_features, logit_scale)
        zero = contrastive.new_zeros(())
        sds = zero
        if self.sds_loss is not None:
            embeddings = {
                "image": image_features if self.normalize else image_embedding,
                "text": text_features if self.normalize else text_embedding,
            }
            seed = self.seeds.next(images.device)
            judged = ("image", "text") if self.sds_on == "both" else (self.sds_on,)
            sds = sum((self._judge(embeddings[side], captions, seed) for side in judged), zero) / len(judged)
        ranking = zero
        if self.ranking_weight:
            # Drawn without candidates too, so that processes whose batches differ in them keep one stream.
            scorer_seed = None if self.scorer is None else self.seeds.next(images.device)
            ranked = image_features if candidate_rows is None else image_features[candidate_rows]
            if len(ranked) == 0:
                features, targets = ranked.new_zeros(0, 1, ranked.shape[1]), ranked.new_zeros(0, 1)
            elif candidate_tokens is None:
                raise ValueError(
                    "candidate_tokens: expected in every batch, because ranking_weight is above 0, got None"
                )
            else:
                batch, candidates = candidate_tokens.shape[:2]
                features = self.clip.encode_text(candidate_tokens.flatten(0, 1), normalize=True)  # type: ignore[operator]
                features = features.view(batch, candidates, -1)
                targets = self._targets(
                    candidates, candidate_scores, candidate_labels, candidate_captions, latents, scorer_seed
                )
            ranking = ranking_loss(ranked, features, logit_scale, targets)
        loss = contrastive + self.sds_weight * sds + self.ranking_weight * ranking
        return DistillOutput(loss, contrastive, sds, ranking)

    @torch.no_grad()
    def fit_projector(
        self, batches: Iterable[tuple[Float[Tensor, "batch 3 height width"], Tensor]], ridge: float = 1e-3
    ) -> float:
        """Starts the projector as the ridge regression from image embeddings to VAE latents.

        Args:
            batches: images as `forward` takes them, each with the VAE latents of the same images.

        Returns:
            The share of the latents' variance explained.
        """
        if self.projector is None:
            raise ValueError("sds_weight: the projector exists only where it is above 0")

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for images, latents in batches:
                yield self.clip.encode_image(images, normalize=self.normalize), latents  # type: ignore[operator]

        return self.projector.fit_ridge(pairs(), ridge)

    def _leave_bias(self) -> None:
        """A bias of all logits (SigLIP's) changes none of the losses: it would never get the gradient it waits for."""
        if getattr(self.clip, "logit_bias", None) is not None and self.tuned.pop("logit_bias", None) is not None:
            self.clip.logit_bias.requires_grad_(False)  # type: ignore[operator, union-attr]

    def _logit_scale(self) -> Float[Tensor, ""]:
        """At most 100, or what it was before: where it is tuned, the parameter itself is held there, as CLIP's was."""
        parameter: Tensor = self.clip.logit_scale  # type: ignore[assignment]
        if parameter.requires_grad and self.training:
            with torch.no_grad():
                parameter.clamp_(max=self._max_logit_scale)
        return parameter.exp()

    def _keep_frozen_statistics(self) -> None:
        for module in self.clip.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                tuned = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                module.train(module.training and tuned)

    def _judge(self, embedding: Tensor, captions: Text, seed: Tensor) -> Tensor:
        assert self.sds_loss is not None and self.projector is not None
        latents = self.projector(embedding)
        return self.sds_loss(latents.float() if latents.dtype != torch.float64 else latents, captions, seed=seed)

    def _targets(
        self,
        candidates: int,
        scores: Tensor | None,
        labels: Tensor | None,
        captions: Sequence[Sequence[str]] | None,
        latents: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        if (scores is not None) + (labels is not None) + (captions is not None) != 1:
            raise ValueError(
                "candidate_scores: ranking needs just one of candidate_scores (of the teacher), candidate_labels (the "
                "labelled control) and candidate_captions with latents (scored now)"
            )
        if labels is not None:
            return hard_targets(labels, candidates)
        if captions is not None:
            if self.scorer is None or seed is None or latents is None:
                raise ValueError("candidate_captions: scoring them now needs latents in the batch and a scorer")
            if dist.is_initialized():
                seed = seed + dist.get_rank()  # noise of its own for every process's images
            scores = self.scorer.score_latents(latents, captions, seed=seed)
        assert scores is not None
        return soft_targets(scores, self.ranking_temperature)

    def _check(self, images: Tensor, tokens: Tensor, captions: Text) -> None:
        size = self.clip.visual.image_size  # type: ignore[union-attr]
        height, width = size if isinstance(size, Sequence) else (size, size)
        if list(images.shape[1:]) != [3, height, width] or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point [batch, 3, {height}, {width}] as the CLIP model takes, "
                f"got {images.dtype} {list(images.shape)}; apply its preprocessing"
            )
        device = next(self.clip.parameters()).device
        if images.device != device or tokens.device != device:
            raise ValueError(
                f"images, tokens: expected on the CLIP model's device {device}, got {images.device} and {tokens.device}"
            )
        if not len(images) == len(tokens) == len(captions):
            raise ValueError(
                f"captions: expected one per image, got {len(images)} images, {len(tokens)} token rows and "
                f"{len(captions)} captions"
            )


def _embed_dim(clip: Any) -> int:
    """Width of the joint embedding, whatever the towers are made of."""
    tokens = torch.zeros(1, clip.context_length, dtype=torch.int64, device=next(clip.parameters()).device)
    with torch.no_grad():
        return clip.encode_text(tokens).shape[-1]


def _contrastive_loss() -> Any:
    from open_clip import ClipLoss

    if not (dist.is_available() and dist.is_initialized()):
        return ClipLoss()
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
