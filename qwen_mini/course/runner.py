"""Execute notebooks, each in its own kernel, and tell what ran, what it cost and what it showed."""

import contextlib
import json
import logging
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from .. import __version__
from . import hardware, show
from .artifacts import alone, check_writable, write_file
from .claims import forget, read_claims
from .environment import applied, kernel_environment, kernel_manager
from .errors import CourseError
from .nb import Notebook, source
from .paths import runs, shown
from .processes import in_forks
from .progress import clock, printable
from .scales import ScaleConfig, load_scale, scale_file

CELL_TIMEOUT = 3600  # seconds
REPORTS = ("report.json", "junit.xml")
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


@dataclass
class Result:
    """What one notebook did: status is "passed" or "failed"."""

    notebook: str
    status: str
    seconds: float = 0.0
    peak_mib: float = 0.0
    claims_held: int = 0
    claims: int = 0
    problem: str = ""
    failed_claims: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status != "failed"

    @property
    def held_of_all(self) -> str:
        return f"{self.claims_held}/{self.claims}"


def run(
    books: list[Notebook],
    scale: str = "quick",
    seed: int = 0,
    *,
    keep_going: bool = False,
    timeout: float = CELL_TIMEOUT,
    records_only: bool = False,
    fresh: bool = False,
) -> list[Result]:
    """Execute `books` at a scale, print progress and a table, write reports; returns what each did.

    As many at once as the scale's `jobs`, each with its share of the threads (on Linux; elsewhere one by one). After a failure the rest is left out unless `keep_going`. `timeout` is in seconds per cell.
    `records_only` makes a result that is not recorded an error, `fresh` computes everything anew.
    """
    if records_only and fresh:
        raise CourseError("a run from records alone cannot compute anew: ask for one of the two")
    config = load_scale(scale)
    check_writable(config.name)
    most = min(config.run.jobs, hardware.threads(config), len(books))
    jobs = max(1, most) if sys.platform == "linux" else 1
    environment = applied(kernel_environment(config, records_only, fresh, jobs))

    def one(nb: Notebook) -> Result:
        with Watch(nb.name, last_seconds(config.name).get(nb.name), live=jobs == 1) as watch:
            problem = execute(nb, scale, config, seed, timeout, environment)
        return _judge(nb, config.name, problem, watch)

    results = []
    # two runs of a scale would take each other's claims and notebooks for their own
    only_run = alone(runs() / config.name / "run", f"scale {config.name} is being run", wait=False)
    with only_run, _orderly_end(), Watch("running", None, live=jobs > 1) as whole:
        for name in REPORTS:  # an earlier run's would speak of notebooks that do not end
            (runs() / config.name / name).unlink(missing_ok=True)
        for result in _each(books, one, jobs):
            results.append(result)
            expected = last_seconds(config.name).get(result.notebook)
            _print_line(result, f"[{len(results)}/{len(books)}]", expected)
            if result.ok:
                _note_seconds(result, config.name)
            else:
                _print_failure(result, config.name)
                if not keep_going:
                    break
    place = {nb.name: number for number, nb in enumerate(books)}
    results.sort(key=lambda result: place[result.notebook])
    print(f"\nscale {config.name} · seed {seed}")
    _print_table(results, whole)
    _write_reports(results, config.name, seed, whole)
    return results


