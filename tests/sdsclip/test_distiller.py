from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from fastsds.clip import ModelMismatchError
from fastsds.diffusion import DiffusionScorer, SDSLoss
from fastsds.diffusion.timesteps import SeedStream
from fastsds.sdsclip import SDSDistiller
from fastsds.sdsclip.ranking import ranking_loss, soft_targets
from fastsds.toyworld import models

CAPTIONS = ["a red circle", "a blue square", "a green circle", "a small red square"]
TOKENS = torch.zeros(4, 3, models.CONTEXT_LENGTH, dtype=torch.int64)
CANDIDATES = [[caption, "a large blue circle", "a red circle left of a blue square"] for caption in CAPTIONS]
LAYERNORM = ("ln_1.", "ln_2.", "ln_pre.", "ln_post.", "ln_final.")


@pytest.fixture
def batch(clip_tokenizer: Any) -> dict[str, Any]:
    return {"images": torch.randn(4, 3, 32, 32), "tokens": clip_tokenizer(CAPTIONS), "captions": CAPTIONS}


@pytest.fixture
def candidate_tokens(clip_tokenizer: Any) -> Tensor:
    return torch.stack([clip_tokenizer(row) for row in CANDIDATES])


def _gradients(distiller: SDSDistiller, batch: dict[str, Any]) -> dict[str, Tensor]:
    distiller.zero_grad()
    distiller(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in distiller.trained_parameters().items()}


def _unit(embedding: Tensor) -> np.ndarray:
    array = embedding.detach().double().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def _contrastive_by_hand(clip: Any, batch: dict[str, Any]) -> float:
    """Cross entropy over rows and columns of the scaled cosines, the halves averaged."""
    images, texts = _unit(clip.encode_image(batch["images"])), _unit(clip.encode_text(batch["tokens"]))
    logits = float(np.exp(clip.logit_scale.item())) * images @ texts.T
    by_image = np.log(np.exp(logits).sum(axis=1)) - logits.diagonal()
    by_text = np.log(np.exp(logits).sum(axis=0)) - logits.diagonal()
    return float((by_image.mean() + by_text.mean()) / 2)


def test_contrastive_loss_is_clips(clip: Any, batch: dict[str, Any]) -> None:
    out = SDSDistiller(clip, None, sds_weight=0)(**batch)
    assert out.contrastive.item() == pytest.approx(_contrastive_by_hand(clip, batch), rel=1e-5)


def test_without_weight_it_is_the_contrastive_control_and_needs_no_teacher(clip: Any, batch: dict[str, Any]) -> None:
    distiller = SDSDistiller(clip, None, sds_weight=0)
    out = distiller(**batch)
    assert out.loss.item() == out.contrastive.item() > 0
    assert out.sds.item() == 0 and out.ranking.item() == 0
    assert distiller.teacher is None and distiller.projector is None
    assert all(name.startswith("clip.") for name in distiller.trained_parameters())
    assert set(distiller.random_streams()["noise"].state_dict()) == {"seed"}  # no noise is drawn


def test_loss_is_the_weighted_sum_of_its_parts(
    clip: Any, teacher: Any, batch: dict[str, Any], candidate_tokens: Tensor
) -> None:
    distiller = SDSDistiller(clip, teacher, sds_weight=0.25, ranking_weight=3.0, ranking_temperature=0.1)
    scores = torch.rand(4, 3)
    out = distiller(**batch, candidate_tokens=candidate_tokens, candidate_scores=scores)
    assert min(out.contrastive.item(), out.sds.item(), out.ranking.item()) > 1e-3
    expected = out.contrastive.item() + 0.25 * out.sds.item() + 3 * out.ranking.item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sds_on", ["image", "text", "both"])
