"""Problems with worked steps: the parts that all of them share, and the fourteen families that pre-training reads."""

import itertools
import json
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .words import FAMILY_WORDINGS, LANGUAGES, LEXICON, TASK_NAMES, TASK_RELATIONS, TASK_WORDS

Problem = tuple[str, str, str]  # question, steps, answer
Family = Callable[[random.Random], Problem]


@dataclass(frozen=True)
class Draw:
    """A problem before it is worded: its key, what fills a wording, the solution, and facts for a verifier.

    key: equal for two draws that are the same problem, however they are written. facts: a function if they take long to
    make; it is called for the problems that are taken. pretrained: pre-training may have read it with steps and answer.
    """

    key: str
    slots: dict[str, Any]
    reasoning: str
    answer: str
    facts: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    system: str | None = None
    pretrained: bool = False


# --- what problems share -----------------------------------------------------------------------------------------


def ask(rng: random.Random, family: str, *slots: object) -> str:
    """The question of a family in one of its wordings."""
    return rng.choice(FAMILY_WORDINGS[family]).format(*slots)


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def worked(start: int, *steps: str, gap: str = " ") -> tuple[str, int]:
    """Lines that apply steps such as "+3" or "*2" one after the other, and the last result; gap: between the signs."""
    lines, value = [], start
    for step in steps:
        result = SIGNS[step[0]](value, int(step[1:]))
        lines.append(gap.join((str(value), step[0], step[1:], "=", str(result))))
        value = result
    return "\n".join(lines), value


def numbered(items: Iterable[str]) -> str:
    """One line an item, numbered upwards: a short answer reaches its end without being told how long it is."""
    return "\n".join(f"{i} {item}" for i, item in enumerate(items, 1))


def linked(form: str, items: Iterable[str]) -> list[str]:
    """One text for each pair of neighbours: "a > b", "a makes b"."""
    return [form.format(a, b) for a, b in itertools.pairwise(items)]


def ranking(rng: random.Random, count: int) -> tuple[list[str], tuple[str, str, str]]:
    """Names in order, and the relation that puts them so: more, most, least."""
    return rng.sample(TASK_NAMES, count), rng.choice(TASK_RELATIONS)


def glosses(entries: Iterable[Sequence[str]], source: int, target: int) -> str:
    """One line for each entry of the lexicon: a word and its translation."""
    return "\n".join(f"{entry[source]} = {entry[target]}" for entry in entries)


# --- the families ------------------------------------------------------------------------------------------------


