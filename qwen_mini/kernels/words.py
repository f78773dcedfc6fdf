"""Words and n-grams of many texts at once, as arrays of 64-bit hashes: chapter 10's sets of words without a Python loop."""

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MULTIPLIER, INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64)
BLOCK = 1 << 19  # characters that are looked at together: arrays of a few megabytes


@dataclass(frozen=True)
class Words:
    """The words of some texts as 64-bit hashes: text i has hashes[starts[i] : starts[i + 1]]."""

    hashes: np.ndarray
    starts: np.ndarray

    @property
    def texts(self) -> np.ndarray:
        """The text that each word belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@functools.cache
def letter_kinds() -> np.ndarray:
    """Of every code point: 0 for no part of a word, 1 for a letter, digit or accent, 2 for a CJK character, a word alone."""
    points = range(sys.maxunicode + 1)
    kinds = np.fromiter((chr(p).isalnum() for p in points), np.uint8, len(points))
    kinds[0x300:0x370] = 1
    for low, high in ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x32000)):
        kinds[low:high] *= 2
    return kinds


@functools.cache
def powers(base: int, count: int) -> np.ndarray:
    """base ** 0 … base ** (count - 1), modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def mix(x: np.ndarray) -> np.ndarray:
    """Make every bit of 64-bit numbers depend on all of theirs (the finish of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All characters, a line end after every text, and where each text starts, (texts + 1,)."""
    joined = "\n".join(texts) + "\n"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    return codes, np.cumsum([0, *(len(text) + 1 for text in texts)])


def split_words(texts: Sequence[str]) -> Words:
    """The words of each text in lower case, without punctuation and symbols, hashed.

    A word's hash is a polynomial in its characters, taken from one running sum over all texts.
    """
    codes, edges = code_points([text.lower() for text in texts])
    kinds = letter_kinds()[codes]
    first = kinds == 2
    first[0] = kinds[0] > 0
    first[1:] |= (kinds[1:] == 1) & (kinds[:-1] != 1)
    begins = np.flatnonzero(first)
    size = 1 << (len(codes) - 1).bit_length()  # few sizes, so that `powers` remembers them
    sums = np.cumsum(powers(INVERSE, size)[: len(codes)] * (codes * (kinds > 0)))
    parts = np.diff(sums[np.append(begins[1:], len(codes)) - 1], prepend=np.uint64(0))
    hashes = mix(parts * powers(MULTIPLIER, size)[begins])
    return Words(hashes, np.searchsorted(begins, edges))


def ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of n words inside a text, and the place of each run's first word."""
    count = max(0, len(words.hashes) - n + 1)
    hashes, inside = np.zeros(count, np.uint64), np.ones(count, bool)
    for k in range(n):
        hashes = hashes * np.uint64(MULTIPLIER) + words.hashes[k : k + count]
        borders = words.starts[1:-1] - k
        if k:
            inside[borders[(borders >= 0) & (borders < count)]] = False
    places = np.flatnonzero(inside)
    return mix(hashes[places]), places


def blocks(texts: Iterable[str], characters: int = BLOCK) -> Iterator[list[str]]:
    """Lists of neighbouring texts of about so many characters: what is in memory at a time."""
    part, size = [], 0
    for text in texts:
        part.append(text)
        size += len(text) + 1
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def bucket(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes as numbers below `size`, a power of 2."""
    return (hashes >> np.uint64(65 - size.bit_length())).astype(np.int64)


def repeated(hashes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """True for all but one of the places of each hash in its text; owners: the text of every hash."""
    keys = mix(hashes + owners.astype(np.uint64) * np.uint64(MULTIPLIER))
    order = np.argsort(keys)
    result = np.zeros(len(keys), bool)
    result[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return result


def mean_of(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """Mean of the values of each of `count` texts, 0 where there are none."""
    return np.bincount(owners, values, count) / np.maximum(np.bincount(owners, minlength=count), 1)


HASHES = 128  # minima in a MinHash signature


def signatures(texts: Sequence[str], shingle: int = 5, seed: int = 0) -> np.ndarray:
    """MinHash of the sets of word n-grams, (texts, 128) uint32; a text shorter than n words is one shingle.

    The share of equal entries of two rows estimates the Jaccard index of their sets. Source: Broder, 1997.
    """
    words = split_words(texts)
    hashes, places = ngrams(words, shingle)
    starts = np.searchsorted(places, words.starts)
    short = np.flatnonzero(np.diff(starts) == 0)
    sums = np.append(np.uint64(0), np.cumsum(words.hashes))
    whole = sums[words.starts[short + 1]] - sums[words.starts[short]]
    hashes = (np.insert(hashes, starts[short], mix(whole)) >> np.uint64(32)).astype(np.uint32)
    starts = starts[:-1] + np.searchsorted(short, np.arange(len(texts)))
    rng = np.random.default_rng(seed)
    factors, shifts = rng.integers(0, 2**32, (2, HASHES), dtype=np.uint32)
    result, turned = np.empty((HASHES, len(texts)), np.uint32), np.empty_like(hashes)
    for row, factor, shift in zip(result, factors | np.uint32(1), shifts, strict=True):
        np.multiply(hashes, factor, out=turned)  # an odd factor permutes the numbers modulo 2^32
        np.add(turned, shift, out=turned)
        np.minimum.reduceat(turned, starts, out=row)
    return result.T
