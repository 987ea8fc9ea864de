"""`sds_loss` against the textbook's unfactored residual, for every prediction type."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsds.ops import add_noise, guidance_scale_from_offset, sds_loss, sds_loss_and_gradients

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow"]
LOW_PRECISION = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SEED = 77
SHAPE = (3, 4, 3, 5)
DRAWS = 2


class Case:
    """Latents, coefficients, the noise and the teacher's ideal prediction, in float64."""

    def __init__(
        self, oracle: Any, prediction_type: str, *, shape: tuple[int, ...] = SHAPE, draws: int = DRAWS
    ) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(2)
        self.prediction_type = prediction_type
        self.seed = torch.tensor(SEED)
        self.latents = torch.randn(shape, generator=generator).double()
        angle = torch.rand(shape[0], draws, generator=generator).double() * 1.2 + 0.2
        self.alpha_t = angle.cos()
        self.sigma_t = 1 - self.alpha_t if prediction_type == "flow" else angle.sin()
        self.weight = torch.rand(shape[0], draws, generator=generator).double() + 0.5
        self.eps = oracle.noise(SEED, (shape[0], draws, *shape[1:]))
        self.perturbation = torch.randn(self.eps.shape, generator=generator).double()
        self.alpha, self.sigma = (
            coefficient.reshape(*coefficient.shape, *[1] * (len(shape) - 1))
            for coefficient in (self.alpha_t, self.sigma_t)
        )
        z = self.latents.unsqueeze(1)
        self.noised = self.alpha * z + self.sigma * self.eps
        self.ideal = {
            "epsilon": self.eps,
            "v_prediction": self.alpha * self.eps - self.sigma * z,
            "sample": z.expand_as(self.eps),
            "flow": self.eps - z,
        }[prediction_type]
        self.prediction = self.ideal + 0.3 * self.perturbation

    def residual(self, prediction: Tensor) -> Tensor:
        """`eps_hat - eps`, with `eps_hat` from the prediction and `z_t` alone, as a sampler would compute it."""
        eps_hat = {
            "epsilon": lambda: prediction,
            "v_prediction": lambda: self.alpha * prediction + self.sigma * self.noised,
            "sample": lambda: (self.noised - self.alpha * prediction) / self.sigma,
            "flow": lambda: self.noised + self.alpha * prediction,
        }[self.prediction_type]()
        return eps_hat - self.eps

    def loss(self, prediction: Tensor) -> Tensor:
        return self.weight * self.residual(prediction).square().flatten(2).mean(dim=2)

    def call(self, prediction: Tensor, latents: Tensor | None = None, **options: Any) -> Tensor:
        return sds_loss(
            prediction,
            self.latents if latents is None else latents,
            self.alpha_t,
            self.sigma_t,
            self.weight,
            self.seed,
            prediction_type=self.prediction_type,  # type: ignore[arg-type]
            **options,
        )


@pytest.fixture(params=PREDICTION_TYPES)
def case(oracle: Any, request: pytest.FixtureRequest) -> Case:
    return Case(oracle, request.param)


def test_value_is_the_textbooks(case: Case) -> None:
    loss = case.call(case.prediction)
    assert loss.dtype == torch.float64
    assert loss.shape == (3, 2)
    assert (loss > 1e-3).all()
    torch.testing.assert_close(loss, case.loss(case.prediction), rtol=1e-4, atol=0)


def test_ideal_prediction_has_no_loss(case: Case) -> None:
    """What remains is the rounding of the float32 normals."""
    loss = case.call(case.ideal)
    assert (loss < 1e-9).all()
    assert (case.call(case.ideal + 0.1) > 1e-4).all()


def test_weight_multiplies(case: Case) -> None:
    weighted = case.call(case.prediction)
    weight, case.weight = case.weight, torch.ones_like(case.weight)
    torch.testing.assert_close(weighted, weight * case.call(case.prediction), rtol=1e-12, atol=0)
    case.weight = torch.zeros_like(weight)
    assert torch.equal(case.call(case.prediction), torch.zeros(3, 2).double())


