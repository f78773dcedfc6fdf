"""Claims: what a notebook set out to show, printed, recorded, and read by the runner and by the closing report."""

import json
from pathlib import Path

from .artifacts import write_file
from .errors import CourseError
from .paths import runs, shown

_current: dict = {"notebook": None, "scale": None, "seed": None}
_made: list[dict] = []


def open_notebook(notebook: str, scale: str, seed: int) -> None:
    """Remember which notebook claims and forget what it claimed before."""
    _current.update(notebook=notebook, scale=scale, seed=seed)
    _made.clear()
    forget(scale, notebook)


def forget(scale: str, notebook: str) -> None:
    """Remove a notebook's claims from the record."""
    claims_file(scale, notebook).unlink(missing_ok=True)


def claim(text: str, holds: bool, value=None, report: str | None = None) -> None:
    """State, print and record one claim.

    A claim that fails does not stop the notebook, it fails a headless run. `value` is what was measured (JSON-able or
    a 0-d array or tensor), `report` the place in the technical report, such as "§3.3" or "Table 16".
    """
    holds = bool(holds)
    place = f" · report {report}" if report else ""
    print(f"{'claim holds' if holds else 'CLAIM FAILS'} · {text}{place}")
    if _current["notebook"] is not None:
        facts = {"claim": text, "holds": holds, "value": _plain(value), "report": report}
        _made.append(_current | facts)
        # whole, not one line more: if the notebook is open twice, the claims of one session stay together
        content = "".join(_line(record) for record in _made)
        write_file(claims_file(_current["scale"], _current["notebook"]), content)


def claims_file(scale: str, notebook: str) -> Path:
    """`runs/<scale>/claims/<notebook>.jsonl`: a file each, so that notebooks may run at the same time."""
    return runs() / scale / "claims" / f"{notebook}.jsonl"


def read_claims(scale: str, notebook: str | None = None) -> list[dict]:
    """Recorded claims of a scale, by notebook and in order; of one notebook if given."""
    folder = runs() / scale / "claims"
    paths = [claims_file(scale, notebook)] if notebook else sorted(folder.glob("*.jsonl"))
    return [record for path in paths if path.exists() for record in _read(path)]


def _read(path: Path) -> list[dict]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(one["claim"], str) and isinstance(one["holds"], bool) for one in records):
            return records
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CourseError(f"{shown(path)} is damaged: delete it, and run the notebook again")


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _plain(value):
    """`value` with arrays, tensors and numpy scalars turned into plain numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
