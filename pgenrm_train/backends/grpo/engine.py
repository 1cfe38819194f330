"""GRPO on veRL: the phases of CRE and of the curriculum, in one warm session (METHOD §4 and §5).

`launch` runs `train` in a process of its own, whose environment is set before anything heavy is imported:

    launch(config, [Phase("cre", start, rows, cre_dir, 80, rewards=…), Phase("curriculum", None, rows, cur_dir, 60, …)])

A phase is complete when `<work_dir>/checkpoint` (Hugging Face format, tokenizer included) and `<work_dir>/trained.json` exist;
complete phases are kept.  An interrupted phase goes on after its newest complete veRL checkpoint: same batches in the same order,
same sampling seeds, same optimiser, schedule and step count.  Not bit-exact then: sums over a batch when several ranks or several
vLLM servers finish in another order, and on a GPU its kernels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pgenrm_train import errors
from pgenrm_train.backends.grpo.config import to_verl, verl_variables
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.config import Config, seed_of
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError, EngineLostError, NothingTrainedError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.run.process import die_with_parent
from pgenrm_train.run.tracking import append

TRAINED, ENGINE_LOG, RESTARTS = "trained.json", "engine.log", "restarts.jsonl"
__all__ = ["Phase", "launch", "to_verl", "train", "verl_variables"]


@dataclass(frozen=True)
class Phase:
    """One stage of GRPO.

    section: "cre" or "curriculum", whose settings apply.  start: checkpoint in Hugging Face format; None takes the phase before.
    rows: parquet with data_source, prompt, reward_model, extra_info.  steps: optimiser steps of the whole phase.
    weights: fields of `rewards.RewardWeights`.  judge: "module:factory" of a `base.Judge`, None for no process reward.
    mining_samples: K > 0 chains a row measure hardness before training, half of them on `mirror`, the rows in the other
    presentation order, when given.  signals: parquet of model-free signals a row, enough for a start without mining.
    settings: those of the section that this phase has other than the configuration, so that one session serves several arms.
    """

    section: str
    start: Path | None
    rows: Path
    work_dir: Path
    steps: int
    weights: Mapping[str, float] = field(default_factory=dict)
    judge: str | None = None
    judge_kwargs: Mapping[str, Any] = field(default_factory=dict)
    judge_in_flight: int = 64
    mining_samples: int = 0
    mirror: Path | None = None
    signals: Path | None = None
    validation: Path | None = (
        None  # rows as `rows`, each pair in both orders; sampled every `<section>.validate_every` steps
    )
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / "checkpoint"

    def config(self, config: Config) -> Config:
        """The configuration as this phase has it."""
        section = dataclasses.replace(getattr(config, self.section), **self.settings)
        return dataclasses.replace(config, **{self.section: section})


def launch(config: Config, phases: Sequence[Phase]) -> list[Trained]:
    """`train` in a child process, which is started again when its engine or a node of the cluster was lost.

    At most `cluster.max_failures` times; a new start waits for a lost node to come back.  Raises what `train` raises;
    EngineLostError when the child was killed.
    """
    return with_restarts(
        lambda: _launch(config, phases), config.cluster.max_failures, phases[0].work_dir / RESTARTS
    )


def with_restarts(work: Callable[[], list[Trained]], allowed: int, log: Path) -> list[Trained]:
    """`work`, done again after an EngineLostError up to `allowed` times; each is told and kept in `log`."""
    for made in range(allowed):
        try:
            return work()
        except EngineLostError as error:
            print(f"{error}\nstarting again from the newest checkpoint ({made + 1} of {allowed})", flush=True)
            append(log, {"time": time.time(), "reason": str(error)})
    return work()


def _launch(config: Config, phases: Sequence[Phase]) -> list[Trained]:
    """One child, from its start to its report."""
    folder = phases[0].work_dir
    folder.mkdir(parents=True, exist_ok=True)
    job, report = folder / "verl_job.json", folder / "verl_report.json"
    report.unlink(missing_ok=True)
    write_json(
        job,
        {
            "config": dataclasses.asdict(config),
            "phases": [dataclasses.asdict(p) for p in phases],
            "report": str(report),
        },
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | verl_variables(config)
    command = [sys.executable, "-m", "pgenrm_train.backends.grpo.engine", str(job)]
    child = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    told = ("cluster:", *(f"{phase.section}{sign}" for phase in phases for sign in " :"))
    # A thread, because Ray's daemons may hold the pipe open longer than the child lives.
    threading.Thread(target=_relay, args=(child.stdout, folder / ENGINE_LOG, told), daemon=True).start()
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        try:
            child.wait(timeout=40.0)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    return _read(report, code, folder)


def _relay(lines: IO[str] | None, log: Path, told: tuple[str, ...]) -> None:
    """Keep all that Ray, veRL and vLLM say in a file; show the progress lines."""
    assert lines is not None
    with log.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(line)
            out.flush()
            if line.startswith(told):
                print(line, end="", flush=True)


def _read(report: Path, code: int, folder: Path) -> list[Trained]:
    if not report.exists():
        killed = code < 0 and -code not in (signal.SIGINT, signal.SIGTERM)  # those are somebody's wish
        kind = EngineLostError if killed else BackendError
        raise kind(
            f"veRL's process ended with code {code} and no report; its last words are in {folder / ENGINE_LOG}"
        )
    found = read_json(report)
    if "error" in found:
        kind = getattr(errors, found["error"], BackendError)
        raise kind(found["message"])
    return [Trained(t["steps"], Path(t["checkpoint"]), t["metrics"]) for t in found["trained"]]


def train(config: Config, phases: Sequence[Phase], report: Path | None = None) -> list[Trained]:
    """Run the phases that are not complete, in order, on one session (with LoRA: a session each, for the adapter is merged between).

    Must run in the environment of `verl_variables(config)`.  report: where the watchdog leaves its message.
    """
    _check_environment(config)
    starts = _starts(phases)
    waiting = [i for i, phase in enumerate(phases) if _completed(phase) is None]
    sessions = [[i] for i in waiting] if config.model.lora.rank else [waiting] if waiting else []
    for together in sessions:
        _run_session(
            config,
            [phases[i] for i in together],
            [starts[i] for i in together],
            report or phases[0].work_dir / "verl_report.json",
        )
    return [done for phase in phases if (done := _completed(phase)) is not None]


def _run_session(config: Config, phases: Sequence[Phase], starts: Sequence[Path], report: Path) -> None:
    from pgenrm_train.backends.grpo.mining import check_cache
    from pgenrm_train.backends.grpo.session import Session, Watchdog, end_stalled

    for phase, start in zip(phases, starts, strict=True):
        check_cache(phase, start)
    configs = [phase.config(config) for phase in phases]
    sections = [getattr(c, p.section) for c, p in zip(configs, phases, strict=True)]
    first = _verl(configs[0], phases[0], starts[0])
    first.actor_rollout_ref.actor.use_kl_loss = any(section.kl_coefficient > 0 for section in sections)
    seconds = min(section.stall_seconds for section in sections)
    watchdog = Watchdog(seconds, lambda why: end_stalled(session_folder[0], report, why))
    watchdog.follow(phases[0].work_dir / "heartbeat.json")
    session_folder: list[Path] = [Path("/nonexistent")]
    with Session(config, first, watchdog) as session:
        session_folder[0] = session.folder
        for own, phase, start in zip(configs, phases, starts, strict=True):
            watchdog.follow(phase.work_dir / "heartbeat.json")
            _run_phase(own, phase, start, session)


def _verl(config: Config, phase: Phase, start: Path) -> Any:
    phase.work_dir.mkdir(parents=True, exist_ok=True)
    return to_verl(
        config, phase.section, start=start, rows=phase.rows, work_dir=phase.work_dir, total_steps=phase.steps
    )


def _run_phase(config: Config, phase: Phase, start: Path, session: Any) -> None:
    """Mine where asked, train to the planned step, export, and say so in `trained.json`."""
    from pgenrm_train.backends.grpo.scoring import RewardSpec
    from pgenrm_train.backends.grpo.trainer import PhaseRun

    started = time.monotonic()
    grpo, trainer = getattr(config, phase.section), session.trainer
    rewards = RewardSpec(
        phase.weights, phase.judge, phase.judge_kwargs, phase.judge_in_flight, grpo.null_policy
    )
    run = PhaseRun(
        stage=phase.section, rows=phase.rows, work_dir=phase.work_dir, steps=phase.steps, rewards=rewards, seed=seed_of(config, phase.section),
        keep_checkpoints=grpo.keep_checkpoints, resample=grpo.resample, validation=phase.validation, validate_every=grpo.validate_every,
        validate_temperature=config.eval.temperature,
        beat=session.watchdog.beat, max_null_share=0.0 if grpo.null_policy == "stop" else grpo.max_null_share,
    )  # fmt: skip
    session.watchdog.beat(phase.section, 0, "preparing the phase")
    trainer.prepare(run, _verl(config, phase, start), start)
    made = trainer.begin(_sampler(config, phase, trainer, start))
    if made < phase.steps:
        trainer.fit()
    _check_steps(phase, trainer.last_saved())
    session.watchdog.beat(phase.section, phase.steps, "exporting the checkpoint")
    export(trainer, phase, start, "float32" if config.cluster.device == "cpu" else config.model.dtype)
    last = {k: v for k, v in run.last.items() if v is not None}
    seconds = round(time.monotonic() - started, 1)
    write_json(phase.work_dir / TRAINED, {"steps": phase.steps, "metrics": last, "seconds": seconds})


def _sampler(config: Config, phase: Phase, trainer: Any, start: Path) -> Any:
    """The phase's sampler; measures hardness first where the schedule needs it."""
    from pgenrm_train.backends.grpo.mining import hardness
    from pgenrm_train.curriculum.sampler import CurriculumSampler, too_common

    grpo, run = getattr(config, phase.section), trainer.run
    shape: dict[str, Any] = {}
    if phase.section == "curriculum":
        shape = {
            "schedule": grpo.schedule, "start": grpo.hard_share_start, "end": grpo.hard_share_end,
            "band": (grpo.hard_low, grpo.hard_high), "suspect_weight": grpo.suspect_weight,
            "users": run.user_ids if grpo.user_balanced else None,
        }  # fmt: skip
        if phase.mining_samples or phase.signals:
            found = hardness(
                trainer, start, phase.mining_samples, phase.mirror, phase.signals, shape["band"], grpo.hard_by
            )
            shape |= {
                "hard": found["hard"],
                "suspect": found["suspect"],
                "pass_rates": found.get("pass_rate"),
            }
            shape["chains"] = phase.mining_samples
            if said := too_common(grpo.schedule, found["hard"], grpo.hard_share_start, grpo.hard_share_end):
                print(f"{phase.section}: {said}", flush=True)
    return CurriculumSampler(
        run.table.num_rows,
        prompts_per_step=grpo.prompts_per_step,
        steps=phase.steps,
        seed=seed_of(config, phase.section),
        **shape,
    )


