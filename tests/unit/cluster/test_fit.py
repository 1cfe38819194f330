"""What the plan refuses before a start, on the memory of this machine, and its early warnings."""

from pathlib import Path

import pytest

from pgenrm_train.cluster.preflight import fit, gpus
from pgenrm_train.cluster.preflight.checks import CHECKS, fail_early
from pgenrm_train.config import TRAINED, Config, load
from pgenrm_train.errors import PreflightError
from pgenrm_train.run.checkpoints import mark_complete
from recipes.psi import with_zero_stage

PSI, CRE, CURRICULUM = TRAINED


def composed(*keys: str) -> Config:
    return load("recipe=pipeline", "model=qwen3_8b", "data=chatbot_arena", *keys)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[gpus.Gpu]:
    """The GPUs of this machine, to be filled."""
    visible: list[gpus.Gpu] = []
    monkeypatch.setattr(fit, "visible_gpus", lambda: visible)
    return visible


def test_a_later_stage_that_does_not_fit_is_refused_before_the_first(
    cards: list[gpus.Gpu], tmp_path: Path
) -> None:
    cards.append(gpus.Gpu("NVIDIA H100", 79.6, 79.0, (9, 0)))
    config = composed("cluster=gpu1", f"run_dir={tmp_path / 'run'}")
    assert list(fit.check_fit(config, PSI)) == []
    (problem,) = fit.check_fit(config, CRE)
    assert problem.startswith("the plan of cre does not fit: cre: update needs") and "of 79.6 GiB" in problem
    change = problem.partition("the nearest that fits is ")[2].partition(" (")[0].split()
    assert list(fit.check_fit(composed("cluster=gpu1", *change), CRE)) == []
    config.preflight.skip = [name for name in CHECKS if name != "fit"]
    with pytest.raises(PreflightError, match="the plan of cre does not fit"):
        fail_early(config, TRAINED)
    config.preflight.skip.append("fit")
    fail_early(config, TRAINED)


def test_memory_is_that_of_the_smallest_gpu_here(cards: list[gpus.Gpu]) -> None:
    config = composed("cluster=gpu8", "cluster.processes_per_node=2", "cluster.zero_stage=2")
    cards += [gpus.Gpu("NVIDIA H200", 140.4, 140.0, (9, 0))] * 2
    assert list(fit.check_fit(config, PSI)) == list(fit.check_fit(config, CRE)) == []
    cards[1] = gpus.Gpu("NVIDIA L40S", 45.0, 44.0, (8, 9))
    assert "of 45 GiB" in next(iter(fit.check_fit(config, PSI)))
    cards.clear()
    assert "of 79.6 GiB" in next(iter(fit.check_fit(config, CRE))), "GPUs of other machines: plan.card"


def test_the_zero_stage_follows_the_memory_of_this_machine(cards: list[gpus.Gpu]) -> None:
    config = composed("cluster=gpu8")
    assert config.cluster.zero_stage is None and fit.zero_stage_here(config) == 2, "plan.card is an H100"
    cards.append(gpus.Gpu("NVIDIA L40S", 45.0, 44.0, (8, 9)))
    assert fit.zero_stage_here(config) == 3
    cards[0] = gpus.Gpu("NVIDIA H200", 140.4, 140.0, (9, 0))
    assert fit.zero_stage_here(config) == 1
    assert fit.zero_stage_here(composed("cluster=gpu8", "model.name=someone/else")) == 3, "no plan"
    assert fit.zero_stage_here(composed("cluster=gpu8", "cluster.zero_stage=3")) == 3


def test_a_started_training_keeps_its_zero_stage(
    cards: list[gpus.Gpu], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("cluster=gpu8")
    assert with_zero_stage(config, tmp_path).cluster.zero_stage == 2
    assert "psi: ZeRO stage 2 (by the plan" in capsys.readouterr().out
    (tmp_path / "steps/checkpoint-20").mkdir(parents=True)
    mark_complete(tmp_path / "steps/checkpoint-20", {"zero_stage": 3})
    assert with_zero_stage(config, tmp_path).cluster.zero_stage == 3
    assert "as started" in capsys.readouterr().out
    given = composed("cluster=gpu8", "cluster.zero_stage=1")
    assert with_zero_stage(given, tmp_path) is given, "another stage is refused by the checkpoint's marker"


def test_texts_beyond_the_positions_are_refused_before_psi(cards: list[gpus.Gpu]) -> None:
    config = composed("cluster=gpu8", "model.max_prompt_tokens=40000")
    (problem,) = fit.check_fit(config, PSI)
    assert "48192 exceeds the model's 40960 positions" in problem and "max_prompt_tokens=32768" in problem


def test_eight_billion_parameters_on_a_cpu_are_a_forgotten_cluster() -> None:
    (problem,) = fit.check_fit(composed(), PSI)
    assert "the plan of psi does not fit" in problem and "use another cluster=" in problem
    assert list(fit.check_fit(load("recipe=pipeline"), PSI)) == []


def test_models_that_cannot_be_planned_are_not_refused(cards: list[gpus.Gpu]) -> None:
    assert list(fit.check_fit(composed("cluster=gpu1", "model.name=someone/else"), CRE)) == []
    assert list(fit.check_fit(load("recipe=evaluate", "model=baseline"), "evaluate")) == []


@pytest.mark.parametrize("stage", TRAINED)
def test_few_steps_of_every_stage_are_warned_about_before_the_first(stage: str) -> None:
    key = "psi.max_steps=5" if stage == PSI else f"{stage}.steps=5"
    (warning,) = fit.planned_warnings(composed("cluster=gpu8", key), TRAINED)
    assert warning.startswith(f"{stage} makes 5 optimiser steps, and fewer than 10")
    assert "the nearest better setting is" in warning
    rest = [name for name in TRAINED if name != stage]
    assert list(fit.planned_warnings(composed("cluster=gpu8", key), rest)) == []
