"""Goldens of the chapters about the model, from layers to sparse prefill."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import torch
from golden_registry import digest, golden, summary
from golden_texts import tokenizer
from torch.nn import functional as F

from qwen_mini import attention as a
from qwen_mini import dual_chunk as d
from qwen_mini import generation as g
from qwen_mini import layers
from qwen_mini import moe as m
from qwen_mini import sparse_prefill as s
from qwen_mini.kernels.attention import TiledAttention
from qwen_mini.kernels.cache import KVCache
from qwen_mini.model import (
    QWEN2_5,
    ModelConfig,
    Qwen,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
)

CONFIG = ModelConfig(
    vocab_size=1_024,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)
SMALL = dataclasses.replace(
    CONFIG, vocab_size=61, head_dim=16, max_position_embeddings=256, rope_theta=1_000.0
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(rows: int, length: int, seed: int = 0, low: int = 0, high: int = 1_024) -> torch.Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def tiny(config: ModelConfig = CONFIG, seed: int = 0, scale: float = 0.2, kind=Qwen):
    """A model with large random weights, so that its distributions are far from flat."""
    model = kind(config).eval()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(scale * rand(*p.shape, seed=1_000 * seed + number) + (p.ndim == 1))
    return model


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list:
    return [summary(x) for x in torch.autograd.grad(loss, tensors)]


# ---------------------------------------------------------------- layers
@golden("layers", "RMSNorm")
def _():
    x, norm = rand(3, 5, 16).requires_grad_(), layers.RMSNorm(16, 1e-5)
    norm.weight.data = 1 + rand(16, seed=1)
    out = norm(x)
    plain = layers.rms_norm(x.detach(), norm.weight.detach(), 1e-5)
    half = layers.rms_norm(x.detach().bfloat16(), norm.weight.detach().bfloat16(), 1e-5)
    loss = (out * rand(3, 5, 16, seed=2)).sum()
    return [summary(out), summary(plain), str(half.dtype), gradients(loss, x, norm.weight)]


@golden("layers", "RoPE")
def _():
    x, frequencies = rand(2, 3, 7, 8).requires_grad_(), layers.rope_frequencies(8, 500.0)
    places = torch.tensor([0, 1, 5, 9, 100, 2_000, 3])
    out = layers.apply_rope(x, places, frequencies)
    tables = layers.rope_tables(places, frequencies)
    loss = (out * rand(2, 3, 7, 8, seed=1)).sum()
    return [frequencies, summary(out), [summary(table) for table in tables], gradients(loss, x)]


@golden("layers", "SwiGLU")
def _():
    mlp, x = layers.SwiGLU(8, 12), rand(4, 8).requires_grad_()
    for number, p in enumerate(mlp.parameters()):
        p.data = rand(*p.shape, seed=number)
    out = mlp(x)
    with torch.no_grad():
        plain = mlp(x)
    return [
        summary(out),
        summary(plain),
        gradients((out * rand(4, 8, seed=5)).sum(), x, *mlp.parameters()),
    ]


# ---------------------------------------------------------------- attention
def qkv(
    length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8
) -> list[torch.Tensor]:
    return [
        rand(batch, n, length, head_dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))
    ]


FREQUENCIES = layers.rope_frequencies(8, 1_000.0)


@golden("attention", "masked and visible")
def _():
    q, k, v = qkv(9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
    mask = a.visible(9, 9, documents, documents)
    seen = a.visible(3, 9).int()
    return [
        summary(a.masked_attention(q, k, v, mask)),
        summary(a.masked_attention(q, k, v)),
        digest(mask),
        seen,
    ]


@golden("attention", "tiles")
def _():
    q, k, v = (x.requires_grad_() for x in qkv(150))
    out = TiledAttention.apply(q, k, v)
    return [summary(out), gradients((out * rand(*out.shape, seed=9)).sum(), q, k, v)]


@golden("attention", "causal attention")
def _():
    q, k, v = qkv(20)
    documents = torch.arange(20).expand(2, 20) // 7
    call = functools.partial(a.causal_attention, q, k, v, frequencies=FREQUENCIES)
    with torch.no_grad():
        return [
            summary(x) for x in (call(), call(torch.arange(20) * 3), call(document_ids=documents))
        ]


@golden("attention", "cache")
def _():
    cache, out = KVCache(1, 2, 2, 8, 16), []
    q, k, v = qkv(12)
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 12)):
            part = [x[:, :, start:end] for x in (q, k, v)]
            out.append(a.causal_attention(*part, cache=cache.layers[0], frequencies=FREQUENCIES))
            cache.length = end
    one = cache.select(torch.tensor([1]))
    return [
        summary(torch.cat(out, 2)),
        summary(one.layers[0].keys),
        [one.length, one.capacity, one.batch_size],
    ]


@golden("attention", "cache with documents")
@torch.no_grad()
def _():
    cache, out = KVCache(1, 2, 2, 8, 16), []
    q, k, v = qkv(12)
    documents = torch.tensor([[1] * 4 + [0] * 8, [0] * 12])  # padding on the left of the first row
    for start, end in ((0, 7), (7, 8), (8, 12)):
        part = [x[:, :, start:end] for x in (q, k, v)]
        cache.remember(documents[:, start:end], end - start)
        out.append(a.causal_attention(*part, cache=cache.layers[0], frequencies=FREQUENCIES))
        cache.length = end
    return [summary(torch.cat(out, 2)), cache.select(torch.tensor([0])).document_ids]


@golden("attention", "grouped queries")
def _():
    layer, x = a.GroupedQueryAttention(16, 4, 2, 8), rand(2, 11, 16).requires_grad_()
    for number, p in enumerate(layer.parameters()):
        p.data = 0.3 * rand(*p.shape, seed=number)
    out = layer(x, functools.partial(a.causal_attention, frequencies=FREQUENCIES))
    return [summary(out), gradients((out * rand(2, 11, 16, seed=7)).sum(), x, *layer.parameters())]


# ---------------------------------------------------------------- model
@golden("model", "initial weights")
def _():
    torch.manual_seed(0)
    return {
        name: summary(p) for name, p in Qwen(CONFIG).named_parameters() if "layers.1" not in name
    }


@golden("model", "logits and gradients")
def _():
    model, tokens = tiny(), ids(2, 25)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return [summary(logits), loss, {name: summary(p.grad) for name, p in model.named_parameters()}]


@golden("model", "documents, positions, cache")
@torch.no_grad()
def _():
    model, tokens = tiny(dataclasses.replace(CONFIG, tie_word_embeddings=False)), ids(2, 20)
    documents, cache = torch.arange(20).expand(2, 20) // 6, model.make_cache(2, 24)
    parts = [model(tokens[:, i:j], cache=cache) for i, j in ((0, 9), (9, 10), (10, 20))]
    packed = model(tokens, torch.arange(20) % 6, documents)
    return [summary(torch.cat(parts, 1)), summary(packed), cache.length]


@golden("model", "sizes")
def _():
    sizes = [
        [count_parameters(x), count_parameters(x, False), flops_per_token(x, 4_096, True)]
        for x in QWEN2_5.values()
    ]
    read = ModelConfig.from_dict(CONFIG.to_dict())
    return {
        "published": sizes,
        "cache": kv_cache_bytes_per_token(QWEN2_5["7B"]),
        "names": list(QWEN2_5),
        "config": digest(CONFIG.to_dict()),
        "read back": read == CONFIG,
    }


@golden("model", "checkpoint")
@torch.no_grad()
def _():
    found = []
    for tied, dtype in ((True, None), (False, torch.bfloat16)):
        model = tiny(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, dtype, {"eos_token_id": 3})
            names = ("config.json", "generation_config.json")
            texts = [json.loads((Path(folder) / name).read_text()) for name in names]
            again = Qwen.from_pretrained(folder)
        found.append([digest(texts), summary(again(ids(1, 9))), str(again.lm_head.weight.dtype)])
    return found


# ---------------------------------------------------------------- generation
PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (3, 9, 6)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(completions) -> list:
    return [[one.tokens, one.finished] for one in completions]


@golden("generation", "choices")
def _():
    logits, uniform = 3 * rand(3, 40), torch.rand(3, 1, generator=seeded())
    history, found = torch.tensor([[1, 2, 2], [3, 4, 5], [0, 0, 1]]), {}
    for k, p in ((0, 1.0), (5, 1.0), (0, 0.8), (9, 0.5)):
        values, chosen = g.candidates(logits, k, p)
        found[f"{k}, {p}"] = [chosen[:, :9], summary(values.clamp(min=-99))]
    for n, options in enumerate(
        (dict(), dict(temperature=0.7, top_k=4, forbidden_ids=[1]), dict(temperature=2.0))
    ):
        found[f"chosen {n}"] = g.Sampling(**options).choose(logits, history, uniform)
    found["penalised"] = summary(g.penalize_repetition(logits, history, 1.3))
    return found | {"sampled": g.sample(logits, uniform), "padded": g.left_pad(PROMPTS)[0]}


@golden("generation", "greedy")
def _():
    return tokens_of(g.generate(tiny(), PROMPTS, 24, stop_ids=[7]))


@golden("generation", "greedy, not fused")
def _():
    model = tiny()
    usual = model.attention
    model.attention = lambda *x, **y: usual(
        *x, **y
    )  # no partial of causal_attention: no fused decoder
    return tokens_of(g.generate(model, PROMPTS, 24, stop_ids=[7]))


@golden("generation", "sampled")
def _():
    options = dict(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, vocab_size=1_000)
    stops = list(range(0, 1_000, 40))
    found = g.generate(
        tiny(), PROMPTS, 24, stop_ids=stops, num_return_sequences=2, generator=seeded(), **options
    )
    return tokens_of(found)


@golden("generation", "groups")
def _():
    options = dict(generator=seeded(1), return_logprobs=True, stop_ids=list(range(0, 1_000, 30)))
    groups = g.sample_groups(tiny(), PROMPTS, 3, 16, temperature=1.2, **options)
    return [[[*one.tokens], one.logprobs] for group in groups for one in group]


@golden("generation", "stream")
def _():
    pieces = g.stream(tiny(), tokenizer(), "The river", 30, temperature=1.0, generator=seeded(2))
    return list(pieces)


# ---------------------------------------------------------------- mixture of experts
MOE = m.MoeConfig(
    **dataclasses.asdict(SMALL), num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12,
    shared_expert_intermediate_size=20,
)  # fmt: skip


@golden("moe", "initial weights")
def _():
    torch.manual_seed(0)
    return {name: summary(p.detach()) for name, p in m.QwenMoe(MOE).named_parameters()}


@golden("moe", "logits, routing and gradients")
def _():
    found = {}
    for norm, only in ((False, ()), (True, (0,))):
        config = dataclasses.replace(MOE, norm_topk_prob=norm, mlp_only_layers=only)
        model, rows = tiny(config, kind=m.QwenMoe), ids(2, 20, high=61)
        with m.record_routing(model) as routes:
            loss = model(rows[:, :-1], targets=rows[:, 1:])
        logits = torch.stack([one for one, _ in routes])
        balance = [m.load_balancing_loss(x, 2) for x in (logits, logits.flatten(0, 1))]
        (loss + balance[0]).backward()
        gradients = {name: summary(p.grad) for name, p in model.named_parameters()}
        chosen = [index.flatten().tolist() for _, index in routes]
        found[f"norm {norm}"] = [loss.item(), *(b.item() for b in balance), chosen, gradients]
    return found


@golden("moe", "ways to compute")
def _():
    experts, x = m.Experts(6, 16, 8), rand(30, 16)
    with torch.no_grad():
        for number, p in enumerate(experts.parameters()):
            p.copy_(0.3 * rand(*p.shape, seed=number))
    weights, index = rand(30, 6, seed=7).softmax(-1).topk(2)
    with torch.no_grad():
        return [
            summary(way(x, weights, index, experts))
            for way in (m.padded_experts, m.grouped_experts)
        ]


@golden("moe", "upcycling")
def _():
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    found = {}
    for share in (0.0, 0.5):
        model = m.upcycle(
            tiny(SMALL), fresh=share, seed=1, shared_expert_intermediate_size=20, **experts
        )
        found[str(share)] = {name: summary(p.detach()) for name, p in model.named_parameters()}
    return found


@golden("moe", "sizes and loads")
def _():
    load = m.expert_load(torch.tensor([[0, 1], [0, 2], [3, 1]]), 4)
    sizes = {
        n: [m.count_moe_parameters(c, a) for a in (False, True)] for n, c in m.QWEN_MOE.items()
    }
    return {"sizes": sizes, "load": load.tolist(), "violation": m.max_violation(load).item()}


# ---------------------------------------------------------------- dual chunks
@golden("dual_chunk", "frequencies")
def _():
    found = {f"yarn {f}": d.yarn_frequencies(16, 1_000.0, f, 64) for f in (1.0, 2.5, 16.0)}
    found["qwen"] = summary(d.yarn_frequencies(128, 1e6, 4.0, 32_768))
    found |= {"ntk": d.ntk_frequencies(16, 1_000.0, 4.0), "range": d.yarn_range(128, 1e6, 32_768)}
    return found | {"temperature": [d.yarn_temperature(f) for f in (0.5, 1.0, 4.0, 40.0)]}


@golden("dual_chunk", "temperatures")
def _():
    pairs = ((100, None), (100, 64), (64, 64), (9_000, 64))
    gentle = [d.yarn_temperature(factor) for factor in (1.01, 1.5, 2.0)]
    return {"yarn": gentle, "of a length": [d.temperature_of(*pair) for pair in pairs]}


@golden("dual_chunk", "positions")
def _():
    found = [d.dual_chunk_positions(length, 5, 8) for length in (4, 11, 23)]
    return {"matrices": list(map(digest, found)), "last": found[-1][-1], "stride": d.stride_of(256)}


DUAL = dict(frequencies=FREQUENCIES, chunk_size=16, local_size=4)


@golden("dual_chunk", "attention")
def _():
    q, k, v = qkv(50)
    fast = d.dual_chunk_attention(q, k, v, **DUAL)
    warm = d.dual_chunk_attention(q, k, v, **DUAL, original_length=16)
    naive = d.naive_dual_chunk_attention(q, k, v, frequencies=FREQUENCIES, stride=12, chunk_size=16)
    rows = d.attention_by_rows(q, q, q, True, rows=20)
    return [summary(x) for x in (fast, warm, naive, *rows)]


@golden("dual_chunk", "attention with a cache")
def _():
    q, k, v = qkv(50)
    cache, out = KVCache(1, 2, 2, 8, 60), []
    for start, end in ((0, 20), (20, 41), (41, 42), (42, 50)):
        part = [x[:, :, start:end] for x in (q, k, v)]
        out.append(
            d.dual_chunk_attention(
                *part, cache=cache.layers[0], **DUAL, original_length=16, length=50
            )
        )
        cache.length = end
    return summary(torch.cat(out, 2))


@golden("dual_chunk", "schemes")
@torch.no_grad()
def _():
    model, found = tiny(dataclasses.replace(SMALL, max_position_embeddings=32)), {}
    for mode in ("rope", "yarn", "dca", "dca+temperature", "dca+yarn"):
        model.attention = d.position_scheme(model.config, mode, 100)
        found[mode] = summary(model(ids(1, 100, high=61)))
    return found


# ---------------------------------------------------------------- sparse prefill
@golden("sparse_prefill", "patterns")
def _():
    q, k = 2 * rand(96, 8), 2 * rand(96, 8, seed=1)
    masks = [
        s.a_shape(96, 4, 16),
        s.vertical_slash(q, k, 12, 9, 8, 2, 3)[0],
        s.block_sparse(q, k, 3, 16),
    ]
    _, columns, slashes = s.vertical_slash(q, k, 12, 9, 8, 2, 3)
    shares = [summary(s.recall(q, k, mask)) for mask in masks]
    return {
        "masks": list(map(digest, masks)),
        "recall": shares,
        "columns": columns,
        "slashes": slashes,
    }


@golden("sparse_prefill", "logits")
def _():
    model, tokens, found = tiny(SMALL, scale=0.3), ids(1, 1_100, high=61), {}
    budgets = {
        "default": None,
        "small": s.Budget(64, 64),
        "first keys": s.Budget(64, 128, estimate=False),
    }
    for name, budget in budgets.items():
        attention = s.SparseAttention(SMALL, 1_100, budget)
        logits, cache = s.sparse_prefill(model, tokens, attention, chunk_tokens=576)
        found[name] = [summary(logits), summary(cache.layers[1].values), cache.length]
    attention = s.SparseAttention(
        SMALL, 1_100, s.Budget(64, 64), temperature=False, continuous=False
    )
    return found | {
        "plain": summary(s.sparse_prefill(model, tokens, attention, chunk_tokens=576)[0])
    }


@golden("sparse_prefill", "budgets")
def _():
    model, tokens = tiny(SMALL, scale=0.3), ids(1, 700, high=61)
    chosen = s.choose_budgets(model, tokens)
    refined, rounds = s.refine_budgets(model, tokens, chosen, threshold=0.9, max_vertical=256)
    as_lists = [
        [[b.vertical, b.window, b.estimate] for row in grid for b in row]
        for grid in (chosen, refined)
    ]
    return {
        "chosen": as_lists[0],
        "refined": as_lists[1],
        "recalls": [list(found.values()) for found in rounds],
    }
