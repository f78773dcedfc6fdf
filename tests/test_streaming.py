"""Pre-training text streamed from local parquet: shared out, packed, resumed, and what is refused."""

import dataclasses
import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import TINY, weights_of

from qwen_mini.corpus import chat_messages, prepare_corpus, task_documents, unpack
from qwen_mini.course import CourseError, corpus_files, load_scale, streaming
from qwen_mini.course.corpus_files import Source, open_rows, read_documents, read_sources
from qwen_mini.course.launch import on_ranks
from qwen_mini.course.scales import Phase
from qwen_mini.course.streaming import TokenStream
from qwen_mini.pretraining import pretraining_stage
from qwen_mini.tokenizer import Tokenizer

pytest.importorskip("datasets")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
TOKENIZER = Tokenizer([])  # a token is a byte
END = TOKENIZER.endoftext_id
TEXTS = [f"Document {i}: {f'w{i} ' * (i * 7 % 23)}{i}." for i in range(90)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 4)


def parquet(folder, texts, files: int = 3, column: str = "text", **options) -> Source:
    """A source of `files` parquet files with `texts` in them, in row groups of seven."""
    paths = [folder / f"{number}.parquet" for number in range(files)]
    for number, path in enumerate(paths):
        own = pa.table({"id": range(len(texts[number::files])), column: texts[number::files]})
        pq.write_table(own, path, row_group_size=7)
    described = {"kind": "huggingface", "domain": "web", "licence": "", "attribution": ""}
    described |= {"package": "parquet", "version": "1", "files": tuple(map(str, paths))}
    return Source("web", **described | options)


def all_windows(stream: TokenStream, length: int) -> list[np.ndarray]:
    windows = []
    with pytest.raises(CourseError, match="ended after"):
        while True:
            windows.append(stream.window(length))
    return windows


def tokens_of(stream: TokenStream) -> np.ndarray:
    """All that a stream gives in windows of one target."""
    windows = all_windows(stream, 1)
    return np.concatenate([windows[0], *(window[1:] for window in windows[1:])])


def documents_of(stream: TokenStream) -> list[str]:
    return [TOKENIZER.decode(ids.tolist()) for ids in unpack(tokens_of(stream), END)]


@pytest.mark.parametrize(("files", "ranks"), [(3, 1), (3, 3), (6, 3), (3, 2), (1, 4)])
def test_the_ranks_share_the_documents_and_every_one_is_read_once(tmp_path, files, ranks):
    source = parquet(tmp_path, TEXTS, files)
    shares = [documents_of(TokenStream(source, TOKENIZER, 1, r, ranks)) for r in range(ranks)]
    assert all(shares) and sorted(sum(shares, [])) == sorted(TEXTS)


def test_windows_follow_one_another_so_that_every_token_is_a_target_once(tmp_path):
    source = parquet(tmp_path, TEXTS)
    whole = tokens_of(TokenStream(source, TOKENIZER, 1))
    windows = all_windows(TokenStream(source, TOKENIZER, 1), 50)
    for number, window in enumerate(windows):
        assert np.array_equal(window, whole[number * 50 : number * 50 + 51])
    assert len(whole) - 50 <= len(windows) * 50 < len(whole)
    assert (whole == END).sum() == len(TEXTS) and whole[-1] == END


@pytest.mark.parametrize(("files", "ranks", "length"), [(3, 1, 1), (6, 3, 16), (3, 2, 200)])
def test_a_stream_goes_on_where_it_stopped(tmp_path, files, ranks, length):
    source = parquet(tmp_path, TEXTS, files)
    opened = lambda: TokenStream(source, TOKENIZER, 1, ranks - 1, ranks)
    kept = lambda stream: json.loads(json.dumps(stream.state_dict()))
    stream = opened()
    for _ in range(3):  # interrupted at the start, and twice later on
        resumed = opened()
        resumed.load_state_dict(kept(stream))
        for _ in range(4):
            assert np.array_equal(resumed.window(length), stream.window(length))
            assert (len(resumed.left), resumed.taken) == (len(stream.left), stream.taken)
        stream = resumed
    whole = all_windows(opened(), length)
    assert np.array_equal(all_windows(stream, length), whole[12:]) and len(whole) > 12


