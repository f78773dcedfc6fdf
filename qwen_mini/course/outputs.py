"""What a notebook printed and drew, cleaned so that rendering twice gives equal files, and put back into its source."""

import itertools
import json
import re
import shutil
from pathlib import Path

import nbformat

from . import records, stages
from .artifacts import read_manifest, shipped_dir, stage_dir, write_file
from .nb import Notebook
from .paths import home, runs
from .progress import MARK
from .runner import executed_path

SCALE = "laptop"  # what committed outputs, records and checkpoints are made at
LIVE = "live"  # the tag of a cell whose text differs from processor to processor
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def copy_outputs(nb: Notebook, scale_name: str = SCALE) -> bool:
    """Put the outputs of the executed copy into the notebook, cell by cell id; returns whether the file changed."""
    outputs = executed_outputs(nb, scale_name)
    book = nbformat.read(nb.path, as_version=4)
    book.metadata = nbformat.from_dict(
        {key: value for key, value in book.metadata.items() if key == "kernelspec"}
    )
    made_of = {"scale": scale_name, "code": nb.code_digest}
    book.metadata["qwen_mini"] = made_of | used(nb, scale_name)
    for cell in book.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key == "tags"}
        )
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = outputs.get(cell.id, [])
    return _write_if_changed(nb.path, nbformat.writes(book) + "\n")


def executed_outputs(nb: Notebook, scale_name: str = SCALE) -> dict[str, list]:
    """Cell id → the cleaned outputs of the notebook's last execution at a scale."""
    executed = nbformat.read(executed_path(scale_name, nb), as_version=4)
    return {cell.id: clean(cell.outputs) for cell in executed.cells if cell.cell_type == "code"}


def used(nb: Notebook, scale_name: str = SCALE) -> dict[str, dict[str, str]]:
    """Keys of the stages and records that the notebook used when it ran last, and digests of the sections it read."""
    found = json.loads(records.used_file(scale_name, nb.name).read_text(encoding="utf-8"))
    return {"stages": {}, "records": {}, "sections": {}} | {
        kind: dict(sorted(keys.items())) for kind, keys in sorted(found.items())
    }


def differences(nb: Notebook, scale_name: str = SCALE) -> list[str]:
    """Where the text of the last execution differs from the committed outputs, one sentence a cell."""
    anew, found = executed_outputs(nb, scale_name), []
    for number, cell in enumerate(nbformat.read(nb.path, as_version=4).cells):
        if cell.cell_type != "code" or LIVE in cell.metadata.get("tags", []):
            continue
        before, now = _texts(cell.outputs), _texts(anew.get(cell.id, []))
        if before != now:
            lines = itertools.zip_longest(before.split("\n"), now.split("\n"), fillvalue="")
            was, shown = next((pair for pair in lines if pair[0] != pair[1]), ("", ""))
            found.append(
                f"{nb.path.name}, cell {number}: was {was!r:.100}, is {shown!r:.100}: run `make outputs`"
            )
    return found


def publish(nb: Notebook, scale_name: str = SCALE) -> None:
    """Ship what the notebook used: its records, and stages that are shipped already and were made anew."""
    keys = used(nb, scale_name)
    target = home() / "data" / "records" / scale_name / nb.name
    kept = set()
    for name, key in keys["records"].items():
        source, place = (
            records.record_path(folder, nb.name, name)
            for folder in (runs() / scale_name / "records", target.parent)
        )
        kept.add(place)
        if source.exists() and records.read(source)["key"] == key:
            write_file(place, source.read_text(encoding="utf-8"))
    for old in set(target.glob("*.json")) - kept:
        old.unlink()
    for name, key in keys["stages"].items():
        shipped = read_manifest(shipped_dir(name)).get("key")
        if (
            shipped not in (None, key)
            and read_manifest(stage_dir(scale_name, name)).get("key") == key
        ):
            stages.ship(stage_dir(scale_name, name), name)
    if target.is_dir() and not any(target.iterdir()):
        shutil.rmtree(target)


def clean(outputs: list) -> list:
    """Outputs without what differs between executions: counts, addresses, widgets, progress, warnings, overwritten lines.

    A cell that shows a widget keeps nothing: the widget is dead on paper, and its static twin stands in the cell before.
    """
    kept = []
    if any(WIDGET_VIEW in output.get("data", {}) for output in outputs):
        return kept
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                _append_text(kept, output.text)
        elif output.output_type in ("display_data", "execute_result") and output.metadata != MARK:
            kept.append(_clean_data(output))
    for output in kept:
        if output.output_type == "stream":
            output.text = ADDRESS.sub("0x…", _overwritten(output.text))
    return kept


def _texts(outputs: list) -> str:
    """All that can be read in outputs; figures are left out, which differ by a pixel between processors."""
    texts = []
    for output in outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        else:
            texts += [
                "".join(text)
                for kind, text in sorted(output.get("data", {}).items())
                if kind.startswith("text/")
            ]
    return "\n".join(texts)


def _append_text(kept: list, text: str) -> None:
    """Add standard output, joined with what precedes it: where the kernel cuts it is chance."""
    if kept and kept[-1].output_type == "stream":
        kept[-1].text += text
    else:
        kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))


def _clean_data(output):
    data = {}
    for kind, content in output.data.items():
        if kind.startswith("text/"):
            content = ADDRESS.sub("0x…", content)
        elif kind == "image/png":
            content = content.strip()
        data[kind] = content
    return nbformat.v4.new_output(output.output_type, data=data)


def _overwritten(text: str) -> str:
    """Text as a terminal shows it after carriage returns."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _write_if_changed(path: Path, text: str) -> bool:
    if path.read_text(encoding="utf-8") == text:
        return False
    write_file(path, text)
    return True
