"""Seeds that go on after a checkpoint where they stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from fastsds.diffusion import SeedStream

CPU = torch.device("cpu")


def _seeds(stream: SeedStream, count: int) -> list[int]:
    return [int(stream.next(CPU)) for _ in range(count)]


def test_seeds_are_fresh_int64_scalars() -> None:
    stream = SeedStream(3)
    seed = stream.next(CPU)
    assert seed.dtype == torch.int64
    assert seed.shape == ()
    assert len({int(seed), *_seeds(stream, 100)}) == 101


def test_streams_of_one_seed_agree_and_of_another_do_not() -> None:
    assert _seeds(SeedStream(3), 10) == _seeds(SeedStream(3), 10)
    assert not set(_seeds(SeedStream(3), 10)) & set(_seeds(SeedStream(4), 10))


def test_seeds_use_more_than_32_bits() -> None:
    seeds = _seeds(SeedStream(), 50)
    assert max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) == 50


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    SeedStream().next(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_round_trip(tmp_path: Path) -> None:
    """Through a file, into a stream that was built with another seed and has already drawn."""
    stream = SeedStream(3)
    _seeds(stream, 5)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = _seeds(stream, 5)
    resumed = SeedStream(8)
    _seeds(resumed, 2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert _seeds(resumed, 5) == expected


def test_saved_state_does_not_move_with_the_stream() -> None:
    stream = SeedStream(3)
    _seeds(stream, 1)
    state = stream.state_dict()
    expected = _seeds(stream, 3)
    _seeds(stream, 10)
    stream.load_state_dict(state)
    assert _seeds(stream, 3) == expected


def test_a_state_taken_before_the_first_draw_carries_the_seed() -> None:
    state = SeedStream(41).state_dict()
    other = SeedStream(-7)
    other.load_state_dict(state)
    device = torch.device("cpu")
    assert other.next(device) == SeedStream(41).next(device)
    assert other.next(device) != SeedStream(-7).next(device)
