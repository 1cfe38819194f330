"""gpu_check: the owner's first day on a GPU node, in 20 minutes: preflight, three steps of PSI and of CRE, an evaluation, one verdict.

The stages are the recipes themselves, each in a process of its own as in the pipeline, on a model of random weights (nano's code path,
`model=nano_1b` or `model.nano.*`): engines, kernels, NCCL and memory are tried, not what a model learns.  Peak memory is measured from
outside (NVML on GPUs, the kernel's share of each process on a CPU) and set beside the plan's; the same recipe runs on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgenrm_train.cluster.planning import plan_of
from pgenrm_train.cluster.preflight import findings, stages_of
from pgenrm_train.cluster.preflight.machine import visible_gpus
from pgenrm_train.config import Config
from pgenrm_train.errors import PGenRMError, PreflightError
from pgenrm_train.files import write_json
from pgenrm_train.run.folder import StageFolder, environment_facts
from pgenrm_train.stages.stage import launch, prepare

MINUTES = 20.0  # the promise
END_MINUTES = 2 * MINUTES  # what still runs then hangs, and is ended: a verdict always comes
STEPS = ("build_data", "build_sec", "psi", "cre", "evaluate")
MEASURED = ("psi", "cre", "evaluate")


@dataclass
class Seen:
    """What was seen of one recipe: seconds, GiB at the peak, the times at which metrics were written."""

    seconds: float = 0.0
    peak_gib: float = 0.0
    steps: list[float] = field(default_factory=list)
    error: str | None = None


def run(config: Config) -> int:
    config.model.attention = attention(config)
    prepare(config)
    problems = [p for finding in findings(config, stages_of(config)) for p in finding.problems]
    if problems:
        raise PreflightError("; ".join(problems))
    print(f"preflight: ok · attention: {config.model.attention}", flush=True)
    seen: dict[str, Seen] = {}
    end = time.monotonic() + 60 * END_MINUTES
    for recipe in STEPS:
        seen[recipe] = tried(config, recipe, end - time.monotonic())
        if seen[recipe].error:
            break
    report = report_of(config, seen)
    write_json(Path(config.run_dir) / "gpu_check.json", report)
    print(told(report))
    return 0 if report["passed"] else 1


def attention(config: Config) -> str:
    """FlashAttention where it is installed and there is a GPU for it."""
    flash = config.cluster.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else config.model.attention


def tried(config: Config, recipe: str, seconds: float) -> Seen:
    """Run one recipe in a process of its own, for so many seconds at most; a failure is kept, for the verdict."""
    seen, began = Seen(), time.monotonic()
    with watching(config, recipe, seen), ending(seen, seconds):
        try:
            launch(config, recipe)
        except (PGenRMError, SystemExit) as error:
            seen.error = seen.error or (
                str(error) if isinstance(error, PGenRMError) else "its sentence stands above"
            )
    seen.seconds = time.monotonic() - began
    return seen


@contextmanager
def ending(seen: Seen, seconds: float) -> Iterator[None]:
    """Kill what the block has started when it takes longer."""
    import psutil

    def end() -> None:
        seen.error = f"not done after {END_MINUTES:g} minutes in all, and ended"
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watching(config: Config, recipe: str, seen: Seen, every: float = 0.25) -> Iterator[None]:
    """Sample memory, and note when lines come to the stage's metrics.jsonl, while the block runs."""
    ended, metrics = threading.Event(), Path(config.run_dir) / recipe / "metrics.jsonl"
    before = used_gib(config)

    def watch() -> None:
        lines = 0
        while not ended.wait(every):
            seen.peak_gib = max(seen.peak_gib, used_gib(config) - before)
            written = metrics.read_text().count("\n") if metrics.exists() else 0
            seen.steps += [time.monotonic()] * max(0, written - lines)
            lines = written

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def used_gib(config: Config) -> float:
    """GiB in use: on the fullest visible GPU, or by all processes that this one has started."""
    if config.cluster.device == "cuda":
        return max((gpu.memory_gib - gpu.free_gib for gpu in visible_gpus()), default=0.0)
    import psutil

    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / 2**30


def report_of(config: Config, seen: dict[str, Seen]) -> dict[str, Any]:
    """Numbers of every recipe beside the plan's, and the verdict."""
    planned: dict[str, float] = {
        stage.stage: max((p.total for p in stage.phases), default=0.0) for stage in plan_of(config).stages
    }
    rows = []
    for recipe, found in seen.items():
        row: dict[str, Any] = {"recipe": recipe, "seconds": round(found.seconds, 1), "error": found.error}
        if recipe in MEASURED:
            row |= {"peak_gib": round(found.peak_gib, 2), "planned_gib": round(planned[recipe], 2)}
        rows.append(row | throughput(config, recipe, found))
    minutes = sum(found.seconds for found in seen.values()) / 60
    done = len(seen) == len(STEPS) and all(found.error is None for found in seen.values())
    return {
        "passed": done and minutes <= MINUTES,
        "finished": done,
        "minutes": round(minutes, 1),
        "cluster": config.cluster.name,
        "model": config.model.label,
        "parameters": plan_of(config).geometry.parameters,
        "attention": config.model.attention,
        "recipes": rows,
        **environment_facts(),
    }


def throughput(config: Config, recipe: str, found: Seen) -> dict[str, float]:
    """Seconds a step, from when metrics were written; tokens a second of the rollouts; chains a second of the evaluation."""
    folder = StageFolder.read(Path(config.run_dir), recipe)
    if not folder.complete or recipe not in MEASURED:
        return {}
    if recipe == "evaluate":
        models = sum(StageFolder.read(Path(config.run_dir), stage).complete for stage in ("psi", "cre"))
        chains = 2 * models * folder_results(config)["n_pairs"]
        return {"chains_per_second": round(chains / found.seconds, 3)}
    rates = {}
    if len(found.steps) > 1:
        rates["seconds_per_step"] = round((found.steps[-1] - found.steps[0]) / (len(found.steps) - 1), 2)
    if recipe == "cre":
        last = json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[-1])
        tokens = config.cre.prompts_per_step * config.cre.group_size * last["cre/response_length"]
        rates |= {
            "seconds_per_step": round(last["cre/time/step"], 2),
            "generated_per_second": round(tokens / last["cre/time/gen"], 1),
        }
    return rates


def folder_results(config: Config) -> dict[str, Any]:
    return dict(json.loads((Path(config.run_dir) / "evaluate" / "results.json").read_text()))


def told(report: dict[str, Any]) -> str:
    """The report for people; its last line is the verdict."""
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:,.1f} M random weights on cluster={report['cluster']}"
    ]
    for row in report["recipes"]:
        facts = [
            f"{name.replace('_', ' ')} {row[name]:g}"
            for name in ("seconds_per_step", "generated_per_second", "chains_per_second")
            if name in row
        ]
        if "peak_gib" in row:
            facts.append(f"peak {row['peak_gib']:.2f} GiB, planned {row['planned_gib']:.2f}")
        facts += [f"FAILED: {row['error']}"] if row["error"] else []
        lines.append(f"  {row['recipe']:10} {row['seconds']:7.1f} s  {' · '.join(facts)}")
    if report["passed"]:
        verdict = f"PASSED in {report['minutes']} minutes"
    elif report["finished"]:
        verdict = f"SLOW: everything works, in {report['minutes']} minutes instead of {MINUTES:g}"
    else:
        verdict = f"FAILED at {report['recipes'][-1]['recipe']}; the same command goes on from there"
    return "\n".join([*lines, f"verdict: {verdict}"])
