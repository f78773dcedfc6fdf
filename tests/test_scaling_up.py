"""Chapter 22: sharded training against one process, resharding, memory, balance, folders, GGUF files, bad input."""

import dataclasses
import json
import math
import runpy
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import small_config, tiny_model
from tiny import exercises, passes, refuses

from qwen_mini import course, scaling_up
from qwen_mini.course import CourseError, gguf_files, home, stages
from qwen_mini.course.launch import on_ranks, torchrun
from qwen_mini.course.nb import Notebook
from qwen_mini.course.plan import GPUS, peak_flops, plan
from qwen_mini.course.ranks import world
from qwen_mini.generation import generate
from qwen_mini.kernels.sharding import shard
from qwen_mini.model import QWEN2_5, ModelConfig, Qwen, count_parameters
from qwen_mini.moe import QWEN_MOE, MoeConfig, QwenMoe, expert_load, load_balancing_loss
from qwen_mini.scaling_up import (
    FlatShard,
    export_gguf,
    gguf_tensors,
    global_expert_load,
    has_state,
    load_model,
    load_sharded,
    memory_per_rank,
    rows_of,
    save_sharded,
    shard_by_hand,
    train_distributed,
    training_plan,
)
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.training import Trainer, training_tensors

SHAPE = small_config(vocab_size=300)
EXPERTS = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)
UNTIED = dataclasses.replace(SHAPE, tie_word_embeddings=False)
MOE = MoeConfig(**dataclasses.asdict(SHAPE), **EXPERTS)
ROWS = torch.randint(300, (30, 17), generator=torch.Generator().manual_seed(0))
BATCH = rows_of(ROWS, 6)
STEPS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def made(config=SHAPE):
    torch.manual_seed(0)
    return (QwenMoe if isinstance(config, MoeConfig) else Qwen)(config)


def settings(**changes):
    plain = {"grad_accumulation": 1, "warmup_steps": 1, "optimizer": "adamw"} | changes
    return dataclasses.replace(course.load_scale("quick").pretraining, **plain)


def run(config=SHAPE, folder=None, stop=None, **changes):
    """The losses and gradient norms of a run."""
    how = (made(config), BATCH, settings(**changes), STEPS, stop, folder)
    return [(r["loss"], r["grad_norm"]) for r in train_distributed(*how)]


def close(found, expected, rel=1e-5):
    assert [x for pair in found for x in pair] == pytest.approx(
        [x for pair in expected for x in pair], rel=rel
    )


# ---------------------------------------------------------------- groups of processes
def test_every_rank_answers_in_order():
    assert on_ranks(world, 3) == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match="at least one rank, got 0"):
        on_ranks(world, 0)


def fail_on_one():
    if dist.get_rank():
        raise KeyError("no good")
    dist.barrier()


def test_the_error_of_the_rank_that_failed_is_raised_not_that_of_those_that_waited():
    with pytest.raises(RuntimeError, match="no good"):
        on_ranks(fail_on_one, 2)


def test_a_rank_that_computes_without_end_meets_the_limit():
    def forever():
        while True:
            pass

    with pytest.raises(CourseError, match="ended"):
        on_ranks(forever, 1, timeout=1)


SCRIPT = """
import sys, time
from qwen_mini.course.launch import join
rank, ranks = join()
if sys.argv[1] == "fail" and rank:
    raise ValueError("no good")
time.sleep(60 * (sys.argv[1] == "sleep"))
sys.stdout.write(f"{rank} {ranks}\\n")  # at once: `print` writes the end of the line apart
"""


