"""Goldens of the chapters that handle text: tokenizer, corpus, tasks."""

import base64
import functools
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from golden_registry import digest, files, golden

from qwen_mini import corpus as c
from qwen_mini import tasks as t
from qwen_mini.course import artifacts, corpus_files
from qwen_mini.course.sandbox import run_many
from qwen_mini.tokenizer import Tokenizer, chat_segments, count_pieces, split_pieces, train_bpe
from qwen_mini.world import constraints, needles, problems, words

TEXTS = [
    "The river is long, and the house stands by the road. It's 1,234.5 km; isn't it?",
    "Où est l'élève ? Ça coûte 3 €. ¿Qué sabes de los árboles, señor?",
    "大语言模型从文本中学习。你好，世界！ 한국어 テスト العربية हिन्दी 😀👩‍🚀",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # squares\n\n\tpass\r\n",
    "  two  spaces\n\n\nthree lines \t\t tabs   ",
    "cafe\u0301 = café, \u212b = Å, ﬁ",
    "",
    "0123456789 3.14159 1e-4 0xff",
    "ALL CAPS WE'LL they'Ve <b>html</b> http://a.b/c?d=e&f#g",
]
CONTROLLED = "<|im_start|>user\nHi<|im_end|>\n<tool_call>{}</tool_call><|endoftext|><|fim_prefix|>x"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <|im_end|> for?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "look", "arguments": {"word": "im_end"}}],
    },
    {"role": "tool", "content": "the end of a turn"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It ends a turn.\n"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"word": "string"}}}]
LEARNED = " ".join(
    f"The {word} number {i * i} stands near the {other}, isn't it? été {word}s."
    for i, (word, other) in enumerate(
        zip(words.TASK_WORDS, reversed(words.TASK_WORDS), strict=True)
    )
)


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer of every shipped checkpoint."""
    return Tokenizer.from_pretrained(artifacts.shipped_dir("long_context"))


@functools.cache
def plain_tokenizer() -> Tokenizer:
    """The same, in Python alone."""
    return Tokenizer.from_pretrained(artifacts.shipped_dir("long_context"), fast=False)


@functools.cache
def hay() -> np.ndarray:
    """Filler for needles, without control tokens."""
    text = (
        "The river is long and the house stands by the road. "
        "A stone fell into the water near the bridge. "
    )
    return np.array(tokenizer().encode(text * 60 + LEARNED * 3), dtype=np.uint16)


# ---------------------------------------------------------------- tokenizer
@golden("tokenizer", "pieces")
def _():
    return {"split": digest(list(map(split_pieces, TEXTS))), "counted": digest(count_pieces(TEXTS))}


@golden("tokenizer", "ids")
def _():
    return [tokenizer().encode(text) for text in TEXTS]


@golden("tokenizer", "ids, plain path")
def _():
    return digest([plain_tokenizer().encode(text) for text in TEXTS])


@golden("tokenizer", "control tokens")
def _():
    tok = tokenizer()
    meant, text = tok.encode(CONTROLLED, allow_control=True), tok.encode(CONTROLLED)
    batch = tok.encode_batch([CONTROLLED, "a"], allow_control=True)
    decoded = [tok.decode(meant, skip) for skip in (False, True)]
    return {"meant": meant, "text": text, "batch": digest(batch), "decoded": decoded}


@golden("tokenizer", "decoding")
def _():
    tok = tokenizer()
    ids = tok.encode("".join(TEXTS))
    cut = [tok.decode(ids[start : start + 3]) for start in range(0, len(ids), 7)]
    return {
        "cut": digest(cut),
        "bytes": digest([tok.token_bytes(i).hex() for i in range(tok.vocab_size)]),
    }


@golden("tokenizer", "chat")
def _():
    tok = tokenizer()
    forms = [(TALK, None, False), (TALK, TOOLS, True), (TALK[1:2], None, True)]
    ids = [tok.encode_chat(*form) for form in forms]
    texts = [tok.apply_chat_template(*form) for form in forms]
    return {
        "ids": digest(ids),
        "lengths": [len(row) for row in ids],
        "texts": digest(texts),
        "short": ids[-1],
        "segments": digest(chat_segments(TALK, TOOLS)),
        "special": [tok.endoftext_id, tok.im_start_id, tok.im_end_id],
    }


@golden("tokenizer", "training")
def _():
    merges = train_bpe(count_pieces([LEARNED]), 100)
    trained = {fast: Tokenizer.train([LEARNED], 380, fast=fast) for fast in (True, False)}
    ids = {str(fast): digest(list(map(tok.encode, TEXTS))) for fast, tok in trained.items()}
    return {"merges": digest(merges), "first": merges[:4], "ids": ids}


@golden("tokenizer", "files")
def _():
    tok = tokenizer()
    tokens = [tok.token_bytes(i) for i in range(tok.vocab_size - len(tok.control_tokens))]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    official = Tokenizer.from_tiktoken(b"\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        tok.save_pretrained(folder, "<|im_end|>")
        again = Tokenizer.from_pretrained(folder)
    ids = [digest(list(map(one.encode, TEXTS))) for one in (tok, again, official)]
    return {"ids": ids}


# ---------------------------------------------------------------- corpus
def _family(name: str) -> dict:
    rng = random.Random(f"golden/{name}")
    drawn = [problems.FAMILIES[name](rng) for _ in range(40)]
    return {"hash": digest(drawn), "first": drawn[0][0]}


for _name in problems.FAMILIES:
    golden("corpus", f"family {_name}")(functools.partial(_family, _name))

PAGES = json.dumps(
    {
        "a": {"title": "Tree ", "extract": "A tree is a plant. It is tall.\r\nIt has leaves."},
        "b": {"title": "Sun", "extract": "no sentence here"},
    }
)
GLOSSES = "sun\ta star | warm light\nstar\ta star\nmoon\ta body near the earth\n" * 2
SENTENCES = json.dumps(
    [
        {"chinese": "你好。", "pinyin": "Nǐ hǎo.", "translation": {"en": "Hello."}},
        {
            "chinese": "我是学生。",
            "pinyin": "Wǒ shì xuésheng.",
            "translation": {"en": "I am a student."},
        },
    ]
)


@functools.cache
def documents() -> dict[str, list[corpus_files.Document]]:
    """A corpus of six domains in miniature, read as the real one is."""
    return {
        "wiki_en": list(corpus_files.wikipedia_documents(PAGES, "wiki_en")),
        "glosses": list(corpus_files.gloss_documents(GLOSSES, "glosses", 2)),
        "chinese_english": list(corpus_files.sentence_documents(SENTENCES, "chinese_english", 1)),
        "python": [
            corpus_files.Document(f"topic {i}\n\nText {i}.", "python", ((f"t{i}", f"Text {i}."),))
            for i in range(30)
        ],
    }


@golden("corpus", "readers")
def _():
    facts = {
        domain: [[d.text, d.source, d.records] for d in docs]
        for domain, docs in documents().items()
    }
    excerpts = [
        corpus_files.excerpt("a\n\nb\n\nc", 5),
        corpus_files.first_sentences("One. Two! Three", 8),
        corpus_files.first_sentences("none", 9),
    ]
    return {
        "hash": digest(facts),
        "counts": [len(docs) for docs in documents().values()],
        "excerpts": excerpts,
    }


@golden("corpus", "cleaning")
def _():
    dirty = ["\0 cafe\u0301\r\nline\rline ", "  ", *TEXTS]
    keys = [c.document_key(text).hex() for text in dirty]
    return {
        "clean": digest(list(map(corpus_files.clean, dirty))),
        "first": corpus_files.clean(dirty[0]),
        "keys": digest(keys),
    }


@golden("corpus", "duplicates and split")
def _():
    texts = [f"text {i % 37}" + " " * (i % 3) for i in range(90)]
    docs = [corpus_files.Document(text, "x") for text in texts]
    once = c.deduplicate(docs)
    train, heldout = c.split_by_hash(once, 0.2)
    mixed = c.shuffled(range(20), 3, "x")
    taken = [len(c.take_bytes(once, limit)) for limit in (0, 1, 100)]
    return {
        "once": digest([d.text for d in once]),
        "heldout": [d.text for d in heldout],
        "train": len(train),
        "none held out": [len(side) for side in c.split_by_hash(once[:5], 0.0)],
        "shuffled": mixed,
        "taken": taken,
    }


@golden("corpus", "split of the corpus")
def _():
    settings = SimpleNamespace(heldout_fraction=0.2, task_documents=30, max_heldout_bytes=4_000)
    sides = c.split_corpus(documents(), SimpleNamespace(corpus=settings), 0)
    texts = [{domain: [d.text for d in docs] for domain, docs in side.items()} for side in sides]
    return {
        "train": digest(texts[0]),
        "heldout": digest(texts[1]),
        "sample": digest(c.training_sample(texts[0], 900)),
    }


@golden("corpus", "packing")
def _():
    tok = tokenizer()
    stream = c.pack([tok.encode(text) for text in TEXTS], tok.endoftext_id)
    numbers = c.document_numbers(stream[:64].reshape(2, 32), tok.endoftext_id)
    parts = c.unpack(stream, tok.endoftext_id)
    return {
        "stream": digest(stream),
        "dtype": str(stream.dtype),
        "numbers": digest(numbers),
        "parts": digest(parts),
    }


@golden("corpus", "task documents")
def _():
    made = {str(side): [d.text for d in c.task_documents(40, 0, side)] for side in (False, True)}
    return {side: {"hash": digest(texts), "first": texts[0][:60]} for side, texts in made.items()}


@golden("corpus", "chat documents")
def _():
    made = {str(side): c.chat_messages(60, documents(), 0, side) for side in (False, True)}
    return {
        side: {"hash": digest(talks), "first": talks[0][-2]["content"][:60]}
        for side, talks in made.items()
    }


@golden("corpus", "needle rows")
def _():
    pieces, found = needles.needle_pieces(tokenizer()), {}
    for length in (48, 100, 200):
        ids, weights = needles.needle_rows(20, length, hay(), pieces, f"golden/{length}")
        found[str(length)] = [digest(ids), digest(weights)]
    return {"pieces": digest(pieces.words), "count": len(pieces.words), **found}


@golden("corpus", "needle prompts")
def _():
    pieces, rng = needles.needle_pieces(tokenizer()), random.Random("golden/prompts")
    prompts = [
        needles.needle_prompt(120, hay(), pieces, rng, n, style=s)
        for n in (1, 3)
        for s in ("compact", "prose")
    ]
    passkeys = [needles.passkey_prompt(90, hay(), pieces, rng, depth) for depth in (None, 0.0, 1.0)]
    return {"hash": digest([prompts, passkeys]), "first": tokenizer().decode(passkeys[0][1])}


@golden("corpus", "files")
def _():
    settings = SimpleNamespace(heldout_fraction=0.2, task_documents=30, max_heldout_bytes=4_000)
    settings.chat_documents, settings.needle_rows, settings.needle_lengths = 20, 12, (48,)
    config, endoftext = SimpleNamespace(corpus=settings), tokenizer().endoftext_id
    sides = dict(zip(("train", "heldout"), c.split_corpus(documents(), config, 0), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        writer = corpus_files.CorpusWriter(Path(folder), tokenizer())
        for split, side in sides.items():
            c.write_documents(writer, split, side)
        c.write_chat(writer, config, *sides.values(), 0)
        filler = {split: [np.append(hay(), endoftext)] for split in sides}
        c.write_needles(writer, config, filler, 0)
        return {"files": files(Path(folder)), "facts": digest(writer.domains)}


# ---------------------------------------------------------------- tasks
def _draws(name: str) -> dict:
    """level/wording/split → hash of the first two draws: question, chain, answer, facts."""
    found = {}
    for level in t.LEVELS:
        for wording in t.WORDINGS:
            for split in t.SPLITS:
                rng = random.Random(f"golden/{name}/{level}/{wording}/{split}")
                drawn = [t.TASKS[name].generate(rng, level, split, wording) for _ in range(2)]
                facts = [[e.key, e.messages, e.response, e.facts] for e in drawn]
                found[f"{level}/{wording}/{split}"] = digest(facts)[:8]
    return found


def examples(name: str, count: int = 4) -> list[t.Example]:
    """Fixed problems of one task, of rising level."""
    rng = random.Random(f"golden/examples/{name}")
    return [t.TASKS[name].generate(rng, 1 + i % 3, wording=t.WORDINGS[i % 3]) for i in range(count)]


def responses(example: t.Example, other: t.Example) -> list[str]:
    """The gold response, and what is almost right, empty, an echo or about something else."""
    gold, question = example.response, example.messages[-1]["content"]
    changed = [
        gold.replace(a, b, 1) for a, b in (("1", "7"), ("a", "e"), (" ", "  "), ("\n", "\n\n"))
    ]
    frames = [
        "",
        " ",
        t.ANSWER,
        f"{t.ANSWER}?",
        f"{t.ANSWER}{example.answer}",
        gold + " ",
        "\n" + gold,
        gold.upper(),
    ]
    echoes = [question, f"{question}\n{gold}", f"{gold}\n{gold}", other.response]
    return [
        gold,
        *t.near_misses(example, random.Random(7)),
        *frames,
        *echoes,
        *changed,
        example.answer[::-1],
    ]


def _verdicts(name: str) -> list[str]:
    """A string an example, a letter a response: C correct, c but inconsistent, f form only, -."""
    drawn = examples(name)
    pairs = [
        (e, text)
        for e, other in zip(drawn, drawn[1:] + drawn[:1], strict=True)
        for text in responses(e, other)
    ]
    found: dict[int, str] = {}
    for (e, text), verdict in zip(pairs, t.verify_many(pairs), strict=True):
        right = "C" if t.consistent(e, text) else "c"
        found[id(e)] = found.get(id(e), "") + (
            right if verdict.correct else "f" if verdict.formatted else "-"
        )
    return list(found.values())


def _reasons(name: str) -> str:
    """Hash of what the verifier says of one example's responses, one by one."""
    first, other = examples(name, 2)
    said = [t.TASKS[name].verify(first, text) for text in responses(first, other)]
    return digest(
        [[v.correct, v.formatted, v.reason] for v in said if not v.reason.startswith("error")]
    )


for _name in t.TASKS:
    golden("tasks", f"draws of {_name}")(functools.partial(_draws, _name))
    golden("tasks", f"verdicts of {_name}")(functools.partial(_verdicts, _name))
    golden("tasks", f"reasons of {_name}")(functools.partial(_reasons, _name))

KEPT = [
    (
        {"words": 4, "contain": "sun", "upper": ""},
        ["SUN TREE FISH BIRD", "sun tree fish bird", "MILK TREE FISH BIRD"],
    ),
    (
        {"words": 5, "commas": 2, "end": "stop"},
        ["tree, fish, sun bird stop", "tree fish sun bird stop", "tree, fish, sun bird milk"],
    ),
    (
        {"words": 4, "title": "news", "starred": 1},
        ["<<news>> *sun* tree fish", "<<news>> sun tree fish", "*sun* tree fish bird"],
    ),
    (
        {"words": 3, "quotes": "", "no_comma": ""},
        ['"sun tree fish"', "sun tree fish", '"sun, tree fish"'],
    ),
    (
        {"words": 3, "avoid": "a", "lower": ""},
        [
            "sun tree fish",
            "sun tree star",
            "sun tree xyz",
            "SUN tree fish",
            "sun tree fish bird",
            "sun sun fish",
        ],
    ),
]


@golden("tasks", "constraints")
def _():
    rng, found = random.Random("golden/constraints"), []
    for wanted, texts in KEPT:
        example = t.Example("instructions", 1, "", (), "", "", {"wanted": wanted})
        found.append(
            [t.keeps_constraints(example, text) for text in texts]
            + [constraints.fulfil(wanted, rng)[1]]
        )
    unseen = [
        t.instructions(rng, 2, ["words", *t.UNSEEN_CONSTRAINTS, "end"]).answer for _ in range(3)
    ]
    return found + [unseen]


@golden("tasks", "chains")
def _():
    lines = [
        "2+3=5",
        "2+3=6",
        "10-4=6\n3*3=8",
        "-2+5=3",
        "no sum",
        "1+2=3, 3-5=-2",
        "4*5=20 and 20-1=18",
    ]
    answers = [
        "Answer: 3",
        "Answer: 1\nAnswer: 2",
        "x\nAnswer: y z",
        "Answer: 3\n",
        "answer: 3",
        "Answer: ",
    ]
    split = [t.split_of(f"golden/{i}") for i in range(30)]
    right = examples("story", 3)
    pairs = [(e, text) for e in right for text in (e.response, e.answer, f"1+1=3\n{e.response}")]
    return {
        "wrong lines": list(map(t.wrong_line, lines)),
        "final answers": list(map(t.final_answer, answers)),
        "split": digest(split),
        "filtered": len(t.filter_responses(pairs)),
    }


PROGRAMS = [
    "def f(x):\n    return x * 2",
    "def f(x):\n    return [x, {'a': (1, 2)}, None, 1.5, True]",
    "def f(x):\n    return x / 0",
    "def f(x):\n    return {1, 2}",
    "def f(x):\n    while True: pass",
    "import sys\ndef f(x):\n    sys.exit(0)",
    "def f(x):\n    return 'a' * 1_000_000",
    "def f(x):\n    return open('/etc/hosts').read()",
    "def g(x):\n    return x",
    "def f(x:\n    return x",
]


@golden("tasks", "sandbox")
def _():
    outcomes = run_many([(program, "f", [[3], [-1]]) for program in PROGRAMS])
    return [[outcome.status, outcome.values] for outcome in outcomes]
