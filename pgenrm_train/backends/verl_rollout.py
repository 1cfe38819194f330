"""Sampling and scoring of chains inside veRL: prompt → group of chains → rewards → TransferQueue.

verl's stock agent loop builds objects and makes several remote calls a *sample*; here a prompt is tokenised once, each of its
samples is one request to a vLLM server, its reward is computed as soon as it is finished (so judge calls overlap generation),
and the group is written with one put.  Requests carry seeds derived from (run, stage, step, place in the batch, sample), so a
resumed run samples the chains that the interrupted one would have sampled.

What a chain earns is `verl_rewards`'.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from verl.utils import hf_tokenizer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from pgenrm_train.backends.verl_rewards import RewardSpec, Sample, load_judge, scored, settle, share_of
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards import RewardWeights


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


class ChainSampler:
    """Samples and scores groups against vLLM servers.  Lives on a thread of the driver or in Ray actors (`Rollout`)."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        self.config, self.servers = config, list(servers)
        self.in_flight = [0] * len(self.servers)
        model = config.actor_rollout_ref.model
        self.tokenizer = hf_tokenizer(model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code)
        self.ends = _end_tokens(self.tokenizer, model.path)
        self.failures: list[str] = []
        self.use_rewards(RewardSpec())

    def use_rewards(self, spec: RewardSpec) -> None:
        self.null_policy = spec.null_policy
        self.weights, self.judge = RewardWeights(**spec.weights), load_judge(spec.judge, spec.judge_kwargs)
        self.threads = ThreadPoolExecutor(max_workers=spec.judge_in_flight, thread_name_prefix="reward")

    async def train(self, prompts: Sequence[Prompt]) -> None:
        """Sample every group and write it to TransferQueue; a prompt that fails is marked so, with its reason kept."""
        await asyncio.gather(*(self._train_group(prompt) for prompt in prompts))

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

    async def _train_group(self, prompt: Prompt) -> None:
        status = "finished"
        try:
            samples, discarded = await self._with_advantage(prompt)
            await asyncio.to_thread(_put_group, prompt, samples, discarded)
        except Exception as error:  # an engine failure of one prompt must not strand the others; the trainer counts and judges
            self.failures.append(f"{prompt.row['extra_info'].get('pair_id')}: {type(error).__name__}: {error}"[:300])
            status = "failure"
        tags = [{"is_prompt": True, "status": status, "global_steps": prompt.step}]
        await asyncio.to_thread(tq.kv_batch_put, keys=[prompt.uid], partition_id="train", tags=tags)

    async def _with_advantage(self, prompt: Prompt) -> tuple[list[Sample], dict[str, int]]:
        """The first group whose rewards differ, else the last of `1 + prompt.resample`, and what was discarded before.

        The same prompt is asked again, not another: which groups end first is chance, and the sampler's draws must not hang on it.
        """
        discarded = {"discarded_passes": 0, "discarded_chains": 0}
        for attempt in range(prompt.resample):
            samples = await self.group(prompt, attempt)
            if len({sample.score for sample in samples}) > 1:
                return samples, discarded
            discarded["discarded_passes"] += sum((sample.info["outcome"] or 0.0) > 0 for sample in samples)
            discarded["discarded_chains"] += len(samples)
        return await self.group(prompt, prompt.resample), discarded

    async def group(self, prompt: Prompt, attempt: int = 0) -> list[Sample]:
        """All samples of one prompt, scored; each attempt has seeds of its own."""
        ids = self._prompt_ids(prompt)
        numbers = range(attempt * prompt.samples, (attempt + 1) * prompt.samples)
        samples = await asyncio.gather(*(self._sample(prompt, ids, number) for number in numbers))
        settle(samples, prompt.row, self.weights, self.null_policy)
        return list(samples)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            list(prompt.row["prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        limit = self.config.data.max_prompt_length
        if len(ids) > limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens and model.max_prompt_tokens={limit}")
        return list(ids)

    async def _sample(self, prompt: Prompt, ids: list[int], number: int) -> Sample:
        limit = self.config.data.max_response_length
        parameters = {
            "temperature": prompt.temperature, "top_p": 1.0, "top_k": -1, "logprobs": True, "detokenize": False,
            "max_tokens": limit, "seed": _seed(prompt, number), "output_kind": _final_only(),
        }  # fmt: skip
        place = min(range(len(self.servers)), key=self.in_flight.__getitem__)
        self.in_flight[place] += 1
        try:
            output = await self.servers[place].generate.remote(prompt_ids=ids, sampling_params=parameters, request_id=uuid4().hex)
        finally:
            self.in_flight[place] -= 1
        tokens = list(output.token_ids[:limit])
        if not tokens:
            raise RuntimeError(f"the engine returned no tokens (stop reason {output.stop_reason})")
        sample = Sample(
            ids, tokens, list(output.log_probs[:limit]), self.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens[-1] in self.ends, int(output.extra_fields.get("global_steps") or 0),
        )  # fmt: skip
        sample.info = await self._info(sample, prompt.row) | {"length": len(tokens)}
        return sample

    async def _info(self, sample: Sample, row: Mapping[str, Any]) -> dict[str, Any]:
        arguments = (sample, row, self.weights, self.judge)
        if self.judge is None:
            return scored(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.threads, scored, *arguments)


class Rollout:
    """The samplers behind one call: a thread of this process when `agent.num_workers` is 0, else that many Ray actors."""

    def __init__(self, config: Any, servers: Sequence[Any]) -> None:
        self.actors = []
        workers = config.actor_rollout_ref.rollout.agent.num_workers
        if workers == 0:
            self.sampler = ChainSampler(config, servers)
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, name="chain-sampler", daemon=True).start()
        else:
            actor = ray.remote(_RemoteSampler)
            self.actors = [actor.options(scheduling_strategy="SPREAD").remote(config, servers) for _ in range(workers)]

    def use_rewards(self, spec: RewardSpec) -> None:
        if self.actors:
            ray.get([actor.use_rewards.remote(share_of(spec, len(self.actors))) for actor in self.actors])
        else:
            self.sampler.use_rewards(spec)

    def train(self, prompts: Sequence[Prompt]) -> None:
        """Start sampling and return; results arrive in TransferQueue."""
        self._start("train", prompts)

    def measure(self, prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """One list of infos a prompt, in order."""
        return [group for part in self._wait(self._start("measure", prompts)) for group in part]

    def take_failures(self) -> list[str]:
        if self.actors:
            return [line for lines in ray.get([a.take_failures.remote() for a in self.actors]) for line in lines]
        return asyncio.run_coroutine_threadsafe(self.sampler.take_failures(), self.loop).result()

    def judge_metrics(self) -> dict[str, float]:
        """Summed over samplers."""
        if self.actors:
            found = ray.get([a.judge_metrics.remote() for a in self.actors])
        else:
            found = [asyncio.run_coroutine_threadsafe(self.sampler.judge_metrics(), self.loop).result()]
        sums = {f"judge/{name}": sum(f.get(name, 0.0) for f in found) for name in {name for f in found for name in f}}
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


def _put_group(prompt: Prompt, samples: Sequence[Sample], discarded: Mapping[str, int]) -> None:
    keys = [f"{prompt.uid}_{number}_0" for number in range(len(samples))]
    fields = list_of_dict_to_tensordict([_trajectory(prompt, sample, discarded) for sample in samples])
    tags = [_tag(prompt, sample) for sample in samples]
    tq.kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id="train")


def _trajectory(prompt: Prompt, sample: Sample, discarded: Mapping[str, int]) -> dict[str, Any]:
    """The fields that verl's trainer and actor read; the reward sits on the last token, the end token is inside the mask."""
    prompts = torch.tensor(sample.prompt_ids, dtype=torch.int64)
    responses = torch.tensor(sample.token_ids, dtype=torch.int64)
    mask = torch.ones_like(responses)
    rewards = torch.zeros(len(responses), dtype=torch.float32)
    rewards[-1] = sample.score
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
        "rm_scores": rewards,
        "num_turns": 2,
        "multi_modal_inputs": {},
        "extra_fields": {"reward_extra_info": sample.info, "order": prompt.row["extra_info"].get("order"), **discarded},
    }


def _tag(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    prompt_length, length = len(sample.prompt_ids), len(sample.token_ids)
    return {
        "status": "success", "prompt_len": prompt_length, "response_len": length, "seq_len": prompt_length + length,
        "global_steps": prompt.step, "min_global_steps": sample.weights_version, "max_global_steps": sample.weights_version,
    }  # fmt: skip


def _seed(prompt: Prompt, number: int) -> int:
    digest = hashlib.blake2b(f"{prompt.seed}/{prompt.step}/{prompt.uid}/{number}".encode(), digest_size=4).digest()
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
