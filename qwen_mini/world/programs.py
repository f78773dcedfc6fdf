"""Small Python functions, described step by step: chapter 15 asks for them and tests them."""

import functools
import hashlib
import random
from collections.abc import Callable, Sequence

from .problems import Draw

#: Kind of x → a step in words → the same step in Python.
STEPS = {
    "number": {
        "add {0} to x": "x + {0}",
        "multiply x by {0}": "x * {0}",
        "subtract {0} from x": "x - {0}",
        "take x modulo {0}": "x % {0}",
        "square x": "x * x",
        "change the sign of x": "-x",
    },
    "list": {
        "sort x": "sorted(x)",
        "reverse x": "x[::-1]",
        "drop the first item of x": "x[1:]",
        "keep the first {0} items of x": "x[:{0}]",
        "add {0} to every item of x": "[i + {0} for i in x]",
        "keep the items of x above {0}": "[i for i in x if i > {0}]",
    },
}
Step = tuple[str, int]  # a step in words, and its number


def wide_inputs(kind: str) -> list:
    """Inputs of many sizes and ranges, from empty lists to sixteen items, on which different programs differ."""
    rng = random.Random(kind)
    if kind == "number":
        return rng.sample(range(-40, 80), 120)
    inputs = []
    for _ in range(120):
        low, size = rng.randint(-6, 8), rng.randint(0, 16)
        high = low + rng.randint(1, 12)
        inputs.append([rng.randint(low, high) for _ in range(size)])
    return inputs


WIDE_INPUTS = {kind: wide_inputs(kind) for kind in STEPS}
LOOKED_AT = 24  # of the wide inputs, to tell whether two programs are one


@functools.cache
def step_function(kind: str, step: Step) -> Callable:
    """A step as a function of x: our own code, outside of the sandbox."""
    text, number = step
    return eval("lambda x: " + STEPS[kind][text].format(number))


def steps_function(kind: str, steps: Sequence[Step]) -> Callable:
    """A program of these steps as a function of x."""
    functions = [step_function(kind, step) for step in steps]

    def run(x):
        for function in functions:
            x = function(x)
        return x

    return run


def program(rng: random.Random, level: int, tests: Callable[[str, list[Step]], dict]) -> Draw:
    """A function of level + 1 different steps, on a number or on a list; `tests` makes the verifier's facts of them.

    Programs that return the same are one problem, whichever their steps.
    """
    kind = rng.choice(("number", "list"))
    steps = [(text, rng.randint(2, 5)) for text in rng.sample(list(STEPS[kind]), level + 1)]
    told = ", then ".join(text.format(number) for text, number in steps)
    body = "\n".join(f"    x = {STEPS[kind][text].format(number)}" for text, number in steps)
    returned = list(map(steps_function(kind, steps), WIDE_INPUTS[kind][:LOOKED_AT]))
    key = f"{kind} {hashlib.sha256(str(returned).encode()).hexdigest()[:16]}"
    code = f"def f(x):\n{body}\n    return x"
    return Draw(key, {"kind": kind, "told": told}, "", code, functools.partial(tests, kind, steps))
