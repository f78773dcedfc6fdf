"""Scales: one TOML file each, read into frozen dataclasses that accept no unknown or impossible value.

The defaults are those of `laptop`, the scale of the committed outputs, but for the few that `laptop.toml` states, where
the other scales agree. A file holds what differs: from the defaults, or from the scale that it names as its `base`. Its
`start` says for all stages what they start from. What follows from other keys, `_derived` fills in.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import CourseError

FOLDER = Path(__file__).parent / "scales"
CONTROL_TOKENS = 22
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for it
STRICT = ConfigDict(strict=True, extra="forbid")
DERIVED = None  # the default of a key that follows from others; TOML cannot say it
MOST_LAYERS = 1_000  # no public model has as many; a wrong number would build for hours

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, lt=2**24)]  # two of them, multiplied, are still a size of memory
CountOrNone = Annotated[int, Field(ge=0)]  # 0 for none
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
HeadDim = Annotated[int, Field(gt=0, lt=2**12, multiple_of=2)]  # channels are rotated in pairs
VocabSize = Annotated[int, Field(ge=256 + CONTROL_TOKENS, lt=2**24)]
Start = Literal["own", "shipped"]  # the scale's own stage, or that which ships with the course


class ScaleError(CourseError):
    """A scale that does not exist or does not make sense; the message names the file, the section and the key."""


def _sum_to_one(shares):
    total = sum(shares.values() if isinstance(shares, dict) else shares)
    if abs(total - 1) >= 1e-6:
        raise ValueError(f"must sum to 1, got {total:g}")
    return shares


@dataclass(frozen=True, config=STRICT)
class Run:
    """The machine: `threads` 0 means all cores, `memory_gib` is the budget of a run, `jobs` of its notebooks run at once.

    `dtype`: what training and sampling compute in; `QWEN_MINI_DTYPE` overrides it. float32 is right on every CPU,
    bfloat16 faster where the processor has instructions for it. It is provenance, and part of no key.
    """

    memory_gib: Positive = 8.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: CountOrNone = 0
    jobs: Count = 1


@dataclass(frozen=True, config=STRICT)
class TokenizerScale:
    """`vocab_size` counts every id, the 22 control tokens included."""

    vocab_size: VocabSize = 1024
    training_bytes: Count = 4_000_000


@dataclass(frozen=True, config=STRICT)
class Model:
    """The architecture, with the field names of Hugging Face's `Qwen2Config`."""

    vocab_size: Size = DERIVED  # the tokenizer's
    hidden_size: Size = 128
    intermediate_size: Size = 384
    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = 5
    num_attention_heads: Size = 4
    num_key_value_heads: Size = 2
    head_dim: HeadDim = DERIVED  # hidden_size / num_attention_heads
    max_position_embeddings: Size = DERIVED  # the longest window of pre-training
    rope_theta: Positive = 1000.0
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: Positive = 0.02


@dataclass(frozen=True, config=STRICT)
class MoeScale:
    """What chapter 06 compares experts on: a phone book of `facts`, and text; `seeds` runs of every arm.

    `fact_steps`, `text_steps`, `upcycle_steps`: training steps of the longest run of experts.
    """

    facts: Annotated[int, Field(ge=100, le=6_400)] = 6_000  # names of two syllables out of 80
    fact_steps: Annotated[int, Field(ge=10)] = 600
    text_steps: Annotated[int, Field(ge=4)] = 640  # a quarter of it is a run, too
    upcycle_steps: Annotated[int, Field(ge=2)] = 50
    seeds: Annotated[int, Field(ge=2, le=10)] = 4  # of one there is no interval


# What the sources hold, and the two domains that the course makes beside needles.
_SOURCES = ("wiki_en", "wiki_fr", "wiki_es", "glosses", "chinese_english", "python")
_DOMAINS = (*_SOURCES, "tasks", "chat")


