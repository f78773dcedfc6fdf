"""Goldens: stored numbers that decide whether a change of code changed what a chapter computes.

A golden is a function without arguments that returns plain data: numbers, ids, verdicts, hashes.
Its value is stored in `tests/goldens/<chapter>.json`, beside the versions of the chapter and of all
that it imports. Floats may differ by `TOLERANCE`, everything else is compared exactly.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from qwen_mini.course import hardware
from qwen_mini.course.versions import closure, versions, versions_of

FOLDER = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # of a float, or of the largest float in its list
NEGLIGIBLE = 1e-7  # a difference that no float is too small for
GOLDENS: dict[str, dict[str, Callable]] = {}


def golden(module: str, name: str):
    """Decorator: enter a function as the golden `name` of a chapter module."""

    def enter(function: Callable) -> Callable:
        known = GOLDENS.setdefault(module, {})
        if name in known:
            raise ValueError(f"{module} has two goldens named {name!r}")
        known[name] = function
        return function

    return enter


# ---------------------------------------------------------------- values
def digest(value) -> str:
    """Twelve hex digits of anything that `plain` knows: for texts and ids too long to store."""
    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()[:12]


def summary(x: torch.Tensor) -> dict[str, list[float]]:
    """A tensor as [norm, projection] and eight entries; the projection sees signs and places."""
    flat = x.detach().double().flatten()
    projection = flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64))
    places = torch.linspace(0, len(flat) - 1, min(8, len(flat))).long()
    return {"whole": [flat.norm(), projection], "some": flat[places]}


def files(folder: Path) -> dict[str, str]:
    """Path → hash of every file below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in found]
    names = [path.relative_to(folder).as_posix() for path in found]
    return dict(zip(names, hashes, strict=True))


def columns(records: list[dict]) -> dict[str, list]:
    """Records of steps, name → its values step by step, so that one scale serves all of them."""
    return {name: [record[name] for record in records] for name in records[0]}


def plain(value):
    """`value` as JSON reads it back; floats with nine digits."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a golden holds finite numbers, not {value}")
        return float(f"{value:.9g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"a golden holds plain data, not {type(value).__name__}")


@contextlib.contextmanager
def same_everywhere() -> Iterator[None]:
    """One thread, the CPU, a fixed seed; threads and random state are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            mock.patch.object(hardware, "device", lambda: "cpu"),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def compute(module: str, name: str):
    """The value of one golden with today's code."""
    try:
        with same_everywhere():
            return plain(GOLDENS[module][name]())
    except Exception as error:
        error.add_note(
            f"The golden {module} · {name} could not be computed: undo the change or mend it."
        )
        raise


# ---------------------------------------------------------------- comparison
def differences(stored, found, path: str = "") -> list[str]:
    """What differs, as "path: stored …, found …"; an empty list if nothing does."""
    if isinstance(stored, dict) and isinstance(found, dict) and stored.keys() == found.keys():
        return [
            line for key in stored for line in differences(stored[key], found[key], f"{path}/{key}")
        ]
    if isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        if all(map(is_number, [*stored, *found])) and any(map(is_float, [*stored, *found])):
            scale = max(map(abs, stored), default=0.0)
        else:
            scale = None
        pairs = enumerate(zip(stored, found, strict=True))
        return [line for i, (a, b) in pairs for line in one(a, b, f"{path}/{i}", scale)]
    return one(stored, found, path)


def one(stored, found, path: str, scale: float | None = None) -> list[str]:
    """`differences` of two leaves, or of what is no leaf after all."""
    if (
        isinstance(stored, dict | list)
        and type(stored) is type(found)
        and len(stored) == len(found)
    ):
        if not isinstance(stored, dict) or stored.keys() == found.keys():
            return differences(stored, found, path)
    if is_number(stored) and is_number(found) and (is_float(stored) or is_float(found)):
        allowed = TOLERANCE * (abs(stored) if scale is None else scale) + NEGLIGIBLE
        same = stored == found or abs(stored - found) <= allowed
    else:
        same = type(stored) is type(found) and stored == found
    return [] if same else [f"{path or '/'}: stored {shown(stored)}, found {shown(found)}"]


