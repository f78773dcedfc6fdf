"""A scale's real text under a tokenizer of a few hundred ids, for models so small that more ids would be most of them."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from . import artifacts
from .corpus_files import available_sources, read_documents
from .scales import ScaleConfig


@dataclass
class SmallText:
    """Windows of two packed streams: `train` (windows, length + 1), shuffled, and a fixed held-out sample."""

    train: "numpy.ndarray"  # noqa: F821
    heldout: "numpy.ndarray"  # noqa: F821
    bytes_per_token: float

    def batch(self, start: int, rows: int):
        """Inputs and targets, (rows, length) each, from window `start` on; after the last comes the first."""
        import numpy as np
        import torch

        places = np.arange(start, start + rows) % len(self.train)
        window = torch.from_numpy(self.train[places].astype(np.int64))
        return window[:, :-1], window[:, 1:]


def open_text(
    config: ScaleConfig,
    seed: int = 0,
    vocab_size: int = 384,
    length: int = 64,
    heldout: int = 16_384,
) -> SmallText:
    """`SmallText` of a scale, made if it is not there; `heldout`: tokens to measure on, spread over all documents."""
    import numpy as np

    prepare_text(config, seed, vocab_size)
    folder = artifacts.find(config.name, f"small_text_{vocab_size}")
    train, held = (np.load(folder / f"{split}.npy") for split in ("train", "heldout"))
    size = json.loads((folder / "heldout.json").read_text())["bytes"]
    windows = [
        np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length] for ids in (train, held)
    ]
    order = np.random.default_rng(seed).permutation(len(windows[0]))
    count = min(len(windows[1]), heldout // length)
    places = np.linspace(0, len(windows[1]) - 1, count).astype(int)
    return SmallText(windows[0][order], windows[1][places], size / len(held))


def prepare_text(config: ScaleConfig, seed: int = 0, vocab_size: int = 384) -> None:
    """The documents of the prepared corpus, encoded anew, as the stage "small_text_<vocab_size>": two packed streams.

    Every domain of real text takes part with all it has; held-out documents stay held out.
    """
    import numpy as np

    from qwen_mini.corpus import open_prepared, pack, prepare_corpus, shuffled
    from qwen_mini.tokenizer import Tokenizer

    prepare_corpus(config, seed)
    corpus, tokenizer = open_prepared(config, seed)
    inputs = artifacts.read_manifest(artifacts.find(config.name, "corpus"))["inputs"]
    inputs, stage = {"corpus": inputs, "vocab_size": vocab_size}, f"small_text_{vocab_size}"
    with artifacts.stage_lock(config.name, stage):
        found = artifacts.read_manifest(artifacts.stage_dir(config.name, stage))
        if artifacts.made(config.name, stage) and found.get("inputs") == inputs:
            return
        texts = {
            split: shuffled(_documents(corpus, tokenizer, split), seed, "small_text")
            for split in ("train", "heldout")
        }
        small = Tokenizer.train(texts["train"][: max(200, len(texts["train"]) // 16)], vocab_size)
        with artifacts.write_stage(config.name, stage, inputs) as folder:
            for split, documents in texts.items():
                stream = pack(small.encode_batch(documents), small.endoftext_id)
                np.save(folder / f"{split}.npy", stream)
                size = sum(len(text.encode()) + 1 for text in documents)
                (folder / f"{split}.json").write_text(json.dumps({"bytes": size}))


def _documents(corpus, tokenizer, split: str) -> list[str]:
    """The documents of all domains of real text, as text again."""
    import numpy as np

    found = []
    for name, facts in corpus.domains.items():
        if facts["kind"] == "real":
            ids = np.asarray(corpus.tokens(name, split))
            parts = np.split(ids, np.flatnonzero(ids == tokenizer.endoftext_id) + 1)
            found += [tokenizer.decode(part[:-1].tolist()) for part in parts if len(part) > 1]
    return found


def domain_rows(config: ScaleConfig, tokenizer: Path, kilobytes: int, length: int) -> dict:
    """Side → domain → rows of ids, (rows, length + 1), of at most so much text of each source that is at hand.

    Documents go to the sides "train", "tune" and "final", 8 : 1 : 1, by a hash of their text: identical ones stand
    together. A source too small to fill every side is left out.
    """
    import torch

    from qwen_mini.tokenizer import Tokenizer

    encoder, sides = Tokenizer.from_pretrained(tokenizer), {"train": {}, "tune": {}, "final": {}}
    for source in available_sources(config)[0]:
        kept, size = {side: [] for side in sides}, 0
        for document in read_documents(source):
            raw = document.text.encode()
            if (size := size + len(raw)) > 1_000 * kilobytes:
                break
            side = {0: "tune", 1: "final"}.get(zlib.crc32(raw) % 10, "train")
            kept[side].append(document.text)
        if not all(kept.values()):
            continue
        for side, texts in kept.items():
            ids = [i for text in encoder.encode_batch(texts) for i in (*text, encoder.endoftext_id)]
            rows = len(ids) // (length + 1)
            sides[side][source.domain] = torch.tensor(ids[: rows * (length + 1)]).view(rows, -1)
    return sides


def epochs(count: int, batch: int, steps: int, seed: int) -> "torch.Tensor":  # noqa: F821
    """Which of `count` rows each step reads, (steps, batch): all of them once, then all again in another order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(count, generator=generator) for _ in range(1 + steps * batch // count)]
    return torch.cat(order)[: steps * batch].view(steps, batch)
