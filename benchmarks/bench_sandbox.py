"""Programs that a model wrote, a second, in one worker of the sandbox: against a fresh, isolated Python for each.

The peer is what a reader would write first, `python -I -c`: it confines nothing but the imports. Both run the same
functions on the same calls and must give the same results.
"""

import json
import subprocess
import sys
import time

from lines import report

from qwen_mini.course.sandbox import run_sandboxed, stop_workers

PROGRAM = (
    "def middle(values):\n    ordered = sorted(values)\n    return ordered[len(ordered) // 2]\n"
)
CALLS = [[[5, 1, 4]], [[2, 2, 9, 7, 7]], [[0]]]
MANY, FEW, TRIES = 600, 20, 3


def in_sandbox() -> float:
    """Programs a second, the best of some tries after one to warm up."""
    best = 0.0
    for _ in range(TRIES + 1):
        begun = time.perf_counter()
        outcomes = [run_sandboxed(PROGRAM, "middle", CALLS) for _ in range(MANY)]
        best = max(best, MANY / (time.perf_counter() - begun))
        assert [outcome.values for outcome in outcomes] == [[4, 7, 0]] * MANY
    stop_workers()
    return best


def in_fresh_processes() -> float:
    """The same with a process for every program."""
    source = f"{PROGRAM}import json\nprint(json.dumps([middle(*call) for call in {CALLS}]))"
    best = 0.0
    for _ in range(TRIES):
        begun = time.perf_counter()
        for _ in range(FEW):
            out = subprocess.run([sys.executable, "-I", "-c", source], stdout=-1, check=True).stdout
            assert json.loads(out) == [4, 7, 0]
        best = max(best, FEW / (time.perf_counter() - begun))
    return best


def main() -> None:
    ours, peer = in_sandbox(), in_fresh_processes()
    what = "programs in the sandbox, one worker"
    report(what, ours, peer, "a fresh `python -I` each", "programs/s")


if __name__ == "__main__":
    main()
