"""Child of test_gpu_settings.py: veRL with the shipped GPU settings, and the switches below, on this CPU.

`python gpu_on_cpu.py FOLDER MODEL CLUSTER ATTENTION [OVERRIDE …]`, in the environment of
`grpo.config.verl_variables` for a CPU.  FOLDER holds start/ and rows.parquet of `verl_world`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pgenrm_train.backends.grpo import engine
from pgenrm_train.backends.grpo.phase import Phase
from pgenrm_train.config import Config, load
from pgenrm_train.config.stage_names import StageName

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout"))
# Our configuration: sizes alone.
SMALLER: dict[str, Any] = {
    "cluster.nodes": 1,
    "cluster.tensor_parallel": 1,
    "model.max_prompt_tokens": 64,
    "model.max_response_tokens": 64,
    "cre.steps": 1,
    "cre.prompts_per_step": 4,
    "cre.mini_batch_prompts": 4,
    "cre.group_size": 4,
    "cre.micro_batch_tokens": 300,  # the longest sequence has 128
}
# verl's configuration: settings that a CPU cannot have.  Everything else is used as shipped.
CPU_SWITCHES: dict[str, Any] = {
    "trainer.device": "cpu",
    "actor_rollout_ref.model.override_config": {"attn_implementation": "sdpa"},
    f"{ACTOR}.use_torch_compile": False,  # inductor would compile for minutes
    f"{ACTOR}.fsdp_config.use_torch_compile": False,
    f"{REF}.use_torch_compile": False,
    f"{REF}.fsdp_config.use_torch_compile": False,
    f"{ROLLOUT}.enforce_eager": True,
    f"{ROLLOUT}.free_cache_engine": False,  # vLLM's sleep mode is CUDA's
    f"{ROLLOUT}.enable_sleep_mode": False,
    f"{ROLLOUT}.enable_chunked_prefill": False,  # a CPU generator cannot rewind a seeded request
    f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": "uni",
    f"{ROLLOUT}.agent.num_workers": 1,  # one sampler is enough for two servers
}
# … of `mode=separate_async`: NCCL's part
SEPARATE_SWITCHES = {
    f"{ROLLOUT}.checkpoint_engine.backend": "files",
    f"{ROLLOUT}.checkpoint_engine.custom_backend_module": "file_engine",
}


def gpu_config(folder: Path, model: str, cluster: str, attention: str, *more: str) -> Config:
    ranks = 1 if cluster == "gpu1" else 2
    overrides = [f"{key}={value}" for key, value in (SMALLER | {"cluster.processes_per_node": ranks}).items()]
    return load(
        "recipe=cre",
        f"model={model}",
        f"cluster={cluster}",
        f"model.attention={attention}",
        f"run_dir={folder}",
        "tracking=none",
        "judge=none",
        "data=pairs",
        "data.path=none.parquet",
        "teacher=features",
        *overrides,
        *more,
    )


def shipped_with_switches(config: Config, section: str, **where: Any) -> Any:
    gpu = copy.deepcopy(config)
    gpu.cluster.device = "cuda"
    composed = to_verl(gpu, section, **where)
    separate = {} if composed.actor_rollout_ref.hybrid_engine else SEPARATE_SWITCHES
    for key, value in (CPU_SWITCHES | separate).items():
        OmegaConf.update(composed, key, value, force_add=True)
    return composed


to_verl = engine.to_verl


def main(folder: Path, *settings: str) -> None:
    config = gpu_config(folder, *settings)
    config.cluster.device = "cpu"  # how Ray and the processes start
    engine.to_verl = shipped_with_switches
    phase = Phase(StageName.CRE, folder / "start", folder / "rows.parquet", folder / "cre", config.cre.steps)
    print(engine.train(config, [phase]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
