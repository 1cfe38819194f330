"""Rows with several responses: votes between two of them, by a stated rule.

A row has `responses` (n ≥ 2 texts, or messages) and one of

    ratings   one number per response, higher is better; null leaves an unrated response out
    ranking   one rank per response, 1 is the best; equal ranks are a tie

The rule is `data.pairs_of`:

    best   the best response against each other one: n − 1 votes
    all    every two responses: n (n − 1) / 2 votes
    ends   the best response against the worst: 1 vote

Two responses with equal ratings or equal texts make no vote, and are counted.  Of several best ones the first
counts as the best.  All votes of a row share its conversation, so they are in one split.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from data_builders.sources import hub
from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import read_id
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.slates import RULES

COLUMNS = ("responses", "ratings", "ranking")


def votes_of(row: hub.Row, where: str, rule: str, number: str, left_out: LeftOut) -> Iterator[hub.Row]:
    """The row's votes, each with `chosen` and `rejected`; a row without `responses` is one already.

    `number` names the row where it has no id of its own.  DataError names field and expectation.
    """
    if row.get("responses") is None or row.get("chosen") is not None:
        yield row
        return
    texts = texts_of(row, where)
    values = values_of(row, where, len(texts))
    name = name_of(row, number)
    rest = {column: value for column, value in row.items() if column not in COLUMNS}
    scored = row.get("ratings") is not None
    for better, worse in ordered(texts, values, rule, left_out):
        yield rest | {
            "pair_id": f"{name}/{better}-{worse}",
            "conversation_id": row.get("conversation_id") or name,
            "chosen": texts[better],
            "rejected": texts[worse],
            "chosen_score": values[better] if scored else None,
            "rejected_score": values[worse] if scored else None,
        }


def name_of(row: hub.Row, number: str) -> str:
    """The first part of the ids of a row's votes."""
    return read_id(row.get("pair_id")) or read_id(row.get("conversation_id")) or number


def ordered(
    texts: Sequence[str], values: Sequence[float | None], rule: str, left_out: LeftOut
) -> Iterator[tuple[int, int]]:
    """(better, worse) responses of each vote, by their places."""
    rated = [(-value, place) for place, value in enumerate(values) if value is not None]
    if len(rated) < len(texts):
        left_out["responses without a rating"] += len(texts) - len(rated)
    order = [place for _, place in sorted(rated)]
    for better, worse in RULES[rule](order) if len(order) > 1 else []:
        if values[better] == values[worse] or texts[better] == texts[worse]:
            left_out["two responses of equal rating or text"] += 1
        else:
            yield better, worse


def texts_of(row: hub.Row, where: str) -> list[str]:
    """The texts of `responses`.  DataError for fewer than two, or for one without content."""
    items = row.get("responses")
    if not isinstance(items, list) or len(items) < 2:
        raise DataError(
            f"{where}, field 'responses': expected a list of two texts or more, got {str(items)[:60]!r}"
        )
    texts: list[str] = []
    for place, item in enumerate(items):
        text = item.get("content") if isinstance(item, Mapping) else item
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where}, field 'responses[{place}]': expected a non-empty text or {{role, content}}, "
                f"got {str(text)[:60]!r}"
            )
        texts.append(text)
    return texts


def values_of(row: hub.Row, where: str, n: int) -> list[float | None]:
    """A value per response, higher is better; None if it has none."""
    given = [name for name in ("ratings", "ranking") if row.get(name) is not None]
    if len(given) != 1:
        raise DataError(
            f"{where}: expected 'ratings' or 'ranking' next to 'responses', got "
            f"{' and '.join(given) or 'neither'}"
        )
    (name,) = given
    values = row[name]
    if not isinstance(values, list) or len(values) != n:
        raise DataError(
            f"{where}, field '{name}': expected one value for each of the {n} responses, "
            f"got {str(values)[:60]!r}"
        )
    return [_value(value, where, name, place) for place, value in enumerate(values)]


def _value(value: object, where: str, name: str, place: int) -> float | None:
    if value is None or value != value:  # NaN is what pandas writes for null
        return None
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.inf
    if name == "ratings" and math.isfinite(number):
        return number
    if name == "ranking" and number >= 1 and number.is_integer():
        return -number
    expected = "a finite number or null" if name == "ratings" else "a rank from 1 (the best) or null"
    raise DataError(f"{where}, field '{name}[{place}]': expected {expected}, got {str(value)[:60]!r}")
