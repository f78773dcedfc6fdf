"""The project as a whole: checks pass, pins agree, imports stay light, the README's commands exist."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from authoring import checks
from qwen_mini.course import cli
from qwen_mini.course.cli import parser
from qwen_mini.course.nb import notebooks

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_make_check_passes(check):
    assert check(ROOT) == []


def _name(requirement: str) -> str:
    return re.split(r"[\s\[<>=!;]", requirement.strip())[0].lower().replace("_", "-")


def _pins(lines) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in lines]
    return {_name(line): line.split("==")[1].strip() for line in lines if "==" in line}


def _direct() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = [
        line for group in groups for line in group if "==" not in line
    ]  # or pinned there: asked for alone
    return {_name(line) for line in lines} - {"qwen-mini"}


def test_pins_agree():
    pinned = _pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert not _direct() - set(pinned), "a direct dependency has no pin"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    listed = next(item for item in environment["dependencies"] if isinstance(item, dict))["pip"]
    assert _pins(listed) == {name: pinned[name] for name in _direct()}
    assert f"torch=={pinned['torch']}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_is_said_once():
    from qwen_mini import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__


HEAVY = [
    "IPython",
    "ipykernel",
    "jupyter_client",
    "matplotlib",
    "nbdev",
    "papermill",
    "transformers",
    "trl",
]


def _import_alone(code: str) -> list[str]:
    """Heavy packages that are loaded after `code` ran in a fresh interpreter."""
    probe = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_module_imports_without_notebook_machinery():
    modules = [nb.module for nb in notebooks(ROOT) if nb.module]
    assert _import_alone("".join(f"import qwen_mini.{name}\n" for name in modules)) == []


def test_the_course_imports_without_torch_and_chapters():
    code = "import sys\nfrom qwen_mini import course\nfrom qwen_mini.course import cli, runner\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "own = {n for n in sys.modules if n.startswith('qwen_mini.')}\n"
    code += "assert all(name.startswith('qwen_mini.course') for name in own), own"
    assert _import_alone(code) == []


def test_the_readme_and_the_help_agree_on_the_commands():
    commands = set(parser()._subparsers._group_actions[0].choices)
    assert commands == {
        "run",
        "outputs",
        "verify",
        "chat",
        "eval",
        "plan",
        "report",
        "train",
        "export",
    }
    assert (ROOT / "README.md").exists()
    assert checks.commands_exist(ROOT) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_every_make_target_is_known_to_make():
    for target in "setup course test check lab chat bench outputs clean".split():
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="needs bash")
def test_the_ci_script_is_sound():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "set -euo pipefail" in script.read_text()
    assert script.read_text().rstrip().endswith("make test")
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_text_of_the_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text


@pytest.mark.parametrize(
    ("scale", "parameters"), [("quick", ""), ("gpu", ""), ("cluster", "494,032,768")]
)
def test_plans_are_counted_on_the_meta_device(scale, parameters, capsys):
    assert cli.main(["plan", "--scale", scale, "--gpus", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("parameters") and parameters in lines[0] and "GiB" in lines[4]


@pytest.fixture
def tiny_checkpoint(runs_folder):
    """A stage `pretraining` at quick scale that nothing has trained."""
    from qwen_mini.course import artifacts, load_scale
    from qwen_mini.model import ModelConfig, Qwen
    from qwen_mini.tokenizer import Tokenizer

    config = load_scale("quick")
    with artifacts.write_stage("quick", "pretraining") as folder:
        Qwen(ModelConfig.from_scale(config)).save_pretrained(folder)
        Tokenizer.train(["some words, and some more words"], 288).save_pretrained(folder)


def test_export_copies_a_checkpoint(tiny_checkpoint, tmp_path, capsys):
    words = ["export", "pretraining", str(tmp_path / "out"), "--scale", "quick"]
    assert cli.main(words) == 0 and (tmp_path / "out" / "model.safetensors").exists()
    assert cli.main(words) == 2 and "exists already" in capsys.readouterr().err
    assert (
        cli.main(
            ["export", "pretraining", str(tmp_path / "half"), "--scale", "quick", "--bfloat16"]
        )
        == 0
    )
    whole, half = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "half")
    )
    assert 0.45 * whole < half < 0.55 * whole


def test_chat_completes_with_a_base_model(tiny_checkpoint, runs_folder, monkeypatch, capsys):
    lines = iter(["some words", "more " * 500, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--scale", "quick", "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "completes what you type" in out and "\nsome words" in out
    assert cli.main(["chat", "--scale", "quick", "--stage", "reward_scores"]) == 2
    (runs_folder / "quick" / "pretraining" / "model.safetensors").write_bytes(b"torn")
    assert (
        cli.main(["chat", "--scale", "quick"]) == 2
        and "cannot be loaded" in capsys.readouterr().err
    )


def test_a_long_conversation_loses_its_oldest_turns_and_never_its_system_prompt():
    from qwen_mini.course import CourseError, chat

    talker = chat.Talker("laptop", "dpo", 0, 0.0, 16)
    talker.messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(60):
        ids, messages = talker.prompt(f"Reverse: lamp tree stone {turn} " * 3)
        talker.messages = [*messages, {"role": "assistant", "content": "stone tree lamp"}]
        assert len(ids) + talker.max_tokens <= talker.model.config.max_position_embeddings
        assert talker.messages[0]["content"] == "Be brief." and talker.messages[-2][
            "content"
        ].startswith("Reverse")
    assert 2 < len(talker.messages) < 121
    with pytest.raises(CourseError, match="longer than the"):
        talker.prompt("tree " * 5_000)
    assert talker.messages == messages + [{"role": "assistant", "content": "stone tree lamp"}]


def test_the_chat_of_a_notebook_answers_and_shows_text_as_text(tiny_checkpoint, monkeypatch):
    pytest.importorskip("ipywidgets")
    from qwen_mini.course import chat

    monkeypatch.setattr(chat.Talker, "answer", lambda self, text: f"<b>{text[::-1]}</b>\n& more")
    box = chat.chat_widget("quick", "pretraining")
    said, line = box.children
    line.value = "<i>ab"
    assert (
        "&lt;i&gt;ab" in said.value and "&lt;b&gt;ba&gt;i&lt;&lt;/b&gt;<br>&amp; more" in said.value
    )
    assert "<i>ab" not in said.value and line.value == ""
    before = said.value
    line.value = "   "
    assert said.value == before


@pytest.mark.skipif(not (ROOT / "data" / "checkpoints").is_dir(), reason="no checkpoint is shipped")
def test_shipped_checkpoints_open_in_transformers_and_here():
    import torch

    from qwen_mini.model import Qwen
    from qwen_mini.tokenizer import Tokenizer

    transformers = pytest.importorskip("transformers")
    for folder in sorted((ROOT / "data" / "checkpoints").iterdir()):
        text = "The river is long.\nQuestion: 12+7=?"
        ids = Tokenizer.from_pretrained(folder).encode(text)
        assert transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            ours = Qwen.from_pretrained(folder)(torch.tensor([ids]))
            torch.testing.assert_close(
                ours, theirs(torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4
            )
        assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 2**20
