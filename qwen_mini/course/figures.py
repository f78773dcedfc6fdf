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
