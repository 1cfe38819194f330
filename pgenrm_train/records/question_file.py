"""Question of `recipe=score`: a JSON file → an example.

The file holds {"user_id", "history": [{"query", "chosen", "rejected"}], "criteria": str|null, "query",
"responses": [str, …]}.
"""

import json
from pathlib import Path

from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message


def read_question(path: Path) -> Example:
    """Parse the file.  Raises DataError naming file, field and expectation."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a JSON file for score.input") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected one JSON object, got {type(raw).__name__}")
    responses, history, criteria = raw.get("responses"), raw.get("history") or [], raw.get("criteria")
    if (
        not isinstance(responses, list)
        or len(responses) < 2
        or any(not isinstance(r, str) for r in responses)
    ):
        raise DataError(f"{path}, field 'responses': expected a list of at least two texts")
    if not isinstance(history, list):
        raise DataError(f"{path}, field 'history': expected a list of {{query, chosen, rejected}}")
    if criteria is not None and not isinstance(criteria, str):
        raise DataError(f"{path}, field 'criteria': expected a text or null")
    return Example(
        pair_id=path.stem,
        user_id=_text(raw, "user_id", path),
        context=(Message("user", _text(raw, "query", path)),),
        responses=tuple(responses),
        chosen_index=0,  # unknown, and never read
        history=tuple(_item(item, number, path) for number, item in enumerate(history)),
        explicit=ExplicitSignals(criteria=criteria or None),
    )


def _item(item: object, number: int, path: Path) -> HistoryItem:
    if not isinstance(item, dict):
        raise DataError(f"{path}, field 'history[{number}]': expected {{query, chosen, rejected}}")
    prefix = f"history[{number}]."
    return HistoryItem(*(_text(item, name, path, prefix) for name in ("query", "chosen", "rejected")))


def _text(raw: dict[str, object], name: str, path: Path, prefix: str = "") -> str:
    text = raw.get(name)
    if not isinstance(text, str):
        raise DataError(f"{path}, field '{prefix}{name}': expected a text, got {text!r}")
    return text
