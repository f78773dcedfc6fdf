"""`qwen-mini chat`: a conversation in the terminal, or a completion when the model has only been pre-trained."""

from . import artifacts
from .errors import CourseError
from .scales import load_scale

INSTRUCTED = ("grpo", "dpo", "sft")  # newest first
BASE = ("long_context", "pretraining")


def newest_stage(scale_name: str) -> str:
    """The last stage of the pipeline whose model exists: in the scale's own runs, else among the shipped ones."""
    for exists in (artifacts.made, artifacts.has):
        for stage in (*INSTRUCTED, *BASE):
            if exists(scale_name, stage):
                return stage
    raise artifacts.MissingStage(f"no model has been trained yet: make one with `qwen-mini run --scale {scale_name}`")


class Talker:
    """A model, its tokenizer and the conversation so far."""

    def __init__(self, scale: str, stage: str | None, seed: int, temperature: float, max_tokens: int):
        import torch

        from qwen_mini.model import Qwen
        from qwen_mini.tokenizer import Tokenizer

        name = load_scale(scale).name
        self.stage = stage or newest_stage(name)
        folder = artifacts.find(name, self.stage)
        if not (folder / "config.json").exists():
            raise CourseError(f"the stage {self.stage!r} holds no model: {folder}")
        try:
            self.model, self.tokenizer = Qwen.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CourseError(f"the model of stage {self.stage!r} cannot be loaded: {error}") from error
        self.generator = torch.Generator().manual_seed(seed)
        self.temperature = temperature
        self.max_tokens = min(max_tokens, self.model.config.max_position_embeddings // 2)
        self.instructed = self.stage in INSTRUCTED
        self.messages: list[dict] = []

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation with `text` added; the oldest turns are left out when it grows too long."""
        room = self.model.config.max_position_embeddings - self.max_tokens
        if not self.instructed:
            return self.tokenizer.encode(text)[-room:]
        self.messages.append({"role": "user", "content": text})
        while True:
            ids = self.tokenizer.encode_chat(self.messages, add_generation_prompt=True)
            if len(ids) <= room:
                return ids
            first = int(self.messages[0]["role"] == "system")  # the system prompt stays
            if len(self.messages) == first + 1:
                self.messages.pop()
                raise CourseError(f"that is longer than the {room} tokens this model can read")
            del self.messages[first : first + 2]

    def answer(self, text: str) -> str:
        """What the model says next."""
        from qwen_mini.generation import generate

        ids = self.prompt(text)
        stops = [self.tokenizer.endoftext_id, self.tokenizer.im_end_id]
        settings = {"temperature": self.temperature, "vocab_size": self.tokenizer.vocab_size}
        done = generate(self.model, [ids], self.max_tokens, stop_ids=stops, generator=self.generator, **settings)[0]
        said = self.tokenizer.decode(done.tokens, skip_special_tokens=True)
        if self.instructed:
            self.messages.append({"role": "assistant", "content": said})
        return said


def talk(scale: str, stage: str | None, seed: int, temperature: float, max_tokens: int) -> int:
    """Read lines until an empty one or the end of the input, and answer each."""
    talker = Talker(scale, stage, seed, temperature, max_tokens)
    what = "answers" if talker.instructed else "was only pre-trained: it completes what you type"
    print(f"the model of stage {talker.stage} {what}; an empty line ends it")
    while text := _ask():
        try:
            said = talker.answer(text)
        except (CourseError, ValueError) as error:
            print(f"({error})")
            continue
        print(said if talker.instructed else text + said)
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def chat_widget(scale: str, stage: str | None = None, seed: int = 0, temperature: float = 0.0, max_tokens: int = 128):
    """The same conversation in a notebook, an ipywidgets box: a line to type in, and above it what has been said."""
    import html

    import ipywidgets

    talker = Talker(scale, stage, seed, temperature, max_tokens)
    said = ipywidgets.HTML(value=f"<i>the model of stage {talker.stage}; type a problem and press Enter</i>")
    wide = ipywidgets.Layout(width="90%")
    line = ipywidgets.Text(placeholder="Reverse: lamp tree stone", continuous_update=False, layout=wide)

    def answer(_):
        text = line.value.strip()
        if not text:
            return
        try:
            reply = talker.answer(text)
        except (CourseError, ValueError) as error:
            reply = f"({error})"
        # what was typed and what the model wrote is text, never markup
        turns = [f"<b>{who}</b> {html.escape(what)}" for who, what in (("you", text), (talker.stage, reply))]
        said.value += "<br>" + "<br>".join(turn.replace("\n", "<br>") for turn in turns)
        line.value = ""

    line.observe(answer, "value")
    return ipywidgets.VBox([said, line])
