"""Words of a text; in scripts without blanks between words, each character counts as one."""

import re

# Japanese kana, Bopomofo, single Jamo, CJK ideographs, Hangul, Thai, Lao, Burmese, Khmer.
UNSPACED = (
    "\u3040-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
_PUNCTUATION = "\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # no wide letters
# As `str.split`, except for these scripts and their punctuation.
_PIECE = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}{_PUNCTUATION}]+")


def count_words(text: str) -> int:
    """Words between blanks, and characters of scripts without blanks.

    >>> count_words("It's fine."), count_words("你好。"), count_words("Python 很好")
    (2, 2, 3)
    """
    return sum(1 for _ in _PIECE.finditer(text))