def test_sds_judges_the_projected_embeddings(
    clip: Any, teacher: Any, batch: dict[str, Any], sds_on: str, normalize: bool
) -> None:
    distiller = SDSDistiller(clip, teacher, sds_on=sds_on, normalize=normalize, seed=5)
    out = distiller(**batch)
    loss, seed = SDSLoss(teacher), SeedStream(5).next(torch.device("cpu"))
    parts = {}
    for side, embedding in (
        ("image", clip.encode_image(batch["images"], normalize=normalize)),
        ("text", clip.encode_text(batch["tokens"], normalize=normalize)),
    ):
        linear = distiller.projector.linear
        latents = (embedding @ linear.weight.T + linear.bias).view(4, *teacher.latent_shape)
        parts[side] = loss(latents, CAPTIONS, seed=seed).item()
    assert parts["image"] != pytest.approx(parts["text"], rel=1e-6)
    expected = (parts["image"] + parts["text"]) / 2 if sds_on == "both" else parts[sds_on]
    assert out.sds.item() == pytest.approx(expected, rel=1e-5)


def test_options_of_the_loss_arrive(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    options = {
        "draws": 3,
        "strategy": "stratified",
        "weighting": "min_snr",
        "jacobian": "skip",
        "t_range": (100, 900),
        "guidance_scale": 4.0,
    }
    distiller = SDSDistiller(clip, teacher, teacher_batch=2, seed=5, **options)
    latents = distiller.projector(clip.encode_image(batch["images"], normalize=True))
    expected = SDSLoss(teacher, **options)(latents, CAPTIONS, seed=SeedStream(5).next(torch.device("cpu")))
    assert distiller(**batch).sds.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_step_draws_fresh_noise_and_the_seed_replays_it(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    first = SDSDistiller(clip, teacher, seed=3)
    second = SDSDistiller(clip, teacher, seed=3)
    second.projector.load_state_dict(first.projector.state_dict())
    values = [first(**batch).sds.item() for _ in range(2)]
    assert values[0] != values[1]
    assert [second(**batch).sds.item() for _ in range(2)] == values
    # a stream restored from a checkpoint goes on, it does not begin again
    following = first.random_streams()["noise"].state_dict()
    third = first(**batch).sds.item()
    second.random_streams()["noise"].load_state_dict(following)
    assert second(**batch).sds.item() == third


def test_conditioning_can_take_the_place_of_captions(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    distiller = SDSDistiller(clip, teacher)
    by_caption = distiller(**batch).sds.item()
    distiller.seeds = SeedStream(0)
    assert distiller(**{**batch, "captions": teacher.encode_text(CAPTIONS)}).sds.item() == by_caption
    distiller.seeds = SeedStream(0)
    assert distiller(**{**batch, "captions": CAPTIONS[::-1]}).sds.item() != by_caption


def test_only_layernorms_and_projector_are_trained(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    distiller = SDSDistiller(clip, teacher, sds_weight=0.5).train()
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    distiller(**batch).loss.backward()
    with_gradient = {name for name, parameter in distiller.named_parameters() if parameter.grad is not None}
    norms = {f"clip.{name}" for name, _ in clip.named_parameters() if any(part in name for part in LAYERNORM)}
    projector = {"projector.linear.weight", "projector.linear.bias"}
    assert with_gradient == norms | projector == set(distiller.trained_parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in distiller.trained_parameters().values())
    # every parameter is offered to the optimizer, and weight decay moves all that it may
    torch.optim.AdamW(distiller.parameters(), lr=0.1, weight_decay=0.1).step()
    changed = {name for name, tensor in distiller.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == norms | projector
    assert any(name.startswith("sds_loss.teacher.unet.") for name in before)


@pytest.mark.parametrize(
    ("tune", "clips"), [("projector", set()), ("^logit_scale$", {"clip.logit_scale"}), ("all", None)]
)
def test_tune_chooses_what_is_trained(clip: Any, teacher: Any, tune: str, clips: set[str] | None) -> None:
    if clips is None:
        clips = {f"clip.{name}" for name, _ in clip.named_parameters()}
    distiller = SDSDistiller(clip, teacher, tune=tune)
    assert set(distiller.trained_parameters()) == clips | {"projector.linear.weight", "projector.linear.bias"}


@pytest.mark.parametrize("tune", ["all", "^logit"])
def test_a_bias_of_the_logits_is_not_tuned(tune: str, batch: dict[str, Any], clip_tokenizer: Any) -> None:
    """No parameter is left without a gradient, which several processes would wait for."""
    text = {"context_length": models.CONTEXT_LENGTH, "vocab_size": len(clip_tokenizer.tokenizer), "pool_type": "last"}
    clip = open_clip.CustomTextCLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg"},
        text_cfg={**text, "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True, "proj_bias": True},
        init_logit_bias=-10.0,
    )
    distiller = SDSDistiller(clip, None, sds_weight=0, tune=tune)
    distiller(**batch).loss.backward()
    trained = distiller.trained_parameters()
    assert "clip.logit_scale" in trained and "clip.logit_bias" not in trained
    assert all(parameter.grad is not None for parameter in trained.values())
    assert "logit_bias" not in distiller.identity()["tuned"] and not clip.logit_bias.requires_grad


@pytest.mark.parametrize(("start", "highest"), [(99.0, 100.0), (120.0, 120.0)])
def test_a_tuned_logit_scale_does_not_rise_above_100(
    clip: Any, batch: dict[str, Any], start: float, highest: float
) -> None:
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(start))
    distiller = SDSDistiller(clip, None, sds_weight=0, tune="^logit_scale$").train()
    with torch.no_grad():
        clip.logit_scale.add_(1.0)  # a step of an optimizer
    distiller(**batch).loss.backward()
    assert clip.logit_scale.exp().item() == pytest.approx(highest)
    assert clip.logit_scale.grad.abs() > 0  # it may fall again
    with torch.no_grad():
        clip.logit_scale.sub_(1.0)
    distiller(**batch)
    assert clip.logit_scale.exp().item() == pytest.approx(highest / math.e)


def test_a_frozen_logit_scale_is_left_as_it_is(clip: Any, batch: dict[str, Any]) -> None:
    distiller = SDSDistiller(clip, None, sds_weight=0).train()
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(150.0))
    assert distiller(**batch).contrastive.item() == pytest.approx(_contrastive_by_hand(clip, batch), rel=1e-4)
    assert clip.logit_scale.exp().item() == pytest.approx(150.0)


@pytest.mark.parametrize("options", [{}, {"jacobian": "skip", "draws": 2}, {"sds_on": "both", "guidance_scale": 3.0}])
@pytest.mark.parametrize("teacher_batch", [1, 3])
def test_gradient_does_not_depend_on_the_teachers_batch(
    clip: Any, teacher: Any, batch: dict[str, Any], teacher_batch: int, options: dict[str, Any]
) -> None:
    whole = SDSDistiller(clip, teacher, sds_weight=1.0, seed=2, **options).double()
    pieces = SDSDistiller(
        copy.deepcopy(clip), copy.deepcopy(teacher), sds_weight=1.0, seed=2, teacher_batch=teacher_batch, **options
    ).double()
    pieces.projector.load_state_dict(whole.projector.state_dict())
    batch["images"] = batch["images"].double()
    expected, found = _gradients(whole, batch), _gradients(pieces, batch)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_teacher_sees_no_more_latents_than_its_batch(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    sizes = []
    predict = teacher.predict

    def record(noised: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(noised))
        return predict(noised, *rest)

    teacher.predict = record
    SDSDistiller(clip, teacher, teacher_batch=3)(**batch)
    assert sizes == [3, 1]


def test_gradient_of_the_weighted_sum_is_the_sum_of_gradients(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    """The cut in the graph must not lose the weight."""
    both = SDSDistiller(clip, teacher, sds_weight=0.3, seed=2).double()
    batch["images"] = batch["images"].double()
    total = _gradients(both, batch)
    both.seeds = SeedStream(2)
    both.zero_grad()
    both(**batch).sds.backward()
    sds = {name: parameter.grad.clone() for name, parameter in both.trained_parameters().items() if "visual" in name}
    both.zero_grad()
    both(**batch).contrastive.backward()
    assert len(sds) == 12
    for name, gradient in sds.items():
        contrastive = both.get_parameter(name).grad
        torch.testing.assert_close(total[name], contrastive + 0.3 * gradient, rtol=1e-9, atol=1e-12)


class _Scorer:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.calls: list[tuple[Tensor, Any, int]] = []

    def score_latents(self, latents: Tensor, captions: Any, *, seed: Tensor) -> Tensor:
        self.calls.append((latents, captions, int(seed)))
        return self.scores


def _ranking_by_hand(clip: Any, batch: dict[str, Any], candidate_tokens: Tensor, targets: Tensor) -> float:
    images = _unit(clip.encode_image(batch["images"]))
    texts = np.stack([_unit(clip.encode_text(row)) for row in candidate_tokens])
    logits = float(np.exp(clip.logit_scale.item())) * np.einsum("nd,nkd->nk", images, texts)
    log_share = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = targets.double().numpy()
    terms = np.where(target > 0, target * (np.log(np.where(target > 0, target, 1)) - log_share), 0)
    return float(terms.sum(axis=1).mean())


def test_ranking_by_the_teachers_scores(clip: Any, batch: dict[str, Any], candidate_tokens: Tensor) -> None:
    scores = 0.01 * torch.rand(4, 3)
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0)
    out = distiller(**batch, candidate_tokens=candidate_tokens, candidate_scores=scores)
    weights = (-scores / 0.005).exp()
    targets = weights / weights.sum(dim=1, keepdim=True)
    assert out.ranking.item() == pytest.approx(_ranking_by_hand(clip, batch, candidate_tokens, targets), rel=1e-4)


def test_ranking_by_labels_is_the_control(clip: Any, batch: dict[str, Any], candidate_tokens: Tensor) -> None:
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0)
    out = distiller(**batch, candidate_tokens=candidate_tokens, candidate_labels=torch.tensor([0, 2, 1, 0]))
    targets = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert out.ranking.item() == pytest.approx(_ranking_by_hand(clip, batch, candidate_tokens, targets), rel=1e-4)


def test_ranking_is_the_mean_over_images_with_candidates(
    clip: Any, batch: dict[str, Any], candidate_tokens: Tensor
) -> None:
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0)
    labels = torch.zeros(len(candidate_tokens), dtype=torch.int64)
    each = [
        distiller(**batch, candidate_tokens=candidate_tokens[row, None], candidate_labels=labels[:1],
                  candidate_rows=torch.tensor([row])).ranking.item()
        for row in range(2)
    ]  # fmt: skip
    assert each[0] != pytest.approx(each[1], rel=1e-3)
    rows = torch.tensor([1, 0])
    both = distiller(**batch, candidate_tokens=candidate_tokens[rows], candidate_labels=labels[:2], candidate_rows=rows)
    assert both.ranking.item() == pytest.approx(sum(each) / 2, rel=1e-5)
    assert distiller(**batch, candidate_rows=torch.tensor([], dtype=torch.int64)).ranking.item() == 0


def test_ranking_scored_now_is_ranking_by_those_scores(
    clip: Any, batch: dict[str, Any], candidate_tokens: Tensor
) -> None:
    scores, latents = 0.01 * torch.rand(4, 3), torch.randn(4, 4, 8, 8)
    scorer: Any = _Scorer(scores)
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0, scorer=scorer)
    batch["candidate_tokens"] = candidate_tokens
    now = [distiller(**batch, candidate_captions=CANDIDATES, latents=latents).ranking.item() for _ in range(2)]
    given = distiller(**batch, candidate_scores=scores).ranking.item()
    assert now == [given, given]
    assert scorer.calls[0][0] is latents and scorer.calls[0][1] is CANDIDATES
    assert scorer.calls[0][2] != scorer.calls[1][2]  # fresh noise at every step


def test_ranking_with_a_real_scorer(clip: Any, teacher: Any, batch: dict[str, Any], candidate_tokens: Tensor) -> None:
    latents = torch.randn(4, 4, 8, 8)
    scorer = DiffusionScorer(teacher, draws=2)
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0, scorer=scorer, seed=9)
    out = distiller(**batch, candidate_tokens=candidate_tokens, candidate_captions=CANDIDATES, latents=latents)
    scores = scorer.score_latents(latents, CANDIDATES, seed=SeedStream(9).next(torch.device("cpu")))
    images = clip.encode_image(batch["images"], normalize=True)
    texts = clip.encode_text(candidate_tokens.flatten(0, 1), normalize=True).view(4, 3, -1)
    expected = ranking_loss(images, texts, clip.logit_scale.exp(), soft_targets(scores, 0.005))
    assert out.ranking.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scores.std(dim=1).min() > 0


