"""Keep what veRL's actor trains on: token ids, mask, advantages and reward of every chain.

Named as a judge, because judges are built in the training process before its first step.
"""

from __future__ import annotations

import functools
from typing import Any

FILE = "trained_tokens.jsonl"  # in the phase's folder, one line per chain


def judge() -> Any:
    """PersonaWorld's judge; from then on the trainer of this process also writes `FILE`."""
    from data_builders.teachers.oracle import judge_for_rewards
    from pgenrm_train.backends.grpo.trainer import ChainTrainer

    ChainTrainer._compute_advantage = _recorded(ChainTrainer._compute_advantage)
    return judge_for_rewards()


def _recorded(compute: Any) -> Any:
    """veRL's last step before the update, and then a reading of the fields that the update uses."""
    import transfer_queue as tq

    from pgenrm_train.run.tracking import append

    names = ("responses", "response_mask", "loss_mask", "rm_scores", "advantages", "extra_fields")

    @functools.wraps(compute)
    def recorded(self: Any, batch: Any, metrics: Any) -> Any:
        batch = compute(self, batch, metrics)
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding")]
        fields = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(names))
        for number, (key, extra) in enumerate(zip(keys, list(fields["extra_fields"]), strict=True)):
            tokens = {name: fields[name][number].tolist() for name in names[:-1]}
            reward = getattr(extra, "data", extra)["reward_extra_info"]
            line = {"step": self.global_steps, "key": key, "reward": reward, **tokens}
            append(self.run.phase.work_dir / FILE, line)
        return batch

    return recorded
