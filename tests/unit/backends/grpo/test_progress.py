"""Numbers of veRL that reach metrics.jsonl, and the warning that vLLM and the actor differ."""

from pgenrm_train.backends.grpo.progress import (
    DIFFERENCE,
    MAX_DIFFERENCE,
    difference_warning,
    engine_metrics,
)


def test_memory_mfu_and_differences_pass_and_lengths_do_not() -> None:
    metrics = {
        "actor/grad_norm": 1.0,
        "actor/perf/max_memory_allocated_gb": 2.0,
        "actor/training/rollout_probs_diff_mean": 3.0,  # of the loss, on a CPU
        "training/rollout_actor_probs_pearson_corr": 4.0,
        "rollout_corr/kl": 5.0,
        "perf/mfu/actor": 6.0,
        "global_seqlen/mean": 7.0,
    }
    assert engine_metrics(metrics) == {
        "actor/grad_norm": 1.0,
        "perf/max_memory_allocated_gb": 2.0,
        DIFFERENCE: 3.0,
        "training/rollout_actor_probs_pearson_corr": 4.0,
        "rollout_corr/kl": 5.0,
        "perf/mfu/actor": 6.0,
    }


def test_a_large_mean_difference_is_warned_of() -> None:
    warning = difference_warning({DIFFERENCE: 0.051})
    assert warning and "differ by 0.051 on average" in warning
    assert difference_warning({DIFFERENCE: MAX_DIFFERENCE}) is None
    assert difference_warning({}) is None and difference_warning({DIFFERENCE: None}) is None
