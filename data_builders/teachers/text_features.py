"""Text features of the `features` rule, and the words for a wish for more or less of each.

textstat supplies LIX (Björnsson 1968), the readability index that needs no syllable dictionary: no download,
no one language.  The lexicons are English; in other languages those features are constant and without
effect.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import textstat

from pgenrm_train.records.words import UNSPACED

PREFIX = 20_000  # characters that the word statistics read; length counts the full text
READABILITY_PREFIX = 5_000

_LETTERS = rf"[^\W\d_{UNSPACED}]+"
_WORD = re.compile(rf"[{UNSPACED}]|{_LETTERS}(?:['’]{_LETTERS})*|\d+")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_BLOCK = re.compile(r"\s*(?:[-*•+]\s|\d{1,2}[.)]\s|#{1,6}\s|\||```|<li>)")
_SLIP = re.compile(r"\s[,.!?;]|[,;!?][^\W\d_]|\b(?:i|u|ur|im|dont|cant|wont|thats|doesnt|isnt)\b|[!?]{2,}")
_REFUSAL = re.compile(
    r"\bas an ai\b|\blanguage model\b|\bi(?:'m| am) (?:sorry|unable)\b|\bi (?:cannot|can't|don't have)\b"
)


def _lexicon(words: str) -> frozenset[str]:
    return frozenset(words.split())


_HEDGES = _lexicon(
    "may might could perhaps maybe possibly probably likely seem seems appear appears suggest suggests "
    "generally usually often "
    "sometimes somewhat relatively typically however although unless depends depending arguably potentially "
    "presumably"
)
_CASUAL = _lexicon(
    "i i'm i've i'll you you're your gonna wanna kinda yeah yes ok okay hey hi lol guys stuff thing things "
    "lot really very just "
    "so well cool dont don't can't won't isn't it's that's doesn't let's u ur cause cuz pretty"
)
_WARM = _lexicon(
    "thank thanks please sorry glad happy hope welcome feel feeling love dear friend friends enjoy "
    "wonderful great care help "
    "understand together appreciate excited joy we our us"
)
_REASONS = _lexicon(
    "because therefore thus hence since so if then consequently reason reasons due result results means why "
    "shows show proves "
    "evidence example instance according"
)


@dataclass(frozen=True)
class _Text:
    """Shared input of the features: text, prefix, words in lower case, sentences and non-blank lines."""

    text: str
    prefix: str
    words: tuple[str, ...]
    sentences: tuple[str, ...]
    lines: tuple[str, ...]

    def per_100_words(self, count: float) -> float:
        # Ten words are added so that one hit in a three-word answer is not an extreme.
        return 100 * count / (len(self.words) + 10)

    def share(self, lexicon: frozenset[str]) -> float:
        return self.per_100_words(sum(word in lexicon for word in self.words))


def _parse(text: str) -> _Text:
    prefix = text[:PREFIX]
    words = tuple(word.lower().replace("’", "'") for word in _WORD.findall(prefix))
    sentences = tuple(s.strip() for s in _SENTENCE_END.split(prefix) if s.strip())
    return _Text(text, prefix, words, sentences, tuple(line for line in prefix.splitlines() if line.strip()))


def _structure(t: _Text) -> float:
    """Log count of lines; list items, headings, table rows and code fences count twice."""
    return float(np.log1p(len(t.lines) + sum(bool(_BLOCK.match(line)) for line in t.lines)))


def _formality(t: _Text) -> float:
    """Long words minus colloquial ones: in place of Heylighen & Dewaele's F-score, which needs a tagger."""
    long_words = 100 * sum(len(word) > 6 for word in t.words) / max(len(t.words), 1)
    return long_words - t.share(_CASUAL) - t.per_100_words(t.prefix.count("!"))


def _readability(t: _Text) -> float:
    """Minus LIX, so that more is easier; clipped, so that a word of 5,000 letters is only 'very hard'."""
    return -float(np.clip(textstat.lix(t.prefix[:READABILITY_PREFIX]), 10, 80)) if t.words else -40.0


def _polish(t: _Text) -> float:
    """A finished last sentence, capitals at sentence starts, few slips of spelling and punctuation."""
    finished = t.text.rstrip().endswith(tuple(".!?\"')`:。！？」"))
    capitals = sum(not s[0].islower() for s in t.sentences) / max(len(t.sentences), 1)
    return (
        float(finished) + 2 * capitals - 0.5 * float(np.sqrt(t.per_100_words(len(_SLIP.findall(t.prefix)))))
    )


class Feature(NamedTuple):
    """One measurement, with one English word for a wish for more of it and one for less."""

    more: str
    less: str
    measure: Callable[[_Text], float]


TABLE: dict[str, Feature] = {
    "length": Feature("longer", "shorter", lambda t: float(np.log(len(t.text) + 10))),
    "structure": Feature("structured", "plain", _structure),
    "hedging": Feature("cautious", "assertive", lambda t: t.share(_HEDGES)),
    "formality": Feature("formal", "casual", _formality),
    "readability": Feature("simple", "complex", _readability),
    # Guiraud's index: types over the root of tokens, less dependent on length than the type–token ratio.
    "vocabulary": Feature("varied", "repetitive", lambda t: len(set(t.words)) / max(len(t.words), 1) ** 0.5),
    "reasoning": Feature("reasoned", "unargued", lambda t: t.share(_REASONS)),
    "warmth": Feature("warm", "neutral", lambda t: t.share(_WARM)),
    "polish": Feature("polished", "careless", _polish),
    "numbers": Feature(
        "numeric", "verbal", lambda t: t.per_100_words(sum(w[0].isdigit() for w in t.words)) ** 0.5
    ),
    "quotation": Feature(
        "quoting", "unquoted", lambda t: t.per_100_words(sum(map(t.prefix.count, '"“«「'))) ** 0.5
    ),
    "refusal": Feature("declining", "forthcoming", lambda t: float(bool(_REFUSAL.search(t.prefix.lower())))),
}
FEATURES: tuple[str, ...] = tuple(TABLE)

_measured: dict[bytes, np.ndarray] = {}
_MEASURED_AT_MOST = 200_000


def measure(text: str) -> np.ndarray:
    """Raw features of one text in the order of `FEATURES`: (F,), float64, finite, read-only.

    Cached by the text's hash.
    """
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if key not in _measured:
        if len(_measured) >= _MEASURED_AT_MOST:
            _measured.clear()
        parsed = _parse(text)
        values = np.array([feature.measure(parsed) for feature in TABLE.values()])
        values.flags.writeable = False
        _measured[key] = values
    return _measured[key]


def measure_many(texts: Sequence[str]) -> np.ndarray:
    """Raw features, shape (N, F)."""
    return np.array([measure(text) for text in texts]).reshape(-1, len(FEATURES))
