"""Needle rows: text with statements hidden in it and questions at the end; and prompts of the same kind for evaluation."""

import itertools
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_mini.course.corpus_files import CorpusError

if TYPE_CHECKING:
    from qwen_mini.tokenizer import Tokenizer

WEIGHT_ANSWER, WEIGHT_TEMPLATE, WEIGHT_FILLER = 50, 1, 3  # tenths: 5.0, 0.1 and 0.3
Row = tuple[list[int], list[int]]  # token ids and their loss weights in tenths
RECALL_SHARE = 0.4  # of the rows: many short pairs instead of a few needles


@dataclass(frozen=True)
class NeedlePieces:
    """Everything a needle row is put together from, as token ids, encoded once."""

    words: tuple[int, ...]  # single tokens that serve as keys: " river", " house", …
    digits: tuple[int, ...]
    passkey: tuple[int, ...]
    equals: tuple[int, ...]
    stop: tuple[int, ...]
    newline: tuple[int, ...]
    the: tuple[int, ...]
    key_is: tuple[int, ...]
    what_is: tuple[int, ...]
    key_asked: tuple[int, ...]


def needle_pieces(tokenizer: "Tokenizer") -> NeedlePieces:
    """Encode the pieces; borders between them are borders of the pre-tokenizer, so joining ids is exact."""
    count = tokenizer.vocab_size - len(tokenizer.control_tokens)
    regular = {i: tokenizer.token_bytes(i) for i in range(count)}
    words = [i for i, raw in regular.items() if re.fullmatch(rb" [a-z]{3,}", raw)]
    words = [i for i in words if tokenizer.encode(regular[i].decode()) == [i]]
    if len(words) < 32:  # a vocabulary too small for words: letters are always single tokens
        words = [i for i, raw in regular.items() if re.fullmatch(rb"[A-Za-z]", raw)]
    texts = {"passkey": " pass", "equals": "=", "stop": ".", "newline": "\n", "the": " The"}
    texts |= {"key_is": " key is ", "what_is": "What is the", "key_asked": " key?"}
    texts["digits"] = "0123456789"
    encoded = {name: tuple(tokenizer.encode(text)) for name, text in texts.items()}
    return NeedlePieces(tuple(words), **encoded)


def needle_statement(pieces: NeedlePieces, key: tuple, value: tuple, style: str) -> list[int]:
    """The needle: " river=58301." (compact: the key touches its digits) or " The river key is 58301." (prose)."""
    if style == "compact":
        return [*key, *pieces.equals, *value, *pieces.stop]
    return [*pieces.the, *key, *pieces.key_is, *value, *pieces.stop]


def needle_question(pieces: NeedlePieces, key: tuple, style: str) -> list[int]:
    """Everything up to the answer: "\\n river=" or "\\nWhat is the river key? The river key is "."""
    if style == "compact":
        return [*pieces.newline, *key, *pieces.equals]
    p = pieces
    return [*p.newline, *p.what_is, *key, *p.key_asked, *p.the, *key, *p.key_is]


def draw_value(
    pieces: NeedlePieces, rng: random.Random, digits: int = 5, distinct: bool = False
) -> tuple:
    """The token ids of a random number, which may begin with 0."""
    draw = rng.sample if distinct else rng.choices
    return tuple(draw(pieces.digits, k=digits))


def draw_keys(pieces: NeedlePieces, rng: random.Random, count: int, tokens: int = 1) -> list[tuple]:
    """`count` keys of `tokens` words each, no word used twice."""
    words = rng.sample(pieces.words, count * tokens)
    return [tuple(words[i : i + tokens]) for i in range(0, count * tokens, tokens)]


def hide_needles(needles: list[list[int]], depths: list[float], filler: list[int]) -> Row:
    """The filler with needle i put in after the share `depths[i]` of it (0 = before everything, 1 = after it)."""
    ids, weights, done = [], [], 0
    for depth, needle in sorted(zip(depths, needles, strict=True)):
        cut = min(int(depth * (len(filler) + 1)), len(filler))
        ids += filler[done:cut] + needle
        weights += [WEIGHT_FILLER] * (cut - done) + [WEIGHT_TEMPLATE] * len(needle)
        done = cut
    return ids + filler[done:], weights + [WEIGHT_FILLER] * (len(filler) - done)


def filler_slice(filler: np.ndarray, size: int, rng: random.Random) -> list[int]:
    """`size` neighbouring tokens from a random place of a stream without `<|endoftext|>`."""
    if len(filler) < size:
        raise CorpusError(f"needle rows need {size} tokens of filler, there are {len(filler)}")
    start = rng.randrange(len(filler) - size + 1)
    return filler[start : start + size].tolist()


