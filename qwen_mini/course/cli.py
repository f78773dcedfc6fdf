"""The command line: `qwen-mini run | outputs | verify | chat | eval | plan | report | train | export`."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from .errors import CourseError
from .paths import PACKAGE, home, shown
from .progress import printable
from .scales import Count, CountOrNone, Positive, check_seed, load_scale, scale_names


def parser() -> argparse.ArgumentParser:
    """All subcommands with their options; chapters and Jupyter are imported only by the one that runs."""
    what = "The Qwen2.5 technical report as a course that runs."
    top = argparse.ArgumentParser(prog="qwen-mini", description=what)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    _executing(commands)
    _asking(commands)
    _making(commands)
    return top


def _add(
    commands, function: Callable, help: str, scale: str | None = None
) -> argparse.ArgumentParser:
    """A subcommand that calls `function`; with --scale and --seed if it has a usual scale."""
    sub = commands.add_parser(function.__name__, help=help, description=function.__doc__)
    sub.set_defaults(function=function)
    if scale:
        known = ", ".join(scale_names())
        sub.add_argument("--scale", default=scale, help=f"{known} or a TOML file ({scale})")
        sub.add_argument("--seed", type=int, default=0, help="0 to 2**32 - 1 (0)")
    return sub


def _flag(sub: argparse.ArgumentParser, name: str, help: str) -> None:
    sub.add_argument(name, action="store_true", help=help)


def _executing(commands) -> None:
    """run, outputs and verify: what executes notebooks."""
    executed = _add(commands, run, "execute notebooks", "quick")
    rendered = _add(commands, outputs, "render notebooks at laptop and store their outputs in them")
    for sub in (executed, rendered):
        which = "names, numbers, subjects or paths; all of them by default"
        sub.add_argument("notebooks", nargs="*", help=which)
        _flag(sub, "--fresh", "compute anew what is recorded")
        _flag(sub, "--keep-going", "go on after a notebook that failed")
        longest = "seconds that one cell may take (3600)"
        sub.add_argument("--timeout", type=_a(Positive), default=3600, help=longest)
    _flag(executed, "--records-only", "a result without a record is an error")
    _flag(rendered, "--dry-run", "only say what is not current, and what it takes")
    sub = _add(commands, verify, "compute records anew and compare")
    which = "names such as 16_sft/base, or how many in turn (1)"
    sub.add_argument("records", nargs="*", help=which)


def _asking(commands) -> None:
    """chat, eval, plan and report: what trains nothing."""
    sub = _add(commands, chat, "talk to the newest trained model", "laptop")
    sub.add_argument("--stage", help="a stage's name, instead of the newest")
    greedy = "0 takes the likeliest token (default)"
    sub.add_argument("--temperature", type=float, default=0.0, help=greedy)
    sub.add_argument("--max-tokens", type=int, default=128)
    sub = _add(commands, eval, "score a Hugging Face Qwen2 checkpoint on the course's benchmarks")
    sub.add_argument("checkpoint", type=Path, help="its folder")
    which = "all generated ones by default; IFEval and GSM8K (a download of 12 MB) only by name"
    sub.add_argument("--benchmarks", nargs="+", default=[], help=which)
    sub.add_argument("--count", type=_a(Count), default=36, help="items of each benchmark (36)")
    before = (
        "solved problems before each question: 0 for a chat model (default), 2 for a base model"
    )
    sub.add_argument("--shots", type=_a(CountOrNone), default=0, help=before)
    sub.add_argument("--seed", type=int, default=0, help="of the items (0)")
    kept = "JSONL file of every response; an interrupted run goes on there"
    sub.add_argument("--out", type=Path, help=kept)
    sub = _add(commands, plan, "parameters, memory and FLOPs of a scale", "gpu")
    sub.add_argument("--gpus", type=_a(Count), default=1, help="devices that share the work")
    by_laws = "N: settings and cost by the scaling laws"
    sub.add_argument("--params", type=_a(Positive), help=by_laws)
    sub.add_argument("--tokens", type=_a(Positive), help="D, with --params")
    _add(commands, report, "write the closing report from what is recorded", "laptop")


def _making(commands) -> None:
    """train and export: what writes checkpoints."""
    sub = _add(commands, train, "train a stage, also under torchrun", "quick")
    known = "pretraining (default), long_context, sft, dpo, …"
    sub.add_argument("stage", nargs="?", default="pretraining", help=known)
    _flag(sub, "--fresh", "train it although it is there")
    sub = _add(commands, export, "copy a stage's Hugging Face checkpoint folder", "laptop")
    sub.add_argument("stage")
    sub.add_argument("folder", type=Path)
    _flag(sub, "--bfloat16", "store the weights in 16 bits")


def _a(kind) -> Callable[[str], float]:
    """Reads an option of a kind of number; argparse prints what is wrong with another."""

    def read(text: str) -> float:
        try:
            return TypeAdapter(kind).validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{error.errors()[0]['msg']}, got {text!r}") from None

    return read


def _execution(options) -> dict:
    """What the commands that execute notebooks have in common."""
    from .records import asked_anew

    fresh = options.fresh or asked_anew()
    return {"keep_going": options.keep_going, "timeout": options.timeout, "fresh": fresh}


def run(options) -> int:
    """Execute notebooks, each in its own kernel, and report what ran and what it showed."""
    from . import nb, runner

    books = nb.select(home(), options.notebooks)
    flags = {"records_only": options.records_only, **_execution(options)}
    results = runner.run(books, options.scale, options.seed, **flags)
    return 0 if all(result.ok for result in results) and len(results) == len(books) else 1


def outputs(options) -> int:
    """Render the named notebooks, or all whose outputs are not current, at laptop; then ship outputs and records."""
    from . import nb, runner
    from .outputs import SCALE, copy_outputs, publish
    from .progress import clock
    from .stale import stale, stale_outputs

    if options.dry_run:
        found = stale(home())
        for thing in found:
            about = f"; about {clock(thing.seconds)}" if thing.seconds else ""
            print(f"{thing.what}: {thing.reason}{about}")
        whole = f"in all about {clock(sum(thing.seconds for thing in found))}"
        print(whole if found else "everything is current")
        return 0
    flags, books = _execution(options), nb.select(home(), options.notebooks)
    if not options.notebooks and not flags["fresh"]:
        old = {thing.what for thing in stale_outputs(home())}
        books = [book for book in books if book.name in old]
        if not books:
            print("all outputs are current")
            return 0
    results = runner.run(books, SCALE, **flags)
    ended = {result.notebook for result in results if result.ok}
    passed = [book for book in books if book.name in ended]
    for book in passed:
        publish(book)
        print(f"{book.name}: outputs {'written' if copy_outputs(book) else 'unchanged'}")
    return 0 if len(passed) == len(books) else 1


def verify(options) -> int:
    """Compute some records anew in their notebooks and compare them within the tolerance that they state."""
    from .verify import verify

    return verify(home(), options.records)


def chat(options) -> int:
    """Talk in the terminal; a model that was only pre-trained completes what you type."""
    from .chat import talk

    return talk(options.scale, options.stage, options.seed, options.temperature, options.max_tokens)


def eval(options) -> int:
    """Score a checkpoint folder on chapter 21's benchmarks: shares of right answers with 95 % intervals, and chance."""
    from .scoring import score

    wanted = options.benchmarks, options.count, options.shots, options.seed, options.out
    found = score(options.checkpoint, *wanted)
    print(f"{'benchmark':18}{'items':>6}{'right':>7}   {'95 % interval':16}{'chance':>7}")
    for row in found:
        interval = f"[{row['low']:.0%} {row['high']:.0%}]"
        shares = f"{row['right']:>7.0%}   {interval:16}{row['chance']:>7.0%}"
        print(f"{row['benchmark']:18}{row['items']:>6}{shares}")
    return 0


