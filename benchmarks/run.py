"""Run every benchmark beside this file, one process each; every line that they print is one JSON object."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    codes = [
        subprocess.run([sys.executable, path]).returncode
        for path in sorted(Path(__file__).parent.glob("bench_*.py"))
    ]
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
