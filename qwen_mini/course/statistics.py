"""Intervals, errors and times of what notebooks measure."""

import math
import time
from collections.abc import Callable, Mapping, Sequence


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (95 % at the default z) for a rate of which `share` was seen in `n` trials (E. B. Wilson, 1927).

    ValueError for no trial.
    """
    if n < 1:
        raise ValueError("an interval needs one trial or more")
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_interval(right: Sequence[int]) -> tuple[float, float, float]:
    """(share, low, high) of ones among zeros and ones, with Wilson's interval. ValueError for no trial."""
    if not len(right):
        raise ValueError("an interval needs one trial or more")
    share = sum(right) / len(right)
    return share, *wilson_interval(share, len(right))


def standard_errors(right: Sequence[int], rate: float) -> float:
    """By how many standard errors the share of ones is off `rate`, if that were the true one.

    ValueError for no trial or a rate that is not between 0 and 1.
    """
    if not len(right) or not 0 < rate < 1:
        raise ValueError(f"needs a trial and a rate in (0, 1), got {len(right)} and {rate}")
    return abs(sum(right) / len(right) - rate) / math.sqrt(rate * (1 - rate) / len(right))


def grouped(labels: Sequence[str], values: Sequence) -> dict[str, list]:
    """The values of every label, labels in the order in which they first occur."""
    pairs = list(zip(labels, values, strict=True))
    return {name: [v for at, v in pairs if at == name] for name in dict.fromkeys(labels)}


def next_alike(labels: Sequence) -> list[int]:
    """For every place the next one with the same label; for the last one of a label its first: an only one follows itself."""
    places: dict = {}
    for i, label in enumerate(labels):
        places.setdefault(label, []).append(i)
    after = {}
    for some in places.values():
        after |= zip(some, some[1:] + some[:1], strict=True)
    return [after[i] for i in range(len(labels))]


# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom, from any table of them.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few independent values, and half the width of its 95 % interval by Student's t.

    ValueError unless there are 2 to 10 of them.
    """
    n = len(values)
    if not 2 <= n <= len(STUDENT) + 1:
        raise ValueError(f"an interval wants 2 to {len(STUDENT) + 1} values, got {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, STUDENT[n - 2] * math.sqrt(variance / n)


def best_seconds(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds that each call takes at its best: all take turns, so that what slows the machine slows all of them."""
    best = dict.fromkeys(work, math.inf)
    for _ in range(rounds):
        for name, call in work.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best
