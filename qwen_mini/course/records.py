"""Experiments: what a notebook measures is computed once, kept as JSON, and found again by what it was computed from.

A record's key holds the function's syntax (not its comments, layout and local names), that of the notebook's functions
it calls, its inputs and the versions of the chapters it uses. Precision, processor and seconds are provenance.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import linecache
import os
import re
import symtable
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import artifacts, hardware
from .errors import CourseError
from .paths import home, runs, shown
from .processes import side_by_side
from .progress import Progress, clock
from .provenance import provenance
from .scales import SECTIONS, ScaleConfig, Sections, section_digest, tell_reads
from .stages import Stage, digest, making, weights_hash
from .syntax import normalised
from .versions import imported_chapters, other_versions, versions, versions_of

TIMING = "timing"  # a tolerance: seconds and speeds are told, not compared
MANY = 8  # lists of so many numbers are compared by their means


class BadRecord(CourseError):
    """A record that cannot be used."""


@dataclass
class Book:
    """The notebook that is running."""

    name: str
    scale: str
    seed: int
    fresh: bool
    dtype: str
    module: str | None
    process: int
    sections: dict[str, str] = dataclasses.field(default_factory=dict)


_book: Book | None = None


def open_notebook(notebook: str, config: ScaleConfig, seed: int, fresh: bool = False) -> None:
    """Called by `course.start`: whose records these are, and whether to compute them anew."""
    from .nb import Notebook

    global _book
    path = home() / "notebooks" / f"{notebook}.ipynb"
    module = Notebook(path).module if path.exists() else None
    fresh = fresh or asked_anew()
    _book = Book(notebook, config.name, seed, fresh, config.run.dtype, module, os.getpid())
    artifacts.write_file(used_file(config.name, notebook), "{}\n")
    tell_reads(note_section)


def asked_anew() -> bool:
    """Whether the environment asks to compute records anew: `FRESH=1`."""
    return os.environ.get("FRESH", "") not in ("", "0")


def experiment(name: str, fn: Callable, /, *, tolerance: float | str = 0.05, **inputs):
    """The result of `fn(**inputs)`, from its record or computed now; plain JSON data.

    `tolerance`: how far a number may be from the record when another machine computes it anew, as a share of it (of 1
    where it is smaller than 1); `"timing"` for seconds and speeds. What `fn` reads must be an input, a function or a constant of the notebook, or
    come from a chapter. CourseError names what is not, and what JSON cannot hold.
    """
    return experiments({name: functools.partial(fn, **inputs)}, tolerance=tolerance)[name]


def experiments(calls: Mapping[str, functools.partial], *, tolerance: float | str = 0.05) -> dict:
    """Results by name. What has no record is computed side by side, each call in a process with one thread."""
    if _book is None:
        raise CourseError("experiments belong to a notebook: call course.start(…) first")
    keys = {name: key_of(name, call) for name, call in calls.items()}
    found = {name: None if _book.fresh else _find(name, keys[name]) for name in calls}
    missing = {name: call for name, call in calls.items() if not found[name]}
    if missing and os.environ.get("QWEN_MINI_RECORDS") == "only":
        first = f"{_book.name}/{next(iter(missing))}"
        raise _missing(_book.name, first, _book.scale, "is missing, or is of other inputs")
    named = os.environ.get("QWEN_MINI_VERIFY", "").split("\n")
    doubted = [name for name in calls if found[name] and f"{_book.name}/{name}" in named]
    again = {name: calls[name] for name in doubted}
    for name, record in _compute(again, keys, tolerance, stored=False).items():
        _verify(name, found[name], record)
    known = found | _compute(missing, keys, tolerance, stored=True)
    _note("records", keys)
    return {name: known[name]["result"] for name in calls}


def opted(variable: str, what: str, calls: Mapping[str, functools.partial], **options) -> dict:
    """`experiments(calls)` of what is opt-in; where it cannot be had without `variable` set to 1, none, and a line on it.

    what: what setting it would do.
    """
    try:
        return experiments(calls, **options)
    except CourseError:
        if os.environ.get(variable) == "1":
            raise
        print(f"left out: {variable}=1 would {what}")
        return {}


def recall(notebook: str, name: str):
    """The result of another notebook's experiment, as that notebook left it."""
    scale = _book.scale if _book else "laptop"
    for record in _stored(scale, notebook, name):
        if not other_versions(record["versions"]):
            if _book:
                _note("recalled", {f"{notebook}/{name}": record["key"]})
            return record["result"]
    raise _missing(notebook, f"{notebook}/{name}", scale, "is missing")


