"""verl, vLLM and Ray on a CPU train a model of 100k parameters in several phases of one session."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import verl_world
from grpo_session import (
    CURRICULUM_STEPS,
    ROWS,
    STEPS,
    config,
    cre,
    curriculum,
    lines,
    training,
)

from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.curriculum.decks import unpack
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import ArtifactError
from pgenrm_train.run.tracking import samples_file


def test_a_judge_that_fails_three_calls_in_ten_is_null_and_never_zero(trained: Path) -> None:
    steps = training(trained, "judged", "cre")
    assert len(steps) == 2
    for line in steps:
        assert 0 < line["cre/reward/process_null_share"] < 1
        # Without a verdict for one chain its group has no process reward, so those that count are complete.
        assert line["cre/reward/process"] is None or line["cre/reward/process"] == pytest.approx(0.6)
        assert line["cre/time/verdicts"] > 0 and math.isfinite(line["cre/actor/grad_norm"]), (
            "the update waits for verdicts"
        )
    last = steps[-1]
    assert last["cre/judge/calls"] >= 20 and last["cre/judge/completion_tokens"] > 0
    kinds = {name.rsplit("/", 1)[1] for name in last if "no_verdict" in name}
    assert {"http_500", "html", "unreadable", "timeout"} <= kinds


def test_every_reward_part_is_in_the_metrics_of_every_step(trained: Path) -> None:
    steps = training(trained)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["stage"] == "cre"
        for name in ("total", "outcome", "process", "format"):
            assert math.isfinite(line[f"cre/reward/{name}"])
            assert line[f"cre/reward/{name}_std"] >= 0
        assert line["cre/signs/score_spread"] >= 0
        for name in (
            "pass_rate",
            "groups/zero_advantage_share",
            "order_first_share",
            "format_error_share",
            "length_cut_share",
            "rollout/cached_prompt_share",
        ):
            assert 0 <= line[f"cre/{name}"] <= 1
        assert line["cre/reward/error_share"] == 0
        assert 1 <= line["cre/response_length"] <= 64
        assert abs(line["cre/actor/ppo_kl"]) < 1e-5, (
            "vLLM's probabilities are the actor's: the weight sync works"
        )
        assert (
            0 <= line["cre/training/rollout_probs_diff_mean"] <= line["cre/training/rollout_probs_diff_max"]
        )
        assert line["cre/training/rollout_probs_diff_mean"] < 1e-3, "the sampler's probabilities"
        assert line["cre/training/rollout_actor_probs_pearson_corr"] > 0.99
        assert abs(line["cre/rollout_corr/kl"]) < 1e-3
        assert line["cre/perf/mfu/actor"] > 0 and line["cre/perf/throughput"] > 0
        assert line["cre/perf/max_memory_allocated_gb"] >= 0 and 0 <= line["cre/perf/cpu_utilization"] <= 1
    assert steps[-1]["cre/actor/kl_loss"] > 0 == pytest.approx(steps[0]["cre/actor/kl_loss"], abs=1e-6)


def test_validation_runs_at_the_start_at_its_steps_and_at_the_end(trained: Path) -> None:
    """The slice has 10 pairs in both orders with their own history, and as many rows of a probe."""
    import pyarrow.parquet as pq

    validations = [line for line in lines(trained / "cre/metrics.jsonl") if "eval/accuracy" in line]
    assert [line["step"] for line in validations] == [0, 3, STEPS]
    shares = (
        "accuracy_chosen_first",
        "format_error_share",
        "probe/swapped_history_accuracy",
        "signs/unverifiable_share",
    )
    for line in validations:
        assert all(0 <= line[name] <= 1 for name in ("eval/accuracy", "eval/order_flip_rate"))
        assert line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"]
        samples = pq.read_table(samples_file(trained / "cre/metrics.jsonl", line["step"])).to_pylist()
        assert len(samples) == 8 and all(row["text"] and row["tokens"] for row in samples)
        assert all(0 <= line[f"cre/validation/{name}"] <= 1 for name in shares)
        assert (
            line["cre/validation/reward/process"] is not None and line["cre/validation/response_length"] > 0
        )
    assert (
        validations[0]["cre/validation/length_drift"] == 1
        and max(line["eval/accuracy"] for line in validations) > 0
    )


def test_the_second_judge_rates_validation_chains_alone(trained: Path) -> None:
    rated = [
        line for line in lines(trained / "cre/metrics.jsonl") if "cre/validation/judge_gold/score" in line
    ]
    assert [line["step"] for line in rated] == [0, 3, STEPS]
    for line in rated:
        assert line["cre/validation/judge_gold/score"] == 0.25
        gap = line["cre/validation/judge_gold/training_judge"] - 0.25
        assert line["cre/validation/judge_gold/gap"] == pytest.approx(gap)
    assert not any("judge_gold" in name for line in training(trained) for name in line)


def test_a_judge_without_a_verdict_is_null(trained: Path) -> None:
    """Every sixth pair has none: the share is reported and the mean is over those that have one."""
    steps = training(trained)
    assert max(line["cre/reward/process_null_share"] for line in steps) > 0
    assert all(line["curriculum/reward/process"] is None for line in training(trained, "curriculum"))


def test_batches_are_those_of_the_pure_sampler(trained: Path) -> None:
    sampler = CurriculumSampler(ROWS, prompts_per_step=8, steps=STEPS, seed=0)
    assert [line["rows"] for line in lines(trained / "cre/batches.jsonl")] == [
        sampler.next_batch(s) for s in range(1, STEPS + 1)
    ]


def test_mining_measures_every_row_in_both_orders_and_feeds_the_curriculum(trained: Path) -> None:
    import pyarrow.parquet as pq

    folder = trained / "curriculum"
    records = pq.read_table(folder / "hardness.parquet").to_pylist()
    assert [row["pair_id"] for row in records] == [f"p{i}" for i in range(ROWS)]
    assert {row["pass_rate"] for row in records} <= {0.0, 0.5, 1.0} and {
        row["samples"] for row in records
    } == {2}
    assert {row["order_gap"] for row in records} == {0.0, 1.0}
    hard = {row["index"] for row in records if row["pass_rate"] == 0.5}
    first = lines(folder / "batches.jsonl")[0]
    assert sum(i in hard for i in first["rows"]) / 8 == pytest.approx(0.75)
    counts = json.loads((folder / "hardness.json").read_text())
    assert (
        counts["hard"] == len(hard)
        and counts["suspect"] == pq.read_metadata(folder / "suspect.parquet").num_rows
    )


def test_the_saved_sampler_knows_the_rollouts_of_its_own_step(trained: Path) -> None:
    """The marker in the last step's checkpoint holds the evidence of that step's groups."""
    folder = trained / "curriculum"
    state = json.loads((folder / f"verl/global_step_{CURRICULUM_STEPS}/complete.json").read_text())["sampler"]
    drawn = [i for line in lines(folder / "batches.jsonl") for i in line["rows"]]
    assert unpack(state["evidence"], 3, "<f8")[0].tolist() == sorted(set(drawn))
    steps = training(trained, "curriculum")
    assert all(line["curriculum/curriculum/target_hard_share"] == 0.75 for line in steps)
    assert sum(line["curriculum/groups/discarded_chains"] for line in steps) > 0, (
        "groups without advantage were sampled again"
    )
    for line in steps:
        assert line["curriculum/curriculum/hard_pairs"] + line["curriculum/curriculum/rest_pairs"] + line.get(
            "curriculum/curriculum/suspect_pairs", 0
        ) == pytest.approx(ROWS)


def test_the_reference_of_the_second_phase_is_its_start(trained: Path) -> None:
    assert training(trained, "curriculum")[0]["curriculum/actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)


def test_a_second_arm_starts_where_the_first_did_and_has_its_own_settings(trained: Path) -> None:
    step = training(trained, "arm", "curriculum")[0]
    assert step["curriculum/actor/kl_loss"] == pytest.approx(0.0, abs=1e-6), (
        "not what the first arm's training has left"
    )
    assert step["curriculum/curriculum/target_hard_share"] is None
    sampler = CurriculumSampler(ROWS, prompts_per_step=8, steps=1, seed=0)
    assert [line["rows"] for line in lines(trained / "arm/batches.jsonl")] == [sampler.next_batch(1)]


def test_checkpoints_load_with_their_tokenizer_and_differ(trained: Path, world: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [world / "start", trained / "cre/checkpoint", trained / "curriculum/checkpoint"]
    weights = [AutoModelForCausalLM.from_pretrained(f).model.layers[0].mlp.up_proj.weight for f in folders]
    assert all(w.dtype == torch.float32 for w in weights)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    ids = [AutoTokenizer.from_pretrained(f)("user likes warm . <JSON_START>")["input_ids"] for f in folders]
    assert ids[0] == ids[1] == ids[2]


def test_the_export_is_what_verls_merger_makes_before_rounding(trained: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    ours = load_file(trained / "cre/checkpoint/model.safetensors")
    theirs = verl_world.merged_by_verl(
        trained / f"cre/verl/global_step_{STEPS}", tmp_path / "merged"
    ).state_dict()
    assert all(torch.equal(tensor.bfloat16().float(), theirs[name]) for name, tensor in ours.items())


def test_the_watchdog_sees_each_file_of_the_export(trained: Path) -> None:
    heartbeat = json.loads((trained / "cre/heartbeat.json").read_text())
    assert heartbeat["doing"] == "exporting the checkpoint, file 1 of 1"


def test_complete_phases_are_kept(trained: Path, world: Path) -> None:
    before = (trained / "cre/checkpoint/model.safetensors").stat().st_mtime_ns
    began = time.monotonic()
    second = curriculum(world, trained)
    assert [t.steps for t in launch(config(trained), [cre(world, trained), second])] == [
        STEPS,
        CURRICULUM_STEPS,
    ]
    assert time.monotonic() - began < 30, "nothing was started"
    assert (trained / "cre/checkpoint/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="4 steps and 5 are planned"):
        launch(config(trained), [cre(world, trained, steps=5)])
