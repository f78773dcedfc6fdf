"""Chapter 06: routing and its three ways to compute, parity with transformers, balance, upcycling, and bad input."""

import copy
import dataclasses
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_mini.course import home, small_text, stages, tuning
from qwen_mini.course.nb import Notebook
from qwen_mini.course.small_text import epochs
from qwen_mini.course.statistics import best_seconds, mean_interval
from qwen_mini.generation import generate
from qwen_mini.layers import SwiGLU
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.moe import (
    QWEN_MOE,
    Experts,
    MoeConfig,
    QwenMoe,
    Router,
    SparseMoeBlock,
    count_moe_parameters,
    expert_load,
    grouped_experts,
    load_balancing_loss,
    max_violation,
    padded_experts,
    record_routing,
    upcycle,
)
from qwen_mini.tokenizer import Tokenizer

DENSE = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1e4, initializer_range=0.15,
)  # fmt: skip
SMALL = MoeConfig(
    **dataclasses.asdict(DENSE), num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12,
    shared_expert_intermediate_size=20,
)  # fmt: skip


def other(**changes) -> MoeConfig:
    return dataclasses.replace(SMALL, **changes)


def loop(x, weights, index, experts):
    """What every dispatch has to equal: token after token, choice after choice."""
    out = torch.zeros_like(x)
    for token, choice in itertools.product(range(len(x)), range(index.shape[1])):
        e = index[token, choice]
        gate, up = (experts.gate_up_proj[e] @ x[token]).chunk(2)
        out[token] += weights[token, choice] * (experts.down_proj[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("width", [12, 7])  # rows of 7 numbers are no multiple of 16 bytes
@pytest.mark.parametrize("way", [padded_experts, grouped_experts])
def test_every_way_equals_the_loop_with_gradients(way, width):
    torch.manual_seed(0)
    router, experts = Router(SMALL), Experts(6, 32, width)
    experts.reset_parameters(0.3)
    results = []
    for dispatch in (loop, way):
        x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        _, weights, index = router(x)
        y = dispatch(x, weights, index, experts)
        parameters = [x, *router.parameters(), *experts.parameters()]
        results.append((y, *torch.autograd.grad(y.square().mean(), parameters)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [padded_experts, grouped_experts])
def test_experts_that_nobody_chose_and_a_single_token(way):
    experts = Experts(5, 16, 8)
    index, weights = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]])
    x = torch.randn(1, 16)
    torch.testing.assert_close(way(x, weights, index, experts), loop(x, weights, index, experts))
    all_to_one = torch.full((9, 1), 4)
    x, ones = torch.randn(9, 16), torch.ones(9, 1)
    y = way(x, ones, all_to_one, experts)
    torch.testing.assert_close(y, loop(x, ones, all_to_one, experts))
    y.sum().backward()
    assert experts.down_proj.grad[:4].abs().max() == 0 < experts.down_proj.grad[4].abs().max()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("hidden", "width", "tokens"), [(32, 48, 1), (32, 48, 77), (128, 352, 300)]
)
def test_one_expert_equals_the_dense_layer_bit_for_bit(hidden, width, tokens, gradient):
    sizes = other(hidden_size=hidden, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=width,
                  shared_expert_intermediate_size=0)  # fmt: skip
    block, dense = SparseMoeBlock(sizes), SwiGLU(hidden, width)
    with torch.no_grad():
        block.experts.gate_up_proj[0] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        block.experts.down_proj[0] = dense.down_proj.weight
    x = torch.randn(tokens, hidden)
    with torch.set_grad_enabled(gradient):
        assert torch.equal(block(x), dense(x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "layers",
    [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": (1, 3)}, {"tie_word_embeddings": True}],
)
def test_logits_router_logits_and_loss_equal_transformers(norm, layers, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = QwenMoe(other(norm_topk_prob=norm, **layers)).eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    ids = torch.randint(40, (3, 17))
    want = theirs(ids, labels=ids, output_router_logits=True)
    with record_routing(model) as routes:
        logits = model(ids)
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    assert len(routes) == len(want.router_logits) == sum(map(model.config.is_sparse, range(4)))
    for (found, _), expected in zip(routes, want.router_logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pooled = 2 * load_balancing_loss(torch.cat([found for found, _ in routes]), 2)
    torch.testing.assert_close(pooled, want.aux_loss, rtol=1e-5, atol=1e-5)
    loss = model(ids[:, :-1], targets=ids[:, 1:]) + 0.001 * pooled
    torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=1e-5)


def test_balance_loss_with_padding_equals_transformers():
    module = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    logits = [torch.randn(24, 6) for _ in range(3)]
    attention_mask = (torch.arange(8) < torch.tensor([8, 5, 2])[:, None]).long()
    want = module.load_balancing_loss_func(tuple(logits), 6, 2, attention_mask)
    mask = attention_mask.flatten().repeat(3).float()
    found = 2 * load_balancing_loss(torch.cat(logits), 2, mask=mask)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


GOLDEN = {
    False: ([0.339259, 1.459161, -0.794890, 0.773158, 0.190612, -1.018012, 0.634434, -1.750335, -0.073698,
             -0.176658, 0.701335, 0.287601], 2.2546787),
    True: ([0.380271, 1.327922, -0.931516, 0.578818, -0.018947, -1.159651, 0.709966, -1.861761, -0.144453,
            -0.118392, 0.672451, 0.341452], 2.2330081),
}  # fmt: skip


def fill(shapes: dict) -> dict:
    """Numbers that any program can make: a linear congruential generator for each name in sorted order."""
    state = {}
    for number, name in enumerate(sorted(shapes), 1):
        s, values = number, []
        for _ in range(torch.Size(shapes[name]).numel()):
            s = (1_664_525 * s + 1_013_904_223) % 2**32
            values.append(s / 2**32 - 0.5)
        u = torch.tensor(values, dtype=torch.float64).view(shapes[name])
        state[name] = (1 + 0.5 * u if "norm" in name else 0.8 * u).float()
    return state


@pytest.mark.parametrize("norm", [False, True])
def test_golden_logits_of_a_folder_filled_by_rule(norm, tmp_path):
    config = MoeConfig(12, 16, 24, 2, 4, 2, 4, 64, 1e4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6,
                       shared_expert_intermediate_size=10, norm_topk_prob=norm)  # fmt: skip
    QwenMoe(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = fill({name: tensor.shape for name, tensor in load_file(path).items()})
    assert len(state) == 61
    save_file(state, path)
    model = QwenMoe.from_pretrained(tmp_path).eval()
    with record_routing(model) as routes, torch.no_grad():
        logits = model(torch.tensor([[1, 5, 2, 9, 3, 0, 7, 4]]))[0, -1]
    last, aux = GOLDEN[norm]
    torch.testing.assert_close(logits, torch.tensor(last), rtol=1e-5, atol=1e-5)
    found = 2 * load_balancing_loss(torch.cat([one for one, _ in routes]), 2)
    torch.testing.assert_close(found, torch.tensor(aux), rtol=1e-5, atol=1e-5)


def test_there_and_back(tmp_path):
    model = QwenMoe(other(mlp_only_layers=(2,), norm_topk_prob=True))
    model.save_pretrained(tmp_path)
    again = QwenMoe.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, found), (same, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == same and torch.equal(found, expected)
    half = QwenMoe.from_pretrained(tmp_path, torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    back = QwenMoe.from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen1.5-MoE-A2.7B", 14_315_784_192, 2_689_173_504),
        ("Qwen2-57B-A14B", 57_408_658_944, 14_249_270_784),
    ],
)
def test_published_sizes(name, total, active):
    config = QWEN_MOE[name]
    assert (count_moe_parameters(config), count_moe_parameters(config, active=True)) == (
        total,
        active,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in QwenMoe(config).parameters()) == total
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**config.to_dict()))
    assert sum(p.numel() for p in theirs.parameters()) == total


@pytest.mark.parametrize("changes", [{}, {"decoder_sparse_step": 2}, {"shared_expert_intermediate_size": 0},
                                     {"mlp_only_layers": (0,), "tie_word_embeddings": True}])  # fmt: skip
def test_counted_parameters_are_those_of_the_model(changes):
    config = other(**changes)
    model = QwenMoe(config)
    assert count_moe_parameters(config) == sum(p.numel() for p in model.parameters())
    unused = sum(map(config.is_sparse, range(4))) * 4 * 3 * 32 * 12  # four of six experts rest
    assert count_moe_parameters(config, active=True) == count_moe_parameters(config) - unused


def test_generation_with_a_cache_equals_the_full_pass():
    torch.manual_seed(0)
    model = QwenMoe(SMALL).eval().requires_grad_(False)
    ids = torch.randint(40, (2, 20))
    cache = model.make_cache(2, 20)
    parts = [model(part, cache=cache) for part in ids.split([7, 1, 12], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-5, atol=1e-5)
    made = generate(model, [ids[0].tolist()], max_new_tokens=5, temperature=0.0)
    prompt = ids[:1]
    for _ in range(5):
        prompt = torch.cat([prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)], 1)
    assert made[0].tokens[-5:] == prompt[0, -5:].tolist()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_balance_loss_is_one_when_balanced_and_most_when_collapsed(k):
    even = torch.eye(8).repeat(100, 1) * 1e-3  # each expert is the favourite equally often
    shifted = torch.stack([even.roll(-i, 1) * (8 - i) for i in range(8)]).sum(0)
    torch.testing.assert_close(
        load_balancing_loss(shifted, k), torch.tensor(1.0), rtol=1e-3, atol=1e-3
    )
    collapsed = torch.full((50, 8), -30.0)
    collapsed[:, :k] = 30.0
    torch.testing.assert_close(
        load_balancing_loss(collapsed, k), torch.tensor(8.0 / k), rtol=1e-4, atol=1e-4
    )


def test_pooling_layers_hides_what_each_layer_shows():
    """QwenLM/Qwen3#1418: two layers that collapsed onto different experts."""
    layers = torch.full((2, 100, 4), -20.0)
    layers[0, :, :2] = layers[1, :, 2:] = 20.0
    assert abs(load_balancing_loss(layers, 2) - 2) < 1e-4
    assert abs(load_balancing_loss(layers.flatten(0, 1), 2) - 1) < 1e-4


def test_the_load_of_the_global_batch_allows_specialists():
    logits = torch.randn(2, 3_000, 8)
    logits[0, :, :4] += 9
    logits[1, :, 4:] += 9
    load = expert_load(logits.flatten(0, 1).topk(2).indices, 8)
    each = torch.stack([load_balancing_loss(one, 2) for one in logits]).mean()
    torch.testing.assert_close(load_balancing_loss(logits, 2), each)
    assert each > 1.9
    shared = load_balancing_loss(logits, 2, load=load)
    assert abs(shared - load_balancing_loss(logits.flatten(0, 1), 2)) < 1e-5 and shared < 1.05


def test_the_balance_loss_pushes_down_what_is_chosen_too_often():
    logits = torch.zeros(100, 4)
    logits[:, 0] = 0.5
    logits.requires_grad_()
    load_balancing_loss(logits, 1).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_load_and_violation():
    index = torch.tensor([[0, 1], [0, 2], [0, 1]])
    torch.testing.assert_close(expert_load(index, 4), torch.tensor([3, 2, 1, 0]) / 6)
    mask = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(expert_load(index, 4, mask), torch.tensor([2, 2, 0, 0]) / 4)
    assert max_violation(torch.tensor([[0.5, 0.25, 0.25, 0], [0.25] * 4])).tolist() == [1.0, 0.0]


def test_the_selection_bias_changes_the_choice_and_not_the_weights():
    router = Router(other(norm_topk_prob=False))
    x = torch.randn(30, 32)
    logits, _, index = router(x)
    rarest = expert_load(index, 6).argmin()
    router.selection_bias = F.one_hot(rarest, 6) * 2.0
    _, weights, biased = router(x)
    assert (biased == rarest).any(1).all() and not (index == rarest).any(1).all()
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, biased))


