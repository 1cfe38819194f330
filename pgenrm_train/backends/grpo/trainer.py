"""verl's synchronous PPO trainer with our sampler, our rollout and every reward part in the metrics.

One `ChainTrainer` serves several phases (CRE, curriculum) on the same workers: `prepare` gives it the rows
and settings of a phase, `begin` its sampler, and `fit` is verl's own loop.  Differences from stock verl, and
the reasons:

- Batches come from `CurriculumSampler.next_batch`, not from a DataLoader that prefetches.  The state at the
  end of step t is the state after t draws; it is stored with the weights of step t, in the marker that makes
  a checkpoint complete.
- A checkpoint counts only once `complete.json` was renamed into it; verl's own tracker file can be
  half-written.
- Trajectories are put in (place, sample) order before the update, so that a resumed run sums in the same
  order.
- The sampler learns the step's pass rates before the checkpoint is written, so its saved state is not one
  update stale.
- With `mode=async` the chains of the next `max_staleness` steps are sampled while this step's verdicts are
  awaited: update, sync, then sample step t + 1 while step t is judged.  Steps, their rows and their groups
  are those of `sync`; only the weights that sample them are older.  vLLM sleeps once nothing is in flight.
  verl's `colocate_async` instead aborts chains in the middle and trains on the groups that end first.
- With `mode=separate_async` vLLM has GPUs of its own and never sleeps: it samples step t + 1 also during the
  update of step t.  The weights are copied once nothing is in flight, so no chain has two policies.
- Rewards are awaited where advantages need them, after the log-probabilities; `time/verdicts` is that wait
  per step.
- Reward parts are read before the checkpoint is written.  A stop (too many reward errors, a judge without
  verdicts) therefore leaves a resumable run, and `metrics.jsonl` has every step that a checkpoint has.
"""

import pkgutil
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import transfer_queue as tq
from verl.checkpoint_engine import CheckpointEngineManager
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.workers.rollout.llm_server import LLMServerManager

from pgenrm_train.backends.grpo.config import TRAINER
from pgenrm_train.backends.grpo.gold import gold_metrics, widened
from pgenrm_train.backends.grpo.phase import ChainRequest, PhaseRun
from pgenrm_train.backends.grpo.progress import (
    ACCURACY,
    CHECKPOINTS,
    INTERVAL,
    LENGTH,
    Metrics,
    chain_metrics,
    difference_warning,
    engine_metrics,
    format_warning,
    mix_metrics,
    newest_checkpoint,
    progress_line,
    rewards_problem,
    sample_rows,
    staleness_metrics,
    truth_metrics,
    under_stage,
    validation_line,
    validation_metrics,
)
from pgenrm_train.backends.grpo.rollout import Measured, Prompt, Rollout
from pgenrm_train.backends.grpo.scoring import RewardSpec, ScoredGroup
from pgenrm_train.backends.grpo.worker import ChainWorker
from pgenrm_train.backends.protocols import ChainReader, Judge
from pgenrm_train.cluster.utilization import Utilization
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import BackendError, EngineLostError
from pgenrm_train.files import write_table
from pgenrm_train.rewards.training_rows import GrpoRow
from pgenrm_train.run.checkpoints import complete_checkpoints, mark_complete
from pgenrm_train.run.timeline import Part
from pgenrm_train.run.tracking import METRICS, append, read, samples_file, trim

MEASURED_PER_BEAT = 64  # prompts
POLL_SECONDS = 0.05  # verl polls its replay buffer every 2 s, longer than a small step
MAX_FAILED_PROMPTS = 0.1  # of a step's prompts that the engine failed


