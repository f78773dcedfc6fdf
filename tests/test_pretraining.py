"""Chapter 09: the batches, runs that are interrupted or shared, and the measures of held-out text."""

import collections
import dataclasses
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_two_processes
from safetensors.torch import load_file
from tiny import fresh, losses_of, tiny_scale, weights_of
from torch import nn

from qwen_mini import corpus as corpus_module
from qwen_mini import pretraining
from qwen_mini.corpus import open_corpus, open_prepared, prepare_corpus
from qwen_mini.course import CourseError, artifacts, load_scale, stages
from qwen_mini.course.scales import FOLDER, Phase, Pretraining
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.pretraining import (
    MixtureSampler,
    evaluate_bits_per_byte,
    heldout_nll,
    ngram_nll,
    pretrain,
    pretraining_stage,
    token_sizes,
    xz_bits_per_byte,
)
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.training import (
    Batch,
    Trainer,
    finished_model,
    load_training_state,
    make_optimizers,
    training_header,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(environment, scale path, corpus): one corpus that all tests of this module read."""
    folder = tmp_path_factory.mktemp("pretraining")
    old, threads = os.environ["QWEN_MINI_RUNS"], torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["QWEN_MINI_RUNS"] = str(folder / "runs")
    scale = tiny_scale(folder)
    config = load_scale(scale)
    corpus = open_corpus(prepare_corpus(config))
    yield config, scale, corpus, folder / "runs"
    os.environ["QWEN_MINI_RUNS"] = old
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- batches
def test_batches_depend_on_seed_and_step_alone(prepared):
    config, _, corpus, _ = prepared
    make = lambda seed: MixtureSampler(corpus, config.pretraining.phases, 512, seed)
    one, other = make(0), make(0)
    late = other.batch(25)
    for step in range(25):
        one.batch(step)
    assert torch.equal(one.batch(25).input_ids, late.input_ids)
    assert not torch.equal(make(1).batch(25).input_ids, late.input_ids)


def test_shares_are_kept_at_every_step(prepared):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    for plan, phase in zip(sampler.plans, sampler.phases, strict=True):
        rows = 512 // phase.length
        wanted = np.arange(len(plan))[:, None] * rows * np.array(list(phase.mixture.values()))
        assert (np.diff(plan, axis=0).sum(1) == rows).all()
        assert (np.diff(plan, axis=0) >= 0).all()
        assert np.abs(plan - wanted).max() < 2


def test_every_window_comes_once_before_any_comes_again(prepared):
    _, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, (Phase(100_000, 64, {"chat": 1.0}),), 512)
    tokens = np.asarray(corpus.tokens("chat", "train")).astype(np.int64)
    count = (len(tokens) - 65) // 64 + 1
    seen = [
        tuple(row.tolist()) for step in range(count // 8) for row in sampler.batch(step).input_ids
    ]
    windows = collections.Counter(
        tuple(tokens[i * 64 : i * 64 + 64].tolist()) for i in range(count)
    )
    assert not collections.Counter(seen) - windows


def test_ranks_share_one_batch(prepared):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    whole = sampler.batch(20)
    parts = [sampler.batch(20, rank, 3) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.input_ids, whole.input_ids[rank::3])
        assert torch.equal(part.weights, whole.weights[rank::3])


def test_targets_follow_inputs_and_needles_carry_weights(prepared):
    config, _, corpus, _ = prepared
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    needles = (batch.weights != 1).any(1)
    assert needles.any() and (~needles).any()
    assert (batch.weights[~needles] == 1).all()
    assert batch.weights[needles].max() > 1 > batch.weights[needles].min()


def test_sampler_errors_say_what_to_do(prepared):
    _, _, corpus, _ = prepared
    with pytest.raises(ValueError, match="names the domain 'poems'.*prepare the corpus again"):
        MixtureSampler(corpus, (Phase(512, 32, {"poems": 1.0}),), 512)
    with pytest.raises(ValueError, match="rows of 64 tokens.*windows of 32"):
        MixtureSampler(corpus, (Phase(512, 32, {"needles_64": 1.0}),), 512).batch(0)
    with pytest.raises(ValueError, match="shorter than one window"):
        MixtureSampler(corpus, (Phase(2**20, 2**20, {"chat": 1.0}),), 2**20).batch(0)


# ---------------------------------------------------------------- the stage
@pytest.fixture
def own(prepared, tmp_path, monkeypatch):
    """(config, runs): the corpus of this module in a folder that one test may spoil."""
    config, _, _, runs = prepared
    for name in ("corpus", "tokenizer"):
        shutil.copytree(runs / "tiny" / name, tmp_path / "runs" / "tiny" / name)
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / "runs"))
    return config, tmp_path / "runs"


@pytest.fixture
def saved_often(monkeypatch):
    """A training state after every step."""
    monkeypatch.setattr(stages, "SAVE_EVERY", 0.0)


def run_pretrain(scale: str, runs: Path, stage: str, **options) -> subprocess.Popen:
    """A training in another process that saves its state after every step."""
    code = (
        f"from qwen_mini import course; from qwen_mini.pretraining import pretrain; import torch; "
        f"course.stages.SAVE_EVERY = 0.0; "
        f"torch.set_num_threads(1); pretrain(course.load_scale({scale!r}), stage={stage!r})"
    )
    environment = os.environ | {"QWEN_MINI_RUNS": str(runs)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **options)


@pytest.fixture(scope="module")
def whole(prepared):
    """The folder of a run that nothing has interrupted."""
    config, *_ = prepared
    return pretrain(config, stage="whole")


@pytest.fixture
def steps_taken(monkeypatch):
    """The numbers of the steps that are computed from now on."""
    taken, step = [], Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, batch: taken.append(self.step_count) or step(self, batch)
    )
    return taken


def test_killed_at_random_moments_reaches_the_same_numbers(prepared, whole):
    _, scale, _, runs = prepared
    state, rng = runs / "tiny" / "training_state", random.Random(0)
    written = lambda: {path: path.stat().st_mtime_ns for path in state.glob("killed-*")}
    for _ in range(3):
        before = written()
        process = run_pretrain(scale, runs, "killed")
        while (
            written() == before and process.poll() is None
        ):  # wait for the next training state, then strike
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, "the run was over before it could be killed"
    assert run_pretrain(scale, runs, "killed").wait(120) == 0
    assert losses_of(runs / "tiny" / "killed") == losses_of(whole)
    assert weights_of(runs / "tiny" / "killed") == weights_of(whole)
    assert not list(state.glob("*killed*"))


@pytest.mark.skipif(os.name == "nt", reason="nothing keeps two writers apart there")
def test_a_second_process_waits_and_finds_the_stage_made(prepared, whole):
    config, scale, _, runs = prepared
    with artifacts.stage_lock("tiny", "twice"):
        second = run_pretrain(scale, runs, "twice", stdout=subprocess.PIPE, text=True)
        assert f"twice is being made by process {os.getpid()} on " in second.stdout.readline()
        weights = pretrain(config, stage="twice") / "model.safetensors"
        made = weights.stat().st_mtime_ns
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and said == "" and weights.stat().st_mtime_ns == made
    assert weights_of(runs / "tiny" / "twice") == weights_of(whole)


@pytest.mark.parametrize(
    "stop", [1, 10, 17, 29]
)  # in the middle, at an evaluation, in the second phase, at the end
def test_an_interrupted_run_reaches_the_same_numbers(prepared, whole, steps_taken, stop):
    config, *_ = prepared
    state = pretrain(config, stage="interrupted", stop_after=stop)
    assert (
        state.suffix == ".safetensors"
        and pretraining_stage(config, stage="interrupted").find() is None
    )
    folder = pretrain(config, stage="interrupted")
    assert steps_taken == list(range(30))
    assert losses_of(folder) == losses_of(whole) and weights_of(folder) == weights_of(whole)
    assert not state.exists()
    shutil.rmtree(folder)


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_previous_state(prepared, saved_often, monkeypatch):
    config, _, _, _ = prepared
    state = pretrain(config, stage="full_disk", stop_after=5)
    before = state.read_bytes()
    monkeypatch.setattr(artifacts, "check_writable", lambda _: None)  # it is full only later
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        artifacts.ArtifactError, match="the disk is full; the previous version, if any, is kept"
    ):
        pretrain(config, stage="full_disk")
    monkeypatch.undo()
    assert state.read_bytes() == before
    assert load_training_state(state, fresh(config))[-1]["step"] == 5


def test_a_disk_that_is_full_from_the_beginning_costs_no_step(own, steps_taken, monkeypatch):
    config, runs = own
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(artifacts.ArtifactError, match="the disk is full"):
        pretrain(config)
    assert steps_taken == []


def test_a_full_disk_at_the_end_keeps_the_state(own, whole, steps_taken, monkeypatch):
    """The last checkpoint does not fit, a training state does: no step is computed again."""
    config, runs = own
    monkeypatch.setattr(artifacts, "write_lines", no_space)
    place = re.escape(str(Path("tiny", "full_end")))
    with pytest.raises(
        artifacts.ArtifactError, match=rf"{place} was not written because the disk is full"
    ):
        pretrain(config, stage="full_end")
    monkeypatch.undo()
    monkeypatch.setenv("QWEN_MINI_RUNS", str(runs))
    assert len(steps_taken) == 30
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was computed again"))
    folder = pretrain(config, stage="full_end")
    assert losses_of(folder) == losses_of(whole) and weights_of(folder) == weights_of(whole)
    assert not list((runs / "tiny" / "training_state").glob("*"))


def test_a_finished_run_is_not_repeated(prepared, steps_taken):
    config, _, _, _ = prepared
    folder = pretrain(config, stage="finished")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    steps_taken.clear()
    assert pretrain(config, stage="finished") == folder and steps_taken == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    again = dataclasses.replace(config.pretraining, weight_decay=0.2)
    assert pretrain(config, stage="finished", settings=again) == folder
    assert (
        steps_taken == list(range(30))
        and (folder / "model.safetensors").stat().st_mtime_ns != before
    )


def test_a_finished_run_can_be_made_anew(prepared, whole, steps_taken):
    config, *_ = prepared
    before = weights_of(whole)
    assert pretraining_stage(config, stage="whole").make() == whole
    assert steps_taken == list(range(30)) and weights_of(whole) == before


def test_domains_that_could_not_be_fetched_leave_the_mixture(prepared):
    config, _, corpus, _ = prepared
    phases = (Phase(512, 32, {"wiki_en": 0.5, "python": 0.3, "tasks": 0.2}),)
    monkey = type(
        "Corpus",
        (),
        {"domains": corpus.domains, "manifest": corpus.manifest | {"left_out": {"wiki_en": "?"}}},
    )
    assert pretraining.available_phases(phases, monkey)[0].mixture == pytest.approx(
        {"python": 0.6, "tasks": 0.4}
    )
    with pytest.raises(ValueError, match="names the domain 'wiki_en'"):
        MixtureSampler(corpus, pretraining.available_phases(phases, corpus), 512)


def test_a_run_keeps_the_precision_it_began_with(prepared, whole, capsys, monkeypatch):
    config, _, _, _ = prepared
    pretrain(config, stage="precision", stop_after=3)
    monkeypatch.setenv("QWEN_MINI_DTYPE", "bfloat16")
    folder = pretrain(config, stage="precision")
    assert (
        "precision: goes on in torch.float32, as it began, not in torch.bfloat16"
        in capsys.readouterr().out
    )
    assert artifacts.read_manifest(folder)["provenance"]["precision"] == "float32"
    assert losses_of(folder) == losses_of(whole)
    other = pretrain(config, stage="other_precision")
    assert artifacts.read_manifest(other)["provenance"]["precision"] == "bfloat16"
    assert losses_of(other) != losses_of(whole)


SETTINGS = {"phases": lambda p: (dataclasses.replace(p[0], tokens=2 * p[0].tokens), *p[1:]),
            "optimizer": lambda _: "adamw", "schedule": lambda _: "wsd"}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Pretraining)])
def test_every_setting_is_in_the_key(prepared, field):
    config, *_ = prepared
    value = getattr(config.pretraining, field)
    other = SETTINGS.get(field, lambda x: x * 2 if isinstance(x, int) else x / 2)(value)
    settings = dataclasses.replace(config.pretraining, **{field: other})
    assert pretraining_stage(config, settings=settings).key != pretraining_stage(config).key


def test_model_corpus_and_seed_are_in_the_key_and_measurements_are_not(prepared):
    config, *_ = prepared
    key, replace = pretraining_stage(config).key, dataclasses.replace
    others = [
        pretraining_stage(config, seed=1),
        pretraining_stage(replace(config, model=replace(config.model, rope_theta=2000.0))),
        pretraining_stage(replace(config, corpus=replace(config.corpus, chat_documents=31))),
        pretraining_stage(
            replace(config, tokenizer=replace(config.tokenizer, training_bytes=50_000))
        ),
    ]
    assert len({key, *(stage.key for stage in others)}) == 5
    measure = replace(config.measure, eval_every=7, eval_tokens=128)
    assert pretraining_stage(replace(config, measure=measure)).key == key
    assert (
        pretraining_stage(config, stage="other_name").key == key
    )  # a name says where, the key says what


def test_the_size_of_evaluations_changes_no_training(prepared, whole):
    config, *_ = prepared
    often = dataclasses.replace(
        config, measure=dataclasses.replace(config.measure, eval_every=7, eval_tokens=128)
    )
    folder = pretrain(often, stage="often")
    assert weights_of(folder) == weights_of(whole)
    evaluated = lambda where: [step for step, _, _, heldout in losses_of(where) if heldout]
    assert evaluated(folder) == [7, 14, 21, 28, 30] and evaluated(whole) == [10, 20, 30]


def test_other_settings_do_not_resume_each_other(prepared):
    config, _, _, _ = prepared
    one = pretrain(config, stage="settings", stop_after=3)
    settings = dataclasses.replace(config.pretraining, clip_norm=0.05)
    other = pretrain(config, stage="settings", settings=settings, stop_after=3)
    assert one != other and one.exists() and other.exists()


def test_the_checkpoint_is_a_hugging_face_folder(prepared, whole):
    transformers = pytest.importorskip("transformers")
    _, _, corpus, _ = prepared
    names = {path.name for path in whole.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "metrics.jsonl",
        "manifest.json",
    } <= names
    ids = torch.from_numpy(np.asarray(corpus.tokens("python", "heldout")[:60]).astype(np.int64))[
        None
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    assert theirs.generation_config.eos_token_id == Tokenizer.from_pretrained(whole).endoftext_id
    with torch.no_grad():
        torch.testing.assert_close(
            Qwen.from_pretrained(whole)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_the_checkpoint_holds_the_masters_as_they_are_shipped(prepared, whole):
    """bfloat16, rounded from the float32 weights of the last step."""
    config, _, corpus, _ = prepared
    torch.manual_seed(0)
    trainer = Trainer(Qwen(ModelConfig.from_scale(config)), config.pretraining, 30)
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    for step in range(30):
        trainer.step(sampler.batch(step))
    stored = load_file(whole / "model.safetensors")
    for name, p in zip(trainer.names, trainer.masters, strict=True):
        assert torch.equal(stored[name], p.detach().bfloat16())
    finished = finished_model(trainer)
    assert {p.dtype for p in finished.parameters()} == {torch.float32}


def test_a_missing_corpus_says_which_command_makes_it(runs_folder, tmp_path):
    with pytest.raises(
        artifacts.MissingStage, match="'corpus' of scale 'tiny' is missing: make it with"
    ):
        pretrain(load_scale(tiny_scale(tmp_path)))


def test_tokenizer_and_corpus_of_different_recipes_are_told_apart(own, monkeypatch, steps_taken):
    """A preparation with another seed that ends between its two stages leaves its tokenizer beside the old corpus."""
    config, _ = own
    monkeypatch.setattr(corpus_module, "CorpusWriter", no_space)
    with pytest.raises(artifacts.ArtifactError):
        prepare_corpus(config, seed=1)
    monkeypatch.undo()
    monkeypatch.setenv("QWEN_MINI_RUNS", str(own[1]))
    with pytest.raises(
        CourseError,
        match="corpus and the tokenizer of scale 'tiny' were made from different settings",
    ):
        open_prepared(config)
    with pytest.raises(
        CourseError, match="were made from different settings.*run `qwen-mini run corpus"
    ):
        pretrain(config)
    assert steps_taken == []
    prepare_corpus(config, seed=1)  # what the message says to run
    corpus, tokenizer = open_prepared(config)
    assert (
        tokenizer.decode(corpus.tokens("python", "heldout")[:200])
        in corpus.heldout_bytes("python").decode()
    )


def test_a_corpus_of_another_seed_or_size_is_not_trained_on(own, steps_taken):
    """The key names the corpus that a run has read: any other would make a model that is not what its key says."""
    config, _ = own
    with pytest.raises(CourseError, match="prepared with other settings or another seed"):
        pretrain(config, seed=1)
    larger = dataclasses.replace(
        config, corpus=dataclasses.replace(config.corpus, chat_documents=31)
    )
    with pytest.raises(CourseError, match="prepared with other settings or another seed"):
        pretrain(larger)
    assert steps_taken == []


# ---------------------------------------------------------------- two processes
BODY = """
import dataclasses, json, os, pathlib
from qwen_mini import course
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.pretraining import pretrain
from qwen_mini.training import Batch, Trainer
config, rank = course.load_scale(sys.argv[1]), dist.get_rank()
runs, told = pathlib.Path(os.environ["QWEN_MINI_RUNS"]), {}


def failure(**options):
    try:
        pretrain(config, **options)
    except course.CourseError as error:
        return str(error)
    return "no error"


pretrain(config, stage="two_processes")
told["finished"] = pretrain(config, stage="two_processes").name
pretrain(config, stage="cut", stop_after=12)
pretrain(config, stage="cut")
many = dataclasses.replace(config.pretraining, grad_accumulation=8)
told["rows"] = failure(stage="rows", settings=many)

rows = torch.load(sys.argv[2])
torch.manual_seed(0)
trainer = Trainer(Qwen(ModelConfig.from_scale(config)), config.pretraining, 30)
told["loss"] = trainer.step(Batch(*(x[rank::2] for x in rows)))["loss"]
try:
    trainer.step(Batch(rows[0][1::2], rows[1][1::2], rows[2][1::2]))
except course.CourseError as error:
    told["nothing"] = str(error)

for stage in ("begun", "made"):  # a disk each from here on; the first process alone has what is there already
    for first in (0, 1):
        os.environ["QWEN_MINI_RUNS"] = str(runs.parent / f"{stage}{int(rank == first)}")
        told[f"{stage}{first}"] = failure(stage=stage)
pathlib.Path(sys.argv[3], f"{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def two(prepared, whole, tmp_path_factory):
    """What two processes tell, one dict each; their stages lie in the folder of results."""
    config, scale, corpus, runs = prepared
    for stage in ("begun", "made"):
        for process in (0, 1):  # folder 1 holds what folder 0 lacks
            folder = runs.parent / f"{stage}{process}" / "tiny"
            for name in ("corpus", "tokenizer"):
                shutil.copytree(runs / "tiny" / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(runs.parent / "begun1"))
        pretrain(config, stage="begun", stop_after=3)
        patch.setenv("QWEN_MINI_RUNS", str(runs.parent / "made1"))
        pretrain(config, stage="made")
    folder = tmp_path_factory.mktemp("two")
    torch.save(half_empty(config, corpus), folder / "rows.pt")
    run_two_processes(folder, BODY, scale, folder / "rows.pt", folder, QWEN_MINI_RUNS=str(runs))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def half_empty(config, corpus) -> list[torch.Tensor]:
    """A batch whose odd rows train nothing: all that the second of two processes gets."""
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    weights = batch.weights.clone()
    weights[1::2] = 0
    return [batch.input_ids, batch.targets, weights]


@pytest.mark.parametrize("name", ["two_processes", "cut"])
def test_two_processes_train_as_one(prepared, whole, two, name):
    *_, runs = prepared
    done, one = losses_of(runs / "tiny" / name), losses_of(whole)
    assert [r[0] for r in done] == [r[0] for r in one] and {told["finished"] for told in two} == {
        "two_processes"
    }
    assert [r[1] for r in done] == pytest.approx([r[1] for r in one], rel=1e-4)


KILLED = """
import os, signal
from qwen_mini import course
from qwen_mini.course import stages
from qwen_mini.pretraining import pretrain
from qwen_mini.training import Trainer
stages.SAVE_EVERY, update = 0.0, Trainer.update


def fragile(trainer):
    if sys.argv[2] == "kill" and trainer.step_count == 14 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(trainer)


Trainer.update = fragile
pretrain(course.load_scale(sys.argv[1]), stage="rank_killed")
"""


def test_a_run_goes_on_after_one_of_its_processes_was_killed(prepared, two, tmp_path):
    _, scale, _, runs = prepared
    variables = {"QWEN_MINI_RUNS": str(runs)}
    with pytest.raises(subprocess.CalledProcessError):
        run_two_processes(tmp_path, KILLED, scale, "kill", **variables)
    [state] = (runs / "tiny" / "training_state").glob("rank_killed-*")
    assert int(training_header(state)["step"]) == 14
    run_two_processes(tmp_path, KILLED, scale, "go on", **variables)
    killed, whole = (losses_of(runs / "tiny" / name) for name in ("rank_killed", "two_processes"))
    assert killed == whole
    assert weights_of(runs / "tiny" / "rank_killed") == weights_of(runs / "tiny" / "two_processes")


def test_rows_that_cannot_be_shared_are_refused(two):
    for told in two:
        assert told["rows"].startswith(
            "8 rows of 64 tokens cannot be shared by 2 process(es) x 8 micro-batches"
        )


@pytest.mark.parametrize(("case", "stands"), [("begun", "at step 3"), ("made", "finished")])
@pytest.mark.parametrize("first", [0, 1])
def test_processes_that_do_not_see_the_same_folder_end_with_a_sentence(two, case, stands, first):
    for told in two:
        sentence = told[f"{case}{first}"]
        assert (
            sentence.startswith("these processes do not see the same folder")
            and "\n" not in sentence
        )
        assert (
            stands in sentence and "put QWEN_MINI_RUNS on a disk that all of them share" in sentence
        )


def test_a_process_may_have_nothing_to_train_but_not_all_of_them(prepared, two):
    config, _, corpus, _ = prepared
    alone = fresh(config).step(Batch(*half_empty(config, corpus)))
    for told in two:
        assert told["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert told["nothing"].startswith("this batch trains no token")


# ---------------------------------------------------------------- measures
@pytest.mark.parametrize("stride", [8, 16])
def test_heldout_nll_equals_token_by_token(prepared, stride):
    config, _, corpus, _ = prepared
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_scale(config))
    tokens = np.asarray(corpus.tokens("python", "heldout")[:150]).astype(np.int64)
    nll = heldout_nll(model, tokens, 16, stride=stride)
    assert len(nll) == 149
    starts = list(range(0, 149, stride))
    for t in range(1, 150):  # token t is scored in the first window that reaches it
        start = next(s for s in starts if s + 16 >= t)
        context = torch.from_numpy(tokens[start:t])[None]
        logprobs = model(context)[0, -1].log_softmax(-1)
        assert nll[t - 1].item() == pytest.approx(-logprobs[tokens[t]].item(), abs=1e-4)


def test_bits_per_byte_of_a_uniform_model(prepared):
    config, _, corpus, _ = prepared
    tokenizer = Tokenizer.from_pretrained(artifacts.find(config.name, "tokenizer"))
    model = Qwen(ModelConfig.from_scale(config))
    nn.init.zeros_(model.model.norm.weight)
    tokens = np.asarray(corpus.tokens("python", "heldout"))
    expected = (len(tokens) - 1) * math.log2(384) / token_sizes(tokenizer)[tokens[1:]].sum()
    assert evaluate_bits_per_byte(model, corpus, tokenizer, "python", 64) == pytest.approx(
        expected, rel=1e-5
    )


def test_token_sizes_count_the_held_out_bytes(prepared):
    config, _, corpus, _ = prepared
    tokenizer = Tokenizer.from_pretrained(artifacts.find(config.name, "tokenizer"))
    for name in ("python", "tasks"):
        assert token_sizes(tokenizer)[np.asarray(corpus.tokens(name, "heldout"))].sum() == len(
            corpus.heldout_bytes(name)
        )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_equals_a_dictionary(order):
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 6, 300), rng.integers(0, 8, 80)

    def probability(context, token, n):
        if n == 0:
            return 1 / 8
        lower = probability(context[1:], token, n - 1)
        follow = collections.Counter(
            train[i + n - 1]
            for i in range(len(train) - n + 1)
            if tuple(train[i : i + n - 1]) == context
        )
        total, kinds = sum(follow.values()), len(follow)
        return (follow[token] + kinds * lower) / (total + kinds) if total else lower

    expected = [
        -math.log(
            probability(tuple(heldout[max(0, i - order + 1) : i]), heldout[i], min(order, i + 1))
        )
        for i in range(1, len(heldout))
    ]
    np.testing.assert_allclose(ngram_nll(train, heldout, 3, 8)[order - 1], expected, rtol=1e-9)


def test_xz_is_the_real_xz():
    data = b"the same words over and over, " * 100
    assert xz_bits_per_byte(data) == 8 * len(
        lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    ) / len(data)


# ---------------------------------------------------------------- every scale
@pytest.mark.parametrize("scale", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_every_scale_fits_its_stages(scale):
    """The model can be built (on the meta device) and the phases are whole numbers of batches and rows."""
    config = load_scale(scale)
    with torch.device("meta"):
        model = Qwen(ModelConfig.from_scale(config))
    trained = make_optimizers(
        [
            (name, nn.Parameter(torch.empty(p.shape, device="meta")))
            for name, p in model.named_parameters()
        ],
        config.pretraining,
    )
    grouped = sum(len(group["params"]) for optimizer in trained for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters()))
    for phase in config.pretraining.phases:
        assert phase.tokens >= config.pretraining.batch_tokens
        for name in phase.mixture:
            if name.startswith("needles_"):
                assert (
                    int(name.removeprefix("needles_"))
                    == phase.length
                    in config.corpus.needle_lengths
                )
