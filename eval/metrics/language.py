"""Language of a text: its main script and, for Latin script, a count of function words.

A language of Latin script needs a list here, and clearly the most function words of the text.  A text too
short for that takes the commonest of these languages in its data set.  Any other text is named by its script,
so Russian and Ukrainian, or Hindi and Marathi, are one.  This suffices to see that a model is worse on one
language than on another.  It does not identify a single short text.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

LATIN = "Latin"
UNKNOWN_LATIN = "Latin script"
LEAST = 3  # function words that a text must hold
CLEARLY = 1.5  # times as many as of the next language

# Readable names, one for scripts that are written together.
_SCRIPTS = {"CJK": "Chinese characters", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
_FUNCTION_WORDS = {
    "English": "the and of to is are was that you for with this have it my your what how can be from they i "
    "would about by which",
    "German": "der die das und ist nicht ein eine ich zu mit auf für sie wie auch sich von dem den im es "
    "kann ihr werden oder bei",
    "French": "le la les des et est une vous que pour dans pas je qui sur avec du ce il au sont plus ne mais "
    "nous votre aux un",
    "Spanish": "el la los las que y es una por para con no del se como su lo al más pero un sus en le mi o "
    "está son",
    "Portuguese": "o os as não que uma para com é do da em um você mais por se dos ao como mas seu "
    "sua na no são",
    "Italian": "il che di è una per non sono con gli della del un più le si nel alla come la ma da "
    "i lo dei anche",
    "Dutch": "de het een en van ik niet dat je op voor met zijn is te die aan ook er maar om hoe wat "
    "kan naar uit",
}
_LISTS = {name: frozenset(words.split()) for name, words in _FUNCTION_WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")


def languages(texts: Sequence[str]) -> list[str]:
    """The language of each text of one data set."""
    names = [language(text) for text in texts]
    counts = Counter(name for name in names if name in _LISTS)
    commonest = max(counts, key=lambda name: (counts[name], name), default=UNKNOWN_LATIN)
    return [commonest if name == UNKNOWN_LATIN else name for name in names]


def language(text: str) -> str:
    """The language if it is clear, else the name of the script, or `no letters`."""
    if (name := script(text)) != LATIN:
        return name
    words = Counter(_WORD.findall(text.lower()))
    hits = sorted(((sum(words[w] for w in listed), name) for name, listed in _LISTS.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    return name if most >= LEAST and most >= CLEARLY * second else UNKNOWN_LATIN


def script(text: str) -> str:
    """The script of most letters; Japanese if kana and Chinese characters together prevail."""
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
    """Script of a letter: the first word of its Unicode name."""
    if not character.isalpha():
        return None
    word = unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]
    return _SCRIPTS.get(word, word.capitalize())