@pytest.mark.parametrize(
    "word, timeout, told",
    [("go", 300, None), ("fail", 300, "no good"), ("sleep", 8, "not done after 8 s")],
)
def test_a_script_under_torchrun(word, timeout, told, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    if told is None:
        out = torchrun(script, word, timeout=timeout)
        assert sorted(line for line in out.splitlines() if line) == ["0 2", "1 2"]
    else:
        with pytest.raises(CourseError, match=told):
            torchrun(script, word, timeout=timeout)


# ---------------------------------------------------------------- by hand
def gradients_by_hand(config=SHAPE):
    """Whole gradients of two accumulated steps, the loss of the second, and what is still gathered."""
    model, (rank, ranks) = made(config), world()
    units = shard_by_hand(model)
    for step in range(2):
        batch = BATCH(step, rank, ranks)
        loss = len(batch.input_ids) / 6 * model(batch.input_ids, targets=batch.targets)
        loss.backward()
    whole = []
    for unit in units:
        flat = torch.empty_like(unit.shard).repeat(ranks)
        dist.all_gather_single(flat, unit.shard.grad)
        whole += [g.tolist() for g in flat[: sum(unit.sizes)].split(unit.sizes)]
    loss = loss.detach()
    dist.all_reduce(loss)
    return whole, loss.item(), FlatShard.held


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("config", [SHAPE, UNTIED], ids=["tied", "untied"])
def test_by_hand_gradients_are_those_of_one_process(ranks, config):
    model = made(config)
    for step in range(2):
        batch = BATCH(step)
        loss = model(batch.input_ids, targets=batch.targets)
        loss.backward()
    layers = [p for layer in model.model.layers for p in layer.parameters()]
    inside = set(map(id, layers))
    expected = [*layers, *(p for p in model.parameters() if id(p) not in inside)]
    for whole, found, held in on_ranks(partial(gradients_by_hand, config), ranks):
        assert found == pytest.approx(loss.item(), rel=1e-6) and held == 0
        flat = torch.cat([torch.tensor(g) for g in whole])
        wanted = torch.cat([p.grad.flatten() for p in expected])
        assert (flat - wanted).norm() < 1e-6 * wanted.norm()


# ---------------------------------------------------------------- fully_shard
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_trainer_takes_the_same_steps_on_more_ranks(ranks, optimizer):
    alone = run(optimizer=optimizer)
    for found in on_ranks(partial(run, optimizer=optimizer), ranks):
        close(found, alone, 1e-4)


def test_experts_are_sharded_too():
    alone = run(MOE)
    for found in on_ranks(partial(run, MOE), 2):
        close(found, alone, 1e-4)


def test_outside_a_group_sharding_changes_nothing():
    model = made()
    assert shard(model) is model and type(model.lm_head.weight) is torch.nn.Parameter


# ---------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a state that two ranks left after half of the steps, their losses)."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    return folder, on_ranks(partial(run, SHAPE, folder, STEPS // 2, optimizer="muon"), 2)[0]


@pytest.mark.parametrize("ranks", [0, 1, 2, 3])
def test_a_state_of_two_ranks_goes_on_anywhere(saved, ranks, tmp_path):
    folder, first = saved
    again = partial(run, SHAPE, shutil.copytree(folder, tmp_path / "state"), None, optimizer="muon")
    rest = on_ranks(again, ranks)[0] if ranks else again()
    assert len(first) == len(rest) == STEPS // 2
    close(first + rest, run(optimizer="muon"), 1e-4)


def test_the_restored_tensors_are_those_that_were_saved(tmp_path):
    trainer = Trainer(made(), settings(), STEPS)
    trainer.step(BATCH(0))
    save_sharded(tmp_path / "state", trainer)
    torch.manual_seed(1)
    other = Trainer(Qwen(SHAPE), settings(), STEPS)
    load_sharded(tmp_path / "state", other)
    before, after = training_tensors(trainer), training_tensors(other)
    assert other.step_count == 1 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_sharded(tmp_path / "state", other)  # over an older one
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    (tmp_path / "state").rename(
        tmp_path / ".state.older"
    )  # killed before the new one took its place
    assert has_state(tmp_path / "state")
    load_sharded(tmp_path / "state", Trainer(Qwen(SHAPE), settings(), STEPS))
    assert not has_state(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["missing", "no metadata", "cut", "other pickle", "cut piece"])
def test_a_damaged_state_is_refused(saved, damage, tmp_path):
    folder = tmp_path / "state"
    if damage != "missing":
        shutil.copytree(saved[0], folder)
        path = folder / ".metadata"
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:100])
        if damage == "other pickle":
            path.write_bytes(b"\x80\x04N.")  # None
        if damage == "cut piece":
            path.write_bytes(content)
            piece = next(folder.glob("*.distcp"))
            piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(CourseError, match="no complete state, or it could not be read"):
        load_sharded(folder, Trainer(made(), settings(optimizer="muon"), STEPS))


def test_a_state_with_a_tensor_of_nobody_is_refused(tmp_path):
    trainer = Trainer(made(), settings(), STEPS)
    state = training_tensors(trainer) | {"steps": torch.tensor(0), "exp_avg.nobody": torch.zeros(2)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "state", no_dist=True)
    with pytest.raises(CourseError, match=r"no complete state, .* \(KeyError\)"):
        load_sharded(tmp_path / "state", trainer)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_the_state_of_another_model_is_refused(saved, changes):
    trainer = Trainer(Qwen(dataclasses.replace(SHAPE, **changes)), settings(), STEPS)
    before = [p.detach().clone() for p in trainer.masters]
    with pytest.raises(CourseError, match="state of another model: model.* does not fit"):
        load_sharded(saved[0], trainer)
    assert all(map(torch.equal, before, trainer.masters))


