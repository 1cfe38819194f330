"""Records of votes: pairs, their rows and files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgenrm_train.records.pairs import PreferencePair as PreferencePair
    from pgenrm_train.records.rows import read_pairs as read_pairs

_HOMES = {
    "PreferencePair": "pgenrm_train.records.pairs",
    "read_pairs": "pgenrm_train.records.rows",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
