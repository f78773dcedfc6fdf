"""Questions with options as a local task of lm_eval (EleutherAI's lm-evaluation-harness), which needs no download."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .artifacts import write_file


def write_task(rows: Iterable[Mapping], folder: str | Path, name: str) -> Path:
    """Write `<name>.jsonl` and the task `<name>.yaml` that reads it; returns the latter. JSON is a part of YAML.

    rows: dicts with `context`, `choices` and `gold`, the number of the right choice. Made for
    `lm_eval --model hf --model_args pretrained=CHECKPOINT,dtype=float32 --include_path FOLDER --tasks NAME`.
    """
    folder = Path(folder)
    lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    data = write_file(folder / f"{name}.jsonl", lines)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    }
    return write_file(folder / f"{name}.yaml", json.dumps(task, indent=1) + "\n")
