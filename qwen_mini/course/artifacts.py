"""Stages on disk: a folder appears whole or not at all, and one version stays loadable until the next is complete.

Beside what is written, a stage or a file, may lie, hidden: `.<name>.writer`, locked by the one process that may write it;
`.<name>.partial-…`, which that process writes or removes, and which is worth nothing once the lock can be taken;
`.<stage>.new`, a whole version on its way to the stage's place.
"""

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import __version__
from .errors import CourseError
from .paths import home, runs, shown
from .scales import scale_names

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two writers apart there
    fcntl = None

# the chapter that makes a stage, by the beginning of its name
MAKERS = {"tokenizer": "corpus", "small_text": "scaling_laws", "probe": "grpo"}
MAKERS |= dict.fromkeys(("answers", "reward_model"), "reward_model")
MAKERS |= dict.fromkeys(("pairs", "preferred"), "dpo")
MAKERS |= dict.fromkeys(("more_sft", "rejection", "expert", "order"), "online_rl")
NAME = re.compile(r"[\w-][\w.-]*")
LEFTOVER = re.compile(r"\.(.+?)\.(?:new|writer|partial-.+)")

FULL, CROWDED = (errno.ENOSPC, errno.EDQUOT), (errno.EMFILE, errno.ENFILE)
IN_THE_WAY, DENIED = (errno.EEXIST, errno.ENOTDIR), (errno.EACCES, errno.EPERM)
REASONS = {
    FULL: "the disk is full; the previous version, if any, is kept: free some space and run it again",
    CROWDED: "too many files are open: close other programs or raise the limit with `ulimit -n 4096`",
    IN_THE_WAY: "a file stands where a folder is needed: move it, or set QWEN_MINI_RUNS to another folder",
    DENIED: "you may not write there: change its permissions, or set QWEN_MINI_RUNS to another folder",
    (
        errno.EROFS,
    ): "it lies on a read-only file system: set QWEN_MINI_RUNS to a folder that can be written",
}


class ArtifactError(CourseError):
    """A result that could not be written."""


class MissingStage(CourseError):
    """A result that nobody has made yet; the message says which command makes it."""


def stage_dir(scale_name: str, stage: str) -> Path:
    """Where the stage of a scale lives: `runs/<scale>/<stage>`, whether it exists or not."""
    for name in (scale_name, stage):
        if not NAME.fullmatch(name):  # results go nowhere else
            wrong = f"{name!r} is not the name of a stage or scale"
            raise ArtifactError(f"{wrong}: letters, digits, _, - and . are")
    return runs() / scale_name / stage


def shipped_dir(stage: str) -> Path:
    """Where the repository ships the stage's small trained checkpoint, if it does."""
    return home() / "data" / "checkpoints" / stage


def use_shipped() -> bool:
    """Whether a scale may take what ships for its own result; `QWEN_MINI_SHIPPED=0` makes everything anew.

    Chapters that start from a shipped checkpoint by choice still do.
    """
    return os.environ.get("QWEN_MINI_SHIPPED") != "0"


def state_file(scale_name: str, stage: str, key: str) -> Path:
    """Where an interrupted training of the stage with this key keeps its state."""
    return stage_dir(scale_name, "training_state") / f"{stage}-{key}.safetensors"


def made(scale_name: str, stage: str) -> bool:
    """Whether the stage is in this scale's own runs."""
    return _whole(stage_dir(scale_name, stage)) is not None


def has(scale_name: str, stage: str) -> bool:
    """Whether `find` would find the stage."""
    shipped = use_shipped() and read_manifest(shipped_dir(stage)).get("scale") == scale_name
    return made(scale_name, stage) or shipped


