"""Chapter 04: the decoder against transformers and golden values, its counters, and damaged checkpoints."""

import copy
import dataclasses
import json
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_mini import course
from qwen_mini import model as chapter
from qwen_mini.course import artifacts
from qwen_mini.layers import SwiGLU
from qwen_mini.model import (
    QWEN2_5,
    DecoderLayer,
    ModelConfig,
    Qwen,
    count_parameters,
    dense_layer,
    flops_per_token,
    kv_cache_bytes_per_token,
    read_config,
)

SMALL = ModelConfig(200, 64, 96, 3, 4, 2, 16, 128, 10_000.0, 1e-6, True, 0.2)


def lively(config: ModelConfig = SMALL, seed: int = 0) -> Qwen:
    """A model whose biases and gains are random too: zeros and ones hide mistakes."""
    torch.manual_seed(seed)
    model = Qwen(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def token_ids(rows=3, length=100, config=SMALL, seed=1):
    return torch.randint(
        config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def relative(ours, theirs) -> float:
    """Largest difference in units of the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---------------------------------------------------------------- golden values


def golden_fill(model: Qwen) -> None:
    """Weights from a congruential generator that starts at the place of each name in alphabetical order."""
    parameters = dict(model.named_parameters())
    for start, name in enumerate(sorted(parameters), 1):
        state, values = start, []
        for _ in range(parameters[name].numel()):
            state = (1664525 * state + 1013904223) % 2**32
            u = state / 2**32 - 0.5
            values.append(1 + 0.5 * u if "norm" in name else 0.8 * u)
        with torch.no_grad():
            parameters[name].copy_(torch.tensor(values).reshape(parameters[name].shape))


GOLDEN = {
    True: ([1.245379, -0.441101, -0.426658, 1.493341, 0.387465, 0.526805,
            -0.266382, -0.655909, 0.688256, -1.862029, 0.159538, -0.105091], 2.7750595, 26),
    False: ([0.000547, 0.348544, 0.197984, 0.656062, -0.726898, 0.210800,
             0.111006, 0.667058, -0.338014, 0.680618, -0.579838, 0.609160], 2.8802264, 27),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_golden_logits_and_loss(tied, grad):
    last, loss, tensors = GOLDEN[tied]
    model = Qwen(ModelConfig(12, 16, 24, 2, 4, 2, 4, 128, 10_000.0, 1e-6, tied))
    golden_fill(model)
    assert len(list(model.parameters())) == tensors
    ids = torch.tensor([[1, 5, 2, 9, 3, 0, 7, 4]])
    with torch.set_grad_enabled(grad):
        logits = model(ids)
        assert logits[0, -1].tolist() == pytest.approx(last, abs=1e-5)
        assert F.cross_entropy(logits[0, :-1], ids[0, 1:]).item() == pytest.approx(loss, abs=1e-5)


def test_golden_masked_loss_and_gradient():
    model = Qwen(ModelConfig(12, 16, 24, 2, 4, 2, 4, 128, 10_000.0, 1e-6, True))
    golden_fill(model)
    ids = torch.tensor([[1, 5, 2, 9, 3, 0, 7, 4]])
    logits = model(ids)
    assert F.cross_entropy(logits[0, 3:-1], ids[0, 4:]).item() == pytest.approx(2.6577537, abs=1e-5)
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(6.997245, abs=1e-4)


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module", params=["tied", "untied", "wide heads, eps 1e-5"])
def pair(request, tmp_path_factory):
    """Our model and what AutoModelForCausalLM makes of the folder we wrote."""
    transformers = pytest.importorskip("transformers")
    config = {
        "tied": SMALL,
        "untied": dataclasses.replace(SMALL, tie_word_embeddings=False),
        "wide heads, eps 1e-5": dataclasses.replace(
            SMALL, head_dim=32, rms_norm_eps=1e-5, rope_theta=1_000_000.0
        ),
    }[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    model = lively(config)
    model.save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    return model, theirs


@pytest.mark.parametrize("grad", [True, False])
def test_logits_equal_transformers(pair, grad):
    model, theirs = pair
    with torch.no_grad():
        reference = theirs(token_ids()).logits
    with torch.set_grad_enabled(grad):
        assert relative(model(token_ids()), reference) < 1e-5


def test_cached_logits_equal_transformers(pair):
    model, theirs = pair
    ids = token_ids()
    with torch.no_grad():
        cache = model.make_cache(batch_size=3, capacity=100)
        pieces = [ids[:, :40], ids[:, 40:50], *ids[:, 50:].split(1, dim=1)]
        ours = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
        assert relative(ours, theirs(ids).logits) < 1e-5
    assert cache.length == 100


def test_left_padding_equals_transformers(pair):
    model, theirs = pair
    ids, mask = token_ids(), torch.ones(3, 100, dtype=torch.long)
    mask[0, :30], mask[1, :7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    with torch.no_grad():
        reference = theirs(ids, attention_mask=mask, position_ids=positions).logits
        whole = model(ids, positions, mask)
        cache = model.make_cache(3, 100)
        pieces = [slice(0, 60), *(slice(t, t + 1) for t in range(60, 100))]
        stepped = torch.cat(
            [model(ids[:, s], positions[:, s], mask[:, s], cache) for s in pieces], dim=1
        )
    assert torch.isfinite(whole).all()
    assert relative(whole[real], reference[real]) < 1e-5
    assert relative(stepped[real], reference[real]) < 1e-5


def test_packed_documents_equal_transformers_alone(pair):
    model, theirs = pair
    ids = token_ids(rows=1)
    documents = torch.tensor([[7] * 35 + [3] * 50 + [7] * 15])[:, :85]
    positions = torch.cat([torch.arange(35), torch.arange(50)])
    with torch.no_grad():
        packed = model(ids[:, :85], positions, documents)
        alone = torch.cat([theirs(ids[:, :35]).logits, theirs(ids[:, 35:85]).logits], dim=1)
        leaking = model(ids[:, :85], positions)
    assert relative(packed, alone) < 1e-5
    assert relative(leaking, alone) > 1e-3


def same_gradients(loss, reference, model, theirs):
    """Both losses have the same gradient in every parameter; none is left behind."""
    loss.backward()
    reference.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        assert relative(p.grad, gradients[name]) < 1e-4, name
    model.zero_grad()
    theirs.zero_grad()


def test_loss_and_gradients_equal_transformers(pair):
    model, theirs = pair
    ids = token_ids()
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    reference = theirs(ids, labels=ids).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    same_gradients(loss, reference, model, theirs)


def test_the_loss_in_the_forward_pass_equals_that_of_transformers(pair):
    """Of all tokens, and of those that a label asks for: weights 1 and 0."""
    model, theirs = pair
    ids = token_ids()
    labels = ids.masked_fill(torch.arange(ids.numel()).view(ids.shape) % 3 == 0, -100)
    for asked, weights in ((ids, None), (labels, (labels[:, 1:] != -100).float())):
        reference = theirs(ids, labels=asked).loss
        loss = model(ids[:, :-1], targets=ids[:, 1:], weights=weights)
        assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
        same_gradients(loss, reference, model, theirs)


def test_a_layer_may_hold_other_modules():
    """What chapter 06 needs: the same block with another feed-forward part."""

    class Twice(SwiGLU):
        def forward(self, x):
            return 2 * super().forward(x)

    def make_layer(config):
        layer = dense_layer(config)
        return DecoderLayer(
            config, layer.self_attn, Twice(config.hidden_size, config.intermediate_size)
        )

    torch.manual_seed(0)
    other, model = Qwen(SMALL, make_layer).eval(), lively(SMALL)
    other.load_state_dict(model.state_dict())
    assert relative(other(token_ids()), model(token_ids())) > 1e-3
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight /= 2
    torch.testing.assert_close(other(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_as_that_of_transformers(pair):
    model, theirs = (copy.deepcopy(m).to(torch.bfloat16) for m in pair)
    with torch.no_grad():
        exact = pair[0](token_ids())
        error = lambda logits: (logits.float() - exact).square().mean().sqrt()
        assert error(model(token_ids())) < 1.2 * error(theirs(token_ids()).logits)


def test_reads_what_transformers_writes(pair, tmp_path):
    model, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = Qwen.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(token_ids()), model(token_ids()))


def test_reads_shards_that_transformers_writes(pair, tmp_path):
    model, theirs = pair
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = Qwen.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()), model(token_ids()))
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        Qwen.from_pretrained(tmp_path)


def test_generates_in_transformers(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, _ = pair
    model.save_pretrained(
        tmp_path, generation_config={"eos_token_id": 7, "pad_token_id": 7, "do_sample": False}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.generation_config.eos_token_id == 7
    out = theirs.generate(
        token_ids(1, 5), max_new_tokens=8, attention_mask=torch.ones(1, 5, dtype=torch.long)
    )
    ids = token_ids(1, 5)
    with torch.no_grad():
        for expected in out[0, 5:].tolist():
            chosen = model(ids)[0, -1].argmax().item()
            assert chosen == expected
            ids = torch.cat([ids, torch.tensor([[chosen]])], 1)


def test_published_configurations_equal_transformers():
    transformers = pytest.importorskip("transformers")
    for name in ("0.5B", "7B"):
        values = QWEN2_5[name].to_dict()
        config = transformers.Qwen2Config(**values)
        with torch.device("meta"):
            theirs = transformers.Qwen2ForCausalLM(config)
            ours = Qwen(QWEN2_5[name])
        ours_shapes = {n: tuple(p.shape) for n, p in ours.state_dict().items()}
        assert ours_shapes == {n: tuple(p.shape) for n, p in theirs.state_dict().items()}
        assert config.rope_parameters["rope_theta"] == 1_000_000.0


# ---------------------------------------------------------------- counters

EXACT = {  # total, non-embedding, KV bytes per token, training GFLOPs per token at 4,096 / 32,768 / 131,072
    "0.5B": (494_032_768, 357_898_112, 12_288, 3.49, 7.19, 19.88),
    "1.5B": (1_543_714_304, 1_310_340_608, 28_672, 10.32, 17.72, 43.08),
    "3B": (3_085_938_688, 2_774_773_760, 36_864, 20.33, 33.01, 76.5),
    "7B": (7_615_616_512, 6_525_621_760, 57_344, 44.89, 62.15, 121.3),
    "14B": (14_770_033_664, 13_212_898_304, 196_608, 89.99, 132.3, 277.2),
    "32B": (32_763_876_352, 31_206_740_992, 262_144, 200.0, 256.3, 449.6),
    "72B": (72_706_203_648, 70_214_787_072, 327_680, 444.9, 557.6, 944.2),
}
TABLE_1 = {
    "0.5B": (24, 14, 2, True), "1.5B": (28, 12, 2, True), "3B": (36, 16, 2, True), "7B": (28, 28, 4, False),
    "14B": (48, 40, 8, False), "32B": (64, 40, 8, False), "72B": (80, 64, 8, False),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_published_sizes(name):
    config, (total, body, kv, *gflops) = QWEN2_5[name], EXACT[name]
    c = config
    assert (
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.tie_word_embeddings,
    ) == TABLE_1[name]
    assert (count_parameters(config), count_parameters(config, embedding=False)) == (total, body)
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen(config).parameters()) == total
    assert kv_cache_bytes_per_token(config) == kv
    assert kv_cache_bytes_per_token(config, bytes_per_value=4) == 2 * kv
    for length, expected in zip((4_096, 32_768, 131_072), gflops, strict=True):
        rounding = 0.5 * 10 ** -len(str(expected).partition(".")[2])
        assert flops_per_token(config, length, training=True) / 1e9 == pytest.approx(
            expected, abs=rounding * 1.01
        )


def test_kv_cache_at_32k_and_embedding_share():
    gib = {name: kv_cache_bytes_per_token(c) * 32_768 / 2**30 for name, c in QWEN2_5.items()}
    assert list(gib.values()) == [0.375, 0.875, 1.125, 1.75, 6, 8, 10]
    c = QWEN2_5["0.5B"]
    assert 1 - count_parameters(c, embedding=False) / count_parameters(c) == pytest.approx(
        0.276, abs=5e-4
    )


def test_kv_bytes_are_what_the_cache_allocates():
    cache = lively().make_cache(batch_size=2, capacity=50)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 50 * kv_cache_bytes_per_token(SMALL, bytes_per_value=4)


def test_linear_flops_equal_the_counter():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lively()(token_ids(1, 128))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = (counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)) / 128
    attention = 2 * SMALL.num_hidden_layers * SMALL.num_attention_heads * SMALL.head_dim * 129
    assert flops_per_token(SMALL, 128) == linear + attention
    assert flops_per_token(SMALL, 128, training=True) == 3 * flops_per_token(SMALL, 128)


@pytest.mark.parametrize("scale", ["quick", "laptop", "gpu", "cluster"])
def test_every_scale_builds(scale):
    from qwen_mini.course.plan import plan

    config = course.load_scale(scale)
    shape = ModelConfig.from_scale(config)
    assert shape.vocab_size >= config.tokenizer.vocab_size
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen(shape).parameters()) == count_parameters(shape)
    rows = dict(plan(config))
    assert f"{count_parameters(shape):,}" in rows["parameters"]
    print(scale, rows)


def test_cluster_is_the_published_architecture():
    shape = ModelConfig.from_scale(course.load_scale("cluster"))
    published = QWEN2_5["0.5B"]
    assert dataclasses.replace(shape, rope_theta=1e6, max_position_embeddings=32_768) == published


# ---------------------------------------------------------------- the model itself


def test_initialisation():
    torch.manual_seed(0)
    model = Qwen(dataclasses.replace(SMALL, vocab_size=2048, initializer_range=0.02))
    for name, p in model.named_parameters():
        if "bias" in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
    ids = token_ids(8, 64, model.config)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(2048), abs=0.1)


def test_tie_is_one_object():
    for tied in (True, False):
        model = lively(dataclasses.replace(SMALL, tie_word_embeddings=tied))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_attention_can_be_exchanged():
    model, seen = lively(), []
    original = model.attention

    def spy(q, k, v, position_ids, document_ids, cache):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return original(q, k, v, position_ids, document_ids, cache)

    expected = model(token_ids())
    model.attention = spy
    assert torch.equal(model(token_ids()), expected)
    assert seen == [((3, 4, 100, 16), (3, 2, 100, 16))] * 3


@pytest.mark.parametrize("cached", [False, True])
def test_rope_tables_are_computed_once_a_forward(monkeypatch, cached):
    """All layers turn by the same tables, at the places that the cache says."""
    net, ids, made = lively(), token_ids()[:, :20], []
    real = chapter.rope_tables
    monkeypatch.setattr(chapter, "rope_tables", lambda *x: made.append(x[0]) or real(*x))
    with torch.no_grad():
        cache = net.make_cache(len(ids), 32) if cached else None
        for part in ids.split(10, 1) if cached else [ids]:
            net(part, cache=cache)
    expected = [list(range(10)), list(range(10, 20))] if cached else [list(range(20))]
    assert [x.tolist() for x in made] == expected


def test_causal_and_independent_rows():
    model, ids = lively(), token_ids()
    changed = ids.clone()
    changed[0, 50:] = 0
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert relative(b[0, :50], a[0, :50]) < 1e-6 and relative(b[1:], a[1:]) < 1e-6
    assert relative(b[0, 50:], a[0, 50:]) > 1e-2


@pytest.mark.parametrize("shape", [(5,), (), (1, 2, 3)])
def test_input_ids_of_another_rank(shape):
    with pytest.raises(ValueError, match=r"\(batch, length\)"):
        lively()(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("wrong", [200, -1, 10**6])
def test_token_id_outside_the_vocabulary(wrong):
    model = lively()
    cache = model.make_cache(1, 8)
    with pytest.raises(ValueError, match=f"0 … 199.*{wrong}"):
        model(torch.tensor([[3, wrong]]), cache=cache)
    assert cache.length == 0


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def folder(tmp_path):
    lively().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder, **changes):
    """Change keys of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def test_round_trip(folder):
    again = Qwen.from_pretrained(folder)
    assert again.config == SMALL
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(token_ids()), lively()(token_ids()))
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_untied_round_trip_and_half_the_bytes_in_bfloat16(tmp_path):
    model = lively(dataclasses.replace(SMALL, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(Qwen.from_pretrained(tmp_path / "full").lm_head.weight, model.lm_head.weight)
    half = Qwen.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Qwen.from_pretrained(tmp_path / "half").lm_head.weight.dtype == torch.float32
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert 0.5 <= sizes[0] / sizes[1] < 0.52


def test_loaded_model_trains_and_saves_again(folder, tmp_path):
    model = Qwen.from_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(token_ids())[:, :-1].square().mean().backward()
    optimizer.step()
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)
    assert torch.equal(Qwen.from_pretrained(folder).lm_head.weight, model.lm_head.weight)


def test_saving_over_shards_wins(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    save_file({n: state[n] for n in names[:10]}, folder / "a.safetensors")
    save_file({n: state[n] for n in names[10:]}, folder / "b.safetensors")
    weight_map = {n: "a.safetensors" if i < 10 else "b.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert torch.equal(Qwen.from_pretrained(folder)(token_ids()), lively()(token_ids()))
    newer = lively(seed=5)
    newer.save_pretrained(folder)
    assert torch.equal(Qwen.from_pretrained(folder)(token_ids()), newer(token_ids()))


def test_tied_file_that_stores_the_alias(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    again = Qwen.from_pretrained(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_missing_folder_or_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Qwen.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Qwen.from_pretrained(tmp_path)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        Qwen.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model_type": "qwen2"', b"[1, 2]", b"null", b"\xff\xfe\x00"]
)
def test_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        Qwen.from_pretrained(folder)


def test_damaged_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="index.json is damaged"):
        Qwen.from_pretrained(folder)
    for content in (
        "{}",
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": 3}}',
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="index.json is damaged"):
            Qwen.from_pretrained(folder)


def test_truncated_weights_anywhere(folder):
    whole = (folder / "model.safetensors").read_bytes()
    rng = random.Random(0)
    for cut in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            Qwen.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    Qwen.from_pretrained(folder)


def test_foreign_checkpoint(folder):
    rewrite(folder, model_type="llama")
    with pytest.raises(ValueError, match="llama"):
        Qwen.from_pretrained(folder)
    rewrite(folder, model_type=None)
    with pytest.raises(ValueError, match="not a Qwen2 checkpoint"):
        Qwen.from_pretrained(folder)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads", "num_key_value_heads"])  # fmt: skip
def test_config_that_lacks_a_size(folder, key):
    rewrite(folder, **{key: None, "head_dim": None})
    with pytest.raises(ValueError, match=f"lacks.*{key}"):
        Qwen.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"vocab_size": 201}, {"num_hidden_layers": 4},
                                    {"num_hidden_layers": 2}, {"num_key_value_heads": 4},
                                    {"intermediate_size": 97}, {"tie_word_embeddings": False}])  # fmt: skip
def test_shapes_that_do_not_fit_the_config(folder, change):
    rewrite(folder, **change)
    with pytest.raises(ValueError, match="does not fit its config.json: tensor .* expected"):
        Qwen.from_pretrained(folder)


def test_missing_and_surplus_tensors(folder):
    state = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.self_attn.q_proj.bias", "model.embed_tokens.weight"):
        save_file({n: t for n, t in state.items() if n != name}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} is missing, expected"):
            Qwen.from_pretrained(folder)
    save_file(state | {"model.layers.0.extra": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="model.layers.0.extra is \\(3,\\), expected no such tensor"
    ):
        Qwen.from_pretrained(folder)


@pytest.mark.parametrize("change", [
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
])  # fmt: skip
def test_scaled_rope_is_refused(folder, change):
    rewrite(folder, **change)
    with pytest.raises(ValueError, match="scaled RoPE"):
        Qwen.from_pretrained(folder)


FORMS = {  # what other writers make of a folder -> how its logits compare with transformers', or the refusal
    "a tied head that is stored": (
        lambda state: {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
        {},
        None,
    ),
    "a head of its own": (
        lambda state: {"lm_head.weight": state["model.embed_tokens.weight"] * 0.5},
        {},
        "own.*tied",
    ),
    "old buffers": (
        lambda state: {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        {},
        None,
    ),
    "keys that say nothing": (
        lambda state: {},
        {"use_cache": True, "sliding_window": 4096, "torch_dtype": "float16"},
        None,
    ),
    "all layers look at all": (lambda state: {}, {"layer_types": ["full_attention"] * 3}, None),
    "a layer with a window": (
        lambda state: {},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "sliding window",
    ),
    "dual chunks": (
        lambda state: {},
        {"dual_chunk_attention_config": {"chunk_size": 8}},
        "dual chunk attention: remove",
    ),
    "quantised": (lambda state: {}, {"quantization_config": {"quant_method": "awq"}}, "quantised"),
    "a key of another model": (
        lambda state: {},
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping, which Qwen2.5",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_gives_the_logits_of_transformers_or_is_refused(folder, form):
    """Never silently other numbers."""
    added, change, refusal = FORMS[form]
    state = load_file(folder / "model.safetensors")
    save_file(state | added(state), folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(folder, **change)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            Qwen.from_pretrained(folder)
        return
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = theirs(token_ids()).logits, Qwen.from_pretrained(folder).eval()(token_ids())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("value", ["x", [], None, -1, 0, 1e400, 10**30, True, {}])
@pytest.mark.parametrize(
    "key",
    "hidden_size num_hidden_layers num_attention_heads head_dim rope_theta rms_norm_eps vocab_size "
    "tie_word_embeddings layer_types rope_parameters".split(),
)
def test_no_value_of_a_config_ends_in_a_traceback(folder, key, value):
    """A config that loads, or one sentence."""
    rewrite(folder, **{key: value})
    try:
        config = read_config(folder)
    except ValueError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
    else:
        assert config.num_hidden_layers <= 1000 and 0 < config.rope_theta < float("inf")


@pytest.mark.parametrize("damage", [torch.int8, torch.bool, float("nan"), float("inf")])
def test_weights_are_finite_floating_point_numbers(folder, damage):
    state = load_file(folder / "model.safetensors")
    norm = state["model.norm.weight"]
    state["model.norm.weight"] = (
        norm.to(damage) if isinstance(damage, torch.dtype) else torch.full_like(norm, damage)
    )
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="model.norm.weight (is of .*floating-point|holds numbers that are not finite)",
    ):
        Qwen.from_pretrained(folder)


def test_other_architectures_are_refused(folder):
    for change in ({"use_sliding_window": True}, {"hidden_act": "gelu"}):
        shutil.copytree(folder, folder.with_name("other"), dirs_exist_ok=True)
        rewrite(folder.with_name("other"), **change)
        with pytest.raises(ValueError, match="sliding window or an activation"):
            Qwen.from_pretrained(folder.with_name("other"))


def test_both_dialects_of_the_rope_keys(folder):
    cases = [
        ({"rope_theta": 5e5, "rope_parameters": None}, 5e5),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}, 2e6),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}, 2e6),
        (
            {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": {"rope_type": "default"}},
            5e5,
        ),
        ({"rope_theta": None, "rope_parameters": None}, 10_000.0),
    ]
    for change, expected in cases:
        rewrite(folder, rope_scaling=None)
        rewrite(folder, **change)
        assert read_config(folder).rope_theta == expected
        try:
            from transformers import Qwen2Config
        except ImportError:
            continue
        assert Qwen2Config.from_pretrained(folder).rope_parameters["rope_theta"] == expected


def test_the_published_config_of_the_smallest_model():
    published = {  # the dialect of the published files, before transformers 5
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    assert ModelConfig.from_dict(published) == QWEN2_5["0.5B"]


@pytest.mark.parametrize("config", [*QWEN2_5.values(), SMALL])
def test_config_survives_its_own_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("crash_at", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_crash_while_saving_keeps_the_old_checkpoint(folder, monkeypatch, crash_at, moment):
    old, newer = Qwen.from_pretrained(folder), lively(seed=5)
    real = {"fsync": artifacts.os.fsync, "replace": artifacts.os.replace}
    writing = []
    original_write = artifacts.write_file

    def write(path, content):
        writing.append(path.name)
        return original_write(path, content)

    def crash(*arguments):
        if writing and writing[-1] == crash_at:
            raise OSError(28, "No space left on device")
        return real[moment](*arguments)

    monkeypatch.setattr(artifacts, "write_file", write)
    monkeypatch.setattr(artifacts.os, moment, crash)
    with pytest.raises((OSError, course.ArtifactError)):
        newer.save_pretrained(folder)
    monkeypatch.undo()
    expected = old if crash_at == "model.safetensors" else newer
    assert torch.equal(Qwen.from_pretrained(folder)(token_ids()), expected(token_ids()))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_stage_appears_whole_or_not_at_all(runs_folder):
    with artifacts.write_stage("quick", "base") as folder:
        lively().save_pretrained(folder)
    with (
        pytest.raises(RuntimeError, match="crash"),
        artifacts.write_stage("quick", "base") as folder,
    ):
        lively(seed=5).save_pretrained(folder)
        raise RuntimeError("crash")
    found = Qwen.from_pretrained(artifacts.find("quick", "base"))
    assert torch.equal(found(token_ids()), lively()(token_ids()))