@dataclass(frozen=True, config=STRICT)
class Corpus:
    """What is read and made; `max_bytes_per_source` 0 means everything."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)] = _SOURCES
    heldout_fraction: Inside = 0.03
    max_heldout_bytes: Count = 200_000
    task_documents: CountOrNone = 40_000
    chat_documents: CountOrNone = 12_000
    needle_rows: CountOrNone = 16_000
    needle_lengths: tuple[Count, ...] = DERIVED  # the windows of pre-training
    max_bytes_per_source: CountOrNone = 0


@dataclass(frozen=True, config=STRICT)
class Phase:
    """One phase of pre-training: `tokens` in windows of `length`, drawn from the domains by the shares of `mixture`."""

    tokens: Count
    length: Size
    mixture: Annotated[dict[str, Positive], AfterValidator(_sum_to_one)]


# Short windows first: retrieval is learned at length 64 and then carried to 128 and 256.
_PHASES = tuple(
    Phase(tokens, length, dict(zip(_DOMAINS, shares, strict=True)) | {f"needles_{length}": needles})
    for tokens, length, needles, shares in (
        (1_638_400, 64, 0.25, (0.20, 0.10, 0.08, 0.09, 0.03, 0.13, 0.08, 0.04)),
        (2_457_600, 128, 0.20, (0.22, 0.11, 0.08, 0.10, 0.03, 0.14, 0.08, 0.04)),
        (18_432_000, 256, 0.08, (0.26, 0.13, 0.10, 0.12, 0.02, 0.17, 0.08, 0.04)),
    )
)


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """The training loop's numbers; `matrix_learning_rate` is read by the optimizer `muon` alone."""

    batch_tokens: Count = 4096
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: Positive = 3e-3
    min_lr_ratio: Share = 0.05
    warmup_steps: CountOrNone = 50
    schedule: Literal["cosine", "wsd"] = "wsd"
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = _PHASES
    matrix_learning_rate: Positive = 0.02
    decay_fraction: Share = 0.2
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip_norm: Positive = 1.0
    grad_accumulation: Count = 1


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One stage of context extension: `tokens` at base `rope_theta`, `shares[i]` of them in windows of `lengths[i]`."""

    tokens: Count
    rope_theta: Positive
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)]
    shares: Annotated[tuple[Positive, ...], AfterValidator(_sum_to_one)]


# Twice as long in every stage, 40 % at the stage's longest window and 60 % in shorter ones.
_STAGES = (
    Stage(802_816, 10_000.0, (512, 256, 128), (0.4, 0.4, 0.2)),
    Stage(2_801_664, 30_000.0, (1024, 512, 256, 128), (0.4, 0.2, 0.3, 0.1)),
)


@dataclass(frozen=True, config=STRICT)
class LongContext:
    """Context extension by training, of the scale's own model or (`start`) of the one that ships with the course."""

    batch_tokens: Count = DERIVED  # as in pre-training
    learning_rate: Positive = 1.2e-3
    warmup_steps: CountOrNone = 10
    needle_share: Inside = 0.3
    needle_rows: Count = 1_500
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = _STAGES
    matrix_learning_rate: Positive = 0.004
    start: Start = "own"

    @property
    def trained_length(self) -> int:
        """The longest window, and so the context that the extended model has seen."""
        return max(max(stage.lengths) for stage in self.stages)


@dataclass(frozen=True, config=STRICT)
class DataQuality:
    """Chapter 10: `crawl_bytes` of clean text in the crawl, `noise` texts of a kind and `documents` of a domain to learn from.

    `tokens`, `mixture_tokens`: of every small model of an ablation, and of one of the `mixtures`; `seeds`: models of an
    arm; `start`: which base model scores text, the first `scored_tokens` of each.
    """

    crawl_bytes: Count = 1_200_000
    noise: Count = 120
    documents: Count = 300
    tokens: Count = 204_800
    mixtures: Annotated[int, Field(gt=7)] = 32
    mixture_tokens: Count = 102_400
    learning_rate: Positive = 1e-3
    seeds: Annotated[int, Field(ge=2, le=8)] = 5
    test_items: Count = 10_000
    scored_tokens: Count = 128
    start: Start = "own"


