"""What has to be made anew, told without executing anything: from keys and versions, and with the time it will take."""

import json
from dataclasses import dataclass
from pathlib import Path

from .nb import Notebook, notebooks
from .outputs import SCALE
from .paths import PACKAGE
from .records import BadRecord, read
from .scales import SECTIONS, load_scale, scale_names, section_digest
from .training import STAGES, handle
from .versions import other_versions


@dataclass(frozen=True)
class Stale:
    """One thing that is not of today's code, and the seconds that it took last time."""

    what: str
    reason: str
    seconds: float = 0.0


def stale(root: Path) -> list[Stale]:
    """Stages, then records, then notebooks whose outputs are older than what they show."""
    return stale_stages(root) + stale_records(root) + stale_outputs(root)


def stale_stages(root: Path) -> list[Stale]:
    """Shipped checkpoints made by another version of a chapter."""
    found = []
    for name, facts in _manifests(root).items():
        if reason := other_versions(facts.get("versions", {})) or _other_settings(
            root, name, facts
        ):
            found.append(
                Stale(f"stage {name}", reason, facts.get("provenance", {}).get("seconds", 0))
            )
    return found


def stale_records(root: Path) -> list[Stale]:
    """Shipped records made by another version of a chapter, or not whole."""
    found = []
    for name, record in _records(root).items():
        if isinstance(record, BadRecord):
            found.append(Stale(f"record {name}", str(record)))
        elif reason := other_versions(record["versions"]):
            found.append(Stale(f"record {name}", reason, record["seconds"]))
    return found


def stale_outputs(root: Path) -> list[Stale]:
    """Notebooks without outputs, with outputs of other code, or of other stages and records than are shipped."""
    stages = {name: facts.get("key", "") for name, facts in _manifests(root).items()}
    records = {
        name: record["key"] for name, record in _records(root).items() if isinstance(record, dict)
    }
    scales = map(load_scale, scale_names())
    sections = {f"{s.name}/{name}": section_digest(s, name) for s in scales for name in SECTIONS}
    return [
        Stale(nb.name, reason)
        for nb in notebooks(root)
        if (reason := _why_stale(nb, stages, records, sections))
    ]


def _why_stale(nb: Notebook, stages: dict, records: dict, sections: dict[str, str]) -> str:
    """Why a notebook has to be rendered, '' if it need not.

    `stages`, `records`: the keys of those that are shipped; `sections`: digest of each of every scale, as it is now.
    """
    facts = nb.data["metadata"].get("qwen_mini", {})
    if not any(cell.get("outputs") for cell in nb.cells):
        return "it has no outputs"
    if facts.get("scale") != SCALE:
        return f"its outputs are of scale {facts.get('scale')}, not {SCALE}"
    if facts.get("code") != nb.code_digest:
        return "its outputs are of other code"
    if "sections" not in facts:
        return "its outputs do not say which settings they are of"
    for place, digest in facts["sections"].items():
        if sections.get(place) != digest:
            return f"its outputs are of other settings: {place}"
    for name, key in facts.get("stages", {}).items():
        if stages.get(name, key) != key:  # a stage that is not shipped is made where it is needed
            return f"the stage {name} is newer"
    own = {f"{nb.name}/{name}": key for name, key in facts.get("records", {}).items()}
    for name, key in (own | facts.get("recalled", {})).items():
        if records.get(name) != key:
            return f"the record {name} is {'newer' if name in records else 'missing'}"
    return ""


def _other_settings(root: Path, name: str, facts: dict) -> str:
    """Whether a checkpoint of the course is of other settings than its scale has now."""
    if root.resolve() != PACKAGE.parent or name not in STAGES:
        return ""
    return (
        ""
        if handle(name, load_scale(SCALE), 0).key == facts.get("key")
        else f"its settings in {SCALE}.toml changed"
    )


def record_files(root: Path) -> list[Path]:
    """The shipped records."""
    return sorted((root / "data" / "records" / SCALE).glob("*/*.json"))


def _manifests(root: Path) -> dict[str, dict]:
    """What each shipped checkpoint says about itself."""
    paths = sorted((root / "data" / "checkpoints").glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _records(root: Path) -> dict[str, dict | BadRecord]:
    """The shipped records by name, or by file where one is damaged: then what is wrong with it."""
    found = {}
    for path in record_files(root):
        try:
            record = read(path)
            found[record["name"]] = record
        except BadRecord as problem:
            found[f"{path.parent.name}/{path.stem}"] = problem
    return found
