"""A conversation goes on after every line that could not be answered."""

import io
import sys

import pytest

from qwen_mini.course import chat, cli, paths
from qwen_mini.course.errors import CourseError

GOOD = "Reverse: sun tree"
pytestmark = pytest.mark.skipif(
    not (paths.home() / "data" / "checkpoints" / "sft").is_dir(), reason="no checkpoint is shipped"
)


@pytest.fixture
def talker(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path))
    return chat.Talker("laptop", "sft", seed=3, temperature=0.7, max_tokens=12)


def snapshot(talker):
    return [dict(message) for message in talker.messages], talker.generator.get_state().tolist()


def fails(*args, **kwargs):
    raise ValueError("the model broke")


def stops(*args, **kwargs):
    raise KeyboardInterrupt


BAD = {
    "a line of another encoding": ("caf\udce9", ValueError, None),
    "a line that is too long": ("tree " * 5_000, CourseError, None),
    "a failing model": (GOOD, ValueError, fails),
    "an interruption": (GOOD, KeyboardInterrupt, stops),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("turns", [0, 1, 12])
def test_what_fails_leaves_the_conversation_as_it_was(talker, monkeypatch, bad, turns):
    line, error, broken = BAD[bad]
    for _ in range(turns):
        talker.answer(GOOD + " lamp stone river" * 9)
    before, drawn = snapshot(talker), talker.generator.get_state()
    expected = talker.answer(GOOD)
    talker.messages = before[0]
    talker.generator.set_state(drawn)
    for _ in range(2):
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(talker.model, "hidden_states", broken)
            with pytest.raises(error):
                talker.answer(line)
        assert snapshot(talker) == before
    assert talker.answer(GOOD) == expected


def test_roles_alternate_after_bad_lines(talker):
    for line in (GOOD, "caf\udce9", GOOD, "tree " * 5_000, GOOD):
        try:
            talker.answer(line)
        except (CourseError, ValueError):
            continue
    assert [message["role"] for message in talker.messages] == ["user", "assistant"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "1e-39"], "temperature must be 0"),
        (["--max-tokens", "0"], "raise --max-tokens"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    assert cli.main(["chat", "--stage", "sft", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_terminal_in_another_encoding(tmp_path, monkeypatch):
    """é as Latin-1 sends it, in a terminal that speaks ASCII: one sentence, and the next line is answered."""
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path))
    typed, shown = io.BytesIO(b"caf\xe9\nReverse: sun tree\n"), io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    answers = []
    monkeypatch.setattr(chat.Talker, "answer", listened(answers))
    assert chat.talk("laptop", "sft", 0, 0.0, 12) == 0
    sys.stdout.flush()
    assert len(answers) == 1 and b"(" in shown.getvalue() and b"?" in shown.getvalue()


def listened(answers):
    answer = chat.Talker.answer

    def listening(self, text):
        answers.append(answer(self, text))
        return answers[-1] + " \N{SNOWMAN}"

    return listening


def test_a_notebook_shows_a_line_that_cannot_be_encoded():
    pytest.importorskip("ipywidgets")
    said, line = chat.chat_widget("laptop", "sft", max_tokens=4).children
    line.value = "caf\udce9"
    said.value.encode("utf-8")
    assert "caf?" in said.value