@pytest.mark.parametrize("scale", [1.0, 0.0, 7.5, -2.0])
def test_guidance(case: Case, scale: float) -> None:
    """diffusers' convention: uncond + scale * (text - uncond)."""
    uncond = case.ideal - 0.2 * case.perturbation.flip(0)
    loss = case.call(case.prediction, prediction_uncond=uncond, guidance_scale=scale)
    expected = case.loss(uncond + scale * (case.prediction - uncond))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-8)


def test_guidance_at_its_landmarks(case: Case) -> None:
    uncond = case.ideal - 0.2 * case.perturbation.flip(0)
    at = {scale: case.call(case.prediction, prediction_uncond=uncond, guidance_scale=scale) for scale in (0.0, 1.0)}
    torch.testing.assert_close(at[1.0], case.call(case.prediction), rtol=1e-12, atol=0)
    torch.testing.assert_close(at[0.0], case.call(uncond), rtol=1e-12, atol=0)


def test_guidance_scale_from_offset(case: Case) -> None:
    """The other convention: text + offset * (text - uncond)."""
    uncond = case.ideal - 0.2 * case.perturbation.flip(0)
    scale = guidance_scale_from_offset(6.5)
    assert scale == 7.5
    loss = case.call(case.prediction, prediction_uncond=uncond, guidance_scale=scale)
    torch.testing.assert_close(loss, case.loss(case.prediction + 6.5 * (case.prediction - uncond)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_gradients_in_float64(oracle: Any, case: Case, guided: bool, backend: str) -> None:
    small = Case(oracle, case.prediction_type, shape=(2, 2, 3))
    prediction, latents = small.prediction.requires_grad_(), small.latents.requires_grad_()
    uncond = (small.ideal.detach() - 0.2 * small.perturbation).requires_grad_()

    def loss(prediction: Tensor, latents: Tensor, *uncond: Tensor) -> Tensor:
        options = {"prediction_uncond": uncond[0], "guidance_scale": 2.5} if uncond else {}
        return small.call(prediction, latents, **options)

    leaves = (prediction, latents, *([uncond] if guided else []))
    interpreted = backend == "triton-cpu"  # which takes a second for a dozen calls
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=interpreted)


def test_gradient_in_the_latents_is_the_textbooks(case: Case) -> None:
    """At a fixed prediction, `z` enters the textbook's residual through `z_t` and, for epsilon, not at all."""
    latents = case.latents.clone().requires_grad_()
    loss = case.call(case.prediction, latents).sum()
    if case.prediction_type == "epsilon":
        assert not loss.requires_grad or torch.autograd.grad(loss, latents, allow_unused=True)[0] is None
        return
    (gradient,) = torch.autograd.grad(loss, latents)
    z = case.latents.clone().requires_grad_()
    case.noised = case.alpha * z.unsqueeze(1) + case.sigma * case.eps
    (expected,) = torch.autograd.grad(case.loss(case.prediction).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("guided", [False, True])
def test_skip_hands_the_residual_to_the_latents(case: Case, guided: bool) -> None:
    latents, prediction = case.latents.clone().requires_grad_(), case.prediction.clone().requires_grad_()
    uncond = (case.ideal - 0.2 * case.perturbation.flip(0)).requires_grad_()
    options: dict[str, Any] = {"prediction_uncond": uncond, "guidance_scale": 3.0} if guided else {}
    combined = uncond + 3.0 * (case.prediction - uncond) if guided else case.prediction
    upstream = torch.randn(3, 2).double()
    loss = case.call(prediction, latents, jacobian="skip", **options)
    gradients = torch.autograd.grad(loss, (latents, prediction, uncond), upstream, allow_unused=True)
    scale = (upstream * case.weight)[..., None, None, None]
    expected = (scale * case.residual(combined.detach())).sum(dim=1)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-5)
    assert gradients[1] is None
    assert gradients[2] is None


def test_full_and_skip_have_one_value_and_two_gradients(case: Case) -> None:
    values, gradients = [], []
    for jacobian in ("full", "skip"):
        latents = case.latents.clone().requires_grad_()
        prediction = case.prediction + latents.unsqueeze(1)
        loss = case.call(prediction, latents, jacobian=jacobian)
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(latents.grad)
    assert torch.equal(values[0], values[1])
    assert (gradients[0] - gradients[1]).abs().max() > 0.1 * gradients[1].abs().max()


@pytest.mark.parametrize("jacobian", ["full", "skip"])
@pytest.mark.parametrize("guided", [False, True])
def test_loss_and_gradients_in_one_pass_are_those_of_autograd(case: Case, jacobian: Any, guided: bool) -> None:
    uncond = (case.ideal - 0.2 * case.perturbation.flip(0)).requires_grad_() if guided else None
    options: dict[str, Any] = {"prediction_uncond": uncond, "guidance_scale": 2.5} if guided else {}
    prediction, latents = case.prediction.requires_grad_(), case.latents.requires_grad_()
    upstream = torch.randn(3, 2).double()
    loss = case.call(prediction, latents, jacobian=jacobian, **options)
    leaves = [leaf for leaf in (prediction, latents, uncond) if leaf is not None]
    expected = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    result = sds_loss_and_gradients(
        upstream, prediction, latents, case.alpha_t, case.sigma_t, case.weight, case.seed,
        prediction_type=case.prediction_type, jacobian=jacobian, **options,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, loss, rtol=1e-14, atol=0)  # a launch of another shape sums in another order
    for actual, wanted in zip(result[1:], (*expected, *[None] * (3 - len(expected))), strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_second_derivatives(case: Case, guided: bool) -> None:
    leaves = (case.prediction[:1, :, :1], case.latents[:1, :1], case.prediction[:1, :, :1] + 0.5)
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves[: 3 if guided else 2])
    draws = (case.alpha_t[:1], case.sigma_t[:1], case.weight[:1], case.seed)

    def loss(prediction: Tensor, latents: Tensor, uncond: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"prediction_uncond": uncond, "guidance_scale": 3.0} if guided else {}
        return sds_loss(prediction, latents, *draws, prediction_type=case.prediction_type, **options).square()

    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_results_are_dense_whatever_the_coefficients_are() -> None:
    latents, coefficients = torch.randn(3, 4), torch.rand(2, 3).t()
    loss = sds_loss(torch.randn(3, 2, 4), latents, coefficients, coefficients, coefficients, torch.tensor(1))
    assert loss.is_contiguous()


@pytest.mark.smoke
def test_noise_is_that_of_add_noise() -> None:
    """The residual of an epsilon prediction is zero at the noise that `add_noise` used, in one piece and in slices."""
    latents, seed, ones = torch.randn(4, 3, 5), torch.tensor(-9), torch.ones(4, 3)
    eps = add_noise(latents, 0 * ones, ones, seed)
    assert torch.equal(sds_loss(eps, latents, ones, ones, ones, seed), torch.zeros(4, 3))
    part = sds_loss(eps[2:], latents[2:], ones[2:], ones[2:], ones[2:], seed, batch_offset=2)
    assert torch.equal(part, torch.zeros(2, 3))
    assert (sds_loss(eps[2:], latents[2:], ones[2:], ones[2:], ones[2:], seed) > 0.5).all()


def test_slices_equal_the_whole(case: Case) -> None:
    whole, pieces = case.call(case.prediction), []
    full = {name: getattr(case, name) for name in ("latents", "alpha_t", "sigma_t", "weight")}
    for i in range(3):
        for name, value in full.items():
            setattr(case, name, value[i : i + 1])
        pieces.append(case.call(case.prediction[i : i + 1], batch_offset=i))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("latents_dtype", LOW_PRECISION)
def test_low_precision_inputs_are_summed_in_float32(case: Case, dtype: torch.dtype, latents_dtype: torch.dtype) -> None:
    """Against the textbook in float64 on the very same rounded inputs, so that only the op's own error is left."""
    latents = case.latents.to(latents_dtype)
    prediction = case.prediction.to(dtype).requires_grad_()
    case.latents = latents.double()
    case.noised = case.alpha * case.latents.unsqueeze(1) + case.sigma * case.eps
    exact = prediction.detach().double().requires_grad_()
    expected = case.loss(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    for name in ("alpha_t", "sigma_t", "weight"):
        setattr(case, name, getattr(case, name).float())
    loss = case.call(prediction, latents)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    error = (gradient.double() - expected_gradient).abs()
    # A float16 gradient may also be subnormal, where the step is constant.
    assert (error <= 1.01 * rounding * expected_gradient.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    ("prediction_type", "jacobian"),
    [
        (name, jacobian)
        for name in PREDICTION_TYPES
        for jacobian in ("full", "skip")
        if (name, jacobian) != ("epsilon", "full")  # no direct gradient in the latents there
    ],
)
def test_low_precision_gradient_in_the_latents(
    oracle: Any, prediction_type: str, jacobian: str, dtype: torch.dtype
) -> None:
    case = Case(oracle, prediction_type)
    latents = case.latents.to(dtype).requires_grad_()
    exact = latents.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(case.call(case.prediction, exact, jacobian=jacobian).sum(), exact)
    (gradient,) = torch.autograd.grad(case.call(case.prediction, latents, jacobian=jacobian).sum(), latents)
    assert gradient.dtype == dtype
    assert ((gradient.double() - expected).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 3e-5).all()


def test_memory_format_does_not_matter(case: Case) -> None:
    expected = case.call(case.prediction)
    latents = case.latents.to(memory_format=torch.channels_last).requires_grad_()
    prediction = case.prediction.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2))
    prediction.requires_grad_()
    assert not prediction.is_contiguous()
    loss = case.call(prediction, latents, jacobian="full")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    contiguous = case.prediction.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(case.call(contiguous).sum(), contiguous)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=0)


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """`[batch, (draws,) channels, height, width]` in a memory format."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=layout)
    return tensor.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, tensor.shape[:2])


@pytest.mark.parametrize("latents_layout", LAYOUTS)
@pytest.mark.parametrize("prediction_layout", LAYOUTS)
@pytest.mark.parametrize("uncond_layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "jacobian"), [((2, 4, 4, 6), "full"), ((2, 3, 2, 3), "full"), ((2, 4, 2, 6), "skip")]
)
def test_each_tensor_has_a_layout_of_its_own(
    oracle: Any,
    latents_layout: torch.memory_format,
    prediction_layout: torch.memory_format,
    uncond_layout: torch.memory_format,
    shape: tuple[int, ...],
    jacobian: Any,
) -> None:
    """Values do not depend on it, and each gradient lies as its tensor does."""
    case = Case(oracle, "v_prediction", shape=shape)
    uncond, upstream = case.ideal - 0.2 * case.perturbation.flip(0), torch.rand(2, 2).double() + 0.5

    def call(prediction: Tensor, latents: Tensor, uncond: Tensor) -> Any:
        return sds_loss_and_gradients(
            upstream, prediction, latents, case.alpha_t, case.sigma_t, case.weight, case.seed,
            prediction_type="v_prediction", prediction_uncond=uncond, guidance_scale=2.5, jacobian=jacobian,
        )  # fmt: skip

    expected = call(case.prediction.clone(), case.latents.clone(), uncond.clone())
    tensors = (
        _laid_out(case.prediction, prediction_layout),
        _laid_out(case.latents, latents_layout),
        _laid_out(uncond, uncond_layout),
    )
    actual = call(*tensors)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(expected.loss, case.loss(uncond + 2.5 * (case.prediction - uncond)), rtol=1e-4, atol=0)
    for tensor, gradient, wanted in zip(tensors, actual[1:], expected[1:], strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
            assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("latents_dtype", LOW_PRECISION)
def test_low_precision_in_channels_last(oracle: Any, dtype: torch.dtype, latents_dtype: torch.dtype) -> None:
    """The case of a channels-last teacher and contiguous latents: values and gradients as in float64, rounded once."""
    case = Case(oracle, "flow", shape=(2, 4, 4, 4))
    prediction = _laid_out(case.prediction, torch.channels_last).to(dtype)
    latents = case.latents.to(latents_dtype)
    case.latents, case.noised = latents.double(), case.alpha * latents.double().unsqueeze(1) + case.sigma * case.eps
    exact = prediction.double().requires_grad_()
    expected = case.loss(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    result = sds_loss_and_gradients(
        torch.ones(2, 2), prediction, latents,
        *(getattr(case, name).float() for name in ("alpha_t", "sigma_t", "weight")), case.seed, prediction_type="flow",
    )  # fmt: skip
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=2e-5, atol=1e-7)
    assert result.prediction.dtype == dtype
    error = (result.prediction.double() - expected_gradient).abs()
    assert (error <= 1.01 * torch.finfo(dtype).eps / 2 * expected_gradient.abs() + 2e-6).all()


@pytest.mark.parametrize("numel", [127, 128, 129, 2047, 2048, 2049, 2052, 4100])
def test_sizes_around_blocks(oracle: Any, numel: int) -> None:
    case = Case(oracle, "v_prediction", shape=(1, numel))
    prediction, latents = case.prediction.requires_grad_(), case.latents.clone().requires_grad_()
    loss = case.call(prediction, latents)
    textbook_prediction = case.prediction.detach().clone().requires_grad_()
    expected = case.loss(textbook_prediction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(prediction.grad, textbook_prediction.grad, rtol=1e-4, atol=1e-5 / numel)
    # At a fixed prediction, d residual / dz is alpha sigma, and d residual / d prediction is alpha.
    in_latents = (textbook_prediction.grad * case.sigma).sum(dim=1)
    torch.testing.assert_close(latents.grad, in_latents, rtol=1e-4, atol=1e-5 / numel)


@pytest.mark.parametrize("draws", [1, 3, 20, 70])
def test_any_number_of_draws(oracle: Any, draws: int) -> None:
    """One pass gives each draw its loss and sums the gradient in the latents over all of them."""
    case = Case(oracle, "epsilon", shape=(1, 10), draws=draws)
    latents = case.latents.clone().requires_grad_()
    loss = case.call(case.prediction, latents, jacobian="skip")
    torch.testing.assert_close(loss, case.loss(case.prediction), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), latents)
    expected = (case.weight[..., None] * case.residual(case.prediction)).sum(dim=1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_strided_tensors_with_sentinels_between(case: Case) -> None:
    """Views that skip elements: what lies between is neither read nor written."""
    expected = case.call(case.prediction)
    strided = {}
    for name in ("prediction", "latents", "alpha_t", "sigma_t", "weight"):
        value = getattr(case, name)
        buffer = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), 99.0).double()
        strided[name] = buffer[..., 1::2]
        strided[name].copy_(value)
        setattr(case, name, strided[name])
    befores = {name: view._base.clone() for name, view in strided.items()}
    loss = case.call(case.prediction.detach().requires_grad_(), case.latents.detach().requires_grad_())
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    for name, before in befores.items():
        assert torch.equal(strided[name]._base, before), name


@pytest.mark.parametrize("offset", [1, 3])
def test_views_and_inputs_left_alone(case: Case, offset: int) -> None:
    buffer = torch.full((case.prediction.numel() + 8,), 99.0).double()
    view = buffer[offset : offset + case.prediction.numel()].view(case.prediction.shape)
    view.copy_(case.prediction)
    before = buffer.clone()
    tensors = {name: getattr(case, name).clone() for name in ("latents", "alpha_t", "sigma_t", "weight", "seed")}
    prediction = view.detach().requires_grad_()
    loss = case.call(prediction, prediction_uncond=prediction.detach().flip(0), guidance_scale=2.0)
    loss.sum().backward()
    assert torch.equal(buffer, before)
    for name, value in tensors.items():
        assert torch.equal(getattr(case, name), value), name
    whole = case.call(case.prediction, prediction_uncond=case.prediction.flip(0), guidance_scale=2.0)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)


def test_upstream_gradient_is_not_written_to(case: Case) -> None:
    prediction, upstream = case.prediction.requires_grad_(), torch.randn(3, 2).double()
    before = upstream.clone()
    case.call(prediction).backward(upstream)
    assert torch.equal(upstream, before)


def test_empty_batch_and_single_elements(case: Case) -> None:
    options: dict[str, Any] = {"prediction_type": case.prediction_type}
    none, one = torch.ones(0, 2), torch.ones(1, 1)
    prediction = torch.ones(0, 2, 4, 3, 3, requires_grad=True)
    loss = sds_loss(prediction, torch.ones(0, 4, 3, 3), none, none, none, case.seed, **options)
    assert loss.shape == (0, 2)
    loss.sum().backward()
    assert prediction.grad is not None
    loss = sds_loss(torch.ones(1, 1, 1), torch.ones(1, 1), one, one, one, case.seed, **options)
    assert loss.shape == (1, 1)
    assert torch.isfinite(loss).all()


def test_zero_signal() -> None:
    """The last timestep of a zero terminal SNR schedule: v says nothing about eps there, and costs nothing."""
    latents, seed = torch.randn(2, 3), torch.tensor(1)
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    prediction = torch.randn(2, 1, 3, requires_grad=True)
    loss = sds_loss(prediction, latents, zero, one, one, seed, prediction_type="v_prediction")
    assert torch.equal(loss.detach(), zero)
    loss.sum().backward()
    assert torch.equal(prediction.grad, torch.zeros(2, 1, 3))


def test_more_than_2_31_elements_in_shape() -> None:
    """Of the fake, on any machine; `test_more_than_2_31_elements` runs it."""
    with FakeTensorMode():
        prediction, latents = torch.empty(3, 2, 2**29 + 1, dtype=torch.float16), torch.empty(3, 2**29 + 1)
        one, seed = torch.empty(3, 2), torch.empty((), dtype=torch.int64)
        result = sds_loss_and_gradients(one, prediction, latents, one, one, one, seed)
    assert result.loss.shape == (3, 2)
    assert result.prediction.shape == (3, 2, 2**29 + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 9 GB and seconds on a GPU, minutes on a CPU")
def test_more_than_2_31_elements(oracle: Any, backend: str) -> None:
    """The last of more than 2**31 elements: no index has wrapped around."""
    if backend != "triton-cuda":
        pytest.skip("of the GPU's kernels")
    batch, numel = 2**16 + 8, 2**15 + 4
    prediction = torch.zeros(batch, 1, numel, dtype=torch.bfloat16)
    one, latents = torch.ones(batch, 1), prediction[:, 0]
    result = sds_loss_and_gradients(one, prediction, latents, one, one, one, torch.tensor(SEED))
    eps = oracle.noise(SEED, (numel,), start=(batch - 1) * numel)
    torch.testing.assert_close(result.loss[-1, 0].double(), eps.square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.prediction[-1, 0].double(), -2 * eps / numel, rtol=2**-8, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_graph_replays_with_the_noise_of_the_seed_in_place(case: Case, backend: str) -> None:
    if backend != "triton-cuda":
        pytest.skip("of the GPU's kernels")
    case.call(case.prediction)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = case.call(case.prediction)
    replays = []
    for value in (5, 6):
        case.seed.fill_(value)
        graph.replay()
        assert torch.equal(loss, case.call(case.prediction))
        replays.append(loss.clone())
    assert case.prediction_type == "sample" or not torch.isclose(*replays).any()  # "sample" has no noise in it


@pytest.mark.parametrize("jacobian", ["full", "skip"])
@pytest.mark.parametrize("guided", [False, True])
def test_opcheck(oracle: Any, jacobian: str, guided: bool) -> None:
    case = Case(oracle, "v_prediction", shape=(2, 3, 2, 2))
    uncond = case.ideal.clone().requires_grad_() if guided else None
    torch.library.opcheck(
        torch.ops.fastsds.sds_loss.default,
        (
            case.prediction.requires_grad_(), case.latents.requires_grad_(), case.alpha_t, case.sigma_t, case.weight,
            case.seed, "v_prediction", uncond, 2.0 if guided else 1.0, jacobian, 1,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("needs", [[True, True, False], [False, True, False], [True, False, False]])
def test_opcheck_backward(oracle: Any, needs: list[bool]) -> None:
    case = Case(oracle, "flow", shape=(2, 3, 2, 2))
    torch.library.opcheck(
        torch.ops.fastsds.sds_loss_backward.default,
        (
            torch.randn(2, 2).double(), case.prediction.bfloat16(), case.latents, case.alpha_t, case.sigma_t,
            case.weight, case.seed, "flow", None, 1.0, "full", 0, needs,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("jacobian", "compiler"),
    [("full", "aot_eager"), ("skip", "aot_eager"), pytest.param("full", "inductor", marks=pytest.mark.slow)],
)
def test_compiles_as_one_graph(oracle: Any, jacobian: str, compiler: str) -> None:
    torch._dynamo.reset()
    case = Case(oracle, "v_prediction", shape=(2, 3, 2))

    def function(prediction: Tensor, latents: Tensor) -> Tensor:
        noised = add_noise(latents, case.alpha_t, case.sigma_t, case.seed)
        return case.call(prediction.sin() + noised, latents, jacobian=jacobian).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for run in (function, compiled):
        leaves = case.prediction.clone().requires_grad_(), case.latents.clone().requires_grad_()
        value = run(*leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    assert results[0][2] is not None
    assert (results[0][1] is None) == (jacobian == "skip")
    for eager, graph in zip(*results, strict=True):
        if eager is None:
            assert graph is None or not graph.any()
        else:
            torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": torch.ones(3, 2, 5)}, "prediction: expected [batch, draws, *latent] = [3, 2, 4], got [3, 2"),
        ({"prediction": torch.ones(3, 4)}, "prediction: expected [batch, draws, *latent] = [3, 2, 4], got [3, 4]"),
        ({"prediction": torch.ones(3, 2, 4).int()}, "prediction: expected one of [torch.float32, "),
        ({"prediction_uncond": torch.ones(1, 2, 4)}, "prediction_uncond: expected [batch, draws, *latent] = [3, 2, 4]"),
        ({"prediction_uncond": torch.ones(3, 2, 4).long()}, "prediction_uncond: expected one of "),
        ({"guidance_scale": 2.0}, "prediction_uncond: expected a tensor, because guidance_scale is 2.0, got None"),
        ({"latents": torch.ones(3)}, "latents: expected [batch, *latent], at least 2-D, got [3]"),
        ({"latents": torch.ones(3, 4).long()}, "latents: expected one of [torch.float32, "),
        ({"alpha_t": torch.ones(2, 2)}, "alpha_t: expected [batch=3, draws], got [2, 2]"),
        ({"sigma_t": torch.ones(3, 3)}, "sigma_t: expected the shape of alpha_t [3, 2], got [3, 3]"),
        ({"weight": torch.ones(3, 1)}, "weight: expected the shape of alpha_t [3, 2], got [3, 1]"),
        ({"weight": torch.ones(3, 2).half()}, "weight: expected one of [torch.float32, torch.float64], got torch"),
        ({"seed": torch.tensor(1.0)}, "seed: expected one int64 in a tensor, got shape [] of torch.float32"),
        ({"seed": torch.tensor([1, 2])}, "seed: expected one int64 in a tensor, got shape [2] of torch.int64"),
        ({"batch_offset": -2}, "batch_offset: expected at least 0, got -2"),
        ({"prediction_type": "v"}, "prediction_type: expected one of ('epsilon', 'v_prediction', 'sample', 'flow')"),
        ({"jacobian": "half"}, "jacobian: expected one of ('full', 'skip'), got 'half'"),
        ({"prediction": torch.ones(3, 2, 4, device="meta")}, "prediction: expected on the device of latents (cpu)"),
        ({"weight": torch.ones(3, 2, device="meta")}, "weight: expected on the device of latents (cpu), got meta"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "prediction": torch.ones(3, 2, 4),
        "latents": torch.ones(3, 4),
        **{name: torch.ones(3, 2) for name in ("alpha_t", "sigma_t", "weight")},
        "seed": torch.tensor(1),
    }
    message = message.replace("(cpu)", f"({arguments['latents'].device})")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        sds_loss(**{**arguments, **changes})
