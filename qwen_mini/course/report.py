"""The closing report: records and metrics → slots → a document in the order of the Qwen2.5 report.

`report.toml` holds the words, and what the original says. A number stands in a text only as a slot in braces:

    {12_long_context/pass key after > 1024 ; .0%}      from a record: selector ; form
    {a - b ; +.2f}   {a / b ; .1f}                     of two selectors; items and runs in pairs
    {06_moe/text * > loss ; .3f, runs}                 the mean of several records, and how many they are
    {= 32,768 ; §3.3}                                  of the original: value ; place

A selector is a record's name, in which `*` stands for runs, then keys: `a|b` joins the items of two, `*` those of all,
`#2` is the second. In a list `0|2` are two entries, `:` is each of them, `2/3` the second third. Digits outside a slot
are refused. A slot without its record is a gap, which says how to fill it.
"""

import contextlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import artifacts, records
from .errors import CourseError
from .paths import PACKAGE, home, runs
from .versions import other_versions

PLAN = PACKAGE / "course" / "report.toml"
SLOT = re.compile(r"\{([^{}]+)\}")
NAME = re.compile(r"\b[A-Za-z][\w.@-]*\d[\w.@-]*\b")  # a word with digits: Qwen2.5, bfloat16
CLOSE = "\ue000"
FIRST_MARK = 0xF0000
MARKED = re.compile("([\U000f0000-\U000ffffd])([^\ue000]*)\ue000")
# 97.5 % quantiles of Student's t; between two of them the larger one counts
T = {1: 12.71, 2: 4.3, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09}
T |= {30: 2.04, 60: 2.0, 120: 1.98}
VERDICTS = ("agrees", "does not show", "opposite", "no interval", "not measured")


class Gap(CourseError):
    """What a slot needs and nobody has recorded; the message says how to fill it."""


# --- records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelf:
    """What a scale has recorded: results by name, checkpoints among them, and the records' own facts.

    results: `09_pretraining/needles` → its result; `checkpoints/sft/manifest`, `…/config`, `…/metrics` (columns).
    records: the whole records by name.
    """

    scale: str
    results: dict[str, object]
    records: dict[str, dict]

    def take(self, selector: str) -> dict[str, np.ndarray]:
        """Numbers by run: what `*` in the record's name stands for → an array whose first axis are the items.

        Gap if no record has that name, or one has no such entry.
        """
        pattern, *keys = (part.strip() for part in selector.split(" > "))
        named = self.named(pattern)
        if not named:
            raise Gap(f"not measured: record `{pattern}`; {self.remedy(pattern)}")
        try:
            return {run: _numbers(self.results[name], keys) for run, name in named.items()}
        except (LookupError, TypeError, ValueError):
            where = " > ".join(keys)
            message = f"not measured: record `{pattern}` of scale {self.scale} holds no `{where}`"
            raise Gap(message) from None

    def remedy(self, name: str) -> str:
        """The command that makes a record or a checkpoint."""
        book, _, rest = name.partition("/")
        doing = f"train {rest.split('/')[0]}" if book == "checkpoints" else f"run {book}"
        measures = "" if self.scale == "laptop" else ", where this scale measures it"
        return f"compute it with `qwen-mini {doing} --scale {self.scale}`{measures}"

    def named(self, pattern: str) -> dict[str, str]:
        """Names of records that a pattern fits, by what its `*` stand for."""
        match = re.compile(re.escape(pattern).replace(r"\*", "(.*)")).fullmatch
        return {" ".join(m.groups()): name for name in sorted(self.results) if (m := match(name))}

    def sources(self, expression: str) -> list[str]:
        """The records that an expression reads."""
        patterns = [selector.split(" > ")[0].strip() for _, selector in _split(expression)]
        return [name for pattern in patterns for name in self.named(pattern).values()]