# ---------------------------------------------------------------- memory and plans
def owned():
    trainer = Trainer(shard(made()), settings(), STEPS)
    trainer.forward_backward(BATCH(0, *world()))
    total = sum(p.grad.to_local().nbytes for p in trainer.masters)
    trainer.update()
    return total + sum(x.to_local().nbytes for x in training_tensors(trainer).values() if x.ndim)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_fullest_rank_owns_what_the_formula_says(ranks):
    assert max(on_ranks(owned, ranks)) == memory_per_rank(SHAPE, ranks, width=4)["owned"]


@pytest.mark.parametrize("config", [*QWEN2_5.values(), *QWEN_MOE.values()], ids=[*QWEN2_5, *QWEN_MOE])  # fmt: skip
def test_memory_of_published_models(config):
    from qwen_mini.moe import count_moe_parameters

    count = count_moe_parameters if isinstance(config, MoeConfig) else count_parameters
    alone, many = memory_per_rank(config, 1, width=4), memory_per_rank(config, 64)
    assert memory_per_rank(config, 1)["owned"] == 20 * count(
        config
    )  # 16-bit weights and gradients, too
    assert alone["owned"] == 16 * count(config) and alone["gathered"] == alone["gradients"] == 0
    most = 1.1 if isinstance(config, MoeConfig) else 1.01  # 60 experts on 64 ranks: four have none
    assert alone["owned"] / 64 <= many["owned"] < alone["owned"] / 64 * most
    assert many["gradients"] > many["gathered"] > 0  # they are summed in float32


def test_memory_grows_with_tokens_and_shrinks_by_recomputing():
    sizes = [memory_per_rank(SHAPE, 2, n)["activations"] for n in (0, 10, 20)]
    assert sizes[0] == 0 and sizes[2] == 2 * sizes[1] > 0
    large = QWEN2_5["7B"]
    full, less = (memory_per_rank(large, 2, 100, recompute=r)["activations"] for r in (False, True))
    assert less < full / 3
    with pytest.raises(ValueError, match="at least one rank, got 0"):
        memory_per_rank(SHAPE, 0)


