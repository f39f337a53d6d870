"""The keyed random numbers: their distribution, and that they depend only on (seed, epoch, index)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import augment

INDICES = np.arange(81 * 400)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10_000), count=st.integers(1, 300))
def test_permutation_holds_each_index_once_and_depends_on_seed_and_epoch(seed: int, epoch: int, count: int) -> None:
    order = augment.permutation(seed, epoch, count)
    assert sorted(order) == list(range(count))
    if count > 20:  # two equal orders of 20 by chance: 1 in 20!
        assert not np.array_equal(order, augment.permutation(seed, epoch + 1, count))
        assert not np.array_equal(order, augment.permutation(seed + 1, epoch, count))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_a_row_depends_only_on_its_index(indices: list[int], seed: int, epoch: int) -> None:
    together = augment.uniform(seed, epoch, np.array(indices), 3)
    alone = [augment.uniform(seed, epoch, np.array([i]), 3)[0] for i in indices]
    np.testing.assert_array_equal(together, alone)
    assert ((together >= 0) & (together < 1)).all()


def test_uniform_draws_are_uniform_and_uncorrelated() -> None:
    u = augment.uniform(7, 3, INDICES, 4)
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(u.var(0), 1 / 12, atol=0.002)
    neighbours = np.hstack(
        [u[:-1], u[1:], augment.uniform(7, 4, INDICES, 4)[1:], augment.uniform(8, 3, INDICES, 4)[1:]]
    )
    correlation = np.corrcoef(neighbours.T) - np.eye(16)
    assert np.abs(correlation).max() < 0.03  # 5 standard errors of 32,400 pairs


def test_each_of_the_81_positions_is_equally_likely() -> None:
    start, mirror = augment.crop_and_flip(0, 0, INDICES, 4, flip=True)
    counts = np.bincount(start[:, 0] * 9 + start[:, 1], minlength=81)
    assert len(counts) == 81
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 138  # 80 degrees of freedom: exceeded by chance in 1 of 20,000 cases
    assert abs(mirror.mean() - 0.5) < 0.015


@pytest.mark.parametrize("flip", [True, False])
def test_mirror_only_where_it_keeps_the_label(flip: bool) -> None:
    assert augment.crop_and_flip(0, 0, INDICES, 4, flip)[1].any() == flip
    assert augment.resized_crop(0, 0, INDICES, flip)[1].any() == flip


def test_each_operation_of_trivial_augment_is_equally_likely_and_keyed() -> None:
    found = augment.trivial(7, 3, INDICES)
    identity = np.broadcast_to(np.eye(2, 3, dtype=np.float32), found.matrix.shape)
    changed = {
        "geometry": ~np.isclose(found.matrix, identity, atol=1e-6).all((1, 2)),
        "colour": (found.colour != 1).any(1),
        "posterize": found.bits[:, 0] != 255,
        "solarize": found.threshold[:, 0] != 255,
    }
    assert np.max(sum(mask.astype(int) for mask in changed.values())) == 1, "an image gets one operation"
    for name, operations in (("geometry", 5), ("colour", 3), ("posterize", 1), ("solarize", 1)):
        # The lowest of 31 levels changes nothing; posterize also keeps all bits at the next two.
        share = operations / 11 * (28 / 31 if name == "posterize" else 30 / 31)
        assert changed[name].mean() == pytest.approx(share, abs=0.01), name
    assert found.colour.min() == pytest.approx(0.01, abs=1e-3)
    assert found.colour.max() == pytest.approx(1.99, abs=1e-3)
    alone = augment.trivial(7, 3, INDICES[5:6])
    assert all(np.array_equal(one[0], whole[5]) for one, whole in zip(alone, found, strict=True))


def test_resized_crop_keeps_to_its_ranges_and_fills_them() -> None:
    box, mirror = augment.resized_crop(0, 0, INDICES, flip=True)
    np.testing.assert_allclose(box.min(0), [0.08, 3 / 4, 0, 0], atol=0.001)
    np.testing.assert_allclose(box.max(0), [1, 4 / 3, 1, 1], atol=0.001)
    assert np.median(box[:, 1]) == pytest.approx(1, abs=0.01)  # as often wide as tall
    assert augment.resized_crop(0, 0, INDICES, True, min_area=0.5)[0][:, 0].min() == pytest.approx(0.5, abs=0.001)
    assert abs(mirror.mean() - 0.5) < 0.015
