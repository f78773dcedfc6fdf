"""The closing report: every number has an origin, a missing record is a gap, verdicts follow their rule."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny import exercises, passes, refuses

from qwen_mini import course
from qwen_mini.course import cli, records, report, report_files
from qwen_mini.course.nb import Notebook
from qwen_mini.course.paths import home

SHIPPED = home() / "data" / "records" / "laptop"
PLAN = """
title = "A plan for Qwen2.5"
summary = ["The rule: {= 95 % ; ours}."]
legend = "all"
[[section]]
place = "§3"
title = "Training"
[[section.part]]
text = "The loss is {03_a/loss > last ; .2f}, there {= 1.5 ; §3}."
[[section.part]]
place = "Table 9"
title = "losses"
heads = ["", "=7B", "here"]
rows = [["loss", "=1.5", "{03_a/loss > last ; .2f}"], ["of runs", "", "{03_a/run * > right ; .0%}"]]
[[claim]]
name = "runs over start"
section = "§3"
place = "§3.1"
says = "training helps"
here = "right: runs, less the start"
measured = "03_a/run * > right - 03_a/start > right"
expect = "more"
"""


def shelf(**changes):
    """Five results of one notebook; `changes` replaces some, None removes."""
    results = {
        "03_a/loss": {"last": 2.25, "all": [3.0, 2.25]},
        "03_a/start": {"right": [0, 0, 1, 0] * 5},
    }
    results |= {f"03_a/run {s}": {"right": [1] * 19 + [1 - s]} for s in (0, 1)}
    results |= {f"03_a/{name}": value for name, value in changes.items()}
    return report.Shelf("laptop", {n: v for n, v in results.items() if v is not None}, {})


def written(tmp_path, plan=PLAN, **changes):
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    return report.write_up(shelf(**changes), tmp_path / "plan.toml", {"commit": "12ab"})


def loose_digits(text, origins):
    """Groups of digits outside every slot."""
    inside = np.zeros(len(text), bool)
    for slot in origins:
        inside[slot["begin"] : slot["end"]] = True
    return [m.group() for m in re.finditer(r"\d+", text) if not inside[m.start() : m.end()].all()]


@pytest.fixture(scope="module")
def shipped():
    return report.open_shelf("laptop", SHIPPED)


@pytest.fixture(scope="module")
def whole(shipped):
    return report.write_up(shipped, facts=report_files.run_facts("laptop"))


# --- every number has an origin -------------------------------------------------------------------------------------


def test_every_group_of_digits_of_the_report_lies_in_a_slot_with_an_origin(whole, shipped):
    text, origins = report_files.markdown(whole)
    assert len(text) > 10_000 and loose_digits(text, origins) == []
    kinds = ("record ", "original, ", "provenance of ", "place in the original", "a name", "a gap")
    kinds += ("count of this report", "this run", "the plan")
    assert {o["from"] for o in origins if not o["from"].startswith(kinds)} == set()
    used = {
        n for o in origins if o["from"].startswith("record ") for n in o["from"][7:].split("; ")
    }
    assert used <= set(shipped.results) and len(used) > 60
    for one in origins:
        assert text[one["begin"] : one["end"]].strip() and report.CLOSE not in text


def test_the_words_of_the_plan_hold_no_digit():
    """The slots of the shipped plan taken out, only names with a letter in front have digits."""
    text = re.sub(r'(?m)^#.*$|\{[^{}]+\}|"=[^"]*"', "", report.PLAN.read_text(encoding="utf-8"))
    said = re.findall(r'(?m)^(?:text|title|says|here) = "(.*)"$', text)
    assert len(said) > 40
    assert [s for s in said if re.search(r"\d", report.NAME.sub("", s))] == []


def test_a_digit_that_is_typed_is_refused(tmp_path):
    typed = PLAN.replace("The loss is", "The loss of 3 runs is")
    with pytest.raises(course.CourseError, match="a number outside a slot: '3'"):
        written(tmp_path, typed)
    with pytest.raises(course.CourseError, match="'88'"):
        written(tmp_path, PLAN.replace('title = "losses"', 'title = "losses 88"'))


def test_numbers_come_from_the_records(tmp_path):
    text, origins = report_files.markdown(written(tmp_path))
    assert "The loss is 2.25, there 1.5." in text and "| of runs |  | 98% |" in text
    at = text.index("2.25")
    assert {"begin": at, "end": at + 4, "from": "record 03_a/loss"} in origins
    assert "The loss is 1.75" in report_files.markdown(written(tmp_path, loss={"last": 1.75}))[0]
    assert "commit: 12ab" in text and loose_digits(text, origins) == []


# --- gaps -----------------------------------------------------------------------------------------------------------


def test_a_missing_record_is_a_visible_gap(tmp_path):
    document = written(tmp_path, loss=None)
    text, _ = report_files.markdown(document)
    gap = "not measured: record `03_a/loss`; compute it with `qwen-mini run 03_a --scale laptop`"
    assert document.gaps == [gap] and f"> {gap}" in text and "2.25" not in text
    assert "| loss | 1.5 | not measured |" in text and "98%" in text
    assert 'class="gap"' in report_files.page(document)


def test_a_record_without_the_entry_is_a_gap_too(tmp_path):
    assert "holds no `last`" in written(tmp_path, loss={"end": 1}).gaps[0]
    assert "holds no `last`" in written(tmp_path, loss=[1, 2]).gaps[0]


def test_each_record_that_the_report_shows_is_missed_when_it_is_gone(whole, shipped):
    """Without it the text is another; one of several runs is missed in the numbers, any other as a gap."""
    text = report_files.markdown(report.write_up(shipped))[0]
    for name in sorted(whole.ledger.names):
        rest = {n: r for n, r in shipped.results.items() if n != name}
        without = report.write_up(report.Shelf("laptop", rest, shipped.records))
        assert report_files.markdown(without)[0] != text, name


def test_a_deleted_file_is_a_gap_and_a_damaged_one_is_refused(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "records")
    (tmp_path / "records" / "18_dpo" / "final_sft.json").unlink()
    document = report.write_up(report.open_shelf("laptop", tmp_path / "records"))
    assert any(
        "`18_dpo/final/sft`" in gap and "qwen-mini run 18_dpo" in gap for gap in document.gaps
    )
    (tmp_path / "records" / "18_dpo" / "sft.json").write_text("{}", encoding="utf-8")
    with pytest.raises(records.BadRecord, match="not a whole record"):
        report.open_shelf("laptop", tmp_path / "records")


def test_own_runs_come_first_and_old_versions_are_left_out(runs_folder):
    path = next((SHIPPED / "18_dpo").glob("final_sft.json"))
    record = records.read(path)
    own = runs_folder / "laptop" / "records" / "18_dpo" / "final_sft.json"
    records.write(own, records.sealed(record | {"result": {"correct": [[0]]}}))
    assert report.open_shelf("laptop").results["18_dpo/final/sft"] == {"correct": [[0]]}
    old = record["versions"] | {"model": 10**6}
    records.write(own, records.sealed(record | {"versions": old, "result": {}}))
    assert report.open_shelf("laptop").results["18_dpo/final/sft"] == record["result"]


# --- selectors ------------------------------------------------------------------------------------------------------


def test_selectors():
    take = shelf(table={"a": [1, 2], "b": [3], "rows": [[1, 2], [3, 4], [5, 6]]}).take
    assert {run: x.tolist() for run, x in take("03_a/run * > right").items()}.keys() == {"0", "1"}
    assert take("03_a/table > a|b")[""].tolist() == [1, 2, 3]
    assert take("03_a/table > rows > 0|2")[""].tolist() == [[1, 2], [5, 6]]
    assert take("03_a/table > #2")[""].tolist() == [3]
    assert take("03_a/table > rows > 2/3")[""].tolist() == [[3, 4]]
    assert take("03_a/table > rows > : > 1")[""].tolist() == [2, 4, 6]
    assert take("03_a/loss > last")[""] == 2.25
    for wrong in ("03_a/table > c", "03_a/table > a|c", "03_a/table > rows > 7", "03_a/none > x"):
        with pytest.raises(report.Gap, match="not measured"):
            take(wrong)


def test_a_star_stands_for_anything_and_other_letters_for_themselves():
    found = report.Shelf(
        "laptop", {"06_a/x: e 1": 1.0, "06_a/x: e+ 1": 3.0, "06_a/x: d 1": 2.0}, {}
    )
    assert found.take("06_a/x: e *") == {"1": 1.0} and found.take("06_a/x: e+ *") == {"1": 3.0}


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_an_interval_of_items_and_runs_is_the_formula():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50))
    parts = values.mean(0).var(ddof=1) / 50, values.mean(1).var(ddof=1) * (1 / 3 + 1)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 49 + parts[1] ** 2 / 2)
    found = report.summary(list(values), alone=True)
    quantile = report.T[max(df for df in report.T if df <= freedom)]
    assert abs(found.value - values.mean()) < 1e-12
    assert abs(found.high - found.low - 2 * quantile * sum(parts) ** 0.5) < 1e-12
    assert (found.items, found.runs) == (50, 3)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hit = 0
    for _ in range(400):
        found = report.summary(list(rng.normal(size=(3, 1)) + rng.normal(size=(3, 20)) * 0.5))
        hit += found.low < 0 < found.high
    assert hit / 400 > 0.93


def test_a_few_equal_answers_prove_nothing():
    three = report.Shelf("laptop", {"03_a/a": [1, 1, 1], "03_a/b": [0, 0, 0]}, {})
    assert report.judge(report.estimate(three, "03_a/a - 03_a/b"), "more") == "does not show"
    many = report.Shelf("laptop", {"03_a/a": [1] * 20, "03_a/b": [0] * 20}, {})
    found = report.estimate(many, "03_a/a - 03_a/b")
    assert found.value == 1 and 0 < found.low < found.high <= 1


def test_without_a_spread_there_is_no_interval():
    same = report.Shelf(
        "laptop", {"03_a/a 1": 0.5, "03_a/a 2": 0.5, "03_a/b 1": 0.25, "03_a/b 2": 0.25}, {}
    )
    found = report.estimate(same, "03_a/a * - 03_a/b *")
    assert (found.value, found.low, found.runs) == (0.25, None, 2)
    assert report.judge(found, "more") == "no interval"


def test_runs_are_paired_by_what_the_star_stands_for():
    results = {"03_a/a 1": 1.0, "03_a/a 2": 2.0, "03_a/a 3": 9.0, "03_a/b 1": 0.9, "03_a/b 2": 1.8}
    found = report.estimate(report.Shelf("laptop", results, {}), "03_a/a * - 03_a/b *")
    assert abs(found.value - 0.15) < 1e-12 and found.runs == 2
    results = {"03_a/a 1": 1.0, "03_a/a 2": 2.0, "03_a/b 3": 0.9, "03_a/b 4": 1.8}
    with pytest.raises(report.Gap, match="no run stands on all sides"):
        report.estimate(report.Shelf("laptop", results, {}), "03_a/a * - 03_a/b *")


def test_sums_of_differences_and_ratios():
    results = {
        "03_a/a": [3.0, 5.0],
        "03_a/b": [1.0, 2.0],
        "03_a/c": [0.5, 0.5],
        "03_a/d": [0.0, 1.0],
    }
    found = report.estimate(
        report.Shelf("laptop", results, {}), "03_a/a - 03_a/b - 03_a/c plus 03_a/d"
    )
    assert found.value == 2.5 and found.items == 2
    ratio = report.estimate(report.Shelf("laptop", results, {}), "03_a/a / 03_a/b")
    assert abs(ratio.value - 4 / 1.5) < 1e-12 and report.judge(ratio, "more") == "no interval"


@pytest.mark.parametrize(
    "low, high, expect, margin, verdict",
    [
        (0.1, 0.3, "more", 0, "agrees"),
        (0.1, 0.3, "less", 0, "opposite"),
        (-0.3, -0.1, "less", 0, "agrees"),
        (-0.3, -0.1, "more", 0, "opposite"),
        (-0.1, 0.3, "more", 0, "does not show"),
        (-0.1, 0.3, "less", 0, "does not show"),
        (-0.1, 0.1, "same", 0.2, "agrees"),
        (0.05, 0.1, "same", 0.2, "agrees"),
        (-0.1, 0.3, "same", 0.2, "does not show"),
        (0.25, 0.3, "same", 0.2, "opposite"),
        (-0.3, -0.25, "same", 0.2, "opposite"),
    ],
)
def test_the_rule_of_a_verdict(low, high, expect, margin, verdict):
    found = report.Estimate((low + high) / 2, low, high, 5, 1)
    assert report.judge(found, expect, margin) == verdict


def test_a_statement_has_its_verdict_or_its_gap(tmp_path):
    (row,) = written(tmp_path).claims
    assert row["verdict"] == "agrees" and report.unmarked(row["over"]) == "20 items, 2 runs"
    (row,) = written(tmp_path, start=None).claims
    assert row["verdict"] == "not measured" and "03_a/start" in row["measured"]


def test_a_statement_that_is_not_whole_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(course.CourseError, match="more, less, same or inside, not 'better'"):
        written(tmp_path, PLAN.replace('expect = "more"', 'expect = "better"'))
    with pytest.raises(course.CourseError, match="a statement needs 'here'"):
        written(tmp_path, PLAN.replace("here =", "hear ="))
    with pytest.raises(course.CourseError, match="the slot of `03_a/loss > last`"):
        written(tmp_path, PLAN.replace("; .2f}", "; .2q}"))


def test_statements_of_the_plan_name_a_section_that_exists(whole):
    places = {
        report.unmarked(b.text).split()[0] for b in whole.blocks if isinstance(b, report.Heading)
    }
    assert {row["section"] for row in whole.claims} <= places
    assert len({row["name"] for row in whole.claims}) == len(whole.claims)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_all_files_whole_or_none(runs_folder, capsys, monkeypatch):
    assert cli.main(["report", "--scale", "laptop"]) == 0
    folder = runs_folder / "laptop" / "report"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        "report.html" in capsys.readouterr().out
        and (folder / "report.pdf").read_bytes()[:5] == b"%PDF-"
    )
    assert not re.search(r'(?:src|href)="(?!data:)', html) and 'name="viewport"' in html
    assert report.CLOSE not in html and html.count("<img") == len(list(folder.glob("*.png")))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        loose_digits(text, json.loads((folder / "origins.json").read_text(encoding="utf-8"))) == []
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(document):
        raise OSError("the disk went away")

    monkeypatch.setattr(report_files, "pdf", fails)
    assert cli.main(["report", "--scale", "laptop"]) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_scale_without_a_record_has_a_report_of_gaps(runs_folder):
    document = report.write_up(report.open_shelf("quick"))
    text, origins = report_files.markdown(document)
    assert len(document.gaps) > 50 and loose_digits(text, origins) == []
    assert all(row["verdict"] == "not measured" for row in document.claims)
    assert report_files.pdf(document)[:5] == b"%PDF-"


def test_html_shows_signs_as_text(tmp_path):
    document = written(tmp_path, PLAN.replace("training helps", "a < b & c"))
    assert "a &lt; b &amp; c" in report_files.page(document)


def test_lines_of_the_pdf_fit_and_lose_nothing():
    words = "a sentence with_a_very_long_name_" + "x" * 120 + " in the middle"
    lines = report_files.wrapped(words, 100, 8)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(report_files._width(line, 8, False) <= 101 for line in lines)
    widths = report_files.column_widths([["a", "word " * 60, "b"], ["c", "d", "longer"]], 400, 8)
    assert sum(widths) <= 400.01 and widths[0] < 30 < widths[1]


# --- exercises ------------------------------------------------------------------------------------------------------

BOOK = Notebook(home() / "notebooks" / "23_mini_report.ipynb")


EXERCISES = exercises(BOOK)


def room():
    """What the exercises find defined above them."""
    return {"np": np, "re": re, "report": report, "SHIPPED": SHIPPED}


STATEMENT = """row = {"name": "n", "section": "§5.2.3", "place": "ours", "says": "s", "here": "h", "expect": "more"}
A, B = "20_online_rl/judges/verifier + full", "20_online_rl/judges/full"
"""
WRONG = [
    (0, "return re.findall(r'\\d+', text)"),
    (0, "return [g.group() for g in re.finditer(r'\\d', text) if not any(a <= g.start() < b for a, b in slots)]"),
    (0, "inside = {i for a, b in slots for i in range(a, b)}\n"
        "return [g.group() for g in re.finditer(r'\\d+', text) if not set(range(*g.span())) <= inside]"),
    (0, "return [g.group() for g in re.finditer(r'\\d+', text) if not any(a <= g.start() < b for a, b in slots)]"),
    (1, "d = np.asarray(differences)\nreturn 1.96 * d.std(ddof=1) / len(d) ** 0.5"),
    (1, "d = np.asarray(differences)\nreturn report.T[len(d) - 1] * d.std() / len(d) ** 0.5"),
    (1, "d = np.asarray(differences)\nreturn report.T[len(d)] * d.std(ddof=1) / len(d) ** 0.5"),
    (1, "d = np.asarray(differences)\nreturn report.T[len(d) - 1] * d.std(ddof=1)"),
    (2, STATEMENT + 'return row | {"measured": f"{B} > gold - {A} > gold"}'),
    (2, STATEMENT + 'return row | {"measured": f"{A} > gold"}'),
    (2, STATEMENT + 'return row | {"measured": f"{A} > row > truthful - {B} > row > truthful"}'),
    (2, STATEMENT + 'return row | {"measured": f"{A} > gold - {B} > gold", "expect": "less"}'),
    (2, STATEMENT + 'return row | {"measured": f"{A} > gold / {B} > gold"}'),
    (2, STATEMENT + 'return row | {"measured": f"{A} > gold - 20_online_rl/judges/longer > gold"}'),
]  # fmt: skip


@pytest.mark.parametrize("number", range(3))
def test_the_solution_of_an_exercise_passes(number):
    passes(EXERCISES[number], room())


@pytest.mark.parametrize("number, body", WRONG)
def test_a_wrong_answer_is_refused(number, body):
    refuses(EXERCISES[number], body, room(), (AssertionError, course.CourseError))


def test_there_are_three_exercises():
    assert len(EXERCISES) == 3