@register_trainer(TRAINER)
class ChainTrainer(PPOTrainerSync):
    """verl's trainer for several phases: call `init`, then `prepare`, `begin` and `fit` per phase."""

    role_worker_mapping: dict[Any, Any]

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # the base class branches on the name
        self.separate = not config.actor_rollout_ref.hybrid_engine
        self._enable_hybrid_replicas = not self.separate  # read by the base class
        super().__init__(config)
        self.replay_buffer.poll_interval = POLL_SECONDS
        self.run: PhaseRun  # set by `prepare`
        # The checkpoint whose weights the actor has.
        self.loaded: str | None = config.actor_rollout_ref.model.path
        self.awake = False  # verl's set-up leaves the vLLM replicas asleep
        self.utilization = Utilization()
        self.truth: ChainReader | None = None
        self.gold: Judge | None = None

    # set-up: rows and checkpoints belong to phases

    def _init_dataloader(self) -> None:
        self.steps_per_epoch = 10**9

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(ChainWorker) for role in self.role_worker_mapping}

    def _setup(self) -> None:
        super()._setup()
        if self.separate:
            self.llm_server_manager = DirectServers.create(config=self.config)
            self.checkpoint_manager = CheckpointEngineManager(
                omega_conf_to_dataclass(self.config.actor_rollout_ref.rollout.checkpoint_engine),
                self.actor_rollout_wg,
                self.llm_server_manager.get_replicas(),
            )

    @property
    def placement_groups(self) -> list[Any]:
        """Ray's placement groups of all workers."""
        pools = [*self.resource_pool_manager.resource_pool_dict.values()]
        if self.separate:
            pools += [replica.resource_pool for replica in self.llm_server_manager.get_replicas()]
        return [group for pool in pools for group in pool.pgs or ()]

    def _load_checkpoint(self) -> None:
        self.global_steps = 0

    def on_init_end(self) -> None:
        """Start the rollout; weights go to vLLM when a phase begins."""
        self.rollout = Rollout(self.config, self.llm_server_manager.server_handles)

    # phases

    def prepare(self, run: PhaseRun, config: Any, start: Path) -> None:
        """Give the workers the settings of `run` and the weights of `start`; vLLM gets them when it wakes."""
        config.trainer.v1.trainer_mode = "sync"
        self.config, self.run, self.train_dataloader = config, run, run
        self.total_training_steps = run.phase.steps
        self.use_reference_policy = config.actor_rollout_ref.actor.use_kl_loss
        self.sleep()
        # With vLLM on GPUs of its own the reference is a worker group, else a part of the actor's.
        groups = {self.actor_rollout_wg, getattr(self, "ref_policy_wg", self.actor_rollout_wg)}
        for group in groups:
            group.begin_phase(
                config.actor_rollout_ref,
                str(start),
                self.loaded != str(start),
                config.algorithm.rollout_correction.bypass_mode,
            )
        self.loaded, self.global_steps = str(start), 0
        self.truth = pkgutil.resolve_name(run.phase.truth)(run.config) if run.phase.truth else None
        self.gold = run.phase.gold.build() if run.phase.gold else None
        totals = run.config.model.counted
        self.rollout.use_rewards(
            RewardSpec(
                run.phase.weights,
                run.phase.judge,
                run.grpo.null_policy,
                totals,
                run.grpo.rubric_dropout,
            )
        )

    def begin(self, sampler: CurriculumSampler) -> int:
        """Load the phase's newest complete checkpoint, if there is one; returns its step, else 0."""
        run, work_dir = self.run, self.run.phase.work_dir
        run.sampler = sampler
        newest = newest_checkpoint(work_dir / "verl")
        for file in (METRICS, "batches.jsonl"):
            trim(work_dir / file, 0 if newest is None else newest.step)
        if newest is not None:
            print(f"{run.phase.section}: resuming after step {newest.step} from {newest.folder}", flush=True)
            self.sleep()
            self.actor_rollout_wg.load_checkpoint(
                local_path=str(newest.folder / "actor"), del_local_after_load=False
            )
            run.load_state_dict(newest.sampler)
            self.loaded, self.global_steps = str(newest.folder), newest.step
        self._wake()
        self._init_dump_executor()
        self.validate()  # the start, or a step whose validation a kill has cut off
        run.first_step, run.started = self.global_steps, time.monotonic()
        return self.global_steps

    def last_saved(self) -> int:
        newest = newest_checkpoint(self.run.phase.work_dir / "verl")
        return 0 if newest is None else newest.step

    def sleep(self) -> None:
        """Free the memory of vLLM: it is the actor's while weights and optimiser are loaded."""
        if self.awake:
            self.checkpoint_manager.sleep_replicas()
            self.awake = False

    def _wake(self) -> None:
        """Wake vLLM with the actor's weights."""
        if not self.awake:
            self.checkpoint_manager.update_weights(self.global_steps)
            self.awake = True

    def fit(self) -> None:
        self.loaded = None  # the next phase may start where this one did
        super().fit(self.rollout)

    def measure(
        self, requests: Sequence[ChainRequest], temperature: float | None = None
    ) -> Iterator[Measured]:
        """The chains of each request, as they end, from the current actor, scored and not trained on.

        `temperature`: None for that of training.
        """
        self._wake()
        run = self.run
        prompts = [
            self._prompt(request.row, request.uid, request.samples, 0, temperature) for request in requests
        ]
        for number, measured in enumerate(self.rollout.measure(prompts), start=1):
            if number % MEASURED_PER_BEAT == 0:
                run.beat(self.global_steps, f"measuring, {number}/{len(prompts)} prompts")
            yield measured
        run.beat(self.global_steps, f"measured {len(prompts)} prompts")

    def validate(self) -> None:
        """Sample one chain per validation row, with fixed seeds, if this step needs it."""
        run, phase, step = self.run, self.run.phase, self.global_steps
        every, file = run.grpo.validate_every, phase.work_dir / METRICS
        if phase.validation is None or not every or (step % every and step < phase.steps):
            return
        before = [line for line in read(file) if ACCURACY in line]
        if any(line["step"] == step for line in before):
            return
        run.beat(step, "validating", Part.VALIDATION)
        table, began = pq.read_table(phase.validation), time.monotonic()
        requests = [ChainRequest(f"validation{i}", row, 1) for i, row in enumerate(table.to_pylist())]
        chains = dict(self.measure(requests, run.config.eval.temperature))
        groups = [chains[request.uid] for request in requests]
        first_length = before[0][f"{phase.section}/{LENGTH}"] if before else None
        extras = table["extra_info"].to_pylist()
        metrics = validation_metrics(groups, extras, first_length)
        if self.gold and phase.gold:
            metrics |= gold_metrics(groups, extras, self.gold, phase.gold.in_flight)
        metrics["validation/seconds"] = time.monotonic() - began
        headline = {
            name: metrics[name.replace("eval/", "validation/")]
            for name in (ACCURACY, *INTERVAL, "eval/order_flip_rate")
        }
        if self.truth:
            headline |= truth_metrics(groups, extras, self.truth)
        if rows := sample_rows(groups, extras, run.config.tracking.sample_chains):
            write_table(samples_file(file, step), rows)
        self._log(headline | under_stage(phase.section, metrics))
        print(f"{phase.section} {step}/{phase.steps} · {validation_line(headline)}", flush=True)
        if sentence := widened(read(file), phase.section):
            print(f"warning: {sentence}", flush=True)

    def _log(self, metrics: Metrics) -> None:
        phase = self.run.phase
        append(phase.work_dir / METRICS, {"step": self.global_steps, "stage": str(phase.section)} | metrics)

    # one step

    def _prompt(
        self, row: GrpoRow, uid: str, samples: int, step: int, temperature: float | None = None
    ) -> Prompt:
        return Prompt(
            uid=uid,
            row=row,
            step=step,
            seed=f"{self.run.seed}/{self.run.phase.section}",
            samples=samples,
            temperature=self.run.grpo.temperature if temperature is None else temperature,
            resample=self.run.grpo.resample,
        )

    def prepare_step(self) -> dict[str, object]:
        """Begin to sample the step, and those that are sampled ahead of their turn."""
        run, step = self.run, self.global_steps
        last = min(step + run.grpo.steps_ahead, run.phase.steps)
        ahead = f" of steps up to {last}" if last > step else ""
        run.beat(step, f"sampling chains{ahead}", Part.GENERATION)
        for each in range(step, last + 1):
            if each not in self.rollout.training:
                self._sample(each)
        return {}

    def _sample(self, step: int) -> None:
        """Draw the batch of a step and pass it to the rollout."""
        run, drawn = self.run, self.run.draw(step).rows
        prompts = [
            self._prompt(row, f"s{step}p{place:05d}", run.grpo.group_size, step)
            for place, row in enumerate(run.table.take(drawn).to_pylist())
        ]
        append(
            run.phase.work_dir / "batches.jsonl",
            {"step": step, "rows": drawn, "pairs": [p.row["extra_info"]["pair_id"] for p in prompts]},
        )
        tq.kv_batch_put(
            keys=[prompt.uid for prompt in prompts],
            partition_id="train",
            tags=[{"is_prompt": True, "status": "pending", "global_steps": step} for _ in prompts],
        )
        self.rollout.train(prompts)

    def on_sample_begin(self) -> None:
        """Wait until the step is sampled, and vLLM may sleep: every prompt of the steps ahead is, once."""
        if self.run.grpo.steps_ahead:
            while self._samples():
                time.sleep(POLL_SECONDS)
            if not self.separate:
                self.rollout.pause()

    def _samples(self) -> bool:
        buffer = self.replay_buffer
        buffer._sync_metadata_from_transfer_queue()
        pending, running = buffer.pending_keys["train"], buffer.running_keys["train"]
        of_step = any(uid.startswith(f"s{self.global_steps}p") for uid in pending | running)
        return of_step or bool(pending and not self.separate)

    def on_sample_end(self) -> None:
        if not self.separate:
            super().on_sample_end()
        self.run.beat(self.global_steps, "taking log-probabilities", Part.LOG_PROBABILITIES)

    def on_step_end(self) -> None:
        if self.separate:
            self.run.beat(self.global_steps, "waiting for the chains of steps ahead", Part.GENERATION)
            self.rollout.pause()
        self.run.beat(self.global_steps, "syncing weights to vLLM", Part.SYNC)
        super().on_step_end()
        if self.run.grpo.steps_ahead:
            self.rollout.resume()
        self.validate()

    def _balance_batch(self, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
        batch.reorder(sorted(range(len(batch.keys)), key=lambda i: _place(batch.keys[i])))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _compute_advantage(self, batch: Any, metrics: dict[str, float]) -> Any:
        run, step = self.run, self.global_steps
        run.beat(step, "waiting for verdicts", Part.VERDICTS)
        with marked_timer("verdicts", self.timing_raw):
            self.rollout.settled(step)
        run.beat(step, "updating the actor", Part.UPDATE)
        return super()._compute_advantage(batch, metrics)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        began, run, phase, step = time.monotonic(), self.run, self.run.phase, self.global_steps
        try:
            batch = super().step(metrics, timing_raw)
        except RuntimeError as error:
            # verl's replay buffer raises if no prompt of the step has a chain: add the reason.
            if failures := self.rollout.settled(step):
                raise EngineLostError(
                    f"{phase.section} has no chains at step {self.global_steps}: {failures[0]}"
                ) from error
            raise
        by_place = self._groups(batch)
        groups, failures = list(by_place.values()), self.rollout.settled(step)
        del self.rollout.training[step]
        draw = run.draws.pop(step)
        by_pair = {draw.rows[place]: group for place, group in by_place.items()}
        ours = chain_metrics(groups) | mix_metrics(by_pair, run.sampler, draw) | self.rollout.judge_metrics()
        ours |= staleness_metrics(step, batch.tags)
        ours["rollout/failed_prompts"] = len(failures)
        run.sampler.observe((draw.rows[place], *group.evidence()) for place, group in by_place.items())
        metrics.update({f"{phase.section}/{name}": value for name, value in ours.items()})
        ours |= {"time/step": time.monotonic() - began} | {f"time/{k}": v for k, v in timing_raw.items()}
        ours |= engine_metrics(metrics) | self.utilization.read()
        tokens = sum(tag["seq_len"] for tag in batch.tags if not tag.get("is_padding", False))
        ranks = self.run.config.cluster.ranks  # with those of vLLM alone
        ours["perf/throughput"] = tokens / ours["time/step"] / ranks  # tokens per second and rank
        difference = None if ours["staleness/max"] else difference_warning(ours)
        for name, warning in (("difference", difference), ("format", format_warning(groups))):
            if warning and name not in run.warned:
                run.warned.add(name)
                print(f"{phase.section}: step {step}: {warning}", flush=True)
        run.last = ours
        self._log(under_stage(phase.section, ours))
        seconds = (time.monotonic() - run.started) / max(self.global_steps - run.first_step, 1)
        print(progress_line(phase.section, self.global_steps, phase.steps, ours, seconds), flush=True)
        self._stop_if_useless(groups, ours, failures)
        return batch

    def _groups(self, batch: Any) -> dict[int, ScoredGroup]:
        """Place in the batch → its group, in the order of the places; padding rows left out."""
        keys = [
            key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)
        ]
        fields = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        chains: dict[int, list[Any]] = {}
        for key, extra in zip(keys, list(fields["extra_fields"]), strict=True):
            place = int(key.split("_")[0].rpartition("p")[2])
            chains.setdefault(place, []).append(getattr(extra, "data", extra))
        return {place: ScoredGroup.from_extra_fields(chains[place]) for place in sorted(chains)}

    def _stop_if_useless(
        self, groups: Sequence[ScoredGroup], metrics: Metrics, failures: Sequence[str]
    ) -> None:
        """End the run after a checkpoint if the step's rewards are useless, or the engine fails."""
        grpo, prompts = self.run.grpo, self.run.sampler.prompts_per_step
        max_null_share = 0.0 if grpo.null_policy == "stop" else grpo.max_null_share
        problem, kind = rewards_problem(groups, metrics, max_null_share), BackendError
        if problem is None and len(failures) > MAX_FAILED_PROMPTS * prompts:
            problem, kind = (
                f"the engine failed {len(failures)} of {prompts} prompts, first {failures[0]}",
                EngineLostError,
            )
        if problem is not None:
            self._save_checkpoint()
            raise kind(
                f"{self.run.phase.section} stopped at step {self.global_steps}: {problem}; "
                "remedy that, then run the same command to resume"
            )

    def _save_checkpoint(self) -> None:
        run, step = self.run, self.global_steps
        run.beat(step, "saving a checkpoint", Part.CHECKPOINT)
        super()._save_checkpoint()
        checkpoints = run.phase.work_dir / "verl"
        mark_complete(checkpoints / f"global_step_{step}", {"sampler": run.state_dict()})
        for old in complete_checkpoints(checkpoints, CHECKPOINTS)[: -run.grpo.keep_checkpoints]:
            shutil.rmtree(old)


class DirectServers(LLMServerManager):
    """vLLM servers without verl's load-balancer actor.

    `ChainSampler` spreads its requests itself, which saves two remote calls per sample and a process that
    imports verl.
    """

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None


# verl's trainer takes the class from its module and has no setting for it.
trainer_base.LLMServerManager = DirectServers


def _place(key: str) -> tuple[str, int]:
    uid, sample, _ = key.rsplit("_", 2)
    return uid, int(sample)
