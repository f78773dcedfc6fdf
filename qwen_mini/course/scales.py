"""Scales: one TOML file each, read into frozen dataclasses that accept no unknown, missing or impossible value."""

import dataclasses
import hashlib
import json
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

from .errors import CourseError

FOLDER = Path(__file__).parent / "scales"
CONTROL_TOKENS = 22


class ScaleError(CourseError):
    """A scale that does not exist or does not make sense; the message names the file, the section and the key."""


class _Impossible(ScaleError):
    """A value of the right type that cannot work."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key} {reason}")
        self.key, self.reason = key, reason


def _require(holds: bool, key: str, reason: str) -> None:
    if not holds:
        raise _Impossible(key, reason)


def _positive(section, *keys: str) -> None:
    for key in keys:
        _require(getattr(section, key) > 0, key, f"must be above 0, got {getattr(section, key)}")


def _share(section, *keys: str) -> None:
    for key in keys:
        _require(0 <= getattr(section, key) <= 1, key, f"must lie between 0 and 1, got {getattr(section, key)}")


def _not_negative(section, *keys: str) -> None:
    for key in keys:
        _require(getattr(section, key) >= 0, key, f"must not be negative, got {getattr(section, key)}")


@dataclass(frozen=True)
class Run:
    """The machine: `threads` 0 means all cores, `memory_gib` is the budget of one notebook.

    `dtype`: what training and sampling compute in; `QWEN_MINI_DTYPE` overrides it. float32 is right on every CPU,
    bfloat16 faster where the processor has instructions for it. It is provenance, and part of no key.
    """

    threads: int
    memory_gib: float
    dtype: typing.Literal["float32", "bfloat16"]

    def __post_init__(self):
        _not_negative(self, "threads")
        _positive(self, "memory_gib")


@dataclass(frozen=True)
class TokenizerScale:
    """`vocab_size` counts every id, the 22 control tokens included."""

    vocab_size: int
    training_bytes: int

    def __post_init__(self):
        least = 256 + CONTROL_TOKENS
        _require(self.vocab_size >= least, "vocab_size", f"must be at least {least}: 256 bytes and 22 control tokens")
        _positive(self, "training_bytes")


@dataclass(frozen=True)
class Model:
    """The architecture, with the field names of Hugging Face's `Qwen2Config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float

    def __post_init__(self):
        _positive(self, *(field.name for field in dataclasses.fields(self) if field.name != "tie_word_embeddings"))
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        _require(heads % groups == 0, "num_key_value_heads", f"must divide the {heads} query heads, got {groups}")
        _require(self.head_dim % 2 == 0, "head_dim", f"must be even to form channel pairs, got {self.head_dim}")


@dataclass(frozen=True)
class Corpus:
    """What is read and made; `max_bytes_per_source` 0 means everything."""

    sources: tuple[str, ...]
    max_bytes_per_source: int
    heldout_fraction: float
    max_heldout_bytes: int
    task_documents: int
    chat_documents: int
    needle_rows: int
    needle_lengths: tuple[int, ...]

    def __post_init__(self):
        _not_negative(self, "max_bytes_per_source", "task_documents", "chat_documents", "needle_rows")
        _positive(self, "max_heldout_bytes")
        _require(0 < self.heldout_fraction < 1, "heldout_fraction", "must lie strictly between 0 and 1")
        _require(len(self.sources) > 0, "sources", "must name at least one source")
        _require(all(length > 0 for length in self.needle_lengths), "needle_lengths", "must all be above 0")


@dataclass(frozen=True)
class Phase:
    """One phase of pre-training: `tokens` in windows of `length`, drawn from the domains by the shares of `mixture`."""

    tokens: int
    length: int
    mixture: dict[str, float]

    def __post_init__(self):
        _positive(self, "tokens", "length")
        total = sum(self.mixture.values())
        _require(all(share > 0 for share in self.mixture.values()), "mixture", "must hold shares above 0 only")
        _require(abs(total - 1) < 1e-6, "mixture", f"must sum to 1, got {total:g}")


