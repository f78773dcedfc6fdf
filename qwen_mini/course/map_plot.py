"""The map of chapter 00: sections of the report, the notebooks that rebuild them, and what these have shown."""

from collections.abc import Callable, Mapping, Sequence

from .figures import COLORS

PALE = "#b5b5b5"


def draw_map(
    chapters: Sequence[tuple[str, str, str, str]],
    sections: Mapping[str, str],
    parts: Mapping[str, tuple[int, int, str]],
    verdict: Callable[[str], tuple[str, bool]],
) -> None:
    """Draw the map.

    chapters: (notebook, module, sections of the report, promise); sections: number → title; parts: title → (first
    chapter, last one, colour); verdict: notebook → (what it has shown, whether it exists).
    """
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(10, 9))
    rows, places, bands = _heights(sections, parts)
    for title, (_, _, name) in parts.items():
        ax.axhspan(*bands[title], color=COLORS[name], alpha=0.06, linewidth=0)
        style = {"color": COLORS[name], "fontsize": 10, "fontweight": "bold"}
        ax.text(0.8, bands[title][0] + 0.5, title, va="center", **style)
    for section, title in sections.items():
        _box(ax, 0.8, places[section], 19, f"{section} {title}", "#444444", fontsize=9)
    for y, (name, module, about, promise) in zip(rows, chapters, strict=True):
        part = next(p for p in parts.values() if p[0] <= int(name[:2]) <= p[1])
        color, (state, ready) = COLORS[part[2]], verdict(name)
        for section in about.split():
            _link(ax, 19.8, places[section], 28, y, color, ready)
        _box(ax, 28, y, 19.5, name, color, ready, fontsize=9)
        if module:
            _link(ax, 47.5, y, 49.5, y, color, ready)
            _box(ax, 49.5, y, 12, module, color, ready, fontsize=8, family="monospace")
        ax.text(62.6, y, state, color=color if ready else "#777777", va="center", fontsize=9)
        ax.text(71.5, y, promise, color="black" if ready else "#777777", va="center", fontsize=9)
    for title, x in {"report": 10.3, "notebook": 37.7, "module": 55.5, "claims": 65.5}.items():
        ax.text(x, -1.75, title, ha="center", color="#555555", style="italic")
    ax.set(xlim=(0, 101), ylim=(list(bands.values())[-1][1], -2.1))
    ax.axis("off")
    plt.show()


def _heights(sections, parts) -> tuple[list[float], dict[str, float], dict[str, tuple]]:
    """Where rows, section boxes and parts stand; sections spread over their part."""
    rows, places, bands = [], {}, {}
    for part, (title, (first, last, _)) in enumerate(parts.items()):
        top = first - 1 + 0.9 * part
        bands[title] = (top - 1.3, last - 0.45 + 0.9 * part)
        rows += [top + i for i in range(last - first + 1)]
        own = [section for section in sections if section[1] == "2345"[part]]  # §2 is of part I
        step = (last - first + 1) / len(own)
        for i, section in enumerate(own):
            places[section] = top - 0.5 + step * (i + 0.5)
    return rows, places, bands


def _box(ax, x, y, width, text, color, ready=True, height=0.66, **font) -> None:
    """A rounded box from x rightwards, its middle at y; pale if it is yet to come."""
    from matplotlib.patches import FancyBboxPatch

    style = {"facecolor": color + "22", "edgecolor": color, "linewidth": 1.0}
    if not ready:
        style = {"facecolor": "white", "edgecolor": PALE, "linewidth": 0.8, "linestyle": (0, (4, 2))}  # fmt: skip
    shape = "round,pad=0,rounding_size=0.22"
    corners = FancyBboxPatch((x, y - height / 2), width, height, boxstyle=shape, **style)
    corners.set_mutation_aspect(0.5)
    ax.add_patch(corners)
    ink = "black" if ready else "#777777"
    ax.text(x + width / 2, y, text, ha="center", va="center", color=ink, **font)


def _link(ax, x0, y0, x1, y1, color, ready=True) -> None:
    """A line that leaves and arrives level."""
    import numpy as np

    t = np.linspace(0, 1, 40)
    style = {"color": color, "linewidth": 1.1} if ready else {"color": "#c9c9c9", "linewidth": 0.8}
    ax.plot(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t * t * (3 - 2 * t), alpha=0.75, zorder=0, **style)
