"""Data quality: MinHash, scores, mixtures, decontamination against plain versions and planted truth."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from tiny import exercises, passes, refuses

from qwen_mini.course import home, load_scale
from qwen_mini.course.nb import Notebook
from qwen_mini.course.proxies import Proxies
from qwen_mini.course.regmix import read_runs
from qwen_mini.data_quality import (
    TestIndex,
    all_scores,
    best_shares,
    decontaminate,
    draw_mixtures,
    fit_head,
    fit_mixture_law,
    mixture_features,
    near_duplicates,
    quality_score,
    rebalance,
    verify_arithmetic,
    within_epochs,
)
from qwen_mini.kernels.ensemble import Ensemble, EnsembleAdamW, rows_of, windows_of
from qwen_mini.kernels.overlap import lcs_lengths
from qwen_mini.kernels.text_scores import MODEL, Reference, model_scores, softmax_regression
from qwen_mini.kernels.words import blocks, ngrams, signatures, split_words
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.world import noise as world_noise
from qwen_mini.world.crawl import PARTS, counts, crawl_of, labelled_texts, origins, split_parts
from qwen_mini.world.noise import careless, edited, found_texts, mojibake, noise_texts, passages
from qwen_mini.world.problems import FAMILIES

TestIndex.__test__ = False  # a class of the chapter, not of pytest
VOCABULARY = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou ") if b != " "] + [
    a + b + c for a, b, c in itertools.product("bdfgklmn", "aeiou", "rstlnm")
]


def text_of(words: int, seed) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


# ---------------------------------------------------------------- words and n-grams
def test_words_equal_a_regular_expression():
    texts = ["The cat—sat. ON", "", "l'élève, ça 3,14", "ÀÉ àé", "...", "a\nb\tc", "x" * 300]
    words = split_words(texts)
    plain = [re.findall(r"\w+", text.lower()) for text in texts]
    assert np.diff(words.starts).tolist() == [len(p) for p in plain]
    flat = [word for p in plain for word in p]
    same = words.hashes[:, None] == words.hashes
    assert same.tolist() == [[a == b for b in flat] for a in flat]


def test_every_chinese_character_is_a_word_and_punctuation_is_none():
    assert np.diff(split_words(["大语言模型。你好，world"]).starts).tolist() == [8]
    one, other = split_words(["The U.K.'s"]).hashes, split_words(["the  u k s"]).hashes
    assert one.tolist() == other.tolist()


def test_ngrams_stay_inside_a_text():
    texts = ["a b c", "d e", "", "b c"]
    hashes, places = ngrams(split_words(texts), 2)
    assert places.tolist() == [0, 1, 3, 5]
    assert hashes[1] == hashes[3] and len(set(hashes.tolist())) == 3
    assert ngrams(split_words(["a"]), 5)[0].size == 0


def test_blocks_hold_little_and_lose_nothing():
    endless = (f"text {i}" for i in itertools.count())
    first = next(blocks(endless, 100))
    assert first == [f"text {i}" for i in range(len(first))] and len(first) < 20


# ---------------------------------------------------------------- MinHash
def jaccard(a: str, b: str) -> float:
    sets = [set(zip(*(t.split()[i:] for i in range(5)), strict=False)) for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_jaccard():
    text = text_of(300, 0)
    copies = [
        edited(text, share, VOCABULARY, random.Random(i))
        for i, share in enumerate([0.02, 0.1] * 20)
    ]
    estimates = (signatures(copies) == signatures([text])).mean(1)
    errors = estimates - [jaccard(text, copy) for copy in copies]
    assert abs(errors.mean()) < 0.02 and errors.std() < 0.06


def test_signatures_agree_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    text = text_of(200, 1)
    copy = edited(text, 0.08, VOCABULARY, random.Random(1))
    theirs = []
    for one in (text, copy):
        sketch = datasketch.MinHash(num_perm=128)
        for words in zip(*(one.split()[i:] for i in range(5)), strict=False):
            sketch.update(" ".join(words).encode())
        theirs.append(sketch)
    ours = signatures([text, copy])
    true = jaccard(text, copy)
    for estimate in ((ours[0] == ours[1]).mean(), theirs[0].jaccard(theirs[1])):
        assert abs(estimate - true) < 4 * np.sqrt(0.25 / 128)


def test_near_duplicates_names_the_first_of_a_group():
    texts = [text_of(150, i) for i in range(40)]
    copies = [edited(texts[7], 0.03, VOCABULARY, random.Random(i)) for i in range(5)]
    found = list(near_duplicates([*texts, *copies, texts[3], "short", "short", ""]))
    assert found == [-1] * 40 + [7] * 5 + [3, -1, 46, -1]


def test_near_duplicates_reads_an_endless_stream():
    stream = near_duplicates(text_of(400, i % 50) for i in itertools.count())
    found = list(itertools.islice(stream, 500))
    assert found[:50] == [-1] * 50 and found[50:] == [i % 50 for i in range(50, 500)]


@pytest.mark.parametrize("threshold", [0, 1.5, -1])
def test_a_threshold_that_is_no_share(threshold):
    with pytest.raises(ValueError, match="share of common n-grams"):
        list(near_duplicates(["a"], threshold))


# ---------------------------------------------------------------- scores and head
@pytest.fixture(scope="module")
def parts():
    """Two domains that differ in their words, in the parts of a crawl."""

    class Text(str):
        text = property(str)

    rng = random.Random(0)
    topics = {d: [rng.sample(VOCABULARY, 40) for _ in range(12)] for d in ("python", "wiki_en")}
    documents = {
        domain: [
            Text(
                " ".join(
                    w + rng.choice(("", "", ",", ".")) for w in rng.choices(rng.choice(lists), k=90)
                )
            )
            for _ in range(2_000)
        ]
        for domain, lists in topics.items()
    }
    return split_parts(documents)


def test_scores_are_finite_and_know_the_domain(parts):
    reference = Reference(parts["seed"])
    texts = [
        *parts["pool"]["python"][:50],
        *parts["pool"]["wiki_en"][:50],
        "",
        "...",
        "大" * 30,
        "x",
    ]
    scores, domains = reference.scores(texts)
    assert scores.shape == (104, 19) and np.isfinite(scores).all()
    assert (domains[:100] == np.repeat([0, 1], 50)).mean() > 0.95


def test_scores_do_not_depend_on_neighbours(parts):
    reference = Reference(parts["seed"])
    texts = parts["pool"]["python"][:6]
    together = reference.scores(texts)[0]
    alone = np.concatenate([reference.scores([text])[0] for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_the_filter_finds_planted_noise(parts):
    reference = Reference(parts["seed"])
    clean = [t for texts in parts["source"].values() for t in texts]
    noise = noise_texts(parts["source"], parts["source"], 20, 0, 0)
    texts = clean + [t for group in noise.values() for t in group]
    kinds = ["clean"] * len(clean) + [k for k, group in noise.items() for _ in group]
    scores, domains = reference.scores(texts)
    head = fit_head(scores, domains, kinds)
    unseen, others = (
        [t for name in names for texts in parts[name].values() for t in texts]
        for names in (("tune", "choose", "judge"), ("pool",))
    )
    head = head.keeping(0.9, *all_scores(unseen, reference))
    assert (quality_score(unseen, reference, head) >= 0).mean() == pytest.approx(0.9, abs=0.02)
    fresh = noise_texts(parts["pool"], parts["writers"], 20, 1, 1)
    # 0.9 was asked for. Which noise the head has met depends on the files of this installation; with 800 texts for the
    # threshold and 1,200 to judge it the share has a standard error of 0.014 (with 50 and 80 it was 0.055)
    assert (quality_score(others, reference, head) > 0).mean() > 0.85
    for kind in ("keyword spam", "mojibake", "page parts", "code tables"):
        assert (quality_score(fresh[kind], reference, head) > 0).mean() < 0.3, kind


def test_model_scores_equal_those_of_one_text_at_a_time():
    rng, sizes = np.random.default_rng(0), torch.arange(50).float() + 1
    torch.manual_seed(0)
    model = Qwen(SHAPE).eval()
    rows = [rng.integers(0, 50, n).tolist() for n in (16, 5, 2, 9)]
    found = model_scores(model, rows, sizes, batch=3)
    assert found.shape == (4, len(MODEL))
    for row, scores in zip(rows, found, strict=True):
        np.testing.assert_allclose(model_scores(model, [row], sizes)[0], scores, atol=1e-4)
        ids = torch.tensor([row])
        with torch.no_grad():
            nats = model(ids[:, :-1], targets=ids[:, 1:]).item() * (len(row) - 1)
        assert scores[0] == pytest.approx(nats / np.log(2) / sizes[row[1:]].sum().item(), rel=1e-4)


def test_softmax_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 4)), rng.integers(0, 3, 200)
    w = torch.tensor(softmax_regression(x, y, steps=500), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(torch.tensor(x) @ w, torch.tensor(y), reduction="sum")
    (loss + w.square().sum() / 2).backward()
    assert w.grad.abs().max() < 1e-2


def test_empty_input_is_one_sentence(parts):
    with pytest.raises(ValueError, match="the clean seed is empty"):
        Reference({"a": []})
    with pytest.raises(ValueError, match="the clean seed is empty"):
        Reference({})
    with pytest.raises(ValueError, match="clean texts and noise"):
        fit_head(np.ones((3, 2)), np.zeros(3, int), ["clean"] * 3)
    with pytest.raises(ValueError, match="the corpus is empty"):
        quality_score([], None, None)


# ---------------------------------------------------------------- mixtures
def test_the_mixture_law_recovers_itself():
    rng = np.random.default_rng(0)
    shares = draw_mixtures(np.ones(4) / 4, 200)
    assert np.allclose(shares.sum(1), 1) and shares.min() >= 0
    true = rng.standard_normal((9, 4))
    law = fit_mixture_law(shares, mixture_features(shares) @ true, decay=1e-8)
    np.testing.assert_allclose(
        mixture_features(shares) @ law, mixture_features(shares) @ true, atol=1e-3
    )


def test_best_shares_finds_the_minimum():
    shares = draw_mixtures(np.ones(3) / 3, 100)
    wanted = np.array([0.6, 0.3, 0.1])
    losses = -np.log(shares + 0.01) * wanted * 3  # lowest where shares are as wanted
    best = best_shares(fit_mixture_law(shares, losses), np.ones(3) / 3)
    assert abs(best - wanted).max() < 0.08


def test_rebalance_gives_shares_in_bytes():
    documents = {"a": ["x" * 99] * 50, "b": ["y" * 199] * 10}
    texts = rebalance(documents, {"a": 0.25, "b": 0.75}, 8_000, seed=1)
    sizes = [sum(len(t) + 1 for t in texts if t[0] == c) for c in "xy"]
    assert sizes == [2_000, 6_000] and texts == rebalance(
        documents, {"a": 0.25, "b": 0.75}, 8_000, 1
    )


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5, "b": 0.6}, "sum to 1, but sum to 1.1"),
        ({}, "sum to 1"),
        ({"a": 1.5, "b": -0.5}, "0 or more"),
        ({"a": 0.5, "c": 0.5}, "'c' has a share but no text"),
        ({"a": 0.0, "b": 1.0}, "repeat its text 50.0 times"),
    ],
)
def test_shares_that_cannot_be(shares, message):
    with pytest.raises(ValueError, match=message):
        rebalance({"a": ["x" * 9] * 1_000, "b": ["y" * 19]}, shares, 1_000)


def test_within_epochs_cuts_what_would_repeat_too_much():
    documents = {"a": ["x" * 99] * 100, "b": ["y" * 99], "c": ["z" * 99] * 100}
    shares = within_epochs({"a": 0.2, "b": 0.6, "c": 0.2}, documents, 10_000)
    assert sum(shares.values()) == pytest.approx(1) and shares["b"] < 0.041
    assert shares["a"] == pytest.approx(shares["c"])
    rebalance(documents, shares, 10_000)
    with pytest.raises(ValueError, match="too small"):
        within_epochs({"b": 1.0}, documents, 10_000)


# ---------------------------------------------------------------- synthetic data
def test_the_verifier_accepts_truth_and_refuses_most_slips():
    rng = random.Random(0)
    problems = [
        FAMILIES[rng.choice(["addition", "subtraction", "multiplication"])](rng) for _ in range(400)
    ]
    assert all(verify_arithmetic(*problem) for problem in problems)
    assert sum(verify_arithmetic(*careless(problem, rng)) for problem in problems) < 20
    assert not verify_arithmetic("What now?", "", "3")


# ---------------------------------------------------------------- decontamination
def lcs_plain(a, b) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = (
            table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        )
    return table[-1][-1]


def test_lcs_equals_the_table():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 5, (40, 11)), rng.integers(1, 5, (40, 19))
    assert lcs_lengths(a, b).tolist() == [lcs_plain(x, y) for x, y in zip(a, b, strict=True)]
    a[:, 8:], b[:, 15:] = 0, 0  # padding matches nothing
    assert lcs_lengths(a, b).tolist() == [
        lcs_plain(x[:8], y[:15]) for x, y in zip(a, b, strict=True)
    ]


ITEM = [f"item{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (ITEM, True),
        (ITEM[:13], True),  # the shorter one counts
        (ITEM[:12], False),  # below 13 words
        (ITEM[:24] + ["x"] * 16, True),  # 60 % of 40
        (ITEM[:23] + ["x"] * 17, False),
        ([w if i % 10 else "x" for i, w in enumerate(ITEM)], True),  # nine of ten
        ([w if i % 2 else "x" for i, w in enumerate(ITEM)], False),
        ([w.upper() + "," for w in ITEM], True),  # case and punctuation
        (["before"] * 500 + ITEM + ["after"] * 3_000, True),
        ([], False),
    ],
)
def test_the_rule_of_the_report(words, found):
    test = " ".join(ITEM)
    assert list(decontaminate([" ".join(words)], [text_of(30, 1), test])) == [1 if found else -1]


def test_a_long_document_is_not_flagged_by_chance():
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 3_001)
    draw = lambda n: " ".join(f"w{i}" for i in rng.choice(3_000, n, p=p / p.sum()))
    items, documents = [draw(25) for _ in range(200)], [draw(5_000) for _ in range(40)]
    assert max(decontaminate(documents, items)) == -1


@pytest.mark.parametrize(("share", "least"), [(0.0, 1.0), (0.05, 0.99), (0.1, 0.95)])
def test_recall_of_edited_copies(share, least):
    rng = random.Random(0)
    items = [text_of(rng.randint(20, 60), i) for i in range(300)]
    leaks = (
        f"{text_of(30, i + 1_000)} {edited(item, share, ['foo', 'bar'], rng)} {text_of(30, i + 2_000)}"
        for i, item in enumerate(items)
    )
    found = list(decontaminate(leaks, items))
    assert np.mean([f == i for i, f in enumerate(found)]) >= least


def test_a_corpus_larger_than_memory_is_read_in_blocks():
    item = " ".join(ITEM)
    stream = decontaminate(
        (item if i == 700 else text_of(200, i) for i in itertools.count()), [item]
    )
    found = list(itertools.islice(stream, 1_000))
    assert found[700] == 0 and sum(f >= 0 for f in found) == 1


def test_boilerplate_of_many_items_is_still_found():
    items = [f"{' '.join(ITEM[:20])} number{i} other{i}" for i in range(500)]
    assert next(decontaminate([items[-1]], items)) >= 0


def test_bad_rules_and_empty_tests():
    with pytest.raises(ValueError, match="an index needs test items"):
        list(decontaminate(["a"], []))
    with pytest.raises(ValueError, match="n = 0"):
        TestIndex(["a"], 0)
    with pytest.raises(ValueError, match="share in"):
        list(decontaminate(["a"], ["b"], share=0))
    assert list(decontaminate(["a b c"], ["d"])) == [-1]


# ---------------------------------------------------------------- members with data of their own
SHAPE = ModelConfig(50, 16, 32, 1, 2, 2, 8, 16, 1_000.0, tie_word_embeddings=True)


def members(count: int) -> list[Qwen]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(Qwen(SHAPE))
    return made


def test_members_with_windows_and_weights_of_their_own_are_qwens():
    models, rng = members(3), torch.Generator().manual_seed(0)
    ensemble = Ensemble(models)
    windows = torch.randint(0, 50, (3, 2, 17), generator=rng)
    weights = torch.rand((3, 2, 16), generator=rng)
    plain = ensemble.losses(windows[..., :-1], windows[..., 1:])
    weighed, gradients = ensemble.gradients(windows[..., :-1], windows[..., 1:], weights)
    shared, right = ensemble.token_scores(windows[1], rows=1)
    names = list(ensemble.parameters)
    for i, model in enumerate(models):
        want = model(windows[i, :, :-1], targets=windows[i, :, 1:])
        torch.testing.assert_close(plain[i], want, rtol=1e-5, atol=1e-5)
        logits = model(windows[i, :, :-1])
        nll = torch.nn.functional.cross_entropy(logits.mT, windows[i, :, 1:], reduction="none")
        want = (nll * weights[i]).sum() / weights[i].sum()
        torch.testing.assert_close(weighed[i], want.detach(), rtol=1e-5, atol=1e-5)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(want, [parameters[name] for name in names])
        flat = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(gradients[i], flat, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            logits = model(windows[1, :, :-1])
        nll = torch.nn.functional.cross_entropy(logits.mT, windows[1, :, 1:], reduction="none")
        torch.testing.assert_close(shared[i], nll, rtol=1e-4, atol=1e-4)
        assert torch.equal(right[i], logits.argmax(-1) == windows[1, :, 1:])


def test_shared_ids_are_everybodys_own():
    ensemble, windows = Ensemble(members(2)), torch.randint(0, 50, (3, 17))
    each = windows.expand(2, -1, -1)
    found = [ensemble.gradients(w[..., :-1], w[..., 1:]) for w in (windows, each)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_members_do_not_touch_each_other():
    models, data = members(2), torch.randint(0, 50, (5, 2, 4, 9))
    both, alone = Ensemble(models), Ensemble(models[1:])
    for ensemble, rates, part in ((both, [1e-2, 3e-3], data), (alone, [3e-3], data[:, 1:])):
        adamw = EnsembleAdamW(ensemble)
        for windows in part:
            _, gradients = ensemble.gradients(windows[..., :-1], windows[..., 1:])
            adamw.step(gradients, torch.tensor(rates))
    torch.testing.assert_close(both.weights[1], alone.weights[0], rtol=1e-4, atol=1e-6)


def test_half_precision_computes_and_full_precision_stores():
    ensemble, windows = Ensemble(members(2), torch.bfloat16), torch.randint(0, 50, (2, 3, 17))
    losses, gradients = ensemble.gradients(windows[..., :-1], windows[..., 1:])
    exact = Ensemble(members(2)).losses(windows[..., :-1], windows[..., 1:])
    assert gradients.dtype == ensemble.weights.dtype == torch.float32
    torch.testing.assert_close(losses, exact.detach(), rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([text_of(400, i) for i in range(20)], 300).save_pretrained(folder)
    return Proxies(folder, load_scale("quick"))


def test_proxies_learn_what_their_text_says(proxies):
    texts = {"a": [text_of(200, i) for i in range(8)], "b": ["one two three four " * 40] * 4}
    ensemble, epochs = proxies.compare(texts, 4_096, [0, 1], factor=4)
    streams = proxies.streams(texts)
    bits = proxies.bits_per_byte(ensemble, streams).reshape(2, 2, 2)  # (arms, seeds, streams)
    assert (bits[0, :, 0] < bits[1, :, 0]).all() and (bits[1, :, 1] < bits[0, :, 1]).all()
    assert epochs == pytest.approx([4_096 / len(stream) for stream in streams.values()])


def test_windows_of_a_mixture_have_its_shares(proxies):
    streams = {"a": np.zeros(20_000, np.uint16), "b": np.ones(3_000, np.uint16)}
    windows = proxies.mixed(streams, [0.75, 0.25], 51_200, seed=1)
    assert windows.shape == (400, 129) and abs(windows[:, 0].mean() - 0.25) < 0.07
    assert windows.tolist() == proxies.mixed(streams, [3, 1], 51_200, seed=1).tolist()
    with pytest.raises(ValueError, match="100 are too few"):
        proxies.mixed(streams, [0.5, 0.5], 100, seed=0)
    assert {len(s) for s in proxies.heldout({"a": [text_of(900, 0)] * 9}, 100).values()} == {512}


def test_windows_cover_a_stream_before_any_comes_again():
    stream = np.arange(101)
    assert rows_of(stream, 10).shape == (10, 11) and rows_of(stream[:5], 10).shape == (1, 11)
    drawn = windows_of(stream, 25, 10, 0)[:, 0]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(0, 100, 10))


# ---------------------------------------------------------------- noise
def test_noise_is_what_it_says(parts):
    assert sorted(noise_texts(parts["source"], {}, 3, 0, 0)["shuffled words"][0].split())
    assert mojibake("déjà vu, très bien, où ça, à bientôt", random.Random(0)).count("Ã") >= 5
    rows = crawl_of(parts, 20_000, 5, 0)
    kinds = {kind for _, _, kind in rows}
    assert {"clean", "near-copies", "fluent junk", "mojibake"} <= kinds
    json.dumps(rows)
    facts = counts([text for text, _, _ in rows], [kind for _, _, kind in rows])
    assert sum(f["documents"] for f in facts.values()) == len(rows) and set(facts) == kinds
    found = origins(["é", "b", "c"], ["clean", "near-copies", "licences"])
    assert found == {"documents": 3, "kB": 0.004, "clean": 1, "near-copies": 1, "noise": 1}


def test_documents_serve_one_purpose(parts):
    """Whole documents go to one part, and the filter learns from none that the crawl or its writers use."""
    assert set(parts) == set(PARTS)
    texts = {part: {t for found in parts[part].values() for t in found} for part in parts}
    for one, other in itertools.combinations(parts, 2):
        assert not texts[one] & texts[other]
    known, kinds = labelled_texts(parts, 30, 5, 0)
    crawl = {text for text, _, _ in crawl_of(parts, 20_000, 5, 0)}
    assert len(known) == len(kinds) and not set(known) & crawl
    made = {w for t, k in zip(known, kinds, strict=True) if k == "clean" for w in [t]}
    assert made <= texts["source"]
    with_gaps = [t for t, k in zip(known, kinds, strict=True) if k == "fluent junk"]
    pairs = {p for t in texts["source"] for p in itertools.pairwise(t.split(" "))}
    assert all(set(itertools.pairwise(t.split(" "))) & pairs for t in with_gaps)


def test_files_of_noise_are_split_with_their_copies(tmp_path, monkeypatch):
    """A licence in many packages, with other names in it, is one document, and on one side."""
    monkeypatch.setattr(world_noise.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    for i in range(30):
        folder = tmp_path / f"package{i}.dist-info"
        folder.mkdir()
        body = f"terms of licence {'abcdefghij'[i % 10]} " * 60
        (folder / "LICENSE").write_text(f"Copyright (c) {1990 + i} Author {i}\n{body}")
    halves = [found_texts("licences", 99, random.Random(0), half) for half in (0, 1)]
    marks = [{re.search(r"licence (\w)", t)[1] for t in half} for half in halves]
    assert not marks[0] & marks[1] and marks[0] | marks[1] == set("abcdefghij")


def test_passages_have_20_to_60_words_of_one_text(parts):
    texts = parts["pool"]["python"]
    found = passages(texts, 20, random.Random(0))
    assert all(20 <= len(p.split()) <= 60 for p in found) and len(found) == 20
    assert all(any(p in " ".join(t.split()) for t in texts) for p in found)


# ---------------------------------------------------------------- exercises
BOOK = Notebook(home() / "notebooks" / "10_data_quality.ipynb")
EXERCISES = exercises(BOOK)
WRONG = [
    (0, "return (1 / 128) ** (1 / r)"),
    (0, "return (r / 128) ** (1 / r)"),  # the rule of thumb, not the solution
    (0, "return (1 - 0.5 ** (1 / 128)) ** (1 / r)"),
    (0, "return 1 - 0.5 ** (r / 128)"),
    (1, "return lcs_plain(train, test) >= 13"),
    (1, "return lcs_plain(train, test) >= 0.6 * min(len(train), len(test))"),
    (1, "c = lcs_plain(train, test); return c >= 13 and c >= 0.6 * max(len(train), len(test))"),
    (1, "c = lcs_plain(train, test); return c >= 13 and c >= 0.6 * len(test)"),
    (1, "c = lcs_plain(train, test); return c >= 13 and c >= 0.6 * len(train)"),
    (1, "c = lcs_plain(train, test); return c > 13 and c >= 0.6 * min(len(train), len(test))"),
    (1, "c = lcs_plain(train, test); return c >= 13 and c > 0.6 * min(len(train), len(test))"),
    (1, "c = lcs_plain(train, test); return c >= 13 or c >= 0.6 * min(len(train), len(test))"),
    (
        1,
        "c = len(set(train) & set(test)); return c >= 13 and c >= 0.6 * min(len(train), len(test))",
    ),
    (2, "return text.count('harbour') / 10"),
    (2, "return min(1.0, len(text) / 1_000)"),
    (2, "words = text.lower().split(); return len(set(words)) / max(1, len(words))"),
    (2, "words = text.lower().split(); return 1 - len(set(words)) / max(1, len(words))"),
    (2, "w = [x for x in text.split() if len(x) > 5]; return 1 - len(set(w)) / max(1, len(w))"),
    (2, r"w = re.findall(r'\w+', text.lower()); return 1 - len(set(w)) / max(1, len(w))"),
    (2, "return 1 - len(set(text)) / max(1, len(text))"),
]


def room() -> dict:
    """What the exercises find defined above them."""
    space = {"itertools": itertools, "np": np, "re": re}
    exec(next(code for code in BOOK.code if "def lcs_plain(" in code).split("\n\n\n")[0], space)
    return space


@pytest.mark.parametrize("number", range(3))
def test_the_solution_of_an_exercise_passes(number):
    passes(EXERCISES[number], room())


@pytest.mark.parametrize("number, body", WRONG)
def test_a_wrong_answer_is_refused(number, body):
    refuses(EXERCISES[number], body, room())


# ---------------------------------------------------------------- RegMix's published runs
@pytest.fixture
def regmix(tmp_path):
    """A folder of files in RegMix's format, whose losses follow the law, and the cell's function."""
    code = next(code for code in BOOK.code if "def ranks_carry(" in code)
    space = {"np": np, "read_runs": read_runs, "fit_mixture_law": fit_mixture_law}
    space |= {"mixture_features": mixture_features}
    exec(next(code for code in BOOK.code if "def spearman(" in code).split("\n\n\n")[0], space)
    exec(code.split("if os.environ")[0], space)
    for split, size, rows in (("train", "1m", 40), ("test", "1B", 20)):
        shares = draw_mixtures(np.ones(3) / 3, rows, seed=rows)
        losses = -np.log(shares + 0.01) @ [0.6, 0.3, 0.1]
        lines = [",".join(map(str, (i, *row))) for i, row in enumerate(shares)]
        write = lambda kind, text, at=(split, size): (
            tmp_path / f"{at[0]}_{kind}_{at[1]}.csv"
        ).write_text(text)
        write("mixture", "\n".join(["index,train_a,train_b,train_c", *lines]))
        lines = [f"{i},9,{loss}" for i, loss in enumerate(losses)]
        write("pile_loss", "\n".join(["index,other_val_loss,x_pile_cc_val_loss", *lines]))
    return tmp_path, space["ranks_carry"]


def test_published_runs_are_read_and_ranked(regmix):
    folder, ranks_carry = regmix
    assert ranks_carry(folder) > 0.95


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("train_mixture_1m.csv", None, "train_mixture_1m.csv is no table of numbers"),
        ("test_mixture_1B.csv", "index,a\n0,many\n", "test_mixture_1B.csv is no table of numbers"),
        ("test_pile_loss_1B.csv", "index,loss\n0,1\n", "no column that ends in 'pile_cc_val_loss'"),
        (
            "train_pile_loss_1m.csv",
            "index,pile_cc_val_loss\n0,1\n",
            "a row of shares and one of losses",
        ),
    ],
)
def test_other_files_than_the_published_ones(regmix, file, text, message):
    folder, ranks_carry = regmix
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        ranks_carry(folder)
