"""Text for pre-training that need not fit on a disk: streamed from a data set, shared out among processes, resumed.

The package `datasets` reads the rows, gives each process its own and knows where it stands. Rows come in the order of
the files, for what waits in a buffer that shuffles would be lost when a run goes on. No row comes twice.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .corpus_files import CorpusError, Source, open_rows, read_sources, row_texts
from .ranks import world
from .scales import Phase

if TYPE_CHECKING:
    from qwen_mini.tokenizer import Tokenizer
    from qwen_mini.training import Batch

BLOCK = 256  # documents that are encoded at once, on all cores


class TokenStream:
    """Windows of tokens for process `rank` of `ranks`: documents, each with its `<|endoftext|>`, packed one after another.

    wanted: tokens that this process will take in all, for the error where a source ends too early; keep: which texts
    are trained on. What a text says is text: it never becomes a control token.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: "Tokenizer",
        wanted: int,
        rank: int = 0,
        ranks: int = 1,
        keep: Callable[[str], bool] = bool,
    ):
        rows = open_rows(source)
        from datasets.distributed import split_dataset_by_node

        self.source, self.tokenizer, self.wanted, self.keep = source, tokenizer, wanted, keep
        self.rank, self.ranks = rank, ranks
        self.rows = split_dataset_by_node(rows, rank, ranks)
        self.texts = row_texts(self.rows, source)
        self.begin = self.rows.state_dict()  # of the block of documents that is being used
        self.left, self.taken = np.empty(0, np.int64), 0  # tokens read and not used yet; used

    def window(self, length: int) -> np.ndarray:
        """The next length + 1 tokens; the last one begins the next window, so that each is a target once.

        CorpusError where the source has no more.
        """
        while len(self.left) <= length:
            self._read()
        window, self.left = self.left[: length + 1], self.left[length:]
        self.taken += length
        return window

    def _read(self) -> None:
        """Add the tokens of the next documents to those that are left."""
        from qwen_mini.corpus import pack

        self.begin = self.rows.state_dict()
        block = list(itertools.islice(self.texts, BLOCK))
        if not block:
            had = f"ended after {self.taken + len(self.left):,} of {self.wanted:,} tokens"
            remedy = "name a larger source or train on fewer tokens, for none are read twice"
            who = f"on rank {self.rank} of {self.ranks}"
            raise CorpusError(f"source {self.source.name!r} {had} {who}: {remedy}")
        kept = [text for text in block if text and self.keep(text)]
        ids, end = self.tokenizer.encode_batch(kept), self.tokenizer.endoftext_id
        self.left = np.concatenate([self.left, pack(ids, end, "<i8")])

    def batches(self, rows: int, length: int) -> Callable[[int, int, int], "Batch"]:
        """A function (step, rank, ranks) → this process's `Batch` of a step: every `ranks`-th of `rows` rows."""
        import torch
        from qwen_mini.training import Batch

        own = len(range(self.rank, rows, self.ranks))

        def batch(step: int, rank: int = 0, ranks: int = 1) -> Batch:
            asked, stands = (rank, ranks, step * own * length), (self.rank, self.ranks, self.taken)
            if asked != stands:
                what = "(process, processes, tokens taken)"
                raise CorpusError(f"the stream stands at {stands} {what}, not at {asked}")
            tokens = torch.from_numpy(np.stack([self.window(length) for _ in range(own)]))
            return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(own, length))

        return batch

    def state_dict(self) -> dict:
        """Where the stream stands, JSON-able: the block of documents that it uses, and how much of that is left."""
        place = {"begin": self.begin, "left": len(self.left), "taken": self.taken}
        stream = {"source": self.source.name, "version": self.source.version}
        return stream | {"rank": self.rank, "ranks": self.ranks} | place

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was called; CorpusError for the state of another stream or number of processes."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CorpusError("this is no state of a stream of tokens: begin anew without it")
        if state["ranks"] != self.ranks:
            shared = f"the stream was shared by {state['ranks']} process(es), not {self.ranks}"
            raise CorpusError(f"{shared}: go on with as many as before")
        if other := [key for key in ("source", "version", "rank") if state[key] != own[key]]:
            differs = f"of {other[0]} {state[other[0]]!r}, not {own[other[0]]!r}"
            raise CorpusError(f"the state is that of a stream {differs}: go on with that one")
        self.rows.load_state_dict(state["begin"])
        self.texts, self.left = row_texts(self.rows, self.source), self.left[:0]
        if state["left"]:
            self._read()
        if len(self.left) < state["left"]:
            raise CorpusError("the state is of other documents or another tokenizer: begin anew")
        self.left = self.left[len(self.left) - state["left"] :]
        self.begin, self.taken = state["begin"], state["taken"]


def open_streams(
    names: Iterable[str],
    phases: Sequence[Phase],
    tokenizer: "Tokenizer",
    keep: Callable[[str], bool] = bool,
) -> dict[str, TokenStream]:
    """Domain → stream of this process, for those of the named sources that are streamed and in the phases' mixtures."""
    rank, ranks = world()
    known, streams = read_sources(), {}
    for source in (known[name] for name in names):
        tokens = sum(phase.tokens * phase.mixture.get(source.domain, 0) for phase in phases)
        if source.streamed and tokens:
            if source.domain in streams:
                twice = f"two streamed sources have the domain {source.domain!r}"
                raise CorpusError(f"{twice}: leave one of them out, or give it a domain of its own")
            wanted = math.ceil(tokens / ranks)
            streams[source.domain] = TokenStream(source, tokenizer, wanted, rank, ranks, keep)
    return streams


def stream_states(streams: dict[str, TokenStream]) -> list[dict[str, dict]]:
    """Where the streams of every process stand, by rank; under torchrun all call this together."""
    own = {domain: stream.state_dict() for domain, stream in streams.items()}
    states = [own] * world()[1]
    if len(states) > 1:
        import torch.distributed as dist

        dist.all_gather_object(states, own)
    return states


def restore_streams(streams: dict[str, TokenStream], states: list[dict[str, dict]]) -> None:
    """Put this process's streams where `stream_states` found them; CorpusError for others."""
    own = states[min(world()[0], len(states) - 1)] if states else {}  # too few: refused by name
    if own.keys() != streams.keys():
        had = ", ".join(sorted(own)) or "nothing"
        now = ", ".join(sorted(streams)) or "nothing"
        raise CorpusError(f"the state is of a run that streamed {had}, and this one streams {now}")
    for domain, stream in streams.items():
        try:
            stream.load_state_dict(own[domain])
        except CorpusError:
            raise
        except Exception:  # what is damaged can raise anything
            damaged = "where the stream stood is damaged in this training state"
            raise CorpusError(f"{damaged}: delete it to start from the beginning") from None
