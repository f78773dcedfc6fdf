"""Scales load, and every kind of mistake in one is named with its file, section and key."""

import dataclasses
import pickle
import tomllib

import pytest

from qwen_mini import course
from qwen_mini.course.scales import FOLDER, Phase, scale_names

QUICK = (FOLDER / "quick.toml").read_text(encoding="utf-8")


def load_with(tmp_path, old: str, new: str):
    """Load quick.toml with one line's beginning replaced."""
    lines = [new if line.startswith(old) else line for line in QUICK.splitlines()]
    assert lines != QUICK.splitlines(), f"no line begins with {old!r}"
    path = tmp_path / "own.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return course.load_scale(path)


@pytest.mark.parametrize("name", ["quick", "laptop", "gpu", "cluster"])
def test_every_scale_loads_and_keeps_the_numbers_of_its_file(name):
    config = course.load_scale(name)
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    assert config.name == name and config.model.hidden_size == table["model"]["hidden_size"]
    assert isinstance(config.pretraining.phases[0], Phase)
    assert config.corpus.sources == tuple(table["corpus"]["sources"])
    assert (
        pickle.loads(pickle.dumps(config)) == config
        and table["run"].items() <= dataclasses.asdict(config)["run"].items()
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 1


def test_cluster_is_qwen2_5_0_5b():
    model = course.load_scale("cluster").model
    shape = (
        model.hidden_size,
        model.intermediate_size,
        model.num_hidden_layers,
        model.head_dim,
        model.vocab_size,
    )
    assert shape == (896, 4864, 24, 64, 151_936)
    assert (model.num_attention_heads, model.num_key_value_heads, model.tie_word_embeddings) == (
        14,
        2,
        True,
    )


def test_known_scales_are_listed_in_order():
    assert scale_names() == ["quick", "laptop", "gpu", "cluster"]
    with pytest.raises(course.ScaleError, match="'huge'.*quick, laptop, gpu, cluster"):
        course.load_scale("huge")


def test_a_file_of_ones_own_is_a_scale(tmp_path):
    assert load_with(tmp_path, "training_bytes", "training_bytes = 7").name == "own"
    with pytest.raises(course.ScaleError, match="there is no scale"):
        course.load_scale(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "hidden_size",
            "hidden_sise = 96",
            r"own.toml: \[model\] has an unknown key 'hidden_sise'",
        ),
        ("hidden_size", "", r"own.toml: \[model\] lacks the key 'hidden_size'"),
        (
            "hidden_size",
            'hidden_size = "96"',
            r"\[model\] key 'hidden_size' should be a valid integer, got '96'",
        ),
        (
            "hidden_size",
            "hidden_size = 96.5",
            r"\[model\] key 'hidden_size' should be a valid integer",
        ),
        (
            "hidden_size",
            "hidden_size = true",
            r"\[model\] key 'hidden_size' should be a valid integer",
        ),
        (
            "hidden_size",
            "hidden_size = 0",
            r"\[model\] key 'hidden_size' should be greater than 0, got 0",
        ),
        ("head_dim", "head_dim = 31", r"\[model\] key 'head_dim' should be a multiple of 2"),
        (
            "num_key_value_heads",
            "num_key_value_heads = 3",
            r"\[model\] key 'num_key_value_heads' must divide",
        ),
        (
            "num_attention_heads",
            "num_attention_heads = 4\ntie_word_embeddings = 1",
            "should be a valid boolean, got 1",
        ),
        (
            "dtype",
            'dtype = "fp8"',
            r"\[run\] key 'dtype' should be 'float32' or 'bfloat16', got 'fp8'",
        ),
        (
            "dtype",
            'dtype = "auto"',
            r"\[run\] key 'dtype' should be 'float32' or 'bfloat16', got 'auto'",
        ),
        ("eval_every", "eval_every = 0", r"\[measure\] key 'eval_every' should be greater than 0"),
        ("best_of", "best_of = 1", r"\[measure\] key 'best_of' should be greater than 1"),
        ("tokens", "tokens = 0", r"\[pretraining.phases.0\] key 'tokens' should be greater than 0"),
        ("side_steps", "", r"own.toml: \[measure\] lacks the key 'side_steps'"),
        (
            "decay_fraction",
            "decay_fraction = 0.5\neval_every = 100",
            r"\[pretraining\] has an unknown key 'eval_every'",
        ),
        (
            "decay_fraction",
            "decay_fraction = 0.5\ncheckpoint_every = 5",
            r"\[pretraining\] has an unknown key 'checkpoint_every'",
        ),
        ("sources", 'sources = "python"', r"\[corpus\] key 'sources' should be a valid array"),
        ("sources", "sources = [1]", r"\[corpus.sources\] key 0 should be a valid string"),
        ("heldout_fraction", "heldout_fraction = 1.5", r"\[corpus\] key 'heldout_fraction'"),
        ("decay_fraction", "decay_fraction = 0.5\nbeta2 = 1.0", r"\[pretraining\] key 'beta2'"),
        (
            "batch_tokens",
            "batch_tokens = 1000",
            r"\[pretraining\] key 'batch_tokens' must be a multiple",
        ),
        (
            "max_position_embeddings",
            "max_position_embeddings = 8",
            r"\[model\] key 'max_position_embeddings'",
        ),
        (
            "shares",
            "shares = [0.4, 0.5]",
            r"\[long_context.stages.0\] key 'shares' must sum to 1, got 0.9",
        ),
        (
            "shares",
            "shares = [1]",
            r"\[long_context.stages.0\] key 'shares' must hold one share for every length",
        ),
        ("factors", "factors = [1, 2]", r"\[dual_chunk\] key 'factors' must hold 1 and 4"),
        (
            "chunk_tokens",
            "chunk_tokens = 1000",
            r"\[sparse_prefill\] key 'chunk_tokens' must be a multiple of 768",
        ),
        ("[tokenizer]", "[tokeniser]", "own.toml: has an unknown key 'tokeniser'"),
        ("[run]", "[run", "own.toml is not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    with pytest.raises(course.ScaleError, match=message):
        load_with(tmp_path, old, new)


@pytest.mark.parametrize("name", scale_names())
def test_no_size_of_a_measurement_stands_in_a_section_that_trains(name):
    """A key holds what trains: what is measured, and how often, stands in a section of its own."""
    config = course.load_scale(name)
    sizes = {field.name for field in dataclasses.fields(config.measure)}
    for section in ("pretraining", "long_context", "sft", "reward_model", "dpo", "grpo"):
        assert not sizes & {field.name for field in dataclasses.fields(getattr(config, section))}
    assert config.run.dtype in ("float32", "bfloat16")


def test_a_file_with_the_name_of_a_scale_of_the_course_is_refused(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(QUICK, encoding="utf-8")
    with pytest.raises(
        course.ScaleError, match="has the name of a scale of the course.*rename the file"
    ):
        course.load_scale(path)
    assert course.load_scale(path.rename(tmp_path / "renamed.toml")).name == "renamed"
    assert course.load_scale(FOLDER / "quick.toml").name == "quick"


def test_a_scale_file_cannot_choose_where_results_go(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f'name = "{tmp_path}/thesis"\n{QUICK}', encoding="utf-8")
    with pytest.raises(
        course.ScaleError, match="unknown key 'name': a scale has the name of its file"
    ):
        course.load_scale(path)
    for stem in ("..", "a b", "a\nb", "a."):
        path = tmp_path / f"{stem}.toml"
        path.write_text(QUICK, encoding="utf-8")
        with pytest.raises(course.ScaleError, match="needs a name of letters"):
            course.load_scale(path)


def test_models_and_tokenizers_tell_scales_of_one_name_apart(tmp_path):
    one = load_with(tmp_path, "training_bytes", "training_bytes = 7")
    assert load_with(tmp_path, "training_bytes", "training_bytes = 8").digest != one.digest
    assert (
        load_with(tmp_path, "hidden_size", "hidden_size = 192").digest
        != course.load_scale("quick").digest
    )
    assert (
        load_with(tmp_path, "eval_every", "eval_every = 7").digest
        == course.load_scale("quick").digest
    )


def test_only_the_sections_that_were_declared_can_be_read():
    config = course.load_scale("quick")
    part = config.only("model", "sft")
    assert part.sft is config.sft and part.name == "quick" and part.run is config.run
    with pytest.raises(
        course.ScaleError,
        match=r"'dpo' was read, but only model, sft declared: add it to config.only",
    ):
        part.dpo  # noqa: B018
    with pytest.raises(course.ScaleError, match="no section 'sftt': use some of tokenizer, model"):
        config.only("sftt")
