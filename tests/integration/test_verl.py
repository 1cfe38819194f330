"""verl, vLLM and Ray on a CPU train a model of 100k parameters in both phases, are killed, and resume."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import verl_world
from llm_server import serve, slowly

from pgenrm_train.backends.grpo.config import check, to_verl, verl_variables
from pgenrm_train.backends.grpo.phase import HardnessSource, Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec, Sample
from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.cluster.sizes import with_sizes
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.curriculum.decks import unpack
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError
from pgenrm_train.rewards.reward import RewardWeights
from pgenrm_train.run.tracking import samples_file

STEPS, ROWS, CURRICULUM_STEPS = 4, 48, 3
CHILD = "backends.grpo.supervisor"  # in the command line of the training process


def config(run_dir: Path, max_failures: int = 0, **changed: Any) -> Config:
    settings = Config(recipe="pipeline", run_dir=str(run_dir))
    settings.cluster.max_failures = max_failures
    settings.model.max_prompt_tokens, settings.model.max_response_tokens = 64, 64
    settings.tracking.kind = "none"
    for section in (settings.cre, settings.curriculum):
        section.prompts_per_step, section.mini_batch_prompts, section.group_size = 8, 8, 4
        section.micro_batch_size, section.learning_rate, section.kl_coefficient = 16, 1e-3, 0.01
        section.save_every, section.keep_checkpoints, section.stall_seconds = 1, 2, 180.0  # a busy machine
        section.validate_every = 3
        for key, value in changed.items():
            setattr(section, key, value)
    settings.curriculum.hard_share_start, settings.curriculum.hard_share_end = 0.25, 0.75
    settings.curriculum.schedule, settings.curriculum.resample = "self_paced", 1
    return settings


@pytest.fixture(scope="module", autouse=True)
def judge_on_path() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(verl_world.__file__).parent))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    verl_world.write_checkpoint(folder / "start", sft_steps=220)
    verl_world.write_rows(folder / "rows.parquet", ROWS)
    verl_world.write_rows(folder / "validation.parquet", 10, seed=5, both_orders=True)
    verl_world.write_rows(folder / "mirror.parquet", ROWS, turned=True)
    return folder


def cre(world: Path, run: Path, steps: int = STEPS) -> Phase:
    return Phase(
        StageName.CRE,
        world / "start",
        world / "rows.parquet",
        run / "cre",
        steps,
        judge=JudgeSpec("verl_world:unreliable_judge"),
        gold=JudgeSpec("verl_world:strict_judge"),
        validation=world / "validation.parquet",
    )


def curriculum(world: Path, run: Path) -> Phase:
    """Self-paced, with hardness from one chain in each order."""
    return Phase(
        StageName.CURRICULUM,
        None,
        world / "rows.parquet",
        run / "curriculum",
        CURRICULUM_STEPS,
        weights=RewardWeights(process=0.0),
        hardness=HardnessSource(samples=2, mirror=world / "mirror.parquet"),
    )


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CRE, two arms of the curriculum, and CRE with a language model as judge, in one session."""
    run = tmp_path_factory.mktemp("run")
    second = curriculum(world, run)
    arm = Phase(
        StageName.CURRICULUM,
        run / "cre/checkpoint",
        world / "rows.parquet",
        run / "arm",
        1,
        settings={"schedule": "uniform", "advantage": "dr_grpo"},
    )
    with serve(unreliable_judge()) as server:
        settings = EndpointConfig(
            kind="endpoint",
            base_url=server.url,
            name="stub",
            attempts=1,
            timeout_seconds=1.0,
            give_up_after=99,
        )
        third = Phase(
            StageName.CRE,
            world / "start",
            world / "rows.parquet",
            run / "judged",
            2,
            judge=JudgeSpec(
                "pgenrm_train.backends.api.roles:judge_for_rewards", settings, run / "judge_cache"
            ),
            settings={"advantage": "gdpo", "warmup_steps": 1, "min_learning_rate_ratio": 0.1},
        )
        whole = config(run)
        whole.judge.kind = "endpoint"  # of a phase with advantage=gdpo, which needs one
        done = launch(whole, [cre(world, run), second, arm, third])
    assert [t.steps for t in done] == [STEPS, CURRICULUM_STEPS, 1, 2]
    assert not children_of_ray()
    return run


