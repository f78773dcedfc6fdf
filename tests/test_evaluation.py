"""The harness: scores equal oracles, a killed run ends as one that was not, controls fail, bad requests are refused."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model
from tiny import exercises, passes, refuses

from qwen_mini import evaluation
from qwen_mini.course import CourseError, artifacts, home
from qwen_mini.course.cli import main
from qwen_mini.course.lm_eval_task import export_lm_eval
from qwen_mini.course.nb import Notebook
from qwen_mini.course.statistics import share_interval, standard_errors, wilson_interval
from qwen_mini.evaluation import (
    BENCHMARKS,
    Item,
    Settings,
    bootstrap_interval,
    chance_level,
    choose,
    chosen,
    detectable_difference,
    evaluate,
    given_away,
    option_logprobs,
    option_rows,
    paired_interval,
    pass_at_k,
    right_by_luck,
    suite,
    swapped,
)
from qwen_mini.sft import draw_examples
from qwen_mini.tasks import TASKS, TRAIN_LEVELS, split_of

BASE = artifacts.shipped_dir("long_context")
NOTEBOOK = Notebook(home() / "notebooks" / "21_evaluation.ipynb")


def letters(count=6, choices=(" c", " dd", " eee")):
    """Short items with choices of several lengths."""
    return [Item("letters", f"{i}", f"x{i}", choices, i % len(choices)) for i in range(count)]


# ---------------------------------------------------------------- likelihood
def test_log_likelihoods_are_those_of_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    from qwen_mini.model import Qwen

    ours = Qwen.from_pretrained(BASE).eval()
    for item in suite(3, 1, ["words", "next lines"]):
        rows, first = option_rows(tokenizer, item)
        sums = option_logprobs(ours, rows, [first] * len(rows))
        for ids, ours_sum in zip(rows, sums, strict=True):
            with torch.no_grad():
                log_p = theirs(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
            wanted = sum(log_p[t - 1, ids[t]].item() for t in range(first, len(ids)))
            assert ours_sum == pytest.approx(wanted, abs=1e-5 * (len(ids) - first), rel=1e-5)


def test_a_batch_changes_no_sum(monkeypatch):
    model, rng = tiny_model(), random.Random(0)
    rows = [[rng.randrange(1_000) for _ in range(rng.randint(3, 40))] for _ in range(20)]
    firsts = [rng.randint(1, len(row) - 1) for row in rows]
    together = option_logprobs(model, rows, firsts)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 1)
    alone = option_logprobs(model, rows, firsts)
    assert together == pytest.approx(alone, abs=1e-4)
    whole = [option_logprobs(model, [row], [1])[0] for row in rows]
    split = [
        option_logprobs(model, [row[:f]], [1])[0] if f > 1 else 0.0
        for row, f in zip(rows, firsts, strict=True)
    ]
    assert [a + b for a, b in zip(split, alone, strict=True)] == pytest.approx(whole, abs=1e-3)
    with pytest.raises(ValueError, match="a token of context"):
        option_logprobs(model, [[1, 2]], [0])


def test_choices_begin_where_the_context_ends_and_all_at_one_place(tokenizer):
    for context, choices in [
        ("The key is ", ("123", "45")),
        ("a b c", (" d", " e f")),
        ("win", ("dow", "ter")),
        ("", ("one", "two")),
    ]:
        rows, first = option_rows(tokenizer, Item("x", "x", context, choices))
        before = {tokenizer.decode(row[1:first]) for row in rows}
        assert len(before) == 1 and context.startswith(before.pop()) and first >= 1
        for row, choice in zip(rows, choices, strict=True):
            assert tokenizer.decode(row[1:]) == context + choice and len(row) > first
    rows, first = option_rows(tokenizer, Item("x", "x", "The key is ", ("123", "45")))
    assert tokenizer.decode(rows[0][1:first]) == "The key is"  # the blank belongs to the choices


def test_per_byte_forgives_length():
    item = Item("x", "x", "a", (" b", " bbbb"), 1)
    assert chosen([-4.0, -5.0], item) == 0
    assert chosen([-4.0, -5.0], dataclasses.replace(item, per_byte=True)) == 1
    assert chosen([-4.0, -4.0], item) == 0  # the first of equals


@pytest.mark.parametrize("choices, gold", [((" a",), 0), ((" a", ""), 0), ((" a", " b"), 2)])
def test_an_item_that_cannot_be_scored_is_refused(choices, gold):
    with pytest.raises(ValueError, match="choice"):
        Item("x", "key", "text", choices, gold)


# ---------------------------------------------------------------- statistics
def test_wilson_solves_its_equation_and_equals_published_values():
    for k, n in [(0, 50), (45, 100), (7, 9), (10, 10)]:
        for bound in wilson_interval(k / n, n):
            if 0 < bound < 1:
                z = abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert z == pytest.approx(1.96, abs=1e-6)
    assert wilson_interval(0.45, 100) == pytest.approx((0.356, 0.548), abs=5e-4)
    assert wilson_interval(0, 50) == pytest.approx((0, 0.071), abs=5e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(0, 0),
        lambda: share_interval([]),
        lambda: standard_errors([], 0.5),
        lambda: standard_errors([1], 0.0),
        lambda: standard_errors([1], 1.0),
    ],
)
def test_no_trial_has_no_interval(call):
    with pytest.raises(ValueError, match="trial"):
        call()


@pytest.mark.parametrize("n, c", [(6, 0), (6, 1), (6, 3), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets(n, c):
    samples = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        share = np.mean([any(some) for some in itertools.combinations(samples, k)])
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_the_paper_and_of_bad_numbers():
    assert pass_at_k(200, 13, 10) == pytest.approx(0.497551, abs=1e-6)
    assert pass_at_k(200, 13, 100) == pytest.approx(0.999919, abs=1e-6)
    for n, c, k in [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)]:
        with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
            pass_at_k(n, c, k)


def test_the_bootstrap_covers_what_it_says():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.random(80) < 0.3, draws=300, seed=trial)
        held += low <= 0.3 <= high
    assert 0.90 < held / 200 < 0.985
    values = rng.normal(size=400)
    low, high = bootstrap_interval(values)
    assert (high - low) / 3.92 == pytest.approx(values.std() / 20, rel=0.08)
    samples = np.repeat(values[:, None], 5, 1)  # more samples of the same are no more information
    assert bootstrap_interval(samples) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval([])


def test_paired_differences_are_narrower_than_separate_ones():
    rng = np.random.default_rng(1)
    hard = rng.random(300) < 0.5
    first, second = hard * 1.0, np.where(rng.random(300) < 0.1, 1.0, hard)
    mean, low, high = paired_interval(first, second)
    assert mean == pytest.approx((second - first).mean()) and low <= mean <= high
    alone = [bootstrap_interval(x) for x in (first, second)]
    assert high - low < 0.7 * math.hypot(*(b - a for a, b in alone))
    with pytest.raises(ValueError, match="same questions"):
        paired_interval([1, 0], [1])


def test_a_detectable_difference_is_detected_four_times_of_five():
    n, d, rng = 200, 0.3, np.random.default_rng(0)
    size, found = detectable_difference(n, d), 0
    for _ in range(2_000):
        up, down = rng.multinomial(n, [(d + size) / 2, (d - size) / 2, 1 - d])[:2]
        found += abs(up - down) > 1.96 * math.sqrt(up + down)
    assert 0.76 < found / 2_000 < 0.86
    assert detectable_difference(1, 1.0) == 1
    for bad in [(0, 0.3), (10, 0.0), (10, 1.1)]:
        with pytest.raises(ValueError, match="1 question or more"):
            detectable_difference(*bad)


# ---------------------------------------------------------------- the harness
def mixed():
    """Items of both kinds."""
    some = draw_examples(2, 0, "test", tasks=["story", "to_json"])
    return letters(40) + [Item("asked", e.key, example=e) for e in some]


SMALL = Settings(samples=2, temperature=1.0, max_new_tokens=5, batch_rows=4)

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from test_evaluation import SMALL, mixed, tiny_model
from qwen_mini.evaluation import evaluate
from qwen_mini.tokenizer import Tokenizer
def kill(done, all):
    if done == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate(tiny_model(), Tokenizer.from_pretrained({folder!r}), mixed(), {out!r}, SMALL, kill)
"""


