"""Small models that compare training texts (chapter 10): all arms and seeds of a comparison are one ensemble."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import hardware
from .scales import ScaleConfig

ROWS, LENGTH = 4, 128  # windows a step, and tokens of a window


class Proxies:
    """Trains models of two layers and width 64 under a checkpoint's tokenizer, and measures their bits per byte.

    The learning rate is `factor` times that of the scale's [data_quality]; it warms up and falls along a cosine.
    """

    def __init__(self, folder: Path, scale: ScaleConfig):
        from qwen_mini.tokenizer import Tokenizer

        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.dtype = hardware.pick_dtype(scale.run.dtype)
        self.rate = scale.data_quality.learning_rate

    def streams(self, texts_of: Mapping[str, Sequence[str]]) -> dict:
        """name -> one stream of tokens, <|endoftext|> after each text."""
        from qwen_mini.corpus import pack

        encode, end = self.tokenizer.encode_batch, self.tokenizer.endoftext_id
        return {name: pack(encode(texts), end) for name, texts in texts_of.items()}

    def heldout(self, texts_of: Mapping[str, Sequence[str]], trained_on: int) -> dict:
        """`streams` of held-out texts, cut to 4,000 tokens, or fewer for models that were trained on little."""
        streams = self.streams({name: texts[:40] for name, texts in texts_of.items()})
        tokens = min(4_000, max(4 * LENGTH, trained_on // 8))
        return {name: stream[:tokens] for name, stream in streams.items()}

    def rows(self, tokens: int) -> int:
        """Windows that hold so many tokens, a multiple of `ROWS`; ValueError for less than one step."""
        if tokens < ROWS * LENGTH:
            raise ValueError(
                f"a step of the small models reads {ROWS * LENGTH} tokens: {tokens} are too few"
            )
        return tokens // (ROWS * LENGTH) * ROWS

    def mixed(self, streams: Mapping, shares: Sequence[float], tokens: int, seed: int):
        """Windows (rows, LENGTH + 1) of the streams in these shares, in random order."""
        import numpy as np

        from qwen_mini.kernels.ensemble import windows_of

        rng, rows = np.random.default_rng([seed, 1]), self.rows(tokens)
        counts = rng.multinomial(rows, np.array(shares) / sum(shares))
        drawn = zip(streams.values(), counts, strict=True)
        found = [windows_of(stream, count, LENGTH, seed) for stream, count in drawn]
        return np.concatenate(found)[rng.permutation(rows)]

    def train(self, windows: Sequence, seeds: Sequence[int], factor: float = 1.0):
        """An `Ensemble`: member i begins from the numbers that seeds[i] draws and reads windows[i], each (rows, LENGTH + 1)."""
        import numpy as np
        import torch

        from qwen_mini.kernels.ensemble import Ensemble, EnsembleAdamW
        from qwen_mini.model import ModelConfig, Qwen
        from qwen_mini.training import learning_rate_factor

        shape = (self.tokenizer.vocab_size, 64, 176, 2, 2, 2, 32, LENGTH, 1e3)
        models, windows = [], np.stack(windows)
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(Qwen(ModelConfig(*shape, tie_word_embeddings=True)))
        ensemble = Ensemble(models, self.dtype)
        adamw, steps = EnsembleAdamW(ensemble, betas=(0.9, 0.95)), windows.shape[1] // ROWS
        for step in range(steps):
            batch = torch.from_numpy(windows[:, step * ROWS : (step + 1) * ROWS].astype(np.int64))
            _, gradients = ensemble.gradients(batch[..., :-1], batch[..., 1:])
            rate = factor * self.rate * learning_rate_factor(step, steps, 20)
            adamw.step(gradients, torch.full((len(seeds),), rate))
        return ensemble

    def compare(
        self,
        arms: Mapping[str, Sequence[str]],
        tokens: int,
        seeds: Sequence[int],
        factor: float = 1.0,
    ):
        """A model for each arm's texts and each seed, all of `tokens` tokens; and how often each arm's text is read.

        Windows are drawn in random order, none twice before all were read once. Returns the ensemble (arms · seeds
        members, arm by arm) and a number for each arm.
        """
        from qwen_mini.kernels.ensemble import windows_of

        streams, rows = self.streams(arms).values(), self.rows(tokens)
        windows = [windows_of(stream, rows, LENGTH, seed) for stream in streams for seed in seeds]
        ensemble = self.train(windows, list(seeds) * len(arms), factor)
        return ensemble, [rows * LENGTH / len(stream) for stream in streams]

    def bits_per_byte(self, ensemble, streams: Mapping):
        """(members, streams), each stream cut into windows."""
        import math

        import numpy as np
        import torch

        from qwen_mini.kernels.ensemble import rows_of
        from qwen_mini.pretraining import token_sizes

        result, sizes = [], token_sizes(self.tokenizer)
        for stream in streams.values():
            windows = rows_of(stream, LENGTH).astype(np.int64)
            losses, _ = ensemble.token_scores(torch.from_numpy(windows))
            nats = losses.sum((1, 2)).numpy()
            result.append(nats / math.log(2) / sizes[windows[:, 1:]].sum())
        return np.stack(result, 1)
