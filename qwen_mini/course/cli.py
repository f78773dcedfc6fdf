"""The command line: `qwen-mini run | outputs | check | chat | plan | train | export`."""

import argparse
import shutil
import sys
from pathlib import Path

from .errors import CourseError
from .paths import home
from .scales import load_scale, scale_names


def parser() -> argparse.ArgumentParser:
    """All subcommands with their options; chapters and Jupyter are imported only by the one that runs."""
    top = argparse.ArgumentParser(prog="qwen-mini", description="The Qwen2.5 technical report as a course that runs.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def add(function, help, default_scale: str | None = "quick"):
        sub = commands.add_parser(function.__name__, help=help, description=function.__doc__)
        sub.set_defaults(function=function)
        if default_scale:
            known = ", ".join(scale_names())
            sub.add_argument("--scale", default=default_scale, help=f"{known} or a TOML file ({default_scale})")
            sub.add_argument("--seed", type=int, default=0)
        return sub

    for sub in (add(run, "execute notebooks"), add(outputs, "execute notebooks and commit their outputs", "laptop")):
        sub.add_argument("notebooks", nargs="*", help="names, numbers, subjects or paths; all of them by default")
        sub.add_argument("--force", action="store_true", help="execute what is up to date, too")
        sub.add_argument("--keep-going", action="store_true", help="go on after a notebook that failed")
        sub.add_argument("--timeout", type=float, default=3600, help="seconds that one cell may take (default 3600)")
    add(check, "check the project without executing it", None)
    sub = add(chat, "talk to the newest trained model", "laptop")
    sub.add_argument("--stage", help="a stage's name, instead of the newest")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sub.add_argument("--max-tokens", type=int, default=128)
    sub = add(plan, "parameters, memory and FLOPs of a scale", "gpu")
    sub.add_argument("--gpus", type=int, default=1, help="devices that share the work")
    add(train, "prepare the corpus and pre-train, also under torchrun")
    sub = add(export, "copy a stage's Hugging Face checkpoint folder", "laptop")
    sub.add_argument("stage")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--bfloat16", action="store_true", help="store the weights in 16 bits")
    return top


def run(options) -> int:
    """Execute notebooks, each in its own kernel, and report what ran and what it showed."""
    from . import nb, runner

    books = runner.require_notebooks(nb.select(home(), options.notebooks))
    settings = (options.scale, options.seed, options.force, options.keep_going, options.timeout)
    results = runner.run(books, *settings)
    return 0 if all(result.ok for result in results) and len(results) == len(books) else 1


def outputs(options) -> int:
    """Execute what is not up to date, then copy the cleaned outputs into the notebooks whose run is of this code."""
    from . import nb, runner
    from .outputs import copy_outputs

    code = run(options)
    name = load_scale(options.scale).name
    state = runner.State(name)
    for book in nb.select(home(), options.notebooks):
        if state.up_to_date(book, runner.fingerprint_of(book, options.scale, options.seed)):
            print(f"{book.name}: outputs {'written' if copy_outputs(book, name) else 'unchanged'}")
        else:
            code = code or 1
            reason = "it was not started, did not finish, or is made of what changed while it ran"
            print(f"{book.name}: outputs left as they were, because {reason}: run it again", file=sys.stderr)
    return code


def check(options) -> int:
    """Compare modules, notebooks, outputs, links and commands with each other; seconds, no training."""
    from . import checks

    return checks.main()


def chat(options) -> int:
    """Talk in the terminal; a model that was only pre-trained completes what you type."""
    from .chat import talk

    return talk(options.scale, options.stage, options.seed, options.temperature, options.max_tokens)


def plan(options) -> int:
    """Build the model on the meta device and count."""
    from .plan import plan

    if options.gpus < 1:
        raise CourseError(f"--gpus must be at least 1, got {options.gpus}")
    for name, value in plan(load_scale(options.scale), options.gpus):
        print(f"{name:30} {value}")
    return 0


def train(options) -> int:
    """Prepare the corpus and pre-train at a scale; under torchrun one process prepares while the others wait."""
    from .training import train

    return train(load_scale(options.scale), options.seed)


def export(options) -> int:
    """Copy a stage's Hugging Face checkpoint folder."""
    from . import artifacts

    config = load_scale(options.scale)
    found = artifacts.find(config.name, options.stage)
    if not (found / "config.json").exists():
        raise CourseError(f"the stage {options.stage!r} holds no Hugging Face checkpoint: {found}")
    if options.folder.exists():
        raise CourseError(f"{options.folder} exists already: name a new folder")
    shutil.copytree(found, options.folder, ignore=shutil.ignore_patterns("metrics.jsonl"))
    if options.bfloat16:
        import torch

        from qwen_mini.model import Qwen

        Qwen.from_pretrained(found).save_pretrained(options.folder, torch.bfloat16)
    artifacts.count_files(options.folder)
    print(f"copied {options.stage} to {options.folder}")
    return 0


def main(words: list[str] | None = None) -> int:
    """Run one command; returns 0 for success, 1 if something did not hold, 2 for a request that cannot be met."""
    options = parser().parse_args(words)
    try:
        return options.function(options)
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if error.name is None or error.name.startswith("qwen_mini"):
            raise
        print(f"error: {error.name} is not installed: pip install 'qwen-mini[dev]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
