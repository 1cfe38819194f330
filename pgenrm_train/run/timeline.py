"""Where the time of a run goes: the parts of each stage, from all of its processes.

A stage does one thing at a time: while a child process trains, its parent waits.  So one line per change, in
`timeline.jsonl` of the run folder, is enough: each part lasts until the next line.
Child processes find file and stage by environment variables.  Without `begin`, `mark` does nothing.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from pgenrm_train.config import STAGES
from pgenrm_train.files import write_json

LINES, SUMMARY = "timeline.jsonl", "timeline.json"
FILE, STAGE = "PGENRM_TIMELINE", "PGENRM_STAGE"  # environment variables


class Part(StrEnum):
    """Parts of a stage's time; the report's columns, in this order."""

    START = "start-up"  # imports, engines, loading weights
    DATA = "data"  # rows, prompts, rejection sampling, clusters
    GENERATION = "generation"
    LOG_PROBABILITIES = "log-probabilities"
    VERDICTS = "verdicts"  # waiting for a judge
    UPDATE = "update"
    SYNC = "weight sync"
    VALIDATION = "validation"
    CHECKPOINT = "checkpoints"
    EXPORT = "export"
    REPORT = "statistics and report"


_END = "end"


def _start_times() -> Iterator[float]:
    yield psutil.Process().create_time()
    while True:
        yield time.time()


_starts = _start_times()


def begin(run_dir: Path, stage: str) -> None:
    """Start the time line of a stage.  The first stage of a process began when the process did."""
    os.environ[FILE], os.environ[STAGE] = str(run_dir.resolve() / LINES), stage
    _write(Part.START, next(_starts), new=True)


def mark(part: Part, stage: str | None = None) -> None:
    """The stage of `begin`, or `stage`, does `part` from now on.  One of its processes calls at a time."""
    _write(part, time.time(), stage)


def end() -> None:
    """The stage has ended, well or not."""
    _write(_END, time.time())
    os.environ.pop(FILE, None)


def _write(part: str, when: float, stage: str | None = None, new: bool = False) -> None:
    if (file := os.environ.get(FILE)) is None:
        return
    line: dict[str, object] = {"time": round(when, 4), "stage": stage or os.environ[STAGE], "part": part}
    line |= {"new": True} if new else {}
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps(line))  # so that a line that was cut does not spoil this one


def seconds_by_part(run_dir: Path) -> dict[str, dict[str, float]]:
    """Stage → part → seconds, over all starts of a run; empty without a time line.

    The last part of a process that was killed has no known end and counts nothing.
    """
    file = run_dir / LINES
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line[-1:] == "}"]
    spent: dict[str, dict[str, float]] = {}
    for line, after in itertools.pairwise(lines):
        if line["part"] != _END and not after.get("new"):
            parts = spent.setdefault(line["stage"], {})
            parts[line["part"]] = parts.get(line["part"], 0.0) + after["time"] - line["time"]
    return spent


def rows(spent: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row per stage, in the order of the pipeline: seconds in all and by part; a part that no stage has
    is left out."""
    used = [part for part in Part if any(part in parts for parts in spent.values())]
    return [
        {"stage": stage, "seconds": round(sum(spent[stage].values()), 1)}
        | {str(part): round(spent[stage].get(part, 0.0), 1) for part in used}
        for stage in STAGES
        if stage in spent
    ]


def write_summary(run_dir: Path) -> None:
    """Write `timeline.json`: seconds by stage and part."""
    write_json(run_dir / SUMMARY, seconds_by_part(run_dir))
