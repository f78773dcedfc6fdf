"""Run every benchmark beside this file, one process each; every line that they print is one JSON object.

With `--store` they also go into docs/bench.json, with processor, threads, versions and date, from which
`make measurements` writes docs/measurements.md.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # authoring/ is part of no installation


def main() -> int:
    codes, lines = [], []
    for path in sorted(HERE.glob("bench_*.py")):
        with subprocess.Popen(
            [sys.executable, path], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        codes.append(process.returncode)
    if any(codes):
        print("a benchmark failed: nothing is stored", file=sys.stderr)
    elif "--store" in sys.argv[1:]:
        store([json.loads(line) for line in lines if line.startswith("{")])
    return int(any(codes))


def store(lines: list[dict]) -> None:
    from authoring.measurements import store_benchmarks
    from qwen_mini.course.provenance import provenance

    machine = {**provenance(), "date": datetime.date.today().isoformat(), "lines": lines}
    print(
        f"stored in {store_benchmarks(HERE.parent, machine)}: `make measurements` writes the page"
    )


if __name__ == "__main__":
    sys.exit(main())
