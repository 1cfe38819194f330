"""PSI, persona-guided scoring induction (METHOD §3): SFT on the kept chains, loss on the assistant's tokens only.

Needs `build_sec/sec.parquet` and a base model.  Makes `checkpoint/` in Hugging Face format.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pgenrm_train.backends.protocols import Trained
from pgenrm_train.config import PsiConfig
from pgenrm_train.stages.build_sec import SEC

FREE = ("save_every", "log_every", "keep_checkpoints")  # a run may go on with others: they train nothing
READS = (
    *(f"psi.{field.name}" for field in dataclasses.fields(PsiConfig) if field.name not in FREE),
    "seed",
    "model.kind",
    "model.name",
    "model.path",
    "model.lora",
    "model.nano",
    "cluster.processes_per_node",
    "cluster.nodes",
)

__all__ = ["READS", "SEC", "facts"]


def facts(trained: Trained) -> dict[str, Any]:
    """What the manifest keeps of a training run."""
    return {"steps": trained.steps, "metrics": dict(trained.metrics)}
