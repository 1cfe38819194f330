"""Sampling and scoring of chains inside veRL: prompt → group of chains → rewards → TransferQueue.

verl's stock agent loop builds objects and makes several remote calls per *sample*.  Here a prompt is
tokenised once, and each of its samples is one request to the group's vLLM server (`placement`).  A sample
is scored as soon as it ends, so judge calls overlap generation.  One put writes the group once it is
sampled; rewards follow when the last is known.  A slow judge therefore delays neither the sleep of vLLM nor
the log-probabilities, only the advantages (`Rollout.settled`).

Requests carry seeds derived from (run, stage, step, place in the batch, sample), so a resumed run samples the
chains that the interrupted one would have sampled.  The rewards themselves are in `scoring`.
"""

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from verl.utils import hf_tokenizer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from pgenrm_train.backends.grpo.placement import Placement
from pgenrm_train.backends.grpo.scoring import (
    RewardSpec,
    Sample,
    ScoredChain,
    ScoredGroup,
    score,
    settle,
    tokens_before_total,
)
from pgenrm_train.chains.totals import STOP, close_chain
from pgenrm_train.config import Totals
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards.training_rows import GrpoRow

# A reward that is not written yet: it would show in an update that did not wait for it.
UNKNOWN = float("nan")
# verl's status of a prompt: sampled once, and perhaps sampled again once it is judged
SAMPLED = "running"
COLLECT_SECONDS = 1.0  # between two collections of measured groups
Measured = tuple[str, list[ScoredChain]]  # a group and its `Prompt.uid`


@dataclass(frozen=True)
class Prompt:
    """One row to sample from.

    `uid` is unique within the step and has no underscore, where verl splits trajectory keys.  `resample`: how
    often a group without advantage is sampled again.
    """

    uid: str
    row: GrpoRow
    step: int
    seed: str
    samples: int
    temperature: float
    resample: int = 0


@dataclass
class Group:
    """The chains of a prompt; `scoring` returns their rewards."""

    prompt: Prompt
    samples: list[Sample]
    scoring: asyncio.Task[list[ScoredChain]]
    discarded: Sequence[ScoredChain] = ()

    @property
    def trajectories(self) -> list[str]:
        """verl's keys: prompt, sample, turn."""
        return [f"{self.prompt.uid}_{number}_0" for number in range(len(self.samples))]

    def scored(self) -> ScoredGroup:
        """The group with its rewards, once `scoring` is done."""
        return ScoredGroup(
            chains=self.scoring.result(),
            order=self.prompt.row["extra_info"]["order"],
            discarded_passes=sum(chain.passed for chain in self.discarded),
            discarded_chains=len(self.discarded),
        )


