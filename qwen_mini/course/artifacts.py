"""Stages on disk: a folder appears whole or not at all, and the old one stays loadable until the next is complete."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from .errors import CourseError
from .paths import home, runs, shown


MAKERS = {"tokenizer": "corpus", "careless": "reward_model", "reward_scores": "reward_model"}  # not by their own name


class ArtifactError(CourseError):
    """A result that could not be written."""


class MissingStage(CourseError):
    """A result that nobody has made yet; the message says which command makes it."""


def stage_dir(scale_name: str, stage: str) -> Path:
    """Where the stage of a scale lives: `runs/<scale>/<stage>`, whether it exists or not."""
    return runs() / scale_name / stage


def shipped_dir(stage: str) -> Path:
    """Where the repository ships the stage's small trained checkpoint, if it does."""
    return home() / "data" / "checkpoints" / stage


def made(scale_name: str, stage: str) -> bool:
    """Whether the stage is in this scale's own runs."""
    return _whole(stage_dir(scale_name, stage)) is not None


def has(scale_name: str, stage: str) -> bool:
    """Whether `find` would find the stage."""
    return made(scale_name, stage) or shipped_dir(stage).is_dir()


def find(scale_name: str, stage: str) -> Path:
    """The stage's folder: from this scale's runs, else the shipped one, else `MissingStage`."""
    path = stage_dir(scale_name, stage)
    if whole := _whole(path):
        return whole
    if shipped_dir(stage).is_dir():
        print(f"using the shipped checkpoint {shown(shipped_dir(stage))}: {shown(path)} has not been made yet")
        return shipped_dir(stage)
    maker = "reward_model" if stage.startswith("reward_model_") else MAKERS.get(stage, stage)
    command = f"qwen-mini run {maker} --scale {scale_name}"
    raise MissingStage(f"the stage {stage!r} of scale {scale_name!r} is missing: make it with `{command}`")


@contextlib.contextmanager
def write_stage(scale_name: str, stage: str, inputs: dict | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes the stage, on any exception the old stage stays.

    `manifest.json` gains the keys stage, scale, inputs, version and files (path -> bytes); the body may have
    written a manifest of its own, whose keys are kept.
    """
    path = stage_dir(scale_name, stage)
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        _sweep(path)
        folder = Path(tempfile.mkdtemp(prefix=f".{stage}.partial-{os.getpid()}-", dir=path.parent))
        try:
            yield folder
            _write_manifest(folder, {"stage": stage, "scale": scale_name, "inputs": inputs or {}})
            for file in [*folder.rglob("*"), folder]:
                _fsync(file)
            _swap(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_file(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write one file whole: aside, to disk, then in place of the old one."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
            _fsync(path.parent)
        finally:
            Path(aside).unlink(missing_ok=True)
    return path


def _complete(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _whole(path: Path) -> Path | None:
    """The stage, or the version that it was replacing when a crash or another process cut in between; else None."""
    return next((folder for folder in (path, _old(path)) if _complete(folder)), None)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Undo a swap that was cut between its two renames."""
    if _old(path).is_dir() and not path.exists():
        with contextlib.suppress(OSError):
            _old(path).rename(path)


def _swap(folder: Path, path: Path) -> None:
    """Put `folder` in the place of `path`; a crash in between is undone by `_recover`."""
    os.chmod(folder, 0o755)
    shutil.rmtree(_old(path), ignore_errors=True)
    if path.exists():
        path.rename(_old(path))
    try:
        folder.rename(path)
    except OSError:
        _recover(path)
        raise
    _fsync(path.parent)
    shutil.rmtree(_old(path), ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what writers that no longer live have left behind."""
    for leftover in path.parent.glob(f".{path.name}.partial-*-*"):
        pid = leftover.name.split("-")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_manifest(folder: Path, facts: dict) -> None:
    path = folder / "manifest.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    manifest = {**facts, "version": __version__, "files": _sizes(folder), **own}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def count_files(folder: Path) -> None:
    """Bring the list of files in a copied stage's manifest up to date."""
    path = folder / "manifest.json"
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8")) | {"files": _sizes(folder)}
        write_file(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder but its manifest."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, however a library reports it, into one sentence."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left on device" in str(error).lower():
            message = f"{shown(path)} was not written because the disk is full; the previous version, if any, is kept"
            raise ArtifactError(message) from error
        raise
