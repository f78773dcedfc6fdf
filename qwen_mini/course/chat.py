"""`qwen-mini chat`: a conversation in the terminal, or a completion when the model has only been pre-trained."""

import sys

from . import artifacts
from .errors import CourseError
from .progress import printable
from .scales import load_scale

INSTRUCTED = ("grpo", "dpo", "sft")  # newest first
BASE = ("long_context", "pretraining")


def newest_stage(scale_name: str) -> str:
    """The last stage of the pipeline whose model exists: in the scale's own runs, else among the shipped ones."""
    for exists in (artifacts.made, artifacts.has):
        for stage in (*INSTRUCTED, *BASE):
            if exists(scale_name, stage):
                return stage
    make = f"make one with `qwen-mini run --scale {scale_name}`"
    raise artifacts.MissingStage(f"no model has been trained yet: {make}")


class Talker:
    """A model, its tokenizer and the conversation so far."""

    def __init__(
        self, scale: str, stage: str | None, seed: int, temperature: float, max_tokens: int
    ):
        import torch

        from qwen_mini.generation import Sampling
        from qwen_mini.model import Qwen
        from qwen_mini.tokenizer import Tokenizer

        if max_tokens < 1:
            least = "an answer needs at least 1 token"
            raise CourseError(f"{least}, got {max_tokens}: raise --max-tokens")
        try:
            Sampling(temperature=temperature)
        except ValueError as error:
            raise CourseError(str(error)) from error
        config = load_scale(scale)
        name = config.name
        self.stage = stage or newest_stage(name)
        folder = artifacts.find(name, self.stage, config.digest)
        if not (folder / "config.json").exists():
            raise CourseError(f"the stage {self.stage!r} holds no model: {folder}")
        try:
            self.model = Qwen.from_pretrained(folder).eval()
            self.tokenizer = Tokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            what = f"the model of stage {self.stage!r}"
            raise CourseError(f"{what} cannot be loaded: {error}") from error
        self.generator = torch.Generator().manual_seed(seed)
        self.temperature = temperature
        self.max_tokens = min(max_tokens, self.model.config.max_position_embeddings // 2)
        self.instructed = self.stage in INSTRUCTED
        self.messages: list[dict] = []

    def prompt(self, text: str) -> tuple[list[int], list[dict]]:
        """Token ids of the conversation with `text` added, and its messages; the oldest turns go when it is too long.

        `self.messages` stays as it is: a line that cannot be answered must leave no trace.
        """
        room = self.model.config.max_position_embeddings - self.max_tokens
        if not self.instructed:
            return self.tokenizer.encode(text)[-room:], []
        messages = [*self.messages, {"role": "user", "content": text}]
        first = int(messages[0]["role"] == "system")  # the system prompt stays
        while True:
            ids = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
            if len(ids) <= room:
                return ids, messages
            if len(messages) == first + 1:
                raise CourseError(f"that is longer than the {room} tokens this model can read")
            del messages[first : first + 2]

    def answer(self, text: str) -> str:
        """What the model says next; whatever fails leaves conversation and random numbers as they were."""
        from qwen_mini.generation import generate

        ids, messages = self.prompt(text)
        settings = {"temperature": self.temperature, "vocab_size": self.tokenizer.vocab_size}
        settings["stop_ids"] = [self.tokenizer.endoftext_id, self.tokenizer.im_end_id]
        settings["generator"] = self.generator
        drawn = self.generator.get_state()
        try:
            [done] = generate(self.model, [ids], self.max_tokens, **settings)
            said = self.tokenizer.decode(done.tokens, skip_special_tokens=True)
        except BaseException:  # Ctrl-C as well
            self.generator.set_state(drawn)
            raise
        if self.instructed:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        return said


def talk(scale: str, stage: str | None, seed: int, temperature: float, max_tokens: int) -> int:
    """Read lines until an empty one or the end of the input, and answer each."""
    # what the terminal cannot spell is refused or shown as ?, never a crash
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    talker = Talker(scale, stage, seed, temperature, max_tokens)
    what = "answers" if talker.instructed else "was only pre-trained: it completes what you type"
    print(f"the model of stage {talker.stage} {what}; an empty line ends it")
    while text := _ask():
        try:
            said = talker.answer(text)
        except (CourseError, ValueError) as error:
            print(printable(f"({error})"))
            continue
        print(printable(said if talker.instructed else text + said))
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, OSError, RuntimeError):  # closed, or lost, by whoever held the other end
        return ""


def chat_widget(scale: str, stage: str | None = None, seed: int = 0, max_tokens: int = 128):
    """The same conversation in a notebook, an ipywidgets box: a line to type in, and above it what has been said."""
    import html

    import ipywidgets

    talker = Talker(scale, stage, seed, 0.0, max_tokens)
    what = f"the model of stage {talker.stage}; type a problem and press Enter"
    said = ipywidgets.HTML(value=f"<i>{what}</i>")
    look = {"placeholder": "Reverse: lamp tree stone", "layout": ipywidgets.Layout(width="90%")}
    line = ipywidgets.Text(continuous_update=False, **look)

    def answer(_):
        text = line.value.strip()
        if not text:
            return
        try:
            reply = talker.answer(text)
        except (CourseError, ValueError) as error:
            reply, text = f"({error})", text.encode("utf-8", "replace").decode()  # for the browser
        # what was typed and what the model wrote is text, never markup
        pair = (("you", text), (talker.stage, reply))
        turns = [f"<b>{who}</b> {html.escape(what)}" for who, what in pair]
        said.value += "<br>" + "<br>".join(turn.replace("\n", "<br>") for turn in turns)
        line.value = ""

    line.observe(answer, "value")
    return ipywidgets.VBox([said, line])