@pytest.mark.parametrize("torn", [0, 7])
def test_a_killed_run_goes_on_and_leaves_the_same_file(tmp_path, tokenizer, torn):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    lines, model = evaluate(tiny_model(), tokenizer, mixed(), whole, SMALL), tiny_model()
    facts = {"path": [*sys.path], "after": 3, "folder": str(BASE), "out": str(broken)}
    done = subprocess.run([sys.executable, "-c", KILLED.format(**facts)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    kept = broken.read_bytes()
    assert whole.read_bytes().startswith(kept) and 0 < len(kept) < len(whole.read_bytes())
    if torn:
        broken.write_bytes(kept[:-torn])
    batches = []
    again = evaluate(model, tokenizer, mixed(), broken, SMALL, lambda *n: batches.append(n))
    assert broken.read_bytes() == whole.read_bytes() and again == lines
    assert evaluate(model, tokenizer, mixed(), broken, SMALL) == lines  # nothing left to do
    assert [line["key"] for line in lines] == [item.key for item in mixed()]
    assert batches[-1][0] == batches[-1][1]


def test_what_is_finished_is_not_computed_again(tmp_path, tokenizer, monkeypatch):
    path, model = tmp_path / "x.jsonl", tiny_model()
    lines = evaluate(model, tokenizer, letters(), path)
    monkeypatch.setattr(evaluation, "score_batch", None)
    assert evaluate(model, tokenizer, letters(), path) == lines


def test_files_of_other_runs_and_damaged_ones_are_refused(tmp_path, tokenizer):
    path, model = tmp_path / "x.jsonl", tiny_model()
    evaluate(model, tokenizer, letters(), path)
    kept = path.read_bytes()
    for other, what in [
        ((tiny_model(1), tokenizer, letters(), path), "other model"),
        ((model, tokenizer, letters(7), path), "other items"),
        ((model, tokenizer, letters(), path, Settings(shots=1)), "other settings"),
    ]:
        with pytest.raises(CourseError, match=what):
            evaluate(*other)
    path.write_bytes(kept.replace(b'"chosen"', b'chosen"', 1))
    with pytest.raises(CourseError, match="damaged"):
        evaluate(model, tokenizer, letters(), path)
    path.write_bytes(b"1\n")
    with pytest.raises(CourseError, match="something else"):
        evaluate(model, tokenizer, letters(), path)
    assert path.read_bytes() == b"1\n"  # somebody's file is left alone


def test_two_processes_do_not_write_one_file(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    body = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from qwen_mini.course.response_log import ResponseLog\n"
        f"ResponseLog({str(path)!r}, {{}}, []).__enter__()"
    )
    with evaluation.ResponseLog(path, {}, []):
        done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
    assert done.returncode == 1 and "is being written" in done.stderr


def test_requests_that_cannot_be_met(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="no key twice"):
        evaluate(model, tokenizer, letters(2) * 2)
    with pytest.raises(ValueError, match="one item or more"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match="needles: .* takes .* tokens, .* context holds 256"):
        evaluate(model, tokenizer, suite(3, 0, ["needles"]))
    with pytest.raises(ValueError, match="no benchmark 'wrds': use some of words"):
        suite(3, 0, ["wrds"])
    with pytest.raises(ValueError, match="1 item or more"):
        suite(0)
    with pytest.raises(ValueError, match="IFEval is asked without solved problems"):
        evaluate(model, tokenizer, suite(2, 0, ["IFEval"]), settings=Settings(shots=1))


def test_verdicts_are_the_verifiers(tokenizer, monkeypatch):
    items, said = mixed()[40:], {}

    def generate(model, prompts, *_, num_return_sequences, **options):
        from qwen_mini.generation import Completion

        texts = [t for i in items for t in (i.example.response, "nothing")]
        said["prompts"] = prompts
        return [Completion([*tokenizer.encode(t), tokenizer.im_end_id], True) for t in texts]

    monkeypatch.setattr(evaluation, "generate", generate)
    lines = evaluation.respond(None, tokenizer, items, Settings(samples=2, shots=2), 0)
    assert [line["correct"] for line in lines] == [[1, 0]] * len(items)
    assert [line["responses"][0] for line in lines] == [i.example.response for i in items]
    text = tokenizer.decode(said["prompts"][0])
    question = items[0].example.messages[-1]["content"]
    assert text.count("<|im_start|>assistant") == 3 and text.count(question) == 1
    assert right_by_luck(items, lines) == [0] * len(items) and chance_level(items, lines) == 0


# ---------------------------------------------------------------- suite and controls
def test_the_suite_is_held_out_distinct_and_the_same_each_time():
    items, again = suite(12, 3), suite(12, 3)
    assert items == again and items != suite(12, 4)
    keys = [(item.benchmark, item.key) for item in items]
    assert len(set(keys)) == len(keys) and {name for name, _ in keys} == set(BENCHMARKS)
    for item in items:
        if item.example:
            e = item.example
            assert split_of(f"{e.task}/{e.key}") == "test" and e.task in TASKS
            assert e.level in BENCHMARKS[item.benchmark].levels
            hard = item.benchmark.startswith("hard")
            assert hard or BENCHMARKS[item.benchmark].levels == TRAIN_LEVELS
        else:
            assert len(set(item.choices)) == len(item.choices)
            assert len(item.choices) == BENCHMARKS[item.benchmark].options
    asked = {task for b in BENCHMARKS.values() for task in b.tasks}
    assert asked == set(TASKS)  # nothing that was taught is left out


@pytest.mark.parametrize("name", ["words", "next lines", "needles"])
def test_the_right_choice_stands_anywhere(name):
    golds = [item.gold for item in suite(200, 0, [name])]
    shares = np.bincount(golds, minlength=4) / len(golds)
    assert shares.min() > 0.12 and shares.max() < 0.40


def test_needles_hold_what_is_asked():
    for item in suite(9, 0, ["needles"]):
        asked = item.context.rsplit("What is the ", 1)[1].split()[0]
        assert f" The {asked} key is {item.choices[item.gold]}." in item.context
        assert all(value in item.context for value in item.choices)


def test_a_wrong_question_brings_every_item_another_context():
    items = suite(8, 0, ["words", "next lines"])
    for item, other in zip(items, swapped(items), strict=True):
        assert other.context != item.context and other.choices == item.choices
        assert other.context in {i.context for i in items if i.benchmark == item.benchmark}


def test_a_model_of_random_weights_is_at_chance(tokenizer):
    model, items = tiny_model(), suite(234, 0, ["words"])
    right = np.mean([line["correct"][0] for line in choose(model, tokenizer, items)])
    assert abs(right - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(items))
    assert chance_level(items, []) == 0.25


def test_leaked_questions_are_found_and_others_are_not():
    items = suite(9, 0, ["instructions"])
    text = evaluation.question_of(items[3])
    documents = ["The weather is fine today and it will stay so for a while, they say. " * 3, text]
    found = given_away(items, documents)
    assert found[3] == 1 and set(found) <= {-1, 1}
    assert given_away(items, documents[:1]) == [-1] * len(items)


# ---------------------------------------------------------------- other programs
def test_the_exported_task_says_all_that_lm_eval_needs(tmp_path):
    yaml = pytest.importorskip("yaml")
    items = suite(4, 0, ["words", "next lines"])
    task = yaml.safe_load(export_lm_eval(items, tmp_path).read_text())
    assert task["output_type"] == "multiple_choice" and task["target_delimiter"] == ""
    rows = [json.loads(line) for line in (tmp_path / "qwen_mini.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows] == [item.gold for item in items]
    assert rows[0]["context"] == f"<|endoftext|>{items[0].context}"
    for some in ([], mixed()):
        with pytest.raises(ValueError, match="only items with choices"):
            export_lm_eval(some, tmp_path)


def test_lm_eval_gives_the_same_log_likelihoods(tmp_path, tokenizer):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from qwen_mini.model import Qwen

    items = suite(12, 0, ["words", "next lines"])
    export_lm_eval(items, tmp_path / "tasks", "course")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    ask = {"tasks": ["course"], "task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    sums, theirs = {}, {}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        model = HFLM(pretrained=str(BASE), dtype=f"float{bits}", device="cpu", batch_size=4)
        found = lm_eval.simple_evaluate(model, **ask)
        samples = sorted(found["samples"]["course"], key=lambda sample: sample["doc_id"])
        theirs[bits] = [float(one[0][0]) for sample in samples for one in sample["resps"]]
        ours, split = (
            Qwen.from_pretrained(BASE, dtype).eval(),
            [option_rows(tokenizer, i) for i in items],
        )
        rows = [row for rows, _ in split for row in rows]
        firsts = [first for rows, first in split for _ in rows]
        sums[bits] = option_logprobs(ours, rows, firsts)
        each = iter(sums[bits])
        for item, sample in zip(items, samples, strict=True):
            of_item = list(itertools.islice(each, len(item.choices)))
            plain, per_byte = (dataclasses.replace(item, per_byte=way) for way in (False, True))
            assert sample["acc"] == (chosen(of_item, plain) == item.gold)
            assert sample["acc_bytes"] == (chosen(of_item, per_byte) == item.gold)
        share = sum(sample["acc_bytes"] for sample in samples) / len(samples)
        assert found["results"]["course"]["acc_bytes,none"] == share
    tokens = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
    off = lambda a, b: max(abs(x - y) / n for x, y, n in zip(a, b, tokens, strict=True))
    assert off(sums[64], theirs[64]) < 1e-6
    assert sums[64] == pytest.approx(theirs[64], rel=1e-6, abs=0)
    assert off(sums[32], theirs[32]) < 1e-5  # two orders of summing, each rounded to 24 bits
    assert off(sums[32], sums[64]) < 1e-5


def test_any_qwen2_folder_can_be_scored_and_a_second_call_reads_the_file(
    tmp_path, tokenizer, capsys
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.Qwen2Config(
        vocab_size=1_024, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(settings).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "responses.jsonl"
    words = ["eval", str(tmp_path / "model"), "--count", "3", "--benchmarks", "words", "code"]
    assert main([*words, "--out", str(out)]) == 0
    said, kept = capsys.readouterr().out, out.read_bytes()
    assert "95 % interval" in said and "25%" in said and kept.count(b"\n") == 1 + 3 + 3
    assert main([*words, "--out", str(out)]) == 0 and out.read_bytes() == kept
    assert main([*words, "--shots", "1", "--out", str(out)]) == 2
    assert "of other settings: delete it" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, tokenizer, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path)]) == 2
    assert "cannot be" in capsys.readouterr().err
    assert main(["eval", str(BASE), "--benchmarks", "mmlu"]) == 2
    assert "no benchmark 'mmlu'" in capsys.readouterr().err


# ---------------------------------------------------------------- exercises
EXERCISES = dict(enumerate(exercises(NOTEBOOK), 1))
WRONG = [
    (1, "return math.ceil(d * (1.96 / size) ** 2)"),  # found half of the time
    (1, "return math.ceil((2.8 / size) ** 2 / 4)"),  # two separate shares
    (1, "return math.ceil(2.8 * d / size)"),
    (2, "n = b + c\nreturn min(1.0, sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n)"),
    (2, "n = b + c\nreturn min(1.0, 2 * math.comb(n, min(b, c)) / 2**n)"),
    (2, "n = b + c\nreturn min(1.0, 2 * sum(math.comb(n, i) for i in range(b + 1)) / 2**n)"),
    (2, "n = b + c\nreturn 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n"),
    (3, "w = np.exp(np.asarray(logprobs))\nreturn w[np.asarray(true, bool)].sum() / w.sum()"),
    (3, "return float(np.argmax(logprobs) in np.flatnonzero(true))"),
    (3, "w = np.asarray(logprobs)\nreturn w[np.asarray(true, bool)].sum() / w.sum()"),
    (4, "return item"),
    (
        4,
        "context = '\\n'.join([item.context, *item.choices, 'Answer:'])\n"
        "return dataclasses.replace(item, context=context, choices=(' A', ' B', ' C', ' D'))",
    ),
    (
        4,
        "listed = [f'{a}.{c}' for a, c in zip('ABCD', item.choices)]\n"
        "return dataclasses.replace(item, context='\\n'.join([item.context, *listed, 'Answer:']),\n"
        "    choices=('A', 'B', 'C', 'D'))",
    ),
]  # fmt: skip


def room():
    """What the exercises find defined above them."""
    items = suite(4, 0, ["words"])
    question = Item("x", "x", "de la", (" maison", " région", " chien", " pomme"), 1)
    space = {name: getattr(evaluation, name) for name in evaluation.__all__}
    space |= {"math": math, "np": np, "dataclasses": dataclasses, "question": question}
    space |= {"asked_of": {"words": items}, "quick": True, "base": tiny_model(), "course": None}
    space["tokenizer"] = evaluation.Tokenizer.from_pretrained(BASE)
    return space


@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_of_an_exercise_passes(number):
    passes(EXERCISES[number], room())


@pytest.mark.parametrize("number, body", WRONG)
def test_a_wrong_answer_is_refused(number, body):
    refuses(EXERCISES[number], body, room())
