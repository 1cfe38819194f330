"""Rewards of a group's chains, groups that are sampled again, and verdicts while others are still sampled."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import verl_world

from pgenrm_train.backends.grpo.scoring import Sample
from pgenrm_train.rewards.reward import RewardWeights


def sample(text: str, finished: bool = True) -> Sample:
    return Sample([1], [2], [0.0], text, finished, 0)


def test_scores_of_a_group() -> None:
    from pgenrm_train.backends.grpo.scoring import RewardSpec, score, settle

    row, weights = verl_world.example(0), RewardWeights()
    chosen = int(row["reward_model"]["ground_truth"])
    right = verl_world.chain("warm", (8, 2) if chosen == 0 else (2, 8))
    samples = [sample(right), sample(right, finished=False), sample("no chain"), sample(right)]
    verdicts = iter([1.0, None])

    def judge(text: str, example: Any) -> float | None:
        return next(verdicts)

    group = [score(one, row, weights, judge) for one in samples]
    settled = settle(group, RewardSpec(weights, null_policy="group_mean"))
    assert [one.score for one in settled] == [1.5, -0.1, -0.1, 1.5], "the mean of the existing verdicts"
    settled = settle(group, RewardSpec(weights, null_policy="drop_process_for_group"))
    assert settled[1].failure == "length"
    assert [one.score for one in settled] == [1.0, -0.1, -0.1, 1.0], (
        "no verdict for one: no process reward in its group"
    )
    assert [one.process for one in settled] == [1.0, None, None, None]


def test_a_raising_reward_is_data_with_the_mean_of_its_group() -> None:
    from pgenrm_train.backends.grpo.scoring import RewardSpec, score, settle

    row, weights = verl_world.example(0), RewardWeights()

    def judge(text: str, example: Any) -> float | None:
        raise OSError("connection lost")

    samples = [sample(verl_world.chain("warm", (5, 5))), sample("no chain")]
    group = [score(one, row, weights, judge) for one in samples]
    first, second = settle(group, RewardSpec(weights, null_policy="drop_process_for_group"))
    assert first.error == "OSError: connection lost"
    assert first.score == second.score == pytest.approx(-0.1)


def test_a_group_without_advantage_is_sampled_again_and_its_chains_are_counted() -> None:
    import asyncio

    from pgenrm_train.backends.grpo.rollout import ChainSampler, Group, Prompt
    from pgenrm_train.backends.grpo.scoring import ScoredChain

    def group(*outcomes: float) -> list[ScoredChain]:
        return [ScoredChain(1, outcome=outcome, score=outcome) for outcome in outcomes]

    class Scripted(ChainSampler):
        def __init__(self, *groups: list[ScoredChain]) -> None:
            self.groups, self.calls = groups, 0

        async def _mark(self, prompt: Prompt, status: str) -> None:
            assert status == "running", "sampled once"

        async def _sampled(self, prompt: Prompt, attempt: int = 0) -> Group:
            assert attempt == self.calls
            self.calls += 1
            return Group(prompt, [], asyncio.create_task(asyncio.sleep(0, self.groups[attempt])))

    def resample(limit: int, *groups: list[ScoredChain]) -> tuple[list[float], tuple[int, int], int]:
        sampler = Scripted(*groups)

        async def run() -> tuple[list[float], tuple[int, int], int]:
            prompt = Prompt("s1p00000", verl_world.example(0), 1, "0", 2, 1.0, limit)
            kept = await sampler._with_advantage(prompt)
            await kept.scoring
            group = kept.scored()
            discarded = group.discarded_passes, group.discarded_chains
            return [chain.score for chain in group.chains], discarded, sampler.calls

        return asyncio.run(run())

    same, other = group(1, 1), group(1, 0)
    assert resample(0, same) == ([1, 1], (0, 0), 1)
    assert resample(2, other, same) == ([1, 0], (0, 0), 1)
    assert resample(2, same, other) == ([1, 0], (2, 2), 2)
    assert resample(1, same, group(0, 0)) == ([0, 0], (2, 2), 2), "bounded: the last is kept"


def test_a_chain_is_judged_while_others_are_still_sampled_and_its_group_does_not_wait(world: Path) -> None:
    """Four chains that end one after the other, and reach the actor before the last verdict."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.rollout import ChainSampler, Prompt

    row, events = verl_world.example(0), []
    start = str(world / "start")

    class Server:
        """Stand-in for the handle of a vLLM server."""

        def __init__(self) -> None:
            self.generate, self.calls = SimpleNamespace(remote=self.answer), 0

        async def answer(self, **_: Any) -> Any:
            self.calls += 1
            await asyncio.sleep(0.3 * self.calls)
            events.append("ended")
            return SimpleNamespace(
                token_ids=tokens, log_probs=[0.0] * len(tokens), extra_fields={}, stop_reason=None
            )

    def judge(text: str, example: Any) -> float:
        events.append("judged")
        time.sleep(0.3)
        return 0.5

    async def sample_group() -> list[Any]:
        group = await sampler._sampled(Prompt("s1p0", row, 1, "0", 4, 1.0))
        assert not group.scoring.done()
        return await group.scoring

    settings = OmegaConf.create(
        {
            "data": {"max_prompt_length": 64, "max_response_length": 128},
            "actor_rollout_ref": {
                "model": {"path": start, "trust_remote_code": False},
                "rollout": {"max_num_seqs": 4, "agent": {"num_workers": 0}},
            },
        }
    )
    sampler = ChainSampler(settings, [Server()])
    sampler.judge, sampler.threads = judge, ThreadPoolExecutor(4)
    tokens = sampler.tokenizer(verl_world.chain("warm", (8, 2)))["input_ids"] + [
        sampler.tokenizer.eos_token_id
    ]
    assert [chain.process for chain in asyncio.run(sample_group())] == [0.5] * 4
    assert events == ["ended", "judged"] * 4, "each chain is judged when it ends"
