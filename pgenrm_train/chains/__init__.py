"""Evaluation chains: parse, verify, keep or reject."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgenrm_train.chains.chain import (
        Chain as Chain,
    )
    from pgenrm_train.chains.chain import (
        ParseFailure as ParseFailure,
    )
    from pgenrm_train.chains.chain import (
        parse_chain as parse_chain,
    )

_HOMES = {
    "Chain": "pgenrm_train.chains.chain",
    "ParseFailure": "pgenrm_train.chains.chain",
    "parse_chain": "pgenrm_train.chains.chain",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
