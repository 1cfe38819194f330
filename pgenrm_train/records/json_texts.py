"""Conversations and responses stored as JSON text, as after a round trip through CSV.

A column is either text or JSON text, in all of its rows.  The first text decides, and a later one that
differs is refused, so one pass suffices.  Only messages count: a response that is other JSON remains a text.
"""

import json
import re
from collections.abc import Mapping

from pgenrm_train.errors import DataError

COLUMNS = ("context", "chosen", "rejected")
MESSAGES = (
    {"role", "content"},
    {"from", "value"},
)  # keys; those of ShareGPT are refused later, with their name
_KEYS = [re.compile(rf"['\"]{key}['\"]\s*:") for key in ("role", "content")]
_MESSAGE = re.compile(r"""\s*[\[{(]+\s*['"](?:role|content|from)['"]\s*:""")  # how messages begin
# A string, also one without an end, or a bracket.
_TOKEN = re.compile(r""""(?:[^"\\]|\\.)*+\\?(?:"|\Z)|'(?:[^'\\]|\\.)*+\\?(?:'|\Z)|[][{}()]""", re.DOTALL)
_SHOWN = 60  # characters of a text in an error


class JsonTexts:
    """Reader of the JSON texts of one source."""

    def __init__(self) -> None:
        self._is_json: dict[str, bool] = {}  # column → whether its texts are JSON

    def read(self, row: Mapping[str, object], where: str) -> Mapping[str, object]:
        """The row with its JSON texts as messages.  Raises DataError with row and field."""
        texts = {name: text for name in COLUMNS if isinstance(text := row.get(name), str) and text.strip()}
        return (
            {**row, **{name: self._read(name, text, where) for name, text in texts.items()}} if texts else row
        )

    def _read(self, name: str, text: str, where: str) -> object:
        messages = _messages(text)
        expected = None
        if messages is None and (_is_python(text.strip()) or _is_cut(text)):
            expected = "plain text, or complete messages as json.dumps writes them"
        elif self._is_json.setdefault(name, messages is not None) != (messages is not None):
            expected = f"{'JSON' if messages is None else 'plain'} text, as in the rows before"
        if expected:
            raise DataError(f"{where}, field '{name}': expected {expected}, got {text.strip()[:_SHOWN]!r}")
        return text if messages is None else messages


def _messages(text: str) -> object:
    """The message or list of messages in a JSON text, also if encoded twice; else None."""
    value = _json(text)
    value = _json(value) if isinstance(value, str) else value
    listed = value if isinstance(value, list) else [value]
    are_messages = [
        isinstance(item, Mapping) and any(keys <= item.keys() for keys in MESSAGES) for item in listed
    ]
    return value if are_messages and all(are_messages) else None


def _json(text: str) -> object:
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_python(text: str) -> bool:
    """Whether a text looks like messages that Python or numpy printed, or like JSON that is broken."""
    brackets = text.startswith(("[", "{", "(", "array(")) and text.endswith(("]", "}", ")"))
    return brackets and _json(text) is None and all(key.search(text) for key in _KEYS)


def _is_cut(text: str) -> bool:
    """Whether a text begins like messages and ends before their last bracket."""
    if not _MESSAGE.match(text):
        return False
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in "[{(") - (token[0] in "]})")
        if depth == 0:
            return False
    return True
