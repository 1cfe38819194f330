"""Extensions of verl's Ray workers for one warm session: start a phase in place, and export.

verl builds actor, reference and rollout once; a second `run_ppo` would build them again (80–90 s on two
cores).  `ChainWorker` takes over the weights, loss and optimiser settings of the next phase in the running
process.  It also writes checkpoints in Hugging Face format in the requested dtype: verl's merger casts every
tensor to bfloat16, which would round an fp32 model.

Without flash-attn verl takes log-probabilities one *token* at a time: its loop over rows was written for
(batch, length) logits and gets them flattened.  That is most of an update on a CPU, and a kernel launch per
token on a GPU, so it is done in chunks here.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from verl import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_corr_metrics_from_logprobs
from verl.utils import torch_functional
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import fsdp2_load_full_state_dict
from verl.utils.metric import Metric
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from pgenrm_train.backends.grpo.export import Export

CHUNK = 4096  # tokens whose log-softmax is held at a time


def logprobs_in_chunks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label: logits (…, vocabulary), labels (…) → (…)."""
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    parts = [
        -cross_entropy(r, w, reduction="none")
        for r, w in zip(rows.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return torch.cat(parts).view(labels.shape)


torch_functional.logprobs_from_logits_v2 = logprobs_in_chunks


def loss_and_difference(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """verl's loss, and its metrics of the difference between sampler and actor.

    For `bypass_mode`: the sampler's probabilities are the old ones, and verl compares them with nothing.
    """
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    with torch.no_grad():
        actors = no_padding_2_padding(model_output["log_probs"], data)
        batch = data.select("old_log_probs", "response_mask").to_padded_tensor()
        batch["rollout_log_probs"], batch["old_log_probs"] = batch["old_log_probs"], actors
        batch["responses"] = actors  # only its width is used
        differences = calculate_debug_metrics(DataProto(batch=batch))
        differences |= compute_rollout_corr_metrics_from_logprobs(
            actors, batch["rollout_log_probs"], batch["response_mask"]
        )
    for name, value in differences.items():
        metrics[name] = Metric("max" if name.endswith("_max") else "mean", value)
    return loss, metrics


class ChainWorker(ActorRolloutRefWorker):
    """Actor, rollout adapter and reference of one rank."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the process group with our timeout, then build the models."""
        # verl's own call passes no timeout, so NCCL's ten minutes would apply; it finds this group
        initialize_global_process_group_ray(timeout_second=self.config.nccl_timeout)
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_phase(self, config: Any, start: str, reload: bool, compare: bool) -> None:
        """Take the loss, batch and optimiser settings of `config`, with a fresh optimiser and schedule.

        `config` is verl's section `actor_rollout_ref`.  With `reload`, also load the weights of the
        checkpoint `start`, for the actor and as the new reference.  With `compare` the loss also compares the
        actor with the sampler.
        """
        if self.ref is not None:
            if reload:
                load_weights(self.ref.engine, start)
            _cut_inference(self.ref.engine.engine_config, config.ref)
        if self.actor is None:  # the worker of the reference alone
            return
        engine = self.actor.engine
        if reload:
            load_weights(engine, start)
        settings = omega_conf_to_dataclass(config.actor)
        settings.model_config = self.actor.model_config
        self.actor.set_loss_fn(partial(loss_and_difference if compare else ppo_loss, config=settings))
        engine.optimizer_config = settings.optim
        batches = engine.engine_config
        batches.use_dynamic_bsz = settings.use_dynamic_bsz
        batches.micro_batch_size_per_gpu = settings.ppo_micro_batch_size_per_gpu
        batches.max_token_len_per_gpu = settings.ppo_max_token_len_per_gpu
        _cut_inference(batches, config.rollout)
        engine.optimizer = engine._build_optimizer(engine.module)
        engine.lr_scheduler = engine._build_lr_scheduler(engine.optimizer)
        engine.checkpoint_manager.optimizer = engine.optimizer
        engine.checkpoint_manager.lr_scheduler = engine.lr_scheduler

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_export(self, folder: str, dtype: str) -> int:
        """Begin the export of the actor to `folder`; returns the number of files for `export_file`."""
        kind, model_config = getattr(torch, dtype), self.actor.model_config
        module, device = self.actor.engine.module, get_device_name()
        self.exporting = Export(module, model_config, Path(folder), kind, device)
        return self.exporting.begin()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_file(self, number: int) -> None:
        self.exporting.write(number)


def _cut_inference(engine: Any, section: Any) -> None:
    """Cut batches of log-probabilities as verl's section `rollout` (the actor) or `ref` demands."""
    engine.use_dynamic_bsz = section.log_prob_use_dynamic_bsz
    engine.infer_micro_batch_size_per_gpu = section.log_prob_micro_batch_size_per_gpu
    engine.infer_max_token_len_per_gpu = section.log_prob_max_token_len_per_gpu


def load_weights(engine: Any, start: str) -> None:
    """Overwrite a verl FSDP2 engine's weights with a checkpoint's; rank 0 reads, the others receive."""
    from transformers import AutoModelForCausalLM

    state: dict[str, torch.Tensor] = {}
    if torch.distributed.get_rank() == 0:
        state = AutoModelForCausalLM.from_pretrained(
            start, dtype=next(engine.module.parameters()).dtype
        ).state_dict()
    offloads = getattr(engine, "_uses_fsdp2_cpu_offload_policy", False)
    fsdp2_load_full_state_dict(engine.module, state, engine.device_mesh, True if offloads else None)
    if engine.is_param_offload_enabled:
        engine.to("cpu", model=True, optimizer=False, grad=False)
