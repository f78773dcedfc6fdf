"""The runner executes tiny notebooks and believes none of them without looking."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest

from qwen_mini.course import CourseError, artifacts, claims, cli, hardware, runner
from qwen_mini.course.nb import Notebook, select

PARAMETERS = 'scale = "laptop"\nseed = 0'


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """A project without chapters."""
    monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))


def write(folder: Path, name: str, *cells: str, parameters: str | None = PARAMETERS) -> Notebook:
    """A notebook `name` whose first cells are the usual ones."""
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    if parameters is not None:
        nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    if any("course." in text for text in cells):
        cells = (
            f'from qwen_mini import course\nconfig = course.start("{name}", scale=scale, seed=seed)',
            *cells,
        )
    nb.cells += [nbformat.v4.new_code_cell(text) for text in cells]
    path = folder / f"{name}.ipynb"
    nbformat.write(nb, path)
    return Notebook(path)


def only(results):
    assert len(results) == 1
    return results[0]


@pytest.fixture
def bench(tmp_path, runs_folder):
    """Write one notebook and run it."""

    def run(*cells, name="01_toy", **kwargs):
        options = {key: kwargs.pop(key) for key in ("timeout",) if key in kwargs}
        return only(runner.run([write(tmp_path, name, *cells, **kwargs)], "quick", **options))

    return run


def test_a_good_notebook_passes_and_is_executed_again(tmp_path, runs_folder, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [
        "import os; x = bytearray(200_000_000)",
        "threads = os.environ['OMP_NUM_THREADS']",
        f"course.claim('scale and threads arrive', config.name == 'quick' and threads == '{min(2, hardware.cores())}')",
        "course.claim('runs beside its file', os.path.exists('01_toy.ipynb') and seed == 3)",
    ]
    nb = write(tmp_path, "01_toy", *cells)
    first = only(runner.run([nb], "quick", seed=3))
    assert (first.status, first.claims_held, first.claims) == ("passed", 2, 2)
    assert first.seconds > 0.5 and 200 < first.peak_mib < 2000
    assert "last time" not in capsys.readouterr().out
    assert runner.last_seconds("quick") == {"01_toy": round(first.seconds, 1)}
    again = only(runner.run([nb], "quick", seed=3))
    assert (again.status, again.claims) == ("passed", 2)
    assert f"last time {runner.clock(round(first.seconds, 1))}" in capsys.readouterr().out

    report = json.loads((runs_folder / "quick" / "report.json").read_text())
    assert report["notebooks"][0]["claims"] == 2
    suite = ElementTree.parse(runs_folder / "quick" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"01_toy": {"seconds": 1.0}}', '{"seconds": {"01_toy": null}}']
)
def test_expected_times_of_another_version_or_cut_are_none(runs_folder, content):
    artifacts.write_file(runs_folder / "quick" / "run_state.json", content)
    assert runner.last_seconds("quick") == {}
    runner._note_seconds(runner.Result("01_toy", "passed", 2.04), "quick")
    assert runner.last_seconds("quick") == {"01_toy": 2.0}


def test_an_exception_shows_cell_error_and_path(bench, capsys):
    result = bench("marker = 1\nraise ValueError('the very reason')")
    assert not result.ok
    out = capsys.readouterr().out
    assert "| marker = 1" in out and "ValueError: the very reason" in out
    assert "runs/quick/notebooks/01_toy.ipynb" in out.replace("\\", "/")


def test_a_silent_exit_is_a_failure(bench):
    result = bench("import sys\nsys.exit(0)", "never = 'reached'")
    assert not result.ok and "SystemExit" in result.problem


def test_an_exception_inside_a_widget_callback_is_a_failure(bench):
    result = bench("from ipywidgets import interact\ninteract(lambda n: 1 / n, n=[0, 1]);")
    assert not result.ok and "ZeroDivisionError" in result.problem


def test_an_exception_in_a_button_handler_is_a_failure(bench):
    code = "from ipywidgets import Button\nbutton = Button()\nbutton.on_click(lambda _: 1 / 0)\nbutton.click()"
    result = bench(code)
    assert not result.ok and "ZeroDivisionError" in result.problem


def test_a_traceback_on_standard_error_is_a_failure(bench):
    code = "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()"
    result = bench(code)
    assert not result.ok and "ZeroDivisionError" in result.problem


def test_a_parameter_the_notebook_does_not_know_is_a_failure(bench):
    result = bench(parameters='scale = "laptop"')
    assert not result.ok and "does not know seed" in result.problem
    result = bench(parameters=None, name="02_toy")
    assert not result.ok and "parameters" in result.problem


def test_a_claim_that_does_not_hold_is_a_failure(bench, capsys):
    result = bench("course.claim('pigs fly', False)", "course.claim('two is even', 2 % 2 == 0)")
    assert not result.ok and (result.claims_held, result.claims) == (1, 2)
    assert (
        result.failed_claims == ["pigs fly"] and "claim fails · pigs fly" in capsys.readouterr().out
    )


def test_a_slow_cell_and_a_dead_kernel_are_failures(bench):
    slow = bench("import time\ntime.sleep(60)", timeout=2)
    assert not slow.ok and "time.sleep(60)" in slow.problem and "imeout" in slow.problem
    dead = bench("import os\nos._exit(0)", name="02_toy")
    assert not dead.ok and "os._exit(0)" in dead.problem


def test_the_first_failure_stops_unless_told_otherwise(tmp_path, runs_folder):
    bad, slow = (
        write(tmp_path, "01_bad", "1 / 0"),
        write(tmp_path, "02_slow", "import time\ntime.sleep(600)"),
    )
    begun = time.monotonic()
    assert [one.status for one in runner.run([bad, slow], "quick")] == ["failed"]
    assert time.monotonic() - begun < 60 and eventually(lambda: not kernels_of(str(runs_folder)))
    books = [bad, write(tmp_path, "03_good")]
    assert [one.status for one in runner.run(books, "quick", keep_going=True)] == [
        "failed",
        "passed",
    ]
    assert list(runner.last_seconds("quick")) == ["03_good"]


@pytest.mark.skipif(
    sys.platform != "linux" or hardware.cores() < 2, reason="one after the other there"
)
def test_two_notebooks_run_at_a_time_with_a_thread_each(tmp_path, runs_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    meet = """
        import os, pathlib, time
        here = pathlib.Path(os.environ["QWEN_MINI_RUNS"])
        (here / "{own}").touch()
        until = time.monotonic() + 60
        while not (here / "{other}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        course.claim("the other one runs at the same time", (here / "{other}").exists())
        course.claim("one thread", os.environ["OMP_NUM_THREADS"] == "1")"""
    places = [("01_a", "02_b"), ("02_b", "01_a")]
    books = [
        write(tmp_path, own, textwrap.dedent(meet.format(own=own, other=other)))
        for own, other in places
    ]
    results = runner.run(books, "quick")
    assert [(one.notebook, one.status, one.claims) for one in results] == [
        ("01_a", "passed", 2),
        ("02_b", "passed", 2),
    ]
    report = json.loads((runs_folder / "quick" / "report.json").read_text())
    assert report["peak_mib"] > 1.5 * max(one.peak_mib for one in results)
    assert report["seconds"] < sum(one.seconds for one in results)


@pytest.mark.skipif(
    sys.platform != "linux" or hardware.cores() < 2, reason="one after the other there"
)
def test_a_notebook_whose_process_is_killed_has_failed(tmp_path, runs_folder, monkeypatch):
    """And the others go on; the reports of an earlier run are gone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    artifacts.write_file(runs_folder / "quick" / "report.json", "{}")
    killing = "import os, pathlib, signal\n"
    killing += f"assert not pathlib.Path({str(runs_folder)!r}, 'quick', 'report.json').exists()\n"
    killing += "os.kill(os.getppid(), signal.SIGKILL)"
    books = [write(tmp_path, "01_killer", killing), write(tmp_path, "02_good")]
    killed, good = runner.run(books, "quick", keep_going=True)
    assert (killed.status, good.status) == (
        "failed",
        "passed",
    ) and "memory was short" in killed.problem
    report = json.loads((runs_folder / "quick" / "report.json").read_text())
    assert [one["status"] for one in report["notebooks"]] == ["failed", "passed"]


def test_two_notebooks_of_one_name_are_refused(tmp_path):
    for who in ("alice", "bob"):
        (tmp_path / who).mkdir()
        write(tmp_path / who, "03_attention")
    paths = [str(tmp_path / who / "03_attention.ipynb") for who in ("alice", "bob")]
    with pytest.raises(CourseError, match="have the same name: run one after the other"):
        select(tmp_path, paths)
    assert len(select(tmp_path, [paths[0], paths[0]])) == 1


def test_a_wish_for_records_alone_or_none_reaches_the_kernel(tmp_path, runs_folder, monkeypatch):
    monkeypatch.setenv("FRESH", "1")
    wish = "assert (os.environ.get('QWEN_MINI_RECORDS'), os.environ.get('FRESH')) == ('only', None)"
    nb = write(tmp_path, "01_toy", f"import os\n{wish}")
    assert only(runner.run([nb], "quick", records_only=True)).ok
    with pytest.raises(CourseError, match="one of the two"):
        runner.run([nb], "quick", records_only=True, fresh=True)


def processes_of(word: str) -> list[psutil.Process]:
    """Running processes whose environment holds `word`: a run, its kernel, and the kernel's forks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and word in process.environ().get(
                "QWEN_MINI_RUNS", ""
            ):
                found.append(process)
    return found


def kernels_of(word: str) -> list[psutil.Process]:
    """Kernels alone: this process has the same environment."""
    return [process for process in processes_of(word) if "ipykernel_launcher" in process.cmdline()]


def eventually(look, seconds=60):
    until = time.monotonic() + seconds
    while not look() and time.monotonic() < until:
        time.sleep(0.1)
    return look()


@pytest.fixture
def long_run(tmp_path, runs_folder):
    """A run in the middle of two forks that compute for ever; whatever is left of it ends with the test."""
    code = f"""
        import pathlib
        def call(name):
            pathlib.Path({str(tmp_path)!r}, name).touch()
            while True: pass
        course.side_by_side({{name: lambda name=name: call(name) for name in "ab"}})"""
    books = [write(tmp_path, "01_fast"), write(tmp_path, "02_forks", textwrap.dedent(code))]
    command = [
        sys.executable,
        "-u",
        "-m",
        "qwen_mini.course",
        "run",
        *(str(nb.path) for nb in books),
    ]

    def listen():  # a job in the background would inherit deaf ears
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    yield running
    for process in [running, *processes_of(str(runs_folder))]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    running.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="forks compute on Linux only")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_whatever_ends_a_run_ends_its_kernel_and_forks(tmp_path, runs_folder, long_run, name):
    assert "01_fast" in long_run.stdout.readline()
    assert eventually((tmp_path / "a").exists)
    assert len(processes_of(str(runs_folder))) >= 4
    with pytest.raises(
        CourseError, match=rf"^scale quick is being run by process {long_run.pid} on .* since "
    ):
        runner.run([write(tmp_path, "03_other")], "quick")
    long_run.send_signal(getattr(signal, name))
    error = long_run.communicate(timeout=60)[1]
    assert eventually(lambda: not processes_of(str(runs_folder)))
    if name != "SIGKILL":
        assert long_run.returncode == 130 and "the same command finds what is finished" in error
    assert only(
        runner.run([write(tmp_path, "03_other")], "quick")
    ).ok  # the lock went with the process


def test_two_sessions_of_one_notebook_do_not_mix_their_claims(tmp_path, runs_folder):
    code = """
        import sys
        from qwen_mini import course
        from qwen_mini.course import claims
        claims.open_notebook("01_toy", "quick", int(sys.argv[1]))
        for number in range(50):
            course.claim(f"number {number}", number != 13)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen([*command, str(seed)], stdout=subprocess.DEVNULL) for seed in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    records = claims.read_claims("quick", "01_toy")
    assert [record["claim"] for record in records] == [f"number {number}" for number in range(50)]
    assert len({record["seed"] for record in records}) == 1


def test_the_command_line_returns_codes_and_plain_sentences(tmp_path, runs_folder, capsys):
    good, bad = write(tmp_path, "01_good"), write(tmp_path, "02_bad", "1 / 0")
    assert cli.main(["run", str(good.path), "--scale", "quick"]) == 0
    assert cli.main(["run", str(bad.path)]) == 1
    capsys.readouterr()
    assert cli.main(["run", str(good.path), "--scale", "huge"]) == 2
    assert cli.main(["run", "no_such_notebook"]) == 2
    assert cli.main(["run", str(tmp_path / "99.ipynb")]) == 2
    assert cli.main(["export", "pairs", str(tmp_path / "out"), "--scale", "gpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert (
        "quick, laptop, gpu, cluster" in lines[0]
        and "qwen-mini train pairs --scale gpu" in lines[3]
    )


def test_notebooks_are_found_by_name_number_and_subject(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("07_corpus", "09_pretraining"):
        write(tmp_path / "notebooks", name)
    for word in ("09_pretraining", "09", "pretraining"):
        assert [nb.name for nb in select(tmp_path, [word])] == ["09_pretraining"]
    assert [nb.name for nb in select(tmp_path, [])] == ["07_corpus", "09_pretraining"]


def test_module_entry_point_equals_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "qwen_mini.course", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "qwen-mini" in done.stdout