@dataclass(frozen=True, config=STRICT)
class DualChunk:
    """How far chapter 13 measures: multiples of the trained length, and prompts per task and length."""

    factors: tuple[Count, ...] = (1, 2, 4, 8, 16)
    tries: Count = 16


@dataclass(frozen=True, config=STRICT)
class SparsePrefill:
    """How far chapter 14 measures: prompt lengths in tokens, tokens per prefill chunk, prompts per length and depth."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=2)] = (4**6, 4**7, 4**8, 4**9, 4**10)
    tries: Count = 1
    chunk_tokens: Count = 49_152


Shape = Annotated[tuple[Size, ...], Field(min_length=2, max_length=2)]  # width, layers


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """Runs of one model at every batch and rate, measured after each number of tokens."""

    model: Shape
    batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 128, 256)
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)] = (60_000, 120_000, 240_000)
    rates: Annotated[tuple[Positive, ...], Field(min_length=3)] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


# The last two: longer runs of the smallest, for which batch is best changes with the tokens.
_LONGER = Sweep((24, 2), (128, 256, 512), (480_000, 960_000), (2e-3, 4e-3, 8e-3, 1.6e-2))
_LARGE_BATCH = Sweep((24, 2), (1024,), (480_000, 960_000), (4e-3, 8e-3, 1.6e-2, 3.2e-2))
_SWEEPS = (Sweep((24, 2)), Sweep((32, 2), (128,)), Sweep((48, 2)), _LONGER, _LARGE_BATCH)


@dataclass(frozen=True, config=STRICT)
class ScalingLaws:
    """Chapter 11's grids; a model is a pair of width and layers, budgets are FLOPs, the rest are tokens.

    Small models, so that a grid of them takes minutes; the held-out run is larger than what it is predicted from.

    `sweeps`: what the laws of rate and batch are fitted to; `ladder`: the sizes that share each of `budgets` (those
    whose tokens per parameter lie within `ratio`); `heldout_model`, `heldout_tokens`: the run that is
    predicted first; `widths`, `width_tokens`: of the transfer by muP; `moe_models`, `moe_tokens`: of the experts.
    """

    sweeps: Annotated[tuple[Sweep, ...], Field(min_length=1)] = _SWEEPS
    ladder: tuple[Shape, ...] = ((16, 2), (24, 2), (32, 2), (48, 2), (64, 2), (80, 3), (96, 4))
    budgets: tuple[Positive, ...] = (3e10, 1e11, 3e11, 1e12)
    ratio: tuple[Positive, Positive] = (0.7, 200.0)
    heldout_model: Shape = (72, 3)
    heldout_tokens: Count = 400_000
    widths: tuple[Count, ...] = (32, 64, 96)
    width_tokens: Count = 48_000
    moe_models: tuple[Shape, ...] = ((24, 2), (48, 2))
    moe_tokens: Count = 240_000
    vocab_size: VocabSize = 384
    length: Count = 64


@dataclass(frozen=True, config=STRICT)
class Sft:
    """Fine-tuning: `demonstrations` gold responses per task, and the numbers of the run.

    `replay`: windows of pre-training text per demonstration, their tokens weighing `replay_weight`; `min_lr_ratio`: the
    rates at the end, of those at the beginning.
    """

    demonstrations: Count = 400
    epochs: Count = 5
    batch_rows: Count = 16
    learning_rate: Positive = 1.2e-3
    matrix_learning_rate: Positive = 0.01
    warmup_steps: CountOrNone = 10
    min_lr_ratio: Share = 0.1
    replay: NotNegative = 0.25
    replay_weight: NotNegative = 0.3


@dataclass(frozen=True, config=STRICT)
class RewardModelScale:
    """Preference data and training of chapter 17's reward models.

    `demonstrations`: careless responses per task; `problems`: per task for the pairs, `samples` answers each;
    `center`: the weight that keeps rewards around zero.
    """

    demonstrations: Count = 150
    problems: Count = 110
    learning_rate: Positive = 1e-3
    warmup_steps: CountOrNone = 3
    samples: Annotated[int, Field(gt=1)] = 8  # of one there is no pair
    epochs: Count = 1
    batch_pairs: Count = 32
    center: NotNegative = 0.01
    start: Start = "own"


@dataclass(frozen=True, config=STRICT)
class Dpo:
    """Preference optimisation: `problems` a task give up to `pairs_per_problem` pairs each of `samples` answers.

    `alpha`, `keep`: the Online Merging Optimizer's.
    """

    problems: Count = 120
    pairs_per_problem: Count = 4
    batch_pairs: Count = 32
    beta: Positive = 1.0
    learning_rate: Positive = 1e-4
    warmup_steps: CountOrNone = 3
    alpha: Share = 3e-4
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    samples: Annotated[int, Field(gt=1)] = 8
    max_new_tokens: Count = 128
    epochs: Count = 1
    start: Start = "own"


@dataclass(frozen=True, config=STRICT)
class Grpo:
    """Reinforcement learning: `steps` updates on `queries` fresh problems with `group_size` answers each.

    `micro_groups`: groups per forward pass; `probe`: problems per kind that tell which are worth asking; `beta`:
    weight of the KL term, 0 for none.
    """

    steps: Count = 28
    queries: Count = 64
    learning_rate: Positive = 3e-4
    warmup_steps: CountOrNone = 5
    group_size: Annotated[int, Field(gt=1)] = 8  # of one there is nothing to compare
    micro_groups: Count = 6
    levels: Annotated[tuple[Literal[1, 2, 3, 4, 5], ...], Field(min_length=1)] = (1, 2, 3)
    probe: Count = 6
    max_new_tokens: Count = 128
    epsilon: Positive = 0.2
    epsilon_high: Positive = 0.28
    beta: NotNegative = 0.0
    start: Start = "own"


@dataclass(frozen=True, config=STRICT)
class Measure:
    """Sizes of measurements, which no training depends on.

    `eval_every`, `eval_tokens`: steps between evaluations while pre-training, and tokens per domain; `needle_tries`:
    prompts per cell of a needle grid; `sft_problems`, `sft_fresh`: held-out problems, and new ones for rejection
    sampling, per task; `ablation_demonstrations`: per task, of chapter 16's small arms; `long_rows`: long instructions
    of its second stage; `reward_heldout`: problems per task of the reward benchmarks; `best_of`: samples per problem for
    best-of-n; `dpo_heldout`, `grpo_heldout`: held-out problems per task (and wording); `dpo_seeds`, `grpo_seeds`:
    training runs that are compared; `side_steps`: of the small runs that show what goes wrong.
    """

    eval_every: Count = 500
    eval_tokens: Count = 8_192
    needle_tries: Count = 20
    sft_problems: Count = 20
    sft_fresh: Count = 24
    ablation_demonstrations: Count = 100
    long_rows: Count = 300
    reward_heldout: Count = 40
    dpo_heldout: Count = 20
    grpo_heldout: Count = 17
    side_steps: Count = 4
    best_of: Annotated[int, Field(gt=1)] = 64
    dpo_seeds: Count = 3
    grpo_seeds: Count = 3


@dataclass(frozen=True, config=STRICT)
class ScaleConfig:
    """One scale, whole: `config.model.hidden_size`, `config.pretraining.phases[0].tokens`, …"""

    name: str
    run: Run
    tokenizer: TokenizerScale
    model: Model
    moe: MoeScale
    corpus: Corpus
    pretraining: Pretraining
    scaling_laws: ScalingLaws
    long_context: LongContext
    data_quality: DataQuality
    dual_chunk: DualChunk
    sparse_prefill: SparsePrefill
    sft: Sft
    reward_model: RewardModelScale
    dpo: Dpo
    grpo: Grpo
    measure: Measure

    def __post_init__(self):
        sections = vars(self)
        unwatched = SimpleNamespace(**sections)
        for (section, key), value in _derived(unwatched).items():
            if getattr(sections[section], key) is DERIVED:
                object.__setattr__(sections[section], key, value)
        for holds, section, key, reason in _rules(unwatched):
            if not holds:
                raise ValueError(f"[{section}] key {key!r} {reason}")

    def __getattribute__(self, name: str):
        if name in SECTIONS and _readers:
            _readers[-1](self, name)
        return object.__getattribute__(self, name)

    @property
    def digest(self) -> str:
        """Of the model and the tokenizer: two scale files of one name with other models are told apart by it."""
        return _digest([dataclasses.asdict(self.model), dataclasses.asdict(self.tokenizer)])

    def only(self, *sections: str) -> "Sections":
        """These sections alone, as the input of an experiment: reading another one is an error."""
        return Sections(self, sections)


SECTIONS = tuple(ScaleConfig.__annotations__)[2:]  # not name and run
STARTING = [name for name, kind in ScaleConfig.__annotations__.items() if hasattr(kind, "start")]
_readers: list[Callable[[ScaleConfig, str], None]] = []


def tell_reads(reader: Callable[[ScaleConfig, str], None]) -> None:
    """From now on `reader(config, section)` is called before a section of any scale is read."""
    _readers[:] = [reader]


def section_digest(config: ScaleConfig, name: str) -> str:
    """Of a section's settings: it tells whether they are those that a notebook read."""
    return _digest(dataclasses.asdict(vars(config)[name]))


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _derived(config) -> dict[tuple[str, str], object]:
    """Section and key → what follows from other keys, where a file does not say it."""
    lengths = {phase.length for phase in config.pretraining.phases}
    return {
        ("model", "vocab_size"): config.tokenizer.vocab_size,
        ("model", "head_dim"): config.model.hidden_size // config.model.num_attention_heads,
        ("model", "max_position_embeddings"): max(lengths),
        ("corpus", "needle_lengths"): tuple(sorted(lengths)),
        ("long_context", "batch_tokens"): config.pretraining.batch_tokens,
    }


