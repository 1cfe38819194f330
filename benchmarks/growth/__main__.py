"""How the cost of every stage grows with users, votes per user, samples per pair and processes.

    python -m benchmarks.growth [--only NAME] [--repeats 2]

Each size is twice the one before.  Counted are the CPU seconds of a stage's own work, with children, without
engines: the least of `--repeats` runs, each in a process of its own that has imported everything.  The
exponent is the slope of log seconds over log size, with the standard error of the line.  Memory is the growth
of a driver's peak per pair between the two largest sizes, files and pairs that it reads included.

Bars: exponent at most 1.1, and 200 bytes per pair for the drivers that hold no texts.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.growth import stages
from data_builders.sources.personaworld import SCENARIOS
from data_builders.teachers import ideal
from pgenrm_train.chains.near_duplicates import signature

EXPONENT, BYTES = 1.1, 200


class Measured(NamedTuple):
    seconds: float
    bytes: int  # growth of the peak


@dataclass(frozen=True)
class Growth:
    """A stage and an axis; `inputs` fills a folder for a size, `pairs` are those of a size."""

    stage: str
    axis: str
    first: int
    work: Callable[[Path, int], stages.Work]
    inputs: Callable[[Path, int], object] = lambda *_: None
    pairs: Callable[[int], float] = float
    doublings: int = 3
    driver: bool = False  # whether the bar of bytes is for it

    @property
    def sizes(self) -> list[int]:
        return [self.first * 2**n for n in range(self.doublings + 1)]


def world(folder: Path, users: int) -> None:
    stages.write_pairs(folder, stages.pairs_of(users, 12))


def voters(folder: Path, votes: int) -> None:
    stages.write_pairs(folder, [pair for pair in stages.pairs_of(1, votes) if pair.trains])


def raw(folder: Path, users: int) -> None:
    stages.write_votes(folder, stages.pairs_of(users, 12))


def raw_votes(folder: Path, votes: int) -> None:
    stages.write_votes(folder, [pair for pair in stages.pairs_of(1, votes) if pair.trains])


def shared(folder: Path, users: int) -> None:
    stages.write_pairs(folder, stages.shared_pairs(users))


def chats(folder: Path, count: int) -> None:
    stages.write_chat_rows(folder, stages.pairs_of(count // 12 + 1, 12)[:count])


def some_chats(folder: Path, _: int) -> None:
    chats(folder, 1024)


def some_users(folder: Path, _: int) -> None:
    world(folder, 24)


def of_users(votes: int, size: int) -> float:
    return size * votes


per_user = partial(of_users, 15)  # those of held-out users included
STAGES = (
    Growth("build_data, PersonaWorld", "users", 250, stages.personaworld_data, pairs=partial(of_users, 12)),
    Growth("build_data, data=pairs", "users", 60, stages.votes_data, raw, per_user),
    Growth("build_data, data=pairs", "votes per user", 500, stages.votes_data, raw_votes),
    Growth("build_sec, rule", "users", 25, stages.sec_by_rule, world, per_user),
    Growth("build_sec, language model", "users", 15, stages.sec_by_model, world, per_user),
    Growth("build_sec, rule", "votes per user", 300, stages.sec_by_rule, voters),
    Growth("build_sec, rejected chains", "samples", 8, stages.sec_samples, some_users),
    Growth("PSI: chats to batches", "chats", 256, stages.psi, chats),
    Growth("PSI: chats to batches", "processes", 1, stages.psi_ranks, some_chats, doublings=1),
    Growth("GRPO rows", "users", 20, stages.grpo_rows, world, per_user),
    Growth("GRPO rows", "votes per user", 300, stages.grpo_rows, voters),
    Growth("mining's books", "pairs", 4000, stages.mined),
    Growth("sampler, an epoch", "pairs", 32_000, stages.sampled, driver=True),
    Growth("sampler, set-up", "pairs", 500_000, stages.sampler_set_up, driver=True),
    Growth("scoring and metrics", "prompts", 256, stages.scored_prompts),
    Growth("scoring and metrics", "samples", 16, stages.scored_samples),
    Growth("prototypes", "users", 125, stages.clustered, world, per_user),
    Growth("neighbours, 500 searches", "users", 20_000, stages.neighbours),
    Growth("evaluate", "users", 20, stages.evaluated, world, per_user),
    Growth("evaluate", "samples", 4, stages.evaluated_samples, some_users),
    Growth("label", "users", 40, stages.labelled, world, per_user),
    Growth("best_of_n", "users", 15, stages.best_of_n, world, per_user),
    Growth("twins, flips, others' ratings", "users", 4000, stages.shared, shared),
)


def in_child(function: Callable[[], object]) -> object:
    """The JSON-able result of `function`, in a fork whose output is dropped unless it fails."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 1
        try:
            os.close(reader)
            errors = os.dup(2)
            with tempfile.TemporaryFile() as kept:
                os.dup2(kept.fileno(), 1), os.dup2(kept.fileno(), 2)
                try:
                    result = json.dumps(function())
                except BaseException:  # also an exit: its reason must reach the terminal
                    os.dup2(errors, 2)
                    raise
            os.write(writer, result.encode())
            code = 0
        except BaseException:  # a fork must not return into its parent's code
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        result = stream.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a stage of the benchmark failed; see above")
    return json.loads(result)


