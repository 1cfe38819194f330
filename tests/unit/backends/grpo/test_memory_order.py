"""vLLM is asleep whenever the actor needs its memory: while weights and optimiser move."""

from pathlib import Path
from typing import Any

import pytest
import verl_world

from pgenrm_train.backends.grpo.phase import Phase, PhaseRun
from pgenrm_train.config import Config, StageName
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.files import write_json


class Calls:
    """Remote handles of the actor and of vLLM: they record what a trainer calls, in order."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.made.append(name) or []


@pytest.mark.parametrize("mines", [False, True])
def test_vllm_wakes_after_the_optimiser_of_a_checkpoint_is_loaded(mines: bool, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.trainer import ChainTrainer

    config, work_dir = Config(recipe="cre"), tmp_path / "cre"
    rows = verl_world.write_rows(tmp_path / "rows.parquet", 16)
    run = PhaseRun(Phase(StageName.CRE, None, rows, work_dir, 4), config)
    sampler = CurriculumSampler(16, prompts_per_step=4, steps=4, seed=0)
    marker = {"step": 2, "sampler": sampler.state_dict()}
    (work_dir / "verl/global_step_2").mkdir(parents=True)
    write_json(work_dir / "verl/global_step_2/complete.json", marker)
    trainer, calls = object.__new__(ChainTrainer), Calls()
    trainer.awake, trainer.loaded = True, None  # as the phase before leaves them
    trainer.checkpoint_manager = trainer.actor_rollout_wg = calls
    trainer.rollout = Calls()
    verl = OmegaConf.create(
        {
            "trainer": {"v1": {}},
            "actor_rollout_ref": {"actor": {"use_kl_loss": False}},
            "algorithm": {"rollout_correction": {"bypass_mode": True}},
        }
    )
    trainer.prepare(run, verl, tmp_path / "start")
    if mines:
        list(trainer.measure([]))
    assert trainer.begin(sampler) == 2
    mining = ["update_weights", "sleep_replicas"] if mines else []
    assert calls.made == ["sleep_replicas", "begin_phase", *mining, "load_checkpoint", "update_weights"]
    trainer._shutdown_dump_executor()


def test_vllm_sleeps_while_the_actor_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pgenrm_train.backends.grpo import engine

    class Trained(Calls):
        """A trainer at its last step, and its workers; the export has two files."""

        def __getattr__(self, name: str) -> Any:
            answers = {"begin": 4, "last_saved": 4, "begin_export": [2]}
            return lambda *_, **__: self.made.append(name) or answers.get(name)

    work_dir = tmp_path / "cre"
    rows = verl_world.write_rows(tmp_path / "rows.parquet", 16)
    run = PhaseRun(Phase(StageName.CRE, None, rows, work_dir, 4), Config(recipe="cre"))
    for name in ("_verl", "_sampler"):
        monkeypatch.setattr(engine, name, lambda *_: None)
    monkeypatch.setattr(engine, "check_export", lambda draft: draft.mkdir(parents=True))
    trainer: Any = Trained()
    trainer.actor_rollout_wg = trainer
    engine._run_phase(run, tmp_path / "start", trainer)
    order = ["prepare", "begin", "last_saved", "sleep", "begin_export", "export_file", "export_file"]
    assert trainer.made == order
