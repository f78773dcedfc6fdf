"""Checkpoint folders in Hugging Face's layout: `config.json` and safetensors files, read and checked.

What a file holds is used, or is known to say nothing, or is an error: numbers that are silently others are worse than
a refusal.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .scales import UNKNOWN, Model

# Keys of config.json that change no number of a plain forward pass.
SILENT = frozenset(
    "_name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "finetuning_task hidden_dropout id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id "
    "layer_types max_window_layers num_labels output_attentions output_hidden_states pad_token_id problem_type "
    "return_dict sliding_window task_specific_params tokenizer_class torch_dtype transformers_version unsloth_fixed "
    "unsloth_version use_cache use_return_dict".split()
)
# Keys that are read on their own.
CHECKED = frozenset(
    "model_type rope_parameters rope_scaling hidden_act use_sliding_window quantization_config".split()
)
# Buffers that older trainers store; every loader computes them itself.
SILENT_TENSORS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")

# What a file must say. (A scale that says nothing has defaults, which are no other model's sizes.)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads")
# What transformers takes where a file says nothing.
DEFAULTS = {"max_position_embeddings": 32_768, "rope_theta": 10_000.0, "tie_word_embeddings": False}


def qwen2_values(values: dict) -> dict[str, Any]:
    """The sizes in a `config.json`, of transformers before 5 (`rope_theta`) or since; checked.

    Without any base it is 10,000, as in transformers. A file of another architecture, or one that asks for what `Qwen`
    cannot compute, is a ValueError with one sentence.
    """
    if values.get("model_type") != "qwen2":
        says = f"config.json says model_type {values.get('model_type')!r}, not 'qwen2'"
        raise ValueError(f"not a Qwen2 checkpoint: {says}")
    values = {key: value for key, value in values.items() if value is not None}
    _refuse_more(values)
    if missing := [key for key in SIZES if key not in values]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    known = {field.name for field in dataclasses.fields(Model)}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if "head_dim" not in values and type(heads) is type(width) is int and heads > 0:
        values["head_dim"] = width // heads
    left = {key: value for key, value in values.items() if key not in SILENT | CHECKED}
    told = {key: value for key, value in left.items() if key in known or value}
    try:
        model = TypeAdapter(Model).validate_json(json.dumps(DEFAULTS | told))
    except ValidationError as error:
        raise ValueError(f"config.json {_sentence(error.errors())}") from None
    if (heads := model.num_attention_heads) % (groups := model.num_key_value_heads):
        says = f"must divide the {heads} query heads, got {groups}"
        raise ValueError(f"config.json key 'num_key_value_heads' {says}")
    return dataclasses.asdict(model)


# Keys that Qwen2Moe adds, with what transformers takes where a file says nothing; None: the file must say it.
MOE_KEYS = dict.fromkeys((
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
))  # fmt: skip
MOE_KEYS |= {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": ()}
MOE_KEYS |= {"router_aux_loss_coef": 0.001}


def qwen2_moe_values(values: dict) -> dict[str, Any]:
    """The sizes in a `config.json` of a Qwen2Moe checkpoint: those of `qwen2_values`, and `MOE_KEYS`.

    Whether numbers of experts fit each other says `check_experts`.
    """
    if values.get("model_type") != "qwen2_moe":
        says = f"config.json says model_type {values.get('model_type')!r}, not 'qwen2_moe'"
        raise ValueError(f"not a Qwen2Moe checkpoint: {says}")
    if values.get("qkv_bias", True) is not True:
        unknown = "which Qwen's models do not have"
        raise ValueError(f"config.json asks for attention without biases, {unknown}")
    told = MOE_KEYS | {key: values[key] for key in MOE_KEYS if values.get(key) is not None}
    if missing := [key for key, value in told.items() if value is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if not isinstance(told["mlp_only_layers"], list | tuple):
        raise ValueError("config.json key 'mlp_only_layers' should be a list of layer numbers")
    told["mlp_only_layers"] = tuple(told["mlp_only_layers"])
    other = {*MOE_KEYS, "model_type", "qkv_bias", "output_router_logits"}
    dense = {key: value for key, value in values.items() if key not in other}
    return qwen2_values(dense | {"model_type": "qwen2"}) | told


def check_experts(config) -> None:
    """ValueError for numbers of a config with experts that cannot be, or do not fit each other."""
    ones = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
    for name, low in (dict.fromkeys(ones, 1) | {"shared_expert_intermediate_size": 0}).items():
        if type(value := getattr(config, name)) is not int or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if (k := config.num_experts_per_tok) > (most := config.num_experts):
        raise ValueError(f"num_experts_per_tok must be at most num_experts ({most}), got {k}")
    if wrong := set(config.mlp_only_layers) - set(range(config.num_hidden_layers)):
        raise ValueError(f"mlp_only_layers names {wrong.pop()!r}, which is the number of no layer")


def _refuse_more(values: dict) -> None:
    """ValueError for what other models have, and this one does not."""
    for rope in (values.get("rope_parameters") or {}, values.get("rope_scaling") or {}):
        flat = isinstance(rope, dict) and not any(isinstance(x, dict | list) for x in rope.values())
        kinds = {rope.get(key, "default") for key in ("rope_type", "type")} if flat else set()
        if kinds != {"default"} or set(rope) - {"rope_type", "type", "rope_theta"}:
            remedy = "load the plain checkpoint and choose the scaling as an attention function"
            raise ValueError(f"config.json asks for scaled RoPE: {remedy}")
    if values.get("dual_chunk_attention_config"):
        lengths = "set max_position_embeddings to its original_max_position_embeddings"
        remedy = f"remove that section, {lengths}, and choose the chunks as an attention function"
        raise ValueError(f"config.json asks for dual chunk attention: {remedy}")
    kinds = values.get("layer_types", [])
    slides = not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}
    if values.get("use_sliding_window") or slides or values.get("hidden_act", "silu") != "silu":
        asks = "config.json asks for a sliding window or an activation other than silu"
        raise ValueError(f"{asks}: Qwen2.5 has neither")
    if values.get("quantization_config"):
        remedy = "load the checkpoint in 16 or 32 bits"
        raise ValueError(f"config.json says that the weights are quantised: {remedy}")


def _sentence(problems: list[dict]) -> str:
    unknown = [str(problem["loc"][-1]) for problem in problems if problem["type"] == UNKNOWN]
    if unknown:
        return f"asks for {', '.join(unknown)}, which Qwen2.5 does not have: remove it if it changes no number"
    key, problem = (problems[0]["loc"] or ("",))[-1], problems[0]
    if problem["type"] == "value_error":
        return f"key {key!r} {problem['ctx']['error']}"
    got = str(problem["input"])[:60]
    return f"key {key!r} {problem['msg'].removeprefix('Input ')}, got {got!r}"


def read_config_json(folder: str | Path) -> dict:
    """The `config.json` of a checkpoint folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    return read_json(path)


def read_json(path: Path) -> dict:
    """A JSON object; ValueError if the file is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or not even text
        raise ValueError(f"{path} is damaged: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return values


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, else the shards that `model.safetensors.index.json` names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        pickles = [path.name for kind in ("bin", "pt", "pth") for path in folder.glob(f"*.{kind}")]
        if pickles and not whole.exists():
            raise ValueError(
                f"{folder} holds pickled weights ({min(pickles)}), and opening a pickle can run code: convert them to "
                "safetensors where you trust them"
            )
        return [whole]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is damaged: it names no shard")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            wrong = f"{str(name)[:60]!r} is not the name of a file beside it"
            raise ValueError(f"{index} is damaged: {wrong}")
    return [folder / name for name in sorted(set(places.values()))]


def read_weights(folder: str | Path, dtype) -> dict:
    """All tensors of a checkpoint by name, converted to `dtype`; finite floating-point numbers only.

    FileNotFoundError for a missing file; ValueError for one that is cut, or that holds what no weight can be.
    """
    from safetensors import SafetensorError, safe_open

    folder, state = Path(folder), {}
    for path in weight_files(folder):
        if not path.is_file():
            missing = f"{path.name} is missing"
            raise FileNotFoundError(f"{folder} is not a complete checkpoint: {missing}")
        try:
            with safe_open(path, framework="pt") as file:
                names = [key for key in file.keys() if not key.endswith(SILENT_TENSORS)]
                stored = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            wrong = f"{path} is truncated or no safetensors file ({error})"
            raise ValueError(f"{wrong}: make or download it again") from None
        for key, tensor in stored.items():
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                numbers = f"is of {kind}, but weights are floating-point numbers"
                raise ValueError(f"{path}: tensor {key} {numbers}")
            state[key] = tensor = tensor.to(dtype)
            if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum may overflow
                wrong = "holds numbers that are not finite: the checkpoint is damaged"
                raise ValueError(f"{path}: tensor {key} {wrong}")
    return state


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def split_experts(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Parameters under their names on disk, where every matrix of an expert is a tensor of its own.

    In memory `experts.gate_up_proj` holds those of all experts, gate rows before up rows, and `experts.down_proj` too.
    """
    state = {}
    for name, tensor in named:
        stem, fused, kind = name.partition(".experts.")
        if not fused:
            state[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate", "up"), expert.chunk(2), strict=True))
            for part, weight in parts.items():
                state[f"{stem}.experts.{number}.{part}_proj.weight"] = weight
    return state


def fuse_experts(state: dict[str, Any], count: int) -> dict[str, Any]:
    """The way back, for `count` experts a layer; ValueError names a tensor that is missing or surplus."""
    import torch

    fused, loose = {}, {}
    for name, tensor in state.items():
        if found := EXPERT.fullmatch(name):
            loose.setdefault(found[1], {})[name] = tensor
        else:
            fused[name] = tensor
    for stem, parts in loose.items():
        every, kinds = [f"{stem}.{number}" for number in range(count)], ("gate", "up", "down")
        names = {kind: [f"{one}.{kind}_proj.weight" for one in every] for kind in kinds}
        expected = set().union(*names.values())
        if wrong := sorted(expected ^ parts.keys()):
            state_of = "missing" if wrong[0] in expected else "surplus"
            raise ValueError(f"tensor {wrong[0]} is {state_of}: config.json says {count} experts")
        stacks = {kind: torch.stack([parts[name] for name in names[kind]]) for kind in names}
        fused[f"{stem}.gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], 1)
        fused[f"{stem}.down_proj"] = stacks["down"]
    return fused