def find(scale_name: str, stage: str, scale_digest: str | None = None) -> Path:
    """The stage's folder: from this scale's runs, else the shipped one of this scale, else `MissingStage`.

    `scale_digest`: refuse a stage whose manifest carries another one, made with another file of the same name.
    """
    path = stage_dir(scale_name, stage)
    if whole := _whole(path):
        if scale_digest and read_manifest(whole).get("scale_digest", scale_digest) != scale_digest:
            other = f"{shown(path)} was made with another scale of the name {scale_name!r}"
            remedy = f"rename your scale's file, or {_remedy(scale_name, stage)}"
            raise MissingStage(f"{other}: {remedy}")
        return whole
    if has(scale_name, stage):
        return shipped_dir(stage)
    missing = f"the stage {stage!r} of scale {scale_name!r} is missing"
    raise MissingStage(f"{missing}: {_remedy(scale_name, stage)}")


def find_by_key(scale_name: str, stage: str, key: str) -> Path | None:
    """The stage made with this key: from this scale's runs, else the shipped one, else None."""
    for folder in (_whole(stage_dir(scale_name, stage)), use_shipped() and shipped_dir(stage)):
        if folder and read_manifest(folder).get("key") == key:
            return folder
    return None


def read_manifest(folder: Path) -> dict:
    """What a stage says about itself; nothing where there is no readable manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _remedy(scale_name: str, stage: str) -> str:
    from .training import STAGES  # here: only a failure needs it

    scale = scale_name if scale_name in scale_names() else f"{scale_name}.toml"
    if stage in STAGES:
        return f"make it with `qwen-mini train {stage} --scale {scale}`"
    chapters = {"corpus": "corpus"} | MAKERS
    chapter = next((chapter for name, chapter in chapters.items() if stage.startswith(name)), None)
    if chapter is None:
        return f"no stage has that name; those that train are {', '.join(STAGES)}"
    return f"make it with `qwen-mini run {chapter} --scale {scale}`"


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def write_stage(scale_name: str, stage: str, inputs: dict | None = None, **facts) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes the stage, on any exception the old stage stays.

    `manifest.json` gains the keys stage, scale, inputs, version, files (path -> bytes) and those of `facts`; the body
    may have written a manifest of its own, whose keys are kept. With a fact `key`, the stage's training states are
    removed: it is finished, and the others belong to settings that are no longer wanted. One process at a time writes a
    stage; a second one waits.
    """
    path = stage_dir(scale_name, stage)
    with _readable_errors(path), stage_lock(scale_name, stage):
        sweep(scale_name)
        folder = Path(tempfile.mkdtemp(prefix=_aside(path), dir=path.parent))
        _writing.add(folder.name)
        try:
            yield folder
            own = {"stage": stage, "scale": scale_name, "inputs": inputs or {}}
            _write_manifest(folder, own | facts)
            for file in [*folder.rglob("*"), folder]:
                _fsync(file)
            os.chmod(folder, 0o755)
            if "key" in facts:  # its own state goes last: whoever is killed here comes by again
                _drop_states(scale_name, stage, but=facts["key"])
            folder.rename(_new(path))  # from here on this version counts, whatever happens
            _finish(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _writing.discard(folder.name)
        settle(scale_name, stage)


def replace_folder(aside: Path, folder: Path) -> None:
    """Put a complete folder in another's place; the old one stays beside it until then, see `bring_back`."""
    older = folder.with_name(f".{folder.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    aside.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def bring_back(folder: Path) -> None:
    """Undo a `replace_folder` that died between its two renames."""
    older = folder.with_name(f".{folder.name}.older")
    if older.exists() and not folder.exists():
        older.rename(folder)


def write_file(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write one file whole: aside, to disk, then in place of the old one."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path, f"{shown(path)} is being written", wait=True):
            _clean(path)
            handle, aside = tempfile.mkstemp(prefix=_aside(path), dir=path.parent)
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


def write_lines(path: Path, records: Iterable) -> None:
    """A file of JSON values, one a line, into a folder that `write_stage` gave."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def read_lines(path: Path) -> list:
    """What `write_lines` wrote."""
    with path.open(encoding="utf-8") as file:  # lines end at \n alone, whatever a text holds
        return [json.loads(line) for line in file]


def check_writable(scale_name: str) -> None:
    """Find out before hours of work whether its result can be written; an `ArtifactError` if not."""
    folder = runs() / scale_name
    with _readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())


def stage_lock(scale_name: str, stage: str, wait: bool = True) -> contextlib.AbstractContextManager:
    """Be the only process that makes this stage; when you had to wait, look again before you work: it may be there."""
    path = stage_dir(scale_name, stage)
    return alone(path, f"{shown(path)} is being made", wait)


@contextlib.contextmanager
def alone(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold the lock of a path; a thread that holds it may take it again.

    Whoever comes second says `what` is going on and who is at it, and waits, or with `wait` False gives up with an
    `ArtifactError`.
    """
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_of(path)
        if not lock.take(tries=10):  # whoever only cleans up holds it for an instant
            if not wait:
                raise ArtifactError(f"{what} by {lock.holder}: wait until it has ended")
            print(f"{what} by {lock.holder}: waiting until it has ended", flush=True)
            lock.take()
    try:
        yield
    finally:
        lock.release()


def settle(scale_name: str, stage: str) -> None:
    """Clean up around a finished stage: what was left by a writer that died just before or just after its end.

    For whoever finds the stage finished and so never comes to `write_stage`.
    """
    path = stage_dir(scale_name, stage)
    with contextlib.suppress(OSError), _held(path, tries=1) as held:
        if held:
            _clean(path)
            key = read_manifest(path).get("key")
            if isinstance(key, str) and re.fullmatch("[0-9a-f]+", key):
                state_file(scale_name, stage, key).unlink(missing_ok=True)


def sweep(scale_name: str) -> None:
    """Remove what dead writers have left anywhere in a scale's folder but inside its stages."""
    for folder, names, files in os.walk(runs() / scale_name):
        for name in {match[1] for match in map(LEFTOVER.fullmatch, [*names, *files]) if match}:
            _heal(Path(folder, name))
        visible = (name for name in names if not name.startswith("."))
        names[:] = [name for name in visible if not _complete(Path(folder, name))]


def _drop_states(scale_name: str, stage: str, but: str) -> None:
    """Remove the training states of a stage's other keys."""
    kept = state_file(scale_name, stage, but)
    for state in kept.parent.glob(f"{stage}-*.safetensors"):
        if state != kept and re.fullmatch("[0-9a-f]+", state.stem.removeprefix(f"{stage}-")):
            state.unlink(missing_ok=True)


def count_files(folder: Path) -> None:
    """Bring the list of files in a copied stage's manifest up to date."""
    path = folder / "manifest.json"
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8")) | {"files": _sizes(folder)}
        write_file(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _write_manifest(folder: Path, facts: dict) -> None:
    path = folder / "manifest.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    manifest = {**facts, "version": __version__, "files": _sizes(folder), **own}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder but its manifest."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return {name: size for name, size in sizes.items() if Path(name).name != "manifest.json"}


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
    """Turn a full disk, however a library reports it, and a folder that cannot be written into one sentence."""
    try:
        yield
    except Exception as error:
        code, where = getattr(error, "errno", None), getattr(error, "filename", None)
        if rust := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(rust[1])
        elif "no space left on device" in str(error).lower():
            code = errno.ENOSPC
        reason = next((reason for codes, reason in REASONS.items() if code in codes), None)
        if isinstance(error, CourseError) or reason is None or not _concerns(path, where, code):
            raise
        # the stage, not its hidden folder
        name = re.sub(r"\.([^/\\]+)\.partial-[^/\\]+", r"\1", shown(path))
        raise ArtifactError(f"{name} was not written because {reason}") from error


def _concerns(path: Path, where, code: int) -> bool:
    """Whether an error about the file `where` has to do with writing `path`: perhaps another file was read."""
    if code in FULL + CROWDED:
        return True
    if not isinstance(where, str | os.PathLike):
        return code not in IN_THE_WAY
    path, where = path.absolute(), Path(where).absolute()
    beside = where.is_relative_to(path.parent) and code not in IN_THE_WAY
    return path.is_relative_to(where) or beside


# ---------------------------------------------------------------- versions of a stage


def _complete(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _whole(path: Path) -> Path | None:
    """The stage, or the version on its way to that place; else None. Cleans up behind a writer that died."""
    with contextlib.suppress(OSError):
        if any(name.startswith(f".{path.name}.") for name in os.listdir(path.parent)):
            _heal(path)
    for _ in range(20):
        if _complete(path):
            return path
        time.sleep(0.005 if _complete(_new(path)) else 0)  # a writer is between its two renames
    return _new(path) if _complete(_new(path)) else None


def _finish(path: Path) -> None:
    """Put a new version in the stage's place; the old one leaves under a name that never comes back."""
    if not _new(path).is_dir():
        return
    old = Path(tempfile.mkdtemp(prefix=_aside(path), dir=path.parent))
    if path.exists():
        path.rename(old / path.name)
    _new(path).rename(path)
    _fsync(path.parent)
    _remove(old)


def _aside(path: Path) -> str:
    """How names begin under which the holder of its lock writes or removes `path`."""
    return f".{path.name}.partial-"


def _clean(path: Path) -> None:
    """For the holder of the lock: end the swap of a writer that died, and remove what it left."""
    _finish(path)
    if _lock_of(path).file:  # without locks the other writers may be alive
        for name in os.listdir(path.parent):
            if name.startswith(_aside(path)) and name not in _writing:
                _remove(path.with_name(name))


def _heal(path: Path) -> None:
    """Clean up around a path if nobody is writing it; a folder that may only be read stays as it is."""
    with contextlib.suppress(OSError), _held(path, tries=1) as held:
        if held:
            _clean(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def _held(path: Path, tries: int | None = None) -> Iterator[bool]:
    """Hold the lock of a path if it can be had; without `tries` wait for it."""
    lock = _lock_of(path)
    held = lock.take(tries)
    try:
        yield held
    finally:
        if held:
            lock.release()


class _Lock:
    """A path's lock file. The kernel opens the lock when its process ends, however it ends; a fork does not hold it.

    Closing any handle of the file would open it as well: so there is one `_Lock` for each file and process.
    """

    def __init__(self, path: Path):
        self.path = path.with_name(f".{path.name}.writer")
        self.threads, self.depth, self.file, self.holder = threading.RLock(), 0, None, ""

    def take(self, tries: int | None = None) -> bool:
        """Whether it is held now; after so many failed `tries` it is not, and `holder` says who has it."""
        self.holder = "another thread"
        if not self.threads.acquire(blocking=tries is None):
            return False
        held = False
        try:
            held = self.depth > 0 or self._open(tries)
        finally:
            if held:
                self.depth += 1
            else:
                self.threads.release()
        return held

    def release(self) -> None:
        self.depth -= 1
        if self.depth == 0 and self.file:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is held: whoever comes later makes a file of their own
            self.file.close()
            self.file = None
        self.threads.release()

    def _open(self, tries: int | None) -> bool:
        """Lock the file and keep it open. Where there are no locks, whoever writes goes on; who only cleans up does not."""
        while fcntl:
            with contextlib.ExitStack() as files:
                file = files.enter_context(open(self.path, "ab+", buffering=0))
                try:
                    if not self._lock(file, tries):
                        return False
                except OSError:  # a file system without locks
                    self.path.unlink(missing_ok=True)
                    break
                with contextlib.suppress(FileNotFoundError):  # its last holder has removed it
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                        who = f"process {os.getpid()} on {platform.node()}"
                        with contextlib.suppress(
                            OSError
                        ):  # on a full disk nobody is told who it is
                            file.truncate(0)
                            file.write(f"{who} since {time.strftime('%F %R')}".encode())
                        self.file = file
                        files.pop_all()
                        return True
        return tries != 1

    def _lock(self, file, tries: int | None) -> bool:
        for attempt in itertools.count() if tries is None else range(tries):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            time.sleep(0.02 if tries is None or attempt + 1 < tries else 0)
        file.seek(0)
        self.holder = file.read().decode(errors="replace") or "another process"
        return False


_locks: dict[Path, _Lock] = {}
# folders that this process is filling: no leftovers, although it can take their lock
_writing: set[str] = set()


def _lock_of(path: Path) -> _Lock:
    """The one lock of a path in this process, however the path is spelled."""
    path = path.parent.resolve() / path.name
    return _locks.setdefault(path, _Lock(path))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)
