"""Problems whose difficulty grows with a level: generators of the tasks of chapter 15.

Texts under constraints are in `constraints`, programs in `programs`.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from .problems import Draw, glosses, linked, numbered, ranking, worked
from .words import LANGUAGES, LEXICON, ORDERS, TASK_NAMES, TASK_WORDS


def story(rng: random.Random, level: int) -> Draw:
    """Someone gets and gives away things, level + 1 times; always between 0 and 40."""
    name, thing = rng.choice(TASK_NAMES), rng.choice(["pens", "eggs", "coins", "books", "cups"])
    start = have = rng.randint(2, 20)
    moves: list[int] = []
    for _ in range(level + 1):
        change = rng.randint(2, 9)
        if have + change > 40 or (have - change >= 0 and rng.random() < 0.5):
            change = -change
        have += change
        moves.append(change)
    events = (f"gives away {-move}" if move < 0 else f"gets {move} more" for move in moves)
    told = " ".join(f"{name} {event}." for event in events)
    slots = {"name": name, "thing": thing, "start": start, "events": told}
    steps, _ = worked(start, *(f"{move:+d}" for move in moves), gap="")
    pretrained = len(moves) == 2 and moves[0] > 0 > moves[1]  # the first story of `problems.story`
    return Draw(f"{start} {moves}", slots, steps, str(have), pretrained=pretrained)


def first_error(rng: random.Random, level: int) -> Draw:
    """A chain of level + 2 sums, one of them wrong or none: which?

    The gold lines write the right result and then the one that is judged, side by side.
    """
    have, lines, judged = rng.randint(2, 9), [], []
    wrong = rng.randrange(level + 3)  # 0: all lines are right
    for number in range(1, level + 3):
        change = rng.randint(2, 9)
        off = rng.choice((-2, -1, 1, 2)) if number == wrong else 0
        right, told = have + change, have + change + off
        lines.append(f"{have}+{change}={told}")
        verdict = "wrong" if off else "right"
        judged.append(f"{number} {have}+{change}={right} {told} {verdict}")
        have = told  # the mistake is carried on, as people do
    steps = "\n".join(judged[: wrong or None])  # what comes after the mistake is not judged
    return Draw(steps, {"lines": "\n".join(lines)}, steps, str(wrong))


# --- logic -------------------------------------------------------------------------------------------------------


def order(rng: random.Random, level: int) -> Draw:
    """Names in order, from comparisons of neighbours told in any order: level + 2 of them."""
    names, (more, most, _) = ranking(rng, level + 2)
    facts = linked(f"{{}} is {more} than {{}}.", names)
    slots = {"facts": " ".join(rng.sample(facts, len(facts))), "most": most}
    steps = [f"{names[0]} is below nobody", *linked("{} > {}", names)]
    return Draw(str(names), slots, "\n".join(steps), " ".join(names))


def rules(rng: random.Random, level: int) -> Draw:
    """Follow a chain of rules among others that do not matter: level + 1 rules deep."""
    words = rng.sample(TASK_WORDS, level + 4)
    chain, idle = words[: level + 2], words[level + 2 :]
    told = linked("{} makes {}.", chain) + linked("{} makes {}.", idle)
    rng.shuffle(told)
    slots = {"rules": " ".join(told), "start": chain[0]}
    return Draw(str(chain), slots, "\n".join(linked("{} makes {}", chain)), chain[-1])


#: Operators on the set of two values, {"T"}, {"F"} or both.
OPERATORS: dict[str, Callable[[set[str]], bool]] = {
    "and": lambda values: values == {"T"},
    "or": lambda values: "T" in values,
    "xor": lambda values: len(values) == 2,
}


def canonical_expression(terms: Sequence[str], operators: Sequence[str]) -> str:
    """One text for all expressions that are the same problem, read from the left.

    The terms of a run of one operator may change places, and so may the names a and b.
    """
    forms = []
    for names in ("ab", "ba"):
        left = iter([term[:-1] + names["ab".index(term[-1])] for term in terms])
        group, runs = [next(left)], []
        for operator, run in itertools.groupby(operators):
            group += [next(left) for _ in run]
            runs.append(f"{operator}: {', '.join(sorted(group))}")
            group = []
        forms.append("; ".join(runs))
    return min(forms)


def truth_table(rng: random.Random, level: int) -> Draw:
    """An expression of a and b for all four of their values; level + 1 operators, read from the left.

    The chain writes each term before its value: what is looked up stands beside where it is used. Behind it comes the
    result so far.
    """
    terms = [rng.choice(["a", "b", "not a", "not b"]) for _ in range(level + 2)]
    operators = rng.choices(list(OPERATORS), k=level + 1)
    first, rest = terms[0], list(zip(operators, terms[1:], strict=True))
    steps, column = [], []
    for a, b in itertools.product("TF", repeat=2):
        values = {"a": a, "b": b, "not a": "FT"[a == "F"], "not b": "FT"[b == "F"]}
        result, line = values[first], f"{a}{b} {first} {values[first]}"
        for operator, term in rest:
            result = "FT"[OPERATORS[operator]({result, values[term]})]
            line += f" {operator} {term} {values[term]} {result}"
        steps.append(line)
        column.append(result)
    text = " ".join([first, *(f"{operator} {term}" for operator, term in rest)])
    key = canonical_expression(terms, operators)
    return Draw(key, {"expression": text}, "\n".join(steps), " ".join(column))


# --- tables and lists --------------------------------------------------------------------------------------------


def table_sum(rng: random.Random, level: int) -> Draw:
    """The sum of one column over the rows of one group: level + 2 rows."""
    names = rng.sample(TASK_NAMES, level + 2)
    rows = [(name, rng.choice(["red", "blue"]), rng.randint(1, 9)) for name in names]
    wanted = rng.choice([group for _, group, _ in rows])
    total, steps = 0, []
    for name, group, value in rows:
        steps.append(f"{name} {group}")
        if group == wanted:
            steps[-1] += f": {total}+{value}={total + value}"
            total += value
    table = "\n".join(["name,team,points", *(f"{n},{g},{v}" for n, g, v in rows)])
    key = str(sorted(value for _, group, value in rows if group == wanted))
    return Draw(key, {"table": table, "wanted": wanted}, "\n".join(steps), str(total))


def countdown(items: Sequence[object]) -> str:
    """One item a line, each behind a number that falls to 1: who writes it knows how much is left."""
    return "\n".join(f"{len(items) - i} {item}" for i, item in enumerate(items))


def sequence(rng: random.Random, level: int) -> Draw:
    """Numbers from a start by a step: 3 · level + 3 lines, numbered down to 1."""
    start, step, count = rng.randint(1, 99), rng.randint(1, 6), 3 * level + 3
    text = countdown([start + step * i for i in range(count)])
    return Draw(f"{start} {step}", {"start": start, "step": step, "count": count}, "", text)


def cycle(rng: random.Random, level: int) -> Draw:
    """Words again and again: 3 · level + 3 to 3 · level + 5 lines, numbered down to 1."""
    words = rng.sample(TASK_WORDS, rng.randint(2, 4))
    count = 3 * level + 3 + rng.randrange(3)
    text = countdown([words[i % len(words)] for i in range(count)])
    return Draw(str(words), {"words": " ".join(words), "count": count}, "", text)


# --- other languages, and rules of the system prompt -------------------------------------------------------------


def _foreign(rng: random.Random, level: int) -> tuple[int, list, dict[str, Any]]:
    """A language, level + 1 entries of the lexicon, and what their reversal means in English."""
    language, entries = rng.choice((1, 2)), rng.sample(LEXICON, level + 1)
    return language, entries, {"language": language, "english": [e[0] for e in reversed(entries)]}


def reverse_in(rng: random.Random, level: int) -> Draw:
    """Reverse level + 1 words, asked and answered in French or Spanish."""
    language, entries, facts = _foreign(rng, level)
    words = [entry[language] for entry in entries]
    orders, result = ORDERS[LANGUAGES[language]], words[::-1]
    slots = {kind: rng.choice(texts).format(" ".join(words)) for kind, texts in orders.items()}
    return Draw(f"{language} {words}", slots, numbered(result), " ".join(result), facts)


def translate_reverse(rng: random.Random, level: int) -> Draw:
    """Translate level + 1 English words, and give them in reverse."""
    language, entries, facts = _foreign(rng, level)
    words = " ".join(entry[0] for entry in entries)
    slots, turned = {"words": words, "language": LANGUAGES[language]}, entries[::-1]
    answer = " ".join(entry[language] for entry in turned)
    return Draw(f"{language} {words}", slots, glosses(turned, 0, language), answer, facts)


SYSTEM_RULES = {
    "Answer in upper case.": str.upper,
    "Put the answer in brackets.": lambda x: f"[{x}]",
    "End every answer with OK.": lambda x: f"{x} OK",
    "Begin every answer with Sure:": lambda x: f"Sure: {x}",
    "Say every answer twice.": lambda x: f"{x} {x}",
    "Put a dash between the words.": lambda x: x.replace(" ", "-"),
}


def system_rule(rng: random.Random, level: int) -> Draw:
    """Copy or reverse level + 1 words under a rule of the system prompt."""
    rule, words = rng.choice(list(SYSTEM_RULES)), rng.sample(TASK_WORDS, level + 1)
    backwards = rng.random() < 0.5
    result = words[::-1] if backwards else words
    slots = {"verb": "Reverse" if backwards else "Copy", "words": " ".join(words)}
    key = f"{rule} {' '.join(result)}"  # copied, or reversed from the other end: the same chain and answer
    return Draw(key, slots, numbered(result), SYSTEM_RULES[rule](" ".join(result)), system=rule)
