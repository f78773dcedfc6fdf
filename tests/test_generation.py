"""Generation: cached decoding, the sampler, batches, stops, streams; transformers is the oracle if it is installed."""

import math

import pytest
import torch

from qwen_mini import generation
from qwen_mini.generation import (
    Sampling,
    candidates,
    fused_decoder,
    generate,
    inference_copy,
    left_pad,
    penalize_repetition,
    rollout,
    sample,
    sample_group,
    sample_groups,
    stream,
)
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.tokenizer import Tokenizer

CONFIGS = [
    ModelConfig(300, 32, 48, 2, 4, 2, 8, 128, 1_000.0, 1e-6, True, 0.3),
    ModelConfig(211, 24, 40, 3, 3, 1, 16, 96, 10_000.0, 1e-5, False, 0.3),
    ModelConfig(128, 40, 64, 1, 5, 5, 8, 64, 500.0, 1e-6, True, 0.3),
]
PROMPTS = [[5, 9, 17], [3], [8, 8, 1, 20, 41, 7], [100, 2]]


def make(config=CONFIGS[0], seed=0):
    """A random model whose weights are large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = Qwen(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def tokenizer():
    text = "the señor said 你好 to the world, and the world said hello to the señor " * 20
    return Tokenizer.train([text], vocab_size=300)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(completions):
    return [completion.tokens for completion in completions]


@torch.inference_mode()
def greedy_without_cache(model, ids, count):
    ids = torch.tensor([ids])
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -count:].tolist()


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_padded_batch_is_greedy_decoding_of_each_prompt_without_cache(number):
    model = make(CONFIGS[number], seed=number)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    completions = generate(model, PROMPTS, 12)
    assert tokens(completions) == expected
    assert not any(completion.finished for completion in completions)


def test_a_tensor_of_prompts_is_a_list_of_prompts(model):
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate(model, prompts, 5) == generate(model, prompts.tolist(), 5)
    assert generate(model, [], 5) == []


def test_left_padding_hides_itself_and_repeats_the_first_token():
    ids, document_ids = left_pad([[5, 6], [7, 8, 9]])
    assert ids.tolist() == [[5, 5, 6], [7, 8, 9]]
    assert document_ids.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert left_pad([[1, 2], [3, 4]])[1] is None


def test_stop_ids_end_rows_and_stay_in_the_tokens(model):
    plain = generate(model, PROMPTS, 20, temperature=1.0, generator=seeded())
    stops = sorted(
        {completion.tokens[n] for completion, n in zip(plain, (3, 0, 11, 19), strict=True)}
    )
    stopped = generate(model, PROMPTS, 20, temperature=1.0, generator=seeded(), stop_ids=stops)
    for free, completion in zip(plain, stopped, strict=True):
        end = next((i + 1 for i, token in enumerate(free.tokens) if token in stops), 20)
        assert completion.tokens == free.tokens[:end]
        assert completion.finished == (free.tokens[end - 1] in stops)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 2.0])
def test_dropping_finished_rows_changes_no_other_row(model, monkeypatch, share):
    options = {
        "temperature": 1.0,
        "stop_ids": range(0, 300, 7),
        "repetition_penalty": 1.2,
        "return_logprobs": True,
    }
    prompts = PROMPTS * 6
    expected = generate(model, prompts, 25, generator=seeded(3), **options)
    monkeypatch.setattr(generation, "DROP_SHARE", share)
    found = generate(model, prompts, 25, generator=seeded(3), **options)
    assert tokens(found) == tokens(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)


def test_the_batch_shrinks_when_rows_finish(model):
    sizes = [
        len(rows)
        for rows, _, _ in rollout(model, PROMPTS * 8, 25, Sampling(1.0), range(0, 300, 5), seeded())
    ]
    assert sizes[0] == 32 and sizes == sorted(sizes, reverse=True) and sizes[-1] <= 8


def test_same_seed_same_samples_and_later_prompts_change_nothing(model):
    first = generate(model, PROMPTS, 15, temperature=1.0, generator=seeded(1))
    assert first == generate(model, PROMPTS, 15, temperature=1.0, generator=seeded(1))
    assert first != generate(model, PROMPTS, 15, temperature=1.0, generator=seeded(2))
    more = generate(model, PROMPTS + [[1, 2, 3]], 15, temperature=1.0, generator=seeded(1))
    assert tokens(more[:4]) == tokens(first)
    torch.manual_seed(5)
    unnamed = generate(model, PROMPTS, 15, temperature=1.0)
    torch.manual_seed(5)
    assert unnamed == generate(model, PROMPTS, 15, temperature=1.0)


def test_a_group_is_the_prompt_repeated(model):
    group = sample_group(model, PROMPTS[2], 5, 10, generator=seeded(4))
    assert tokens(group) == tokens(
        generate(model, [PROMPTS[2]] * 5, 10, temperature=1.0, generator=seeded(4))
    )
    assert len({tuple(completion.tokens) for completion in group}) > 1


def test_groups_of_several_prompts_of_different_length(model):
    groups = sample_groups(model, PROMPTS, 3, 10, generator=seeded(4), temperature=0.8)
    assert [len(group) for group in groups] == [3] * 4
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    flat = generate(model, repeated, 10, temperature=0.8, generator=seeded(4))
    assert [completion for group in groups for completion in group] == flat


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 0.6, "top_k": 5, "repetition_penalty": 1.3}],
)
def test_logprobs_are_those_of_the_model_at_the_temperature(model, options):
    found = generate(
        model, PROMPTS, 12, return_logprobs=True, generator=seeded(), stop_ids=[11], **options
    )
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt + completion.tokens])
        with torch.inference_mode():
            logprobs = (model(ids) / (options.get("temperature") or 1.0)).log_softmax(-1)
        expected = logprobs[0, len(prompt) - 1 : -1].gather(
            1, torch.tensor(completion.tokens)[:, None]
        )[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4
        )
    assert generate(model, PROMPTS, 2)[0].logprobs is None


def test_sampling_leaves_no_trace_on_the_model(model):
    model.train()
    generate(model, PROMPTS, 3, temperature=1.0)
    next(iter(rollout(model, PROMPTS, 3, Sampling())))
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.tensor([PROMPTS[0]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    model.eval()


def test_an_inference_copy_shares_nothing(model):
    model(torch.tensor([[1, 2]])).sum().backward()
    twin = inference_copy(model, torch.float32)
    assert tokens(generate(twin, PROMPTS, 8)) == tokens(generate(model, PROMPTS, 8))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not any(p.requires_grad or p.grad is not None for p in twin.parameters())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=True)
    half = inference_copy(model, torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert len(generate(half, PROMPTS, 8, temperature=1.0, generator=seeded())[0].tokens) == 8


# --- the fused step -------------------------------------------------------------------------------------------------


def test_generation_with_and_without_the_fused_step_agrees(model, monkeypatch):
    expected = generate(
        model, PROMPTS, 20, temperature=1.0, generator=seeded(), stop_ids=range(0, 300, 9)
    )
    monkeypatch.setattr(generation, "fused_decoder", lambda *_: None)
    found = generate(
        model, PROMPTS, 20, temperature=1.0, generator=seeded(), stop_ids=range(0, 300, 9)
    )
    assert found == expected


def test_the_fused_step_is_left_alone_by_other_architectures(model):
    assert fused_decoder(model, 9) is not None
    other = make()
    plain = other.attention
    other.attention = lambda *arguments: plain(*arguments)
    assert fused_decoder(other, 9) is None
    assert tokens(generate(other, PROMPTS, 8)) == tokens(generate(make(), PROMPTS, 8))
    other = make()
    other.model.layers[1].mlp = torch.nn.Sequential(other.model.layers[1].mlp)
    assert fused_decoder(other, 9) is None
    assert tokens(generate(other, PROMPTS, 8)) == tokens(generate(make(), PROMPTS, 8))


def test_the_fused_step_is_left_alone_by_large_models(model, monkeypatch):
    monkeypatch.setattr(generation, "LARGEST_FUSED", 1_000)
    assert fused_decoder(model, 9) is None


# --- the sampler ----------------------------------------------------------------------------------------------------


def chi_square_limit(freedom, z=3.09):
    """99.9 % point of the chi-square distribution, by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "forbidden_ids": (1, 4)},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 1.0, "top_p": 0.7},
        {
            "temperature": 0.8,
            "top_k": 12,
            "top_p": 0.9,
            "repetition_penalty": 1.4,
            "vocab_size": 30,
        },
    ],
)
def test_draws_follow_the_distribution(settings):
    logits = torch.randn(1, 40, generator=seeded(7)) * 1.5
    history, settings, count = torch.tensor([[2, 3, 3, 30]]), Sampling(**settings), 200_000
    if settings.vocab_size:
        history = history[:, :3]
    expected = settings.probabilities(logits, history)[0] * count
    uniform = torch.rand(count, 1, generator=seeded(8))
    drawn = settings.choose(logits.expand(count, -1), history.expand(count, -1), uniform)
    observed = torch.bincount(drawn.flatten(), minlength=40)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum().item()
    assert statistic < chi_square_limit(int(likely.sum()) - 1)


