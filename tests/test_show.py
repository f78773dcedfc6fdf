"""Sentences and tables: right digits, stable bytes, and errors that name what is missing."""

import numpy as np
import pytest
import torch

from qwen_mini.course import CourseError, show
from qwen_mini.course.show import say, table


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would be given: a list of bundles from type to text."""
    import IPython.display

    bundles = []
    monkeypatch.setattr(show, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_a_sentence_is_markdown_in_a_notebook_and_text_in_a_terminal(capsys, monkeypatch, shown):
    say(
        "GRPO gains **{gain:.1f} points** in {steps:,} steps.",
        gain=torch.tensor(13.44),
        steps=np.int64(1200),
    )
    text = "GRPO gains **13.4 points** in 1,200 steps."
    assert shown == [{"text/plain": text, "text/markdown": text}]
    monkeypatch.setattr(show, "in_notebook", lambda: False)
    say("{a} of {b[0]:>{width}}", a=1, b=[2], width=3)
    assert capsys.readouterr().out == "1 of   2\n"


@pytest.mark.parametrize(
    ("template", "numbers", "named"),
    [
        ("{gain:.1f} points", {}, "gain"),
        ("{gain.real:.1f}", {"gian": 1.0}, "gain"),
        ("{gain:.1f} points", {"gain": 1.0, "loss": 2.0}, "loss"),
        ("{gain:.1f} points", {"gain": None}, "gain"),
        ("{gain:.1q} points", {"gain": 1.0}, "gain"),
        ("{} points", {"gain": 1.0}, "name="),
        ("$x_{1$ is {gain}", {"gain": 1.0}, "brace"),
    ],
)
def test_a_sentence_that_cannot_be_said_names_its_number(template, numbers, named):
    with pytest.raises(CourseError, match=named):
        say(template, **numbers)


def test_a_table_is_aligned_text_in_a_terminal(capsys):
    rows = {
        "SFT": {"pass": (53.36, 0.81), "time": 3.0, "who": "us"},
        "DPO <b>": {"pass": (59.9, 0.8), "time": None, "steps": 1200, "who": "你们"},
    }
    columns = {"": "run", "who": "by", "pass": "passed, %", "time": "time", "steps": "steps"}
    table(rows, columns, {"pass": ".1f", "time": "{:.1f} s"})
    assert capsys.readouterr().out.splitlines() == [
        "run      by     passed, %   time  steps",
        "-------  ----  ----------  -----  -----",
        "SFT      us    53.4 ± 0.8  3.0 s",
        "DPO <b>  你们  59.9 ± 0.8         1,200",
    ]


def test_a_table_is_plain_html_in_a_notebook(shown):
    for _ in range(2):
        table([{"piece": "<|im_start|>\n&", "id": 7}], ["piece", "id"])
    first, second = shown
    assert first == second
    left, right = (f'align="{side}" style="text-align: {side}"' for side in ("left", "right"))
    assert first["text/html"].splitlines() == [
        "<table>",
        "<thead>",
        f"<tr><th {left}>piece</th><th {right}>id</th></tr>",
        "</thead>",
        "<tbody>",
        f"<tr><td {left}>&lt;|im_start|&gt; &amp;</td><td {right}>7</td></tr>",
        "</tbody>",
        "</table>",
    ]
    assert first["text/plain"].splitlines()[0] == "piece           id"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.1234, None, "0.123"),
        (12345.6, None, "12,346"),
        (12345, None, "12,345"),
        (2024, "d", "2024"),
        (0.1234, ".1%", "12.3%"),
        ((0.5, 0.04), ".0%", "50 ± 4%"),
        ((1.5, 0.25), "{:.2f} bits", "1.50 ± 0.25 bits"),
        ((0.125, 0.04), "+.1%", "+12.5 ± 4.0%"),  # an error has no sign
        ((0.5, 0.4, 0.625), ".0%", "50% [40% 62%]"),
        (torch.tensor(1.5), ".1f", "1.5"),
        (np.float32(0.5), None, "0.5"),
        (True, None, "yes"),
        (None, ".1f", ""),
        ("not published", ".1f", "not published"),
    ],
)
def test_cells(capsys, value, form, text):
    table([{"x": value}], formats={"x": form} if form else None)
    lines = capsys.readouterr().out.split("\n")
    assert lines[2].strip() == text


def test_one_format_for_all_and_headings_where_they_are_wanted(capsys):
    rows = {"a": {"n": 1200, "share": 0.5, "who": "us"}, "b": {"n": 7, "share": (0.25, 0.125, 0.5)}}
    table(rows, [("", "run"), "n", ("share", "right"), "who"], ".0%")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "a    1,200            50%  us",
        "b        7  25% [12% 50%]",
    ]


def test_rows_may_miss_cells_and_columns_come_as_they_occur(capsys):
    table([{"a": "one"}, {"b": 2, "a": "two"}])
    assert capsys.readouterr().out.splitlines() == ["a    b", "---  -", "one", "two  2"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([{"a": 1}], ["a", "b"]), "'b'"),
        (([{"a": 1}], None, {"b": ".1f"}), "'b'"),
        (([{"a": 1.0}], None, {"a": "{:.1f} of {:.1f}"}), "braces"),
        (([{"a": [1.0]}], None, {"a": ".1f"}), "'a'"),
        (([{"a": (1.0, 2.0, 3.0, 4.0)}],), "'a'"),
        (({"a": 1},), "dict of dicts"),
        (([["a", 1]],), "list of dicts"),
    ],
)
def test_a_table_that_cannot_be_drawn_says_why(arguments, named):
    with pytest.raises(CourseError, match=named):
        table(*arguments)


def test_a_kernel_is_a_notebook_and_ipython_in_a_terminal_is_none(monkeypatch):
    import IPython

    for kernel, expected in [(object(), True), (None, False)]:
        shell = type("Shell", (), {"kernel": kernel})()
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        assert show.in_notebook() is expected
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert show.in_notebook() is False