def _missing(notebook: str, name: str, scale: str, what: str) -> BadRecord:
    make = f"make it with `qwen-mini run {notebook} --scale {scale}`"
    return BadRecord(f"the record {name} of scale {scale} {what}: {make}")


# --- computing ---------------------------------------------------------------------------------------------------


def _compute(
    calls: Mapping[str, functools.partial], keys: dict[str, str], tolerance, stored: bool
) -> dict[str, dict]:
    """New records of the calls; timings one after the other, so that none disturbs another."""
    import torch

    if not calls:
        return {}
    expected = sum(_expected(name) or 0 for name in calls)
    threads = 1 if tolerance == TIMING else torch.get_num_threads()
    about = f", about {clock(expected / min(threads, len(calls)))}" if expected else ""
    progress, done = Progress(), []
    progress.show(f"computing {len(calls)} experiment(s){about} …")

    def finished(name, seconds):
        done.append(name)
        progress.show(f"{len(done)} of {len(calls)} · {name} took {clock(seconds)}{about}")

    made_now = lambda n: functools.partial(_made, n, calls[n], keys[n], tolerance, stored)
    work = {name: made_now(name) for name in calls}
    groups = [{name: call} for name, call in work.items()] if tolerance == TIMING else [work]
    made = {}
    try:
        for group in groups:
            made |= side_by_side(group, on_done=finished)
    finally:  # also where one fails: its message stands alone
        progress.clear()
    return made


def _made(name: str, call: functools.partial, key: str, tolerance, stored: bool) -> dict:
    """In the process that computes: the record, stored as soon as it is there, whatever becomes of the others."""
    _make_stages(list(call.keywords.values()))  # whose time is not the experiment's
    begun = time.perf_counter()
    result = plain(call(), name)
    record = _record(name, call, key, tolerance, result, time.perf_counter() - begun)
    if stored:
        write(record_path(runs() / _book.scale / "records", _book.name, name), record)
    return record


def _make_stages(value) -> None:
    """Every stage among the inputs, made now if it is not there."""
    if isinstance(value, Stage):
        value.folder()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            _make_stages(item)


def _record(name: str, call, key: str, tolerance, result, seconds: float) -> dict:
    facts = {"name": f"{_book.name}/{name}", "key": key, "versions": _traced(name, call)[1]}
    facts |= {"tolerance": tolerance, "seconds": round(seconds, 1)}
    facts["provenance"] = provenance(hardware.pick_dtype(_book.dtype))
    return sealed(facts | {"result": result})


def sealed(record: dict) -> dict:
    """The record with the digest of all that it says."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return content | {"sha256": digest(content)}


def _expected(name: str) -> float | None:
    """Seconds that the last record of this name took, whatever it was made from."""
    with contextlib.suppress(BadRecord):
        for record in _stored(_book.scale, _book.name, name):
            return record["seconds"]
    return None


def plain(value, name: str):
    """`value` as JSON gives it back, numbers to seven digits; CourseError for what JSON cannot hold."""
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if value - value != 0:
            instead = "which JSON cannot hold: return None instead"
            raise CourseError(f"the experiment {name!r} returns {value}, {instead}")
        return float(f"{value:.7g}")
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            returns = f"the experiment {name!r} returns the key {wrong[0]!r}"
            raise CourseError(f"{returns}: JSON wants text, use str(…)")
        return {key: plain(item, name) for key, item in value.items()}
    instead = "which JSON cannot hold: return numbers, texts, lists, dicts"
    raise CourseError(f"the experiment {name!r} returns a {type(value).__name__}, {instead}")


# --- files -------------------------------------------------------------------------------------------------------


def _stored(scale: str, notebook: str, name: str) -> Iterator[dict]:
    """The records of that name, checked: of the scale's own runs, then those that ship with the course."""
    for folder in folders(scale):
        path = record_path(folder, notebook, name)
        if path.exists():
            yield read(path)


def folders(scale: str) -> list[Path]:
    """Where a scale's records are looked for: its own runs, then what ships with the course if that may be used."""
    shipped = [home() / "data" / "records" / scale] if artifacts.use_shipped() else []
    return [runs() / scale / "records", *shipped]


def record_path(folder: Path, notebook: str, name: str) -> Path:
    """`folder/<notebook>/<name>.json`; what does not fit into a file's name becomes `_`, other letters a digest."""
    stem = re.sub(r"[^A-Za-z0-9.+-]+", "_", name)
    if not name.isascii():
        stem += "-" + digest(name)[:6]
    return folder / notebook / f"{stem}.json"


