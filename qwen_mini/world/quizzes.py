"""Questions with options for the harness of chapter 21: words in other languages, how a text goes on, keys in a text."""

import itertools
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qwen_mini.course.corpus_files import long_documents

from .words import FAMILY_WORDINGS, LANGUAGES, LEXICON

NEEDLE_KEYS = "name book star hand person small form value order answer plus best".split()
MOST_CHARACTERS = 400  # of a passage: some files have very long lines


class Quiz(NamedTuple):
    """A text, what may follow it, and the number of the choice that does."""

    key: str
    context: str
    choices: tuple[str, ...]
    gold: int


class Request(NamedTuple):
    """A text that asks for a written answer, facts for its check, and the wording or language it is in."""

    key: str
    text: str
    facts: Mapping[str, Any]
    wording: str = ""


def placed(rng: random.Random, right: str, wrong: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """The right choice among the others at a random place, and the place: never always the first."""
    choices = [right, *wrong]
    gold = rng.randrange(len(choices))
    choices[0], choices[gold] = choices[gold], choices[0]
    return tuple(choices), gold


def word_quizzes(rng: random.Random, count: int, options: int = 4) -> list[Quiz]:
    """A word in another language, as a line of the steps that pre-training has read; at most 234."""
    pairs = list(itertools.permutations(range(len(LANGUAGES)), 2))
    every, made = list(itertools.product(pairs, LEXICON)), []
    for (source, target), entry in rng.sample(every, min(count, len(every))):
        others = rng.sample([e for e in LEXICON if e != entry], options - 1)
        names = LANGUAGES[source], LANGUAGES[target], entry[source]
        asked = rng.choice(FAMILY_WORDINGS["translation"]).format(*names)
        context = f"Question: {asked}\nSteps:\n{entry[source]} ="
        choices = placed(rng, f" {entry[target]}", [f" {e[target]}" for e in others])
        made.append(Quiz(" ".join(names), context, *choices))
    return made


def line_quizzes(
    rng: random.Random, count: int, options: int = 4, lines: int = 6, after: int = 2
) -> list[Quiz]:
    """Which lines follow in a Python file? Text of the standard library where no corpus has read it."""
    texts, made = [text.split("\n") for text in long_documents(6_000, limit=60)], {}
    # after a sign the line break may be one token with it; all choices come from such places, or these would tell
    places = [
        (number, start)
        for number, text in enumerate(texts)
        for start in range(lines, len(text) - after)
        if text[start - 1][-1:].isalnum() and "".join(text[start : start + after]).strip()
    ]
    said = lambda number, start: "\n" + "\n".join(texts[number][start : start + after])
    for number, start in rng.sample(places, len(places)):
        others = [said(*place)[:MOST_CHARACTERS] for place in rng.sample(places, options - 1)]
        right = said(number, start)[:MOST_CHARACTERS]
        if len({right, *others}) == options:
            context = "\n".join(texts[number][start - lines : start])[-MOST_CHARACTERS:]
            key = f"{number}:{start}"
            made[key] = Quiz(key, context, *placed(rng, right, others))
        if len(made) == count:
            break
    return list(made.values())


def needle_quizzes(
    rng: random.Random, count: int, options: int = 4, characters: int = 1_200
) -> list[Quiz]:
    """Keys in a text; the choices are their values, and one key is asked for."""
    texts, made = long_documents(6_000, limit=60), []
    for number in range(count):
        keys, text = rng.sample(NEEDLE_KEYS, options), rng.choice(texts)
        values = ["".join(rng.choices("0123456789", k=5)) for _ in keys]
        start = rng.randrange(len(text) - characters)
        cuts = [
            start,
            *sorted(rng.sample(range(start, start + characters), options)),
            start + characters,
        ]
        needles = [f" The {key} key is {value}." for key, value in zip(keys, values, strict=True)]
        parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
        hay = "".join(part + needle for part, needle in zip(parts, [*needles, ""], strict=True))
        gold = rng.randrange(options)
        asked = f"\nWhat is the {keys[gold]} key? The {keys[gold]} key is "
        made.append(Quiz(f"{number} {keys[gold]}", hay + asked, tuple(values), gold))
    return made


QUIZZES = {"words": word_quizzes, "lines": line_quizzes, "needles": needle_quizzes}
