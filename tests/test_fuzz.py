"""Every value of every kind of file, swapped for something else: it is read, or refused in one sentence."""

import copy
import json
import os
import random

import pytest
import torch
from conftest import small_config
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import whole_file

from qwen_mini.course import (
    CourseError,
    artifacts,
    claims,
    cli,
    home,
    load_scale,
    nb,
    records,
    runner,
    stages,
    training,
)
from qwen_mini.model import Qwen
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.training import Trainer, load_training_state, save_training_state

# Of each document. `QWEN_MINI_FUZZ=2000 pytest tests/test_fuzz.py` tries more than ten thousand inputs in all.
MOST = int(os.environ.get("QWEN_MINI_FUZZ", "150"))
OTHERS = ["text", "", "../..", [], {}, None, True, -1, 0, 1e400, 10**30, [[[]]]]
READABLE = (CourseError, ValueError, FileNotFoundError)


def places(value, path=()):
    """The way to every value of a JSON document."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


def swapped(document, most, seed=0):
    """The document with one value swapped, at most `most` of all ways."""
    ways = [(place, other) for place in places(document) for other in OTHERS]
    for place, other in random.Random(seed).sample(ways, min(most, len(ways))):
        changed = {"": copy.deepcopy(document)}
        inside = changed
        for key in ("", *place)[:-1]:
            inside = inside[key]
        inside[("", *place)[-1]] = other
        yield changed[""], place, other


def accepts(read, document, most=MOST):
    """`read` each swapped document; whatever it raises must be a sentence for a reader."""
    for changed, place, other in swapped(document, most):
        try:
            read(changed)
        except READABLE as error:
            assert str(error) and "\n" not in str(error).strip(), (place, other, error)
        except RecursionError:
            raise
        except Exception as error:
            pytest.fail(f"{place} = {other!r:.30}: {error!r}")


def survives(read, path, good, most=MOST // 3):
    """`read()` the file at `path` with bytes of it cut off, overwritten, repeated or left out."""
    rng = random.Random(0)
    for _ in range(most):
        start, end = sorted(rng.choices(range(len(good) + 1), k=2))
        noise = rng.randbytes(rng.randrange(1, 9))
        damaged = rng.choice(
            [
                good[:start],
                good[:start] + good[end:],
                good[:start] + noise + good[start + len(noise) :],
                good[:start] + good[start:end] * 2 + good[end:],
            ]
        )
        path.write_bytes(damaged)
        try:
            read()
        except READABLE as error:
            assert str(error) and "\n" not in str(error).strip(), (damaged[:80], error)
        except Exception as error:
            pytest.fail(f"bytes {start} to {end} of {path.name}: {error!r}")


def test_manifests(runs_folder):
    shipped = artifacts.shipped_dir("sft") / "manifest.json"
    path = runs_folder / "quick" / "sft" / "manifest.json"
    path.parent.mkdir(parents=True)

    def find():
        artifacts.settle("quick", "sft")
        artifacts.find_by_key("quick", "sft", "0" * 16)
        artifacts.find("quick", "sft", load_scale("quick").digest)

    def read(document):
        path.write_text(json.dumps(document))
        find()

    accepts(read, json.loads(shipped.read_text(encoding="utf-8")))
    survives(find, path, shipped.read_bytes())


def test_records(tmp_path):
    path = tmp_path / "a.json"
    good = records.sealed({"name": "a", "key": "k", "versions": {}, "tolerance": 0, "seconds": 1.0, "provenance": {},
                           "result": {"x": [1, 2]}})  # fmt: skip

    def read(document):
        path.write_text(json.dumps(document))
        records.read(path)

    accepts(read, good)
    survives(lambda: records.read(path), path, json.dumps(good).encode())


def test_claims_and_times(runs_folder):
    claims.open_notebook("01_toy", "quick", 0)
    claims.claim("two is even", True, value=[1.0])
    path = claims.claims_file("quick", "01_toy")
    good = json.loads(path.read_text())

    def read(document):
        path.write_text(json.dumps(document) + "\n")
        claims.read_claims("quick", "01_toy")

    accepts(read, good)
    survives(
        lambda: claims.read_claims("quick", "01_toy"), path, (json.dumps(good) + "\n").encode()
    )
    state = runs_folder / "quick" / "run_state.json"

    def read_times(document):
        state.write_text(json.dumps(document))
        runner.last_seconds("quick")

    accepts(read_times, {"seconds": {"01_toy": 2.0}})


def test_notebooks(tmp_path):
    path = tmp_path / "15_tasks.ipynb"
    good = json.loads((home() / "notebooks" / path.name).read_text(encoding="utf-8"))
    good["cells"] = good["cells"][:6]

    def load():
        book = nb.Notebook(path)
        _ = book.module, book.code, book.parameters(), book.code_digest

    def read(document):
        path.write_text(json.dumps(document))
        load()

    accepts(read, good)
    survives(load, path, json.dumps(good).encode())


def test_tokenizers(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    good["model"]["merges"] = good["model"]["merges"][:4]
    kept = {name: i for name, i in good["model"]["vocab"].items() if i < 260}
    good["model"]["vocab"] = kept
    good["added_tokens"] = [token | {"id": 260 + i} for i, token in enumerate(good["added_tokens"])]

    def load():
        Tokenizer.from_pretrained(tmp_path).encode("some words")

    def read(document):
        path.write_text(json.dumps(document))
        load()

    read(good)
    accepts(read, good, most=4 * MOST)
    survives(load, path, json.dumps(good).encode())


def test_models(tmp_path):
    Qwen(small_config()).save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good = json.loads(path.read_text(encoding="utf-8"))

    def read(document):
        path.write_text(json.dumps(document))
        Qwen.from_pretrained(tmp_path)

    read(good)
    accepts(read, good)
    survives(lambda: Qwen.from_pretrained(tmp_path), path, json.dumps(good).encode())
    path.write_text(json.dumps(good))
    survives(lambda: Qwen.from_pretrained(tmp_path), weights, weights.read_bytes())


def test_training_states(tmp_path):
    trainer = Trainer(Qwen(small_config()), load_scale("quick").pretraining, 10)
    trainer.step_count = 1
    path = tmp_path / "state.safetensors"
    save_training_state(path, trainer, [{"loss": 1.0}])
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def read(document):
        if isinstance(document, dict):
            save_file(tensors, path, metadata={key: str(value) for key, value in document.items()})
            load_training_state(path, trainer)

    read(header)
    accepts(read, header)
    accepts(lambda text: read(header | {"metrics": json.dumps(text)}), [{"loss": 1.0}])
    save_training_state(path, trainer, [{"loss": 1.0}])
    survives(lambda: load_training_state(path, trainer), path, path.read_bytes())
    for name in list(tensors)[:5]:
        for other in (tensors[name].flatten()[:1], torch.zeros(0)):
            save_file(tensors | {name: other}, path, metadata=header)
            with pytest.raises(CourseError, match="is no training state of this model"):
                load_training_state(path, trainer)


def test_scales(tmp_path):
    lines = ['base = "gpu"', 'start = "own"', *whole_file(load_scale("quick")).splitlines()]
    path = tmp_path / "own.toml"
    values = '"text" [] {} true -1 0 inf nan 1e400 1000000000000000000000000000000 1979-05-27 [[]] {a=1}'.split()
    for number, line in enumerate(lines):
        key, equals, _ = line.partition(" = ")
        for value in values if equals else ():
            path.write_text(
                "\n".join([*lines[:number], f"{key} = {value}", *lines[number + 1 :]]),
                encoding="utf-8",
            )
            try:
                config = load_scale(path)
            except CourseError as error:
                assert "own.toml" in str(error) and "\n" not in str(error).strip()
            else:
                assert config.name == "own"
    survives(lambda: load_scale(path), path, "\n".join(lines).encode())


WORDS = [
    "",
    "-",
    "..",
    "../x",
    "/etc",
    "nosuch",
    "a b",
    "é",
    "-1",
    "0",
    "1e400",
    "9" * 20,
    "\n",
    "%s",
    "--",
    "laptop",
]


def _refuse(*_, **__):
    raise CourseError("the words are right, and it would compute now")


@pytest.mark.parametrize("command", ["plan", "train", "export", "chat", "eval", "verify", "run"])
def test_commands(command, runs_folder, tmp_path, capsys, monkeypatch):
    """A sentence and a code, whatever the words."""
    monkeypatch.setattr("builtins.input", lambda *_: "")
    monkeypatch.chdir(tmp_path)
    if command == "run":
        monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))  # without notebooks
    for place, name in (
        (stages.Stage, "folder"),
        (training, "_prepare"),
        (runner, "run"),
    ):  # words that are right
        monkeypatch.setattr(place, name, _refuse)
    options = {"plan": ["--gpus", "--scale"], "train": ["", "--scale", "--seed"], "export": ["--scale"],
               "chat": ["--stage", "--max-tokens", "--temperature", "--seed"], "verify": [""],
               "eval": ["", "--count", "--shots", "--seed", "--out", "--benchmarks"],
               "run": ["", "--timeout", "--seed", "--scale"]}[command]  # fmt: skip
    lines = [[option, word] for option in options for word in WORDS]
    rng = random.Random(0)
    for _ in range(MOST // 5):  # several at once, and words of any letters
        lines.append([])
        for option in rng.choices(options, k=rng.randrange(1, 4)):
            letters = "".join(map(chr, rng.choices([*range(1, 0x250), 0x1F600, 0xDC80], k=4)))
            lines[-1] += [option, rng.choice([*WORDS, letters])]
    for line in lines:
        words = [command, *line] if line[0] else [command, *line[1:]]
        words += {"export": ["sft", "x"], "eval": ["--seed", "1", "x"]}.get(command, [])
        try:
            code = cli.main(words)
        except SystemExit as end:  # argparse's own sentence
            code = end.code
        said = capsys.readouterr()
        assert code in (0, 1, 2) and "Traceback" not in said.err, words
        assert code == 0 or said.err.strip() or said.out.strip(), words
