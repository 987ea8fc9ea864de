from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsds.sdsclip import LatentProjector

SHAPE = (2, 3, 4)
WIDTH = 5


def _pairs(count: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) + 2  # a mean that the bias must take
    y = x @ torch.randn(WIDTH, 24, generator=generator, dtype=torch.float64) + 7
    y = y + noise * torch.randn(count, 24, generator=generator, dtype=torch.float64)
    return x, y.view(count, *SHAPE)


def _ridge_by_augmented_rows(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of `|y - x W - b|^2 + n ridge s |W|^2` by least squares on rows `sqrt(n ridge s) I` added."""
    count, width = x.shape
    penalty = np.sqrt(count * ridge * x.var(axis=0).mean())
    rows = np.block([[x, np.ones((count, 1))], [penalty * np.eye(width), np.zeros((width, 1))]])
    targets = np.concatenate([y, np.zeros((width, y.shape[1]))])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return solution[:-1], solution[-1]


def _projector() -> LatentProjector:
    return LatentProjector(WIDTH, SHAPE).double()


def test_vit_b_32_and_stable_diffusion_have_the_papers_size() -> None:
    with torch.device("meta"):
        projector = LatentProjector(512, (4, 64, 64))
        out = projector(torch.empty(2, 512))
    assert out.shape == (2, 4, 64, 64)
    sizes = sorted(parameter.numel() for parameter in projector.parameters())
    assert sizes == [16_384, 8_388_608]


def test_latent_elements_come_in_row_major_order() -> None:
    projector = _projector()
    with torch.no_grad():
        projector.linear.weight.zero_()
        projector.linear.bias.copy_(torch.arange(24.0))
    out = projector(torch.zeros(1, WIDTH, dtype=torch.float64))
    assert out[0, 1, 2, 3] == 23 and out[0, 0, 0, 1] == 1 and out[0, 0, 1, 0] == 4 and out[0, 1, 0, 0] == 12


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.5])
def test_ridge_is_the_penalised_least_squares_solution(ridge: float) -> None:
    x, y = _pairs(60)
    projector = _projector()
    projector.fit_ridge([(x, y)], ridge)
    weight, bias = _ridge_by_augmented_rows(x.numpy(), y.flatten(1).numpy(), ridge)
    np.testing.assert_allclose(projector.linear.weight.detach().numpy().T, weight, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(projector.linear.bias.detach().numpy(), bias, rtol=1e-9, atol=1e-10)


def test_batches_of_any_size_give_what_one_batch_gives() -> None:
    x, y = _pairs(60)
    whole, streamed = _projector(), _projector()
    share = whole.fit_ridge([(x, y)])
    streamed_share = streamed.fit_ridge(zip(x.split([1, 30, 29]), y.split([1, 30, 29]), strict=True))
    torch.testing.assert_close(streamed.linear.weight, whole.linear.weight, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(streamed.linear.bias, whole.linear.bias, rtol=1e-10, atol=1e-11)
    assert streamed_share == pytest.approx(share, rel=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.5])
def test_share_explained_is_that_of_the_residuals(ridge: float) -> None:
    x, y = _pairs(60, noise=2.0)
    projector = _projector()
    share = projector.fit_ridge([(x, y)], ridge)
    with torch.no_grad():
        residual = (projector(x) - y).square().sum()
    total = (y - y.mean(dim=0)).square().sum()
    assert share == pytest.approx(1 - (residual / total).item(), rel=1e-9)
    assert 0 < share < 0.999


def test_bias_is_not_penalised() -> None:
    x, y = _pairs(60)
    projector = _projector()
    projector.fit_ridge([(x, y)], ridge=1e9)
    # nothing is left of the weights then, and the best constant is the mean
    torch.testing.assert_close(projector.linear.bias.detach(), y.flatten(1).mean(dim=0), rtol=1e-6, atol=1e-6)
    assert projector.linear.weight.abs().max() < 1e-6


def test_penalty_is_relative_to_the_embeddings_variance() -> None:
    x, y = _pairs(60)
    small, large = _projector(), _projector()
    small.fit_ridge([(x, y)], 0.1)
    large.fit_ridge([(1000 * x, y)], 0.1)
    torch.testing.assert_close(1000 * large.linear.weight, small.linear.weight, rtol=1e-9, atol=1e-10)


def test_fewer_pairs_than_dimensions_still_have_a_solution() -> None:
    x, y = _pairs(3, noise=0.0)
    projector = _projector()
    assert projector.fit_ridge([(x, y)], 1e-6) == pytest.approx(1.0, abs=1e-3)
    assert projector.linear.weight.isfinite().all()


def test_float32_layer_is_solved_in_float64_and_stays_trainable() -> None:
    x, y = _pairs(60)
    projector = LatentProjector(WIDTH, SHAPE)
    projector.fit_ridge([(x.float(), y.float())])
    weight, _ = _ridge_by_augmented_rows(x.numpy(), y.flatten(1).numpy(), 1e-3)
    assert projector.linear.weight.dtype == torch.float32
    np.testing.assert_allclose(projector.linear.weight.detach().numpy().T, weight, rtol=1e-4, atol=1e-5)
    projector(x.float()).sum().backward()
    assert projector.linear.weight.grad is not None


@pytest.mark.parametrize("pairs", [[], [(torch.zeros(0, WIDTH), torch.zeros(0, *SHAPE))]])
def test_no_pairs_are_refused(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(ValueError, match="pairs: expected at least one batch, got none"):
        _projector().fit_ridge(pairs)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"), [((4, WIDTH + 1), (4, *SHAPE)), ((4, WIDTH), (4, 3, 2, 4)), ((4, WIDTH), (4, 24))]
)
def test_other_shapes_are_refused_with_both(x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    message = rf"expected \[batch, 5\] and \[batch, 2, 3, 4\], got \[{', '.join(map(str, x_shape))}\] and \[4, "
    with pytest.raises(ValueError, match=message):
        _projector().fit_ridge([(torch.randn(x_shape), torch.randn(y_shape))])


@pytest.mark.parametrize("count", [1, 8])
def test_embeddings_that_do_not_vary_are_refused_and_the_layer_is_left(count: int) -> None:
    projector = _projector()
    before = projector.linear.weight.clone()
    with pytest.raises(ValueError, match=f"expected embeddings that vary, got {count} with mean variance"):
        projector.fit_ridge([(torch.full((count, WIDTH), 0.3), torch.randn(count, *SHAPE))])
    assert torch.equal(projector.linear.weight, before)
