"""Sessions of veRL are killed or stall, and resume."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import psutil
import pytest
import verl_world
from grpo_session import (
    CHILD,
    CURRICULUM_STEPS,
    ROWS,
    STEPS,
    children_of_ray,
    config,
    cre,
    curriculum,
    in_background,
    lines,
    processes,
    training,
    wait_for,
)

from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.curriculum.sampler import CurriculumSampler


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
