"""The figures of chapter 06, drawn from plain data: what they show is the chapter's, how they are drawn is not."""

from .figures import COLORS
from .statistics import mean_interval


def show_comparison(facts, text, leads) -> None:
    """Facts known by run, loss of finished runs, and the lead of experts: means over seeds with 95 % intervals.

    facts: {run: [for each seed]}; text, leads: {name: {tokens: [for each seed]}}, arms in the order of the runs.
    """
    import matplotlib.pyplot as plt

    def draw(ax, found, color, label=None):
        mean, half = zip(*map(mean_interval, found.values()), strict=True)
        ax.errorbar(list(found), mean, half, fmt="o-", capsize=4, color=color, label=label)

    _, (known, loss, ahead) = plt.subplots(1, 3, figsize=(11, 3.2))
    paint = [COLORS[name] for name in ("blue", "orange", "green", "sky")]
    for place, (values, color) in enumerate(zip(facts.values(), paint, strict=True)):
        draw(known, {place: values}, color)
    known.set_xticks(range(4), ["dense\nactive", "experts", "dense\ntotal", "active,\nlonger"])
    known.set(ylabel="facts known", title="facts: mean, 95 % interval", xlim=(-0.5, 3.5))
    both = [COLORS["blue"], COLORS["vermillion"]]
    for ax, lines, colors in ((loss, text, paint), (ahead, leads, both)):
        for (name, found), color in zip(lines.items(), colors[: len(lines)], strict=True):
            draw(ax, {tokens / 1e6: values for tokens, values in found.items()}, color, name)
        ax.set(xlabel="million tokens of a run")
        ax.legend()
    loss.set(ylabel="loss on final, nats a token", title="text: finished runs")
    ahead.axhline(0, color="grey", lw=1)
    ahead.set(ylabel="loss of dense less loss of experts", title="text: above 0, experts lead")
    plt.show()


def show_loads(looks, steps: int) -> None:
    """Shares of the choices by domain, {domain: [for each expert]} at ten evenly spaced steps, 1 = an equal share."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(looks[0]), figsize=(11, 2.6), sharey=True)
    for ax, name in zip(axes, looks[0], strict=True):
        grid = np.array([look[name] for look in looks]) * len(looks[0][name])
        image = ax.imshow(grid, aspect="auto", vmin=0, vmax=4, cmap="viridis")
        ax.set(title=name, xlabel="expert")
    labels = [steps * n // 10 for n in (1, 5, 10)]
    axes[0].set(ylabel="training step", yticks=[0, 4, 9], yticklabels=labels)
    figure.colorbar(image, ax=axes, label="load, in equal shares")
    plt.show()
