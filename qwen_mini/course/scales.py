"""Scales: one TOML file each, read into frozen dataclasses that accept no unknown, missing or impossible value.

What is the same at most scales is a default here; a file holds what differs.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from .errors import CourseError

FOLDER = Path(__file__).parent / "scales"
CONTROL_TOKENS = 22
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for it
STRICT = ConfigDict(strict=True, extra="forbid")

MOST_LAYERS = 1_000  # no public model has as many; a wrong number would build for hours

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, lt=2**24)]  # two of them, multiplied, are still a size of memory
CountOrNone = Annotated[int, Field(ge=0)]  # 0 for none
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


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

    memory_gib: Positive
    dtype: Literal["float32", "bfloat16"]
    threads: CountOrNone = 0
    jobs: Count = 1


@dataclass(frozen=True, config=STRICT)
class TokenizerScale:
    """`vocab_size` counts every id, the 22 control tokens included."""

    vocab_size: Annotated[int, Field(ge=256 + CONTROL_TOKENS)]
    training_bytes: Count


@dataclass(frozen=True, config=STRICT)
class Model:
    """The architecture, with the field names of Hugging Face's `Qwen2Config`."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, Field(gt=0, lt=2**12, multiple_of=2)]  # channels are rotated in pairs
    max_position_embeddings: Size
    rope_theta: Positive
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: Positive = 0.02

    @field_validator("num_key_value_heads")
    def _heads_share_keys(cls, groups: int, earlier) -> int:
        heads = earlier.data.get("num_attention_heads", groups)  # which may be wrong itself
        if heads % groups:
            raise ValueError(f"must divide the {heads} query heads, got {groups}")
        return groups


@dataclass(frozen=True, config=STRICT)
class MoeScale:
    """What chapter 06 compares experts on: a phone book of `facts`, and text; `seeds` runs of every arm.

    `fact_steps`, `text_steps`, `upcycle_steps`: training steps of the longest run of experts.
    """

    facts: Annotated[int, Field(ge=100, le=6_400)]  # names of two syllables out of 80
    fact_steps: Annotated[int, Field(ge=10)]
    text_steps: Annotated[int, Field(ge=4)]  # a quarter of it is a run, too
    upcycle_steps: Annotated[int, Field(ge=2)]
    seeds: Annotated[int, Field(ge=2, le=10)] = 4  # of one there is no interval


@dataclass(frozen=True, config=STRICT)
class Corpus:
    """What is read and made; `max_bytes_per_source` 0 means everything."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    heldout_fraction: Inside
    max_heldout_bytes: Count
    task_documents: CountOrNone
    chat_documents: CountOrNone
    needle_rows: CountOrNone
    needle_lengths: tuple[Count, ...]
    max_bytes_per_source: CountOrNone = 0


@dataclass(frozen=True, config=STRICT)
class Phase:
    """One phase of pre-training: `tokens` in windows of `length`, drawn from the domains by the shares of `mixture`."""

    tokens: Count
    length: Count
    mixture: Annotated[dict[str, Positive], AfterValidator(_sum_to_one)]


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """The training loop's numbers; `matrix_learning_rate` is read by the optimizer `muon` alone."""

    batch_tokens: Count
    optimizer: Literal["adamw", "muon"]
    learning_rate: Positive
    min_lr_ratio: Share
    warmup_steps: CountOrNone
    schedule: Literal["cosine", "wsd"]
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
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


@dataclass(frozen=True, config=STRICT)
class LongContext:
    """Context extension by training, of the scale's own model or (`start`) of the one that ships with the course."""

    batch_tokens: Count
    learning_rate: Positive
    warmup_steps: CountOrNone
    needle_share: Inside
    needle_rows: Count
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    matrix_learning_rate: Positive = 0.004
    start: Literal["own", "shipped"] = "own"

    @property
    def trained_length(self) -> int:
        """The longest window, and so the context that the extended model has seen."""
        return max(max(stage.lengths) for stage in self.stages)


@dataclass(frozen=True, config=STRICT)
class DataQuality:
    """Chapter 10: `crawl_bytes` of clean text in the crawl, `noise` texts of a kind and `documents` of a domain to learn from.

    `tokens`, `mixture_tokens`: of every small model of an ablation, and of one of the `mixtures`; `start`: which base
    model scores text.
    """

    crawl_bytes: Count
    noise: Count
    documents: Count
    tokens: Count
    mixtures: Annotated[int, Field(gt=7)]
    mixture_tokens: Count
    learning_rate: Positive = 1e-3
    test_items: Count = 10_000
    start: Literal["own", "shipped"] = "own"


