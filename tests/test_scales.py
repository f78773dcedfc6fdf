"""Scales load, and every kind of mistake in one is named with its file, section and key."""

import contextlib
import dataclasses
import json
import pickle
import re
import tomllib

import pytest
from tiny import toml, whole_file

from qwen_mini import course
from qwen_mini.course.scales import FOLDER, Phase, scale_names
from qwen_mini.tasks import TASKS

NAMES = scale_names()
PHASE = "[[pretraining.phases]]\ntokens = {tokens}\n{length}mixture = {{ tasks = 1.0 }}"
STAGE = "[[long_context.stages]]\ntokens = 512\nrope_theta = 1e4\nlengths = [512, 256]\nshares = "


def own_scale(tmp_path, text: str, base: str = "quick"):
    """Load a file that says `text`, and the rest like another scale."""
    path = tmp_path / "own.toml"
    path.write_text(f'base = "{base}"\n{text}' if base else text, encoding="utf-8")
    return course.load_scale(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_loads_and_keeps_the_numbers_of_its_file(name):
    config = course.load_scale(name)
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    assert config.name == name and isinstance(config.pretraining.phases[0], Phase)
    found = dataclasses.asdict(config)
    for section, key, value in _said(table):
        if key != "sweeps":  # whose tables have defaults, too
            assert json.loads(json.dumps(found[section][key])) == value, (section, key)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 1


def _said(table: dict):
    """Section, key and value of all that a file says of its sections."""
    for section, values in table.items():
        if isinstance(values, dict):
            yield from ((section, key, value) for key, value in values.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_only_what_differs(name, tmp_path):
    config = course.load_scale(name)
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    for section, key, _ in _said(table):
        less = table | {section: {k: v for k, v in table[section].items() if k != key}}
        text = "".join(f"{top} = {toml(value)}\n" for top, value in less.items())
        with contextlib.suppress(course.ScaleError):
            other = own_scale(tmp_path, text, base="")
            assert dataclasses.replace(other, name=name) != config, (section, key)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_say_everything(name, tmp_path):
    config = course.load_scale(name)
    for base in ("", "cluster"):
        found = own_scale(tmp_path, whole_file(config), base)
        assert dataclasses.replace(found, name=name) == config


def test_what_no_file_says_is_as_at_laptop_and_follows_from_other_keys(tmp_path):
    laptop = course.load_scale("laptop")
    empty = own_scale(tmp_path, "", base="")
    for section in ("tokenizer", "model", "moe", "corpus", "scaling_laws", "dpo", "grpo"):
        assert getattr(empty, section) == getattr(laptop, section)
    text = PHASE.format(tokens=1, length="length = 512\n") + "\n[tokenizer]\nvocab_size = 2000"
    own = own_scale(tmp_path, f"{text}\n[model]\nhidden_size = 256", base="")
    model = own.model
    shape = (model.vocab_size, model.head_dim, model.max_position_embeddings)
    assert shape == (2000, 64, 512) and own.corpus.needle_lengths == (512,)
    assert own.long_context.batch_tokens == own.pretraining.batch_tokens
    assert (empty.model.vocab_size, empty.model.head_dim) == (1024, 32)  # each has its own


def test_a_file_begins_from_its_base_and_says_for_all_stages_what_they_start_from(tmp_path):
    gpu = course.load_scale("gpu")
    own = own_scale(tmp_path, 'start = "shipped"\n[dpo]\nstart = "own"\nbeta = 0.5', base="gpu")
    assert own.name == "own" and own.dpo == dataclasses.replace(gpu.dpo, beta=0.5)
    assert own.grpo == dataclasses.replace(gpu.grpo, start="shipped")
    starting = {own.long_context.start, own.data_quality.start, own.reward_model.start}
    assert starting == {"shipped"} and own.model == gpu.model
    for base in ("'own'", "'gpu.toml'", "7", "[]"):
        with pytest.raises(course.ScaleError, match="own.toml: key 'base' should be one of quick"):
            own_scale(tmp_path, f"base = {base}", base="")
    with pytest.raises(course.ScaleError, match=r"key 'start' should be 'own' or 'shipped'"):
        own_scale(tmp_path, "start = 1")


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
    assert own_scale(tmp_path, "[tokenizer]\ntraining_bytes = 7").tokenizer.training_bytes == 7
    with pytest.raises(course.ScaleError, match="there is no scale"):
        course.load_scale(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("section", "said", "message"),
    [
        ("model", "hidden_sise = 96", r"own.toml: \[model\] has an unknown key 'hidden_sise'"),
        ("model", 'hidden_size = "96"', r"\[model\] key 'hidden_size' .* valid integer, got '96'"),
        ("model", "hidden_size = 96.5", r"\[model\] key 'hidden_size' should be a valid integer"),
        ("model", "hidden_size = true", r"\[model\] key 'hidden_size' should be a valid integer"),
        ("model", "hidden_size = 0", r"key 'hidden_size' should be greater than 0, got 0"),
        ("model", "head_dim = 31", r"\[model\] key 'head_dim' should be a multiple of 2"),
        ("model", "num_key_value_heads = 3", r"\[model\] key 'num_key_value_heads' must divide"),
        ("model", "num_attention_heads = 5", r"\[model\] key 'num_key_value_heads' must divide"),
        ("model", "tie_word_embeddings = 1", "should be a valid boolean, got 1"),
        ("model", "vocab_size = 300", r"\[model\] key 'vocab_size' must be at least the tokenizer"),
        ("model", "max_position_embeddings = 8", r"\[model\] key 'max_position_embeddings'"),
        ("run", 'dtype = "fp8"', r"\[run\] key 'dtype' .* 'float32' or 'bfloat16', got 'fp8'"),
        ("run", 'dtype = "auto"', r"\[run\] key 'dtype' .* 'float32' or 'bfloat16', got 'auto'"),
        ("measure", "eval_every = 0", r"\[measure\] key 'eval_every' should be greater than 0"),
        ("measure", "best_of = 1", r"\[measure\] key 'best_of' should be greater than 1"),
        ("pretraining", "eval_every = 1", r"\[pretraining\] has an unknown key 'eval_every'"),
        ("pretraining", "beta2 = 1.0", r"\[pretraining\] key 'beta2'"),
        ("pretraining", "decay_fraction = 0", r"key 'decay_fraction' must be above 0 for wsd"),
        ("pretraining", "batch_tokens = 1000", r"\[pretraining\] key 'batch_tokens' must be a mul"),
        ("corpus", 'sources = "python"', r"\[corpus\] key 'sources' should be a valid array"),
        ("corpus", "sources = [1]", r"\[corpus.sources\] key 0 should be a valid string"),
        ("corpus", "heldout_fraction = 1.5", r"\[corpus\] key 'heldout_fraction'"),
        ("dual_chunk", "factors = [1, 2]", r"\[dual_chunk\] key 'factors' must hold 1 and 4"),
        ("sparse_prefill", "chunk_tokens = 1000", r"'chunk_tokens' must be a multiple of 768"),
        ("tokeniser", "vocab_size = 384", "own.toml: has an unknown key 'tokeniser'"),
        ("", "corpus = 5", r"own.toml: key 'corpus' should be"),
        ("", PHASE.format(tokens=1, length=""), r"\[pretraining.phases.0\] lacks the key 'length'"),
        (
            "",
            PHASE.format(tokens=0, length="length = 64\n"),
            r"\[pretraining.phases.0\] key 'tokens'",
        ),
        (
            "",
            STAGE + "[0.4, 0.5]",
            r"\[long_context.stages.0\] key 'shares' must sum to 1, got 0.9",
        ),
        (
            "",
            STAGE + "[1]",
            r"\[long_context.stages.0\] key 'shares' must hold one share for every",
        ),
        ("run", "[", "own.toml is not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, section, said, message):
    with pytest.raises(course.ScaleError, match=message):
        own_scale(tmp_path, f"[{section}]\n{said}" if section else said)


def test_a_mistake_in_what_follows_from_other_keys_names_the_key_to_state(tmp_path):
    for hidden in (12, 2):
        with pytest.raises(course.ScaleError, match=r"\[model\] key 'head_dim' must be even"):
            own_scale(tmp_path, f"[model]\nhidden_size = {hidden}", base="")
    with pytest.raises(
        course.ScaleError, match=r"\[long_context\] key 'batch_tokens' must be a mu"
    ):
        own_scale(tmp_path, "[pretraining]\nbatch_tokens = 768", base="")


@pytest.mark.parametrize("name", NAMES)
def test_no_size_of_a_measurement_stands_in_a_section_that_trains(name):
    """A key holds what trains: what is measured, and how often, stands in a section of its own."""
    config = course.load_scale(name)
    sizes = {field.name for field in dataclasses.fields(config.measure)}
    for section in ("pretraining", "long_context", "sft", "reward_model", "dpo", "grpo"):
        assert not sizes & {field.name for field in dataclasses.fields(getattr(config, section))}
    assert config.run.dtype in ("float32", "bfloat16")


def test_a_file_with_the_name_of_a_scale_of_the_course_is_refused(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text("", encoding="utf-8")
    with pytest.raises(
        course.ScaleError, match="has the name of a scale of the course.*rename the file"
    ):
        course.load_scale(path)
    assert course.load_scale(path.rename(tmp_path / "renamed.toml")).name == "renamed"
    assert course.load_scale(FOLDER / "quick.toml").name == "quick"


def test_a_scale_file_cannot_choose_where_results_go(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f'name = "{tmp_path}/thesis"\n', encoding="utf-8")
    with pytest.raises(
        course.ScaleError, match="unknown key 'name': a scale has the name of its file"
    ):
        course.load_scale(path)
    for stem in ("..", "a b", "a\nb", "a."):
        path = tmp_path / f"{stem}.toml"
        path.write_text("", encoding="utf-8")
        with pytest.raises(course.ScaleError, match="needs a name of letters"):
            course.load_scale(path)


def test_models_and_tokenizers_tell_scales_of_one_name_apart(tmp_path):
    quick = course.load_scale("quick").digest
    few, more = (own_scale(tmp_path, f"[tokenizer]\ntraining_bytes = {n}").digest for n in (7, 8))
    wide = own_scale(tmp_path, "[model]\nhidden_size = 192").digest
    assert len({quick, few, more, wide}) == 4
    assert own_scale(tmp_path, "[measure]\neval_every = 7").digest == quick


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


@pytest.mark.parametrize("name", ["gpu", "cluster"])
def test_every_value_that_no_run_here_has_tried_says_where_it_comes_from(name):
    """On its line, or in the comment above its group of lines, which an empty line ends."""
    source = re.compile(r"arXiv:? \d{4}\.\d{5}|[Rr]eport[ ,]+(section|Table)|[Oo]ur choice")
    for block in (FOLDER / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[1:]:
        said, keys = "", 0
        for line in block.splitlines():
            code, _, comment = line.partition("#")
            if not code.strip():
                said += comment
            elif "=" in code and not code.startswith(" "):  # what is indented continues a list
                keys += 1
                assert source.search(comment or said), f"{name}.toml: {line!r} has no source"
        assert keys, block


def test_the_report_s_own_numbers_stand_in_the_largest_scale():
    cluster, tasks = course.load_scale("cluster"), len(TASKS)
    assert cluster.grpo.queries * cluster.grpo.group_size == 2048
    assert cluster.sft.demonstrations * tasks > 1e6 and cluster.sft.epochs == 2
    assert (cluster.sft.learning_rate, cluster.sft.min_lr_ratio) == (7e-6, 0.1)
    assert cluster.dpo.learning_rate == 7e-7 and cluster.dpo.epochs == 1
    assert cluster.dpo.problems * cluster.dpo.pairs_per_problem * tasks == 300_000
    assert (cluster.pretraining.weight_decay, cluster.pretraining.clip_norm) == (0.1, 1.0)
    (stage,) = cluster.long_context.stages
    assert (cluster.model.max_position_embeddings, stage.lengths[0]) == (4096, 32_768)
    assert (cluster.model.rope_theta, stage.rope_theta) == (1e4, 1e6) and stage.shares[0] == 0.4
