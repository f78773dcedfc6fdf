"""Every notebook runs at quick scale and shows what it claims; skip with `pytest -m "not notebooks"`."""

import json
import os

import pytest
from tiny import forks

from qwen_mini.course import home, load_scale, runner
from qwen_mini.course.nb import notebooks

BOOKS = notebooks(home())
FORKING = {nb.name for nb in BOOKS if os.name == "nt" and forks(nb)}

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run of the whole course, from nothing, into a folder of its own."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(folder))
        runner.run(
            [nb for nb in BOOKS if nb.name not in FORKING], "quick", keep_going=True, timeout=600
        )
    return json.loads((folder / "quick" / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [nb.name for nb in BOOKS])
def test_notebook(report, name):
    if name in FORKING:
        pytest.skip("the sandbox needs a system that can fork: on Windows use WSL")
    (result,) = [one for one in report["notebooks"] if one["notebook"] == name]
    assert result["status"] == "passed", f"\n{result['problem']}"
    assert result["claims_held"] == result["claims"]


def test_the_course_fits_into_memory(report):
    """All notebooks that run at the same time take no more than the scale promises."""
    assert report["peak_mib"] < load_scale("quick").run.memory_gib * 1024
