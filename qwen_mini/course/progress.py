"""One line that changes while something runs, and is gone when it has."""

import multiprocessing
import unicodedata

MARK = {"qwen_mini": "progress"}  # in the output's metadata: such outputs are not kept


def clock(seconds: float) -> str:
    """`73` -> `1:13`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def printable(text: str) -> str:
    """Text without the characters that command a terminal (title, clipboard, colours): they become a question mark."""
    return "".join("?" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


class Progress:
    """In a notebook one line that is replaced, elsewhere a line each time."""

    def __init__(self):
        self.handle = None

    def show(self, text: str) -> None:
        if not _in_notebook():
            print(text, flush=True)
        elif self.handle is None:
            from IPython.display import display

            self.handle = display({"text/plain": text}, raw=True, display_id=True, metadata=MARK)
        else:
            self.handle.update({"text/plain": text}, raw=True, metadata=MARK)

    def clear(self) -> None:
        """Leave nothing behind."""
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True, metadata=MARK)


def _in_notebook() -> bool:
    if multiprocessing.parent_process():  # a fork: what it displays would reach the kernel's own session
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"
