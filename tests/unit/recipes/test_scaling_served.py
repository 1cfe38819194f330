"""Test-time scaling of a model behind an API, over real HTTP.

Similar users' chains come from the served model, and a dead server loses nothing.
"""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
from llm_server import completion, serve
from prompt_sections import split_prompt

from eval.ask.harness import PredictionStore, ask
from eval.studies.scaling_study import Similar, Study, cells, sample_pool
from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair

PAIRS = [
    PreferencePair(f"p{i}", f"u{i % 4}", (Message("user", f"q{i}"),), f"good {i}", f"bad {i}")
    for i in range(12)
]
HISTORIES = {p.pair_id: (HistoryItem("earlier", "mine", "other"),) for p in PAIRS}
STUDY = Study("scaling", (4,), (3,))
SAMPLES = len(PAIRS) * 2 * (4 + 3)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAIT_SECONDS", 0.02)


def chains(body, _number=0):
    """Own chains prefer the bad response, similar users' the good one by more: n changes the verdict."""
    sections = dict(split_prompt(body["messages"][-1]["content"]))
    good, bad = (9, 2) if sections["<chosen>"] == "theirs" else (4, 5)
    scores = [[good if sections[f"<response_{i}>"].startswith("good") else bad] for i in (1, 2)]
    texts = [
        write_chain(f"likes it {body['seed'] + i}", [("taste", 100)], scores) for i in range(body.get("n", 1))
    ]
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"content": text}} for i, text in enumerate(texts)
    ]
    return {"completion": completion("") | {"choices": choices}}


def pool_of(server, folder) -> pd.DataFrame:
    settings = EndpointConfig(
        kind="endpoint", base_url=server.url, name="served-name", max_in_flight=8, attempts=2, give_up_after=4
    )
    generator = EndpointGenerator(Endpoint(settings))

    def answer(questions):
        return ask(
            questions,
            lambda: generator,
            chat_messages,
            PredictionStore(folder, "m"),
            masking="masked",
            temperature=0.7,
            progress=lambda items, *_: items,
            what="test",
        )

    def find(analyses, users, n):
        return [
            [Similar(f"other{rank}", (HistoryItem("theirs", "theirs", "x"),)) for rank in range(n)]
            for _ in users
        ]

    try:
        return sample_pool(STUDY, PAIRS, HISTORIES, answer, find)
    finally:
        generator.close()


def by_sample(pool: pd.DataFrame) -> list[tuple]:
    columns = ["pair_id", "order", "source", "sample", "neighbour", "score_chosen", "score_rejected", "text"]
    return sorted(pool[columns].fillna("").itertuples(index=False, name=None))


def test_similar_users_chains_come_from_the_served_model_and_count(tmp_path):
    with serve(chains) as server:
        pool = pool_of(server, tmp_path)
    assert {body["model"] for body in server.bodies} == {"served-name"}
    assert pool["failure"].isna().all() and Counter(pool["source"]) == {"ind": 96, "pro": 72}
    config = Config(recipe="evaluate")
    config.eval.draws = 20
    assert cells(pool, Study("scaling", (4,), (0,)), config)[0]["accuracy"] == 0.0
    assert cells(pool, STUDY, config)[0]["accuracy"] == 1.0


@pytest.mark.parametrize("answered", [5, 60], ids=["among own samples", "among similar users"])
def test_a_server_that_dies_half_way_loses_nothing(tmp_path, answered):
    with serve(chains) as healthy:
        expected = pool_of(healthy, tmp_path / "whole")
    mortal = serve(lambda body, number: chains(body) if number < answered else {"reset": True})
    with mortal as dying, pytest.raises(BackendError, match="the same command continues from there"):
        pool_of(dying, tmp_path / "broken")
    with serve(chains) as again:
        pool = pool_of(again, tmp_path / "broken")
    asked = sum(body.get("n", 1) for body in again.bodies)
    kept = sum(body.get("n", 1) for body in dying.bodies[:answered])
    assert asked == SAMPLES - kept, "only missing samples are requested"
    assert by_sample(pool) == by_sample(expected)
