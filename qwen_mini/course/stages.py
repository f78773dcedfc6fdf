"""Stages: everything that trains, and what is sampled on the way. A stage is found by its key, or made; never mistaken.

A key holds what decides the result: settings, seed, start and the versions of the chapters used. Precision, processor,
torch and Python are provenance: they stand in the manifest and make nothing stale.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import artifacts, hardware
from .errors import CourseError
from .paths import shown
from .processes import generators_kept
from .provenance import provenance
from .ranks import is_first, patience, world
from .scales import LongContext, Pretraining, ScaleConfig, Sft
from .versions import versions_of

# Seconds between training states; more where writing one takes longer than a second.
SAVE_EVERY = 30.0
MOST_METRICS = 200  # records of a shipped checkpoint

# A step takes its number and returns its record; what it does depends on the number and the weights alone.
Begin = Callable[[object], tuple]  # dtype -> (trainer, step, tokenizer)


@dataclass(frozen=True, eq=False)
class Stage:
    """A handle: making it computes nothing; `folder()` finds the result by its key, or makes it."""

    config: ScaleConfig = field(repr=False)
    name: str
    seed: int = field(repr=False)
    inputs: dict = field(repr=False)  # JSON-able: all that decides the result but seed and versions
    versions: dict[str, int] = field(repr=False)
    work: Callable[["Stage", int | None], Path | None] = field(repr=False)

    @property
    def key(self) -> str:
        """Sixteen hex digits of inputs, seed and versions."""
        return digest({"inputs": self.inputs, "seed": self.seed, "versions": self.versions})

    @property
    def scale(self) -> str:
        return self.config.name

    def find(self) -> Path | None:
        """The folder in `runs/<scale>/`, else in `data/checkpoints/`, if its key is this one; else None."""
        artifacts.settle(self.scale, self.name)
        return artifacts.find_by_key(self.scale, self.name, self.key)

    def identity(self) -> str:
        """What depends on this stage holds: the hash of the weights where the course ships it, else the key.

        Numbers belong to weights: whoever trains a shipped stage anew measures anew. Of another stage nobody has the
        weights before they are needed.
        """
        ships = artifacts.read_manifest(artifacts.shipped_dir(self.name)).get("scale") == self.scale
        found = self.find() if ships else None
        return weights_hash(found) if found and any(found.glob("*.safetensors")) else self.key

    def folder(self) -> Path:
        """The finished folder, made now if nobody has made it; the running notebook notes that it used it."""
        from . import records

        if not making():
            records.note_stage(self)
        found = self.find()
        if "alone" in _now:
            return found or artifacts.find(self.scale, self.name, self.config.digest)
        _compare_ranks(self, "finished" if found else "not finished")
        return found or self.make()

    def run(self, stop_after: int | None = None) -> Path:
        """`folder()`, or `make(stop_after)` to end the training early as an interruption would."""
        return self.make(stop_after) if stop_after else self.folder()

    def make(self, stop_after: int | None = None) -> Path:
        """Make it whatever is there already; the training state if `stop_after` ended it early.

        One process at a time: another that wants the same stage waits, and then finds it. Under torchrun all ranks
        take part, and the first one writes.
        """
        if os.environ.get("QWEN_MINI_RECORDS") == "only" and not os.environ.get("QWEN_MINI_VERIFY"):
            remedy = "make it with `qwen-mini outputs`, or ask for more than records"
            what = f"the stage {self.name!r} is not there, or is of other settings"
            raise artifacts.MissingStage(f"{what}: {remedy}")
        artifacts.check_writable(self.scale)
        before = self.find()
        own = artifacts.stage_lock(self.scale, self.name)
        with own if is_first() else contextlib.nullcontext():
            # whoever had to wait may find it made; under torchrun all ranks do as the first one found
            if found := _of_all_ranks(self.find() if not before else None)[0]:
                return found
            with generators_kept(), _while("making"):
                return self.work(self, stop_after)


# "making" while this process makes a stage, "alone" while the others of its group wait for it
_now: list[str] = []


def making() -> bool:
    """Whether this process makes a stage: what that reads is in its key, and who finds the result does not see it."""
    return "making" in _now


@contextlib.contextmanager
def _while(what: str) -> Iterator[None]:
    _now.append(what)
    try:
        yield
    finally:
        _now.remove(what)


def stage(
    config: ScaleConfig, name: str, modules: tuple[str, ...], seed: int, inputs: dict, begin: Begin
) -> Stage:
    """A stage that trains. `begin(dtype)` gives (trainer, step, tokenizer); `inputs` holds every number that is read.

    An interrupted run goes on from its last state and reaches the same numbers. The final weights are stored in
    bfloat16, as they are shipped: what starts from them starts from the same bits everywhere.
    """
    work = lambda self, stop_after: _train(self, begin, stop_after)  # noqa: E731
    return Stage(config, name, seed, inputs, versions_of(*modules), work)


def data_stage(
    config: ScaleConfig,
    name: str,
    modules: tuple[str, ...],
    seed: int,
    inputs: dict,
    fill: Callable[[Path], None],
    starts: tuple = (),
) -> Stage:
    """A stage of data, such as sampled pairs: `fill(folder)` writes it, in the first process alone.

    `starts`: what `fill` reads; a stage that is not there is made before, by all processes together.
    """
    work = lambda self, _: _fill(self, fill, starts)  # noqa: E731
    return Stage(config, name, seed, inputs, versions_of(*modules), work)


def origin(start: "Path | Stage") -> str:
    """What a stage was made from: the identity of a stage, or the hash of a checkpoint folder's weights."""
    return start.identity() if isinstance(start, Stage) else weights_hash(start)