def unreliable_judge() -> Any:
    """A judge over HTTP that answers 0.8 · (1 − 0.25) = 0.6; three calls in ten fail, hang or are garbage."""
    troubles = {0: {"status": 500}, 3: {"raw": b"<html>"}, 6: "I would say 1.0!"}

    def behaviour(body: dict[str, Any], number: int) -> Any:
        if number == 7:
            return slowly(2.0, "too late")
        return troubles.get(number % 10, '{"reason": "likes", "covered": 0.8, "unsupported": 0.25}')

    return behaviour


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


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def training(run: Path, folder: str = "cre", stage: str | None = None) -> list[dict[str, Any]]:
    """The metric lines of training steps; validation has lines of its own."""
    return [
        line for line in lines(run / folder / "metrics.jsonl") if f"{stage or folder}/reward/total" in line
    ]


def children_of_ray() -> list[str]:
    """Command lines of Ray, vLLM and veRL processes below this one."""
    commands = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if any(name in line for name in ("raylet", "ray::", "EngineCore", "gcs_server", CHILD)):
            commands.append(line)
    return commands


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


def wait_for(condition: Any, seconds: float, event: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {event}")


def in_background(work: Any) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BackendError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]


@pytest.mark.slow
def test_killed_and_stalled_runs_resume_as_if_uninterrupted(
    world: Path, trained: Path, tmp_path: Path
) -> None:
    """kill -9 after step 1 and a frozen engine after step 3 change no batch, reward or weight."""
    import torch
    from safetensors.torch import load_file

    phase, saved = cre(world, tmp_path), tmp_path / "cre/verl"

    thread, killed = in_background(lambda: launch(config(tmp_path), [phase]))
    wait_for(lambda: (saved / "global_step_1/complete.json").exists(), 240, "the first checkpoint")
    driver = processes(CHILD)[0]
    followers = driver.children(recursive=True)
    assert any("EngineCore" in " ".join(p.cmdline()) for p in followers)
    driver.send_signal(signal.SIGKILL)
    thread.join(timeout=60)
    assert "code -9" in str(killed[0])
    wait_for(
        lambda: not psutil.wait_procs(followers, timeout=0)[1], 30, "Ray and vLLM to follow their driver"
    )
    (saved / "global_step_9").mkdir()  # as if the kill had come while a checkpoint was being written

    thread, done = in_background(
        lambda: launch(config(tmp_path, stall_seconds=12.0, max_failures=1), [phase])
    )
    wait_for(lambda: (saved / "global_step_3/complete.json").exists(), 240, "the third checkpoint")
    engine = processes("EngineCore")[0]
    engine.suspend()
    thread.join(timeout=300)
    assert done[0][0].steps == STEPS, "the watchdog ended it, and it was started again by itself"
    assert not children_of_ray()
    (lost,) = lines(tmp_path / "cre/restarts.jsonl")
    assert "cre made no progress for" in lost["reason"]
    assert (tmp_path / "cre/stall_stacks.txt").stat().st_size > 0
    assert not (saved / "global_step_9").exists()
    assert lines(tmp_path / "cre/batches.jsonl") == lines(trained / "cre/batches.jsonl")
    names = ("step", "cre/reward/total", "cre/reward/process", "cre/response_length")
    ours, theirs = ([[line[name] for name in names] for line in training(run)] for run in (tmp_path, trained))
    assert ours == theirs
    weights = [load_file(run / "cre/checkpoint/model.safetensors") for run in (tmp_path, trained)]
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-5
    assert all(torch.isfinite(w).all() for w in weights[0].values())


@pytest.mark.slow
def test_a_killed_curriculum_resumes_with_the_same_pairs(world: Path, trained: Path, tmp_path: Path) -> None:
    """kill -9 after the first step of a self-paced curriculum: its next draw depends on its observations."""
    first = cre(world, trained)
    phase = dataclasses.replace(curriculum(world, tmp_path), start=first.checkpoint)
    thread, killed = in_background(lambda: launch(config(tmp_path), [phase]))
    wait_for(
        lambda: (tmp_path / "curriculum/verl/global_step_1/complete.json").exists(),
        300,
        "the first checkpoint",
    )
    processes(CHILD)[0].send_signal(signal.SIGKILL)
    thread.join(timeout=60)
    assert "code -9" in str(killed[0])
    wait_for(lambda: not children_of_ray(), 30, "Ray and vLLM to follow their driver")
    assert launch(config(tmp_path), [phase])[0].steps == CURRICULUM_STEPS
    assert lines(tmp_path / "curriculum/batches.jsonl") == lines(trained / "curriculum/batches.jsonl")