class ChainSampler:
    """Sample and score groups with vLLM servers, on a thread of the driver or in Ray actors."""

    def __init__(self, config: Any, servers: Sequence[Any], in_actor: bool = False) -> None:
        if in_actor:
            tq.init()  # join the session's TransferQueue
        self.config, self.servers = config, list(servers)
        self.measured: list[Measured] = []
        rollout = config.actor_rollout_ref.rollout
        room = len(self.servers) * rollout.max_num_seqs // max(1, rollout.agent.num_workers)
        self.placement = Placement(len(self.servers), room)
        model = config.actor_rollout_ref.model
        self.tokenizer = hf_tokenizer(
            model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code
        )
        self.ends = _end_tokens(self.tokenizer, model.path)
        self.use_rewards(RewardSpec())

    def use_rewards(self, spec: RewardSpec) -> None:
        self.rewards = spec
        self.judge = None if spec.judge is None else spec.judge.build()
        if spec.judge is not None:
            self.threads = futures.ThreadPoolExecutor(spec.judge.in_flight, thread_name_prefix="reward")

    async def train(self, prompts: Sequence[Prompt]) -> list[str]:
        """Write every group to TransferQueue when it is sampled, and all rewards when they are known.

        Returns the reasons of prompts that failed, which are marked as such.
        """
        results = await asyncio.gather(*(self._train_group(prompt) for prompt in prompts))
        if groups := [result for result in results if isinstance(result, Group)]:
            await asyncio.to_thread(_put_rewards, groups)
        return [result for result in results if isinstance(result, str)]

    async def measure(self, prompts: Sequence[Prompt]) -> None:
        """Sample groups that no training uses (mining, validation), for `collect`.

        They are one queue: a group starts when the servers have room.  Raises on engine failure.
        """

        async def measure(prompt: Prompt) -> None:
            group = await self._sampled(prompt)
            shown = close_chain if self.rewards.totals is Totals.CODE else str
            chains = zip(await group.scoring, group.samples, strict=True)
            self.measured.append((prompt.uid, [replace(chain, text=shown(of.text)) for chain, of in chains]))

        await asyncio.gather(*map(measure, prompts))

    async def collect(self) -> list[Measured]:
        """The groups of `measure` that have ended since the last call."""
        measured, self.measured = self.measured, []
        return measured

    async def pause(self) -> None:
        await self.placement.pause()

    async def resume(self) -> None:
        self.placement.resume()

    async def judge_metrics(self) -> dict[str, float]:
        """The judge's own counts (calls, cost, missing verdicts) since the start; empty for a rule."""
        return dict(getattr(self.judge, "metrics", dict)())

    async def _train_group(self, prompt: Prompt) -> Group | str:
        """The group, written and then scored, or the reason why the engine failed."""
        try:
            group = await self._with_advantage(prompt)
            await asyncio.to_thread(_put_group, group)
            result: Group | str = group
        except Exception as error:
            # An engine failure of one prompt must not strand the others; the trainer counts them.
            result = f"{prompt.row['extra_info']['pair_id']}: {type(error).__name__}: {error}"[:300]
        await self._mark(prompt, "failure" if isinstance(result, str) else "finished")
        if isinstance(result, Group):
            await result.scoring
        return result

    async def _mark(self, prompt: Prompt, status: str) -> None:
        tag = {"is_prompt": True, "status": status, "global_steps": prompt.step}
        await asyncio.to_thread(tq.kv_batch_put, keys=[prompt.uid], partition_id="train", tags=[tag])

    async def _with_advantage(self, prompt: Prompt) -> Group:
        """The first group whose rewards differ, else the last of `1 + prompt.resample`.

        The same prompt is sampled again, not another one: which groups end first is chance, and the sampler's
        draws must not depend on it.
        """
        discarded: list[ScoredChain] = []
        for attempt in range(prompt.resample):
            group = await self._sampled(prompt, attempt)
            if attempt == 0:
                await self._mark(prompt, SAMPLED)
            chains = await group.scoring
            if len({chain.score for chain in chains}) > 1:
                break
            discarded += chains
        else:
            # Kept whatever its rewards are, so they are not waited for.
            group = await self._sampled(prompt, prompt.resample)
        group.discarded = discarded
        return group

    async def _sampled(self, prompt: Prompt, attempt: int = 0) -> Group:
        """All samples of one prompt, each being scored since it ended; each attempt has seeds of its own."""
        server = await self.placement.take(prompt.samples)
        try:
            ids = self._encode(prompt.row)
        except BaseException:
            self.placement.release(server, prompt.samples)
            raise
        numbers = range(attempt * prompt.samples, (attempt + 1) * prompt.samples)
        pairs = await asyncio.gather(*(self._sample(prompt, ids, number, server) for number in numbers))
        samples, scored = [sample for sample, _ in pairs], [task for _, task in pairs]
        return Group(prompt, samples, asyncio.create_task(self._settle(scored)))

    def _encode(self, row: GrpoRow) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(row["prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        limit = self.config.data.max_prompt_length
        if len(ids) > limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens and model.max_prompt_tokens={limit}")
        return ids

    async def _settle(self, scored: Sequence[asyncio.Task[ScoredChain]]) -> list[ScoredChain]:
        return settle(await asyncio.gather(*scored), self.rewards)

    async def _sample(
        self, prompt: Prompt, ids: list[int], number: int, server: int
    ) -> tuple[Sample, asyncio.Task[ScoredChain]]:
        from vllm.sampling_params import RequestOutputKind

        limit = self.config.data.max_response_length
        identity = f"{prompt.seed}/{prompt.step}/{prompt.uid}/{number}"
        digest = hashlib.blake2b(identity.encode(), digest_size=4).digest()
        parameters = {
            "temperature": prompt.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "logprobs": True,
            "detokenize": False,
            "max_tokens": limit,
            "seed": int.from_bytes(digest, "big") >> 1,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        by_code = self.rewards.totals is Totals.CODE
        if by_code:
            parameters |= {"stop": [STOP], "detokenize": True}
        try:
            output = await self.servers[server].generate.remote(
                prompt_ids=ids, sampling_params=parameters, request_id=uuid4().hex
            )
        finally:
            self.placement.release(server)
        tokens = list(output.token_ids[:limit])
        if not tokens:
            raise RuntimeError(f"the engine returned no tokens (stop reason {output.stop_reason})")
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        sample = Sample(
            prompt_ids=ids,
            token_ids=tokens,
            log_probs=list(output.log_probs[:limit]),
            text=text,
            finished=tokens[-1] in self.ends or (by_code and STOP in text),
            weights_version=int(output.extra_fields.get("global_steps") or 0),
            trained=tokens_before_total(self.tokenizer, tokens, text) if by_code else None,
            cached_tokens=int(output.extra_fields.get("num_cached_tokens") or 0),
        )
        return sample, asyncio.create_task(self._score(sample, prompt))

    async def _score(self, sample: Sample, prompt: Prompt) -> ScoredChain:
        row = self.rewards.judged_row(prompt.row, prompt.step)
        arguments = (sample, row, self.rewards.weights, self.judge, self.rewards.totals)
        if self.judge is None:
            return score(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.threads, score, *arguments)


class Rollout:
    """The samplers behind one call: `agent.num_workers` Ray actors, or a thread of this process for 0."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        self.actors: list[Any] = []
        self.training: dict[int, list[Any]] = {}  # step → calls of `train` that have started
        workers = config.actor_rollout_ref.rollout.agent.num_workers
        if workers == 0:
            self.sampler = ChainSampler(config, servers)
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, name="chain-sampler", daemon=True).start()
        else:
            spread = ray.remote(ChainSampler).options(scheduling_strategy="SPREAD")
            self.actors = [spread.remote(config, servers, in_actor=True) for _ in range(workers)]

    def use_rewards(self, spec: RewardSpec) -> None:
        if not self.actors:
            self.sampler.use_rewards(spec)
            return
        if spec.judge is not None:
            spec = replace(spec, judge=spec.judge.share(len(self.actors)))
        ray.get([actor.use_rewards.remote(spec) for actor in self.actors])

    def train(self, prompts: Sequence[Prompt]) -> None:
        """Start sampling a step and return; results arrive in TransferQueue."""
        self.training[prompts[0].step] = self._start("train", prompts)

    def settled(self, step: int) -> list[str]:
        """Wait until all rewards of a step are in TransferQueue; returns the reasons of failed prompts."""
        return [reason for reasons in self._wait(self.training[step]) for reason in reasons]

    def pause(self) -> None:
        """Start no further group; returns once no request is in flight, so that vLLM may sleep."""
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def measure(self, prompts: Sequence[Prompt]) -> Iterator[Measured]:
        """Scored chains by `Prompt.uid`, as groups end; no group waits for the caller."""
        started, ended = self._start("measure", prompts), False
        while not ended:
            ended = self._have_ended(started, COLLECT_SECONDS)
            for part in self._call("collect"):
                yield from part
        self._wait(started)  # raises an engine's failure

    def judge_metrics(self) -> dict[str, float]:
        """The judges' counts, summed over samplers."""
        counts = self._call("judge_metrics")
        names = {name for count in counts for name in count}
        sums = {f"judge/{name}": sum(count.get(name, 0.0) for count in counts) for name in names}
        if twice := sums.get("judge/judged_twice"):
            sums["judge/repeat_difference"] = sums["judge/judged_twice_difference"] / twice
        return sums

    def _call(self, call: str) -> list[Any]:
        if self.actors:
            return self._wait([getattr(actor, call).remote() for actor in self.actors])
        return self._wait([asyncio.run_coroutine_threadsafe(getattr(self.sampler, call)(), self.loop)])

    def _start(self, call: str, prompts: Sequence[Prompt]) -> list[Any]:
        if not self.actors:
            return [asyncio.run_coroutine_threadsafe(getattr(self.sampler, call)(prompts), self.loop)]
        size = -(-len(prompts) // len(self.actors))
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [getattr(actor, call).remote(part) for actor, part in zip(self.actors, parts, strict=False)]

    def _wait(self, started: list[Any]) -> list[Any]:
        return ray.get(started) if self.actors else [future.result() for future in started]

    def _have_ended(self, started: list[Any], seconds: float) -> bool:
        """Wait up to `seconds`; returns whether all calls have ended."""
        if self.actors:
            return not ray.wait(started, num_returns=len(started), timeout=seconds)[1]
        return not futures.wait(started, seconds).not_done


def _put_group(group: Group) -> None:
    fields = list_of_dict_to_tensordict([_trajectory(group.prompt, sample) for sample in group.samples])
    tq.kv_batch_put(
        keys=group.trajectories,
        fields=fields,
        tags=[_tag(group.prompt, sample) for sample in group.samples],
        partition_id="train",
    )


def _put_rewards(groups: Sequence[Group]) -> None:
    """Write the rewards, on the last token of each chain, and their parts."""
    keys = [key for group in groups for key in group.trajectories]
    fields = [field for group in groups for field in _rewards(group.scored())]
    tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), partition_id="train")


def _trajectory(prompt: Prompt, sample: Sample) -> dict[str, object]:
    """Fields that verl's trainer and actor read; rewards follow later.

    The mask holds the end token, and with totals=code no token from the first total on.
    """
    prompts = torch.tensor(sample.prompt_ids, dtype=torch.int64)
    responses = torch.tensor(sample.token_ids, dtype=torch.int64)
    mask = torch.tensor(sample.loss_mask, dtype=torch.int64)
    ids = torch.cat([prompts, responses])
    return {
        "uid": prompt.uid,
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "rollout_log_probs": torch.tensor(sample.log_probs, dtype=torch.float32),
        "rm_scores": torch.full((len(responses),), UNKNOWN),
        "num_turns": 2,
        "multi_modal_inputs": {},
    }


def _rewards(group: ScoredGroup) -> Iterator[dict[str, object]]:
    for chain, extra_fields in zip(group.chains, group.to_extra_fields(), strict=True):
        rewards = torch.zeros(chain.length)
        rewards[-1] = chain.score
        yield {"rm_scores": rewards, "extra_fields": extra_fields}


def _tag(prompt: Prompt, sample: Sample) -> dict[str, object]:
    prompt_length, length = len(sample.prompt_ids), len(sample.token_ids)
    return {
        "status": "success",
        "prompt_len": prompt_length,
        "response_len": length,
        "seq_len": prompt_length + length,
        "global_steps": prompt.step,
        "min_global_steps": sample.weights_version,
        "max_global_steps": sample.weights_version,
    }


def _end_tokens(tokenizer: Any, path: str) -> set[int]:
    """Tokens at which vLLM stops: the tokenizer's end token and those of the generation config."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a checkpoint need not have one
        return ends
    return ends | set(declared if isinstance(declared, list) else [] if declared is None else [declared])