def test_the_ends_of_the_unit_interval_never_draw_the_impossible():
    logits = torch.full((2, 1_000), -math.inf)
    logits[:, [3, 500]] = torch.randn(2, 2, generator=seeded())
    assert sample(logits, torch.tensor([[0.0], [0.0]])).tolist() == [[3], [3]]
    assert sample(logits, torch.full((2, 1), 1 - 2**-24)).tolist() == [[500], [500]]
    assert sample(torch.zeros(1, 1), torch.tensor([[0.5]])).tolist() == [[0]]


def test_temperature_zero_is_the_limit_of_low_temperatures(model):
    greedy = generate(model, PROMPTS, 10)
    assert tokens(generate(model, PROMPTS, 10, temperature=1e-4, generator=seeded())) == tokens(
        greedy
    )
    assert tokens(
        generate(model, PROMPTS, 10, temperature=2.0, top_k=1, generator=seeded())
    ) == tokens(greedy)
    assert tokens(
        generate(model, PROMPTS, 10, temperature=2.0, top_p=1e-6, generator=seeded())
    ) == tokens(greedy)


def test_top_p_beyond_its_first_guess_is_the_same_as_sorting_everything():
    flat = torch.randn(3, 1_000, generator=seeded()) * 0.1
    values, ids = candidates(flat, top_p=0.9)
    probs, order = torch.softmax(flat, -1).sort(descending=True)
    kept = (probs.cumsum(-1) - probs < 0.9).sum(-1)
    assert (values > -math.inf).sum(-1).tolist() == kept.tolist() and kept.min() > 128
    assert ids[0, : kept[0]].tolist() == order[0, : kept[0]].tolist()
    peaked = flat * 50
    assert candidates(peaked, top_p=0.5)[0].shape[1] == 128


def test_penalty_makes_repeats_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    found = penalize_repetition(logits, torch.tensor([[0, 1, 1, 3]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0, 0.0]] and logits.tolist() == [[2.0, -2.0, 1.0, 0.0]]


def test_the_penalty_counts_prompt_and_answer_but_no_padding(model):
    options = {"repetition_penalty": 1.7, "temperature": 0.0}
    alone = [generate(model, [prompt], 15, **options)[0] for prompt in PROMPTS]
    assert tokens(generate(model, PROMPTS, 15, **options)) == tokens(alone)
    assert tokens(alone) != tokens(generate(model, PROMPTS, 15))


def test_forbidden_and_padded_ids_never_come_out(model):
    options = {
        "temperature": 3.0,
        "generator": seeded(),
        "vocab_size": 100,
        "forbidden_ids": range(0, 90),
    }
    found = {
        token
        for completion in generate(model, PROMPTS * 4, 30, **options)
        for token in completion.tokens
    }
    assert found == set(range(90, 100))
    assert generate(model, [[1]], 3, vocab_size=1)[0].tokens == [0, 0, 0]


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_pieces_join_to_the_decoded_tokens(model, tokenizer, seed):
    options = {"temperature": 1.5, "generator": seeded(seed)}
    pieces = list(stream(model, tokenizer, "the 世", 40, **options))
    stops = (tokenizer.im_end_id, tokenizer.endoftext_id)
    prompt = tokenizer.encode("the 世")
    options |= {"generator": seeded(seed), "vocab_size": tokenizer.vocab_size, "stop_ids": stops}
    [completion] = generate(model, [prompt], 40, **options)
    assert "".join(pieces) == tokenizer.decode(completion.tokens, skip_special_tokens=True)
    assert all(pieces)
    assert (
        list(stream(model, tokenizer, prompt, 40, temperature=1.5, generator=seeded(seed)))
        == pieces
    )


def scripted(monkeypatch, ids):
    """Let every step choose the next of `ids`."""
    script = iter(ids)
    monkeypatch.setattr(
        Sampling, "choose", lambda self, logits, history, uniform: torch.tensor([[next(script)]])
    )


def test_a_character_is_not_shown_before_its_last_byte(model, tokenizer, monkeypatch):
    ids = [tokenizer.encode(letter)[0] for letter in "ab"]
    bytes_of = {tokenizer.token_bytes(i): i for i in range(256)}
    euro = [bytes_of[bytes([byte])] for byte in "€".encode()]
    scripted(monkeypatch, [ids[0], *euro, ids[1], *euro[:2], tokenizer.im_end_id])
    assert list(stream(model, tokenizer, "x", 20)) == ["a", "€", "b", "\ufffd"]


def test_special_tokens_are_not_shown_and_stops_end_the_stream(model, tokenizer, monkeypatch):
    a = tokenizer.encode("a")[0]
    scripted(monkeypatch, [a, tokenizer.im_start_id, a, tokenizer.endoftext_id, a])
    assert "".join(stream(model, tokenizer, "x", 20)) == "aa"
    scripted(monkeypatch, [a, tokenizer.endoftext_id, a, a, a])
    assert "".join(stream(model, tokenizer, "x", 5, stop_ids=[])) == "aaaa"


def test_a_stream_can_be_left_early(model, tokenizer):
    pieces = stream(model, tokenizer, "the", 30, temperature=1.0)
    next(pieces)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    pieces.close()


# --- wrong requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        (
            {"prompts": [[1, 300]]},
            "prompt 0 holds the id 300, but the model knows the ids 0 to 299",
        ),
        ({"prompts": [[-1]]}, "holds the id -1"),
        ({"prompts": [1, 2]}, r"wrap one prompt as \[ids\]"),
        ({"prompts": ["hello"]}, "must be a list of token lists"),
        (
            {"prompts": [[1] * 128]},
            "128 tokens and 1 new ones would follow, but the model's context holds 128",
        ),
        ({"prompts": [[1] * 9], "max_new_tokens": 120}, "context holds 128"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": 1e-39}, "temperature must be 0 .greedy. or at least 1e-15"),
        (
            {"repetition_penalty": 1e-39},
            "repetition_penalty must be positive .1 is off., from 1e-15",
        ),
        (
            {"repetition_penalty": 1e39},
            "repetition_penalty must be positive .1 is off., from 1e-15 to 1e15",
        ),
        ({"forbidden_ids": range(300)}, "forbidden_ids must leave at least one id"),
        (
            {"forbidden_ids": range(300), "temperature": 1.0},
            "forbidden_ids must leave at least one id",
        ),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"stop_ids": [300]}, "stop id 300 can never come out"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
    ],
)
def test_a_wrong_request_is_one_sentence(model, change, message):
    request = {"prompts": PROMPTS, "max_new_tokens": 1} | change
    with pytest.raises(ValueError, match=message) as error:
        generate(model, request.pop("prompts"), request.pop("max_new_tokens"), **request)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-15},
        {"temperature": 1e-15, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.0, "repetition_penalty": 1e-15},
        {"temperature": 1.0, "repetition_penalty": 1e15},
        {"temperature": 1e-15, "repetition_penalty": 1e-15},
        {"temperature": 1e-15, "repetition_penalty": 1e15},
        {"forbidden_ids": range(299)},
    ],
)
def test_what_a_refusal_offers_instead_works(model, options):
    assert len(
        generate(model, PROMPTS, 6, return_logprobs=True, generator=seeded(), **options)
    ) == len(PROMPTS)
    coldest = generate(model, PROMPTS, 6, temperature=1e-15, generator=seeded())
    assert tokens(coldest) == tokens(generate(model, PROMPTS, 6))


def test_a_longer_context_can_be_asked_for(model):
    assert len(generate(model, [[1] * 100], 60, context=160)[0].tokens) == 60


def test_an_unknown_option_is_named(model):
    with pytest.raises(TypeError, match="temprature"):
        generate(model, PROMPTS, 1, temprature=1.0)


def test_a_wrong_stream_fails_at_once(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        stream(model, tokenizer, "", 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_reported(temperature, value):
    model = make()
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, 3, temperature=temperature)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    module.utils.logging.set_verbosity_error()
    return module


def in_transformers(transformers, model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_greedy_batches_equal_transformers(transformers, tmp_path, number):
    model = make(CONFIGS[number], seed=10 + number)
    theirs = in_transformers(transformers, model, tmp_path)
    ids, document_ids = left_pad(PROMPTS)
    greedy = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=1 - document_ids, **greedy)
    assert tokens(generate(model, PROMPTS, 16)) == expected[:, ids.shape[1] :].tolist()


def test_several_stop_ids_equal_transformers(transformers, tmp_path):
    model = make(seed=20)
    theirs = in_transformers(transformers, model, tmp_path)
    free = tokens(generate(model, PROMPTS, 16))
    stops = [free[0][4], free[2][9]]
    ids, document_ids = left_pad(PROMPTS)
    greedy = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": stops, "pad_token_id": 299}
    expected = theirs.generate(ids, attention_mask=1 - document_ids, **greedy)[:, ids.shape[1] :]
    for completion, row in zip(
        generate(model, PROMPTS, 16, stop_ids=stops), expected.tolist(), strict=True
    ):
        assert row[: len(completion.tokens)] == completion.tokens
        assert set(row[len(completion.tokens) :]) <= {299}


def test_penalized_greedy_equals_transformers(transformers, tmp_path):
    model = make(seed=21)
    theirs = in_transformers(transformers, model, tmp_path)
    greedy = {
        "do_sample": False,
        "max_new_tokens": 20,
        "eos_token_id": None,
        "repetition_penalty": 1.3,
    }
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **greedy
        )
        [found] = generate(model, [prompt], 20, repetition_penalty=1.3)
        assert found.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.05, 3.0])
def test_distributions_equal_the_logits_processors(
    transformers, temperature, top_k, top_p, penalty
):
    from transformers.generation import logits_process as hf

    logits = torch.randn(6, 400, generator=seeded(3), dtype=torch.float64) * 3
    history = torch.randint(0, 400, (6, 30), generator=seeded(4))
    processors = hf.LogitsProcessorList(
        [hf.RepetitionPenaltyLogitsProcessor(penalty)] * (penalty != 1)
    )
    processors.append(hf.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(hf.TopPLogitsWarper(top_p))
    expected = torch.softmax(processors(history, logits.clone()), -1)
    found = Sampling(temperature, top_k, top_p, penalty).probabilities(logits, history)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_stop_ids_in_every_form():
    """As a generation_config.json has them: a number or a list; and a tensor."""
    model = make()
    free = generate(model, [[5, 6]], 8)[0].tokens
    want = generate(model, [[5, 6]], 8, stop_ids=[free[2]])[0]
    assert want.finished and len(want.tokens) <= 3
    for stops in (free[2], torch.tensor(free[2]), torch.tensor([free[2]]), (free[2],)):
        assert generate(model, [[5, 6]], 8, stop_ids=stops)[0] == want


def test_top_p_at_exact_sums_and_off():
    transformers = pytest.importorskip("transformers")
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 4_096, generator=rng) * 3
    values, _ = generation.candidates(logits, 0, 1.0)
    assert values.isfinite().all(), "top_p = 1 is off"
    exact = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log()
    for rows, top_p in ((exact, 0.8), (exact, 0.5), (exact, 0.9), (logits, 0.9), (logits, 0.999)):
        kept = generation.candidates(rows, 0, top_p)[0].isfinite().sum(-1)
        theirs = transformers.TopPLogitsWarper(top_p)(None, rows.clone()).isfinite().sum(-1)
        assert (kept - theirs).abs().max() <= 1 and (
            rows is not exact or torch.equal(kept, theirs)
        ), (kept, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"forbidden_ids": [95]},
        {"forbidden_ids": [95, 3], "temperature": 1.0},
    ],
)
def test_ids_among_the_padded_rows(options):
    """Allowed in a prompt, and never sampled."""
    model = Qwen(ModelConfig(128, 32, 64, 1, 2, 1, 16, 64)).eval()
    tokens = generate(model, [[100, 5]], 4, vocab_size=90, **options)[0].tokens
    assert max(tokens) < 90 and not set(tokens) & set(options.get("forbidden_ids", []))


def test_a_negative_forbidden_id_is_named():
    with pytest.raises(ValueError, match="forbidden_ids must be ids from 0 on"):
        generate(make(), [[5]], 2, forbidden_ids=[-1])