def _rules(config) -> Iterator[tuple[bool, str, str, str]]:
    """What several keys must fulfil together: whether they do, section and key to change, and what it must be."""
    model, training, extension = config.model, config.pretraining, config.long_context
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    reason = f"must divide the {heads} query heads, got {groups}"
    yield heads % groups == 0, "model", "num_key_value_heads", reason
    fits = 0 < model.head_dim < 2**12 and model.head_dim % 2 == 0
    reason = f"must be even and below 4,096; hidden_size / num_attention_heads is {model.head_dim}"
    yield fits, "model", "head_dim", reason
    ids, reach = config.tokenizer.vocab_size, model.max_position_embeddings
    reason = f"must be at least the tokenizer's {ids}, got {model.vocab_size}"
    yield model.vocab_size >= ids, "model", "vocab_size", reason
    fits = training.schedule != "wsd" or training.decay_fraction > 0
    yield fits, "pretraining", "decay_fraction", "must be above 0 for wsd"
    for phase in training.phases:
        reason = f"must reach the longest training window, {phase.length}, got {reach}"
        yield phase.length <= reach, "model", "max_position_embeddings", reason
        parts = training.grad_accumulation
        fits = training.batch_tokens % (phase.length * parts) == 0
        reason = f"must be a multiple of length x grad_accumulation = {phase.length} x {parts}"
        yield fits, "pretraining", "batch_tokens", reason
    for number, stage in enumerate(extension.stages):
        where, fits = f"long_context.stages.{number}", len(stage.shares) == len(stage.lengths)
        yield fits, where, "shares", "must hold one share for every length"
        fits = all(extension.batch_tokens % length == 0 for length in stage.lengths)
        yield fits, "long_context", "batch_tokens", "must be a multiple of every window length"
    factors = set(config.dual_chunk.factors)
    yield {1, 4} <= factors, "dual_chunk", "factors", "must hold 1 and 4, which the claims compare"
    trained = extension.trained_length
    stride = trained - trained // 4  # of the dual chunks, chapter 13
    reason = f"must be a multiple of {stride}, the stride of dual chunks at {trained} tokens"
    yield config.sparse_prefill.chunk_tokens % stride == 0, "sparse_prefill", "chunk_tokens", reason


