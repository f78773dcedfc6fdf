"""Problems with worked steps, in fourteen families: a family makes a question, its steps and its answer from a seed."""

import itertools
import json
import random
from collections.abc import Callable

from .words import LANGUAGES, LEXICON, TASK_NAMES, TASK_RELATIONS, TASK_WORDS

Problem = tuple[str, str, str]  # question, steps, answer
Family = Callable[[random.Random], Problem]


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
    ask = rng.choice(["{0}+{1}=?", "Add {0} and {1}.", "What is {0} plus {1}?", "Compute {0}+{1}."])
    return ask.format(a, b), "\n".join(steps), str(a + b)


def subtraction(rng: random.Random) -> Problem:
    """Column subtraction from the right, with the borrows written out; the answer is never negative."""
    b, a = sorted(rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    steps, borrow = [], 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        difference = int(x) - int(y) - borrow
        steps.append(
            f"{x}-{y}-{borrow}={difference} write {difference % 10} borrow {int(difference < 0)}"
        )
        borrow = int(difference < 0)
    ask = rng.choice(
        ["{0}-{1}=?", "Subtract {1} from {0}.", "What is {0} minus {1}?", "Compute {0}-{1}."]
    )
    return ask.format(a, b), "\n".join(steps), str(a - b)


def multiplication(rng: random.Random) -> Problem:
    """A number times one digit, split into tens and ones."""
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    tens, ones = a // 10 * 10, a % 10
    steps = f"{tens}*{b}={tens * b}\n{ones}*{b}={ones * b}\n{tens * b}+{ones * b}={a * b}"
    ask = rng.choice(["{0}*{1}=?", "Multiply {0} by {1}.", "What is {0} times {1}?"])
    return ask.format(a, b), steps, str(a * b)


def comparison(rng: random.Random) -> Problem:
    """Largest or smallest of a list, keeping the best so far."""
    numbers = rng.sample(range(1, 100), rng.randint(2, 5))
    word, better = rng.choice([("largest", max), ("smallest", min)])
    best = itertools.accumulate(numbers, better)
    steps = "\n".join(
        f"see {number}, best {kept}" for number, kept in zip(numbers, best, strict=True)
    )
    ask = rng.choice(["Which is the {0} of {1}?", "Find the {0} number: {1}", "{1}: name the {0}."])
    return ask.format(word, " ".join(map(str, numbers))), steps, str(better(numbers))


def sorting(rng: random.Random) -> Problem:
    """Selection sort: take the smallest (or largest) of what is left."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    order, take = rng.choice([("ascending", min), ("descending", max)])
    left, taken, steps = list(numbers), [], []
    while left:
        taken.append(take(left))
        left.remove(taken[-1])
        steps.append(f"take {taken[-1]}, left {' '.join(map(str, left)) or 'nothing'}")
    ask = rng.choice(["Sort {1} in {0} order.", "Put in {0} order: {1}", "{1}: sort, {0}."])
    return (
        ask.format(order, " ".join(map(str, numbers))),
        "\n".join(steps),
        " ".join(map(str, taken)),
    )


def listing(rng: random.Random) -> Problem:
    """Copy or reverse a list of words, letters or digits."""
    pool = rng.choice([TASK_WORDS, list("abcdefghkmnprst"), list("0123456789")])
    items = rng.sample(pool, rng.randint(3, 6))
    backwards = rng.random() < 0.6
    result = items[::-1] if backwards else items
    steps = "\n".join(f"{i} {item}" for i, item in enumerate(result, 1))
    ask = rng.choice(
        ["Reverse: {}", "Write backwards: {}"] if backwards else ["Copy: {}", "Repeat: {}"]
    )
    return ask.format(" ".join(items)), steps, " ".join(result)


def counting(rng: random.Random) -> Problem:
    """How often one item occurs, counting as we go."""
    pool = rng.sample(rng.choice([TASK_WORDS, list("abcdxyz")]), 3)
    items = rng.choices(pool, k=rng.randint(4, 8))
    target = rng.choice(pool)
    counts = itertools.accumulate(int(item == target) for item in items)
    steps = ", ".join(f"{item} {count}" for item, count in zip(items, counts, strict=True))
    ask = rng.choice(
        ["How many {0} are in: {1}", "Count {0}: {1}", "{1}\nHow often does {0} occur?"]
    )
    return ask.format(target, " ".join(items)), steps, str(items.count(target))


def lookup(rng: random.Random) -> Problem:
    """Read one value out of a small table or a JSON object."""
    keys = rng.sample(rng.choice([TASK_NAMES, TASK_WORDS]), rng.randint(2, 5))
    values = {key: rng.randint(1, 99) for key in keys}
    wanted = rng.choice(keys)
    shown = (
        json.dumps(values)
        if rng.random() < 0.5
        else "\n".join(f"{key}: {values[key]}" for key in keys)
    )
    ask = rng.choice(["{0}\nWhat is the value of {1}?", "{0}\nLook up {1}.", "{0}\n{1}?"])
    return ask.format(shown, wanted), f"{wanted}: {values[wanted]}", str(values[wanted])


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
    ask = rng.choice(["Evaluate: {}", "True or False? {}", "What is the value of {}?"])
    return ask.format(f"{a} {outer} {sign}({b} {inner} {c})"), "\n".join(steps), str(value)


def ordering(rng: random.Random) -> Problem:
    """Put names in order from comparisons of neighbours, told in any order."""
    names = rng.sample(TASK_NAMES, rng.randint(3, 4))
    more, most, least = rng.choice(TASK_RELATIONS)
    facts = [f"{first} is {more} than {second}." for first, second in itertools.pairwise(names)]
    rng.shuffle(facts)
    wanted = rng.choice([most, least])
    steps = "\n".join([*(f"{a} > {b}" for a, b in itertools.pairwise(names)), " > ".join(names)])
    return (
        f"{' '.join(facts)} Who is the {wanted}?",
        steps,
        names[0] if wanted == most else names[-1],
    )


def spelling(rng: random.Random) -> Problem:
    """Change the case or the letters of a word."""
    word, letter = rng.choice(TASK_WORDS), rng.choice("abxyz")
    name, edit = rng.choice(
        [
            ("in upper case", str.upper),
            ("with a capital first letter", str.capitalize),
            ("backwards", lambda w: w[::-1]),
            ("without its first letter", lambda w: w[1:]),
            ("without its last letter", lambda w: w[:-1]),
            (f"with {letter} added at the end", lambda w: w + letter),
            (f"with {letter} instead of its first letter", lambda w: letter + w[1:]),
            ("twice", lambda w: w + w),
        ]
    )
    ask = rng.choice(["Write {0} {1}.", "Spell {0} {1}.", "What is {0} {1}?"])
    return ask.format(word, name), f"{' '.join(word)}\n{' '.join(edit(word))}", edit(word)


def python_value(rng: random.Random) -> Problem:
    """The value of a small Python expression."""
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    numbers, word, i = [a, b, c], rng.choice(TASK_WORDS), rng.randrange(3)
    expression, steps, value = rng.choice(
        [
            (f"{a} * {b} + {c}", f"{a} * {b} = {a * b}\n{a * b} + {c} = {a * b + c}", a * b + c),
            (
                f"({a} + {b}) * {c}",
                f"{a} + {b} = {a + b}\n{a + b} * {c} = {(a + b) * c}",
                (a + b) * c,
            ),
            (f"sum({numbers})", f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}", a + b + c),
            (
                f"max({numbers})",
                f"{a}, best {a}\n{b}, best {max(a, b)}\n{c}, best {max(numbers)}",
                max(numbers),
            ),
            (f"{numbers}[{i}]", f"0: {a}, 1: {b}, 2: {c}", numbers[i]),
            (f"{a * b + c} % {b}", f"{a * b + c} = {(a * b + c) // b} * {b} + {c % b}", c % b),
            (
                f"len({word!r})",
                " ".join(f"{letter} {n}" for n, letter in enumerate(word, 1)),
                len(word),
            ),
            (f"{word!r}[{i}]", f"0: {word[0]}, 1: {word[1]}, 2: {word[2]}", repr(word[i])),
            (
                f"{word!r}.upper()",
                f"{' '.join(word)}\n{' '.join(word.upper())}",
                repr(word.upper()),
            ),
            (f"{a} < {b}", f"{a} {'<' if a < b else '>='} {b}", a < b),
        ]
    )
    ask = rng.choice(
        [">>> {}", "What is the value of {} in Python?", "Evaluate the Python expression {}"]
    )
    return ask.format(expression), steps, str(value)


def story(rng: random.Random) -> Problem:
    """A word problem of two steps."""
    a, b = rng.randint(3, 20), rng.randint(2, 20)
    c = rng.randint(1, a + b - 1)
    one, two = rng.sample(TASK_NAMES, 2)
    thing = rng.choice(["apples", "pens", "coins", "books", "eggs"])
    bought = f"{one} has {a} {thing}. {one} buys {b} more and gives {c} to {two}. How many {thing} has {one} now?"
    shared = (
        f"{one} has {a} {thing} and {two} has {b} more than {one}. How many have they together?"
    )
    broken = (
        f"There are {a} boxes with {b} {thing} each. {c} {thing} are broken. How many are whole?"
    )
    return rng.choice(
        [
            (bought, f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}", str(a + b - c)),
            (shared, f"{a} + {b} = {a + b}\n{a} + {a + b} = {2 * a + b}", str(2 * a + b)),
            (broken, f"{a} * {b} = {a * b}\n{a * b} - {c} = {a * b - c}", str(a * b - c)),
        ]
    )


def translation(rng: random.Random) -> Problem:
    """Word by word between English, French and Spanish."""
    source, target = rng.sample(range(3), 2)
    entries = rng.sample(LEXICON, rng.randint(1, 4))
    ask = rng.choice(
        ["Translate from {0} to {1}: {2}", "{0} to {1}: {2}", "From {0}, say in {1}: {2}"]
    )
    question = ask.format(
        LANGUAGES[source], LANGUAGES[target], ", ".join(entry[source] for entry in entries)
    )
    steps = "\n".join(f"{entry[source]} = {entry[target]}" for entry in entries)
    return question, steps, ", ".join(entry[target] for entry in entries)


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        addition,
        subtraction,
        multiplication,
        comparison,
        sorting,
        listing,
        counting,
        lookup,
    )
    + (logic, ordering, spelling, python_value, story, translation)
}
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
