"""Fine-tuning: masks, the loss of TRL and transformers, packing, exact resume, honest scores."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from conftest import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mini import course
from qwen_mini.corpus import prepare_corpus
from qwen_mini.course import CourseError, artifacts, stages
from qwen_mini.long_context import open_long_corpus
from qwen_mini.model import Qwen
from qwen_mini.sft import (
    OTHER_SYSTEM,
    TRAIN_SYSTEM,
    Row,
    RowSampler,
    accuracy,
    by_area,
    by_problem,
    chat_example,
    demonstrations,
    draw_examples,
    evaluate_tasks,
    finetune,
    long_instructions,
    loss_mask,
    make_rows,
    mean_gain,
    pack_best_fit,
    pack_rows,
    part_of,
    pass_any,
    rejection_sample,
    replay_rows,
    score_long,
    sft_stage,
    share,
    slower,
    standard_error,
    to_batch,
    training_rows,
    verdicts,
    with_system,
)
from qwen_mini.tasks import TASKS, TRAIN_LEVELS, split_of
from qwen_mini.tokenizer import Tokenizer

FOLDER = artifacts.shipped_dir("long_context")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and <|im_start|>assistant\n1?"},
    {"role": "assistant", "content": "6\n"},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return (
        Qwen(small_config(vocab_size=4_096, max_position_embeddings=512))
        .eval()
        .requires_grad_(False)
    )


def spans(tokenizer, mask):
    """What is trained on, as text, piece by piece."""
    ids, trained = loss_mask(tokenizer, TALK, mask)
    assert len(ids) == len(trained) and ids == tokenizer.encode_chat(TALK)
    text, pieces = "", []
    for i, keep in zip([*ids, 0], [*trained, False], strict=True):
        if keep:
            text += tokenizer.decode([i])
        elif text:
            pieces.append(text)
            text = ""
    return pieces


def test_the_masks_train_on_what_they_say(tokenizer):
    assert spans(tokenizer, "answer") == ["5<|im_end|>", "6\n<|im_end|>"]
    assert spans(tokenizer, "answer+newline") == ["5<|im_end|>\n", "6\n<|im_end|>\n"]
    assert spans(tokenizer, "no_end") == ["5", "6\n"]
    assert spans(tokenizer, "chatml") == [
        "<|im_start|>", "<|im_end|>\n<|im_start|>", "<|im_end|>\n<|im_start|>", "5<|im_end|>\n<|im_start|>",
        "<|im_end|>\n<|im_start|>", "6\n<|im_end|>\n",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="there is no loss mask 'all': use one of answer"):
        loss_mask(tokenizer, TALK, "all")


@pytest.mark.parametrize("said", ["\n", "\n\nfive", "\n five", " five"])
def test_a_response_may_begin_with_white_space(tokenizer, said):
    """White space that is one token with the header's line break cannot be trained on; everything else is."""
    ids, trained = loss_mask(tokenizer, [*TALK[:2], {"role": "assistant", "content": said}])
    text = tokenizer.decode([i for i, keep in zip(ids, trained, strict=True) if keep])
    assert f"{said}<|im_end|>".endswith(text) and text.endswith(f"{said.lstrip()}<|im_end|>")


@pytest.mark.parametrize("name", TASKS)
def test_the_prompt_is_what_generation_sees(name, tokenizer):
    """Training rows begin with exactly the ids that the model is asked with, and go on with the response's own ids."""
    for example in draw_examples(5, 0, tasks=[name]):
        ids, trained = loss_mask(tokenizer, chat_example(example))
        prompt = tokenizer.encode_chat(example.messages, add_generation_prompt=True)
        answer = [*tokenizer.encode(example.response), tokenizer.im_end_id]
        assert (
            ids[: len(prompt)] == prompt and ids[len(prompt) : len(prompt) + len(answer)] == answer
        )
        assert [i for i, keep in enumerate(trained) if keep] == list(
            range(len(prompt), len(prompt) + len(answer))
        )


def rows_of(tokenizer, count=6):
    return make_rows(
        tokenizer, [(e, e.response) for e in draw_examples(1, 3, tasks=list(TASKS)[:count])]
    )