@dataclass(frozen=True)
class Pretraining:
    """The training loop's numbers; `matrix_learning_rate` is read by the optimizer `muon` alone."""

    batch_tokens: int
    optimizer: typing.Literal["adamw", "muon"]
    learning_rate: float
    matrix_learning_rate: float
    min_lr_ratio: float
    warmup_steps: int
    schedule: typing.Literal["cosine", "wsd"]
    decay_fraction: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    grad_accumulation: int
    phases: tuple[Phase, ...]

    def __post_init__(self):
        _positive(self, "batch_tokens", "learning_rate", "matrix_learning_rate", "eps", "clip_norm")
        _positive(self, "grad_accumulation")
        _not_negative(self, "warmup_steps", "weight_decay")
        _share(self, "min_lr_ratio", "decay_fraction")
        _require(self.schedule != "wsd" or self.decay_fraction > 0, "decay_fraction", "must be above 0 for wsd")
        for key in ("beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, key, f"must be at least 0 and below 1, got {getattr(self, key)}")
        _require(len(self.phases) > 0, "phases", "must hold at least one phase")
        for phase in self.phases:
            rows, rest = divmod(self.batch_tokens, phase.length * self.grad_accumulation)
            reason = f"must be a multiple of length x grad_accumulation = {phase.length} x {self.grad_accumulation}"
            _require(rows > 0 and rest == 0, "batch_tokens", reason)


@dataclass(frozen=True)
class Stage:
    """One stage of context extension: `tokens` at base `rope_theta`, `shares[i]` of them in windows of `lengths[i]`."""

    tokens: int
    rope_theta: float
    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        _positive(self, "tokens", "rope_theta")
        _require(len(self.lengths) > 0 and min(self.lengths) > 0, "lengths", "must name window lengths above 0")
        _require(len(self.shares) == len(self.lengths), "shares", "must hold one share for every length")
        _require(all(share > 0 for share in self.shares), "shares", "must hold shares above 0 only")
        _require(abs(sum(self.shares) - 1) < 1e-6, "shares", f"must sum to 1, got {sum(self.shares):g}")


@dataclass(frozen=True)
class LongContext:
    """Context extension by training, of the scale's own model or (`start`) of the one that ships with the course."""

    start: typing.Literal["own", "shipped"]
    batch_tokens: int
    learning_rate: float
    matrix_learning_rate: float
    warmup_steps: int
    needle_share: float
    needle_rows: int
    stages: tuple[Stage, ...]

    def __post_init__(self):
        _positive(self, "batch_tokens", "learning_rate", "matrix_learning_rate", "needle_rows")
        _not_negative(self, "warmup_steps")
        _require(0 < self.needle_share < 1, "needle_share", "must lie strictly between 0 and 1")
        _require(len(self.stages) > 0, "stages", "must hold at least one stage")
        for stage in self.stages:
            fits = all(self.batch_tokens % length == 0 for length in stage.lengths)
            _require(fits, "batch_tokens", "must be a multiple of every window length")

    @property
    def trained_length(self) -> int:
        """The longest window, and so the context that the extended model has seen."""
        return max(max(stage.lengths) for stage in self.stages)


@dataclass(frozen=True)
class DualChunk:
    """How far chapter 11 measures: multiples of the trained length, and prompts per task and length."""

    factors: tuple[int, ...]
    tries: int

    def __post_init__(self):
        _positive(self, "tries")
        _require(min(self.factors, default=0) > 0, "factors", "must name multiples above 0")
        _require({1, 4} <= set(self.factors), "factors", "must hold 1 and 4, which the claims compare")


@dataclass(frozen=True)
class SparsePrefill:
    """How far chapter 12 measures: prompt lengths in tokens, tokens per prefill chunk, prompts per length and depth."""

    lengths: tuple[int, ...]
    chunk_tokens: int
    tries: int

    def __post_init__(self):
        _positive(self, "chunk_tokens", "tries")
        _require(len(self.lengths) > 1 and min(self.lengths) > 0, "lengths", "must name two lengths or more")


@dataclass(frozen=True)
class Sft:
    """Fine-tuning: `demonstrations` gold responses per task, and the numbers of the run.

    `replay`: windows of pre-training text per demonstration, their tokens weighing `replay_weight`; `min_lr_ratio`: the
    rates at the end, of those at the beginning.
    """

    demonstrations: int
    replay: float
    replay_weight: float
    epochs: int
    batch_rows: int
    learning_rate: float
    matrix_learning_rate: float
    min_lr_ratio: float
    warmup_steps: int

    def __post_init__(self):
        _positive(self, "demonstrations", "epochs", "batch_rows", "learning_rate", "matrix_learning_rate")
        _not_negative(self, "replay", "replay_weight", "warmup_steps")
        _share(self, "min_lr_ratio")


@dataclass(frozen=True)
class RewardModelScale:
    """Preference data and training of chapter 15's reward models.

    `demonstrations`: careless responses per task; `problems`: per task for the pairs, `samples` answers each;
    `center`: the weight that keeps rewards around zero.
    """

    start: typing.Literal["own", "shipped"]
    demonstrations: int
    problems: int
    samples: int
    epochs: int
    batch_pairs: int
    learning_rate: float
    warmup_steps: int
    center: float

    def __post_init__(self):
        _positive(self, "demonstrations", "problems", "epochs", "batch_pairs", "learning_rate")
        _not_negative(self, "warmup_steps", "center")
        _require(self.samples > 1, "samples", "must be at least 2, or there is no pair")


@dataclass(frozen=True)
class Dpo:
    """Preference optimisation: `problems` a task give up to `pairs_per_problem` pairs each of `samples` answers.

    `alpha`, `keep`: the Online Merging Optimizer's.
    """

    start: typing.Literal["own", "shipped"]
    problems: int
    samples: int
    pairs_per_problem: int
    max_new_tokens: int
    epochs: int
    batch_pairs: int
    beta: float
    learning_rate: float
    warmup_steps: int
    alpha: float
    keep: float

    def __post_init__(self):
        _positive(self, "problems", "pairs_per_problem", "max_new_tokens", "epochs", "batch_pairs", "beta")
        _positive(self, "learning_rate", "keep")
        _not_negative(self, "warmup_steps")
        _share(self, "alpha", "keep")
        _require(self.samples > 1, "samples", "must be at least 2, or there is no pair")


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning: `steps` updates on `queries` fresh problems with `group_size` answers each.

    `micro_groups`: groups per forward pass; `probe`: problems per kind that tell which are worth asking; `beta`:
    weight of the KL term, 0 for none.
    """

    start: typing.Literal["own", "shipped"]
    steps: int
    queries: int
    group_size: int
    micro_groups: int
    levels: tuple[int, ...]
    probe: int
    max_new_tokens: int
    learning_rate: float
    warmup_steps: int
    epsilon: float
    epsilon_high: float
    beta: float

    def __post_init__(self):
        _positive(self, "steps", "queries", "micro_groups", "max_new_tokens", "learning_rate", "epsilon")
        _positive(self, "epsilon_high", "probe")
        _not_negative(self, "warmup_steps", "beta")
        _require(self.group_size > 1, "group_size", "must be at least 2, or there is nothing to compare")
        _require(set(self.levels) <= {1, 2, 3, 4, 5} and self.levels, "levels", "must name levels from 1 to 5")


@dataclass(frozen=True)
class Measure:
    """Sizes of measurements, which no training depends on.

    `eval_every`, `eval_tokens`: steps between evaluations while pre-training, and tokens per domain; `needle_tries`:
    prompts per cell of a needle grid; `sft_problems`, `sft_fresh`: held-out problems, and new ones for rejection
    sampling, per task; `ablation_demonstrations`: per task, of chapter 14's small arms; `long_rows`: long instructions
    of its second stage; `reward_heldout`: problems per task of the reward benchmarks; `best_of`: samples per problem for
    best-of-n; `dpo_heldout`, `grpo_heldout`: held-out problems per task (and wording); `dpo_seeds`, `grpo_seeds`:
    training runs that are compared; `side_steps`: of the small runs that show what goes wrong.
    """

    eval_every: int
    eval_tokens: int
    needle_tries: int
    sft_problems: int
    sft_fresh: int
    ablation_demonstrations: int
    long_rows: int
    reward_heldout: int
    best_of: int
    dpo_heldout: int
    dpo_seeds: int
    grpo_heldout: int
    grpo_seeds: int
    side_steps: int

    def __post_init__(self):
        _positive(self, *(field.name for field in dataclasses.fields(self)))
        _require(self.best_of > 1, "best_of", "must be at least 2")


@dataclass(frozen=True)
class ScaleConfig:
    """One scale, whole: `config.model.hidden_size`, `config.pretraining.phases[0].tokens`, …"""

    name: str
    run: Run
    tokenizer: TokenizerScale
    model: Model
    corpus: Corpus
    pretraining: Pretraining
    long_context: LongContext
    dual_chunk: DualChunk
    sparse_prefill: SparsePrefill
    sft: Sft
    reward_model: RewardModelScale
    dpo: Dpo
    grpo: Grpo
    measure: Measure

    def __post_init__(self):
        _require(
            self.model.vocab_size >= self.tokenizer.vocab_size,
            "model.vocab_size",
            f"must be at least the tokenizer's {self.tokenizer.vocab_size}, got {self.model.vocab_size}",
        )
        trained = self.long_context.trained_length
        stride = trained - trained // 4  # of the dual chunks, chapter 11
        reason = f"must be a multiple of {stride}, the stride of dual chunks at {trained} tokens"
        _require(self.sparse_prefill.chunk_tokens % stride == 0, "sparse_prefill.chunk_tokens", reason)
        longest = max(phase.length for phase in self.pretraining.phases)
        _require(
            longest <= self.model.max_position_embeddings,
            "model.max_position_embeddings",
            f"must reach the longest training window, {longest}, got {self.model.max_position_embeddings}",
        )


    @property
    def digest(self) -> str:
        """Of the model and the tokenizer: two scale files of one name with other models are told apart by it."""
        text = json.dumps([dataclasses.asdict(self.model), dataclasses.asdict(self.tokenizer)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def only(self, *sections: str) -> "Sections":
        """These sections alone, as the input of an experiment: reading another one is an error."""
        return Sections(self, sections)


class Sections:
    """Some sections of a scale, `config.only("model", "sft")`; `name` and `run` are there, too, and count for no key."""

    def __init__(self, config: ScaleConfig, names: tuple[str, ...]):
        known = [field.name for field in dataclasses.fields(config)]
        if unknown := sorted(set(names) - set(known)):
            raise ScaleError(f"a scale has no section {unknown[0]!r}: use some of {', '.join(known[2:])}")
        self.sections = {name: getattr(config, name) for name in ("name", "run", *names)}

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "sections":
            raise AttributeError(name)
        if name not in self.sections:
            declared = ", ".join(list(self.sections)[2:])
            raise ScaleError(f"the section {name!r} was read, but only {declared} declared: add it to config.only(…)")
        return self.sections[name]


def check_seed(seed: int) -> None:
    """CourseError for a seed that numpy or torch would refuse in the middle of the work."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise CourseError(f"a seed is a whole number from 0 to 2**32 - 1, got {seed!r}")


def scale_names() -> list[str]:
    """The scales that come with the course, in order of size."""
    known = [path.stem for path in FOLDER.glob("*.toml")]
    order = ["quick", "laptop", "gpu", "cluster"]
    return sorted(known, key=lambda name: order.index(name) if name in order else len(order))


def scale_file(scale: str | Path) -> Path:
    """The TOML file of a scale: a known name, or the path of a file of your own."""
    path = FOLDER / f"{scale}.toml"
    if str(scale) in scale_names():
        return path
    own = Path(scale)
    if own.suffix == ".toml" and own.is_file():
        if own.stem in scale_names() and own.resolve().parent != FOLDER:
            raise ScaleError(
                f"{own} has the name of a scale of the course, and both would share runs/{own.stem}: rename the file"
            )
        return own.resolve()
    known = ", ".join(scale_names())
    raise ScaleError(f"there is no scale {str(scale)!r}: use one of {known}, or the path of a .toml file")


def load_scale(scale: str | Path) -> ScaleConfig:
    """Read and check a scale by name (`"quick"`) or by the path of a TOML file, whose stem becomes the name."""
    path = scale_file(scale)
    where = path.name if path.parent == FOLDER else str(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScaleError(f"{where} is not valid TOML: {error}") from None
    return _build(ScaleConfig, {"name": path.stem, **table}, where, "")


def _build(kind, table: dict, where: str, section: str):
    """`kind(**table)` after checking names and types; `section` is the dotted name of the table, for messages."""
    hints = typing.get_type_hints(kind)
    inside = f"{where}: [{section}]" if section else f"{where}: top level"
    for key in table:
        if key not in hints:
            raise ScaleError(f"{inside} has an unknown key {key!r}; known keys: {', '.join(hints)}")
    for key in hints:
        if key not in table:
            raise ScaleError(f"{inside} lacks the key {key!r}")
    values = {
        key: _value(hint, table[key], where, f"{section}.{key}" if section else key) for key, hint in hints.items()
    }
    try:
        return kind(**values)
    except _Impossible as problem:
        place, _, key = f"{section}.{problem.key}".strip(".").rpartition(".")
        raise ScaleError(f"{where}: [{place}] key {key!r} {problem.reason}") from None


def _value(hint, value, where: str, key: str):
    """`value` as the type `hint`, or a ScaleError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    section, _, last = key.rpartition(".")

    def wrong(expected: str) -> ScaleError:
        return ScaleError(f"{where}: [{section}] key {last!r} must be {expected}, got {value!r}")

    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ScaleError(f"{where}: {key!r} must be a section [{key}], got {value!r}")
        return _build(hint, value, where, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise wrong("one of " + ", ".join(arguments))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong("a list")
        return tuple(_value(arguments[0], item, where, key) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a table")
        return {name: _value(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise wrong({int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint])
    return value
