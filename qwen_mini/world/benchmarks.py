"""The benchmarks of chapter 21, from `benchmarks.toml`."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Benchmark:
    """A stand-in. report: the report's benchmarks that measure the same kind of thing.

    Its questions are held-out problems of chapter 15's `tasks` at `levels`, or a `quiz` with `options` options;
    share: of the items that are asked for.
    """

    area: str
    report: str
    measures: str
    tasks: Sequence[str] = ()
    levels: Sequence[int] = (1, 2, 3)  # those that are trained on
    quiz: str = ""
    options: int = 4
    per_byte: bool = False
    share: float = 1.0


def read_benchmarks() -> dict[str, Benchmark]:
    """Name → benchmark, in the order of the file."""
    text = Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8")
    return {name: Benchmark(**facts) for name, facts in tomllib.loads(text).items()}
