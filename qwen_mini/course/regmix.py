"""The runs that RegMix published (arXiv 2407.01492), which chapter 10 reads if a reader has downloaded them."""

from pathlib import Path


def read_runs(folder: str | Path) -> list:
    """Shares and Pile-CC losses of the 1M runs, then of the 1B runs: (runs, domains) and (runs, 1) each.

    ValueError for a folder without the four tables, or with other ones.
    """
    found = []
    for split, size in (("train", "1m"), ("test", "1B")):
        shares = _columns(Path(folder) / f"{split}_mixture_{size}.csv")
        losses = _columns(Path(folder) / f"{split}_pile_loss_{size}.csv", "pile_cc_val_loss")
        if len(shares) != len(losses) or not len(shares):
            raise ValueError(
                f"{folder}: each {split} mixture needs a row of shares and one of losses"
            )
        found += [shares, losses]
    return found


def _columns(path: Path, ending: str = ""):
    """The columns of a CSV file whose names end so, without the first, (rows, columns)."""
    import numpy as np

    try:
        names, *rows = path.read_text(encoding="utf-8").splitlines()
        chosen = [i for i, name in enumerate(names.split(",")) if i and name.endswith(ending)]
        if not chosen:
            raise ValueError(f"it has no column that ends in {ending!r}")
        return np.loadtxt(rows, delimiter=",", usecols=chosen, ndmin=2)
    except (OSError, ValueError) as error:
        why = f"is no table of numbers as RegMix publishes them: {error}"
        raise ValueError(f"{path} {why}") from None
