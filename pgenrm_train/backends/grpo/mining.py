"""Measured hardness: K chains a pair from the current actor, through the session's own rollout engine (METHOD §5).

In the phase's folder:

    mining.parquet    a row a pair: index, pair_id, pass_rate (share of the K chains that rank chosen first; a failed chain ranks
                      nothing), margin and verified_margin (means of s_chosen − best other over the chains that have such scores,
                      null without any), order_gap (difference of the pass rates in the two orders, null when one order was asked),
                      samples, failures.  Its metadata names the checkpoint by a hash of its weights.  It grows by blocks, so
                      that a killed mining goes on
    hardness.parquet  the record of each pair: the above, the model-free signals, hard, suspect and why
    suspect.parquet   the suspect rows of the record, most contradicted first
    hardness.json     counts, for the manifest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.curriculum.hardness import ORDERS, SIGNALS, column, records
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import atomic, write_json
from pgenrm_train.run.folder import weights_digest

BLOCK = 256  # pairs after which what was measured is kept
MINING, HARDNESS, SUSPECTS, COUNTS = "mining.parquet", "hardness.parquet", "suspect.parquet", "hardness.json"


def hardness(
    trainer: Any,
    start: Path,
    samples: int,
    mirror: Path | None,
    signals: Path | None,
    band: tuple[float, float],
    by: str = "hardness",
) -> dict[str, Any]:
    """The hardness record of the trainer's phase, written, counted and told; returns its columns (see `hardness.records`).

    samples: chains a pair, 0 for a cold start from `signals`; mirror: the rows in the other presentation order.
    """
    run = trainer.run
    mined = mined_rows(trainer, start, samples, mirror) if samples else None
    table, names = (
        None if signals is None else pq.read_table(signals),
        (*SIGNALS, *([by] if by in ORDERS else [])),
    )
    found = (
        None if table is None else {name: np.asarray(table[name].to_numpy(), dtype=float) for name in names}
    )
    record = records(run.pair_ids, mined, found, *band, by)
    if table is not None:
        record["origin"] = table["origin"].to_pylist()
    publish(run.work_dir, record, run.stage)
    return record


def publish(folder: Path, record: Mapping[str, Any], stage: str) -> None:
    table = pa.table(dict(record))
    with atomic(folder / HARDNESS) as draft:
        pq.write_table(table, draft)
    suspects = table.filter(table["suspect"])
    if "margin" in suspects.column_names:
        suspects = suspects.sort_by("margin")
    with atomic(folder / SUSPECTS) as draft:
        pq.write_table(suspects, draft)
    counts = {"pairs": table.num_rows, "hard": sum(record["hard"]), "suspect": suspects.num_rows,
              "measured_by": "model" if "pass_rate" in record else next((name for name in ORDERS if name in record), "signals")}  # fmt: skip
    write_json(folder / COUNTS, counts)
    listed = f" (down-weighted, listed in {folder / SUSPECTS})" if suspects.num_rows else ""
    print(
        f"{stage}: {counts['hard']} of {counts['pairs']} pairs are hard, {counts['suspect']} suspect{listed}",
        flush=True,
    )


def mined_rows(trainer: Any, start: Path, samples: int, mirror: Path | None) -> list[dict[str, Any]]:
    """From `mining.parquet`, else measured now.  Raises ArtifactError as `cached` does."""
    run = trainer.run
    rows = cached(run.work_dir, start, samples, run.pair_ids)
    mark, turned = _mark(start, samples), None if mirror is None else pq.read_table(mirror)
    while len(rows) < len(run.pair_ids):
        rows += mine(trainer, samples, turned, range(len(rows), min(len(rows) + BLOCK, len(run.pair_ids))))
        with atomic(run.work_dir / MINING) as draft:
            pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(mark), draft)
    return rows


def check_cache(phase: Any, start: Path) -> None:
    """Refuse a foreign measurement before minutes go into starting an engine; phase: a `verl_grpo.Phase`."""
    if phase.mining_samples and (start / "config.json").exists():  # else a phase before makes it
        extras = pq.read_table(phase.rows, columns=["extra_info"])["extra_info"].to_pylist()
        cached(phase.work_dir, start, phase.mining_samples, [extra["pair_id"] for extra in extras])


def cached(folder: Path, start: Path, samples: int, pair_ids: Sequence[str]) -> list[dict[str, Any]]:
    """What `folder` holds of the measurement, for the first pairs alone where mining was interrupted.

    Raises ArtifactError when it is of another checkpoint or other pairs.
    """
    file, mark = folder / MINING, _mark(start, samples)
    if not file.exists():
        return []
    found = pq.read_table(file)
    said = found.schema.metadata or {}
    for key, what in (
        (b"checkpoint", f"another checkpoint than {start}"),
        (b"samples", "another curriculum.mining_samples"),
    ):
        if said.get(key) != mark[key]:
            raise ArtifactError(
                f"{file} was measured with {what} ({_text(said.get(key))} instead of {_text(mark[key])}): delete it to measure "
                "again, or use another run_dir"
            )
    rows: list[dict[str, Any]] = found.to_pylist()
    if [row["pair_id"] for row in rows] != list(pair_ids)[: len(rows)]:
        raise ArtifactError(
            f"{file} holds other pairs than the phase's rows: delete it to measure again, or use another run_dir"
        )
    return rows


def _mark(start: Path, samples: int) -> dict[bytes, bytes]:
    return {b"checkpoint": weights_digest(start).encode(), b"samples": str(samples).encode()}


def _text(value: bytes | None) -> str:
    return "nothing" if value is None else value.decode()


def mine(trainer: Any, samples: int, mirror: pa.Table | None, places: range) -> list[dict[str, Any]]:
    """Sample the rows at `places` `samples` times from the current actor, half of them in the other order, and summarise each."""
    run = trainer.run
    turned = samples // 2 if mirror is not None else 0
    asked = trainer.measure(run.table, samples - turned, "mine", places=places)
    other = trainer.measure(mirror, turned, "turned", places=places) if turned else [[]] * len(asked)
    return [summary(i, run.pair_ids[i], *groups) for i, *groups in zip(places, asked, other, strict=True)]


def summary(
    index: int, pair_id: str, asked: Sequence[Mapping[str, Any]], turned: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """What the chains of one pair say; `turned` are those in the other order."""
    group = [*asked, *turned]
    return {
        "index": index,
        "pair_id": pair_id,
        "pass_rate": _passed(group),
        "margin": _mean(group, "margin"),
        "verified_margin": _mean(group, "verified_margin"),
        "order_gap": abs(_passed(asked) - _passed(turned)) if turned else None,
        "samples": len(group),
        "failures": sum(info["margin"] is None for info in group),
    }


def _passed(group: Sequence[Mapping[str, Any]]) -> float:
    return sum((info["outcome"] or 0.0) > 0 for info in group) / len(group)


def _mean(group: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = column(group, name)
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
