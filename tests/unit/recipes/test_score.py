"""Test-time scaling of one question: which scores count, and with what weight."""

import json

import pytest

from eval.studies.scaling_study import Similar
from pgenrm_train.backends.protocols import Generation
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import Example, HistoryItem, Message
from recipes import score
from recipes.wiring import scorer

MINE, THEIRS = (HistoryItem("earlier", "mine", "x"),), (HistoryItem("earlier", "theirs", "x"),)
EXAMPLE = Example("q", "ann", (Message("user", "q"),), ("a", "b"), 0, MINE)
OWN = write_chain("x", [("taste", 100)], [[8], [4]]).replace(
    '"response_1": 8', '"response_1": 2'
)  # declares 2 for 8
OTHER = write_chain("x", [("taste", 100)], [[5], [7]])


def scored(monkeypatch, own=OWN, **settings):
    config = Config(recipe="score")
    config.score.ind, config.score.pro = 2, 1
    for name, value in settings.items():
        setattr(config.model if name == "totals" else config.eval, name, value)
    monkeypatch.setattr(scorer, "similar_users", lambda *_: [Similar("bob", THEIRS)])

    def model(requests, *, temperature):
        for request in requests:
            text = own if "mine" in request.messages[-1]["content"] else OTHER
            yield from (Generation(request.key, sample, text) for sample in range(request.samples))

    _, facts = scorer.Scorer(config, model, chat_messages).score(EXAMPLE)
    return facts


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (2 + 5, 4 + 7)),
        ({"totals": "verified"}, (8 + 5, 4 + 7)),
        ({"totals": "code"}, (8 + 5, 4 + 7)),
        ({"weights": [1.0, 0.5]}, (2 + 2.5, 4 + 3.5)),
        ({"weights": [0.0, 1.0], "totals": "verified"}, (5, 7)),
    ],
)
def test_scores_are_declared_or_verified_and_weighted(monkeypatch, settings, expected):
    facts = scored(monkeypatch, **settings)
    assert tuple(facts["scores"].values()) == expected
    assert facts["own"]["used"] == 2 and facts["similar"] == {
        "used": 1,
        "failures": {},
        "asked": 1,
        "users": ["bob"],
    }


def test_a_chain_without_a_rubric_has_no_verified_score(monkeypatch):
    bare = OWN.replace("taste 100%", "because")
    assert scored(monkeypatch, bare)["scores"] == {"response_1": 7, "response_2": 11}
    with pytest.raises(BackendError, match="unverified: its rubric cannot be read"):
        scored(monkeypatch, bare, totals="verified")


def test_an_answer_that_was_cut_off_names_the_limit(capsys):
    def model(requests, *, temperature):
        yield Generation("0", 0, "", "length")

    config = Config(recipe="score")
    with pytest.raises(BackendError, match="was cut off after 8192 tokens, before its scores; raise model"):
        scorer.Scorer(config, model, chat_messages).score(EXAMPLE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("left_out", "roles"), [([], ["system", "user"]), (["system"], ["user"])])
def test_a_dry_run_shows_the_messages_that_the_server_would_get(left_out, roles, capsys, tmp_path):
    question = tmp_path / "question.json"
    question.write_text('{"user_id": 1, "query": "q", "responses": ["a", "b"], "history": []}')
    config = Config(recipe="score")
    config.score.input, config.score.dry_run = str(question), True
    config.model.kind, config.model.instructions, config.model.leave_out = "endpoint", True, left_out
    assert score.run(config) == 0
    assert [message["role"] for message in json.loads(capsys.readouterr().out)] == roles
