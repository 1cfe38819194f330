"""One row of a GRPO stage: the prompt, and beside it what the prompt must not hold.

What masking keeps out of the prompt rides in `extra_info` only, where rewards and judges find it.
"""

from __future__ import annotations

import json
from typing import Any

from pgenrm_train.config import Config
from pgenrm_train.prompts.writer import Messages
from pgenrm_train.records.pairs import ExplicitSignals, PreferencePair
from pgenrm_train.rewards.judging import signals


def row_of(
    config: Config, index: int, pair: PreferencePair, order: int, prompt: Messages, explicit: ExplicitSignals
) -> dict[str, Any]:
    """`order` is the place of the chosen response; `explicit` is what there is to judge the chain by."""
    return {
        "data_source": config.data.name,
        "prompt": prompt,
        "reward_model": {"style": "rule", "ground_truth": str(order)},
        "extra_info": {
            "index": index,
            "pair_id": pair.pair_id,
            "user_id": pair.user_id,
            "order": order,
            "kind": pair.kind,
            "n_responses": 2,
            "criteria": explicit.criteria,
            "explicit": json.dumps(
                signals(explicit), ensure_ascii=False
            ),  # all that there is to judge by, for an LLM judge
            "synthetic": explicit.synthetic,
        },
    }
