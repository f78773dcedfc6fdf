"""Bad documents of kinds that web corpora are full of: found in this installation where possible, else made from good text."""

import random
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

# kind -> files below site-packages (or the standard library) that hold it
FOUND = {
    "minified code": ("**/*.min.js", "**/*.min.css", "jupyterlab/static/*.js", "**/static/*.js"),
    "hash lists": ("*.dist-info/RECORD",),
    "licences": ("*.dist-info/**/LICEN*", "*.dist-info/**/COPYING*", "*.dist-info/**/NOTICE*"),
    "code tables": ("encodings/*.py", "encodings/**/*.py"),
}
SELLING = (
    "best cheap buy online free shipping discount price top review deals sale near me official "
    "store guide tips now today offer win new click order save"
).split()
PAGE_PARTS = (
    "Accept all cookies|We use cookies to improve your experience on our website|Home|About|Contact"
    "|Subscribe to our newsletter|Share on Facebook|Log in|Sign up|Terms of service|Privacy policy"
    "|All rights reserved|Skip to main content|Click here to read more|Read more|Next page|Menu"
    "|Previous page|Related articles|You may also like|Add to cart|Copyright|Powered by|Follow us"
    "|Back to top|Search|Comments (0)|Leave a reply|Posted by admin|Load more"
    "|Your email address will not be published"
).split("|")


def found_texts(
    kind: str, count: int, rng: random.Random, half: int = 0, size: int = 900
) -> list[str]:
    """Up to `count` pieces of about `size` characters of one kind of `FOUND`, at most four of a file; [] if there is none.

    half: 0 or 1, of two that have no file in common; files that are equal but for their copyright lines, as the
    same licence in two packages, count as one.
    """
    paths = sysconfig.get_paths()
    folder = Path(paths["stdlib"] if kind == "code tables" else paths["purelib"])
    files = sorted({path for pattern in FOUND[kind] for path in folder.glob(pattern)})
    rng.shuffle(files)
    texts, seen = [], set()
    for path in files:
        if len(texts) >= count:
            break
        try:
            text = path.read_text(encoding="utf-8")[:20_000]
        except (OSError, UnicodeDecodeError):
            continue
        family = _without_names(text)
        if family in seen or family % 2 != half:
            continue
        seen.add(family)
        pieces = [text[i : i + size].strip() for i in range(0, len(text), size)]
        pieces = [piece for piece in pieces if len(piece) > size // 3]
        texts += rng.sample(pieces, min(4, len(pieces)))
    return texts[:count]


def _without_names(text: str) -> int:
    """A number that texts share whose letters are equal outside of lines with a copyright."""
    lines = [line for line in text.lower().splitlines() if "copyright" not in line]
    letters = "".join(c for line in lines for c in line if c.isalpha())
    return zlib.crc32(letters.encode())


def shuffled_words(text: str, rng: random.Random) -> str:
    """The same words in any order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def mojibake(text: str, rng: random.Random) -> str:
    """UTF-8 read as another encoding: Windows-1252 if the text has enough letters beyond ASCII, else UTF-16."""
    raw = text.encode()
    if sum(map(str.isascii, text)) < len(text) - 5:
        return raw.decode("cp1252", "replace")
    return raw[: len(raw) // 2 * 2].decode("utf-16-le", "replace")


def keyword_spam(text: str, rng: random.Random) -> str:
    """A few words of the text over and over among words that sell."""
    words = rng.choices([w for w in text.split() if w.isalpha() and len(w) > 4] or ["shop"], k=3)
    parts, size = [], 0
    while size < len(text):
        group = rng.sample(words + rng.choices(SELLING, k=3), rng.randint(3, 6))
        parts.append(" ".join(group) + rng.choice((".", "!", " |", " -")))
        size += len(parts[-1]) + 1
    return " ".join(parts)


def page_parts(text: str, rng: random.Random) -> str:
    """What surrounds the text of a web page, with the text's title here and there."""
    title, parts, size = " ".join(text.split()[: rng.randint(2, 5)]), [], 0
    while size < len(text):
        parts.append(rng.choice(PAGE_PARTS) if rng.random() < 0.85 else title)
        size += len(parts[-1]) + 1
    return rng.choice(("\n", " | ", " ")).join(parts)


MADE = {
    "shuffled words": shuffled_words,
    "mojibake": mojibake,
    "keyword spam": keyword_spam,
    "page parts": page_parts,
}


class TrigramWriter:
    """Fluent junk: every three words in a row stood so in a text, and the whole says nothing."""

    def __init__(self, texts: Iterable[str]):
        self.after, self.starts = defaultdict(list), []
        for words in (text.split(" ") for text in texts):
            if len(words) > 3:
                self.starts.append((words[0], words[1]))
                for a, b, c in zip(words, words[1:], words[2:], strict=False):
                    self.after[a, b].append(c)

    def write(self, words: int, rng: random.Random) -> str:
        """A text of so many words."""
        last = rng.choice(self.starts)
        written = [*last]
        while len(written) < words:
            following = self.after.get(last)
            if following:
                last = last[1], rng.choice(following)
                written.append(last[1])
            else:
                last = rng.choice(self.starts)
                written += last
        return " ".join(written)


def edited(text: str, share: float, words: list[str], rng: random.Random) -> str:
    """The text with about `share` of its words replaced, dropped or followed by a word of `words`."""
    return " ".join(_edits(text.split(" "), share, words, rng))


def _edits(old: list[str], share: float, words: list[str], rng: random.Random) -> Iterator[str]:
    for word in old:
        kind = rng.choice(("replace", "replace", "drop", "insert")) if rng.random() < share else ""
        if kind in ("", "insert"):
            yield word
        if kind in ("replace", "insert"):
            yield rng.choice(words)


def noise_texts(
    clean: dict[str, list[str]], read: dict[str, list[str]], count: int, half: int, seed: int
) -> dict[str, list[str]]:
    """kind -> about `count` texts, four times as many of the hardest kind, fluent junk.

    clean: domain -> texts to spoil; read: what the writers of fluent junk have read; half: 0 or 1, whose files of
    `FOUND` are disjoint. Two calls share no document if their halves, `clean` and `read` share none.
    """
    rng = random.Random(f"{seed}/noise/{half}")
    flat = [text for texts in clean.values() for text in texts]
    noise = {kind: found_texts(kind, count, rng, half) for kind in FOUND}
    for kind, make in MADE.items():
        noise[kind] = [make(rng.choice(flat), rng) for _ in range(count)]
    large = [texts for texts in read.values() if sum(map(len, texts)) > 50_000]
    writers = [TrigramWriter(texts) for texts in large or [flat]]
    noise["fluent junk"] = [
        writers[i % len(writers)].write(rng.randint(60, 180), rng) for i in range(4 * count)
    ]
    return {kind: texts for kind, texts in noise.items() if texts}


def passages(texts: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` passages of 20 to 60 words of the texts."""
    found = []
    while len(found) < count:
        words, size = rng.choice(texts).split(), rng.randint(20, 60)
        if len(words) > size:
            at = rng.randrange(len(words) - size)
            found.append(" ".join(words[at : at + size]))
    return found


def careless(problem: tuple[str, str, str], rng: random.Random) -> tuple[str, str, str]:
    """The problem (question, steps, answer) with one digit of its steps or answer changed."""
    question, steps, answer = problem
    text = f"{steps}\n{answer}"
    at = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    wrong = text[:at] + rng.choice([d for d in "0123456789" if d != text[at]]) + text[at + 1 :]
    steps, _, answer = wrong.rpartition("\n")
    return question, steps, answer
