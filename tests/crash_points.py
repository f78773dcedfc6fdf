"""Kill what writes results at every file operation and at random moments, start it again, and compare.

    python tests/crash_points.py               a sample, the one of `make test`
    python tests/crash_points.py --all         every file operation, and 163 random kills of each case
    python tests/crash_points.py --all stage   of the case `stage` alone

After a SIGKILL nothing may be taken for whole that is not, and a version that was there before must still be found; the
next start must end with exactly the files of a run that nobody killed: same names, same content, nothing else.
"""

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_mini.course import artifacts

EVENTS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.listdir", "os.scandir"
}  # fmt: skip
# "metrics.jsonl" in a manifest: its bytes
VARYING = re.compile(rb'"(seconds|metrics\.jsonl|date)": ?("[0-9-]+"|[0-9.e+-]+)')
SCALE = "quick"


class Failure(Exception):
    """A kill that left something behind, lost something, or changed the result."""


def plain(content: bytes) -> bytes:
    """A file's content without what no two runs have in common."""
    return VARYING.sub(rb'"\1": 0', content)


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that survives a kill: `run` is called in a new process each time until it ends by itself.

    prepare: what stands there before the first start. stages: names of the stages of SCALE that `run` writes.
    load: imports what every fork would import again.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    stages: tuple[str, ...] = ()
    load: Callable[[], object] = lambda: None


# ---------------------------------------------------------------- the machinery


def start(
    call: Callable[[], object], runs: Path, kill_at: int | None = None, after: float | None = None
) -> int | None:
    """Run in a process of its own; returns the number of its file operations, or None if it was killed.

    kill_at: SIGKILL before the operation of that number, from 1; after: SIGKILL after so many seconds.
    """
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(receive)
            os.environ["QWEN_MINI_RUNS"] = str(runs)
            count = _count_operations(runs, kill_at)
            call()
            os.write(send, str(count[0]).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(send)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(receive) as pipe:
        operations = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise Failure(f"ended with status {status}")
    return int(operations) if operations else None


def _count_operations(runs: Path, kill_at: int | None) -> list[int]:
    """Count operations on files under `runs` from here on, in this process."""
    count, inside = [0], str(runs)

    def operation() -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        if event in EVENTS and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(inside) or not os.path.isabs(
                path
            ):  # relative: shutil.rmtree by handles
                operation()

    def counted(function: Callable) -> Callable:
        def call(*arguments):
            operation()
            return function(*arguments)

        return functools.wraps(function)(call)

    os.fsync, fcntl.lockf = (
        counted(os.fsync),
        counted(fcntl.lockf),
    )  # neither tells the audit hooks by path
    sys.addaudithook(watch)
    return count


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder, hidden ones too, by the digest of its content."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(plain(path.read_bytes())).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }


def check_versions(case: Case, runs: Path, before: Path, after: Path, reader: bool) -> None:
    """Nothing half counts as whole; what was there before is still found."""
    for stage in case.stages:
        allowed = [tree(folder / SCALE / stage) for folder in (before, after)]
        for folder in (runs / SCALE / stage, runs / SCALE / f".{stage}.new"):
            if (folder / "manifest.json").exists() and tree(folder) not in allowed:
                raise Failure(f"{folder.name} is neither the version before nor the one after")
        if reader:  # it heals, so that only some of the next starts meet what the kill has left
            os.environ["QWEN_MINI_RUNS"] = str(runs)
            if artifacts.made(SCALE, stage):
                if tree(artifacts.find(SCALE, stage)) not in allowed:
                    raise Failure(
                        f"{stage} as found is neither the version before nor the one after"
                    )
            elif (before / SCALE / stage / "manifest.json").exists():
                raise Failure(f"no version of {stage} is found any more")


@dataclasses.dataclass
class Trial:
    """One case with its two ends: as it was before the first start, and after a run that nobody killed."""

    case: Case
    folder: Path

    def __post_init__(self):
        self.before, self.after, self.copy = (
            self.folder / name for name in ("before", "after", "copy")
        )
        self.before.mkdir(parents=True)
        start(self.case.prepare, self.before)
        shutil.copytree(self.before, self.after)
        began = time.perf_counter()
        self.operations = start(self.case.run, self.after)
        self.seconds = time.perf_counter() - began
        self.wanted = tree(self.after)

    def kill(self, *points: int, after: float | None = None, reader: bool = False) -> bool:
        """Kill a run at these operations, one start after the other, or after so many seconds; then let it end.

        False if it ended before it could be killed.
        """
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.before, self.copy)
        killed = False
        for point in points or (None,):
            killed |= start(self.case.run, self.copy, kill_at=point, after=after) is None
            check_versions(self.case, self.copy, self.before, self.after, reader)
        start(self.case.run, self.copy)
        got = tree(self.copy)
        if got != self.wanted:
            names = [
                name for name in sorted(got | self.wanted) if got.get(name) != self.wanted.get(name)
            ]
            raise Failure(f"other than a run without a kill: {', '.join(names)}")
        return killed