def _each(books: list[Notebook], one: Callable[[Notebook], Result], jobs: int) -> Iterator[Result]:
    """Results as they come: here one after the other, or `jobs` at a time in forks of this process.

    Beside each other the longest begin, so that none of them is left to run alone at the end.
    """
    if jobs == 1:
        yield from map(one, books)
    else:
        order = sorted(books, key=lambda nb: -sum(map(len, nb.code)))
        calls = {nb.name: partial(one, nb) for nb in order}
        lost = lambda name, error: Result(name, "failed", problem=f"  {error}")
        with contextlib.closing(in_forks(calls, jobs, lost)) as finished:
            yield from (result for _, result, _ in finished)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal, a lost connection) do what Ctrl-C does: the kernel ends."""

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    old = {number: signal.getsignal(number) for number in numbers}
    for number, handler in old.items():
        if handler != signal.SIG_IGN:  # nohup's run goes on
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def execute(
    nb: Notebook, scale: str, config: ScaleConfig, seed: int, timeout: float, environment: dict
) -> str:
    """Execute one notebook into `runs/<scale>/notebooks/`; returns what went wrong, "" if nothing did."""
    import papermill
    from papermill.clientwrap import PapermillNotebookClient

    # The client would answer widgets on a channel that it is polling, and can then wait for ever for a reply that has
    # come; unanswered, what a widget's callback prints or raises lands in the cell, where `hidden_error` looks.
    PapermillNotebookClient.on_comm_open_jupyter_widget = lambda self, msg: None

    forget(config.name, nb.name)
    target = executed_path(config.name, nb)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    own = str(scale_file(scale)) if str(scale).endswith(".toml") else scale
    try:
        unknown = {"scale", "seed"} - set(nb.parameters())
        if unknown:
            return f"its parameters cell does not know {' and '.join(sorted(unknown))}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                str(nb.path),
                str(target),
                parameters={"scale": own, "seed": seed},
                kernel_name="python3",  # what papermill writes into the copy; the kernel is the manager's
                kernel_manager_class=kernel_manager(environment),
                cwd=str(nb.path.parent),
                progress_bar=False,
                execution_timeout=timeout,
                extra_arguments=["--Application.log_level=50"],  # its errors are in the notebook
            )
    except papermill.PapermillExecutionError as error:
        told = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
        return _cell_report(error.source, told)
    except Exception as error:  # a dead kernel, a timeout, a notebook without a parameters cell, …
        first_lines = " ".join(str(error).split("\n")[:2]).strip()
        return _cell_report(_last_started(target), f"{type(error).__name__}: {first_lines}")
    return hidden_error(json.loads(target.read_text(encoding="utf-8")))


def hidden_error(data: dict) -> str:
    """An error in an executed notebook that papermill takes for success, "" if there is none.

    That is `sys.exit(0)`, and an exception inside a widget's callback, whose traceback goes to the widget's own output
    or to the standard error.
    """
    for cell in data["cells"]:
        for output in cell.get("outputs", []):
            if text := _error_text(output):
                return _cell_report(source(cell), text)
    widgets = data["metadata"].get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for widget in widgets.values():
        for output in widget.get("state", {}).get("outputs", []):
            if text := _error_text(output):
                return _cell_report("(inside a widget's callback)", text)
    return ""


def _error_text(output: dict) -> str:
    if output["output_type"] == "error":
        return "\n".join(output["traceback"]) or f"{output['ename']}: {output['evalue']}"
    text = "".join(output.get("text", ""))
    if output.get("name") == "stderr" and "Traceback (most recent call last)" in text:
        return text
    return ""


def _last_started(target: Path) -> str:
    """Source of the last cell that papermill began, from the notebook it saved on the way."""
    if not target.exists():
        return ""
    cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
    started = [cell for cell in cells if cell["metadata"].get("papermill", {}).get("start_time")]
    return source(started[-1]) if started else ""


def _cell_report(cell: str, error: str) -> str:
    """A cell's first twelve lines and its error's last ones, without colours."""
    code = cell.strip().splitlines()
    shortened = code[:12] + (["…"] if len(code) > 12 else [])
    plain = printable(re.sub(r"\x1b\[[0-9;]*m", "", error)).strip().splitlines()[-12:]
    return "\n".join([*(f"  | {line}" for line in shortened), *(f"  {line}" for line in plain)])


def _judge(nb: Notebook, scale_name: str, problem: str, watch: "Watch") -> Result:
    """Passed only if it ran without an error and everything it claimed holds."""
    records = read_claims(scale_name, nb.name)
    broken = [record["claim"] for record in records if not record["holds"]]
    if not problem and broken:
        problem = "\n".join(f"  claim fails · {text}" for text in broken)
    status = "failed" if problem else "passed"
    claims = (len(records) - len(broken), len(records), problem, broken)
    return Result(nb.name, status, watch.seconds, watch.peak_mib, *claims)


def executed_path(scale_name: str, nb: Notebook) -> Path:
    """Where the executed copy of a notebook lies."""
    return runs() / scale_name / "notebooks" / nb.path.name


class Watch:
    """Time and peak memory of the block, with a line on a terminal that is renewed while it lasts if `live`.

    Memory is that of the processes the block starts, summed, sampled four times a second; what forks share counts once.
    """

    def __init__(self, label: str, expected: float | None, live: bool):
        self.label, self.expected, self.live = label, expected, live and sys.stdout.isatty()
        self.seconds = self.peak_mib = 0.0
        self._stop = threading.Event()

    def __enter__(self):
        import psutil

        self._process = psutil.Process()
        self._others = set(self._process.children(recursive=True))
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._begin

    def _sample(self) -> None:
        highest, samples = 0, 0
        while not self._stop.wait(0.25):
            samples += 1
            resident = self._bytes("rss")
            if resident > 1.01 * highest:  # what is shared is slow to ask for
                highest = resident
                self.peak_mib = max(self.peak_mib, self._bytes("pss") / 2**20)
            if self.live and samples % 4 == 0:
                passed = time.monotonic() - self._begin
                print(f"\r{_timed(self.label, passed, self.expected)}", end="", flush=True)

    def _bytes(self, kind: str) -> int:
        """Memory of all processes: resident ("rss"), or with the n-th part of what n of them share ("pss", Linux)."""
        import psutil

        total = 0
        with contextlib.suppress(psutil.Error):
            for child in set(self._process.children(recursive=True)) - self._others:
                with contextlib.suppress(psutil.Error):
                    facts = child.memory_info() if kind == "rss" else child.memory_full_info()
                    total += getattr(facts, kind, facts.rss)
        return total


def _timed(label: str, seconds: float, expected: float | None) -> str:
    return f"{label}: {clock(seconds)}" + (f" (last time {clock(expected)})" if expected else "")


def _print_line(result: Result, number: str, expected: float | None) -> None:
    """The notebook's line, final."""
    took = _timed(result.notebook, result.seconds, expected)
    line = f"{number} {took} · {result.peak_mib:.0f} MiB"
    begin = "\r" if sys.stdout.isatty() else ""
    print(f"{begin}{line} · claims {result.held_of_all} · {result.status}", flush=True)