class Sections:
    """Some sections of a scale, `config.only("model", "sft")`; `name` and `run` are there, too, and count for no key."""

    def __init__(self, config: ScaleConfig, names: tuple[str, ...]):
        if unknown := sorted(set(names) - {"name", "run", *SECTIONS}):
            known = ", ".join(SECTIONS)
            raise ScaleError(f"a scale has no section {unknown[0]!r}: use some of {known}")
        self.sections = {name: getattr(config, name) for name in ("name", "run", *names)}

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "sections":
            raise AttributeError(name)
        if name not in self.sections:
            declared = ", ".join(list(self.sections)[2:])
            said = f"only {declared} declared: add it to config.only(…)"
            raise ScaleError(f"the section {name!r} was read, but {said}")
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
    names, own = scale_names(), Path(scale)
    if str(scale) in names:
        return FOLDER / f"{scale}.toml"
    if own.suffix != ".toml" or not own.is_file():
        known = f"{', '.join(names)}, or the path of a .toml file"
        raise ScaleError(f"there is no scale {str(scale)!r}: use one of {known}")
    if own.stem in names and own.resolve().parent != FOLDER:
        shared = f"the name of a scale of the course, and both would share runs/{own.stem}"
        raise ScaleError(f"{own} has {shared}: rename the file")
    if not re.fullmatch(r"[\w-]+", own.stem):  # it names the folder of the results
        needed = "a name of letters, digits, _ and - before .toml"
        raise ScaleError(f"{own} needs {needed}: rename the file")
    return own.resolve()


