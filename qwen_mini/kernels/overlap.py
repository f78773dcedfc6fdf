"""Which texts contain a test item: an index of n-grams, and longest common subsequences of many pairs (chapter 10)."""

from collections.abc import Sequence

import numpy as np

from .words import Words, bucket, ngrams, split_words


def lcs_lengths(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Length of the longest common subsequence of each pair of rows: a (pairs, m), b (pairs, k) → (pairs,).

    Zeros are padding and match nothing. One row of the usual table at a time: L[j] = max over j' ≤ j of the better of
    the row above at j' and the diagonal plus a match.
    """
    row = np.zeros((len(a), b.shape[1] + 1), np.int16)
    for column in a.T:
        match = (b == column[:, None]) & (column[:, None] != 0)
        row[:, 1:] = np.maximum(row[:, 1:], row[:, :-1] + match)
        np.maximum.accumulate(row, axis=1, out=row)
    return row[:, -1]


class TestIndex:
    """The n-grams of test items in sorted order, each with the first 16 places where it occurs."""

    MOST = 16  # a boilerplate run of words that more items share is looked up in these

    def __init__(self, items: Sequence[str], n: int = 8):
        if n < 1 or not items:
            raise ValueError(
                f"an index needs test items and n of 1 or more, got {len(items)}, n = {n}"
            )
        self.n, self.words = n, split_words(items)
        hashes, places = ngrams(self.words, n)
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        self.hashes, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
        self.places, self.firsts, self.counts = places, firsts, np.minimum(counts, self.MOST)
        self.present = np.zeros(1 << 24, bool)
        self.present[bucket(self.hashes, len(self.present))] = True

    def hits(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (index into `hashes`, word of an item) of equal n-grams."""
        maybe = np.flatnonzero(self.present[bucket(hashes, len(self.present))])
        at = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        same = self.hashes[at] == hashes[maybe]
        maybe, at = maybe[same], at[same]
        repeats = self.counts[at]
        offsets = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return np.repeat(maybe, repeats), self.places[np.repeat(self.firsts[at], repeats) + offsets]


def overlapping(words: Words, index: TestIndex, least: int, share: float) -> np.ndarray:
    """For every text of `words` a test item that it contains by the report's rule, or −1, (texts,).

    Texts that share an n-gram of the index are looked at: the LCS of the item and of a window of twice its length
    around the n-gram must be at least `least` words, and at least `share` of the shorter of both.
    """
    result, starts, firsts = np.full(len(words.starts) - 1, -1), words.starts, index.words.starts
    hashes, places = ngrams(words, index.n)
    mine, theirs = index.hits(hashes)
    if not len(mine):
        return result
    mine, item = places[mine], index.words.texts[theirs]
    text, sizes = words.texts[mine], np.diff(firsts)[item]
    width = np.maximum(sizes // 2, 1)  # hits of one alignment share a window
    begin = (mine - (theirs - firsts[item])) // width * width - sizes // 4
    sizes, item, text, begin = np.unique(np.stack([sizes, item, text, begin]), axis=1)
    shorter = np.minimum(sizes, np.diff(starts)[text])
    needed = np.maximum(least, np.ceil(share * shorter - 1e-9))
    possible = np.flatnonzero(shorter >= least)
    for part in np.array_split(possible, len(possible) // 2048 + 1):
        i, t = item[part], text[part]
        a = _windows(index.words, i, firsts[i], firsts[i + 1])
        b = _windows(words, t, np.maximum(begin[part], starts[t]), begin[part] + 2 * sizes[part])
        found = lcs_lengths(a, b) >= needed[part]
        result[t[found]] = i[found]
    return result


def _windows(words: Words, texts: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(windows, widest) hashes of words from each begin to its end or that of its text, then zeros."""
    at = begins[:, None] + np.arange(max(0, (ends - begins).max(initial=0)))
    inside = at < np.minimum(ends, words.starts[texts + 1])[:, None]
    return np.where(inside, words.hashes[np.minimum(at, len(words.hashes) - 1)], np.uint64(0))
