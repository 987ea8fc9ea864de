"""The noise: known vectors, the map from elements to words, and that it is standard normal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fastsds.ops import philox

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, 12345, 2**40 + 17, 2**63 - 1, -1, -(2**63), -987654321]


def _integers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_VECTORS)
def test_known_vectors(oracle: Any, counter: str, key: str, expected: str) -> None:
    words = philox.philox4x32(
        [torch.tensor([word]) for word in _integers(counter)], [torch.tensor(word) for word in _integers(key)]
    )
    assert [word.item() for word in words] == _integers(expected)
    assert oracle.rounds([_integers(counter)], _integers(key)).tolist() == [_integers(expected)]


def test_random_counters_and_keys_match_the_oracle(oracle: Any) -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, size=(500, 4), dtype=np.uint64)
    key = rng.integers(0, 2**32, size=2, dtype=np.uint64)
    words = philox.philox4x32(
        torch.from_numpy(counters.astype(np.int64)).unbind(1), torch.from_numpy(key.astype(np.int64)).unbind()
    )
    assert np.array_equal(torch.stack(words, 1).numpy(), oracle.rounds(counters, key))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 3])
def test_words_of_a_stream(oracle: Any, seed: int, stream: int) -> None:
    words = philox.words(torch.tensor(seed), 11, stream)
    assert np.array_equal(words.numpy(), oracle.words(seed, 11, stream=stream))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 7, 2**31 + 1, 2**34 - 5, 2**34 + 3, 2**40 + 2])
def test_element_takes_lane_of_counter(oracle: Any, seed: int, start: int) -> None:
    """Starts that are no multiple of four, and counters at and past 2**32 (elements at 2**34)."""
    normals = philox.normal(torch.tensor(seed), (2, 3, 3), start=start)
    assert normals.dtype == torch.float32
    torch.testing.assert_close(normals.double(), oracle.noise(seed, (2, 3, 3), start=start), rtol=0, atol=5e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_counts_that_do_not_fill_a_block(count: int) -> None:
    seed = torch.tensor(5)
    assert torch.equal(philox.normal(seed, (count,)), philox.normal(seed, (64,))[:count])
    assert torch.equal(philox.words(seed, count, 0), philox.words(seed, 64, 0)[:count])


def test_uniforms_stay_where_the_logarithm_is_finite() -> None:
    extreme = philox._uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert extreme[0] > 0
    assert extreme[-1] <= 1
    assert torch.isfinite(torch.log(extreme)).all()


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_moments_and_distribution(seed: int) -> None:
    count = 400_000
    sample = philox.normal(torch.tensor(seed), (count,)).double().numpy()
    # Four standard errors of each moment of a normal sample.
    assert abs(sample.mean()) < 4 / count**0.5
    assert abs(sample.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(stats.skew(sample)) < 4 * (6 / count) ** 0.5
    assert abs(stats.kurtosis(sample)) < 4 * (24 / count) ** 0.5
    assert stats.kstest(sample, "norm").pvalue > 0.005
    assert np.abs(sample).max() > 4.2  # the tails are there


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 4096])
def test_elements_are_uncorrelated(lag: int) -> None:
    sample = philox.normal(torch.tensor(11), (200_000,)).double().numpy()
    for left, right in [(sample[:-lag], sample[lag:]), (sample[:-lag] ** 2, sample[lag:] ** 2)]:
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / len(left) ** 0.5


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**63 - 1, -1])
def test_seeds_are_uncorrelated(other: int) -> None:
    """Neighbouring seeds, and seeds that differ only in their high word."""
    one, two = (philox.normal(torch.tensor(seed), (200_000,)).double().numpy() for seed in (0, other))
    assert not np.array_equal(one, two)
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / len(one) ** 0.5


def test_streams_differ() -> None:
    seed = torch.tensor(3)
    streams = [
        philox.words(seed, 10_000, stream).double().numpy()
        for stream in (philox.NOISE_STREAM, philox.JITTER_STREAM, philox.ORDER_STREAM, philox.ROTATION_STREAM)
    ]
    correlation = np.corrcoef(streams)
    assert np.abs(correlation - np.eye(4)).max() < 4 / 10_000**0.5


def test_words_are_uniform() -> None:
    words = philox.words(torch.tensor(9), 256_000, philox.JITTER_STREAM).numpy()
    for shift in (0, 24):
        assert stats.chisquare(np.bincount((words >> shift) & 0xFF, minlength=256)).pvalue > 0.005


def test_replay_is_exact() -> None:
    seed = torch.tensor(-12345)
    first = philox.normal(seed, (5, 7))
    assert torch.equal(first, philox.normal(seed.clone(), (5, 7)))
    assert seed.item() == -12345