@pytest.mark.parametrize("normalize", [True, False])
def test_fitted_projector_maps_images_to_their_latents(clip: Any, teacher: Any, normalize: bool) -> None:
    images = torch.randn(48, 3, 32, 32)
    distiller = SDSDistiller(clip, teacher, normalize=normalize)
    with torch.no_grad():
        embedding = clip.encode_image(images, normalize=normalize)
        mixing = torch.randn(embedding.shape[1], 4 * 8 * 8)
        latents = (embedding @ mixing + 0.05 * torch.randn(48, 256)).view(48, 4, 8, 8)
        before = (distiller.projector(embedding) - latents).square().mean()
    before_clip = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    share = distiller.fit_projector(zip(images.split(20), latents.split(20), strict=True))
    with torch.no_grad():
        after = (distiller.projector(embedding) - latents).square()
        variance = (latents - latents.mean(dim=0)).square()
    assert after.mean() < 0.1 * before
    assert share == pytest.approx(1 - (after.sum() / variance.sum()).item(), abs=1e-4)
    assert share > 0.5
    assert all(torch.equal(tensor, before_clip[name]) for name, tensor in clip.state_dict().items())
    assert all(parameter.requires_grad for parameter in distiller.projector.parameters())


def test_fitted_projector_lowers_the_sds_loss(clip: Any, teacher: Any, batch: dict[str, Any]) -> None:
    """With a teacher that is right about latents of one value, and wrong in proportion to the distance from it."""
    target = torch.full((4, 8, 8), 3.0)

    def predict(noised: Tensor, t: Tensor, text: Tensor) -> Tensor:
        alpha, sigma = teacher.schedule.alpha[t].view(-1, 1, 1, 1), teacher.schedule.sigma[t].view(-1, 1, 1, 1)
        noise = (noised - alpha * target) / sigma
        return alpha * noise - sigma * target  # v-prediction

    teacher.predict = predict
    distiller = SDSDistiller(clip, teacher, draws=4, strategy="stratified")
    before = distiller(**batch).sds.item()
    distiller.fit_projector([(batch["images"], target.repeat(4, 1, 1, 1))])
    assert distiller(**batch).sds.item() < 1e-6 < before


