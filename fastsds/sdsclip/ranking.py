"""Teacher ranking (ours, not the paper's): the teacher's judgement of candidate captions, handed to the similarity.

The published loss shapes an image's embedding by itself and asks nothing of its similarity to a text. Here the
teacher's diffusion scores of an image against a few candidate captions, softened, are the targets of CLIP's
similarities between that image and those captions. No label says which candidate is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CONNECTIVES = (
    "to the left of", "to the right of", "left of", "right of", "on top of", "in front of", "next to", "behind",
    "above", "below", "under", "over", "beside", "inside", "on", "in", "at", "with", "near", "holding", "wearing",
)  # fmt: skip


def soft_targets(scores: Float[Tensor, "images candidates"], temperature: float) -> Float[Tensor, "images candidates"]:
    """`softmax(-score / temperature)`: the teacher's preference, from distances where lower is better."""
    return torch.softmax(-scores / temperature, dim=1)


def hard_targets(labels: Int[Tensor, "images"], candidates: int) -> Float[Tensor, "images candidates"]:
    """One-hot targets: the labelled control on the same candidates."""
    return F.one_hot(labels, candidates).float()


def ranking_loss(
    image_features: Float[Tensor, "images width"],
    candidate_features: Float[Tensor, "images candidates width"],
    logit_scale: Float[Tensor, ""],
    targets: Float[Tensor, "images candidates"],
) -> Float[Tensor, ""]:
    """KL divergence of CLIP's distribution over an image's candidates from the targets, averaged over images.

    Features are normalised. The divergence is 0 where CLIP agrees, so its value can be read. Processes may bring
    unequally many images, or none: the mean of what they get is the mean over all their images.
    """
    logits = logit_scale * torch.einsum("nd,nkd->nk", image_features, candidate_features)
    total = F.kl_div(logits.log_softmax(dim=1), targets.to(logits.dtype), reduction="sum")
    count, processes = torch.full((), len(logits), device=logits.device), 1
    if dist.is_initialized():
        dist.all_reduce(count)
        processes = dist.get_world_size()
    return total * processes / count.clamp(min=1)


def swap_phrases(caption: str, connectives: Sequence[str] = CONNECTIVES) -> str | None:
    """The caption with what stands before and after its first connective exchanged; None where there is none.

    `a red circle left of a blue square` becomes `a blue square left of a red circle`: a candidate of the same words.
    """
    alternatives = "|".join(re.escape(word) for word in sorted(connectives, key=len, reverse=True))
    match = re.search(rf"^(.+?)\s+({alternatives})\s+(.+?)([.!]?)$", caption.strip(), flags=re.IGNORECASE)
    if match is None:
        return None
    before, connective, after, end = match.groups()
    swapped = f"{after} {connective} {before}{end}"
    return swapped if swapped != caption.strip() else None


def batch_candidates(
    captions: Sequence[str], candidates: int, rng: random.Random
) -> tuple[list[list[str]], Int[Tensor, "images"]]:
    """For every caption itself and others of the batch, in random order, with the position of its own.

    Raises:
        ValueError: fewer different captions in the batch than candidates.
    """
    distinct = list(dict.fromkeys(captions))
    if not 2 <= candidates <= len(distinct):
        raise ValueError(
            f"candidates: expected 2 to {len(distinct)}, the number of different captions in the batch, "
            f"got {candidates}"
        )
    rows, labels = [], []
    for caption in captions:
        row = [caption, *rng.sample([other for other in distinct if other != caption], candidates - 1)]
        rng.shuffle(row)
        rows.append(row)
        labels.append(row.index(caption))
    return rows, torch.tensor(labels)
