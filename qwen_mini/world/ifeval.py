"""Instructions that a program can check: nineteen of IFEval's 25 kinds, by its rules, on prompts of our own.

Source of the kinds and rules: Zhou et al., arXiv 2311.07911; where it leaves a choice, the checkers in lm_eval 0.4.13,
with which a test compares these. Two of theirs also ask a detector whether the text is English: ours do not.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .constraints import CONSTRAINTS, words_of
from .quizzes import Request


@dataclass(frozen=True)
class Kind:
    """wording: with {names} of the arguments; follows(text, **arguments): the rule; options: what arguments may be."""

    wording: str
    follows: Callable[..., bool]
    options: Sequence[Mapping] = ({},)


def related(count: int, relation: str, bound: int) -> bool:
    """IFEval's two relations: "less than" excludes the bound, "at least" includes it."""
    return count < bound if relation == "less than" else count >= bound


def matches(pattern: str, text: str) -> int:
    """How often a pattern occurs, whatever the case; ^ and $ are the ends of a line."""
    return len(re.findall(pattern, text, re.IGNORECASE | re.MULTILINE))


def parts(text: str, divider: str) -> list[str] | None:
    """What stands between dividers, an empty beginning or end left out; None if anything else is empty."""
    found = [part.strip() for part in text.split(divider)]
    inner = [part for place, part in enumerate(found) if part or 0 < place < len(found) - 1]
    return inner if all(inner) else None


def is_json(text: str) -> bool:
    """Whether all of a text is JSON, with or without a code fence."""
    bare = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip())
    try:
        json.loads(bare.strip())
    except (ValueError, RecursionError):
        return False
    return True


def highlights(text: str) -> int:
    """How many non-blank parts stand between single stars or between double ones; `***a***` counts as both, as in IFEval."""
    single, double = r"\*[^\n*]*\*", r"\*\*[^\n*]*\*\*"
    found = re.findall(single, text) + re.findall(double, text)
    return sum(bool(part.strip("*").strip()) for part in found)


def ends_with(text: str, end_phrase: str) -> bool:
    """Whether a text ends with a phrase, whatever the case, before a last quotation mark."""
    return text.strip().strip('"').lower().endswith(end_phrase.lower())


def two_responses(text: str) -> bool:
    """Two different texts with six stars between them."""
    found = parts(text, "*" * 6)
    return found is not None and len(found) == 2 and found[0] != found[1]


