"""Goldens of chapter 10: words, signatures, scores, heads, mixtures, decontamination, the ensemble."""

import random

import numpy as np
import torch
from golden_registry import digest, golden
from golden_texts import TEXTS

from qwen_mini import data_quality as q
from qwen_mini.kernels import words as w
from qwen_mini.kernels.ensemble import Ensemble, EnsembleAdamW
from qwen_mini.kernels.text_scores import Reference
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.world import noise, problems

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "rst")]


def _texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    topics = [rng.sample(WORDS, 30) for _ in range(5)]
    return [" ".join(rng.choices(topics[i % 5], k=60)) for i in range(count)]


@golden("data_quality", "words")
def _():
    words = w.split_words(TEXTS)
    hashes, places = w.ngrams(words, 3)
    return {
        "words": digest(words.hashes.tolist()),
        "starts": words.starts.tolist(),
        "triples": digest(hashes.tolist()),
        "places": digest(places.tolist()),
        "signatures": digest(w.signatures(TEXTS).tolist()),
    }


@golden("data_quality", "near-duplicates")
def _():
    texts = _texts(20, 0)
    copies = [noise.edited(t, 0.05, WORDS, random.Random(i)) for i, t in enumerate(texts[:6])]
    return list(q.near_duplicates(texts + copies))


@golden("data_quality", "scores and head")
def _():
    seed = {"a": _texts(60, 1), "b": _texts(60, 2)}
    clean = _texts(30, 1)[:15] + _texts(30, 2)[:15]
    spam = [noise.keyword_spam(t, random.Random(i)) for i, t in enumerate(clean)]
    mixed = [noise.shuffled_words(" ".join(_texts(3, 9)), random.Random(i)) for i in range(30)]
    reference = Reference(seed)
    scores, domains = reference.scores(clean + spam + mixed)
    kinds = ["clean"] * 30 + ["spam"] * 30 + ["mixed"] * 30
    head = q.fit_head(scores, domains, kinds)
    kept = q.quality_score(clean + spam + mixed, reference, head) > 0
    # topics are found by random projection, whose last digits differ between machines
    return {
        "form": scores[:, :16].mean(0),
        "domains": domains.tolist(),
        "kept": [bool(kept[i : i + 30].mean() > 0.5) for i in (0, 30, 60)],
    }


@golden("data_quality", "mixtures")
def _():
    shares = q.draw_mixtures(np.array([0.5, 0.3, 0.2]), 24, 1)
    losses = -np.log(shares + 0.02) * [0.2, 0.5, 0.3]
    law = q.fit_mixture_law(shares, losses)
    documents = {"a": [f"a{i}" * 20 for i in range(30)], "b": [f"b{i}" * 30 for i in range(9)]}
    return {
        "shares": shares[:4],
        "law": law,
        "best": q.best_shares(law, np.ones(3) / 3, 2_000),
        "drawn": digest(q.rebalance(documents, {"a": 0.4, "b": 0.6}, 1_000, 2)),
        "within": q.within_epochs({"a": 0.1, "b": 0.9}, documents, 3_000),
    }


@golden("data_quality", "verifier")
def _():
    rng = random.Random(0)
    families = [problems.addition, problems.subtraction, problems.multiplication]
    made = [rng.choice(families)(rng) for _ in range(60)]
    spoiled = [noise.careless(problem, rng) for problem in made]
    return [[q.verify_arithmetic(*p) for p in group] for group in (made, spoiled)]


@golden("data_quality", "decontamination")
def _():
    items = _texts(40, 5)
    leaks = [noise.edited(t, 0.1, WORDS, random.Random(i)) for i, t in enumerate(items)]
    return {
        str(n): list(q.decontaminate(leaks + _texts(20, 6), q.TestIndex(items, n))) for n in (8, 13)
    }


@golden("data_quality", "ensemble")
def _():
    models, data = [], torch.from_numpy(np.random.default_rng(0).integers(0, 40, (4, 3, 6, 13)))
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(
            Qwen(ModelConfig(40, 16, 32, 2, 2, 2, 8, 16, 1_000.0, tie_word_embeddings=True))
        )
    ensemble = Ensemble(models)
    adamw, found = EnsembleAdamW(ensemble, betas=(0.9, 0.95)), []
    for windows in data:
        losses, gradients = ensemble.gradients(windows[..., :-1], windows[..., 1:])
        adamw.step(gradients, torch.tensor([1e-2, 3e-3, 1e-3]))
        found.append(losses)
    return found
