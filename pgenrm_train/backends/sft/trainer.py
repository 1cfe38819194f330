"""transformers' Trainer with our order of sequences, our loss weights, and validation by generation."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback

from pgenrm_train.backends.protocols import Validated
from pgenrm_train.backends.sft.batches import StepOrder
from pgenrm_train.backends.sft.generate import complete_weights, fits
from pgenrm_train.backends.sft.job import Mark, stopped_early
from pgenrm_train.cluster.utilization import Utilization
from pgenrm_train.config import PsiConfig, StageName
from pgenrm_train.config.setting import known
from pgenrm_train.errors import BackendError
from pgenrm_train.files import write_table
from pgenrm_train.run.checkpoints import mark_complete, sizes
from pgenrm_train.run.timeline import Part, mark
from pgenrm_train.run.tracking import append, samples_file


class SftTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose steps take their sequences from `order`.

    `validate`, if given, scores the model at the start, every `psi.evaluate_every` steps (null: in the
    middle), and at the end.
    """

    control: Any  # of the base class

    def __init__(
        self,
        psi: PsiConfig,
        *,
        order: StepOrder,
        validate: Callable[[], Validated] | None,
        metrics: Path,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.psi, self.order, self.validate, self.metrics = psi, order, validate, metrics
        self.utilization, self.tokens, self.logged = Utilization(), 0, time.monotonic()

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, torch.Tensor]], device: Any) -> Any:
        """Sum of the weights over the optimiser step and all processes, which divides the loss."""
        total = sum(batch["weights"].sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add tokens per second and process, memory, and use of the machine since the last log."""
        if "loss" in logs:
            now = time.monotonic()
            logs |= {"perf/throughput": self.tokens / (now - self.logged), **self.utilization.read()}
            if self.args.device.type == "cuda":
                logs["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
            self.tokens, self.logged = 0, now
        super().log(logs, *args)

    def training_step(self, model: Any, inputs: Mapping[str, Any], *args: Any) -> Any:
        self.tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args)
        if not torch.isfinite(loss):
            raise _diverged(self.psi, f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the current model by generation and write the results.

        With `psi.evaluate_every` a checkpoint is saved, the state keeps the best step, and training stops
        after `psi.patience` validations without a better one.
        """
        assert self.validate is not None
        step, was_training = self.state.global_step, self.model.training
        self.control.should_evaluate = False  # a step that ends an epoch would be measured twice
        if not self._measurable():
            return {}
        self._mark(Part.VALIDATION)
        self.model.eval()
        with complete_weights(self.deepspeed):
            validated = self.validate()
        self.model.train(was_training)
        self._mark(Part.UPDATE)
        if self.is_world_process_zero():
            if validated.samples:
                write_table(samples_file(self.metrics, step), validated.samples)
            append(self.metrics, {"step": step, "stage": StageName.PSI, **validated.metrics})
        metrics = {"eval_accuracy": validated.metrics["eval/accuracy"]}
        if not self.psi.evaluate_every:
            return metrics
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        control.should_save = True  # the best step must be there to be published
        better = self.state.best_metric is None or metrics["eval_accuracy"] > self.state.best_metric
        control.should_training_stop |= not better and stopped_early(self.psi, self.state)
        self.control = control
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._mark(Part.CHECKPOINT)
        super()._save_checkpoint(*args, **kwargs)
        self._mark(Part.UPDATE)

    def _mark(self, part: Part) -> None:
        if self.is_world_process_zero():
            mark(part)

    def _measurable(self) -> bool:
        """Whether accuracy is measured: by default only if each process can hold the complete weights."""
        if self.psi.evaluate_every or fits(self.deepspeed):
            return True
        if self.is_world_process_zero() and not self.state.global_step:
            print(
                "psi: accuracy is not measured while training, because the complete weights do not fit on "
                "one GPU next to the optimiser; psi.evaluate_every=N gathers them for every token",
                flush=True,
            )
        return False


class PsiCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that marks complete checkpoints, writes the metrics, and schedules validations."""

    def __init__(self, psi: PsiConfig, order: StepOrder, metrics: Path, mark: Mark, validates: bool) -> None:
        self.psi, self.validates = psi, validates
        self.order, self.metrics, self.mark = order, metrics, mark

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            mark(Part.UPDATE)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate sets a sampler's epoch too, except if several processes resume in the middle of an epoch
        self.order.set_epoch(self.order.epoch_of(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, every = state.global_step, self.psi.evaluate_every
        due = step % every == 0 if every else step == state.max_steps // 2
        if self.validates and (due or step >= state.max_steps):
            control.should_evaluate = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        # under ZeRO-3, `ds_tensor` is this process's part of a weight
        if not all(bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in model.parameters()):
            raise _diverged(self.psi, f"weights after step {state.global_step} are not finite")
        if distributed.is_initialized():
            distributed.barrier()  # every process writes its files
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(checkpoint, {**asdict(self.mark), "bytes": sizes(checkpoint)})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if logs and state.is_world_process_zero and "loss" in logs:
            numbers = {f"psi/{name}": float(value) for name, value in logs.items()}
            finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            append(self.metrics, {"step": state.global_step, "stage": StageName.PSI, **finite})


def _diverged(psi: PsiConfig, reason: str) -> BackendError:
    return BackendError(
        f"PSI has diverged: {reason}; lower psi.learning_rate={known(psi.learning_rate):g} in another "
        "run_dir=, and check the training rows"
    )