@dataclass(frozen=True, config=STRICT)
class DualChunk:
    """How far chapter 13 measures: multiples of the trained length, and prompts per task and length."""

    factors: tuple[Count, ...]
    tries: Count


@dataclass(frozen=True, config=STRICT)
class SparsePrefill:
    """How far chapter 14 measures: prompt lengths in tokens, tokens per prefill chunk, prompts per length and depth."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=2)]
    tries: Count
    chunk_tokens: Count = 49_152


Shape = Annotated[tuple[Size, ...], Field(min_length=2, max_length=2)]  # width, layers


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """Runs of one model at every batch and rate, measured after each number of tokens."""

    model: Shape
    batches: Annotated[tuple[Count, ...], Field(min_length=1)]
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    rates: Annotated[tuple[Positive, ...], Field(min_length=3)]


@dataclass(frozen=True, config=STRICT)
class ScalingLaws:
    """Chapter 11's grids; a model is a pair of width and layers, budgets are FLOPs, the rest are tokens.

    `sweeps`: what the laws of rate and batch are fitted to; `ladder`: the sizes that share each of `budgets` (those
    whose tokens per parameter lie within `ratio`); `heldout_model`, `heldout_tokens`: the run that is
    predicted first; `widths`, `width_tokens`: of the transfer by muP; `moe_models`, `moe_tokens`: of the experts.
    """

    sweeps: Annotated[tuple[Sweep, ...], Field(min_length=1)]
    ladder: tuple[Shape, ...]
    budgets: tuple[Positive, ...]
    ratio: tuple[Positive, Positive]
    heldout_model: Shape
    heldout_tokens: Count
    widths: tuple[Count, ...]
    width_tokens: Count
    moe_models: tuple[Shape, ...]
    moe_tokens: Count
    vocab_size: Annotated[int, Field(ge=256 + CONTROL_TOKENS)] = 384
    length: Count = 64


@dataclass(frozen=True, config=STRICT)
class Sft:
    """Fine-tuning: `demonstrations` gold responses per task, and the numbers of the run.

    `replay`: windows of pre-training text per demonstration, their tokens weighing `replay_weight`; `min_lr_ratio`: the
    rates at the end, of those at the beginning.
    """

    demonstrations: Count
    epochs: Count
    batch_rows: Count
    learning_rate: Positive
    matrix_learning_rate: Positive
    warmup_steps: CountOrNone
    min_lr_ratio: Share = 0.1
    replay: NotNegative = 0.25
    replay_weight: NotNegative = 0.3


@dataclass(frozen=True, config=STRICT)
class RewardModelScale:
    """Preference data and training of chapter 17's reward models.

    `demonstrations`: careless responses per task; `problems`: per task for the pairs, `samples` answers each;
    `center`: the weight that keeps rewards around zero.
    """

    demonstrations: Count
    problems: Count
    learning_rate: Positive
    warmup_steps: CountOrNone = 3
    samples: Annotated[int, Field(gt=1)] = 8  # of one there is no pair
    epochs: Count = 1
    batch_pairs: Count = 32
    center: NotNegative = 0.01
    start: Literal["own", "shipped"] = "own"


@dataclass(frozen=True, config=STRICT)
class Dpo:
    """Preference optimisation: `problems` a task give up to `pairs_per_problem` pairs each of `samples` answers.

    `alpha`, `keep`: the Online Merging Optimizer's.
    """

    problems: Count
    pairs_per_problem: Count
    batch_pairs: Count
    beta: Positive
    learning_rate: Positive
    warmup_steps: CountOrNone
    alpha: Share
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    samples: Annotated[int, Field(gt=1)] = 8
    max_new_tokens: Count = 128
    epochs: Count = 1
    start: Literal["own", "shipped"] = "own"


@dataclass(frozen=True, config=STRICT)
class Grpo:
    """Reinforcement learning: `steps` updates on `queries` fresh problems with `group_size` answers each.

    `micro_groups`: groups per forward pass; `probe`: problems per kind that tell which are worth asking; `beta`:
    weight of the KL term, 0 for none.
    """

    steps: Count
    queries: Count
    learning_rate: Positive
    warmup_steps: CountOrNone = 5
    group_size: Annotated[int, Field(gt=1)] = 8  # of one there is nothing to compare
    micro_groups: Count = 6
    levels: Annotated[tuple[Literal[1, 2, 3, 4, 5], ...], Field(min_length=1)] = (1, 2, 3)
    probe: Count = 6
    max_new_tokens: Count = 128
    epsilon: Positive = 0.2
    epsilon_high: Positive = 0.28
    beta: NotNegative = 0.0
    start: Literal["own", "shipped"] = "own"


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

    eval_every: Count
    eval_tokens: Count
    needle_tries: Count
    sft_problems: Count
    sft_fresh: Count
    ablation_demonstrations: Count
    long_rows: Count
    reward_heldout: Count
    dpo_heldout: Count
    grpo_heldout: Count
    side_steps: Count
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

    @model_validator(mode="after")
    def _fits_together(self):
        for holds, section, key, reason in _rules(self):
            if not holds:
                raise ValueError(f"[{section}] key {key!r} {reason}")
        return self

    @property
    def digest(self) -> str:
        """Of the model and the tokenizer: two scale files of one name with other models are told apart by it."""
        text = json.dumps(
            [dataclasses.asdict(self.model), dataclasses.asdict(self.tokenizer)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def only(self, *sections: str) -> "Sections":
        """These sections alone, as the input of an experiment: reading another one is an error."""
        return Sections(self, sections)


def _rules(config: ScaleConfig) -> Iterator[tuple[bool, str, str, str]]:
    """What several keys must fulfil together: whether they do, section and key to change, and what it must be."""
    model, training, extension = config.model, config.pretraining, config.long_context
    ids, reach = config.tokenizer.vocab_size, model.max_position_embeddings
    reason = f"must be at least the tokenizer's {ids}, got {model.vocab_size}"
    yield model.vocab_size >= ids, "model", "vocab_size", reason
    yield (
        training.schedule != "wsd" or training.decay_fraction > 0,
        "pretraining",
        "decay_fraction",
        ("must be above 0 for wsd"),
    )
    for phase in training.phases:
        reason = f"must reach the longest training window, {phase.length}, got {reach}"
        yield phase.length <= reach, "model", "max_position_embeddings", reason
        reason = f"must be a multiple of length x grad_accumulation = {phase.length} x {training.grad_accumulation}"
        fits = training.batch_tokens % (phase.length * training.grad_accumulation) == 0
        yield fits, "pretraining", "batch_tokens", reason
    for number, stage in enumerate(extension.stages):
        fits = len(stage.shares) == len(stage.lengths)
        yield (
            fits,
            f"long_context.stages.{number}",
            "shares",
            "must hold one share for every length",
        )
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
        known = [field.name for field in dataclasses.fields(config)]
        if unknown := sorted(set(names) - set(known)):
            raise ScaleError(
                f"a scale has no section {unknown[0]!r}: use some of {', '.join(known[2:])}"
            )
        self.sections = {name: getattr(config, name) for name in ("name", "run", *names)}

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "sections":
            raise AttributeError(name)
        if name not in self.sections:
            declared = ", ".join(list(self.sections)[2:])
            raise ScaleError(
                f"the section {name!r} was read, but only {declared} declared: add it to config.only(…)"
            )
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
        if not re.fullmatch(r"[\w-]+", own.stem):  # it names the folder of the results
            raise ScaleError(
                f"{own} needs a name of letters, digits, _ and - before .toml: rename the file"
            )
        return own.resolve()
    known = ", ".join(scale_names())
    raise ScaleError(
        f"there is no scale {str(scale)!r}: use one of {known}, or the path of a .toml file"
    )


def load_scale(scale: str | Path) -> ScaleConfig:
    """Read and check a scale by name (`"quick"`) or by the path of a TOML file, whose stem becomes the name."""
    path = scale_file(scale)
    where = path.name if path.parent == FOLDER else str(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ScaleError(f"{where} is not valid TOML: {error}") from None
    if "name" in table:  # results go to runs/<name>
        raise ScaleError(f"{where}: has an unknown key 'name': a scale has the name of its file")
    try:
        # as JSON, where a list may be a tuple and 1 a float, but nothing else is converted
        return TypeAdapter(ScaleConfig).validate_json(
            json.dumps(table | {"name": path.stem}, default=str)
        )
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda one: one["type"] != UNKNOWN)
        raise ScaleError(f"{where}: {_sentence(unknown_first[0])}") from None


def _sentence(problem: dict) -> str:
    """`[model] key 'hidden_size' should be greater than 0, got 0`."""
    *section, key = problem["loc"] or ("",)
    inside = f"[{'.'.join(map(str, section))}] " if section else ""
    reason = (
        problem["ctx"]["error"]
        if problem["type"] == "value_error"
        else problem["msg"].removeprefix("Input ")
    )
    if not problem["loc"]:  # of several keys together
        return str(reason)
    if problem["type"] == UNKNOWN:
        return f"{inside}has an unknown key {key!r}"
    if problem["type"] == "missing":
        return f"{inside}lacks the key {key!r}"
    return f"{inside}key {key!r} {reason}" + (
        "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    )
