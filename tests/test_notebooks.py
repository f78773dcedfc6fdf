"""Every notebook runs at quick scale and shows what it claims; skip with `pytest -m "not notebooks"`."""

import pytest

from qwen_mini.course import home, runner
from qwen_mini.course.nb import notebooks

BOOKS = notebooks(home())

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run of the whole course, from nothing, into a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(tmp_path_factory.mktemp("course")))
        return {result.notebook: result for result in runner.run(BOOKS, "quick", keep_going=True, timeout=600)}


@pytest.mark.parametrize("name", [nb.name for nb in BOOKS])
def test_notebook(results, name):
    result = results[name]
    assert result.ok, f"\n{result.problem}"
    assert result.claims_held == result.claims


def test_the_course_fits_into_memory(results):
    """No notebook above the 4 GiB that the quick scale promises."""
    assert max(result.peak_mib for result in results.values()) < 4096
