"""Wordings of conversations: system prompts, questions and answers that are filled from what a document explains."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a patient teacher.",
    "You are a dictionary and an encyclopedia.",
    "Answer in the language of the question.",
    "Think step by step.",
    "Be brief.",
    "",
    None,  # none given: the template puts its default there
)
# domain -> (weight, [(question, answer)]); {0} is the key of a record, {1} its explanation
CHAT_FORMS: dict[str, tuple[float, list[tuple[str, str]]]] = {
    "glosses": (0.2, [
        ("What does {0} mean?", "{0} means: {1}."), ("Define {0}.", "{0}: {1}."),
        ("What is the meaning of {0}?", "{1}."),
    ]),
    "wiki_en": (0.15, [
        ("Tell me about {0}.", "{1}"), ("What do you know about {0}?", "{1}"), ("{0}?", "{1}"),
    ]),
    "wiki_fr": (0.08, [("Parle-moi de {0}.", "{1}"), ("Que sais-tu de {0} ?", "{1}")]),
    "wiki_es": (0.08, [("Háblame de {0}.", "{1}"), ("¿Qué sabes de {0}?", "{1}")]),
    "chinese_english": (0.1, [
        ("Translate into English: {0}", "{1}"), ("把这句话翻译成英文：{0}", "{1}"),
        ("Translate into Chinese: {1}", "{0}"), ("用中文怎么说：{1}", "{0}"),
    ]),
    "python": (0.04, [("Explain {0} in Python.", "{1}"), ("What about {0} in Python?", "{1}")]),
}  # fmt: skip
TASK_REPLIES = (
    "{1}\nThe answer is {2}.",
    "{1}\nSo the answer is {2}.",
    "Step by step:\n{1}\nAnswer: {2}",
)
