"""Notebooks as data: reading, the chapters in order, the parameters cell, and the digest of their code."""

import ast
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, StrictStr, ValidationError

from .errors import CourseError
from .syntax import normalised
from .versions import imported_chapters, versions, versions_of

IPYTHON_LINE = re.compile(r"^(\s*)([%!].*)", re.MULTILINE)
EXPORTED = re.compile(r"^#\|\s*export", re.MULTILINE)


class _CellMetadata(BaseModel):
    tags: list[StrictStr] = []


class _Cell(BaseModel):
    cell_type: StrictStr
    source: StrictStr | list[StrictStr]
    metadata: _CellMetadata


class _Shape(BaseModel):
    """What the course reads of a notebook's file."""

    cells: list[_Cell]
    metadata: dict


@dataclass(frozen=True)
class Notebook:
    """One notebook file, parsed once."""

    path: Path

    @cached_property
    def data(self) -> dict:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            _Shape.model_validate(data)
        except (OSError, ValueError, RecursionError) as error:
            reason = "a cell or its metadata is missing or of a wrong type"
            if not isinstance(error, ValidationError):
                reason = str(error)
            raise CourseError(f"{self.path} cannot be read as a notebook: {reason}") from None
        return data

    @property
    def name(self) -> str:
        """`03_attention`."""
        return self.path.stem

    @property
    def number(self) -> int:
        """3; a notebook without a number comes last."""
        digits = re.match(r"\d+", self.name)
        return int(digits.group()) if digits else 10_000

    @property
    def cells(self) -> list[dict]:
        return self.data["cells"]

    @cached_property
    def code(self) -> list[str]:
        return [source(cell) for cell in self.cells if cell["cell_type"] == "code"]

    @cached_property
    def module(self) -> str | None:
        """`attention` from `#| default_exp attention`, None if the notebook exports nothing."""
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(self.code), re.MULTILINE)
        return found.group(1) if found else None

    @cached_property
    def code_digest(self) -> str:
        """Digest of what the code cells compute; prose, comments, layout and local names do not count.

        Nor does exported code: what it computes is decided by goldens, and stands here as the chapters' versions.
        """
        own = [code for code in self.code if not EXPORTED.search(code)]
        texts = [text for text in map(_normalised_cell, own) if text]
        chapters = {self.module}.union(*map(_imports_if_python, self.code)) & set(versions())
        texts.append(json.dumps(versions_of(*chapters)))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    def parameter_cells(self) -> list[dict]:
        return [cell for cell in self.cells if "parameters" in cell["metadata"].get("tags", [])]

    def parameters(self) -> dict:
        """Names and values of the one `parameters` cell; ValueError says what is wrong with it."""
        cells = self.parameter_cells()
        if len(cells) != 1:
            raise ValueError(f"needs exactly one cell tagged `parameters`, has {len(cells)}")
        try:
            tree = ast.parse(source(cells[0]))
        except SyntaxError as error:
            raise ValueError(f"has a parameters cell that is not Python: {error.msg}") from None
        values = {}
        for node in tree.body:
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                more = "has a parameters cell with more than assignments"
                raise ValueError(f"{more}: `{ast.unparse(node)}`")
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                what = f"a parameter that is no literal: `{ast.unparse(node)}`"
                raise ValueError(f"has {what}") from None
        return values


def cell_imports(code: str) -> set[str]:
    """Chapters that a cell imports, lines for IPython aside; SyntaxError if the rest is not Python."""
    try:
        return imported_chapters(code)
    except SyntaxError:
        return imported_chapters(IPYTHON_LINE.sub(r"\1pass", code))


def _imports_if_python(code: str) -> set[str]:
    try:
        return cell_imports(code)
    except SyntaxError:
        return set()


def _normalised_cell(code: str) -> str:
    """What a cell computes, as `normalised` writes it; '' for one that holds only comments.

    Lines for IPython (`%`, `!`) count as they are written, and so does a cell that no parser reads.
    """
    silent = ";" if code.rstrip().endswith(";") else ""  # the last value is not shown then
    try:
        text = normalised(code)
    except SyntaxError:
        try:
            text = normalised(IPYTHON_LINE.sub(_as_call, code))
        except SyntaxError:
            return code
    return "" if text == "[]" else text + silent


def _as_call(found: re.Match) -> str:
    return f"{found[1]}ipython({found[2].rstrip()!r})"


def source(cell: dict) -> str:
    """A cell's text, which files store as a string or a list of lines."""
    return "".join(cell["source"])


def notebooks(root: Path) -> list[Notebook]:
    """The course's notebooks in reading order."""
    found = [Notebook(path) for path in (root / "notebooks").glob("*.ipynb")]
    return sorted(found, key=lambda nb: (nb.number, nb.name))


def select(root: Path, wanted: list[str]) -> list[Notebook]:
    """Notebooks by path, name (`09_pretraining`), number (`09`) or subject (`pretraining`); all for an empty list."""
    known = notebooks(root)
    if not wanted and not known:
        none = f"there are no notebooks in {root / 'notebooks'}"
        raise CourseError(f"{none}: run inside the repository")
    chosen = [] if wanted else known
    for word in wanted:
        if word.endswith(".ipynb"):
            if not Path(word).is_file():
                raise CourseError(f"there is no notebook {word}")
            chosen.append(Notebook(Path(word).resolve()))
            continue
        names = {nb: (nb.name, *nb.name.partition("_")[::2]) for nb in known}
        found = [nb for nb in known if word in names[nb]]
        if not found:
            one = ", ".join(nb.name for nb in known)
            raise CourseError(f"there is no notebook {word!r}: use one of {one}")
        chosen += found
    chosen = list(dict.fromkeys(chosen))
    for first, second in itertools.combinations(chosen, 2):
        if first.name == second.name:  # their results would share a place
            both = f"{first.path} and {second.path} have the same name"
            raise CourseError(f"{both}: run one after the other")
    return chosen
