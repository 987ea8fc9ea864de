"""Test sets hold what they claim, and no split shares scenes' pictures with another."""

from __future__ import annotations

import pytest
import torch

from fastsds.toyworld.tasks import SINGLE_SHARE, composition_pairs, single_things, training_scenes


@pytest.mark.parametrize("swap", ["relation", "attribute"])
def test_captions_of_a_pair_hold_the_same_words(swap: str) -> None:
    pairs = composition_pairs(swap, 50)  # type: ignore[arg-type]
    assert pairs.images.shape == (50, 2, 3, 32, 32)
    for first, second in pairs.captions:
        assert first != second
        assert sorted(first.split()) == sorted(second.split())


def test_splits_differ_and_replay() -> None:
    test, again, validation = (composition_pairs("relation", 20, split) for split in ("test", "test", "validation"))
    assert test.captions == again.captions
    assert torch.equal(test.images, again.images)
    assert test.captions != validation.captions


def test_single_things_carry_class_and_attribute() -> None:
    things = single_things(300)
    assert len(things.classnames) == len(set(things.classnames)) == 36
    assert set(things.attributes) == {"small", "large"}
    assert len(set(things.labels.tolist())) == 36


def test_candidates_hold_the_truth_at_a_random_place() -> None:
    scenes = training_scenes(400)
    labels = []
    for caption, row, label in zip(scenes.captions, scenes.candidates, scenes.labels.tolist(), strict=True):
        if row is not None:
            assert row[label] == caption
            assert sorted(row[1 - label].split()) == sorted(caption.split())
            assert row[1 - label] != caption
            labels.append(label)
    assert abs(len(labels) / 400 - (1 - SINGLE_SHARE)) < 0.1
    assert 0.4 < sum(labels) / len(labels) < 0.6


def test_unstated_captions_tell_nothing_of_the_candidates_order() -> None:
    stated, unstated = training_scenes(400), training_scenes(400, relation_stated=False)
    assert torch.equal(stated.images, unstated.images)
    assert stated.candidates == unstated.candidates
    pairs = [row for row, caption in enumerate(unstated.captions) if " and " in caption]
    assert abs(len(pairs) / 400 - (1 - SINGLE_SHARE)) < 0.1
    assert not any(word in caption for caption in unstated.captions for word in ("left", "right", "above", "below"))
    # The thing that is named first in the caption opens the true candidate: the order of mention must not decide.
    openings = [
        unstated.candidates[row][unstated.labels[row]].startswith(unstated.captions[row].split(" and ")[0])  # type: ignore[index]
        for row in pairs
    ]
    assert 0.4 < sum(openings) / len(openings) < 0.6