def test_the_loss_is_that_of_transformers_and_trl(tokenizer, model, tmp_path):
    """One batch: our weighted mean, `transformers` with the labels of TRL's collator, and TRL's own trainer."""
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    from datasets import Dataset

    rows = rows_of(tokenizer)
    batch = to_batch(rows)
    nll = torch.nn.functional.cross_entropy(
        model(batch.input_ids).flatten(0, 1), batch.targets.flatten(), reduction="none"
    )
    ours = (nll * batch.weights.flatten()).sum() / batch.weights.sum()
    model.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    labels = [[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)] for row in rows]
    data = Dataset.from_list(
        [{"input_ids": row.ids, "labels": x} for row, x in zip(rows, labels, strict=True)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    options = dict(
        report_to=[], use_cpu=True, bf16=False, max_length=None, remove_unused_columns=False
    )
    options |= dict(
        per_device_train_batch_size=len(rows), dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = trl.SFTTrainer(
        model=theirs,
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), **options),
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    count = (inputs["labels"][:, 1:] != -100).sum()
    assert count == batch.weights.sum()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    torch.testing.assert_close(ours, loss.cpu(), rtol=1e-5, atol=1e-5)


def test_packing_is_golden_and_keeps_everything():
    assert pack_best_fit([4, 2, 3, 1], 4) == [[0], [2, 3], [1]]
    assert pack_best_fit([], 4) == []
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into windows of 4"):
        pack_best_fit([5, 1], 4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40))
def test_packed_windows_hold_every_row_once_and_never_overflow(lengths):
    windows = pack_best_fit(lengths, 30)
    assert sorted(i for w in windows for i in w) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in w) for w in windows]
    assert all(0 < s <= 30 for s in sums)
    assert sum(s <= 15 for s in sums) <= 1  # two half-empty windows would have been one


def test_packing_changes_neither_loss_nor_gradient(tokenizer, model):
    rows = rows_of(tokenizer, 8)
    batch, packed = to_batch(rows), pack_rows(rows, 320)
    assert len(packed["input_ids"]) < len(rows)

    def loss_and_grad(weights, targets, **inputs):
        twin = Qwen(model.config)
        twin.load_state_dict(model.state_dict())
        nll = torch.nn.functional.cross_entropy(
            twin(**inputs).flatten(0, 1), targets.flatten(), reduction="none"
        )
        loss = (nll * weights.flatten()).sum() / weights.sum()
        loss.backward()
        return loss.detach(), [p.grad for p in twin.parameters()]

    one = loss_and_grad(batch.weights, batch.targets, input_ids=batch.input_ids)
    other = loss_and_grad(packed.pop("weights"), packed.pop("targets"), **packed)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_batches_show_every_row_once_an_epoch_and_keep_similar_lengths_together(tokenizer):
    rows = [Row([1] * n, [1.0] * n) for n in random.Random(0).choices(range(5, 200), k=300)]
    sampler = RowSampler(rows, 16, 2, seed=1)
    assert sorted(i for b in sampler.plan for i in b) == sorted([*range(300)] * 2)
    padded = sum(sampler.batch(s).input_ids.numel() for s in range(sampler.total_steps))
    assert padded < 1.35 * 2 * sum(len(row.ids) - 1 for row in rows)
    assert (
        RowSampler(rows, 16, 2, seed=1).plan == sampler.plan != RowSampler(rows, 16, 2, seed=2).plan
    )
    with pytest.raises(CourseError, match="a batch of 12 rows cannot be shared by 13 processes"):
        RowSampler(rows[:12], 16, 1).batch(0, 0, 13)
    whole, halves = sampler.batch(3), [sampler.batch(3, rank, 2) for rank in (0, 1)]
    assert sum(b.weights.sum() for b in halves) == whole.weights.sum()
    with pytest.raises(CourseError, match="there are no rows to train on"):
        RowSampler([], 16, 1)


def test_system_prompts_are_added_only_where_none_is_set():
    example = TASKS["story"].generate(random.Random(0))
    assert with_system(example, "x").messages[0] == {"role": "system", "content": "x"}
    assert with_system(example, None) == example
    own = TASKS["system_rule"].generate(random.Random(0))
    assert with_system(own, "x") == own
    assert not set(TRAIN_SYSTEM) & set(OTHER_SYSTEM)