def test_projector_exists_only_with_the_loss(clip: Any, teacher: Any) -> None:
    with pytest.raises(ValueError, match="sds_weight: the projector exists only where it is above 0"):
        SDSDistiller(clip, teacher, sds_weight=0).fit_projector([])


def _resnet_clip() -> Any:
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        text_cfg={"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
    )


def _statistics(clip: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in clip.named_buffers() if "running_" in name or "num_batch" in name}


@pytest.mark.parametrize("tune", ["layernorm", r"visual\.layer4\.0\.bn1\."])
@pytest.mark.parametrize("prepare", [lambda distiller: distiller, lambda distiller: distiller.eval().train()])
def test_frozen_batch_norms_keep_their_statistics(tune: str, prepare: Callable[[Any], Any]) -> None:
    clip = _resnet_clip().train()
    before = _statistics(clip)
    distiller = prepare(SDSDistiller(clip, None, sds_weight=0, tune=tune))
    tokens = torch.randint(1, 600, (4, 16))
    distiller(torch.randn(4, 3, 32, 32), tokens, [""] * 4).loss.backward()
    changed = {name for name, buffer in _statistics(clip).items() if not torch.equal(buffer, before[name])}
    tuned = "visual.layer4.0.bn1."
    assert len(before) > 30
    assert changed == (
        set()
        if tune == "layernorm"
        else {tuned + end for end in ("running_mean", "running_var", "num_batches_tracked")}
    )


