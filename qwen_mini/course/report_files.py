"""The closing report as files: Markdown with the origin of every number beside it, HTML in one file, PDF; whole or not at all."""

import base64
import functools
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __version__
from . import artifacts
from .figures import COLORS, STYLE
from .paths import home
from .report import FIRST_MARK, MARKED, VERDICTS, Document, Figure, Heading, Table, unmarked

FOLDER = "report"
CODE = re.compile(r"`([^`]+)`")
EMPHASIS = re.compile(r"\*([a-z][a-z ]*)\*")
SHADES = dict(zip(VERDICTS, ("green", "black", "vermillion", "sky", "purple"), strict=True))


def write_report(document: Document, scale: str) -> Path:
    """`runs/<scale>/report`: report.md with its figures and origins.json, report.html, report.pdf."""
    with artifacts.write_stage(scale, FOLDER) as folder:
        text, origins = markdown(document)
        (folder / "report.md").write_text(text, encoding="utf-8")
        lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in origins)
        (folder / "origins.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        for figure in figures_of(document):
            (folder / f"{figure.name}.png").write_bytes(png(figure))
        (folder / "report.html").write_text(page(document), encoding="utf-8")
        (folder / "report.pdf").write_bytes(pdf(document))
    return artifacts.stage_dir(scale, FOLDER)


def run_facts(scale: str) -> dict[str, str]:
    """What a report says of itself: scale, version of the course, commit."""
    call = ["git", "-C", str(home()), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(call, capture_output=True, text=True) if shutil.which("git") else None
    commit = done.stdout.strip() if done else ""
    facts = {"scale": scale, "version of qwen_mini": __version__}
    return facts | {"commit": commit or "not under version control"}


def figures_of(document: Document) -> list[Figure]:
    return [block for block in document.blocks if isinstance(block, Figure)]


# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown(document: Document) -> tuple[str, list[dict]]:
    """The text, and for every slot in it where it begins and ends, and where it comes from."""
    parts = [f"# {document.title}", *map(_markdown, document.blocks)]
    marked = "\n\n".join(parts) + "\n"
    text, origins, end = "", [], 0
    for found in MARKED.finditer(marked):
        text += marked[end : found.start()]
        origin = document.origins[ord(found[1]) - FIRST_MARK]
        origins.append({"begin": len(text), "end": len(text) + len(found[2]), "from": origin})
        text, end = text + found[2], found.end()
    return text + marked[end:], origins


def _markdown(block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Figure):
        return f"![{unmarked_name(block.name)}]({block.name}.png)\n\n*{block.title}*"
    if isinstance(block, Table):
        lines = [block.heads, ["---"] * len(block.heads), *block.rows]
        rows = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        return f"**{block.title}**\n\n" + "\n".join(f"| {row} |" for row in rows)
    return f"> {block.text}" if block.gap else block.text


def unmarked_name(name: str) -> str:
    return name.replace("_", " ")


# --- figures -----------------------------------------------------------------------------------------------------


def draw(axes, figure: Figure) -> None:
    """Draw a figure of the report into matplotlib axes."""
    if figure.has_points:
        for row, (_, (value, low, high), verdict) in enumerate(figure.lines):
            ends = [[max(0, value - low)], [max(0, high - value)]]
            axes.errorbar(
                value, -row, xerr=ends, fmt="o", ms=4, capsize=2, color=COLORS[SHADES[verdict]]
            )
        labels = [label for label, *_ in figure.lines]
        axes.set_yticks(range(0, -len(labels), -1), labels, fontsize=7)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set(xscale="symlog", ylim=(-len(labels) + 0.4, 0.6))
    else:
        for label, x, y in figure.lines:
            axes.plot(x, y, "o-" if len(x) < 20 else "-", label=label, markersize=4)
        scale = figure.axes.get("scale", "linear")
        axes.set(xscale=scale, yscale=scale)
        axes.set_ylabel(figure.axes["y"], fontsize=8)
        if len(figure.lines) > 1:
            axes.legend(fontsize=8)
    axes.set_xlabel(figure.axes["x"], fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_fontsize(7)


def height(figure: Figure) -> float:
    """Of a figure that is 6.5 inches wide, in inches."""
    return 0.6 + 0.2 * len(figure.lines) if figure.has_points else 2.8


def png(figure: Figure) -> bytes:
    """A figure as an image."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE), io.BytesIO() as file:
        canvas = Canvas(figsize=(6.5, height(figure)), layout="constrained")
        draw(canvas.subplots(), figure)
        canvas.savefig(file, format="png", dpi=140, metadata={"Software": None})
        return file.getvalue()


# --- HTML --------------------------------------------------------------------------------------------------------

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222 }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2rem }
.box { overflow-x: auto; margin: 0.5rem 0 1.5rem }
table { border-collapse: collapse; font-size: 0.85rem } caption, figcaption { text-align: left; padding: 0.3rem 0; color: #555 }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto } code { font-size: 0.9em; overflow-wrap: anywhere }
[title] { text-decoration: underline dotted #aaa; text-underline-offset: 3px }
.gap { border-left: 4px solid #CC79A7; padding: 0.2rem 0.8rem; background: #faf3f7; font-size: 0.9rem }
.agrees { color: #00694f; font-weight: 600 } .opposite { color: #a34700; font-weight: 600 } .no, .not { color: #777 }
@media (max-width: 40rem) {
  .stack thead { display: none } .stack tr { display: block; border-bottom: 2px solid #bbb; padding: 0.5rem 0 }
  .stack td { display: block; border: 0; padding: 0.1rem 0 } .stack td:empty { display: none }
  .stack td::before { content: attr(data-head) ": "; color: #777; font-weight: 400 }
  .stack td[data-head=""]::before { content: "" } figure img { max-width: none; width: 36rem }
}
"""


def page(document: Document) -> str:
    """One HTML file that loads nothing from elsewhere; each number tells where it comes from."""
    inline = functools.partial(_inline, document)
    body = "\n".join(_html(block, inline) for block in document.blocks)
    title = html.escape(unmarked(document.title))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{inline(document.title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _inline(document: Document, text: str) -> str:
    """Text as HTML: code, emphasis, and slots with their origin as a title."""
    text = CODE.sub(r"<code>\1</code>", html.escape(text, quote=False))
    text = EMPHASIS.sub(r"<em>\1</em>", text)

    def slot(found: re.Match) -> str:
        origin = document.origins[ord(found[1]) - FIRST_MARK]
        if not origin.startswith(("record", "original", "provenance")):
            return found[2]
        first, *more = origin.split("; ")
        more = f" and {len(more)} more" if more else ""
        return f'<span title="{html.escape(first)}{more}">{found[2]}</span>'

    return MARKED.sub(slot, text)


def _html(block, inline) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{inline(block.text)}</h{block.level}>"
    if isinstance(block, Figure):
        data = base64.b64encode(png(block)).decode()
        image = f'<img alt="{unmarked_name(block.name)}" src="data:image/png;base64,{data}">'
        return f'<figure><div class="box">{image}</div><figcaption>{inline(block.title)}</figcaption></figure>'
    if not isinstance(block, Table):
        return (
            f'<p class="gap">{inline(block.text)}</p>'
            if block.gap
            else f"<p>{inline(block.text)}</p>"
        )
    heads = "".join(f"<th>{inline(head)}</th>" for head in block.heads)
    names = [html.escape(unmarked(head)) for head in block.heads]
    rows = []
    for row in block.rows:
        cells = (
            f'<td data-head="{name}"{_shade(cell)}>{inline(cell)}</td>'
            for name, cell in zip(names, row, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="stack"' if max(len(unmarked(c)) for row in block.rows for c in row) > 40 else ""
    table = f"<table{kind}><caption>{inline(block.title)}</caption><thead><tr>{heads}</tr></thead>"
    return f'<div class="box">{table}<tbody>{"".join(rows)}</tbody></table></div>'


def _shade(cell: str) -> str:
    return f' class="{cell}"' if cell in VERDICTS else ""


# --- PDF ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, MARGIN = 595, 842, 54  # A4, in points


def pdf(document: Document) -> bytes:
    """The report on A4 pages."""
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages

    quiet = {
        "CreationDate": None,
        "Producer": None,
        "Creator": None,
        "Title": unmarked(document.title),
    }
    with io.BytesIO() as file, matplotlib.rc_context(STYLE | {"pdf.fonttype": 42}):
        with PdfPages(file, metadata=quiet) as book:
            paper = Paper(book)
            paper.words(document.title, 16)
            for block in document.blocks:
                paper.add(block)
            paper.turn()
        return file.getvalue()


class Paper:
    """Pages that fill from top to bottom."""

    def __init__(self, book):
        self.book, self.sheet, self.top = book, None, MARGIN

    def turn(self) -> None:
        """Close this page."""
        if self.sheet is not None:
            self.book.savefig(self.sheet)
        self.sheet, self.top = None, MARGIN

    def room(self, points: float) -> None:
        """A page on which so much is free."""
        from matplotlib.figure import Figure as Canvas

        if self.top + points > HEIGHT - MARGIN:
            self.turn()
        if self.sheet is None:
            self.sheet = Canvas(figsize=(WIDTH / 72, HEIGHT / 72), layout="none")

    def put(self, x: float, text: str, size: float, **style) -> None:
        """A line of text, x from the left and `top` from above."""
        place = x / WIDTH, 1 - (self.top + size) / HEIGHT
        self.sheet.text(*place, text, fontsize=size, parse_math=False, **style)

    def words(self, text, size: float = 9, bold: bool = False, indent: float = 0, color="black"):
        """A paragraph."""
        for line in wrapped(_plain(text), WIDTH - 2 * MARGIN - indent, size, bold):
            self.room(1.35 * size)
            self.put(MARGIN + indent, line, size, weight="bold" if bold else "normal", color=color)
            self.top += 1.35 * size
        self.top += 0.6 * size

    def add(self, block) -> None:
        if isinstance(block, Heading):
            self.room(90)  # no heading at the foot of a page
            self.top += 8
            self.words(block.text, 12, bold=True)
        elif isinstance(block, Figure):
            self.figure(block)
        elif isinstance(block, Table):
            self.table(block)
        elif block.gap:
            self.words(block.text, 7.5, indent=12, color=COLORS["purple"])
        else:
            self.words(block.text)

    def figure(self, figure: Figure) -> None:
        tall, wide = 72 * height(figure), WIDTH - 2 * MARGIN
        self.room(tall + 30)
        left, below = (190 if figure.has_points else 40), 30
        box = [MARGIN + left, HEIGHT - self.top - tall + below, wide - left, tall - below - 4]
        draw(
            self.sheet.add_axes([box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]),
            figure,
        )
        self.top += tall + 2
        self.words(figure.title, 7.5)

    def table(self, table: Table, size: float = 7) -> None:
        rows = [[_plain(cell) for cell in row] for row in [table.heads, *table.rows]]
        widths = column_widths(rows, WIDTH - 2 * MARGIN, size)
        self.room(60)
        self.words(table.title, 8, bold=True)
        for number, row in enumerate(rows):
            cells = [wrapped(c, w - 6, size, number == 0) for c, w in zip(row, widths, strict=True)]
            lines = max(map(len, cells))
            self.room(lines * 1.3 * size + 3)
            self.row(cells, widths, size, lines, bold=number == 0)
        self.top += 8

    def row(self, cells, widths, size: float, lines: int, bold: bool) -> None:
        from matplotlib.lines import Line2D

        for line in range(lines):
            x = MARGIN
            for cell, width in zip(cells, widths, strict=True):
                if line < len(cell):
                    shade = COLORS[SHADES[" ".join(cell)]] if " ".join(cell) in SHADES else "black"
                    self.put(x, cell[line], size, weight="bold" if bold else "normal", color=shade)
                x += width
            self.top += 1.3 * size
        y = 1 - (self.top + 2) / HEIGHT
        ends = [MARGIN / WIDTH, 1 - MARGIN / WIDTH]
        rule = Line2D(ends, [y, y], color="0.6" if bold else "0.88", linewidth=0.5)
        self.sheet.add_artist(rule)
        self.top += 3


def _plain(text: str) -> str:
    return EMPHASIS.sub(r"\1", unmarked(text)).replace("`", "")


@functools.cache
def _width(text: str, size: float, bold: bool) -> float:
    """Points that a text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def wrapped(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Lines that are no wider; a word that is wider alone is broken."""
    lines, space = [""], _width("a a", size, bold) - 2 * _width("a", size, bold)
    used = 0.0
    for word in _pieces(text.split(), width, size, bold):
        wide = _width(word, size, bold)
        if lines[-1] and used + space + wide > width:
            lines.append("")
            used = 0.0
        used += wide + (space if lines[-1] else 0)
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _pieces(words: Sequence[str], width: float, size: float, bold: bool) -> Iterator[str]:
    for word in words:
        while _width(word, size, bold) > width and len(word) > 1:
            fits = max(1, int(len(word) * width / _width(word, size, bold)) - 1)
            yield word[:fits]
            word = word[fits:]
        yield word


def column_widths(rows: Sequence[Sequence[str]], width: float, size: float) -> list[float]:
    """Points of each column: what it asks for, or a fair share of what the narrow ones leave."""
    wanted = [
        max(_width(cell, size, True) + 8 for cell in column) for column in zip(*rows, strict=True)
    ]
    left, open_columns, given = width, set(range(len(wanted))), {}
    while open_columns:
        share = left / len(open_columns)
        content = {i for i in open_columns if wanted[i] <= share}
        if not content:
            return [given.get(i, share) for i in range(len(wanted))]
        for i in content:
            given[i] = wanted[i]
            left -= wanted[i]
        open_columns -= content
    return [given[i] for i in range(len(wanted))]
