"""Kill the training of each stage at random moments, start it again, and compare what it ends with.

    python tests/random_kills.py                       one run of each stage, as in `make test`
    python tests/random_kills.py --kills 30            thirty runs of each
    python tests/random_kills.py --kills 5 --seed 1 grpo

What nobody kills is trained in a process of its own, with its own hash seed. What is killed is a fork of this one, with
torch already loaded: a SIGKILL leaves the same files as in a fresh process, and a run takes a second or two. It comes
at a moment between the start of a run and its usual end; half of the runs that were killed are killed again.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before an installed copy

from crash_points import Failure, load_torch, start, tree  # noqa: E402

STAGES = ("pretraining", "sft", "dpo", "grpo")
AGAIN = 0.5  # of the runs that were killed are killed once more, and so on
SAVE_EVERY = 0.05  # seconds between training states
# What makes every stage train for about a second; the last three start from what ships with the course.
SIZES = {
    "sft": {"demonstrations": 1, "batch_rows": 2},
    "dpo": {"samples": 8, "max_new_tokens": 48, "pairs_per_problem": 2, "batch_pairs": 1},
    "grpo": {"steps": 4, "queries": 4, "group_size": 4, "max_new_tokens": 32},
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage: `run` makes it and `before` is where it starts; nobody killed what took `seconds` and left `after`."""

    name: str
    run: Callable[[], object]
    before: Path
    after: Path
    seconds: float


@dataclasses.dataclass
class Tally:
    """What came of the runs of a stage."""

    runs: int = 0
    kills: int = 0
    with_state: int = 0  # kills that left a training state
    same: int = 0


def survive(work: Work, kills: int, rng: random.Random) -> Tally:
    """`kills` runs that were killed at least once, each started again until it ended by itself."""
    tally, wanted = Tally(), tree(work.after)
    while tally.runs < kills:
        with tempfile.TemporaryDirectory() as folder:
            copy, moments = Path(folder).resolve() / "runs", []
            shutil.copytree(work.before, copy)
            while moments == [] or rng.random() < AGAIN:
                moments.append(rng.uniform(0, work.seconds))
                if start(work.run, copy, after=moments[-1]) is not None:
                    moments.pop()  # it was quicker
                    break
                tally.with_state += any(copy.glob("*/training_state/*.safetensors"))
            else:
                start(work.run, copy)
            found = tree(copy)
        if not moments:
            continue
        tally.runs += 1
        tally.kills += len(moments)
        tally.same += found == wanted
        if found != wanted:
            names = [n for n in sorted(found | wanted) if found.get(n) != wanted.get(n)]
            when = ", ".join(f"{moment:.3f} s" for moment in moments)
            print(f"{work.name}, killed after {when}: other {', '.join(names)}", file=sys.stderr)
    return tally


# ---------------------------------------------------------------- the course's stages


def small_scale(folder: Path) -> Path:
    """Write a scale of the tests' size, in a file."""
    from tiny import TINY, whole_file

    from qwen_mini.course import load_scale

    path = folder / "kills.toml"
    path.write_text(TINY.format(dtype="float32").replace('"own"', '"shipped"'), encoding="utf-8")
    config = load_scale(path)
    sections = {
        name: dataclasses.replace(getattr(config, name), **sizes) for name, sizes in SIZES.items()
    }
    path.write_text(whole_file(dataclasses.replace(config, **sections)), encoding="utf-8")
    return path


def prepare(scale: Path) -> None:
    """What the stages read, but for what ships."""
    from qwen_mini.corpus import prepare_corpus
    from qwen_mini.course import load_scale
    from qwen_mini.dpo import pairs_stage
    from qwen_mini.grpo import probe_stage

    config = load_scale(scale)
    prepare_corpus(config)
    for stage in (pairs_stage(config), probe_stage(config)):
        stage.folder()


def train(scale: Path, name: str) -> None:
    """Make a stage, silently, with a state every moment."""
    from qwen_mini.course import load_scale, stages
    from qwen_mini.course.training import handle

    stages.SAVE_EVERY = SAVE_EVERY
    with contextlib.redirect_stdout(io.StringIO()):
        handle(name, load_scale(scale)).folder()


def undisturbed(folder: Path, names: list[str]) -> None:
    """Fill `before` and, for every stage, `after`; prints the seconds that each took."""
    load_torch()
    os.environ["QWEN_MINI_RUNS"] = str(folder / "before")
    scale, seconds = small_scale(folder), {}
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(scale)
    for name in names:
        os.environ["QWEN_MINI_RUNS"] = str(folder / name)
        shutil.copytree(folder / "before", folder / name)
        begun = time.perf_counter()
        train(scale, name)
        seconds[name] = time.perf_counter() - begun
    print(json.dumps(seconds))


def works(folder: Path, names: list[str]) -> list[Work]:
    """The stages, made once in a fresh process, while this one loads what its forks need."""
    command = [sys.executable, __file__, "--undisturbed", str(folder), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fresh:
        load_torch()
        from qwen_mini import grpo  # noqa: F401  and with it all the others

        said = fresh.communicate()[0]
    if fresh.returncode:
        raise Failure(f"what nobody killed ended with status {fresh.returncode}")
    scale = folder / "kills.toml"
    return [
        Work(name, functools.partial(train, scale, name), folder / "before", folder / name, seconds)
        for name, seconds in json.loads(said).items()
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--kills", type=int, default=1, help="runs of each stage; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--undisturbed", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    names = options.stages or list(STAGES)
    if unknown := set(names) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(unknown))} here")
    if options.undisturbed:
        undisturbed(options.undisturbed, names)
        return 0
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for work in works(Path(folder).resolve(), names):
            tally = survive(work, options.kills, random.Random(f"{options.seed}/{work.name}"))
            same &= tally.same == tally.runs
            line = f"{work.name}: {tally.runs} runs of {work.seconds:.1f} s, {tally.kills} kills, "
            line += f"{tally.kills} restarts, {tally.with_state} of them from a training state; "
            print(f"{line}{tally.same} of {tally.runs} identical", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as error:
        sys.exit(str(error))
