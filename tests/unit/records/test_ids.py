"""One spelling per identifier, whichever way a source writes it; what identifies nothing is refused."""

import unicodedata
import uuid
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import WHOLE, id_of, read_id


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (7.0, "7"),
        ("7", "7"),
        (" 7\t", "7"),
        (Decimal("7.00"), "7"),
        (np.int32(7), "7"),
        (np.float32(7), "7"),
        (-0.0, "0"),
        ("7.0", "7.0"),
        ("07", "07"),
        (7.5, "7.5"),
        (2**63, str(2**63)),
        (Decimal(2**70), str(2**70)),
        (float(WHOLE - 1), str(WHOLE - 1)),
        ("\u00a0ann\u3000", "ann"),
        ("\ufeffann\u200b", "ann"),
        ("a b", "a b"),
        ("Zoe\u0308", "Zo\u00eb"),
        ("\uff17", "\uff17"),  # a full-width seven is another letter, not another form
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (" ", ""),
    ],
)
def test_one_spelling(value, text):
    assert read_id(value) == text == read_id(text)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        np.bool_(True),
        [],
        {},
        b"7",
        float("nan"),
        float("inf"),
        float(WHOLE),
        -1e300,
        Decimal("NaN"),
    ],
)
def test_what_identifies_nothing(value):
    assert read_id(value) is None
    with pytest.raises(DataError, match=r"row 3, field 'user_id': expected a text or a number"):
        id_of({"user_id": value}, "user_id", "row 3")


@given(st.integers(-WHOLE + 1, WHOLE - 1), st.text(" \t\u00a0\u2003\ufeff", max_size=2))
def test_a_whole_number_is_one_id_in_every_type(number, blank):
    spelled = {
        read_id(value) for value in (number, float(number), Decimal(number), f"{blank}{number}{blank}")
    }
    assert spelled == {str(number)}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_a_text_is_one_id_in_every_unicode_form_and_reading_twice_changes_nothing(text):
    assert read_id(unicodedata.normalize("NFD", text)) == read_id(text) == read_id(read_id(text))


@given(
    st.lists(st.integers(-(10**20), 10**20) | st.text("0123456789.e+-x", min_size=1), min_size=2, max_size=2)
)
def test_ids_of_other_values_stay_apart(values):
    one, two = values
    assert (read_id(one) == read_id(two)) is (str(one) == str(two))