def write(path: Path, record: dict) -> None:
    """Store a record: a line per entry, so that a change is a small one."""
    text = json.dumps(record, ensure_ascii=False, indent=0, separators=(",", ":"))
    artifacts.write_file(path, text.replace("\n", "") + "\n")


def read(path: Path) -> dict:
    """A record, checked: whole, and as it was written. BadRecord says what is wrong and what to do."""
    entries = set("name key versions tolerance seconds provenance result sha256".split())
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(record, dict) and entries <= set(record)
    except (OSError, ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise BadRecord(f"{shown(path)} is not a whole record: delete it, and it is computed anew")
    if record != sealed(record):
        raise BadRecord(f"{shown(path)} was changed by hand: delete it, and it is computed anew")
    return record


def _find(name: str, key: str) -> dict | None:
    """The record of this key; another name may have the same file."""
    wanted = key, f"{_book.name}/{name}"
    stored = _stored(_book.scale, _book.name, name)
    return next((r for r in stored if (r["key"], r["name"]) == wanted), None)


def used_file(scale: str, notebook: str) -> Path:
    """Which stages, records and sections of scales a notebook used when it ran last."""
    return runs() / scale / "notebooks" / f"{notebook}.used.json"


def _note(kind: str, keys: dict[str, str]) -> None:
    path = used_file(_book.scale, _book.name)
    used = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    used.setdefault(kind, {}).update(keys)
    artifacts.write_file(path, json.dumps(used, indent=1, sort_keys=True) + "\n")


def note_shown(kind: str, keys: Mapping[str, str]) -> None:
    """Remember that the running notebook shows stages ("stages") or records of others ("recalled"), by their keys."""
    if _book is not None and keys:
        _note(kind, dict(keys))


def note_stage(stage: Stage) -> None:
    """Remember that the running notebook used a stage; what runs beside it notes nothing."""
    if _book is not None and _book.process == os.getpid() and _book.scale == stage.scale:
        _note("stages", {stage.name: stage.key})


def note_section(config: ScaleConfig, name: str) -> None:
    """Remember that the running notebook, or a chapter's function for it, read a section of a scale."""
    place = f"{config.name}/{name}"
    if _book is None or _book.process != os.getpid() or making():
        return
    if place not in _book.sections:
        _book.sections[place] = section_digest(config, name)
        _note("sections", _book.sections)


# --- verifying ---------------------------------------------------------------------------------------------------


def _verify(name: str, stored: dict, anew: dict) -> None:
    """Compare a record with the same computed anew, within the tolerance that it states."""
    if difference := differs(stored["result"], anew["result"], stored["tolerance"]):
        made = "{provenance[processor]} in {provenance[precision]}".format_map
        how = f"tolerance {stored['tolerance']}; recorded on {made(stored)}, now on {made(anew)}"
        raise BadRecord(f"the record {stored['name']} does not verify: {difference} ({how})")
    print(f"verified {stored['name']}")


def differs(stored, found, tolerance: float | str, where: str = "result") -> str:
    """What differs by more than the tolerance, '' if nothing does.

    With a tolerance, many numbers are compared by their mean, also where they stand in lists of lists (problems and
    samples), and texts, which a model may word in another way on another processor, are not compared.
    """
    other = f"{where} was {stored!r:.60} and is {found!r:.60}"
    both_numbers = all(isinstance(x, int | float) for x in (stored, found))
    if type(stored) is not type(found) and not both_numbers:
        return other
    if isinstance(stored, dict):
        if stored.keys() != found.keys():
            return f"{where} has other keys"
        parts = (differs(stored[key], found[key], tolerance, f"{where}.{key}") for key in stored)
        return next(filter(None, parts), "")
    if isinstance(stored, list):
        before, now = list(_leaves(stored)), list(_leaves(found))
        numbers = all(isinstance(x, int | float) for x in (*before, *now))
        if tolerance not in (TIMING, 0) and numbers and len(before) == len(now) >= MANY:
            means = sum(before) / len(before), sum(now) / len(now)
            return differs(*means, tolerance, f"the mean of {where}")
        if len(stored) != len(found):
            counts = f"{where} had {len(stored)} entries and has {len(found)}"
            return "" if tolerance == TIMING else counts
        pairs = enumerate(zip(stored, found, strict=True))
        parts = (differs(*pair, tolerance, f"{where}[{i}]") for i, pair in pairs)
        return next(filter(None, parts), "")
    if tolerance == TIMING or stored == found or (tolerance and isinstance(stored, str)):
        return ""
    near = both_numbers and abs(stored - found) <= tolerance * max(1.0, abs(stored))
    return "" if near else other


def _leaves(value) -> Iterator:
    """What stands in a list, and in the lists in it."""
    for item in value:
        if isinstance(item, list):
            yield from _leaves(item)
        else:
            yield item


# --- keys --------------------------------------------------------------------------------------------------------


def key_of(name: str, call: functools.partial) -> str:
    """The key of an experiment: function, inputs, versions."""
    parts, used = _traced(name, call)
    return digest(parts | {"versions": used})


def _traced(name: str, call: functools.partial) -> tuple[dict, dict[str, int]]:
    """What an experiment computes and from what, and the versions of the chapters that it uses."""
    if not isinstance(call, functools.partial) or call.args:
        by_name = "needs its inputs by name: partial(function, input=…)"
        raise CourseError(f"the experiment {name!r} {by_name}")
    trace, given = Trace(name), sorted(call.keywords.items())
    function = trace.function(call.func)
    inputs = {key: trace.value(value, f"its input {key!r}") for key, value in given}
    return {"function": function, "inputs": inputs}, versions_of(*trace.modules)


class Trace:
    """What a function depends on, as JSON-able content, and the chapters that it uses."""

    def __init__(self, name: str):
        self.name, self.modules, self.seen = name, set(), {}

    def function(self, fn) -> list:
        """A function or class: a chapter's by its name, the notebook's own by its syntax and what it reads."""
        fn = inspect.unwrap(fn)
        if chapter := self._chapter(fn):
            self.modules.add(chapter)
            return ["chapter", chapter, fn.__qualname__]
        if _is_library(fn.__module__):
            return ["library", fn.__module__, fn.__qualname__]
        if id(fn) in self.seen:
            return ["again", self.seen[id(fn)]]
        self.seen[id(fn)] = len(self.seen)
        source = self._source(fn)
        self.modules |= imported_chapters(source) & set(versions())
        is_function = isinstance(fn, types.FunctionType)
        scope = fn.__globals__ if is_function else vars(sys.modules[fn.__module__])
        found = {name: scope[name] for name in _globals_read(source) & set(scope) - {fn.__name__}}
        if getattr(fn, "__closure__", None):
            cells = zip(fn.__code__.co_freevars, fn.__closure__, strict=True)
            found |= {name: cell.cell_contents for name, cell in cells}
        reads = {name: self._read(name, value) for name, value in sorted(found.items())}
        return ["own", normalised(source), reads]

    def _source(self, fn) -> str:
        try:
            source = _class_source(fn) if isinstance(fn, type) else inspect.getsource(fn)
            source = textwrap.dedent(source)
            if fn.__name__ == "<lambda>":
                raise ValueError
            compile(source, "experiment", "exec")
        except (OSError, TypeError, ValueError, SyntaxError):
            what = f"the function {getattr(fn, '__name__', fn)!r}, whose source is not at hand"
            uses = f"the experiment {self.name!r} uses {what}"
            raise CourseError(f"{uses}: write it with def in a cell") from None
        return source

    def _chapter(self, thing) -> str | None:
        """The chapter that exports a function or class, also while its own notebook defines it."""
        module = getattr(thing, "__module__", "") or ""
        if chapter := _chapter_of(module):
            return chapter
        foreign = module.partition(".")[0] in ("qwen_mini", "torch", "numpy")
        return None if foreign else _own_chapter(getattr(thing, "__name__", ""))

    def _read(self, name: str, value):
        """A global that a notebook's function reads."""
        if isinstance(value, types.ModuleType):
            self.modules |= {_chapter_of(value.__name__)} - {None}
            return ["module", value.__name__]
        if isinstance(value, types.BuiltinFunctionType):
            return ["library", value.__qualname__]
        if isinstance(value, types.FunctionType | type):
            return self.function(value)
        if _is_precision(value):
            return ["precision"]
        if _constant(value):
            return ["constant", self.value(value, name)]
        if own := _exporter(name, value):
            self.modules.add(own)
            return ["chapter", own, name]
        reads = f"the experiment {self.name!r} reads `{name}`"
        neither = "which is neither a function nor a constant of the notebook"
        raise CourseError(f"{reads}, {neither}: pass it as an input, {name}={name}")

    def value(self, value, what: str):
        """An input, as JSON-able content."""
        if _is_precision(value):
            return ["precision"]
        each = lambda values: [self.value(item, what) for item in values]  # noqa: E731
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Stage():
                self.modules.update(value.versions)
                note_stage(value)
                return ["stage", value.name, value.identity()]
            case Path():
                if value.is_dir():
                    return ["weights", weights_hash(value)]
                return ["file", _hash(value.read_bytes())]
            case Sections():
                return ["scale", _sections(value.sections, "name", "run")]
            case ScaleConfig():
                part = value.only(*SECTIONS).sections
                return ["scale", _sections(part, "name", "run", "measure")]
            case types.FunctionType() | type():
                return self.function(value)
            case functools.partial():
                given = sorted(value.keywords.items())
                named = {key: self.value(item, what) for key, item in given}
                return ["partial", self.function(value.func), each(value.args), named]
            case Mapping():
                return ["map", [each(pair) for pair in value.items()]]
            case list() | tuple():
                return each(value)
            case set() | frozenset():
                return ["set", sorted(map(json.dumps, each(value)))]
            case range():
                return ["range", value.start, value.stop, value.step]
        if dataclasses.is_dataclass(value):
            self.modules |= {self._chapter(type(value))} - {None}
            names = [field.name for field in dataclasses.fields(value)]
            facts = {name: self.value(getattr(value, name), what) for name in names}
            return [type(value).__qualname__, facts]
        if hasattr(value, "tolist") and hasattr(value, "shape"):
            if hasattr(value, "detach"):
                value = value.detach().cpu()
                value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
            kind = [] if str(value.dtype) == "float32" else [str(value.dtype)]
            return ["array", list(value.shape), _hash(value.tobytes()), *kind]
        cannot = f"the experiment {self.name!r} cannot tell {what} by its content"
        instead = f"pass data, a stage or a folder instead of a {type(value).__name__}"
        raise CourseError(f"{cannot}: {instead}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sections(sections: Mapping, *left_out: str) -> dict:
    kept = {name: section for name, section in sections.items() if name not in left_out}
    return {name: dataclasses.asdict(section) for name, section in kept.items()}


def _class_source(cls: type) -> str:
    """The text of a class in a cell, found by its methods: `inspect` looks for a file, which a kernel has not."""
    methods = [value for value in vars(cls).values() if isinstance(value, types.FunctionType)]
    for method in methods:
        text = "".join(linecache.getlines(method.__code__.co_filename))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                return ast.unparse(node)
    return inspect.getsource(cls)


def _is_library(module: str) -> bool:
    """Whether code of this module is no part of a key: Python's own, or of a library that chapters build on."""
    package = module.partition(".")[0]
    return package in ("qwen_mini", "torch", "numpy") or package in sys.stdlib_module_names


def _is_precision(value) -> bool:
    """A dtype or a device: provenance, part of no key."""
    return type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device")


def _constant(value) -> bool:
    """Plain data, whatever is nested in it."""
    if value is None or isinstance(value, bool | int | float | str | range):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_constant, value))
    return isinstance(value, dict) and all(_constant(k) and _constant(v) for k, v in value.items())


def _chapter_of(module: str) -> str | None:
    """`sft` of `qwen_mini.sft`; None for what is no chapter."""
    package, _, name = module.partition(".")
    return name if package == "qwen_mini" and name in versions() else None


def _own_chapter(name: str) -> str | None:
    """The chapter whose notebook is running, if it exports this name."""
    own = _book.module if _book else None
    if own not in versions():
        return None
    exported = getattr(importlib.import_module(f"qwen_mini.{own}"), "__all__", ())
    return own if name in exported else None


def _exporter(name: str, value) -> str | None:
    """The chapter that a global comes from: imported from it, or exported by the one whose notebook is running."""
    loaded = {chapter: sys.modules.get(f"qwen_mini.{chapter}") for chapter in versions()}
    holding = (one for one, module in loaded.items() if getattr(module, name, None) is value)
    return next(holding, None) or _own_chapter(name)


def _globals_read(source: str) -> set[str]:
    """Names that code takes from the module around it."""

    def look(table) -> set[str]:
        read = (s for s in table.get_symbols() if s.is_global() and s.is_referenced())
        names = {symbol.get_name() for symbol in read}
        return names.union(*map(look, table.get_children()))

    return look(symtable.symtable(source, "experiment", "exec"))
