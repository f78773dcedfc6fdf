"""The result of a benchmark as a line of JSON, the form that `run.py --store` keeps."""

import json


def report(name: str, ours: float, peer: float, peer_name: str, unit: str = "s") -> None:
    """Print one result in three digits; the ratio says how many times better ours is, of a time or of a rate."""
    ratio = peer / ours if unit in ("s", "ms") else ours / peer
    line = {"name": name, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": unit}
    short = {k: float(f"{x:.3g}") if isinstance(x, float) else x for k, x in line.items()}
    print(json.dumps(short | {"ratio": round(ratio, 2)}, ensure_ascii=False), flush=True)