def test_demonstrations_are_train_side_only_gold_and_different():
    pairs = demonstrations(6, 0)
    assert len(pairs) == 6 * len(TASKS) and len({(e.task, e.key) for e, _ in pairs}) == len(pairs)
    assert all(
        split_of(f"{e.task}/{e.key}") == "train" and response == e.response for e, response in pairs
    )
    assert all(e.level in TRAIN_LEVELS for e, _ in pairs)
    assert demonstrations(6, 0) == pairs != demonstrations(6, 1)


def test_no_demonstration_is_worded_as_what_is_only_asked_or_measured():
    for e, _ in demonstrations(12, 0):
        others = {
            text.split("{")[0]
            for how in ("asked", "unseen")
            for text in getattr(TASKS[e.task], how)
        }
        assert not any(start and e.messages[-1]["content"].startswith(start) for start in others), e
    both = draw_examples(8, 0, "test", wordings=("shown", "asked"), tasks=["purchase"])
    starts = [e.messages[-1]["content"].startswith(("How much", "In the basket")) for e in both]
    assert starts == [False, True] * 4 and len({e.key for e in both}) == 8


@pytest.mark.parametrize("scale", ["quick", "laptop", "gpu", "cluster"])
def test_every_gold_response_fits_what_may_be_generated(scale, tokenizer):
    config = course.load_scale(scale)
    room = min(config.dpo.max_new_tokens, config.grpo.max_new_tokens)
    for e in draw_examples(40, 0):
        assert len(tokenizer.encode(e.response)) + 1 <= room, e


def test_a_second_fine_tuning_is_slower():
    sft = course.load_scale("laptop").sft
    again = slower(sft, 1 / 4, epochs=1)
    assert (again.learning_rate, again.matrix_learning_rate) == (
        sft.learning_rate / 4,
        sft.matrix_learning_rate / 4,
    )
    assert again.epochs == 1 and slower(sft).learning_rate == sft.learning_rate / 8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quick scale with a handful of demonstrations and a small corpus, in a folder of its own, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(tmp_path_factory.mktemp("runs")))
        config = course.load_scale("quick")
        corpus = dataclasses.replace(config.corpus, sources=("python",), max_bytes_per_source=300_000,
                                     task_documents=200, chat_documents=100, needle_rows=8)  # fmt: skip
        config = dataclasses.replace(
            config, corpus=corpus, run=dataclasses.replace(config.run, dtype="float32"),
            sft=dataclasses.replace(config.sft, demonstrations=3, epochs=2, batch_rows=8),
        )  # fmt: skip
        prepare_corpus(config)
        yield config


def test_replay_is_pre_training_text_with_its_weight(small):
    corpus, tokenizer = open_long_corpus(small, FOLDER)
    rows = replay_rows(small, corpus, 12, 0.2)
    assert len(rows) == 12 and all(
        len(row.ids) == 129 and set(row.weights) == {0.2} for row in rows
    )
    text = {
        name: " ".join(map(str, corpus.tokens(name, "train"))) for name in corpus.text_domains()
    }
    assert all(
        any(" ".join(map(str, row.ids)) in stream for stream in text.values()) for row in rows
    )
    rows = training_rows(small, small.sft, corpus, tokenizer)
    replayed = [row for row in rows if row.weights == [small.sft.replay_weight] * 129]
    assert len(replayed) == round(small.sft.replay * 3 * len(TASKS))


def changed(config, section, field):
    """The config with one number of a section changed a little."""
    settings = getattr(config, section)
    value = getattr(settings, field)
    if field == "phases":
        *before, last = value
        one, two = list(last.mixture)[:2]
        half = last.mixture[one] / 2
        other = (
            *before,
            dataclasses.replace(
                last, mixture=last.mixture | {one: half, two: last.mixture[two] + half}
            ),
        )
    elif field == "optimizer":
        other = {"muon": "adamw", "adamw": "muon"}[value]
    else:
        other = value + 1 if isinstance(value, int) else value / 2
    return dataclasses.replace(config, **{section: dataclasses.replace(settings, **{field: other})})


