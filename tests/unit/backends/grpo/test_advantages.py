"""Advantages of a step: the group's scores, and verl's own estimators on them."""

import pytest

from pgenrm_train.backends.grpo.config import grpo_keys
from pgenrm_train.backends.grpo.scoring import RewardSpec, ScoredChain, settle
from pgenrm_train.config import load
from pgenrm_train.rewards.reward import RewardWeights

GDPO = RewardSpec(advantage="gdpo")


def chain(outcome: float, process: float | None = None, null: bool = False) -> ScoredChain:
    total = outcome + 0.5 * (process or 0.0)
    return ScoredChain(
        1, total, unjudged=outcome, outcome=outcome, process=process, format=0.0, null_verdict=null
    )


UNREADABLE = ScoredChain(1, -0.1, unjudged=-0.1, outcome=0.0, format=-0.1, failure="no_json")
BROKEN = ScoredChain(1, error="OSError: lost")


def scores(chains: list[ScoredChain], spec: RewardSpec = GDPO) -> list[float]:
    return [one.score for one in settle(chains, spec)]


def test_parts_are_normalised_apart_and_summed_by_weight():
    """Outcomes 1, 0 are ±1/√2; verdicts 0.4, 0.2 too, although their spread is a fifth."""
    unit = 2**-0.5
    assert scores([chain(1.0, 0.4), chain(0.0, 0.2)]) == pytest.approx([1.5 * unit, -1.5 * unit], abs=1e-4)
    assert scores([chain(1.0, 0.2), chain(0.0, 0.4)]) == pytest.approx([0.5 * unit, -0.5 * unit], abs=1e-4)
    heavy = RewardSpec(RewardWeights(outcome=2.0, process=3.0), advantage="gdpo")
    assert scores([chain(1.0, 0.2), chain(0.0, 0.4)], heavy) == pytest.approx([-unit, unit], abs=1e-4)


def test_equal_values_of_a_part_add_nothing():
    unit = 2**-0.5
    assert scores([chain(1.0, 0.3), chain(1.0, 0.1)]) == pytest.approx([unit / 2, -unit / 2], abs=1e-4)
    assert scores([chain(0.0, 0.1), chain(0.0, 0.1), chain(0.0, 0.1)]) == pytest.approx(
        [0.0, 0.0, 0.0], abs=1e-6
    )


def test_a_missing_verdict_adds_nothing_and_leaves_the_others():
    with_null = [chain(1.0, 0.4), chain(1.0, 0.2), chain(1.0, null=True)]
    assert scores(with_null) == pytest.approx([0.5 * 2**-0.5, -0.5 * 2**-0.5, 0.0], abs=1e-4)
    one_verdict = [chain(1.0, 0.4), chain(1.0, null=True)]
    assert scores(one_verdict) == [0.0, 0.0], "one value has no deviation"


def test_a_format_error_is_the_worst_outcome_and_a_raising_reward_counts_for_nothing():
    group = [chain(0.0), chain(0.0), UNREADABLE, BROKEN]
    good, bad = (0.1 / 3) / (0.1 / 3**0.5), (-0.2 / 3) / (0.1 / 3**0.5)
    assert scores(group) == pytest.approx([good, good, bad, 0.0], abs=1e-4)


def test_other_advantages_compare_the_weighted_sum():
    group = [chain(1.0, 0.4), chain(0.0, 0.2)]
    for name in ("grpo", "dr_grpo"):
        assert scores(group, RewardSpec(advantage=name)) == pytest.approx([1.2, 0.1])


# advantages of the scores 3, 1 and 0, 0 of two groups
VERLS = {
    "grpo": [2**-0.5, -(2**-0.5), 0.0, 0.0],
    "dr_grpo": [1.0, -1.0, 0.0, 0.0],
    "gdpo": [2 / 2**0.5, 0.0, -1 / 2**0.5, -1 / 2**0.5],  # over the batch: mean 1, std √2
}


@pytest.mark.parametrize("name", VERLS)
def test_verl_takes_the_advantage_that_is_set(name):
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    from pgenrm_train.backends.grpo import trainer  # noqa: F401  registers the estimator

    keys = grpo_keys(load("recipe=cre", f"cre.advantage={name}"), "cre")
    rewards, mask = torch.zeros(5, 3), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    rewards[:4, -1] = torch.tensor([3.0, 1.0, 0.0, 0.0])  # the last row is padding
    data = DataProto.from_dict(
        {"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(["a", "a", "b", "b", "pad"], dtype=object)},
    )
    done = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0"],
        adv_estimator=keys["algorithm.adv_estimator"],
        norm_adv_by_std_in_grpo=keys["algorithm.norm_adv_by_std_in_grpo"],
    )
    wanted = torch.tensor([*VERLS[name], 0.0])[:, None] * mask
    assert torch.allclose(done.batch["advantages"], wanted, atol=1e-4)


def test_the_rate_decays_only_if_asked():
    optim = "actor_rollout_ref.actor.optim."
    constant, cosine = (
        grpo_keys(load("recipe=cre", f"cre.min_learning_rate_ratio={ratio}"), "cre") for ratio in (1, 0.1)
    )
    assert constant[optim + "lr_scheduler_type"] == "constant"
    assert (cosine[optim + "lr_scheduler_type"], cosine[optim + "min_lr_ratio"]) == ("cosine", 0.1)
