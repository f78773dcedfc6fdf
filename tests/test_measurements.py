"""The page of measurements and README's numbers come from records and benchmarks, and say what is missing."""

import json

import pytest

from authoring import measurements
from authoring.measurements import NOT_YET, measurements_are_current, store_benchmarks, write
from qwen_mini.course import CourseError, records

HOW = {"processor": "a processor", "precision": "bfloat16", "date": "2025-01-02"}
MACHINE = {
    "processor": "a processor",
    "torch": "2.13.0",
    "date": "2025-01-03",
    "lines": [
        {
            "name": "training, 1M parameters, 2 threads",
            "ours": 24200,
            "peer": 15200,
            "peer_name": "transformers Qwen2 bf16 autocast",
            "unit": "tokens/s",
            "ratio": 1.59,
        },
        {"name": "encoding | decoding", "ours": 0.8, "peer": None, "peer_name": "", "unit": "s"},
    ],
}
README = "Training: <!-- n:training -->?<!-- /n -->. GRPO: <!-- n:grpo -->99 %<!-- /n -->.\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


def _record(root, notebook, name, result):
    record = {
        "name": f"{notebook}/{name}",
        "key": "k",
        "versions": {},
        "tolerance": 0.0,
        "seconds": 61.5,
    }
    path = records.record_path(root / "data" / "records" / "laptop", notebook, name)
    records.write(path, records.sealed(record | {"provenance": HOW, "result": result}))
    return path


def _texts(root):
    return [
        (root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/measurements.md")
    ]


def test_what_was_not_measured_is_said(project):
    assert len(write(project)) == 2
    readme, page = _texts(project)
    assert readme == README.replace("?", NOT_YET).replace("99 %", NOT_YET)
    assert page.startswith("<!-- generated") and page.count(NOT_YET) > len(measurements.NUMBERS)


def test_numbers_come_from_benchmarks_and_records(project):
    store_benchmarks(project, MACHINE)
    for name, right in [("final/grpo", [[1, 0], [1, 1]]), ("final/grpo-1", [[1, 1], [0, 0]])]:
        _record(
            project, "20_online_rl", name, {kind: {"correct": right} for kind in ("shown", "asked")}
        )
    write(project)
    readme, page = _texts(project)
    assert (
        readme
        == "Training: <!-- n:training -->1.6 times as fast<!-- /n -->. GRPO: <!-- n:grpo -->62%<!-- /n -->.\n"
    )
    row = (
        "| training, 1M parameters, 2 threads | 24,200 "
        "| transformers Qwen2 bf16 autocast | 15,200 | tokens/s | 1.59 |"
    )
    assert row in page
    assert "encoding \\| decoding | 0.8 |  |  | s |  |" in page
    assert "| 20_online_rl | 2 | 2.0 | a processor | bfloat16 | 2025-01-02 |" in page  # 2 x 61.5 s


def test_the_text_of_all_domains_counts_by_its_bytes(project):
    domains = [
        ("a", "real", 100, 3.0, 2.0),
        ("b", "real", 300, 1.0, 1.0),
        ("c", "made", 9, 9.0, 9.0),
    ]
    for domain, kind, size, xz, model in domains:
        _record(
            project,
            "09_pretraining",
            f"baselines/{domain}",
            {"kind": kind, "bytes": size, "xz -9": xz},
        )
        _record(project, "09_pretraining", f"model/{domain}", model)
    write(project)
    page = _texts(project)[1]
    assert "by the base model | 1.25 |" in page and "by `xz -9` | 1.50 |" in page


def test_writing_twice_changes_nothing_and_a_check_writes_nothing(project):
    assert len(measurements_are_current(project)) == 2
    assert not (project / "docs" / "measurements.md").exists()
    write(project)
    assert write(project) == measurements_are_current(project) == []
    store_benchmarks(project, MACHINE)
    assert len(measurements_are_current(project)) == 2


def test_a_machine_replaces_its_own_benchmarks_only(project):
    store_benchmarks(project, MACHINE)
    store_benchmarks(project, {**MACHINE, "processor": "another"})
    store_benchmarks(project, {**MACHINE, "date": "2025-02-02"})
    found = json.loads((project / "docs" / "bench.json").read_text(encoding="utf-8"))
    assert [(machine["processor"], machine["date"]) for machine in found] == [
        ("another", "2025-01-03"),
        ("a processor", "2025-02-02"),
    ]


@pytest.mark.parametrize(
    "text", ["{", "[{}]", '[{"processor": 1, "torch": 1, "date": 1, "lines": [{"name": "x"}]}]']
)
def test_broken_benchmarks_are_named(project, text):
    (project / "docs" / "bench.json").write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match="bench.json"):
        write(project)
    assert "bench.json" in measurements_are_current(project)[0]


def test_a_number_that_nobody_computes_and_a_record_of_another_form_are_named(project):
    (project / "README.md").write_text("<!-- n:speed -->1<!-- /n -->", encoding="utf-8")
    with pytest.raises(CourseError, match="speed"):
        write(project)
    (project / "README.md").write_text(README, encoding="utf-8")
    _record(project, "20_online_rl", "final/grpo", {"shown": 1})
    with pytest.raises(CourseError, match="final_grpo"):
        write(project)
