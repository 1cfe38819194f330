"""Rewards of a chain: outcome, process and format."""

from typing import TYPE_CHECKING

from pgenrm_train.lazy import lazily

if TYPE_CHECKING:
    from pgenrm_train.rewards.reward import Reward, RewardWeights, chain_reward

__all__ = ["Reward", "RewardWeights", "chain_reward"]
__getattr__ = lazily(__name__, reward=__all__)
