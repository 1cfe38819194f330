"""Numbers of veRL that reach metrics.jsonl, and the warning that vLLM and the actor differ."""

from collections.abc import Iterable

import pytest

from pgenrm_train.backends.grpo.progress import (
    DIFFERENCE,
    MAX_DIFFERENCE,
    difference_warning,
    engine_metrics,
    format_warning,
    sample_rows,
    staleness_metrics,
    truth_metrics,
    validation_line,
    validation_metrics,
)
from pgenrm_train.backends.grpo.scoring import ScoredChain, ScoredGroup


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


@pytest.mark.parametrize(
    ("kinds", "remedy"),
    [
        (["unverified"] * 9 + ["no_markers"], "model.totals=declared"),
        (["length"] * 9 + ["no_markers"], "raise model.max_response_tokens"),
        (["no_markers"] * 10, "train PSI longer"),
    ],
)
def test_a_step_of_unreadable_chains_is_warned_of(kinds: list[str], remedy: str) -> None:
    groups = [
        ScoredGroup([ScoredChain(length=9, failure=kind) for kind in half]) for half in (kinds[:5], kinds[5:])
    ]
    warning = format_warning(groups)
    assert warning and remedy in warning
    count = kinds.count(kinds[0])
    assert f"10 of 10 chains are format errors, {count} of them {kinds[0]}" in warning
    readable = ScoredGroup([ScoredChain(length=9, outcome=1.0)] * 5)
    assert format_warning([groups[0], readable]) is None


def test_a_validation_has_an_interval_over_users_and_sample_chains_with_their_text() -> None:
    chains = [ScoredChain(length=9, outcome=float(user % 2), text=f"chain {user}") for user in range(8)]
    extras = [{"pair_id": f"p{n}", "user_id": f"u{n}", "order": 0} for n in range(8)]
    probes = [{**extra, "probe": "swapped_history"} for extra in extras]
    groups = [[chain] for chain in chains]
    metrics = validation_metrics([*groups, *groups], [*probes, *extras])
    assert metrics["validation/accuracy"] == 0.5
    assert 0 < metrics["validation/accuracy_low"] < 0.5 < metrics["validation/accuracy_high"] < 1
    single = validation_metrics(groups[:1], extras[:1])
    assert (single["validation/accuracy_low"], single["validation/accuracy_high"]) == (0.0, 1.0)
    rows = sample_rows([*groups, *groups], [*probes, *extras], 3)
    assert [row["text"] for row in rows] == ["chain 0", "chain 1", "chain 2"]
    assert [row["passed"] for row in rows] == [False, True, False] and not sample_rows(groups, extras, 0)


def test_where_chains_err_is_read_from_chains_with_the_user_s_own_history() -> None:
    chains = [[ScoredChain(length=9, text=f"chain {n}")] for n in range(4)]
    own = [{"pair_id": f"p{n}", "order": n % 2} for n in range(2)]
    probes = [{**extra, "probe": "empty_history"} for extra in own]
    read: list[object] = []

    def reader(answers: Iterable[tuple[str, int, str | None]]) -> dict[str, float]:
        read.extend(answers)
        return {"allowed": 0.5, "recalled": 0.25}

    metrics = truth_metrics(chains, [*own, *probes], reader)
    assert read == [("p0", 0, "chain 0"), ("p1", 1, "chain 1")]
    assert metrics == {"eval/truth/allowed": 0.5, "eval/truth/recalled": 0.25}
    assert validation_line({"eval/accuracy": 0.75}) == "validation accuracy 0.750"
    line = validation_line({"eval/accuracy": 0.75, **metrics})
    assert line == "validation accuracy 0.750 · criteria allowed 50% · criteria recalled 25%"


def test_staleness_is_in_updates_and_padding_has_none() -> None:
    """A step trains the weights of the update before it; chains from those are not stale."""
    tags = [{"min_global_steps": version} for version in (4, 4, 3, 3)]
    padding = {"min_global_steps": 0, "is_padding": True}
    assert staleness_metrics(5, [*tags, padding]) == {"staleness/mean": 0.5, "staleness/max": 1}
