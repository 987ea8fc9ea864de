"""`SDSLoss` against its formula written out with the bare U-Net, and the promises about memory."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds.diffusion import DiffusionTeacher, NoiseSchedule, SDSLoss
from fastsds.diffusion import loss as loss_module
from fastsds.ops import philox, sample_timesteps
from fastsds.toyworld import models

CAPTIONS = ["a red circle", "a blue square", "a green triangle"]
SEED = torch.tensor(21)


@pytest.fixture(params=["v_prediction", "epsilon"])
def double_teacher(request: pytest.FixtureRequest, teacher: DiffusionTeacher) -> DiffusionTeacher:
    scheduler = diffusers.DDIMScheduler(**{**models.SCHEDULER_CONFIG, "prediction_type": request.param})
    teacher._schedule = NoiseSchedule.from_scheduler(scheduler)
    return teacher.double()


@pytest.fixture
def teacher64(teacher: DiffusionTeacher) -> DiffusionTeacher:
    return teacher.double()


def _latents(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 4, 8, 8, dtype=torch.float64).to(dtype).requires_grad_()


def _by_hand(
    teacher: DiffusionTeacher,
    latents: Tensor,
    draws: int,
    weights: Tensor,
    t_range: tuple[int, int] | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss, with plain autograd behind it, and every draw's `w(t) (eps_hat - eps)`: one U-Net call per draw."""
    draw = sample_timesteps(teacher.schedule, len(latents), draws, SEED, t_range=t_range)
    eps = philox.normal(SEED, (len(latents), draws, *latents.shape[1:])).double()
    text, unconditional = (teacher.encode_text(captions).embeddings for captions in (CAPTIONS[: len(latents)], [""]))
    alpha_bar = diffusers.DDIMScheduler(**models.SCHEDULER_CONFIG).alphas_cumprod.double()
    losses, residuals = [], []
    for i in range(len(latents)):
        for d in range(draws):
            t = draw.t[i, d]
            alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
            noised = alpha * latents[i : i + 1] + sigma * eps[i, d][None]
            output = teacher.unet(noised, t, encoder_hidden_states=text[i : i + 1]).sample
            if guidance_scale != 1:
                without = teacher.unet(noised, t, encoder_hidden_states=unconditional).sample
                output = without + guidance_scale * (output - without)
            eps_hat = output if teacher.schedule.prediction_type == "epsilon" else alpha * output + sigma * noised
            residual = eps_hat - eps[i, d]
            losses.append(weights[t] * residual.square().mean())
            residuals.append(weights[t] * residual.detach()[0])
    return torch.stack(losses).mean(), torch.stack(residuals).unflatten(0, (len(latents), draws))


OPTIONS: list[dict[str, Any]] = [
    {"draws": 1},
    {"draws": 2, "weighting": "sds", "t_range": (100, 800)},
    {"draws": 2, "guidance_scale": 3.0},
    {"draws": 2, "guidance_scale": 0.0, "weighting": torch.linspace(1, 2, 1000)},
]


