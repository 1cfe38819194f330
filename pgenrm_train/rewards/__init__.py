"""Rewards of a chain: outcome, process and format."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgenrm_train.rewards.chain_reward import Reward, RewardWeights, chain_reward

__all__ = ["Reward", "RewardWeights", "chain_reward"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays light."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pgenrm_train.rewards.chain_reward"), name)