def watched(settings, reads):
    """Settings that note which of their numbers are read."""

    def look(self, name):
        reads.add(name)
        return super(type(settings), self).__getattribute__(name)

    kind = type(type(settings).__name__, (type(settings),), {"__getattribute__": look})
    return kind(
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    )


def test_the_key_holds_every_number_that_the_training_reads(small):
    reads = {"sft": set(), "pretraining": set()}
    spied = {name: watched(getattr(small, name), seen) for name, seen in reads.items()}
    made = sft_stage(dataclasses.replace(small, **spied), stage="watched")
    for seen in reads.values():
        seen.clear()  # what was read for the handle does not count
    made.make()
    own, of_optimizer = (
        {f.name for f in dataclasses.fields(spied[name])} & seen for name, seen in reads.items()
    )
    fixed = {
        "schedule",
        "decay_fraction",
        "grad_accumulation",
    }  # by this chapter's code, whatever a scale says
    own |= of_optimizer & {field.name for field in dataclasses.fields(small.sft)}
    assert {
        "demonstrations",
        "replay_weight",
        "epochs",
        "learning_rate",
    } <= own and "phases" in of_optimizer
    keys = {made.key}
    for section, fields in (("sft", own), ("pretraining", of_optimizer - own - fixed)):
        for field in fields:
            keys.add(sft_stage(changed(small, section, field), stage="watched").key)
    assert len(keys) == 1 + len(own) + len(of_optimizer - own - fixed)


def test_the_key_holds_seed_corpus_and_versions_but_no_measurement(small, monkeypatch):
    from qwen_mini.course import versions

    key = sft_stage(small).key
    assert (
        sft_stage(small, seed=1).key
        != key
        != sft_stage(changed(small, "corpus", "max_bytes_per_source")).key
    )
    assert sft_stage(changed(small, "measure", "sft_problems")).key == key
    assert (
        sft_stage(changed(small, "pretraining", "learning_rate")).key == key
    )  # the stage has its own
    raised = versions.versions() | {"tasks": 99}
    monkeypatch.setattr(versions, "versions", lambda: raised)
    assert sft_stage(small).key != key  # other wordings, other verifiers