def memory(key: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def spent() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(work: stages.Work) -> Measured:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, began = memory("VmRSS"), spent()
    work()
    return Measured(spent() - began, memory("VmHWM") - before)


def exponent(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Slope of log seconds over log size, and its standard error (NaN with two sizes)."""
    x, y = np.log(sizes), np.log(seconds)
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x))) if len(x) > 2 else float("nan")


def once(growth: Growth, size: int) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_child(lambda: growth.inputs(folder, size))
        return Measured(*in_child(lambda: measure(growth.work(folder, size))))


def run(growth: Growth, repeats: int) -> list[Measured]:
    least = []
    for size in growth.sizes:
        runs = [once(growth, size) for _ in range(repeats)]
        least.append(Measured(min(r.seconds for r in runs), min(r.bytes for r in runs)))
    return least


def line(growth: Growth, points: list[Measured]) -> str:
    seconds = [point.seconds for point in points]
    slope, error = exponent(growth.sizes, seconds)
    pairs = growth.pairs(growth.sizes[-1]) - growth.pairs(growth.sizes[-2])
    per_pair = (points[-1].bytes - points[-2].bytes) / pairs
    countable = growth.axis not in ("samples", "processes")
    fails = [name for name, broken in (
        ("exponent", slope > EXPONENT), ("bytes", growth.driver and per_pair > BYTES)
    ) if broken]  # fmt: skip
    return " | ".join(
        (
            f"| {growth.stage} | {growth.axis}",
            f"{growth.sizes[0]:,}–{growth.sizes[-1]:,}",
            f"{seconds[0]:.2f}–{seconds[-1]:.2f}",
            f"{slope:.2f} ± {error:.2f}" if growth.doublings > 1 else f"{slope:.2f}",
            f"{max(0.0, per_pair):,.0f}" if countable else "–",
            f"{'no: ' + ', '.join(fails) if fails else 'yes'} |",
        )
    )


def warm_up() -> None:
    """Make everything that a process makes once, so that forks have it."""
    for name in ("torch", "transformers", "sklearn.cluster", "sklearn.metrics", "matplotlib.pyplot"):
        importlib.import_module(name)
    for scenario in SCENARIOS:
        ideal._tables(scenario)
    for data in ("personaworld", "pairs"):
        stages.composed(data)
    signature("one text")
    stages.tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="stages whose name holds this text")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    warm_up()
    print("| stage | axis | sizes | CPU s | exponent | bytes per pair | within the bars |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for growth in STAGES:
        if args.only in growth.stage:
            print(line(growth, run(growth, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
