"""Question of `recipe=score`: a JSON file → an example.

The file holds {"user_id", "history": [{"query", "chosen", "rejected"}], "criteria": str|null, "query",
"responses": [str, …]}.
"""

import json
from difflib import get_close_matches
from pathlib import Path

from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import id_of
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message
from pgenrm_train.records.raw_rows import UTF8, check_texts, unique

KEYS = ("user_id", "history", "criteria", "query", "responses")


def read_question(path: Path) -> Example:
    """Parse the file.  Raises DataError naming file, field and expectation."""
    try:
        raw = json.loads(path.read_text(encoding=UTF8), object_pairs_hook=unique)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a JSON file for score.input") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); expected a JSON file for score.input"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected one JSON object, got {type(raw).__name__}")
    for unknown in (key for key in raw if key not in KEYS):
        near = get_close_matches(unknown.lower(), KEYS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DataError(f"{path}: unknown key '{unknown[:60]}'; {hint}keys are {', '.join(KEYS)}")
    check_texts(raw, str(path))
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
        user_id=id_of(raw, "user_id", str(path)),
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
