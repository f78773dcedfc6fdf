"""One style for every figure: colours that colour-blind readers can tell apart, and PNG files equal byte for byte."""

from collections.abc import Iterable, Mapping, Sequence

from .progress import in_notebook

# Okabe and Ito (2008), the order of first use.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}

STYLE = {
    "figure.dpi": 96,
    "savefig.dpi": 96,
    "figure.figsize": (6, 3),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "image.cmap": "cividis",
    "svg.hashsalt": "qwen_mini",
}


def palette(n: int) -> list[str]:
    """The first `n` colours; they repeat after eight."""
    colors = list(COLORS.values())
    return [colors[i % len(colors)] for i in range(n)]


def show_lines(x, lines, xlabel: str, ylabel: str) -> None:
    """Shares over `x`, a line with points for each name of `lines`."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(6, 2.7))
    for name, shares in lines.items():
        ax.plot(x, shares, ".-", label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
    ax.legend(fontsize=8)
    plt.show()


def apply_style() -> None:
    """Set matplotlib's defaults, and a notebook's figures to PNG without versions; does nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    from cycler import cycler

    matplotlib.rcParams.update({**STYLE, "axes.prop_cycle": cycler(color=palette(len(COLORS)))})
    if in_notebook():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("png", metadata={"Software": None})  # its name and version


def flow(
    boxes: Mapping[str, tuple[float, float]],
    arrows: Iterable[tuple[int, int]],
    size: tuple[float, float] = (9.5, 2.9),
) -> None:
    """Draw texts in boxes round the places (x, y), and arrows from box to box by their numbers."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=size)
    frame = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": COLORS["blue"]}
    for text, (x, y) in boxes.items():
        ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)
    places, style = list(boxes.values()), {"arrowstyle": "->", "color": "gray"}
    for start, end in arrows:
        (x0, y0), (x1, y1) = places[start], places[end]
        ax.annotate("", (x1 - 0.85, y1), (x0 + 0.85, y0), arrowprops=style)
    xs, ys = zip(*places, strict=True)
    ax.set(xlim=(min(xs) - 1, max(xs) + 1), ylim=(min(ys) - 0.5, max(ys) + 0.5))
    ax.axis("off")
    plt.show()


def with_intervals(ax, xs: Iterable[float], found: Sequence[tuple], **style) -> None:
    """Draw a point with its interval at every x; found: (value, low, high) for each."""
    values, low, high = zip(*found, strict=True)
    below = [max(0, value - bound) for value, bound in zip(values, low, strict=True)]
    above = [max(0, bound - value) for value, bound in zip(values, high, strict=True)]
    ax.errorbar(list(xs), values, yerr=[below, above], **{"fmt": "o", "capsize": 2} | style)


def show_ranks() -> None:
    """Two ranks of sharded training: what each owns all the time, and what it holds while one layer computes."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    _, ax = plt.subplots(figsize=(9, 3.4))
    parts = {"weights": "blue", "gradients": "orange", "moment 1": "green", "moment 2": "green"}
    for rank in range(2):
        left = 6.2 * rank
        ax.text(left + 2.4, 4.3, f"rank {rank}: every second row of the batch", ha="center")
        for row, (name, color) in enumerate(parts.items()):
            y = 3.3 - 0.75 * row
            for piece in range(2):
                own = piece == rank
                face = COLORS[color] + ("99" if own else "00")
                style = {"facecolor": face, "edgecolor": "gray", "linestyle": "-" if own else ":"}
                ax.add_patch(Rectangle((left + 1.4 + 1.7 * piece, y), 1.6, 0.5, **style))
            if rank == 0:  # the same beside
                ax.text(left + 1.3, y + 0.25, name, ha="right", va="center", fontsize=9)
        held = {"facecolor": COLORS["blue"] + "55", "edgecolor": COLORS["blue"]}
        ax.add_patch(Rectangle((left + 1.4, -0.1), 3.3, 0.6, **held))
        told = {"ha": "center", "va": "center", "fontsize": 9}
        ax.text(left + 3.05, 0.2, "one layer, whole, for a moment", **told)
    for y, name in ((0.3, "all-gather"), (2.8, "reduce-scatter")):
        ax.annotate("", (7.5, y), (4.8, y), arrowprops={"arrowstyle": "<->"})
        ax.text(6.15, y + 0.12, name, ha="center", fontsize=8)
    ax.set(xlim=(-0.6, 11.2), ylim=(-0.3, 4.7))
    ax.axis("off")
    plt.show()
