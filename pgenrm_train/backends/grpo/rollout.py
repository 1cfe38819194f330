"""Sampling and scoring of chains inside veRL: prompt → group of chains → rewards → TransferQueue.

verl's stock agent loop builds objects and makes several remote calls a *sample*; here a prompt is tokenised once, each of its
samples is one request to a vLLM server, its reward is asked for as soon as it is finished (so judge calls overlap generation),
and the group is written with one put once it is sampled.  Rewards follow when the last is known, so a judge that is still reading
holds up neither the sleep of vLLM nor the log-probabilities, only the advantages (`Rollout.settled`).  Requests carry seeds derived
from (run, stage, step, place in the batch, sample), so a resumed run samples the chains that the interrupted one would have sampled.

What a chain earns is `verl_rewards`'.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from verl.utils import hf_tokenizer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from pgenrm_train.backends.grpo.scoring import RewardSpec, Sample, load_judge, scored, settle, share_of
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards.chain_reward import RewardWeights

UNKNOWN = float("nan")  # a reward that is not written yet: an update that did not wait for it would show


@dataclass(frozen=True)
class Prompt:
    """One row to sample from: `row` as in the rows parquet (prompt, reward_model, extra_info, data_source)."""

    uid: str  # unique within the step, no underscore: verl splits trajectory keys at it
    row: Mapping[str, Any]
    step: int
    seed: str
    samples: int
    temperature: float
    resample: int = 0  # times that a group without advantage is sampled anew


@dataclass
class Group:
    """The chains of a prompt.  Their `info` and `score` are there once `scoring` is done."""

    prompt: Prompt
    samples: list[Sample]
    scoring: asyncio.Task[None]
    discarded: dict[str, int] = field(default_factory=dict)

    @property
    def trajectories(self) -> list[str]:
        """verl's keys: prompt, sample, turn."""
        return [f"{self.prompt.uid}_{number}_0" for number in range(len(self.samples))]


