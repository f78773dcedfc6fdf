"""One line that changes while something runs, and is gone when it has."""

import multiprocessing
import sys
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
        if not in_notebook():
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


def in_notebook() -> bool:
    """Does a Jupyter kernel run this? IPython in a terminal is a terminal, and a fork would reach the kernel's session."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None and not multiprocessing.parent_process()