def export(trainer: Any, phase: Phase, start: Path, dtype: str) -> None:
    """Write `<work_dir>/checkpoint` beside and rename it into place once it has been loaded."""
    from pgenrm_train.backends.grpo.worker import tokenizer_files

    draft = phase.work_dir / "checkpoint.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    trainer.export(draft, dtype)
    for file in tokenizer_files(start):
        shutil.copyfile(file, draft / file.name)
    _check_loads(draft)
    shutil.rmtree(phase.checkpoint, ignore_errors=True)
    draft.rename(phase.checkpoint)


def _check_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    _, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    broken = {
        key: names
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := list(found[key]))
    }
    if broken:
        raise ArtifactError(f"the exported checkpoint {folder} does not load as written: {broken}")


def _check_steps(phase: Phase, made: int) -> None:
    if made != phase.steps:
        raise NothingTrainedError(
            f"{phase.section} planned {phase.steps} steps and stands at {made}; see {phase.work_dir / 'metrics.jsonl'}"
        )


def _completed(phase: Phase) -> Trained | None:
    """What a complete phase reports; ArtifactError when it was complete with another number of steps."""
    said = phase.work_dir / TRAINED
    if not (said.exists() and (phase.checkpoint / "config.json").exists()):
        return None
    found = read_json(said)
    if found["steps"] != phase.steps:
        raise ArtifactError(
            f"{phase.work_dir} holds a {phase.section} of {found['steps']} steps and {phase.steps} are planned; use another run_dir"
        )
    return Trained(found["steps"], phase.checkpoint, found["metrics"])


