"""Texts under constraints that a program can check, in the manner of IFEval (arXiv 2311.07911)."""

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwen_mini.course.errors import CourseError

from .graded import countdown
from .problems import Draw
from .words import TASK_WORDS

LISTED_WORDS = tuple(TASK_WORDS[:12])
ATTEMPTS = 1_000  # draws of constraints that hold together


@dataclass(frozen=True)
class Constraint:
    """wording: with {0} for its parameter; options: parameters; holds(text, parameter): the check; ifeval: its id."""

    wording: str
    options: tuple
    holds: Callable[[str, Any], bool]
    ifeval: str


def words_of(text: str) -> list[str]:
    """Words as IFEval counts them: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


CONSTRAINTS = {
    "words": Constraint(
        "exactly {0} words", (3, 4, 5, 6, 7, 8), lambda t, n: len(words_of(t)) == n, "length_constraints:number_words"
    ),
    "contain": Constraint(
        "with the word {0}", LISTED_WORDS, lambda t, w: w in words_of(t.lower()), "keywords:existence"
    ),
    "avoid": Constraint(
        "without the letter {0}", tuple("aou"), lambda t, c: c not in t.lower(), "keywords:letter_frequency"
    ),
    "lower": Constraint("in lower case", ("",), lambda t, _: t == t.lower(), "change_case:english_lowercase"),
    "upper": Constraint("in upper case", ("",), lambda t, _: t == t.upper(), "change_case:english_capital"),
    "end": Constraint(
        "ending with {0}", ("stop", "over", "done"), lambda t, w: words_of(t.lower())[-1:] == [w],
        "startend:end_checker",
    ),
    "quotes": Constraint(
        "in double quotes", ("",), lambda t, _: len(t) > 1 and t[0] == t[-1] == '"', "startend:quotation"
    ),
    "commas": Constraint(
        "with {0} commas", (1, 2), lambda t, n: t.count(",") == n, "punctuation:no_comma (counted instead)"
    ),
    "no_comma": Constraint("without commas", ("",), lambda t, _: "," not in t, "punctuation:no_comma"),
    "title": Constraint(
        "with the title <<{0}>>", ("news", "tale"), lambda t, w: re.match(rf"<<{w}>>\s", t) is not None,
        "detectable_format:title",
    ),
    "starred": Constraint(
        "with {0} words, each between *", (1, 2), lambda t, n: len(re.findall(r"\*\w+\*", t)) == n,
        "detectable_format:number_highlighted_sections",
    ),
}  # fmt: skip
EXCLUDE = ({"lower", "upper"}, {"upper", "title"}, {"commas", "no_comma"}, {"quotes", "title"})


def compatible(names: Iterable[str]) -> bool:
    """Whether these constraints can hold together."""
    names = set(names)
    return all(len(names & group) < 2 for group in EXCLUDE)


def fulfil(wanted: dict[str, Any], rng: random.Random) -> tuple[list[str], str]:
    """(words, text): words in the order of the list, so that none comes twice, and the text that they become.

    The text keeps all constraints: words, then stars and punctuation, then case and frame.
    """
    must = [wanted[name] for name in ("contain",) if name in wanted]
    last = [wanted["end"]] if "end" in wanted else []
    room = wanted["words"] - len(must) - len(last) - ("title" in wanted)
    pool = [w for w in LISTED_WORDS if w not in must and not set(w) & set(wanted.get("avoid", ""))]
    chosen = must + rng.sample(pool, room)
    words = sorted(chosen, key=LISTED_WORDS.index) + last
    parts = list(words)
    for place in range(wanted.get("starred", 0)):
        parts[place] = f"*{parts[place]}*"
    for place in range(wanted.get("commas", 0)):
        parts[place] += ","
    text = " ".join(parts)
    text = f"<<{wanted['title']}>> {text}" if "title" in wanted else text
    text = f'"{text}"' if "quotes" in wanted else text
    return words, text.upper() if "upper" in wanted else text


def constrained_text(rng: random.Random, level: int, pool: Iterable[str]) -> Draw:
    """An exact number of words, and `level` constraints more of those in the pool."""
    others = [name for name in pool if name != "words"]
    for _ in range(ATTEMPTS):
        names = ["words", *rng.sample(others, min(level, len(others)))]
        wanted = {name: rng.choice(CONSTRAINTS[name].options) for name in names}
        room = 2 + max(wanted.get("starred", 1), wanted.get("commas", 0))
        avoid = wanted.get("avoid", "?")
        clash = any(avoid in str(v) for name, v in wanted.items() if name != "avoid")
        if compatible(names) and wanted["words"] >= room and not clash:
            break
    else:
        raise CourseError(f"no {level} of these constraints hold together: {', '.join(others)}")
    told = ", ".join(CONSTRAINTS[name].wording.format(value) for name, value in wanted.items())
    slots = {"told": told, "list": " ".join(LISTED_WORDS)}
    key = json.dumps(wanted, sort_keys=True)
    words, text = fulfil(wanted, rng)
    return Draw(key, slots, countdown(words), text, {"wanted": wanted})