def plan(options) -> int:
    """Build the model of a scale on the meta device and count; or take N and D, and let chapter 11's laws say the rest."""
    from .plan import plan, plan_run

    if (options.params is None) != (options.tokens is None):
        raise CourseError("--params and --tokens go together: give both, or neither for a scale")
    if options.params:
        rows = plan_run(options.params, options.tokens)
    else:
        rows = plan(load_scale(options.scale), options.gpus)
    for name, value in rows:
        print(f"{name:30} {value}")
    return 0


def report(options) -> int:
    """Write our own technical report, from records and metrics alone, as Markdown, HTML and PDF."""
    from .report import open_shelf, write_up
    from .report_files import run_facts, write_report

    scale = load_scale(options.scale).name
    document = write_up(open_shelf(scale), facts=run_facts(scale))
    folder = write_report(document, scale)
    print(f"wrote {shown(folder)}/report.html, report.md and report.pdf")
    print(f"gaps: {len(document.gaps)}" if document.gaps else "no gap")
    return 0


def train(options) -> int:
    """Train a stage after what it starts from; under torchrun one process prepares the corpus while others wait."""
    from .training import train

    return train(load_scale(options.scale), options.stage, options.seed, options.fresh)


def export(options) -> int:
    """Copy a stage's Hugging Face checkpoint folder."""
    from .export import export

    export(load_scale(options.scale), options.stage, options.folder, options.bfloat16)
    print(f"copied {options.stage} to {options.folder}")
    return 0


def main(words: list[str] | None = None) -> int:
    """Run one command; returns 0 for success, 1 if something did not hold, 2 for a request that cannot be met."""
    options = parser().parse_args(words)
    try:
        check_seed(getattr(options, "seed", 0))
        return options.function(options)
    except KeyboardInterrupt:
        again = "the same command finds what is finished, and goes on"
        print(f"\ninterrupted: {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {printable(sentence)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str | None:
    """What is wrong and what to do; None for an error that nobody foresaw, whose traceback says more."""
    if isinstance(error, CourseError):
        return str(error)
    if isinstance(error, ImportError) and error.name and not error.name.startswith("qwen_mini"):
        return f"{error.name} is not installed: pip install 'qwen-mini[dev]'"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{shown(error.filename)}: {reason}" if isinstance(error.filename, str) else reason
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(PACKAGE):
        return str(error)  # raised by the course's own code, for a reader
    return None
