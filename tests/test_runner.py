"""The runner executes tiny notebooks and believes none of them without looking."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from qwen_mini.course import cli, runner
from qwen_mini.course.nb import Notebook, select

PARAMETERS = 'scale = "laptop"\nseed = 0'


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """A project without chapters, so that editing one during the tests makes nothing stale."""
    monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))


def write(folder: Path, name: str, *cells: str, parameters: str | None = PARAMETERS) -> Notebook:
    """A notebook `name` whose first cells are the usual ones."""
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    if parameters is not None:
        nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    if any("course." in text for text in cells):
        cells = (f'from qwen_mini import course\nconfig = course.start("{name}", scale=scale, seed=seed)', *cells)
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
        options = {key: kwargs.pop(key) for key in ("timeout", "force") if key in kwargs}
        return only(runner.run([write(tmp_path, name, *cells, **kwargs)], "quick", **options))

    return run


def test_a_good_notebook_passes_and_is_then_up_to_date(tmp_path, runs_folder, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [
        "import os; x = bytearray(200_000_000)",
        "with course.artifacts.write_stage('quick', 'toy') as folder: (folder / 'a').write_text('1')",
        "course.claim('scale and threads arrive', config.name == 'quick' and os.environ['OMP_NUM_THREADS'] == '2')",
        "course.claim('runs beside its file', os.path.exists('01_toy.ipynb') and seed == 3)",
    ]
    nb = write(tmp_path, "01_toy", *cells)
    first = only(runner.run([nb], "quick", seed=3))
    assert (first.status, first.claims_held, first.claims) == ("passed", 2, 2)
    assert first.seconds > 0.5 and 200 < first.peak_mib < 2000
    assert only(runner.run([nb], "quick", seed=3)).status == "up to date"
    assert "[1/1] 01_toy: up to date" in capsys.readouterr().out

    state = json.loads((runs_folder / "quick" / "run_state.json").read_text())
    assert list(state["01_toy"]["wrote"]) == ["toy"]
    report = json.loads((runs_folder / "quick" / "report.json").read_text())
    assert report["notebooks"][0]["claims"] == 2
    suite = ElementTree.parse(runs_folder / "quick" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")

    (runs_folder / "quick" / "toy" / "manifest.json").unlink()
    assert not runner.State("quick").up_to_date(nb, state["01_toy"]["fingerprint"])
    assert not runner.State("quick").up_to_date(nb, runner.fingerprint_of(nb, "quick", seed=4))


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
    assert result.failed_claims == ["pigs fly"] and "claim fails · pigs fly" in capsys.readouterr().out


def test_a_slow_cell_and_a_dead_kernel_are_failures(bench):
    slow = bench("import time\ntime.sleep(60)", timeout=2)
    assert not slow.ok and "time.sleep(60)" in slow.problem and "imeout" in slow.problem
    dead = bench("import os\nos._exit(0)", name="02_toy")
    assert not dead.ok and "os._exit(0)" in dead.problem


def test_the_first_failure_stops_unless_told_otherwise(tmp_path, runs_folder):
    books = [write(tmp_path, "01_bad", "1 / 0"), write(tmp_path, "02_good")]
    assert [one.status for one in runner.run(books, "quick")] == ["failed"]
    assert [one.status for one in runner.run(books, "quick", keep_going=True)] == ["failed", "passed"]
    again = runner.run(books, "quick", keep_going=True)
    assert [one.status for one in again] == ["failed", "up to date"]


def test_a_new_upstream_stage_makes_readers_stale(tmp_path, runs_folder):
    use = "from qwen_mini.course import artifacts\n"
    make = use + "with artifacts.write_stage('quick', 'up') as folder: (folder / 'a').write_text('1')"
    books = [write(tmp_path, "01_up", make), write(tmp_path, "02_down", use + "artifacts.find('quick', 'up')")]
    runner.run(books, "quick")
    assert [one.status for one in runner.run(books, "quick")] == ["up to date"] * 2
    runner.run(books[:1], "quick", force=True)
    assert [one.status for one in runner.run(books, "quick")] == ["up to date", "passed"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, runs_folder):
    books = [write(tmp_path, "01_fast"), write(tmp_path, "02_slow", "import time\ntime.sleep(600)")]
    command = [sys.executable, "-u", "-m", "qwen_mini.course", "run", *(str(nb.path) for nb in books)]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background would inherit deaf ears
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    assert "01_fast" in running.stdout.readline()
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    assert "the same command goes on" in running.communicate(timeout=30)[1]
    assert running.returncode == 130
    books[1] = write(tmp_path, "02_slow")
    assert [one.status for one in runner.run(books, "quick")] == ["up to date", "passed"]


def test_the_command_line_returns_codes_and_plain_sentences(tmp_path, runs_folder, capsys):
    good, bad = write(tmp_path, "01_good"), write(tmp_path, "02_bad", "1 / 0")
    assert cli.main(["run", str(good.path), "--scale", "quick"]) == 0
    assert cli.main(["run", str(bad.path)]) == 1
    capsys.readouterr()
    assert cli.main(["run", str(good.path), "--scale", "huge"]) == 2
    assert cli.main(["run", "no_such_notebook"]) == 2
    assert cli.main(["run", str(tmp_path / "99.ipynb")]) == 2
    assert cli.main(["export", "evaluation", str(tmp_path / "out"), "--scale", "gpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert "quick, laptop, gpu, cluster" in lines[0] and "qwen-mini run evaluation --scale gpu" in lines[3]


def test_outputs_of_a_run_during_which_its_sources_changed_are_not_written(tmp_path, runs_folder, capsys):
    sources = tmp_path / "data" / "sources.toml"
    sources.parent.mkdir()
    cell = f"with open({str(sources)!r}, 'a') as file: file.write('# {{}}\\n')\nprint('done')"
    books = [write(tmp_path, "01_edits", cell.format("changed")), write(tmp_path, "02_good", "print('done')")]
    assert cli.main(["outputs", *(str(book.path) for book in books), "--scale", "quick"]) == 1
    seen = capsys.readouterr()
    assert "01_edits: outputs left as they were" in seen.err and "02_good" not in seen.err
    written = [any(c.get("outputs") for c in nbformat.read(book.path, 4).cells) for book in books]
    assert "02_good: outputs written" in seen.out and written == [False, True]


def test_notebooks_are_found_by_name_number_and_subject(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("07_corpus", "08_pretraining"):
        write(tmp_path / "notebooks", name)
    for word in ("08_pretraining", "08", "pretraining"):
        assert [nb.name for nb in select(tmp_path, [word])] == ["08_pretraining"]
    assert [nb.name for nb in select(tmp_path, [])] == ["07_corpus", "08_pretraining"]


def test_module_entry_point_equals_the_command():
    done = subprocess.run([sys.executable, "-m", "qwen_mini.course", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "qwen-mini" in done.stdout
