"""Goldens: nothing that a chapter computes has moved, and a change that matters would be seen."""

import dataclasses
import functools
import shutil
import sys

import golden_check
import golden_registry
import pytest
import torch
from golden_registry import (
    FOLDER,
    GOLDENS,
    compute,
    computed,
    differences,
    fresh,
    golden,
    plain,
    read,
    report,
    stale,
    versions,
    write,
)

from qwen_mini import corpus, dpo, generation, grpo, long_context, sft, tasks, training
from qwen_mini import reward_model as rewards
from qwen_mini import tokenizer as tok
from qwen_mini.kernels import layers as fast_layers
from qwen_mini.kernels.attention import TiledAttention
from qwen_mini.kernels.cross_entropy import LinearCrossEntropy
from qwen_mini.tasks import Verdict
from qwen_mini.world import needles, problems


# ---------------------------------------------------------------- the goldens themselves
@pytest.mark.parametrize("module", GOLDENS)
def test_nothing_that_a_chapter_computes_has_moved(module):
    message = report(module)
    assert not message, message


@pytest.mark.parametrize("module", GOLDENS)
def test_the_stored_versions_are_those_of_today(module):
    assert not stale(module), stale(module)
    assert not fresh(module), (
        f"not stored yet: {fresh(module)}; python tests/golden_check.py --write {module}"
    )


def test_every_chapter_with_a_version_has_goldens():
    assert set(GOLDENS) == set(versions()) == {path.stem for path in FOLDER.glob("*.json")}


def test_computing_goldens_leaves_threads_and_random_numbers_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    compute("layers", "RMSNorm")
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- changes that must be seen
def moved_by_a_change(module: str, name: str) -> str:
    """The report on one golden, computed now; fails if nothing moved or it lacks a name."""
    stored = read(module)["goldens"]
    message = report(module, {**stored, name: compute(module, name)})
    assert message, f"{module} · {name} did not move"
    assert f"{module} · {name} " in message and "stored" in message and "found" in message
    assert f"raise `{module}` in qwen_mini/course/versions.toml" in message
    assert f"python tests/golden_check.py --write {module}" in message
    return message


@pytest.mark.parametrize(
    "optimizer, module, name",
    [(training.AdamW, "training", "AdamW"), (dpo.OnlineMergingAdamW, "dpo", "online merging")],
)
def test_another_beta_2_of_an_optimiser_is_seen(optimizer, module, name, monkeypatch):
    defaults = tuple(
        (0.9, 0.97) if isinstance(x, tuple) else x for x in optimizer.__init__.__defaults__
    )
    monkeypatch.setattr(optimizer.__init__, "__defaults__", defaults)
    moved_by_a_change(module, name)


@pytest.mark.parametrize(
    "module, name",
    [
        ("training", "steps with Muon"),
        ("training", "steps with AdamW"),
        ("long_context", "steps"),
        ("training", "update"),
        ("sft", "training on rows"),
        ("reward_model", "steps"),
        ("dpo", "steps"),
        ("grpo", "steps, dapo"),
    ],
)
@pytest.mark.parametrize("change", [{"beta2": 0.97}, {"beta1": 0.8}, {"eps": 1e-3}])
def test_other_settings_of_the_optimiser_that_runs_are_seen(module, name, change, monkeypatch):
    usual = training.make_optimizers
    make = lambda named, settings, dtype: usual(
        named, dataclasses.replace(settings, **change), dtype
    )
    monkeypatch.setattr(training, "make_optimizers", make)
    moved_by_a_change(module, name)


GRADIENTS = [
    (fast_layers.FusedRMSNorm, 0, "layers", "RMSNorm"),
    (fast_layers.FusedRMSNorm, 1, "layers", "RMSNorm"),
    (fast_layers.Rotate, 0, "layers", "RoPE"),
    (fast_layers.FusedSwiGLU, 0, "layers", "SwiGLU"),
    (fast_layers.FusedSwiGLU, 1, "layers", "SwiGLU"),
    (TiledAttention, 0, "attention", "tiles"),
    (TiledAttention, 1, "attention", "tiles"),
    (TiledAttention, 2, "attention", "tiles"),
    (LinearCrossEntropy, 0, "training", "linear cross-entropy"),
    (LinearCrossEntropy, 1, "training", "linear cross-entropy"),
    (LinearCrossEntropy, 1, "training", "steps with AdamW"),
    (LinearCrossEntropy, 0, "sft", "training on rows"),
]


@pytest.mark.parametrize("function, place, module, name", GRADIENTS)
def test_a_gradient_s_sign_is_seen(function, place, module, name, monkeypatch):
    usual = function.backward

    def flipped(ctx, *grad):
        found = usual(ctx, *grad)
        found = list(found) if isinstance(found, tuple) else [found]
        found[place] = -found[place]
        return tuple(found)

    monkeypatch.setattr(function, "backward", staticmethod(flipped))
    moved_by_a_change(module, name)