def test_evaluation_mode_holds_for_tuned_batch_norms_too() -> None:
    clip = _resnet_clip()
    distiller = SDSDistiller(clip, None, sds_weight=0, tune="all").eval()
    assert not any(module.training for module in distiller.modules())
    assert all(module.training for module in distiller.train().clip.modules())


def test_teacher_stays_in_evaluation_mode(clip: Any, teacher: Any) -> None:
    distiller = SDSDistiller(clip, teacher).train()
    assert clip.training and not any(module.training for module in teacher.modules())
    assert distiller.teacher is teacher


def test_checkpoints_of_the_same_distiller_are_accepted(clip: Any, teacher: Any) -> None:
    recorded = SDSDistiller(clip, teacher).identity()
    SDSDistiller(copy.deepcopy(clip), None, sds_weight=0).require_identity(recorded)


def test_checkpoints_of_another_choice_of_parameters_are_refused(clip: Any) -> None:
    recorded = SDSDistiller(copy.deepcopy(clip), None, sds_weight=0, tune="layernorm").identity()
    with pytest.raises(
        ModelMismatchError, match="it tunes 22 of CLIP's parameters and this distiller 1; use the `tune`"
    ):
        SDSDistiller(clip, None, sds_weight=0, tune="^logit_scale$").require_identity(recorded)


