"""Experiments: what makes a record another one, what does not, and what is refused in one sentence."""

import functools
import json
import os
import pickle
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_mini.course import CourseError, load_scale, records, stages, training
from qwen_mini.course.records import (
    BadRecord,
    differs,
    experiment,
    experiments,
    key_of,
    opted,
    plain,
    record_path,
)
from qwen_mini.course.scales import SECTIONS

FACTOR = 3
CALLS = []


@pytest.fixture(autouse=True)
def book(runs_folder):
    records.open_notebook("99_probe", load_scale("quick"), 0)
    yield runs_folder
    records._book = None


def half(x):
    return x / 2


def measure(x, log=None):
    if log:
        with open(log, "a") as file:
            file.write("x")
    return {"value": half(x) * FACTOR, "list": np.arange(3), "tensor": torch.tensor(2.5)}


def path_of(name):
    return record_path(records.runs() / "quick" / "records", "99_probe", name)


def key(fn=measure, name="a", **inputs):
    return key_of(name, functools.partial(fn, **(inputs or {"x": 2})))


def test_a_result_is_computed_once_and_is_the_same_data_afterwards(tmp_path):
    log = tmp_path / "log"
    first = experiment("a", measure, x=2, log=str(log))
    assert first == {"value": 3.0, "list": [0, 1, 2], "tensor": 2.5}
    assert experiment("a", measure, x=2, log=str(log)) == first
    assert log.read_text() == "x"


def test_several_are_computed_beside_each_other_and_an_arm_more_computes_that_arm_only(tmp_path):
    log = tmp_path / "log"
    calls = {f"arm/{x}": functools.partial(measure, x=x, log=str(log)) for x in (1, 2)}
    before = experiments(calls)
    after = experiments(calls | {"arm/3": functools.partial(measure, x=3, log=str(log))})
    assert {name: after[name] for name in before} == before
    assert log.read_text() == "xxx"


def test_fresh_computes_anew_and_stores(tmp_path, monkeypatch):
    log = tmp_path / "log"
    experiment("a", measure, x=2, log=str(log))
    monkeypatch.setenv("FRESH", "1")
    records.open_notebook("99_probe", load_scale("quick"), 0)
    experiment("a", measure, x=2, log=str(log))
    assert log.read_text() == "xx"


def test_from_records_alone_a_missing_one_names_the_command(monkeypatch):
    monkeypatch.setenv("QWEN_MINI_RECORDS", "only")
    with pytest.raises(BadRecord, match="99_probe/a .* `qwen-mini run 99_probe --scale quick`"):
        experiment("a", measure, x=2)


def test_a_record_of_other_inputs_is_not_taken():
    experiment("a", measure, x=2)
    assert experiment("a", measure, x=4)["value"] == 6.0


def test_notebook_and_experiment_names_are_kept_apart():
    assert key(name="a") == key(name="b"), "the name is no part of the content"
    experiment("a b", measure, x=2)
    assert experiment("a_b", measure, x=4)["value"] == 6.0  # the same file, another name


@pytest.mark.parametrize("damage", ["", '{"name": "99_probe/a"', "[]", '{"result": 1}'])
def test_a_record_that_is_not_whole_is_told_and_deleting_it_helps(damage):
    experiment("a", measure, x=2)
    path_of("a").write_text(damage)
    with pytest.raises(BadRecord, match="is not a whole record: delete it"):
        experiment("a", measure, x=2)
    path_of("a").unlink()
    assert experiment("a", measure, x=2)["value"] == 3.0


def test_a_record_that_was_changed_by_hand_is_told():
    experiment("a", measure, x=2)
    record = json.loads(path_of("a").read_text())
    record["result"]["value"] = 3.5
    path_of("a").write_text(json.dumps(record))
    with pytest.raises(BadRecord, match="was changed by hand"):
        experiment("a", measure, x=2)


MODEL = torch.nn.Linear(2, 2)


def reads_a_model(x):
    return float(MODEL.weight.sum()) + x


def returns(what):
    return {"nan": float("nan"), "inf": float("inf"), "object": object(), "int key": {1: 2}}[what]


