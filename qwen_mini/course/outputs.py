"""What a notebook printed and drew, cleaned so that executing twice gives equal files, and put back into its source."""

import re
from pathlib import Path

import nbformat

from .artifacts import write_file
from .nb import Notebook
from .runner import executed_path

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def copy_outputs(nb: Notebook, scale_name: str) -> bool:
    """Put the outputs of the executed copy into the notebook, cell by cell id; returns whether the file changed."""
    executed = nbformat.read(executed_path(scale_name, nb), as_version=4)
    outputs = {cell.id: clean(cell.outputs) for cell in executed.cells if cell.cell_type == "code"}
    book = nbformat.read(nb.path, as_version=4)
    book.metadata = nbformat.from_dict({key: value for key, value in book.metadata.items() if key == "kernelspec"})
    book.metadata["qwen_mini"] = {"scale": scale_name, "code": nb.code_hash}
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key == "tags"})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = outputs[cell.id]
    return _write_if_changed(nb.path, nbformat.writes(book) + "\n")


def clean(outputs: list) -> list:
    """Outputs without what differs between executions: counts, addresses, widgets, warnings, overwritten lines.

    A cell that shows a widget keeps nothing: the widget is dead on paper, and its static twin stands in the cell before.
    """
    kept = []
    if any(WIDGET_VIEW in output.get("data", {}) for output in outputs):
        return kept
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                _append_text(kept, output.text)
        elif output.output_type in ("display_data", "execute_result"):
            kept.append(_clean_data(output))
    for output in kept:
        if output.output_type == "stream":
            output.text = ADDRESS.sub("0x…", _overwritten(output.text))
    return kept


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