def last_seconds(scale_name: str) -> dict[str, float]:
    """How long notebooks took when they last passed at a scale, from `runs/<scale>/run_state.json`."""
    try:
        seconds = json.loads(_state_file(scale_name).read_text(encoding="utf-8"))["seconds"]
        return {name: float(value) for name, value in seconds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or another version's
        return {}


def _state_file(scale_name: str) -> Path:
    return runs() / scale_name / "run_state.json"


def _note_seconds(result: Result, scale_name: str) -> None:
    seconds = last_seconds(scale_name) | {result.notebook: round(result.seconds, 1)}
    write_file(_state_file(scale_name), json.dumps({"seconds": seconds}, indent=1) + "\n")


def _print_table(results: list[Result], whole: Watch) -> None:
    """One row per notebook, then the whole run."""
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} failed" if failed else f"{len(results)} passed"
    rows = [(r.notebook, r.seconds, r.peak_mib, r.held_of_all, r.status) for r in results]
    held, count = sum(r.claims_held for r in results), sum(r.claims for r in results)
    rows.append(("all", whole.seconds, whole.peak_mib, f"{held}/{count}", verdict))
    columns = {name: name for name in ("notebook", "time", "memory", "claims", "result")}
    columns["time"] = "  time"
    cells = ((name, f"{clock(seconds):>6}", *rest) for name, seconds, *rest in rows)
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    show.table(rows, columns, {"memory": "{:.0f} MiB"})


def _print_failure(result: Result, scale_name: str) -> None:
    place = shown(runs() / scale_name / "notebooks" / result.notebook)
    print(f"\n{result.notebook} failed:\n{result.problem}")
    print(f"  executed notebook: {place}.ipynb\n", flush=True)


def _write_reports(results: list[Result], scale_name: str, seed: int, whole: Watch) -> None:
    """`report.json` for programs and `junit.xml` for CI systems."""
    folder = runs() / scale_name
    report = {"scale": scale_name, "seed": seed, "version": __version__}
    report |= {"seconds": whole.seconds, "peak_mib": whole.peak_mib}
    report["notebooks"] = [asdict(one) for one in results]
    write_file(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    failures = sum(not one.ok for one in results)
    counts = {"tests": str(len(results)), "failures": str(failures)}
    suite = ElementTree.Element("testsuite", name=f"qwen-mini {scale_name}", **counts)
    for one in results:
        facts = {"name": one.notebook, "time": f"{one.seconds:.1f}"}
        case = ElementTree.SubElement(suite, "testcase", facts)
        if not one.ok:
            ElementTree.SubElement(case, "failure", message="failed").text = _xml_safe(one.problem)
    write_file(folder / "junit.xml", ElementTree.tostring(suite, encoding="unicode") + "\n")


def _xml_safe(text: str) -> str:
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd]", "?", text)
