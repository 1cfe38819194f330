"""Where the driver's time goes in a GRPO step of 1,024 chains on eight stub servers.

    python -m benchmarks.speed.grpo_profile RUN_FOLDER [--prompts 128] [--group 8] [--servers 8] [--rounds 3]

Needs a run of which PSI and CRE's rows exist (`RUN_FOLDER/psi/checkpoint`, `RUN_FOLDER/cre/rows.parquet`,
`RUN_FOLDER/build_sec/sec.parquet`).  Rows, tokenizer, sampling, scoring and TransferQueue are the real ones.
A stub server answers after a random latency with a teacher's chain of the run, so no time is an engine's.
Times are CPU times of the driver, where the sampler runs on a thread: per part, per chain, and as a share of
the total.  TransferQueue's own actors and the workers are other processes.
"""

import argparse
import asyncio
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from pgenrm_train.backends.grpo import rollout
from pgenrm_train.backends.grpo.progress import chain_metrics
from pgenrm_train.backends.grpo.rollout import ChainSampler, Prompt, Rollout
from pgenrm_train.backends.grpo.scoring import RewardSpec
from pgenrm_train.backends.grpo.trainer import ChainTrainer
from pgenrm_train.chains.totals import close_chain

BAR = 2.0  # milliseconds of the driver per chain


class Stub:
    """A vLLM server's handle that answers with one of `answers` (token ids), after up to `seconds`."""

    def __init__(self, answers: list[list[int]], seconds: float, seed: int) -> None:
        self.answers, self.seconds, self.draw = answers, seconds, random.Random(seed)
        self.generate = SimpleNamespace(remote=self.answer)

    async def answer(self, **_: Any) -> Any:
        await asyncio.sleep(self.seconds * self.draw.random())
        ids = self.draw.choice(self.answers)
        return SimpleNamespace(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields={}, stop_reason=None)


class Clock:
    """CPU milliseconds per part, over all threads of this process."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str, clock: Callable[[], float]) -> Iterator[None]:
        began = clock()
        yield
        self.parts[name] += 1000 * (clock() - began)

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Count the CPU time of the calling thread in `owner.function` under `name`."""
        inner = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, time.thread_time):
                return inner(*args, **kwargs)

        setattr(owner, function, timed)


def settings(model: Path, sequences: int) -> Any:
    return OmegaConf.create(
        {
            "data": {"max_prompt_length": 8192, "max_response_length": 2048},
            "actor_rollout_ref": {
                "model": {"path": str(model), "trust_remote_code": False},
                "rollout": {"max_num_seqs": sequences, "agent": {"num_workers": 0}},
            },
        }
    )


def answers_of(run: Path, count: int = 512) -> list[list[int]]:
    """Chains of the run's teacher, with the end token."""
    tokenizer = AutoTokenizer.from_pretrained(run / "psi" / "checkpoint")
    messages = pq.read_table(run / "build_sec" / "sec.parquet", columns=["messages"])["messages"][:count]
    texts = [close_chain(chat[-1]["content"]) for chat in messages.to_pylist()]
    return [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts
    ]


def step(driver: Rollout, prompts: list[Prompt], clock: Clock) -> None:
    """Run our trainer's part of a step: sample, score, write; then read groups and metrics."""
    driver.train(prompts)
    if failures := driver.settled(prompts[0].step):
        raise SystemExit(f"error: {len(failures)} prompts failed, first {failures[0]}")
    keys = [f"{prompt.uid}_{number}_0" for prompt in prompts for number in range(prompt.samples)]
    batch = SimpleNamespace(keys=keys, tags=[{}] * len(keys), partition_id="train")
    with clock.part("read groups", time.thread_time):
        groups = ChainTrainer._groups(None, batch)  # type: ignore[arg-type]
    with clock.part("metrics", time.thread_time):
        chain_metrics(list(groups.values()))
    tq.kv_clear(keys=keys + [prompt.uid for prompt in prompts], partition_id="train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="longest answer of a stub")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init()
    answers = answers_of(args.run)
    servers = [Stub(answers, args.seconds, seed) for seed in range(args.servers)]
    driver = Rollout(settings(args.run / "psi" / "checkpoint", 256), servers)
    driver.use_rewards(RewardSpec())
    rows = pq.read_table(args.run / "cre" / "rows.parquet").slice(0, args.prompts).to_pylist()
    clock = Clock()
    clock.watch(ChainSampler, "_encode", "encode prompts")
    clock.watch(driver.sampler.tokenizer, "decode", "decode chains")
    clock.watch(rollout, "score", "parse and score")
    clock.watch(rollout, "_put_group", "write chains")
    clock.watch(rollout, "_put_rewards", "write rewards")
    totals, walls = [], []
    for number in range(args.rounds + 1):
        prompts = [
            Prompt(f"s{number}p{place:05d}", row, number, "0", args.group, 1.0)
            for place, row in enumerate(rows)
        ]
        if number == 1:
            clock.parts.clear()  # the first round imports and connects
        cpu, wall = time.process_time(), time.monotonic()
        step(driver, prompts, clock)
        totals.append(1000 * (time.process_time() - cpu))
        walls.append(time.monotonic() - wall)
    chains = args.prompts * args.group
    per_chain = statistics.median(totals[1:]) / chains
    lengths = statistics.fmean(map(len, answers))
    print(
        f"{chains} chains of {lengths:.0f} tokens on {args.servers} stub servers, {threading.active_count()} "
        f"threads, process {os.getpid()}: median of {args.rounds} steps"
    )
    rest = sum(totals[1:])
    for name, spent in clock.parts.most_common():
        rest -= spent
        print(f"{name:16} {spent / args.rounds / chains:7.3f} ms per chain  {spent / sum(totals[1:]):6.1%}")
    print(
        f"{'loop and rest':16} {rest / args.rounds / chains:7.3f} ms per chain  {rest / sum(totals[1:]):6.1%}"
    )
    print(
        f"driver           {per_chain:7.3f} ms per chain ({per_chain / BAR:.2f} × the bar of {BAR:.0f} ms); "
        f"a step takes {statistics.median(walls[1:]):.2f} s, of which up to {args.seconds:.1f} s are a stub's"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
