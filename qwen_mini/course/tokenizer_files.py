"""A byte-level BPE tokenizer's files in Hugging Face's layout: tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Tokenizer, normalizers, processors

from .artifacts import write_file
from .errors import CourseError

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""ChatML as a Jinja template, with the names of three constants of the tokenizer's in it."""

REQUIRED = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}

Text = TypeVar("Text", str, bytes)


class TokenizerError(CourseError):
    """A folder that holds no tokenizer of this kind; one sentence says why."""


def spelled(alphabet: Sequence[Text], merges: Sequence[tuple[int, int]]) -> list[Text]:
    """What every id stands for: the 256 of the alphabet, then a token for every merge (left id, right id)."""
    tokens = list(alphabet)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def write(
    folder: str | Path, backend: Tokenizer, special: Mapping[str, bool], settings: Mapping
) -> None:
    """Write both files. backend: the regular tokens; special: control token, in the order of their ids -> whether
    decoding may leave it out; settings: the keys of tokenizer_config.json that differ from one tokenizer to another."""
    first, folder = backend.get_vocab_size(), Path(folder)
    facts = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = enumerate(special.items(), first)
    added = {str(i): {"content": token, **facts, "special": s} for i, (token, s) in tokens}
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    config["added_tokens_decoder"] = added
    config["additional_special_tokens"] = [t for t in list(special)[1:] if special[t]]
    config |= {"bos_token": None, "chat_template": settings["chat_template"]}
    config |= {"clean_up_tokenization_spaces": False, "eos_token": settings["eos_token"]}
    config |= {"errors": "replace", "pad_token": settings["pad_token"]}
    config |= {"split_special_tokens": False, "unk_token": None}
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    for token, is_special in special.items():
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([AddedToken(token, special=is_special, normalized=False)])
    write_file(folder / "tokenizer.json", backend.to_str(pretty=False) + "\n")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_file(folder / "tokenizer_config.json", text + "\n")


def read(
    folder: str | Path, byte_chars: Sequence[str], pattern: str
) -> tuple[list[tuple[int, int]], list[str]]:
    """Merges as pairs of ids and the control tokens in the order of their ids; `TokenizerError` for another kind.

    byte_chars: the characters of the ids 0 to 255; pattern: how text must be cut into pieces.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        cut = "it may have been cut off while written"
        raise TokenizerError(f"{path} is not complete JSON: {cut}") from None
    try:
        vocabulary, pairs = data["model"]["vocab"], data["model"]["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
        ids = {token["content"]: token["id"] for token in data["added_tokens"]}
        control = sorted(ids, key=ids.get)
        merges = [(vocabulary[left], vocabulary[right]) for left, right in pairs]
        names = spelled(byte_chars, merges)
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        regular = {name: i for name, i in vocabulary.items() if name not in ids}
        behind = {token: i for i, token in enumerate(control, len(names))}
        same = ids == behind and regular == {name: i for i, name in enumerate(names)}
        same = same and set(control) >= REQUIRED and all(isinstance(t, str) for t in control)
        same = same and {"Regex": pattern} in [step.get("pattern") for step in steps]
        same = same and data["normalizer"] == {"type": "NFC"}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        same = False
    if not same:
        wanted = "byte-level BPE with Qwen2.5's rules"
        raise TokenizerError(f"{path} holds another kind of tokenizer than {wanted}")
    return merges, control
