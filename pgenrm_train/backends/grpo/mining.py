"""Measured hardness: K chains per pair from the current actor, by the session's rollout engine (METHOD §5).

Files in the phase's folder:

    mining.parquet    `MinedPair` per pair.  Its metadata names the checkpoint by a hash of its weights.  It
                      grows by blocks of the first pairs, so that a killed mining resumes
    hardness.parquet  the record of each pair: the above, the model-free signals, hard, suspect and why
    suspect.parquet   the suspect rows of the record, most contradicted first
    hardness.json     counts, for the manifest
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.backends.grpo.phase import ChainRequest, HardnessSource, Phase, PhaseRun
from pgenrm_train.backends.grpo.scoring import ScoredChain
from pgenrm_train.bootstrap import mean
from pgenrm_train.config import CurriculumConfig
from pgenrm_train.curriculum.hardness import ORDERS, SIGNALS, MinedPair, records
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import write_json, write_table
from pgenrm_train.rewards.training_rows import read_extras
from pgenrm_train.run.folder import weights_digest

# The measurement is saved after so many pairs, or after a share of those saved: each time all of it is
# written, so that equal blocks would cost the square of the pairs.
BLOCK, SHARE = 256, 1 / 16
MINING, HARDNESS, SUSPECTS, COUNTS = "mining.parquet", "hardness.parquet", "suspect.parquet", "hardness.json"


# Requests → (uid, chains) as they end; see `ChainTrainer.measure`.
Measure = Callable[[Sequence[ChainRequest]], Iterable[tuple[str, list[ScoredChain]]]]


def hardness(run: PhaseRun, source: HardnessSource, start: Path, measure: Measure) -> dict[str, list[Any]]:
    """Compute, save and log the hardness record; returns its columns (see `hardness.records`)."""
    grpo = run.grpo
    assert isinstance(grpo, CurriculumConfig)
    mined = mined_pairs(run, source, start, measure) if source.samples else None
    table = None if source.signals is None else pq.read_table(source.signals)
    names = (*SIGNALS, *([grpo.hard_by] if grpo.hard_by in ORDERS else []))
    signals = table and {name: np.asarray(table[name].to_numpy(), dtype=float) for name in names}
    record = records(run.pair_ids, mined, signals, grpo.hard_low, grpo.hard_high, grpo.hard_by)
    if table is not None:
        record["origin"] = table["origin"].to_pylist()
    publish(run.phase, record)
    return record


def publish(phase: Phase, record: Mapping[str, Sequence[Any]]) -> None:
    """Write the record, its suspect rows and its counts."""
    table, folder = pa.table(dict(record)), phase.work_dir
    suspects = table.filter(table["suspect"])
    if "margin" in suspects.column_names:
        suspects = suspects.sort_by("margin")
    for name, content in ((HARDNESS, table), (SUSPECTS, suspects)):
        write_table(folder / name, content)
    hard, suspect = sum(record["hard"]), suspects.num_rows
    cold = next((name for name in ORDERS if name in record), "signals")
    write_json(
        folder / COUNTS,
        {
            "pairs": table.num_rows,
            "hard": hard,
            "suspect": suspect,
            "measured_by": "model" if "pass_rate" in record else cold,
        },
    )
    listed = f" (down-weighted, listed in {folder / SUSPECTS})" if suspect else ""
    print(
        f"{phase.section}: {hard} of {table.num_rows} pairs are hard, {suspect} suspect{listed}", flush=True
    )


def mined_pairs(run: PhaseRun, source: HardnessSource, start: Path, measure: Measure) -> list[MinedPair]:
    """Measurements of `mining.parquet`; makes the missing ones.  Raises ArtifactError as `cached` does."""
    pairs = cached(run.phase.work_dir, start, source.samples, run.pair_ids)
    saved, waiting = len(pairs), deque(_requests(run, source)[len(pairs) :])
    if not waiting:
        return pairs
    # Made once: rows of earlier blocks stay as they are, and the mark hashes the weights.
    tables = [pq.read_table(run.phase.work_dir / MINING)] if saved else []
    mark = _mark(start, source.samples)
    ended: dict[str, list[ScoredChain]] = {}
    for uid, chains in measure([request for pair in waiting for request in pair]):
        ended[uid] = chains
        while waiting and all(request.uid in ended for request in waiting[0]):
            groups = [ended.pop(request.uid) for request in waiting.popleft()]
            pairs.append(summarise(len(pairs), run.pair_ids[len(pairs)], *groups))
        if len(pairs) - saved >= (max(BLOCK, SHARE * saved) if waiting else 1):
            tables.append(pa.Table.from_pylist([asdict(pair) for pair in pairs[saved:]]))
            # A block may hold no value of a column, whose type is then null.
            table = pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(mark)
            write_table(run.phase.work_dir / MINING, table)
            saved = len(pairs)
    return pairs


def _requests(run: PhaseRun, source: HardnessSource) -> list[list[ChainRequest]]:
    """Per pair the chains in the given order and, with a mirror, those in the other order."""
    turned = source.samples // 2 if source.mirror is not None else 0
    orders = [("mine", run.table, source.samples - turned)]
    if source.mirror is not None and turned:
        orders.append(("turned", pq.read_table(source.mirror), turned))
    columns = [
        [ChainRequest(f"{name}{n}", row, samples) for n, row in enumerate(table.to_pylist())]
        for name, table, samples in orders
    ]
    return [list(pair) for pair in zip(*columns, strict=True)]


def check_cache(phase: Phase, start: Path) -> None:
    """Refuse a foreign measurement before an engine is started, which takes minutes."""
    source = phase.hardness
    # Without a config.json, the phase before makes the checkpoint.
    if source is not None and source.samples and (start / "config.json").exists():
        pair_ids = [extra["pair_id"] for extra in read_extras(phase.rows)]
        cached(phase.work_dir, start, source.samples, pair_ids)


def cached(folder: Path, start: Path, samples: int, pair_ids: Sequence[str]) -> list[MinedPair]:
    """The saved measurement; of the first pairs alone if mining was interrupted.

    Raises ArtifactError if it is of another checkpoint, another number of samples or other pairs.
    """
    file, mark = folder / MINING, _mark(start, samples)
    if not file.exists():
        return []
    table = pq.read_table(file)
    saved = table.schema.metadata or {}
    for key, difference in (
        (b"checkpoint", f"another checkpoint than {start}"),
        (b"samples", "another curriculum.mining_samples"),
    ):
        if saved.get(key) != mark[key]:
            raise ArtifactError(
                f"{file} was measured with {difference} ({saved.get(key, b'nothing').decode()} instead of "
                f"{mark[key].decode()}): delete it to measure again, or use another run_dir"
            )
    pairs = [MinedPair(**row) for row in table.to_pylist()]
    if [pair.pair_id for pair in pairs] != list(pair_ids)[: len(pairs)]:
        raise ArtifactError(
            f"{file} holds other pairs than the phase's rows: delete it to measure again, or use another "
            "run_dir"
        )
    return pairs


def _mark(start: Path, samples: int) -> dict[bytes, bytes]:
    return {b"checkpoint": weights_digest(start).encode(), b"samples": str(samples).encode()}


def summarise(
    index: int, pair_id: str, given: Sequence[ScoredChain], turned: Sequence[ScoredChain] = ()
) -> MinedPair:
    """The measurement of one pair from its chains; `turned` are those in the other order."""
    chains = [*given, *turned]
    rankings = [chain.ranking for chain in chains if chain.ranking is not None]
    return MinedPair(
        index=index,
        pair_id=pair_id,
        pass_rate=_pass_rate(chains),
        margin=mean([ranking.margin for ranking in rankings]),
        verified_margin=mean([r.verified_margin for r in rankings if r.verified_margin is not None]),
        order_gap=abs(_pass_rate(given) - _pass_rate(turned)) if turned else None,
        samples=len(chains),
        failures=len(chains) - len(rankings),
    )


def _pass_rate(chains: Sequence[ScoredChain]) -> float:
    return sum(chain.passed for chain in chains) / len(chains)