def addition(rng: random.Random) -> Problem:
    """Column addition from the right, with the carries written out."""
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    steps, carry = [], 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total} write {total % 10} carry {total // 10}")
        carry = total // 10
    if carry:
        steps.append(f"write {carry}")
    return ask(rng, "addition", a, b), "\n".join(steps), str(a + b)


def subtraction(rng: random.Random) -> Problem:
    """Column subtraction from the right, with the borrows written out; the answer is never negative."""
    b, a = sorted(rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    steps, borrow = [], 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        difference = int(x) - int(y) - borrow
        line, borrow = f"{x}-{y}-{borrow}={difference}", int(difference < 0)
        steps.append(f"{line} write {difference % 10} borrow {borrow}")
    return ask(rng, "subtraction", a, b), "\n".join(steps), str(a - b)


def multiplication(rng: random.Random) -> Problem:
    """A number times one digit, split into tens and ones."""
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    tens, ones = a // 10 * 10, a % 10
    steps = f"{tens}*{b}={tens * b}\n{ones}*{b}={ones * b}\n{tens * b}+{ones * b}={a * b}"
    return ask(rng, "multiplication", a, b), steps, str(a * b)


def comparison(rng: random.Random) -> Problem:
    """Largest or smallest of a list, keeping the best so far."""
    numbers = rng.sample(range(1, 100), rng.randint(2, 5))
    word, better = rng.choice([("largest", max), ("smallest", min)])
    rows = zip(numbers, itertools.accumulate(numbers, better), strict=True)
    steps = "\n".join(f"see {number}, best {kept}" for number, kept in rows)
    question = ask(rng, "comparison", word, " ".join(map(str, numbers)))
    return question, steps, str(better(numbers))


def sorting(rng: random.Random) -> Problem:
    """Selection sort: take the smallest (or largest) of what is left."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    order, take = rng.choice([("ascending", min), ("descending", max)])
    left, taken, steps = list(numbers), [], []
    while left:
        taken.append(take(left))
        left.remove(taken[-1])
        steps.append(f"take {taken[-1]}, left {' '.join(map(str, left)) or 'nothing'}")
    question = ask(rng, "sorting", order, " ".join(map(str, numbers)))
    return question, "\n".join(steps), " ".join(map(str, taken))


def listing(rng: random.Random) -> Problem:
    """Copy or reverse a list of words, letters or digits."""
    pool = rng.choice([TASK_WORDS, list("abcdefghkmnprst"), list("0123456789")])
    items = rng.sample(pool, rng.randint(3, 6))
    backwards = rng.random() < 0.6
    result = items[::-1] if backwards else items
    question = ask(rng, "reversing" if backwards else "copying", " ".join(items))
    return question, numbered(result), " ".join(result)


def counting(rng: random.Random) -> Problem:
    """How often one item occurs, counting as we go."""
    pool = rng.sample(rng.choice([TASK_WORDS, list("abcdxyz")]), 3)
    items = rng.choices(pool, k=rng.randint(4, 8))
    target = rng.choice(pool)
    counts = itertools.accumulate(int(item == target) for item in items)
    steps = ", ".join(f"{item} {count}" for item, count in zip(items, counts, strict=True))
    question = ask(rng, "counting", target, " ".join(items))
    return question, steps, str(items.count(target))


def lookup(rng: random.Random) -> Problem:
    """Read one value out of a small table or a JSON object."""
    keys = rng.sample(rng.choice([TASK_NAMES, TASK_WORDS]), rng.randint(2, 5))
    values = {key: rng.randint(1, 99) for key in keys}
    wanted = rng.choice(keys)
    lines = [f"{key}: {values[key]}" for key in keys]
    shown = json.dumps(values) if rng.random() < 0.5 else "\n".join(lines)
    question = ask(rng, "lookup", shown, wanted)
    return question, f"{wanted}: {values[wanted]}", str(values[wanted])


def logic(rng: random.Random) -> Problem:
    """A boolean expression, worked from the inside out."""
    a, b, c = (rng.random() < 0.5 for _ in range(3))
    inner, outer = rng.choice(("and", "or")), rng.choice(("and", "or"))
    sign = rng.choice(("", "not "))
    middle = (b or c) if inner == "or" else (b and c)
    turned = not middle if sign else middle
    value = (a or turned) if outer == "or" else (a and turned)
    steps = [f"{b} {inner} {c} = {middle}", *([f"not {middle} = {turned}"] if sign else [])]
    steps.append(f"{a} {outer} {turned} = {value}")
    question = ask(rng, "logic", f"{a} {outer} {sign}({b} {inner} {c})")
    return question, "\n".join(steps), str(value)


def ordering(rng: random.Random) -> Problem:
    """Put names in order from comparisons of neighbours, told in any order."""
    names, (more, most, least) = ranking(rng, rng.randint(3, 4))
    facts = linked(f"{{}} is {more} than {{}}.", names)
    rng.shuffle(facts)
    wanted = rng.choice([most, least])
    steps = "\n".join([*linked("{} > {}", names), " > ".join(names)])
    answer = names[0] if wanted == most else names[-1]
    return f"{' '.join(facts)} Who is the {wanted}?", steps, answer


def spelling(rng: random.Random) -> Problem:
    """Change the case or the letters of a word."""
    word, letter = rng.choice(TASK_WORDS), rng.choice("abxyz")
    edits = {
        "in upper case": word.upper(),
        "with a capital first letter": word.capitalize(),
        "backwards": word[::-1],
        "without its first letter": word[1:],
        "without its last letter": word[:-1],
        f"with {letter} added at the end": word + letter,
        f"with {letter} instead of its first letter": letter + word[1:],
        "twice": word + word,
    }
    name, edited = rng.choice(list(edits.items()))
    steps = f"{' '.join(word)}\n{' '.join(edited)}"
    return ask(rng, "spelling", word, name), steps, edited


def python_value(rng: random.Random) -> Problem:
    """The value of a small Python expression."""
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    numbers, word, i = [a, b, c], rng.choice(TASK_WORDS), rng.randrange(3)
    best = f"{a}, best {a}\n{b}, best {max(a, b)}\n{c}, best {max(numbers)}"
    letters = " ".join(f"{letter} {n}" for n, letter in enumerate(word, 1))
    upper = f"{' '.join(word)}\n{' '.join(word.upper())}"
    expressions = [
        (f"{a} * {b} + {c}", *worked(a, f"*{b}", f"+{c}")),
        (f"({a} + {b}) * {c}", *worked(a, f"+{b}", f"*{c}")),
        (f"sum({numbers})", *worked(a, f"+{b}", f"+{c}")),
        (f"max({numbers})", best, max(numbers)),
        (f"{numbers}[{i}]", f"0: {a}, 1: {b}, 2: {c}", numbers[i]),
        (f"{a * b + c} % {b}", f"{a * b + c} = {(a * b + c) // b} * {b} + {c % b}", c % b),
        (f"len({word!r})", letters, len(word)),
        (f"{word!r}[{i}]", f"0: {word[0]}, 1: {word[1]}, 2: {word[2]}", repr(word[i])),
        (f"{word!r}.upper()", upper, repr(word.upper())),
        (f"{a} < {b}", f"{a} {'<' if a < b else '>='} {b}", a < b),
    ]
    expression, steps, value = rng.choice(expressions)
    return ask(rng, "python_value", expression), steps, str(value)


def story(rng: random.Random) -> Problem:
    """A word problem of two steps."""
    a, b = rng.randint(3, 20), rng.randint(2, 20)
    c = rng.randint(1, a + b - 1)
    one, two = rng.sample(TASK_NAMES, 2)
    thing = rng.choice(["apples", "pens", "coins", "books", "eggs"])
    together = f"{worked(a, f'+{b}')[0]}\n{worked(a, f'+{a + b}')[0]}", 2 * a + b
    solved = (worked(a, f"+{b}", f"-{c}"), together, worked(a, f"*{b}", f"-{c}"))
    stories = zip(FAMILY_WORDINGS["story"], solved, strict=True)
    question, (steps, value) = rng.choice(list(stories))
    slots = {"one": one, "two": two, "thing": thing, "a": a, "b": b, "c": c}
    return question.format(**slots), steps, str(value)


def translation(rng: random.Random) -> Problem:
    """Word by word between English, French and Spanish."""
    source, target = rng.sample(range(3), 2)
    entries = rng.sample(LEXICON, rng.randint(1, 4))
    words = ", ".join(entry[source] for entry in entries)
    question = ask(rng, "translation", LANGUAGES[source], LANGUAGES[target], words)
    return question, glosses(entries, source, target), ", ".join(e[target] for e in entries)


_FAMILIES = (
    addition, subtraction, multiplication, comparison, sorting, listing, counting, lookup, logic,
    ordering, spelling, python_value, story, translation,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.__name__: family for family in _FAMILIES}
LAYOUTS = (
    "Question: {0}\nSteps:\n{1}\nAnswer: {2}",
    "Q: {0}\n{1}\nA: {2}",
    "Problem: {0}\nWork:\n{1}\nResult: {2}",
    "{0}\n{1}\nSo the answer is {2}.",
    "Exercise. {0}\nSolution. {1}\nThe answer is {2}.",
)


def render_problem(problem: Problem, rng: random.Random) -> str:
    """A problem as plain text in one of `LAYOUTS`."""
    return rng.choice(LAYOUTS).format(*problem)