def has_title(text: str) -> bool:
    """Whether some line holds a title in double angular brackets."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


_each = lambda name, *values, **others: [others | {name: value} for value in values]

KINDS = {
    "keywords:existence": Kind(
        "Use the words {keywords}.",
        lambda text, keywords: all(matches(word, text) for word in keywords),
        _each("keywords", ["window", "bread"], ["river", "green"]),
    ),
    "keywords:frequency": Kind(
        'Use the word "{keyword}" {relation} {frequency} times.',
        lambda text, keyword, relation, frequency: related(matches(keyword, text), relation, frequency),
        _each("frequency", 2, 3, keyword="time", relation="at least"),
    ),
    "keywords:forbidden_words": Kind(
        "Do not use the words {forbidden_words}.",
        lambda text, forbidden_words: not any(matches(rf"\b{word}\b", text) for word in forbidden_words),
        _each("forbidden_words", ["nice", "very"], ["is", "day"]),
    ),
    "keywords:letter_frequency": Kind(
        "Let the letter {letter} occur {let_relation} {let_frequency} times.",
        lambda text, letter, let_relation, let_frequency: related(
            text.lower().count(letter), let_relation, let_frequency
        ),
        _each("letter", "q", "z", let_relation="at least", let_frequency=2)
        + _each("letter", "u", let_relation="less than", let_frequency=4),
    ),
    "length_constraints:number_words": Kind(
        "Answer with {relation} {num_words} words.",
        lambda text, relation, num_words: related(len(words_of(text)), relation, num_words),
        _each("num_words", 30, 50, relation="less than") + _each("num_words", 60, relation="at least"),
    ),
    "length_constraints:number_paragraphs": Kind(
        "Write exactly {num_paragraphs} paragraphs, with a line of three stars, ***, between them.",
        lambda text, num_paragraphs: len(parts(text, "***") or ()) == num_paragraphs,
        _each("num_paragraphs", 2, 3),
    ),
    "detectable_content:number_placeholders": Kind(
        "Leave at least {num_placeholders} placeholders in square brackets, such as [name].",
        lambda text, num_placeholders: len(re.findall(r"\[.*?\]", text)) >= num_placeholders,
        _each("num_placeholders", 2, 3),
    ),
    "detectable_content:postscript": Kind(
        "At the end add a postscript that begins with {postscript_marker}",
        lambda text, postscript_marker: matches(r"p\.\s?s\.", text) > 0,
        _each("postscript_marker", "P.S."),
    ),
    "detectable_format:number_bullet_lists": Kind(
        "Give exactly {num_bullets} bullet points, each on a line that begins with * and a blank.",
        lambda text, num_bullets: matches(r"^\s*\*[^*].*$", text) + matches(r"^\s*-.*$", text) == num_bullets,
        _each("num_bullets", 2, 3, 4),
    ),
    "detectable_format:number_highlighted_sections": Kind(
        "Highlight at least {num_highlights} parts of the answer with stars, like *this*.",
        lambda text, num_highlights: highlights(text) >= num_highlights,
        _each("num_highlights", 2, 3),
    ),
    "detectable_format:multiple_sections": Kind(
        "Write at least {num_sections} sections, headed {section_spliter} 1, {section_spliter} 2 and so on.",
        lambda text, section_spliter, num_sections: len(re.findall(rf"{section_spliter}\s?\d+", text)) >= num_sections,
        _each("section_spliter", "Section", "PART", num_sections=2),
    ),
    "detectable_format:json_format": Kind("Give the whole answer as one JSON object.", is_json),
    "detectable_format:title": Kind(
        "Give the answer a title in double angular brackets, such as <<a day out>>.", has_title
    ),
    "combination:two_responses": Kind(
        "Give two different answers, with six stars, ******, and nothing else between them.", two_responses
    ),
    "startend:end_checker": Kind(
        'End with exactly these words, and nothing after them: "{end_phrase}"',
        ends_with,
        _each("end_phrase", "That is all.", "What do you think?"),
    ),
    "startend:quotation": Kind(
        "Put the whole answer in double quotation marks.",
        lambda text: CONSTRAINTS["quotes"].holds(text.strip(), ""),
    ),
    "change_case:english_capital": Kind("Use capital letters only.", str.isupper),
    "change_case:english_lowercase": Kind("Use small letters only, no capitals.", str.islower),
    "punctuation:no_comma": Kind("Use no commas.", lambda text: CONSTRAINTS["no_comma"].holds(text, "")),
}  # fmt: skip
# little else fits beside these
ALONE = "detectable_format:json_format", "combination:two_responses"


def fit(first: str, second: str) -> bool:
    """Whether two kinds can be asked for together: of other families, neither alone, a heading only in its own case."""
    families = {name.split(":")[0] for name in (first, second)}
    headed = "detectable_format:multiple_sections" in (first, second)
    alone = first in ALONE or second in ALONE
    return len(families) == 2 and not alone and not (headed and "change_case" in families)


TOPICS = (
    "Write a few sentences about a rainy day.",
    "Describe a market in the morning.",
    "Explain why the sea is salty.",
    "Tell a short story about a lost key.",
    "Suggest a hobby to a friend.",
    "Write a note to a neighbour about a noisy dog.",
    "Describe how tea is made.",
    "Explain what a map is good for.",
    "Write a few sentences about a train journey.",
    "Give advice on learning a language.",
    "Describe a house by a lake.",
    "Write an invitation to a small party.",
)
Instructions = Sequence[tuple[str, Mapping]]  # kind and arguments
# The argument that asks for exact words.
LITERAL = {
    "detectable_content:postscript": "postscript_marker",
    "startend:end_checker": "end_phrase",
}


def at_odds(asked: Instructions) -> bool:
    """Whether the exact words that one instruction asks for break another one about words or letters."""
    exact = [given[LITERAL[name]] for name, given in asked if name in LITERAL]
    rules = [one for one in asked if one[0].startswith(("keywords:forbidden", "change_case"))]
    return any(not KINDS[name].follows(text, **given) for text in exact for name, given in rules)


def requests(count: int, seed: int = 0) -> list[Request]:
    """`count` prompts, each kind about equally often, every second one with a second instruction of another family."""
    rng, made, names = random.Random(f"ifeval/{seed}"), [], list(KINDS)
    while len(made) < count:
        for first in rng.sample(names, len(names)):
            fitting = [name for name in names if fit(first, name)]
            asked: list = []
            while not asked or at_odds(asked):
                kinds = [first, rng.choice(fitting)] if fitting and len(made) % 2 else [first]
                asked = [(name, rng.choice(KINDS[name].options)) for name in kinds]
            text = " ".join([rng.choice(TOPICS), *(told(*one) for one in asked)])
            made.append(Request(f"{len(made)}", text, {"instructions": asked}))
    return made[:count]


def told(name: str, arguments: Mapping) -> str:
    """An instruction in words."""
    listed = lambda value: (
        " and ".join(f'"{word}"' for word in value) if isinstance(value, list) else value
    )
    return KINDS[name].wording.format(**{key: listed(value) for key, value in arguments.items()})


def followed(instructions: Instructions, response: str, loose: bool = False) -> list[bool]:
    """For each instruction whether the response follows it; an empty one follows none.

    loose: whether any of eight forms does: the response as it is, without its first line, its last, or both; each also
    without its stars.
    """
    forms, lines = [response], response.split("\n")
    if loose:
        cut = [lines[1:], lines[:-1], lines[1:-1]]
        forms += ["\n".join(some).strip() for some in cut]
        forms += [form.replace("*", "") for form in forms]
    forms = [form for form in forms if form.strip()]
    return [
        any(KINDS[name].follows(form, **given) for form in forms) for name, given in instructions
    ]


def problem_with(facts: Mapping, response: str) -> str:
    """Which of `facts["instructions"]` are not followed, strictly; "" if all are."""
    pairs = zip(facts["instructions"], followed(facts["instructions"], response), strict=True)
    return ", ".join(name for (name, _), kept in pairs if not kept)


def other_scores(facts: Sequence[Mapping], responses: Sequence[str]) -> dict[str, list[int]]:
    """IFEval's scores besides the strict one by prompt: 1 or 0 for each prompt or instruction."""
    pairs = [(f["instructions"], text) for f, text in zip(facts, responses, strict=True)]
    strict, loose = ([followed(*pair, loose=way) for pair in pairs] for way in (False, True))
    flat = lambda kept: [int(one) for some in kept for one in some]
    return {
        "strict, by instruction": flat(strict),
        "loose, by prompt": [int(all(some)) for some in loose],
        "loose, by instruction": flat(loose),
    }