@pytest.mark.parametrize(
    "owner, function, module, names",
    [
        (rewards, "bradley_terry_loss", "reward_model", ["loss", "steps"]),
        (dpo, "dpo_loss", "dpo", ["loss", "steps"]),
    ],
)
def test_a_loss_with_the_other_sign_is_seen(owner, function, module, names, monkeypatch):
    usual = getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *x, **options: -usual(*x, **options))
    for name in names:
        moved_by_a_change(module, name)


@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_a_policy_loss_with_the_other_sign_is_seen(kind, monkeypatch):
    usual = grpo.grpo_loss

    def flipped(*arguments, **options):
        loss, seen = usual(*arguments, **options)
        return -loss, seen

    monkeypatch.setattr(grpo, "grpo_loss", flipped)
    moved_by_a_change("grpo", "loss")
    moved_by_a_change("grpo", f"steps, {kind}")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_verifier_that_accepts_or_refuses_everything_is_seen(name, monkeypatch):
    usual = tasks.TASKS[name]
    for check in (lambda example, found: "", lambda example, found: "no"):
        monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(usual, check=check))
        moved_by_a_change("tasks", f"verdicts of {name}")
    if not usual.answered:
        anything = dataclasses.replace(
            usual, form=lambda text: True, check=lambda example, found: ""
        )
        monkeypatch.setitem(tasks.TASKS, name, anything)
        moved_by_a_change("tasks", f"reasons of {name}")


def test_verdicts_that_bypass_the_checks_are_seen(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "judge", lambda example, outcome: "")
        moved_by_a_change("tasks", "verdicts of function")
    with monkeypatch.context() as patch:
        patch.setattr(
            tasks,
            "final_answer",
            lambda text: text.split("\n")[-1].removeprefix(tasks.ANSWER) or None,
        )
        for name in ("story", "rules", "instructions"):
            moved_by_a_change("tasks", f"verdicts of {name}")
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "consistent", lambda example, text: True)
        moved_by_a_change("tasks", "verdicts of story")
    monkeypatch.setattr(tasks.Task, "verify", lambda task, example, text: Verdict(True, True))
    moved_by_a_change("tasks", "reasons of cycle")


@pytest.mark.parametrize("name", tasks.CONSTRAINTS)
def test_a_constraint_that_always_holds_is_seen(name, monkeypatch):
    always = dataclasses.replace(tasks.CONSTRAINTS[name], holds=lambda text, value: True)
    monkeypatch.setitem(tasks.CONSTRAINTS, name, always)
    moved_by_a_change("tasks", "constraints")


@pytest.mark.parametrize("name", rewards.CRITERIA)
def test_a_criterion_that_always_holds_is_seen(name, monkeypatch):
    usual = rewards.criteria
    monkeypatch.setattr(
        rewards, "criteria", lambda example, text: usual(example, text) | {name: True}
    )
    moved_by_a_change("reward_model", "verdicts on fixed texts")


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("wording", tasks.WORDINGS)
def test_another_wording_of_a_task_is_seen(name, wording, monkeypatch):
    first, *rest = getattr(tasks.TASKS[name], wording)
    task = dataclasses.replace(tasks.TASKS[name], **{wording: (first + " Please.", *rest)})
    monkeypatch.setitem(tasks.TASKS, name, task)
    message = moved_by_a_change("tasks", f"draws of {name}")
    assert f"/{wording}/" in message and "more)" in message


@pytest.mark.parametrize("name", corpus.FAMILIES)
def test_another_wording_of_a_family_is_seen(name, monkeypatch):
    family = corpus.FAMILIES[name]
    monkeypatch.setitem(corpus.FAMILIES, name, lambda rng: (family(rng)[0] + "?", *family(rng)[1:]))
    moved_by_a_change("corpus", f"family {name}")


@pytest.mark.parametrize(
    "owner, constant, change, module, name",
    [
        (problems, "LAYOUTS", lambda x: (x[0] + "!", *x[1:]), "corpus", "task documents"),
        (corpus, "TASK_REPLIES", lambda x: ("{1} {2}",), "corpus", "chat documents"),
        (corpus, "SYSTEM_PROMPTS", lambda x: ("Be kind.", *x[1:]), "corpus", "chat documents"),
        (needles, "WEIGHT_ANSWER", lambda x: 40, "corpus", "needle rows"),
        (needles, "RECALL_SHARE", lambda x: 0.2, "corpus", "needle rows"),
        (long_context, "TASK_SHARE", lambda x: 0.1, "long_context", "needle rows"),
        (rewards, "FILLER", lambda x: ("Well.", *x[1:]), "reward_model", "styles and criteria"),
        (sft, "TRAIN_SYSTEM", lambda x: ("Be kind.", *x[1:]), "sft", "rows"),
        (tok, "TOOLS_HEAD", lambda x: x + "\n", "tokenizer", "chat"),
        (
            generation,
            "sample",
            lambda x: lambda logits, uniform: x(logits, 1 - uniform),
            "generation",
            "sampled",
        ),
        (
            training,
            "learning_rate_factor",
            lambda x: lambda *y: 0.9 * x(*y),
            "training",
            "steps with AdamW",
        ),
        (sft, "pack_best_fit", lambda x: lambda sizes, room: x(sizes, room)[::-1], "sft", "rows"),
    ],
)
def test_another_constant_or_function_is_seen(owner, constant, change, module, name, monkeypatch):
    monkeypatch.setattr(owner, constant, change(getattr(owner, constant)))
    moved_by_a_change(module, name)