def test_an_undeclared_input_is_named():
    with pytest.raises(CourseError, match="reads `MODEL`.*pass it as an input, MODEL=MODEL"):
        experiment("a", reads_a_model, x=1)


@pytest.mark.parametrize("what", ["nan", "inf", "object", "int key"])
def test_what_json_cannot_hold_is_refused_and_nothing_is_stored(what):
    with pytest.raises(CourseError, match="JSON"):
        experiment("a", returns, what=what)
    assert not path_of("a").exists()


def test_what_is_opt_in_is_left_out_with_a_line_unless_it_is_asked_for(monkeypatch, capsys):
    def closed():
        raise CourseError("set PROBE=1")

    monkeypatch.delenv("PROBE", raising=False)
    calls = {"a": functools.partial(measure, x=2)}
    assert opted("PROBE", "measure", calls) == experiments(calls)
    capsys.readouterr()
    refused = {"b": functools.partial(closed)}
    assert opted("PROBE", "measure it", refused, tolerance=0.1) == {}
    assert capsys.readouterr().out.endswith("left out: PROBE=1 would measure it\n")
    monkeypatch.setenv("PROBE", "1")
    with pytest.raises(CourseError, match="set PROBE=1"):
        opted("PROBE", "measure it", refused)


def test_an_input_without_content_is_refused():
    with pytest.raises(CourseError, match="cannot tell its input 'x' by its content"):
        experiment("a", measure, x=object())


def test_inputs_by_position_are_refused():
    with pytest.raises(CourseError, match="by name"):
        experiments({"a": functools.partial(measure, 2)})


def test_experiments_outside_a_notebook_are_refused():
    records._book = None
    with pytest.raises(CourseError, match=r"call course\.start"):
        experiment("a", measure, x=2)


def test_a_failing_experiment_keeps_what_the_others_had(tmp_path):
    experiment("a", measure, x=2)
    with pytest.raises(CourseError):
        experiments(
            {"a": functools.partial(measure, x=2), "b": functools.partial(returns, what="nan")}
        )
    assert path_of("a").exists()


def _versions(source: str, **names):
    """The key of a function `f` given as text, in a module of its own."""
    import linecache
    import types

    file = f"<probe {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    module = types.ModuleType("__main__")
    module.__dict__.update(names)
    exec(compile(source, file, "exec"), module.__dict__)
    return key_of("a", functools.partial(module.f, x=1))


BASE = "def g(a):\n    return a + 1\n\ndef f(x):\n    total = g(x) * N\n    return total\n"
SAME = {
    "comment": BASE.replace("    total =", "    # why\n    total ="),
    "docstring": BASE.replace("def f(x):\n", 'def f(x):\n    """What."""\n'),
    "layout": BASE.replace("g(x) * N", "(\n        g(x)\n        * N\n    )"),
    "local name": BASE.replace("total", "product"),
    "annotation": BASE.replace("def f(x):", "def f(x: int) -> int:"),
}
OTHER = {
    "operator": BASE.replace("* N", "- N"),
    "function that it calls": BASE.replace("a + 1", "a + 2"),
    "default": BASE.replace("def g(a):", "def g(a, b=1):"),
    "called function": BASE.replace("g(x) * N", "abs(x) * N"),
}


@pytest.mark.parametrize("edit", SAME)
def test_edits_that_compute_the_same_keep_the_key(edit):
    assert _versions(SAME[edit], N=2) == _versions(BASE, N=2)


@pytest.mark.parametrize("edit", OTHER)
def test_edits_that_compute_something_else_change_the_key(edit):
    assert _versions(OTHER[edit], N=2) != _versions(BASE, N=2)


def test_a_constant_counts_by_its_value():
    assert _versions(BASE, N=2) != _versions(BASE, N=3)


