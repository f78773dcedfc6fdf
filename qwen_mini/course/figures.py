"""One style for every figure: colours that colour-blind readers can tell apart, and PNG files equal byte for byte."""

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
