"""`qwen-mini verify`: compute some records anew, in their own notebooks, and compare within their tolerance."""

import os
import subprocess
from pathlib import Path

from . import runner
from .errors import CourseError
from .nb import select
from .outputs import SCALE
from .records import TIMING, read
from .stale import record_files

LONGEST = 120  # seconds of a record that is chosen in turn


def verify(root: Path, wanted: list[str], longest: float = LONGEST) -> int:
    """Verify records by name (`14_sft/…`), or so many in turn; returns 0 if all of them hold."""
    names = wanted if wanted and not wanted[0].isdigit() else in_turn(root, int(wanted[0]) if wanted else 1, longest)
    known = {read(path)["name"] for path in record_files(root)}
    if unknown := sorted(set(names) - known):
        raise CourseError(f"there is no record {unknown[0]!r} in data/records/{SCALE}")
    if not names:
        raise CourseError(f"data/records/{SCALE} holds no record of at most {longest:g} s")
    books = select(root, sorted({name.partition("/")[0] for name in names}))
    os.environ["QWEN_MINI_VERIFY"] = ":".join(names)
    try:
        results = runner.run(books, SCALE, keep_going=True, records_only=True)
    finally:
        del os.environ["QWEN_MINI_VERIFY"]
    print("\n".join(f"{'verified' if all(r.ok for r in results) else 'asked for'} {name}" for name in names))
    return 0 if all(result.ok for result in results) else 1


def in_turn(root: Path, count: int, longest: float = LONGEST) -> list[str]:
    """`count` records of at most `longest` seconds, others with every commit; timings are not compared."""
    found = [read(path) for path in record_files(root)]
    short = sorted(r["name"] for r in found if r["seconds"] <= longest and r["tolerance"] != TIMING)
    start = _commits(root) * count
    return [short[(start + i) % len(short)] for i in range(min(count, len(short)))]


def _commits(root: Path) -> int:
    """How many commits there are: what goes round with every change."""
    command = ["git", "-C", str(root), "rev-list", "--count", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0
