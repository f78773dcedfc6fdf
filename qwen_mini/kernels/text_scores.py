"""Scores of many texts at once (chapter 10): form, content against a clean seed, and what a language model thinks of them."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from .words import (
    Words,
    blocks,
    bucket,
    code_points,
    letter_kinds,
    mean_of,
    ngrams,
    repeated,
    split_words,
)

BUCKETS, TOPICS = 1 << 16, 48
CLASSES = (
    "blanks, line ends, letters, capitals, digits, symbols, other letters, other symbols".split(
        ", "
    )
)
FORM = ["word length", "line length", "repeated words", "repeated triples"]
CONTENT = [
    "unknown words",
    "unknown pairs",
    "rarity",
    "rare words again",
    "halves",
    "quarters",
    "worst quarters",
]

MODEL = ["bits per byte", "spread", "surprises", "sure tokens", "gain by context"]


@functools.cache
def letter_classes() -> np.ndarray:
    """The number in `CLASSES` of every code point."""
    classes = np.where(letter_kinds() > 0, 6, 7).astype(np.uint8)
    for point in range(128):
        c = chr(point)
        tests = (c.isspace() and c != "\n", c == "\n", c.islower(), c.isupper(), c.isdigit(), True)
        classes[point] = tests.index(True)
    return classes


class Reference:
    """What a clean seed knows: its words and pairs, how likely each word is in each domain, and which words keep company."""

    def __init__(self, seed: dict[str, list[str]]):
        if not seed or not all(seed.values()):
            raise ValueError("the clean seed is empty: give at least one text for every domain")
        self.domains = list(seed)
        counts, owners, entries, documents = np.zeros((BUCKETS, len(seed))), [], [], 0
        self.pairs = np.zeros(1 << 22, bool)
        for column, texts in enumerate(seed.values()):
            for block in blocks(texts):
                words = split_words(block)
                places = bucket(words.hashes, BUCKETS)
                counts[:, column] += np.bincount(places, minlength=BUCKETS)
                self.pairs[bucket(ngrams(words, 2)[0], len(self.pairs))] = True
                entry = np.unique((words.texts + documents) * BUCKETS + places)
                owners.append(entry // BUCKETS)
                entries.append(entry % BUCKETS)
                documents += len(block)
        self.counts = counts.sum(1)
        self.log_p = np.log((counts + 0.3) / (counts.sum(0) + 0.3 * BUCKETS)).astype(np.float32)
        self.rare = self.counts < max(2, self.counts.sum() / 2e4)
        self.vectors = _word_vectors(np.concatenate(owners), np.concatenate(entries), documents)

    def scores(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(texts, 19) scores of `CLASSES`, `FORM` and `CONTENT`, and the number of the likeliest domain, (texts,)."""
        count = len(texts)
        codes, edges = code_points(texts)
        owners = np.repeat(np.arange(0, 8 * count, 8), np.diff(edges))
        classes = np.bincount(owners + letter_classes()[codes], minlength=8 * count).reshape(
            count, 8
        )
        words = split_words(texts)
        lengths, places, of = np.diff(words.starts), bucket(words.hashes, BUCKETS), words.texts
        triples, at = ngrams(words, 3)
        pairs, pair_at = ngrams(words, 2)
        again, rare = repeated(words.hashes, of), self.rare[places]
        sums = np.zeros((count + 1, len(self.domains)))
        np.cumsum(self.log_p[places], 0, out=(running := np.empty((len(places), sums.shape[1]))))
        fits = np.diff(np.vstack([sums[:1], running])[words.starts], axis=0)
        form = [
            classes[:, [2, 3, 4, 6]].sum(1) / np.maximum(lengths, 1),
            np.log(np.diff(edges) / (classes[:, 1] + 1)),
            mean_of(again, of, count),
            mean_of(repeated(triples, of[at]), of[at], count),
        ]
        content = [
            mean_of(self.counts[places] == 0, of, count),
            mean_of(~self.pairs[bucket(pairs, len(self.pairs))], of[pair_at], count),
            fits.max(1) / np.maximum(lengths, 1),
            mean_of(again & rare, of, count) / np.maximum(mean_of(rare, of, count), 0.01),
        ]
        shares = classes / classes.sum(1, keepdims=True)
        found = np.column_stack([shares, *form, *content, self._coherence(words, places)])
        return found, fits.argmax(1)

    def _coherence(self, words: Words, places: np.ndarray) -> np.ndarray:
        """How alike the topics of a text's parts are: cosines of its halves, and mean and least of its quarters."""
        lengths, of = np.diff(words.starts), words.texts
        part = 4 * of + 4 * (np.arange(len(places)) - words.starts[of]) // lengths[of]
        sums = np.zeros((4 * len(lengths), TOPICS), np.float32)
        if len(part):
            starts = np.flatnonzero(np.diff(part, prepend=-1))
            sums[part[starts]] = np.add.reduceat(self.vectors[places], starts, axis=0)
        quarters = _unit(sums).reshape(-1, 4, TOPICS)
        cosines = np.einsum("nik,njk->nij", quarters, quarters)[:, *np.triu_indices(4, 1)]
        halves = _unit(quarters.reshape(-1, 2, 2, TOPICS).sum(2))
        return np.column_stack(
            [(halves[:, 0] * halves[:, 1]).sum(1), cosines.mean(1), cosines.min(1)]
        )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _word_vectors(owners: np.ndarray, places: np.ndarray, documents: int) -> np.ndarray:
    """(BUCKETS, TOPICS): words that occur in the same texts point the same way; rare ones are longer.

    The best approximation of rank `TOPICS` of the table of texts and words (Deerwester et al., 1990).
    """
    seen = np.bincount(places, minlength=BUCKETS)
    weight = np.where(seen > 1, np.log((documents + 1) / (seen + 1)), 0).astype(np.float32)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([owners, places])),
        torch.from_numpy(weight[places]),
        (documents, BUCKETS),
        check_invariants=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        topics = torch.svd_lowrank(matrix, q=min(TOPICS, documents), niter=3)[2].numpy()
    vectors = np.zeros((BUCKETS, TOPICS), np.float32)
    vectors[:, : topics.shape[1]] = _unit(topics) * weight[:, None]
    return vectors