def _starts(phases: Sequence[Phase]) -> list[Path]:
    """Where each phase starts; the first must say so."""
    if not phases or phases[0].start is None:
        raise ConfigError("the first phase needs a start checkpoint")
    return [phase.start or phases[i - 1].checkpoint for i, phase in enumerate(phases)]


def _check_environment(config: Config) -> None:
    needed = verl_variables(config)
    wrong = [
        name
        for name in ("VERL_USE_EXTERNAL_MODULES", "TRANSFER_QUEUE_ENABLE")
        if os.environ.get(name) != needed[name]
    ]
    if wrong:
        raise BackendError(
            f"{', '.join(wrong)} must be set by verl_variables(config) before verl is imported; use launch()"
        )


def main(job: Path) -> int:
    """Child of `launch`: the job's phases, and a report of what came of them."""
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.session import exit_on_terminate

    die_with_parent(signal.SIGTERM)
    exit_on_terminate()
    asked = json.loads(job.read_text())
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), asked["config"]))
    report = Path(asked["report"])
    try:
        trained = train(config, [_phase(p) for p in asked["phases"]], report)
    except errors.PGenRMError as error:
        write_json(report, {"error": type(error).__name__, "message": str(error)})
        return 2
    except Exception as error:
        traceback.print_exc()
        kind = EngineLostError if _died(error) else BackendError
        write_json(
            report, {"error": kind.__name__, "message": f"veRL failed with {type(error).__name__}: {error}"}
        )
        return 1
    write_json(report, {"trained": [dataclasses.asdict(t) for t in trained]})
    return 0


def _died(error: Exception) -> bool:
    """Whether a process or machine of the session is gone, rather than code in it wrong."""
    from ray import exceptions

    return isinstance(
        error, exceptions.RayActorError | exceptions.NodeDiedError | exceptions.WorkerCrashedError
    )


def _phase(said: dict[str, Any]) -> Phase:
    names = ("start", "rows", "work_dir", "validation", "mirror", "signals")
    paths = {name: Path(said[name]) for name in names if said.get(name) is not None}
    return Phase(**(said | paths))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