def folder_of(start: "Path | Stage") -> Path:
    """The folder of a stage or a path."""
    return start.folder() if isinstance(start, Stage) else Path(start)


def shipped(name: str, start: str = "shipped") -> Path | None:
    """A checkpoint that ships with the course, whatever scale made it; None where there is none.

    start: a scale's word on what to start from; None, too, where that is the scale's "own".
    """
    path = artifacts.shipped_dir(name)
    return path if start == "shipped" and path.is_dir() else None


def digest(content) -> str:
    """Sixteen hex digits of JSON-able content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_hashes: dict[tuple, str] = {}


def weights_hash(folder: Path) -> str:
    """Hash of a checkpoint's weights, rounded to bfloat16 as they are shipped."""
    import torch
    from safetensors import safe_open

    total = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CourseError(f"{shown(folder)} holds no weights: name the folder of a checkpoint")
    marks = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    if marks not in _hashes:
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in sorted(tensors.keys()):
                    tensor = tensors.get_tensor(name).to(torch.bfloat16).contiguous()
                    total.update(f"{name}{tuple(tensor.shape)}".encode())
                    total.update(tensor.view(torch.int16).numpy().tobytes())
        _hashes[marks] = total.hexdigest()[:16]
    return _hashes[marks]


# What `Trainer` reads of its settings; lengths, phases and sizes of measurements are none of it.
OPTIMIZER = (
    "optimizer learning_rate matrix_learning_rate min_lr_ratio warmup_steps schedule decay_fraction beta1 beta2 eps "
    "weight_decay clip_norm grad_accumulation"
).split()


def optimizer_inputs(settings: Pretraining) -> dict:
    """Every number of the settings that a `Trainer` reads, for the inputs of a stage."""
    return {name: getattr(settings, name) for name in OPTIMIZER}


def decaying(config: ScaleConfig, settings: Sft | LongContext, **changes) -> Pretraining:
    """The scale's pre-training settings with another stage's rates: warm-up, then linear; and other changes."""
    names = ("learning_rate", "matrix_learning_rate", "warmup_steps")
    rates = {name: getattr(settings, name) for name in names}
    plan = {"schedule": "wsd", "decay_fraction": 1.0}
    return replace(config.pretraining, **rates, **plan, **changes)


