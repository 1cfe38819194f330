"""transformers' Trainer with our order of sequences, our loss weights, and validation by generation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback

from pgenrm_train.backends.protocols import Validator
from pgenrm_train.backends.sft.batches import StepOrder
from pgenrm_train.backends.sft.checkpoints import COMPLETE, sizes, stopped_early
from pgenrm_train.backends.sft.generate import TrainingGenerator
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError
from pgenrm_train.files import write_json, write_table
from pgenrm_train.run.tracking import METRICS, append, samples_file


class SftTrainer(Trainer):  # type: ignore[misc]
    """`order` says which sequences a step takes; `validate`, where given, scores the model every `psi.evaluate_every` steps."""

    control: Any  # the base class's

    def __init__(
        self,
        config: Config,
        *,
        order: StepOrder,
        validate: Validator | None,
        tokenizer: Any,
        work_dir: Path,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.config, self.order, self.validate, self.work_dir = config, order, validate, work_dir
        self.generator = TrainingGenerator(config, self.model, tokenizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: Any) -> Any:
        """Σ of the weights over the optimiser step, all processes together: what the loss is divided by."""
        total = sum(batch["weights"].sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def training_step(self, *args: Any, **rest: Any) -> Any:
        loss = super().training_step(*args, **rest)
        if not torch.isfinite(loss):
            raise diverged(self.config, f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the model as it is by generation, write what was found, and have a checkpoint saved.

        The state keeps the best step; after `psi.patience` validations without a better one training stops.
        """
        assert self.validate is not None
        step, was_training = self.state.global_step, self.model.training
        self.model.eval()
        found = self.validate(self.generator)
        self.model.train(was_training)
        if self.is_world_process_zero():
            write_table(samples_file(self.work_dir / METRICS, step), found.samples)
            append(self.work_dir / METRICS, {"step": step, "stage": "psi", **found.metrics})
        metrics = {"eval_accuracy": found.metrics["eval/accuracy"]}
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        control.should_save = True  # the best step must be there to be published
        better = self.state.best_metric is None or metrics["eval_accuracy"] > self.state.best_metric
        control.should_training_stop |= not better and stopped_early(self.config, self.state)
        self.control = control
        return metrics


class Follower(TrainerCallback):  # type: ignore[misc]
    """Marks whole checkpoints, writes the metrics, and says when to validate.  `mark` is what a resume must agree with."""

    def __init__(self, config: Config, order: StepOrder, metrics: Path, mark: Mapping[str, Any]) -> None:
        self.config, self.every = config, config.psi.evaluate_every
        self.order, self.metrics, self.mark = order, metrics, mark

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate tells a sampler its epoch too, but not in an epoch that several processes resume in the middle of.
        self.order.set_epoch(self.order.epoch_of(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every and (state.global_step % self.every == 0 or state.global_step >= state.max_steps):
            control.should_evaluate = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not all(
            bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in model.parameters()
        ):  # ZeRO-3: this process's part
            raise diverged(self.config, f"weights after step {state.global_step} are not finite")
        if distributed.is_initialized():
            distributed.barrier()  # every process writes files of its own
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, {"step": state.global_step, **self.mark, "bytes": sizes(folder)})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if logs and state.is_world_process_zero and "loss" in logs:
            numbers = {f"psi/{name}": float(value) for name, value in logs.items()}
            finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            append(self.metrics, {"step": state.global_step, "stage": "psi", **finite})


def diverged(config: Config, what: str) -> BackendError:
    return BackendError(
        f"PSI has diverged: {what}; lower psi.learning_rate={config.psi.learning_rate:g} in another run_dir=, and see that the rows are sound"
    )
