"""Groups on vLLM servers: one prefill per group, prefix hits of real vLLM, and one queue for measurements."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import verl_world
from omegaconf import OmegaConf

from pgenrm_train.backends.grpo import rollout
from pgenrm_train.backends.grpo.rollout import ChainSampler, Prompt
from pgenrm_train.backends.vllm.engine import engine_settings, vllm_variables
from pgenrm_train.config import ROOT, load

NANO = ROOT / "tests" / "data" / "psi_nano"
BLOCK = 32  # tokens of a block of vLLM's prefix cache
GROUP = 8


def settings(max_num_seqs: int = 256) -> Any:
    return OmegaConf.create(
        {
            "data": {"max_prompt_length": 640, "max_response_length": 16},
            "actor_rollout_ref": {
                "model": {"path": str(NANO), "trust_remote_code": False},
                "rollout": {"max_num_seqs": max_num_seqs, "agent": {"num_workers": 0}},
            },
        }
    )


def prompts(count: int, samples: int = GROUP) -> list[Prompt]:
    """Long prompts that differ from their first words."""
    made = []
    for number in range(count):
        row = verl_world.example(number)
        words = " ".join(random.Random(number).choices(verl_world.TRAITS, k=80))
        made.append(
            Prompt(f"p{number}", row | {"prompt": [{"role": "user", "content": words}]}, 0, "0", samples, 1.0)
        )
    return made


class Stub:
    """Stand-in for the handle of a vLLM server; it keeps the prompts that it has been sent."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.generate = seconds, SimpleNamespace(remote=self.answer)
        self.prompts: list[tuple[int, ...]] = []
        self.running = self.most = 0

    async def answer(self, prompt_ids: list[int], **_: Any) -> Any:
        self.prompts.append(tuple(prompt_ids))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds * random.Random(len(self.prompts)).random())
        self.running -= 1
        return SimpleNamespace(token_ids=[5], log_probs=[0.0], extra_fields={}, stop_reason=None)


def measure(sampler: ChainSampler, asked: list[Prompt]) -> dict[str, list[Any]]:
    async def run() -> dict[str, list[Any]]:
        await sampler.measure(asked)
        return dict(await sampler.collect())

    return asyncio.run(run())


def test_eight_servers_prefill_each_prompt_once_and_share_the_groups() -> None:
    servers = [Stub() for _ in range(8)]
    groups = measure(ChainSampler(settings(), servers), prompts(64))
    assert all(len(chains) == GROUP for chains in groups.values()) and len(groups) == 64
    prefills: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
    for number, server in enumerate(servers):
        for ids in server.prompts:
            prefills[ids].add(number)
    assert [len(where) for where in prefills.values()] == [1] * 64
    assert [len(server.prompts) for server in servers] == [64] * 8, "eight groups each"


def test_a_measurement_is_one_queue_over_all_places_of_the_servers() -> None:
    """More prompts than places: all are sampled, the places are full, and never more than that."""
    servers = [Stub(0.02) for _ in range(4)]
    groups = measure(ChainSampler(settings(max_num_seqs=16), servers), prompts(100, samples=2))
    assert sorted(groups) == sorted(f"p{n}" for n in range(100))
    assert 14 <= sum(server.most for server in servers) / 4 <= 18, "64 places, 2 for each group"


def test_measured_groups_arrive_before_the_last_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt ends last; the others are there long before."""
    monkeypatch.setattr(rollout, "COLLECT_SECONDS", 0.1)
    slow = threading.Event()

    class First(Stub):
        async def answer(self, prompt_ids: list[int], **rest: Any) -> Any:
            if tuple(prompt_ids) == first:
                await asyncio.to_thread(slow.wait, 60)
            return await super().answer(prompt_ids, **rest)

    sampler, asked = rollout.Rollout(settings(), [First()]), prompts(20, samples=1)
    first = tuple(sampler.sampler._encode(asked[0].row))
    arrived = []
    for uid, chains in sampler.measure(asked):
        arrived.append(uid)
        assert len(chains) == 1
        if len(arrived) == 19:
            assert "p0" not in arrived
            slow.set()
    assert arrived[-1] == "p0" and len(arrived) == 20


class InProcess:
    """A vLLM engine behind the interface of veRL's server."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.generate = engine, SimpleNamespace(remote=self.answer)
        self.waiting: dict[str, asyncio.Future[Any]] = {}
        self.prefills: Counter[tuple[int, ...]] = Counter()  # prompts read from their first block on
        self.hits = self.reachable = 0

    async def answer(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(**(sampling_params | {"logprobs": 0}))
        self.engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, parameters)
        self.waiting[request_id] = asyncio.get_running_loop().create_future()
        if len(self.waiting) == 1:
            self.task = asyncio.create_task(self.step())
        output = await self.waiting[request_id]
        self.hits += output.num_cached_tokens // BLOCK
        self.prefills[tuple(prompt_ids)] += not output.num_cached_tokens
        tokens = output.outputs[0].token_ids
        return SimpleNamespace(
            token_ids=tokens,
            log_probs=[0.0] * len(tokens),
            extra_fields={"num_cached_tokens": output.num_cached_tokens},
        )

    async def step(self) -> None:
        while self.waiting:
            await asyncio.sleep(0)  # requests that are ready come first, as over a network
            for output in self.engine.step():
                if output.finished:
                    self.waiting.pop(output.request_id).set_result(output)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    os.environ.update(vllm_variables("cpu"))
    from vllm import LLM

    llm = LLM(str(NANO), block_size=BLOCK, **engine_settings(load("recipe=evaluate", "model=nano")))
    yield llm.llm_engine
    llm.llm_engine.engine_core.shutdown()


def test_vllm_reads_a_prompt_once_per_group_and_finds_it_for_the_other_samples(engine: Any) -> None:
    server, asked = InProcess(engine), prompts(32)
    sampler = ChainSampler(settings(), [server])
    groups = measure(sampler, asked)
    blocks = [(len(sampler._encode(prompt.row)) - 1) // BLOCK for prompt in asked]
    assert min(blocks) >= 4 and set(server.prefills.values()) == {1}
    assert server.hits >= 0.95 * (GROUP - 1) * sum(blocks)
    shares = [chain.cached_share for chains in groups.values() for chain in chains]
    assert sum(shares) / len(shares) == pytest.approx((GROUP - 1) / GROUP, rel=0.1), "as logged"
