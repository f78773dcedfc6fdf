"""Each check finds the mistake it is there for, in a tiny project, and nothing in a sound one."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest

from authoring import checks, sync
from qwen_mini.course import nb, outputs, records, runner, scales, stale, versions

ROOT = Path(__file__).resolve().parent.parent
START = 'from qwen_mini import course\nconfig = course.start("{name}", scale=scale, seed=seed)'
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def write(root, name, *cells, prose="# Title", parameters='scale = "laptop"\nseed = 0'):
    """A notebook that exports `cells` to the module of its name, with outputs of that code."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    book.cells = [nbformat.v4.new_markdown_cell(prose)]
    book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    module = name.partition("_")[2]
    texts = [
        f"#| default_exp {module}",
        START.format(name=name),
        *(f"#| export\n{text}" for text in cells),
    ]
    book.cells += [nbformat.v4.new_code_cell(text) for text in texts]
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="fine\n")]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(book, path)
    stamp(path)
    return path


def stamp(path):
    """Note that the outputs belong to the code as it is."""
    facts = {"scale": "laptop", "code": nb.Notebook(path).code_digest, "sections": {}}
    edit(path, lambda data: data["metadata"].update(qwen_mini=facts))


def edit(path, change):
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two chapters, the second importing the first."""
    for folder in ("notebooks", "qwen_mini/course"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "Makefile").write_text("test: ready\n\tpytest\n")
    prose = "[next](02_two.ipynb), `make test`, `qwen-mini run 01 --scale quick`, `qwen_mini.two`, [out](https://a.b/c)"
    write(tmp_path, "01_one", "def f(x):\n    return x", prose=prose)
    write(tmp_path, "02_two", "from qwen_mini.one import f", "def g(x):\n    return f(x)")
    monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))
    assert sync.main([]) == 0
    return tmp_path


def only(problems, *words):
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems


def test_a_sound_project_has_no_problems(project, capsys):
    assert checks.problems(project) == []
    assert (
        checks.main() == 0 and f"all {len(checks.CHECKS)} checks passed" in capsys.readouterr().out
    )


def test_a_module_that_differs_or_has_no_notebook(project):
    module = project / "qwen_mini" / "one.py"
    assert "from .one import f" in (project / "qwen_mini" / "two.py").read_text()
    module.write_text(module.read_text() + "y = 1\n")
    only(checks.modules_equal_notebooks(project), "one.py", "differs")
    module.unlink()
    only(checks.modules_equal_notebooks(project), "one.py", "differs")
    assert sync.main(["01_one"]) == 0
    (project / "qwen_mini" / "stray.py").write_text("")
    only(checks.modules_equal_notebooks(project), "stray.py", "no notebook")


@pytest.mark.parametrize(
    "code",
    [
        "from qwen_mini.two import g",
        "from qwen_mini import two",
        "import qwen_mini.two",
        "def f():\n    from qwen_mini.two import g\n    return g",
        'import importlib\n\n\ndef f():\n    return importlib.import_module("qwen_mini.two")',
    ],
)
def test_imports_of_later_chapters_are_found(project, code):
    write(project, "01_one", code)
    sync.main([])
    found = checks.imports_point_backwards(project)
    assert [problem.split()[0] for problem in found] == ["01_one.ipynb", "qwen_mini/one.py"]


def test_imports_of_unknown_modules_and_by_the_course_are_found(project):
    write(project, "01_one", "from qwen_mini.three import h")
    assert "no notebook exports" in checks.imports_point_backwards(project)[0]
    write(project, "01_one", "from qwen_mini.course import artifacts")
    (project / "qwen_mini" / "course" / "eager.py").write_text(
        "from ..one import f\nfrom .. import __version__\n"
    )
    only(checks.imports_point_backwards(project), "eager.py", "one")


@pytest.mark.parametrize("room", ["kernels", "world"])
@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from ..one import f", "the chapter one"),
        ("from .. import one", "the chapter one"),
        ("import qwen_mini.one", "the chapter one"),
        ("def g():\n    from qwen_mini.one import f\n    return f", "the chapter one"),
        ("try:\n    from ..one import f\nexcept ImportError:\n    pass", "the chapter one"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from ..one import f", "the chapter one"),
        ("from ..{other}.fast import f", "{other}"),
    ],
)
def test_kernels_and_world_import_no_chapter_and_not_each_other(project, room, code, name):
    other = {"kernels": "world", "world": "kernels"}[room]
    path = project / "qwen_mini" / room / "bad.py"
    path.parent.mkdir()
    path.write_text(code.replace("{other}", other) + "\n")
    only(
        checks.imports_point_backwards(project),
        f"{room}/bad.py imports {name.format(other=other)}, but {room} may",
    )


def test_imports_that_kernels_may_have(project):
    path = project / "qwen_mini" / "kernels" / "good.py"
    path.parent.mkdir()
    path.write_text(
        "import torch\nfrom . import cache\nfrom .one import f\nfrom ..course import hardware\n"
        "from qwen_mini.kernels.layers import rope\nif TYPE_CHECKING:\n    from ..one import f\n\n\n"
        "def g():\n    if typing.TYPE_CHECKING:\n        from qwen_mini.two import g\n"
    )
    imports = "from qwen_mini.kernels.good import g\nfrom qwen_mini import kernels"
    write(project, "01_one", imports, "def f(x):\n    return x")
    assert sync.main([]) == 0 and checks.imports_point_backwards(project) == []
    (project / "qwen_mini" / "course" / "eager.py").write_text("from ..kernels.good import g\n")
    only(
        checks.imports_point_backwards(project),
        "course/eager.py imports kernels, but course may import only course",
    )


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ('scale = "laptop"', "instead of scale and seed"),
        ('scale = "laptop"\nseed = 0\nn = 1', "instead of scale and seed"),
        ('import os\nscale = "laptop"\nseed = 0', "more than assignments"),
        ('scale = str("laptop")\nseed = 0', "no literal"),
    ],
)
def test_parameters_cells_that_papermill_would_misread(project, parameters, words):
    write(project, "01_one", "x = 1", parameters=parameters)
    only(checks.parameters_are_literal(project), "01_one.ipynb", words)


def test_a_missing_parameters_cell_and_a_wrong_name(project):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["cells"][1]["metadata"].clear())
    only(checks.parameters_are_literal(project), "exactly one cell")
    write(project, "01_one", "x = 1").rename(project / "notebooks" / "01_other.ipynb")
    only(checks.parameters_are_literal(project), 'course.start("01_other"')


def test_outputs_missing_stale_or_bad(project):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["cells"][-1].update(source="1 + 1"))
    only(checks.results_are_current(project), "01_one", "other code", "outputs --dry-run")
    stamp(path)
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    edit(path, lambda data: data["cells"][-1]["outputs"].append(error))
    only(checks.results_are_current(project), "error")
    edit(path, lambda data: data["cells"][-1].update(outputs=[]))
    only(checks.results_are_current(project), "no outputs")


@pytest.mark.parametrize("text", ["# a comment\n1 + 1", "(1\n + 1)"])
def test_comments_and_layout_make_no_output_stale(project, text):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["cells"][-1].update(source="1 + 1"))
    stamp(path)
    edit(path, lambda data: data["cells"][-1].update(source=text))
    assert checks.results_are_current(project) == []


def record(project, key="k", versions=None, result=1.0):
    """A shipped record of the notebook 01_one."""
    path = project / "data" / "records" / "laptop" / "01_one" / "a.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "name": "01_one/a",
        "key": key,
        "versions": versions or {},
        "tolerance": 0,
        "seconds": 90.0,
    }
    facts["provenance"] = {}
    path.write_text(json.dumps(records.sealed(facts | {"result": result})))
    return path


def test_exported_code_is_decided_by_goldens_and_versions(project, monkeypatch):
    """A refactor makes nothing stale; a version that was raised does."""
    path = project / "notebooks" / "01_one.ipynb"
    code = "#| export\nfrom qwen_mini.sft import loss_mask\n\ndef twice(x):\n    return 2 * x"
    edit(path, lambda data: data["cells"][-1].update(source=code))
    before = nb.Notebook(path).code_digest
    edit(path, lambda data: data["cells"][-1].update(source=code.replace("2 * x", "x + x")))
    assert nb.Notebook(path).code_digest == before
    raised = dict(versions.versions()) | {"tasks": 99}
    monkeypatch.setattr(versions, "versions", lambda: raised)
    monkeypatch.setattr(nb, "versions", lambda: raised)
    assert nb.Notebook(path).code_digest != before


def test_a_cell_that_is_not_python_is_one_sentence(project):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["cells"][-1].update(source="x = (\n"))
    assert any(
        "01_one.ipynb has a cell that is not Python" in text
        for text in checks.imports_point_backwards(project)
    )
    edit(path, lambda data: data["cells"][-1].update(source='x = ("%d"\n % 3)\n'))
    assert not [text for text in checks.imports_point_backwards(project) if "01_one" in text]
    edit(path, lambda data: data["cells"][1].update(source="x = ("))
    assert any("01_one" in text for text in checks.parameters_are_literal(project))


def test_outputs_of_other_records_are_found(project):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["metadata"]["qwen_mini"].update(records={"a": "k"}))
    only(checks.results_are_current(project), "01_one", "the record 01_one/a is missing")
    record(project)
    assert checks.results_are_current(project) == []
    record(project, key="other")
    only(checks.results_are_current(project), "01_one", "the record 01_one/a is newer")


def test_outputs_are_stale_where_a_section_that_was_read_has_another_value(
    project, tmp_path, monkeypatch
):
    path = project / "notebooks" / "01_one.ipynb"
    read = {"laptop/sft": scales.section_digest(scales.load_scale("laptop"), "sft")}
    edit(path, lambda data: data["metadata"]["qwen_mini"].update(sections=read))
    assert checks.results_are_current(project) == []
    monkeypatch.setattr(scales, "FOLDER", shutil.copytree(scales.FOLDER, tmp_path / "scales"))
    laptop = scales.FOLDER / "laptop.toml"
    usual = laptop.read_text(encoding="utf-8")
    for changed, reason in {
        "[dpo]\nbeta = 0.5\n": "",  # not read
        "[run]\nmemory_gib = 9.0\n": "",
        "[sft]\nepochs = 9\n": "its outputs are of other settings: laptop/sft",
    }.items():
        section = changed.split("\n")[0] + "\n"
        kept = usual.replace(section, changed) if section in usual else usual + changed
        laptop.write_text(kept, encoding="utf-8")
        found = {one.what: one.reason for one in stale.stale_outputs(project)}
        assert found.get("01_one", "") == reason, changed
    edit(path, lambda data: data["metadata"]["qwen_mini"].pop("sections"))
    assert "do not say which settings" in stale.stale_outputs(project)[0].reason


def test_a_raised_version_makes_exactly_what_depends_on_it_stale(project):
    record(project, versions={"sft": 1, "tasks": versions.versions()["tasks"]})
    now = dict(versions.versions())
    assert checks.results_are_current(project) == []
    path = project / "data" / "checkpoints" / "sft" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {"key": "k", "versions": {"tasks": now["tasks"] - 1}, "provenance": {"seconds": 30}}
        )
    )
    found = stale.stale(project)
    assert [(thing.what, thing.seconds) for thing in found] == [("stage sft", 30)]
    assert f"tasks {now['tasks'] - 1} → {now['tasks']}" in found[0].reason


def test_a_broken_record_is_found(project):
    record(project).write_text("{")
    only(checks.results_are_current(project), "01_one/a", "not a whole record")


def test_untidy_notebooks(project):
    path = project / "notebooks" / "01_one.ipynb"
    edit(path, lambda data: data["metadata"].update(widgets={}))
    only(checks.notebooks_are_tidy(project), "widgets")
    edit(path, lambda data: data["metadata"].pop("widgets"))
    edit(path, lambda data: data["cells"][1]["metadata"].update(papermill={}))
    only(checks.notebooks_are_tidy(project), "metadata other than tags")
    assert sync.main([]) == 0 and checks.notebooks_are_tidy(project) == []
    assert nb.Notebook(path).parameters() == {"scale": "laptop", "seed": 0}
    edit(path, lambda data: data["cells"][-1].update(source=f'x = "{"a" * 120}"'))
    only(checks.notebooks_are_tidy(project), "wider than 120")
    edit(path, lambda data: data["cells"][-1].update(source="# " + "long\n# " * 200_000))
    only(checks.notebooks_are_tidy(project), "larger")


def test_code_that_the_formatter_would_change(project):
    (project / "tests").mkdir()
    (project / "tests" / "test_one.py").write_text("x = { 1 : 2 }\n")
    only(
        checks.code_is_clean(project), "tests/test_one.py line 1 is not formatted", "authoring.sync"
    )
    assert sync.main([]) == 0 and checks.code_is_clean(project) == []


def test_ruff_problems_name_file_and_line(project):
    (project / "qwen_mini" / "course" / "bad.py").write_text("import os\n")
    only(checks.code_is_clean(project), "qwen_mini/course/bad.py line 1: F401")


@pytest.mark.parametrize(
    ("prose", "words"),
    [
        ("[gone](03_three.ipynb)", "03_three.ipynb, which does not exist"),
        ("![gone](img/a.png)", "img/a.png"),
        ("see `qwen_mini.three`", "qwen_mini.three"),
        ("see `qwen_mini/three.py`", "qwen_mini/three.py"),
        ("`make coffee`", "make coffee"),
        ("```\nqwen-mini brew --scale quick\n```", "no command"),
        ("`python -m qwen_mini.course run --sclae quick`", "does not know --sclae"),
    ],
)
def test_links_and_commands_that_lead_nowhere(project, prose, words):
    (project / "README.md").write_text(prose + "\n", encoding="utf-8")
    only(checks.links_exist(project) + checks.commands_exist(project), "README.md", words)


def test_outputs_are_copied_by_cell_and_cleaned(project, runs_folder):
    path = write(project, "01_one", "x = 1")
    code = 'import sys\nprint("a", end="")\nsys.stdout.flush()\nprint("b", object())\n'
    code += 'print("no", file=sys.stderr)\nobject()'
    extra = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    widget = "from ipywidgets import interact\ninteract(lambda n: print(n), n=[0, 1]);"
    for text in (code, extra, widget):
        edit(
            path,
            lambda data, text=text: data["cells"].append(dict(nbformat.v4.new_code_cell(text))),
        )
    book, texts = nb.Notebook(path), []
    for _ in range(2):
        assert runner.run([book], "laptop")[0].ok
        outputs.copy_outputs(book)
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert not outputs.copy_outputs(book)
    done = nbformat.read(path, as_version=4)
    printed, value = done.cells[-3].outputs
    assert (
        printed.text == "ab <object object at 0x…>\n"
        and value.data["text/plain"] == "<object at 0x…>"
    )
    assert "image/png" in done.cells[-2].outputs[-1].data and done.cells[-1].outputs == []
    assert (
        set(done.metadata) == {"kernelspec", "qwen_mini"} and "injected-parameters" not in texts[0]
    )
    assert checks.results_are_current(project) + checks.notebooks_are_tidy(project) == []
