"""Count the work of one 8B step on eight GPUs, with the earlier rules and with today's.

    python -m benchmarks.step_counts

Lengths are drawn (log-normal, σ = 0.6, seed 0) around the plan's 2,000 tokens of a prompt and 1,000 of a
chain, up to the limits of 8B.  Sizes are those of the plan for Chatbot Arena.  *Before* is the rule that was
replaced, *now* the project's own code; a server decodes one token per chain and engine step.

- prefills: servers that read a group's prompt; before, each sample went to the emptiest server.
- mining: engine steps until 1,220 chains have ended; before, 64 prompts at a time behind a barrier.
- update: micro-batches per rank; before, one chain each; now, as veRL cuts them, ⌈tokens / limit⌉ of the
  fullest rank (`verl.utils.seqlen_balancing.rearrange_micro_batches`).
- PSI: micro-batches per rank and step; before, one chain each.
"""

import asyncio
import heapq
import itertools
import random
from collections.abc import Iterator, Sequence

from pgenrm_train.backends.grpo.placement import Placement
from pgenrm_train.backends.sft.batches import Batching, Layout, StepOrder
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.config import Config, load, tokens_per_pass
from pgenrm_train.config.setting import known

SERVERS, PLACES = 8, 256  # vLLM's sequences at a time
BARRIER = 64  # prompts
PROMPT, ANSWER, SPREAD = 2000, 1000, 0.6
PAIRS = 305  # of Chatbot Arena


def main() -> None:
    config = with_planned_sizes(
        load(
            "recipe=plan",
            *("model=llama31_8b", "cluster=gpu8", "data=chatbot_arena"),
            "model.attention=flash_attention_2",
        )
    )
    rows = {
        "servers that read a prompt, mean over groups": prefills(config),
        "engine steps of mining": mining(config),
        "micro-batches of a GRPO update per rank": update(config),
        "micro-batches of a PSI step per rank": psi(config),
    }
    print(f"{'':46} {'before':>8} {'now':>8}")
    for name, (before, now) in rows.items():
        print(f"{name:46} {before:8,g} {now:8,g}")


def prefills(config: Config) -> tuple[float, float]:
    groups, group = known(config.cre.prompts_per_step), config.cre.group_size

    async def servers_per_group(at_once: int) -> float:
        placement = Placement(SERVERS, SERVERS * PLACES)
        places = [[await placement.take(at_once) for _ in range(group // at_once)] for _ in range(groups)]
        return sum(len(set(servers)) for servers in places) / groups

    before, now = (asyncio.run(servers_per_group(at_once)) for at_once in (1, group))
    return before, now


def mining(config: Config) -> tuple[float, float]:
    """Each pair in both orders, half of the samples each."""
    samples = config.curriculum.mining_samples // 2
    chains = [list(answers(config, samples, seed)) for seed in range(2 * PAIRS)]
    blocks = [chains[first : first + BARRIER] for first in range(0, len(chains), BARRIER)]
    return sum(map(last_end, blocks)), last_end(chains)


def last_end(prompts: Sequence[Sequence[int]]) -> int:
    """Engine steps until all chains of the prompts have ended, which fill the free places in their order."""
    ends: list[int] = []
    for length in itertools.chain.from_iterable(prompts):
        start = heapq.heappop(ends) if len(ends) == SERVERS * PLACES else 0
        heapq.heappush(ends, start + length)
    return max(ends)


def update(config: Config) -> tuple[float, float]:
    per_rank = known(config.cre.mini_batch_prompts) * config.cre.group_size // SERVERS
    limit, drawn = known(tokens_per_pass(config, "cre")), list(texts(config, per_rank * SERVERS))
    ranks = [sum(drawn[rank::SERVERS]) for rank in range(SERVERS)]
    return per_rank, max(-(-tokens // limit) for tokens in ranks)


def psi(config: Config) -> tuple[float, float]:
    lengths, batch = list(texts(config, 2 * PAIRS)), known(config.psi.batch_size)
    settings = (
        Batching(Layout.GROUPED, batch, 1, SERVERS),
        Batching(Layout.PACKED, batch, config.psi.micro_batch_tokens, SERVERS),
    )
    before, now = (StepOrder(lengths, each, seed=0, epochs=3).accumulation for each in settings)
    return before, now


def texts(config: Config, count: int, seed: int = 0) -> Iterator[int]:
    """Tokens of prompt and answer."""
    prompts = drawn(PROMPT, config.model.max_prompt_tokens, count, f"prompt {seed}")
    return (prompt + answer for prompt, answer in zip(prompts, answers(config, count, seed), strict=True))


def answers(config: Config, count: int, seed: int) -> Iterator[int]:
    return drawn(ANSWER, config.model.max_response_tokens, count, f"answer {seed}")


def drawn(mean: int, limit: int, count: int, seed: str) -> Iterator[int]:
    draw = random.Random(seed)
    for _ in range(count):
        yield min(limit, max(1, int(mean * draw.lognormvariate(-SPREAD * SPREAD / 2, SPREAD))))


if __name__ == "__main__":
    main()
