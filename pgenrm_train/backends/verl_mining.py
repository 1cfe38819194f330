"""Measured hardness: K chains a row from the current actor, through the session's own rollout engine (METHOD §5).

`mining.parquet` in the phase's folder holds a row a pair: index, pair_id, pass_rate (share of the K chains that rank chosen
first; a failed chain ranks nothing), margin (mean of s_chosen − best other over parsed chains, null without any), samples,
failures.  Its metadata names the checkpoint by a hash of its weights, so another model's measurements are not reused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def pass_rates(trainer: Any, start: Path, samples: int) -> list[float]:
    """One pass rate a row of the trainer's phase: from `mining.parquet` when it is of this checkpoint, else measured now."""
    file = trainer.run.work_dir / "mining.parquet"
    mark = {b"checkpoint": weights_hash(start).encode(), b"samples": str(samples).encode()}
    if file.exists():
        found = pq.read_table(file)
        kept = {key: (found.schema.metadata or {}).get(key) for key in mark}
        if kept == mark and found.num_rows == trainer.run.table.num_rows:
            return found["pass_rate"].to_pylist()
        print(f"{file} is of another checkpoint or other rows; the pairs are measured again", flush=True)
    rows = mine(trainer, samples)
    draft = file.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(mark), draft)
    draft.rename(file)
    return [row["pass_rate"] for row in rows]


def mine(trainer: Any, samples: int) -> list[dict[str, Any]]:
    """Sample every row `samples` times from the current actor and summarise it."""
    groups = trainer.measure(trainer.run.table, samples, "mine")
    extras = trainer.run.table["extra_info"].to_pylist()
    return [summary(index, extra["pair_id"], group) for index, (extra, group) in enumerate(zip(extras, groups, strict=True))]


def summary(index: int, pair_id: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    margins = [info["margin"] for info in group if info["margin"] is not None]
    return {
        "index": index,
        "pair_id": pair_id,
        "pass_rate": sum((info["outcome"] or 0.0) > 0 for info in group) / len(group),
        "margin": float(np.mean(margins)) if margins else None,
        "samples": len(group),
        "failures": len(group) - len(margins),
    }


def weights_hash(checkpoint: Path) -> str:
    """Of the safetensors files, in name order."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