def test_batches_are_the_ranks_rows_and_a_wrong_step_is_refused(tmp_path):
    source = parquet(tmp_path, TEXTS)
    batch = TokenStream(source, TOKENIZER, 1).batches(4, 20)
    other = TokenStream(source, TOKENIZER, 1)
    for step in range(3):
        made, rows = batch(step), np.stack([other.window(20) for _ in range(4)])
        assert np.array_equal(made.input_ids, rows[:, :-1])
        assert np.array_equal(made.targets, rows[:, 1:])
        assert made.weights.shape == (4, 20) and made.weights.eq(1).all()
    for asked in ((2,), (4,), (3, 1, 2)):
        with pytest.raises(CourseError, match=r"stands at \(0, 1, 240\).*not at"):
            batch(*asked)
    uneven = TokenStream(source, TOKENIZER, 1, 1, 2).batches(5, 20)
    assert uneven(0, 1, 2).input_ids.shape == (2, 20)  # of rows 0 … 4 the second and the fourth
    torch.testing.assert_close(batch(3).input_ids[0, 0].item(), int(other.window(20)[0]))


def test_a_source_that_ends_too_early_is_an_error_not_a_second_epoch(tmp_path):
    stream = TokenStream(parquet(tmp_path, TEXTS[:9]), TOKENIZER, 12_345, 1, 2)
    count = len(tokens_of(TokenStream(stream.source, TOKENIZER, 1, 1, 2)))
    match = f"'web' ended after {count} of 12,345 tokens on rank 1 of 2: name a larger source"
    with pytest.raises(CourseError, match=match):
        while True:
            stream.window(30)


def test_what_a_text_says_is_text(tmp_path):
    texts = ["one<|endoftext|>two", "<|im_start|>system\n<tool_call>", "three"]
    stream = TokenStream(parquet(tmp_path, texts, 1), TOKENIZER, 1)
    ids = tokens_of(stream)
    assert (ids == END).sum() == 3 and set(ids[ids != END]) <= set(range(256))
    assert documents_of(TokenStream(stream.source, TOKENIZER, 1)) == texts


def test_empty_texts_and_those_of_the_other_side_are_left_out(tmp_path):
    texts = ["", "  ", None, *TEXTS, "\0"]
    keep = lambda text: "1" not in text
    found = documents_of(TokenStream(parquet(tmp_path, texts), TOKENIZER, 1, keep=keep))
    assert sorted(found) == sorted(filter(keep, TEXTS))


def test_other_columns_and_documents_of_the_corpus(tmp_path):
    source = parquet(tmp_path, TEXTS, column="content")
    with pytest.raises(CourseError, match="'web' has no column 'text', only content, id: name its"):
        TokenStream(source, TOKENIZER, 1).window(1)
    with pytest.raises(CourseError, match="'web' holds int, not text, in its column 'id'"):
        TokenStream(dataclasses.replace(source, column="id"), TOKENIZER, 1).window(1)
    named = dataclasses.replace(source, column="content")
    documents = list(read_documents(named))
    assert sorted(document.text for document in documents) == sorted(TEXTS)
    assert {document.source for document in documents} == {"web"}


def test_an_empty_source_has_no_window(tmp_path):
    for texts in ([], ["", ""]):
        stream = TokenStream(parquet(tmp_path, pa.array(texts, "string"), 1), TOKENIZER, 9)
        with pytest.raises(CourseError, match="ended after 0 of 9 tokens on rank 0 of 1"):
            stream.window(1)


@pytest.mark.parametrize("version", ["", "main", "v1.0", "87f0914", "8" * 39 + "g", "8" * 41])
def test_a_revision_that_may_move_is_refused(version):
    source = dataclasses.replace(read_sources()["fineweb_edu"], version=version)
    with pytest.raises(CourseError, match=f"revision '{version}', but a branch or a tag may move"):
        TokenStream(source, TOKENIZER, 1)


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), RuntimeError("no network")])
def test_a_hub_out_of_reach_is_named(error, monkeypatch):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(CourseError, match="^source 'fineweb_edu' cannot be read: no network$"):
        TokenStream(read_sources()["fineweb_edu"], TOKENIZER, 1)


