"""Results that somebody types are refused, what no run decides is accepted."""

import json

import pytest

from authoring.digits import typed, typed_numbers

RESULTS = [
    "DPO passes 59.9 % of the problems.",
    "GRPO gains 13 points.",
    "It gains about 9 percentage points on unseen wordings.",
    "It is right in 57 per cent of the cases.",
    "A step takes 1.24 s.",
    "The prompt is read in 42 seconds, dense attention would need 3 hours.",
    "A step takes 350 ms.",
    "It samples 20,700 tokens a second.",
    "| sampling | 20,700 tokens/s |",
    "Training is 2x as fast, and 12 times faster than before.",
    "Held-out text costs 1.63 bits per byte.",
    "The loss ends at 3.42.",
    "* the first\n* the second, with a loss of 3.42 nats",
    "| run | loss |\n|---|---|\n| ours | 3.42 |",
    "| | Qwen2.5 | ours |\n|---|---|---|\n| passes | 90.1 % | 59.9 % |",
    "The rate is 0.7.<!-- constant: a setting --> The loss is 3.42.",
    "<!-- constant: a setting -->\nThe rate is 0.7.\n\nThe loss is 3.42.",
    "In §4.3 the report says more; here the gain is 13.4 points (Table 4).",
    "With Qwen2.5 as a model the loss is 3.42.",
    "Version 2 of the run ends at 3.42",
    "DPO 5.9, GRPO 6.7",
]

CONSTANTS = [
    "There are 22 control tokens, 256 bytes, 151,643 regular tokens and 7 sizes, in 2024.",
    "See §3.3, §4.1–4.2, Table 16 and Figure 2, and arXiv 2412.15115 or [2309.16609](https://arxiv.org/abs/2309.16609).",
    "Python 3.11, 3.12 or 3.13 and PyTorch 2.13; texts under CC BY-SA 4.0, CC BY 4.0, PSF-2.0, ODC-By 1.0, Apache-2.0.",
    "Qwen2.5-0.5B, Qwen2.5 and Llama-3.1, the size 0.5B",
    "$\\beta_2 = 0.95$ and `lr=0.0003`, `59.9 %`",
    "$$\n\\epsilon = 0.000001\n$$",
    "```\n59.9 % of 12 s\n```",
    "The temperature is 0.7.<!-- constant: a setting -->",
    "<!-- constant: settings -->\n| temperature | top-p |\n|---|---|\n| 0.7 | 0.8 |",
    "<!-- report: Table 1 -->\n\nIt reads 0.5 to 72 billion, 60.5 %.",
    "| | Qwen2.5 | ours |\n|---|---|---|\n| passes | 90.1 % | fewer |",
    "GRPO gains <!-- n:grpo -->13.4<!-- /n --> points.",
    "Under a minute each; under 4 GiB. It climbs 4 times.",
    "> **Pitfall · a base model.** It goes on.",
]


@pytest.mark.parametrize("text", RESULTS)
def test_a_typed_result_is_found(text):
    assert len(list(typed(text))) == 1


@pytest.mark.parametrize("text", CONSTANTS)
def test_what_no_run_decides_passes(text):
    assert list(typed(text)) == []


def test_the_result_and_its_sentence_are_quoted():
    assert list(typed("It works. The loss\nends at 3.42, as it should.")) == [
        ("3.42", "The loss ends at 3.42, as it should.")
    ]


@pytest.fixture
def project(tmp_path):
    """A project of a notebook, a README and a page, with what each says."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "docs").mkdir()

    def write(start="", corpus="", readme="", page=""):
        for name, text in [("00_start", start), ("07_corpus", corpus)]:
            cells = [
                {"cell_type": "markdown", "metadata": {}, "source": [text]},
                {"cell_type": "code", "metadata": {}, "source": "print(0.12)", "outputs": []},
            ]
            path = tmp_path / "notebooks" / f"{name}.ipynb"
            path.write_text(json.dumps({"cells": cells, "metadata": {}}), encoding="utf-8")
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
        (tmp_path / "docs" / "page.md").write_text(page, encoding="utf-8")
        return typed_numbers(tmp_path)

    return write


def test_notebooks_readme_and_docs_are_read_and_named(project):
    assert project() == []
    problems = project("It gains 13.4 points.", "By 3 %.", "It takes 3 s.", "It is 2x as fast.")
    assert [problem.split(" types ")[0] for problem in problems] == [
        "notebooks/00_start.ipynb",
        "notebooks/07_corpus.ipynb",
        "README.md",
        "docs/page.md",
    ]
    assert '"13.4 points" in "It gains 13.4 points."' in problems[0] and "constant" in problems[0]


def test_a_generated_page_is_left_alone(project):
    assert project(page="<!-- generated -->\nIt gains 13.4 points.") == []


@pytest.mark.parametrize(
    "text",
    [
        "It gains 12 pp.",
        "About 3x the loss.",
        "It reads 5 million tokens per second.",
        "Twice as fast as before.",
        "A rate of .53 here.",
    ],
)
def test_other_spellings_of_results(text):
    assert list(typed(text))


def test_a_reason_may_hold_any_sign():
    assert not list(typed("It holds 12 % of them <!-- constant: a > b -->. And more."))
