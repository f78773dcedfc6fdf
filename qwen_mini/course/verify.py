"""`qwen-mini verify`: compute some records anew, in their own notebooks, and compare within their tolerance."""

import os
import subprocess
from pathlib import Path
from unittest import mock

from . import runner
from .errors import CourseError
from .nb import notebooks, select
from .outputs import SCALE
from .records import TIMING, read
from .stale import record_files

LONGEST = 120  # seconds of a record that is chosen in turn


def verify(root: Path, wanted: list[str]) -> int:
    """Verify records by name (`16_sft/…`), or so many in turn; returns 0 if all of them hold."""
    counts = [word for word in wanted if word.isdecimal() and word.isascii()]
    names = [word for word in wanted if word not in counts]
    count = int(counts[0]) if counts else int(not wanted)
    names += in_turn(root, count) if count else []
    known = {r["name"]: r["provenance"]["precision"] for r in map(read, record_files(root))}
    if unknown := sorted(set(names) - set(known)):
        raise CourseError(f"there is no record {unknown[0]!r} in data/records/{SCALE}")
    if not names:
        raise CourseError(f"data/records/{SCALE} holds no record of at most {LONGEST:g} s")
    fine = True
    for precision in sorted(set(known[name] for name in names)):
        group = [name for name in names if known[name] == precision]
        books = select(root, sorted({name.partition("/")[0] for name in group}))
        # what is verified is computed in the precision of its record
        wish = {"QWEN_MINI_VERIFY": "\n".join(group), "QWEN_MINI_DTYPE": precision}
        with mock.patch.dict(os.environ, wish):
            results = runner.run(books, SCALE, keep_going=True, records_only=True)
        fine = fine and all(result.ok for result in results)
        paths = [runner.executed_path(SCALE, book) for book in books]
        said = "".join(path.read_text(encoding="utf-8") for path in paths)
        for name in group:
            compared = f"verified {name}" in said  # printed where the record is compared
            failed = f"{name} was not computed, or does not hold"
            print(f"verified {name} in {precision}" if compared else failed)
            fine = fine and compared
    return 0 if fine else 1


def in_turn(root: Path, count: int, longest: float = LONGEST) -> list[str]:
    """`count` records of at most `longest` seconds, others with every commit.

    Timings are not compared, and notebooks left out whose stages would have to be trained first.
    """
    trained = _trained(root)
    found = [read(path) for path in record_files(root) if path.parent.name in trained]
    short = sorted(r["name"] for r in found if r["seconds"] <= longest and r["tolerance"] != TIMING)
    start = _commits(root) * count
    return [short[(start + i) % len(short)] for i in range(min(count, len(short)))]


def _trained(root: Path) -> set[str]:
    """Notebooks that use no stage but those that are shipped."""
    shipped = {path.name for path in (root / "data" / "checkpoints").iterdir()}
    used = lambda nb: set(nb.data["metadata"].get("qwen_mini", {}).get("stages", {}))
    return {nb.name for nb in notebooks(root) if used(nb) <= shipped}


def _commits(root: Path) -> int:
    """How many commits there are: what goes round with every change."""
    command = ["git", "-C", str(root), "rev-list", "--count", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0
