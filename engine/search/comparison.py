"""How sure an accuracy is, how far two networks differ on the same test images, and what that says of a search."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from engine.trial import hits_from_text

Json = dict[str, Any]

# Two accuracies differ if their difference is more than this many of its standard errors.
CLEAR = 2.0
# The winner counts as smaller from this share of the other's multiply-accumulates on.
SMALLER = 0.9


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy (0..1) on that many images."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def standard_error_of_mean(accuracies: Sequence[float], images: int) -> float:
    """Standard error of the mean accuracy (0..1) of repeated trainings, all scored on the same images.

    The mean depends on the images that were drawn (the binomial error, which repeats do not reduce) and on the seeds.
    """
    binomial = standard_error(statistics.mean(accuracies), images)
    seeds = statistics.variance(accuracies) / len(accuracies) if len(accuracies) > 1 else 0.0
    return math.sqrt(binomial**2 + seeds)


def with_error(value: float, error: float, digits: int = 1, sign: str = "") -> str:
    """A fraction of 1 in percent, with its standard error, for people; `sign` is that of format()."""
    return f"{100 * value:{sign}.{digits}f} \N{PLUS-MINUS SIGN} {100 * error:.{digits}f}"


def images_in(hits: str) -> int:
    """The number of images that `hits` (engine.trial.hits_to_text) covers."""
    return len(hits_from_text(hits))


def difference(one: str, other: str) -> tuple[float, float]:
    """Accuracy (0..1) of the first network minus that of the second, with its standard error.

    The arguments are what the networks got right on the same images (engine.trial.hits_to_text). The error is that of
    the mean of the paired differences, -1, 0 or 1 for each image: it is small if the networks fail on the same images.
    """
    pairs = [a - b for a, b in zip(hits_from_text(one), hits_from_text(other), strict=True)]
    mean = sum(pairs) / len(pairs)
    variance = sum(pair**2 for pair in pairs) / len(pairs) - mean**2
    return mean, math.sqrt(max(0.0, variance) / len(pairs))


def verdict(final: Json, baselines: list[Json], left_out: str, classes: int) -> str:
    """Whether the search was worth it, in one sentence: the finished winner against the best baseline that meets the
    limits of the search, or if there is none, against the best of the others.

    The rows are those of result.json; `left_out` says why there is no baseline. Where the winner is not clearly better
    than a guess among the `classes`, no comparison means anything.
    """
    trained = [row for row in baselines if "test_accuracy" in row]
    if not trained:
        failures = [f"{row['name']}: {row['status']}" for row in baselines]
        reason = f"every baseline failed ({', '.join(failures)})" if failures else left_out
        return f"Whether the search was worth it is not known: {reason}."
    if final["test_accuracy"] <= 1 / classes + CLEAR * standard_error(1 / classes, final["test_images"]):
        return (
            f"Whether the search was worth it is not known: on the {final['test_images']:,} test images the finished "
            f"winner is no better than a guess among {classes} classes; train for longer (--high.epochs, "
            "--final.epochs), or on more images."
        )
    best = max(trained, key=lambda row: (row["within_limits"], row["test_accuracy"]))
    if best.get("architecture") == final["architecture"]:
        return f"The search was not needed: its winner is the baseline '{best['name']}'."
    return _sentence(best, final["macs"] / best["macs"] if best["macs"] else None)


def _sentence(best: Json, ratio: float | None) -> str:
    gain, error = best["difference"], best["difference_standard_error"]
    name, smaller = f"the baseline '{best['name']}'", ratio is not None and ratio <= SMALLER
    points = f"{abs(100 * gain):.1f} points"
    size = f", at {ratio:.2f} times its multiply-accumulates" if ratio is not None else ""
    sure = f"(standard error of the difference {100 * error:.1f}, paired over {best['test_images']:,} test images)"
    if abs(gain) <= CLEAR * error:
        claim = "worth it for the size, as far as the test can tell" if smaller else "not shown to be worth it"
        found = f"as accurate as {name} within the error of the test, {100 * gain:+.1f} points {sure}{size}"
    elif gain > 0:
        claim = "worth it"
        found = f"{points} more accurate than {name} {sure}{size}"
    else:
        claim = "a trade of accuracy for size" if smaller else "not worth it"
        found = f"{points} less accurate than {name} {sure}{size}"
    return f"The search was {claim}: the finished winner is {found}."
