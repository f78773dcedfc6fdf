"""The map of the report: true rows become a page, wrong ones are named."""

import pytest

from authoring import report_map

ROW = '[[line]]\nreport = "§2"\nsays = "A layer"\ncode = "{code}"\ntest = "{test}"\n'


@pytest.fixture
def project(tmp_path):
    """One chapter with a function and a class, one test file, and rows to be written."""
    for folder in ("docs", "notebooks", "qwen_mini", "tests"):
        (tmp_path / folder).mkdir()
    cell = '{"cell_type": "code", "metadata": {}, "outputs": [], "source": "#| default_exp layers"}'
    (tmp_path / "notebooks" / "02_layers.ipynb").write_text(
        f'{{"cells": [{cell}], "metadata": {{}}}}'
    )
    module = "def norm(x):\n    ...\n\nclass Layer:\n    def forward(self):\n        ...\n"
    (tmp_path / "qwen_mini" / "layers.py").write_text(module)
    (tmp_path / "tests" / "test_layers.py").write_text(
        "def test_norm():\n    assert norm(1) == Layer().forward()\n"
    )
    return tmp_path


def write(project, code="layers.norm", test="test_layers.test_norm"):
    (project / "docs" / "map.toml").write_text(ROW.format(code=code, test=test), encoding="utf-8")


@pytest.mark.parametrize("code", ["layers.norm", "layers.Layer.forward"])
def test_true_rows_become_a_page_that_must_be_current(project, code):
    write(project, code)
    (stale,) = report_map.map_is_current(project)
    assert "authoring.report_map" in stale
    (project / "docs" / "map.md").write_text(report_map.page(project), encoding="utf-8")
    assert report_map.map_is_current(project) == []
    assert "[02_layers](../notebooks/02_layers.ipynb)" in report_map.page(project)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"code": "layers.softmax"}, "no notebook exports layers.softmax"),
        ({"code": "layers.Layer.backward"}, "no notebook exports"),
        ({"code": "course.start"}, "no notebook exports course.start"),
        ({"test": "test_layers.test_softmax"}, "there is no test"),
        ({"test": "test_model.test_norm"}, "there is no test"),
        ({"code": "02_layers"}, "02_layers exists"),
    ],
)
def test_wrong_rows_are_named(project, row, words):
    write(project, **row)
    (problem,) = report_map.map_is_current(project)
    assert words in problem


def test_hand_written_code_names_its_notebook(project):
    (project / "qwen_mini" / "course").mkdir()
    (project / "qwen_mini" / "course" / "report.py").write_text("def norm():\n    ...\n")
    cells = '{"cells": [], "metadata": {}}'
    (project / "notebooks" / "23_mini_report.ipynb").write_text(cells)
    named = 'test_layers.test_norm"\nnotebook = "'
    write(project, "course/report.norm", f"{named}23_mini_report")
    assert report_map.problems(project) == []
    assert "[23_mini_report](../notebooks/23_mini_report.ipynb)" in report_map.page(project)
    write(project, "course/report.norm", f"{named}24_none")
    assert "no notebook" in report_map.problems(project)[0]


def test_the_file_of_a_test_must_use_the_code(project):
    (project / "tests" / "test_layers.py").write_text("def test_norm():\n    assert True\n")
    write(project)
    (problem,) = report_map.map_is_current(project)
    assert "does not use norm" in problem


def test_what_is_to_come_has_no_test(project):
    write(project, "06_mixture_of_experts")
    assert report_map.problems(project) == []
    assert "*to come*" in report_map.page(project)
