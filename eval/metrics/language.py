"""In which language is a text?  The writing system of most letters, and among Latin letters a count of little words.

Tells languages of Latin script apart that have a list here, where their little words are many and clearly the most.  A text that is too
short for that counts with the commonest of these languages among the texts beside it.  Anything else is called by its script.  Russian and Ukrainian, or Hindi and Marathi, are not told apart.  Good enough to see that a model is worse
on one language than on another; no identification of a single short text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

LATIN = "Latin"
UNTOLD = "Latin script"
LEAST = 3  # little words that a text must hold
CLEARLY = 1.5  # times as many as of the next language

# Names of scripts whose characters are called otherwise, and those that are written together.
_SCRIPTS = {"CJK": "Chinese characters", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
_LITTLE_WORDS = {
    "English": "the and of to is are was that you for with this have it my your what how can be from they i would about by which",
    "German": "der die das und ist nicht ein eine ich zu mit auf für sie wie auch sich von dem den im es kann ihr werden oder bei",
    "French": "le la les des et est une vous que pour dans pas je qui sur avec du ce il au sont plus ne mais nous votre aux un",
    "Spanish": "el la los las que y es una por para con no del se como su lo al más pero un sus en le mi o está son",
    "Portuguese": "o os as não que uma para com é do da em um você mais por se dos ao como mas seu sua na no são",
    "Italian": "il che di è una per non sono con gli della del un più le si nel alla come la ma da i lo dei anche",
    "Dutch": "de het een en van ik niet dat je op voor met zijn is te die aan ook er maar om hoe wat kan naar uit",
}
_LISTS = {name: frozenset(words.split()) for name, words in _LITTLE_WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")


def languages(texts: Sequence[str]) -> list[str]:
    """The language of each text of one data set."""
    found = [language(text) for text in texts]
    told = Counter(name for name in found if name in _LISTS)
    commonest = max(told, key=lambda name: (told[name], name), default=UNTOLD)
    return [commonest if name == UNTOLD else name for name in found]


def language(text: str) -> str:
    """The language, as far as it can be told; else the name of the script, or `no letters`."""
    found = script(text)
    if found != LATIN:
        return found
    words = Counter(_WORD.findall(text.lower()))
    hits = sorted(((sum(words[w] for w in known), name) for name, known in _LISTS.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    return name if most >= LEAST and most >= CLEARLY * second else UNTOLD


def script(text: str) -> str:
    """The writing system of most letters; Japanese wherever kana stand among Chinese characters."""
    counts: Counter[str] = Counter()
    for character, n in Counter(text).items():
        if name := _script_of(character):
            counts[name] += n
    if not counts:
        return "no letters"
    if counts["Japanese"] and counts["Japanese"] + counts["Chinese characters"] > sum(counts.values()) / 2:
        return "Japanese"
    return min(counts, key=lambda name: (-counts[name], name))


@cache
def _script_of(character: str) -> str | None:
    """The first word of a letter's Unicode name says its script."""
    if not character.isalpha():
        return None
    word = unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]
    return _SCRIPTS.get(word, word.capitalize())
