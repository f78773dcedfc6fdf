"""`qwen-mini export`: a stage's Hugging Face checkpoint in a folder of the reader's, whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from . import artifacts
from .errors import CourseError
from .paths import shown
from .scales import ScaleConfig

LEFT_OUT = shutil.ignore_patterns("metrics.jsonl")  # how it was trained is no part of a checkpoint


def export(config: ScaleConfig, stage: str, folder: str | os.PathLike, bfloat16: bool) -> Path:
    """Copy a stage of the scale `config` to `folder`, which must not exist; with `bfloat16` in 16 bits.

    The copy is made beside `folder` and renamed: a failure leaves nothing, and the next try is free.
    """
    found, folder = artifacts.find(config.name, stage, config.digest), Path(folder)
    if not (found / "config.json").exists():
        raise CourseError(f"the stage {stage!r} holds no Hugging Face checkpoint: {shown(found)}")
    if os.path.lexists(folder):
        raise CourseError(f"{folder} exists already: name a new folder")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            made = Path(shutil.copytree(found, Path(aside) / "stage", ignore=LEFT_OUT))
            if bfloat16:
                _round_to_16_bits(made)
            artifacts.count_files(made)
            made.rename(folder)
    except BaseException as error:
        for parent in new_parents:  # innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | shutil.Error):
            reason = getattr(error, "strerror", None) or error
            raise CourseError(f"{folder} could not be written: {reason}") from error
        raise
    return folder


def _round_to_16_bits(folder: Path) -> None:
    """Store the weights in bfloat16; no model is built, so that every kind of model can be exported."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    weights, config = folder / "model.safetensors", folder / "config.json"
    try:
        state = load(weights.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CourseError(f"the stage's weights cannot be read ({error}): make it again") from error
    state = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}
    artifacts.write_file(weights, save(state, metadata={"format": "pt"}))
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    artifacts.write_file(config, json.dumps(values, indent=2) + "\n")