# ---------------------------------------------------------------- comparing, storing
def test_a_golden_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(corpus, "task_documents", None)
    with pytest.raises(TypeError) as caught:
        compute("corpus", "task documents")
    assert "The golden corpus · task documents could not be computed" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "stored, found, same",
    [
        (1.0, 1.00009, True),
        (1.0, 1.0002, False),
        (0.0, 5e-8, True),
        (0.0, 5e-7, False),
        (1, 1.00001, True),
        ([100.0, 0.001], [100.0, 0.01], True),
        ([1.0, 0.001], [1.0, 0.0012], False),
        ([1, 2], [1, 3], False),
        ([10_000, 10_001], [10_000, 10_000], False),
        (10_000, 10_001, False),
        (True, 1, False),
        ("a", "b", False),
        ({"a": 1}, {"b": 1}, False),
        ({"a": [1.0, {"b": "x"}]}, {"a": [1.0, {"b": "y"}]}, False),
        ([1], [1, 1], False),
        ([], [], True),
        (None, 0, False),
        ([[1.0], [2.0]], [[1.0], [2.1]], False),
        ("1", 1, False),
    ],
)
def test_floats_may_differ_by_the_tolerance_and_nothing_else_at_all(stored, found, same):
    assert bool(differences(stored, found)) != same


def test_a_golden_holds_plain_finite_data():
    assert plain({1: torch.tensor([1.0, 2.0]), "a": (True, None, torch.tensor(3))}) == {
        "1": [1.0, 2.0],
        "a": [True, None, 3],
    }
    with pytest.raises(TypeError, match="plain data, not set"):
        plain({1, 2})
    with pytest.raises(ValueError, match="finite numbers, not nan"):
        plain([float("nan")])
    with pytest.raises(ValueError, match="two goldens named 'ids'"):
        golden("tokenizer", "ids")(list)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A copy of the stored files, and goldens of `grpo` whose values a test sets."""
    shutil.copytree(FOLDER, tmp_path / "goldens")
    monkeypatch.setattr(golden_registry, "FOLDER", tmp_path / "goldens")
    monkeypatch.setattr(golden_registry, "closure", lambda module: {module})
    values = {"a": 1.0, "b": "x"}
    entries = {name: functools.partial(values.get, name) for name in values}
    monkeypatch.setitem(GOLDENS, "grpo", entries)
    golden_registry.save("grpo", values)
    computed.cache_clear()
    yield values
    computed.cache_clear()


def test_a_moved_golden_is_written_only_with_a_raised_number(stored, monkeypatch):
    stored["a"] = 2.0
    computed.cache_clear()
    with pytest.raises(
        ValueError,
        match="a moved, but neither `grpo` nor a chapter that it imports has a higher number",
    ):
        write("grpo")
    assert read("grpo")["goldens"]["a"] == 1.0
    raised = golden_registry.versions_of("grpo")
    for name in ("grpo", "sft"):  # its own number, or that of a chapter it imports
        raised[name] += 1
        monkeypatch.setattr(golden_registry, "versions_of", lambda module: dict(raised))
        assert f"{name} {raised[name] - 1} → {raised[name]}" in stale("grpo")
        assert write("grpo") == ["grpo"] and not stale("grpo") and not report("grpo")
        assert read("grpo")["goldens"]["a"] == stored["a"]
        stored["a"] += 1
        computed.cache_clear()


def test_new_goldens_are_written_freely_and_unmoved_ones_keep_their_digits(stored):
    stored["a"] = 1.00001
    GOLDENS["grpo"]["c"] = lambda: [1, 2]
    computed.cache_clear()
    assert fresh("grpo") == ["c"]
    write("grpo")
    assert read("grpo")["goldens"] == {"a": 1.0, "b": "x", "c": [1, 2]} and not fresh("grpo")


def test_a_golden_that_is_gone_or_whose_import_moved_is_reported(stored, monkeypatch):
    del GOLDENS["grpo"]["b"]
    monkeypatch.setitem(GOLDENS, "layers", {name: lambda: 0 for name in GOLDENS["layers"]})
    monkeypatch.setattr(golden_registry, "closure", lambda module: {module, "layers"})
    computed.cache_clear()
    message = report("grpo")
    assert "grpo · b no longer computed" in message
    assert "So did goldens of layers, which `grpo` imports: begin there." in message


def test_the_command_says_what_moved(stored, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["golden_check.py", "grpo"])
    assert golden_check.main() == 0 and "grpo: 2 goldens, as stored" in capsys.readouterr().out
    stored["b"] = "y"
    computed.cache_clear()
    assert (
        golden_check.main() == 1 and 'grpo · b /: stored "x", found "y"' in capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", ["golden_check.py", "--write", "grpo"])
    assert golden_check.main() == 1 and "raise the number first" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["golden_check.py", "tokens"])
    with pytest.raises(SystemExit):
        golden_check.main()
    assert "no goldens are known for tokens" in capsys.readouterr().err
