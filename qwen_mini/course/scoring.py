"""`qwen-mini eval`: the benchmarks of chapter 21 for any folder with a Qwen2 model in Hugging Face's format."""

from collections.abc import Sequence
from pathlib import Path

from . import hardware
from .errors import CourseError
from .progress import Progress
from .statistics import wilson_interval

REAL_TOKENS = 256  # of an answer to a real item: they are longer
SMALLEST = 8  # real items: GSM8K asks each problem in four languages


def score(
    folder: Path, names: Sequence[str], count: int, shots: int, seed: int, out: Path | None
) -> list[dict]:
    """One row a benchmark: name, items, share of right answers, its interval, and chance. CourseError if it cannot be had.

    names: of the benchmarks, none for all generated ones; out: where every response is kept, and an interrupted run goes on.
    """
    from qwen_mini.evaluation import BENCHMARKS, REAL, Settings, chance_level, evaluate, suite

    names = list(dict.fromkeys(names or BENCHMARKS))
    real = [name for name in names if name in REAL]
    other = next((name for name in names if name not in REAL), None)
    if real and other:
        longer = f"answers to {real[0]} may be longer than those to {other}"
        raise CourseError(f"{longer}, and batches are shared: ask for them one after the other")
    if real and count < SMALLEST:
        few = f"chance on {real[0]} is judged on other items"
        raise CourseError(f"{few}: ask for {SMALLEST} or more with --count")
    model, tokenizer = _load(folder)
    progress, items = Progress(), suite(count, seed, names)
    longest = REAL_TOKENS if real else Settings.max_new_tokens
    settings = Settings(shots=shots, seed=seed, max_new_tokens=longest)
    tell = lambda done, all: progress.show(f"batch {done} of {all}")
    try:
        lines = evaluate(model, tokenizer, items, out, settings, tell)
    finally:
        progress.clear()
    rows = []
    for name in names:
        some = [pair for pair in zip(items, lines, strict=True) if pair[0].benchmark == name]
        its_items, its_lines = zip(*some, strict=True)
        share = sum(line["correct"][0] for line in its_lines) / len(some)
        low, high = wilson_interval(share, len(some))
        row = {"benchmark": name, "items": len(some), "right": share, "low": low, "high": high}
        rows.append(row | {"chance": chance_level(its_items, its_lines)})
    return rows


def _load(folder: Path):
    """(model, tokenizer) of a checkpoint folder, ready to answer."""
    from qwen_mini.model import Qwen
    from qwen_mini.tokenizer import Tokenizer

    if not (folder / "config.json").is_file():
        raise CourseError(
            f"{folder} holds no config.json: name a folder with a Hugging Face Qwen2 checkpoint"
        )
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
        model = Qwen.from_pretrained(folder, hardware.pick_dtype("auto"))
    except (OSError, ValueError) as error:
        raise CourseError(f"the checkpoint in {folder} cannot be loaded: {error}") from error
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CourseError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} ids, the model knows "
            f"{model.config.vocab_size:,}: they do not belong together"
        )
    return model.eval().requires_grad_(False).to(hardware.device()), tokenizer
