"""Several vLLM engines on Ray give the answers of one; a lost engine is an error."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_builders.sources.personaworld import build
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.backends.vllm.engine import VllmGenerator
from pgenrm_train.backends.vllm.replicas import VllmReplicas, _Engine, local_engines
from pgenrm_train.config import ROOT, Config, DataConfig, load
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import MaskedView, present
from pgenrm_train.prompts.messages import chat_messages

NANO = ROOT / "tests" / "data" / "psi_nano"
Load = Callable[[Path], Generator]


@pytest.fixture(scope="module")
def config() -> Config:
    return load(
        "recipe=evaluate", "model=nano", "data=personaworld", "cluster.engines=2", "eval.max_in_flight=32"
    )


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    pairs = list(build(DataConfig(users=8, heldout_users=2, pairs_per_user=10), seed=0))
    history = HistorySampler(pairs, size=3, policy="random")
    views = [present(pair, history(pair), 0) for pair in pairs[:80]]
    chats = [
        tuple(chat_messages(MaskedView(v.context, v.history, v.responses), instructions=False)) for v in views
    ]
    return [GenerationRequest(f"{n}", chat, samples=1 + n % 2, seed=n) for n, chat in enumerate(chats)]


@pytest.fixture(scope="module")
def load_checkpoint(config: Config) -> Iterator[Load]:
    with local_engines(config) as load_checkpoint:
        yield load_checkpoint


@pytest.fixture
def replicas(load_checkpoint: Load) -> Iterator[Generator]:
    generator = load_checkpoint(NANO)
    yield generator
    generator.close()


def test_two_engines_answer_what_one_does(
    config: Config, requests: list[GenerationRequest], replicas: Generator
) -> None:
    shared = _by_sample(replicas(iter(requests), temperature=0.7))
    alone = VllmGenerator(config, NANO)
    expected = _by_sample(alone(iter(requests), temperature=0.7))
    alone.close()
    assert shared.keys() == expected.keys() and len(shared) == sum(r.samples for r in requests)
    same = sum(shared[key].text == expected[key].text for key in shared)
    assert same >= 0.9 * len(shared), "another batch size rounds differently, and rarely draws another token"


def test_the_next_checkpoint_takes_the_place_of_the_last(
    requests: list[GenerationRequest], load_checkpoint: Load, tmp_path: Path
) -> None:
    shutil.copytree(NANO, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(
        {name: torch.zeros_like(w) for name, w in weights.items()},
        tmp_path / "other" / "model.safetensors",
        {"format": "pt"},
    )
    for checkpoint, ends in ((tmp_path / "other", False), (NANO, True)):
        generator = load_checkpoint(checkpoint)
        ended = [answer.failure is None for answer in generator(iter(requests), temperature=0.7)]
        generator.close()
        assert (np.mean(ended) > 0.9) == ends, "weights of zero seldom end within the limit; trained ones do"


def test_an_engine_steps_while_the_next_requests_are_not_there_yet(
    config: Config, requests: list[GenerationRequest], replicas: Generator
) -> None:
    """Each block comes ten steps after the one before: an engine that waits for it would make none."""
    from ray.util.queue import Queue

    engine, queue, steps = _Engine(config), Queue(actor_options={"num_cpus": 0}), list[int]()
    engine.load(str(NANO))
    core = engine._generator._llm.llm_engine
    step = core.step
    core.step = lambda: steps.append(1) or step()

    def feed() -> list[int]:
        between = []
        for first in (0, 4, 8):
            queue.put(requests[first : first + 4])
            before, end = len(steps), time.monotonic() + 60
            while len(steps) < before + 10 and time.monotonic() < end:
                time.sleep(0.01)
            between.append(len(steps) - before)
        queue.put(None)
        return between

    with ThreadPoolExecutor(1) as pool:
        feeding = pool.submit(feed)
        answers = [answer for block in engine.run(queue, 0.7) for answer in block]
        assert min(feeding.result()) >= 10
    engine.unload()
    assert len(answers) == sum(request.samples for request in requests[:12])


def test_an_error_in_a_prompt_reaches_the_caller(
    requests: list[GenerationRequest], replicas: Generator
) -> None:
    def broken() -> Iterator[GenerationRequest]:
        yield from requests[:20]
        raise KeyError("no such user")

    answered: list[Generation] = []
    with pytest.raises(KeyError, match="no such user"):
        answered.extend(replicas(broken(), temperature=0.7))


def test_a_lost_engine_is_an_error_after_the_finished_answers(
    requests: list[GenerationRequest], load_checkpoint: Load
) -> None:
    import ray

    replicas = load_checkpoint(NANO)
    assert isinstance(replicas, VllmReplicas)
    many = [replace(request, key=f"{n}/{request.key}") for n in range(20) for request in requests]
    answers = replicas(iter(many), temperature=0.7)
    next(answers)
    ray.kill(replicas._engines[0])
    with pytest.raises(BackendError, match=r"a vLLM engine failed .*repeat the command"):
        list(answers)


def test_several_nodes_need_an_address() -> None:
    config = load("recipe=evaluate", "model=llama31_8b", "cluster=multi_node", "data=personaworld")
    with (
        local_engines(config) as load_checkpoint,
        pytest.raises(ConfigError, match=r"cluster.nodes=4 needs ray.address="),
    ):
        load_checkpoint(NANO)


def _by_sample(answers: Iterator[Generation]) -> dict[tuple[str, int], Generation]:
    return {(answer.key, answer.sample): answer for answer in answers}