def test_recording_sees_every_layer_and_ends():
    model = QwenMoe(other(mlp_only_layers=(0,)))
    ids = torch.randint(40, (2, 5))
    with record_routing(model) as routes:
        model(ids)
    model(ids)
    assert [(a.shape, b.shape) for a, b in routes] == [((10, 6), (10, 2))] * 3
    copy.deepcopy(model)  # nothing of a forward pass stays behind
    with pytest.raises(RuntimeError), record_routing(model) as routes:
        raise RuntimeError
    model(ids)
    assert routes == []


def test_a_permuted_copy_computes_what_the_dense_layer_computes():
    """Without fresh weights, experts as wide as the dense layer change nothing; with some, they differ."""
    torch.manual_seed(0)
    dense = Qwen(DENSE).eval()
    ids = torch.randint(40, (2, 9))
    experts = dict(
        num_experts=3, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True
    )
    same = upcycle(dense, fresh=0.0, **experts).eval()
    torch.testing.assert_close(same(ids), dense(ids), rtol=1e-5, atol=1e-5)
    first, second, _ = same.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(first, second)  # permuted
    assert (upcycle(dense, **experts)(ids) - dense(ids)).abs().max() > 0.1


@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_upcycling_redraws_its_share_and_keeps_the_rest(fresh):
    dense = Qwen(dataclasses.replace(DENSE, num_hidden_layers=2)).eval()
    model = upcycle(dense, fresh=fresh, seed=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
                    shared_expert_intermediate_size=48, mlp_only_layers=(1,))  # fmt: skip
    sparse, old = model.model.layers[0].mlp, dense.model.layers[0].mlp
    known = torch.isin(sparse.experts.gate_up_proj, old.gate_proj.weight) | torch.isin(
        sparse.experts.gate_up_proj, old.up_proj.weight
    )
    assert abs(known.float().mean() - (1 - fresh)) < 0.03
    rows = {tuple(row) for row in old.up_proj.weight.tolist()}
    assert {tuple(row) for row in sparse.shared_expert.up_proj.weight.tolist()} == rows
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight
    )
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    again = upcycle(dense, fresh=fresh, seed=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
                    shared_expert_intermediate_size=48, mlp_only_layers=(1,))  # fmt: skip
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_upcycling_scales_the_last_matrix_alone():
    dense = Qwen(DENSE).eval()
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    plain, scaled = upcycle(dense, **experts), upcycle(dense, scale=3.0, **experts)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(b, 3 * a if name.endswith("experts.down_proj") else a)