def metrics(folder: Path) -> list[dict]:
    """A finished stage's records, one per step; of a shipped one about every n-th."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise CourseError(f"{shown(path)} is missing: the folder holds no finished stage")
    return artifacts.read_lines(path)


def thinned(records: list[dict]) -> list[dict]:
    """Every n-th record, the first and the last, and those that hold more than numbers (evaluations, views)."""
    every = max(1, math.ceil(len(records) / MOST_METRICS))
    special = lambda record: any(isinstance(value, dict) for value in record.values())  # noqa: E731
    last = len(records) - 1
    return [r for i, r in enumerate(records) if i % every == 0 or i == last or special(r)]


def ship(found: Path, name: str) -> Path:
    """Copy a finished stage to `data/checkpoints/`, with thinned metrics."""
    target = artifacts.shipped_dir(name)
    aside = target.with_name(f".{name}.shipping")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(found, aside)
    if (aside / "metrics.jsonl").exists():
        artifacts.write_lines(aside / "metrics.jsonl", thinned(metrics(found)))
    artifacts.count_files(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def state_path(made: Stage) -> Path:
    """Where the state of an unfinished run lies."""
    return artifacts.state_file(made.scale, made.name, made.key)


def _fill(made: Stage, fill: Callable[[Path], None], starts: tuple) -> Path:
    for start in starts:
        folder_of(start)
    wait = patience()
    if is_first():
        begun = time.monotonic()
        # what trains inside under torchrun would wait for the other processes without end
        alone = _while("alone") if world()[1] > 1 else contextlib.nullcontext()
        with _written(made) as folder, alone:
            fill(folder)
            _add_provenance(folder, made, hardware.pick_dtype(made.config.run.dtype), begun)
    wait()
    return _agreed(made)


def _train(made: Stage, begin: Begin, stop_after: int | None) -> Path:
    """The skeleton: begin, resume, step, save, write."""
    import torch
    from qwen_mini.training import finished_model, load_training_state, save_training_state

    state, begun = state_path(made), time.monotonic()
    artifacts.sweep(made.scale)
    dtype = _precision(made, state)
    torch.manual_seed(made.seed)
    trainer, step, tokenizer = begin(dtype)
    records = load_training_state(state, trainer) if state.exists() else []
    _compare_ranks(made, f"at step {trainer.step_count}, in {dtype}")
    saved, pause = time.monotonic(), SAVE_EVERY
    while trainer.step_count < min(trainer.total_steps, stop_after or math.inf):
        started = time.perf_counter()
        record = step(trainer.step_count)
        records.append({**record, "seconds": time.perf_counter() - started})
        due = time.monotonic() - saved >= pause or trainer.step_count == stop_after
        # the processes' clocks differ, and each has a piece of the state: the first one decides
        if trainer.step_count < trainer.total_steps and _of_all_ranks(due)[0]:
            writing = time.perf_counter()
            save_training_state(state, trainer, records)
            saved = time.monotonic()
            # a thirtieth of the time at most
            pause = SAVE_EVERY * max(1.0, time.perf_counter() - writing)
    if trainer.step_count < trainer.total_steps:
        return state
    model, failure = finished_model(trainer), None
    if is_first():
        try:
            _write(made, model, tokenizer, records, dtype, begun)
        except Exception as error:  # the other processes wait for what became of it
            known = isinstance(error, CourseError)
            failure = error if known else CourseError(f"{type(error).__name__}: {error}")
            failure.__cause__ = None if known else error
    if failure := _of_all_ranks(failure)[0]:
        with contextlib.suppress(CourseError):
            # a full disk, for instance: the work of the last seconds is not lost
            save_training_state(state, trainer, records)
        raise failure
    return _agreed(made)


def _write(made: Stage, model, tokenizer, records: list[dict], dtype, begun: float) -> None:
    import torch

    with _written(made) as folder:
        chats = made.inputs.get("chat", False)
        stops = [tokenizer.im_end_id, tokenizer.endoftext_id] if chats else tokenizer.endoftext_id
        pad = tokenizer.control_tokens[tokenizer.pad_token]
        ends = {"eos_token_id": stops, "pad_token_id": pad}
        model.save_pretrained(folder, torch.bfloat16, generation_config=ends)
        tokenizer.save_pretrained(folder)
        artifacts.write_lines(folder / "metrics.jsonl", records)
        _add_provenance(folder, made, dtype, begun)


def _written(made: Stage) -> contextlib.AbstractContextManager[Path]:
    """The folder that becomes the stage; its manifest says what it was made from."""
    facts = {"key": made.key, "seed": made.seed, "versions": made.versions}
    facts["scale_digest"] = made.config.digest
    return artifacts.write_stage(made.scale, made.name, made.inputs, **facts)


def _add_provenance(folder: Path, made: Stage, dtype, begun: float) -> None:
    """How it was made; the body's own manifest is completed by `write_stage`."""
    facts = {"provenance": provenance(dtype) | {"seconds": round(time.monotonic() - begun)}}
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")


def _of_all_ranks(value) -> list:
    """The value of every process, by rank; under torchrun all wait here for each other."""
    import torch.distributed as dist

    values = [value] * world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _precision(made: Stage, state: Path):
    """The dtype of the run: the one it began with, else the scale's; the first process decides."""
    import torch
    from qwen_mini.training import training_header

    dtype = hardware.pick_dtype(made.config.run.dtype)
    if state.exists():
        began = getattr(torch, training_header(state)["dtype"])
        if began != dtype:
            print(f"{made.name}: goes on in {began}, as it began, not in {dtype}")
        dtype = began
    return _of_all_ranks(dtype)[0]


def _compare_ranks(made: Stage, stands: str) -> None:
    """Processes that do not see the same stages and training states would wait for each other without end."""
    seen = _of_all_ranks((made.key, stands))
    if len(set(seen)) > 1:
        one_key = len({key for key, _ in seen}) == 1
        told = sorted({how if one_key else f"{how}, with the key {key}," for key, how in seen})
        seen = f"{made.name} is {' for one of them, but '.join(told)} for another"
        remedy = "put QWEN_MINI_RUNS on a disk that all of them share"
        raise CourseError(f"these processes do not see the same folder: {seen}; {remedy}")


def _agreed(made: Stage) -> Path:
    """The finished folder, once every process has come here."""
    _of_all_ranks(None)
    folder = made.find()
    if folder is None:
        where = shown(artifacts.stage_dir(made.scale, made.name))
        made_there = f"the stage {made.name!r} was made by another process"
        raise CourseError(f"{made_there}, but is not in {where}")
    return folder