def _reference(teacher: DiffusionTeacher, latents: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    weighting = options.get("weighting", "uniform")
    noise = 1 - diffusers.DDIMScheduler(**models.SCHEDULER_CONFIG).alphas_cumprod.double()
    weights = {"uniform": torch.ones(1000), "sds": noise}[weighting] if isinstance(weighting, str) else weighting
    return _by_hand(
        teacher, latents, options["draws"], weights, options.get("t_range"), options.get("guidance_scale", 1.0)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted range", "guided", "unconditional, own weights"])
def test_full_jacobian_is_plain_backpropagation(double_teacher: DiffusionTeacher, options: dict[str, Any]) -> None:
    latents = _latents()
    expected, _ = _reference(double_teacher, latents, options)
    (expected_gradient,) = torch.autograd.grad(expected, latents)
    loss = SDSLoss(double_teacher, **options)(latents, CAPTIONS, seed=SEED)
    (gradient,) = torch.autograd.grad(loss, latents)
    assert loss.dtype == torch.float64
    # The schedule's tables are float32.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted range", "guided", "unconditional, own weights"])
def test_skipped_jacobian_is_the_residual(double_teacher: DiffusionTeacher, options: dict[str, Any]) -> None:
    latents = _latents()
    expected, residuals = _reference(double_teacher, latents, options)
    loss = SDSLoss(double_teacher, jacobian="skip", **options)(latents, CAPTIONS, seed=SEED)
    (gradient,) = torch.autograd.grad(loss, latents)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected_gradient = residuals.sum(dim=1) / (3 * options["draws"])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max().item())
    (full,) = torch.autograd.grad(
        SDSLoss(double_teacher, jacobian="full", **options)(latents, CAPTIONS, seed=SEED), latents
    )
    assert (full - gradient).abs().max() > 0.1 * gradient.abs().max()


@pytest.mark.parametrize("jacobian", ["full", "skip"])
@pytest.mark.parametrize("teacher_batch", [1, 2, 3, 7])
def test_pieces_equal_the_whole(teacher64: DiffusionTeacher, jacobian: Any, teacher_batch: int) -> None:
    options: dict[str, Any] = {"draws": 2, "guidance_scale": 2.0, "jacobian": jacobian, "strategy": "stratified"}
    latents = _latents()
    whole = SDSLoss(teacher64, **options)(latents, CAPTIONS, seed=SEED)
    pieces = SDSLoss(teacher64, teacher_batch=teacher_batch, **options)(latents, CAPTIONS, seed=SEED)
    (expected,), (gradient,) = (torch.autograd.grad(loss, latents) for loss in (whole, pieces))
    assert abs(pieces - whole) <= 1e-10 * whole
    assert (gradient - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("teacher_batch", [1, 2, 3, None])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_largest_unet_call_is_the_teacher_batch(
    teacher: DiffusionTeacher, teacher_batch: int | None, guidance_scale: float
) -> None:
    """Guidance needs two predictions of each noised latent, in one call."""
    sizes: list[int] = []
    teacher.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    loss = SDSLoss(teacher, draws=2, teacher_batch=teacher_batch, guidance_scale=guidance_scale)
    loss(_latents(dtype=torch.float32), CAPTIONS)
    each = 2 * (1 if guidance_scale == 1.0 else 2)
    assert max(sizes) == each * (teacher_batch or 3)
    assert sum(sizes) == each * 3


@pytest.fixture
def watch_predictions(monkeypatch: pytest.MonkeyPatch) -> Callable[[DiffusionTeacher], list[Any]]:
    """Records a weak reference to each U-Net output, whether it has a graph, and its gradient's size."""

    def watch(teacher: DiffusionTeacher) -> list[Any]:
        seen: list[Any] = []
        predict = teacher.predict

        def watched(*args: Any) -> Tensor:
            output = predict(*args)
            record = {"reference": weakref.ref(output), "graph": output.requires_grad, "rms": None}
            if output.requires_grad:
                output.register_hook(lambda gradient: record.update(rms=gradient.float().square().mean().sqrt().item()))
            seen.append(record)
            return output

        monkeypatch.setattr(teacher, "predict", watched)
        return seen

    return watch


@pytest.mark.parametrize("jacobian", ["full", "skip"])
def test_no_graph_of_the_unet_is_kept(
    teacher: DiffusionTeacher, watch_predictions: Callable[[DiffusionTeacher], list[Any]], jacobian: Any
) -> None:
    seen = watch_predictions(teacher)
    loss = SDSLoss(teacher, jacobian=jacobian, teacher_batch=1)(_latents(dtype=torch.float32), CAPTIONS)
    assert loss.requires_grad
    assert [record["graph"] for record in seen] == [jacobian == "full"] * 3
    gc.collect()
    assert all(record["reference"]() is None for record in seen)
    loss.backward()
    assert len(seen) == 3  # the teacher is not called again


@pytest.mark.parametrize("how", ["no_grad", "latents without gradient"])
def test_value_alone(
    teacher: DiffusionTeacher, watch_predictions: Callable[[DiffusionTeacher], list[Any]], how: str
) -> None:
    latents = _latents(dtype=torch.float32)
    expected = SDSLoss(teacher)(latents, CAPTIONS, seed=SEED)
    seen = watch_predictions(teacher)
    with torch.set_grad_enabled(how != "no_grad"):
        loss = SDSLoss(teacher)(latents if how == "no_grad" else latents.detach(), CAPTIONS, seed=SEED)
    assert not loss.requires_grad
    assert not any(record["graph"] for record in seen)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("teacher_batch", [1, 3])
def test_gradients_inside_the_cut_are_of_order_one(
    teacher: DiffusionTeacher,
    watch_predictions: Callable[[DiffusionTeacher], list[Any]],
    size: int,
    teacher_batch: int,
) -> None:
    """Whatever the number of elements, latents and draws, which would otherwise divide them."""
    seen = watch_predictions(teacher)
    latents = torch.randn(3, 4, size, size, requires_grad=True)
    SDSLoss(teacher, draws=2, teacher_batch=teacher_batch, t_range=(300, 400))(latents, CAPTIONS)
    assert all(0.3 < record["rms"] < 10 for record in seen)


def test_upstream_gradient_multiplies(teacher64: DiffusionTeacher) -> None:
    latents = _latents()
    loss = SDSLoss(teacher64)(latents, CAPTIONS, seed=SEED)
    (plain,) = torch.autograd.grad(loss, latents, retain_graph=True)
    (scaled,) = torch.autograd.grad(-1e-3 * loss, latents)
    torch.testing.assert_close(scaled, -1e-3 * plain, rtol=1e-12, atol=0)


def test_gradient_flows_on_into_what_made_the_latents(teacher64: DiffusionTeacher) -> None:
    features, projector = torch.randn(3, 5).double(), torch.nn.Linear(5, 256).double()
    latents = projector(features).view(3, 4, 8, 8)
    loss = SDSLoss(teacher64, teacher_batch=2)(latents, CAPTIONS, seed=SEED)
    (at_cut,) = torch.autograd.grad(loss, latents, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(projector.weight.grad, at_cut.flatten(1).T @ features, rtol=1e-10, atol=1e-14)
    assert all(parameter.grad is None for parameter in teacher64.parameters())


def test_second_derivative_is_refused(teacher: DiffusionTeacher) -> None:
    latents = _latents(dtype=torch.float32)
    loss = SDSLoss(teacher)(latents, CAPTIONS)
    (gradient,) = torch.autograd.grad(loss.square(), latents, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("jacobian", ["full", "skip"])
@pytest.mark.parametrize("latents_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16])
def test_low_precision(
    teacher: DiffusionTeacher, jacobian: Any, latents_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    """Near the float32 teacher's loss and gradient; a gradient that underflowed would not point the same way."""
    latents = _latents(dtype=latents_dtype)
    options: dict[str, Any] = {"draws": 2, "jacobian": jacobian, "t_range": (200, 900)}
    exact = latents.detach().float().requires_grad_()
    expected = SDSLoss(teacher, **options)(exact, CAPTIONS, seed=SEED)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    loss = SDSLoss(teacher.to(teacher_dtype), **options)(latents, CAPTIONS, seed=SEED)
    (gradient,) = torch.autograd.grad(loss, latents)
    assert loss.dtype == torch.float32
    assert gradient.dtype == latents_dtype
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    difference = (gradient.float() - expected_gradient).norm() / expected_gradient.norm()
    assert difference < (0.05 if teacher_dtype == torch.bfloat16 else 0.01)


def test_captions_equal_their_embeddings(teacher64: DiffusionTeacher) -> None:
    loss, latents = SDSLoss(teacher64, guidance_scale=2.0), _latents()
    by_text = loss(latents, CAPTIONS, seed=SEED)
    assert torch.equal(loss(latents, teacher64.encode_text(CAPTIONS), seed=SEED), by_text)
    other = loss(latents, CAPTIONS[::-1], seed=SEED)
    assert abs(other - by_text) > 1e-6 * by_text


def test_every_call_draws_fresh_noise_that_can_be_replayed(teacher: DiffusionTeacher) -> None:
    latents = _latents(dtype=torch.float32)
    first, second = (SDSLoss(teacher, seed=5) for _ in range(2))
    values = [first(latents, CAPTIONS).item() for _ in range(4)]
    assert len(set(values)) == 4
    assert [second(latents, CAPTIONS).item() for _ in range(4)] == values
    assert SDSLoss(teacher, seed=6)(latents, CAPTIONS).item() not in values
    one, again = (first(latents, CAPTIONS, seed=SEED) for _ in range(2))
    assert torch.equal(one, again)
    # A replay takes no seed from the stream.
    third = SDSLoss(teacher, seed=5)
    third(latents, CAPTIONS, seed=SEED)
    assert third(latents, CAPTIONS).item() == values[0]


@pytest.mark.parametrize("strategy", ["uniform", "stratified"])
def test_processes_draw_one_global_batch(
    teacher64: DiffusionTeacher, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    """Two processes of two latents average to the loss of one process with all four."""
    latents, captions = _latents(4), [*CAPTIONS, "a small cube"]
    loss = SDSLoss(teacher64, draws=2, strategy=strategy, teacher_batch=1)
    whole = loss(latents, captions, seed=SEED)
    (expected,) = torch.autograd.grad(whole, latents)
    monkeypatch.setattr(loss_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loss_module.dist, "get_world_size", lambda: 2)
    losses, gradients = [], []
    for rank in range(2):
        monkeypatch.setattr(loss_module.dist, "get_rank", lambda rank=rank: rank)
        mine = latents[2 * rank : 2 * rank + 2].detach().requires_grad_()
        losses.append(loss(mine, captions[2 * rank : 2 * rank + 2], seed=SEED))
        gradients.append(torch.autograd.grad(losses[-1], mine)[0])
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat(gradients) / 2, expected, rtol=1e-8, atol=1e-12)


def test_latents_are_not_written_to(teacher: DiffusionTeacher) -> None:
    latents = _latents(dtype=torch.float32)
    before = latents.detach().clone()
    SDSLoss(teacher, teacher_batch=2)(latents, CAPTIONS).backward()
    assert torch.equal(latents, before)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_better_latents_have_a_lower_loss(teacher64: DiffusionTeacher) -> None:
    """A step against the full gradient, under the same draw, lowers the loss as the gradient promises."""
    latents = _latents()
    loss = SDSLoss(teacher64, draws=2)
    before = loss(latents, CAPTIONS, seed=SEED)
    (gradient,) = torch.autograd.grad(before, latents)
    step = 1e-4
    after = loss((latents - step * gradient).detach(), CAPTIONS, seed=SEED)
    torch.testing.assert_close(before.detach() - after, step * gradient.square().sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(3, 3, 8, 8), "got torch.float32 [3, 3, 8, 8]"),
        (torch.zeros(4, 8, 8), "got torch.float32 [4, 8, 8]"),
        (torch.zeros(0, 4, 8, 8), "got torch.float32 [0, 4, 8, 8]"),
        (torch.zeros(3, 4, 8, 8).long(), "got torch.int64 [3, 4, 8, 8]"),
    ],
)
def test_refused_latents(teacher: DiffusionTeacher, latents: Tensor, message: str) -> None:
    expected = "latents: expected floating point [batch, 4, height, width] as the teacher takes, batch at least 1, "
    with pytest.raises(ValueError, match=re.escape(expected + message)):
        SDSLoss(teacher)(latents, CAPTIONS[: len(latents)])


def test_latents_on_another_device_are_refused(teacher: DiffusionTeacher) -> None:
    with pytest.raises(
        ValueError, match=r"latents: expected on the teacher's device cpu, got meta; move one with \.to"
    ):
        SDSLoss(teacher)(torch.zeros(3, 4, 8, 8, device="meta"), CAPTIONS)


@pytest.mark.parametrize("text", [CAPTIONS[:2], [*CAPTIONS, "a"], torch.zeros(1, models.CONTEXT_LENGTH, 64)])
def test_refused_number_of_captions(teacher: DiffusionTeacher, text: Any) -> None:
    with pytest.raises(ValueError, match=rf"text: expected one caption for each of 3 latents, got {len(text)}"):
        SDSLoss(teacher)(_latents(dtype=torch.float32), text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws: expected at least 1, got 0"),
        ({"teacher_batch": 0}, ValueError, "teacher_batch: expected at least 1 or None, got 0"),
        ({"strategy": "sobol"}, RuntimeError, "strategy: expected one of"),
        ({"jacobian": "half"}, RuntimeError, "jacobian: expected one of"),
        ({"weighting": "dreamfusion"}, ValueError, "weighting: expected one of"),
        ({"t_range": (0, 1001)}, RuntimeError, "t_range: expected 0 <= first < end <= 1000 timesteps, got (0, 1001)"),
        ({"t_range": (0.02, 0.98)}, TypeError, "t_range: expected two timesteps (int, int), got (0.02, 0.98)"),
    ],
)
def test_refused_options(
    teacher: DiffusionTeacher, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SDSLoss(teacher, **options)(_latents(dtype=torch.float32), CAPTIONS)