@pytest.mark.slow
def test_two_ranks_with_lora_are_killed_resume_and_export_the_trained_model(
    world: Path, tmp_path: Path
) -> None:
    """kill -9 after step 1 of 3: data, adapters and optimiser resume; the merged export is the actor."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = config(tmp_path, kl_coefficient=0.0)
    settings.cluster.processes_per_node, settings.model.lora.rank, settings.model.lora.alpha = 2, 4, 8
    phase = dataclasses.replace(cre(world, tmp_path, steps=3), validation=None)
    thread, killed = in_background(lambda: launch(settings, [phase]))
    wait_for(
        lambda: (tmp_path / "cre/verl/global_step_1/complete.json").exists(), 400, "the first checkpoint"
    )
    processes(CHILD)[0].send_signal(signal.SIGKILL)
    thread.join(timeout=60)
    assert "code -9" in str(killed[0])
    wait_for(lambda: not children_of_ray(), 30, "Ray and vLLM to follow their driver")

    assert launch(settings, [phase])[0].steps == 3
    sampler = CurriculumSampler(ROWS, prompts_per_step=8, steps=3, seed=0)
    assert [line["rows"] for line in lines(tmp_path / "cre/batches.jsonl")] == [
        sampler.next_batch(step) for step in (1, 2, 3)
    ]
    steps = training(tmp_path)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(abs(line["cre/actor/ppo_kl"]) < 1e-4 for line in steps), (
        "vLLM samples with the actor's adapters, after the kill too"
    )
    last = tmp_path / "cre/verl/global_step_3"
    optimiser = torch.load(last / "actor/optim_world_size_2_rank_0.pt", weights_only=False)
    assert {int(state["step"]) for state in optimiser["state"].values()} == {3}

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "cre/checkpoint")
    start = AutoModelForCausalLM.from_pretrained(world / "start")
    actor = verl_world.merged_by_verl(last, tmp_path / "merged")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        exported, trained, before = (
            model(input_ids=ids).logits.log_softmax(-1) for model in (ours, actor, start)
        )
    learnt = float((trained - before).abs().mean())
    assert learnt > 0 and float((exported - trained).abs().mean()) < 0.2 * learnt, (
        "up to the merger's rounding to bfloat16"
    )


def test_to_verl_maps_a_gpu_configuration_that_verl_accepts(world: Path) -> None:
    from verl.utils.config import validate_config

    gpu = Config(recipe="cre")
    gpu.cluster.device, gpu.cluster.processes_per_node, gpu.cluster.tensor_parallel = "cuda", 8, 2
    gpu.model.max_prompt_tokens, gpu.model.max_response_tokens = 256, 256
    gpu.model.lora.rank = 16
    gpu = with_sizes(gpu, StageName.CRE, 8192)
    composed = to_verl(
        gpu, "cre", start=world / "start", rows=world / "rows.parquet", work_dir=world, total_steps=7
    )
    validate_config(composed, use_reference_policy=True, use_critic=False)
    assert composed.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert (
        not composed.actor_rollout_ref.model.use_remove_padding
    )  # packing needs flash-attn, which the default does not
    gpu.model.attention = "flash_attention_2"
    composed = to_verl(
        gpu, "cre", start=world / "start", rows=world / "rows.parquet", work_dir=world, total_steps=7
    )
    assert composed.actor_rollout_ref.model.use_remove_padding
    assert composed.actor_rollout_ref.actor.use_kl_loss
    assert composed.trainer.total_training_steps == 7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"cre.mini_batch_prompts": 6, "cluster.processes_per_node": 5},
            r"cre.mini_batch_prompts × cre.group_size = 48 .* = 5",
        ),
        ({"cre.micro_batch_size": 7}, "cre.micro_batch_size=7 must divide the 1024"),
        ({"cluster.tensor_parallel": 3}, "cluster.tensor_parallel=3 must divide"),
        (
            {"model.max_response_tokens": 9000},
            r"model.max_prompt_tokens \+ model.max_response_tokens = 13096 exceeds the 512",
        ),
    ],
)
def test_conflicts_name_both_keys(world: Path, change: dict[str, int], text: str) -> None:
    settings = with_sizes(Config(recipe="cre"), StageName.CRE, 8192)
    for key, value in change.items():
        section, name = key.split(".")
        setattr(getattr(settings, section), name, value)
    with pytest.raises(ConfigError, match=text):
        check(settings, "cre", world / "start")


def sample(text: str, finished: bool = True) -> Sample:
    return Sample([1], [2], [0.0], text, finished, 0)


def test_scores_of_a_group() -> None:
    from pgenrm_train.backends.grpo.scoring import RewardSpec, score, settle

    row, weights = verl_world.example(0), RewardWeights()
    chosen = int(row["reward_model"]["ground_truth"])
    right = verl_world.chain("warm", (8, 2) if chosen == 0 else (2, 8))
    samples = [sample(right), sample(right, finished=False), sample("no chain"), sample(right)]
    verdicts = iter([1.0, None])

    def judge(text: str, example: Any) -> float | None:
        return next(verdicts)

    group = [score(one, row, weights, judge) for one in samples]
    settled = settle(group, RewardSpec(weights, null_policy="group_mean"))
    assert [one.score for one in settled] == [1.5, -0.1, -0.1, 1.5], "the mean of the existing verdicts"
    settled = settle(group, RewardSpec(weights, null_policy="drop_process_for_group"))
    assert settled[1].failure == "length"
    assert [one.score for one in settled] == [1.0, -0.1, -0.1, 1.0], (
        "no verdict for one: no process reward in its group"
    )
    assert [one.process for one in settled] == [1.0, None, None, None]


def test_a_raising_reward_is_data_with_the_mean_of_its_group() -> None:
    from pgenrm_train.backends.grpo.scoring import RewardSpec, score, settle

    row, weights = verl_world.example(0), RewardWeights()

    def judge(text: str, example: Any) -> float | None:
        raise OSError("connection lost")

    samples = [sample(verl_world.chain("warm", (5, 5))), sample("no chain")]
    group = [score(one, row, weights, judge) for one in samples]
    first, second = settle(group, RewardSpec(weights, null_policy="drop_process_for_group"))
    assert first.error == "OSError: connection lost"
    assert first.score == second.score == pytest.approx(-0.1)


def test_a_group_without_advantage_is_sampled_again_and_its_chains_are_counted() -> None:
    import asyncio

    from pgenrm_train.backends.grpo.rollout import ChainSampler, Group, Prompt
    from pgenrm_train.backends.grpo.scoring import ScoredChain

    def group(*outcomes: float) -> list[ScoredChain]:
        return [ScoredChain(1, outcome=outcome, score=outcome) for outcome in outcomes]

    class Scripted(ChainSampler):
        def __init__(self, *groups: list[ScoredChain]) -> None:
            self.groups, self.calls = groups, 0

        async def _mark(self, prompt: Prompt, status: str) -> None:
            assert status == "running", "sampled once"

        async def _sampled(self, prompt: Prompt, attempt: int = 0) -> Group:
            assert attempt == self.calls
            self.calls += 1
            return Group(prompt, [], asyncio.create_task(asyncio.sleep(0, self.groups[attempt])))

    def resample(limit: int, *groups: list[ScoredChain]) -> tuple[list[float], tuple[int, int], int]:
        sampler = Scripted(*groups)

        async def run() -> tuple[list[float], tuple[int, int], int]:
            prompt = Prompt("s1p00000", verl_world.example(0), 1, "0", 2, 1.0, limit)
            kept = await sampler._with_advantage(prompt)
            await kept.scoring
            group = kept.scored()
            discarded = group.discarded_passes, group.discarded_chains
            return [chain.score for chain in group.chains], discarded, sampler.calls

        return asyncio.run(run())

    same, other = group(1, 1), group(1, 0)
    assert resample(0, same) == ([1, 1], (0, 0), 1)
    assert resample(2, other, same) == ([1, 0], (0, 0), 1)
    assert resample(2, same, other) == ([1, 0], (2, 2), 2)
    assert resample(1, same, group(0, 0)) == ([0, 0], (2, 2), 2), "bounded: the last is kept"


def test_a_chain_is_judged_while_others_are_still_sampled_and_its_group_does_not_wait(world: Path) -> None:
    """Four chains that end one after the other, and reach the actor before the last verdict."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.rollout import ChainSampler, Prompt

    row, events = verl_world.example(0), []
    start = str(world / "start")

    class Server:
        """Stand-in for the handle of a vLLM server."""

        def __init__(self) -> None:
            self.generate, self.calls = SimpleNamespace(remote=self.answer), 0

        async def answer(self, **_: Any) -> Any:
            self.calls += 1
            await asyncio.sleep(0.3 * self.calls)
            events.append("ended")
            return SimpleNamespace(
                token_ids=tokens, log_probs=[0.0] * len(tokens), extra_fields={}, stop_reason=None
            )

    def judge(text: str, example: Any) -> float:
        events.append("judged")
        time.sleep(0.3)
        return 0.5

    async def sample_group() -> list[Any]:
        group = await sampler._sampled(Prompt("s1p0", row, 1, "0", 4, 1.0))
        assert not group.scoring.done()
        return await group.scoring

    settings = OmegaConf.create(
        {
            "data": {"max_prompt_length": 64, "max_response_length": 128},
            "actor_rollout_ref": {
                "model": {"path": start, "trust_remote_code": False},
                "rollout": {"max_num_seqs": 4, "agent": {"num_workers": 0}},
            },
        }
    )
    sampler = ChainSampler(settings, [Server()])
    sampler.judge, sampler.threads = judge, ThreadPoolExecutor(4)
    tokens = sampler.tokenizer(verl_world.chain("warm", (8, 2)))["input_ids"] + [
        sampler.tokenizer.eos_token_id
    ]
    assert [chain.process for chain in asyncio.run(sample_group())] == [0.5] * 4
    assert events == ["ended", "judged"] * 4, "each chain is judged when it ends"


