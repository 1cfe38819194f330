"""PSI over several nodes: Ray Train places the ranks, and starts all of them again when one is lost.

A rank runs the code that torchrun runs on one node.  Each attempt goes on from the newest complete checkpoint in the run folder,
which every node sees, and not from what Ray Train was told of: a worker that dies right after a save has not told it yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.backends.ray.cluster import join
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, ConfigError


def run(config: Config, job: Path, variables: dict[str, str]) -> None:
    """Run the job file's training on `nodes × processes_per_node` ranks of the cluster at `ray.address`.

    Raises ConfigError without an address, BackendError when a rank failed more than `cluster.max_failures` times.
    """
    import ray

    if config.ray.address is None:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes} needs ray.address=HOST:PORT of a running Ray cluster (ray start --head there, "
            "ray start --address=HOST:PORT on the other nodes)"
        )
    join(config.ray.address, variables | {"RAY_TRAIN_V2_ENABLED": "1"}, show_output=True)
    try:
        _fit(config, job)
    finally:
        ray.shutdown()


def _fit(config: Config, job: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster, cuda = config.cluster, config.cluster.device == "cuda"
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"job": str(job)},
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.nodes * cluster.processes_per_node,
            use_gpu=cuda,
            placement_strategy="PACK"
            if cuda
            else "SPREAD",  # a node's GPUs together; logical CPU nodes one rank each
        ),
        run_config=RunConfig(
            name="psi",
            storage_path=str(job.parent / "ray_train"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[teller(job.parent / "steps")],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise BackendError(
            f"PSI failed more than cluster.max_failures={cluster.max_failures} times on the cluster; its last words: "
            f"{str(error).strip().splitlines()[-1]}"
        ) from error


def teller(steps: Path) -> Any:
    """Ray Train's callback, which it takes to its controller; what is printed there appears here."""
    from ray.train import UserCallback

    class Teller(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            print(lost_sentence(worker_exceptions, steps), flush=True)

    return Teller()


def lost_sentence(errors: Mapping[int, Exception], steps: Path) -> str:
    """What a user reads when ranks of PSI are gone, with their node or by themselves."""
    from pgenrm_train.backends.sft.checkpoints import newest_complete

    newest = newest_complete(steps, clean=False)
    return (
        f"psi: rank {', '.join(map(str, sorted(errors)))} of the cluster was lost ({type(errors[min(errors)]).__name__}); all start again "
        f"{f'from {newest}' if newest else 'from the beginning'} once enough nodes are there"
    )


def _rank(settings: dict[str, str]) -> None:
    from pgenrm_train.backends.sft.engine import train_rank

    train_rank(settings["job"])
