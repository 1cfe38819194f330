"""Identifiers of users, votes and conversations: one spelling per identifier.

pandas writes the user 1 as 1.0 if a column has a null, and as "1" after a round trip through text.  All
three are one user.  "1.0" and "01" are texts of their own, because a source that writes them means them.
"""

import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from uuid import UUID

from pgenrm_train.errors import DataError

ID = "a text or a number (below 2^53 if it is a float)"  # as errors name it
WHOLE = 2**53  # whole numbers below it are exact in every file format
# White space of Unicode, and the three marks without width that editors and spreadsheets leave at the ends.
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"


def read_id(value: object) -> str | None:
    """An identifier as text: no white space at the ends, Unicode form NFC, whole numbers without `.0`.

    None for a value that identifies nothing: a boolean, a list, NaN, or a float of 2^53 and above, which
    may be any of several whole numbers.  A blank text gives an empty one.

    >>> read_id(" 7 "), read_id(7.0), read_id("7.0"), read_id(True)
    ('7', '7', '7.0', None)
    """
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip(_BLANK)
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Decimal):
        whole = value.is_finite() and value == value.to_integral_value()
        return str(int(value)) if whole else read_id(float(value))
    if isinstance(value, Real) and abs(number := float(value)) < WHOLE:
        return str(int(number)) if number.is_integer() else str(number)
    return None


def shown(value: object) -> str:
    """A bad value as errors name it."""
    return "nothing (missing or null)" if value is None else repr(value)[:60]


def id_of(row: Mapping[str, object], name: str, where: str) -> str:
    """The identifier in a field of a raw row.  Raises DataError if there is none."""
    if not (text := read_id(value := row.get(name))):
        raise DataError(f"{where}, field '{name}': expected {ID}, got {shown(value)}")
    return text
