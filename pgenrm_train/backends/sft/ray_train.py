"""PSI over several nodes: Ray Train places the ranks, and restarts all of them when one is lost.

A rank runs the same code as under torchrun.  Each attempt resumes from the newest complete checkpoint in the
run folder, which every node sees.  Ray Train's own record would be late: a worker that dies right after a
save has not reported it yet.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.backends.ray.cluster import join
from pgenrm_train.backends.sft.job import STEPS, Job
from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import BackendError, ConfigError, last_line
from pgenrm_train.run.checkpoints import newest_complete


def run(config: Config, job_file: Path, variables: dict[str, str]) -> None:
    """Train the job on `nodes × processes_per_node` ranks of the cluster at `ray.address`.

    Raises ConfigError without an address, BackendError if a rank failed more than `cluster.max_failures`
    times.
    """
    import ray

    if config.ray.address is None:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes} needs ray.address=HOST:PORT of a running Ray cluster "
            "(ray start --head there, ray start --address=HOST:PORT on the other nodes)"
        )
    join(config.ray.address, variables | {"RAY_TRAIN_V2_ENABLED": "1"}, show_output=True)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cuda, failures = config.cluster.device == "cuda", config.cluster.max_failures
    try:
        TorchTrainer(
            _train_rank,
            train_loop_config={"job": str(job_file)},
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.cluster.ranks,
                use_gpu=cuda,
                # PACK keeps a node's GPUs together; SPREAD gives logical CPU nodes one rank each
                placement_strategy="PACK" if cuda else "SPREAD",
            ),
            run_config=RunConfig(
                name=StageName.PSI.value,
                storage_path=str(job_file.parent / "ray_train"),
                failure_config=FailureConfig(max_failures=failures),
                callbacks=[lost_rank_reporter(job_file.parent / "steps")],
            ),
        ).fit()
    except TrainingFailedError as error:
        raise BackendError(
            f"PSI failed more than cluster.max_failures={failures} times on the cluster; "
            f"last error: {last_line(error)}"
        ) from error
    finally:
        ray.shutdown()


def lost_rank_reporter(steps: Path) -> Any:
    """Ray Train's callback that prints lost ranks; it runs in the controller, whose output appears here."""
    from ray.train import UserCallback

    class LostRankReporter(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            newest, ranks = newest_complete(steps, STEPS, clean=False), sorted(worker_exceptions)
            print(
                f"psi: rank {', '.join(map(str, ranks))} of the cluster was lost "
                f"({type(worker_exceptions[ranks[0]]).__name__}); all start again "
                f"from {newest or 'the beginning'} once enough nodes are there",
                flush=True,
            )

    return LostRankReporter()


def _train_rank(settings: dict[str, str]) -> None:
    from pgenrm_train.backends.sft.rank import train_rank

    train_rank(Job.read(Path(settings["job"])))