def needle_row(length: int, filler: np.ndarray, pieces: NeedlePieces, rng: random.Random) -> Row:
    """`length + 1` tokens: one to four needles in filler, then questions for one of them or for all.

    Difficulty follows the length: to 64 five distinct digits and keys of one token, to 128 a mixture, beyond it digits
    repeat and keys may have two tokens.
    """
    hard = length > 128 or (length > 64 and rng.random() < 0.5)
    [count] = rng.choices((1, 2, 3, 4), (4, 2, 2, 2))
    style = rng.choice(("compact", "compact", "prose"))
    keys = draw_keys(pieces, rng, count, rng.choice((1, 2)) if hard else 1)
    if count == 1 and style == "prose":
        keys = [rng.choice((pieces.passkey, keys[0]))]
    pairs = [(key, draw_value(pieces, rng, distinct=not hard)) for key in keys]
    ask_all = rng.random() < 0.75
    while True:
        needles = [needle_statement(pieces, key, value, style) for key, value in pairs]
        asked = rng.sample(pairs, len(pairs) if ask_all else 1)
        prompts = [needle_question(pieces, key, style) for key, _ in asked]
        room = length + 1 - sum(map(len, needles + prompts)) - (5 + len(pieces.stop)) * len(asked)
        if room >= length // 8:
            break
        if len(pairs) > 1:
            pairs.pop()
        elif style == "prose":
            pairs, style = [(draw_keys(pieces, rng, 1)[0], pairs[0][1])], "compact"
        else:
            short = "is too short for one needle and its question"
            raise CorpusError(f"a row of {length} tokens {short}")
    depths = [rng.random() for _ in needles]
    ids, weights = hide_needles(needles, depths, filler_slice(filler, room, rng))
    for prompt, (_, value) in zip(prompts, asked, strict=True):
        ids += [*prompt, *value, *pieces.stop]
        weights += [WEIGHT_TEMPLATE] * len(prompt) + [WEIGHT_ANSWER] * 5
        weights += [WEIGHT_TEMPLATE] * len(pieces.stop)
    return ids, weights


def recall_row(length: int, filler: np.ndarray, pieces: NeedlePieces, rng: random.Random) -> Row:
    """`length + 1` tokens: filler, pairs " river=7 lamp=3 …", then as many of the keys again as fit."""
    digits = 1 if length <= 64 else rng.randint(1, 2 if length <= 128 else 3)
    total = (length + 1 - len(pieces.newline)) // (2 + digits)
    pairs = rng.randint(3, min(total * 6 // 10, len(pieces.words)))
    keys = draw_keys(pieces, rng, pairs)
    stated = [[*key, *pieces.equals, *draw_value(pieces, rng, digits)] for key in keys]
    asked = rng.sample(stated, min(total - pairs, pairs))
    tail = [*itertools.chain(*stated), *pieces.newline, *itertools.chain(*asked)]
    room = length + 1 - len(tail)
    weights = [WEIGHT_FILLER] * room + [WEIGHT_TEMPLATE] * (len(tail) - (2 + digits) * len(asked))
    weights += ([WEIGHT_TEMPLATE] * 2 + [WEIGHT_ANSWER] * digits) * len(asked)
    return filler_slice(filler, room, rng) + tail, weights


def needle_rows(
    count: int, length: int, filler: np.ndarray, pieces: NeedlePieces, seed, dtype="<u2"
) -> tuple[np.ndarray, np.ndarray]:
    """`count` rows as (ids, weights), both (count, length + 1); `filler` is a 1-d array of token ids."""
    rng = random.Random(str(seed))
    ids = np.empty((count, length + 1), dtype=dtype)
    weights = np.empty((count, length + 1), dtype=np.uint8)
    for i in range(count):
        row = recall_row if rng.random() < RECALL_SHARE else needle_row
        ids[i], weights[i] = row(length, filler, pieces, rng)
    return ids, weights


def needle_prompt(
    length: int,
    filler: np.ndarray,
    pieces: NeedlePieces,
    rng: random.Random,
    keys: list[tuple] | int = 1,
    depths: list[float] | None = None,
    style: str = "compact",
) -> tuple[list[int], list[int]]:
    """(prompt of exactly `length` ids that ends where the answer begins, the answer's ids), for evaluation.

    The first of `keys` (ids, or how many to draw) is asked for; `depths` in [0, 1] are drawn when not given.
    """
    keys = draw_keys(pieces, rng, keys) if isinstance(keys, int) else keys
    depths = [rng.random() for _ in keys] if depths is None else depths
    values = [draw_value(pieces, rng) for _ in keys]
    pairs = zip(keys, values, strict=True)
    needles = [needle_statement(pieces, key, value, style) for key, value in pairs]
    asked = needle_question(pieces, keys[0], style)
    room = length - len(asked) - sum(map(len, needles))
    if room < 0:
        raise CorpusError(f"{len(keys)} needles and a question do not fit into {length} tokens")
    ids, _ = hide_needles(needles, depths, filler_slice(filler, room, rng))
    return ids + asked, list(values[0])


def passkey_prompt(
    length: int,
    filler: np.ndarray,
    pieces: NeedlePieces,
    rng: random.Random,
    depth: float | None = None,
) -> tuple[list[int], list[int]]:
    """`needle_prompt` for " The pass key is 58301.", hidden at `depth` in [0, 1] or anywhere."""
    depths = None if depth is None else [depth]
    return needle_prompt(length, filler, pieces, rng, [pieces.passkey], depths, "prose")
