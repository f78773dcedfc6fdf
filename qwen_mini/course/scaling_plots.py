"""The figures of chapter 11, drawn from plain data: what they show is the chapter's, how they are drawn is not."""

import numpy as np

from .figures import COLORS, palette

LINES = {64: ":", 128: "-", 256: "--"}  # of batches


def rate_axis(ax, rates) -> None:
    """A logarithmic axis with every second rate as a tick."""
    ax.set_xscale("log")
    ax.set_xticks(rates[::2], [f"{rate:.3g}" for rate in rates[::2]])
    ax.minorticks_off()
    ax.set_xlabel("learning rate")


def show_basins(cells, horizons) -> None:
    """Losses of cells (N, D, B, rates, losses) over the rate at these horizons, a panel for each N."""
    import matplotlib.pyplot as plt

    sizes = sorted({cell["N"] for cell in cells})
    _, axes = plt.subplots(1, len(sizes), figsize=(8, 3), sharey=True, squeeze=False)
    for cell in (cell for cell in cells if cell["D"] in horizons):
        ax, color = axes[0, sizes.index(cell["N"])], palette(8)[horizons.index(cell["D"])]
        label = f"{cell['D']:,} tokens" if cell["B"] == 128 else None
        style = LINES.get(cell["B"], "-.")
        ax.plot(cell["rates"], cell["losses"], style, marker=".", color=color, label=label)
        ax.set_title(f"N = {cell['N']:,}")
        rate_axis(ax, cell["rates"])
    axes[0, 0].set_ylabel("held-out loss, nats")
    axes[0, -1].legend(fontsize=7)
    plt.show()


def show_approaches(runs, approaches) -> None:
    """Losses over N at each budget, and the exponents {name: {"exponent", "interval"}} of N*."""
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), width_ratios=[1.2, 1])
    for flops, color in zip(sorted({run["flops"] for run in runs}), palette(8), strict=False):
        group = sorted((run["N"], run["loss"]) for run in runs if run["flops"] == flops)
        left.semilogx(*zip(*group, strict=True), ".-", color=color, label=f"{flops:.0e}")
    left.set(xlabel="parameters N, without table", ylabel="held-out loss, nats")
    left.legend(title="FLOPs", fontsize=7, title_fontsize=7)
    drawn = {name: one for name, one in approaches.items() if "exponent" in one}
    for place, (name, one) in enumerate(drawn.items()):
        color = palette(2)[name.endswith("table")]
        right.plot(one["interval"], [place, place], color=color)
        right.plot(one["exponent"], place, "o", color=color)
    right.set_yticks(range(len(drawn)), drawn, fontsize=8)
    right.set(xlabel="exponent of N*(C), 90 % interval")
    plt.show()


def show_check(arms, losses, prediction, points) -> None:
    """The local sweep around a prediction: mean and spread over seeds; and the predicted loss beside the measured one.

    arms: {name: {"batch", "rates"}}; losses: {name: (seeds, rates)}, the first arm holds the prediction in its middle;
    points: (points, 3), N, D and loss of the runs behind the law.
    """
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), width_ratios=[1.3, 1])
    for (name, arm), color in zip(arms.items(), palette(8), strict=False):
        local, label = name.startswith("batch"), f"batch {arm['batch']:,}"
        label = label if local else f"{name}, {label}"
        drawn = {"fmt": "o-" if local else "X", "ms": 4, "color": color, "label": label}
        mean, spread = losses[name].mean(0), losses[name].std(0, ddof=1)
        left.errorbar(arm["rates"], mean, spread, **drawn)
    first, black = next(iter(arms)), COLORS["black"]
    middle = losses[first].shape[1] // 2
    measured = losses[first][:, middle].mean()
    left.plot(prediction["rate"], measured, "o", ms=11, mfc="none", color=black)
    left.axvspan(*prediction["rate interval"], color="0.9", zorder=0)
    rate_axis(left, arms[first]["rates"])
    left.set(xlabel="learning rate; grey: predicted interval", ylabel="held-out loss, nats")
    for N in np.unique(points[:, 0]):
        right.semilogx(*points[points[:, 0] == N, 1:].T, ".-", label=f"N = {N:,.0f}")
    low, high = prediction["loss interval"]
    half = [[prediction["loss"] - low], [high - prediction["loss"]]]
    drawn = {
        "fmt": "s",
        "ms": 13,
        "mfc": "none",
        "color": black,
        "capsize": 4,
        "label": f"predicted, N = {prediction['N']:,}",
    }
    right.errorbar(prediction["D"], prediction["loss"], half, **drawn)
    right.plot(prediction["D"], measured, "*", ms=11, color=COLORS["vermillion"], label="measured")
    right.set_xlabel("tokens D")
    for ax in (left, right):
        ax.legend(fontsize=7)
    plt.show()


def show_widths(widths, rates, changes, losses) -> None:
    """For each form: change of the logits (widths, steps) over the width, and losses (widths, rates) over the rate."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 4, figsize=(9, 2.8), width_ratios=[1, 1, 1.3, 1.3])
    for index, name in enumerate(changes):
        left, right = axes[index], axes[2 + index]
        for step, values in enumerate(changes[name].T):
            color = plt.cm.cividis(step / 4)
            left.loglog(widths, values, ".-", color=color, label=f"step {step + 1}")
        left.set(xlabel="width", title=f"{name}: change", ylim=(0.2, 3))
        left.set_xticks(widths, widths)
        left.set_yticks([0.3, 1, 3], ["0.3", "1", "3"])
        left.minorticks_off()
        for width, values in zip(widths, losses[name], strict=True):
            right.plot(rates, values, ".-", label=f"width {width}")
        rate_axis(right, rates)
        right.set_title(f"{name}: loss")
    axes[0].set_ylabel("RMS change of logits")
    axes[2].set_ylabel("held-out loss, nats")
    axes[0].legend(fontsize=7)
    axes[3].legend(fontsize=7)
    plt.show()
