"""Compare the goldens with today's code, or store them anew.

python tests/golden_check.py [MODULE …]          what moved
python tests/golden_check.py --write [MODULE …]  store; refused if a value moved and no number did
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before an installed copy

import golden_models  # noqa: E402, F401
import golden_quality  # noqa: E402, F401
import golden_scaling_up  # noqa: E402, F401
import golden_texts  # noqa: E402, F401
import golden_training  # noqa: E402, F401
from golden_registry import GOLDENS, fresh, report, stale, write  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="chapters; default: all")
    parser.add_argument("--write", action="store_true", help="store the values of today's code")
    options = parser.parse_args()
    if unknown := [name for name in options.modules if name not in GOLDENS]:
        parser.error(f"no goldens are known for {', '.join(unknown)}: use {', '.join(GOLDENS)}")
    failed = False
    for module in options.modules or GOLDENS:
        if options.write:
            try:
                print(f"{module}: written {', '.join(write(module))}")
            except ValueError as error:
                print(error)
                failed = True
        else:
            new = fresh(module)
            said = [
                report(module),
                stale(module),
                f"{module}: not stored yet: {', '.join(new)}" if new else "",
            ]
            failed |= any(said)
            print(
                "\n".join(filter(None, said))
                or f"{module}: {len(GOLDENS[module])} goldens, as stored"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