def test_checkpoints_of_another_activation_are_refused(clip: Any) -> None:
    recorded = SDSDistiller(clip, None, sds_weight=0).identity()
    recorded["clip"]["activation"] = "QuickGELU"
    with pytest.raises(ModelMismatchError, match="activation was 'QuickGELU'"):
        SDSDistiller(clip, None, sds_weight=0).require_identity(recorded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sds_on": "audio"}, r"sds_on: expected one of \('image', 'text', 'both'\), got 'audio'"),
        ({"sds_weight": -1.0}, "sds_weight: expected a number >= 0, got -1.0"),
        ({"sds_weight": float("nan")}, "sds_weight: expected a number >= 0, got nan"),
        ({"ranking_weight": float("inf")}, "ranking_weight: expected a number >= 0, got inf"),
        ({"ranking_temperature": 0.0}, "ranking_temperature: expected a number > 0, got 0.0"),
        ({"sds_weight": 0.5}, "teacher: expected a DiffusionTeacher, because sds_weight is 0.5, got None"),
        ({"sds_weight": 0, "tune": "lora"}, "tune: 'lora' matches none"),
    ],
)
def test_options_outside_their_range_are_refused(clip: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDSDistiller(clip, None, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(4, 3, 16, 32)},
            r"\[batch, 3, 32, 32\] as the CLIP .* got torch.float32 \[4, 3, 16, 32\]",
        ),
        ({"images": torch.zeros(4, 1, 32, 32)}, r"got torch.float32 \[4, 1, 32, 32\]; apply its preprocessing"),
        ({"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)}, r"expected floating point .* got torch.uint8"),
        ({"images": torch.zeros(3, 3, 32, 32)}, "got 3 images, 4 token rows and 4 captions"),
        ({"captions": CAPTIONS[:2]}, "captions: expected one per image, got 4 images, 4 token rows and 2 captions"),
        ({"tokens": TOKENS[0, :1].repeat(5, 1)}, "got 4 images, 5 token rows and 4 captions"),
        (
            {"tokens": torch.zeros(4, models.CONTEXT_LENGTH, dtype=torch.int64, device="meta")},
            "images, tokens: expected on the CLIP model's device cpu, got cpu and meta",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    clip: Any, batch: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SDSDistiller(clip, None, sds_weight=0)(**{**batch, **change})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "candidate_tokens: expected in every batch, because ranking_weight is above 0, got None"),
        ({"candidate_tokens": TOKENS}, "candidate_scores: ranking needs just one of"),
        (
            {"candidate_tokens": TOKENS, "candidate_scores": torch.zeros(4, 3), "candidate_labels": torch.zeros(4)},
            "candidate_scores: ranking needs just one of",
        ),
        (
            {"candidate_tokens": TOKENS, "candidate_captions": CANDIDATES, "latents": torch.zeros(4, 4, 8, 8)},
            "candidate_captions: scoring them now needs latents in the batch and a scorer",
        ),
    ],
)
def test_ranking_without_what_it_needs_is_refused(
    clip: Any, batch: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0)(**batch, **columns)


def test_scoring_now_needs_latents(clip: Any, batch: dict[str, Any], candidate_tokens: Tensor) -> None:
    scorer: Any = _Scorer(torch.zeros(4, 3))
    distiller = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0, scorer=scorer)
    with pytest.raises(ValueError, match="scoring them now needs latents"):
        distiller(**batch, candidate_tokens=candidate_tokens, candidate_captions=CANDIDATES)