def trials(
    trial: Trial, every: int, kills: int, rng: random.Random
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """The kills of one case: every `every`-th operation, half of them with a second kill later, and random moments."""
    first = rng.randrange(every) + 1
    for number, point in enumerate(range(first, trial.operations + 1, every)):
        points = (point, rng.randint(1, trial.operations)) if number % 2 else (point,)
        reader = number % 4 < 2
        yield f"killed at operation {points}", functools.partial(trial.kill, *points, reader=reader)
    for number in range(kills):
        after = rng.uniform(0, trial.seconds)
        yield (
            f"killed after {after:.4f} s",
            functools.partial(trial.kill, after=after, reader=number % 2 == 0),
        )


def examine(case: Case, every: int = 1, kills: int = 0, seed: int = 0) -> str:
    """All kills of a case; a line about them, or a `Failure` that says which kill did what."""
    case.load()
    rng, hit, total = random.Random(f"{case.name} {seed}"), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(case, Path(folder).resolve())
        for what, kill in trials(trial, every, kills, rng):
            try:
                hit += kill()
            except Failure as error:
                raise Failure(f"{case.name}, {what} of {trial.operations}: {error}") from None
            total += 1
    return f"{case.name}: {trial.operations} file operations, {total} runs, {hit} killed, all ended the same"


# ---------------------------------------------------------------- the cases


def _write_state() -> None:
    for number in range(3):
        artifacts.write_file(artifacts.state_file(SCALE, "toy", "0a"), f"{number}" * 100_000)


def _write_toy(content: str) -> None:
    with artifacts.write_stage(SCALE, "toy", {"content": content}) as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(content * 100_000)


def _write_pair(content: str) -> None:
    """Two stages, the second from the first, neither of them made again: as tokenizer and corpus."""
    for stage in ("first", "second"):
        if artifacts.read_manifest(artifacts.stage_dir(SCALE, stage)).get("inputs") != {
            "content": content
        }:
            with artifacts.write_stage(SCALE, stage, {"content": content}) as folder:
                (folder / stage).write_text(content)
        else:
            artifacts.settle(SCALE, stage)


def load_torch() -> None:
    """One thread, since a parent's others are not in its forks; a first step, since it imports more of torch."""
    import torch
    from safetensors.torch import load, save

    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    load(save({"a": torch.ones(1)}))


def _train(key: str, steps: int = 6) -> None:
    """A training as the course's: its state saved as it goes, resumed after an interruption, not repeated when done."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save, save_file

    if artifacts.find_by_key(SCALE, "toy", key):
        return artifacts.settle(SCALE, "toy")
    artifacts.check_writable(SCALE)
    with artifacts.stage_lock(SCALE, "toy"):
        torch.manual_seed(int(key, 16))
        model = torch.nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        state, metrics = artifacts.state_file(SCALE, "toy", key), []
        for p in model.parameters():
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": 0 * p.data,
                "exp_avg_sq": 0 * p.data,
            }
        tensors = {
            f"{name}.{field}": x
            for name, p in model.named_parameters()
            for field, x in [("p", p.data), *optimizer.state[p].items()]
        }
        if state.exists():
            with safe_open(state, framework="pt") as file:
                metrics = json.loads(file.metadata()["metrics"])
                for name, x in tensors.items():
                    x.copy_(file.get_tensor(name))
        while len(metrics) < steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(len(metrics)))
            loss = (model(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics.append({"loss": loss.item(), "seconds": time.monotonic()})
            artifacts.write_file(state, save(tensors, {"metrics": json.dumps(metrics)}))
        with artifacts.write_stage(SCALE, "toy", key=key) as folder:
            save_file(
                {name: p.data for name, p in model.named_parameters()}, folder / "model.safetensors"
            )
            lines = [json.dumps(record) + "\n" for record in metrics]
            (folder / "metrics.jsonl").write_text("".join(lines))


def _train_with(former: str) -> None:
    """Before the case `training`: a stage of former settings, and the state of a third run that nobody will end."""
    _train(former)
    artifacts.write_file(artifacts.state_file(SCALE, "toy", "0c"), "x")


def _train_a_model() -> None:
    """The course's own skeleton and trainer on a model of two layers, its state saved after every step."""
    import torch
    from conftest import small_config

    from qwen_mini.course import load_scale, stages
    from qwen_mini.model import Qwen
    from qwen_mini.tokenizer import Tokenizer
    from qwen_mini.training import Batch, Trainer

    stages.SAVE_EVERY = 0.0
    config = load_scale(SCALE)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dtype="bfloat16"))

    def begin(dtype) -> tuple:
        trainer = Trainer(Qwen(small_config()), config.pretraining, 4, dtype)

        def step(number: int) -> dict:
            ids = torch.randint(30, 900, (4, 17), generator=torch.Generator().manual_seed(number))
            return trainer.step(Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 16)))

        return trainer, step, Tokenizer.from_pretrained(artifacts.shipped_dir("long_context"))

    stages.stage(config, "toy", ("pretraining",), 0, {}, begin).folder()


def _load_stages() -> None:
    """Run it once, so that the forks find everything loaded."""
    load_torch()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QWEN_MINI_RUNS"] = folder
        _train_a_model()


CASES = [
    Case("file", _write_state),
    Case("stage", functools.partial(_write_toy, "2"), functools.partial(_write_toy, "1"), ("toy",)),
    Case(
        "pair",
        functools.partial(_write_pair, "2"),
        functools.partial(_write_pair, "1"),
        ("first", "second"),
    ),
    Case(
        "training",
        functools.partial(_train, "0a"),
        functools.partial(_train_with, "0b"),
        ("toy",),
        load=load_torch,
    ),
]
REAL = [  # the course's own code: with --all only
    Case("model", _train_a_model, lambda: _write_toy("1"), ("toy",), load=_load_stages)
]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=", ".join(case.name for case in CASES + REAL)
    )
    parser.add_argument(
        "--all", action="store_true", help="every file operation, and 163 random kills of each case"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args(words)
    known = CASES + REAL
    if unknown := set(options.cases) - {case.name for case in known}:
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    chosen = [case for case in known if case.name in options.cases] or (
        known if options.all else CASES
    )
    for case in chosen:
        every, kills = (1, 163) if options.all else (9, 12)
        print(examine(case, every, kills, options.seed), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as error:
        sys.exit(str(error))