def test_a_version_counts_where_the_chapter_is_used(monkeypatch):
    from qwen_mini.course import versions as module

    inside = "def f(x):\n    from qwen_mini.sft import accuracy\n    return accuracy(x)\n"
    outside = "from qwen_mini.sft import accuracy\ndef f(x):\n    return accuracy(x)\n"
    before = [_versions(inside), _versions(outside), _versions(BASE, N=2)]
    raised = dict(module.versions()) | {"tasks": 99}
    monkeypatch.setattr(module, "versions", lambda: raised)
    after = [_versions(inside), _versions(outside), _versions(BASE, N=2)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, False, True]


def test_sections_count_and_the_others_do_not():
    import dataclasses

    quick = load_scale("quick")
    other = dataclasses.replace(quick, grpo=dataclasses.replace(quick.grpo, steps=99))
    assert key(x=quick.only("sft")) == key(x=other.only("sft"))
    assert key(x=quick.only("sft", "grpo")) != key(x=other.only("sft", "grpo"))
    assert key(x=quick) != key(x=other)


def test_measuring_sizes_precision_and_machine_are_in_no_key_of_a_scale():
    import dataclasses

    quick = load_scale("quick")
    other = dataclasses.replace(
        quick,
        measure=dataclasses.replace(quick.measure, grpo_heldout=99),
        run=dataclasses.replace(quick.run, dtype="bfloat16", threads=7),
    )
    assert key(x=quick) == key(x=other)
    assert key(x=torch.float32) == key(x=torch.bfloat16)


def test_folders_count_by_their_weights(tmp_path):
    import shutil

    from qwen_mini.course import artifacts

    copy = Path(shutil.copytree(artifacts.shipped_dir("sft"), tmp_path / "copy"))
    assert key(x=copy) == key(x=artifacts.shipped_dir("sft"))
    assert key(x=copy) != key(x=artifacts.shipped_dir("dpo"))


@pytest.mark.parametrize(
    ("stored", "found", "tolerance", "same"),
    [
        (1.0, 1.04, 0.05, True),
        (1.0, 1.06, 0.05, False),
        (100.0, 104.0, 0.05, True),
        ({"a": [1, 2]}, {"a": [1, 3]}, 0.05, False),
        ({"a": 1}, {"b": 1}, 0.05, False),
        ([0, 1] * 8, [1, 0] * 8, 0.05, True),  # many verdicts: their mean
        ([0] * 16, [1] * 16, 0.05, False),
        ([1.0, 2.0], [1.0], 0.05, False),
        ([[0, 1], [1, 1]] * 4, [[1, 1], [0, 1]] * 4, 0.05, True),  # problems and samples, too
        ([[0, 1], [1, 1]] * 4, [[0, 1], [0, 0]] * 4, 0.05, False),
        ([0, 1] * 8, [1, 0] * 8, 0.0, False),  # no tolerance: one by one
        ("x", "y", 0.0, False),
        ("x", "y", 0.05, True),  # another processor may sample other words
        (3.0, 30.0, "timing", True),
        ({"a": 3.0}, {"b": 3.0}, "timing", False),
        (None, 1.0, 0.05, False),
    ],
)
def test_differences_within_the_tolerance(stored, found, tolerance, same):
    assert (differs(stored, found, tolerance) == "") == same


def test_verifying_compares_and_names_what_does_not_hold(monkeypatch, capsys):
    experiment("a: b", measure, x=2)
    monkeypatch.setenv("QWEN_MINI_VERIFY", "99_probe/a: b")
    experiment("a: b", measure, x=2)
    assert "verified 99_probe/a: b" in capsys.readouterr().out
    record = json.loads(path_of("a: b").read_text())
    record["result"]["value"] = 9.0
    record = records.sealed(record)
    records.write(path_of("a: b"), record)
    with pytest.raises(
        BadRecord, match=r"99_probe/a: b does not verify: result\.value was 9.0 and is 3.0"
    ):
        experiment("a: b", measure, x=2)


def test_another_notebooks_record_can_be_read():
    experiment("a", measure, x=2)
    assert records.recall("99_probe", "a")["value"] == 3.0
    with pytest.raises(BadRecord, match="qwen-mini run 98_other"):
        records.recall("98_other", "a")


