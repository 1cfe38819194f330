"""PSI's engine: transformers' Trainer on DeepSpeed, with loss on assistant tokens only.

One code path serves nano on a CPU and 70B with LoRA on a cluster.  `train` first checks everything that can
be wrong, encodes the chats once for all processes, and publishes the checkpoint that training left on disk.
A single process trains in place.  Several processes on one node are started by torchrun, those of several
nodes by Ray Train; both run `rank` on a job file.  Each checkpoint gets a marker as its last file, so that a
resume recognises and skips a half-written one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pgenrm_train.backends.protocols import Trained
from pgenrm_train.backends.sft import ray_train
from pgenrm_train.backends.sft.batches import write_chats
from pgenrm_train.backends.sft.checkpoints import STEPS, Mark, check_resumable, is_over, state_of
from pgenrm_train.backends.sft.checks import check_libraries, encode_rows, inspect_start
from pgenrm_train.backends.sft.job import Job
from pgenrm_train.backends.sft.publishing import publish
from pgenrm_train.backends.sft.rank import train_rank
from pgenrm_train.backends.sft.settings import deepspeed_variables, set_variables
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError
from pgenrm_train.run.checkpoints import newest_complete, step_of
from pgenrm_train.run.process import run_child
from pgenrm_train.run.tracking import trim

STOP_SECONDS = 15.0  # for torchrun to end its ranks


def train(
    config: Config, rows: Path, *, start: Path | str, work_dir: Path, validator: str | None = None
) -> Trained:
    """Fine-tune `start` on the chats in `rows` (parquet; METHOD §3) and publish `work_dir/checkpoint`.

    Rank 0 appends to `work_dir/metrics.jsonl` every `psi.log_every` steps.  Training resumes from the newest
    complete checkpoint in `work_dir/steps`.  `validator` is `module:function`, which makes a `Validator` from
    the configuration: a name, because every process makes its own.  With a validator the best checkpoint is
    published, without one the last.

    Raises ConfigError, DataError or ArtifactError before any weight is loaded if the inputs cannot be trained
    on, and NothingTrainedError if fewer optimiser steps were made than planned.
    """
    set_variables(config.cluster)
    check_libraries(config.psi)
    inspected = inspect_start(config, start)
    mark = Mark(config.cluster.ranks, config.cluster.zero_stage, inspected.identity)
    base = str(Path(start).resolve()) if Path(start).exists() else str(start)
    job = Job(config, base, work_dir.resolve(), mark, validator if config.psi.evaluate_every else None)
    write_chats(job.chats, encode_rows(inspected.tokenizer, rows, inspected.limit))
    if resume := newest_complete(job.steps, STEPS):
        check_resumable(resume, mark)
    if resume and is_over(config.psi, state_of(resume)):
        trim(job.metrics, step_of(resume))
    else:
        _run(job)
    return publish(job, inspected.tokenizer)


def _run(job: Job) -> None:
    """Train on all ranks, and return when the last one has ended."""
    cluster = job.config.cluster
    if cluster.ranks == 1:
        train_rank(job)
    elif cluster.nodes == 1:
        _torchrun(job.write(), cluster.processes_per_node, deepspeed_variables(cluster))
    else:
        ray_train.run(job.config, job.write(), deepspeed_variables(cluster))


def _torchrun(job_file: Path, ranks: int, variables: dict[str, str]) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    module = ["-m", "pgenrm_train.backends.sft.rank", str(job_file)]
    command = [torchrun, "--standalone", f"--nproc_per_node={ranks}", *module]
    if code := run_child(command, os.environ | variables, patience=STOP_SECONDS):
        raise BackendError(f"torchrun exited with code {code}; see the messages of its ranks above")
