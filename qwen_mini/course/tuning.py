"""Learning rates: each arm of a comparison gets its own, from runs on a grid."""

import functools
from collections.abc import Callable, Mapping, Sequence

from .records import experiments
from .show import table


def tune(
    kind: str, learn: Callable, arms: Mapping[str, dict], grids: Mapping[str, Sequence[float]], seed: int = 1_000,
) -> dict[str, float]:  # fmt: skip
    """Arm → the rate of its grid with the lowest "loss" of `learn(arm=…, learning_rate=…, seed=…)`.

    Shows all losses, and for each arm whether the lowest lies inside its grid: only then was the grid wide enough. A
    grid of one rate is taken untried.
    """
    tried = {name: sorted(grid) for name, grid in grids.items() if len(grid) > 1}
    found = experiments({
        f"{kind}: tune {name} {rate}": functools.partial(learn, arm=arms[name], learning_rate=rate, seed=seed)
        for name, grid in tried.items() for rate in grid
    }, tolerance=0.2)  # fmt: skip
    best, rows, title = (
        {name: grid[0] for name, grid in grids.items()},
        [],
        "loss at the learning rate",
    )
    for name, grid in tried.items():
        losses = {rate: found[f"{kind}: tune {name} {rate}"]["loss"] for rate in grid}
        best[name] = min(losses, key=losses.get)
        inside = grid[0] < best[name] < grid[-1]
        place = "inside the grid" if inside else "at an end of the grid"
        rows.append(
            {title: name, **{f"{rate:g}": loss for rate, loss in losses.items()}, "lowest": place}
        )
    rates = [f"{rate:g}" for rate in sorted({rate for grid in tried.values() for rate in grid})]
    if rows:
        table(rows, [title, *rates, "lowest"], dict.fromkeys(rates, ".3f"))
    return best