def test_upcycling_leaves_the_generator_of_the_caller_alone():
    dense = Qwen(DENSE)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    upcycle(dense, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    assert torch.equal(torch.rand(3), expected)


def test_upcycles_the_base_model_of_the_course():
    dense = Qwen.from_pretrained(stages.shipped("pretraining")).eval()
    model = upcycle(
        dense, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=384, fresh=0.0
    ).eval()
    ids = torch.randint(1_024, (1, 30))
    assert model(ids).shape == dense(ids).shape
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok must be at most num_experts \(6\), got 7"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number of at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"num_experts": "8"}, "num_experts must be a whole number of at least 1, got '8'"),
        ({"moe_intermediate_size": 2.5}, "moe_intermediate_size must be a whole number"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size must be a whole number"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number of at least 1"),
        ({"mlp_only_layers": (4,)}, "mlp_only_layers names 4, which is the number of no layer"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        other(**changes)


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="num_experts_per_tok must lie in 1 … 4, got 5"):
        load_balancing_loss(torch.randn(3, 4), 5)
    with pytest.raises(ValueError, match="a share of the weights, from 0 to 1, got 1.5"):
        upcycle(Qwen(DENSE), fresh=1.5, num_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="at most the dense width, 48"):
        upcycle(
            Qwen(DENSE), num_experts=2, num_experts_per_tok=1, shared_expert_intermediate_size=49
        )
    with pytest.raises(ValueError, match="has a shared expert: give it a size"):
        other(shared_expert_intermediate_size=0).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "not a Qwen2Moe checkpoint: config.json says model_type 'qwen2'"),
        ({"qkv_bias": False}, "attention without biases"),
        ({"num_experts": None}, "config.json lacks num_experts"),
        ({"num_experts": 1}, "num_experts_per_tok must be at most num_experts"),
        ({"mlp_only_layers": 3}, "'mlp_only_layers' should be a list"),
        ({"hidden_act": "gelu"}, "an activation other than silu"),
        ({"n_group": 4}, "asks for n_group"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_one_sentence(changes, message, tmp_path):
    QwenMoe(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        QwenMoe.from_pretrained(tmp_path)


def test_a_folder_that_is_not_whole_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        QwenMoe.from_pretrained(tmp_path)
    QwenMoe(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"tensor {name} is missing: config.json says 6 experts"):
        QwenMoe.from_pretrained(tmp_path)
    extra = name.replace("2", "6")
    save_file(whole | {extra: whole[name].clone()}, path)
    with pytest.raises(ValueError, match=f"tensor {extra} is surplus"):
        QwenMoe.from_pretrained(tmp_path)
    save_file(whole | {name: torch.zeros(13, 32)}, path)
    with pytest.raises((ValueError, RuntimeError)):
        QwenMoe.from_pretrained(tmp_path)


def test_it_trains():
    torch.manual_seed(0)
    model = QwenMoe(other(num_hidden_layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.randint(40, (8, 12))
    losses = []
    for _ in range(30):
        with record_routing(model) as routes:
            loss = model(ids[:, :-1], targets=ids[:, 1:])
        balance = load_balancing_loss(torch.stack([logits for logits, _ in routes]), 2)
        (loss + 0.01 * balance).backward()
        assert all(p.grad is not None for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- the notebook's exercises refuse wrong answers
RIGHT = """optimizer = torch.optim.AdamW(block.parameters(), lr=0.01)
    for _ in range(steps):
        with record_routing(block) as routes:
            error = F.mse_loss(block(x), targets)
        logits, index = routes[0]
        optimizer.zero_grad()
        (error + coefficient * load_balancing_loss(logits, index.shape[1])).backward()
        optimizer.step()
    counts = F.one_hot(domain).T @ F.one_hot(index[:, 0], logits.shape[1])
    return error.item(), (counts.amax(1).sum() / len(domain)).item()"""
WRONG = {
    "most_experts": [
        "return memory // (3 * hidden_size * f)",  # as wide as the dense layer
        "return memory // (2 * hidden_size * (f // k))",  # two matrices
        "return -(-memory // (3 * hidden_size * (f // k)))",  # rounded up
    ],
    "balance_loss": [
        "return load_balancing_loss(router_logits, k)",  # padding counts
        "return k * load_balancing_loss(router_logits, k, mask=mask)",  # grows with k
        "return load_balancing_loss(router_logits[mask > 0].softmax(-1), k)",  # softmax twice
        "return load_balancing_loss(router_logits.detach(), k, mask=mask).requires_grad_()",  # no gradient
    ],
    "train_router": [
        "return F.mse_loss(block(x), targets).item(), 1.0",  # nothing trained
        "return 0.0, 0.9",
        *(RIGHT.replace("coefficient *", wrong) for wrong in (
            "0.0 *", "0.01 *", "0.1 *", "1.0 *", "10.0 *",  # a coefficient of its own
            "-coefficient *",  # away from balance
        )),
        RIGHT.replace("(error + coefficient * load", "(coefficient * load"),  # nothing learned but balance
        RIGHT.replace("counts.amax(1)", "counts.amax(0)"),  # the favourite domain of each expert
        RIGHT.replace("counts.amax(1).sum() / len(domain)", "counts.sum(0).amax() / len(domain)"),  # the busiest expert
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def exercises():
    """Function → its answer and its check, as the notebook has them."""
    book = Notebook(home() / "notebooks" / "06_mixture_of_experts.ipynb")
    return {pair[0].partition("def ")[2].partition("(")[0]: pair for pair in tiny.exercises(book)}


def attempt(answer: str, check: str) -> None:
    names = {
        "torch": torch, "F": F, "Experts": Experts, "MoeConfig": MoeConfig, "SparseMoeBlock": SparseMoeBlock,
        "load_balancing_loss": load_balancing_loss, "record_routing": record_routing,
        "max_violation": max_violation, "expert_load": expert_load,
        "sizes": dataclasses.asdict(dataclasses.replace(DENSE, num_hidden_layers=2)),
    }  # fmt: skip
    torch.manual_seed(0)
    exec(answer + "\n" + check, names)


@pytest.mark.parametrize("name", WRONG)
def test_checks_of_exercises_take_the_right_answer_and_no_wrong_one(name, exercises):
    answer, check = exercises[name]
    attempt(answer, check)
    head = answer.partition("# BEGIN SOLUTION")[0].rstrip()
    for wrong in WRONG[name]:
        with pytest.raises((AssertionError, RuntimeError)):
            attempt(f"{head}\n    {wrong}", check)


# ---------------------------------------------------------------- the machinery that the notebook's comparison uses
def test_intervals_of_a_few_values_are_wider_than_those_of_many():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    assert mean_interval([0.0, 1.0])[1] == pytest.approx(12.706 / 2)
    assert mean_interval([5.0] * 4) == (5.0, 0.0)
    for n in (1, 11):
        with pytest.raises(ValueError, match=f"an interval wants 2 to 10 values, got {n}"):
            mean_interval([1.0] * n)


def test_every_epoch_reads_all_rows_once():
    rows = epochs(10, 4, 5, seed=1)
    assert rows.shape == (5, 4)
    assert (
        sorted(rows.flatten()[:10].tolist())
        == sorted(rows.flatten()[10:].tolist())
        == list(range(10))
    )
    assert torch.equal(rows, epochs(10, 4, 5, seed=1)) and not torch.equal(
        rows, epochs(10, 4, 5, seed=2)
    )
    assert epochs(100, 7, 3, seed=0).unique().numel() == 21


def test_calls_are_timed_in_turns_at_their_best():
    order = []
    work = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = best_seconds(work, 3)
    assert order == ["a", "b"] * 3 and set(found) == {"a", "b"} and 0 <= min(found.values()) < 1


def test_documents_of_a_side_are_on_no_other(monkeypatch):
    texts = [f"Document {n % 90} of the source." for n in range(120)]  # the last thirty stand twice
    source = SimpleNamespace(domain="wiki_en")
    monkeypatch.setattr(small_text, "available_sources", lambda config: ([source], []))
    documents = lambda source: (SimpleNamespace(text=text) for text in texts)
    monkeypatch.setattr(small_text, "read_documents", documents)
    folder = stages.shipped("pretraining")
    sides = small_text.domain_rows(None, folder, kilobytes=100, length=8)
    tokenizer = Tokenizer.from_pretrained(folder)
    found = {}
    for side, domains in sides.items():
        assert domains["wiki_en"].shape[1] == 9
        text = tokenizer.decode(domains["wiki_en"].flatten().tolist())
        found[side] = set(re.findall(r"Document \d+ of the source\.", text))
    assert len(found["train"]) > len(found["tune"]) > 0 < len(found["final"])
    assert not (
        found["train"] & found["tune"]
        or found["train"] & found["final"]
        or found["tune"] & found["final"]
    )
    assert (
        small_text.domain_rows(None, folder, kilobytes=0, length=8)["train"] == {}
    )  # too small for three sides


def test_the_best_rate_is_taken_and_an_end_of_the_grid_is_told(monkeypatch, capsys):
    calls = lambda calls, tolerance: {name: call() for name, call in calls.items()}
    monkeypatch.setattr(tuning, "experiments", calls)
    learn = lambda arm, learning_rate, seed: {"loss": (learning_rate - arm["best"]) ** 2}
    arms = {"middle": {"best": 2.1}, "end": {"best": 5.0}, "alone": {"best": 1.0}}
    best = tuning.tune("toy", learn, arms, {"middle": [3, 1, 2], "end": [1, 2, 3], "alone": [2]})
    assert best == {"middle": 2, "end": 3, "alone": 2}
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line for line in lines}
    assert (
        "inside the grid" in told["middle"] and "at an end" in told["end"] and "alone" not in told
    )
    assert (
        tuning.tune("toy", None, arms, {"alone": [2]}) == {"alone": 2}
        and not capsys.readouterr().out
    )
