"""Needle tasks, the length mixture, and the stage that extends a context: exact resume, exact base, honest scores."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from tiny import needle_share as evaluate_task

from qwen_mini import course
from qwen_mini.attention import causal_attention
from qwen_mini.corpus import pack, prepare_corpus
from qwen_mini.course import artifacts, stages
from qwen_mini.course.corpus_files import long_documents, recode
from qwen_mini.course.scales import Stage
from qwen_mini.course.statistics import wilson_interval
from qwen_mini.generation import generate
from qwen_mini.layers import rope_frequencies
from qwen_mini.long_context import (
    RULER,
    Example,
    LongCorpus,
    StageSampler,
    add_needles,
    ask,
    ask_all,
    extend_context,
    extended_checkpoint,
    extension_stage,
    haystack,
    interleave,
    long_rows,
    needle_batch,
    open_hay,
    open_long_corpus,
    position_losses,
    score,
    set_base,
    starting_point,
    task_scores,
    with_needles,
)
from qwen_mini.model import Qwen, read_config
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.world.needles import needle_pieces, needle_question, needle_statement

SHIPPED = artifacts.shipped_dir("pretraining")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quick scale with two tiny stages, its corpus made in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(tmp_path_factory.mktemp("runs")))
        config = course.load_scale("quick")
        corpus = dataclasses.replace(config.corpus, sources=("python",), max_bytes_per_source=300_000,
                                     task_documents=300, chat_documents=60, needle_rows=64)  # fmt: skip
        mixture = {"python": 0.7, "tasks": 0.2, "chat": 0.1}
        phases = tuple(
            dataclasses.replace(phase, mixture=mixture) for phase in config.pretraining.phases
        )
        pretraining = dataclasses.replace(config.pretraining, phases=phases)
        measure = dataclasses.replace(config.measure, eval_every=100, eval_tokens=512)
        settings = dataclasses.replace(
            config.long_context, batch_tokens=1_024, needle_rows=40, warmup_steps=1,
            stages=(Stage(3_072, 5_000.0, (256, 128), (0.4, 0.6)), Stage(3_072, 20_000.0, (512, 128), (0.4, 0.6))),
        )  # fmt: skip
        config = dataclasses.replace(config, corpus=corpus, pretraining=pretraining, long_context=settings,
                                     measure=measure, run=dataclasses.replace(config.run, dtype="float32"))  # fmt: skip
        prepare_corpus(config, 0)
        yield config


@pytest.fixture(scope="module")
def hay(tokenizer):
    text = "The river is long and the house stands by the road. A stone fell into the water near the old bridge. "
    return np.array(tokenizer.encode(text * 200), dtype=np.uint16)


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [96, 257, 1_024])
def test_every_task_fills_its_length_and_its_answer_is_right(name, length, hay, tokenizer):
    pieces = needle_pieces(tokenizer)
    for seed in range(20):
        example = RULER[name](length, hay, pieces, random.Random(seed))
        assert len(example.prompt) + len(example.answer) == length
        assert score(example.answer, example.references) == 1
        assert score([], example.references) == 0
        assert max(example.prompt + example.answer) < tokenizer.vocab_size
        garbage = random.Random(seed).choices(hay.tolist(), k=len(example.answer))
        assert score(garbage, example.references) < 1


@pytest.mark.parametrize(
    "name", ["passkey", "single", "multi_key", "only_needles", "multi_value", "multi_query"]
)
def test_what_is_asked_for_stands_in_the_prompt(name, hay, tokenizer):
    example = RULER[name](512, hay, needle_pieces(tokenizer), random.Random(4))
    text = tokenizer.decode(example.prompt)
    assert all(tokenizer.decode(list(r)) in text for r in example.references)


def test_variable_tracking_can_be_followed_by_hand(hay, tokenizer):
    pieces = needle_pieces(tokenizer)
    example = RULER["variable_tracking"](300, hay, pieces, random.Random(2))
    equals, ids = pieces.equals[0], example.prompt
    asked, chain = ids[-2], []
    while asked not in pieces.digits:
        place = next(i for i in range(len(ids) - 3) if ids[i] == asked and ids[i + 1] == equals)
        asked = ids[place + 2]
        chain.append(asked)
    assert [(name,) for name in chain[:-1]] == [tuple(r) for r in example.references[:-1]] and len(
        chain
    ) == 5


def test_tasks_that_do_not_fit_are_an_error(hay, tokenizer):
    with pytest.raises(course.CourseError, match="do not fit"):
        RULER["multi_query"](40, hay, needle_pieces(tokenizer), random.Random(0))


def test_score_counts_neighbouring_ids_only():
    assert score([1, 2, 3, 9, 9], [(1, 2, 3)]) == 1
    assert score([1, 9, 2, 3], [(1, 2, 3)]) == 0
    assert score([5, 6, 1], [(5,), (7,), (1,), (6, 1)]) == 0.75


def test_wilson_interval_against_known_values():
    low, high = wilson_interval(0.5, 100)
    assert abs(low - 0.40383) < 1e-4 and abs(high - 0.59617) < 1e-4
    assert wilson_interval(1.0, 20)[1] == 1 and abs(wilson_interval(1.0, 20)[0] - 0.83887) < 1e-4
    assert wilson_interval(0.0, 20)[0] == 0


def test_evaluate_task_is_exact_on_a_model_that_knows_and_one_that_does_not(hay, tokenizer):
    """The shipped model finds a pass key at its trained length; untrained weights do not."""
    model = Qwen.from_pretrained(SHIPPED).eval().requires_grad_(False)
    pieces = needle_pieces(tokenizer)
    assert evaluate_task(model, RULER["passkey"], 128, 8, hay, pieces) >= 0.75
    torch.manual_seed(0)
    assert evaluate_task(Qwen(model.config).eval(), RULER["passkey"], 128, 4, hay, pieces) == 0


def test_the_score_of_a_task_is_the_mean_of_its_prompts(hay, tokenizer):
    """In the order of the prompts, however many are read at once."""
    model = Qwen.from_pretrained(artifacts.shipped_dir("long_context")).eval().requires_grad_(False)
    pieces, task = needle_pieces(tokenizer), RULER["multi_value"]
    scores = task_scores(model, task, 256, 7, hay, pieces, batch_tokens=800)
    assert len(scores) == 7 and len(set(scores)) > 1 and set(scores) <= {0, 0.25, 0.5, 0.75, 1}
    assert scores == task_scores(model, task, 256, 7, hay, pieces)
    assert evaluate_task(model, task, 256, 7, hay, pieces) == sum(scores) / 7


def test_evaluation_asks_every_model_the_same(hay, tokenizer):
    seen = []

    def spy(length, filler, pieces, rng):
        seen.append(RULER["single"](length, filler, pieces, rng))
        return Example(seen[-1].prompt, seen[-1].answer, seen[-1].references)

    model = Qwen.from_pretrained(SHIPPED).eval().requires_grad_(False)
    for _ in range(2):
        evaluate_task(model, spy, 96, 3, hay, needle_pieces(tokenizer))
    assert [e.prompt for e in seen[:3]] == [e.prompt for e in seen[3:]]


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_lengths_keep_their_shares_at_all_times(steps):
    shares = {1_024: 0.4, 512: 0.2, 256: 0.3, 128: 0.1}
    order = interleave(shares, steps)
    for end in range(1, steps + 1):
        assert all(abs(order[:end].count(n) - share * end) < 1.5 for n, share in shares.items())


def test_needle_rows_mark_answers_and_repeat_with_their_seed(hay, tokenizer):
    ids, weights = needle_batch(60, 256, hay, needle_pieces(tokenizer), "x")
    again, _ = needle_batch(60, 256, hay, needle_pieces(tokenizer), "x")
    other, _ = needle_batch(60, 256, hay, needle_pieces(tokenizer), "y")
    assert ids.shape == weights.shape == (60, 257)
    assert (ids == again).all() and (ids != other).any()
    assert ((weights == 50).sum(1) >= 1).all()


def test_needles_replace_needles_and_shares_sum_to_one():
    mixture = with_needles({"a": 0.5, "b": 0.3, "needles_64": 0.2}, "needles_512", 0.25)
    assert mixture.keys() == {"a", "b", "needles_512"} and math.isclose(sum(mixture.values()), 1)
    assert math.isclose(mixture["a"] / mixture["b"], 0.5 / 0.3)


def test_the_sampler_knows_its_base_and_its_lengths(small):
    corpus, _ = open_long_corpus(small, starting_point(small))
    add_needles(corpus, [128, 256, 512], 40, 0)
    sampler = StageSampler(corpus, small.long_context, small.pretraining.phases[-1].mixture, 0)
    assert sampler.total_steps == 6
    assert [sampler.base(i) for i in range(7)] == [5_000.0] * 3 + [20_000.0] * 4
    lengths = [sampler.batch(i).input_ids.shape[1] for i in range(6)]
    assert set(lengths[:3]) == {256, 128} and set(lengths[3:]) == {512, 128}
    assert all(sampler.batch(i).input_ids.numel() == 1_024 for i in range(6))
    whole = sampler.batch(4).input_ids
    halves = [sampler.batch(4, rank, 2).input_ids for rank in range(2)]
    assert sum(len(h) for h in halves) == len(whole) and torch.equal(whole[::2], halves[0])


def test_text_in_other_ids_is_the_same_text(small):
    """The corpus has the ids of its own tokenizer; what the extension trains on has those of the checkpoint."""
    corpus, tokenizer = open_long_corpus(small, starting_point(small))
    own = Tokenizer.from_pretrained(artifacts.find("quick", "tokenizer"))
    before = own.decode(corpus.corpus.tokens("python")[:500].tolist())
    after = tokenizer.decode(corpus.tokens("python")[:800].tolist())
    common = min(len(before), len(after), 400)
    assert before[:common] == after[:common]
    chat = corpus.tokens("chat")
    assert (
        tokenizer.control_tokens["<|im_start|>"] in chat
        and tokenizer.control_tokens["<|im_end|>"] in chat
    )


def test_only_the_sides_that_are_read_are_encoded_anew(small, monkeypatch):
    asked = []
    spy = lambda tokens, *others: asked.append(len(tokens)) or recode(tokens, *others)
    monkeypatch.setattr("qwen_mini.long_context.recode", spy)
    corpus, tokenizer = open_long_corpus(small, starting_point(small))
    corpus.recode_tokens = 500
    assert asked == []
    first = corpus.tokens("python", "heldout")
    assert asked == [500] and corpus.weights("python", "heldout") is None
    assert corpus.tokens("python", "heldout") is first and asked == [500]
    own = LongCorpus(
        corpus.corpus, tokenizer
    )  # nothing is known of the corpus's ids: they count as the tokenizer's
    assert len(own.tokens("python")) > 500 and asked == [500]


def test_what_needs_the_corpus_prepares_it(small, tmp_path, monkeypatch):
    """A measurement declares two sections of the scale, and neither it nor the stage wants anything run before."""
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / "measured"))
    pieces, hay = open_hay(SHIPPED, small.only("corpus", "tokenizer"))
    corpus, tokenizer = open_long_corpus(small, SHIPPED)
    assert pieces == needle_pieces(tokenizer) and np.array_equal(hay, corpus.filler("heldout"))
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / "trained"))
    assert extend_context(small, 0, stage="alone", stop_after=1).exists()


def test_extension_writes_a_checkpoint_with_the_new_base_and_context(small):
    folder = extend_context(small, 0, stage="extended")
    config = read_config(folder)
    assert config.rope_theta == 20_000.0 and config.max_position_embeddings == 512
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(900, (2, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            Qwen.from_pretrained(folder).eval()(ids), theirs(ids).logits, rtol=1e-4, atol=2e-4
        )


def test_an_interrupted_extension_reaches_the_same_numbers(small):
    whole = extend_context(small, 0, stage="whole")
    for stop in (2, 4):
        state = extend_context(small, 0, stage="cut", stop_after=stop)
        assert state.suffix == ".safetensors" and state.exists()
    cut = extend_context(small, 0, stage="cut")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    losses = [[record["loss"] for record in stages.metrics(folder)] for folder in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert not state.exists()


def test_a_finished_extension_is_found_and_not_made_again(small, monkeypatch):
    folder = extend_context(small, 0, stage="extended")

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("qwen_mini.long_context.make_extension", refuse)
    assert extend_context(small, 0, stage="extended") == folder
    with pytest.raises(AssertionError, match="trained again"):
        extend_context(small, 1, stage="extended")


def test_other_settings_do_not_go_on_from_an_interrupted_run(small):
    """A state of one clip norm is no start for another: the result is that of a run of its own."""
    tight = dataclasses.replace(
        small, pretraining=dataclasses.replace(small.pretraining, clip_norm=0.05)
    )
    extend_context(small, 0, stage="mixed", stop_after=3)
    mixed, fresh = extend_context(tight, 0, stage="mixed"), extend_context(tight, 0, stage="fresh")
    losses = [[record["loss"] for record in stages.metrics(folder)] for folder in (mixed, fresh)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


class Watched:
    """Settings that note which of their numbers are read."""

    def __init__(self, settings, read: set):
        self.__dict__.update(settings=settings, read=read)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.read.add(name)
        return getattr(self.settings, name)


def test_the_key_holds_every_number_that_the_optimiser_reads(small, monkeypatch):
    """Whatever `Trainer` takes from its settings while it trains decides the result, and so must decide the key."""
    from qwen_mini import long_context

    read, real = set(), long_context.extension_optimizer
    monkeypatch.setattr(long_context, "extension_optimizer", lambda *a: Watched(real(*a), read))
    corpus, _ = open_long_corpus(small, starting_point(small))
    trainer = long_context.make_extension(small, SHIPPED, corpus, 0, torch.float32)
    for number in range(2):
        trainer.step(trainer.sampler.batch(number))
    monkeypatch.undo()
    assert {"beta1", "beta2", "clip_norm", "weight_decay", "optimizer"} <= read
    assert read <= set(extension_stage(small).inputs["optimizer"])


OTHERS = dict(
    optimizer="adamw",
    beta1=0.5,
    beta2=0.6,
    eps=1e-5,
    weight_decay=0.3,
    clip_norm=0.05,
    grad_accumulation=2,
)


@pytest.mark.parametrize("name", OTHERS)
def test_another_number_of_the_optimiser_is_another_key(small, name):
    other = dataclasses.replace(small.pretraining, **{name: OTHERS[name]})
    assert (
        extension_stage(dataclasses.replace(small, pretraining=other)).key
        != extension_stage(small).key
    )


def test_what_does_not_change_the_training_does_not_change_the_key(small):
    measure = dataclasses.replace(small.measure, eval_every=7, eval_tokens=99, needle_tries=1)
    run = dataclasses.replace(small.run, dtype="bfloat16", threads=1)
    other = dataclasses.replace(small, measure=measure, run=run)
    assert extension_stage(other).key == extension_stage(small).key
    settings = dataclasses.replace(small.long_context, needle_rows=41)
    changed = [
        extension_stage(small, 1),
        extension_stage(small, settings=settings),
        extension_stage(
            dataclasses.replace(small, corpus=dataclasses.replace(small.corpus, task_documents=299))
        ),
    ]
    assert (
        extension_stage(small).key not in {stage.key for stage in changed}
        and len({s.key for s in changed}) == 3
    )


def test_set_base_changes_attention_and_config_alone():
    model = Qwen.from_pretrained(SHIPPED).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    set_base(model, 50_000, 777)
    assert model.config.rope_theta == 50_000 and model.config.max_position_embeddings == 777
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    q, k, v = (torch.randn(1, n, 9, 32) for n in (4, 2, 2))
    want = causal_attention(q, k, v, frequencies=rope_frequencies(32, 50_000))
    torch.testing.assert_close(model.attention(q, k, v), want)


def test_long_documents_are_long_and_beyond_what_the_corpus_reads(tokenizer):
    documents = long_documents(5_000, limit=3)
    assert len(documents) == 3 and all(len(text) == 5_000 for text in documents)
    rows = long_rows(tokenizer, 1_000, limit=2)
    assert rows.shape == (2, 1_001)
    longer = long_documents(1_000_000, limit=2)  # no file is so long: one follows the other
    assert [len(text) for text in longer] == [1_000_000] * 2 and longer[0][:1_000] != longer[1][
        :1_000
    ]
    with pytest.raises(
        course.CourseError, match="the standard library has no 50,000,000 unseen characters"
    ):
        long_documents(50_000_000)


@pytest.mark.parametrize("style", ["prose", "compact"])
def test_haystack_hides_every_key_once_and_asks_for_each(hay, tokenizer, style):
    pieces = needle_pieces(tokenizer)
    ids, planted = haystack(700, 4, hay, pieces, random.Random(3), style=style)
    assert len(ids) == 700 and planted[0][0] == pieces.passkey
    assert sorted(depth for _, _, depth in planted) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    text = " ".join(map(str, ids))
    for key, value, _ in planted:
        assert text.count(" ".join(map(str, needle_statement(pieces, key, value, style)))) == 1
    again, _ = haystack(700, 4, hay, pieces, random.Random(3), style=style)
    assert again == ids


def test_keys_asked_from_a_cache_are_those_of_whole_prompts(hay, tokenizer):
    """One read and many questions answer as one prompt a question does, and the cache stays as it was."""
    model = Qwen.from_pretrained(artifacts.shipped_dir("long_context")).eval().requires_grad_(False)
    pieces = needle_pieces(tokenizer)
    ids, planted = haystack(600, 5, hay, pieces, random.Random(1))
    cache = model.make_cache(1, 700)
    with torch.inference_mode():
        model.hidden_states(torch.tensor([ids]), cache=cache)
    found = ask_all(model, cache, planted, pieces, model.attention)
    assert cache.length == 600 and sum(found) >= 4
    for (key, value, _), right in zip(planted, found, strict=True):
        question = needle_question(pieces, key, "prose")
        whole = generate(model, [ids + question], 5, context=700)[0].tokens
        assert (whole == list(value)) == right
        assert ask(model, cache, question, 5, model.attention) == whole


def test_position_losses_are_the_model_s(tokenizer):
    model = Qwen.from_pretrained(SHIPPED).eval()
    rows = long_rows(tokenizer, 200, limit=2)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(
            model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        ).view(2, 200)
    torch.testing.assert_close(position_losses(model, rows), want, rtol=1e-4, atol=1e-4)


def test_where_the_chapters_begin():
    quick, laptop = course.load_scale("quick"), course.load_scale("laptop")
    assert starting_point(quick) == SHIPPED
    assert extended_checkpoint(quick) == artifacts.shipped_dir("long_context")
    assert starting_point(laptop, 3).name == "pretraining" and starting_point(laptop, 3).seed == 3
    assert (
        extended_checkpoint(laptop, 3).name == "long_context"
        and extended_checkpoint(laptop, 3).seed == 3
    )


def test_the_shipped_long_checkpoint_finds_a_key_at_four_times_the_old_context(hay, tokenizer):
    folder = artifacts.shipped_dir("long_context")
    model = Qwen.from_pretrained(folder, torch.bfloat16).eval().requires_grad_(False)
    assert model.config.max_position_embeddings == 1_024
    assert evaluate_task(model, RULER["passkey"], 1_024, 6, hay, needle_pieces(tokenizer)) >= 0.8


def test_recoding_keeps_control_tokens_and_text_that_spells_them_apart(tokenizer):
    new = Tokenizer.train(["hello world " * 50, "the quick brown fox " * 40], 300)
    chat = tokenizer.encode_chat([{"role": "user", "content": "what does <|im_end|> mean?"}])
    texts = ["ChatML ends a turn with <|im_end|> and a document with <|endoftext|>.", "second"]
    old = pack([*map(tokenizer.encode, texts), chat], tokenizer.endoftext_id)
    again = new.encode_chat([{"role": "user", "content": "what does <|im_end|> mean?"}])
    want = pack([*map(new.encode, texts), again], new.endoftext_id)
    assert np.array_equal(recode(old, tokenizer, new), want)