@torch.no_grad()
def model_scores(
    model: torch.nn.Module, rows: Sequence[Sequence[int]], sizes: torch.Tensor, batch: int = 64
) -> np.ndarray:
    """(texts, 5) scores of `MODEL` of texts as token ids, each with a first token that is not scored.

    sizes: (vocab_size,) bytes of every id. Texts of about one length are read together.
    """
    order, result = sorted(range(len(rows)), key=lambda i: len(rows[i])), np.empty((len(rows), 5))
    for group in (order[i : i + batch] for i in range(0, len(rows), batch)):
        parts = [torch.tensor(rows[i]) for i in group]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) - 1 for part in parts])[:, None]
        places = torch.arange(ids.shape[1] - 1)
        inside, late = places < lengths, (places < lengths) & (places >= lengths / 2)
        logits = model(ids[:, :-1]).float()
        nll = logits.logsumexp(-1) - logits.gather(-1, ids[:, 1:, None])[..., 0]
        mean = lambda values, where=inside: (values * where).sum(1) / where.sum(1).clamp_min(1)
        found = [
            mean(nll) / mean(sizes[ids[:, 1:]]) / math.log(2),
            mean((nll - mean(nll)[:, None]) ** 2).sqrt(),
            mean(nll > 8),
            mean(nll < 0.5),
            mean(nll, inside & ~late) - mean(nll, late),
        ]
        result[group] = torch.stack(found, 1).numpy()
    return result


def softmax_regression(x: np.ndarray, y: np.ndarray, decay=1.0, steps: int = 60) -> np.ndarray:
    """Weights (features, classes) that minimise −Σ log p(y | x) + decay/2 · |w|², by L-BFGS."""
    features, labels = torch.tensor(x), torch.tensor(y)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(features @ weights, labels, reduction="sum")
        total = fit + decay / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach().numpy()
