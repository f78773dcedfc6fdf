"""No result is typed: a check of the texts for digits that only a run can know.

Refused in Markdown cells, README and docs: percentages, points, times, speeds, ratios of speed, decimals.
Not looked at: code, formulas, links, sections, versions and licences, columns of the report in a table, whole
numbers without such a unit. What is known without a run (a setting, a value of the report) is marked:

    <!-- constant: why -->   alone on a line: the paragraph or table that follows; within a line: its sentence
    <!-- report: §3.2 -->    the same for values that the report or another paper gives
    <!-- n:name -->12<!-- /n -->   filled in by `make measurements`
    <!-- generated … -->     at the top of a file that a command writes
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_mini.course.nb import notebooks, source

REMEDY = "let `course.say` or `course.table` say it, or mark what no run decides with `<!-- constant: why -->`"
MARK = re.compile(r"<!--\s*(?:constant|report)\b(?:(?!-->).)*-->", re.DOTALL)
FILLED = re.compile(r"<!--\s*n:[\w.-]+\s*-->.*?<!--\s*/n\s*-->", re.DOTALL)
GENERATED = "<!-- generated"
REPORT_COLUMN = re.compile(r"qwen|report|published", re.IGNORECASE)

NUMBER = r"(?<![\w.])(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s(?:thousand|million|billion))?"
UNITS = r"ns|µs|ms|s|seconds?|min|minutes?|h|hours?"
TYPED = re.compile(
    rf"{NUMBER}(?:\s?%|\s+per\s?cent\b|\s+(?:percentage\s+)?points?\b|\s?pp\b)"
    rf"|{NUMBER}\s?(?:{UNITS})\b"
    rf"|{NUMBER}\s+[\w-]+(?:/s\b|\s(?:a|per)\s(?:second|minute|hour)\b)"
    rf"|(?:{NUMBER}(?:\s?[x×]|\s+times)|(?i:twice))\s+(?:as\s|the\s(?:speed|loss|time)|faster|slower)"
    r"|(?<![\w.])\d*[\d,]*\.\d+(?!\.?\w)"
)
NOT_RESULTS = re.compile(
    r"""
      (?s:```.*?```) | `[^`\n]*`                                   # code
    | (?s:\$\$.*?\$\$) | \$[^$\n]+\$                               # formulas
    | \]\([^)\s]*\) | https?://\S+                                 # addresses
    | (?:§|\bTables?\s|\bFigures?\s|\bEquations?\s)[\d.]+(?:\s?(?:–|-|,|and)\s?§?\d[\d.]*)*
    | \barXiv[:\s]*\d+\.\d+ | \b\d{4}\.\d{5}\b                     # papers
    | \b(?:Python|PyTorch|CUDA|NumPy|version)\s\d[\d.]*(?:(?:,|\sor|\sto|\sand)\s\d+\.\d+)*
    | \b(?:CC\sBY(?:-\w\w)*|[A-Z][\w-]*-By|Apache|PSF|MIT|GPL)[\s-]\d\.\d
    | \b[A-Z]\w*-\d\.\d\b                                          # models: Llama-3.1
    """,
    re.VERBOSE,
)


def typed_numbers(root: Path) -> list[str]:
    """One sentence for each passage of the texts that types a result; [] if there is none."""
    texts, problems = {}, []
    for book in notebooks(root):
        cells = [source(cell) for cell in book.cells if cell["cell_type"] == "markdown"]
        texts[book.path] = "\n\n".join(cells)
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if path.exists() and not (text := path.read_text(encoding="utf-8")).startswith(GENERATED):
            texts[path] = text
    for path, text in texts.items():
        where = path.relative_to(root).as_posix()
        problems += [
            f'{where} types "{found}" in "{passage}": {REMEDY}' for found, passage in typed(text)
        ]
    return problems


def typed(markdown: str) -> Iterator[tuple[str, str]]:
    """Every typed result of a text, with the beginning of its sentence, item or row."""
    text = NOT_RESULTS.sub(_blank, FILLED.sub("", markdown))
    marked = False
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().splitlines()
        own = bool(lines) and MARK.fullmatch(lines[0].strip()) is not None
        if own and len(lines) == 1:  # a mark between blank lines speaks of what follows it
            marked = True
            continue
        for passage in [] if own or marked else _passages(lines):
            if not MARK.search(passage) and (found := TYPED.search(passage)):
                yield found.group().strip(), " ".join(passage.split())[:60]
        marked = False


def _blank(found: re.Match) -> str:
    """Something without digits that keeps words apart and lines in place."""
    return "·" + "\n" * found.group().count("\n")


def _passages(lines: list[str]) -> list[str]:
    """Sentences and items of a paragraph, or rows of a table without the columns that quote the report."""
    if len(lines) > 1 and all(line.lstrip().startswith("|") for line in lines):
        heads = _cells(lines[0])
        quoted = {i for i, head in enumerate(heads) if REPORT_COLUMN.search(head)}
        rows = [_cells(line) for line in lines]
        return [" | ".join(cell for i, cell in enumerate(row) if i not in quoted) for row in rows]
    text = re.sub(r"\n\s*(?:[*+-]|\d+\.|>)\s+", "\n\n", "\n" + "\n".join(lines))
    text = re.sub(rf"([.!?]\s?{MARK.pattern})\s", r"\1\n\n", text)
    return re.split(r"\n\n|(?<=[.!?])\s+(?=\S)", text)


def _cells(line: str) -> list[str]:
    return line.strip().strip("|").split("|")
