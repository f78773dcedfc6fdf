"""What models answered, as JSONL on disk: whole batches, written as they come, taken up again after a kill."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import alone
from .errors import CourseError
from .paths import shown

if TYPE_CHECKING:
    from torch import nn


def model_digest(model: "nn.Module") -> str:
    """Sixteen hex digits of all weights and their names: the same for the same model in the same precision."""
    import torch

    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class ResponseLog:
    """A JSONL file that grows by whole batches: a header, then one line an item; what is in it survives a kill.

    path: None for no file. sizes: how many items each batch has. `batches`: those that the file holds already. A torn
    end is cut off. CourseError for a file of another run, a damaged one, and one that another process is writing.
    """

    def __init__(self, path: str | Path | None, header: dict, sizes: Sequence[int]):
        self.path, self.header, self.sizes = path and Path(path), header, sizes
        self.batches, self.file, self.held = [], None, contextlib.ExitStack()

    def __enter__(self) -> "ResponseLog":
        if self.path is not None:
            with contextlib.ExitStack() as held:
                writing = alone(self.path, f"{shown(self.path)} is being written", wait=False)
                held.enter_context(writing)
                self.file = held.enter_context(open(self.path, "ab+"))
                self._take_over()
                self.held = held.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.held.close()

    def _take_over(self) -> None:
        """Read the whole batches of the file, cut off the rest, and write the header into an empty one."""
        self.file.seek(0)
        pieces = self.file.read().split(b"\n")[:-1]  # what follows the last line break is torn
        try:
            found = [json.loads(piece) for piece in pieces]
        except ValueError:
            raise CourseError(
                f"{shown(self.path)} is damaged: delete it, or name another file"
            ) from None
        if found and found[0] != self.header:
            theirs = found[0] if isinstance(found[0], dict) else {}
            other = [key for key, value in self.header.items() if theirs.get(key) != value]
            what = f"other {' and '.join(other)}" if theirs and other else "something else"
            raise CourseError(f"{shown(self.path)} is of {what}: delete it, or name another file")
        ends = [end for end in itertools.accumulate(self.sizes, initial=1) if end <= len(found)]
        self.file.truncate(sum(len(piece) + 1 for piece in pieces[: ends[-1] if ends else 0]))
        self.batches = [found[a:b] for a, b in itertools.pairwise(ends)]
        if not found:
            self._append([self.header])

    def _append(self, lines: Sequence[dict]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def batch(self, number: int, make: Callable[[], list[dict]]) -> list[dict]:
        """The lines of a batch: those that the file holds, or new ones, which are written to disk if there is a path."""
        if number < len(self.batches):
            return self.batches[number]
        lines = make()
        if self.file is not None:
            self._append(lines)
        return lines
