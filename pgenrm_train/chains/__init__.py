"""Evaluation chains: parse, verify, keep or reject."""

from typing import TYPE_CHECKING

from pgenrm_train.lazy import lazily

if TYPE_CHECKING:
    from pgenrm_train.chains.chain import Chain, ParseFailure, parse_chain
    from pgenrm_train.chains.totals import close_chain

__all__ = ["Chain", "ParseFailure", "close_chain", "parse_chain"]
__getattr__ = lazily(__name__, chain=["Chain", "ParseFailure", "parse_chain"], totals=["close_chain"])