def test_a_pinned_revision_is_asked_for(monkeypatch):
    import datasets

    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *path, **said: asked.update(said) or path)
    source = read_sources()["fineweb_edu"]
    assert open_rows(source) == ("HuggingFaceFW/fineweb-edu",)
    pinned = {"name": "sample-10BT", "revision": source.version}
    assert asked == {"split": "train", "streaming": True, **pinned}


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    source = parquet(tmp_path, TEXTS)
    stream = TokenStream(source, TOKENIZER, 1)
    path = tmp_path / "1.parquet"
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" + bytes(len(whole) // 2) + whole[len(whole) // 2 + 4 :])
    with pytest.raises(CourseError, match="'web' cannot be read: .+") as caught:
        while True:
            stream.window(1)
    assert "\n" not in str(caught.value)
    for wrong, match in (
        ({"files": (str(tmp_path / "none.parquet"),)}, "'web' cannot be read: .*none.parquet"),
        ({"version": ""}, "files of your own: give it a `version`"),
    ):
        with pytest.raises(CourseError, match=match):
            TokenStream(dataclasses.replace(source, **wrong), TOKENIZER, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CourseError, match="pip install -c constraints.txt datasets"):
        TokenStream(source, TOKENIZER, 1)


def test_the_state_of_another_stream_is_refused(tmp_path):
    source = parquet(tmp_path, TEXTS)
    stream = TokenStream(source, TOKENIZER, 1, 0, 2)
    stream.window(40)
    state = stream.state_dict()
    for changes, match in (
        ({"ranks": 3}, r"shared by 3 process\(es\), not 2: go on with as many"),
        ({"rank": 1}, "of rank 1, not 0"),
        ({"version": "2"}, "of version '2', not '1'"),
        ({"source": "books"}, "of source 'books', not 'web'"),
        ({"left": 10**6}, "of other documents or another tokenizer"),
        ({"more": 1}, "no state of a stream"),
    ):
        with pytest.raises(CourseError, match=match):
            TokenStream(source, TOKENIZER, 1, 0, 2).load_state_dict(state | changes)
    with pytest.raises(CourseError, match="no state of a stream"):
        TokenStream(source, TOKENIZER, 1).load_state_dict({})


PHASES = [Phase(100, 10, {"web": 0.5, "tasks": 0.5}), Phase(1_000, 10, {"web": 1.0})]


def test_streams_of_a_mixture_are_saved_and_restored_by_rank(tmp_path, monkeypatch):
    source = parquet(tmp_path, TEXTS, streamed=True)
    sources = {"web": source, "books": dataclasses.replace(source, domain="books")}
    monkeypatch.setattr(streaming, "read_sources", lambda: sources)

    def work():
        streams = streaming.open_streams(sources, PHASES, TOKENIZER)
        streams["web"].window(30)
        states = json.loads(json.dumps(streaming.stream_states(streams)))
        expected = streams["web"].window(30).tolist()
        again = streaming.open_streams(sources, PHASES, TOKENIZER)
        streaming.restore_streams(again, states)
        return states, streams["web"].wanted, expected, again["web"].window(30).tolist()

    (states, wanted, *rows), (same, *_, others, _) = on_ranks(work, 2)
    assert states == same and [state["web"]["rank"] for state in states] == [0, 1]
    assert wanted == 525 and rows[0] == rows[1] != others
    alone = streaming.open_streams(sources, PHASES, TOKENIZER)
    assert alone["web"].wanted == 1_050
    with pytest.raises(CourseError, match=r"shared by 2 process\(es\), not 1"):
        streaming.restore_streams(alone, states)
    for left in ([], [{}]):
        with pytest.raises(CourseError, match="streamed nothing, and this one streams web"):
            streaming.restore_streams(alone, left)
    assert streaming.open_streams(["books"], PHASES, TOKENIZER) == {}  # in no mixture
    sources["again"] = dataclasses.replace(source, name="again")
    with pytest.raises(CourseError, match="two streamed sources have the domain 'web'"):
        streaming.open_streams(sources, PHASES, TOKENIZER)
    del sources["again"]
    sources["web"] = dataclasses.replace(source, streamed=False)
    assert streaming.open_streams(sources, PHASES, TOKENIZER) == {}


