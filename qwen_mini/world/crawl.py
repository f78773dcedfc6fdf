"""A crawl whose labels are known: clean text in lopsided shares, planted noise, and near-copies (chapter 10)."""

import hashlib
import random
from collections.abc import Iterable, Mapping

import numpy as np

from .noise import edited, noise_texts

# Upper ends of shares of the documents: to learn what clean text is, to fit the filter, to set its threshold, to be read
# by the writers of the crawl's fluent junk, to crawl, to choose a mixture, to judge with.
PARTS = {
    "seed": 0.3,
    "source": 0.42,
    "tune": 0.47,
    "writers": 0.55,
    "pool": 0.86,
    "choose": 0.93,
    "judge": 1.0,
}

# How much of the crawl's clean text each domain has: dictionaries and two languages too much.
CRAWL = {
    "glosses": 0.32,
    "wiki_es": 0.2,
    "wiki_fr": 0.2,
    "wiki_en": 0.12,
    "python": 0.1,
    "tasks": 0.05,
    "chinese_english": 0.01,
}


def pieces(text: str, size: int = 1200) -> list[str]:
    """A text in pieces of whole paragraphs, about `size` characters each; short ends are left out."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        if parts[-1] and len(parts[-1]) + len(paragraph) > size:
            parts.append("")
        parts[-1] = (parts[-1] + "\n\n" + paragraph if parts[-1] else paragraph)[:size]
    return [part for part in parts if len(part) >= 200]


def split_parts(documents: Mapping[str, Iterable]) -> dict[str, dict[str, list[str]]]:
    """part -> domain -> texts: pieces of documents (with `.text`), all of a document in the part that its hash says."""
    parts: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    for domain, found in documents.items():
        for document in found:
            digest = hashlib.blake2b(document.text.encode(), digest_size=4).digest()
            place = int.from_bytes(digest, "big") / 2**32
            part = next(name for name, end in PARTS.items() if place < end)
            parts[part].setdefault(domain, []).extend(pieces(document.text))
    return parts


def labelled_texts(
    parts: dict[str, dict[str, list[str]]], documents: int, count: int, seed: int
) -> tuple[list[str], list[str]]:
    """Texts and their kinds, to fit a filter to: `documents` clean ones of a domain, `count` of each kind of noise.

    All are of the part "source", or of files that the noise of `crawl_of` does not use.
    """
    clean = {domain: texts[:documents] for domain, texts in parts["source"].items()}
    groups = noise_texts(clean, parts["source"], count, 0, seed)
    texts = [t for group in (*clean.values(), *groups.values()) for t in group]
    kinds = ["clean"] * sum(map(len, clean.values()))
    return texts, kinds + [kind for kind, group in groups.items() for _ in group]


def crawl_of(
    parts: dict[str, dict[str, list[str]]], size: int, count: int, seed: int
) -> list[tuple[str, str, str]]:
    """Shuffled rows (text, domain, kind): about `size` bytes of clean text of the part "pool" by the shares of `CRAWL`,
    `count` texts of each kind of noise, and eight near-copies each of a few texts.
    """
    rng, rows = random.Random(f"{seed}/crawl"), []
    pool = parts["pool"]
    total = sum(CRAWL.get(domain, 0.01) for domain in pool)
    for domain, texts in pool.items():
        ends = np.cumsum([len(text.encode()) + 1 for text in texts])
        share = CRAWL.get(domain, 0.01) / total
        kept = texts[: int(np.searchsorted(ends, size * share)) + 1]
        rows += [(text, domain, "clean") for text in kept]
    clean = {domain: [t for t, d, _ in rows if d == domain] for domain in pool}
    words = " ".join(text for text, _, _ in rows[::50]).split()
    copied = rng.sample(rows, max(4, len(rows) // 50))
    for text, domain, _ in [row for row in copied for _ in range(8)]:
        rows.append((edited(text, rng.choice((0, 0.02, 0.05)), words, rng), domain, "near-copies"))
    for kind, texts in noise_texts(clean, parts["writers"], count, 1, seed).items():
        rows += [(text, "", kind) for text in texts]
    rng.shuffle(rows)
    return rows


def counts(texts: Iterable[str], kinds: Iterable[str]) -> dict[str, dict]:
    """kind -> documents, kB and how the first text begins."""
    found: dict[str, dict] = {}
    for text, kind in zip(texts, kinds, strict=True):
        begins = text[:64].replace("\n", " ")
        facts = found.setdefault(kind, {"documents": 0, "kB": 0.0, "begins": begins})
        facts["documents"] += 1
        facts["kB"] += len(text.encode()) / 1000
    return found


def origins(texts: list[str], kinds: list[str]) -> dict[str, float]:
    """Documents, kB, and how many documents are clean, near-copies, or noise of whatever kind."""
    found = {"documents": len(texts), "kB": sum(len(text.encode()) for text in texts) / 1000}
    found |= {kind: kinds.count(kind) for kind in ("clean", "near-copies")}
    return found | {"noise": len(texts) - found["clean"] - found["near-copies"]}