def test_a_record_of_another_version_is_not_recalled():
    experiment("a", measure, x=2)
    record = json.loads(path_of("a").read_text())
    records.write(path_of("a"), records.sealed(record | {"versions": {"tasks": 0}}))
    with pytest.raises(BadRecord, match="is missing"):
        records.recall("99_probe", "a")


def test_names_of_other_letters_have_files_of_their_own():
    assert experiment("arm/β 0.1", measure, x=2)["value"] == 3.0
    assert experiment("arm/α 0.1", measure, x=4)["value"] == 6.0
    assert path_of("arm/β 0.1") != path_of("arm/α 0.1") and path_of("arm/β 0.1").exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(16777216), torch.tensor(16777217)),
        (np.array(1.0), np.array(1 + 1e-10)),
        (np.zeros(3, np.int64), np.zeros(3)),
        (torch.tensor(1 + 1j), torch.tensor(1 + 2j)),
    ],
)
def test_arrays_count_by_all_their_digits_and_their_kind(one, other):
    assert key(x=one) != key(x=other)


def test_a_recalled_record_is_noted():
    experiment("a", measure, x=2)
    records.recall("99_probe", "a")
    used = json.loads(records.used_file("quick", "99_probe").read_text())
    assert used["recalled"] == {"99_probe/a": key(x=2)}


@pytest.mark.parametrize(
    "field", ["name", "key", "versions", "tolerance", "seconds", "provenance", "result"]
)
def test_no_field_of_a_record_can_be_edited_unseen(field):
    experiment("a", measure, x=2)
    record = json.loads(path_of("a").read_text())
    records.write(path_of("a"), record | {field: "edited"})
    with pytest.raises(BadRecord, match="was changed by hand"):
        records.read(path_of("a"))


def test_the_record_says_how_it_was_made():
    experiment("a", measure, x=2, tolerance="timing")
    record = json.loads(path_of("a").read_text())
    assert record["tolerance"] == "timing" and record["provenance"]["threads"] == 1
    assert {"processor", "precision", "torch", "python"} <= set(record["provenance"])


def test_numbers_keep_seven_digits():
    assert plain(1 / 3, "a") == 0.3333333 and plain(np.float32(0.1), "a") == 0.1


def test_used_keys_are_noted():
    experiment("a", measure, x=2)
    used = json.loads(records.used_file("quick", "99_probe").read_text())
    assert used["records"] == {"a": key(x=2)}
    assert os.environ.get("QWEN_MINI_RECORDS") is None


def sections_read():
    return set(json.loads(records.used_file("quick", "99_probe").read_text()).get("sections", {}))


def test_sections_of_scales_that_are_read_are_noted():
    config, gpu = load_scale("quick"), load_scale("gpu")
    assert config.name and config.run.threads and pickle.dumps(config)
    assert sections_read() == set()  # loading is not reading, and the machine decides nothing
    config.model.hidden_size  # noqa: B018
    config.only("sft")
    gpu.dpo.beta  # noqa: B018
    assert sections_read() == {"quick/model", "quick/sft", "gpu/dpo"}
    probe = stages.Stage(config, "probe", 0, {}, {}, lambda made, _: made.config.grpo and Path())
    probe.make()  # what a training reads is in its key
    assert sections_read() == {"quick/model", "quick/sft", "gpu/dpo"}
    training.handle("long_context", config, 0)  # whose key is made of it
    assert {"quick/long_context", "quick/pretraining"} < sections_read()
    key(x=config)
    assert len(sections_read()) == 1 + len(SECTIONS)


def test_what_runs_beside_a_notebook_notes_no_section(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    load_scale("quick").model  # noqa: B018
    assert sections_read() == set()


def test_a_function_of_pythons_own_library_is_no_part_of_the_key():
    def mean_of(values):
        return fmean(values)  # noqa: F821

    mean_of.__globals__["fmean"] = statistics.fmean  # as `from statistics import fmean` in a cell
    try:
        assert experiment("mean", mean_of, values=[1.0, 2.0]) == 1.5
    finally:
        del mean_of.__globals__["fmean"]