def open_shelf(scale: str, shipped: Path | None = None) -> Shelf:
    """The records and checkpoints of a scale: its own runs before those that ship with the course.

    shipped: a folder in place of `data/records/<scale>`; then nothing else is read but checkpoints. Records of other
    versions of a chapter are left out; BadRecord for one that is damaged.
    """
    found = {}
    for folder in [shipped] if shipped else reversed(records.folders(scale)):  # own runs count
        for path in sorted(folder.glob("*/*.json")):
            record = records.read(path)
            if not other_versions(record["versions"]):
                found[record["name"]] = record
    results = {name: record["result"] for name, record in found.items()}
    return Shelf(scale, results | _checkpoints(scale), found)


def _checkpoints(scale: str) -> dict[str, object]:
    """Manifest, configuration and metrics of every checkpoint of the scale."""
    own, shipped, found = runs() / scale, home() / "data" / "checkpoints", {}
    names = {path.parent.name for folder in (own, shipped) for path in folder.glob("*/config.json")}
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError, artifacts.MissingStage):  # just being replaced
            found |= _checkpoint(name, artifacts.find(scale, name))
    return found


def _checkpoint(name: str, folder: Path) -> dict[str, object]:
    facts = {"manifest": artifacts.read_manifest(folder)}
    facts["config"] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (path := folder / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        facts["metrics"] = (
            {key: [line.get(key) for line in lines] for key in lines[0]} if lines else {}
        )
    return {f"checkpoints/{name}/{kind}": fact for kind, fact in facts.items()}


def _numbers(value, keys: Sequence[str]) -> np.ndarray:
    """What lies under the keys, as an array; what several keys lead to is joined along its first axis."""
    if not keys:
        return np.array(value, float)
    key, rest = keys[0], keys[1:]
    if key == ":":
        return np.array([_numbers(item, rest) for item in value])
    if isinstance(value, Mapping):
        if key.startswith("#"):
            key = list(value)[int(key[1:]) - 1]
        chosen = list(value) if key == "*" else [key] if key in value else key.split("|")
    else:  # a part of a list is a list
        if "/" in key:  # of so many equal parts this one
            part, parts = map(int, key.split("/"))
            size = len(value) // parts
            return _numbers(value[(part - 1) * size : part * size], [":", *rest])
        found = [_numbers(value[int(one)], rest) for one in key.split("|")]
        return found[0] if len(found) == 1 else np.array(found)
    found = [_numbers(value[one], rest) for one in chosen]
    return found[0] if len(found) == 1 else np.concatenate([np.atleast_1d(one) for one in found])


# --- estimates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, (None, None) where there is no spread to take one from, over so many items and runs."""

    value: float
    low: float | None
    high: float | None
    items: int
    runs: int


def estimate(shelf: Shelf, expression: str) -> Estimate:
    """The mean of what a selector finds, of sums and differences by items and runs in pairs, or the ratio `a / b`."""
    parts = _split(expression)
    signs, sides = zip(*((sign, shelf.take(selector)) for sign, selector in parts), strict=True)
    if "/" in signs:
        first, second = (np.mean([x.mean() for x in side.values()]) for side in sides)
        return Estimate(float(first / second), None, None, 1, 1)
    many = [set(side) for side in sides if len(side) > 1]  # runs in pairs: of a seed, of a domain
    paired = sorted(set.intersection(*many)) if many else [""]
    if not paired:
        raise Gap(f"not measured: no run stands on all sides of `{expression}`")
    pick = lambda side, run: _by_item(side[run] if len(side) > 1 else next(iter(side.values())))
    factors = [-1 if sign == "-" else 1 for sign in signs]
    apart = [
        sum(factor * pick(side, run) for factor, side in zip(factors, sides, strict=True))
        for run in paired
    ]
    lowest = -1 if len(sides) > 1 else 0
    more = (
        (1, lowest)
        if all(np.isin(x, (0, 1)).all() for side in sides for x in side.values())
        else ()
    )
    return summary(apart, more, alone=0 < len(many) < len(sides))


def summary(
    apart: Sequence[np.ndarray], more: Sequence[float] = (), alone: bool = False
) -> Estimate:
    """Mean and interval of the (items,) values of each run: chance is in the items, and in the runs if several.

    more: values to add to the items where these are right or wrong, because a few equal answers prove nothing.
    alone: what was subtracted is a single run, taken to spread as much as these.
    """
    values = np.stack(apart)
    k, n = values.shape
    items = np.append(values.mean(0), more) if n > 1 else values.mean(0)
    parts = [(items.var(ddof=1) / len(items), len(items) - 1)] if n > 1 else []
    if k > 1:
        parts.append((values.mean(1).var(ddof=1) * (1 / k + alone), k - 1))
    value, total = float(values.mean()), sum(part for part, _ in parts)
    if (
        total <= (1e-6 * value) ** 2
    ):  # measured once, or each time the same to all digits of a record
        return Estimate(value, None, None, n, k)
    # degrees of freedom of a sum of variances (Welch and Satterthwaite)
    freedom = total**2 / sum(part**2 / df for part, df in parts)
    half = T[max(df for df in T if df <= max(1, math.floor(freedom)))] * total**0.5
    middle = float(items.mean())
    low, high = middle - half, middle + half
    if len(more):  # shares and differences of shares
        low, high = max(low, min(more)), min(high, max(more))
    return Estimate(value, low, high, n, k)


def _split(expression: str) -> list[tuple[str, str]]:
    """`[("", "a"), ("-", "b")]` of `a - b`; the other signs are `plus` and `/`."""
    first, *rest = re.split(r" (-|/|plus) ", expression)
    return [("", first.strip()), *zip(rest[::2], map(str.strip, rest[1::2]), strict=True)]


def _by_item(values: np.ndarray) -> np.ndarray:
    """(items,): the mean of everything that belongs to an item."""
    return values.reshape(len(values), -1).mean(1) if values.ndim else values.reshape(1)


def judge(found: Estimate, expect: str, margin: float = 0.0) -> str:
    """The verdict on a statement, by the interval alone.

    expect: "more" or "less" than 0, or "same": within the margin on both sides. CourseError for anything else.
    """
    if expect not in ("more", "less", "same"):
        raise CourseError(f"a statement expects more, less, same or inside, not {expect!r}")
    if found.low is None:
        return "no interval"
    if expect == "same":
        if -margin < found.low and found.high < margin:
            return "agrees"
        return "opposite" if found.low > margin or found.high < -margin else "does not show"
    sides = {"more": (found.low > 0, found.high < 0), "less": (found.high < 0, found.low > 0)}
    as_said, against = sides[expect]
    return "agrees" if as_said else "opposite" if against else "does not show"


# --- slots -------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Texts with their slots filled; where every number comes from, and what is missing."""

    shelf: Shelf
    names: set[str] = field(default_factory=set)  # records that a slot was filled from
    origins: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    def mark(self, text: str, origin: str) -> str:
        """`text` between marks that no reader sees, which say where it comes from."""
        if not text:
            return ""
        if origin not in self.origins:
            self.origins.append(origin)
        return f"{chr(FIRST_MARK + self.origins.index(origin))}{text}{CLOSE}"

    def fill(self, template: str, place: str = "") -> str:
        """The template with its slots filled. `= …` as a whole is a value of the original at `place`; Gap as in `take`."""
        if template.startswith("="):
            return self.mark(template[1:].strip(), f"original, {place}")
        parts, end = [], 0
        for slot in SLOT.finditer(template):
            parts += [self._words(template[end : slot.start()]), self._slot(slot[1], place)]
            end = slot.end()
        return "".join([*parts, self._words(template[end:])])

    def missing(self, gap: Gap) -> str:
        """The sentence about a gap, once among all gaps; names and commands are marked."""
        if str(gap) not in self.gaps:
            self.gaps.append(str(gap))
        return self.mark(str(gap), "a gap")

    def number(self, expression: str, value: float, form: str) -> str:
        """A number from records, marked with them."""
        sources = self.shelf.sources(expression)
        self.names.update(sources)
        if form == "points":
            text = f"{100 * value:+.1f}"
        else:
            try:
                text = ("yes" if value else "no") if form == "yes" else format(value, form)
            except ValueError as error:
                raise CourseError(f"the slot of `{expression}`: {error}") from None
        return self.mark(text, f"record {'; '.join(sources)}")

    def _slot(self, slot: str, place: str) -> str:
        body, _, form = (part.strip() for part in slot.rpartition(" ; "))
        if slot.strip().startswith("="):
            return self.mark((body or form)[1:].strip(), f"original, {form if body else place}")
        if form.startswith(("sum ", "count ")):  # of all numbers, instead of their mean
            how, _, form = form.partition(" ")
            values = np.concatenate([x.reshape(-1) for x in self.shelf.take(body).values()])
            return self.number(body, values.sum() if how == "sum" else len(values), form)
        found = estimate(self.shelf, body)
        text = self.number(body, found.value, form.removesuffix(", runs"))
        if form.endswith(", runs"):
            text += f" ({self.number(body, found.runs, ',d')} runs)"
        return text

    def _words(self, text: str) -> str:
        """Words between slots: a digit in them belongs to a name, or is refused."""
        marked = NAME.sub(lambda found: self.mark(found[0], "a name"), text)
        if stray := re.search(r"\S*\d\S*", MARKED.sub("", marked)):
            raise CourseError(f"a number outside a slot: {stray[0]!r} in {text.strip()[:60]!r}")
        return marked


def unmarked(text: str) -> str:
    """The text as it is read."""
    return MARKED.sub(r"\2", text)


# --- the document ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    gap: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    heads: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """Lines (label, x, y) or, where the third is a verdict, points (label, (x, low, high), verdict); drawn by `report_files.draw`."""

    name: str
    title: str
    lines: list[tuple]
    axes: dict[str, str]

    @property
    def has_points(self) -> bool:
        """Whether its lines are statements with a verdict."""
        return bool(self.lines) and isinstance(self.lines[0][2], str)


@dataclass(frozen=True)
class Document:
    title: str
    blocks: list[Heading | Paragraph | Table | Figure]
    ledger: Ledger
    claims: list[dict]

    @property
    def origins(self) -> list[str]:
        return self.ledger.origins

    @property
    def gaps(self) -> list[str]:
        return self.ledger.gaps


def write_up(shelf: Shelf, plan: Path = PLAN, facts: Mapping[str, str] | None = None) -> Document:
    """The document that the plan makes of a shelf. facts: what else is said of the run, such as its commit."""
    content = tomllib.loads(plan.read_text(encoding="utf-8"))
    ledger = Ledger(shelf)
    judged = [judged_row(ledger, one) for one in content["claim"]]
    blocks = _head(ledger, facts or {}) + _verdicts(ledger, content, judged)
    for section in content["section"]:
        blocks += _section(ledger, section, judged)
    missing = [Paragraph(ledger.missing(Gap(gap)), gap=True) for gap in ledger.gaps]
    missing = missing or [Paragraph("Nothing: every slot has its record.")]
    blocks += [Heading(2, "What is missing"), *missing, *_cost(ledger)]
    return Document(ledger.fill(content["title"]), blocks, ledger, judged)


def judged_row(ledger: Ledger, row: dict) -> dict:
    """A statement with what was measured, its interval, and the verdict."""
    if missing := {"name", "section", "place", "says", "here", "measured", "expect"} - set(row):
        raise CourseError(f"a statement needs {sorted(missing)[0]!r}: {row.get('name', row)}")
    expression, form = row["measured"], row.get("form", "+.3f")
    cells = {"name": row["name"], "section": row["section"]}
    cells |= {"place": ledger.mark(row["place"], "place in the original")}
    cells |= {"says": ledger.fill(row["says"], row["place"]), "here": ledger.fill(row["here"])}
    if "margin" in row:
        cells["here"] += f"; margin {ledger.mark(str(row['margin']), 'the plan')} on both sides"
    try:
        found = estimate(ledger.shelf, expression)
        if "interval" in row:  # as the record has it
            low, high = next(iter(ledger.shelf.take(row["interval"]).values()))
            found = Estimate(found.value, float(low), float(high), found.items, found.runs)
        if row["expect"] == "inside":
            verdict = "agrees" if found.low <= found.value <= found.high else "opposite"
        else:
            verdict = judge(found, row["expect"], row.get("margin", 0.0))
        cells["towards"] = _towards(found, row["expect"])
    except Gap as gap:
        blank = {"measured": ledger.missing(gap), "over": "", "towards": None}
        return cells | blank | {"verdict": "not measured"}
    say = lambda value: ledger.number(expression, value, form)
    measured = say(found.value)
    if found.low is not None:
        measured += f" [{say(found.low)}, {say(found.high)}]"
    measured += {"points": " points"}.get(form, "")
    sizes = (found.items, row.get("units", "items")), (found.runs, "runs")
    over = [f"{ledger.number(expression, n, ',d')} {what}" for n, what in sizes if n > 1]
    return cells | {"measured": measured, "over": ", ".join(over), "verdict": verdict}


def _towards(found: Estimate, expect: str) -> tuple[float, float, float] | None:
    """Value and ends of the interval in units of half of it, positive where the original says that it lies."""
    if found.low is None or expect not in ("more", "less"):
        return None
    ends = (found.value, found.low, found.high)
    sign = 1 if expect == "more" else -1
    value, low, high = (2 * sign * end / (found.high - found.low) for end in ends)
    return value, min(low, high), max(low, high)


def _head(ledger: Ledger, facts: Mapping[str, str]) -> list:
    said = [f"{name}: {ledger.mark(value, 'this run')}" for name, value in facts.items()]
    return [Paragraph(" · ".join(said))] if said else []


def _verdicts(ledger: Ledger, content: dict, judged: list[dict]) -> list:
    """The summary: how many statements agree, by which rule, and a figure of all of them."""
    count = lambda n: ledger.mark(str(n), "count of this report")
    found = {v: sum(row["verdict"] == v for row in judged) for v in VERDICTS}
    said = "; ".join(f"{verdict}: {count(n)}" for verdict, n in found.items() if n)
    lines = [
        (f"{unmarked(row['place'])} {row['name']}", row["towards"], row["verdict"])
        for row in judged
        if row["towards"] is not None
    ]
    axes = {"x": "effect towards what is said, in half widths of its interval", "scale": "symlog"}
    blocks = [
        Heading(2, "Summary"),
        *(Paragraph(ledger.fill(text)) for text in content["summary"]),
        Paragraph(f"Of {count(len(judged))} statements, by verdict: {said}."),
    ]
    return blocks + ([Figure("statements", content["legend"], lines, axes)] if lines else [])


def _section(ledger: Ledger, section: dict, judged: list[dict]) -> list:
    """A section: its paragraphs, tables and figures in the order of the plan, then its statements."""
    place = ledger.mark(section["place"], "place in the original")
    blocks = [Heading(2, f"{place} {section['title']}")]
    for part in section.get("part", []):
        if "text" in part:
            blocks.append(_paragraph(ledger, part["text"], section["place"]))
        elif "rows" in part:
            blocks += _table(ledger, part)
        else:
            blocks.append(_figure(ledger, part))
    own = [row for row in judged if row["section"] == section["place"]]
    if own:
        keys = {"place": "where", "says": "the report says", "here": "here", "measured": "measured"}
        keys |= {"over": "over", "verdict": "verdict"}
        rows = [[row[key] for key in keys] for row in own]
        blocks.append(Table("Statements", list(keys.values()), rows))
    return blocks


def _paragraph(ledger: Ledger, template: str, place: str) -> Paragraph:
    try:
        return Paragraph(ledger.fill(template, place))
    except Gap as gap:
        return Paragraph(ledger.missing(gap), gap=True)


def _table(ledger: Ledger, part: dict) -> list:
    """A table; below it, what its empty cells are missing."""
    gaps, rows = [], []
    for row in part["rows"]:
        cells = []
        for cell in row:
            try:
                cells.append(ledger.fill(cell, part["place"]))
            except Gap as gap:
                gaps.append(ledger.missing(gap))
                cells.append("not measured")
        rows.append(cells)
    place = ledger.mark(part["place"], "place in the original")
    heads = [ledger.fill(head, part["place"]) for head in part["heads"]]
    notes = [Paragraph(gap, gap=True) for gap in dict.fromkeys(gaps)]
    return [Table(f"{place}: {ledger.fill(part['title'], part['place'])}", heads, rows), *notes]


def _figure(ledger: Ledger, part: dict) -> Figure | Paragraph:
    """Lines through what the records of each series hold, x from a column or from what `*` stands for."""
    place = ledger.mark(part["place"], "place in the original")
    lines, drawn = [], []
    try:
        for series in part["series"]:
            found = ledger.shelf.take(series["y"])
            if "x" in series:
                (y,), (x,) = found.values(), ledger.shelf.take(series["x"]).values()
                x = x * estimate(ledger.shelf, series["times"]).value
            else:
                x, y = [float(run) for run in found], [values.mean() for values in found.values()]
            order = np.argsort(x)
            lines.append((series["label"], np.array(x)[order], np.array(y)[order]))
            points = ledger.number(series["y"], len(order), ",d")
            drawn.append(f"{series['label']}: {points} points")
    except Gap as gap:
        return Paragraph(ledger.missing(gap), gap=True)
    title = f"{place}: {ledger.fill(part['title'], part['place'])}"
    return Figure(part["figure"], f"{title} ({', '.join(drawn)})", lines, part["axes"])


def _cost(ledger: Ledger) -> list:
    """Seconds, machine, precision and date of all records by notebook, and of the checkpoints; seeds of these."""
    rows, by_book = [], {}
    for name, record in ledger.shelf.records.items():
        by_book.setdefault(name.partition("/")[0], []).append(
            (record["seconds"], record["provenance"])
        )
    for name, result in ledger.shelf.results.items():
        if name.startswith("checkpoints/") and name.endswith("/manifest"):
            how = result.get("provenance", {})
            own = (how.get("seconds", 0), how | {"seed": result.get("seed")})
            by_book.setdefault(name.removesuffix("/manifest"), []).append(own)
    for book, made in sorted(by_book.items()):
        each = lambda key, made=made: sorted(
            {str(how[key]) for _, how in made if how.get(key) is not None}
        )
        dates = each("date")
        cells = [
            str(len(made)),
            f"{sum(seconds for seconds, _ in made):,.0f}",
            ", ".join(each("seed")),
        ]
        cells += [", ".join(each("processor")), ", ".join(each("precision"))]
        cells.append(" to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "")
        rows.append([ledger.mark(cell, f"provenance of {book}") for cell in [book, *cells]])
    total = sum(seconds for made in by_book.values() for seconds, _ in made)
    said = ledger.mark(f"{total:,.0f}", "provenance of all records and checkpoints")
    heads = ["made by", "records", "seconds", "seed", "processor", "precision", "date"]
    blocks = [Heading(2, "What it cost")]
    if not rows:
        return [*blocks, Paragraph("Nothing was recorded at this scale.")]
    text = (
        f"In all {said} seconds, of one thread each for records and of one or two for checkpoints."
    )
    return [*blocks, Paragraph(text), Table("Cost", heads, rows)]


def note(document: Document) -> None:
    """Let the running notebook remember which records and checkpoints it shows."""
    shelf, used = document.ledger.shelf, sorted(document.ledger.names)
    keys = {name: shelf.records[name]["key"] for name in used if name in shelf.records}
    records.note_shown("recalled", keys)
    stages = {name.split("/")[1] for name in used if name.startswith("checkpoints/")}
    made = {
        name: shelf.results[f"checkpoints/{name}/manifest"].get("key") for name in sorted(stages)
    }
    records.note_shown("stages", {name: key for name, key in made.items() if key})
