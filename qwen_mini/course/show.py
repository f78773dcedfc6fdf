"""Results as sentences and tables: `say` and `table` put numbers that code computed into what is read.

In a notebook they show Markdown and HTML, with the same as plain text beside it; in a terminal they print.
The bytes depend on the arguments only.
"""

import html
import string
import unicodedata
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from .errors import CourseError
from .progress import in_notebook

NAME = ""  # the key of the column that holds the names of a dict's rows


def say(template: str, **numbers: Any) -> None:
    """Show a sentence in Markdown with its numbers filled in: `say("Loss falls to {loss:.2f}.", loss=loss)`.

    Fields are those of `str.format`; braces that are meant are doubled. A field without a number, a number
    without a field and a format that does not fit raise `CourseError`, which names them.
    """
    try:
        text = _Sentence().vformat(template, (), numbers)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        unfit = "a number does not fit its format, or a brace that is meant does not stand twice"
        raise CourseError(f"say: {error} in {template!r}: {unfit}") from None
    _show(text, "text/markdown", text)


class _Sentence(string.Formatter):
    """`str.format` that wants every number to have a field and every field a number."""

    def get_value(self, key, positional, numbers):
        if key in numbers:
            return numbers[key]
        name = key if isinstance(key, str) else ""
        raise CourseError(f"say: no number for {{{name}}}: pass {name or 'name'}=…")

    def check_unused_args(self, used, positional, numbers):
        for name in sorted(set(numbers) - used):
            unused = f"{name} is given but does not occur in the sentence"
            raise CourseError(f"say: {unused}: remove it or use it")


