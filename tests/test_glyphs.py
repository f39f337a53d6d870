"""The embedded data set: shape, balance, seeds, labels that match the images, and its cost."""

import time

import numpy as np
import pytest

from engine.data.glyphs import CHARACTERS, SIZE, render


@pytest.mark.parametrize("count", [0, 1, 36, 501, 1000])
def test_shapes_and_balance(count: int) -> None:
    images, labels = render(count, seed=0)
    assert images.shape == (count, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=len(CHARACTERS))
    assert len(counts) == 36
    assert counts.max() - counts.min() <= 1


def test_the_seed_decides_every_pixel() -> None:
    images, labels = render(600, seed=3)
    again, labels_again = render(600, seed=3)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    other, other_labels = render(600, seed=4)
    assert not np.array_equal(labels, other_labels)
    assert (images == other).mean() < 0.05
    assert len(np.unique(images.reshape(600, -1), axis=0)) == 600


def test_labels_match_the_images_and_a_linear_classifier_is_not_enough() -> None:
    train, y_train = render(3000, seed=0)
    test, y_test = render(1000, seed=1)

    def features(images: np.ndarray) -> np.ndarray:
        grey = images.mean(-1)[:, ::2, ::2].reshape(len(images), -1)
        grey = grey - grey.mean(1, keepdims=True)
        return grey / grey.std(1, keepdims=True)

    x = features(train)
    weights = np.linalg.solve(x.T @ x + 300 * np.eye(x.shape[1]), x.T @ np.eye(36)[y_train])
    accuracy = (np.argmax(features(test) @ weights, 1) == y_test).mean()
    assert 0.10 < accuracy < 0.60  # chance is 0.028


def test_fifteen_thousand_take_less_than_fifteen_seconds_of_one_core() -> None:
    start = time.process_time()
    render(1500, seed=0)
    assert time.process_time() - start < 1.5