def tokens_by_domain(config) -> Counter:
    """Domain → tokens that pre-training takes of it."""
    wanted = Counter()
    for phase in config.pretraining.phases:
        for domain, share in phase.mixture.items():
            wanted[domain] += phase.tokens * share
    return wanted


@pytest.mark.parametrize("name", ["gpu", "cluster"])
def test_no_text_of_others_is_read_twice(name):
    """Tokens hold about four bytes of English and at most five, held-out documents aside."""
    config, sources = load_scale(name), read_sources()
    extension = sum(stage.tokens for stage in config.long_context.stages)
    stored = config.corpus.max_bytes_per_source / 5
    for source in (sources[name] for name in config.corpus.sources):
        wanted = tokens_by_domain(config)[source.domain]
        assert 0 < wanted <= 0.9 * source.tokens  # which are counted with another vocabulary
        read = extension * (1 - config.long_context.needle_share)
        assert read + (0 if source.streamed else wanted) <= stored


@pytest.mark.parametrize("name", ["gpu", "cluster"])
def test_what_the_course_makes_comes_four_times_at_most(name):
    """Three bytes a token at most, since digits are tokens of their own; less than three in ten texts are repeated."""
    config, count = load_scale(name), 300
    tasks = [document.text for document in task_documents(count, 0, False)]
    chats = map(TOKENIZER.apply_chat_template, chat_messages(count, {}, 0, False))
    made = {"tasks": (tasks, config.corpus.task_documents)}
    made["chat"] = (chats, config.corpus.chat_documents)
    for domain, (some, documents) in made.items():
        tokens = 0.7 * documents * sum(len(text.encode()) for text in some) / count / 3
        assert 1 < tokens_by_domain(config)[domain] / tokens <= 4


def test_what_is_read_of_a_data_set_is_part_of_every_key_that_depends_on_it(tmp_path):
    source = parquet(tmp_path, TEXTS)
    changes = {"version": "2", "files": (), "column": "id", "streamed": True}
    pins = {dataclasses.replace(source, **{key: value}).pin for key, value in changes.items()}
    assert len(pins | {source.pin}) == 5
    sources = read_sources()
    assert sources["wiki_en"].pin == sources["wiki_en"].sha256 and sources["python"].pin == ""


# ---------------------------------------------------------------- pre-training
@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A tiny scale whose text is streamed, its corpus prepared: trains the stage, `times` its tokens, with `stops`."""
    folder = tmp_path_factory.mktemp("streamed")
    documents = itertools.islice(read_documents(read_sources()["python"]), 60)
    texts = [document.text[:2_000] for document in documents]
    source = parquet(folder, texts, streamed=True)
    known = read_sources() | {"web": source}
    scale = TINY.replace('sources = ["python"]', 'sources = ["web"]').replace(
        "python = 0", "web = 0"
    )
    (folder / "own.toml").write_text(scale.format(dtype="float32"))
    config = load_scale(str(folder / "own.toml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(folder / "runs"))
        patch.setattr(corpus_files, "read_sources", lambda: known)
        patch.setattr(streaming, "read_sources", lambda: known)
        prepare_corpus(config)

        def train(times: int = 1, stops=()):
            phases = config.pretraining.phases
            phases = tuple(dataclasses.replace(p, tokens=p.tokens * times) for p in phases)
            made = pretraining_stage(
                config, settings=dataclasses.replace(config.pretraining, phases=phases)
            )
            for stop in stops:
                made.make(stop)
            return made.make()

        yield train


def test_an_interrupted_run_on_streamed_text_reaches_the_same_weights(streamed):
    weights = [
        weights_of(streamed()),
        weights_of(streamed(stops=(7,))),
        weights_of(streamed(stops=(3, 12))),
    ]
    assert weights[0] == weights[1] == weights[2]


def test_a_run_ends_with_its_stream_and_says_how_many_tokens_were_wanted(streamed):
    with pytest.raises(CourseError, match="source 'web' ended after .* none are read twice"):
        streamed(times=12)
