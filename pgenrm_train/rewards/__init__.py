"""Rewards of a chain: outcome, process and format."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgenrm_train.rewards.chain_reward import (
        Reward as Reward,
    )
    from pgenrm_train.rewards.chain_reward import (
        RewardWeights as RewardWeights,
    )
    from pgenrm_train.rewards.chain_reward import (
        chain_reward as chain_reward,
    )

_HOMES = {
    "Reward": "pgenrm_train.rewards.chain_reward",
    "RewardWeights": "pgenrm_train.rewards.chain_reward",
    "chain_reward": "pgenrm_train.rewards.chain_reward",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