def test_an_interrupted_run_reaches_the_same_weights(small):
    whole = finetune(small, stage="whole")
    state = finetune(small, stage="cut", stop_after=5)
    assert state.suffix == ".safetensors" and not (artifacts.stage_dir("quick", "cut")).exists()
    cut = finetune(small, stage="cut")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert not state.exists()
    steps = [record["step"] for record in stages.metrics(cut)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_run_goes_on_from_its_last_save_and_short_runs_are_saved_too(small, monkeypatch):
    from qwen_mini import sft

    whole = finetune(small, stage="whole")
    clock = iter(
        range(0, 10_000, 20)
    )  # every look at the clock is 20 s later: a save is due every second step
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    step = sft.Trainer.step

    def dies(trainer, batch):
        if trainer.step_count == 5:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(sft.Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(small, stage="killed")
    assert len(list(artifacts.stage_dir("quick", "training_state").glob("killed-*"))) == 1
    seen = []
    monkeypatch.setattr(
        sft.Trainer, "step", lambda t, batch: seen.append(t.step_count) or step(t, batch)
    )
    again = finetune(small, stage="killed")
    assert (
        seen[0] == 4
        and (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    )


def test_a_finished_run_is_not_repeated_unless_something_changed(small):
    folder = finetune(small, stage="again")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert finetune(small, stage="again") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    finetune(small, seed=1, stage="again")
    assert (folder / "model.safetensors").stat().st_mtime_ns != before


def test_the_checkpoint_opens_in_transformers_and_stops_at_the_end_token(small):
    transformers = pytest.importorskip("transformers")
    folder = finetune(small, stage="whole")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.im_end_id in theirs.generation_config.eos_token_id
    ids = torch.tensor([tokenizer.encode_chat(TALK[:2], add_generation_prompt=True)])
    with torch.no_grad():
        torch.testing.assert_close(
            Qwen.from_pretrained(folder).eval()(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_scores_count_what_they_say(tokenizer, monkeypatch):
    """A stand-in for generation that answers with gold, unfinished gold, or nonsense."""
    from qwen_mini import sft
    from qwen_mini.generation import Completion

    examples = draw_examples(1, 5, tasks=["story", "rules", "to_json"])
    gold = {
        tuple(tokenizer.encode_chat(e.messages, add_generation_prompt=True)): e.response
        for e in examples
    }

    def answers(model, prompts, new, *, stop_ids, num_return_sequences, **_):
        done = []
        for prompt in prompts:
            ids = tokenizer.encode(gold[tuple(prompt)])
            kinds = [
                Completion([*ids, stop_ids[0]], True),
                Completion(ids, False),
                Completion([*tokenizer.encode("no"), stop_ids[0]], True),
            ]
            done += (kinds * num_return_sequences)[:num_return_sequences]
        return done

    monkeypatch.setattr(sft, "generate", answers)
    one, four = (evaluate_tasks(None, tokenizer, examples, samples=n) for n in (1, 4))
    assert accuracy(one) == 1 and pass_any(one) == 1
    assert accuracy(four) == 0.5 and pass_any(four) == 1 and standard_error(four) == 0
    assert by_problem(four).tolist() == [0.5] * len(examples)
    kept = json.loads(json.dumps(verdicts(four)))  # as a record keeps them
    assert kept["task"] == ["story", "rules", "to_json"] and kept["correct"] == [[1, 0, 0, 1]] * 3
    assert kept["finished"] == [[1, 0, 1, 1]] * 3 and kept["tokens"] == [
        [len(a.tokens) for a in g] for g in four
    ]
    for score in (accuracy, pass_any, by_area, standard_error, verdicts):
        assert score(kept) == score(four)
    kept["correct"][1] = [1, 1, 1, 1]
    assert by_area(kept)[TASKS["rules"].area] == 1 and by_area(kept)[TASKS["story"].area] == 0.5
    assert by_area(kept, pass_any)[TASKS["story"].area] == 1 and share(kept, "finished") == 0.75
    assert by_problem(part_of(kept, ["rules", "story"])).tolist() == [0.5, 1]
    assert [a.finished for a in four[0]] == [True, False, True, True]
    kept = rejection_sample(None, tokenizer, examples, 4, most=2)
    assert kept == [(e, e.response) for e in examples]  # the same text counts once


def test_the_error_of_a_gain_holds_problems_and_runs():
    """By hand: runs of mean 0.5 and 0.25; problems of mean 0.75, 0.25, 0.5, 0."""
    differences = np.array([[1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    problems, runs = (0.3125 / 3) / 4, 0.03125
    assert mean_gain(differences) == pytest.approx((0.375, (problems + runs / 2) ** 0.5))
    assert mean_gain(differences, other_runs=1) == pytest.approx(
        (0.375, (problems + runs * 1.5) ** 0.5)
    )
    alone = differences[:1]
    assert mean_gain(alone, other_runs=1) == pytest.approx(
        (0.5, (1 / 3 / 4) ** 0.5)
    )  # one run has no spread


def test_same_seed_same_answers(tokenizer, model):
    examples = draw_examples(2, 1, tasks=["story", "rules"])
    first, again, other = (
        evaluate_tasks(model, tokenizer, examples, 1.0, 2, 8, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other


def test_long_instructions_ask_for_one_of_their_keys(tokenizer, monkeypatch):
    hay = np.array(
        tokenizer.encode("the sun and the moon are far away from here. " * 200), dtype=np.uint16
    )
    made = long_instructions(4, 300, hay, tokenizer, 0)
    for [message], response in made:
        number = response.split()[-1].rstrip(".")
        assert number in message["content"] and len(number) == 5 and number.isdigit()
        size = len(tokenizer.encode_chat([message], add_generation_prompt=True))
        assert 290 < size < 400
    from qwen_mini import sft
    from qwen_mini.generation import Completion

    said = iter([made[0][1], "no 12345", made[2][1] + " 12345", made[3][1]])
    monkeypatch.setattr(sft, "generate", lambda m, prompts, n, **_: [
        Completion([*tokenizer.encode(next(said)), tokenizer.im_end_id], True) for _ in prompts
    ])  # fmt: skip
    assert score_long(None, tokenizer, made) == 0.5
