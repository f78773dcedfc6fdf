"""Speed of chapter 10 on text of this installation: one JSON object a line, megabytes a second.

Two processes, one thread each, as a corpus would be shared out; the peers do the same with plain Python sets, or with
datasketch where it is installed. `ratio` says how many times faster ours is.
"""

import importlib.util
import os
import random
import re
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from lines import report

from qwen_mini.data_quality import TestIndex, decontaminate, near_duplicates
from qwen_mini.kernels.text_scores import Reference
from qwen_mini.kernels.words import blocks

PROCESSES, TEST_ITEMS, PIECE = 2, 10_000, 1_200


def texts_of(limit: int) -> list[str]:
    """Pieces of the standard library and the language reference, about `limit` characters in all."""
    found, size = [], 0
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    for path in paths:
        if size >= limit:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        size += len(text)
    return found + list(topics.values())


TEXTS = texts_of(8_000_000)
REFERENCE = Reference({"python": TEXTS[::10]})


def passages(count: int) -> list[str]:
    """`count` passages of 20 to 60 words that no text holds: words of the texts in any order."""
    rng = random.Random(0)
    words = " ".join(TEXTS[::20]).split()
    return [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(count)]


INDEX = TestIndex(passages(TEST_ITEMS))


def minhash_and_filters(part: int, texts: int | None = None) -> int:
    """Near-duplicates and the plain scores of one share of the texts; returns its bytes."""
    mine = TEXTS[part::PROCESSES][:texts]
    kept = [t for t, n in zip(mine, near_duplicates(mine), strict=True) if n < 0]
    for block in blocks(kept):
        REFERENCE.scores(block)
    return sum(len(t.encode()) for t in mine)


def decontamination(part: int) -> int:
    """The share checked against all test items; returns its bytes."""
    mine = TEXTS[part::PROCESSES]
    list(decontaminate(mine, INDEX))
    return sum(len(t.encode()) for t in mine)


def plain_minhash(part: int) -> int:
    """128 minima a text, over Python sets: with datasketch, or with 128 keyed hashes of every shingle."""
    mine = TEXTS[part::PROCESSES][:60]
    for text in mine:
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        if importlib.util.find_spec("datasketch"):
            from datasketch import MinHash

            MinHash(num_perm=128).update_batch(shingles)
        else:
            [min(hash((i, s)) for s in shingles) for i in range(128)]
    return sum(len(t.encode()) for t in mine)


def plain_decontamination(part: int) -> int:
    """Runs of 8 words in a set of Python tuples, without the check of the candidates."""
    known = set()
    for item in passages(TEST_ITEMS):
        known.update(zip(*(item.lower().split()[i:] for i in range(8)), strict=False))
    mine = TEXTS[part::PROCESSES]
    begin = time.perf_counter()
    for text in mine:
        words = re.findall(r"\w+", text.lower())
        any(run in known for run in zip(*(words[i:] for i in range(8)), strict=False))
    return sum(len(t.encode()) for t in mine), time.perf_counter() - begin


def speed(function) -> float:
    """Megabytes a second of two processes, the better of two runs; what they need is loaded before."""
    best = 0.0
    with ProcessPoolExecutor(PROCESSES) as pool:
        list(pool.map(minhash_and_filters, range(PROCESSES), [5] * PROCESSES))  # warm
        for _ in range(2):
            begin = time.perf_counter()
            done = list(pool.map(function, range(PROCESSES)))
            seconds = time.perf_counter() - begin
            if isinstance(done[0], tuple):  # a peer that timed its own loop
                seconds = max(own for _, own in done)
                done = [size for size, _ in done]
            best = max(best, sum(done) / 1e6 / seconds)
    return best


def main() -> None:
    peer = "datasketch" if importlib.util.find_spec("datasketch") else "plain Python"
    report(
        "MinHash and scores of form and content, 2 processes",
        speed(minhash_and_filters),
        speed(plain_minhash),
        f"MinHash alone, {peer}",
        "MB/s",
    )
    report(
        f"decontamination against {TEST_ITEMS:,} items, 2 processes",
        speed(decontamination),
        speed(plain_decontamination),
        "n-grams in a Python set, candidates unchecked",
        "MB/s",
    )


if __name__ == "__main__":
    main()