def is_float(x) -> bool:
    return isinstance(x, float)


def is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def shown(value, most: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------- files
def read(module: str) -> dict:
    """{"versions": …, "goldens": name → value}; empty if nothing has been stored."""
    path = FOLDER / f"{module}.json"
    if not path.exists():
        return {"versions": {}, "goldens": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def save(module: str, values: dict) -> None:
    """Store all values of a chapter, one golden a line, with the versions of today."""
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
    ]
    body = ",\n".join(lines)
    text = f'{{"versions": {json.dumps(versions_of(module))},\n"goldens": {{\n{body}\n}}}}\n'
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{module}.json").write_text(text, encoding="utf-8")


@functools.cache
def computed(module: str) -> dict:
    """All goldens of a chapter, computed once in a process."""
    return {name: compute(module, name) for name in GOLDENS[module]}


def moved(module: str, values: dict | None = None) -> dict[str, list[str]]:
    """Golden → what differs from the stored value, of goldens that differ or are gone."""
    values, result = computed(module) if values is None else values, {}
    for name, stored in read(module)["goldens"].items():
        lines = differences(stored, values[name]) if name in values else ["no longer computed"]
        if lines:
            result[name] = lines
    return result


def fresh(module: str) -> list[str]:
    """Goldens that nobody has stored yet."""
    return [name for name in GOLDENS[module] if name not in read(module)["goldens"]]


def command(module: str) -> str:
    return f"`python tests/golden_check.py --write {module}`"


def report(module: str, values: dict | None = None) -> str:
    """What a failing test says: module, golden, values and the remedy; "" if nothing moved.

    values: golden → value, those of today's code by default.
    """
    found = moved(module, values)
    if not found:
        return ""
    lines = [f"{len(found)} of the goldens of `{module}` moved:"]
    for name, differing in found.items():
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        lines += [f"  {module} · {name} {line}" for line in differing[:3]]
        lines[-1] += more
    roots = [
        other for other in sorted(closure(module) - {module}) if values is None and moved(other)
    ]
    if roots:
        lines.append(
            f"So did goldens of {', '.join(roots)}, which `{module}` imports: begin there."
        )
    lines.append(
        f"Undo the change, or, if it is meant, raise `{module}` in qwen_mini/course/versions.toml "
        f"and write the goldens anew: {command(module)}"
    )
    return "\n".join(lines)


def stale(module: str) -> str:
    """Why a chapter's file does not fit versions.toml, or ""."""
    stored, wanted = read(module)["versions"], versions_of(module)
    changed = [
        name for name in wanted.keys() | stored.keys() if stored.get(name) != wanted.get(name)
    ]
    if not changed:
        return ""
    numbers = ", ".join(f"{n} {stored.get(n)} → {wanted.get(n)}" for n in sorted(changed))
    first = next((name for name in sorted(changed) if name in wanted), module)
    return f"goldens/{module}.json was written at other versions ({numbers}): {command(first)}"


def refusal(module: str) -> str:
    """Why a chapter's goldens may not be written now, or ""."""
    found, stored = moved(module), read(module)["versions"]
    wanted = versions_of(module)
    if not found or any(wanted.get(name, number) > number for name, number in stored.items()):
        return ""
    return (
        f"{', '.join(found)} moved, but neither `{module}` nor a chapter that it imports has a "
        "higher number in qwen_mini/course/versions.toml than in the stored file: undo the change "
        "or raise the number first"
    )


def write(module: str) -> list[str]:
    """Store a chapter's goldens and those of all chapters that import it; returns their names.

    ValueError, with nothing written, if a stored value moved and no number was raised.
    """
    modules = [name for name in GOLDENS if name == module or module in closure(name)]
    reasons = {name: reason for name in modules if (reason := refusal(name))}
    if reasons:
        raise ValueError("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
    for name in modules:
        old, new = read(name)["goldens"], computed(name)
        kept = {
            golden
            for golden in old.keys() & new.keys()
            if not differences(old[golden], new[golden])
        }
        save(name, {golden: old[golden] if golden in kept else new[golden] for golden in new})
    return modules


def chapters() -> list[str]:
    """Every chapter with a version, which is every chapter that needs goldens."""
    return list(versions())