def test_half_written_checkpoints_and_lines_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pgenrm_train.backends.grpo.progress import newest_checkpoint
    from pgenrm_train.run.tracking import trim

    for step, complete in ((2, True), (4, True), (6, False)):
        (tmp_path / f"global_step_{step}").mkdir()
        if complete:
            marker = json.dumps({"step": step, "sampler": {"at": step}})
            (tmp_path / f"global_step_{step}/complete.json").write_text(marker)
    assert newest_checkpoint(tmp_path) == (tmp_path / "global_step_4", 4, {"at": 4})
    assert newest_checkpoint(tmp_path / "none") is None
    assert f"half-written checkpoint {tmp_path / 'global_step_6'}" in capsys.readouterr().out
    (tmp_path / "m.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5}\n{"ste')
    trim(tmp_path / "m.jsonl", 4)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 3}\n{"step": 4}\n'


def test_logprobs_in_chunks_are_those_that_verl_takes_token_by_token() -> None:
    import torch
    from verl.utils import torch_functional

    theirs = torch_functional.logprobs_from_logits_v2
    from pgenrm_train.backends.grpo import worker as verl_worker

    assert torch_functional.logprobs_from_logits_v2 is verl_worker.logprobs_in_chunks
    if theirs is verl_worker.logprobs_in_chunks:  # imported before this test
        theirs = torch_functional.logprobs_from_logits_naive
    torch.manual_seed(0)
    for shape in ((2 * verl_worker.CHUNK + 3,), (3, 7)):
        logits = torch.randn(*shape, 11, requires_grad=True)
        labels = torch.randint(11, shape)
        results = [take(logits, labels) for take in (theirs, verl_worker.logprobs_in_chunks)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r.square().sum(), logits)[0] for r in results))


