"""What a caller's environment may not do to a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat.v4
import pytest
import torch

from qwen_mini.course import CourseError, environment, hardware, home, load_scale, runner
from qwen_mini.course.nb import Notebook

LOOK = """
import json, os, sys, warnings
import matplotlib
warnings.warn("harmless")
seen = {
    "python": sys.executable,
    "assertions": __debug__,
    "injected": "injected" in globals(),
    "threads": [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")],
    "binding": os.environ.get("OMP_PROC_BIND"),
    "ranks": os.environ.get("WORLD_SIZE"),
    "tokenizers": os.environ["TOKENIZERS_PARALLELISM"],
    "line": matplotlib.rcParams["lines.linewidth"],
    "hash": hash("qwen"),
    "text": sys.flags.utf8_mode,
    "waiting": os.environ["GOMP_SPINCOUNT"],
}
print(json.dumps(seen))
"""


def in_python(code: str, **variables) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def executed(folder: Path, *cells: str) -> dict:
    """The cells' outputs by kind, of a notebook that has run and passed."""
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    parameters = nbformat.v4.new_code_cell(
        "scale = ''\nseed = 0", metadata={"tags": ["parameters"]}
    )
    nb.cells = [parameters, *map(nbformat.v4.new_code_cell, cells)]
    path = folder / "01_toy.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    (result,) = runner.run([Notebook(path)], "quick")
    assert result.ok, result.problem
    cells = json.loads(runner.executed_path("quick", Notebook(path)).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return {
        "text": "".join("".join(one["text"]) for one in outputs if one.get("name") == "stdout"),
        "figures": sum("image/png" in one.get("data", {}) for one in outputs),
    }


def bad_values(folder: Path) -> dict[str, str]:
    """Every variable with a value that would change what a kernel shows or checks."""
    start = folder / "start.py"
    start.write_text("injected = True\n")
    profile = folder / "ipython" / "profile_default" / "startup"
    profile.mkdir(parents=True)
    (profile / "00.py").write_text("injected = True\n")
    (folder / "ipython" / "matplotlibrc").write_text("lines.linewidth: 17\n")
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {
        "argv": ["/no/such/python", "{connection_file}"],
        "display_name": "Another",
        "language": "python",
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return {
        "MPLBACKEND": "Agg",
        "MATPLOTLIBRC": str(folder / "ipython"),
        "PYTHONOPTIMIZE": "1",
        "PYTHONSTARTUP": str(start),
        "PYTHONWARNINGS": "error",
        "PYTHONHASHSEED": "42",
        "PYTHONUTF8": "0",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PATH": str(folder / "jupyter"),
        "OMP_NUM_THREADS": "nonsense",
        "MKL_NUM_THREADS": "7",
        "OMP_PROC_BIND": "true",
        "WORLD_SIZE": "2",
        "TOKENIZERS_PARALLELISM": "true",
    }


def test_no_variable_of_the_caller_reaches_into_a_notebook(tmp_path, runs_folder, monkeypatch):
    for name, value in bad_values(tmp_path).items():
        monkeypatch.setenv(name, value)
    cells = [LOOK, "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"]
    outputs = executed(tmp_path, *cells)
    threads = str(min(2, hardware.cores()))
    assert json.loads(outputs["text"]) == {
        "python": sys.executable,
        "assertions": True,
        "injected": False,
        "threads": [threads, threads],
        "binding": None,
        "ranks": None,
        "tokenizers": "false",
        "line": 1.5,
        "hash": int(in_python("print(hash('qwen'))", PYTHONHASHSEED="0")),
        "text": 1,
        "waiting": os.environ["GOMP_SPINCOUNT"],
    }
    assert outputs["figures"] == 1
    assert os.environ["MPLBACKEND"] == "Agg"  # the caller's own stays as it was


def test_a_wrong_assertion_is_caught_whatever_the_caller_optimises(
    tmp_path, runs_folder, monkeypatch
):
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    with pytest.raises(AssertionError, match="1 \\+ 1 == 3"):
        executed(tmp_path, "assert 1 + 1 == 3")


def test_search_path_and_kept_variables(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    monkeypatch.setenv("FRESH", "1")
    changes = environment.kernel_environment(load_scale("quick"))
    assert changes["PYTHONPATH"].split(os.pathsep) == [str(environment.PACKAGE.parent), "elsewhere"]
    assert "PYTHONNOUSERSITE" not in changes and "FRESH" not in changes
    assert environment.kernel_environment(load_scale("quick"), records_only=True)["FRESH"] is None


@pytest.mark.parametrize("module", ["qwen_mini", "qwen_mini.course"])
def test_importing_the_package_sets_how_threads_wait_and_loads_no_torch(module):
    code = f"import os, sys, {module}; print('torch' in sys.modules, *map(os.environ.get, {list(environment.WAITING)}))"
    unset = dict.fromkeys(environment.WAITING)
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", *environment.WAITING.values()]
    assert in_python(code, GOMP_SPINCOUNT="5", KMP_BLOCKTIME="6").split() == ["False", "5", "6"]


def test_make_sets_the_same_values():
    exported = dict(
        re.findall(r"^export (\w+) \?= (\w+)$", (home() / "Makefile").read_text(), re.MULTILINE)
    )
    assert exported == environment.WAITING


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_and_sandbox_workers_are_as_many_as_the_cores_that_are_allowed(monkeypatch):
    code = """
import os
os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
from qwen_mini.course import hardware, load_scale, sandbox
sandbox.run_many([("def f(x):\\n    return x", "f", [[1]])] * 4)
print(*[hardware.threads(load_scale(scale)) for scale in ("quick", "gpu")], len(sandbox._workers))
"""
    assert in_python(code, OMP_NUM_THREADS="").split() == ["1", "1", "1"]
    assert in_python(code, OMP_NUM_THREADS="3").split() == ["3", "3", "1"]


def test_the_precision_is_the_scales_unless_the_environment_names_another(monkeypatch):
    monkeypatch.delenv("QWEN_MINI_DTYPE", raising=False)
    assert hardware.pick_dtype("float32") == torch.float32
    assert hardware.pick_dtype("bfloat16") == torch.bfloat16
    for gpu, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        assert hardware.pick_dtype() == dtype
    monkeypatch.setenv("QWEN_MINI_DTYPE", "bfloat16")
    assert hardware.pick_dtype("float32") == torch.bfloat16
    for wrong in ("auto", "float16"):
        monkeypatch.setenv("QWEN_MINI_DTYPE", wrong)
        with pytest.raises(
            CourseError, match=f"^QWEN_MINI_DTYPE must be float32 or bfloat16, not '{wrong}'$"
        ):
            hardware.pick_dtype("float32")
