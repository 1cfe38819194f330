"""verl's synchronous PPO trainer with our sampler, our rollout and every reward part in the metrics.

One `ChainTrainer` serves several phases (CRE, curriculum) on the same workers: `begin` hands it the rows, sampler and settings of
a phase, `fit` is verl's own loop.  What differs from stock verl and why:

- batches come from `CurriculumSampler.next_batch`, not from a DataLoader that prefetches: the state at the end of step t is the
  state after t draws, and it is stored beside the weights of step t in the marker that makes a checkpoint complete;
- a checkpoint counts only when `complete.json` was renamed into it; verl's own tracker file can be half-written;
- trajectories are put in (place, sample) order before the update, so that a resumed run sums in the same order;
- the sampler learns the step's pass rates before the checkpoint is written, so its saved state is not one update stale;
- rewards are waited for where advantages need them, after the log-probabilities: what a judge costs a step is `time/verdicts`;
- reward parts are read before the checkpoint is written, so a stop (too many reward errors, a judge without verdicts) leaves a
  resumable run and `metrics.jsonl` never lacks a step that a checkpoint holds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import transfer_queue as tq
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.workers.rollout.llm_server import LLMServerManager

from pgenrm_train.backends.grpo.config import TRAINER
from pgenrm_train.backends.grpo.progress import (
    ACCURACY,
    CHECKPOINTS,
    LENGTH,
    chain_metrics,
    hopeless,
    mix_metrics,
    newest_checkpoint,
    progress_line,
    tried,
    under_stage,
    validation_metrics,
)
from pgenrm_train.backends.grpo.rollout import Prompt, Rollout
from pgenrm_train.backends.grpo.scoring import RewardSpec
from pgenrm_train.backends.grpo.worker import ChainWorker
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import BackendError, EngineLostError
from pgenrm_train.files import write_json
from pgenrm_train.run.checkpoints import COMPLETE, complete_checkpoints
from pgenrm_train.run.tracking import METRICS, append, read, trim

PROMPTS_AT_ONCE = 64  # of a measurement
POLL_SECONDS = 0.05  # verl polls its replay buffer every 2 s, longer than a small step
MAX_FAILED_PROMPTS = 0.1  # of a step's prompts that the engine failed


@dataclass
class PhaseRun:
    """A phase as the trainer sees it."""

    stage: str
    rows: Path
    work_dir: Path
    steps: int
    rewards: RewardSpec
    seed: int
    keep_checkpoints: int = 2
    resample: int = 0
    validation: Path | None = None
    validate_every: int = 0
    validate_temperature: float | None = None  # null: that of training
    max_null_share: float = 0.5
    beat: Callable[[str, int, str], None] = lambda stage, step, doing: None
    last: dict[str, Any] = field(default_factory=dict)
    sampler: CurriculumSampler = field(init=False)  # set by `begin`, once hardness is known

    def __post_init__(self) -> None:
        self.table = pq.read_table(self.rows)
        self.started, self.first_step = time.monotonic(), 0
        extras = self.table["extra_info"].to_pylist()
        self.pair_ids, self.user_ids = ([extra[name] for extra in extras] for name in ("pair_id", "user_id"))
        self.drawn: list[int] = []  # the rows of the step under way

    def row(self, index: int) -> dict[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]

    def state_dict(self) -> dict[str, Any]:
        """verl stores this in data.pt; we read it back from the marker."""
        return self.sampler.state_dict()

    def seconds_a_step(self, step: int) -> float:
        return (time.monotonic() - self.started) / max(step - self.first_step, 1)


@register_trainer(TRAINER)
class ChainTrainer(PPOTrainerSync):
    """See the module's docstring.  `start_rollout` after `init`, then for each phase `prepare`, `begin` and `fit`."""

    role_worker_mapping: dict[Any, Any]

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # the base class branches on the name
        super().__init__(config)
        self.replay_buffer.poll_interval = POLL_SECONDS
        self.run: PhaseRun  # set by `prepare`
        self.loaded: str | None = (
            config.actor_rollout_ref.model.path
        )  # the checkpoint whose weights the actor has
        self.awake = False  # verl's set-up leaves the vLLM replicas asleep

    # set-up: rows and checkpoints belong to phases

    def _init_dataloader(self) -> None:
        self.steps_per_epoch = 10**9

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(ChainWorker) for role in self.role_worker_mapping}

    def _load_checkpoint(self) -> None:
        self.global_steps = 0

    def on_init_end(self) -> None:
        """Weights go to vLLM when a phase begins."""

    def start_rollout(self) -> None:
        self.rollout = Rollout(self.config, self.llm_server_manager.server_handles)

    # phases

    def prepare(self, run: PhaseRun, config: Any, start: Path) -> None:
        """Give the workers, vLLM included, the settings of `run` and the weights of `start`."""
        config.trainer.v1.trainer_mode = "sync"
        self.config, self.run, self.train_dataloader = config, run, run
        self.total_training_steps = run.steps
        self.use_reference_policy = config.actor_rollout_ref.actor.use_kl_loss
        if self.awake:
            self.checkpoint_manager.sleep_replicas()  # their memory is the actor's while weights move
            self.awake = False
        self.actor_rollout_wg.begin_phase(
            config.actor_rollout_ref.actor, str(start), self.loaded != str(start)
        )
        self.loaded, self.global_steps = str(start), 0
        self._sync()
        self.rollout.use_rewards(run.rewards)

    def begin(self, sampler: CurriculumSampler) -> int:
        """Go to the newest complete checkpoint of the phase, if there is one; returns the step that the phase stands at."""
        run = self.run
        run.sampler = sampler
        self.global_steps = self._resume(run)
        self._init_dump_executor()
        self.validate()  # the start, and a step whose validation a kill has cut off
        run.first_step, run.started = self.global_steps, time.monotonic()
        return self.global_steps

    def last_saved(self) -> int:
        return newest_checkpoint(self.run.work_dir / "verl")[1]

    def _sync(self) -> None:
        if self.awake:
            self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)
        self.awake = True

    def _resume(self, run: PhaseRun) -> int:
        folder, step, state = newest_checkpoint(run.work_dir / "verl")
        trim(run.work_dir / METRICS, step)
        trim(run.work_dir / "batches.jsonl", step)
        if folder is None:
            return 0
        print(f"{run.stage}: resuming after step {step} from {folder}", flush=True)
        self.actor_rollout_wg.load_checkpoint(local_path=str(folder / "actor"), del_local_after_load=False)
        run.sampler.load_state_dict(state)
        self.loaded, self.global_steps = str(folder), step
        self._sync()
        return step

    def fit(self) -> None:
        self.loaded = None  # the next phase may start where this one did
        super().fit(self.rollout)

    def export(self, folder: Path, dtype: str) -> None:
        self.actor_rollout_wg.export(str(folder), dtype)

    def measure(
        self,
        table: Any,
        samples: int,
        purpose: str,
        *,
        temperature: float | None = None,
        places: range | None = None,
    ) -> list[list[dict[str, Any]]]:
        """`samples` chains of the rows of `table`, all or those at `places`, from the current actor, scored and not trained on; one
        list of infos a row.

        temperature: null is that of training.
        """
        run, groups = self.run, []
        places = range(table.num_rows) if places is None else places
        for first in places[::PROMPTS_AT_ONCE]:
            rows = table.slice(first, min(PROMPTS_AT_ONCE, places.stop - first)).to_pylist()
            prompts = [
                self._prompt(row, f"{purpose}{first + i}", samples, 0, temperature)
                for i, row in enumerate(rows)
            ]
            groups += self.rollout.measure(prompts)
            run.beat(run.stage, self.global_steps, f"{purpose} {first + len(rows)}/{table.num_rows} pairs")
        return groups

    def validate(self) -> None:
        """One chain a validation row, from seeds that stay the same, when this step is due and has not been validated."""
        run, step, file = self.run, self.global_steps, self.run.work_dir / METRICS
        if (
            run.validation is None
            or not run.validate_every
            or (step % run.validate_every and step < run.steps)
        ):
            return
        before = [line for line in read(file) if ACCURACY in line]
        if any(line["step"] == step for line in before):
            return
        table, began = pq.read_table(run.validation), time.monotonic()
        groups = self.measure(table, 1, "validation", temperature=run.validate_temperature)
        first = before[0][f"{run.stage}/{LENGTH}"] if before else None
        found = validation_metrics(groups, table["extra_info"].to_pylist(), first)
        found["validation/seconds"] = time.monotonic() - began
        headline = {
            name: found[name.replace("eval/", "validation/")] for name in (ACCURACY, "eval/order_flip_rate")
        }
        append(file, {"step": step, "stage": run.stage} | headline | under_stage(run.stage, found))
        print(f"{run.stage} {step}/{run.steps} · validation accuracy {headline[ACCURACY]:.3f}", flush=True)

    # one step

    def _prompt(
        self, row: dict[str, Any], uid: str, samples: int, step: int, temperature: float | None = None
    ) -> Prompt:
        seed, usual = f"{self.run.seed}/{self.run.stage}", self.config.actor_rollout_ref.rollout.temperature
        return Prompt(
            uid, row, step, seed, samples, usual if temperature is None else temperature, self.run.resample
        )

    def prepare_step(self) -> dict[str, Any]:
        """Draw the batch and hand it to the rollout."""
        run, step = self.run, self.global_steps
        run.beat(run.stage, step, "sampling chains")
        drawn = run.drawn = run.sampler.next_batch(step)
        samples = self.config.actor_rollout_ref.rollout.n
        prompts = [
            self._prompt(run.row(i), f"s{step}p{place:05d}", samples, step) for place, i in enumerate(drawn)
        ]
        append(
            run.work_dir / "batches.jsonl",
            {"step": step, "rows": drawn, "pairs": [p.row["extra_info"]["pair_id"] for p in prompts]},
        )
        tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in prompts]
        tq.kv_batch_put(keys=[p.uid for p in prompts], partition_id="train", tags=tags)
        self.rollout.train(prompts)
        return {}

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self.run.beat(self.run.stage, self.global_steps, "taking log-probabilities")

    def on_step_end(self) -> None:
        self.run.beat(self.run.stage, self.global_steps, "syncing weights to vLLM")
        super().on_step_end()
        self.validate()

    def _balance_batch(self, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
        batch.reorder(sorted(range(len(batch.keys)), key=lambda i: _place(batch.keys[i])))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        run, step = self.run, self.global_steps
        run.beat(run.stage, step, "waiting for verdicts")
        with marked_timer("verdicts", self.timing_raw):
            self.rollout.settled()
        run.beat(run.stage, step, "updating the actor")
        return super()._compute_advantage(batch, metrics)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        began = time.monotonic()
        run = self.run
        try:
            batch = super().step(metrics, timing_raw)
        except RuntimeError as error:  # verl's replay buffer, when no prompt of the step has a chain: say why
            if failures := self.rollout.take_failures():
                raise EngineLostError(
                    f"{run.stage} has no chains at step {self.global_steps}: {failures[0]}"
                ) from error
            raise
        placed = self._groups(batch)
        groups = list(placed.values())
        ours = chain_metrics(groups) | mix_metrics(
            {run.drawn[place]: group for place, group in placed.items()}, run.sampler
        )
        run.sampler.observe((run.drawn[place], *tried(group)) for place, group in placed.items())
        ours |= self.rollout.judge_metrics()
        ours |= {"rollout/failed_prompts": len(run_failures := self.rollout.take_failures())}
        metrics.update({f"{run.stage}/{name}": value for name, value in ours.items()})
        ours |= {"time/step": time.monotonic() - began} | {f"time/{k}": v for k, v in timing_raw.items()}
        ours |= {k: float(v) for k, v in metrics.items() if k.startswith(("actor/", "perf/max_memory"))}
        run.last = ours
        append(
            run.work_dir / METRICS,
            {"step": self.global_steps, "stage": run.stage} | under_stage(run.stage, ours),
        )
        print(
            progress_line(
                run.stage, self.global_steps, run.steps, ours, run.seconds_a_step(self.global_steps)
            ),
            flush=True,
        )
        self._stop_if_hopeless(groups, ours, run_failures)
        return batch

    def _groups(self, batch: Any) -> dict[int, list[dict[str, Any]]]:
        """Place in the batch → the infos of its samples, in the order of the places; padding rows left out."""
        keys = [
            key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)
        ]
        fields = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        groups: dict[int, list[dict[str, Any]]] = {}
        for key, extra in zip(keys, list(fields["extra_fields"]), strict=True):
            extra = getattr(extra, "data", extra)
            info = extra["reward_extra_info"] | {
                name: extra[name] for name in ("order", "discarded_passes", "discarded_chains")
            }
            groups.setdefault(int(key.split("_")[0].rpartition("p")[2]), []).append(info)
        return dict(sorted(groups.items()))

    def _stop_if_hopeless(
        self, groups: list[list[dict[str, Any]]], ours: Mapping[str, float], failures: Sequence[str]
    ) -> None:
        """End the run behind a checkpoint when the rewards of the step are worth nothing, or the engine fails."""
        run, asked = self.run, self.run.sampler.prompts_per_step
        problem, kind = hopeless(ours, groups, run.max_null_share), BackendError
        if problem is None and len(failures) > MAX_FAILED_PROMPTS * asked:
            problem, kind = (
                f"the engine failed {len(failures)} of {asked} prompts, first {failures[0]}",
                EngineLostError,
            )
        if problem is not None:
            self._save_checkpoint()
            raise kind(
                f"{run.stage} stopped at step {self.global_steps}: {problem}; the run can be resumed once that is mended"
            )

    def _save_checkpoint(self) -> None:
        run, step = self.run, self.global_steps
        run.beat(run.stage, step, "saving a checkpoint")
        super()._save_checkpoint()
        marker = run.work_dir / "verl" / f"global_step_{step}" / COMPLETE
        write_json(marker, {"step": step, "sampler": run.state_dict()})
        for old in complete_checkpoints(run.work_dir / "verl", CHECKPOINTS)[: -run.keep_checkpoints]:
            shutil.rmtree(old)


class DirectServers(LLMServerManager):
    """vLLM servers without verl's load-balancer actor: `ChainSampler` spreads its requests itself, which saves two remote calls
    a sample and a process that imports verl."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None


def use_direct_servers() -> None:
    """verl's trainer names the manager class in its module and offers no setting for it."""
    trainer_base.LLMServerManager = DirectServers


def _place(key: str) -> tuple[str, int]:
    uid, sample, _ = key.rsplit("_", 2)
    return uid, int(sample)
