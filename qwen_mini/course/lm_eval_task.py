"""Questions with options as a local task of lm_eval (EleutherAI's lm-evaluation-harness), which needs no download."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import write_file

if TYPE_CHECKING:
    from qwen_mini.evaluation import Item


def export_lm_eval(items: "Sequence[Item]", folder: str | Path, name: str = "qwen_mini") -> Path:
    """Write items with choices as `<name>.jsonl`, and the task `<name>.yaml` that reads them; returns the latter.

    JSON is a part of YAML. Made for `lm_eval --model hf --model_args pretrained=CHECKPOINT,dtype=float32
    --include_path FOLDER --tasks NAME`. ValueError for items that are generated: their verifiers are ours alone.
    """
    if not items or any(item.example is not None for item in items):
        raise ValueError("only items with choices can be exported, and one at least")
    kinds = ("key", "context", "choices", "gold")
    rows = [{kind: getattr(item, kind) for kind in kinds} for item in items]
    rows = [row | {"context": f"<|endoftext|>{row['context']}"} for row in rows]
    folder = Path(folder)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_bytes")],
    }
    return write_file(folder / f"{name}.yaml", json.dumps(task, indent=1) + "\n")
