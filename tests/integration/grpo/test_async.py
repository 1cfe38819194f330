"""CRE and curriculum with `mode=async`: the next step is sampled while this one is judged; kill, resume."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

import pytest
from grpo_session import (
    CHILD,
    CURRICULUM_STEPS,
    ROWS,
    STEPS,
    children_of_ray,
    config,
    cre,
    in_background,
    lines,
    processes,
    training,
    wait_for,
)

from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.curriculum.sampler import CurriculumSampler


def batches() -> list[list[int]]:
    sampler = CurriculumSampler(ROWS, prompts_per_step=8, steps=STEPS, seed=0)
    return [sampler.next_batch(step) for step in range(1, STEPS + 1)]


@pytest.fixture
def run(trained: Path) -> Path:
    return trained / "async"


def test_each_step_after_the_first_is_sampled_one_update_early_and_corrected(run: Path) -> None:
    steps = training(run)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["cre/staleness/max"] for line in steps] == [0, 1, 1, 1]
    assert [line["cre/staleness/mean"] for line in steps] == [0, 1, 1, 1]
    assert abs(steps[0]["cre/actor/ppo_kl"]) < 1e-5
    assert all(abs(line["cre/actor/ppo_kl"]) > 1e-5 for line in steps[1:]), "the ratio is to the old sampler"
    assert all(abs(line["cre/rollout_corr/kl"]) > 1e-5 for line in steps[1:]), "the mismatch is logged"
    assert all(math.isfinite(line["cre/actor/grad_norm"]) for line in steps)
    assert [line["rows"] for line in lines(run / "cre/batches.jsonl")] == batches(), "those of sync"
    accuracies = [line["step"] for line in lines(run / "cre/metrics.jsonl") if "eval/accuracy" in line]
    assert accuracies == [0, 3, STEPS]


def test_groups_are_sampled_again_within_the_bound_and_the_curriculum_draws_one_step_early(
    run: Path,
) -> None:
    steps = training(run, "curriculum")
    assert [line["step"] for line in steps] == list(range(1, CURRICULUM_STEPS + 1))
    assert sum(line["curriculum/groups/discarded_chains"] for line in steps) > 0
    assert all(0 <= line["curriculum/staleness/mean"] <= 1 for line in steps)
    assert all(line["curriculum/staleness/max"] <= 1 for line in steps)
    assert all(line["curriculum/curriculum/target_hard_share"] == 0.75 for line in steps)
    assert [len(set(line["rows"])) for line in lines(run / "curriculum/batches.jsonl")] == [8] * len(steps)


def test_a_dead_judge_gives_null_verdicts(run: Path) -> None:
    steps = training(run, "dead", "cre")
    assert [line["cre/reward/process_null_share"] for line in steps] == [1, 1]
    assert all(line["cre/reward/process"] is None and line["cre/reward/outcome"] >= 0 for line in steps)


def test_with_several_updates_each_token_of_older_chains_is_weighted(run: Path) -> None:
    """`rollout_is=token`: min(actor / sampler, 2); 1 in the first step, whose sampler is the actor."""
    first, second = training(run, "dead", "cre")
    assert first["cre/rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
    assert second["cre/staleness/mean"] == 1
    assert second["cre/rollout_corr/rollout_is_max"] > 1.0001 > second["cre/rollout_corr/rollout_is_min"]
    one_update = training(run)[-1]
    assert "cre/rollout_corr/rollout_is_mean" not in one_update, "there the ratio is to the sampler"


def test_a_killed_run_trains_every_step_once(world: Path, tmp_path: Path) -> None:
    """kill -9 with two steps in flight; they are sampled again, with the weights of the checkpoint."""
    phase, saved = dataclasses.replace(cre(world, tmp_path), validation=None), tmp_path / "cre/verl"
    settings = config(tmp_path, mode="async", max_staleness=2)
    thread, killed = in_background(lambda: launch(settings, [phase]))
    wait_for(lambda: (saved / "global_step_1/complete.json").exists(), 240, "the first checkpoint")
    processes(CHILD)[0].send_signal(signal.SIGKILL)
    thread.join(timeout=60)
    assert "code -9" in str(killed[0])
    wait_for(lambda: not children_of_ray(), 30, "Ray and vLLM to follow their driver")
    assert launch(settings, [phase])[0].steps == STEPS
    steps = training(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line["cre/staleness/max"] <= 2 for line in steps)
    assert 0 in [line["cre/staleness/max"] for line in steps[1:]], "the first step after the kill"
    assert [line["rows"] for line in lines(tmp_path / "cre/batches.jsonl")] == batches()


def test_verls_own_buffer_trains_on_the_groups_that_end_first() -> None:
    """Why this is not verl's `colocate_async`: chance would decide which pairs a step trains, or drops."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

    class Scripted(ReplayBufferAsync):
        """Two steps of two groups, of which `pending` are still sampled."""

        pending = frozenset({"s1p0"})

        def _sync_metadata_from_transfer_queue(self) -> None:
            self.prompt_global_steps["train"] = {"s1p0": 1, "s1p1": 1, "s2p0": 2}
            self.pending_keys["train"] = set(self.pending)
            self.finished_keys["train"] = set(self.prompt_global_steps["train"]) - self.pending

        def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
            """In place of TransferQueue; the new groups are not sampled yet."""
            self.finished_keys[partition_id] -= uids

    buffer = Scripted(
        "colocate_async",
        {},
        max_off_policy_threshold=2,
        max_off_policy_strategy="drop",  # verl's default
        sampler_kwargs={},
        refill_fn=print,
    )
    ended, _ = buffer.wait_for_sampleable(1, "train", 2)
    chosen, *_ = buffer._select_prompt_uids("train", ended, 2)
    assert chosen == ["s1p1", "s2p0"], "step 1 trains a pair of step 2, because its own is still sampled"
    buffer.pending = frozenset()
    buffer._sync_metadata_from_transfer_queue()
    late = buffer._terminal_eviction_reasons(3, "train")
    assert "s1p0" in buffer._evict_terminal_groups(3, "train", late)[0], "its pair is dropped for another"