def test_a_plan_is_flops_over_speed():
    found = training_plan(QWEN2_5["0.5B"], 1e12, gpus=10, peak=1e14, utilisation=0.5)
    assert found["days"] * 86_400 == pytest.approx(found["flops"] / 5e14)
    assert found["tokens_per_second"] * found["days"] * 86_400 == pytest.approx(1e12)
    assert found["flops"] / 1e12 == pytest.approx(3.49e9, rel=0.01)  # 3.49 GFLOPs a token at 4,096
    for wrong in ({"gpus": 0}, {"utilisation": 1.1}, {"peak": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            training_plan(QWEN2_5["0.5B"], **({"tokens": 1e9, "gpus": 1} | wrong))


def test_the_plan_of_a_scale_tells_of_sharding():
    rows = dict(plan(course.load_scale("cluster"), 8))
    config = ModelConfig.from_scale(course.load_scale("cluster"))
    found = memory_per_rank(config, 8)
    whole = sum(found[part] for part in ("owned", "gathered", "gradients"))
    told = rows["weights, gradients, optimizer"]
    assert told.startswith(f"{whole / 2**30:.2f} GiB a device ({found['owned'] / 2**30:.2f} owned")
    assert (
        "20 bytes a parameter)"
        in dict(plan(course.load_scale("gpu")))["weights, gradients, optimizer"]
    )


# ---------------------------------------------------------------- balance of experts
def balance(use_global):
    """A rank's loss on its half of the rows of a model with experts, and the gradients of its routers."""
    rank, ranks = world()
    logits = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    logits[:32, :3] += 2.0
    logits[32:, 3:] += 2.0
    logits = logits.chunk(ranks)[rank].clone().requires_grad_()
    load = global_expert_load(logits.topk(2).indices, 6) if use_global else None
    loss = load_balancing_loss(logits, 2, load)
    (loss / ranks).backward()
    return loss.item(), logits.grad.tolist()


def test_the_balance_loss_of_all_ranks_is_that_of_one_process():
    (loss, gradient), own = balance(False), on_ranks(partial(balance, False), 2)
    found = on_ranks(partial(balance, True), 2)
    assert sum(x for x, _ in found) / 2 == pytest.approx(loss, rel=1e-6)
    joined = torch.tensor([row for _, g in found for row in g])
    torch.testing.assert_close(joined, torch.tensor(gradient), rtol=1e-5, atol=1e-7)
    assert sum(x for x, _ in own) / 2 > 1.2 * loss


def test_the_load_of_one_process_is_that_of_chapter_06():
    index = torch.randint(6, (50, 2))
    torch.testing.assert_close(global_expert_load(index, 6), expert_load(index, 6))


# ---------------------------------------------------------------- folders
PUBLISHED = {
    "Qwen2, tied": (SHAPE, {"tie_word_embeddings": True}),
    "Qwen2.5, untied": (SHAPE, {"tie_word_embeddings": False}),
    "Qwen2-MoE": (MOE, {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_as_published_gives_the_greedy_tokens_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(PUBLISHED[name][0], **PUBLISHED[name][1])
    kind = "Qwen2Moe" if isinstance(config, MoeConfig) else "Qwen2"
    values = getattr(transformers, f"{kind}Config")(**config.to_dict())
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(values)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # far from flat distributions
    theirs.bfloat16().save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    prompt = [5, 17, 200, 31]
    model = load_model(tmp_path).eval()
    assert type(model).__name__ == ("QwenMoe" if kind == "Qwen2Moe" else "Qwen")
    found = generate(model, [prompt], max_new_tokens=12)[0].tokens[-12:]
    wanted = theirs.float().generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert found == wanted[0, 4:].tolist()


def test_a_tokenizer_with_three_or_with_more_control_tokens(tmp_path, tokenizer):
    names = list(tokenizer.control_tokens)
    for control in (names[:3], [*names, "<|own|>", "<|other|>"]):
        Tokenizer(tokenizer.merges, control_tokens=control).save_pretrained(tmp_path)
        again = Tokenizer.from_pretrained(tmp_path)
        assert list(again.control_tokens) == control
        assert again.decode(again.encode("def f(x):")) == "def f(x):"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    tiny_model().save_pretrained(path)
    return path


def test_pickled_weights_are_refused_and_not_opened(folder):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "opened",))

    (folder / "model.safetensors").unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\).*convert them"):
        load_model(folder)
    assert not (folder / "opened").exists()


def test_pickled_weights_beside_safetensors_do_no_harm(folder):
    (folder / "optimizer.pt").write_bytes(b"anything")
    assert load_model(folder).config == tiny_model().config


@pytest.mark.parametrize(
    "damage, told",
    [
        ({"model_type": "llama"}, "a model of the kind 'llama'"),
        ({"model_type": None}, "a model of the kind None"),
        ({"intermediate_size": 24}, "does not fit its config.json: tensor .* expected"),
    ],
)
def test_foreign_and_wrongly_shaped_folders_are_refused(folder, damage, told):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=told) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_folder_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_model(folder)


# ---------------------------------------------------------------- GGUF
EVEN = small_config(vocab_size=1_100)
EVEN = dataclasses.replace(EVEN, hidden_size=EVEN.num_attention_heads * EVEN.head_dim)


def exported(folder, tokenizer, model, dtype):
    """A folder with this model, and its GGUF file read back: (reader, tensor by name)."""
    gguf = pytest.importorskip("gguf")
    model.save_pretrained(folder, generation_config={"eos_token_id": [tokenizer.im_end_id, 3]})
    tokenizer.save_pretrained(folder)
    path = export_gguf(folder, folder / "model.gguf", dtype)
    assert not list(folder.glob(".*.part"))
    reader = gguf.GGUFReader(path)
    dequantize = gguf.quants.dequantize
    return reader, {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def moe_model(**changes):
    config = MoeConfig(**dataclasses.asdict(dataclasses.replace(EVEN, **changes)) | EXPERTS)
    return made(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "untied", "moe"])
def test_a_gguf_file_holds_the_model(kind, dtype, tmp_path, tokenizer):
    dense = dataclasses.replace(EVEN, tie_word_embeddings=kind != "untied")
    model = moe_model() if kind == "moe" else made(dense)
    reader, found = exported(tmp_path, tokenizer, model, dtype)
    arch, c = "qwen2moe" if kind == "moe" else "qwen2", model.config
    value = lambda key: reader.fields[key].contents()
    assert value("general.architecture") == arch
    assert value(f"{arch}.block_count") == c.num_hidden_layers
    assert value(f"{arch}.rope.freq_base") == pytest.approx(c.rope_theta)
    assert value(f"{arch}.attention.key_length") == c.head_dim
    assert value("tokenizer.ggml.eos_token_id") == tokenizer.im_end_id
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == len(value("tokenizer.ggml.token_type")) == 1_100 > tokenizer.vocab_size
    assert tokens[tokenizer.im_end_id] == "<|im_end|>" and tokens[-1] == "[PAD1099]"
    assert len(value("tokenizer.ggml.merges")) == len(tokenizer.merges)
    assert ("output.weight" in found) == (not c.tie_word_embeddings or kind == "moe")
    state = dict(gguf_tensors(model))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        exact = tensor.ndim == 1 or "ffn_gate_inp" in name
        assert torch.equal(found[name], tensor if exact else tensor.to(dtype).float()), name


def test_names_of_gguf_are_those_of_the_library(tmp_path):
    gguf = pytest.importorskip("gguf")
    for model, arch in ((made(EVEN), gguf.MODEL_ARCH.QWEN2), (moe_model(), gguf.MODEL_ARCH.QWEN2MOE)):  # fmt: skip
        blocks = model.config.num_hidden_layers
        known = {
            gguf.TENSOR_NAMES[kind].format(bid=i)
            for kind in gguf.MODEL_TENSORS[arch]
            for i in range(blocks)
        }
        names = {name.rpartition(".")[0] for name, _ in gguf_tensors(model)}
        assert names <= known, names - known


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"shared_expert_intermediate_size": 0},
                                     {"decoder_sparse_step": 2}, {"mlp_only_layers": (0,)}])  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(changes):
    even = dataclasses.replace(MOE, hidden_size=MOE.num_attention_heads * MOE.head_dim)
    assert gguf_files.metadata_of(even)
    with pytest.raises(ValueError, match="cannot be exported"):
        gguf_files.metadata_of(dataclasses.replace(even, **changes))
    with pytest.raises(ValueError, match="share the hidden size evenly"):
        gguf_files.metadata_of(dataclasses.replace(even, hidden_size=16))


