"""Speed of the from-scratch tokenizer: one JSON object a line, CPU seconds on one thread.

`ratio` says how many times faster ours is than the peer (below 1: slower). The naive trainer would take an hour, so
its time is integrated from single merges measured at a few places along the way; its name says so.
"""

import os
import sysconfig
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # `tokenizers` on one thread, read when it is imported

from pydoc_data.topics import topics

from lines import report

from qwen_mini.tokenizer import (
    Tokenizer,
    _train_fast,
    byte_ids,
    count_pieces,
    merge_word,
    split_pieces,
    train_bpe,
)

VOCABULARY = 4_096
TEXT_BYTES = 4_000_000


def python_text(limit: int) -> list[str]:
    """The language reference and standard library sources, up to `limit` bytes."""
    texts, size = [], 0
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for text in [*topics.values(), *(path.read_text(encoding="utf-8") for path in paths)]:
        texts.append(text)
        size += len(text.encode())
        if size >= limit:
            break
    return texts


def cpu_seconds(function, repeat: int = 3) -> float:
    """The best of a few runs, in CPU seconds of this process."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        function()
        best = min(best, time.process_time() - begin)
    return best


def naive_step(words: list[tuple[list[int], int]]) -> None:
    """One merge the naive way: count every pair of every word, then rewrite every word."""
    pairs = Counter()
    for ids, count in words:
        for pair in pairwise(ids):
            pairs[pair] += count
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    for ids, _ in words:
        merged, i = [], 0
        while i < len(ids):
            found = i + 1 < len(ids) and (ids[i], ids[i + 1]) == best
            merged.append(-1 if found else ids[i])
            i += 2 if found else 1


def naive_seconds(
    pieces: list[tuple[str, int]], merges: list[tuple[int, int]], places: int = 5
) -> float:
    """Estimated time of all merges: trapezoids over single merges, each measured on the text as it stands then."""
    at = [round(i * (len(merges) - 1) / (places - 1)) for i in range(places)]
    cost = []
    for learned in at:
        ranks = {pair: rank for rank, pair in enumerate(merges[:learned])}
        known = {piece: merge_word(byte_ids(piece), ranks) for piece, _ in pieces}
        words = [(list(known[piece]), count) for piece, count in pieces]
        cost.append(cpu_seconds(lambda words=words: naive_step(words), repeat=1))
    return sum(
        (b - a) * (x + y) / 2 for (a, b), (x, y) in zip(pairwise(at), pairwise(cost), strict=True)
    )


def main() -> None:
    texts = python_text(TEXT_BYTES)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    name = f"BPE training, {VOCABULARY:,} ids, {megabytes:.1f} MB"
    num_merges = VOCABULARY - 278
    ours = cpu_seconds(lambda: train_bpe(count_pieces(texts), num_merges))
    rust = cpu_seconds(lambda: _train_fast(texts, num_merges))
    tokenizer = Tokenizer.train(texts, VOCABULARY, fast=False)

    distinct = count_pieces(texts)
    once = cpu_seconds(lambda: count_pieces(texts), repeat=1)
    every = [(piece, 1) for text in texts for piece in split_pieces(text)]
    note = "estimated from 5 of its merges"
    naive = once + naive_seconds(every, tokenizer.merges)
    report(name, ours, naive, f"recount all text before every merge ({note})", "s")
    naive = once + naive_seconds(list(distinct.items()), tokenizer.merges)
    report(name, ours, naive, f"recount distinct pieces before every merge ({note})", "s")
    report(name, ours, rust, "tokenizers BpeTrainer, 1 thread", "s")

    compiled = Tokenizer(tokenizer.merges)
    compiled.encode("warm up")
    fresh = cpu_seconds(lambda: Tokenizer(tokenizer.merges, fast=False).encode_batch(texts))
    rust = cpu_seconds(lambda: compiled.encode_batch(texts))
    report(
        f"encoding, {megabytes:.1f} MB",
        megabytes / fresh,
        megabytes / rust,
        "tokenizers, 1 thread",
        "MB/s",
    )
    ids = tokenizer.encode_batch(texts)
    ours = cpu_seconds(lambda: [tokenizer.decode(row) for row in ids])
    rust = cpu_seconds(lambda: compiled._rust.decode_batch(ids))
    report(
        f"decoding, {megabytes:.1f} MB",
        megabytes / ours,
        megabytes / rust,
        "tokenizers, 1 thread",
        "MB/s",
    )


if __name__ == "__main__":
    main()