def load_scale(scale: str | Path) -> ScaleConfig:
    """Read and check a scale by name (`"quick"`) or by the path of a TOML file, whose stem becomes the name."""
    path = scale_file(scale)
    where = path.name if path.parent == FOLDER else str(path)
    table = {name: {} for name in ("run", *SECTIONS)} | _table(path, where) | {"name": path.stem}
    try:
        # as JSON, where a list may be a tuple and 1 a float, but nothing else is converted
        return TypeAdapter(ScaleConfig).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda one: one["type"] != UNKNOWN)
        raise ScaleError(f"{where}: {_sentence(unknown_first[0])}") from None


def _table(path: Path, where: str) -> dict:
    """What a file says, over what its base says; its `start` goes to every section that has one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ScaleError(f"{where} is not valid TOML: {error}") from None
    if "name" in table:  # results go to runs/<name>
        raise ScaleError(f"{where}: has an unknown key 'name': a scale has the name of its file")
    if "start" in table:
        start = {"start": table.pop("start")}
        table = _over(table, dict.fromkeys(STARTING, start))
    if "base" not in table:
        return table
    if (base := table.pop("base")) not in scale_names():
        known = ", ".join(scale_names())
        raise ScaleError(f"{where}: key 'base' should be one of {known}, got {base!r}")
    return _over(table, _table(scale_file(base), where))


def _over(above, below):
    """`above`, and in tables what only `below` says."""
    if not isinstance(above, dict) or not isinstance(below, dict):
        return above
    return below | {key: _over(value, below.get(key)) for key, value in above.items()}


def _sentence(problem: dict) -> str:
    """`[model] key 'hidden_size' should be greater than 0, got 0`."""
    *section, key = problem["loc"] or ("",)
    inside = f"[{'.'.join(map(str, section))}] " if section else ""
    if problem["type"] == UNKNOWN:
        return f"{inside}has an unknown key {key!r}"
    if problem["type"] == "missing":
        return f"{inside}lacks the key {key!r}"
    if problem["type"] == "value_error":  # of several keys together, where no key is named
        reason = problem["ctx"]["error"]
        return f"{inside}key {key!r} {reason}" if problem["loc"] else str(reason)
    return f"{inside}key {key!r} {problem['msg'].removeprefix('Input ')}, got {problem['input']!r}"