def test_numbers_of_the_metadata_have_the_type_that_llama_cpp_reads():
    values = gguf_files.metadata_of(dataclasses.replace(EVEN, rope_theta=1_000_000))
    kinds = {key: type(value) for key, value in values.items()}
    floats = {"qwen2.rope.freq_base", "qwen2.attention.layer_norm_rms_epsilon"}
    assert {key for key, kind in kinds.items() if kind is float} == floats
    assert set(kinds.values()) == {int, float}


def test_bad_gguf_requests_leave_no_file(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "checkpoint"
    made(EVEN).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="not torch.int8"):
        export_gguf(folder, tmp_path / "x.gguf", torch.int8)
    with pytest.raises(CourseError, match="could not be written"):
        export_gguf(folder, tmp_path / "nowhere" / "x.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*part"))


def test_without_an_end_of_answer_it_is_endoftext(tmp_path, tokenizer):
    assert gguf_files.end_of_answer(tmp_path, tokenizer) == tokenizer.endoftext_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert gguf_files.end_of_answer(tmp_path, tokenizer) == 7


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_llama_cpp_gives_the_same_greedy_tokens(kind, tmp_path, tokenizer):
    """Opt-in: `pip install xllamacpp`, llama.cpp as a wheel (llama-cpp-python has to be compiled)."""
    llama = pytest.importorskip("xllamacpp")
    if kind == "dense":
        shutil.copytree(stages.shipped("pretraining"), tmp_path, dirs_exist_ok=True)
    else:
        moe_model(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    text = "def main():\n    "
    model, prompt = load_model(tmp_path).eval(), tokenizer.encode(text)
    wanted = generate(model, [prompt], max_new_tokens=16)[0].tokens[-16:]
    options = llama.CommonParams()
    options.model.path = str(export_gguf(tmp_path, tmp_path / "model.gguf", torch.float32))
    options.n_ctx, options.n_parallel, options.warmup, options.fit_params = 128, 1, False, False
    server = llama.Server(options)
    for asked in (prompt, text):  # its own tokenizer, too
        request = {"prompt": asked, "n_predict": 16, "temperature": 0, "top_k": 1}
        found = server.handle_completions(request | {"repeat_penalty": 1.0, "ignore_eos": True})
        found = json.loads(found) if isinstance(found, str) else found
        assert found["choices"][0]["text"] == tokenizer.decode(wanted)
        assert found["usage"]["prompt_tokens"] == len(prompt)


# ---------------------------------------------------------------- one GPU
def test_the_check_of_a_gpu_on_a_cpu(capsys):
    """Every stage in bfloat16 has the losses of float32; the report is one line of JSON."""
    check = runpy.run_path(str(home() / "benchmarks" / "gpu_check.py"))
    assert check["main"](["--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu" and report["left_out"] == []
    assert {"pretraining", "experts", "sft", "reward_model", "dpo", "grpo"} == set(report["stages"])
    assert all(0 < stage["off"] < 1e-2 for stage in report["stages"].values())
    assert report["speed"]["tokens_per_second"] > 0


def test_a_check_without_time_has_not_succeeded(capsys):
    check = runpy.run_path(str(home() / "benchmarks" / "gpu_check.py"))
    assert check["main"](["--device", "cpu", "--seconds", "0"]) == 1
    assert "pretraining" in json.loads(capsys.readouterr().out)["left_out"]


@pytest.mark.parametrize(
    ("name", "card"),
    [("Tesla T4", "T4"), ("NVIDIA L4", "L4"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100 80GB PCIe", "A100"),
     ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H100 SXM"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
     ("NVIDIA H100 PCIe", None), ("NVIDIA L40S", None), ("NVIDIA GeForce RTX 3090", None),
     ("NVIDIA H200 NVL", None),
     ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX 6000 Ada Generation", None)],
)  # fmt: skip
def test_the_peak_of_a_card_by_its_name(name, card):
    assert peak_flops(name) == (GPUS[card] if card else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_says_that_there_is_no_gpu(capsys):
    check = runpy.run_path(str(home() / "benchmarks" / "gpu_check.py"))
    assert check["main"]([]) == 2 and "--device cpu" in capsys.readouterr().err


# ---------------------------------------------------------------- exercises
BOOK = Notebook(home() / "notebooks" / "22_scaling_up.ipynb")
EXERCISES = exercises(BOOK)
OWN = "own = sum((p**2).sum() for p in pieces)\n"
ALL = "dist.all_reduce(own)\nnorm = own.sqrt().item()\n"
SCALE = "for p in pieces:\n    p.mul_(min(1.0, most / norm))\n"
WRONG = [
    (0, "return parameters * OWNED_BYTES // (gib * 2**30)"),
    (0, "return -(-parameters * 4 // (gib * 2**30))"),
    (0, "return math.ceil(parameters * OWNED_BYTES / (gib * 10**9))"),
    (1, OWN + "norm = own.sqrt().item()\n" + SCALE + "return norm"),
    (1, OWN + "norm = own.sqrt()\ndist.all_reduce(norm)\nnorm = norm.item()\n" + SCALE + "return norm"),
    (1, OWN + ALL + "for p in pieces:\n    p.mul_(most / norm)\nreturn norm"),
    (1, OWN + ALL + SCALE + "return min(norm, most)"),
    (1, OWN + ALL + "pieces = [p * min(1.0, most / norm) for p in pieces]\nreturn norm"),
    (2, "flat = torch.cat(pieces)\nreturn list(F.pad(flat, (0, -len(flat) % ranks)).chunk(ranks))"),
    (2, "return list(torch.cat(pieces)[:size].chunk(ranks))"),
    (2, "return list(torch.cat(pieces)[:size].tensor_split(ranks))"),
    (3, "return (width * 2 * parameters + 4 * parameters) * (ranks - 1) / ranks"),
    (3, "return (width * (2 * parameters - rest) + width * parameters) * (ranks - 1) / ranks"),
    (3, "return (width * (2 * parameters - rest) + 4 * parameters) / ranks"),
    (3, "return width * (2 * parameters - rest) + 4 * parameters"),
]  # fmt: skip


def room() -> dict:
    """What the exercises find defined above them."""
    space = {"math": math, "partial": partial, "on_ranks": on_ranks, "world": world, "dist": dist}
    space |= {"count_parameters": count_parameters, "QWEN2_5": QWEN2_5, "F": F, "torch": torch}
    return space | vars(scaling_up)


def test_there_are_four_exercises():
    assert len(EXERCISES) == 4


@pytest.mark.parametrize("number", range(4))
def test_the_solution_of_an_exercise_passes(number):
    passes(EXERCISES[number], room())


@pytest.mark.parametrize("number, body", WRONG)
def test_a_wrong_answer_is_refused(number, body):
    refuses(EXERCISES[number], body, room())
