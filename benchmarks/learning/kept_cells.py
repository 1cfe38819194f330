"""Kept cells of a benchmark: one small parquet file per finished cell, fit to be committed.

A cell is a trained checkpoint (a method and a seed) with its answers to the test pairs.  Training takes
hours and run folders are deleted.  The tables can be made again from the kept files alone, also from
those of several days and machines.  Cells must be comparable for that, so each file records its start,
its result and its settings:

    columns    pair_id, user_id, kind, cohort, order, score_chosen, score_rejected, failure
    metadata   method, seed, start and checkpoint (hashes of weights), settings (those that all cells share),
               steps, chains, seconds, the commit, counts of hard pairs, and a few metrics per step
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import atomic
from pgenrm_train.stages.registry import FREE

COLUMNS = ("pair_id", "user_id", "kind", "cohort", "order", "score_chosen", "score_rejected", "failure")
Facts = Mapping[str, Any]
Kept = dict[tuple[str, int], tuple[pd.DataFrame, Facts]]  # (method, seed) → its answers and facts


def keep(folder: Path, predictions: pd.DataFrame, facts: Facts) -> Path:
    """Write and return `<folder>/<method>-<seed>.parquet`; one sample per pair and order."""
    if predictions.duplicated(["user_id", "pair_id", "order"]).any():
        raise DataError(
            "a kept cell holds one sample per pair and order; evaluate with eval.seeds=1 eval.ind=1"
        )
    rows = predictions[list(COLUMNS)].sort_values(["user_id", "pair_id", "order"])
    table = pa.Table.from_pandas(rows, preserve_index=False)
    file = folder / f"{facts['method']}-{facts['seed']}.parquet"
    with (
        atomic(file) as draft,
        pq.ParquetWriter(
            draft, table.schema, compression="zstd", compression_level=19, store_schema=False
        ) as writer,
    ):
        writer.write_table(table)
        writer.add_key_value_metadata({"cell": json.dumps(facts)})
    return file


def read(folder: Path) -> Kept:
    """Read every kept cell of `folder`.  Raises ArtifactError for cells that cannot share a table."""
    cells: Kept = {}
    for file in sorted(folder.glob("*.parquet")):
        facts = json.loads((pq.read_metadata(file).metadata or {}).get(b"cell", b"null"))
        if facts is None:
            raise ArtifactError(f"{file} is not a kept cell: its metadata have no entry `cell`")
        cells[facts["method"], facts["seed"]] = (
            pq.read_table(file).to_pandas().assign(seed=0, sample=0),
            facts,
        )
    check([facts for _, facts in cells.values()], folder)
    return cells


def check(cells: Sequence[Facts], folder: Path) -> None:
    """Raise ArtifactError unless cells share settings and start, and arms start from their seed's `cre`.

    The answers of the start itself are the cell `psi`.  Intervals of validation and saving (`FREE`) may
    differ, and so may a key that only one cell has: it comes from newer code.
    """
    for facts in cells[1:]:
        one, other = cells[0]["settings"], facts["settings"]
        shared = [key for key in one.keys() & other.keys() if key.rpartition(".")[2] not in FREE]
        if changed := [key for key in shared if one[key] != other[key]]:
            changes = ", ".join(f"{key}: {one[key]} → {other[key]}" for key in sorted(changed))
            raise ArtifactError(
                f"{_name(facts)} was made with other settings than {_name(cells[0])} in {folder} ({changes})"
            )
    first: dict[Any, Facts] = {}  # group with one start → its first cell
    starts = {facts["seed"]: facts for facts in cells if facts["method"] == "cre"}
    for facts in cells:
        where = "cre" if facts["method"] in ("psi", "cre") else facts["seed"]
        other = first.setdefault(where, facts)
        if facts["start"] != other["start"]:
            raise ArtifactError(
                f"{_name(facts)} and {_name(other)} in {folder} start from different checkpoints"
            )
        cre = starts.get(facts["seed"])
        if cre and where != "cre" and facts["start"] != cre["checkpoint"]:
            raise ArtifactError(
                f"{_name(facts)} in {folder} does not start from the checkpoint of {_name(cre)}: "
                f"delete the kept cells of seed {facts['seed']} and make them again, or use another seed"
            )


def _name(facts: Facts) -> str:
    return f"{facts['method']}-{facts['seed']}"