def test_the_cpu_patches_are_still_needed() -> None:
    """If one of these fails, a patch in grpo/cpu.py or a setting in `config.cpu_keys` can go."""
    from verl.model_merger import fsdp_model_merger
    from verl.workers.engine.fsdp import transformer_impl

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)
    from verl.workers.rollout.vllm_rollout import utils, vllm_async_server, vllm_rollout

    for module, words in (
        (vllm_rollout, "job_id = ray.get_runtime_context().get_job_id()"),
        (vllm_async_server, 'os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()'),
        (utils, 'os.environ.get("VERL_RAY_JOB_ID"'),
    ):
        assert words in inspect.getsource(module), "the socket has another name: ray/job_ids.py can go"
    assert ".bfloat16()" in inspect.getsource(fsdp_model_merger), (
        "verl's merger still rounds: our export stays"
    )
    script = """
import torch
from torch import distributed
try:
    distributed.init_process_group("cpu:gloo,cpu:gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    raise SystemExit("torch takes a device named twice: use_gloo can go")
except (ValueError, AssertionError):
    pass
try:
    torch.Generator("cpu").get_offset()
    raise SystemExit("CPU generators have offsets: chunked prefill can be switched on")
except RuntimeError:
    pass
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
layer = torch.nn.Linear(64, 64, bias=False)
layer.weight.requires_grad_(False)
dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
if layer.weight.numel():
    raise SystemExit("vLLM keeps Linear weights: keep_linear_weights can go")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_environment_reaches_every_worker() -> None:
    variables = verl_variables(Config(recipe="cre"))
    modules = variables["VERL_USE_EXTERNAL_MODULES"].split(",")
    assert modules == ["pgenrm_train.backends.ray.job_ids", "pgenrm_train.backends.grpo.cpu"]
    assert all(isinstance(value, str) for value in variables.values())
