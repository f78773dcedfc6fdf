"""Claims: what a notebook set out to show, printed, recorded, and read by the runner and by the closing report."""

import json
from pathlib import Path

from .artifacts import write_file
from .paths import runs

_current: dict = {"notebook": None, "scale": None, "seed": None}


def open_notebook(notebook: str, scale: str, seed: int) -> None:
    """Remember which notebook claims and forget what it claimed before."""
    _current.update(notebook=notebook, scale=scale, seed=seed)
    forget(scale, notebook)


def forget(scale: str, notebook: str) -> None:
    """Remove a notebook's claims from the record."""
    records = read_claims(scale)
    kept = [record for record in records if record["notebook"] != notebook]
    if len(kept) < len(records):
        write_file(claims_file(scale), "".join(_line(record) for record in kept))


def claim(text: str, holds: bool, value=None, report: str | None = None) -> None:
    """State, print and record one claim.

    A claim that fails does not stop the notebook, it fails a headless run. `value` is what was measured (JSON-able or
    a 0-d array or tensor), `report` the place in the technical report, such as "§3.3" or "Table 16".
    """
    holds = bool(holds)
    place = f" · report {report}" if report else ""
    print(f"{'claim holds' if holds else 'CLAIM FAILS'} · {text}{place}")
    if _current["notebook"] is not None:
        record = {**_current, "claim": text, "holds": holds, "value": _plain(value), "report": report}
        path = claims_file(_current["scale"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def claims_file(scale: str) -> Path:
    """`runs/<scale>/claims.jsonl`."""
    return runs() / scale / "claims.jsonl"


def read_claims(scale: str, notebook: str | None = None) -> list[dict]:
    """Recorded claims of a scale, in order; of one notebook if given."""
    path = claims_file(scale)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # a line cut by a crash
            continue
    return [record for record in records if notebook in (None, record["notebook"])]


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
