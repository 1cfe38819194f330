"""Train, evaluate and scale personalised generative reward models (P-GenRM, arXiv 2602.12116)."""

from typing import TYPE_CHECKING

from pgenrm_train.lazy import lazily

if TYPE_CHECKING:
    from pgenrm_train.chains import parse_chain
    from pgenrm_train.records import PreferencePair, read_pairs
    from pgenrm_train.rewards import chain_reward

__version__ = "0.1.0"
__all__ = ["PreferencePair", "chain_reward", "parse_chain", "read_pairs"]
__getattr__ = lazily(
    __name__, chains=["parse_chain"], records=["PreferencePair", "read_pairs"], rewards=["chain_reward"]
)
