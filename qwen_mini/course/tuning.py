"""Learning rates: each arm of a comparison gets its own, from runs on a grid."""

import functools
from collections.abc import Callable, Mapping, Sequence

from .records import experiments
from .show import table


def tune(
    kind: str, learn: Callable, arms: Mapping[str, dict], grids: Mapping[str, Sequence[float]], seed: int = 1_000,
) -> dict[str, float]:  # fmt: skip
    """Arm → the rate of its grid with the lowest "loss" of `learn(arm=…, learning_rate=…, seed=…)`.

    Shows all losses, and for each arm whether the lowest lies inside its grid: only then was the grid wide enough.
    """
    found = experiments({
        f"{kind}: tune {name} {rate}": functools.partial(learn, arm=arms[name], learning_rate=rate, seed=seed)
        for name, grid in grids.items() for rate in grid
    }, tolerance=0.2)  # fmt: skip
    best, rows = {}, []
    for name, grid in grids.items():
        losses = {rate: found[f"{kind}: tune {name} {rate}"]["loss"] for rate in sorted(grid)}
        best[name] = min(losses, key=losses.get)
        inside = min(losses) < best[name] < max(losses)
        place = (
            "inside the grid" if inside else "at an end of the grid" if grid[1:] else "not tuned"
        )
        rows.append(
            {"loss at the learning rate": name} | {f"{r:g}": loss for r, loss in losses.items()}
        )
        rows[-1]["lowest"] = place
    rates = sorted({rate for grid in grids.values() for rate in grid})
    columns = ["loss at the learning rate", *(f"{rate:g}" for rate in rates), "lowest"]
    table(rows, columns, {f"{rate:g}": ".3f" for rate in rates})
    return best