class ChainSampler:
    """Samples and scores groups against vLLM servers.  Lives on a thread of the driver or in Ray actors (`Rollout`)."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        self.config, self.servers = config, list(servers)
        self.in_flight = [0] * len(self.servers)
        model = config.actor_rollout_ref.model
        self.tokenizer = hf_tokenizer(
            model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code
        )
        self.ends = _end_tokens(self.tokenizer, model.path)
        self.failures: list[str] = []
        self.use_rewards(RewardSpec())

    def use_rewards(self, spec: RewardSpec) -> None:
        self.null_policy = spec.null_policy
        self.weights, self.judge = RewardWeights(**spec.weights), load_judge(spec.judge, spec.judge_kwargs)
        self.threads = ThreadPoolExecutor(max_workers=spec.judge_in_flight, thread_name_prefix="reward")

    async def train(self, prompts: Sequence[Prompt]) -> None:
        """Write every group to TransferQueue when it is sampled, and all rewards when they are known; a prompt that fails is marked
        so, with its reason kept."""
        groups = await asyncio.gather(*(self._train_group(prompt) for prompt in prompts))
        if written := [group for group in groups if group is not None]:
            await asyncio.to_thread(_put_rewards, written)

    async def measure(self, prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """The `info` of every sample of every prompt, without training on it (mining, validation).  Raises on engine failure."""
        groups = await asyncio.gather(*(self.group(prompt) for prompt in prompts))
        return [[sample.info for sample in group] for group in groups]

    async def judge_metrics(self) -> dict[str, float]:
        """What the judge says of itself (calls, cost, missing verdicts), summed since the start; empty for a rule."""
        metrics = getattr(self.judge, "metrics", dict)
        return dict(metrics())

    async def take_failures(self) -> list[str]:
        taken, self.failures = self.failures, []
        return taken

    async def _train_group(self, prompt: Prompt) -> Group | None:
        """The group, written and then scored; None when the engine failed."""
        status, group = "finished", None
        try:
            group = await self._with_advantage(prompt)
            await asyncio.to_thread(_put_group, group)
        except Exception as error:  # an engine failure of one prompt must not strand the others; the trainer counts and judges
            self.failures.append(
                f"{prompt.row['extra_info'].get('pair_id')}: {type(error).__name__}: {error}"[:300]
            )
            status, group = "failure", None
        tags = [{"is_prompt": True, "status": status, "global_steps": prompt.step}]
        await asyncio.to_thread(tq.kv_batch_put, keys=[prompt.uid], partition_id="train", tags=tags)
        if group is not None:
            await group.scoring
        return group

    async def _with_advantage(self, prompt: Prompt) -> Group:
        """The first group whose rewards differ, else the last of `1 + prompt.resample`, with a count of what was discarded before.

        The same prompt is asked again, not another: which groups end first is chance, and the sampler's draws must not hang on it.
        """
        passes = chains = 0
        for attempt in range(prompt.resample):
            group = await self._sampled(prompt, attempt)
            await group.scoring
            if len({sample.score for sample in group.samples}) > 1:
                break
            passes += sum((sample.info["outcome"] or 0.0) > 0 for sample in group.samples)
            chains += len(group.samples)
        else:
            group = await self._sampled(
                prompt, prompt.resample
            )  # kept whatever its rewards are, so they are not waited for
        group.discarded = {"discarded_passes": passes, "discarded_chains": chains}
        return group

    async def group(self, prompt: Prompt) -> list[Sample]:
        """All samples of one prompt, scored."""
        group = await self._sampled(prompt)
        await group.scoring
        return group.samples

    async def _sampled(self, prompt: Prompt, attempt: int = 0) -> Group:
        """All samples of one prompt, their scores under way since each ended; each attempt has seeds of its own."""
        ids = self._prompt_ids(prompt)
        numbers = range(attempt * prompt.samples, (attempt + 1) * prompt.samples)
        pairs = await asyncio.gather(*(self._sample(prompt, ids, number) for number in numbers))
        samples = [sample for sample, _ in pairs]
        return Group(
            prompt,
            samples,
            asyncio.create_task(self._score(prompt, samples, [scoring for _, scoring in pairs])),
        )

    async def _score(
        self, prompt: Prompt, samples: Sequence[Sample], scoring: Sequence[asyncio.Task[None]]
    ) -> None:
        await asyncio.gather(*scoring)
        settle(samples, prompt.row, self.weights, self.null_policy)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            list(prompt.row["prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        limit = self.config.data.max_prompt_length
        if len(ids) > limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens and model.max_prompt_tokens={limit}")
        return list(ids)

    async def _sample(self, prompt: Prompt, ids: list[int], number: int) -> tuple[Sample, asyncio.Task[None]]:
        """One chain, and the task that fills in its `info`."""
        limit = self.config.data.max_response_length
        parameters = {
            "temperature": prompt.temperature, "top_p": 1.0, "top_k": -1, "logprobs": True, "detokenize": False,
            "max_tokens": limit, "seed": _seed(prompt, number), "output_kind": _final_only(),
        }  # fmt: skip
        place = min(range(len(self.servers)), key=self.in_flight.__getitem__)
        self.in_flight[place] += 1
        try:
            output = await self.servers[place].generate.remote(
                prompt_ids=ids, sampling_params=parameters, request_id=uuid4().hex
            )
        finally:
            self.in_flight[place] -= 1
        tokens = list(output.token_ids[:limit])
        if not tokens:
            raise RuntimeError(f"the engine returned no tokens (stop reason {output.stop_reason})")
        sample = Sample(
            ids, tokens, list(output.log_probs[:limit]), self.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens[-1] in self.ends, int(output.extra_fields.get("global_steps") or 0),
        )  # fmt: skip
        return sample, asyncio.create_task(self._inform(sample, prompt.row))

    async def _inform(self, sample: Sample, row: Mapping[str, Any]) -> None:
        arguments = (sample, row, self.weights, self.judge)
        if self.judge is None:
            info = scored(*arguments)
        else:
            info = await asyncio.get_running_loop().run_in_executor(self.threads, scored, *arguments)
        sample.info = info | {"length": len(sample.token_ids)}


class Rollout:
    """The samplers behind one call: a thread of this process when `agent.num_workers` is 0, else that many Ray actors."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        self.actors: list[Any] = []
        self.training: list[Any] = []  # what `train` started
        workers = config.actor_rollout_ref.rollout.agent.num_workers
        if workers == 0:
            self.sampler = ChainSampler(config, servers)
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, name="chain-sampler", daemon=True).start()
        else:
            actor = ray.remote(_RemoteSampler)
            self.actors = [
                actor.options(scheduling_strategy="SPREAD").remote(config, servers) for _ in range(workers)
            ]

    def use_rewards(self, spec: RewardSpec) -> None:
        if self.actors:
            ray.get([actor.use_rewards.remote(share_of(spec, len(self.actors))) for actor in self.actors])
        else:
            self.sampler.use_rewards(spec)

    def train(self, prompts: Sequence[Prompt]) -> None:
        """Start sampling and return; results arrive in TransferQueue."""
        self.training = self._start("train", prompts)

    def settled(self) -> None:
        """Wait until the rewards of what `train` started are in TransferQueue."""
        self._wait(self.training)

    def measure(self, prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """One list of infos a prompt, in order."""
        return [group for part in self._wait(self._start("measure", prompts)) for group in part]

    def take_failures(self) -> list[str]:
        if self.actors:
            return [
                line for lines in ray.get([a.take_failures.remote() for a in self.actors]) for line in lines
            ]
        return asyncio.run_coroutine_threadsafe(self.sampler.take_failures(), self.loop).result()

    def judge_metrics(self) -> dict[str, float]:
        """Summed over samplers."""
        if self.actors:
            found = ray.get([a.judge_metrics.remote() for a in self.actors])
        else:
            found = [asyncio.run_coroutine_threadsafe(self.sampler.judge_metrics(), self.loop).result()]
        sums = {
            f"judge/{name}": sum(f.get(name, 0.0) for f in found)
            for name in {name for f in found for name in f}
        }
        if twice := sums.get("judge/judged_twice"):
            sums["judge/repeat_difference"] = sums["judge/judged_twice_difference"] / twice
        return sums

    def _start(self, call: str, prompts: Sequence[Prompt]) -> list[Any]:
        if not self.actors:
            return [asyncio.run_coroutine_threadsafe(getattr(self.sampler, call)(prompts), self.loop)]
        size = -(-len(prompts) // len(self.actors))
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [getattr(actor, call).remote(part) for actor, part in zip(self.actors, parts, strict=False)]

    def _wait(self, started: list[Any]) -> list[Any]:
        return ray.get(started) if self.actors else [future.result() for future in started]


class _RemoteSampler(ChainSampler):
    """`ChainSampler` in a Ray actor: it joins the session's TransferQueue first."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        tq.init()
        super().__init__(config, servers)


def _put_group(group: Group) -> None:
    fields = list_of_dict_to_tensordict([_trajectory(group.prompt, sample) for sample in group.samples])
    tags = [_tag(group.prompt, sample) for sample in group.samples]
    tq.kv_batch_put(keys=group.trajectories, fields=fields, tags=tags, partition_id="train")


def _put_rewards(groups: Sequence[Group]) -> None:
    fields = list_of_dict_to_tensordict(
        [_rewards(group, sample) for group in groups for sample in group.samples]
    )
    tq.kv_batch_put(
        keys=[key for group in groups for key in group.trajectories], fields=fields, partition_id="train"
    )


def _trajectory(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """The fields that verl's trainer and actor read; the end token is inside the mask, rewards are yet to come."""
    prompts = torch.tensor(sample.prompt_ids, dtype=torch.int64)
    responses = torch.tensor(sample.token_ids, dtype=torch.int64)
    mask = torch.ones_like(responses)
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


def _rewards(group: Group, sample: Sample) -> dict[str, Any]:
    """The reward, on the last token, and what is known of it."""
    rewards = torch.zeros(len(sample.token_ids))
    rewards[-1] = sample.score
    order = group.prompt.row["extra_info"].get("order")
    return {
        "rm_scores": rewards,
        "extra_fields": {"reward_extra_info": sample.info, "order": order, **group.discarded},
    }


def _tag(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    prompt_length, length = len(sample.prompt_ids), len(sample.token_ids)
    return {
        "status": "success", "prompt_len": prompt_length, "response_len": length, "seq_len": prompt_length + length,
        "global_steps": prompt.step, "min_global_steps": sample.weights_version, "max_global_steps": sample.weights_version,
    }  # fmt: skip


def _seed(prompt: Prompt, number: int) -> int:
    digest = hashlib.blake2b(
        f"{prompt.seed}/{prompt.step}/{prompt.uid}/{number}".encode(), digest_size=4
    ).digest()
    return int.from_bytes(digest, "big") >> 1


def _end_tokens(tokenizer: Any, path: str) -> set[int]:
    """What vLLM stops at: the tokenizer's end token and those of the generation config."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a checkpoint need not have one
        declared = None
    return ends | set(declared if isinstance(declared, list) else [] if declared is None else [declared])


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY
