"""GGUF files written with the library `gguf`: metadata, a byte-level BPE tokenizer, tensors."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CourseError
from .folders import read_json
from .smollm2 import CONFIG_KEYS, import_gguf
from .tokenizer_files import CHAT_TEMPLATE

if TYPE_CHECKING:
    import torch

    from ..model import ModelConfig
    from ..tokenizer import Tokenizer

MOE_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
TYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def metadata_of(config: "ModelConfig") -> dict[str, int | float]:
    """Key → value of the architecture; ValueError for a model that llama.cpp would compute differently."""
    from ..moe import MoeConfig

    keys = {field: key.removeprefix("llama.") for field, key in CONFIG_KEYS.items()}
    del keys["vocab_size"]  # the list of tokens says it
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            "llama.cpp's Qwen2 has heads that share the hidden size evenly: "
            f"{config.num_attention_heads} of {config.head_dim} are not {config.hidden_size}"
        )
    if experts := isinstance(config, MoeConfig):
        sparse = all(map(config.is_sparse, range(config.num_hidden_layers)))
        if config.norm_topk_prob or not (sparse and config.shared_expert_intermediate_size):
            raise ValueError(
                "llama.cpp's qwen2moe has experts and a shared expert in every layer and does not normalise the "
                "experts' weights: a model that is built otherwise cannot be exported"
            )
        keys |= MOE_KEYS
    values = {key: getattr(config, field) for field, key in keys.items()}
    for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        values[key] = float(values[key])  # an int would be stored as one, and refused
    values |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
    return {f"qwen2{'moe' * experts}.{key}": value for key, value in values.items()}


def write(
    path: str | Path,
    metadata: Mapping[str, int | float],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    dtype: "torch.dtype",
    tokenizer: "Tokenizer",
    rows: int,
    end: int,
) -> Path:
    """Write the file, whole or not at all; the path.

    metadata: keys begin with the architecture; tensors: float32, matrices are stored in `dtype`, vectors and routers in
    float32; rows: of the embedding; end: the id that ends an answer. ValueError for another dtype, CourseError without
    the library gguf or if the disk refuses.
    """
    gguf, path = import_gguf(), Path(path)
    if str(dtype) not in TYPES:
        raise ValueError(f"a GGUF file is written in float32, float16 or bfloat16, not {dtype}")
    aside, kinds = path.with_name(f".{path.name}.part"), gguf.GGMLQuantizationType
    try:
        architecture = next(iter(metadata)).partition(".")[0]
        with contextlib.closing(gguf.GGUFWriter(aside, architecture)) as writer:
            for key, value in metadata.items():
                (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
            _add_tokenizer(writer, tokenizer, rows, end)
            for name, tensor in tensors:
                wide = tensor.ndim == 1 or "ffn_gate_inp" in name
                kind = kinds.F32 if wide else kinds[TYPES[str(dtype)]]
                data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
                writer.add_tensor(name, data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return aside.replace(path)
    except OSError as error:
        raise CourseError(f"{path} could not be written: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)


def tokens_of(tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens in GPT-2's byte characters, their types, and merges; rows of the embedding that no token has are padding."""
    from ..tokenizer import BYTE_CHARS, BYTE_ORDER

    kind, char = import_gguf().TokenType, dict(zip(BYTE_ORDER, BYTE_CHARS, strict=True))
    spelled = lambda i: "".join(char[byte] for byte in tokenizer.token_bytes(i))
    control = list(tokenizer.control_tokens)
    regular = tokenizer.vocab_size - len(control)
    padding = [f"[PAD{i}]" for i in range(tokenizer.vocab_size, size)]
    types = [kind.NORMAL] * regular
    types += [kind.CONTROL if t in tokenizer.special_tokens else kind.USER_DEFINED for t in control]
    types += [kind.UNUSED] * len(padding)
    merges = [f"{spelled(left)} {spelled(right)}" for left, right in tokenizer.merges]
    return [*map(spelled, range(regular)), *control, *padding], [int(t) for t in types], merges


def end_of_answer(folder: str | Path, tokenizer) -> int:
    """The first eos_token_id of a folder's generation_config.json, else that of <|endoftext|>."""
    path = Path(folder) / "generation_config.json"
    told = read_json(path).get("eos_token_id") if path.is_file() else None
    told = told[0] if isinstance(told, list) and told else told
    return told if isinstance(told, int) else tokenizer.endoftext_id


def _add_tokenizer(writer, tokenizer: "Tokenizer", size: int, end: int) -> None:
    tokens, types, merges = tokens_of(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.control_tokens[tokenizer.pad_token])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