def table(
    rows: Mapping[str, Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | Iterable[str | tuple[str, str]] | None = None,
    formats: Mapping[str, str] | str | None = None,
) -> None:
    """Show rows as a table, numbers to the right and text to the left.

    rows     a list of dicts, or a dict from a row's name to a dict. A cell is text, a number, a pair
             (value, error), which becomes `12.3 ± 0.4`, a value with its interval (value, low, high), which becomes
             `12.3 [11.9 12.7]`, or None, which stays empty.
    columns  the keys to show, in order, each alone or as a pair (key, heading), or a dict from key to heading (units
             belong there). Without it, every key as it first occurs. The heading of the rows' names has the key "".
    formats  key to what `format` takes (`".2f"`, `",.0f"`, `".1%"`), or that in braces within text
             (`"{:.1f} s"`). Without one, whole numbers get commas and others three digits. One text alone is the
             format of all numbers that are not whole.

    Raises `CourseError` for rows that are not dicts, a column or format that no row has, and a cell that
    its format does not fit.
    """
    records = _records(rows)
    titles = _titles(records, columns)
    alone, formats = (formats, {}) if isinstance(formats, str) else (None, dict(formats or {}))
    for key in sorted(set(formats) - set(titles)):
        none = f"the format of {key!r} belongs to no column: the columns are {list(titles)}"
        raise CourseError(f"table: {none}")
    form = lambda key, value: formats.get(key, None if isinstance(value, Integral) else alone)
    row = lambda record: [(record.get(key), key) for key in titles]
    cells = [[_cell(value, form(key, value), key) for value, key in row(r)] for r in records]
    right = [any(_is_number(record.get(key)) for record in records) for key in titles]
    heads = [_one_line(title) for title in titles.values()]
    _show(_plain(heads, cells, right), "text/html", _html(heads, cells, right))


def _records(rows: Any) -> list[Mapping[str, Any]]:
    if isinstance(rows, Mapping):
        if all(isinstance(row, Mapping) for row in rows.values()):
            return [{NAME: str(name), **row} for name, row in rows.items()]
    elif isinstance(rows, Iterable) and not isinstance(rows, str):
        rows = list(rows)
        if all(isinstance(row, Mapping) for row in rows):
            return rows
    raise CourseError("table: rows must be a list of dicts, or a dict of dicts")


def _titles(records: list[Mapping[str, Any]], columns: Any) -> dict[str, str]:
    """Key to heading, in order; the column of names comes first unless `columns` places it."""
    known = dict.fromkeys(key for record in records for key in record)
    if columns is None:
        return {key: str(key) for key in known}
    pair = lambda column: column if isinstance(column, tuple) else (column, column)
    given = dict(columns if isinstance(columns, Mapping) else map(pair, columns))
    for key in given:
        if records and key not in known:
            raise CourseError(f"table: no row has {key!r}: the keys are {list(known)}")
    named = {NAME: ""} if NAME in known and NAME not in given else {}
    return {key: str(title) for key, title in {**named, **given}.items()}


def _is_number(value: Any) -> bool:
    """A number, or one with its error or interval; 0-d arrays and tensors count, truth values do not."""
    if isinstance(value, tuple):
        return True
    number = isinstance(value, Real) or getattr(value, "shape", None) == ()
    return number and not isinstance(value, bool)


def _cell(value: Any, form: str | None, key: str) -> str:
    """One cell as text; `form` is a format spec, or text around one in braces."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and not form:
        return _one_line(value)
    try:
        before, spec, after = _parts(form or "")
        if isinstance(value, tuple) and len(value) == 3:
            middle, low, high = (_number(one, spec) for one in value)
            text = f"{middle} [{low} {high}]"
        elif isinstance(value, tuple):
            specs = spec, spec.replace("+", "")
            middle, error = (_number(one, how) for one, how in zip(value, specs, strict=True))
            text = f"{middle.removesuffix('%')} ± {error}"
        else:
            text = _one_line(value) if isinstance(value, str) else _number(value, spec)
    except (ValueError, TypeError) as error:
        unfit = f"{value!r} in the column {key!r} does not fit the format {form!r}"
        raise CourseError(f"table: {unfit}: {error}") from None
    return f"{before}{text}{after}" if not isinstance(value, str) else text


def _parts(form: str) -> tuple[str, str, str]:
    """`("", ".1f", " s")` of `"{:.1f} s"`; a form without braces is a spec alone."""
    if "{" not in form:
        return "", form, ""
    found = list(string.Formatter().parse(form))
    if [name for _, name, _, _ in found if name is not None] != [""]:
        raise ValueError("one pair of braces without a name is wanted")
    after = "".join(text for text, *_ in found[1:])
    return found[0][0], found[0][2] or "", after


def _number(value: Any, spec: str) -> str:
    value = value.item() if hasattr(value, "item") else value
    if not spec:
        spec = ",d" if isinstance(value, int) else ".3g" if abs(value) < 1000 else ",.0f"
    return format(value, spec)


def _one_line(value: Any) -> str:
    return " ".join(str(value).splitlines())


def _width(text: str) -> int:
    """Columns that `text` takes in a terminal: East Asian characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def _plain(heads: list[str], cells: list[list[str]], right: list[bool]) -> str:
    lines = [heads, *cells]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(line, widths, right) for line in lines)


def _line(texts: list[str], widths: list[int], right: list[bool]) -> str:
    spaces = [" " * (width - _width(text)) for text, width in zip(texts, widths, strict=True)]
    padded = lambda text, space, to_right: space + text if to_right else text + space
    return "  ".join(map(padded, texts, spaces, right)).rstrip()


def _html(heads: list[str], cells: list[list[str]], right: list[bool]) -> str:
    """A bare table: `align` is what GitHub keeps, the style what Jupyter obeys."""
    sides = ["right" if to_right else "left" for to_right in right]

    def row(tag: str, texts: list[str]) -> str:
        cells = zip(sides, (html.escape(text, quote=False) for text in texts), strict=True)
        form = '<{0} align="{1}" style="text-align: {1}">{2}</{0}>'.format
        return f"<tr>{''.join(form(tag, *cell) for cell in cells)}</tr>"

    body = "\n".join(row("td", line) for line in cells)
    return f"<table>\n<thead>\n{row('th', heads)}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _show(plain: str, kind: str, rich: str) -> None:
    if in_notebook():
        from IPython.display import display

        display({"text/plain": plain, kind: rich}, raw=True)
    else:
        print(plain)
